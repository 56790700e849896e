"""What is applied to a finished objective: many ranks, less memory, compilation, kernels of attention.

The model never knows.
"""

import gc
import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.compiler import config as compiler
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gpt import signals
from gpt.loss import WHOLE, NextToken, Objective, Preferences, Whole
from gpt.model import BLOCKS, GPT, ModelConfig, gelu_by_sigmoid, gelu_tanh
from gpt.ranks import Forward, Ranks, is_divided

PROBE = 256  # tokens that show whether a kernel works here
SHAPES = 128  # that FlexAttention is compiled for
FASTER = 1.03  # times, for a kernel to be taken in place of another
aten = torch.ops.aten
ORDERS = {  # torch's fused kernels, the one to be tried first by its name
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}
DEAR = [  # products of matrices with weights, and fused attention: what is worth its memory to those who recompute the rest
    *(aten.mm.default, aten.addmm.default, torch.ops.higher_order.flex_attention),
    *(aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_cudnn_attention.default),
    *(aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default),
]
KEEPING: dict[str, dict[str, Any]] = {  # what `checkpoint` is told
    "full": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, DEAR)},
}
# Every rank computes the same ones; torch 2.13 gave the argument of DDP that says so another name.
NEWER = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
BUFFERS_STAY: dict[str, Any] = {"forward_sync_buffers" if NEWER else "broadcast_buffers": False}


class Split(Whole):
    """The head's rows stand on several ranks, in order."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.rank = mesh.get_group(), mesh.get_local_rank()

    def rows(self, weight: Tensor) -> Tensor:
        return weight.to_local() if is_divided(weight) else weight

    def log_softmax(self, logits: Tensor) -> Tensor:
        top = logits.amax(dim=-1, keepdim=True)
        distributed.all_reduce(top, distributed.ReduceOp.MAX, group=self.group)
        logits = logits - top
        return logits - self.sum(logits.exp().sum(dim=-1, keepdim=True)).log()

    def find(self, targets: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        rows = like.shape[1]
        index = targets - self.rank * rows
        there = (index >= 0) & (index < rows)
        return torch.where(there, index, 0), there.to(like.dtype)

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        distributed.all_reduce(x, group=self.group)
        return x


def recomputed(kind: str, forward: Callable[..., Tensor], *given: Any) -> Tensor:
    """What `forward` of a block answers; its gradient keeps `given` and, selective, what is `DEAR`; the rest is computed again
    (Chen et al. 2016; Korthikanti et al. 2022).

    Random numbers are drawn again as they fell, so that dropout hides the same columns.
    """
    if not torch.is_grad_enabled():
        return forward(*given)
    return checkpoint(forward, *given, use_reentrant=False, **KEEPING[kind])


def in_parts(objective: Objective, ranks: Ranks, device: str) -> None:
    """Divide an objective that was made without memory (on "meta") among `ranks`, and give it memory on `device`.

    Its parameters are to be filled in afterwards.
    """
    from torch.distributed.fsdp import (
        fully_shard,
        register_fsdp_forward_method,
    )  # a second, which one process need not pay

    assert ranks.mesh is not None
    met, where = ranks.mesh.device_type, device.partition(":")[0]
    if met != where:
        raise ValueError(f"the run computes on {where}, and its ranks would meet on {met}: set train.device={where}")
    model = objective.model
    if ranks.n.tensor > 1:  # 1. of the four steps that `applied` goes on with
        assert isinstance(objective, NextToken)
        _tensor_parallel(model, ranks.mesh["tensor"])
        objective.vocabulary = Split(ranks.mesh["tensor"])
    if (
        ranks.n.shard > 1 or ranks.n.replicate > 1
    ):  # 4.; what hooks into a module's call stands outside of what is compiled
        mesh = ranks.mesh["replicate", "shard"] if ranks.n.replicate > 1 else ranks.mesh["shard"]
        for block in model.model.layers.children():
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)  # the root, with embedding, final norm and head
        if isinstance(objective, Preferences):
            register_fsdp_forward_method(objective, "rewards")
    objective._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def resharded(objective: Objective) -> None:
    """Let go of weights that were gathered for a pass without a gradient, so that the next one reads what the parts hold then."""
    modules: Iterable[Any] = objective.modules()
    for module in modules:
        if hasattr(module, "reshard"):  # FSDP2's
            module.reshard()


def _tensor_parallel(model: GPT, mesh: DeviceMesh) -> None:
    """Heads, hidden columns and rows of the vocabulary on several ranks; between them each has some positions of the stream."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor import parallel as styles

    def normed(path: str, dim: int = 1) -> dict[str, styles.ParallelStyle]:
        """A norm of divided positions (or heads); without weights it needs no telling."""
        there = [*model.get_submodule(path).parameters()]
        return {path: styles.SequenceParallel(sequence_dim=dim, use_local_output=True)} if there else {}

    row, divided = (lambda: styles.RowwiseParallel(output_layouts=Shard(1))), Shard(1)
    plan: dict[str, styles.ParallelStyle] = {
        "model.embed_tokens": styles.RowwiseParallel(input_layouts=Replicate()),
        # Positions are added to the whole stream, then it is divided.
        "model.dropout": styles.PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=divided, use_local_output=True
        ),
        "lm_head": styles.ColwiseParallel(),
        **normed("model.norm"),
    }
    for i in range(model.config.n_layer):
        here = f"model.layers.{i}"
        for name in BLOCKS[model.config.norm_at].norms:
            plan |= normed(f"{here}.{name}")
        given, wanted = (divided, None, None, None, None), (Replicate(), None, None, None, None)
        plan[f"{here}.self_attn"] = styles.PrepareModuleInput(
            input_layouts=given, desired_input_layouts=wanted, use_local_output=True
        )
        plan[f"{here}.mlp"] = styles.PrepareModuleInput(
            input_layouts=divided, desired_input_layouts=Replicate(), use_local_output=True
        )
        plan |= normed(f"{here}.self_attn.q_norm", 2) | normed(f"{here}.self_attn.k_norm", 2)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            if name != "mlp.gate_proj" or model.config.gated:
                plan[f"{here}.{name}"] = styles.ColwiseParallel()
        plan[f"{here}.self_attn.o_proj"], plan[f"{here}.mlp.down_proj"] = row(), row()
    styles.parallelize_module(model, mesh, plan)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight

    def gathered(module: nn.Module, given: Any, features: Tensor) -> Tensor:
        """All positions; the gradient that comes back is each rank's share, since each has some of the head's rows."""
        whole = DTensor.from_local(features, mesh, [divided], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    model.model.register_forward_hook(gathered)


class Fused(Whole):
    """The head's arithmetic between its products compiled by itself: passes over a chunk of logits become few."""

    def __init__(self) -> None:
        self.compiled = torch.compile(Whole.bent, dynamic=False)

    def bent(
        self, logits: Tensor, targets: Tensor, softcap: float | None, slope: Tensor | None, vocabulary: Whole
    ) -> Tensor:
        found = Whole.bent if slope is None else self.compiled
        return found(logits, targets, softcap, slope, vocabulary)


def _compile(block: Any, compile: bool) -> None:
    """Have the compiler make the block's code when it is first called, or leave it as it is written."""
    block._compiled_call_impl = None
    if getattr(block.mlp, "activation", None) in (gelu_tanh, gelu_by_sigmoid):
        block.mlp.activation = gelu_by_sigmoid if compile else gelu_tanh
    if compile:
        block.compile(dynamic=False)
        block._compiled_call_impl = partial(_where_learned, block._compiled_call_impl, block._call_impl)


def equipped(reference: GPT, model: GPT) -> None:
    """`reference`, which is of the shape of `model`, computes with its kernels: what both say of a text can be compared."""
    reference.model.flex = model.model.flex
    block: Any
    like: Any
    for block, like in zip(reference.model.layers.children(), model.model.layers.children(), strict=True):
        if (block._compiled_call_impl is None) != (like._compiled_call_impl is None):
            _compile(block, like._compiled_call_impl is not None)


def _where_learned(compiled: Callable[..., Tensor], plain: Callable[..., Tensor], *given: Any) -> Tensor:
    """Evaluations meet shapes of their own, which take longer to compile than to compute. A frozen reference is not one."""
    return (plain if torch.is_inference_mode_enabled() else compiled)(*given)


def applied(
    objective: Objective,
    *,
    compile: bool,
    checkpointing: str = "none",
    ranks: Ranks | None = None,
) -> Forward:
    """The function that training calls in place of `objective`; it shares the objective's parameters.

    The order matters: 1. tensor parallelism (`in_parts`), 2. blocks are told what to keep, 3. the compiler sees them, 4. FSDP2
    (`in_parts`, whose hooks the compiler leaves outside) or DDP around what was compiled.

    Blocks are alike, so that one is compiled for all: a fourth of the time that compiling the whole takes, and the step is as
    fast (measured: docs/experiments.md).
    """
    in_parts = ranks is not None and ranks.n.in_parts
    if compile:
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # the compiler learns it here
    block: Any
    for block in objective.model.model.layers.children():
        block.__dict__.pop("forward", None)
        if checkpointing != "none":
            block.forward = partial(recomputed, checkpointing, block.forward)
        _compile(block, compile)
    forward: Any = objective
    if isinstance(objective, NextToken) and type(objective.vocabulary) in (Whole, Fused):
        objective.vocabulary = Fused() if compile else WHOLE
    if ranks is not None and not (ranks.alone or ranks.canonical or in_parts):
        gc.collect()  # of one that was made before, to measure, the hooks go with it
        torch._dynamo.config.optimize_ddp = (
            False  # or blocks are cut for its buckets, which wait for whole blocks anyway
        )
        forward = DistributedDataParallel(forward, **BUFFERS_STAY, gradient_as_bucket_view=True)
        if not next(objective.parameters()).is_cuda:
            forward.register_comm_hook(ranks.team.size, _averaged)
    return forward


def _averaged(size: int, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """The bucket's gradients averaged over ranks, each by itself, so that their bits do not depend on what shares the bucket.

    Rings add a number's parts in an order that goes by its place among what is sent, and DDP deals buckets anew after its
    first update: with sums of whole buckets a resumed run would round otherwise than one that was never stopped.
    """
    sums = [distributed.all_reduce(g.div_(size), async_op=True) for g in bucket.gradients()]
    for each in sums:
        each.wait()
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def flexible(model: GPT) -> None:
    """Attention inside documents and windows by FlexAttention, whose kernel skips the blocks that a mask hides.

    Compiled once for each shape, of which every source that is evaluated brings one, its last batch; past torch's own limit
    of eight it would write all scores out.
    """
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    model.model.flex = torch.compile(flex_attention, dynamic=False)


def hiding_kernel(model: GPT) -> tuple[str, str]:
    """The kernel for attention inside documents or windows on this model's device, "flex" or "dense", and why; `flexible` if
    it is flex.

    The model's gradients are gone when this returns. Of a model in parts a block of its kind is tried. FlexAttention
    and not varlen_attn: it takes rows as they are, groups of heads (varlen: from torch 2.12 on) and windows, needs no number
    of documents on the host, and its masks are tried on a CPU.
    """
    if is_divided(model.lm_head.weight):
        small = model.config.model_copy(update={"n_layer": 1, "nope_layers": (), "full_layers": (), "vocab_size": 64})
        kernel, why = hiding_kernel(GPT(small).to(model.lm_head.weight.device))
        if kernel == "flex":
            flexible(model)
        return kernel, why
    device_of = model.lm_head.weight.device
    if device_of.type != "cuda":
        return "dense", f"a mask of every pair: FlexAttention trains on CUDA, this is {device_of.type}"
    if model.config.position == "relative" or model.config.prefix_lm:
        return "dense", "a mask of every pair, since scores have a bias or prompts are seen both ways"
    flexible(model)
    n_tokens = min(PROBE, model.model.max_seq_len)
    ids = torch.zeros(1, n_tokens, dtype=torch.int64, device=device_of)
    try:
        with torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16):
            NextToken(model)(ids, ids, ids, torch.arange(n_tokens, device=device_of)[None] // 100).backward()
    except (RuntimeError, ImportError, ValueError) as error:
        model.model.flex = None
        return "dense", f"a mask of every pair: FlexAttention failed here: {signals.reason(error)}"
    finally:
        model.zero_grad(set_to_none=True)
    return "flex", "FlexAttention, which skips what the mask hides"


@contextmanager
def preferring(kernel: str) -> Iterator[None]:
    """Within it torch's fused attention tries `kernel` of `ORDERS` first; "any": in torch's own order.

    It is the process's state, set around whole updates: nothing is asked in a call or in a compiled graph. Code that the
    compiler keeps on disk does not know under which order it was made, so it is told.
    """
    if kernel == "any":
        yield
        return
    told = compiler.patch(cache_key_tag=f"attention: {kernel}")  # type: ignore[attr-defined]
    with sdpa_kernel(ORDERS[kernel], set_priority=True), told:
        yield


def fused_kernel(config: ModelConfig, device: str, dtype: torch.dtype, seq_len: int) -> tuple[str, str]:
    """Which of torch's fused kernels causal attention tries first (`ORDERS`; "any": torch's own order), and why.

    Known on all but Hopper: cuDNN's lost to Flash on Ampere, Ada and Blackwell and won on Hopper (transformers, pull request
    48163), where both are tried on this model's heads and timed, a fraction of a second.
    """
    if not device.startswith("cuda"):
        return "any", f"torch's own choice on {device}"
    if dtype == torch.float32:
        return "any", "torch's own choice in float32"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "flash", "Flash first: cuDNN's is faster on Hopper alone"
    seconds, whys = {}, []
    shape = max(1, 8192 // seq_len), config.n_head, config.n_group, seq_len, config.d_head
    for kernel in ORDERS:
        try:
            seconds[kernel] = _timed_attention(kernel, shape, device, dtype)
            whys.append(f"{kernel} {1000 * seconds[kernel]:.2f} ms")
        except (RuntimeError, ValueError) as error:
            whys.append(f"{kernel} failed: {signals.reason(error)}")
    told = f"{', '.join(whys)} forwards and backwards"
    if not seconds:
        return "any", told
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] * FASTER < seconds.get("flash", math.inf) else "flash", told


def _timed_attention(kernel: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> float:
    """Median seconds of causal attention forwards and backwards; ValueError if it is not what the formula gives."""
    B, H, G, T, D = shape
    draw = torch.Generator(device).manual_seed(0)

    def normal(heads: int, n_tokens: int = T) -> Tensor:
        return torch.randn(B, n_tokens, heads, D, generator=draw, device=device, dtype=dtype).transpose(1, 2)

    q, k, v, slope = (normal(heads).requires_grad_() for heads in (H, G, G, H))
    times = []
    with preferring(kernel):
        few = [x[:1, :, :PROBE].detach().requires_grad_() for x in (q, k, v)]
        given = *few, slope.detach()[:1, :, :PROBE]
        ours, exact = _attention(*given), _attention(*(x.detach().float().requires_grad_() for x in given))
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
        if not apart < 0.02:
            raise ValueError(f"it is {apart:.1%} off the exact values")
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _attention(q, k, v, slope.detach())
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def _attention(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> list[Tensor]:
    """Causal attention and the gradients of its inputs."""
    answer = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return [answer, *torch.autograd.grad(answer, (q, k, v), slope)]
