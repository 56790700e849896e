"""Where text comes from: files, directories, globs, standard input, URLs, the standard library; as a stream of documents.

It finds and reads; it knows nothing of tokens, splits or shards. A document can be read again from its byte range.
"""

import fnmatch
import glob
import gzip
import hashlib
import http.client
import json
import os
import sys
import sysconfig
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from gpt import durable, signals
from gpt.config import Settings

BLOCK = 1 << 20
JSON_LINES = (".jsonl", ".ndjson")
UNSUPPORTED = {
    **dict.fromkeys((".parquet", ".arrow", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z"), "is not read here"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".epub"), "is not plain text; extract its text first"),
    **dict.fromkeys((".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".safetensors"), "is binary, not text"),
}
SKIPPING = "--on-bad-record skip leaves such text out"
USER_AGENT = "gpt-trainer"
TIMEOUT_S = 30


class BadRecord(ValueError):
    """A document that cannot be read as text; the message says where and why. A policy may skip it."""


class Source(Settings):
    """One input of a recipe: exactly one of `path`, `url` and `python` says where the text is."""

    path: str | None = Field(None, description="a file, a directory, a glob, or '-' for standard input")
    url: str | None = Field(None, description="an http(s) address of one file")
    sha256: str | None = Field(None, description="hash that the file behind `url` must have, in hexadecimal")
    python: Literal["stdlib"] | None = Field(
        None, description="the .py files of the running interpreter's standard library"
    )
    name: str | None = Field(None, description="the source's name in reports; by default its file's or directory's")
    field: str | None = Field(None, description="the field that holds the text of a JSON line; 'text' in a .jsonl file")
    separator: str | None = Field(
        None, description="what stands between documents in a text file; null: a file is a document"
    )
    exclude: tuple[str, ...] = Field(
        (), strict=False, description="globs over names and relative paths that are left out of a directory"
    )
    obtain: str | None = Field(None, description="what to tell someone who does not have the file")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(place is not None for place in (self.path, self.url, self.python)) != 1:
            raise ValueError("an input has exactly one of path, url and python")
        if self.field is not None and self.separator is not None:
            raise ValueError("an input has a field (JSON lines) or a separator (text), not both")
        if self.separator == "":
            raise ValueError("separator must not be empty")
        return self

    @property
    def label(self) -> str:
        """The source's name."""
        if self.name is not None or self.python is not None:
            return self.name or "python"
        place = PurePosixPath(urllib.parse.urlsplit(self.url).path if self.url else self.path or "")
        plain = [part for part in place.parts if not glob.has_magic(part) and part != "/"]
        last = plain[-1] if plain else "input"
        return "stdin" if last == "-" else last.removesuffix(".gz").rpartition(".")[0] or last


@dataclass(frozen=True)
class File:
    """A file to read: `label` is how errors name it; `explicit` files must not be empty."""

    path: Path
    label: str
    field: str | None  # of JSON lines; None: plain text
    separator: str | None
    explicit: bool

    @property
    def size(self) -> int:
        """Bytes on disk, which for .gz is less than the text."""
        return self.path.stat().st_size


class Document(NamedTuple):
    """A document's text, its UTF-8 bytes, and the bytes start .. end - 1 of the (decompressed) file that hold it."""

    text: str
    utf8: bytes
    start: int
    end: int


def files(source: Source, downloads: Path, spool: Path, say: Callable[[str], None]) -> list[File]:
    """The files of a source in order. A URL is fetched into `downloads`, standard input is copied to the file `spool`.

    Raises FileNotFoundError or ValueError in words.
    """

    def file(path: Path, label: str, *, explicit: bool) -> File:
        stem, suffix = path.name.removesuffix(".gz"), PurePosixPath(path.name.removesuffix(".gz")).suffix.lower()
        if explicit and suffix in UNSUPPORTED:
            raise ValueError(
                f"{label}: {suffix} {UNSUPPORTED[suffix]}; give .txt, .md or other text, .jsonl, or .gz of them"
            )
        is_json = stem.lower().endswith(JSON_LINES) and source.separator is None
        return File(path, label, source.field or ("text" if is_json else None), source.separator, explicit)

    if source.url is not None:
        return [file(fetch(source.url, source.sha256, downloads, say), source.url, explicit=True)]
    if source.python is not None:
        return [file(path, str(path), explicit=False) for path in _standard_library(source.exclude)]
    place = source.path or ""
    if place == "-":
        with spool.open("wb") as copy:
            while block := sys.stdin.buffer.read(BLOCK):
                signals.check()
                copy.write(block)
        return [file(spool, "standard input", explicit=True)]
    path = Path(place)
    if path.is_dir():
        found = _walk(path, source.exclude)
        if not found:
            raise FileNotFoundError(
                f"{place}: no file in this directory{' is left by exclude' if source.exclude else ''}"
            )
        return [file(each, str(each), explicit=False) for each in found]
    if path.exists():
        return [file(path, place, explicit=True)]
    if found := sorted(Path(each) for each in glob.glob(place, recursive=True) if Path(each).is_file()):  # noqa: PTH207
        return [file(each, str(each), explicit=False) for each in found]
    what = "nothing matches" if glob.has_magic(place) else "no such file or directory"
    raise FileNotFoundError(f"{place}: {what}" + (f"; {source.obtain}" if source.obtain else ""))


def _walk(root: Path, exclude: tuple[str, ...]) -> list[Path]:
    """Files under `root` sorted by relative path; hidden ones and links to directories are left out."""

    def kept(path: Path) -> bool:
        relative = path.relative_to(root).as_posix()
        return not path.name.startswith(".") and not any(
            fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(relative, pattern) for pattern in exclude
        )

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


def documents(
    file: File, start: int = 0, end: int | None = None, skip: Callable[[BadRecord], None] | None = None
) -> Iterator[Document]:
    """The documents of a file, or of its bytes start .. end - 1, which begin and end at documents; empty ones are left out.

    What cannot be read as text raises BadRecord, or is handed to `skip` and left out. Other errors are ValueErrors.
    """
    try:
        with file.path.open("rb") as raw:
            if _is_binary(file, raw, skip):
                return
            stream: BinaryIO = gzip.GzipFile(fileobj=raw) if file.path.suffix == ".gz" else raw  # type: ignore[assignment]
            read = _json_text if file.field is not None else _plain_text
            for number, (at, after, data) in enumerate(_records(stream, file, start, end), 1):
                try:
                    text, utf8 = read(file, data, number, at)
                except BadRecord as error:
                    if skip is None:
                        raise BadRecord(f"{error}; {SKIPPING}") from None
                    skip(error)
                    continue
                if text:
                    yield Document(text, utf8, at, after)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file.label}: not a whole gzip file ({error})") from None


def _is_binary(file: File, raw: BinaryIO, skip: Callable[[BadRecord], None] | None) -> bool:
    """Whether a file is binary and skipped; refuses one without `skip`, and any such or empty file that was named itself."""
    stream = gzip.GzipFile(fileobj=raw) if file.path.suffix == ".gz" else raw
    head = stream.read(1 << 13)
    raw.seek(0)
    if not head and file.explicit:
        raise ValueError(f"{file.label}: the file is empty")
    if b"\0" not in head:
        return False
    error = BadRecord(f"{file.label}: a binary file, or UTF-16 (it has NUL bytes); expected text in UTF-8")
    if file.explicit:
        raise error
    if skip is None:
        raise BadRecord(f"{error}; {SKIPPING}")
    skip(error)
    return True


def _records(stream: BinaryIO, file: File, start: int, end: int | None) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, content) of each record: the whole file, or what its line feeds or separators part."""
    stream.seek(start)
    delimiter = b"\n" if file.field is not None else (file.separator or "").encode()
    if not delimiter:
        data = stream.read()
        yield start, start + len(data), data
        return
    position, rest = start, b""
    while block := stream.read(max(BLOCK, len(rest))):  # grows with the record, so that a long one costs linear time
        *whole, rest = (rest + block).split(delimiter)
        for data in whole:
            if end is not None and position >= end:
                return
            yield position, position + len(data) + len(delimiter), data
            position += len(data) + len(delimiter)
    if rest and (end is None or position < end):
        yield position, position + len(rest), rest


def _plain_text(file: File, data: bytes, number: int, at: int) -> tuple[str, bytes]:
    try:
        return data.decode("utf-8"), data
    except UnicodeDecodeError as error:
        raise BadRecord(f"{file.label}: not UTF-8 at byte {at + error.start} (0x{data[error.start]:02x})") from None


def _json_text(file: File, data: bytes, number: int, at: int) -> tuple[str, bytes]:
    """The text field of a JSON line, and its UTF-8; a blank line is an empty document."""
    where, field = f"{file.label}:{number}", file.field
    try:
        line = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{where}: not UTF-8 at byte {at + error.start} of the file (0x{data[error.start]:02x})"
        ) from None
    if not line.strip():
        return "", b""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: broken JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord(f"{where}: expected a JSON object with a field '{field}', got {type(record).__name__}")
    if field not in record:
        raise BadRecord(
            f"{where}: no field '{field}'; it has {', '.join(map(repr, record)) or 'none'}; name one with field"
        )
    text = record[field]
    if not isinstance(text, str):
        raise BadRecord(f"{where}: field '{field}' is {type(text).__name__}, expected text")
    try:
        return text, text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"{where}: field '{field}' has half of a surrogate pair, which is no character") from None


def fetch(url: str, sha256: str | None, directory: Path, say: Callable[[str], None]) -> Path:
    """The file behind `url` in `directory`: reused if it has the hash (or none is stated), else fetched whole or not at all."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: not an http(s) address")
    name = PurePosixPath(urllib.parse.unquote(parts.path)).name or "index"
    path = directory / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if path.is_file() and sha256 in (None, durable.sha256_file(path)):
        return path
    say(f"fetching {url}")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        digest = durable.write_file(path, _download(url, parts.hostname, sha256))
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(f"{url}: the server answered {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise ValueError(f"{url}: could not be fetched ({reason}); fetch it yourself and give input=PATH") from None
    if sha256 is None:
        say(f"its sha256 is {digest}")
    return path


def _download(url: str, host: str, sha256: str | None) -> Iterator[bytes]:
    """The body in blocks; ValueError at its end if it is not whole or has another hash."""
    local = host in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    digest, n_bytes = hashlib.sha256(), 0
    with opener.open(request, timeout=TIMEOUT_S) as response:
        while block := response.read(BLOCK):
            signals.check()
            digest.update(block)
            n_bytes += len(block)
            yield block
        expected = response.headers.get("Content-Length")
    if expected is not None and int(expected) != n_bytes:
        raise ValueError(f"{url}: the connection ended after {n_bytes} of {expected} bytes; run the same command again")
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise ValueError(f"{url}: its sha256 is {digest.hexdigest()}, expected {sha256}; nothing was kept")
