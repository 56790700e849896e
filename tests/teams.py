"""Ranks for tests: threads of this process that hear each other, the blocks of tensors that ranks could hold, and what all
of them saved."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt import checkpoint, slices, tensors
from gpt.slices import Slice, cut
from gpt.team import Elsewhere, Team

PATIENCE_S = 60


class Line:
    """Where threads meet."""

    def __init__(self, size: int) -> None:
        self.said = ["null"] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self.aside: list[Line] = []


@dataclass(frozen=True)
class Threads(Team):
    """A rank that is a thread; `group` is the line that it shares with the others."""

    def gather(self, value: Any) -> list[Any]:
        self.group.said[self.rank] = json.dumps(value)
        self.group.barrier.wait()
        heard = [json.loads(each) for each in self.group.said]
        self.group.barrier.wait()
        return heard

    def aside(self, patience_s: float) -> Team:
        if self.first:
            self.group.aside.append(Line(self.size))
        self.group.barrier.wait()
        line = self.group.aside[-1]
        self.group.barrier.wait()
        return Threads(self.rank, self.size, line)


def ranks(size: int, work: Callable[[Team], Any]) -> list[Any]:
    """What `work` returns, or raises, on each of `size` ranks."""
    line, results = Line(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, size, line))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def on_all(size: int, work: Callable[[Team], Any]) -> list[Any]:
    """`ranks`, raising what the rank that failed by itself raised; all must have failed with it."""
    results = ranks(size, work)
    failed = [each for each in results if isinstance(each, BaseException)]
    if failed:
        assert len(failed) == size, results
        raise next((error for error in failed if not isinstance(error, Elsewhere)), failed[0])
    return results


def blocks(tensors: Mapping[str, Tensor], grid: tuple[int, int]) -> list[dict[str, Slice]]:
    """What each rank of a grid holds: rows and columns in shares as equal as can be; what has no rows the first holds."""
    held: list[dict[str, Slice]] = [{} for _ in range(grid[0] * grid[1])]
    for name, tensor in tensors.items():
        shares = (*grid[: tensor.dim()], *[1] * (tensor.dim() - 2)) if tensor.dim() else ()
        borders = [[n * i // share for i in range(share + 1)] for n, share in zip(tensor.shape, shares, strict=True)]
        for place in product(*map(range, shares)):
            offset = tuple(border[i] for border, i in zip(borders, place, strict=True))
            shape = tuple(border[i + 1] - border[i] for border, i in zip(borders, place, strict=True))
            rank = (place[0] if place else 0) * grid[1] + (place[1] if len(place) > 1 else 0)
            held[rank][name] = Slice(tuple(tensor.shape), offset, cut(tensor, offset, shape))
    return held


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a verified checkpoint, by the names on disk."""
    found = {name: entry for file in checkpoint.weight_files(path) for name, entry in tensors.stored(file).items()}
    return {name: slices.read(slices.undivided(entry)) for name, entry in found.items()}
