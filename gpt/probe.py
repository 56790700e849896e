"""What this machine does in a second: products of matrices, bytes of memory, and each operation of an update, timed alone."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpt import operations, runtime
from gpt.machines import Machine
from gpt.operations import Op, Tally

BUDGET_S = 1.5  # for timing the operations of an update, those that weigh most first
SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096)}
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes: more than a cache holds
LAUNCH_S = {"cuda": 4e-6, "mps": 1e-5}  # of a GPU's operation that was written out, asked for one by one
REPEATS = 5
ENOUGH_S = 0.02  # of one operation
FUSED = 1 / 3  # of the bytes that operations move one by one, when a compiler makes chains of them one


def matmul_rate(device: str, dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of square products of random numbers in `dtype`, found in about so many seconds; the largest that fit in decide.

    Numbers are random because zeros let a GPU draw less power and run faster, and none is drawn from torch's own generator.
    """
    kind, rate, until = device.partition(":")[0], 0.0, time.perf_counter() + seconds
    source = torch.Generator(device).manual_seed(0)
    for side in SIDES[kind]:
        try:
            a, b = (torch.randn(side, side, generator=source, device=device) for _ in range(2))
            a, b = a.to(runtime.DTYPES[dtype]), b.to(runtime.DTYPES[dtype])
            out = torch.empty_like(a)
            with torch.no_grad():
                took = timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, until - time.perf_counter())  # type: ignore[misc]
        except torch.OutOfMemoryError:  # of a GPU that is in use: smaller ones were measured, or nothing can be
            if rate:
                break
            raise
        rate = 2 * side**3 / took
        if time.perf_counter() + 8 * took >= until:  # the next one takes as long
            break
    return rate


@dataclass(frozen=True)
class Rates:
    """FLOP/s of large products in the run's dtype, bytes/s read and written, and seconds to ask for one operation."""

    matmul: float
    bandwidth: float
    asking: float

    def seconds(self, op: Op, compiled: bool = False) -> float:
        """By the limit it meets: arithmetic or memory."""
        if not op.flops:
            return op.moved * (FUSED if compiled else 1) / self.bandwidth
        return max(op.flops / self.matmul, op.moved / self.bandwidth)


def known(machine: Machine, dtype: str) -> Rates:
    """Of a machine that need not be here. Products in fp32 go by TF32, at about half the rate."""
    return Rates(machine.matmul / (2 if dtype == "float32" else 1), machine.bandwidth, LAUNCH_S["cuda"])


def timed(call: Callable[[], object], device: str, enough_s: float = ENOUGH_S, most: int = REPEATS) -> float:
    """Median seconds of a call, after one that warms up: of as many as begin in so long, one at least, and three of a quick
    one, as a moment in which the machine did something else must not decide."""
    call()
    runtime.synchronize(device)
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < most and (
        not found or time.perf_counter() - begun < enough_s or (len(found) < 3 and min(found) < min(ENOUGH_S, enough_s))
    ):
        start = time.perf_counter()
        call()
        runtime.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measured(device: str, dtype: str) -> Rates:
    """Of this machine, in about a third of a second."""
    kind = device.partition(":")[0]
    matmul, n_bytes = matmul_rate(device, dtype), COPIED.get(kind, 1 << 27)
    n_bytes = min(n_bytes, runtime.free_memory_bytes(device) // 4)  # of a GPU that is in use
    source, target = (torch.ones(n_bytes // 4, device=device) for _ in range(2))
    bandwidth = 2 * n_bytes / timed(lambda: target.copy_(source), device, 0.1)
    small = torch.ones(1, device=device)
    asking = LAUNCH_S.get(kind) or timed(lambda: [small.add(small) for _ in range(1000)], device) / 1000
    return Rates(matmul, bandwidth, asking)


class Clock:
    """Seconds of an update's operations on a device: timed one by one where it is this machine's CPU, else by its rates."""

    def __init__(
        self, rates: Rates, device: str | None = None, *, compiled: bool = False, budget_s: float | None = None
    ) -> None:
        self.rates, self.device, self.compiled = rates, device, compiled
        self.left_s = BUDGET_S if budget_s is None else budget_s
        self._timed: dict[Op, float] = {}

    def watch(self, tallies: list[Tally]) -> None:
        """Time the operations of these, those first that are thought to weigh most, until the budget is spent."""
        if self.device is None:
            return
        weights: dict[Op, float] = {}
        for tally in tallies:
            for op, n in tally:
                weights[op] = max(weights.get(op, 0.0), n * (self.rates.seconds(op) + self.rates.asking))
        begun = time.perf_counter()
        with torch.no_grad():
            for op in sorted(weights, key=lambda op: -weights[op]):
                if time.perf_counter() - begun > self.left_s:
                    break
                if op not in self._timed and op.moved and (call := operations.again(op, self.device)) is not None:
                    self._timed[op] = timed(call, self.device)
        self.left_s -= time.perf_counter() - begun

    def seconds(self, tally: Tally) -> float:
        """Of all calls, one after the other."""
        asked = sum(n * self.rates.asking for op, n in tally if not self.compiled or op.flops)
        work = 0.0
        for op, n in tally:
            alone = self._timed.get(op)
            work += n * (self.rates.seconds(op, self.compiled) if alone is None else alone)
        return work + asked if self.device is not None else max(work, asked)
