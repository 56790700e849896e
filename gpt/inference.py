"""A finished model made ready to write: its matrices packed once as the CPU's kernels read them, bf16 where it computes that.

Applied, never known: the model's own modules are exchanged for some that compute the same. oneDNN's packed products are
private operations of torch; they are used where they pass a test of numbers here, and nowhere else.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt import runtime, signals
from gpt.model import GPT, Attention, GainFreeRMSNorm, GatedMLP, RMSNorm
from gpt.positions import Angles

FEW = 16  # rows
# What one thread does in the time that waking another costs twice over: bytes of a weight read, multiplications.
WORTH_WAKING = 8 << 20, 3 << 24
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a sum of random products, by its size


class PackedLinear(nn.Module):
    """nn.Linear without gradients, its weight (N, K) in the order in which oneDNN's kernels read it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = bias
        self.n_bytes = weight.numel() * weight.itemsize
        self.threads = torch.get_num_threads()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), by all threads where it is worth it, even where one computes alone (`runtime.lone_thread`)."""
        products = x.numel() * self.out_features
        alone = torch.get_num_threads()
        wakes = alone < self.threads and (self.n_bytes > WORTH_WAKING[0] or products > WORTH_WAKING[1])
        if wakes:
            torch.set_num_threads(self.threads)
        out = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if wakes:
            torch.set_num_threads(alone)
        return out


class LeanNorm(nn.Module):
    """RMSNorm without gradients, in few calls: for few rows these cost more than the arithmetic.

    Beside -x the mean of x is zero and its variance is its mean square, so that of the two layer_norm, which is one
    kernel, computes what RMSNorm does of x.
    """

    def __init__(self, norm: RMSNorm | GainFreeRMSNorm, width: int) -> None:
        super().__init__()
        gain = norm.weight.detach().float() if isinstance(norm, RMSNorm) else torch.ones(width)
        self.gain, self.twice = gain, torch.cat((gain, gain))  # no buffers: they stay fp32
        self.width, self.eps = width, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= FEW * self.width:
            both = F.layer_norm(torch.cat((x, -x), dim=-1), (2 * self.width,), self.twice, None, self.eps)
            return both[..., : self.width]
        wide = x.float()
        scale = wide.square().mean(dim=-1, keepdim=True).add_(self.eps).rsqrt_()
        return wide.mul(scale).mul_(self.gain).to(x.dtype)


class JoinedAttention(Attention):
    """Attention whose queries, keys and values are one product."""

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.layer, self.d_head, self.turn = attention.layer, attention.d_head, attention.turn
        self.q_normed, self.k_normed = attention.q_normed, attention.k_normed
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        three = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.widths = [linear.out_features for linear in three]
        self.qkv_proj, self.o_proj = _joined(three, dtype), _joined([attention.o_proj], dtype)

    def project(self, x: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        return self.placed(q, k, v, angles)


class BareAttention(JoinedAttention):
    """The same, whose queries and keys are not normalized: they turn as one."""

    def project(self, x: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv_proj(x).view(*x.shape[:2], -1, self.d_head).transpose(1, 2)
        H, G = (width // self.d_head for width in self.widths[:2])
        turned = self.turn(heads[:, : H + G], angles)
        return turned[:, :H], turned[:, H:], heads[:, H + G :]


class JoinedMLP(GatedMLP):
    """A gated MLP whose gate and up are one product."""

    def __init__(self, mlp: GatedMLP, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.activation = mlp.activation
        self.gate_up, self.down_proj = _joined([mlp.gate_proj, mlp.up_proj], dtype), _joined([mlp.down_proj], dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate).mul_(up))


def ready(model: GPT, device: str, dtype: str | None = None) -> str:
    """Make a finished model ready to write on `device`, in place, and say how; it can be trained no more.

    `dtype` is by default what the device computes fastest. Each matrix is exchanged for its packed form before the next
    one is: the model never takes more memory than it did, but for embeddings that are the output head too, whose rows are
    still looked up. A model with other modules than its own (quantized, with an adapter) keeps its dtype and its matrices.
    """
    if others := {type(linear).__name__ for linear in _linears(model)} - {"Linear"}:
        model.to(device)
        return f"as it is: it has {', '.join(sorted(others))}"
    chosen, why = (dtype, "as asked") if dtype is not None else runtime.best_dtype(device)
    to = runtime.DTYPES[chosen]
    how = ""
    if device == "cpu":
        unfit = _unfit(to)
        how = f"; weights not packed: {unfit}" if unfit else ", weights packed"
        if not unfit:
            _pack(model, to)
    _convert(model, to)
    model.to(device)
    return f"{chosen} ({why}){how}"


def beside(model: GPT, dtype: str | None = None) -> GPT:
    """A model ready to write beside one that is trained or measured, which stays as it is; on the same device.

    It shares what need not be changed. Where there is not twice the memory that it would take, it is `model` itself.
    """
    device = str(model.model.embed_tokens.weight.device)
    chosen = dtype or runtime.best_dtype(device)[0]
    n_bytes = sum(p.numel() for p in model.parameters()) * runtime.DTYPES[chosen].itemsize
    if runtime.free_memory_bytes(device) < 2 * n_bytes:
        return model
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    ready(shared, device, chosen)
    return shared.eval()


def _linears(model: GPT) -> list[nn.Module]:
    """Every module in the place of a matrix."""
    inside = (module for name, module in model.model.layers.named_modules() if name.endswith("_proj"))
    return [model.lm_head, *inside]


def _pack(model: GPT, dtype: torch.dtype) -> None:
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, RMSNorm | GainFreeRMSNorm):
                width = norm.weight.numel() if isinstance(norm, RMSNorm) else norm.width
                setattr(module, name, LeanNorm(norm, width))
    block: Any
    for block in model.model.layers:
        bare = isinstance(block.self_attn.q_norm, nn.Identity)
        block.self_attn = (BareAttention if bare else JoinedAttention)(block.self_attn, dtype)
        block.dropout = nn.Identity()
        if type(block.mlp) is GatedMLP:
            block.mlp = JoinedMLP(block.mlp, dtype)
        else:
            block.mlp.up_proj = _joined([block.mlp.up_proj], dtype)
            block.mlp.down_proj = _joined([block.mlp.down_proj], dtype)
    model.lm_head = _joined([model.lm_head], dtype)


@torch.no_grad()
def _joined(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Any:
    """One PackedLinear for those of `linears`, which read the same."""
    weight = torch.cat([linear.weight.detach().to(dtype) for linear in linears])
    biases = [linear.bias.detach().to(dtype) for linear in linears if linear.bias is not None]
    return PackedLinear(weight, torch.cat(biases) if biases else None)


@torch.no_grad()
def _convert(model: GPT, dtype: torch.dtype) -> None:
    """Parameters and tables in `dtype`, new ones: who shares the old ones keeps them. What was one tensor stays one."""
    new: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                module._parameters[name] = new.setdefault(parameter, fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


@cache
def _unfit(dtype: torch.dtype) -> str:
    """Why packed products in `dtype` cannot be used here, or "": they are there, and give what plain ones do."""
    if dtype not in TOLERANCE:
        return f"not in {str(dtype).removeprefix('torch.')}"
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((96, 80), (96,), (65, 80)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    try:
        packed = PackedLinear(weight, bias)
        for n in (1, 3, 65):
            error = (packed(x[:n]).double() - exact[:n]).abs().max() / exact.abs().max()
            if not error < TOLERANCE[dtype]:
                return f"packed products are wrong here by {float(error):.1e}"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"this torch cannot ({signals.reason(error)})"
    return ""
