"""Where text comes from: files, directories, globs, standard input, URLs, the hub, the standard library; as documents.

It finds, reads and picks the text out of records; it knows nothing of tokens or splits. A document can be read again
from its place.
"""

import codecs
import fnmatch
import glob
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from gpt import conversations, durable, fetch, fields, formats, hub, signals
from gpt.config import Settings
from gpt.formats import BadRecord, Form

SKIPPING = "--on-bad-record skip leaves such text out"
PLACES = ("path", "url", "python", "hub")
JSON_SPACE = " \t\n\r"
Bad = Callable[[BadRecord], None]
Records = Iterator[tuple[int, int, Any]]  # (start, end, value)
Take = Callable[[Any], str | None]  # the text of a value; None of a blank line; raises BadRecord or UnicodeError


class Source(Settings):
    """One input of a recipe: exactly one of `path`, `url`, `hub` and `python` says where the text is."""

    path: str | None = Field(None, description="a file, a directory, a glob, or '-' for standard input")
    url: str | None = Field(None, description="an http(s) address of one file")
    hub: str | None = Field(
        None, description="a data set of the Hugging Face hub: ORG/NAME, or ORG/NAME@REVISION for a fixed version"
    )
    python: Literal["stdlib"] | None = Field(
        None, description="the .py files of the running interpreter's standard library"
    )
    sha256: str | None = Field(None, description="hash that the file behind `url` must have, in hexadecimal")
    name: str | None = Field(None, description="the source's name in reports; by default its file's or directory's")
    field: str | None = Field(
        None,
        description="the field or column that holds the text, dots lead inside: a.b; a list of texts is joined by line "
        "feeds; 'text' where there are fields",
    )
    template: str | None = Field(
        None, description="text made of several fields: '{title}\\n{author}\\n{paragraphs}'; {{ and }} are braces"
    )
    ids: str | None = Field(
        None, description="the field that holds a list of token ids; its text is the numbers (for kind: ids)"
    )
    prompt: str | None = Field(
        None, description="the field that holds a prompt: it stands before the text, and only the text is learned"
    )
    chat: bool = Field(
        False,
        description="records are conversations (messages, ShareGPT's, prompt and completion, instruction and output), of "
        "which the assistant's turns are learned",
    )
    preference: bool = Field(
        False, description="records are pairs: chosen and rejected, whole conversations or answers to a prompt"
    )
    separator: str | None = Field(
        None, description="what stands between documents in a text file; null: a file is a document"
    )
    begins: str | None = Field(
        None,
        description="a regular expression: records are put together, and one whose beginning it matches is the first of the "
        "next document",
    )
    exclude: tuple[str, ...] = Field(
        (), strict=False, description="globs over names and relative paths that are left out of a directory or tar"
    )
    min_chars: int = Field(1, ge=0, description="shorter documents are left out and counted")
    max_chars: int | None = Field(None, ge=1, description="longer documents are left out and counted")
    normalize: Literal["nfc"] | None = Field(
        None, description="nfc: one code point for one accented letter, however it was written (Unicode NFC)"
    )
    config: str | None = Field(None, description="hub: which configuration of the data set")
    split: str = Field("train", description="hub: which split of the data set")
    data_files: str | None = Field(
        None, description="hub: glob over the repository's files, instead of config and split"
    )
    streaming: bool = Field(
        False, description="hub: read over the network and keep only the fields that are needed, not the files"
    )
    obtain: str | None = Field(None, description="what to tell someone who does not have the file")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(getattr(self, place) is not None for place in PLACES) != 1:
            raise ValueError("an input has exactly one of path, url, hub and python")
        ways = [name for name in ("field", "template", "ids") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"an input has one of {' and '.join(ways)}, not both")
        ways += ["prompt"] if self.prompt is not None else []
        if self.spoken is not None:
            self._check_spoken(ways)
        if ways and self.separator is not None:
            raise ValueError(f"an input has {ways[0]} (records) or a separator (text), not both")
        if self.prompt is not None and (self.ids is not None or self.begins is not None):
            raise ValueError(f"a prompt goes with text of one record, not with {'ids' if self.ids else 'begins'}")
        if self.separator == "":
            raise ValueError("separator must not be empty")
        if self.template is not None:
            fields.template_keys(self.template)
        if self.begins is not None:
            try:
                re.compile(self.begins)
            except re.error as error:
                raise ValueError(f"begins: {self.begins!r} is no regular expression ({error})") from None
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}: no document is left")
        if self.sha256 is not None and self.url is None:
            raise ValueError("sha256 is the hash of the file behind url, and this input has none")
        return self._of_the_hub()

    def _check_spoken(self, ways: list[str]) -> None:
        if self.chat and self.preference:
            raise ValueError("an input has conversations (chat) or pairs of them (preference), not both")
        way = "chat" if self.chat else "preference"
        ways += [name for name in ("separator", "begins") if getattr(self, name) is not None]
        if ways:
            raise ValueError(f"with {way} a record is a conversation as a whole; leave {' and '.join(ways)} out")

    def _of_the_hub(self) -> Self:
        if self.hub is not None:
            hub.parse(self.hub)
            if self.data_files is not None and (self.config is not None or self.split != "train"):
                raise ValueError("data_files stands instead of config and split; leave one of them out")
        elif self.config is not None or self.data_files is not None or self.streaming or self.split != "train":
            raise ValueError("config, split, data_files and streaming belong to hub inputs")
        return self

    @property
    def spoken(self) -> fields.Spoken | None:
        """What its records are as a whole, if they are no text."""
        return "chat" if self.chat else "pair" if self.preference else None

    @property
    def whole(self) -> bool:
        """Whether its documents are only partly learned, so that none may be cut."""
        return self.prompt is not None or self.spoken is not None

    def picker(self) -> Callable[[Any], str]:
        """What makes a text of its records that are no text."""
        return fields.picker(self.field, self.template, self.ids, self.prompt, self.spoken)

    def columns(self) -> frozenset[str]:
        """The fields of a record that it reads; none named are all."""
        return fields.columns(self.field, self.template, self.ids, self.prompt, self.spoken)

    @property
    def label(self) -> str:
        """The source's name."""
        if self.name is not None or self.python is not None:
            return self.name or "python"
        if self.hub is not None:
            return hub.parse(self.hub)[0].rpartition("/")[2]
        place = PurePosixPath(urllib.parse.urlsplit(self.url).path if self.url else self.path or "")
        plain = [part for part in place.parts if not glob.has_magic(part) and part != "/"]
        last = plain[-1] if plain else "input"
        pattern = not place.parts or last != place.parts[-1]
        if self.url is None and (pattern or Path(place).is_dir()):
            return last  # of a directory a point is part of its name
        return "stdin" if last == "-" else formats.stem_of(last)


@dataclass(frozen=True)
class File:
    """A file to read, and how: `label` is how errors name it; `explicit` files must not be empty."""

    path: Path
    label: str
    form: Form
    explicit: bool
    source: Source

    @property
    def direct(self) -> bool:
        """Whether documents are found again by their bytes; if not, start and end are ordinals and cost a pass."""
        return self.form.packing == "" and self.form.kind in ("text", "jsonl")

    @property
    def size(self) -> int:
        """Bytes on disk, which for what is compressed is less than the text."""
        return self.path.stat().st_size


class Document(NamedTuple):
    """A document's text and where it stands: bytes start .. end - 1 of a direct file, else records start .. end - 1.

    A prompt ends with fields.BORDER, where the source has prompts; a conversation's text is its canonical JSON.
    """

    text: str
    utf8: bytes  # the same
    n_bytes: int  # of the text's UTF-8, before any normalization
    start: int
    end: int


# Finding


def files(source: Source, downloads: Path, spool: Path, say: Callable[[str], None]) -> list[File]:
    """The files of a source in order. What comes from a URL or the hub is kept in `downloads` (or the hub's own cache);
    standard input and streamed data sets are copied into the directory `spool`.

    Raises FileNotFoundError or ValueError in words.
    """

    def file(path: Path, label: str, *, explicit: bool) -> File:
        suffix = path.suffix.lower()
        if explicit and suffix in formats.REFUSED and source.separator is None and source.field is None:
            raise ValueError(f"{label}: {suffix} {formats.REFUSED[suffix]}")
        return File(path, label, _form(source, label, path.name), explicit, source)

    if source.url is not None:
        return [file(fetch.fetch(source.url, source.sha256, downloads, say), source.url, explicit=True)]
    if source.hub is not None:
        chosen = hub.choose(source.hub, source.config, source.split, source.data_files)
        found = hub.stream(chosen, source.columns(), spool, say) if source.streaming else hub.download(chosen, say)
        return [file(path, label, explicit=False) for path, label in found]
    if source.python is not None:
        return [file(path, str(path), explicit=False) for path in _standard_library(source.exclude)]
    place = source.path or ""
    if place == "-":
        return [file(_copied(sys.stdin.buffer, spool / "stdin"), "standard input", explicit=True)]
    path = Path(place)
    if path.is_dir():
        left = _walk(path, source.exclude)
        if not left:
            raise FileNotFoundError(
                f"{place}: no file in this directory{' is left by exclude' if source.exclude else ''}"
            )
        for each in left:
            if each.is_symlink():  # to wherever: what stands there may be nobody's text
                durable.plain(each)
        return [file(each, str(each), explicit=False) for each in left]
    if path.is_file():
        return [file(path, place, explicit=True)]
    if path.exists():  # a pipe, as of <(command)
        name = f"pipe-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
        with path.open("rb") as pipe:
            return [file(_copied(pipe, spool / name), place, explicit=True)]
    if matching := sorted(Path(p) for p in glob.glob(place, recursive=True) if Path(p).is_file()):  # noqa: PTH207
        matching = [each for each in matching if not _excluded(each.name, str(each), source.exclude)]
        if not matching:
            raise FileNotFoundError(f"{place}: no file that it matches is left by exclude")
        return [file(each, str(each), explicit=False) for each in matching]
    what = "nothing matches" if glob.has_magic(place) else "no such file or directory"
    raise FileNotFoundError(f"{place}: {what}" + (f"; {source.obtain}" if source.obtain else ""))


def _form(source: Source, label: str, name: str) -> Form:
    """What a file is read as: its suffixes say, but a field makes text JSON lines, and a separator makes JSON text."""
    form = formats.form_of(name)
    if source.separator is not None and form.kind not in ("text", "tar"):
        if form.kind not in ("jsonl", "json"):
            raise ValueError(f"{label}: a separator parts text, and this is {form.kind}; name a field")
        return form._replace(kind="text")
    if form.kind == "text" and _has_fields(source):
        return form._replace(kind="jsonl")
    if form.kind == "text" and source.begins is not None and source.separator is None:
        raise ValueError(f"{label}: begins puts records together, and this text has none; part it with a separator")
    if form.kind == "parquet" and form.packing:
        raise ValueError(f"{label}: a compressed .parquet is not read here; decompress it (it is compressed inside)")
    return form


def _has_fields(source: Source) -> bool:
    return any(getattr(source, way) is not None for way in ("field", "template", "ids", "prompt", "spoken"))


def _copied(stream: BinaryIO, path: Path) -> Path:
    """A stream that can be read once, as a file."""
    durable.make_directory(path.parent)

    def blocks() -> Iterator[bytes]:
        while block := stream.read(formats.BLOCK):
            signals.check()
            yield block

    durable.write_file(path, blocks())
    return path


def _excluded(name: str, relative: str, exclude: tuple[str, ...]) -> bool:
    return name.startswith(".") or any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(relative, pattern) for pattern in exclude
    )


def _walk(root: Path, exclude: tuple[str, ...]) -> list[Path]:
    """Files under `root` sorted by relative path; hidden ones and links to directories are left out."""

    def kept(path: Path) -> bool:
        return not _excluded(path.name, path.relative_to(root).as_posix(), exclude)

    found = []
    for directory, names, leaves in os.walk(root):
        names[:] = [name for name in names if kept(Path(directory, name))]
        found += [Path(directory, leaf) for leaf in leaves if kept(Path(directory, leaf))]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _standard_library(exclude: tuple[str, ...]) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in _walk(root, exclude) if path.suffix == ".py"] if root.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"{root}: this Python has no standard library in source form; name other text with input=PATH"
        )
    return found


# Reading


def documents(
    file: File,
    start: int = 0,
    end: int | None = None,
    skip: Bad | None = None,
    tally: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of a file in order, or those at start .. end - 1, which begin and end at documents.

    Empty documents, and those outside min_chars .. max_chars, are left out and counted in `tally` as "empty", "too short"
    and "too long". What cannot be read as text raises BadRecord, or is handed to `skip` and left out. Other errors are
    ValueErrors and OSErrors in words.
    """

    def bad(error: BadRecord) -> None:
        if skip is None:
            raise BadRecord(f"{error}; {SKIPPING}") from None
        skip(error)

    counts: Counter[str] = Counter() if tally is None else tally
    with _opened(file) as raw, formats.faults(file.label, file.form):
        if file.direct:
            raw.seek(start)
            begin = start or _begin(raw, file.label, bad, explicit=file.explicit)
            if begin is not None:
                yield from _read(raw, file.source, file.form.kind, file.label, bad, counts, begin, end)
            return
        found = enumerate(_indirect(file, raw, bad, counts))
        for i, document in found if start == 0 and end is None else islice(found, start, end):
            yield document._replace(start=i, end=i + 1)


def again(file: File, places: Sequence[tuple[int, int]]) -> tuple[list[str], list[bytes]] | None:
    """The texts of the documents that stand at `places` of a direct file, and their UTF-8, all parsed together, which is
    faster than `documents`; None where only that can.

    For who knows what they were, and compares: of a file that changed, broken records might mend one another here.
    """
    if file.form.kind != "jsonl" or file.source.begins is not None:
        return None
    begin = places[0][0]
    with _opened(file) as raw, formats.faults(file.label, file.form):
        raw.seek(begin)
        data = raw.read(places[-1][1] - begin)
    lines = [data[start - begin : end - begin] for start, end in places]
    pick = file.source.picker()
    try:
        found = [pick(record) for record in json.loads((b"[" + b",".join(lines) + b"]").decode())]
        if file.source.normalize == "nfc":
            found = [unicodedata.normalize("NFC", text) for text in found]
        return found, [text.encode() for text in found]
    except (ValueError, RecursionError):
        return None


def _opened(file: File) -> Any:
    try:
        return io.BufferedReader(file.path.open("rb", buffering=0), formats.BLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file.label}: it was there and is gone; put it back and run the same command"
        ) from None


def _indirect(file: File, raw: io.BufferedReader, bad: Bad, counts: Counter[str]) -> Iterator[Document]:
    """The documents of a file that is compressed, or made of other records than lines of bytes."""
    source, kind = file.source, file.form.kind
    if file.explicit and file.size == 0:
        raise ValueError(f"{file.label}: the file is empty")
    if kind == "parquet":
        yield from _read(raw, source, kind, file.label, bad, counts, 0)
        return
    stream = formats.unpacked(raw, file.form.packing)
    if kind != "tar":
        begin = _begin(stream, file.label, bad, explicit=file.explicit)
        if begin is not None:
            yield from _read(stream, source, kind, file.label, bad, counts, begin)
        return
    for name, content in formats.members(stream):
        label, form = f"{file.label}/{name}", _form(source, f"{file.label}/{name}", name)
        if any(_excluded(part, name, source.exclude) for part in PurePosixPath(name).parts):
            continue
        if form.kind in ("tar", "parquet"):
            bad(BadRecord(f"{label}: a {form.kind} inside a tar is not read"))
            continue
        with formats.faults(label, form):
            inner = formats.unpacked(content, form.packing) if form.packing else content
            begin = _begin(inner, label, bad, explicit=False)
            if begin is not None:
                yield from _read(inner, source, form.kind, label, bad, counts, begin)


def _begin(stream: io.BufferedReader, label: str, bad: Bad, *, explicit: bool) -> int | None:
    """The byte that text begins at in a stream, which is read up to there: 0, or behind a BOM. None for what is binary,
    which is told to `bad`.

    Raises ValueError for a file that was named itself and is empty or binary.
    """
    head = stream.peek(formats.HEAD_BYTES)[: formats.HEAD_BYTES]
    if not head and explicit:
        raise ValueError(f"{label}: the file is empty")
    if b"\0" in head or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        error = BadRecord(
            f"{label}: a binary file, or UTF-16 (it has NUL bytes or its mark); expected text in UTF-8, which "
            "iconv -f UTF-16 -t UTF-8 makes of UTF-16"
        )
        if explicit:
            raise error
        bad(error)
        return None
    return len(stream.read(len(formats.BOM))) if head.startswith(formats.BOM) else 0


def _read(
    stream: io.BufferedReader,
    source: Source,
    kind: formats.Kind,
    label: str,
    bad: Bad,
    counts: Counter[str],
    start: int,
    end: int | None = None,
) -> Iterator[Document]:
    """The documents among the records of a stream, which stands at byte `start`; the hot loop of reading."""
    records, take = _records(stream, source, kind, start, end), _taker(source, kind)
    shortest, longest, nfc = source.min_chars, source.max_chars, source.normalize == "nfc"
    whole, number = end is None and source.begins is None, 0
    n_border = 0 if source.prompt is None else len(fields.BORDER)  # which is no text
    if source.begins is not None:
        between = source.separator or "" if kind == "text" else ""
        records, take = _joined(records, take, re.compile(source.begins).match, between)
    for at, after, value in records:
        number += 1
        if value == b"":  # an empty line is no record, an empty part of a text is an empty document
            counts["empty"] += kind == "text"
            continue
        try:
            text = take(value)
            if text is None:
                continue
            utf8 = text.encode()
        except (BadRecord, UnicodeError) as error:
            where = label if isinstance(error, _Ended) else _where(kind, label, number if whole else None, at)
            bad(BadRecord(f"{where}: {_explained(error, kind, at)}"))
            continue
        n_bytes = len(utf8)
        if nfc and n_bytes != len(text):
            text = conversations.composed(text) if source.spoken is not None else unicodedata.normalize("NFC", text)
            utf8 = text.encode()
        n_chars = len(text)
        if source.spoken is not None:  # the JSON around what is said is no text
            spoken = conversations.load(text)
            n_chars, n_bytes = len(conversations.plain(spoken)), conversations.n_bytes(spoken)
        if n_chars < shortest or not n_chars:
            counts["too short" if n_chars else "empty"] += 1
        elif longest is not None and n_chars > longest:
            counts["too long"] += 1
        else:
            yield Document(text, utf8, n_bytes - n_border, at, after)


def _records(stream: io.BufferedReader, source: Source, kind: formats.Kind, start: int, end: int | None) -> Records:
    if kind == "jsonl":
        return formats.spans(stream, b"\n", start, end)
    if kind == "text":
        separator = (source.separator or "").encode()
        return formats.spans(stream, separator, start, end) if separator else formats.pieces(stream, start, end)
    columns = source.columns()
    if kind == "parquet":
        return _guarded(formats.parquet_rows(stream, columns))
    if kind == "json":
        return _guarded(formats.array_values(stream))
    return _guarded(formats.table_rows(stream, formats.DELIMITERS[kind], columns))


def _joined(records: Records, take: Take, begins: Callable[[str], object], between: str) -> tuple[Records, Take]:
    """Records put together, with `between` amid them, and what takes their text: each document begins at a record whose text
    `begins` matches."""

    def join() -> Records:
        parts: list[str] = []
        first, last, n_chars = 0, 0, 0
        for at, after, value in records:
            try:
                text = take(value)
            except (BadRecord, UnicodeError):
                yield at, after, value  # take_joined raises it again
                continue
            if text is None:
                continue
            if parts and begins(text):
                yield first, last, between.join(parts)
                parts, n_chars = [], 0
            elif n_chars > formats.RECORD_BYTES:
                raise BadRecord(f"no record begins a document in {n_chars} characters; change begins")
            first = first if parts else at
            parts.append(text)
            n_chars, last = n_chars + len(text), after
        if parts:
            yield first, last, between.join(parts)

    def take_joined(value: Any) -> str | None:
        return value if isinstance(value, str) else take(value)

    return _guarded(join()), take_joined


class _Ended(BadRecord):
    """What is bad is all that is left of a stream, for behind it the records cannot be told apart."""


def _guarded(records: Records) -> Records:
    """The records, and as the last one what ended them."""
    try:
        yield from records
    except BadRecord as error:
        yield 0, 0, _Ended(error)


def _where(kind: formats.Kind, label: str, number: int | None, at: int) -> str:
    """The place of a record as people look for it."""
    if kind == "text":
        return label
    if kind == "jsonl":
        return f"{label}:{number}" if number is not None else f"{label}: byte {at}"
    if kind in ("csv", "tsv"):
        return f"{label}:{at}"
    return f"{label}: {'row' if kind == 'parquet' else 'element'} {at + 1}"


def _explained(error: Exception, kind: formats.Kind, at: int) -> str:
    if isinstance(error, UnicodeDecodeError):
        place = f"{at + error.start}{'' if kind == 'text' else ' of the file'}"
        return f"not UTF-8 at byte {place} (0x{error.object[error.start]:02x})"
    if isinstance(error, UnicodeEncodeError):
        code = ord(error.object[error.start])
        if 0xDC80 <= code <= 0xDCFF and kind in formats.DELIMITERS:  # how table_rows hands on what it cannot decode
            return f"not UTF-8 (0x{code - 0xDC00:02x})"
        return "its text has half of a surrogate pair, which is no character"
    return f"{error} (in what begins at byte {at})" if kind == "text" and at else str(error)


def _taker(source: Source, kind: formats.Kind) -> Take:
    """What makes a record's text of it; None of a blank line. It raises BadRecord or UnicodeError."""
    pick = source.picker()

    def plain(value: bytes | BadRecord) -> str:
        if isinstance(value, BadRecord):
            raise value
        if b"\0" in value:
            raise BadRecord("a NUL byte: a binary file, or UTF-16; expected text in UTF-8")
        return value.decode()

    def line(value: bytes | BadRecord) -> str | None:
        if isinstance(value, BadRecord):
            raise value
        text = value.decode()
        try:
            record, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            end = -1
        if end != len(text) and (end < 0 or text[end:].strip(JSON_SPACE)):
            try:  # it allows white space in front, and has the words for what is wrong
                record = decoder.decode(text)
            except (ValueError, RecursionError) as error:
                if text.isspace():
                    return None
                raise BadRecord(f"broken JSON ({error})") from None
        return pick(record)

    def record(value: Any) -> str:
        if isinstance(value, BadRecord):
            raise value
        if bare and isinstance(value, str):
            return value
        return pick(value)

    decoder, bare = json.JSONDecoder(), kind == "json" and not _has_fields(source)
    return plain if kind == "text" else line if kind == "jsonl" else record
