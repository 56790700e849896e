"""Token shards: the file format of prepared data, its writer and its verifying reader. It knows no text and no order of training.

A shard is a header, token ids, a document index, optional spans, and a sha256 for every MiB of what stands before the
hashes. A data set is a directory of shards with a manifest. Nothing in it says where, when or by how many it was made.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from gpt.durable import CorruptError, sha256_file

MAGIC, VERSION = b"GPTSHARD", 1
BLOCK = 1 << 20
HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("token_bytes", "<u4"),
        ("n_tokens", "<u8"),
        ("n_documents", "<u8"),
        ("n_spans", "<u8"),
        ("max_id", "<u8"),
        ("tokenizer", "S64"),  # sha256, hexadecimal
        ("checksum", "S64"),  # sha256 of the header with this field empty
    ]
)
DOCUMENT = np.dtype([("start", "<u8"), ("n_bytes", "<u8"), ("source", "<u4")])
SPAN = np.dtype([("start", "<u8"), ("end", "<u8"), ("kind", "<u4")])
SPAN_KINDS = ("train", "prefix")


class Span(NamedTuple):
    """Tokens start .. end - 1 of a document: `train` marks what is learned, `prefix` what is attended both ways."""

    start: int
    end: int
    kind: Literal["train", "prefix"]


@dataclass(frozen=True)
class Document:
    """A document's ids, start token first; the raw UTF-8 bytes it came from; the number of its source; its spans."""

    ids: np.ndarray
    n_bytes: int
    source: int
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest names it."""

    file: str
    sha256: str
    n_tokens: int
    n_documents: int
    n_bytes: int


class Target(Protocol):
    """Where shards are written: durable.Directory."""

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> str: ...


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_shard(
    directory: Target, name: str, documents: Iterable[Document], *, vocab_size: int, tokenizer_sha256: str
) -> ShardEntry:
    """Write one shard; ValueError for an id outside the vocabulary. Holds the shard's ids in memory."""
    dtype, ids, index, spans, n_tokens, max_id = token_dtype(vocab_size), [], [], [], 0, 0
    for document in documents:
        array = np.asarray(document.ids)
        low, high = (int(array.min()), int(array.max())) if len(array) else (0, 0)
        if not len(array) or low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name}: document {len(index)} has ids {low} to {high}, the vocabulary {vocab_size} entries"
            )
        index.append((n_tokens, document.n_bytes, document.source))
        spans += [(n_tokens + s.start, n_tokens + s.end, SPAN_KINDS.index(s.kind)) for s in document.spans]
        ids.append(array.astype(dtype))
        n_tokens, max_id = n_tokens + len(array), max(max_id, high)
    header = np.zeros((), HEADER)
    for field, value in {
        "magic": MAGIC,
        "version": VERSION,
        "token_bytes": dtype.itemsize,
        "n_tokens": n_tokens,
        "n_documents": len(index),
        "n_spans": len(spans),
        "max_id": max_id,
        "tokenizer": tokenizer_sha256.encode(),
    }.items():
        header[field] = value
    header["checksum"] = hashlib.sha256(header.tobytes()).hexdigest().encode()
    sections = [header, *ids, np.array(index, DOCUMENT), np.array(spans, SPAN)]
    body = b"".join(section.tobytes() for section in sections)
    hashes = b"".join(hashlib.sha256(body[i : i + BLOCK]).digest() for i in range(0, len(body), BLOCK))
    sha256 = directory.write(name, [body, hashes])
    return ShardEntry(name, sha256, n_tokens, len(index), sum(n_bytes for _, n_bytes, _ in index))


def write_manifest(
    directory: Target,
    *,
    tokenizer_sha256: str,
    vocab_size: int,
    start_id: int,
    splits: Mapping[str, list[ShardEntry]],
    sources: list[str],
    settings: Mapping[str, Any],
) -> None:
    """Write manifest.json: what the data set is, and a hash of every shard."""
    manifest = {
        "format": VERSION,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "start_id": start_id,
        "sources": sources,
        "settings": dict(settings),
        "splits": {name: [asdict(entry) for entry in entries] for name, entries in splits.items()},
    }
    directory.write("manifest.json", [json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False).encode()])


class Shard:
    """One open shard. Every read is checked: each MiB against its hash the first time it is touched."""

    def __init__(self, path: Path, entry: ShardEntry, tokenizer_sha256: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
        except OSError as error:
            raise CorruptError(
                f"{path}: named by the manifest, but {error.strerror}; prepare the data set again"
            ) from None
        header = np.frombuffer(self._pread(HEADER.itemsize, 0), HEADER)[0]
        self._check_header(header, entry, tokenizer_sha256)
        self.dtype = np.dtype(f"<u{header['token_bytes']}")
        self.n_tokens, self.n_documents = int(header["n_tokens"]), int(header["n_documents"])
        self._index_at = HEADER.itemsize + self.n_tokens * self.dtype.itemsize
        self._spans_at = self._index_at + self.n_documents * DOCUMENT.itemsize
        self._body = self._spans_at + int(header["n_spans"]) * SPAN.itemsize
        n_blocks = -(-self._body // BLOCK)
        expected, size = self._body + 32 * n_blocks, os.fstat(self._fd).st_size
        if size != expected:
            raise self._corrupt(f"{size} bytes, expected {expected}")
        self._hashes = self._pread(32 * n_blocks, self._body)
        self._verified = bytearray(n_blocks)

    def _check_header(self, header: np.void, entry: ShardEntry, tokenizer_sha256: str) -> None:
        if header["magic"] != MAGIC:
            raise self._corrupt("it is not a token shard")
        blank = header.copy()
        blank["checksum"] = b""
        if hashlib.sha256(blank.tobytes()).hexdigest().encode() != header["checksum"]:
            raise self._corrupt("its header was changed")
        if header["version"] != VERSION:
            raise ValueError(
                f"{self.path}: format version {header['version']}, this program reads {VERSION}; prepare it again"
            )
        if header["token_bytes"] not in (2, 4):
            raise self._corrupt(f"tokens of {header['token_bytes']} bytes")
        if header["tokenizer"].decode() != tokenizer_sha256:
            raise self._corrupt("it was written with another tokenizer than its manifest names")
        if (header["n_tokens"], header["n_documents"]) != (entry.n_tokens, entry.n_documents):
            raise self._corrupt(f"{header['n_tokens']} tokens, the manifest says {entry.n_tokens}")

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self.path}: {what}; the file is damaged: prepare the data set again")

    def _pread(self, count: int, offset: int) -> bytes:
        data = os.pread(self._fd, count, offset)
        if len(data) != count:
            raise self._corrupt(f"{len(data)} of {count} bytes at {offset}: it is truncated")
        return data

    def _read(self, offset: int, count: int) -> bytes:
        """Bytes of the body, from verified blocks only."""
        for block in range(offset // BLOCK, -(-(offset + count) // BLOCK)):
            if not self._verified[block]:
                start = block * BLOCK
                data = self._pread(min(BLOCK, self._body - start), start)
                if hashlib.sha256(data).digest() != self._hashes[32 * block : 32 * block + 32]:
                    raise self._corrupt(f"bytes {start} to {start + len(data)} are not what was written")
                self._verified[block] = 1
        return self._pread(count, offset)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of this shard."""
        data = self._read(HEADER.itemsize + start * self.dtype.itemsize, count * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype)

    def documents(self) -> np.ndarray:
        """The document index: (n_documents,) of DOCUMENT."""
        return np.frombuffer(self._read(self._index_at, self._spans_at - self._index_at), DOCUMENT)

    def spans(self) -> np.ndarray:
        """All spans: (n_spans,) of SPAN, offsets within the shard."""
        return np.frombuffer(self._read(self._spans_at, self._body - self._spans_at), SPAN)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class TokenSet:
    """One split of a prepared data set: its documents' tokens one after another, read as a circle.

    Every document opens with the start token; the target of the last token is token 0, the closing delimiter.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        manifest, self.fingerprint = _load_manifest(path)
        self.vocab_size, self.start_id = manifest["vocab_size"], manifest["start_id"]
        self.tokenizer_sha256, self.sources = manifest["tokenizer_sha256"], manifest["sources"]
        if split not in manifest["splits"]:
            raise ValueError(f"{path}: no split '{split}'; there is {', '.join(manifest['splits'])}")
        self.entries = [_entry(path, values) for values in manifest["splits"][split]]
        self.shards = [Shard(path / entry.file, entry, self.tokenizer_sha256) for entry in self.entries]
        self.dtype = token_dtype(self.vocab_size)
        if any(shard.dtype != self.dtype for shard in self.shards):
            raise CorruptError(
                f"{path}: its shards hold tokens of other sizes than a vocabulary of {self.vocab_size} needs"
            )
        self.n_documents = sum(entry.n_documents for entry in self.entries)
        self.n_bytes = sum(entry.n_bytes for entry in self.entries)
        self._ends = np.cumsum([entry.n_tokens for entry in self.entries], dtype=np.int64)

    @property
    def n_tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, in the data set's dtype; they must lie inside the split."""
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise IndexError(f"{self.path}: tokens {start} to {start + count} of {self.n_tokens}")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            offset = start - (int(self._ends[shard - 1]) if shard else 0)
            taken = min(count, self.entries[shard].n_tokens - offset)
            parts.append(self.shards[shard].read(offset, taken))
            start, count, shard = start + taken, count - taken, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, self.dtype)

    @cached_property
    def _documents(self) -> np.ndarray:
        firsts = self._ends - [entry.n_tokens for entry in self.entries]
        parts = []
        for shard, first in zip(self.shards, firsts, strict=True):
            part = shard.documents().copy()
            part["start"] += np.uint64(first)
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0, DOCUMENT)

    @property
    def document_starts(self) -> np.ndarray:
        """(n_documents,) int64: where each document's start token stands."""
        return self._documents["start"].astype(np.int64)

    @property
    def document_bytes(self) -> np.ndarray:
        """(n_documents,) int64: raw UTF-8 bytes, before any normalization."""
        return self._documents["n_bytes"].astype(np.int64)

    @property
    def document_sources(self) -> np.ndarray:
        """(n_documents,) int64: indices into `sources`."""
        return self._documents["source"].astype(np.int64)

    @cached_property
    def _spans(self) -> np.ndarray:
        firsts = self._ends - [entry.n_tokens for entry in self.entries]
        parts = []
        for shard, first in zip(self.shards, firsts, strict=True):
            part = shard.spans().copy()
            part["start"] += np.uint64(first)
            part["end"] += np.uint64(first)
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0, SPAN)

    def spans(self, start: int, count: int) -> list[Span]:
        """The spans that touch tokens start .. start + count - 1, in offsets of the split; none in the whole set: all is trained."""
        touching = self._spans[(self._spans["end"] > start) & (self._spans["start"] < start + count)]
        return [Span(int(s["start"]), int(s["end"]), SPAN_KINDS[s["kind"]]) for s in touching]

    @property
    def has_spans(self) -> bool:
        return len(self._spans) > 0

    def verify(self) -> None:
        """Hash every shard whole against the manifest; CorruptError names the first that differs."""
        for entry in self.entries:
            if sha256_file(self.path / entry.file) != entry.sha256:
                raise CorruptError(
                    f"{self.path / entry.file}: not the bytes that were written; prepare the data set again"
                )


def _load_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """(manifest, its sha256); errors in words for what is no data set, or not whole."""
    file = path / "manifest.json"
    if not file.is_file():
        hint = (
            f"python data/prepare.py {path}.yaml"
            if Path(f"{path}.yaml").exists()
            else f"python data/prepare.py FILES --out {path}"
        )
        raise FileNotFoundError(f"{path} is not a prepared data set (no manifest.json); make it: {hint}")
    data = file.read_bytes()
    try:
        manifest = json.loads(data)
        if manifest["format"] != VERSION:
            raise ValueError(f"{file}: format {manifest['format']}, this program reads {VERSION}; prepare it again")
        types = {"vocab_size": int, "start_id": int, "tokenizer_sha256": str, "sources": list, "splits": dict}
        if not all(type(manifest[key]) is kind for key, kind in types.items()):
            raise TypeError
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, RecursionError):
        raise CorruptError(f"{file} is damaged; prepare the data set again") from None
    return manifest, hashlib.sha256(data).hexdigest()


def _entry(path: Path, values: Any) -> ShardEntry:
    try:
        entry = ShardEntry(**values)
    except TypeError:
        raise CorruptError(f"{path}/manifest.json is damaged: a shard's entry is incomplete") from None
    counts = (entry.n_tokens, entry.n_documents, entry.n_bytes)
    if (
        not all(type(n) is int and n >= 0 for n in counts)
        or type(entry.file) is not str
        or type(entry.sha256) is not str
    ):
        raise CorruptError(f"{path}/manifest.json is damaged: the entry of shard {entry.file!r}")
    if Path(entry.file).name != entry.file or entry.file.startswith("."):
        raise CorruptError(f"{path}/manifest.json names a file outside its directory: {entry.file!r}")
    return entry
