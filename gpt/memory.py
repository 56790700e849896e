"""What a run needs of memory, before there is a run: its update gone through by tensors that have shapes and no storage.

Nothing is estimated by a formula of its own, so nothing can drift: the model, the objective, the adapter and the optimizer
are the run's, and what they hold is counted as it comes and goes. Blocks are alike, so that two of them tell about all.
"""

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt import adapters, loss, parallel, quantize, runtime
from gpt.adapters import AdapterConfig
from gpt.attention import Mask
from gpt.loss import NextToken, Objective, ObjectiveConfig, Preferences
from gpt.model import GPT, ModelConfig
from gpt.optim import OptimConfig, Optimizer

SPARE = 0.1  # of the memory, left to what no tensor of ours holds: the GPU's context, kernels' work space, gaps
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # torchao's: elements of the least matrix, and of a block with one scale
EIGHT_BIT_STEP = 54  # bytes an element of the largest matrix while torchao takes its step (measured)
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PARTS = {  # of the parameters: what stands in a name
    "embeddings": r"embed_tokens|position",
    "head": r"lm_head",
    "norms": r"norm",
    "attention": r"self_attn",
    "MLP": r"mlp",
}


@dataclass(frozen=True)
class Need:
    """Bytes. `activations` wait for their gradient; `work` comes on top of them for a moment: logits, one block's backward.

    `step` is what the optimizer takes on top, when there are no activations any more.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + max(self.activations + self.work, self.step)


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that were made since it was entered, for as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if storage._cdata not in given | self.known:
                    self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


class _Fused(torch.autograd.Function):
    """What a fused attention kernel holds: its inputs, its answer and a sum for each query, never the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answer = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, answer, q.new_empty(q.shape[:3], dtype=torch.float32))
        return answer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return _Fused.apply(q, k, v)


@contextmanager
def _as_on(device: str) -> Iterator[None]:
    """The loss takes as many logits at once as it will on `device`: tensors without storage all stand on the CPU."""
    kind, before = device.partition(":")[0], loss.CHUNK_LOGITS["cpu"]
    loss.CHUNK_LOGITS["cpu"] = loss.CHUNK_LOGITS.get(kind, before)
    try:
        yield
    finally:
        loss.CHUNK_LOGITS["cpu"] = before


@dataclass(frozen=True)
class Setting:
    """What memory depends on, besides the model's shape."""

    rows: int
    seq_len: int
    device: str
    dtype: str
    optim: OptimConfig
    adapter: AdapterConfig | None = None
    checkpointing: str = "none"
    documents: bool = False  # rows hold several, with attention inside each
    objective: ObjectiveConfig = field(
        default_factory=ObjectiveConfig
    )  # of pairs: a row holds seq_len tokens of each side


def need(config: ModelConfig, setting: Setting) -> Need:
    """Bytes that an update of a model of this shape takes, gradients of earlier micro-batches included."""
    if _differ(setting.adapter):
        return _measured(config, setting)
    one, two = (_measured(_shallow(config, depth), setting) for depth in (1, 2))

    def at_depth(name: str) -> int:
        first, second = getattr(one, name), getattr(two, name)
        return first + (config.n_layer - 1) * (second - first)

    return replace(Need(**{part.name: at_depth(part.name) for part in fields(Need)}), work=two.work)


def _differ(adapter: AdapterConfig | None) -> bool:
    """Whether blocks are unlike, so that all must be gone through: a target names its layer."""
    names = () if adapter is None or adapter.targets == "all" else adapter.targets
    return any(part.isdecimal() for name in names for part in name.split("."))


def _shallow(config: ModelConfig, depth: int) -> ModelConfig:
    """The first `depth` blocks."""
    kept = {name: tuple(n for n in getattr(config, name) if n < depth) for name in ("nope_layers", "full_layers")}
    return config.model_copy(update={"n_layer": depth, **kept})


def _dressed(config: ModelConfig, setting: Setting) -> GPT:
    """The model as it is trained: its base as it is kept, its adapter on."""
    model = GPT(config).train()
    if setting.adapter is not None:
        if setting.adapter.base_dtype != "fp32":
            quantize.quantized(model, setting.adapter.base_dtype, quantize.blank)
        adapters.put_on(model, setting.adapter)
    return model


def _measured(shape: ModelConfig, setting: Setting) -> Need:
    """`need` of a model so shallow that it is gone through."""
    activations, work = _passed(shape, replace(setting, optim=OptimConfig()))
    with FakeTensorMode():
        model = _dressed(shape, setting)
        held = {
            _storage(tensor)._cdata: _storage(tensor).nbytes() for tensor in (*model.parameters(), *model.buffers())
        }
        trained = _trained(model)
        state, step = _optimizer(model, trained, setting.optim)
        copies = 2 if setting.objective.kind == "dpo" and setting.adapter is None else 1  # the reference is one
        return Need(
            weights=copies * sum(held.values()),
            gradients=sum(_bytes(parameter) for parameter in trained),
            optimizer=state,
            activations=activations,
            work=work,
            step=step,
        )


@lru_cache
def _passed(shape: ModelConfig, setting: Setting) -> tuple[int, int]:
    """(bytes that wait for the backward pass, most bytes on top of them) of one forward and backward pass."""
    with FakeTensorMode(), _as_on(setting.device):
        model = reference = _dressed(shape, setting)
        if setting.objective.kind == "dpo" and setting.adapter is None:
            reference = GPT(shape).eval().requires_grad_(False)
        if setting.device.startswith("cuda") and shape.position != "relative":  # a bias needs the scores
            for each in (model, reference):
                each.model.mask = lambda *_: Mask(flex=_fused)  # type: ignore[method-assign]
        objective = _objective(model, reference, setting)
        forward = parallel.applied(objective, compile=False, checkpointing=setting.checkpointing)
        of_pairs = setting.objective.of_pairs
        row = torch.zeros(setting.rows, setting.seq_len * (2 if of_pairs else 1), dtype=torch.int64)
        _give_gradients(_trained(model))
        with Alive() as alive:
            with runtime.autocast("cpu", setting.dtype):
                nats = forward(*[row] * (4 if setting.documents or of_pairs else 2))
            activations = alive.now
            nats.backward()
        return activations, alive.peak - activations


def _objective(model: GPT, reference: GPT, setting: Setting) -> Objective:
    """What is minimized, as `settle.objective` puts it around the model."""
    if not setting.objective.of_pairs:
        return NextToken(model)
    if setting.objective.kind == "simpo":
        return Preferences(model, setting.objective, None)
    return Preferences(model, setting.objective, partial(_frozen, model, reference))


@contextmanager
def _frozen(model: GPT, reference: GPT) -> Iterator[GPT]:
    """`reference`; where that is the model itself, without its adapter."""
    with adapters.off(model) if reference is model else nullcontext():
        yield reference


def _optimizer(model: GPT, trained: Sequence[Tensor], config: OptimConfig) -> tuple[int, int]:
    """(bytes of its state, most bytes on top during a step), of the parameters that are trained."""
    optimizer = Optimizer(model, config.model_copy(update={"state": "fp32"}))
    _give_gradients(trained)
    optimizer.step(1.0)  # makes the state
    _give_gradients(trained)
    with Alive() as alive:
        optimizer.step(1.0)
    state = sum(_bytes(tensor) for tensor in optimizer.state().values())
    if config.state == "fp32":
        return state, alive.peak
    sizes = [p.numel() for p, name in optimizer.names.items() if p.dim() == 2 and ".layers." in name]
    packed = [n for n in sizes if n >= EIGHT_BIT_FROM and n % EIGHT_BIT_BLOCK == 0]  # torchao leaves the others alone
    per_matrix = sum(2 * (n + 4 * n // EIGHT_BIT_BLOCK + 4 * 256) for n in packed)
    return state - 8 * sum(packed) + per_matrix, EIGHT_BIT_STEP * max(packed, default=0)


def _trained(model: GPT) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _give_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def parameters(config: ModelConfig, setting: Setting) -> dict[str, int]:
    """How many parameters each part has; what an adapter trains stands apart, a tied head has none.

    The adapter's base is as `base_dtype` fp32 has it: with its parameters.
    """
    counts: list[dict[str, int]] = []
    depths = (config.n_layer,) if _differ(setting.adapter) else (1, 2)
    for depth in depths:
        with FakeTensorMode():
            model = _dressed(_shallow(config, depth), setting)
        found = dict.fromkeys([*PARTS, "adapter"], 0)
        for name, parameter in model.named_parameters():
            part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
            found["adapter" if setting.adapter and parameter.requires_grad else part] += parameter.numel()
        counts.append(found)
    return {part: n + (config.n_layer - depths[0]) * (counts[-1][part] - n) for part, n in counts[0].items()}


def size(text: str) -> int:
    """Bytes of "12GB", "800MB" or "11.5GiB"; ValueError for another form."""
    match = re.fullmatch(r"([\d.]+) *([KMG]I?B)", text.strip().upper())
    try:
        return int(float(match[1]) * UNITS[match[2]]) if match else int(text)
    except (ValueError, OverflowError):
        raise ValueError(f"'{text:.40}' is no size of a memory; write it like 12GB, 11.5GiB or 800MB") from None
