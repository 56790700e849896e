"""KVCache: keys and values of the positions already decoded, preallocated; it knows nothing of sampling or of layers.

Layout letters (see gpt/model.py): B batch rows, G key/value heads, S cache positions, D head size.
"""

import torch
from torch import Tensor


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
        self.k_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.max_len = max_len
        self._rows = torch.arange(batch, device=device)[:, None]
        self.longest = 0  # max(lengths), kept on the host so that decoding never waits for the device
        self._even = True  # all rows equally long: then one query per row needs no mask

    def positions(self, n_tokens: int) -> Tensor:
        """(B, T) int64: where the next `n_tokens` of each row stand."""
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, G, T, D) at `positions` (B, T) and return views (B, G, S, D) of all that is in use."""
        end = self.longest + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"KVCache: {end} positions do not fit max_len {self.max_len}")
        if self._even:
            self.k_LBGSD[layer, :, :, self.longest : end] = k
            self.v_LBGSD[layer, :, :, self.longest : end] = v
        else:
            self.k_LBGSD[layer][self._rows, :, positions] = k.transpose(1, 2).to(self.k_LBGSD.dtype)
            self.v_LBGSD[layer][self._rows, :, positions] = v.transpose(1, 2).to(self.v_LBGSD.dtype)
        return self.k_LBGSD[layer, :, :, :end], self.v_LBGSD[layer, :, :, :end]

    def visible(self, positions: Tensor, window: int | None = None) -> Tensor | None:
        """(B, 1, T, S) bool: the keys each query at `positions` (B, T) may see, of the last `window` if given.

        None: all of them (even rows, T = 1).
        """
        end = self.longest + (n_tokens := positions.shape[1])
        reach = end if window is None else min(window, end)
        if self._even and n_tokens == 1 and reach == end:
            return None
        distance = positions[..., None] - torch.arange(end, device=positions.device)
        return ((distance >= 0) & (distance < reach))[:, None]

    @property
    def empty(self) -> bool:
        return self.longest == 0

    def advance(self, n_tokens: int) -> None:
        """Every row has grown by `n_tokens`."""
        self.lengths += n_tokens
        self.longest += n_tokens

    def rewind(self, lengths: Tensor) -> None:
        """Set each row's length ((B,) int64); positions past it are forgotten."""
        self.lengths.copy_(lengths)
        self.longest = int(lengths.max())
        self._even = bool((lengths == self.longest).all())

    def spread(self, rows: Tensor, max_len: int) -> "KVCache":
        """A cache with room for `max_len` positions, whose row i begins as a copy of row rows[i] ((n,) int64)."""
        n_layer, _, n_kv_head, _, head_dim = self.k_LBGSD.shape
        wide = KVCache(n_layer, len(rows), n_kv_head, max_len, head_dim, self.k_LBGSD.device, self.k_LBGSD.dtype)
        wide.k_LBGSD[:, :, :, : self.longest] = self.k_LBGSD[:, rows, :, : self.longest]
        wide.v_LBGSD[:, :, :, : self.longest] = self.v_LBGSD[:, rows, :, : self.longest]
        wide.rewind(self.lengths[rows])
        return wide
