"""Whether an update may be made: its numbers are finite, and none stands out from those before; float16's loss scale.

Decides; explains nothing.

A decision depends on the numbers of the step and on what a checkpoint holds of those before it, so a resumed run decides
as one that was never stopped.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gpt.config import Count, Settings

RECENT = 128  # updates whose numbers a new one is compared with
ENOUGH = 48  # of them, before anything can stand out
DEVIATIONS = 7  # robust standard deviations above the median: what stands out
LEAST = {"loss": 1.15, "grad_norm": 8.0}  # times the median that it must reach besides


class NumbersConfig(Settings):
    """What becomes of an update whose numbers are bad."""

    on_bad: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="when loss or gradient are not finite: stop; skip: no update is made, the data goes on; rollback: back to the "
        "last checkpoint, and past the data from there to here",
    )
    at_most: int = Field(
        3, ge=1, description="bad updates in any `within` that are skipped or rolled back; one more stops"
    )
    within: Count = Field(1000, ge=1, description="updates over which bad ones are counted")
    spikes: Literal["ignore", "warn", "bad"] = Field(
        "warn",
        description="a loss or gradient norm far above the recent ones: nothing, a warning, or as bad as not finite",
    )


class Bad(FloatingPointError):
    """An update that must not be made: which number is wrong, and how."""

    def __init__(self, step: int, loss: float, grad_norm: float, wrong: str = "not finite") -> None:
        super().__init__(
            f"step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g} ({wrong}); the update was not made"
        )
        self.step, self.loss, self.grad_norm, self.wrong = step, loss, grad_norm, wrong


def finite(step: int, loss: Tensor, grad_norm: Tensor) -> tuple[float, float]:
    """Both as numbers, fetched at once: the one time that an update waits for the device, unless it has a loss scale. Bad
    unless both are finite."""
    numbers = torch.stack((loss, grad_norm.to(loss))).tolist()
    if not all(map(math.isfinite, numbers)):
        raise Bad(step, *numbers)
    return numbers[0], numbers[1]


class LossScale:
    """By what the loss is multiplied before its gradient is taken in float16, which loses small numbers, and gradients are
    divided by afterwards (Micikevicius et al. 2018); a power of two, so that neither rounds.

    It doubles after so many updates; where gradients are too large for float16 it is halved, and the update made again.
    """

    START, PATIENCE = 2.0**16, 2000  # torch.amp's

    def __init__(self, state: Sequence[float] = ()) -> None:
        """`state` is what a checkpoint holds of it: the scale, and the updates since it last changed."""
        self.become(state or (self.START, 0))

    @property
    def state(self) -> list[float]:
        return [self.value, self.good]

    def become(self, state: Sequence[float]) -> None:
        """What it was when its `state` was this."""
        self.value, self.good = state[0], int(state[1])

    def too_large(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the gradient is not finite because of the scale, which is halved then; never at 1, or where the loss itself is
        not finite. Waits for the device."""
        loss_is, gradient_is = torch.stack((loss, grad_norm.to(loss))).isfinite().tolist()
        if loss_is and not gradient_is and self.value > 1:
            self.value, self.good = self.value / 2, 0
            return True
        self.good += 1
        if self.good == self.PATIENCE:
            self.value, self.good = self.value * 2, 0
        return False


Check = Callable[[int, Tensor, Tensor], object]  # raises Bad


def stands_out(values: Sequence[float], value: float, least: float, scale: Callable[[float], float]) -> bool:
    """Whether `value` is far above `values` by their median and the median deviation from it, which no outlier moves.

    Deviations are of what `scale` makes of them: gradient norms spread by factors, losses by sums.
    """
    if len(values) < ENOUGH or value <= least * statistics.median(values):
        return False
    scaled = [scale(each) for each in values]
    middle = statistics.median(scaled)
    deviation = 1.4826 * statistics.median([abs(each - middle) for each in scaled])
    return scale(value) > middle + DEVIATIONS * deviation


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))


SCALES: dict[str, Callable[[float], float]] = {"loss": float, "grad_norm": _log}


@dataclass(frozen=True)
class Spike:
    """A number that stands out: its name, and what is usual."""

    what: str
    value: float
    usual: float

    def __str__(self) -> str:
        name = {"loss": "loss", "grad_norm": "gradient norm"}[self.what]
        return f"a spike: {name} {self.value:.4g}, usually {self.usual:.4g}"


class Judge:
    """Says of each update whether it may be made. What it remembers goes into checkpoints.

    `bad` are the numbers of the batches that were skipped or rolled back; `scale` is there where gradients are float16.
    """

    def __init__(
        self,
        config: NumbersConfig,
        recent: Iterable[Sequence[float]] = (),
        bad: Iterable[int] = (),
        scale: LossScale | None = None,
    ) -> None:
        self.config, self.bad, self.scale = config, list(bad), scale
        self.recent: deque[tuple[float, float]] = deque(((a, b) for a, b in recent), RECENT)
        self.spike: Spike | None = None  # of the last update that was made

    def __call__(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Bad if the update must not be made; else its numbers are remembered."""
        numbers = finite(step, loss, grad_norm)
        self.spike = None if self.config.spikes == "ignore" else self._spike(numbers)
        if self.spike is not None and self.config.spikes == "bad":
            raise Bad(step, *numbers, str(self.spike))
        self.recent.append(numbers)

    def _spike(self, numbers: tuple[float, float]) -> Spike | None:
        for value, column, (what, least) in zip(numbers, zip(*self.recent, strict=True), LEAST.items(), strict=False):
            if stands_out(column, value, least, SCALES[what]):
                return Spike(what, value, statistics.median(column))
        return None

    def may_go_on(self, number: int) -> bool:
        """Whether one more bad batch, with this number, is within what the settings bear."""
        return sum(each > number - self.config.within for each in self.bad) < self.config.at_most
