"""The text of a record: of a field, of several by a template, of a list of token ids, or a conversation as JSON.

Records are plain JSON values.
"""

import json
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, Literal

from gpt import conversations
from gpt.formats import BadRecord, no_field

DEFAULT_FIELD = "text"
Spoken = Literal["chat", "pair"]  # what a record is as a whole, if it is no text
BORDER = "\x1e"  # a record separator: between a prompt and what is learned behind it


def picker(
    field: str | None,
    template: str | None,
    ids: str | None,
    prompt: str | None = None,
    spoken: Spoken | None = None,
) -> Callable[[Any], str]:
    """What makes a text of an object with fields; at most one of the first three ways is named. It raises BadRecord.

    With `prompt` the text of that field and BORDER stand before it; then neither may hold BORDER. With `spoken` the whole
    record is a conversation, or a pair of them, and its text is the canonical JSON of it.
    """
    if spoken is not None:
        parse = conversations.parse if spoken == "chat" else conversations.parse_pair
        return lambda record: conversations.dump(parse(record))
    if prompt is not None:
        return _prompted(prompt, picker(field, template, ids))
    if template is not None:
        parts = template_keys(template)
        return lambda record: "".join(
            literal + ("" if key is None else _as_text(_value(record, key), key, numbers=True))
            for literal, key in parts
        )
    if ids is not None:
        return lambda record: _as_ids(_value(record, ids), ids)
    name = field or DEFAULT_FIELD

    def pick(record: Any) -> str:
        if type(record) is dict:  # the usual case, quickly
            text = record.get(name)
            if type(text) is str:
                return text
        return _as_text(_value(record, name), name, numbers=False)

    return pick


def _prompted(prompt: str, learned: Callable[[Any], str]) -> Callable[[Any], str]:
    """A text of two parts; nothing where nothing would be learned."""

    def pick(record: Any) -> str:
        parts = _as_text(_value(record, prompt), prompt, numbers=False), learned(record)
        if any(BORDER in part for part in parts):
            raise BadRecord("the character U+001E, which marks here where a prompt ends; take it out of the text")
        return BORDER.join(parts) if parts[1] else ""

    return pick


def segments(text: str) -> list[tuple[str, bool]]:
    """(text, whether it is learned) of the parts of a text with BORDER: prompt and answer, and again."""
    return [(part, i % 2 == 1) for i, part in enumerate(text.split(BORDER))]


def _value(record: Any, field: str) -> Any:
    """The value of a field: of that name, or by the dots in it."""
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected a JSON object with a field '{field}', got {_type(record)}")
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise _no_field(field, record)
        value = value[name]
    return value


def _no_field(field: str, record: Mapping[str, Any]) -> BadRecord:
    error = no_field(field, record)
    if "rejected" in record:
        return BadRecord(f"{error}; for pairs of answers set preference: true (--preference)")
    if "messages" in record or "conversations" in record:
        return BadRecord(f"{error}; for conversations set chat: true (--chat)")
    return error


def _as_text(value: Any, field: str, *, numbers: bool) -> str:
    """A text; a list of texts joined by line feeds; nothing is the empty text."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list):
        return "\n".join(_as_text(each, field, numbers=numbers) for each in value)
    if numbers and isinstance(value, (int, float)):
        return json.dumps(value)
    raise BadRecord(f"field '{field}' is {_type(value)}, expected text or a list of texts")


def _as_ids(value: Any, field: str) -> str:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        wrong = next((e for e in value if type(e) is not int or e < 0), None) if isinstance(value, list) else value
        raise BadRecord(f"field '{field}' holds {_shown(wrong)}, expected a list of ids, which are integers from 0 on")
    return " ".join(map(str, value))


def _type(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def template_keys(template: str) -> list[tuple[str, str | None]]:
    """(literal text, field behind it) of each part of a template; ValueError for more than plain fields in braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ and }}}} for braces") from None
    for _, key, spec, conversion in parts:
        if key is not None and (spec or conversion or not re.fullmatch(r"[^\s\[\]!:{}]+", key)):
            raise ValueError(f"template {template!r}: expected the name of a field in braces, as in {{title}}")
    if all(key is None for _, key, _, _ in parts):
        raise ValueError(f"template {template!r} names no field, as {{title}} does: every document would be the same")
    return [(literal, key) for literal, key, _, _ in parts]


def columns(
    field: str | None,
    template: str | None,
    ids: str | None,
    prompt: str | None = None,
    spoken: Spoken | None = None,
) -> frozenset[str]:
    """The fields that a text is made of; none named are all."""
    if spoken is not None:
        return frozenset()
    if prompt is not None:
        return columns(field, template, ids) | {prompt}
    if template is not None:
        return frozenset(key for _, key in template_keys(template) if key is not None)
    return frozenset({ids or field or DEFAULT_FIELD})
