"""What is applied to a finished objective to run it faster: compilation. The model never knows."""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt.loss import NextToken

Forward = Callable[[Tensor, Tensor], Tensor]


def applied(objective: NextToken, *, compile: bool) -> Forward:
    """The function that training calls in place of `objective`; it shares the objective's parameters."""
    return torch.compile(objective, dynamic=False) if compile else objective
