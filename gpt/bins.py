"""Token files of nanoGPT and llm.c, read where they are: a split behind the same face as one of a prepared data set.

nanoGPT's `train.bin` and `val.bin` are bare uint16 ids (Karpathy 2022); llm.c's and modded-nanogpt's `*_train_*.bin` and
`*_val_*.bin` open with a header of 256 int32: magic, version, number of tokens. Neither says where a document begins or
how many bytes it had: documents are found by the start token, and bytes counted by the vocabulary.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt import durable, run, signals, tokenizer
from gpt.durable import CorruptError
from gpt.shards import Span
from gpt.tokenizer import UNKNOWN, Tokenizer
from gpt.vocabularies import END

HEADER_BYTES = 256 * 4
KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic -> version and dtype: llm.c for GPT-2, for Llama 3
FOREIGN = {
    b"\x93NUMPY": "a numpy array (.npy)",
    b"PK\x03\x04": "a zip archive, as torch.save writes them",
    b"\x1f\x8b": "gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstandard: unpack it first",
    b"GPTSHARD": "a shard of a prepared data set: name the directory with its manifest.json",
    b"PAR1": "parquet",
}
CHUNK = 1 << 22  # tokens read at once
EXPECTED = "expected uint16 ids (nanoGPT), or llm.c's header and ids"
UNPICKLE = (
    "python -c \"import json, pickle; m = pickle.load(open('{0}/meta.pkl', 'rb')); "
    "json.dump({{'vocab_size': m['vocab_size'], 'stoi': m['stoi']}}, open('{0}/meta.json', 'w'))\""
)


@dataclass(frozen=True)
class _File:
    """One token file, open: ids of `dtype` from byte `offset` on."""

    path: Path
    fd: int
    offset: int
    dtype: np.dtype
    count: int
    size: int

    def read(self, start: int, count: int) -> np.ndarray:
        wanted = count * self.dtype.itemsize
        data = os.pread(self.fd, wanted, self.offset + start * self.dtype.itemsize)
        if len(data) != wanted:
            raise CorruptError(f"{self.path}: it became shorter while it was read; write it again and start anew")
        return np.frombuffer(data, self.dtype)

    def __del__(self) -> None:
        os.close(self.fd)


def found(path: Path) -> bool:
    """Whether `path` is a token file or a directory of them, and no prepared data set."""
    if path.suffix == ".bin":
        return True
    return path.is_dir() and not (path / "manifest.json").exists() and bool(_by_split(path, "train"))


def load_tokenizer(path: Path, named: str | None) -> Tokenizer:
    """The vocabulary of the files in `path`: the one `named`, or the characters of the meta.json beside them.

    nanoGPT keeps the latter in meta.pkl, which is not read: a pickle can run code. ValueError in words.
    """
    if named is not None:
        return Tokenizer.load(run.vocabulary(named))
    directory = path if path.is_dir() else path.parent
    if (directory / "meta.json").is_file():
        return _characters(directory / "meta.json")
    if (directory / "meta.pkl").exists():
        raise ValueError(
            f"{directory / 'meta.pkl'} is a pickle, which can run code when it is read, so it is not read; "
            f"if you trust it, turn it into a meta.json: {UNPICKLE.format(directory)}"
        )
    raise ValueError(
        f"{path}: token files do not say which vocabulary they were made with; name it: data.tokenizer=PATH "
        f"(for nanoGPT's and llm.c's GPT-2 files a directory with GPT-2's vocab.json and merges.txt)"
    )


def _characters(file: Path) -> Tokenizer:
    """A vocabulary of characters as {"stoi": {character: id}} or {"itos": [character, ...]} gives it.

    The start token and one for unknown characters come after them: such files have none.
    """
    wrong = f'{file}: expected {{"vocab_size": N, "stoi": {{character: id, ...}}}} or "itos": [character, ...]'
    data = durable.plain(file).read_bytes()
    try:
        meta = json.loads(data)
        itos = meta.get("itos")
        itos = {str(i): c for i, c in enumerate(itos)} if isinstance(itos, list) else itos
        stoi = {c: int(i) for i, c in itos.items()} if isinstance(itos, dict) else dict(meta["stoi"])
        size = meta.get("vocab_size", len(stoi))
        whole = sorted(stoi.values()) == list(range(len(stoi))) and size == len(stoi) > 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(wrong) from None
    if not whole:
        raise ValueError(f"{wrong}, with every id from 0 to vocab_size - 1 once; it has {len(stoi)} characters")
    if long := [c for c in stoi if type(c) is not str or len(c) != 1]:
        raise ValueError(f"{wrong}; {long[0]!r} is no single character: name its tokenizer with data.tokenizer=PATH")
    raw = json.loads(tokenizer.train([], "char", None).files()["tokenizer.json"])
    control = {END: size, UNKNOWN: size + 1}
    raw["model"]["vocab"] = stoi | control
    added = {token["content"]: token for token in raw["added_tokens"]}
    raw["added_tokens"] = [added[name] | {"id": token} for name, token in control.items()]
    return Tokenizer(raw, {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN}, str(file))


def open_bins(path: Path, split: str, vocabulary: Tokenizer) -> "BinSet":
    """The files of a split ("train" or "val"), each read once whole: hashed, and every id checked.

    FileNotFoundError, ValueError or CorruptError names the file and what is wrong with it.
    """
    return BinSet(path, split, vocabulary)


def _by_split(path: Path, split: str) -> dict[str, list[Path]]:
    """Data set name -> its files of the split, in order; a nanoGPT set has the name ""."""
    directory, name = (path, None) if path.is_dir() else (path.parent, _name(path, "train") or "")
    groups: dict[str, list[Path]] = {}
    for file in sorted(directory.glob("*.bin")):
        if (prefix := _name(file, split)) is not None and name in (None, prefix):
            groups.setdefault(prefix, []).append(durable.plain(file))
    return groups


def _name(file: Path, split: str) -> str | None:
    """What stands before the split in a file's name; None if it is of no such split."""
    match = re.fullmatch(rf"(?:(.*)_)?{split}(?:_\d+)?", file.stem)
    return None if match is None else match[1] or ""


def _files(path: Path, split: str) -> list[_File]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a directory with train.bin and val.bin")
    if path.is_file() and _name(path, "train") is None:
        raise ValueError(
            f"{path} is not called train.bin or NAME_train_N.bin; name the directory that holds both splits"
        )
    groups = _by_split(path, split)
    if not groups:
        wanted = f"{split}.bin (nanoGPT) or NAME_{split}_N.bin (llm.c)"
        raise FileNotFoundError(f"{path}: no {split} split; expected {wanted} beside the files that are there")
    if len(groups) > 1:
        names = ", ".join(str(files[0].name) for files in groups.values())
        raise ValueError(f"{path} holds several data sets ({names}); name one by its file of the train split")
    return [_open(file) for file in next(iter(groups.values()))]


def _open(path: Path) -> _File:
    """Open a token file and find out its kind; ValueError if it is none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        head = os.pread(fd, 1 << 20, 0)
        magic = int.from_bytes(head[:4], "little")
        if magic in KINDS:
            offset, dtype, count = HEADER_BYTES, *_header(path, head, magic, size)
        else:
            _check_bare(path, head, size)
            offset, dtype, count = 0, np.dtype("<u2"), size // 2
    except BaseException:
        os.close(fd)
        raise
    return _File(path, fd, offset, dtype, count, size)


def _header(path: Path, head: bytes, magic: int, size: int) -> tuple[np.dtype, int]:
    """(dtype, tokens) of a file with llm.c's header, checked against its size."""
    version, kind = KINDS[magic]
    if len(head) < HEADER_BYTES:
        raise ValueError(f"{path}: it ends inside its header, after {size} of {HEADER_BYTES} bytes; copy it again")
    _, found_version, count = np.frombuffer(head, "<i4", 3).tolist()
    dtype = np.dtype(kind)
    if found_version != version:
        raise ValueError(f"{path}: version {found_version} of llm.c's token files; version {version} is read here")
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        raise ValueError(
            f"{path}: its header promises {count:,} tokens, which are {expected:,} bytes with it, and it has {size:,}: "
            f"cut short, or of another type than {dtype.name}; copy it again"
        )
    return dtype, count


def _check_bare(path: Path, head: bytes, size: int) -> None:
    """ValueError for what can be seen not to be uint16 ids: text, other types and formats."""
    what = next((name for start, name in FOREIGN.items() if head.startswith(start)), None)
    if what is None and _is_text(head):
        what = "text: prepare it with data/prepare.py"
    if what is None and len(head) >= 64:
        columns = np.frombuffer(head[: len(head) // 8 * 8], "<u2").reshape(-1, 4).any(axis=0).tolist()
        if columns in ([True, False, False, False], [True, False, True, False]):
            what = f"{32 if columns[2] else 64}-bit integers: write them as uint16 (numpy.uint16)"
    if what is not None:
        raise ValueError(f"{path} is {what}; {EXPECTED}")
    if size % 2:
        raise ValueError(f"{path} has {size:,} bytes, an odd number: cut short, or not uint16; {EXPECTED}")


def _is_text(head: bytes) -> bool:
    """Whether `head` reads as UTF-8 without control characters; what it ends in may be half a character."""
    try:
        text = head[:65536].decode("utf-8", "strict" if len(head) <= 65536 else "ignore")
    except UnicodeDecodeError as error:
        if error.end < len(head) - 3:
            return False
        text = head[: error.start].decode()
    if len(head) > 65536 and len(text.encode()) < 65536 - 3:
        return False  # something was left out
    return len(text) >= 8 and all(c >= " " or c in "\t\n\r\f" for c in text)


class BinSet:
    """One split of token files: shards.Tokens.

    The ids are a circle that opens with a start token. nanoGPT writes it behind each document, so the last one of the
    file is read as the first; where a file has none at either end, one is put before it.
    """

    has_spans = conversations = pairs = False

    def __init__(self, path: Path, split: str, vocabulary: Tokenizer) -> None:
        self.path, self._files = path, _files(path, split)
        self.vocab_size, self.start_id = vocabulary.size, vocabulary.start_id
        self.tokenizer_sha256 = vocabulary.sha256
        self.sources = [path.name if path.is_dir() else path.stem]
        self.dtype = max((file.dtype for file in self._files), key=lambda dtype: dtype.itemsize)
        self._ends = np.cumsum([file.count for file in self._files])
        n_ids = int(self._ends[-1])
        if n_ids < 2:
            raise ValueError(f"{self._files[0].path}: {n_ids} tokens in the {split} split; expected text to learn from")
        # Tokens put before the ids of the files, and ids at their end that these stand for.
        self._put = int(self._ids(0, 1)[0] != self.start_id)
        self._moved = self._put and int(self._ids(n_ids - 1, 1)[0] == self.start_id)
        self._n_tokens = n_ids + self._put - self._moved
        self.fingerprint, self.document_starts, self.document_bytes = self._scan(vocabulary.byte_lengths)
        self.n_documents, self.n_bytes = len(self.document_starts), int(self.document_bytes.sum())

    @property
    def n_tokens(self) -> int:
        return self._n_tokens

    @cached_property
    def document_sources(self) -> np.ndarray:
        return np.zeros(self.n_documents, dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, which must lie inside the split."""
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise IndexError(f"{self.path}: tokens {start} to {start + count} of {self.n_tokens}")
        if start >= self._put:
            return self._ids(start - self._put, count)
        before = np.full(min(count, self._put), self.start_id, self.dtype)
        return np.concatenate([before, self._ids(0, count - len(before))])

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill out (n, width), of any integer dtype, with tokens starts[i] .. starts[i] + width - 1 of the split."""
        for i, start in enumerate(starts.tolist()):
            out[i] = self.read(start, out.shape[1])

    def spans(self, start: int, count: int) -> list[Span]:
        return []

    def verify(self) -> None:
        """Hash every file again; CorruptError if one is not what it was when it was opened."""
        digest = hashlib.sha256()
        for _, _, ids in self._chunks():
            digest.update(ids.data)
        if digest.hexdigest() != self.fingerprint:
            raise CorruptError(
                f"{self.path}: its files changed since they were opened; restore them or start a new run"
            )

    def _ids(self, start: int, count: int) -> np.ndarray:
        """Ids of the files joined."""
        parts = []
        at = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            file, first = self._files[at], int(self._ends[at]) - self._files[at].count
            taken = min(count, first + file.count - start)
            parts.append(file.read(start - first, taken))
            start, count, at = start + taken, count - taken, at + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def _chunks(self) -> Iterator[tuple[_File, int, np.ndarray]]:
        """(file, position in it, ids) of everything, in bounded portions."""
        for file in self._files:
            for start in range(0, file.count, CHUNK):
                signals.check()
                yield file, start, file.read(start, min(CHUNK, file.count - start))

    def _scan(self, byte_lengths: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
        """(sha256 of the ids, where documents start, the bytes of each), from one pass that checks every id."""
        digest = hashlib.sha256()
        starts: list[Any] = [np.zeros(self._put, np.int64)]
        before: list[Any] = [np.zeros(self._put, np.int64)]  # bytes of the text before each start
        n_ids, n_bytes = 0, 0
        for file, position, ids in self._chunks():
            digest.update(ids.data)
            if int(ids.max()) >= self.vocab_size:
                at = int(np.argmax(ids >= self.vocab_size))
                raise ValueError(
                    f"{file.path}: id {int(ids[at])} at position {position + at:,}, and the vocabulary ends at "
                    f"{self.vocab_size - 1}: made with another tokenizer, or not {file.dtype.name}; name the right one "
                    "with data.tokenizer"
                )
            here = np.flatnonzero(ids == self.start_id)
            total = np.cumsum(byte_lengths[ids])
            starts.append(here + n_ids + self._put)
            before.append(total[here] + n_bytes)  # a start token has no bytes of its own
            n_ids, n_bytes = n_ids + len(ids), n_bytes + int(total[-1])
        all_starts, all_before = np.concatenate(starts), np.concatenate(before)
        if self._moved:
            all_starts, all_before = all_starts[:-1], all_before[:-1]
        return digest.hexdigest(), all_starts, np.diff(np.append(all_before, n_bytes))
