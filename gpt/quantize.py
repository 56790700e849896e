"""The frozen base of an adapter in fewer bits: the blocks' matrices as bf16, int8 or int4, computed with as they were before.

torchao chooses the integers and their scales; they are kept as plain tensors, and a matrix is spread out again where it is
multiplied with. Embeddings, norms and the head stay fp32. It trains nothing: only what passes through gets a gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt import runtime
from gpt.model import GPT, product_dtype

Kind = Literal["bf16", "int8", "int4"]
GROUP = 32  # columns of int4 that share a scale
SCALES = {"int8": torch.float32, "int4": torch.bfloat16}


def spread_bf16(weight: Tensor) -> Tensor:
    return weight


def spread_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (N, K) int8 and scale (N, 1) -> (N, K)."""
    return codes * scale


def spread_int4(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (N, K / 2) uint8, even columns in the low halves, and scale (N, K / GROUP) -> (N, K) fp32."""
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).to(torch.int8) - 8
    return (pairs.view(*scale.shape, GROUP) * scale[..., None].float()).flatten(1)


SPREAD: dict[Kind, Callable[..., Tensor]] = {"bf16": spread_bf16, "int8": spread_int8, "int4": spread_int4}


class FrozenProduct(torch.autograd.Function):
    """x (..., K) times a stored matrix (N, K) -> (..., N), in `dtype`; no spread-out matrix is kept for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.kind = kind
        return F.linear(x.to(dtype), SPREAD[kind](*stored).to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        return grad @ SPREAD[ctx.kind](*stored).to(grad.dtype), None, None, *(None for _ in stored)


class FrozenLinear(nn.Module):
    """nn.Linear over a stored matrix. `weight` is that matrix spread out anew, fp32 (out_features, in_features)."""

    def __init__(self, kind: Kind, stored: tuple[Tensor, ...], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.kind = kind
        for i, tensor in enumerate(stored):
            self.register_buffer(f"stored_{i}", tensor)
        self.bias = bias
        with torch.no_grad():
            self.out_features, self.in_features = SPREAD[kind](*stored).shape

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return tuple(self.buffers())

    @property
    def weight(self) -> Tensor:
        return SPREAD[self.kind](*self.stored).float()

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        product = FrozenProduct.apply(x, self.kind, dtype, *self.stored)
        return product if self.bias is None else product + self.bias.to(dtype)


def quantized(model: GPT, kind: Kind, store: Callable[[Tensor, Kind], tuple[Tensor, ...]] | None = None) -> GPT:
    """`model`, every matrix of its blocks replaced in place by a FrozenLinear of `kind`; do it before adapters are put on.

    The same weights give the same stored ones; `store` makes them (`stored`; `blank` where only their sizes matter).
    ValueError where torchao is missing, or a width cannot be grouped.
    """
    for name, linear in list(_linears(model)):
        parent, _, own = name.rpartition(".")
        try:
            kept = (store or stored)(linear.weight.detach(), kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        setattr(model.get_submodule(parent), own, FrozenLinear(kind, kept, linear.bias))
    return model


def _linears(model: GPT) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def _check_groups(columns: int, kind: Kind) -> None:
    if kind == "int4" and columns % GROUP:
        raise ValueError(f"int4 groups columns by {GROUP}, and it has {columns}: use int8 or bf16")


def blank(weight: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    """Tensors of the shapes that `stored` would return; its ValueError too."""
    N, K = weight.shape
    _check_groups(K, kind)
    if kind == "bf16":
        return (torch.empty(N, K, dtype=torch.bfloat16),)
    codes, scales, dtype = (K, 1, torch.int8) if kind == "int8" else (K // 2, K // GROUP, torch.uint8)
    return torch.empty(N, codes, dtype=dtype), torch.empty(N, scales, dtype=SCALES[kind])


def stored(weight: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    """What is kept of `weight` (N, K): see SPREAD."""
    if kind == "bf16":
        return (weight.bfloat16(),)
    _check_groups(weight.shape[1], kind)
    try:
        with runtime.hushed():
            from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    except ImportError as error:
        raise ValueError(
            f"a base in {kind} needs torchao, which cannot be loaded here ({error}): pip install 'torchao>=0.18', or use bf16"
        ) from None
    dtype, granularity = {"int8": (torch.int8, PerAxis(0)), "int4": (torch.int4, PerGroup(GROUP))}[kind]  # type: ignore[attr-defined]
    probe = nn.Linear(1, 1, bias=False)
    probe.weight = nn.Parameter(weight.float(), requires_grad=False)
    quantize_(probe, IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, scale_dtype=SCALES[kind]))
    chosen: Any = probe.weight  # torchao's tensor: integers from -8 or -128, symmetric, so that no zero point is needed
    assert not chosen.zero_point.any()
    codes = chosen.qdata
    if kind == "int4":
        shifted = (codes + 8).to(torch.uint8)
        codes = shifted[:, ::2] | shifted[:, 1::2] << 4
    return codes, chosen.scale
