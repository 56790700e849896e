"""Whatever shape a conversation comes in, it is the same messages; what is no conversation is refused in words."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import conversations
from gpt.conversations import Conversation, Pair, parse, parse_pair
from gpt.formats import BadRecord

ASKED, TOLD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": [2]}}}
DEEP = json.loads('{"a":[' * 400 + "1" + "]}" * 400)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, TOLD], "id": 7},
        {"messages": [{**ASKED, "timestamp": 3}, {**TOLD, "tool_calls": None, "weight": 1}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                TOLD,
            ]
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"prompt": "Hi", "completion": "Ho"},
        {"prompt": [ASKED], "completion": [TOLD]},
        {"instruction": "Hi", "input": "", "output": "Ho"},
        {"instruction": "Hi", "output": "Ho", "input": None},
        {"messages": None, "prompt": "Hi", "completion": "Ho"},
    ],
)
def test_every_shape_of_a_conversation_is_the_same_messages(record: dict[str, Any]) -> None:
    assert parse(record) == Conversation((ASKED, TOLD))


def test_an_instruction_is_followed_by_its_input_behind_a_blank_line() -> None:
    said = parse({"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be brief."})
    assert said.messages == (SYSTEM, {"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"})


def test_a_system_text_beside_the_messages_is_the_first_of_them() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert parse({"system": "Be brief.", "conversations": turns}).messages == (SYSTEM, ASKED, TOLD)
    assert parse({"system": "", "conversations": turns}).messages == (ASKED, TOLD)
    within = [{"from": "system", "value": "Be brief."}, *turns]
    assert parse({"system": "another", "conversations": within}).messages == (SYSTEM, ASKED, TOLD)


@pytest.mark.parametrize("arguments", [{"b": 1, "a": [2]}, '{"b": 1, "a": [2]}'])
@pytest.mark.parametrize("flat", [False, True])
def test_calls_of_tools_are_objects_whose_arguments_keep_their_order(arguments: object, flat: bool) -> None:
    function = {"name": "f", "arguments": arguments}
    call = function if flat else {"type": "function", "id": "c1", "function": function}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    said = parse(
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I call."},
                {"role": "tool", "tool_call_id": "c1", "name": "f", "content": ""},
                TOLD,
            ],
            "tools": json.dumps([tool]) if flat else [tool],
        }
    )
    assert said.tools == (tool,) and [message["role"] for message in said.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert said.messages[1]["tool_calls"] == [CALL if flat else {"id": "c1", **CALL}]
    assert list(said.messages[1]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
    assert said.messages[1]["reasoning_content"] == "I call." and said.messages[2]["tool_call_id"] == "c1"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [ASKED, {"role": "narrator", "content": "x"}]}, "role 'narrator' is unknown; expected system, user"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "'human' for user and 'gpt' for assistant"),
        ({"messages": [{"content": "x"}]}, "message 1: it has no role"),
        ({"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, "message 2 (assistant) is empty"),
        ({"messages": [{"role": "user"}, TOLD]}, "message 1 (user) is empty"),
        ({"messages": [ASKED]}, "no turn of an assistant"),
        ({"messages": []}, "without a message"),
        ({"messages": "Hi"}, "the messages are str, expected a list"),
        ({"messages": [ASKED, "Ho"]}, "message 2: it is str"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TOLD]}, "of type 'image_url', and only text"),
        ({"messages": [ASKED, {**TOLD, "weight": 0}]}, "weight 0"),
        ({"messages": [ASKED, {**TOLD, "tool_calls": [{"function": {}}]}]}, "a tool call has no name"),
        ({"messages": [ASKED, {**TOLD, "tool_calls": [{"name": "f", "arguments": "x"}]}]}, "'f' are no JSON object"),
        ({"messages": [{**ASKED, "tool_calls": [CALL]}, TOLD]}, "tool_calls of user"),
        ({"messages": [ASKED, TOLD], "tools": "x"}, "'tools' is text, and no JSON"),
        ({"messages": [ASKED, TOLD], "tools": {}}, None),
        ({"messages": [ASKED, TOLD], "tools": [1]}, "'tools' is no list of objects"),
        ({"messages": [ASKED, TOLD], "tools": [DEEP]}, "field 'tools': nested more than 64 levels deep"),
        ({"messages": [ASKED, {**TOLD, "tool_calls": [{"name": "f", "arguments": DEEP}]}]}, "'f': nested more than 64 levels"),
        ({"prompt": 5, "completion": "x"}, "field 'prompt' is int"),
        ({"instruction": "x", "output": 5}, "field 'output' is int"),
        ({"text": "x"}, "no conversation; it has 'text'; expected messages, conversations"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference: true"),
        (["Hi"], "got list"),
        (None, "got nothing"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_in_words(record: Any, words: str | None) -> None:
    if words is None:
        assert parse(record).tools == ()
        return
    with pytest.raises(BadRecord) as caught:
        parse(record)
    assert words in str(caught.value)


WORSE = {"role": "assistant", "content": "Huh"}
PAIR = Pair(Conversation((ASKED, TOLD)), Conversation((ASKED, WORSE)))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Ho", "rejected": "Huh"},
        {"prompt": [ASKED], "chosen": [TOLD], "rejected": [WORSE]},
        {"prompt": "Hi", "chosen": [ASKED, TOLD], "rejected": [ASKED, WORSE]},
        {"chosen": [ASKED, TOLD], "rejected": [ASKED, WORSE]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Ho"},
            "rejected": WORSE,
        },
    ],
)
def test_every_shape_of_a_pair_is_the_same_conversations(record: dict[str, Any]) -> None:
    assert parse_pair(record) == PAIR
    assert parse_pair(record).prompt == Conversation((ASKED,))


def test_an_answer_of_a_pair_may_call_tools_first() -> None:
    called = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, TOLD]
    pair = parse_pair({"system": "Be brief.", "prompt": [ASKED, TOLD, ASKED], "chosen": called, "rejected": "Huh"})
    assert pair.prompt.messages == (SYSTEM, ASKED, TOLD, ASKED)
    assert pair.chosen.messages == (*pair.prompt.messages, *called)


def test_a_system_message_of_the_prompt_stands_before_whole_conversations_without_one() -> None:
    pair = parse_pair({"prompt": [SYSTEM, ASKED], "chosen": [ASKED, TOLD], "rejected": [ASKED, WORSE]})
    assert pair.prompt.messages == (SYSTEM, ASKED)
    other = {"role": "system", "content": "Be long."}
    with pytest.raises(BadRecord, match="prompts must be equal"):
        parse_pair({"prompt": [SYSTEM, ASKED], "chosen": [other, ASKED, TOLD], "rejected": [other, ASKED, WORSE]})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "Ho"}, "equal: there is nothing to prefer"),
        ({"chosen": [ASKED, TOLD], "rejected": [SYSTEM, ASKED, WORSE]}, "from message 1 on, before the last answer: prompts must"),
        ({"chosen": [ASKED, TOLD, ASKED, TOLD], "rejected": [ASKED, WORSE, ASKED, TOLD]}, "from message 2 on"),
        ({"chosen": [ASKED, TOLD], "rejected": [ASKED, TOLD, ASKED, TOLD]}, "prompts must be equal"),
        ({"prompt": "Hello", "chosen": [ASKED, TOLD], "rejected": [ASKED, WORSE]}, "chosen: it is a whole conversation, and the"),
        ({"chosen": "Ho", "rejected": "Huh"}, "chosen: an answer, and no prompt before it"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": ""}, "rejected: message 2 (assistant) is empty"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": [{"role": "x"}]}, "rejected: message 1: role 'x' is unknown"),
        ({"prompt": "Hi", "chosen": "Ho"}, "no pair; it has 'prompt', 'chosen'"),
    ],
)  # fmt: skip
def test_pairs_that_are_equal_or_unequal_in_prompt_are_refused(record: Any, words: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_pair(record)
    assert words in str(caught.value)


said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": said})
talks = st.lists(turns, min_size=1, max_size=5).map(lambda messages: parse({"messages": [*messages, TOLD]}))


@given(talks)
def test_canonical_json_is_read_back_and_equal_conversations_have_equal_texts(talk: Conversation) -> None:
    text = conversations.dump(talk)
    assert conversations.load(text) == talk and conversations.dump(parse(json.loads(text))) == text
    pair = Pair(talk, Conversation((*talk.messages[:-1], WORSE)))
    assert conversations.load(conversations.dump(pair)) == pair


def test_what_is_said_is_counted_and_a_vocabulary_learns_from_it_with_the_roles() -> None:
    talk = parse(
        {"messages": [ASKED, {**TOLD, "reasoning_content": "Hm", "tool_calls": [CALL]}], "tools": [{"name": "f"}]}
    )
    assert conversations.plain(talk) == '{"name":"f"}\nHi\nHm\nHo\n{"name":"f","arguments":{"b":1,"a":[2]}}'
    assert conversations.plain(PAIR, roles=True) == "user\nHi\nassistant\nHo\nassistant\nHuh"
    assert conversations.n_bytes(PAIR) == len("Hi\nHo") + len("Hi\nHuh")
