"""What is applied to a finished objective: many ranks, less memory, compilation, a kernel for document masks.

The model never knows.
"""

import gc
import inspect
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gpt.loss import NextToken, Objective, Preferences, Whole, nats
from gpt.model import BLOCKS, GPT, computed
from gpt.ranks import Forward, Ranks

PROBE = 256  # tokens that show whether a kernel works here
# Every rank computes the same ones; torch 2.13 gave the argument of DDP that says so another name.
NEWER = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
BUFFERS_STAY: dict[str, Any] = {"forward_sync_buffers" if NEWER else "broadcast_buffers": False}


class Split(Whole):
    """The head's rows stand on several ranks, in order."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group, self.rank = mesh.get_group(), mesh.get_local_rank()

    def rows(self, weight: Tensor) -> Tensor:
        return weight.to_local() if isinstance(weight, DTensor) else weight

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


def recomputed(block: nn.Module, *given: Any) -> Tensor:
    """The block's answer; of what its gradient needs only `given` is kept, the rest is computed again (Chen et al. 2016).

    Random numbers are drawn again as they fell, so that dropout hides the same columns.
    """
    if not torch.is_grad_enabled():
        return block(*given)
    return checkpoint(block, *given, use_reentrant=False)


def in_parts(objective: Objective, ranks: Ranks, device: str) -> None:
    """Divide an objective that was made without memory (on "meta") among `ranks`, and give it memory on `device`.

    Its parameters are to be filled in afterwards.
    """
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
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _tensor_parallel(model: GPT, mesh: DeviceMesh) -> None:
    """Heads, hidden columns and rows of the vocabulary on several ranks; between them each has some positions of the stream."""

    def normed(path: str, dim: int = 1) -> dict[str, ParallelStyle]:
        """A norm of divided positions (or heads); without weights it needs no telling."""
        there = [*model.get_submodule(path).parameters()]
        return {path: SequenceParallel(sequence_dim=dim, use_local_output=True)} if there else {}

    row, divided = (lambda: RowwiseParallel(output_layouts=Shard(1))), Shard(1)
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        # Positions are added to the whole stream, then it is divided.
        "model.dropout": PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=divided, use_local_output=True
        ),
        "lm_head": ColwiseParallel(),
        **normed("model.norm"),
    }
    for i in range(model.config.n_layer):
        here = f"model.layers.{i}"
        for name in BLOCKS[model.config.norm_at].norms:
            plan |= normed(f"{here}.{name}")
        given, wanted = (divided, None, None, None, None), (Replicate(), None, None, None, None)
        plan[f"{here}.self_attn"] = PrepareModuleInput(
            input_layouts=given, desired_input_layouts=wanted, use_local_output=True
        )
        plan[f"{here}.mlp"] = PrepareModuleInput(
            input_layouts=divided, desired_input_layouts=Replicate(), use_local_output=True
        )
        plan |= normed(f"{here}.self_attn.q_norm", 2) | normed(f"{here}.self_attn.k_norm", 2)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            if name != "mlp.gate_proj" or model.config.gated:
                plan[f"{here}.{name}"] = ColwiseParallel()
        plan[f"{here}.self_attn.o_proj"], plan[f"{here}.mlp.down_proj"] = row(), row()
    parallelize_module(model, mesh, plan)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight

    def gathered(module: nn.Module, given: Any, features: Tensor) -> Tensor:
        """All positions; the gradient that comes back is each rank's share, since each has some of the head's rows."""
        whole = DTensor.from_local(features, mesh, [divided], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    model.model.register_forward_hook(gathered)


def applied(objective: Objective, *, compile: bool, checkpointing: str = "none", ranks: Ranks | None = None) -> Forward:
    """The function that training calls in place of `objective`; it shares the objective's parameters.

    The order matters: 1. tensor parallelism (`in_parts`), 2. blocks are told what to keep, 3. the compiler sees them, 4. FSDP2
    (`in_parts`, whose hooks the compiler leaves outside) or DDP around what was compiled.
    """
    objective.model.model.through = {"none": computed, "full": recomputed}[checkpointing]
    if isinstance(objective, Preferences):
        objective.nats = nats
    forward: Any = objective
    if compile:
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # the compiler learns it here
    if ranks is not None and ranks.n.in_parts:
        for block in objective.model.model.layers.children():
            if compile:
                block.compile(dynamic=False)
            else:
                block._compiled_call_impl = None
    elif compile and isinstance(objective, Preferences):  # the reference comes and goes between two calls of it
        objective.nats = torch.compile(nats, dynamic=False)
    elif compile:
        forward = torch.compile(objective, dynamic=False)
    if ranks is not None and not (ranks.alone or ranks.canonical or ranks.n.in_parts):
        gc.collect()  # of one that was made before, to measure, the hooks go with it
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
    """Attention inside documents by FlexAttention, whose kernel skips the blocks that a mask hides."""
    model.model.flex = torch.compile(flex_attention, dynamic=False)


def document_kernel(model: GPT, device: str | None = None) -> tuple[str, str]:
    """The kernel for attention inside documents on this model's device, "flex" or "dense", and why; `flexible` if it is flex.

    The model's gradients are gone when this returns. Of a model in parts a block of its kind is tried, on `device`.
    """
    if isinstance(model.lm_head.weight, DTensor):
        small = model.config.model_copy(update={"n_layer": 1, "nope_layers": (), "full_layers": (), "vocab_size": 64})
        kernel, why = document_kernel(GPT(small).to(device or model.lm_head.weight.device))
        if kernel == "flex":
            flexible(model)
        return kernel, why
    device_of = model.lm_head.weight.device
    if device_of.type != "cuda":
        return "dense", f"a mask of every pair: FlexAttention trains on CUDA, this is {device_of.type}"
    flexible(model)
    n_tokens = min(PROBE, model.model.max_seq_len)
    ids = torch.zeros(1, n_tokens, dtype=torch.int64, device=device_of)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            NextToken(model)(ids, ids, ids, torch.arange(n_tokens, device=device_of)[None] // 100).backward()
    except (RuntimeError, ImportError, ValueError) as error:
        model.model.flex = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return "dense", f"a mask of every pair: FlexAttention failed here: {reason}"
    finally:
        model.zero_grad(set_to_none=True)
    return "flex", "FlexAttention, which skips what the mask hides"
