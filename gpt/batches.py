"""Batches as training gets them, and what a data set holds, as blocks of a page: the same loader, seed and step."""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from gpt import config as settings
from gpt import settle, signals
from gpt.data import (
    IGNORED,
    Batch,
    Data,
    DataConfig,
    Loader,
    Stream,
    evaluated_tokens,
    open_data,
    read,
    row_tokens,
    validation_places,
)
from gpt.page import Bars, Block, Heading, Note, Row, Segment, Table, Token, quoted
from gpt.places import Place, named, of_batch, openings
from gpt.plan import TrainingConfig, fixed_steps
from gpt.shards import Tokens
from gpt.tokenizer import Tokenizer
from gpt.trainer import TrainConfig

CHUNK = 1 << 20  # tokens read at once
FREQUENT = 30
DRAWN_STEPS = 1000  # over which shares and epochs are counted when no run says how long it is


@dataclass(frozen=True)
class Order:
    """What decides the order of data: the data settings, rows of a batch, the seed, and how many updates are looked at."""

    data: DataConfig
    batch_rows: int
    seed: int
    steps: int


def order(dataset: str | None, config: Sequence[str] | None, seq_len: int | None) -> Order:
    """As the settings file and overrides in `config` say, or else as a run without any settings of its own.

    Raises ConfigError, or ValueError if a batch is no whole number of rows.
    """
    if config is None:
        data = DataConfig.model_validate({"path": dataset} | ({} if seq_len is None else {"seq_len": seq_len}))
        rows = max(1, TrainingConfig.model_fields["batch_tokens"].default // data.seq_len)
        return Order(data, rows, TrainConfig.model_fields["seed"].default, DRAWN_STEPS)
    file, *overrides = config
    if dataset is not None:
        overrides += [f"data.path={json.dumps(dataset)}", "data.mixture=null", "data.sources=null"]
    if seq_len is not None:
        overrides.append(f"data.seq_len={seq_len}")
    run = settings.load(TrainConfig, Path(file), overrides, {"name": Path(file).stem})
    settle.check_batch(run)
    steps = run.choices.steps if run.choices is not None else fixed_steps(run.train) or DRAWN_STEPS
    return Order(run.data, settle.rows(run), run.seed, steps)


# One pass over a split


@dataclass(frozen=True)
class Contents:
    """What one pass over a split finds: how often each id occurs, and 8 bytes of each document's sha256."""

    counts: np.ndarray  # (vocab_size,) int64
    lengths: np.ndarray  # (n_documents,) int64, start token included
    digests: np.ndarray  # (n_documents,) uint64


def contents(tokens: Tokens) -> Contents:
    """Read a split once, in bounded memory besides 8 bytes a document; reading checks every block."""
    starts = tokens.document_starts
    counts = np.zeros(tokens.vocab_size, dtype=np.int64)
    digests = np.empty(len(starts), dtype=np.uint64)
    ids_hash, document = hashlib.sha256(), -1
    for first in range(0, tokens.n_tokens, CHUNK):
        signals.check()
        ids = np.ascontiguousarray(tokens.read(first, min(CHUNK, tokens.n_tokens - first)))
        data = ids.data
        counts += np.bincount(ids, minlength=tokens.vocab_size)
        low, high = np.searchsorted(starts, (first, first + len(ids))).tolist()
        at = 0
        for start in (starts[low:high] - first).tolist():
            ids_hash.update(data[at:start])
            if document >= 0:
                digests[document] = int.from_bytes(ids_hash.digest()[:8], "little")
            ids_hash, document, at = hashlib.sha256(), document + 1, start
        ids_hash.update(data[at:])
    if document >= 0:
        digests[document] = int.from_bytes(ids_hash.digest()[:8], "little")
    return Contents(counts, np.diff(np.append(starts, tokens.n_tokens)), digests)


def repeats(found: Sequence[Contents]) -> list[tuple[int, int]]:
    """(documents, tokens) in each that repeat a document before them, there or in an earlier one."""
    digests = np.concatenate([each.digests for each in found])
    again = np.ones(len(digests), dtype=bool)
    again[np.unique(digests, return_index=True)[1]] = False
    ends = np.cumsum([len(each.digests) for each in found])
    parts = zip(np.split(again, ends[:-1]), found, strict=True)
    return [(int(here.sum()), int(each.lengths[here].sum())) for here, each in parts]


def powers(values: np.ndarray) -> list[tuple[str, int]]:
    """How many values lie in each range from a power of two to the next, from the first that has any to the last."""
    if not len(values):
        return []
    bins = np.where(values < 1, 0, np.frexp(np.maximum(values, 1).astype(np.float64))[1])
    counts = np.bincount(bins)
    return [(_range(k), int(counts[k])) for k in range(int(bins.min()), len(counts))]


def _range(k: int) -> str:
    low, high = 1 << (k - 1) if k else 0, (1 << k) - 1
    return f"{low:,}" if low >= high else f"{low:,}-{high:,}"


# A row of a batch


def cells(
    tokens: Sequence[int], targets: Sequence[int], tokenizer: Tokenizer, start_id: int
) -> tuple[list[tuple[int, Token]], int]:
    """What a row holds as it is read: (input position, token) pairs, and how many positions at its end are padding.

    A token is `learned` if it is a target; the first of a row never is, it is only read. A target that is not also the
    next input (the delimiter that ends the last document of a row, say) stands there too.
    """
    n = len(tokens)
    while n and tokens[n - 1] == start_id and targets[n - 1] == IGNORED:
        n -= 1

    def token(i: int, learned: bool) -> Token:
        return Token(
            tokenizer.piece(i), i, learned, "control" if i in tokenizer.control_ids or i == start_id else "text"
        )

    shown = [(0, token(tokens[0], learned=False))] if n else []
    for at in range(n):
        target, follows = targets[at], tokens[at + 1] if at + 1 < n else None
        if target != IGNORED:
            shown.append((at + 1 if follows == target else at, token(target, learned=True)))
        if follows is not None and follows != target:
            shown.append((at + 1, token(follows, learned=False)))
    return shown, len(tokens) - n


LEGEND = Row(
    "how to read the rows",
    [
        Segment(
            "a document: each token in one of two shades",
            [
                Token("a token", role="control"),
                Token(" that"),
                Token(" opens"),
                Token(" it;"),
                Token(" dim:", learned=False),
                Token(" read,", learned=False),
                Token(" not learned", learned=False),
            ],
        ),
        Segment("the next document", [Token("in"), Token(" other"), Token(" shades")]),
    ],
)


def of_data(
    dataset: str | None, config: Sequence[str] | None, *, step: int, rows: int, seq_len: int | None, split: str
) -> tuple[str, Iterator[Block]]:
    """(title, blocks): `rows` rows of the batch of update `step` (or of that batch of an evaluation), and what the split holds.

    Raises ConfigError, ValueError or FileNotFoundError in words, CorruptError for a damaged data set.
    """
    how = order(dataset, config, seq_len)
    data = open_data(how.data)
    if config is None and any(part.train.conversations for part in data.parts):  # no run reads them otherwise
        how = replace(how, data=how.data.model_copy(update={"document_mask": True}))
    title = f"{', '.join(part.name for part in data.parts)}: {split}"
    shown = _training(data, how, step, rows) if split == "train" else _validation(data, how, step, rows)
    return title, chain(shown, _holdings(data, how, split))


def _training(data: Data, how: Order, step: int, n_rows: int) -> Iterator[Block]:
    loader = Loader(data, how.data, how.batch_rows, how.seed)
    batch = loader.batch(step)
    places = of_batch(loader, step)
    yield Heading(f"the batch of step {step:,}")
    yield from _rows(batch, places, data, n_rows, how)
    yield from _shares(data, loader, how)


def _validation(data: Data, how: Order, step: int, n_rows: int) -> Iterator[Block]:
    """Batches of an evaluation are counted from 1 over all parts, one after another."""
    seq_len, left = how.data.seq_len, step - 1
    for part in data.parts:
        tokens = part.val
        if not tokens.n_tokens:  # a source without held-out chats
            continue
        for rows, pieces in validation_places(tokens, seq_len, how.batch_rows, evaluated_tokens(tokens, None)):
            if left:
                left -= 1
                continue
            batch = read([(tokens, pieces)], rows, row_tokens(tokens, seq_len), how.data.document_mask)
            yield Heading(f"batch {step:,} of an evaluation: {part.name}")
            yield from _rows(batch, list(named(pieces, part.name, tokens)), data, n_rows, how)
            return
    raise ValueError(
        f"an evaluation has {step - 1 - left} batches of {how.batch_rows} rows of {seq_len} tokens, not {step}; lower --step"
    )


def _rows(batch: Batch, places: Sequence[Place], data: Data, n_rows: int, how: Order) -> Iterator[Block]:
    """The first rows of a batch, and how much of all its positions is learned, only read, or padding."""
    n_padding, seq_len = 0, how.data.seq_len
    shown: list[Block] = []
    start_id = data.parts[0].train.start_id
    if data.parts[0].train.pairs:  # both halves of a row, one below the other
        batch = Batch(batch.tokens.reshape(-1, seq_len), batch.targets.reshape(-1, seq_len))
        places = [replace(p, row=2 * p.row + p.column // seq_len, column=p.column % seq_len) for p in places]
    for number, (tokens, targets) in enumerate(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)):
        row, padding = cells(tokens, targets, data.tokenizer, start_id)
        n_padding += padding
        if number < n_rows:
            here = [place for place in places if place.row == number]
            name = here[0].name if here else "padding alone"
            shown.append(Row(f"row {number}: {name}", segments(row, padding, openings(here))))
    n_all = batch.tokens.numel()
    yield Note(
        f"{len(batch.tokens):,} rows of {how.data.seq_len:,} tokens, seed {how.seed}: "
        f"{_share(batch.n_targets, n_all)} of the targets are learned, "
        f"{_share(n_all - batch.n_targets - n_padding, n_all)} are masked, {_share(n_padding, n_all)} are padding"
    )
    if shown:
        yield LEGEND
    yield from shown


def segments(row: Sequence[tuple[int, Token]], padding: int, documents: Sequence[tuple[int, str]]) -> list[Segment]:
    """A row's tokens document by document, given the column and label of each."""
    groups: list[tuple[str, list[Token]]] = [(label, []) for _, label in documents] or [("", [])]
    columns = [column for column, _ in documents]
    for at, token in row:
        groups[max(0, bisect_right(columns, at) - 1)][1].append(token)
    if padding:
        groups.append(("", [Token(f"{padding:,} x padding", None, False, "padding")]))
    return [Segment(label, group) for label, group in groups if group]


def _shares(data: Data, loader: Loader, how: Order) -> Iterator[Block]:
    """What each part was meant to be of the tokens, what it is, and how often it is read."""
    drawn: Counter[str] = Counter()
    for step in range(1, how.steps + 1):
        signals.check()
        drawn.update(loader.sources_of(step))
    epochs = dict(loader.epochs(how.steps))
    total = sum(part.weight for part in data.parts)
    yield Heading(f"the first {how.steps:,} updates")
    yield Table(
        ("", "tokens", "share asked for", "share drawn", "epochs", "padding"),
        [
            (
                part.name,
                f"{part.n_tokens:,}",
                _share(part.weight, total),
                _share(drawn[part.name], drawn.total()),
                f"{epochs[part.name]:.2f}",
                f"{layout.padding:.2%}",
            )
            for part, layout in zip(data.parts, loader.orders, strict=True)
        ],
    )
    for part, layout in zip(data.parts, loader.orders, strict=True):
        if not isinstance(layout, Stream):
            yield Note(f"{part.name}: {layout.told}")


def _holdings(data: Data, how: Order, split: str) -> Iterator[Block]:
    """What the split of each part holds, from one pass over it."""
    views = [part.train if split == "train" else part.val for part in data.parts]
    found = [contents(view) for view in views]
    names = [part.name for part in data.parts]
    lengths = np.concatenate([each.lengths for each in found])
    yield Heading("documents")
    yield Table(
        ("", "documents", "tokens", "shortest", "median", "mean", "longest", f"above {how.data.seq_len:,}"),
        [_lengths(name, each.lengths, how.data.seq_len) for name, each in zip(names, found, strict=True)],
    )
    yield Bars("tokens of a document", powers(lengths))
    yield Heading("exact duplicates")
    yield Table(
        ("", "repeat an earlier document", "of documents", "of tokens"),
        [
            (name, f"{n:,}", _share(n, len(each.lengths)), _share(n_tokens, int(each.lengths.sum())))
            for name, each, (n, n_tokens) in zip(names, found, repeats(found), strict=True)
        ],
    )
    counts = sum(each.counts for each in found)
    yield from _vocabulary(np.asarray(counts), data.tokenizer)


def _lengths(name: str, lengths: np.ndarray, seq_len: int) -> Sequence[str]:
    if not len(lengths):
        return (name, "0", "0", "-", "-", "-", "-", "-")
    figures = (lengths.min(), int(np.median(lengths)), round(lengths.mean()), lengths.max())
    above = _share(int((lengths > seq_len).sum()), len(lengths))
    return (name, f"{len(lengths):,}", f"{lengths.sum():,}", *(f"{n:,}" for n in figures), above)


def _vocabulary(counts: np.ndarray, tokenizer: Tokenizer) -> Iterator[Block]:
    total, used = int(counts.sum()), int(np.count_nonzero(counts))
    descending = np.sort(counts)[::-1]
    half = int(np.searchsorted(np.cumsum(descending), total / 2)) + 1 if total else 0
    yield Heading("tokens")
    yield Note(
        f"{used:,} of {tokenizer.size:,} entries occur ({_share(used, tokenizer.size)}); "
        f"the {half:,} most frequent make half of the text"
    )
    yield Bars("occurrences of an entry", powers(counts[: tokenizer.size]))
    first = [i for i in np.argsort(-counts, kind="stable")[:FREQUENT].tolist() if counts[i]]
    rows = [(quoted(tokenizer.piece(i)), f"{i}", f"{counts[i]:,}", _share(int(counts[i]), total)) for i in first]
    yield Table(("most frequent", "id", "count", "share"), rows)


def _share(n: float, d: float) -> str:
    return f"{n / d:.2%}" if d else "-"
