"""Conversations as tokens: messages in the format that a tokenizer was made for, with the mask of what is trained.

Control tokens are inserted by id; no text of a message can become one. A chat template is read for the tokens that it
names, and never run. It neither samples nor prints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gpt.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
START, END = "{bos_token}", "{eos_token}"  # in a format: whatever the tokenizer has for them
Parts = tuple[str, ...]  # a part is a control token if the tokenizer has one of that name, else text


class Message(NamedTuple):
    role: Role
    content: str


class Encoded(NamedTuple):
    """A conversation as ids, and for each whether it is trained on: the assistant's words and what ends them."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class Format:
    """What stands around the messages of a conversation."""

    name: str
    marks: Parts  # what a chat template of it holds, kinds of quotes aside
    control: Parts  # what the tokenizer must have as control tokens
    before: Mapping[Role, Parts]
    after: Mapping[Role, Parts]  # a reply ends with the last of its own
    tools: Parts = ()  # control tokens of it that only tools need, which are not called here
    opening: Parts = (START,)
    between: Parts = ()  # follows a reply that has ended
    lead: str = ""  # text that begins every reply, trained and generated with it
    strips: bool = False  # the space around a message is not part of it
    system: tuple[str, str] | None = None  # where it has no turn of its own: around it, in a turn of the user's
    system_last: bool = False  # in the last such turn, not in the first


IM = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
FORMATS = (
    Format(
        "chatml",  # OpenAI's; Qwen and SmolLM have it, and what this trainer's own tokenizers are made for
        marks=IM,
        control=IM,
        before={role: ("<|im_start|>", f"{role}\n") for role in ROLES},
        after={"system": ("<|im_end|>", "\n"), "user": ("<|im_end|>", "\n"), "assistant": ("<|im_end|>",)},
        between=("\n",),
    ),
    Format(
        "llama3",
        marks=HEADER,
        control=HEADER,
        tools=("<|python_tag|>", "<|eom_id|>"),
        before={role: ("<|start_header_id|>", role, "<|end_header_id|>", "\n\n") for role in ROLES},
        after=dict.fromkeys(ROLES, ("<|eot_id|>",)),
        strips=True,
    ),
    Format(
        "nanochat",
        marks=TURNS,
        control=TURNS,
        tools=("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
        before={"user": ("<|user_start|>",), "assistant": ("<|assistant_start|>",)},
        after={"user": ("<|user_end|>",), "assistant": ("<|assistant_end|>",)},
        system=("", "\n\n"),
    ),
    Format(
        "llama2",
        marks=("'[INST] '", "' [/INST]'", "<<SYS>>"),
        control=(),
        before={"user": (START, "[INST] "), "assistant": ()},
        after={"user": (" [/INST]",), "assistant": (" ", END)},
        opening=(),
        lead=" ",
        strips=True,
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    ),
    Format(
        "mistral-v1",
        marks=("' [INST] '", "' [/INST]'"),
        control=(),
        before={"user": (" [INST] ",), "assistant": ()},
        after={"user": (" [/INST]",), "assistant": (END,)},
        lead=" ",
        strips=True,
        system=("", "\n\n"),
    ),
    Format(
        "mistral-v3",
        marks=("'[INST] '", "'[/INST]'"),
        control=("[INST]", "[/INST]"),
        tools=("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        before={"user": ("[INST]", " "), "assistant": ()},
        after={"user": ("[/INST]",), "assistant": (END,)},
        lead=" ",
        strips=True,
        system=("", "\n\n"),
        system_last=True,
    ),
    Format(
        "olmo2",  # and Tulu 3
        marks=(r"'<|user|>\n' + message['content'] + '\n'", r"'<|assistant|>\n'", "message['content'] + eos_token"),
        control=(),
        before={role: (f"<|{role}|>\n",) for role in ROLES},
        after={"system": ("\n",), "user": ("\n",), "assistant": (END,)},
        between=("\n",),
    ),
)


def format_of(tokenizer: Tokenizer) -> Format:
    """The format that the tokenizer's chat template names, or without one its control tokens; ValueError if unknown.

    A template that names control tokens which a format does not have is of another one.
    """
    template = (tokenizer.chat_template or "").replace('"', "'").replace("\n", r"\n")
    control = {name for name, token in tokenizer.vocab.items() if token in tokenizer.control_ids}
    named = {name for name in control if not template or name in template}
    ends = {tokenizer.piece(token) for token in (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)}
    for form in FORMATS:
        marked = all(mark in template for mark in form.marks) if template else bool(form.control)
        other = named - {*form.control, *form.tools, *ends} if template else ()
        if marked and control.issuperset(form.control) and not other:
            return form
    shown = ", ".join(sorted(named)[:12]) or "none"
    has = (
        f"its chat template names {shown}"
        if template
        else f"it has no chat template, and its control tokens are {shown}"
    )
    raise ValueError(
        f"the chat format of this tokenizer is not known here: {has}; known formats:"
        f" {', '.join(form.name for form in FORMATS)}. Sample without chat, or use a model that was tuned in one of these"
    )


def reply_ends(tokenizer: Tokenizer) -> set[int]:
    """The ids that end an assistant's reply."""
    last = _id_or_text(tokenizer, format_of(tokenizer).after["assistant"][-1])
    return {tokenizer.end_id} | ({last} if isinstance(last, int) else set())


def encode(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = False) -> Encoded:
    """Return the conversation as the tokenizer's format has it, from the start token on.

    With `reply` the opening of an assistant's message follows, for a model to continue; a reply has the same ids when it
    is generated as when it is trained on. A start token that the tokenizer's own template does not name is left out. No
    message is added that is not among `messages`, as some templates do.
    """
    form, template = format_of(tokenizer), tokenizer.chat_template
    if strange := [role for role, _ in messages if role not in ROLES]:
        raise ValueError(f"a message has role {strange[0]!r}; expected one of {', '.join(ROLES)}")
    starts = template is None or "bos_token" in template or tokenizer.piece(tokenizer.start_id) in template
    parts = [(_id_or_text(tokenizer, part), False) for part in form.opening if starts]
    for role, content in _with_system(form, messages):
        trained = role == "assistant"
        parts += [(_id_or_text(tokenizer, part), False) for part in form.before[role]]
        parts += [((form.lead if trained else "") + (content.strip() if form.strips else content), trained)]
        parts += [(_id_or_text(tokenizer, part), trained) for part in form.after[role]]
        parts += [(_id_or_text(tokenizer, part), False) for part in form.between if trained]
    if reply:
        parts += [(_id_or_text(tokenizer, part), False) for part in form.before["assistant"]]
    return _joined(tokenizer, parts)


def _id_or_text(tokenizer: Tokenizer, part: str) -> int | str:
    """A part as the id of the control token that it names, or as text."""
    if part in (START, END):
        return tokenizer.start_id if part == START else tokenizer.end_id
    token = tokenizer.vocab.get(part)
    return token if token is not None and token in tokenizer.control_ids else part


def _joined(tokenizer: Tokenizer, parts: Sequence[tuple[int | str, bool]]) -> Encoded:
    """Ids of control tokens and texts, and whether each is trained on. Text between two control tokens is encoded at once,
    but what is trained never changes the ids before it: they stand when a reply is generated."""
    ids, mask = list[int](), list[bool]()
    plain = said = ""

    def add(more: Sequence[int], trained: bool) -> None:
        ids.extend(more)
        mask.extend([trained] * len(more))

    def add_text() -> None:
        nonlocal plain, said
        before = tokenizer.encode(plain)
        add(before, False)
        if said:
            joined = tokenizer.encode(plain + said)
            apart = joined[: len(before)] != before
            add(tokenizer.encode(said) if apart else joined[len(before) :], True)
        plain = said = ""

    for part, trained in parts:
        if isinstance(part, int):
            add_text()
            add([part], trained)
        elif trained:
            said += part
        else:
            plain += part
    add_text()
    return Encoded(ids, mask)


def _with_system(form: Format, messages: Sequence[Message]) -> list[Message]:
    """The messages, with a system message inside a user's where the format has no turn for it."""
    if form.system is None or not messages or messages[0].role != "system":
        return list(messages)
    before, after = form.system
    first, *rest = messages
    turns = [i for i, message in enumerate(rest) if message.role == "user"]
    if not turns:
        raise ValueError(f"in the {form.name} format a system message stands in a user's, and there is none")
    turn = turns[-1] if form.system_last else turns[0]
    rest[turn] = Message("user", before + first.content + after + rest[turn].content)
    return rest


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
