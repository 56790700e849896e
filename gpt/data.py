"""The order of data: batch(step), a pure function of (data set, seq_len, batch size, seed, step) and of nothing else.

A split is a circle of tokens, documents one after another, each opened by its start token. Windows of seq_len + 1
tokens overlapping by one cut it into rows, so that every token is a target exactly once an epoch; each epoch shifts the
cuts and permutes the rows anew. Nothing is kept between calls: the loader's state is the step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gpt.config import Count, Settings
from gpt.runtime import key
from gpt.shards import TokenSet

IGNORED = -100  # torch's own value for a target without loss


class DataConfig(Settings):
    """What is trained on."""

    path: str = Field(description="a prepared data set, for example data/quickstart")
    seq_len: Count = Field(256, ge=1, description="context in tokens: what one row of a batch holds")


class Batch(NamedTuple):
    """Rows of inputs and what follows each: (B, T) int64; targets are shifted, and IGNORED where nothing is learned."""

    tokens: Tensor
    targets: Tensor

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORED).sum())


def permute(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where each index in [0, n) goes under a seeded permutation of [0, n): constant memory, any index alone.

    A four-round Feistel network over the next even power of two; what falls outside walks on until it is inside
    (Black and Rogaway 2002, cycle walking).
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(key(seed, i, "permute")) for i in range(4)]

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & low)
        return (left << np.uint64(half)) | right

    out = once(np.asarray(index, dtype=np.uint64))
    while (outside := out >= n).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)


def rows(tokens: TokenSet, starts: np.ndarray, stops: np.ndarray, seq_len: int, end: int) -> Batch:
    """Rows that learn the targets after positions starts[i] .. stops[i] - 1 of the circle of the first `end` tokens.

    A row shorter than seq_len is filled with start tokens that are not trained on.
    """
    ids = np.full((len(starts), seq_len + 1), tokens.start_id, dtype=np.int64)
    targets = np.full((len(starts), seq_len), IGNORED, dtype=np.int64)
    for i, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        # After the last token of the circle comes its first: a start token again, which stands there already.
        inside = tokens.read(start, min(stop + 1, end) - start)
        ids[i, : len(inside)] = inside
        targets[i, : stop - start] = ids[i, 1 : stop - start + 1]
        ids[i, stop - start :] = tokens.start_id
        if tokens.has_spans:
            targets[i, : stop - start][~_learned(tokens, start + 1, stop - start)] = IGNORED
    return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets))


def _learned(tokens: TokenSet, start: int, count: int) -> np.ndarray:
    """(count,) bool: which of the tokens start .. start + count - 1 lie in a `train` span."""
    learned = np.zeros(count, dtype=bool)
    for span in tokens.spans(start, count):
        if span.kind == "train":
            learned[max(0, span.start - start) : span.end - start] = True
    return learned


class Loader:
    """Training batches of `batch_rows` rows of `seq_len` tokens."""

    def __init__(self, tokens: TokenSet, seq_len: int, batch_rows: int, seed: int) -> None:
        self.tokens, self.seq_len, self.batch_rows, self.seed = tokens, seq_len, batch_rows, seed
        if tokens.n_tokens < seq_len:
            raise ValueError(
                f"the training split has {tokens.n_tokens} tokens, fewer than data.seq_len ({seq_len}): "
                "add text or lower it"
            )
        # One row more than the tokens fill, since a shifted epoch opens and closes with a part of a row.
        self.rows_per_epoch = -(-tokens.n_tokens // seq_len) + 1

    def batch(self, step: int) -> Batch:
        """The batch of update `step`, counted from 1. Pure: the same (seed, step) always gives the same rows."""
        index = (step - 1) * self.batch_rows + np.arange(self.batch_rows)
        epochs, slots = np.divmod(index, self.rows_per_epoch)
        starts = np.empty(self.batch_rows, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order = key(self.seed, epoch, "order")
            shift = key(self.seed, epoch, "shift") % self.seq_len
            starts[here] = permute(slots[here], self.rows_per_epoch, order) * self.seq_len - shift
        n = self.tokens.n_tokens
        return rows(self.tokens, starts.clip(0, n), (starts + self.seq_len).clip(0, n), self.seq_len, n)


def validation_batches(tokens: TokenSet, seq_len: int, batch_rows: int, max_tokens: int | None) -> Iterator[Batch]:
    """Every target of the split once, in order, in windows that do not overlap; the tail is kept.

    With `max_tokens` the first whole documents that reach it (all if they do not), read as a circle of their own.
    """
    end = evaluated_tokens(tokens, max_tokens)
    starts = np.arange(0, end, seq_len)
    for i in range(0, len(starts), batch_rows):
        part = starts[i : i + batch_rows]
        yield rows(tokens, part, (part + seq_len).clip(max=end), seq_len, end)


def evaluated_tokens(tokens: TokenSet, max_tokens: int | None) -> int:
    """Where the last document that an evaluation of about `max_tokens` reads ends."""
    if max_tokens is None or max_tokens >= tokens.n_tokens:
        return tokens.n_tokens
    ends = np.append(tokens.document_starts[1:], tokens.n_tokens)
    return int(ends[np.searchsorted(ends, max_tokens)])


def evaluated_bytes(tokens: TokenSet, max_tokens: int | None) -> int:
    """Raw UTF-8 bytes of the documents that such an evaluation reads."""
    n_documents = np.searchsorted(tokens.document_starts, evaluated_tokens(tokens, max_tokens))
    return int(tokens.document_bytes[:n_documents].sum())
