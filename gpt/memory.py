"""What a run needs of memory, before there is a run: its update gone through by tensors that have shapes and no storage.

Nothing is estimated by a formula of its own, so nothing can drift: the model, the objective, the adapter and the optimizer
are the run's, and what they hold is counted as it comes and goes. Blocks are alike, so that two of them tell about all.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
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
from gpt.attention import Mask, every_head, needs_every_head
from gpt.loss import ObjectiveConfig
from gpt.model import GPT, ModelConfig
from gpt.operations import Tally
from gpt.optim import OptimConfig, Optimizer
from gpt.ranks import Ranks

LOOK = torch.ops.prim.device.default
HOLES = 0.4  # on a CPU: glibc's heap, full of small blocks that stay (docs/planning.md)
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

    `step` is what the optimizer takes on top, when there are no activations any more. `summed`: gradients are added to those
    of earlier micro-batches; those of a single one come as the activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    step: int
    summed: bool = True
    holes: float = 0.0  # of what comes and goes in a pass, what an allocator cannot use again
    reference: int = 0  # the model that answers are compared with: many devices hold it whole each

    @property
    def total(self) -> int:
        """The most at any moment."""
        amid, after = round((1 + self.holes) * (self.activations + self.work)), self.gradients + self.step
        return (
            self.weights + self.reference + self.optimizer + max(amid + (self.gradients if self.summed else 0), after)
        )


BYTES = tuple(part.name for part in fields(Need) if part.name not in ("summed", "holes"))


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: bytes that wait for the backward pass, most bytes on top of them, and what was called."""

    activations: int
    work: int
    calls: Tally


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that were made since it was entered, for as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.calls = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is LOOK:  # by far the most, and nothing
            return func(*args, **(kwargs or {}))
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if storage._cdata not in given | self.known:
                    self._add(storage)
        self.calls.add(func, args, kwargs, made)
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
    """What a fused attention kernel holds: its inputs, its answer and a sum for each query, never the scores.

    torch's kernel for CPUs stands for it, so that what `parallel.DEAR` keeps is kept here too.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: Tally) -> Tensor:
        answer, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
        ctx.calls = calls
        ctx.save_for_backward(q, k, v, answer, sums)
        return answer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        ctx.calls.attention(q, k)
        return *map(torch.empty_like, (q, k, v)), None


def _fused(calls: Tally, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    if q.shape[1] != k.shape[1] and needs_every_head(q, Mask()):
        k, v = every_head(q, k, v)
    return _Fused.apply(q, k, v, calls)


def _chunk(device: str) -> int:
    """Logits that the loss makes at once on `device`."""
    return loss.CHUNK_LOGITS[device.partition(":")[0]]


@contextmanager
def _as_on(device: str) -> Iterator[None]:
    """The loss takes as many logits at once as it will on `device`: tensors without storage all stand on the CPU."""
    kind, held = device.partition(":")[0], (loss.CHUNK_LOGITS, loss.PIECE_LOGITS)
    before = [each["cpu"] for each in held]
    for each in held:
        each["cpu"] = each[kind]
    try:
        yield
    finally:
        for each, n in zip(held, before, strict=True):
            each["cpu"] = n


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
    summed: bool = True  # an update is several micro-batches
    documents: bool = False  # rows hold several, with attention inside each
    objective: ObjectiveConfig = field(
        default_factory=ObjectiveConfig
    )  # of pairs: a row holds seq_len tokens of each side

    @property
    def apart(self) -> bool:
        """Whether what the model is compared with is a model of its own, not itself without its adapter."""
        return self.objective.compares and self.adapter is None


def need(config: ModelConfig, setting: Setting) -> Need:
    """Bytes that an update of a model of this shape takes."""
    return at_depth(config, [_measured(shape, setting) for shape in samples(config, setting.adapter)])


def needs(config: ModelConfig, setting: Setting) -> Callable[[int], Need]:
    """`need` as a function of the rows of a micro-batch: a straight line from where several chunks of logits are made."""
    first = max(2, -(-3 * _chunk(setting.device) // ((config.vocab_size or 1) * setting.seq_len)))

    def of(rows: int) -> Need:
        if rows <= first + 1:
            return need(config, replace(setting, rows=rows))
        one, two = (need(config, replace(setting, rows=few)) for few in (first, first + 1))
        return _line(one, two, rows - first)

    return of


def at_most(config: ModelConfig, setting: Setting, rows: int) -> int:
    """More bytes than such an update takes, by a count in a second's millionth: where they fit nothing need be gone through."""
    C, F, H, D, T, L = config.d_model, config.d_hidden, config.n_head, config.d_head, setting.seq_len, config.n_layer
    V, sides = config.vocab_size or 0, 2 if setting.objective.of_pairs else 1
    token = L * (4 * (40 * C + 16 * F + 24 * H * D) + 20 * H * T)  # kept for the gradient, if all were fp32
    logits = 8 * min(sides * rows * T * V, _chunk(setting.device))
    once = (
        4 * V * 4 * C + 40 * H * T * T + logits + (1 << 27)
    )  # the head's gradient, a bias of the scores, work in pieces
    parameters = V * C * 2 + (config.max_seq_len or 0) * C + L * (4 * C * H * D + 3 * C * F)
    return sides * rows * T * (token + 80 * C + 8 * T) + once + 32 * sides * parameters


def samples(config: ModelConfig, adapter: AdapterConfig | None = None) -> list[ModelConfig]:
    """The shapes that are gone through to know what a model takes: its first block and its first two, since all are alike."""
    return [config] if _differ(adapter) else [_shallow(config, depth) for depth in (1, min(2, config.n_layer))]


def at_depth(config: ModelConfig, found: list[Need]) -> Need:
    """What the whole model takes, from what its `samples` do."""
    if len(found) == 1:
        return found[0]
    one, two = found
    return replace(_line(one, two, config.n_layer - 1), work=two.work)


def _line(first: Need, second: Need, steps: int) -> Need:
    """Where the line from `first` through `second` is after so many steps."""

    def at(name: str) -> int:
        start = getattr(first, name)
        return start + steps * (getattr(second, name) - start)

    found: dict[str, Any] = {name: at(name) for name in BYTES}
    return replace(first, **found)


def _differ(adapter: AdapterConfig | None) -> bool:
    """Whether blocks are unlike, so that all must be gone through: a target names its layer."""
    names = () if adapter is None or adapter.targets == "all" else adapter.targets
    return any(part.isdecimal() for name in names for part in name.split("."))


def _shallow(config: ModelConfig, depth: int) -> ModelConfig:
    """The first `depth` blocks."""
    kept = {name: tuple(n for n in getattr(config, name) if n < depth) for name in ("nope_layers", "full_layers")}
    return config.model_copy(update={"n_layer": depth, **kept})


def bare(config: ModelConfig, adapter: AdapterConfig | None = None) -> GPT:
    """The model as it is trained, of tensors without storage."""
    with FakeTensorMode():
        return _dressed(config, adapter)


def _dressed(config: ModelConfig, adapter: AdapterConfig | None) -> GPT:
    """The model as it is trained: its base as it is kept, its adapter on."""
    model = GPT(config).train()
    if adapter is not None:
        if adapter.base_dtype != "fp32":
            quantize.quantized(model, adapter.base_dtype, quantize.blank)
        adapters.put_on(model, adapter)
    return model


def _measured(shape: ModelConfig, setting: Setting) -> Need:
    """`need` of a model so shallow that it is gone through."""
    passed, moved = walked(shape, setting), stepped(shape, setting)
    return Need(
        weights=moved.weights,
        gradients=moved.gradients,
        optimizer=moved.state,
        activations=passed.activations,
        work=passed.work,
        step=moved.work,
        summed=setting.summed,
        holes=HOLES if setting.device == "cpu" else 0.0,
        reference=moved.weights if setting.apart else 0,
    )


def walked(shape: ModelConfig, setting: Setting) -> Pass:
    """One forward and backward pass of a model that is gone through whole."""
    return _passed(shape, replace(setting, optim=OptimConfig(), summed=True))


@lru_cache(maxsize=64)
def _passed(shape: ModelConfig, setting: Setting) -> Pass:
    alive = Alive()
    with FakeTensorMode(), _as_on(setting.device):
        model = reference = _dressed(shape, setting.adapter)
        if setting.apart:
            reference = GPT(shape).eval().requires_grad_(False)
        written = shape.position == "relative" or shape.prefix_lm  # a bias, or a mask of every pair, needs the scores
        if setting.device.startswith("cuda") and not written:
            for each in (model, reference):
                each.model.mask = lambda *_: Mask(flex=partial(_fused, alive.calls))  # type: ignore[method-assign]
        objective = loss.around(model, setting.objective, partial(_frozen, model, reference))
        forward = parallel.applied(objective, compile=False, checkpointing=setting.checkpointing)
        of_pairs = setting.objective.of_pairs
        row = torch.zeros(setting.rows, setting.seq_len * (2 if of_pairs else 1), dtype=torch.int64)
        _give_gradients(_trained(model))
        with alive:
            with runtime.autocast("cpu", setting.dtype):
                nats = forward(*[row] * (4 if setting.documents or of_pairs else 2))
            activations = alive.now
            nats.backward()
        return Pass(activations, alive.peak - activations, alive.calls)


@contextmanager
def _frozen(model: GPT, reference: GPT) -> Iterator[GPT]:
    """`reference`; where that is the model itself, without its adapter."""
    with adapters.off(model) if reference is model else nullcontext():
        yield reference


@dataclass(frozen=True)
class Step:
    """An optimizer's step: bytes of the weights, their gradients, its state and what it takes on top; what was called."""

    weights: int
    gradients: int
    state: int
    work: int
    calls: Tally


def stepped(shape: ModelConfig, setting: Setting) -> Step:
    """The step, gradients clipped, of a model that is gone through whole."""
    return _stepped(shape, setting.optim, setting.adapter)


@lru_cache(maxsize=64)
def _stepped(shape: ModelConfig, config: OptimConfig, adapter: AdapterConfig | None) -> Step:
    with FakeTensorMode():
        model = _dressed(shape, adapter)
        held = {_storage(each)._cdata: _storage(each).nbytes() for each in (*model.parameters(), *model.buffers())}
        trained = _trained(model)
        optimizer = Optimizer(model, config.model_copy(update={"state": "fp32"}))
        _give_gradients(trained)
        optimizer.step(1.0)  # makes the state
        _give_gradients(trained)
        with Alive() as alive:
            Ranks().agreed(optimizer, torch.zeros(()))
            before = alive.now
            alive.peak = before
            optimizer.step(1.0)
        weights, gradients = sum(held.values()), sum(map(_bytes, trained))
        state = sum(_bytes(tensor) for tensor in optimizer.state().values())
        state += gradients if config.ema is not None else 0  # the average is as large
        if config.state == "fp32":
            return Step(weights, gradients, state, alive.peak - before, alive.calls)
        sizes = [p.numel() for p, name in optimizer.names.items() if p.dim() == 2 and ".layers." in name]
        packed = [
            n for n in sizes if n >= EIGHT_BIT_FROM and n % EIGHT_BIT_BLOCK == 0
        ]  # torchao leaves the others alone
        per_matrix = sum(2 * (n + 4 * n // EIGHT_BIT_BLOCK + 4 * 256) for n in packed)
        state = state - 8 * sum(packed) + per_matrix
        return Step(weights, gradients, state, EIGHT_BIT_STEP * max(packed, default=0), alive.calls)


def _trained(model: GPT) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _give_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def parameters(config: ModelConfig, adapter: AdapterConfig | None = None) -> dict[str, int]:
    """How many parameters each part has; what an adapter trains stands apart, a tied head has none.

    The adapter's base is as `base_dtype` fp32 has it: with its parameters.
    """
    plain = None if adapter is None else adapter.model_copy(update={"base_dtype": "fp32"})
    counts: list[dict[str, int]] = []
    for shape in samples(config, plain):
        found = dict.fromkeys([*PARTS, "adapter"], 0)
        for name, parameter in bare(shape, plain).named_parameters():
            part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
            found["adapter" if plain and parameter.requires_grad else part] += parameter.numel()
        counts.append(found)
    return {part: n + (config.n_layer - 1) * (counts[-1][part] - n) for part, n in counts[0].items()}


def size(text: str) -> int:
    """Bytes of "12GB", "800MB" or "11.5GiB"; ValueError for another form."""
    match = re.fullmatch(r"([\d.]+) *([KMG]I?B)", text.strip().upper())
    try:
        return int(float(match[1]) * UNITS[match[2]]) if match else int(text)
    except (ValueError, OverflowError):
        raise ValueError(f"'{text:.40}' is no size of a memory; write it like 12GB, 11.5GiB or 800MB") from None
