"""Views: the documents of chosen sources of a split, read as if they were all there is."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gpt.shards import Span, Tokens


class View:
    """The documents of the sources with these numbers, in order, as a `shards.Tokens` of its own.

    Documents of a source mostly stand in long runs, which are read as they lie. As every document opens with the start
    token, what follows the last token of a run is the same here as there.
    """

    def __init__(self, base: Tokens, numbers: Sequence[int]) -> None:
        self.base, self.path, self.fingerprint = base, base.path, base.fingerprint
        self.vocab_size, self.start_id, self.dtype = base.vocab_size, base.start_id, base.dtype
        self.tokenizer_sha256, self.sources = base.tokenizer_sha256, base.sources
        self.conversations, self.pairs = base.conversations, base.pairs
        chosen = np.isin(base.document_sources, numbers)
        self._documents = np.flatnonzero(chosen)
        self.n_documents = len(self._documents)
        self.n_bytes = int(base.document_bytes[self._documents].sum())
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)  # runs of documents
        bounds = np.append(base.document_starts, base.n_tokens)
        self._there = bounds[edges[:, 0]]  # where each run begins in the split
        self._here = np.concatenate([[0], np.cumsum(bounds[edges[:, 1]] - self._there)])  # in the view, and the end
        self._starts = self._here.tolist()

    @property
    def n_tokens(self) -> int:
        return self._starts[-1]

    @cached_property
    def document_starts(self) -> np.ndarray:
        there = self.base.document_starts[self._documents]
        run = self._there.searchsorted(there, side="right") - 1
        return there - self._there[run] + self._here[run]

    @cached_property
    def document_bytes(self) -> np.ndarray:
        return self.base.document_bytes[self._documents]

    @cached_property
    def document_sources(self) -> np.ndarray:
        return self.base.document_sources[self._documents]

    def _runs(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """(token of the view, token of the split, how many) of the parts of runs that make this stretch."""
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise IndexError(f"{self.path}: tokens {start} to {start + count} of {self.n_tokens} of chosen sources")
        parts = []
        run = bisect_right(self._starts, start) - 1
        while count:
            taken = min(count, self._starts[run + 1] - start)
            parts.append((start, int(self._there[run]) + start - self._starts[run], taken))
            start, count, run = start + taken, count - taken, run + 1
        return parts

    def read(self, start: int, count: int) -> np.ndarray:
        parts = [self.base.read(there, n) for _, there, n in self._runs(start, count)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        n, width = out.shape
        if not n or not width:
            return
        if starts.min() < 0 or starts.max() + width > self.n_tokens:
            raise IndexError(f"{self.path}: rows of {width} from {starts.min()} to {starts.max()} of {self.n_tokens}")
        run = self._here.searchsorted(starts, side="right") - 1
        there = self._there[run] + starts - self._here[run]
        inside = starts + width <= self._here[run + 1]
        if inside.all():
            self.base.read_rows(there, out)
            return
        rows = np.empty((int(inside.sum()), width), out.dtype)
        self.base.read_rows(there[inside], rows)
        out[inside] = rows
        for i in np.flatnonzero(~inside).tolist():
            out[i] = self.read(int(starts[i]), width)

    @property
    def has_spans(self) -> bool:
        return self.base.has_spans

    def spans(self, start: int, count: int) -> list[Span]:
        found = []
        for here, there, n in self._runs(start, count):
            by = here - there
            found += [Span(s.start + by, s.end + by, s.kind) for s in self.base.spans(there, n)]
        return found

    def verify(self) -> None:
        self.base.verify()


def by_source(tokens: Tokens) -> dict[str, Tokens]:
    """The documents of each source that has any in this split, by its name; sources of one name are one."""
    present = np.bincount(tokens.document_sources, minlength=len(tokens.sources))
    named: dict[str, list[int]] = {}
    for number in np.flatnonzero(present).tolist():
        named.setdefault(tokens.sources[number], []).append(number)
    if len(named) == 1:
        return dict.fromkeys(named, tokens)
    return {name: View(tokens, numbers) for name, numbers in named.items()}
