"""The one pass over a corpus, and all that looks at the whole of it: duplicates, split, chunks, fingerprint, sample.

The pass writes a table of documents; everything else is computed from that table, in memory that does not depend on the
size of the corpus. So it is the same however the corpus is read afterwards, and need not be done again to continue.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.recfunctions import repack_fields

from gpt import conversations, corpus, fields, signals
from gpt.corpus import BadRecord
from gpt.table import GIVEN, Input, Kind, Table, Writer, texts, values

CHUNK_BYTES = 64 << 20  # of a chunk's text, of large corpora; those of smaller ones are a CHUNKS-th of it
LEAST_BYTES = 8 << 20  # but at least this
CHUNKS = 32  # so that many processes have something to do
CHUNK_DOCUMENTS = 1 << 20  # most rows of a chunk, which a process holds
TAIL_DOCUMENTS = 20  # split: auto takes whole documents from so many on
BUCKETS = 1 << 16  # of hashes, whose sizes are counted to cut at a fraction of the bytes
PIECE_CHARACTERS = 1 << 16  # a longer document is drawn in pieces of this length
DOCUMENT_SHARE = 16  # of what is drawn from a source, one document is a sixteenth at most while there is other text
RUN_ROWS = 1 << 10  # of the sample that are read at a time
TOLD_BYTES = 1 << 18  # read, between two words of how far the pass is
SHOWN_RECORDS = 100  # bad ones whose errors are kept
SPLITS = ("train", "val")
VAL = GIVEN.index("val")


class Part(NamedTuple):
    """Text of a document in one split, its raw UTF-8 bytes, its source's number, whether it is the first of it.

    `file` and `start` are where the document stands, as in the table.
    """

    split: str
    text: str
    n_bytes: int
    source: int
    begins: bool
    kind: Kind = "text"
    file: int = 0
    start: int = 0


@dataclass(frozen=True)
class Split:
    """Which text is held out. A pure function of the document, so that equal documents fall on the same side."""

    mode: Literal["hash", "tail", "given"]
    fraction: float  # tail: of each document's characters
    threshold: int  # hash: documents whose value is below are held out

    def parts(self, given: str | None, text: str, n_bytes: int, value: int, source: int, *rest: Any) -> Sequence[Part]:
        """The parts of a document that have any text. `n_bytes` may count other bytes than the text's, if normalized.
        `rest` is what a Part has besides, of a document that is not cut."""
        if self.mode == "hash":
            return (Part("val" if value < self.threshold else "train", text, n_bytes, source, True, *rest),)
        if self.mode == "given":
            return (Part(given or "train", text, n_bytes, source, True, *rest),)
        cut = self.cut(len(text))
        n_held_out = min(n_bytes, len(text[cut:].encode())) if cut else n_bytes
        both = (
            Part("train", text[:cut], n_bytes - n_held_out, source, True),
            Part("val", text[cut:], n_held_out, source, not cut),
        )
        return [part for part in both if part.text]

    def cut(self, n_characters: int) -> int:
        """Where the held-out tail of a document begins."""
        return int(n_characters * (1 - self.fraction))


# The pass


@dataclass(frozen=True)
class Pass:
    """What a pass over the corpus left out."""

    left_out: dict[str, int]  # "empty", "too short", "too long" -> documents
    n_skipped: int  # bad records
    skipped: list[str]  # errors of the first of them


def scan(
    inputs: Sequence[Input],
    work: Path,
    *,
    skip_bad: bool,
    check: Callable[[str, str], None] | None,
    advance: Callable[[int], None],
) -> Pass:
    """Read the corpus once, and write its table and spool into `work`.

    `check` is shown each text and what its place is called, `advance` is told of bytes as they are read; both may raise.
    ValueError in words for what cannot be read.
    """
    left_out: Counter[str] = Counter()
    skipped: list[str] = []
    n_skipped = 0

    def skip(error: BadRecord) -> None:
        nonlocal n_skipped
        n_skipped += 1
        if n_skipped <= SHOWN_RECORDS:
            skipped.append(str(error))

    with Writer(work) as table:
        for number, item in enumerate(inputs):
            first, n_bytes = table.n_rows, 0
            for document in corpus.documents(item.file, skip=skip if skip_bad else None, tally=left_out):
                if check is not None:
                    check(document.text, f"{item.file.label}: document {table.n_rows - first + 1}")
                table.add(document, number, item)
                n_bytes += document.n_bytes
                if n_bytes >= TOLD_BYTES:
                    advance(n_bytes)
                    n_bytes = 0
            advance(n_bytes)
    return Pass(dict(left_out), n_skipped, skipped)


# What the table tells


@dataclass(frozen=True)
class Chunk:
    """Rows first .. last - 1 of the table, which become one shard a split; `n_bytes` of them are not left out."""

    first: int
    last: int
    n_bytes: int


@dataclass
class Survey:
    """What looks at the whole corpus. All but the counts of duplicates is about what is not left out."""

    n_documents: int = 0
    n_bytes: int = 0
    n_repeated: int = 0
    repeated_bytes: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    bucket_bytes: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, dtype=np.int64))
    lowest: int = 1 << 64
    highest: int = -1
    has_validation: bool = False
    content: str = ""  # sha256 over the table, without places


def survey(work: Path, *, drop: bool) -> Survey:
    """Read the table of a finished pass. `drop`: leave out documents with the text of an earlier one."""
    table, found = Table(work), Survey()
    repeated = table.repeated()
    found.n_repeated = int(np.count_nonzero(repeated))
    if drop and found.n_repeated:
        table.drop(repeated)
    else:
        table.keep()
    content = hashlib.sha256()
    for first, rows in table.blocks():
        signals.check()
        found.repeated_bytes += int(rows["n_bytes"][repeated[first : first + len(rows)]].sum())
        kept = rows[rows["dropped"] == 0]
        content.update(repack_fields(kept[["value", "rest", "n_bytes", "source", "given"]]).tobytes())
        found.n_documents += len(kept)
        found.n_bytes += int(kept["n_bytes"].sum())
        found.has_validation |= bool((kept["given"] == VAL).any())
        own = kept[kept["given"] != VAL]
        if len(own):
            buckets = (own["value"] >> np.uint64(48)).astype(np.int64)
            found.bucket_bytes += np.bincount(buckets, own["n_bytes"], BUCKETS).astype(np.int64)
            found.lowest = min(found.lowest, int(own["value"].min()))
            found.highest = max(found.highest, int(own["value"].max()))
    found.content = content.hexdigest()
    found.chunks = list(chunks(table, min(CHUNK_BYTES, max(LEAST_BYTES, found.n_bytes // CHUNKS))))
    return found


def chunks(table: Table, size: int) -> Iterator[Chunk]:
    """Runs of rows whose text reaches `size` bytes, or of CHUNK_DOCUMENTS rows, in order."""
    first = n_bytes = 0
    for at, rows in table.blocks():
        sizes = np.cumsum(np.where(rows["dropped"], 0, rows["n_bytes"]).astype(np.int64))
        done = 0  # of this block's sizes, what earlier chunks have
        while True:
            cut = int(np.searchsorted(sizes, done + size - n_bytes))
            cut = min(cut, first + CHUNK_DOCUMENTS - at - 1)
            if cut >= len(sizes):
                break
            yield Chunk(first, at + cut + 1, n_bytes + int(sizes[cut]) - done)
            first, n_bytes, done = at + cut + 1, 0, int(sizes[cut])
        n_bytes += int(sizes[-1]) - done
    if n_bytes:
        yield Chunk(first, table.n_rows, n_bytes)


def choose_split(found: Survey, *, asked: str, fraction: float, most_bytes: float | None = None) -> Split:
    """Where the held-out text lies: `asked` is given, tail, hash or auto; at most `most_bytes` of it where that is known."""
    if asked == "given":
        return Split("given", 0.0, 0)
    if most_bytes is not None:
        fraction = min(fraction, most_bytes / found.n_bytes)
    if asked == "tail" or (asked == "auto" and found.n_documents < TAIL_DOCUMENTS):
        return Split("tail", fraction, 0)
    sums = np.cumsum(found.bucket_bytes)
    bucket = int(np.searchsorted(sums, fraction * found.n_bytes, side="right"))
    threshold = bucket * (1 << 64) // BUCKETS
    return Split("hash", fraction, max(threshold, found.lowest + 1))  # at least the document with the lowest hash


def parts(inputs: Sequence[Input], work: Path, chunk: Chunk, split: Split, *, skip_bad: bool) -> Iterator[Part]:
    """The text of a chunk, read again; table.Changed if it is not what was scanned."""
    rows = Table(work).read(chunk.first, chunk.last)
    found = zip(
        texts(inputs, work, rows, skip_bad=skip_bad),
        values(rows, "dropped", "given", "n_bytes", "value", "source", "file", "start"),
        strict=True,
    )
    kinds = [item.kind for item in inputs]
    for text, (dropped, given, n_bytes, value, source, file, start) in found:
        if not dropped:
            yield from split.parts(GIVEN[given], text, n_bytes, value, source, kinds[file], file, start)


# The tokenizer's sample


class _Pieces(NamedTuple):
    """Pieces of training text in order: row, number within the document, bytes (about), source, place in the draw."""

    row: np.ndarray  # all (n,)
    number: np.ndarray
    n_bytes: np.ndarray
    source: np.ndarray
    key: np.ndarray  # uint64, random: the lowest are drawn

    def take(self, which: np.ndarray) -> "_Pieces":
        return _Pieces(*(column[which] for column in self))


class Sample:
    """Training text to learn a vocabulary from: all of it, or pieces with low seeded hashes that make about `n_bytes`.

    Each source gives its share of the bytes. A tokenizer that saw the validation text would flatter the model, so there
    is none of it. Holds places, not text: it is read again each time the sample is iterated over.
    """

    def __init__(
        self, inputs: Sequence[Input], work: Path, split: Split, *, n_bytes: int, seed: int, skip_bad: bool
    ) -> None:
        self._inputs, self._table, self._split, self._skip_bad = inputs, Table(work), split, skip_bad
        key = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
        self._key = np.array([int.from_bytes(key, "big")], dtype=np.uint64)
        self._n_sources = 1 + max((item.source for item in inputs), default=0)
        given = np.zeros(self._n_sources)
        for pieces in self._blocks():
            given += np.bincount(pieces.source, pieces.n_bytes, self._n_sources)
        rates = None if given.sum() <= n_bytes else given * (n_bytes / given.sum())
        drawn = self._all() if rates is None else self._lowest(rates)
        self.n_bytes = int(drawn.n_bytes.sum())
        self._row, self._number = drawn.row, drawn.number

    def _blocks(self) -> Iterator[_Pieces]:
        """All pieces that may be drawn, in order."""
        for first, rows in self._table.blocks():
            signals.check()
            wanted = (rows["dropped"] == 0) & (rows["given"] != VAL)
            n_chars = rows["n_chars"].astype(np.int64)
            if self._split.mode == "hash":
                wanted &= rows["value"] >= np.uint64(min(self._split.threshold, (1 << 64) - 1))
            elif self._split.mode == "tail":
                n_chars = (n_chars * (1 - self._split.fraction)).astype(np.int64)
            n_pieces = np.where(wanted, -(-n_chars // PIECE_CHARACTERS), 0)
            at = np.repeat(np.arange(len(rows)), n_pieces)
            number = np.arange(len(at)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
            length = np.minimum(n_chars[at] - number * PIECE_CHARACTERS, PIECE_CHARACTERS)
            n_bytes = -(-rows["n_bytes"][at].astype(np.int64) * length // rows["n_chars"][at].astype(np.int64))
            key = _mixed(rows["value"][at] ^ _mixed(self._key + number.astype(np.uint64)))
            number, n_bytes, source = (column.astype(np.int32) for column in (number, n_bytes, rows["source"][at]))
            yield _Pieces(first + at, number, n_bytes, source, key)

    def _all(self) -> _Pieces:
        none = (np.empty(0, dtype) for dtype in (np.int64, np.int32, np.int32, np.int32, np.uint64))
        return _Pieces(*(np.concatenate(column) for column in zip(none, *self._blocks(), strict=True)))

    def _lowest(self, rates: np.ndarray) -> _Pieces:
        """Of each source the pieces with the lowest keys that fit into its `rates` (n_sources,) of bytes, one at least."""
        sizes = np.zeros((self._n_sources, BUCKETS))
        for pieces in self._ranked(rates):
            bucket = (pieces.key >> np.uint64(48)).astype(np.int64)
            np.add.at(sizes, (pieces.source, bucket), pieces.n_bytes)
        last = (np.cumsum(sizes, axis=1) < rates[:, None]).sum(axis=1)  # the bucket in which a source is full
        near = []
        for pieces in self._ranked(rates):
            near.append(pieces.take((pieces.key >> np.uint64(48)).astype(np.int64) <= last[pieces.source]))
        found = _Pieces(*(np.concatenate(column) for column in zip(*near, strict=True)))
        order = np.lexsort((found.row, found.key, found.source))
        found = found.take(order)
        begins = np.searchsorted(found.source, np.arange(self._n_sources))  # of each source
        before = np.cumsum(found.n_bytes) - found.n_bytes
        own = before - before[np.minimum(begins, len(before) - 1)][found.source]
        drawn = found.take((own + found.n_bytes <= rates[found.source]) | (own == 0))
        return drawn.take(np.lexsort((drawn.number, drawn.row)))

    def _ranked(self, rates: np.ndarray) -> Iterator[_Pieces]:
        """The pieces, those that a document has above its most behind all others."""
        most = np.maximum(rates / DOCUMENT_SHARE / PIECE_CHARACTERS, 1).astype(np.int64)
        for pieces in self._blocks():
            key = pieces.key >> np.uint64(1)
            begins = np.flatnonzero(pieces.number == 0)
            counts = np.diff(np.append(begins, len(key)))
            for i in np.flatnonzero(counts > most[pieces.source[begins]]).tolist():
                own = np.arange(begins[i], begins[i] + counts[i])
                late = own[np.argsort(key[own], kind="stable")[most[pieces.source[own[0]]] :]]
                key[late] |= np.uint64(1 << 63)
            yield pieces._replace(key=key)

    def __iter__(self) -> Iterator[str]:
        begins = np.flatnonzero(np.diff(self._row, prepend=-1) != 0)  # of each row's pieces
        rows = self._row[begins]
        bounds = np.append(begins, len(self._row)).tolist()
        first = 0
        while first < len(rows):  # rows that follow one another are read together
            near = rows[first : first + RUN_ROWS]
            n = int(np.argmax(np.append(np.diff(near) != 1, True))) + 1
            run = self._table.read(int(rows[first]), int(rows[first]) + n)
            for i, text in enumerate(texts(self._inputs, self._table.work, run, skip_bad=self._skip_bad), first):
                signals.check()
                if self._split.mode == "tail":
                    text = text[: self._split.cut(len(text))]
                else:
                    text = _readable(text, self._inputs[int(run[i - first]["file"])].kind)
                for number in self._number[bounds[i] : bounds[i + 1]].tolist():
                    yield text[number * PIECE_CHARACTERS : (number + 1) * PIECE_CHARACTERS]
            first += n


def _readable(text: str, kind: Kind) -> str:
    """What a vocabulary learns of a text."""
    if kind == "prompted":
        return text.replace(fields.BORDER, "")
    return text if kind == "text" else conversations.plain(conversations.load(text), roles=True)


def _mixed(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, one to one, without a pattern (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
