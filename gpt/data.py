"""The order of data: batch(step), a pure function of (data sets, data settings, batch size, seed, step) and of nothing else.

A split is a circle of tokens, documents one after another, each opened by its start token. Windows of seq_len + 1
tokens overlapping by one cut it into rows, or documents are packed into rows whole; either way every token is a target
exactly once an epoch, and each epoch permutes the rows anew. A mixture deals rows to its parts in exact shares, and each
part has epochs of its own. Nothing is kept between calls: the loader's state is the step.
"""

import atexit
import hashlib
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from gpt import bins, packing
from gpt.config import Count, Settings
from gpt.packing import permute
from gpt.runtime import key
from gpt.shards import Tokens, TokenSet
from gpt.tokenizer import Tokenizer
from gpt.views import View, by_source

IGNORED = -100  # torch's own value for a target without loss
CYCLE = 1 << 16  # rows in which a mixture's shares are exact
AHEAD_ROWS, AHEAD_TOKENS = (
    1 << 13,
    1 << 17,
)  # whose places are computed, and which are read, at once; then they fit a cache
WAITING = 4  # portions that stand ready for training


class DataConfig(Settings):
    """What is trained on."""

    path: str | None = Field(None, description="a prepared data set, or .bin files, for example data/quickstart")
    mixture: dict[str, float] | None = Field(
        None,
        description="instead of path: data sets and their shares of the tokens, for example {data/a: 0.7, data/b: 0.3}",
    )
    sources: dict[str, float] | None = Field(
        None, description="sources of the data set and their shares of the tokens; null: every document equally often"
    )
    tokenizer: str | None = Field(None, description="the tokenizer of .bin files, which do not carry their own")
    seq_len: Count = Field(256, ge=1, description="context in tokens: what one row of a batch holds")
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description="stream: rows are cut anywhere, but for documents with prompts and conversations, which are packed whole "
        "either way; documents: rows are made of documents, whole where they fit",
    )
    long_documents: Literal["auto", "cut", "begin", "drop"] = Field(
        "auto",
        description="of documents longer than a packed row, cut: they fill several; begin: their beginning is read, up to the "
        "last answer that fits; drop: they are left out; auto: cut for text, begin for what has prompts",
    )
    document_mask: bool = Field(
        False, description="attention stays inside a document and positions restart with each one"
    )

    @field_validator("mixture", "sources")
    @classmethod
    def _are_shares(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        if shares is None:
            return None
        total = sum(shares.values())
        if not shares or min(shares.values()) <= 0 or abs(total - 1) > 1e-3:
            parts = ", ".join(f"{name}: {share}" for name, share in shares.items())
            raise ValueError(f"expected shares above 0 that sum to 1, got {{{parts}}}, which sum to {total:.6g}")
        return shares

    @model_validator(mode="after")
    def _is_one_place(self) -> "DataConfig":
        if (self.path is None) == (self.mixture is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"expected either path (one data set) or mixture (several with shares), got {given}")
        if self.sources is not None and self.mixture is not None:
            raise ValueError("sources are shares within one data set (path); a mixture is of whole data sets")
        return self


class Batch(NamedTuple):
    """Rows of inputs and what follows each: (B, T) int64; targets are shifted, and IGNORED where nothing is learned.

    With document_mask also each token's position in its document and the number of that within the row (padding has a
    number of its own); for a prefix-LM also whether it belongs to a prompt, (B, T) bool. `tokens` and `targets` may be
    views of one buffer; nobody writes to them.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    doc_ids: Tensor | None = None
    prefix: Tensor | None = None

    @property
    def given(self) -> list[Tensor]:
        """What there is, in the order in which an objective takes it."""
        return [x for x in self if x is not None]

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORED).sum())


# What is opened


@dataclass(frozen=True)
class Part:
    """One component of a mixture: its share of the training tokens, and both splits of it."""

    name: str
    train: Tokens
    val: Tokens
    weight: float = 1.0

    @property
    def n_tokens(self) -> int:
        return self.train.n_tokens


@dataclass(frozen=True)
class Data:
    """What a run trains on, opened and checked: one part, or the parts of a mixture."""

    parts: list[Part]
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        """Training tokens of all parts."""
        return sum(part.n_tokens for part in self.parts)


def open_data(config: DataConfig) -> Data:
    """Open both splits and the tokenizer; ValueError or CorruptError in words if they do not belong together."""
    shares = {config.path: 1.0} if config.path is not None else config.mixture or {}
    opened = [_open(Path(name), config.tokenizer) for name in shares]
    tokenizer = opened[0][2]
    for name, (_, _, other) in zip(shares, opened, strict=True):
        if other.sha256 != tokenizer.sha256:
            raise ValueError(
                f"{name} and {next(iter(shares))} were prepared with different tokenizers; prepare one again: "
                f"--tokenizer {next(iter(shares))}"
            )
    parts = [
        Part(name, train, val, share) for (name, share), (train, val, _) in zip(shares.items(), opened, strict=True)
    ]
    if config.sources is not None:
        parts = _by_shares(parts[0], config.sources)
    whole = any(part.val.has_spans for part in parts)  # they are packed, and need no row to be full
    if (n := sum(part.val.n_tokens for part in parts)) < (1 if whole else config.seq_len):
        raise ValueError(
            f"{', '.join(shares)}: the validation split has {n} tokens, fewer than data.seq_len ({config.seq_len}); "
            f"prepare it with a larger val_fraction or lower data.seq_len"
        )
    seals = [train.fingerprint for train, _, _ in opened]
    fingerprint = seals[0] if len(seals) == 1 else hashlib.sha256("\n".join(seals).encode()).hexdigest()
    return Data(parts, tokenizer, fingerprint)


def _open(path: Path, tokenizer: str | None) -> tuple[Tokens, Tokens, Tokenizer]:
    """(train split, validation split, tokenizer) of a prepared data set or of .bin files."""
    if bins.found(path):
        vocabulary = bins.load_tokenizer(path, tokenizer)
        return bins.open_bins(path, "train", vocabulary), bins.open_bins(path, "val", vocabulary), vocabulary
    train, val = TokenSet(path, "train"), TokenSet(path, "val")
    if tokenizer is not None:
        raise ValueError(f"{path} was prepared with a tokenizer and has it; remove data.tokenizer ({tokenizer})")
    its_own = Tokenizer.load(path)
    if its_own.sha256 != train.tokenizer_sha256:
        raise ValueError(f"{path}: tokenizer.json is not the one the data set was made with; prepare it again")
    return train, val, its_own


def _by_shares(part: Part, shares: dict[str, float]) -> list[Part]:
    """A part for each source named in `shares`; ValueError for one that is not there, or has nothing to train on."""
    trains, vals = by_source(part.train), by_source(part.val)
    missing = [name for name in shares if name not in trains]
    if missing:
        raise ValueError(
            f"{part.name} has no training documents of {', '.join(map(repr, missing))}; data.sources may name "
            f"{', '.join(map(repr, trains))}"
        )
    nothing = View(part.val, [])
    return [Part(name, trains[name], vals.get(name, nothing), share) for name, share in shares.items()]


# Where rows stand


class Pieces(NamedTuple):
    """What rows are made of: for each piece its row, its column, its first token and how many; each (n,) int64."""

    row: np.ndarray
    column: np.ndarray
    start: np.ndarray
    length: np.ndarray


NOTHING = Pieces(*(np.empty(0, dtype=np.int64) for _ in range(4)))


class Stream:
    """Windows that each epoch lays anew over the circle of tokens, in a new order."""

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
        self.n_tokens, self.seq_len, self.seed = tokens.n_tokens, seq_len, seed
        # One row more than the tokens fill, since a shifted epoch opens and closes with a part of a row.
        self.n_rows = -(-tokens.n_tokens // seq_len) + 1

    @property
    def padding(self) -> float:
        """The share of positions that are padding."""
        return 1 - self.n_tokens / (self.n_rows * self.seq_len)

    def pieces(self, ordinals: np.ndarray) -> Pieces:
        """Of the rows with these numbers, which ascend over all epochs; ordered by row, then column."""
        epochs, slots = np.divmod(ordinals, self.n_rows)
        starts = np.empty(len(ordinals), dtype=np.int64)
        for epoch in _epochs(epochs):
            here = epochs == epoch
            shift = key(self.seed, epoch, "shift") % self.seq_len
            starts[here] = permute(slots[here], self.n_rows, key(self.seed, epoch, "order")) * self.seq_len - shift
        stops = (starts + self.seq_len).clip(0, self.n_tokens)
        starts = starts.clip(0, self.n_tokens)
        return Pieces(np.arange(len(starts)), np.zeros(len(starts), np.int64), starts, stops - starts)


class Packed:
    """Rows made of documents (of those in the first `end` tokens) by a packing plan; each epoch gives every document
    other neighbours. `long`: what becomes of documents longer than a row, as DataConfig.long_documents says."""

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, end: int | None = None, long: str = "cut") -> None:
        n_tokens = tokens.n_tokens if end is None else end
        starts = tokens.document_starts
        starts = starts[: np.searchsorted(starts, n_tokens)]
        lengths = np.diff(starts, append=n_tokens)
        self.n_documents, self._noun = len(starts), "conversations" if tokens.conversations else "documents"
        lengths, self.long = _shortened(tokens, starts, lengths, seq_len, long)
        kept = lengths > 0
        if not kept.any():
            raise ValueError(
                f"{tokens.path}: none of its {len(starts):,} {self._noun} has a part to learn from that fits a row of "
                f"{seq_len} tokens (data.seq_len): raise it, or set data.long_documents=cut"
            )
        # What is only partly learned stays whole: an answer without its prompt teaches nothing.
        self.plan = packing.plan(starts[kept], lengths[kept], seq_len, cut=not tokens.has_spans)
        self.seed, self.n_rows = seed, self.plan.n_rows

    @property
    def padding(self) -> float:
        """The share of positions that are padding."""
        return self.plan.waste

    @property
    def told(self) -> str:
        """How the documents were packed, in words."""
        long, plan = self.long, self.plan
        begun = (long.n_begun, "end with the last answer that fits")
        did = ((long.n_cut, "fill several"), begun, (long.n_dropped, "are left out"))
        what = [f"{n:,} {words}" for n, words in did if n]
        lost = f" ({long.n_unread:,} of their tokens are not learned)" if long.n_unread else ""
        more = f"; {plan.n_cut:,} cuts fill gaps" if plan.n_cut else ""
        return (
            f"{plan.n_rows:,} rows an epoch, {self.padding:.2%} padding; {long.n_cut + long.n_begun + long.n_dropped:,} of "
            f"{self.n_documents:,} {self._noun} are longer than a row{': ' if what else ''}{', '.join(what)}{lost}{more}"
        )

    def pieces(self, ordinals: np.ndarray) -> Pieces:
        """Of the rows with these numbers, which ascend over all epochs; ordered by row, then column."""
        return _in_epochs(self.plan, ordinals, self.seed)


class Long(NamedTuple):
    """What became of documents longer than a row, and how many tokens that would be learned are not read."""

    n_cut: int
    n_begun: int
    n_dropped: int
    n_unread: int


def _shortened(
    tokens: Tokens, starts: np.ndarray, lengths: np.ndarray, seq_len: int, long: str
) -> tuple[np.ndarray, Long]:
    """(how much of each document is read, 0 of what is left out; what that means)."""
    above = np.flatnonzero(lengths > seq_len)
    if long == "cut" or (long == "auto" and not tokens.has_spans):
        return lengths, Long(len(above), 0, 0, 0)
    lengths, n_cut, n_unread = lengths.copy(), 0, 0
    for i in above.tolist():
        start, n = int(starts[i]), int(lengths[i])
        learned = [(0, n)]  # of what has no marks all is
        if tokens.has_spans:
            near = tokens.spans(start, n)
            learned = [(max(s.start - start, 0), min(s.end - start, n)) for s in near if s.kind == "train"]
        total = sum(b - a for a, b in learned)
        if total == n:  # text: it has no prompt that what is cut off would miss
            fits = seq_len
            if long == "auto":
                n_cut += 1
                continue
        else:
            fits = max((b for a, b in learned if a and b <= seq_len), default=0)
        lengths[i] = 0 if long == "drop" else fits
        n_unread += total - sum(min(b, lengths[i]) - a for a, b in learned if a < lengths[i])
    n_dropped = int((lengths[above] == 0).sum())
    return lengths, Long(n_cut, len(above) - n_cut - n_dropped, n_dropped, int(n_unread))


class Pairs:
    """Rows of twice `seq_len` made of pairs: chosen documents in the first half, the rejected ones in the second in order.

    So no cut between rows parts a pair, and each reply has the whole context. Pairs are packed by the longer of the two;
    those with a document longer than `seq_len` are left out, since the beginning of a reply is not what was judged.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, end: int | None = None, long: str = "auto") -> None:
        if long not in ("auto", "drop"):
            raise ValueError(
                f"data.long_documents ({long}): a pair with a document longer than data.seq_len is left out, since the "
                "beginning of a reply is not what was judged; set data.long_documents=drop"
            )
        starts, sizes = _pairs(tokens, tokens.n_tokens if end is None else end)
        kept = sizes.max(axis=1) <= seq_len
        if not kept.any():
            raise ValueError(
                f"{tokens.path}: a split has {len(kept):,} pairs, and each has a document longer than data.seq_len "
                f"({seq_len}): raise it, or prepare the data set with a larger val_fraction"
            )
        self._starts, self._sizes, self.n_documents = starts[kept], sizes[kept], 2 * len(kept)
        self.plan = packing.plan(self._starts, self._sizes.max(axis=1), seq_len, cut=False)
        self.seq_len, self.seed, self.n_rows = seq_len, seed, self.plan.n_rows

    @property
    def padding(self) -> float:
        """The share of positions that are padding."""
        return 1 - int(self._sizes.sum()) / (2 * self.n_rows * self.seq_len)

    @property
    def told(self) -> str:
        """How the pairs were packed, in words."""
        n_pairs, n_kept = self.n_documents // 2, len(self._starts)
        left_out = f"{n_pairs - n_kept:,} with a document longer than data.seq_len are left out"
        return (
            f"{n_kept:,} of {n_pairs:,} pairs in {self.n_rows:,} rows an epoch, {self.padding:.2%} padding; {left_out}"
        )

    def pieces(self, ordinals: np.ndarray) -> Pieces:
        """Of the rows with these numbers, which ascend over all epochs; ordered by row, then column."""
        row, _, start, _ = _in_epochs(self.plan, ordinals, self.seed)
        sizes = self._sizes[np.searchsorted(self._starts, start)]
        chosen, rejected = sizes.T
        return _by_row(
            [
                Pieces(row, _columns(row, chosen), start, chosen),
                Pieces(row, self.seq_len + _columns(row, rejected), start + chosen, rejected),
            ]
        )


def row_tokens(tokens: Tokens, seq_len: int) -> int:
    """Tokens of a row: of pairs it holds both sides."""
    return 2 * seq_len if tokens.pairs else seq_len


def _in_epochs(plan: packing.Plan, ordinals: np.ndarray, seed: int) -> Pieces:
    """The pieces of a plan's rows with these numbers, which ascend over all epochs; ordered by row, then column."""
    epochs, slots = np.divmod(ordinals, plan.n_rows)
    parts = []
    for epoch in _epochs(epochs):
        here = np.flatnonzero(epochs == epoch)
        row, start, count = plan.pieces(slots[here], seed, epoch)
        parts.append(Pieces(here[row], _columns(row, count), start, count))
    return _by_row(parts)


def _columns(row: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Where pieces of `count` tokens stand: each where those before it in its row end."""
    begins = np.cumsum(count) - count
    return begins - begins[np.searchsorted(row, row)]


def _by_row(parts: list[Pieces]) -> Pieces:
    """All of them, ordered by row; those of a row in order."""
    if len(parts) == 1:
        return parts[0]
    joined = Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    order = np.argsort(joined.row, kind="stable")
    return Pieces(*(column[order] for column in joined))


def _epochs(epochs: np.ndarray) -> list[int]:
    """The different ones; they ascend, which spares np.unique, the first of which imports all of numpy.ma."""
    return epochs[np.flatnonzero(np.diff(epochs, prepend=-1))].tolist()


def _order(tokens: Tokens, config: DataConfig, seed: int) -> Stream | Packed | Pairs:
    if tokens.pairs:
        return Pairs(tokens, config.seq_len, seed, long=config.long_documents)
    if config.packing == "documents" or tokens.has_spans:
        return Packed(tokens, config.seq_len, seed, long=config.long_documents)
    return Stream(tokens, config.seq_len, seed)


def deal(weights: list[float]) -> np.ndarray:
    """(n,) rows of a cycle for each weight: exact shares by largest remainder, at least one each."""
    shares = np.array(weights) / sum(weights) * CYCLE
    quotas = np.floor(shares).astype(np.int64)
    quotas[np.argsort(quotas - shares, kind="stable")[: CYCLE - quotas.sum()]] += 1
    if quotas.min() < 1:
        raise ValueError(f"a share of {min(weights):.2g} is less than one row in {CYCLE}; leave it out or raise it")
    return quotas


Window = tuple[int, int]  # numbers of the first and the last batch


def merged(windows: Iterable[Sequence[int]]) -> list[Window]:
    """The same batches as windows that ascend and do not touch."""
    found: list[Window] = []
    for first, last in sorted((int(first), int(last)) for first, last in windows):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


def numbered(steps: np.ndarray, skipped: Iterable[Window]) -> np.ndarray:
    """The numbers of the batches of these updates, where those in the windows `skipped` (as `merged` gives them) are left out."""
    numbers = steps
    for first, last in skipped:
        numbers = np.where(numbers >= first, numbers + (last - first + 1), numbers)
    return numbers


class Loader:
    """Training batches of `batch_rows` rows of `seq_len` tokens; `prefix`: they say which tokens belong to a prompt.

    `skipped` are windows of batches that no update reads, because numbers went wrong in them: a recorded part of the order
    of data, which may be set between two calls.
    """

    skipped: Sequence[Window] = ()

    def __init__(self, data: Data, config: DataConfig, batch_rows: int, seed: int, *, prefix: bool = False) -> None:
        self.parts, self.config, self.batch_rows = data.parts, config, batch_rows
        if len({part.train.pairs for part in self.parts}) > 1:
            kinds = ", ".join(f"{part.name} ({'pairs' if part.train.pairs else 'text'})" for part in self.parts)
            raise ValueError(f"pairs and other data do not mix, since each has an objective of its own: {kinds}")
        self.seq_len, self.prefix = row_tokens(self.parts[0].train, config.seq_len), prefix
        for part in self.parts:
            if part.train.conversations and not config.document_mask:
                raise ValueError(
                    f"{part.name} holds conversations, several of which share a row, and none may read another: set "
                    "data.document_mask=true"
                )
            if part.n_tokens < config.seq_len and not part.train.has_spans:
                raise ValueError(
                    f"{part.name}: the training split has {part.n_tokens} tokens, fewer than data.seq_len "
                    f"({config.seq_len}): add text or lower it"
                )
        mixed = len(self.parts) > 1
        seeds = [key(seed, i, "part") if mixed else seed for i in range(len(self.parts))]
        self.orders = [_order(part.train, config, own) for part, own in zip(self.parts, seeds, strict=True)]
        # The component of each row of a cycle, and which of the component's rows of the cycle it is. It repeats with
        # every cycle, what it stands for does not; so a component's rows come in order and its epochs are whole.
        self._quotas = deal([part.weight for part in self.parts])
        places = permute(np.arange(CYCLE), CYCLE, key(seed, 0, "mixture"))
        self._component = np.repeat(np.arange(len(self.parts)), self._quotas)[places]
        self._rank = np.empty(CYCLE, dtype=np.int64)
        for i, quota in enumerate(self._quotas.tolist()):
            self._rank[self._component == i] = np.arange(quota)

    def batch(self, step: int) -> Batch:
        """The batch of update `step`, counted from 1. Pure: the same (seed, step) always gives the same rows."""
        return next(self.portions(step, step))[0]

    def sources_of(self, step: int) -> list[str]:
        """The name of the part that each row of that batch comes from."""
        return [self.parts[i].name for i in self._component[self._rows_of(step) % CYCLE].tolist()]

    def places(self, step: int) -> list[Pieces]:
        """Where the rows of that batch stand, for each part."""
        return self._places(self._rows_of(step))

    def number(self, step: int) -> int:
        """The number of the batch of that update: without skipped windows it is the step."""
        return int(numbered(np.array([step]), self.skipped)[0])

    def _rows_of(self, first: int, n: int = 1) -> np.ndarray:
        """The numbers of the rows of `n` updates from `first` on; they ascend."""
        numbers = numbered(np.arange(first, first + n), self.skipped)
        return ((numbers - 1)[:, None] * self.batch_rows + np.arange(self.batch_rows)).reshape(-1)

    def epochs(self, steps: int) -> list[tuple[str, float]]:
        """How often each part is read in that many updates."""
        cycles, rest = divmod(steps * self.batch_rows, CYCLE)
        drawn = cycles * self._quotas + np.bincount(self._component[:rest], minlength=len(self.parts))
        return [(part.name, n / o.n_rows) for part, o, n in zip(self.parts, self.orders, drawn.tolist(), strict=True)]

    def portions(self, first: int, last: int, pin: bool = False) -> Iterator[list[Batch]]:
        """The batches of updates first .. last, a few at a time; pinned ones are contiguous."""
        ahead = max(1, AHEAD_ROWS // self.batch_rows)
        at_once = max(1, AHEAD_TOKENS // (self.batch_rows * self.seq_len))
        for step in range(first, last + 1, ahead):
            n_steps = min(ahead, last + 1 - step)
            n_rows, places = n_steps * self.batch_rows, self._places(self._rows_of(step, n_steps))
            for low in range(0, n_rows, at_once * self.batch_rows):
                high = min(low + at_once * self.batch_rows, n_rows)
                parts = [
                    (part.train, between(pieces, low, high)) for part, pieces in zip(self.parts, places, strict=True)
                ]
                whole = read(parts, high - low, self.seq_len, self.config.document_mask, prefix=self.prefix)
                if pin:
                    whole = Batch._make(x if x is None else x.contiguous().pin_memory() for x in whole)
                columns = [[None] * (high - low) if x is None else x.split(self.batch_rows) for x in whole]
                yield [Batch(*some) for some in zip(*columns, strict=False)]

    def _places(self, index: np.ndarray) -> list[Pieces]:
        """Where the rows with these numbers stand, for each component."""
        if len(self.parts) == 1:
            return [self.orders[0].pieces(index)]
        cycles, slots = np.divmod(index, CYCLE)
        component = self._component[slots]
        ordinals = cycles * self._quotas[component] + self._rank[slots]
        places = []
        for i, order in enumerate(self.orders):
            here = np.flatnonzero(component == i)
            pieces = order.pieces(ordinals[here]) if len(here) else NOTHING
            places.append(pieces._replace(row=here[pieces.row]))
        return places


# Reading rows


def between(pieces: Pieces, low: int, high: int) -> Pieces:
    """Those of rows low .. high - 1, which are numbered from 0."""
    a, b = np.searchsorted(pieces.row, [low, high])
    return Pieces(pieces.row[a:b] - low, *(column[a:b] for column in pieces[1:]))


def read(
    parts: list[tuple[Tokens, Pieces]],
    n_rows: int,
    seq_len: int,
    document_mask: bool,
    end: int | None = None,
    prefix: bool = False,
) -> Batch:
    """Rows made of pieces of the circles of tokens (of their first `end` tokens, where a document ends).

    A piece learns what follows each of its tokens. What a row has left is filled with start tokens without targets.
    """
    (first, pieces), *others = parts
    last = pieces.start + seq_len
    if (
        not others
        and not first.has_spans
        and (pieces.length == seq_len).all()
        and (last < (end or first.n_tokens)).all()
    ):
        ids = np.empty((n_rows, seq_len + 1), dtype=np.int64)
        first.read_rows(pieces.start, ids)
        both = torch.from_numpy(ids)
        batch = Batch(both[:, :-1], both[:, 1:])
    else:
        ids = np.full((n_rows, seq_len), first.start_id, dtype=np.int64)
        targets = np.full((n_rows, seq_len), IGNORED, dtype=np.int64)
        for tokens, some in parts:
            _fill(tokens, some, ids, targets, tokens.n_tokens if end is None else end)
        batch = Batch(torch.from_numpy(ids), torch.from_numpy(targets))
    if not document_mask:
        return batch
    doc_ids, positions = _documents(parts, n_rows, seq_len)
    return batch._replace(
        doc_ids=torch.from_numpy(doc_ids),
        positions=torch.from_numpy(positions),
        prefix=torch.from_numpy(_prompts(parts, n_rows, seq_len)) if prefix else None,
    )


def _fill(tokens: Tokens, pieces: Pieces, ids: np.ndarray, targets: np.ndarray, end: int) -> None:
    """Write pieces of one split where they belong."""
    seq_len = ids.shape[1]
    whole = (pieces.length == seq_len) & (pieces.start + seq_len < end) & (not tokens.has_spans)
    if whole.any():
        rows = np.empty((int(whole.sum()), seq_len + 1), dtype=np.int64)
        tokens.read_rows(pieces.start[whole], rows)
        ids[pieces.row[whole]], targets[pieces.row[whole]] = rows[:, :-1], rows[:, 1:]
    for row, column, start, count in np.stack(pieces, axis=1)[~whole & (pieces.length > 0)].tolist():
        # After the last token of the circle comes its first: a start token.
        inside = tokens.read(start, min(count + 1, end - start))
        here = slice(column, column + count)
        ids[row, here] = inside[:count]
        targets[row, here] = tokens.start_id
        targets[row, column : column + len(inside) - 1] = inside[1:]
        if tokens.has_spans:
            targets[row, here][~_marked(tokens, "train", start + 1, count)] = IGNORED


def _marked(tokens: Tokens, kind: Literal["train", "prefix"], start: int, count: int) -> np.ndarray:
    """(count,) bool: which of the tokens start .. start + count - 1 lie in a span of this kind."""
    marked = np.zeros(count, dtype=bool)
    for span in tokens.spans(start, min(count, tokens.n_tokens - start)):
        if span.kind == kind:
            marked[max(0, span.start - start) : span.end - start] = True
    if start + count > tokens.n_tokens:  # after the last token of the circle comes its first
        marked[-1] = any(span.kind == kind and span.start == 0 for span in tokens.spans(0, 1))
    return marked


def _prompts(parts: list[tuple[Tokens, Pieces]], n_rows: int, seq_len: int) -> np.ndarray:
    """(n_rows, seq_len) bool: which tokens lie in a `prefix` span."""
    prompts = np.zeros((n_rows, seq_len), dtype=bool)
    for tokens, pieces in parts:
        for row, column, start, count in np.stack(pieces, axis=1)[pieces.length > 0].tolist():
            prompts[row, column : column + count] = _marked(tokens, "prefix", start, count)
    return prompts


def _documents(parts: list[tuple[Tokens, Pieces]], n_rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(document number within the row, position in it): a document begins where a piece does, or inside of one."""
    begins = np.zeros((n_rows, seq_len + 1), dtype=bool)
    for tokens, pieces in parts:
        starts = tokens.document_starts
        low, high = (np.searchsorted(starts, at) for at in (pieces.start + 1, pieces.start + pieces.length))
        counts = high - low
        piece = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        inner = starts[low[piece] + within] - pieces.start[piece]
        begins[pieces.row[piece], pieces.column[piece] + inner] = True
        begins[pieces.row, pieces.column] = True
        begins[pieces.row, pieces.column + pieces.length] = True  # of the next piece, or of what fills the row
    begins = begins[:, :-1]
    begins[:, 0] = False
    columns = np.arange(seq_len)
    return np.cumsum(begins, axis=1), columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)


def prefetched(loader: Loader, first: int, last: int, pin: bool = False) -> Generator[Batch, None, None]:
    """loader.batch(first) .. loader.batch(last), read ahead by a thread; `pin` where there is CUDA to copy to.

    An error of the thread is raised here. The thread ends with the iterator, however that ends, or with the program.
    """
    ready: SimpleQueue[list[Batch] | BaseException | None] = SimpleQueue()
    free: SimpleQueue[None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            for portion in loader.portions(first, last, pin and torch.cuda.is_available()):
                free.get()
                if stop.is_set():
                    return
                ready.put(portion)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    def end() -> None:
        stop.set()
        free.put(None)
        thread.join()

    for _ in range(WAITING):
        free.put(None)
    thread = threading.Thread(target=work, name="batches", daemon=True)  # or nothing would be run at exit
    thread.start()
    atexit.register(end)  # an interpreter that ends while a thread is in native code aborts
    try:
        while (portion := ready.get()) is not None:
            if isinstance(portion, BaseException):
                raise portion
            free.put(None)
            yield from portion
    finally:
        end()
        atexit.unregister(end)


# Validation


def validation_batches(
    tokens: Tokens,
    seq_len: int,
    batch_rows: int,
    max_tokens: int | None,
    document_mask: bool = False,
    prefix: bool = False,
) -> Iterator[Batch]:
    """Every target of the split once, in order, in windows that do not overlap; the tail is kept. Documents with prompts
    are packed whole instead.

    With `max_tokens` the first whole documents that reach it (all if they do not), read as a circle of their own.
    """
    end = evaluated_tokens(tokens, max_tokens)
    for n_rows, pieces in validation_places(tokens, seq_len, batch_rows, end):
        yield read([(tokens, pieces)], n_rows, row_tokens(tokens, seq_len), document_mask, end, prefix)


def _pairs(tokens: Tokens, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(where each pair up to `end` starts (n,), how long both its documents are (n, 2))."""
    bounds = np.append(tokens.document_starts, tokens.n_tokens)
    bounds = bounds[: np.searchsorted(bounds, end) + 1]
    return bounds[:-1:2], np.diff(bounds).reshape(-1, 2)


def validation_places(tokens: Tokens, seq_len: int, batch_rows: int, end: int) -> Iterator[tuple[int, Pieces]]:
    """(rows, where they stand) of each batch of an evaluation of the first `end` tokens."""
    if tokens.pairs and not (_pairs(tokens, end)[1].max(axis=1) <= seq_len).any():
        return  # a source whose few held-out pairs are all too long
    kind = Pairs if tokens.pairs else Packed
    packed = kind(tokens, seq_len, 0, end) if tokens.has_spans or tokens.pairs else None
    starts = np.arange(0, end, seq_len)
    n_rows = len(starts) if packed is None else packed.n_rows
    for i in range(0, n_rows, batch_rows):
        rows = np.arange(i, min(i + batch_rows, n_rows))
        if packed is None:
            part = starts[rows]
            pieces = Pieces(rows - i, np.zeros_like(rows), part, np.minimum(seq_len, end - part))
        else:
            pieces = packed.pieces(rows)
        yield len(rows), pieces


def evaluated_tokens(tokens: Tokens, max_tokens: int | None) -> int:
    """Where the last document that an evaluation of about `max_tokens` reads ends."""
    if max_tokens is None or max_tokens >= tokens.n_tokens:
        return tokens.n_tokens
    ends = np.append(tokens.document_starts[1:], tokens.n_tokens)
    ends = ends[1::2] if tokens.pairs else ends
    return int(ends[np.searchsorted(ends, max_tokens)])


def evaluated_bytes(tokens: Tokens, max_tokens: int | None) -> int:
    """Raw UTF-8 bytes of the documents that such an evaluation reads."""
    n_documents = np.searchsorted(tokens.document_starts, evaluated_tokens(tokens, max_tokens))
    return int(tokens.document_bytes[:n_documents].sum())
