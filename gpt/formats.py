"""Bytes to records: text, JSON lines and arrays, csv, parquet, tar, and what they are compressed with.

Each reader yields (start, end, value) in order, with memory that depends on the longest record and not on the file; a value
that cannot be read is a BadRecord in its place where the reader can go on behind it, and is raised where it cannot. It
knows nothing of fields, documents or sources.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from gpt import signals

BLOCK = 1 << 20
LINES_BLOCK = 1 << 17  # what is split: more would be memory that the system takes back, and clears, each time
PIECE_BYTES = 16 << 20  # a text without separator is cut at line ends into pieces of at most about this size
RECORD_BYTES = 256 << 20  # a longer line or record is not read: memory stays bounded
BATCH_ROWS = 256  # of parquet that are decoded at a time
HEAD_BYTES = 1 << 13
BOM = codecs.BOM_UTF8
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tbz2": ".tar.bz2", ".tzst": ".tar.zst"}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
REFUSED = {
    **dict.fromkeys((".zip", ".7z", ".rar"), "is not read here; unpack it, or pack it as .tar.gz"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro"), "is not read here; write it as .parquet or .jsonl"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".epub"), "is not plain text; extract its text first"),
    **dict.fromkeys((".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".safetensors"), "is binary, not text"),
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
WHITESPACE = re.compile(r"[ \t\r\n]*")
PARQUET_EXTRA = "needs pyarrow: pip install -e '.[parquet]'"

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "tar"]
Span = tuple[int, int, "bytes | BadRecord"]


class BadRecord(ValueError):
    """A document that cannot be read as text; the message says where and why. A policy may skip it."""


class Form(NamedTuple):
    """What a file's name says about its bytes: their kind, and what they are compressed with ("" for nothing)."""

    kind: Kind
    packing: str

    @property
    def words(self) -> str:
        """For errors: `gzip file`, `parquet file`, ..."""
        return f"{self.packing or self.kind} file"


def form_of(name: str) -> Form:
    """The form of a file by its suffixes; text for any other name."""
    name = name.lower()
    for short, long in SHORT.items():
        name = name.removesuffix(short) + long if name.endswith(short) else name
    packing = next((packing for suffix, packing in PACKINGS.items() if name.endswith(suffix)), "")
    if packing:
        name = name.rpartition(".")[0]
    if name.endswith(".tar"):
        return Form("tar", packing)
    kind = next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "text")
    return Form(kind, packing)  # type: ignore[arg-type]


def stem_of(name: str) -> str:
    """A file's name without the suffixes that say its form."""
    for suffix in (*SHORT, *PACKINGS):
        name = name.removesuffix(suffix)
    return name.rpartition(".")[0] or name


def unpacked(raw: BinaryIO, packing: str) -> io.BufferedReader:
    """The decompressed bytes of a stream."""
    stream: Any = raw
    if packing == "" and isinstance(raw, io.BufferedReader):
        return raw
    if packing == "gzip":
        stream = gzip.GzipFile(fileobj=raw)
    elif packing == "xz":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115
    elif packing == "bzip2":
        stream = bz2.BZ2File(raw)
    elif packing == "zstd":
        stream = _Zstd(raw)
    return io.BufferedReader(stream, BLOCK)


class _Zstd(io.RawIOBase):
    """The decompressed bytes of a zstd stream of one or more frames; EOFError where it is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import pyarrow
        except ImportError:
            raise ValueError(f"reading .zst {PARQUET_EXTRA}") from None
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def faults(label: str, form: Form) -> Iterator[None]:
    """Turns what the libraries raise on damaged bytes into a ValueError in words."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError) as error:
        raise ValueError(f"{label}: not a whole {form.words} ({error}); get it again") from None
    except OSError as error:
        if error.errno is None:  # bz2 and pyarrow say so of damaged bytes; what the system says has a number
            raise ValueError(f"{label}: not a whole {form.words} ({error}); get it again") from None
        raise OSError(error.errno, f"{label}: {error.strerror}; reading stopped there") from error
    except ValueError as error:
        if type(error).__module__.startswith("pyarrow"):
            raise ValueError(f"{label}: not a whole {form.words} ({error}); get it again") from None
        raise


# Text


def spans(stream: BinaryIO, delimiter: bytes, start: int = 0, end: int | None = None) -> Iterator[Span]:
    """(start, end, content) of what `delimiter` parts; `end` lies behind it. The stream stands at byte `start`."""
    position, rest = start, b""
    while True:
        signals.check()
        size = min(max(LINES_BLOCK, len(rest)), 16 * BLOCK)  # grows with the record: a long one costs linear time
        if end is not None:
            size = min(size, end - position - len(rest))
        block = stream.read(size) if size > 0 else b""
        if not block:
            break
        *whole, rest = (rest + block).split(delimiter)
        if whole and len(whole[0]) > RECORD_BYTES:  # only the first can hold what earlier blocks left
            after = position + len(whole[0]) + len(delimiter)
            yield position, after, too_long()
            position = after
            del whole[0]
        for data in whole:
            after = position + len(data) + len(delimiter)
            yield position, after, data
            position = after
        if len(rest) > RECORD_BYTES:
            after, rest = _beyond(stream, delimiter, position, rest)
            yield position, after, too_long()
            position = after
    *whole, rest = rest.split(delimiter)  # some, where what lay behind a long record was the end
    for data in whole:
        after = position + len(data) + len(delimiter)
        yield position, after, data
        position = after
    if rest:
        yield position, position + len(rest), too_long() if len(rest) > RECORD_BYTES else rest


def _beyond(stream: BinaryIO, delimiter: bytes, position: int, rest: bytes) -> tuple[int, bytes]:
    """(where the record that begins at `position` with `rest` ends, what was read behind it)."""
    overlap = len(delimiter) - 1
    while block := stream.read(BLOCK):
        signals.check()
        keep = rest[len(rest) - overlap :] if overlap else b""
        position += len(rest) - len(keep)
        rest = keep + block
        at = rest.find(delimiter)
        if at >= 0:
            return position + at + len(delimiter), rest[at + len(delimiter) :]
    return position + len(rest), b""


def pieces(stream: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[Span]:
    """A text without separator: whole if it is short, else cut behind the last line end within each PIECE_BYTES."""
    position, rest, done = start, b"", False
    while not done or rest:
        signals.check()
        while not done and len(rest) < PIECE_BYTES:
            size = PIECE_BYTES - len(rest)
            block = stream.read(size if end is None else max(0, min(size, end - position - len(rest))))
            done, rest = not block, rest + block
        if not rest:
            return
        cut = len(rest) if done and len(rest) <= PIECE_BYTES else rest.rfind(b"\n", 0, PIECE_BYTES) + 1
        while cut == 0 and not done and len(rest) <= RECORD_BYTES:  # a longer line: up to its end
            size = min(PIECE_BYTES, PIECE_BYTES if end is None else end - position - len(rest))
            seen, block = len(rest), stream.read(size)
            done, rest = not block, rest + block
            cut = rest.find(b"\n", seen) + 1
        if cut == 0 and len(rest) > RECORD_BYTES:
            after, rest = _beyond(stream, b"\n", position, rest)
            yield position, after, too_long()
            position = after
            continue
        cut = cut or len(rest)
        yield position, position + cut, rest[:cut]
        position, rest = position + cut, rest[cut:]


def too_long() -> BadRecord:
    return BadRecord(f"a record longer than {RECORD_BYTES >> 20} MiB; part it into lines or documents")


# Values: one record each; `start` and `end` are its ordinals


class _Window:
    """Text of a UTF-8 stream from some place on; `more` forgets what stands before `at` and reads on."""

    def __init__(self, stream: BinaryIO) -> None:
        self.text, self.at, self.ended = "", 0, False
        self._stream, self._n_read = stream, 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> None:
        signals.check()
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > RECORD_BYTES:
            raise too_long()
        block = self._stream.read(min(max(BLOCK, len(self.text)), 16 * BLOCK))
        n_kept = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = self._n_read - n_kept + error.start
            raise BadRecord(f"not UTF-8 at byte {at} (0x{error.object[error.start]:02x})") from None
        self._n_read += len(block)
        self.ended = not block

    def next(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            match = WHITESPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def array_values(stream: BinaryIO) -> Iterator[tuple[int, int, Any]]:
    """The elements of the one JSON array in a stream. BadRecord where it is broken: what follows cannot be told."""
    window, scan, number = _Window(stream), json.JSONDecoder().raw_decode, 0
    if window.next() != "[":
        raise BadRecord("expected one JSON array of objects or texts; JSON lines are read from .jsonl")
    window.at += 1
    mark = window.next()
    while mark != "]":
        yield number, number + 1, _value(window, scan)
        number += 1
        mark = window.next()
        if mark not in ("]", ","):
            raise BadRecord(
                "broken JSON (the array does not go on)" if mark else "broken JSON (it ends inside the array)"
            )
        if mark == ",":
            window.at += 1
            window.next()
    window.at += 1
    if window.next():
        raise BadRecord("broken JSON (text behind the array)")


def _value(window: _Window, scan: Any) -> Any:
    """The JSON value that begins here, read on for until it is whole."""
    while True:
        try:
            value, after = scan(window.text, window.at)
            is_number = isinstance(value, int | float)  # it may go on behind what is read so far, as 1 does in 1e+5
            if after + (2 if is_number else 0) < len(window.text) or window.ended:
                window.at = after
                return value
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated string") or error.pos > len(window.text) - 16
            if window.ended or not cut:
                raise BadRecord(f"broken JSON ({error.msg})") from None
        except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
            raise BadRecord(f"broken JSON ({error})") from None
        window.more()


def table_rows(stream: BinaryIO, delimiter: str, columns: frozenset[str]) -> Iterator[tuple[int, int, Any]]:
    """The cells of `columns` (all if it names none) by name in each row of a csv with a header; `start` is the line that
    the row ends on.

    What is not UTF-8 comes as lone surrogates, so that only the record that holds it is bad.
    """
    csv.field_size_limit(RECORD_BYTES)
    reader = csv.reader(_lines(stream), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise BadRecord(f"broken csv in its first line ({error})") from None
    places = {name: header.index(name) for name in _present(columns, header)}
    wide = max(places.values(), default=0)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, 0, BadRecord(f"broken csv ({error})")
            continue
        if row is None:
            return
        if len(row) > wide:
            yield reader.line_num, 0, {name: row[place] for name, place in places.items()}
        elif row:
            yield reader.line_num, 0, BadRecord(f"{len(row)} cells, expected {len(header)} as in the header")


def _lines(stream: BinaryIO) -> Iterator[str]:
    first = True
    while line := stream.readline(RECORD_BYTES + 1):
        if len(line) > RECORD_BYTES:
            raise too_long()
        yield (line.removeprefix(BOM) if first else line).decode("utf-8", "surrogateescape")
        first = False


def no_field(field: str, names: Any) -> BadRecord:
    known = list(map(repr, names))
    shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return BadRecord(f"no field '{field}'; it has {shown or 'none'}; name one with field")


def _present(columns: frozenset[str], names: Sequence[str]) -> list[str]:
    """The columns as a table names them: `a.b` is column a.b if there is one, else a part of column a; or all there are."""
    found = {name if name in names else name.partition(".")[0] for name in columns}
    if missing := sorted(found - set(names)):
        raise no_field(missing[0], names)
    return sorted(found or names)


def parquet_rows(file: Path | BinaryIO, columns: frozenset[str]) -> Iterator[tuple[int, int, Any]]:
    """The values of `columns` (all if it names none) by name in each row, decoded a few rows at a time; only those columns
    are read."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading .parquet {PARQUET_EXTRA}") from None
    table = pyarrow.parquet.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False)
    with table:
        present = _present(columns, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(BATCH_ROWS, columns=present, use_threads=False):
            signals.check()
            names = batch.schema.names
            for row in zip(*map(_cells, batch.columns), strict=True):
                bad = next((cell for cell in row if isinstance(cell, BadRecord)), None)
                yield number, number + 1, bad or dict(zip(names, row, strict=True))
                number += 1


def _cells(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_cell(value) for value in column]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start} of the text (0x{error.object[error.start]:02x})")


def members(stream: BinaryIO) -> Iterator[tuple[str, Any]]:
    """(name, bytes) of each regular file in a tar that is read once, front to back. Nothing is written by its names.

    tarfile takes a damaged header for the end; so what stands there must be the end mark, two blocks of zeros, and no
    more than zeros behind it. Raises EOFError otherwise.
    """
    blocks: Any = _Blocks(stream)
    with tarfile.open(fileobj=blocks, mode="r|", bufsize=tarfile.BLOCKSIZE) as opened:
        archive: Any = opened
        while (member := archive.next()) is not None:
            archive.members.clear()  # else it would remember every one
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, content
        if any(blocks.last) or len(blocks.last) < tarfile.BLOCKSIZE or not (rest := stream.read(tarfile.BLOCKSIZE)):
            raise EOFError(f"damaged or cut short at byte {blocks.n_bytes}")
        while rest:
            if rest.count(0) < len(rest):
                raise EOFError(f"more data behind its end mark at byte {blocks.n_bytes}")
            rest = stream.read(BLOCK)


class _Blocks:
    """What tarfile reads from; remembers the last block."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.last, self.n_bytes = stream, b"", 0

    def read(self, size: int) -> bytes:
        self.last = self._stream.read(size)
        self.n_bytes += len(self.last)
        return self.last
