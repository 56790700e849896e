"""Conversations as tokens: messages in the ChatML form, with the mask of what an assistant is trained to say.

Control tokens are inserted by id; no text of a message can become one. It neither samples nor prints.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gpt.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    role: Literal["system", "user", "assistant"]
    content: str


class Encoded(NamedTuple):
    """A conversation as ids, and for each whether it is trained on: the assistant's words and their `<|im_end|>`."""

    ids: list[int]
    mask: list[bool]


def control_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of `<|im_start|>` and `<|im_end|>`; ValueError if the tokenizer lacks them."""
    im_start, im_end = tokenizer.im_start_id, tokenizer.im_end_id
    if im_start is None or im_end is None:
        missing = "<|im_start|>" if im_start is None else "<|im_end|>"
        raise ValueError(
            f"the tokenizer has no {missing}, which the ChatML format needs; "
            "use a model whose tokenizer was made by data/prepare.py, or sample without chat"
        )
    return im_start, im_end


def encode(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = False) -> Encoded:
    r"""Return the start token and, for each message, `<|im_start|>role\ncontent<|im_end|>\n`.

    With `reply` the opening of an assistant's message follows, for a model to continue. The header and the content are
    encoded apart, so that a reply has the same ids when it is generated as when it is trained on.
    """
    im_start, im_end = control_ids(tokenizer)
    ids, mask = [tokenizer.start_id], [False]

    def add(more: Sequence[int], target: bool = False) -> None:
        ids.extend(more)
        mask.extend([target] * len(more))

    for role, content in messages:
        if role not in ROLES:
            raise ValueError(f"a message has role {role!r}; expected one of {', '.join(ROLES)}")
        add([im_start, *tokenizer.encode(f"{role}\n")])
        add([*tokenizer.encode(content), im_end], target=role == "assistant")
        add(tokenizer.encode("\n"))
    if reply:
        add([im_start, *tokenizer.encode("assistant\n")])
    return Encoded(ids, mask)


def drop_oldest(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int) -> list[Message]:
    """Return the newest messages that, with a reply opened, are at most `max_tokens` tokens.

    Whole exchanges go, oldest first, so that the rest begins with the user; the system message and the last one stay.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    rest = list(messages[len(system) :])
    while len(rest) > 1 and len(encode(tokenizer, [*system, *rest], reply=True).ids) > max_tokens:
        del rest[0]
        while len(rest) > 1 and rest[0].role != "user":
            del rest[0]
    return [*system, *rest]
