"""The average of the weights that training passes through: what is evaluated, sampled and saved in place of the last ones.

A checkpoint's model is the average, so whatever reads checkpoints has it without knowing. The weights that updates go on
from stand beside the optimizer's state, as NAME:plain.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt import schedule
from gpt.optim import PLAIN
from gpt.parts import Parts


class Average:
    """Of this rank's part of each trained parameter; with `half_life` None there is none, and the weights are what they are.

    `steps` are the run's; `half_life` is in them (`schedule.kept`). `renewed` is called when weights were changed by hand.
    """

    def __init__(self, parts: Parts, half_life: float | None, steps: int, renewed: Callable[[], None]) -> None:
        self._parts, self._renewed = parts, renewed
        self._names = [name for name, parameter in parts.parameters.items() if parameter.requires_grad]
        self._half_life, self._steps = half_life, steps
        self._held: list[Tensor] = []  # the average; while it is shown, the weights

    def _weights(self) -> list[Tensor]:
        return [self._parts.local(name) for name in self._names]

    @torch.no_grad()
    def begin(self, stored: Mapping[str, Tensor] | None = None) -> None:
        """Go on from the weights that the model has, the average of a checkpoint or the start of one, and from `stored`.

        That is the optimizer's state beside them; the weights in it, if any, become the model's.
        """
        if self._half_life is not None:
            self._held = [weight.clone() for weight in self._weights()]
        plain = [f"{name}:{PLAIN}" for name in self._names] if stored is not None else []
        there = {key for key in stored or () if key.endswith(f":{PLAIN}")}
        if there and (missing := sorted(set(plain) - there)):
            raise ValueError(f"the optimizer's state has no {missing[0]}, and {len(there)} others of its kind")
        for key, weight in zip(plain, self._weights(), strict=False):
            if key in there:
                assert stored is not None
                weight.copy_(stored[key])
        self._renewed()

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take the weights in as update `step` left them."""
        if self._half_life is not None:
            torch._foreach_lerp_(self._held, self._weights(), 1 - schedule.kept(self._half_life, step, self._steps))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within, the model is its average; afterwards it has the very bits that it had."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for held, weight in zip(self._held, self._weights(), strict=False):
            before = weight.clone()
            weight.copy_(held)
            held.copy_(before)
        if self._held:
            self._renewed()

    def state(self) -> dict[str, Tensor]:
        """While the average is shown: the weights that updates go on from, to stand beside the optimizer's state."""
        return {f"{name}:{PLAIN}": held for name, held in zip(self._names, self._held, strict=False)}
