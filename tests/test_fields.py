"""The text of a record: what fields, templates and lists of ids make of it, and what is refused in words."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import fields
from gpt.formats import BadRecord

RECORD = {
    "text": "t",
    "title": "T",
    "lines": ["a", "b"],
    "a": {"b": {"c": "deep"}},
    "x.y": "flat",
    "x": {"y": "no"},
    "n": 3,
}


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ({}, "t"),
        ({"field": "title"}, "T"),
        ({"field": "lines"}, "a\nb"),
        ({"field": "a.b.c"}, "deep"),
        ({"field": "x.y"}, "flat"),
        ({"template": "{title}\n{lines}"}, "T\na\nb"),
        ({"template": "{{{n}}} {a.b.c}"}, "{3} deep"),
    ],
)
def test_a_text_is_made_of_fields(way: dict[str, str], text: str) -> None:
    asked = {"field": None, "template": None, "ids": None} | way
    assert fields.picker(**asked)(RECORD) == text
    names = fields.columns(**asked)
    assert {name if name in RECORD else name.partition(".")[0] for name in names} <= RECORD.keys()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"body": "x"}, "no field 'text'; it has 'body'; name one with field"),
        ({}, "it has none"),
        ({f"field{i}": i for i in range(30)}, "'field19' and 10 more"),
        ({"text": 5}, "field 'text' is int, expected text or a list of texts"),
        ({"text": ["a", {}]}, "field 'text' is dict"),
        (["text"], "expected a JSON object with a field 'text', got list"),
        (None, "got nothing"),
    ],
)
def test_a_record_without_such_a_text_is_bad(record: Any, words: str) -> None:
    with pytest.raises(BadRecord) as caught:
        fields.picker(None, None, None)(record)
    assert words in str(caught.value)


@given(st.lists(st.integers(0, 10**12)))
def test_ids_are_read_back_from_their_text(ids: list[int]) -> None:
    assert [int(word) for word in fields.picker(None, None, "ids")({"ids": ids}).split()] == ids


@pytest.mark.parametrize("value", [[1, -1], [1.0], [True], "1 2", 5, None, [[1]]])
def test_what_is_no_list_of_ids_is_bad(value: Any) -> None:
    with pytest.raises(BadRecord, match="expected a list of ids, which are integers from 0 on"):
        fields.picker(None, None, "ids")({"ids": value})


@given(st.lists(st.tuples(st.text(max_size=5), st.sampled_from(["a", "b.c", "床"])), min_size=1))
def test_a_template_is_its_literal_text_and_its_fields(parts: list[tuple[str, str]]) -> None:
    template = "".join(literal.replace("{", "{{").replace("}", "}}") + f"{{{key}}}" for literal, key in parts)
    record = {"a": "A", "b": {"c": "C"}, "床": "B"}
    values = {"a": "A", "b.c": "C", "床": "B"}
    assert fields.picker(None, template, None)(record) == "".join(literal + values[key] for literal, key in parts)
    assert fields.columns(None, template, None) == {key for _, key in parts}


@pytest.mark.parametrize(
    "template", ["{}", "{a!r}", "{a:>9}", "{a[b]}", "{a", "a}", "no field", "{0.__class__[x]}", "{a b}"]
)
def test_a_template_is_refused_unless_it_names_plain_fields(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        fields.template_keys(template)


def test_a_template_reaches_no_attribute() -> None:
    with pytest.raises(BadRecord, match=r"no field 'text\.__class__'"):
        fields.picker(None, "{text.__class__}", None)({"text": "x"})


def test_a_prompt_stands_before_the_text_and_only_the_text_is_learned() -> None:
    pick = fields.picker("answer", None, None, "question")
    text = pick({"question": "1 + 1 = ", "answer": "2"})
    assert fields.segments(text) == [("1 + 1 = ", False), ("2", True)]
    assert fields.segments(pick({"question": "", "answer": "2"})) == [("", False), ("2", True)]
    assert pick({"question": "why?", "answer": ""}) == "", "nothing to learn is an empty document"
    assert fields.columns("answer", None, None, "question") == {"answer", "question"}
    template = fields.picker(None, "{a}, {b}", None, "q")
    assert fields.segments(template({"a": "x", "b": 3, "q": ["u", "v"]})) == [("u\nv", False), ("x, 3", True)]
    for record in ({"question": "a\x1eb", "answer": "2"}, {"question": "a", "answer": "\x1e"}):
        with pytest.raises(BadRecord, match=r"U\+001E"):
            pick(record)
    with pytest.raises(BadRecord, match="'question'"):
        pick({"answer": "2"})


TALK = {"instruction": "Hi", "output": "Ho", "id": 3}


def test_a_conversation_is_its_canonical_json() -> None:
    pick = fields.picker(None, None, None, spoken="chat")
    assert pick(TALK) == '{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Ho"}]}'
    assert fields.picker(None, None, None, spoken="pair")(
        {"prompt": "Hi", "chosen": "Ho", "rejected": "Hu"}
    ).startswith('{"chosen":{"messages":[')
    assert fields.columns(None, None, None, spoken="chat") == frozenset(), "every column of a table"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": []}, "no field 'text'.*for conversations set chat: true"),
        ({"conversations": []}, "--chat"),
        ({"chosen": [], "rejected": []}, "for pairs of answers set preference: true"),
    ],
)
def test_who_reads_conversations_as_text_is_told_what_to_set(record: Any, words: str) -> None:
    with pytest.raises(BadRecord, match=words):
        fields.picker(None, None, None)(record)
