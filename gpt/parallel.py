"""What is applied to a finished objective: less memory, compilation, a kernel for document masks. The model never knows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from gpt.loss import NextToken, Objective, Preferences, nats
from gpt.model import GPT, computed

Forward = Callable[..., Tensor]  # NextToken.forward's arguments
PROBE = (1, 256)  # rows and tokens that show whether a kernel works here


def recomputed(block: nn.Module, *given: Any) -> Tensor:
    """The block's answer; of what its gradient needs only `given` is kept, the rest is computed again (Chen et al. 2016).

    Random numbers are drawn again as they fell, so that dropout hides the same columns.
    """
    if not torch.is_grad_enabled():
        return block(*given)
    return checkpoint(block, *given, use_reentrant=False)


def applied(objective: Objective, *, compile: bool, checkpointing: str = "none") -> Forward:
    """The function that training calls in place of `objective`; it shares the objective's parameters.

    The order matters: blocks are told what to keep before the compiler sees them.
    """
    objective.model.model.through = {"none": computed, "full": recomputed}[checkpointing]
    if isinstance(objective, Preferences):
        objective.nats = nats
    if not compile:
        return objective
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # the compiler learns it here
    if isinstance(objective, Preferences):  # the reference comes and goes between two calls of it
        objective.nats = torch.compile(nats, dynamic=False)
        return objective
    return torch.compile(objective, dynamic=False)


def flexible(model: GPT) -> None:
    """Attention inside documents by FlexAttention, whose kernel skips the blocks that a mask hides."""
    model.model.flex = torch.compile(flex_attention, dynamic=False)


def document_kernel(model: GPT) -> tuple[str, str]:
    """The kernel for attention inside documents on this model's device, "flex" or "dense", and why; `flexible` if it is flex.

    The model's gradients are gone when this returns.
    """
    device = model.lm_head.weight.device
    if device.type != "cuda":
        return "dense", f"a mask of every pair: FlexAttention trains on CUDA, this is {device.type}"
    flexible(model)
    ids = torch.zeros(PROBE, dtype=torch.int64, device=device)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            NextToken(model)(ids, ids, ids, torch.arange(PROBE[1], device=device)[None] // 100).backward()
    except (RuntimeError, ImportError, ValueError) as error:
        model.model.flex = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return "dense", f"a mask of every pair: FlexAttention failed here: {reason}"
    finally:
        model.zero_grad(set_to_none=True)
    return "flex", "FlexAttention, which skips what the mask hides"
