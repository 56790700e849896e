"""Questions with known answers, from a file of JSON lines: multiple choice by likelihood, exact match by greedy decoding.

What kind a task is, its fields say. A file is read and checked whole before any model is asked.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpt import chat, conversations, inference, signals
from gpt.conversations import Conversation
from gpt.formats import BadRecord
from gpt.generate import Sampling, complete
from gpt.likelihood import NOT_FINITE, log_likelihoods
from gpt.model import GPT
from gpt.tokenizer import Tokenizer

Kind = Literal["multiple choice", "exact match"]
PROMPTS = ("prompt", "question", "messages")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GREEDY = Sampling(temperature=0)
STOPS = ("\n",)  # ends an answer that no message ends


@dataclass(frozen=True)
class Item:
    """One question. `answers`: the number of the right choice, or every text that is right."""

    prompt: str | Conversation
    answers: int | tuple[str, ...]
    choices: tuple[str, ...] = ()
    delimiter: str = " "  # between a prompt and a choice where neither has white space there


@dataclass(frozen=True)
class Task:
    name: str
    kind: Kind
    items: Sequence[Item]


class Measure(NamedTuple):
    """A mean over questions, and its standard error; None of a single question."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Result:
    """What a model got; of `n_cut` questions it was shown only the end, as the rest did not fit its context."""

    kind: Kind
    n: int
    measures: Mapping[str, Measure]
    n_cut: int


@dataclass(frozen=True)
class Asking:
    """How questions are put: as messages of a chat or as text; what ends an answer, and how long it may get."""

    batch_tokens: int = 8192
    chat: bool = False
    stops: tuple[str, ...] | None = None  # None: STOPS, and in a chat the end of the message alone
    max_tokens: int = 128


# Reading


def read(place: str, limit: int | None = None) -> Task:
    """Read a task, or its first `limit` questions; BadRecord naming file and line, or ValueError for an empty one."""
    try:
        lines = Path(place).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{place}: no such file; a task is a file of JSON lines") from None
    items: list[Item] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or len(items) == limit:
            continue
        try:
            items.append(_item(_object(line)))
            if bool(items[-1].choices) != bool(items[0].choices):
                raise BadRecord(f"{_kind(items[-1])}, and the file began with {_kind(items[0])}; give each a file")
        except BadRecord as error:
            raise BadRecord(f"{place}:{number}: {error}") from None
    if not items:
        raise ValueError(f"{place}: no question in it; expected JSON lines with a prompt and an answer")
    return Task(place, _kind(items[0]), items)


def _kind(item: Item) -> Kind:
    return "multiple choice" if item.choices else "exact match"


def _object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start} of the line (0x{error.object[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"broken JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, got {type(record).__name__}")
    return record


def _item(record: dict[str, Any]) -> Item:
    """The question that a record asks."""
    given = [name for name in PROMPTS if name in record]
    if len(given) != 1:
        raise BadRecord(
            f"expected one of {', '.join(PROMPTS)}; it has {', '.join(given or map(repr, record)) or 'none'}"
        )
    prompt = _conversation(record) if given == ["messages"] else _text(record, given[0])
    if "answer" not in record:
        raise BadRecord("no field 'answer'")
    delimiter = _text(record, "delimiter") if "delimiter" in record else " "
    if "choices" not in record:
        return Item(prompt, _answers(record["answer"]), delimiter=delimiter)
    choices = record["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise BadRecord("choices: expected a list of texts, none of them blank")
    if len(choices) < 2:
        raise BadRecord(f"choices: expected at least two, got {len(choices)}")
    return Item(prompt, _chosen(record["answer"], choices), tuple(map(_whole, choices)), delimiter)


def _text(record: dict[str, Any], field: str) -> str:
    if not isinstance(record[field], str):
        raise BadRecord(f"{field}: expected text, got {type(record[field]).__name__}")
    return _whole(record[field])


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("its text has half of a surrogate pair, which is no character") from None
    return text


def _conversation(record: dict[str, Any]) -> Conversation:
    """The conversation that an answer is wanted to, by the rules of what is trained on: there each has its answer."""
    messages = record["messages"]
    if not isinstance(messages, list):
        raise BadRecord(f"messages: expected a list, got {type(messages).__name__}")
    answered = {"messages": [*messages, {"role": "assistant", "content": "?"}], "tools": record.get("tools")}
    asked = conversations.parse(answered)
    asked = Conversation(asked.messages[:-1], asked.tools)
    last = asked.messages[-1]["role"] if asked.messages else "nobody"
    if last not in ("user", "tool"):
        raise BadRecord(f"messages: the last one is of {last}; an answer is given to the user's, or to a tool's")
    _whole(conversations.dump(asked))
    return asked


def _chosen(answer: Any, choices: Sequence[str]) -> int:
    """The number of the right choice, given as such, by its text or by its letter."""
    if isinstance(answer, str):
        if choices.count(answer) > 1:
            raise BadRecord(f"answer: {answer!r} is more than one of the choices; give its index, from 0")
        if answer in choices:
            return choices.index(answer)
        number = LETTERS.find(answer) if len(answer) == 1 else -1
    else:
        number = answer if type(answer) is int else -1
    if not 0 <= number < len(choices):
        raise BadRecord(
            f"answer: expected an index from 0 to {len(choices) - 1}, a letter from A to"
            f" {LETTERS[: len(choices)][-1]} or the text of a choice, got {answer!r}"
        )
    return number


def _answers(answer: Any) -> tuple[str, ...]:
    texts = answer if isinstance(answer, list) else [answer]
    texts = [str(text) if type(text) is int else text for text in texts]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadRecord(f"answer: expected a text, or a list of texts that are all right, got {answer!r}")
    return tuple(_whole(text).strip() for text in texts)


# Asking


def ask(model: GPT, tokenizer: Tokenizer, task: Task, how: Asking) -> Result:
    """Put every question to the model, which is in eval mode; the answers do not depend on what shares a batch.

    ValueError in words for messages where the tokenizer has no chat format.
    """
    return (_choose if task.kind == "multiple choice" else _write)(model, tokenizer, task, how)


def _prompt(tokenizer: Tokenizer, prompt: str | Conversation, as_chat: bool) -> list[int]:
    """The ids of a prompt, start token included."""
    if isinstance(prompt, str) and not as_chat:
        return [tokenizer.start_id, *tokenizer.encode(prompt)]
    return chat.encode(tokenizer, _asked(prompt), reply=True).ids


def _asked(prompt: str | Conversation) -> Conversation:
    """A prompt as a conversation, as which text is a message of the user's."""
    return Conversation(({"role": "user", "content": prompt},)) if isinstance(prompt, str) else prompt


def _choose(model: GPT, tokenizer: Tokenizer, task: Task, how: Asking) -> Result:
    """Multiple choice: the likeliest continuation, and the likeliest by UTF-8 byte; of equals the first."""
    context = model.config.max_seq_len
    assert context is not None
    asked = [list(_pairs(tokenizer, item, how.chat)) for item in task.items]
    for number, (item, pairs) in enumerate(zip(task.items, asked, strict=True), 1):
        for choice, (_, more) in zip(item.choices, pairs, strict=True):
            if not 0 < len(more) <= context:
                raise ValueError(
                    f"{task.name}: question {number}: the choice {choice[:40]!r} is {len(more)} tokens; expected at least one,"
                    f" and at most the {context} of the model's context"
                )
    scores = iter(log_likelihoods(model, [pair for pairs in asked for pair in pairs], how.batch_tokens))
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    n_cut = 0
    for item, pairs in zip(task.items, asked, strict=True):
        logprobs = [next(scores).logprob for _ in item.choices]
        by_byte = [logprob / len(text.encode()) for logprob, text in zip(logprobs, item.choices, strict=True)]
        right["acc"].append(float(logprobs.index(max(logprobs)) == item.answers))
        right["acc_norm"].append(float(by_byte.index(max(by_byte)) == item.answers))
        n_cut += max(len(prompt) + len(continuation) for prompt, continuation in pairs) > context + 1
    return Result(task.kind, len(task.items), {name: mean(values) for name, values in right.items()}, n_cut)


def _pairs(tokenizer: Tokenizer, item: Item, as_chat: bool) -> Iterator[tuple[list[int], list[int]]]:
    """The prompt and each choice as ids. White space between them belongs to the choice, as most vocabularies have it;
    the ids of the prompt are the same for every choice, so that only what follows them decides."""
    if not isinstance(item.prompt, str) or as_chat:
        yield from _replies(tokenizer, _asked(item.prompt), [choice.strip() for choice in item.choices])
        return
    plain = item.prompt.rstrip()
    space = item.prompt[len(plain) :]
    prompt = tokenizer.encode(plain)
    opened = [tokenizer.start_id, *prompt]
    for choice in item.choices:
        behind = (space or ("" if choice[0].isspace() else item.delimiter)) + choice
        joined = tokenizer.encode(plain + behind)
        apart = joined[: len(prompt)] != prompt or len(joined) == len(prompt)
        yield opened, tokenizer.encode(behind) if apart else joined[len(prompt) :]


def _replies(
    tokenizer: Tokenizer, asked: Conversation, choices: Sequence[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """The choices as the template has them for replies, space before them and an empty thought included, without what ends
    them; as text behind the prompt where it does not show for certain where a reply stands."""
    replies = ({"role": "assistant", "content": choice} for choice in choices)
    try:
        wholes = [chat.encode(tokenizer, Conversation((*asked.messages, reply), asked.tools)) for reply in replies]
    except ValueError:
        prompt = chat.encode(tokenizer, asked, reply=True).ids  # which says what is wrong where it is the template
        yield from ((prompt, tokenizer.encode(choice)) for choice in choices)
        return
    ends = [len(whole.mask) - 1 - whole.mask[::-1].index(True) for whole in wholes]
    begins = [end - whole.mask[end::-1].index(False) + 1 for end, whole in zip(ends, wholes, strict=True)]
    first = min(begins)  # a choice may join the last token before it
    prompt = wholes[0].ids[:first]
    yield from ((prompt, whole.ids[first:end]) for end, whole in zip(ends, wholes, strict=True))


def _write(model: GPT, tokenizer: Tokenizer, task: Task, how: Asking) -> Result:
    """Exact match: what greedy decoding writes up to a stop, without the space around it, is one of the answers."""
    context = model.config.max_seq_len
    assert context is not None
    max_tokens = min(how.max_tokens, max(1, context // 2))
    room = context - max_tokens
    right, n_cut = [0.0] * len(task.items), 0
    for as_chat in (False, True):
        numbers = [i for i, item in enumerate(task.items) if (how.chat or not isinstance(item.prompt, str)) == as_chat]
        prompts = [_prompt(tokenizer, task.items[i].prompt, as_chat) for i in numbers]
        stops = how.stops if how.stops is not None else () if as_chat else STOPS
        ends = chat.reply_ends(tokenizer) if as_chat and prompts else {tokenizer.end_id, *tokenizer.control_ids}
        kept = [prompt[-room:] for prompt in prompts]
        texts = greedy(model, tokenizer, kept, max_tokens, stops, ends, how.batch_tokens)
        for i, prompt, text in zip(numbers, prompts, texts, strict=True):
            answers = task.items[i].answers
            right[i] = float(isinstance(answers, tuple) and text.strip() in answers)
            n_cut += len(prompt) > room
    return Result(task.kind, len(right), {"exact_match": mean(right)}, n_cut)


def greedy(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stops: Sequence[str],
    stop_ids: Collection[int],
    batch_tokens: int,
) -> list[str]:
    """What the model writes behind each prompt, up to one of `stops` or `stop_ids` and without it: `generate.complete`,
    prompts of like lengths together. A control token that ends nothing is no text."""
    texts = [""] * len(prompts)
    model = inference.beside(model, "float32")
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while order:
        n_rows = max(1, batch_tokens // (len(prompts[order[0]]) + max_tokens))
        batch, order = order[:n_rows], order[n_rows:]
        asked = [prompts[i] for i in batch]
        written = complete(
            model, tokenizer, asked, GREEDY, max_tokens, seed=0, stop=stops, stop_ids=stop_ids, banned_ids=()
        )
        for event in written:
            signals.check()
            if event.logprob is None or math.isnan(event.logprob):
                raise FloatingPointError(NOT_FINITE)
            texts[batch[event.row]] += event.text
    return texts


def mean(values: Sequence[float]) -> Measure:
    """The mean and its standard error, of the sample's variance."""
    n, middle = len(values), sum(values) / len(values)
    if n < 2:
        return Measure(middle, None)
    return Measure(middle, math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1) / n))
