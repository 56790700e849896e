"""One new token of every row as a CUDA graph: launched at once, where kernel by kernel takes longer than the kernels do.

A graph repeats the same kernels on the same memory, so what a step computes may not depend on how long rows are: keys are
read up to a round number, and how many rows there are is rounded too. On other devices it computes the same uncaptured.
"""

import torch
from torch import Tensor

from gpt.cache import KVCache, pinned
from gpt.model import GPT

WORTH = 32  # tokens; capturing costs a few steps


class Graphs:
    """The step of a model over rows of `cache`, captured for each count of rows and each reach when it is first met."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        n_rows = len(cache.host.known)
        self.model, self.cache = model, cache.part(0, n_rows)  # its rows as they are now; some will leave
        self.tokens = torch.zeros(n_rows, 1, dtype=torch.int64, device=cache.lengths.device)
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.tokens.is_cuda else None
        self.stream = torch.cuda.Stream() if self.tokens.is_cuda else None  # one, or the graphs do not share the pool

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits (n, V) after one more token (n, 1) of each row of `cache`, the first n rows of what this was made with.

        They stand in memory that the next step overwrites.
        """
        n_rows, reach = rounded(len(tokens), len(self.tokens), cache.host.longest + 1, cache.max_len)
        self.tokens[: len(tokens)] = tokens
        found = self.captured.get((n_rows, reach)) or (self._capture(n_rows, reach) if self.pool is not None else None)
        if found is None:
            logits = self._compute(n_rows, reach)
        else:
            graph, logits = found
            graph.replay()
        cache.host.grow(1)
        return logits[: len(tokens)]

    def _compute(self, n_rows: int, reach: int) -> Tensor:
        """What a graph holds: it reads the rows' tokens and lengths where they stand, and adds one to the lengths."""
        return self.model(self.tokens[:n_rows], cache=pinned(self.cache, n_rows, reach))[:, -1]

    def _capture(self, n_rows: int, reach: int) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """The graph of a step and where it leaves its logits. None where the model cannot be captured: no more is then tried."""
        lengths, before, stream = self.cache.lengths.clone(), torch.cuda.current_stream(), self.stream
        assert stream is not None
        stream.wait_stream(before)
        with torch.cuda.stream(stream):  # libraries set themselves up in a first pass, which may not be captured
            self._compute(n_rows, reach)
        before.wait_stream(stream)
        self.cache.lengths.copy_(lengths)  # that pass counted; the keys that it wrote are written again
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads ask of the device meanwhile, as the reader of a run's batches does, is not part of it.
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._compute(n_rows, reach)
        except RuntimeError:
            torch.cuda.set_stream(before)  # a capture that cannot end leaves its own
            self.pool = None
            return None
        self.captured[n_rows, reach] = graph, logits
        return graph, logits


def rounded(n_rows: int, most_rows: int, reach: int, most: int) -> tuple[int, int]:
    """Rows and positions that a graph computes for so many: few different ones, at most a quarter too many (or 256)."""
    rows = 1 << max(0, (n_rows - 1).bit_length() - 3)
    keys = 256 if reach < 1024 else 1 << (reach.bit_length() - 3)
    return min(-(-n_rows // rows) * rows, most_rows), min(-(-reach // keys) * keys, most)
