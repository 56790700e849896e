"""KVCache: keys and values of the positions already decoded, preallocated; it knows nothing of sampling or of layers.

Layout letters (see gpt/model.py): B batch rows, G key/value heads, S cache positions, D head size.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

NEAR = 64  # positions by which rows of one span may always differ; longer ones by a quarter


class Lengths:
    """How long the rows are, as the host knows it: decoding never waits for the device.

    Neighbours of like lengths are a span: one new token of each row attends span by span, and reads of none more than
    its longest row has in use. Rows that stand in the order of their lengths make few spans.
    """

    def __init__(self, known: Sequence[int], stops: Sequence[int] | None = None) -> None:
        self.known = list(known)
        self.longest = max(self.known, default=0)
        self.even = min(self.known, default=0) == self.longest  # then all rows share their positions
        self._stops = self._divided() if stops is None else list(stops)  # where spans end

    def _divided(self) -> list[int]:
        stops: list[int] = []
        for row, length in enumerate(self.known):
            first = stops[-2] if len(stops) > 1 else 0
            if stops and abs(self.known[first] - length) <= max(NEAR, self.known[first] // 4):
                stops[-1] = row + 1
            else:
                stops.append(row + 1)
        return stops

    def spans(self) -> list[tuple[slice, int]]:
        """(rows, the keys that they read for one more token each)."""
        edges = zip([0, *self._stops[:-1]], self._stops, strict=True)
        return [(slice(start, stop), max(self.known[start:stop]) + 1) for start, stop in edges]

    def grow(self, n_tokens: int) -> None:
        self.known = [length + n_tokens for length in self.known]
        self.longest += n_tokens

    def without(self, rows: Collection[int]) -> tuple[list[int], "Lengths"]:
        """(which row stands at each place once these are gone, and the lengths then). A hole is filled with the last row of
        its span, and that hole with the last row of the next: few rows move, and spans stay as they are."""
        order, stops = list(range(len(self.known))), list(self._stops)
        for hole in sorted(rows, reverse=True):
            for i, stop in enumerate(stops):
                if hole < stop:
                    order[hole], hole, stops[i] = order[stop - 1], stop - 1, stop - 1
            order.pop()
        left = [stop for i, stop in enumerate(stops) if stop > (stops[i - 1] if i else 0)]
        return order, Lengths([self.known[row] for row in order], left)


class KVCache:
    """Room for `max_len` positions of `batch` rows in every layer; each row has its own length.

    A forward pass over T tokens writes row b's keys at `lengths[b] .. lengths[b] + T - 1` and then calls `advance(T)`.
    What stands past a row's length is never attended and is overwritten later, so `rewind` costs nothing: a
    right-padded prefill advances every row by T and is then rewound to the rows' true lengths.
    """

    def __init__(
        self,
        n_layer: int,
        batch: int,
        n_kv_head: int,
        max_len: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (n_layer, batch, n_kv_head, max_len, head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.hold(k, v, torch.zeros(batch, dtype=torch.int64, device=device), Lengths([0] * batch))

    def hold(self, k_LBGSD: Tensor, v_LBGSD: Tensor, lengths: Tensor, host: Lengths) -> None:
        """Be the cache of these rows."""
        self.k_LBGSD, self.v_LBGSD, self.lengths, self.host = k_LBGSD, v_LBGSD, lengths, host
        self.max_len = k_LBGSD.shape[3]
        self.reach: int | None = None  # positions that every pass attends, where that is fixed: see `pinned`
        self._rows = torch.arange(len(host.known), device=lengths.device)[:, None]

    def positions(self, n_tokens: int) -> Tensor:
        """(B or 1, T) int64: where the next `n_tokens` of each row stand."""
        new = torch.arange(n_tokens, device=self.lengths.device)
        if self.reach is not None:
            return (self.lengths[:, None] + new).clamp(max=self.max_len - 1)
        return (new + self.host.longest)[None] if self.host.even else self.lengths[:, None] + new

    def end(self, n_tokens: int) -> int:
        """Keys that a pass over `n_tokens` attends in the longest row, its own included."""
        return self.host.longest + n_tokens if self.reach is None else self.reach

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, G, T, D) at `positions` (B or 1, T) and return views (B, G, S, D) of all that is in use."""
        end = self.end(k.shape[2])
        if end > self.max_len:
            raise ValueError(f"KVCache: {end} positions do not fit max_len {self.max_len}")
        keys, values = self.k_LBGSD[layer], self.v_LBGSD[layer]
        if self.host.even and self.reach is None:
            keys[:, :, self.host.longest : end] = k
            values[:, :, self.host.longest : end] = v
        else:
            keys[self._rows, :, positions] = k.transpose(1, 2).to(keys.dtype)
            values[self._rows, :, positions] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, :end], values[:, :, :end]

    def spans(self, n_tokens: int) -> list[tuple[slice, int]]:
        """Rows that attend together, and how many keys they read; one span unless there is one token a row."""
        if n_tokens > 1 or self.reach is not None:
            return [(slice(0, len(self.host.known)), self.end(n_tokens))]
        return self.host.spans()

    @property
    def empty(self) -> bool:
        return self.host.longest == 0 and self.reach is None

    def advance(self, n_tokens: int) -> None:
        """Every row has grown by `n_tokens`."""
        self.lengths += n_tokens
        self.host.grow(n_tokens)

    def rewind(self, lengths: Tensor) -> None:
        """Set each row's length ((B,) int64); positions past it are forgotten."""
        self.lengths.copy_(lengths)
        self.host = Lengths(lengths.tolist())

    def part(self, start: int, stop: int) -> "KVCache":
        """The rows from `start` to before `stop`, in the same memory; what is read into them this cache learns by `rewind`."""
        part, rows = KVCache.__new__(KVCache), slice(start, stop)
        part.hold(self.k_LBGSD[:, rows], self.v_LBGSD[:, rows], self.lengths[rows], Lengths(self.host.known[rows]))
        return part


def visible(cache: KVCache, positions: Tensor, window: int | None, rows: slice, end: int) -> Tensor | None:
    """(B or 1, 1, T, S) bool: of `end` keys those that each query of `rows` at `positions` may see, the last `window`.

    None: all of them.
    """
    n_tokens = positions.shape[1]
    reach = end if window is None else min(window, end)
    even = cache.reach is None and len(set(cache.host.known[rows])) == 1
    if even and n_tokens == 1 and reach == end:
        return None
    at = positions if len(positions) == 1 else positions[rows]
    distance = at[..., None] - torch.arange(end, device=positions.device)
    return ((distance >= 0) & (distance < reach))[:, None]


def pinned(cache: KVCache, n_rows: int, reach: int) -> KVCache:
    """The first `n_rows`, as they are seen where no shape and no address may depend on what they hold: every pass attends
    `reach` positions, and writes by index."""
    part = cache.part(0, n_rows)
    part.reach = reach
    return part


def spread(cache: KVCache, rows: Tensor, max_len: int) -> KVCache:
    """A cache with room for `max_len` positions, whose row i begins as a copy of row rows[i] ((n,) int64)."""
    n_layer, _, n_kv_head, _, head_dim = cache.k_LBGSD.shape
    wide = KVCache(n_layer, len(rows), n_kv_head, max_len, head_dim, cache.k_LBGSD.device, cache.k_LBGSD.dtype)
    used = slice(0, cache.host.longest)
    wide.k_LBGSD[:, :, :, used] = cache.k_LBGSD[:, rows, :, used]
    wide.v_LBGSD[:, :, :, used] = cache.v_LBGSD[:, rows, :, used]
    wide.rewind(cache.lengths[rows])
    return wide


def leave(cache: KVCache, rows: Collection[int]) -> list[int]:
    """These rows are no more; which row stands at each place then."""
    order, left = cache.host.without(rows)
    for place, row in enumerate(order):  # from lower places to higher: what is overwritten has moved, or left
        if place != row:
            used = slice(0, cache.host.known[row])
            cache.k_LBGSD[:, place, :, used] = cache.k_LBGSD[:, row, :, used]
            cache.v_LBGSD[:, place, :, used] = cache.v_LBGSD[:, row, :, used]
    if order:
        n = len(order)
        cache.lengths[:n] = torch.tensor(left.known, device=cache.lengths.device)
        cache.hold(cache.k_LBGSD[:, :n], cache.v_LBGSD[:, :n], cache.lengths[:n], left)
    return order
