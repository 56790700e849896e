"""The one pass over a corpus: a table of its documents on disk, and all that follows from it.

Every document becomes a row of fixed width: where it stands, how long it is, the hash of its text. Text that is not
cheap to find again (compressed, columns, a stream) is copied beside the table. What looks at the whole corpus -
duplicates, the split, the chunks, its fingerprint - is computed from the table; the tokenizer's sample is drawn on the way.
"""

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.lib.recfunctions import repack_fields

from gpt import corpus, durable
from gpt.corpus import BadRecord, File

CHUNK_BYTES = 64 << 20
SAMPLE_CHARACTERS = 1 << 16  # a longer document is drawn in pieces of this length
DOCUMENT_PIECES = 64  # of one document at most: no single one is the language
TAIL_DOCUMENTS = 20  # split: auto takes whole documents from so many on
BUCKETS = 1 << 16  # of document hashes, whose sizes are counted to cut the split at a fraction of the bytes
ROWS = 1 << 14  # written, and read, at a time
SPLITS = ("train", "val")

ROW = np.dtype(
    [
        ("value", "<u8"),  # the first 64 bits of the sha256 of the text: its place in the hash split
        ("rest", "<u8"),  # the next 64
        ("start", "<u8"),  # in the file, or where the spool holds it
        ("end", "<u8"),
        ("n_bytes", "<u8"),  # raw UTF-8
        ("file", "<u4"),
        ("source", "<u2"),
        ("given", "u1"),  # the split that it was given for: 0 none, 1 train, 2 val
        ("dropped", "u1"),  # a duplicate that is left out
    ]
)
GIVEN = (None, *SPLITS)


@dataclass(frozen=True)
class Input:
    """A file of the corpus, the number of its source, and the split that its whole text belongs to, if one is given."""

    file: File
    source: int
    given: str | None


class Part(NamedTuple):
    """Text of a document in one split, its raw UTF-8 bytes, and the number of its source."""

    split: str
    text: str
    n_bytes: int
    source: int


@dataclass(frozen=True)
class Split:
    """Which text is held out. A pure function of the document, so that equal documents fall on the same side."""

    mode: Literal["hash", "tail", "given"]
    fraction: float  # tail: of each document's characters
    threshold: int  # hash: documents whose value is below are held out

    def parts(self, given: str | None, text: str, n_bytes: int, value: int, source: int) -> Iterator[Part]:
        """The parts of a document that have any text."""
        if self.mode == "tail":
            cut = self.cut(len(text))
            n_held_out = min(n_bytes, len(text[cut:].encode())) if cut < len(text) else 0
            if cut:
                yield Part("train", text[:cut], n_bytes - n_held_out, source)
            if n_held_out:
                yield Part("val", text[cut:], n_held_out, source)
        elif self.mode == "given":
            yield Part(given or "train", text, n_bytes, source)
        else:
            yield Part("val" if value < self.threshold else "train", text, n_bytes, source)

    def cut(self, n_characters: int) -> int:
        """Where the held-out tail of a document begins."""
        return int(n_characters * (1 - self.fraction))


class Sample:
    """Text for the tokenizer: all of it, or pieces with low seeded hashes that fit into `n_bytes`.

    Every source is drawn from at the same rate: what goes when the room is full is the highest hash of the source that
    most of its text so far is kept of.
    """

    def __init__(self, n_bytes: int, seed: int) -> None:
        self._room, self._key = n_bytes, seed.to_bytes(8, "little", signed=True)
        # By source, lowest first: the negated hash of the next to go, and what is needed to cut off held-out text.
        self._heaps: dict[int, list[tuple[int, int, int, int, int, str]]] = {}
        self._kept: Counter[int] = Counter()
        self._seen: Counter[int] = Counter()
        self._drawn: set[tuple[int, int]] = set()

    def add(self, text: str, digest: bytes, source: int, order: int) -> None:
        """Draw from a document: `digest` is the sha256 of its text. A text that is there already is not drawn again."""
        n, value = len(text), value_of(digest)
        pieces = []
        for start in range(0, n, SAMPLE_CHARACTERS):
            drawn = hashlib.blake2b(digest + start.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
            pieces.append((int.from_bytes(drawn, "big"), start))
        heap = self._heaps.setdefault(source, [])
        for drawn_at, start in sorted(heapq.nsmallest(DOCUMENT_PIECES, pieces), key=lambda piece: piece[1]):
            part = text[start : start + SAMPLE_CHARACTERS]
            size = len(part.encode())
            self._seen[source] += size
            if (drawn_at, start) in self._drawn:
                continue
            self._drawn.add((drawn_at, start))
            heapq.heappush(heap, (-drawn_at, -order, value, start, n, part))
            self._kept[source] += size
            self._room -= size
            while self._room < 0 and self._evict():
                pass

    def _evict(self) -> bool:
        """Let the piece go that is least needed; False if only one of each source is left."""
        full = [source for source, heap in self._heaps.items() if len(heap) > 1]
        if not full:
            return False
        source = max(full, key=lambda each: (self._kept[each] / self._seen[each], -each))
        negated, _, _, start, _, part = heapq.heappop(self._heaps[source])
        self._drawn.discard((-negated, start))
        size = len(part.encode())
        self._kept[source] -= size
        self._room += size
        return True

    def texts(self, split: Split) -> list[str]:
        """The training part of what was drawn: a tokenizer that saw the validation text would flatter the model."""
        pieces = [piece for source in sorted(self._heaps) for piece in self._heaps[source]]
        if split.mode == "hash":
            return [text for _, _, value, _, _, text in pieces if value >= split.threshold]
        if split.mode == "tail":
            return [text[: max(0, split.cut(n) - start)] for *_, start, n, text in pieces]
        return [text for *_, text in pieces]


def value_of(digest: bytes) -> int:
    """A document's place in the hash split: 64 bits of the sha256 of its content."""
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class Chunk:
    """Rows first .. last - 1 of the table, which become one shard a split."""

    first: int
    last: int
    n_bytes: int


@dataclass
class Scan:
    """What the pass over the corpus found, duplicates already marked in the table."""

    sample: Sample
    chunks: list[Chunk] = field(default_factory=list)
    n_documents: int = 0  # with duplicates
    n_bytes: int = 0  # without those that are left out
    n_duplicates: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # too short, too long, empty
    skipped: list[str] = field(default_factory=list)
    bucket_bytes: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, dtype=np.int64))
    lowest: int = 1 << 64
    highest: int = -1
    has_validation: bool = False
    content: str = ""  # sha256 over the table, without places


class Table:
    """The rows in a file; written once, then read in blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def n_rows(self) -> int:
        return self.path.stat().st_size // ROW.itemsize

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows first .. last - 1."""
        with self.path.open("rb") as file:
            file.seek(first * ROW.itemsize)
            return np.frombuffer(file.read((last - first) * ROW.itemsize), ROW)

    def blocks(self) -> Iterator[np.ndarray]:
        for first in range(0, self.n_rows, ROWS):
            yield self.read(first, min(first + ROWS, self.n_rows))

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([np.empty(0, ROW[name]), *(block[name] for block in self.blocks())])

    def mark_duplicates(self, *, drop: bool) -> int:
        """How many rows have the text of an earlier one; with `drop` they are marked. 17 bytes of memory a document."""
        values = self.column("value")
        order = np.argsort(values, kind="stable")
        near = np.flatnonzero(values[order[1:]] == values[order[:-1]])  # only these can be equal
        if not len(near):
            return 0
        candidates = np.unique(np.concatenate([order[near], order[near + 1]]))
        seen: set[tuple[int, int]] = set()
        rows = np.memmap(self.path, ROW, "r+")
        n = 0
        for at in candidates.tolist():
            text = int(rows[at]["value"]), int(rows[at]["rest"])
            if text in seen:
                n += 1
                if drop:
                    rows[at]["dropped"] = 1
            seen.add(text)
        rows.flush()
        return n


class _Writer:
    """Appends rows, and text that is not cheap to find again, to files in the working directory."""

    def __init__(self, work: Path) -> None:
        self._table, self._spool = (work / "documents").open("wb"), (work / "spool").open("wb")
        self._rows: list[tuple[int, ...]] = []
        self._at = self.n_rows = 0

    def add(self, document: corpus.Document, number: int, item: Input) -> None:
        start, end = document.start, document.end
        if not item.file.direct:
            start = self._at
            self._at = end = start + self._spool.write(document.text.encode())
        value, rest = value_of(document.digest), int.from_bytes(document.digest[8:16], "big")
        given = GIVEN.index(item.given)
        self._rows.append((value, rest, start, end, document.n_bytes, number, item.source, given, 0))
        self.n_rows += 1
        if len(self._rows) == ROWS:
            self.flush()

    def flush(self) -> None:
        self._table.write(np.array(self._rows, ROW).tobytes())
        self._rows.clear()

    def close(self) -> None:
        self.flush()
        for file in (self._table, self._spool):
            file.flush()
            os.fsync(file.fileno())
            file.close()


def scan(
    inputs: Sequence[Input],
    work: Path,
    *,
    sample_bytes: int,
    seed: int,
    skip_bad: bool,
    drop_duplicates: bool,
    check: Callable[[str, str], None] | None,
    advance: Callable[[int], None],
) -> Scan:
    """Read the corpus once: check it, write its table and spool into `work`, draw the sample, cut it into chunks.

    `check` is shown each text and what its file is called, `advance` is told of bytes as they are read; both may raise.
    ValueError in words for what cannot be read.
    """
    found = Scan(Sample(sample_bytes, seed))
    skip: Callable[[BadRecord], None] | None = (lambda error: found.skipped.append(str(error))) if skip_bad else None
    writer = _Writer(work)
    try:
        order = 0
        for number, item in enumerate(inputs):
            for document in corpus.documents(item.file, skip=skip, tally=found.left_out):
                if check is not None:
                    check(document.text, f"{item.file.label}: document {writer.n_rows + 1}")
                writer.add(document, number, item)
                if item.given != "val":
                    order += 1
                    found.sample.add(document.text, document.digest, item.source, order)
                advance(document.n_bytes)
    finally:
        writer.close()
    table = Table(work / "documents")
    found.n_documents = table.n_rows
    found.n_duplicates = table.mark_duplicates(drop=drop_duplicates)
    _measure(found, table)
    found.chunks = list(chunks(table))
    return found


def _measure(found: Scan, table: Table) -> None:
    """What the split and the fingerprint need of the rows that are kept."""
    content = hashlib.sha256()
    for block in table.blocks():
        kept = block[block["dropped"] == 0]
        content.update(repack_fields(kept[["value", "rest", "n_bytes", "source", "given"]]).tobytes())
        found.n_bytes += int(kept["n_bytes"].sum())
        found.has_validation |= bool((kept["given"] == GIVEN.index("val")).any())
        own = kept[kept["given"] != GIVEN.index("val")]
        if len(own):
            buckets = (own["value"] >> np.uint64(48)).astype(np.int64)
            found.bucket_bytes += np.bincount(buckets, own["n_bytes"], BUCKETS).astype(np.int64)
            found.lowest = min(found.lowest, int(own["value"].min()))
            found.highest = max(found.highest, int(own["value"].max()))
    found.content = content.hexdigest()


def chunks(table: Table) -> Iterator[Chunk]:
    """Runs of rows whose kept text reaches CHUNK_BYTES, in order."""
    first = at = n_bytes = 0
    for block in table.blocks():
        sizes = np.cumsum(np.where(block["dropped"], 0, block["n_bytes"]).astype(np.int64))
        done = 0  # of this block's sizes, what earlier chunks have
        while (cut := int(np.searchsorted(sizes, done + CHUNK_BYTES - n_bytes))) < len(sizes):
            last = at + cut + 1
            yield Chunk(first, last, n_bytes + int(sizes[cut]) - done)
            first, n_bytes, done = last, 0, int(sizes[cut])
        n_bytes += int(sizes[-1]) - done
        at += len(block)
    if n_bytes:
        yield Chunk(first, at, n_bytes)


def choose_split(found: Scan, *, asked: str, fraction: float, most_bytes: float | None = None) -> Split:
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
    """The text of a chunk, read again; ValueError if it is not what was scanned."""
    for rows in _runs(Table(work / "documents").read(chunk.first, chunk.last)):
        item = inputs[int(rows[0]["file"])]
        given = GIVEN[int(rows[0]["given"])]
        for row, (text, digest) in zip(rows, _texts(item.file, work, rows, skip_bad), strict=True):
            value = int(row["value"])
            if value_of(digest) != value or int.from_bytes(digest[8:16], "big") != row["rest"]:
                raise _changed(item.file)
            if not row["dropped"]:
                yield from split.parts(given, text, int(row["n_bytes"]), value, int(row["source"]))


def _runs(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each file in turn."""
    borders = np.flatnonzero(np.diff(rows["file"])) + 1
    yield from (run for run in np.split(rows, borders) if len(run))


def _texts(file: File, work: Path, rows: np.ndarray, skip_bad: bool) -> Iterator[tuple[str, bytes]]:
    """(text, sha256) of rows of one file, from the file itself or from the spool; ValueError if there are fewer or more."""
    if not file.direct:
        with (work / "spool").open("rb") as spool:
            spool.seek(int(rows[0]["start"]))
            for row in rows:
                data = spool.read(int(row["end"]) - int(row["start"]))
                digest = hashlib.sha256(data).digest()
                try:
                    yield data.decode("utf-8"), digest
                except UnicodeDecodeError:
                    raise durable.CorruptError(f"{work / 'spool'}: it is not what was written; prepare again") from None
        return
    skip: Callable[[BadRecord], None] | None = (lambda error: None) if skip_bad else None
    n = 0
    for document in corpus.documents(file, int(rows[0]["start"]), int(rows[-1]["end"]), skip):
        n += 1
        if n > len(rows):
            break
        yield document.text, document.digest
    if n != len(rows):
        raise _changed(file)


def _changed(file: File) -> ValueError:
    return ValueError(f"{file.label}: the text changed while it was prepared; run the same command again")
