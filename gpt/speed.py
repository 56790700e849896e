"""How long an update takes, before there is one: what it calls of torch, by a clock that knows a machine."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from gpt import memory, runtime
from gpt.loss import NextToken
from gpt.memory import Setting
from gpt.model import GPT, ModelConfig, init_weights
from gpt.operations import Tally
from gpt.parallel import applied
from gpt.probe import Clock, Rates

# Operations so small that calling them, and waking the threads that share them, takes most of their time.
SMALL = ModelConfig(vocab_size=512, max_seq_len=64, n_layer=2, d_model=96, n_head=3)
ROWS, PASSES = 8, 10


@dataclass(frozen=True)
class Pace:
    """Seconds of an update: of each forward and backward pass, and of the optimizer's step."""

    pass_s: float
    step_s: float

    def update_s(self, passes: int) -> float:
        return passes * self.pass_s + self.step_s


def pace(config: ModelConfig, setting: Setting, clock: Clock) -> Pace:
    """By what blocks take when there is one of them and when there are two."""
    shapes = memory.samples(config, setting.adapter)
    passes = [memory.walked(shape, setting).calls for shape in shapes]
    steps = [memory.stepped(shape, setting).calls for shape in shapes]
    clock.watch([passes[-1], steps[-1]])
    return Pace(_at_depth(config, passes, clock), _at_depth(config, steps, clock))


def paces(config: ModelConfig, setting: Setting, clock: Clock) -> Callable[[int], Pace]:
    """`pace` as a function of the rows of a micro-batch: a straight line, found from two and three."""
    two, three = (pace(config, replace(setting, rows=rows), clock) for rows in (2, 3))
    row_s = three.pass_s - two.pass_s

    def of(rows: int) -> Pace:
        return Pace(max(two.pass_s / 2, two.pass_s + (rows - 2) * row_s), two.step_s)

    return of


def _at_depth(config: ModelConfig, tallies: list[Tally], clock: Clock) -> float:
    found = [clock.seconds(tally) for tally in tallies]
    return found[0] if len(found) == 1 else found[0] + (config.n_layer - 1) * (found[1] - found[0])


@lru_cache
def asking_s(dtype: str) -> float:
    """Seconds that an operation costs this CPU when a model calls it, and autograd its gradient, beyond what it takes alone."""
    setting = Setting(rows=ROWS, seq_len=64, device="cpu", dtype=dtype, optim=memory.OptimConfig())
    tally = memory.walked(SMALL, setting).calls
    clock = Clock(Rates(1e12, 1e10, 0.0), "cpu", budget_s=math.inf)  # what is not timed would count as calling
    clock.watch([tally])
    model = GPT(SMALL).train()
    init_weights(model, 1)
    forward, row, seconds = applied(NextToken(model), compile=False), torch.zeros(ROWS, 64, dtype=torch.int64), []
    for _ in range(PASSES):
        start = time.perf_counter()
        with runtime.autocast("cpu", dtype):
            nats = forward(row, row)
        nats.backward()
        seconds.append(time.perf_counter() - start)
    return max(0.0, sorted(seconds)[PASSES // 2] - clock.seconds(tally)) / tally.n_calls


def with_asking(rates: Rates, dtype: str) -> Rates:
    """The rates of this CPU with what calling costs as a model does it."""
    return replace(rates, asking=asking_s(dtype))
