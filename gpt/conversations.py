"""Conversations and preferences as records: the common shapes of them recognized, checked, and as canonical JSON.

It knows no tokenizer and no template. What comes out is plain JSON values under OpenAI's names, whatever came in.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from gpt.formats import BadRecord

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
SHAPES = "messages, conversations, prompt with completion, or instruction with output"
MAX_LEVELS = 64  # of lists and objects in one another: how many Python can follow depends on who asks
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each {role, content} and what else it has of `reasoning_content`, `tool_calls`, `tool_call_id`
    and `name`; and the tools that may be called, as JSON schemas."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last answer alone, of which the first is preferred."""

    chosen: Conversation
    rejected: Conversation

    @property
    def prompt(self) -> Conversation:
        """What both answer: all up to the last message that is not of an answer."""
        return Conversation(_asked(self.chosen.messages), self.chosen.tools)


# Records to conversations


def parse(record: Any) -> Conversation:
    """The conversation of a record: OpenAI's messages, ShareGPT's conversations, prompt and completion, or an instruction.

    Raises BadRecord in words for another shape, an unknown role, an empty turn, or no turn of an assistant.
    """
    fields = _object(record)
    if (turns := _given(fields, "messages", "conversations")) is not None:
        messages = _messages(turns)
    elif "prompt" in fields and "completion" in fields:
        messages = [*_said(fields["prompt"], "user", "prompt"), *_said(fields["completion"], "assistant", "completion")]
    elif "instruction" in fields and "output" in fields:
        messages = [_turn("user", _instruction(fields)), _turn("assistant", _text(fields["output"], "output"))]
    elif "chosen" in fields and "rejected" in fields:
        raise BadRecord(
            "it has chosen and rejected, which make a pair; its input needs preference: true, not chat: true"
        )
    else:
        raise BadRecord(f"no conversation; it has {_names(fields)}; expected {SHAPES}")
    return _checked([*_system(fields, messages), *messages], _tools(fields))


def parse_pair(record: Any) -> Pair:
    """The pair of a record: chosen and rejected, which are whole conversations, or answers to what `prompt` (or `messages`
    or `conversations`) holds; texts, single messages or lists of them.

    Raises BadRecord in words as `parse` does, and for answers that are equal or prompts that are not.
    """
    fields = _object(record)
    if "chosen" not in fields or "rejected" not in fields:
        raise BadRecord(f"no pair; it has {_names(fields)}; expected prompt, chosen and rejected")
    tools = _tools(fields)
    asked = _given(fields, "prompt", "messages", "conversations")
    prompt = [] if asked is None else _said(asked, "user", "prompt")
    whole = []
    for name in ("chosen", "rejected"):
        try:
            messages = _answered(prompt, fields[name], name)
            whole.append(_checked([*_system(fields, messages), *messages], tools))
        except BadRecord as error:
            raise BadRecord(f"{name}: {error}") from None
    chosen, rejected = whole
    if chosen == rejected:
        raise BadRecord("chosen and rejected are equal: there is nothing to prefer")
    ours, theirs = (_asked(each.messages) for each in whole)
    if ours != theirs:
        n = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ours, theirs, strict=False)))
        raise BadRecord(
            f"chosen and rejected differ from message {n + 1} on, before the last answer: prompts must be equal"
        )
    return Pair(chosen, rejected)


def _answered(prompt: Sequence[Message], answer: Any, name: str) -> list[Message]:
    """The conversation that `answer` ends, or is."""
    messages = _said(answer, "assistant", name)
    if messages and messages[0]["role"] in ("assistant", "tool"):
        if not prompt:
            raise BadRecord(
                "an answer, and no prompt before it; expected a field prompt, or messages from the first on"
            )
        return [*prompt, *messages]
    if not any(message["role"] == "system" for message in messages):
        messages = [*(message for message in prompt if message["role"] == "system"), *messages]
    asked = _asked(messages)
    if any(message not in asked for message in prompt):
        raise BadRecord("it is a whole conversation, and the record's prompt is not in it: prompts must be equal")
    return messages


def _asked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages before the last answer, which calls of tools and their results are a part of."""
    n = len(messages)
    while n and messages[n - 1]["role"] in ("assistant", "tool"):
        n -= 1
    return tuple(messages[:n])


def _object(record: Any) -> Mapping[str, Any]:
    """The fields that are not null, as a column of a table is where a record has none."""
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected a JSON object with {SHAPES}, got {_type(record)}")
    return {name: value for name, value in record.items() if value is not None}


def _given(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if name in fields), None)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(fields)[:20])) or "no field"


def _type(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"field '{what}' is {_type(value)}, expected text")
    return value


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _instruction(fields: Mapping[str, Any]) -> str:
    """An instruction and, behind a blank line, its input, if there is one."""
    given = _text(fields.get("input", ""), "input")
    return _text(fields["instruction"], "instruction") + (f"\n\n{given}" if given.strip() else "")


def _system(fields: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """The system message of a record that keeps it beside the conversation."""
    text = _text(fields.get("system", ""), "system")
    if not text.strip() or (messages and messages[0]["role"] == "system"):
        return []
    return [_turn("system", text)]


def _said(value: Any, role: str, what: str) -> list[Message]:
    """A text of `role`, a message, or a list of messages."""
    if isinstance(value, str):
        return [_turn(role, value)]
    if isinstance(value, Mapping):
        return _messages([value])
    if isinstance(value, list):
        return _messages(value)
    raise BadRecord(f"field '{what}' is {_type(value)}, expected text or a list of messages")


# Messages


def _messages(turns: Any) -> list[Message]:
    if not isinstance(turns, list):
        raise BadRecord(f"the messages are {_type(turns)}, expected a list")
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(_message(turn))
        except BadRecord as error:
            raise BadRecord(f"message {number}: {error}") from None
    return messages


def _message(turn: Any) -> Message:
    """A message under OpenAI's names, without what no template can show."""
    if not isinstance(turn, Mapping):
        raise BadRecord(f"it is {_type(turn)}, expected an object with role and content")
    named = _given(turn, "role", "from")
    role = ALIASES.get(named, named) if isinstance(named, str) else named
    if role not in ROLES:
        got = "it has no role" if named is None else f"role {named!r} is unknown"
        also = " and ".join(f"'{name}' for {known}" for name, known in ALIASES.items())
        raise BadRecord(f"{got}; expected {', '.join(ROLES)} (or {also})")
    if turn.get("weight") == 0 and role == "assistant":
        raise BadRecord("weight 0 asks that this turn is not trained, and every turn of an assistant is; leave it out")
    message = _turn(role, _content(_given(turn, "content", "value")))
    for name in ("reasoning_content", "name", "tool_call_id"):
        if turn.get(name):
            message[name] = _text(turn[name], name)
    if calls := turn.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise BadRecord(f"tool_calls of {role}, which are {_type(calls)}; expected a list, of an assistant")
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _content(value: Any) -> str:
    """A text, of parts or whole; nothing is the empty text."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise BadRecord(f"its content is {_type(value)}, expected text")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else _type(part)
        if kind != "text":
            raise BadRecord(f"a part of its content is of type {kind!r}, and only text is trained on")
        texts.append(_text(part.get("text"), "text"))
    return "".join(texts)


def _call(call: Any) -> Message:
    """A call of a function, its arguments as an object: templates write those of a text as a text in quotes."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRecord("a tool call has no name; expected {function: {name, arguments}}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise BadRecord(f"the arguments of tool call {function['name']!r} are no JSON object")
    _check_levels(arguments, f"the arguments of tool call {function['name']!r}")
    seal = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**seal, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    """The tools of a record: a list of JSON schemas, or its text."""
    tools = fields.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError):
            raise BadRecord("field 'tools' is text, and no JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRecord("field 'tools' is no list of objects")
    _check_levels(tools, "field 'tools'")
    return tuple(tools)


def _check_levels(value: Any, what: str) -> None:
    """BadRecord for values that are nested more deeply than anything that is meant."""

    def deeper(value: Any, levels: int) -> bool:
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        return levels < 0 or any(deeper(each, levels - 1) for each in inside if isinstance(each, Mapping | list))

    if deeper(value, MAX_LEVELS):
        raise BadRecord(f"{what}: nested more than {MAX_LEVELS} levels deep")


def _checked(messages: Sequence[Message], tools: tuple[Message, ...]) -> Conversation:
    if not messages:
        raise BadRecord("a conversation without a message")
    for number, message in enumerate(messages, 1):
        # A tool may have nothing to say.
        if message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRecord(f"message {number} ({message['role']}) is empty")
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecord("no turn of an assistant: nothing would be learned")
    return Conversation(tuple(messages), tools)


# As text


def dump(what: Conversation | Pair) -> str:
    """The canonical JSON of it, which `load` reads. Equal ones have equal texts."""
    if isinstance(what, Pair):
        return _compact({"chosen": _plain(what.chosen), "rejected": _plain(what.rejected)})
    return _compact(_plain(what))


def load(text: str) -> Conversation | Pair:
    """What `dump` wrote."""
    values = json.loads(text)
    if "chosen" in values:
        return Pair(_conversation(values["chosen"]), _conversation(values["rejected"]))
    return _conversation(values)


def _plain(what: Conversation) -> dict[str, Any]:
    return {"messages": what.messages} | ({"tools": what.tools} if what.tools else {})


def _conversation(values: Mapping[str, Any]) -> Conversation:
    return Conversation(tuple(values["messages"]), tuple(values.get("tools", ())))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))  # in the order given: templates show it


def composed(text: str) -> str:
    """A conversation or pair as JSON with all that is said in Unicode's composed form (NFC): the strings, not their escapes."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return unicodedata.normalize("NFC", value)
        if isinstance(value, list):
            return [of(each) for each in value]
        return {name: of(each) for name, each in value.items()} if isinstance(value, dict) else value

    return _compact(of(json.loads(text)))


def plain(what: Conversation | Pair, *, roles: bool = False) -> str:
    """All that is said in it: what is counted as its text. With `roles`, which templates write before what they say, it
    is what a vocabulary is learned from."""
    first = what.chosen if isinstance(what, Pair) else what
    tools, messages = [_compact(tool) for tool in first.tools], first.messages
    if isinstance(what, Pair):
        messages += what.rejected.messages[len(what.prompt.messages) :]
    each = (f"{message['role']}\n{_spoken(message)}" if roles else _spoken(message) for message in messages)
    return "\n".join([*tools, *each])


def n_bytes(what: Conversation | Pair) -> int:
    """UTF-8 bytes of all that is said in it; in a pair, of both conversations."""
    both = (what.chosen, what.rejected) if isinstance(what, Pair) else (what,)
    return sum(len(plain(each).encode()) for each in both)


def _spoken(message: Message) -> str:
    calls = [_compact(call["function"]) for call in message.get("tool_calls", ())]
    return "\n".join(text for text in (message.get("reasoning_content", ""), message["content"], *calls) if text)
