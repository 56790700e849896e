"""What changes with the step (learning rate, momentum, how long an average remembers), and when things are due.

Stored nowhere: the step is the only clock.
"""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from gpt.config import Settings

WSD_DECAY = 0.4
MOMENTUM = 0.85  # where a momentum that is warmed up begins


class ScheduleConfig(Settings):
    """Factor on the peak learning rates over a run."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = Field(
        "wsd", description="wsd: warm-up, stable, linear decay"
    )
    warmup: float = Field(0.02, ge=0, description="linear warm-up: a fraction of the steps if below 1, else steps")
    decay: float | None = Field(
        None,
        gt=0,
        description=f"wsd: the last fraction of the steps that decays, or above 1 how many steps; null: {WSD_DECAY}",
    )
    floor: float = Field(0.0, ge=0, le=1, description="factor at the last step")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "wsd" and self.decay is not None:
            raise ValueError(f"decay ({self.decay}) is for kind 'wsd', not '{self.kind}'")
        if self.kind == "constant" and self.floor:
            raise ValueError(f"floor ({self.floor}) has no meaning with kind 'constant'")
        if self.decay is not None and self.decay <= 1 and self.warmup < 1 < self.warmup + self.decay:
            raise ValueError(f"warmup ({self.warmup}) and decay ({self.decay}) are more than the whole run")
        return self


def updates(length: float, steps: int) -> float:
    """A length as settings give it, in updates: below 1 it is a fraction of the run's."""
    return length * steps if length < 1 else length


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor in (0, 1] of update `step`, counted from 1; the last update stands one short of where `floor` is reached."""
    warmup = updates(config.warmup, steps)
    if step <= warmup:
        return step / max(warmup, 1.0)
    left = steps + 1 - step  # updates until the floor
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        decay = config.decay or WSD_DECAY
        shape = min(1.0, left / max(1.0, decay if decay > 1 else decay * steps))
    else:
        shape = left / max(1.0, steps + 1 - warmup)
    if config.kind == "cosine":
        shape = 0.5 - 0.5 * math.cos(math.pi * shape)
    return config.floor + (1 - config.floor) * shape


def momentum(peak: float, warmup: int, step: int | None) -> float:
    """Muon's momentum in update `step`, counted from 1: up to `peak` by even steps in `warmup` updates; None is after them."""
    begin = min(MOMENTUM, peak)
    return peak if step is None or step > warmup else begin + (peak - begin) * (step - 1) / warmup


def kept(half_life: float, step: int, steps: int) -> float:
    """How much of itself an average of weights keeps in update `step`, counted from 1: half in `half_life` updates (below 1: a
    fraction of the steps), and less while it has seen few, so that it forgets what weights began as."""
    return min(0.5 ** (1 / updates(half_life, steps)), step / (step + 9))


def due(step: int, every: int | None, steps: int | None = None) -> bool:
    """Whether something done every `every` steps, and after the last one, is due at `step`; `every` None is never."""
    return every is not None and (step % every == 0 or step == steps)
