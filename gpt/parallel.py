"""What is applied to a finished objective to run it faster: compilation. The model never knows."""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt.loss import NextToken

Forward = Callable[[Tensor, Tensor], Tensor]


def applied(objective: NextToken, *, compile: bool) -> Forward:
    """The function that training calls in place of `objective`; it shares the objective's parameters."""
    if not compile:
        return objective
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # the compiler learns it here
    return torch.compile(objective, dynamic=False)
