"""Token shards: the file format of prepared data, its writer and its verifying reader. It knows no text and no order of training.

A shard is a header, token ids, a document index, optional spans, and a sha256 for every MiB of what stands before the
hashes. A data set is a directory of shards with a manifest. Nothing in it says where, when or by how many it was made.
Every byte is covered by a hash, and is checked before it is used.
"""

import hashlib
import json
import os
import resource
import stat
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, pairwise, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from gpt.durable import CorruptError, is_plain, sha256_file

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
SPAN_KINDS: tuple[Literal["train", "prefix"], ...] = ("train", "prefix")
AGAIN = "prepare the data set again"


class Span(NamedTuple):
    """Tokens start .. end - 1 of a document: `train` marks what is learned, `prefix` what is attended both ways."""

    start: int
    end: int
    kind: Literal["train", "prefix"]


@dataclass(frozen=True)
class Document:
    """A document's ids, start token first; the raw UTF-8 bytes it came from; the number of its source; its spans."""

    ids: np.ndarray | Sequence[int]
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


class Tokens(Protocol):
    """What a split offers, whatever it is stored as: documents one after another, read as a circle.

    A document opens with the start token, so what follows the last token of a document, and of the split, is one. A
    conversation opens as its template does, and nothing of that is learned.
    """

    path: Path
    vocab_size: int
    start_id: int
    tokenizer_sha256: str
    sources: list[str]
    fingerprint: str  # of the whole data set; hexadecimal
    dtype: np.dtype
    n_documents: int
    n_bytes: int
    conversations: bool  # whether there are documents that are conversations
    pairs: bool  # whether documents 2n and 2n + 1 are conversations with one beginning, of which the first is preferred

    @property
    def n_tokens(self) -> int: ...

    @property
    def has_spans(self) -> bool: ...

    @property
    def document_starts(self) -> np.ndarray:
        """(n_documents,) int64, ascending."""

    @property
    def document_bytes(self) -> np.ndarray:
        """(n_documents,) int64: raw UTF-8 bytes."""

    @property
    def document_sources(self) -> np.ndarray:
        """(n_documents,) int64: indices into `sources`."""

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, which lie inside the split, in `dtype`."""

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill out (n, width), of any integer dtype, with tokens starts[i] .. starts[i] + width - 1 of the split."""

    def spans(self, start: int, count: int) -> list[Span]: ...

    def verify(self) -> None: ...


class Target(Protocol):
    """Where shards are written: durable.Directory."""

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> str: ...


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def write_shard(
    directory: Target, name: str, documents: Iterable[Document], *, vocab_size: int, tokenizer_sha256: str
) -> ShardEntry:
    """Write one shard; ValueError for an id outside the vocabulary. Holds the shard in memory."""
    ids: list[np.ndarray] = []
    index: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int, int]] = []
    n_tokens = 0
    for document in documents:
        array = _checked_ids(f"{name}: document {len(index)}", document, vocab_size)
        index.append((n_tokens, document.n_bytes, document.source))
        spans += [(n_tokens + s.start, n_tokens + s.end, SPAN_KINDS.index(s.kind)) for s in sorted(document.spans)]
        ids.append(array)
        n_tokens += len(array)
    arrays, n_bytes = (ids, np.array(index, DOCUMENT), np.array(spans, SPAN)), sum(n for _, n, _ in index)
    return write_arrays(directory, name, *arrays, n_bytes, vocab_size=vocab_size, tokenizer_sha256=tokenizer_sha256)


def write_arrays(
    directory: Target,
    name: str,
    ids: Sequence[np.ndarray],
    documents: np.ndarray,
    spans: np.ndarray,
    n_bytes: int,
    *,
    vocab_size: int,
    tokenizer_sha256: str,
) -> ShardEntry:
    """`write_shard` of whole arrays: `ids` in blocks that stand end to end, the index (n_documents,) of DOCUMENT, whose
    documents follow one another, the spans (n_spans,) of SPAN by start, and the documents' bytes as counted by the caller.
    """
    dtype, n_tokens = token_dtype(vocab_size), sum(map(len, ids))
    low = min((int(block.min()) for block in ids if len(block)), default=0)
    high = max((int(block.max()) for block in ids if len(block)), default=0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} has ids from {low} to {high}; the vocabulary ends at {vocab_size - 1}")
    counts = (n_tokens, len(documents), len(spans), high)
    header = np.array((MAGIC, VERSION, dtype.itemsize, *counts, tokenizer_sha256.encode(), b""), HEADER)
    header["checksum"] = _header_checksum(header)
    blocks = (block.astype(dtype, copy=False) for block in ids)
    body = b"".join(part.tobytes() for part in (header, *blocks, documents, spans))
    view = memoryview(body)
    hashes = b"".join(hashlib.sha256(view[i : i + BLOCK]).digest() for i in range(0, len(body), BLOCK))
    sha256 = directory.write(name, [body, hashes])
    return ShardEntry(name, sha256, n_tokens, len(documents), n_bytes)


def _checked_ids(where: str, document: Document, vocab_size: int) -> np.ndarray:
    ids = np.asarray(document.ids)
    if not len(ids):
        raise ValueError(f"{where} has no ids, not even the start token")
    low, high = ids.min(), ids.max()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{where} has ids from {low} to {high}; the vocabulary ends at {vocab_size - 1}")
    for span in document.spans:
        if not 0 <= span.start < span.end <= len(ids):
            raise ValueError(f"{where} has {len(ids)} tokens, and a span from {span.start} to {span.end}")
    return ids


def _header_checksum(header: np.ndarray) -> bytes:
    blank = header.copy()
    blank["checksum"] = b""
    return hashlib.sha256(blank.tobytes()).hexdigest().encode()


def write_manifest(
    directory: Target,
    *,
    tokenizer_sha256: str,
    vocab_size: int,
    start_id: int,
    splits: Mapping[str, list[ShardEntry]],
    sources: list[str],
    settings: Mapping[str, Any],
    conversations: bool = False,
    pairs: bool = False,
) -> None:
    """Write manifest.json: what the data set is, a hash of every shard, and a checksum of its own.

    `conversations`, `pairs`: what its documents are, as in `Tokens`.
    """
    manifest: dict[str, Any] = {
        "format": VERSION,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "start_id": start_id,
        "sources": sources,
        "conversations": conversations or pairs,
        "pairs": pairs,
        "settings": dict(settings),
        "splits": {name: [asdict(entry) for entry in entries] for name, entries in splits.items()},
    }
    manifest["checksum"] = _manifest_checksum(manifest)
    directory.write("manifest.json", [json.dumps(manifest, sort_keys=True, indent=1).encode()])


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Shard:
    """One open shard. Every read is checked: each MiB against its hash the first time it is touched."""

    def __init__(self, path: Path, entry: ShardEntry, *, vocab_size: int, tokenizer_sha256: str) -> None:
        self.path = path
        try:
            plain = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:
            raise self._corrupt("it is missing, and the manifest names it") from None
        if not plain:
            raise self._corrupt("it is not a plain file (links are not followed)")
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        header = np.frombuffer(self._pread(HEADER.itemsize, 0), HEADER)[0]
        self._check_header(header, entry, vocab_size, tokenizer_sha256)
        self.dtype = token_dtype(vocab_size)
        self.n_tokens, self.n_documents = entry.n_tokens, entry.n_documents
        self._index_at = HEADER.itemsize + self.n_tokens * self.dtype.itemsize
        self._spans_at = self._index_at + self.n_documents * DOCUMENT.itemsize
        self._body = self._spans_at + int(header["n_spans"]) * SPAN.itemsize
        n_blocks = -(-self._body // BLOCK)
        expected, size = self._body + 32 * n_blocks, os.fstat(self.fd).st_size
        if size != expected:
            raise self._corrupt(f"it has {size} bytes, expected {expected}")
        self._hashes = self._pread(32 * n_blocks, self._body)
        self.verified = memoryview(bytearray(n_blocks))  # whether each MiB was found to be what was written

    def _check_header(self, header: Any, entry: ShardEntry, vocab_size: int, tokenizer_sha256: str) -> None:
        if header["magic"] != MAGIC:
            raise self._corrupt("it is not a token shard")
        if header["version"] != VERSION:
            raise self._corrupt(f"its format version is {header['version']}, this program reads {VERSION}")
        if header["checksum"] != _header_checksum(header):
            raise self._corrupt("its header is not what was written")
        if header["token_bytes"] != token_dtype(vocab_size).itemsize or header["max_id"] >= vocab_size:
            ids = f"ids up to {header['max_id']} in {header['token_bytes']} bytes each"
            raise self._corrupt(f"it holds {ids}, the manifest's vocabulary {vocab_size} entries")
        if header["tokenizer"] != tokenizer_sha256.encode(errors="surrogatepass"):
            raise self._corrupt("it was written with another tokenizer than the manifest names")
        found, named = (header["n_tokens"], header["n_documents"]), (entry.n_tokens, entry.n_documents)
        if found != named:
            raise self._corrupt("it holds {} tokens in {} documents, the manifest says {} in {}".format(*found, *named))

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self.path}: {what}; {AGAIN}")

    def _pread(self, count: int, offset: int) -> bytes:
        data = os.pread(self.fd, count, offset)
        if len(data) != count:
            raise self._corrupt(f"it is truncated: {len(data)} of {count} bytes at {offset}")
        return data

    def _read(self, offset: int, count: int) -> bytes:
        """Bytes of the body, from verified blocks only."""
        blocks = range(offset // BLOCK, -(-(offset + count) // BLOCK))
        if not all(self.verified[blocks.start : blocks.stop]):
            for block in blocks:
                self._verify(block)
        return self._pread(count, offset)

    def _verify(self, block: int) -> None:
        if not self.verified[block]:
            start = block * BLOCK
            data = self._pread(min(BLOCK, self._body - start), start)
            if hashlib.sha256(data).digest() != self._hashes[32 * block : 32 * block + 32]:
                raise self._corrupt(f"bytes {start} to {start + len(data)} are not what was written")
            self.verified[block] = 1

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of this shard."""
        data = self._read(HEADER.itemsize + start * self.dtype.itemsize, count * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype)

    def documents(self) -> np.ndarray:
        """The document index: (n_documents,) of DOCUMENT, in order and without gaps."""
        index = np.frombuffer(self._read(self._index_at, self._spans_at - self._index_at), DOCUMENT)
        bounds = np.append(index["start"].astype(np.int64), self.n_tokens)
        if bounds[0] != 0 or np.any(np.diff(bounds) <= 0):
            raise self._corrupt("its documents do not follow one another")
        return index

    def spans(self) -> np.ndarray:
        """All spans: (n_spans,) of SPAN, offsets within the shard, by start."""
        spans = np.frombuffer(self._read(self._spans_at, self._body - self._spans_at), SPAN)
        starts, ends = spans["start"].astype(np.int64), spans["end"].astype(np.int64)
        inside = (starts >= 0) & (starts < ends) & (ends <= self.n_tokens) & (spans["kind"] < len(SPAN_KINDS))
        if not inside.all() or np.any(np.diff(starts) < 0):
            raise self._corrupt("its spans are out of order or outside its tokens")
        return spans

    def __del__(self) -> None:
        if hasattr(self, "fd") and os is not None:  # None while the interpreter ends
            os.close(self.fd)


class TokenSet:
    """One split of a prepared data set: its documents' tokens one after another, read as a circle.

    Every text opens with the start token; the target of the last token is token 0, the closing delimiter.
    FileNotFoundError, ValueError or CorruptError in words for what is no data set, has no such split, or is not whole.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        manifest, self.fingerprint = _load_manifest(path)
        self.vocab_size: int = manifest["vocab_size"]
        self.start_id: int = manifest["start_id"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self.sources: list[str] = manifest["sources"]
        self.conversations: bool = manifest.get("conversations", False)  # older manifests are of text
        self.pairs: bool = manifest.get("pairs", False)
        if split not in manifest["splits"]:
            raise ValueError(f"{path}: no split '{split}'; there is {', '.join(manifest['splits'])}")
        self.entries = [_entry(path, values) for values in manifest["splits"][split]]
        _allow_open_files(sum(map(len, manifest["splits"].values())))
        made_with = {"vocab_size": self.vocab_size, "tokenizer_sha256": self.tokenizer_sha256}
        self.shards = [Shard(path / entry.file, entry, **made_with) for entry in self.entries]
        self.dtype = token_dtype(self.vocab_size)
        self.n_documents = sum(entry.n_documents for entry in self.entries)
        self.n_bytes = sum(entry.n_bytes for entry in self.entries)
        self._firsts = [0, *accumulate(entry.n_tokens for entry in self.entries)]  # where shards begin, and the end
        self._bounds = np.array(self._firsts)
        self._fds = np.array([shard.fd for shard in self.shards], dtype=np.int64)
        # One table of verified blocks for all shards, so that many rows are looked up at once.
        self._first_block = np.array([0, *accumulate(len(shard.verified) for shard in self.shards)])
        verified = bytearray(int(self._first_block[-1]))
        for shard, (a, b) in zip(self.shards, pairwise(self._first_block.tolist()), strict=True):
            shard.verified = memoryview(verified)[a:b]
        self._verified = np.frombuffer(verified, np.uint8)

    @property
    def n_tokens(self) -> int:
        return self._firsts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, in the data set's dtype; they must lie inside the split."""
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise IndexError(f"{self.path}: tokens {start} to {start + count} of {self.n_tokens}")
        parts = []
        shard = bisect_right(self._firsts, start) - 1
        while count:
            taken = min(count, self._firsts[shard + 1] - start)
            parts.append(self.shards[shard].read(start - self._firsts[shard], taken))
            start, count, shard = start + taken, count - taken, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill out (n, width), of any integer dtype, with tokens starts[i] .. starts[i] + width - 1 of the split.

        Where every block was verified before, the costs are a system call a row and one conversion.
        """
        n, width = out.shape
        if not n or not width:
            return
        if starts.min() < 0 or starts.max() + width > self.n_tokens:
            raise IndexError(f"{self.path}: rows of {width} from {starts.min()} to {starts.max()} of {self.n_tokens}")
        n_bytes = width * self.dtype.itemsize
        shard = self._bounds.searchsorted(starts, side="right") - 1
        offsets = HEADER.itemsize + (starts - self._bounds[shard]) * self.dtype.itemsize
        first, last = (self._first_block[shard] + at // BLOCK for at in (offsets, offsets + n_bytes - 1))
        known = n_bytes <= BLOCK and bool((self._verified[first] & self._verified[last]).all())
        if known and (starts + width <= self._bounds[shard + 1]).all():
            parts = map(os.pread, self._fds[shard].tolist(), repeat(n_bytes), offsets.tolist())
            data = b"".join(parts)
            if len(data) == n * n_bytes:  # else one is truncated, and `read` says which
                out[...] = np.frombuffer(data, self.dtype).reshape(n, width)
                return
        for row, start in zip(out, starts.tolist(), strict=True):
            row[...] = self.read(start, width)

    @cached_property
    def _documents(self) -> np.ndarray:
        parts = [np.empty(0, DOCUMENT)]
        for shard, entry, first in zip(self.shards, self.entries, self._firsts, strict=False):
            part = shard.documents().copy()
            if part["n_bytes"].sum() != entry.n_bytes or np.any(part["source"] >= len(self.sources)):
                raise CorruptError(f"{shard.path}: its document index and the manifest disagree; {AGAIN}")
            part["start"] += np.uint64(first)
            parts.append(part)
        return np.concatenate(parts)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """(n_documents,) int64: where each document's start token stands."""
        return self._documents["start"].astype(np.int64)

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """(n_documents,) int64: raw UTF-8 bytes, before any normalization."""
        return self._documents["n_bytes"].astype(np.int64)

    @cached_property
    def document_sources(self) -> np.ndarray:
        """(n_documents,) int64: indices into `sources`."""
        return self._documents["source"].astype(np.int64)

    @cached_property
    def _spans(self) -> np.ndarray:
        parts = [np.empty(0, SPAN)]
        for shard, first in zip(self.shards, self._firsts, strict=False):
            part = shard.spans().copy()
            part["start"] += np.uint64(first)
            part["end"] += np.uint64(first)
            parts.append(part)
        return np.concatenate(parts)

    @cached_property
    def _furthest(self) -> np.ndarray:
        """For each span, the furthest end of it and those before it: ascending, as spans may nest."""
        return np.maximum.accumulate(self._spans["end"])

    def spans(self, start: int, count: int) -> list[Span]:
        """The spans that touch tokens start .. start + count - 1, in offsets of the split."""
        low = np.searchsorted(self._furthest, np.uint64(start), side="right")
        high = np.searchsorted(self._spans["start"], np.uint64(start + count), side="left")
        near = (Span(int(s["start"]), int(s["end"]), SPAN_KINDS[s["kind"]]) for s in self._spans[low:high])
        return [span for span in near if span.end > start]

    @property
    def has_spans(self) -> bool:
        """Whether only marked tokens are trained on; of text without marks all are."""
        return self.conversations or len(self._spans) > 0

    def verify(self) -> None:
        """Hash every shard whole against the manifest; CorruptError names the first that differs."""
        for entry in self.entries:
            if sha256_file(self.path / entry.file) != entry.sha256:
                raise CorruptError(f"{self.path / entry.file}: it is not what was written; {AGAIN}")


def _allow_open_files(n_shards: int) -> None:
    """Each shard of a split stays open; a common limit, 1024 files, is what a set of ten billion tokens has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + 2 * n_shards
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def _load_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """(manifest, its sha256); errors in words for what is no data set, or not whole."""
    file = path / "manifest.json"
    if not file.is_file():
        recipe = Path(f"{path}.yaml")
        command = f"python data/prepare.py {recipe if recipe.exists() else f'FILES --out {path}'}"
        raise FileNotFoundError(f"{path} is not a prepared data set (no manifest.json); make it: {command}")
    if file.is_symlink():
        raise CorruptError(f"{file}: it is a symbolic link, which is not followed; {AGAIN}")
    data = file.read_bytes()
    types = {"vocab_size": int, "start_id": int, "tokenizer_sha256": str, "sources": list, "splits": dict}
    try:
        manifest = json.loads(data)
        version, whole = manifest["format"], manifest["checksum"] == _manifest_checksum(manifest)
        typed = all(type(manifest[key]) is kind for key, kind in types.items())
        typed = typed and all(type(entries) is list for entries in manifest["splits"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptError(f"{file}: it is not a data set's manifest, or is damaged; {AGAIN}") from None
    if version != VERSION:
        raise CorruptError(f"{file}: its format version is {version!r}, this program reads {VERSION}; {AGAIN}")
    if not whole or not typed:
        raise CorruptError(f"{file}: it is not what was written; {AGAIN}")
    return manifest, hashlib.sha256(data).hexdigest()


def _entry(path: Path, values: Any) -> ShardEntry:
    try:
        entry = ShardEntry(**values)
    except TypeError:
        raise CorruptError(f"{path / 'manifest.json'}: the entry of a shard is incomplete; {AGAIN}") from None
    counts = (entry.n_tokens, entry.n_documents, entry.n_bytes)
    if not all(type(n) is int and n >= 0 for n in counts) or {type(entry.file), type(entry.sha256)} != {str}:
        raise CorruptError(f"{path / 'manifest.json'}: the entry of shard {entry.file!r} is damaged; {AGAIN}")
    if not is_plain(entry.file):
        raise CorruptError(f"{path / 'manifest.json'}: it names a file outside its directory: {entry.file!r}; {AGAIN}")
    return entry
