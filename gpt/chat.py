"""Conversations as tokens, by the chat template that a tokenizer brings, with the mask of what is trained.

Control tokens come from the template alone: no text of a message, of a tool or of a call can become one, whatever it holds.
It neither samples nor prints.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from gpt.conversations import ROLES, Conversation, Message
from gpt.template import FIRST_MARK, LAST_MARK, Template
from gpt.tokenizer import CHATML, IM_END, IM_START, Tokenizer

# What a template that asks for the date is told when training data is written, so that it is the same on every day.
TRAINING_TIME = datetime(2025, 1, 1)
# What a template is tried on.
ASKED, TOLD = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALLING = Conversation((ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}), (TOOL,))
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
LOOKS_LIKE_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|\[/?[A-Z_]{3,30}\]|</?s>|<(?:start|end)_of_\w{1,20}>")


class Encoded(NamedTuple):
    """A conversation as ids, and for each whether it is trained on: what the assistant writes and what ends it."""

    ids: list[int]
    mask: list[bool]


class Speech(NamedTuple):
    """A tokenizer's chat template, ready to be rendered, and what its marks stand for."""

    template: Template
    ids: Mapping[str, int]  # mark -> id of its control token
    pieces: re.Pattern[str]  # splits a rendering at its marks
    strips: Mapping[str, tuple[bool, bool]]  # mark -> whether it takes the space before and after it
    inner: Tokenizer  # for text that follows a control token
    n_after: int  # marks behind a conversation that end no reply


class _Turn(NamedTuple):
    """Where a turn of the assistant stands in a rendering: what it writes, up to and with the mark that ends it."""

    begin: int
    end: int


def encode(
    tokenizer: Tokenizer, conversation: Conversation, *, reply: bool = False, now: datetime = TRAINING_TIME
) -> Encoded:
    """Return the ids that the tokenizer's chat template makes of a conversation, and which of them are trained on.

    They are those of transformers' `apply_chat_template` wherever no text holds a control string. With `reply` the opening
    of the assistant's next message follows, for a model to continue, and nothing is trained on. `now` is what a template
    is told that asks for the date. Reasoning is rendered as the template has it: many leave it out of earlier turns.

    ValueError in words if the tokenizer has no template or not its control tokens, if the template refuses the
    conversation, misbehaves, or (without `reply`) renders it so that the assistant's turns cannot be found for certain.
    """
    speech, rendering = _render(tokenizer, conversation, now)
    text = rendering(len(conversation.messages), reply)
    turns = [] if reply else _turns(tokenizer, speech, conversation, text, rendering)
    return _tokens(tokenizer, speech, text, turns)


def reply_ends(tokenizer: Tokenizer) -> set[int]:
    """The ids that end an assistant's reply, or its call of a tool; ValueError in words if no control token does."""
    ends = {tokenizer.end_id, _end_of_reply(tokenizer, Conversation((ASKED, TOLD)))}
    with suppress(ValueError):  # many templates know no tools
        ends.add(_end_of_reply(tokenizer, CALLING))
    return ends


def drop_oldest(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int, *, now: datetime = TRAINING_TIME
) -> Conversation:
    """Return the newest messages that, with a reply opened, are at most `max_tokens` tokens.

    Whole exchanges go, oldest first, so that the rest begins with the user; the system message and the last one stay.
    """
    messages = conversation.messages
    n_system = int(bool(messages) and messages[0]["role"] == "system")
    system, rest = messages[:n_system], list(messages[n_system:])

    def kept() -> Conversation:
        return Conversation((*system, *rest), conversation.tools)

    while len(rest) > 1 and len(encode(tokenizer, kept(), reply=True, now=now).ids) > max_tokens:
        del rest[0]
        while len(rest) > 1 and rest[0]["role"] != "user":
            del rest[0]
    return kept()


# The template of a tokenizer


def _source(tokenizer: Tokenizer) -> str:
    """The tokenizer's template; ChatML where it has none, and the tokens of ChatML."""
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    control = {tokenizer.piece(token) for token in tokenizer.control_ids}
    if not control.issuperset((IM_START, IM_END)):
        shown = ", ".join(sorted(control)[:12]) or "none"
        raise ValueError(
            f"this tokenizer has no chat template, and not the tokens {IM_START} and {IM_END} of the one used without; its"
            f" control tokens are {shown}. Add them (prepare --add-tokens), or take a tokenizer that was made for chats"
        )
    return CHATML


@lru_cache(maxsize=16)
def _speech(tokenizer: Tokenizer, first_mark: int) -> Speech:
    control = {tokenizer.piece(token): token for token in sorted(tokenizer.control_ids)}
    names = {name: str(tokenizer.config[name]) for name in NAMES if name in tokenizer.config}
    template = Template(_source(tokenizer), control, names, ROLES, first_mark)
    marks = template.marks
    spaces = {token["content"]: (token["lstrip"], token["rstrip"]) for token in tokenizer.raw["added_tokens"]}
    pieces = re.compile(f"([{''.join(marks.values())}])" if marks else "(?!)")
    return Speech(
        template,
        {mark: control[name] for name, mark in marks.items()},
        pieces,
        {mark: spaces[name] for name, mark in marks.items() if any(spaces[name])},
        _inner(tokenizer),
        _n_after(template, pieces),
    )


def _inner(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for text inside of a larger one, where SentencePiece's rule puts its mark before the first alone."""
    rules = json.dumps(tokenizer.raw.get("pre_tokenizer"))
    if '"prepend_scheme": "first"' not in rules:
        return tokenizer
    never = json.loads(rules.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
    return Tokenizer({**tokenizer.raw, "pre_tokenizer": never}, tokenizer.config)


def _render(tokenizer: Tokenizer, conversation: Conversation, now: datetime) -> tuple[Speech, "_Rendering"]:
    """The template, its marks chosen so that no text of the conversation has one, and what renders its beginnings."""
    messages = [_plain(message) for message in conversation.messages]
    texts = json.dumps([messages, conversation.tools], ensure_ascii=False)
    speech = _speech(tokenizer, FIRST_MARK)
    if speech.pieces.search(texts):
        used, n = {*texts, *_source(tokenizer)}, len(speech.ids)  # a template's marks avoid what it holds itself
        starts = range(FIRST_MARK, LAST_MARK - 2 * n, n)
        free = (start for start in starts if used.isdisjoint(map(chr, range(start, start + 2 * n))))
        first = next(free, None)
        if first is None:
            raise ValueError(
                "a conversation uses all of Unicode's private characters, of which chats need some; leave it out"
            )
        speech = _speech(tokenizer, first)
    return speech, _Rendering(speech.template, messages, conversation.tools, now, len(texts))


class _Rendering(NamedTuple):
    template: Template
    messages: Sequence[Message]
    tools: Sequence[Message]
    now: datetime
    n_characters: int

    def __call__(self, n_messages: int, reply: bool) -> str:
        """The text of the first messages."""
        return self.template.render(
            self.messages[:n_messages], self.tools, reply=reply, now=self.now, n_characters=self.n_characters
        )


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect one: nothing that is null, and reasoning under both of its names."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = plain.get("reasoning_content")
    return plain if reasoning is None else {"thinking": reasoning, **plain}


# What is trained on


def _turns(
    tokenizer: Tokenizer, speech: Speech, conversation: Conversation, text: str, rendering: _Rendering
) -> list[_Turn]:
    """Where the assistant's turns stand in `text`, the rendering of the whole.

    A turn begins where the template would have a model begin it: behind the messages before it, rendered with a reply
    opened. It ends with the control token that is last when it is itself the last. Both must be found in the whole, where
    earlier messages may be rendered otherwise (their reasoning left out); what is not found for certain is refused.
    """
    turns: list[_Turn] = []
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        opened = rendering(i, True)
        closed = text if i + 1 == len(conversation.messages) else rendering(i + 1, False)
        last = _last(tokenizer, speech, opened, closed, _said(message))
        begin = _begin(speech, opened, text, _said(message))
        end = None if begin is None or last is None else _end(speech, closed, last, text, begin)
        if begin is None or end is None or (turns and begin < turns[-1].end):
            raise ValueError(
                f"message {i + 1} (assistant) cannot be found for certain in what the chat template makes of the whole"
                " conversation, as it renders earlier messages otherwise when others follow; train on shorter conversations,"
                " or with another template (tokenizer_config.json's chat_template)"
            )
        turns.append(_Turn(begin, end))
    return turns


def _marks(speech: Speech, text: str) -> list[int]:
    return [found.start() for found in speech.pieces.finditer(text)]


def _begin(speech: Speech, opened: str, text: str, said: str) -> int | None:
    """Where in `text` the reply begins that `opened` opens, and which holds what is `said`; None if that is not certain."""
    if text.startswith(opened):
        return len(opened)
    ours, theirs = _marks(speech, opened), _marks(speech, text)
    # What stands before the last control token may differ, as where the system message moves to the last user's, if the
    # control tokens are the same and the reply stands there.
    n = len(ours)
    last, place = (ours[-1] + 1, theirs[n - 1] + 1) if n and len(theirs) >= n else (0, 0)
    alike = text.startswith(opened[:last])
    if not alike and [opened[i] for i in ours] != [text[i] for i in theirs[:n]]:
        return None
    # An opening may go on further than the turn does once it is written (with an empty thought): whole lines count.
    lines = [part.end() for part in re.finditer(r".*\n|.+$", opened[last:])]
    shared = max((n for n in lines if text.startswith(opened[last : last + n], place)), default=0)
    end = speech.pieces.search(text, place)
    if not alike and not (said and said in text[place : end.start() if end else len(text)]):
        return None
    return place + shared


def _said(message: Message) -> str:
    """Of a message, what every template shows: its last words, or the tool that it calls."""
    calls = message.get("tool_calls") or [{"function": {"name": ""}}]
    return message["content"].rpartition("</think>")[2].strip() or str(calls[0]["function"]["name"])


def _last(tokenizer: Tokenizer, speech: Speech, opened: str, closed: str, said: str) -> int | None:
    """Where the mark stands that ends the reply which `closed` ends with; ValueError if there is none."""
    begin, marks = _begin(speech, opened, closed, said), _marks(speech, closed)
    if begin is None:
        return None
    if len(marks) <= speech.n_after or marks[-1 - speech.n_after] < begin:
        raise ValueError(_without_end(tokenizer, speech))
    return marks[-1 - speech.n_after]


def _end(speech: Speech, closed: str, last: int, text: str, begin: int) -> int | None:
    """Where in `text` the reply ends that ends in `closed` with the mark at `last`: behind a mark."""
    if last >= begin and text.startswith(closed[:last]) and text[last : last + 1] in speech.ids:
        return last + 1  # also where another token ends it when others follow
    return text.find(closed[last], begin) + 1 or None


def _n_after(template: Template, pieces: re.Pattern[str]) -> int:
    """How many marks a template writes behind a whole conversation, after the one that ended its last reply: some close a
    conversation with the end token, and an answer has an end of its own."""

    def rendered(reply: bool) -> str:
        return template.render((ASKED, TOLD), (), reply=reply, now=TRAINING_TIME, n_characters=99)

    try:
        whole, going_on = rendered(False), rendered(True)
    except ValueError:
        return 0  # it wants other messages
    shared = _n_shared(whole, going_on)
    marks = [found.start() for found in pieces.finditer(whole)]
    inside = [place for place in marks if place < shared]
    ended = bool(inside) and not whole[inside[-1] + 1 : shared].strip()
    return len(marks) - len(inside) if ended else 0


def _n_shared(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))


def _end_of_reply(tokenizer: Tokenizer, conversation: Conversation) -> int:
    """The id of the control token that ends the reply which ends a conversation."""
    speech, rendering = _render(tokenizer, conversation, TRAINING_TIME)
    n = len(conversation.messages)
    closed = rendering(n, False)
    last = _last(tokenizer, speech, rendering(n - 1, True), closed, _said(conversation.messages[-1]))
    if last is None:
        raise ValueError(_without_end(tokenizer, speech))
    return speech.ids[closed[last]]


def _without_end(tokenizer: Tokenizer, speech: Speech) -> str:
    named = sorted(set(LOOKS_LIKE_CONTROL.findall(_source(tokenizer))) - set(speech.template.marks))
    lacks = f"; it names {', '.join(named[:12])}, which the tokenizer does not have as control tokens" if named else ""
    return (
        f"the chat template ends a reply with no control token of this tokenizer, so a model could not end one{lacks}."
        " Use the tokenizer that the template was made for"
    )


# Ids


def _tokens(tokenizer: Tokenizer, speech: Speech, text: str, turns: Sequence[_Turn]) -> Encoded:
    """The ids of a rendering: of its marks those of their control tokens, of what stands between them those of text."""
    ids, mask = list[int](), list[bool]()
    for start, piece in _pieces(speech, text):
        turn = next((turn for turn in turns if turn.begin < start + len(piece) and start < turn.end), None)
        if piece in speech.ids:
            ids.append(speech.ids[piece])
            mask.append(turn is not None)
            continue
        after, before = text[start - 1 : start], text[start + len(piece) : start + len(piece) + 1]
        kept = piece.lstrip() if speech.strips.get(after, (False, False))[1] else piece
        start += len(piece) - len(kept)
        kept = kept.rstrip() if speech.strips.get(before, (False, False))[0] else kept
        encoder = speech.inner if start else tokenizer
        more = encoder.encode(kept)
        n_given = 0 if turn is not None else len(more)
        if turn is not None and turn.begin > start:
            # What the reply begins with may have joined the last token before it, which is then the reply's.
            opening = encoder.encode(kept[: turn.begin - start])
            n_given = _n_shared(opening, more)
        ids += more
        mask += [i >= n_given for i in range(len(more))]
    return Encoded(ids, mask)


def _pieces(speech: Speech, text: str) -> Iterator[tuple[int, str]]:
    """The marks of a rendering and the texts between them, each with where it stands."""
    start = 0
    for piece in speech.pieces.split(text):
        if piece:
            yield start, piece
        start += len(piece)
