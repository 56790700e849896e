"""Packing: whole documents to rows of a fixed length, best fit first, so that little is padding and no token is dropped.

A plan works on the histogram of lengths: one row pattern ("900 + 100 + 24") stands for as many rows as there are documents
for it, so that planning ten million documents costs what their different lengths cost. Which document of a length stands in
which row is drawn anew each epoch by a permutation that is computed, not stored.
"""

from bisect import bisect_right, insort
from collections import Counter
from dataclasses import dataclass

import numpy as np

from gpt.runtime import key

GAP = 128  # a gap of up to seq_len / GAP tokens stays: 0.8 % at most, for which no document is cut


def permute(index: np.ndarray, n: int | np.ndarray, seed: int, twist: int | np.ndarray = 0) -> np.ndarray:
    """Where each index in [0, n) goes under a seeded permutation of [0, n): constant memory, any index alone.

    A four-round Feistel network over the next even power of two; what falls outside walks on until it is inside
    (Black and Rogaway 2002, cycle walking). With n and `twist` of index's shape, each index has its own permutation.
    """
    sizes = np.asarray(n, dtype=np.uint64)
    bits = np.frexp(np.maximum(sizes, 2).astype(np.float64) - 1)[1]  # of n - 1, which is exact below 2 ** 53
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    low = (np.uint64(1) << half) - np.uint64(1)
    turn = np.asarray(twist, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    keys = [np.uint64(key(seed, i, "permute")) + turn for i in range(4)]

    def once(x: np.ndarray, at: np.ndarray | slice | None = None) -> np.ndarray:
        half_, low_, *keys_ = (v if at is None or not v.ndim else v[at] for v in (half, low, *keys))
        left, right = x >> half_, x & low_
        for k in keys_:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & low_)
        return (left << half_) | right

    out = once(np.asarray(index, dtype=np.uint64))
    while len(outside := np.flatnonzero(out >= sizes)):
        out[outside] = once(out[outside], outside)
    return out.astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """Rows of up to `seq_len` tokens made of pieces of documents. Row r of an epoch is asked for by `pieces`."""

    seq_len: int
    n_tokens: int
    n_cut: int  # cuts made only to fill a gap
    row_bounds: np.ndarray  # (P + 1,) where the rows of each pattern begin
    slot_bounds: np.ndarray  # (P + 1,) where the slots of each pattern begin
    slot_length: np.ndarray  # (S,) tokens of the piece in this slot
    slot_first: np.ndarray  # (S,) which piece of its length the pattern's first row has here
    slot_stride: np.ndarray  # (S,) how many the next row is further
    piece_bounds: np.ndarray  # (seq_len + 1,) where the pieces of each length below seq_len begin, and the end
    piece_starts: np.ndarray  # (n_pieces,) their first tokens, by length
    full_bounds: np.ndarray  # (n_long + 1,) how many full rows those before have, of the documents that fill one
    full_starts: np.ndarray  # (n_long,) where such documents begin

    @property
    def n_rows(self) -> int:
        return int(self.row_bounds[-1])

    @property
    def waste(self) -> float:
        """The share of positions that are padding."""
        return 1 - self.n_tokens / (self.n_rows * self.seq_len)

    def pieces(self, rows: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, start, length) of each piece of the given rows in order: which of `rows`, first token, tokens."""
        order = permute(rows, self.n_rows, key(seed, epoch, "order"))
        pattern = self.row_bounds.searchsorted(order, side="right") - 1
        counts = self.slot_bounds[pattern + 1] - self.slot_bounds[pattern]
        row = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        slot = self.slot_bounds[pattern][row] + within
        length = self.slot_length[slot]
        number = self.slot_first[slot] + self.slot_stride[slot] * (order - self.row_bounds[pattern])[row]
        full = length == self.seq_len
        first = self.piece_bounds[np.where(full, 0, length)]
        n = np.where(full, self.full_bounds[-1], self.piece_bounds[np.where(full, 0, length + 1)] - first)
        number = permute(number, n, key(seed, epoch, "pieces"), length)
        start = np.empty_like(length)
        start[~full] = self.piece_starts[(first + number)[~full]]
        document = self.full_bounds.searchsorted(number[full], side="right") - 1
        start[full] = self.full_starts[document] + (number[full] - self.full_bounds[document]) * self.seq_len
        return row, start, length


def plan(starts: np.ndarray, lengths: np.ndarray, seq_len: int, *, cut: bool = True) -> Plan:
    """Pack documents of `lengths` tokens that begin at `starts` into rows of `seq_len`: best fit, longest first.

    A gap that no remaining piece fits is filled by cutting the longest one, unless it is negligible; so all rows but
    the last are full. Without `cut` it stays, and only what is longer than a row is cut. Depends on nothing but its
    arguments.
    """
    full, rest = np.divmod(lengths, seq_len)
    n_full = int(full.sum())
    short = np.flatnonzero(rest)
    narrow = rest[short].astype(np.uint16 if seq_len <= 1 << 16 else np.int64)
    by_length = np.argsort(narrow, kind="stable")
    ends = starts + lengths
    sorted_starts = (ends - rest)[short][by_length]
    counts = np.bincount(narrow, minlength=seq_len + 1)
    patterns, cuts = _patterns(counts, seq_len, seq_len // GAP if cut else seq_len)
    if n_full:
        patterns.insert(0, (Counter({seq_len: 1}), n_full))
    pools = _cut(sorted_starts, counts, cuts)
    sizes = np.zeros(seq_len, dtype=np.int64)
    for length, parts in pools.items():
        sizes[length] = sum(map(len, parts))
    pieces = [part for length in sorted(pools) for part in pools[length]]
    long = np.flatnonzero(full)
    slots, row_bounds, slot_bounds = _slots(patterns)
    return Plan(
        seq_len=seq_len,
        n_tokens=int(lengths.sum()),
        n_cut=sum(n for _, _, n in cuts),
        row_bounds=row_bounds,
        slot_bounds=slot_bounds,
        slot_length=slots[:, 0],
        slot_first=slots[:, 1],
        slot_stride=slots[:, 2],
        piece_bounds=np.concatenate([[0], np.cumsum(sizes)]),
        piece_starts=np.concatenate([np.empty(0, dtype=np.int64), *pieces]),
        full_bounds=np.concatenate([[0], np.cumsum(full[long])]),
        full_starts=starts[long],
    )


Patterns = list[tuple[Counter[int], int]]  # (how many pieces of each length, how many rows)
Cuts = list[tuple[int, int, int]]  # (length, tokens cut off its front, how many pieces)


def _patterns(counts: np.ndarray, seq_len: int, tolerance: int) -> tuple[Patterns, Cuts]:
    """Rows for `counts[n]` pieces of n tokens, and the cuts that fill gaps above `tolerance` tokens, in order."""
    left = {int(n): int(counts[n]) for n in np.flatnonzero(counts)}
    lengths = sorted(left)  # those with pieces left
    patterns: Patterns = []
    cuts: Cuts = []

    def change(length: int, by: int) -> None:
        if not left.get(length):
            insort(lengths, length)
        left[length] = left.get(length, 0) + by
        if not left[length]:
            del lengths[bisect_right(lengths, length) - 1]

    while lengths:
        row: Counter[int] = Counter()  # pieces of the row
        gap, at = seq_len, len(lengths)
        while gap and (at := bisect_right(lengths, gap, hi=at)):
            length = lengths[at - 1]
            if taken := min(gap // length, left[length]):
                row[length] = taken
                gap -= taken * length
            at -= 1
        cut = next((n for n in reversed(lengths) if left[n] > row[n]), 0) if gap > tolerance else 0
        used = row + Counter([cut] if cut else [])
        n_rows = min(left[length] // n for length, n in used.items())
        for length, n in used.items():
            change(length, -n * n_rows)
        if cut:
            cuts.append((cut, gap, n_rows))
            change(cut - gap, n_rows)
            row[gap] += 1
        patterns.append((row, n_rows))
    return patterns, cuts


def _cut(starts: np.ndarray, counts: np.ndarray, cuts: Cuts) -> dict[int, list[np.ndarray]]:
    """The first tokens of the pieces of each length, after `cuts`; `starts` are those before, by length."""
    bounds = np.concatenate([[0], np.cumsum(counts)])
    pools = {int(n): [starts[bounds[n] : bounds[n + 1]]] for n in np.flatnonzero(counts)}
    for length, front, n in cuts:
        parts, taken = pools[length], []
        while n:
            part = parts.pop()
            if len(part) > n:
                parts.append(part[:-n])
                part = part[-n:]
            taken.append(part)
            n -= len(part)
        pools.setdefault(front, []).extend(taken)
        pools.setdefault(length - front, []).extend(part + front for part in taken)
    return pools


def _slots(patterns: Patterns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((S, 3) length, first piece, stride; row bounds; slot bounds) of patterns, each one's longest pieces first."""
    lengths, firsts, strides, n_slots, n_rows = [], [], [], [0], [0]
    given: Counter[int] = Counter()  # pieces of each length that earlier patterns have
    for row, rows in patterns:
        for length in sorted(row, reverse=True):
            n = row[length]
            lengths.append(np.full(n, length))
            firsts.append(given[length] + np.arange(n))
            strides.append(np.full(n, n))
            given[length] += n * rows
        n_slots.append(row.total())
        n_rows.append(rows)
    columns = [np.concatenate([np.empty(0, np.int64), *parts]) for parts in (lengths, firsts, strides)]
    return np.stack(columns, axis=1), np.cumsum(n_rows), np.cumsum(n_slots)
