"""Conversations as ids: as transformers renders their template, text that stays text, the mask, what is dropped."""

import importlib.util
import io
import json
import random
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from templates import FAMILIES
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from gpt import chat
from gpt import tokenizer as tokenizers
from gpt.chat import TRAINING_TIME, drop_oldest, encode, reply_ends
from gpt.conversations import Conversation
from gpt.tokenizer import CHATML, Tokenizer

TEXT = (
    "user assistant system tool\n\n how are you?\n well, thanks. be brief [INST] x [/INST] [1, 2]!\n <|user|>\n<|assistant|>\n"
    " <<SYS>>\n x <</SYS>> <|im_end|> <|im_start|>床前 (x)\n\n  y.\n . <tool_call>{'name': 'f', \"arguments\"} </think> Today"
)
WORDS = [
    "the river ",
    "床前",
    "\n",
    " ",
    "  hi",
    '{"x": 1}',
    "<b>",
    "ß̈é",
    "🙂\u200d",
    "\n\n",
    "123",
    "end.",
    "<think>",
    "[x]",
]
THOUGHT = "<think>\nhm\n</think>\n\nyes"
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d <b> 床", "parameters": {"type": "object", "properties": {"x": {}}}},
}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def talk(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(messages, tools)


SYSTEM, ASK, REPLY = said("system", "be brief"), said("user", "how are you?"), said("assistant", "well, thanks")
AGAIN, ANSWER = said("user", "[1, 2]!"), said("assistant", "床前 (x)\n\n  y.")


def generated(seed: int, *, tools: bool = True) -> Conversation:
    """A conversation of one to four exchanges, with a system message or none, tools, thoughts, and space anywhere."""
    draw = random.Random(seed)

    def text() -> str:
        words = "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6)))
        words = words if words.strip() else words + "z"  # a turn without a word is no turn
        return words + draw.choice(["", "z", THOUGHT]) if draw.random() < 0.9 else THOUGHT + words + "z"

    messages = [said("system", draw.choice([text(), text() + "/no_think", "/think", text()]))] * (draw.random() < 0.5)
    for _ in range(draw.randint(1, 4)):
        messages.append(said("user", text()))
        for _ in range(draw.choice([0, 0, 1, 2]) if tools else 0):
            more = {"reasoning_content": text()} if draw.random() < 0.5 else {}
            content = draw.choice(["", text()])
            messages.append(said("assistant", content, tool_calls=[call(x=text(), n=3)], **more))
            messages.append(said("tool", text()))
        messages.append(said("assistant", text(), **({"reasoning_content": text()} if draw.random() < 0.3 else {})))
    return talk(*messages, tools=(TOOL,) if tools and draw.random() < 0.7 else ())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT * 9], "bpe", 340)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece's kind, whose texts begin with a mark of their own."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 9), model_writer=file, model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=5,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(file.getvalue())
    return Tokenizer.load(path)


def made_for(
    tokenizer: Tokenizer, template: str | None, controls: list[str], others: list[str] | None = None, **flags: bool
) -> Tokenizer:
    """The tokenizer with more control tokens (and other added ones) and a template, as an imported one has them."""
    raw = json.loads(json.dumps(tokenizer.raw))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False} | flags
    new = [(name, True) for name in controls if name not in tokenizer.vocab] + [(name, False) for name in others or []]
    raw["added_tokens"] += [
        {"id": tokenizer.size + i, "content": name, "special": special, **plain}
        for i, (name, special) in enumerate(new)
    ]
    names = {name: tokenizer.config[name] for name in ("bos_token", "eos_token", "pad_token")}
    return Tokenizer(raw, names | ({"chat_template": template} if template else {}))


def family(tokenizer: Tokenizer, name: str) -> Tokenizer:
    template, controls, others = FAMILIES[name]
    return made_for(tokenizer, template, [*controls, "<|im_start|>", "<|im_end|>"], others)


def rendered(tokenizer: Tokenizer, conversation: Conversation, *, reply: bool) -> list[int]:
    """What transformers makes of the tokenizer's own template."""
    names = {name: tokenizer.config[name] for name in ("bos_token", "eos_token", "pad_token")}
    backend = Backend.from_str(json.dumps(tokenizer.raw))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **names)
    return theirs.apply_chat_template(
        list(conversation.messages), list(conversation.tools) or None, add_generation_prompt=reply, return_dict=False
    )


def trained(tokenizer: Tokenizer, conversation: Conversation) -> list[list[int]]:
    """The ids of each run of tokens that are trained on."""
    runs: list[list[int]] = []
    before = False
    for token, now in zip(*encode(tokenizer, conversation), strict=True):
        if now:
            runs[-1:] = [*runs[-1:], [token]] if not before else [[*runs[-1], token]]
        before = now
    return runs


# The ids of transformers


@pytest.mark.parametrize("name", ["qwen3", "llama3", "llama3 with tools", "smollm3"])
def test_two_hundred_conversations_have_the_ids_of_their_template(tokenizer: Tokenizer, name: str) -> None:
    made = family(tokenizer, name)
    n_same = 0
    for seed in range(200):
        conversation = generated(seed, tools=name != "llama3")
        for reply in (False, True):
            try:
                expected = rendered(made, conversation, reply=reply)
            except Exception:  # the template refuses it: several calls at once
                with pytest.raises(ValueError, match="the chat template"):
                    encode(made, conversation, reply=reply)
                continue
            assert encode(made, conversation, reply=reply, now=datetime.now()).ids == expected, seed
            n_same += 1
    assert n_same >= 390


TALKS = [(ASK,), (SYSTEM, ASK), (ASK, REPLY, AGAIN), (SYSTEM, ASK, REPLY, AGAIN), (SYSTEM, ASK, REPLY, AGAIN, ANSWER)]


@pytest.mark.parametrize("messages", TALKS, ids=len)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["tokenizer", "pieces"])
def test_every_family_has_the_ids_of_its_template_in_every_kind_of_vocabulary(
    request: pytest.FixtureRequest, kind: str, name: str, messages: tuple[dict[str, Any], ...]
) -> None:
    made = family(request.getfixturevalue(kind), name)
    for reply in (False, True):
        # Without a reply there must be one to train on in a conversation that ends with a question: none is asked for.
        assert encode(made, talk(*messages), reply=reply, now=datetime.now()).ids == rendered(
            made, talk(*messages), reply=reply
        )


def published() -> list[Any]:
    """The templates that come with trl, where it is installed."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin or "").parent / "chat_templates" if spec else Path("nowhere")
    return [pytest.param(file, id=file.stem) for file in sorted(folder.glob("*.jinja"))]


@pytest.mark.parametrize("file", published())
def test_published_templates_have_the_ids_that_transformers_gives_them(tokenizer: Tokenizer, file: Path) -> None:
    template = file.read_text(encoding="utf-8")
    controls = set(re.findall(r"<[|｜][^<>{}'|｜\s]+[|｜]>|\[/?[A-Z_]+\]|<(?:start|end)_of_\w+>", template))
    made = made_for(tokenizer, template, sorted(controls), ["<think>", "</think>"])
    n_same, n_refused = 0, 0
    for seed in range(24):
        conversation = generated(seed, tools=seed % 2 == 0)
        for reply in (False, True):
            try:
                expected = rendered(made, conversation, reply=reply)
            except Exception:  # by the template itself: it wants other messages
                expected = None
            try:
                got = encode(made, conversation, reply=reply, now=datetime.now()).ids
            except ValueError as error:
                assert expected is None or (not reply and re.search("for certain|ends a reply with no", str(error))), (
                    error
                )
                n_refused += 1
                continue
            assert got == expected
            n_same += 1
    assert n_same or n_refused == 48


def test_a_control_token_that_takes_the_space_beside_it_takes_it(tokenizer: Tokenizer) -> None:
    template, controls, _ = FAMILIES["phi"]
    made = made_for(tokenizer, template, controls, rstrip=True, lstrip=True)
    conversation = talk(said("user", "  hi \n "), said("assistant", "\n\n yes  "))
    assert encode(made, conversation).ids == rendered(made, conversation, reply=False)


def test_the_first_of_several_templates_by_name_is_the_default_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": FAMILIES["olmo2"][0]}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert Tokenizer.load(tmp_path).chat_template == FAMILIES["olmo2"][0]


def test_a_template_in_a_file_of_its_own_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "chat_template"})
    )
    (tmp_path / "chat_template.jinja").write_text(FAMILIES["olmo2"][0])
    assert Tokenizer.load(tmp_path).chat_template == FAMILIES["olmo2"][0]


# Our own


def test_a_tokenizer_of_our_own_has_chatml_after_its_start_token(tokenizer: Tokenizer) -> None:
    start, end = (tokenizer.vocab[name] for name in ("<|im_start|>", "<|im_end|>"))
    expected, text = [tokenizer.start_id], tokenizer.encode
    for message in (SYSTEM, ASK, REPLY):
        expected += [start, *text(f"{message['role']}\n"), *text(message["content"]), end, *text("\n")]
    assert encode(tokenizer, talk(SYSTEM, ASK, REPLY)).ids == expected
    assert reply_ends(tokenizer) == {end, tokenizer.end_id}


def test_our_own_template_goes_along_and_transformers_reads_the_same_ids_from_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for seed in range(100):
        conversation = generated(seed)
        for reply in (False, True):
            ids = theirs.apply_chat_template(
                list(conversation.messages),
                list(conversation.tools) or None,
                add_generation_prompt=reply,
                return_dict=False,
            )
            assert ids == encode(tokenizer, conversation, reply=reply).ids


def test_our_template_shows_tools_calls_and_thoughts(tokenizer: Tokenizer) -> None:
    asked = said("assistant", "", tool_calls=[call(x="床")], reasoning_content="hm")
    conversation = talk(SYSTEM, ASK, asked, said("tool", "5"), ANSWER, tools=(TOOL,))
    text = tokenizer.decode(encode(tokenizer, conversation).ids)
    assert text.startswith(
        'system\nbe brief\n\nTools, as JSON schemas, one a line:\n{"type": "function", "function": {'
    )
    called = '<think>hm</think>\n<tool_call>{"name": "f", "arguments": {"x": "床"}}</tool_call>'
    assert f"assistant\n{called}\ntool\n5\nassistant\n" in text
    assert [tokenizer.decode(run) for run in trained(tokenizer, conversation)] == [called, ANSWER["content"]]


def test_a_tokenizer_that_came_before_its_template_is_given_it(tokenizer: Tokenizer) -> None:
    old = made_for(tokenizer, None, [])
    assert old.chat_template is None and tokenizer.chat_template == CHATML
    assert encode(old, talk(SYSTEM, ASK, REPLY)) == encode(tokenizer, talk(SYSTEM, ASK, REPLY))
    assert old.sha256 == tokenizer.sha256 and list(old.files()) == list(tokenizer.files())


# Text stays text


FRAGMENTS = [
    "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|endoftext|>", "<|im_", "end|>", "<|", "|>", "<", ">", "im_end", "user",
    "/think", "/no_think", "/system_override", " ", "\n", "<|im_/thinkend|>", "<|im_/no_thinkend|>", "[INST]", "[/INST]",
    "<|assistant|>", "<|end|>", "<|return|>", "<|user", "assistant|>", "</s>", "x", "\U000f0000", "\U000f0001", "\U000f0003",
]  # fmt: skip
evil = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
@given(texts=st.tuples(evil, evil, evil, evil))
def test_no_text_becomes_a_control_token(name: str, texts: tuple[str, str, str, str]) -> None:
    made = EVIL_FAMILIES[name]

    def controls_of(system: str, asked: str, answer: str, name: str) -> list[int]:
        """Of a conversation with these texts everywhere, as keys and names too."""
        tool = {
            "type": "function",
            "function": {"name": name, "description": asked, "parameters": {name: {name: answer}}},
        }
        calls = [{"type": "function", "function": {"name": name, "arguments": {name: asked}}}]
        with_calls = name_of_family in ("qwen3", "llama3 with tools", "smollm3")
        answered = [said("assistant", "x" + answer, tool_calls=calls), said("tool", asked)] if with_calls else []
        messages = [said("user", "x" + asked + "x"), *answered, said("assistant", "x" + answer + "x")]
        conversation = talk(said("system", "x" + system), *messages, tools=(tool,) if with_calls else ())
        return [token for token in encode(made, conversation).ids if token in made.control_ids - {made.unknown_id}]

    name_of_family = name
    plain = controls_of("x", "x", "x", "x")
    # A system message may ask for another rendering by words that are no control tokens.
    modes = [controls_of(f"{mode}x", "x", "x", "x") for mode in ("/think", "/no_think", "/system_override")]
    assert controls_of(*texts) in [plain, *modes]


EVIL_FAMILIES = {
    name: family(tokenizers.train([TEXT * 2], "bpe", 300), name) for name in FAMILIES
}  # made once, and not in each of hypothesis's tries


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["tokenizer", "pieces"])
def test_control_words_in_a_message_come_back_as_text(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    made = family(request.getfixturevalue(kind), name)
    words = "a".join(sorted(made.piece(token) for token in made.control_ids - {made.unknown_id}))
    ids, _ = encode(made, talk(said("user", words), said("assistant", words)))
    assert made.decode(ids).count(words) == 2


def test_characters_that_mark_control_tokens_are_text_in_a_message(tokenizer: Tokenizer) -> None:
    private = "".join(map(chr, range(0xF0000, 0xF0040)))
    conversation = talk(said("user", private), REPLY)
    ids, mask = encode(tokenizer, conversation)
    assert private in tokenizer.decode(ids) and ids == rendered(tokenizer, conversation, reply=False)
    assert tokenizer.decode([token for token, now in zip(ids, mask, strict=True) if now]) == REPLY["content"]
    every = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    with pytest.raises(ValueError, match="uses all of Unicode's private characters"):
        encode(tokenizer, talk(said("user", every)))


def test_characters_that_a_template_holds_itself_do_not_make_marks_of_those_in_a_message(tokenizer: Tokenizer) -> None:
    made = made_for(tokenizer, CHATML + "{# " + "".join(map(chr, range(0xF0000, 0xF0040))) + " #}", [])
    private = chr(0xF0040) + "".join(map(chr, range(0xF0042, 0xF0090)))
    ids = encode(made, talk(said("user", private), REPLY)).ids
    assert private in made.decode(ids)
    assert [i for i in ids if i in made.control_ids] == [
        i for i in encode(made, talk(ASK, REPLY)).ids if i in made.control_ids
    ]


# What is trained on


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["tokenizer", "pieces"])
def test_only_what_the_assistant_says_is_trained_its_end_included(
    request: pytest.FixtureRequest, kind: str, name: str
) -> None:
    made = family(request.getfixturevalue(kind), name)
    runs = trained(made, talk(SYSTEM, ASK, REPLY, AGAIN, ANSWER))
    assert len(runs) == 2
    for run, message in zip(runs, (REPLY, ANSWER), strict=True):
        written = made.decode(run).replace(" ", "").replace("<think>\n\n</think>\n\n", "").removeprefix("final")
        assert written == message["content"].replace(" ", "")
        assert run[-1] in made.control_ids
    assert runs[-1][-1] in reply_ends(made)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("content", [REPLY["content"], " well", "!?\n", "x"])
def test_a_reply_continues_into_the_ids_it_is_trained_on(tokenizer: Tokenizer, name: str, content: str) -> None:
    made = family(tokenizer, name)
    asked = encode(made, talk(ASK), reply=True)
    ids, mask = encode(made, talk(ASK, said("assistant", content)))
    n = len(asked.ids)
    assert ids[:n] == asked.ids
    assert not any(asked.mask) and not any(mask[:n]) and mask[n]


def test_what_a_reply_begins_with_may_join_the_token_before_it_as_in_transformers(tokenizer: Tokenizer) -> None:
    conversation = talk(ASK, said("assistant", "\n well"))
    ids, mask = encode(tokenizer, conversation)
    assert ids == rendered(tokenizer, conversation, reply=False)
    assert tokenizer.decode([token for token, now in zip(ids, mask, strict=True) if now]) in ("\n well", "\n\n well")


def test_thoughts_of_earlier_turns_are_left_out_and_what_is_left_is_trained(tokenizer: Tokenizer) -> None:
    made = family(tokenizer, "qwen3")
    first, last = said("assistant", "one", reasoning_content="hm"), said("assistant", "two", reasoning_content="so")
    runs = [made.decode(run) for run in trained(made, talk(ASK, first, AGAIN, last))]
    assert runs == ["one", "<think>\nso\n</think>\n\ntwo"]


def test_calls_of_tools_are_trained_and_their_results_are_not(tokenizer: Tokenizer) -> None:
    made = family(tokenizer, "qwen3")
    calling = said("assistant", "", tool_calls=[call(x=1)])
    runs = trained(made, talk(ASK, calling, said("tool", "5"), REPLY, tools=(TOOL,)))
    assert [made.decode(run) for run in runs] == [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        "<think>\n\n</think>\n\n" + REPLY["content"],
    ]
    assert all(run[-1] == made.vocab["<|im_end|>"] for run in runs)


def test_an_end_behind_the_whole_conversation_is_not_the_replys(tokenizer: Tokenizer) -> None:
    made = family(tokenizer, "phi")
    ends = [run[-1] for run in trained(made, talk(ASK, REPLY, AGAIN, ANSWER))]
    assert ends == [made.vocab["<|end|>"]] * 2
    assert reply_ends(made) == {made.vocab["<|end|>"], made.end_id}


def test_a_reply_in_parts_is_trained_to_its_last_end(tokenizer: Tokenizer) -> None:
    made = family(tokenizer, "channels")
    thinking = said("assistant", "two", reasoning_content="so")
    runs = trained(made, talk(ASK, REPLY, AGAIN, thinking))
    assert [run[-1] for run in runs] == [made.vocab["<|end|>"], made.vocab["<|return|>"]]
    assert runs[1].count(made.vocab["<|end|>"]) == 1


def test_with_a_reply_opened_nothing_is_trained(tokenizer: Tokenizer) -> None:
    assert not any(encode(tokenizer, talk(ASK, REPLY, AGAIN), reply=True).mask)


def test_a_template_that_rewrites_what_came_before_is_refused_for_training_alone(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages[-3:] %}{{ '<|im_start|>' + m.role + '\\n' + m.content | upper + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    made = made_for(tokenizer, template, [])
    conversation = talk(ASK, REPLY, AGAIN, ANSWER)
    with pytest.raises(ValueError, match=r"message 2 \(assistant\) cannot be found for certain .* train on shorter"):
        encode(made, conversation)
    assert encode(made, conversation, reply=True).ids == rendered(made, conversation, reply=True)


# What is refused


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused_by_name(tokenizer: Tokenizer) -> None:
    made = made_for(tokenizer, FAMILIES["llama3"][0], [])
    words = (
        r"ends a reply with no control token .* names <\|end_header_id\|>, <\|eot_id\|>, <\|start_header_id\|>, which"
    )
    for use in (reply_ends, lambda made: encode(made, talk(ASK, REPLY))):
        with pytest.raises(ValueError, match=words):
            use(made)


def test_without_a_template_and_its_tokens_there_is_no_chat(pieces: Tokenizer) -> None:
    for use in (reply_ends, lambda made: encode(made, talk(ASK)), lambda made: drop_oldest(made, talk(ASK, REPLY), 5)):
        with pytest.raises(
            ValueError, match=r"no chat template, and not the tokens .* control tokens are </s>, <s>, <unk>"
        ):
            use(pieces)


def test_what_the_template_refuses_is_refused_in_its_words(tokenizer: Tokenizer) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    made = made_for(tokenizer, template + FAMILIES["plain chatml"][0], [])
    assert encode(made, talk(ASK, REPLY)).ids
    with pytest.raises(ValueError, match="refuses this conversation: System role not supported"):
        encode(made, talk(SYSTEM, ASK, REPLY))


def test_training_data_does_not_depend_on_the_day(tokenizer: Tokenizer) -> None:
    made = family(tokenizer, "smollm3")
    conversation = talk(ASK, REPLY)
    assert f"Today: {TRAINING_TIME:%d %B %Y}" in made.decode(encode(made, conversation).ids)
    assert "Today: 03 May 2031" in made.decode(encode(made, conversation, reply=True, now=datetime(2031, 5, 3)).ids)


# What is dropped


def test_the_oldest_exchanges_go_and_the_system_message_stays(tokenizer: Tokenizer) -> None:
    pairs = [said(role, f"{role} {i}") for i in range(5) for role in ("user", "assistant")]
    whole = talk(SYSTEM, *pairs, ASK, tools=(TOOL,))
    size = len(encode(tokenizer, whole, reply=True).ids)
    assert drop_oldest(tokenizer, whole, size) == whole
    assert drop_oldest(tokenizer, whole, size - 1) == talk(SYSTEM, *whole.messages[3:], tools=(TOOL,))
    assert drop_oldest(tokenizer, whole, 1) == talk(SYSTEM, ASK, tools=(TOOL,))


def test_without_a_system_message_the_last_one_still_stays(tokenizer: Tokenizer) -> None:
    assert drop_oldest(tokenizer, talk(ASK, REPLY, ASK), 1) == talk(ASK)


def test_a_template_is_compiled_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(tokenizer, talk(ASK, REPLY))
    monkeypatch.setattr(chat, "Template", None)
    assert encode(tokenizer, talk(ASK, ANSWER)).ids
