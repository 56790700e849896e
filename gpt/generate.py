"""From prompts to text: the sampling rules, the one decoding loop, and stop strings and streaming on top of it.

Batch, stream, chat and samples during training all consume it. It reads no files and prints nothing.
"""

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpt.cache import KVCache, leave, spread
from gpt.graphs import WORTH, Graphs
from gpt.inference import PackedLinear
from gpt.model import GPT, ModelConfig
from gpt.positions import by_length
from gpt.runtime import evaluating, key, lone_thread
from gpt.tokenizer import Tokenizer

FinishReason = Literal["stop", "eos", "length"]
DRAWN = 1 << 12  # random numbers of a row that are drawn at once
NOT_FINITE = "a logit is not a number: the weights, or their dtype, give numbers that are not finite"
PORTION = 1 << 10  # tokens of prompts that are read at once
PASS = 16  # tokens whose products take as long as reading the weights


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: penalty, then temperature, top-k, top-p, min-p, in this order as in transformers.

    Temperature 0 and top_k 1 are greedy. `top_p` keeps the fewest tokens that hold that much probability (Holtzman et
    al. 2020); `min_p` those at least that fraction as likely as the best (Nguyen et al. 2024); `repetition_penalty`
    divides positive and multiplies negative logits of tokens already in the row, prompt included (Keskar et al. 2019).
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 is none)"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {expected}")

    @property
    def greedy(self) -> bool:
        return self.temperature < torch.finfo(torch.float32).tiny or self.top_k == 1

    def penalize(self, logits: Tensor, seen: Tensor) -> Tensor:
        """`logits` (B, V) with the repetition penalty on the tokens `seen` (B, V) bool."""
        penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, penalized.clamp(max=torch.finfo(logits.dtype).max), logits)

    def keep(self, logits: Tensor) -> Tensor:
        """`logits` (B, V) at this temperature, -inf for every token that may not be drawn."""
        scores = logits / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p < 1:
            probs = scores.softmax(-1)
            scores = scores.masked_fill(probs < _nucleus_floor(probs, self.top_p), -math.inf)
        if self.min_p is not None:
            probs = scores.softmax(-1)
            scores = scores.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), -math.inf)
        return scores

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Choose one token a row: logits (B, V), uniform (B, 1) in [0, 1) -> ids (B, 1) int64.

        The distribution function is inverted, so that a row costs one random number instead of V.
        """
        if self.greedy:
            return logits.argmax(-1, keepdim=True)
        best = logits.amax(-1, keepdim=True)  # at zero it stays finite, however cold it is
        mass = self.keep(logits - best).softmax(-1).cumsum(-1)
        return torch.searchsorted(mass, uniform * mass[:, -1:], right=True)


def _nucleus_floor(probs: Tensor, top_p: float) -> Tensor:
    """(B, 1): the smallest probability inside each row's top-p set.

    A few hundred tokens almost always hold the set, and finding them is many times cheaper than sorting the vocabulary.
    """
    n_tokens = 256
    while True:
        top = probs.topk(min(n_tokens, probs.shape[-1])).values
        mass = top.cumsum(-1)
        if n_tokens >= probs.shape[-1] or bool((mass[:, -1] >= top_p).all()):
            return top.masked_fill(mass - top >= top_p, math.inf).amin(-1, keepdim=True)
        n_tokens *= 8


class Column(NamedTuple):
    """One step of every row: the token and its log-probability under the model at temperature 1; None after its end, and
    log-probabilities where nobody asked for them."""

    ids: list[int | None]
    logprobs: list[float | None]


def _read_whole(config: ModelConfig) -> bool:
    """Whether a prompt must be read at once: its tokens see each other, or its length decides by what angles they turn."""
    return config.prefix_lm or by_length(config.rope_scaling)


class Past:
    """What a model has read of one row, kept from one `generate` to the next: only what is new is then read."""

    def __init__(self) -> None:
        self.ids: list[int] = []  # what the cache holds, and at most one more
        self.cache: KVCache | None = None

    def begin(self, model: GPT, row: list[int], max_len: int) -> tuple[KVCache, int]:
        """A cache for `row` with room for `max_len` positions, and how many tokens of the row it holds: not the last one,
        whose logits are wanted. `row` is the past of what comes next."""
        if self.cache is None:
            self.cache = model.new_cache(1, max_len)
        n_read = min(self.cache.host.longest, len(self.ids), len(row) - 1)
        both = enumerate(zip(self.ids[:n_read], row[:n_read], strict=True))
        n_read = next((i for i, (before, now) in both if before != now), n_read)
        n_read = 0 if _read_whole(model.config) else n_read
        self.cache.rewind(torch.full_like(self.cache.lengths, n_read))
        if self.cache.max_len < max_len:
            wider = min(max(max_len, 2 * self.cache.max_len), model.config.max_seq_len or max_len)
            self.cache = spread(self.cache, torch.zeros_like(self.cache.lengths), wider)
        self.ids = row
        return self.cache, n_read


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_tokens: int,
    *,
    seed: int,
    n_tokens_valid: int,
    stop_ids: Collection[int],
    banned_ids: Collection[int] = (),
    past: Past | None = None,
    logprobs: bool = True,
) -> Generator[Column, None, None]:
    """Continue each prompt (start token included) by up to `max_tokens` tokens, a column at a time.

    A row ends with the first of `stop_ids`, which it includes. Ids from `n_tokens_valid` on (padding of the vocabulary)
    and `banned_ids` are never drawn. Row r draws from `seed + r`: alone with that seed it is what it is in a batch. The
    model is in eval mode meanwhile and gets its mode back at the end. A prefix-LM reads each prompt both ways. With `past`,
    of a single row, what the prompt shares with what was read before is not read again, and the past goes on with this row.
    Without `logprobs` all of them are None, and nothing is computed for them.

    A prompt must be shorter than the context (ValueError). When a row fills the context, the oldest half of its window
    is dropped, its first token kept, and the rest is read again.
    """
    rows = [list(prompt) for prompt in prompts]
    context = _check(model, rows, max_tokens)
    device = model.model.embed_tokens.weight.device
    banned = torch.tensor(sorted(id for id in banned_ids if id < n_tokens_valid), dtype=torch.int64, device=device)
    uniforms = _uniforms(seed, len(rows), max_tokens)
    batch = _Batch(model, rows, context, max_tokens, past)
    seen = None if sampling.repetition_penalty == 1 else _seen(model, batch)

    with evaluating(model):
        logits = batch.read()
        if not logits.isfinite().all():
            raise FloatingPointError(NOT_FINITE)
        for step in range(max_tokens):
            logits = logits.float()
            likely = logits.log_softmax(-1) if logprobs else None
            logits[:, n_tokens_valid:] = -math.inf
            logits.index_fill_(1, banned, -math.inf)
            if seen is not None:
                logits = sampling.penalize(logits, seen)
            chosen = sampling.draw(logits, next(uniforms)[batch.order].to(device))
            if seen is not None:
                seen.scatter_(1, chosen, True)
            ids = chosen[:, 0].tolist()
            if max(ids) >= n_tokens_valid:  # what is drawn where none has a probability
                raise FloatingPointError(NOT_FINITE)
            yield batch.column(ids, None if likely is None else likely.gather(1, chosen)[:, 0].tolist())
            if ended := [place for place, token in enumerate(ids) if token in stop_ids]:
                if len(ended) == len(ids):
                    return
                moved = batch.leave(ended)
                ids = [ids[place] for place in moved]
                chosen, seen = chosen[moved], None if seen is None else seen[moved]
            if step + 1 < max_tokens:
                logits = batch.extend(chosen, ids)


class _Batch:
    """The rows that are still being written and what the model has read of them, in the order of their lengths."""

    def __init__(self, model: GPT, rows: list[list[int]], context: int, max_tokens: int, past: Past | None) -> None:
        self.model, self.rows, self.context, self.past = model, rows, context, past
        self.n_prompt = [len(row) for row in rows]
        self.order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # which row stands at each place
        max_len, self.n_read = min(context, max(self.n_prompt) + max_tokens), 0
        if past is None:
            self.cache = model.new_cache(len(rows), max_len)
        else:
            assert len(rows) == 1, "a past is of one row"
            self.cache, self.n_read = past.begin(model, rows[0], max_len)
        captures = self.cache.lengths.is_cuda and max_tokens >= WORTH
        self.graphs = Graphs(model, self.cache) if captures else None

    def column(self, ids: list[int], logprobs: list[float] | None) -> Column:
        """What stands at each place, by row."""
        column = Column([None] * len(self.rows), [None] * len(self.rows))
        for place, row in enumerate(self.order):
            column.ids[row] = ids[place]
            if logprobs is not None:
                column.logprobs[row] = logprobs[place]
        return column

    def leave(self, places: list[int]) -> list[int]:
        """The rows at these places are finished; from where each of the others comes."""
        moved = leave(self.cache, places)
        self.order = [self.order[place] for place in moved]
        return moved

    def read(self) -> Tensor:
        """Read every prompt but for the `n_read` tokens that the cache holds of it; logits (n, V) after its last token."""
        lengths = [len(self.rows[row]) for row in self.order]
        features = [self._read(start, stop, self.n_read) for start, stop in alike(lengths)]
        self.cache.rewind(torch.tensor(lengths))
        return self.model.logits(torch.cat(features))

    def _read(self, start: int, stop: int, n_read: int = 0) -> Tensor:
        """Read the rows from place `start` to before `stop` from their token `n_read` on; features (n, C) of the last one.

        One row is read in portions, so that what is computed at once is bounded, where the model allows it.
        """
        model, cache = self.model, self.cache.part(start, stop)
        rows, device = [self.rows[row] for row in self.order[start:stop]], cache.lengths.device
        n_prompt = torch.tensor([self.n_prompt[row] for row in self.order[start:stop]])[:, None]
        longest = max(map(len, rows))
        padded = torch.tensor([[*row[n_read:], *[0] * (longest - len(row))] for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        slots = torch.arange(n_read, longest)
        prefix = (slots < n_prompt).to(device) if model.config.prefix_lm else None
        at = slots.minimum(last[:, None]).to(device)  # padding goes no further
        cache.rewind(torch.full((len(rows),), n_read))
        portion = longest if _read_whole(model.config) else max(1, PORTION // len(rows))
        for tokens, positions in zip(padded.to(device).split(portion, 1), at.split(portion, 1), strict=True):
            features = model.features(tokens, positions, cache=cache, prefix=prefix)  # (n, T, C)
        ends = last.to(device) - (longest - features.shape[1])
        return features[torch.arange(len(rows), device=device), ends]

    def extend(self, chosen: Tensor, ids: list[int]) -> Tensor:
        """Append a token (n, 1), which the host knows as `ids`, to each row and read it; logits (n, V). A row that no longer
        fits loses its oldest half."""
        if self.past is not None and len(self.rows[0]) == self.context:
            self.past.ids = []  # the row is about to lose its beginning; a stop meanwhile leaves nothing to go on from
        for row, token in zip(self.order, ids, strict=True):
            self.rows[row].append(token)
        if self.cache.host.longest == self.context:
            self._shorten()
        if self.graphs is not None:
            logits = self.graphs.step(chosen, self.cache)
        else:
            with lone_thread() if isinstance(self.model.lm_head, PackedLinear) else nullcontext():
                logits = self.model(chosen, cache=self.cache)[:, -1]
        if self.past is not None:
            self.past.ids = self.rows[0]
        return logits

    def _shorten(self) -> None:
        """Rows longer than the context lose their oldest half but for their first token; what is left is read again, the
        last token apart, which every row has yet to read."""
        lengths = list(self.cache.host.known)
        for place, row in enumerate(self.order):
            ids = self.rows[row]
            if len(ids) > self.context:
                dropped = slice(1, len(ids) - self.context // 2)
                self.n_prompt[row] = 1 + max(0, self.n_prompt[row] - dropped.stop)
                del ids[dropped]
                token = ids.pop()
                self._read(place, place + 1)
                lengths[place] = len(ids)
                ids.append(token)
        self.cache.rewind(torch.tensor(lengths))


def _seen(model: GPT, batch: _Batch) -> Tensor:
    """(n, V) bool: the tokens of each row of `batch`, in its order."""
    weight = model.model.embed_tokens.weight
    seen = torch.zeros(len(batch.order), len(weight), dtype=torch.bool, device=weight.device)
    for place, row in enumerate(batch.order):
        seen[place, batch.rows[row]] = True
    return seen


def alike(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Rows of these lengths, which only fall, in groups (start, stop) to be read together, the shorter ones padded.

    A group has at most PORTION tokens, unless it is one row, and as much padding as reading apart would cost: what a pass
    over the weights does, PASS tokens, or an eighth of it.
    """
    groups = [(0, 1)]
    for row in range(1, len(lengths)):
        start, size = groups[-1][0], (row + 1 - groups[-1][0]) * lengths[groups[-1][0]]
        padding = size - sum(lengths[start : row + 1])
        if size <= PORTION and padding <= max(PASS, size // 8):
            groups[-1] = start, row + 1
        else:
            groups.append((row, row + 1))
    return groups


def _check(model: GPT, rows: Sequence[Sequence[int]], max_tokens: int) -> int:
    """The model's context in tokens; ValueError if there is nothing to do or a prompt does not fit."""
    context = model.config.max_seq_len
    assert context is not None, "a model that exists has a context length"
    if not rows or not all(rows):
        raise ValueError("generate needs at least one prompt, and at least the start token in each")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
    longest = max(map(len, rows))
    if longest >= context:
        raise ValueError(
            f"the prompt has {longest} tokens (start token included) and the model's context is {context}: no room for "
            f"a new one; shorten the prompt to {context - 1} tokens or use a model with a larger max_seq_len"
        )
    return context


def _uniforms(seed: int, n_rows: int, n_steps: int) -> Iterator[Tensor]:
    """(B, 1) in [0, 1) a step: each row from its own generator, on the CPU so that every device gets the same numbers."""
    generators = [torch.Generator().manual_seed(key(seed + row, 0, "sample")) for row in range(n_rows)]
    for start in range(0, n_steps, DRAWN):  # in portions: who sets no limit sets a billion
        n = min(DRAWN, n_steps - start)
        yield from torch.stack([torch.rand(n, generator=generator) for generator in generators], dim=1)[..., None]


@dataclass(frozen=True)
class Event:
    """A token of one row and the text that may be shown because of it: possibly none yet, never half a character."""

    row: int
    id: int
    logprob: float | None  # None where it was not asked for
    text: str
    finish_reason: FinishReason | None  # set on a row's last event


class StopText:
    """Cuts a stream of text at the first of the stop strings, wherever the pieces are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty; leave it out or give it at least one character")
        self.stops = tuple(stops)
        self.held = ""  # not shown yet: it may be the beginning of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string was completed: then it is all there will be."""
        text = self.held + text
        found = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        longest = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        certain = len(text) - longest
        self.held = text[certain:]
        return text[:certain], False


class _RowText:
    """The text of one row after its prompt, and why it ended."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt: Sequence[int]) -> None:
        self.stream = tokenizer.stream(prompt)
        self.stop = StopText(stops)
        self.done = False

    def push(self, token: int, end: FinishReason | None) -> tuple[str, FinishReason | None]:
        """Add a token; `end` says that it is the row's last one, and why."""
        piece = "" if end == "eos" else self.stream.push(token) or ""
        if end is not None:
            piece += self.stream.flush().rstrip("\ufffd")  # a character that was never finished is not shown
        text, stopped = self.stop.push(piece)
        if end is not None and not stopped:
            text += self.stop.held
        reason: FinishReason | None = "stop" if stopped else end
        self.done = reason is not None
        return text, reason


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    max_tokens: int,
    *,
    seed: int,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    banned_ids: Collection[int] | None = None,
    past: Past | None = None,
    logprobs: bool = True,
) -> Iterator[Event]:
    """Continue prompts, given as text or as ids with the start token, as a stream of events: one per token and row.

    A row ends at a stop string ("stop": neither it nor what follows is shown), at one of `stop_ids` ("eos"; by default
    the tokenizer's end token) or after `max_tokens` ("length"). Other control tokens are never drawn, or `banned_ids`; of
    those that are drawn there is no text. See `generate`.
    """
    ends = {tokenizer.end_id} if stop_ids is None else set(stop_ids)
    ids = [[tokenizer.start_id, *tokenizer.encode(p)] if isinstance(p, str) else p for p in prompts]
    rows = [_RowText(tokenizer, stop, row) for row in ids]
    columns = generate(
        model,
        ids,
        sampling,
        max_tokens,
        seed=seed,
        n_tokens_valid=tokenizer.size,
        stop_ids=ends,
        banned_ids=set(tokenizer.control_ids) - ends if banned_ids is None else banned_ids,
        past=past,
        logprobs=logprobs,
    )
    with closing(columns):  # gives the model its mode back even if the reader leaves early
        for step, column in enumerate(columns, start=1):
            for row, (token, logprob) in enumerate(zip(column.ids, column.logprobs, strict=True)):
                if token is None or rows[row].done:
                    continue
                end: FinishReason | None = "eos" if token in ends else "length" if step == max_tokens else None
                yield Event(row, token, logprob, *rows[row].push(token, end))
            if all(row.done for row in rows):
                return
