"""Files of any kind as a split in memory: read once, encoded for each tokenizer, and scored like prepared data."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import numpy as np

from gpt import corpus, signals
from gpt.formats import BadRecord
from gpt.shards import Span, token_dtype
from gpt.tokenizer import Tokenizer

PORTION = 1 << 20


@dataclass(frozen=True)
class Text:
    """The documents of a file or directory, as `data/prepare.py` would read them, and the UTF-8 bytes of each."""

    name: str
    documents: list[str]
    n_bytes: list[int]

    @property
    def n_words(self) -> int:
        """Runs of characters without white space."""
        return sum(len(document.split()) for document in self.documents)


def read(place: str, max_documents: int | None, say: Callable[[str], None]) -> Text:
    """Read a file, a directory, a glob or '-'; of many documents only the first `max_documents`.

    FileNotFoundError or ValueError in words: a record that cannot be read is named with its line.
    """
    with TemporaryDirectory() as spool:
        files = corpus.files(corpus.Source(path=place), Path(spool), Path(spool), say)
        every = chain.from_iterable(corpus.documents(file, skip=_refuse) for file in files)
        found = list(islice(every, max_documents))
    if not found:
        raise ValueError(f"{place}: no document with text in it; expected something to score")
    return Text(place, [document.text for document in found], [document.n_bytes for document in found])


def _refuse(error: BadRecord) -> NoReturn:
    raise error


def _portions(documents: Sequence[str]) -> Iterator[list[str]]:
    """Documents of about PORTION characters at a time: while it is encoded, text takes many times its room."""
    portion, size = list[str](), 0
    for document in documents:
        portion.append(document)
        size += len(document)
        if size >= PORTION:
            signals.check()
            yield portion
            portion, size = [], 0
    yield portion


class TextSet:
    """A text as a tokenizer cuts it, each document behind a start token: shards.Tokens."""

    has_spans = conversations = pairs = False

    def __init__(self, text: Text, tokenizer: Tokenizer) -> None:
        self.path, self.sources = Path(text.name), [text.name]
        self.vocab_size, self.start_id = tokenizer.size, tokenizer.start_id
        self.tokenizer_sha256, self.dtype = tokenizer.sha256, token_dtype(tokenizer.size)
        encoded = (ids for documents in _portions(text.documents) for ids in tokenizer.encode_batch(documents))
        rows = [np.array([self.start_id, *ids], self.dtype) for ids in encoded]
        self._ids = np.concatenate(rows)
        self.document_starts = np.cumsum([0, *map(len, rows[:-1])])
        self.document_bytes = np.array(text.n_bytes)
        self.document_sources = np.zeros(len(rows), dtype=np.int64)
        self.n_documents, self.n_bytes, self.n_tokens = len(rows), sum(text.n_bytes), len(self._ids)
        self.fingerprint = hashlib.sha256(self._ids.tobytes()).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, which must lie inside the text."""
        return self._ids[start : start + count]

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill out (n, width) with tokens starts[i] .. starts[i] + width - 1."""
        out[...] = self._ids[starts[:, None] + np.arange(out.shape[1])]

    def spans(self, start: int, count: int) -> list[Span]:
        return []

    def verify(self) -> None:
        """Nothing but this process can change it."""
