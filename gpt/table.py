"""The documents of a corpus as rows of fixed width on disk: where each stands, how long it is, the hash of its text.

Text that is not cheap to find again (compressed, columns, a stream) is copied beside the table into a spool. A row finds
its text again in either place, and knows whether it is still the same.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np

from gpt import corpus, durable
from gpt.corpus import BadRecord, File

ROWS = 1 << 14  # written, and read, at a time
GROUP_ROWS = 1 << 22  # whose hashes are sorted at a time to find duplicates
RUN_BYTES = 1 << 19  # of a file or the spool, read again at a time, but at least one document

ROW = np.dtype(
    [
        ("value", "<u8"),  # the first 64 bits of the sha256 of the text: its place in the hash split
        ("rest", "<u8"),  # the next 64
        ("start", "<u8"),  # in the file, or where the spool holds it
        ("end", "<u8"),
        ("n_bytes", "<u8"),  # raw UTF-8
        ("n_chars", "<u8"),
        ("file", "<u4"),
        ("source", "<u2"),
        ("given", "u1"),  # the split that it was given for, as in GIVEN
        ("dropped", "u1"),  # a duplicate that is left out
    ]
)
_ROW = struct.Struct("<QQQQQQIHBB")
_DIGEST = struct.Struct(">QQ16x")
GIVEN = (None, "train", "val")
Kind = Literal["text", "prompted", "chat", "pair"]  # of a text: all learned, parted by fields.BORDER, canonical JSON


@dataclass(frozen=True)
class Input:
    """A file of the corpus, the number of its source, and the split that its whole text belongs to, if one is given."""

    file: File
    source: int
    given: str | None

    @property
    def kind(self) -> Kind:
        """What its documents' texts are."""
        return self.file.source.spoken or ("text" if self.file.source.prompt is None else "prompted")


class Changed(ValueError):
    """Text is not what it was when the corpus was scanned."""

    def __init__(self, label: str) -> None:
        super().__init__(f"{label}: the text changed while it was prepared; run the same command again")
        self.label = label

    def __reduce__(self) -> tuple[type["Changed"], tuple[str]]:
        return Changed, (self.label,)


class _Appended:
    """A file that grows by pieces, on the disk once it is closed."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            durable.fs.unlink(path)
        self._path, self._fd, self._buffer, self.size = path, durable.fs.open(path), bytearray(), 0

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) >= durable.BLOCK:
            self._flush()

    def _flush(self) -> None:
        view, self._buffer = memoryview(self._buffer), bytearray()
        try:
            while view:
                view = view[durable.fs.write(self._fd, view[: durable.BLOCK]) :]
        except OSError as error:  # a full disk: say which
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self, *, whole: bool) -> None:
        try:
            if whole:
                self._flush()
                durable.fs.fsync(self._fd)
        finally:
            os.close(self._fd)


class Writer:
    """Writes a new table, and the spool, into the directory `work`. They are whole when the `with` block ends well."""

    def __init__(self, work: Path) -> None:
        if (work / "duplicates").exists():
            durable.fs.unlink(work / "duplicates")
        self._table, self._spool = _Appended(work / "documents"), _Appended(work / "spool")
        self.n_rows = 0

    def add(self, document: corpus.Document, number: int, item: Input) -> None:
        """Append the document of file `number`."""
        text, utf8, n_bytes, start, end = document
        if not item.file.direct:
            start = self._spool.size
            self._spool.write(utf8)
            end = self._spool.size
        value, rest = _DIGEST.unpack(sha256(utf8).digest())
        given = GIVEN.index(item.given)
        self._table.write(_ROW.pack(value, rest, start, end, n_bytes, len(text), number, item.source, given, 0))
        self.n_rows += 1

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._spool.close(whole=kind is None)
        finally:
            self._table.close(whole=kind is None)


class Table:
    """The rows of a working directory, in blocks: memory does not depend on their number."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._rows, self._marks = work / "documents", work / "duplicates"
        self.n_rows = self._rows.stat().st_size // ROW.itemsize

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows first .. last - 1: (last - first,) of ROW."""
        rows = np.frombuffer(self._bytes(self._rows, first, last, ROW.itemsize), ROW)
        if self._marks.exists():
            rows["dropped"] = np.frombuffer(self._bytes(self._marks, first, last, 1), np.uint8)
        return rows

    def _bytes(self, path: Path, first: int, last: int, width: int) -> bytearray:
        data = bytearray((last - first) * width)
        with path.open("rb") as file:
            file.seek(first * width)
            if file.readinto(data) != len(data):
                raise durable.CorruptError(
                    f"{path}: it ends before document {last}; delete {self.work} and prepare again"
                )
        return data

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, rows) of each block, in order."""
        for first in range(0, self.n_rows, ROWS):
            yield first, self.read(first, min(first + ROWS, self.n_rows))

    def drop(self, repeated: np.ndarray) -> None:
        """Mark rows (n_rows,) bool as left out, durably."""
        durable.write_file(self._marks, [repeated.astype(np.uint8).tobytes()])

    def keep(self) -> None:
        """No row is left out, whatever an earlier command marked."""
        self._marks.unlink(missing_ok=True)

    def repeated(self) -> np.ndarray:
        """(n_rows,) bool: which rows have the text of an earlier one. Sorts GROUP_ROWS hashes at a time."""
        marks = np.zeros(self.n_rows, dtype=bool)
        n_groups = -(-self.n_rows // GROUP_ROWS)
        for group in range(n_groups):
            found = []
            for first, rows in self.blocks():
                near = np.flatnonzero((rows["value"] >> np.uint64(32)) * np.uint64(n_groups) >> np.uint64(32) == group)
                found.append((first + near, rows["value"][near], rows["rest"][near]))
            at, value, rest = (np.concatenate(column) for column in zip(*found, strict=True))
            order = np.lexsort((rest, value))  # stable: of equal texts the first in the table stays first
            same = (value[order[1:]] == value[order[:-1]]) & (rest[order[1:]] == rest[order[:-1]])
            marks[at[order[1:][same]]] = True
        return marks


def values(rows: np.ndarray, *names: str) -> Iterator[tuple[int, ...]]:
    """The columns `names` of each row as integers, of which few exist at a time."""
    for first in range(0, len(rows), ROWS):
        yield from zip(*(rows[name][first : first + ROWS].tolist() for name in names), strict=True)


def texts(inputs: Sequence[Input], work: Path, rows: np.ndarray, *, skip_bad: bool) -> Iterator[str]:
    """The text of each of `rows`, which follow one another in the table. Raises Changed if it is not what was scanned."""
    borders = np.flatnonzero(np.diff(rows["file"])) + 1
    for run in np.split(rows, borders) if len(rows) else ():
        file = inputs[int(run[0]["file"])].file
        yield from _direct(file, run, skip_bad) if file.direct else _spooled(file, work / "spool", run)


def _runs(rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[tuple[int, int]]]]:
    """`rows` of one file in runs of at most RUN_BYTES, or of one row, and where their texts stand."""
    for block in np.split(rows, range(ROWS, len(rows), ROWS)) if len(rows) else ():  # few of them as integers at a time
        starts, ends = block["start"].tolist(), block["end"].tolist()
        first = 0
        while first < len(block):
            last = max(first + 1, bisect_right(ends, starts[first] + RUN_BYTES, first))
            yield block[first:last], list(zip(starts[first:last], ends[first:last], strict=True))
            first = last


def _same(utf8: Iterable[bytes | memoryview], rows: np.ndarray) -> bool:
    """Whether texts are those of `rows`."""
    found = np.frombuffer(b"".join([sha256(text).digest() for text in utf8]), ">u8").reshape(-1, 4)
    same = len(found) == len(rows) and (found[:, 0] == rows["value"]) & (found[:, 1] == rows["rest"])
    return bool(np.all(same))


def _direct(file: File, rows: np.ndarray, skip_bad: bool) -> Iterator[str]:
    for run, places in _runs(rows):
        is_long = places[-1][1] - places[0][0] > RUN_BYTES  # one document, of which there should be few copies
        found = None if is_long else corpus.again(file, places)
        if found is not None and _same(found[1], run):
            yield from found[0]
        else:
            yield from _one_by_one(file, run, skip_bad)


def _one_by_one(file: File, rows: np.ndarray, skip_bad: bool) -> Iterator[str]:
    skip = (lambda error: None) if skip_bad else None
    found = corpus.documents(file, int(rows[0]["start"]), int(rows[-1]["end"]), skip)
    try:
        for digest in values(rows, "value", "rest"):
            document = next(found, None)
            if document is None or _DIGEST.unpack(sha256(document.utf8).digest()) != digest:
                raise Changed(file.label)
            yield document.text
        if next(found, None) is not None:
            raise Changed(file.label)
    except BadRecord:  # it was a good one
        raise Changed(file.label) from None


def _spooled(file: File, spool: Path, rows: np.ndarray) -> Iterator[str]:
    with spool.open("rb") as stream:
        for run, places in _runs(rows):
            begin = places[0][0]
            stream.seek(begin)
            data = memoryview(stream.read(places[-1][1] - begin))
            found = [data[start - begin : end - begin] for start, end in places]
            if not _same(found, run):
                raise durable.CorruptError(
                    f"{spool}: it does not hold the text of {file.label} that was scanned; delete {spool.parent} and"
                    " prepare again"
                )
            yield from (str(text, "utf-8") for text in found)
