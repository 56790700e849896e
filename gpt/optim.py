"""Optimizers: which rule updates which parameter. AdamW for all, or Muon or 8-bit AdamW for the blocks' matrices beside it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gpt import runtime, schedule
from gpt.config import Count, Settings

PARTS = ("codes", "scale", "qmap")  # of an 8-bit state: a byte an element, a number a block of 256, what a byte means
PLAIN = "plain"  # stands beside a parameter's states, and is none: the weights as they are trained (`averages`)


class OptimConfig(Settings):
    """How parameters move."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the blocks' matrices, AdamW for all else"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate (of Muon's matrices with kind muon)")
    adamw_lr: float | None = Field(
        None, gt=0, description="with muon: peak learning rate of AdamW's share; null: 0.003"
    )
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled decay of the blocks' matrices and the untied head, times lr"
    )
    cautious: bool = Field(
        False, description="with muon: its matrices decay only where the update makes a weight smaller too"
    )
    scheduled_decay: bool = Field(
        False,
        description="weight_decay follows the schedule as lr does, so that the decay of a step goes by their product",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's averages")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    momentum_warmup: Count = Field(
        0, ge=0, description=f"updates over which Muon's momentum rises from {schedule.MOMENTUM}; 0: none"
    )
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null: no clipping")
    state: Literal["fp32", "8bit"] = Field(
        "fp32", description="AdamW's averages of the blocks' matrices; 8bit: by torchao (pip install torchao)"
    )
    ema: float | None = Field(
        None,
        gt=0,
        description="half-life of an average of the weights, which is then what is evaluated and saved: a fraction of the steps "
        "if below 1, else steps; null: the weights themselves",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "adamw" and self.adamw_lr is not None:
            raise ValueError(f"adamw_lr ({self.adamw_lr}) is for kind 'muon'; with kind 'adamw' set lr alone")
        if self.kind == "adamw" and (self.cautious or self.momentum_warmup):
            name = "cautious" if self.cautious else f"momentum_warmup ({self.momentum_warmup})"
            raise ValueError(f"{name} is for kind 'muon', not 'adamw'")
        if self.ema is not None and 0.5 < self.ema < 1:
            steps = round(math.log(0.5) / math.log(self.ema))
            raise ValueError(
                f"ema ({self.ema}) is a half-life, below 1 a fraction of the steps; to keep {self.ema} of the average an update "
                f"set ema: {steps}"
            )
        if self.kind == "muon" and self.state != "fp32":
            raise ValueError(
                f"state ({self.state}) is for kind 'adamw': Muon's momentum stays fp32, and so do AdamW's averages beside it"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


def orthogonalize(g: Tensor) -> Tensor:
    """About the semi-orthogonal matrices nearest to g (N, rows, cols): 5 Newton-Schulz steps in its dtype (Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Here:
    """How an optimizer reaches parameters that are all here, whole; `parts.Parts` is the other kind."""

    def handles(self, model: nn.Module) -> dict[Tensor, str]:
        """What an optimizer moves, by parameter: its memory, with a gradient of its own after `take`."""
        return {p: name for name, p in model.named_parameters()}

    def take(self) -> None:
        """Hand the gradients that the backward pass left over to the handles."""

    def shape(self, handle: Tensor) -> torch.Size:
        """Of the whole parameter."""
        return handle.shape

    def copies(self, name: str) -> int:
        """How many ranks hold each block of a parameter."""
        return 1

    def collect(self, handles: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(handle, whole gradient) of those matrices of one shape whose update is made here; each is somewhere's."""
        return [(handle, handle.grad) for handle in handles if handle.grad is not None]

    def deal(self, handles: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Each handle's part of its update; `updates` are of those that `collect` gave."""
        return updates


HERE = Here()


class Rule:
    """Parameters in groups, and their state: the part of torch.optim.Optimizer that is asked for.

    The class itself imports the compiler, to tell it about optimizers, the first time it is used: half a second of each start.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.param_groups = [dict(group) for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(Rule):
    """AdamW (Loshchilov and Hutter 2019) by torch's fused kernel, which divides gradients by `grad_scale` on its way."""

    grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            states = [self._state(parameter) for parameter in moving]
            kinds = {kind: [state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq", "step")}
            adamw(
                moving,
                [p.grad for p in moving],
                kinds["exp_avg"],
                kinds["exp_avg_sq"],
                [],
                kinds["step"],
                fused=True,
                grad_scale=self.grad_scale,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # where the kernel wants it
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


class Muon(Rule):
    """Nesterov momentum, orthogonalized (Jordan et al. 2024); equal shapes are stacked: many small products become few.

    Queries, keys and values are matrices of their own, as they are in memory whatever file a model came from. The step is
    lr * max(1, rows / cols)^0.5 as in torch.optim.Muon's "original"; decay is decoupled and, where `cautious`, left out where
    the update would make a weight larger (Chen et al. 2025). Gradients are overwritten.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        here: Here = HERE,
        *,
        cautious: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__([{"params": params, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}])
        self.here, self.cautious = here, cautious
        first = params[0].device
        # Of products that need no more than some bits; float16 has no room for a gradient's small numbers.
        self.dtype = torch.bfloat16 if runtime.best_dtype(str(first))[0] == "bfloat16" else torch.float32
        self.orthogonalize = runtime.compiled(orthogonalize) if compile and first.type == "cuda" else orthogonalize

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(self.here.shape(parameter), []).append(parameter)
            for (rows, cols), parameters in shapes.items():
                moved = self._moved(self.here.collect(parameters), group["momentum"])
                whole = list(self._orthogonal(moved).to(parameters[0].dtype)) if moved else []
                updates = self.here.deal(parameters, whole)
                self._decay(parameters, updates, group["lr"] * group["weight_decay"])
                step_size = group["lr"] * max(1, rows / cols) ** 0.5
                torch._foreach_add_(parameters, updates, alpha=-step_size)

    def _moved(self, collected: list[tuple[Tensor, Tensor]], momentum: float) -> list[Tensor]:
        """Where each gradient goes with its momentum, in the gradient's memory."""
        if not collected:
            return []
        buffers, gradients = [], [gradient for _, gradient in collected]
        for parameter, gradient in collected:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)
        return gradients

    def _orthogonal(self, matrices: list[Tensor]) -> Tensor:
        stack = matrices[0].new_empty((len(matrices), *matrices[0].shape), dtype=self.dtype)
        torch._foreach_copy_(list(stack), matrices)
        return self.orthogonalize(stack)

    def _decay(self, parameters: list[Tensor], updates: list[Tensor], rate: float) -> None:
        if not self.cautious:
            torch._foreach_mul_(parameters, 1 - rate)
        elif rate:
            agree = torch._foreach_mul(parameters, updates)
            torch._foreach_sign_(agree)
            torch._foreach_clamp_min_(agree, 0.0)
            torch._foreach_addcmul_(parameters, parameters, agree, value=-rate)


@contextmanager
def _shortened(part: Rule, shrink: Tensor | None) -> Iterator[None]:
    """Within, a step of `part` sees its gradients times `shrink`. The fused kernel does that on its way, as for a loss scale;
    that of Apple's GPUs only since torch 2.13 (pull request 186360)."""
    if shrink is None:
        yield
    elif isinstance(part, AdamW) and shrink.device.type != "mps":
        part.grad_scale = shrink.reciprocal()
        try:
            yield
        finally:
            part.grad_scale = None
    else:
        gradients = [p.grad for group in part.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, shrink)
        yield


def _torchao() -> Any:
    """torchao's optimizers; ValueError where they are not installed."""
    try:
        with runtime.hushed():
            from torchao import optim
            from torchao.optim import subclass_8bit
    except ImportError as error:
        raise ValueError(
            f"optim.state=8bit needs torchao, which cannot be loaded here ({error}): pip install 'torchao>=0.18', or set "
            "optim.state=fp32"
        ) from None
    return optim.AdamW8bit, subclass_8bit.OptimState8bit


class Optimizer:
    """The optimizers of one model behind the few calls a trainer needs; state is keyed by parameter name."""

    def __init__(self, model: nn.Module, config: OptimConfig, here: Here = HERE, *, compile: bool = False) -> None:
        self.names: dict[Tensor, str] = {p: name for p, name in here.handles(model).items() if p.requires_grad}
        self.config, self.here = config, here
        self.parts = list(_build(self.names, config, here, compile))
        self.around: Callable[[], AbstractContextManager[None]] = (
            runtime.uncompiled if config.state == "8bit" else nullcontext
        )
        self.peaks = [[(float(g["lr"]), g["weight_decay"]) for g in part.param_groups] for part in self.parts]

    def step(self, factor: float, update: int | None = None, norm: Tensor | None = None) -> None:
        """Update every parameter from its gradient at `factor` times the peak learning rates; drop the gradients.

        `update`: which it is, counted from 1; None is one after all warming up. `norm`: of all gradients together, which are
        made shorter where that is above `clip`; None leaves them as they are.
        """
        shrink = self._shrink(norm)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, (lr, weight_decay) in zip(part.param_groups, peaks, strict=True):
                if isinstance(group["lr"], Tensor):  # torchao's, which wants the same tensor filled
                    group["lr"].fill_(lr * factor)
                else:
                    group["lr"] = lr * factor
                group["weight_decay"] = weight_decay * (factor if self.config.scheduled_decay else 1.0)
                if "momentum" in group:
                    group["momentum"] = schedule.momentum(self.config.momentum, self.config.momentum_warmup, update)
            with self.around(), _shortened(part, shrink):
                part.step()
            part.zero_grad()

    def _shrink(self, norm: Tensor | None) -> Tensor | None:
        """What gradients are to be multiplied with; None where that is known, without waiting for a device, to be nothing."""
        if norm is None or self.config.clip is None or self._within(norm, self.config.clip):
            return None
        device = next(iter(self.names)).device
        return (self.config.clip / (norm.to(device, torch.float32, non_blocking=True) + 1e-6)).clamp(max=1.0)

    def _within(self, norm: Tensor, limit: float) -> bool:
        """Whether it is known, without waiting for a device, that nothing is to be made shorter."""
        return norm.device.type == "cpu" and bool(norm <= limit)

    def drop(self) -> None:
        """Forget the gradients: no update is made from them."""
        for part in self.parts:
            part.zero_grad()

    def reset(self) -> None:
        """As before the first step."""
        self.drop()
        for part in self.parts:
            part.state.clear()

    def state(self) -> dict[str, Tensor]:
        """Every state tensor as "parameter name:state name"; shared, not copied. An 8-bit one is three, "name.codes" and so on.

        In the order of the parameters and then of the names, however the state came to be: what is written of it is the same.
        """
        states = {parameter: values for part in self.parts for parameter, values in part.state.items()}
        return {
            f"{name}:{kind}{suffix}": tensor
            for parameter, name in self.names.items()
            for kind, value in sorted(states.get(parameter, {}).items())
            for suffix, tensor in _plain(value)
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned; shapes and names must be this model's.

        Where a parameter is held in parts, `tensors` are those of this part; a momentum of Muon's is whole.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        owners = {
            parameter: part for part in self.parts for group in part.param_groups for parameter in group["params"]
        }
        for key in tensors:
            name, _, kind = key.rpartition(":")
            if kind == PLAIN:
                continue
            value = tensors[key]
            if name not in parameters:
                raise ValueError(f"optimizer state '{key}' belongs to no parameter of this model")
            parameter = parameters[name]
            kind, _, piece = kind.partition(".")
            shape = self.here.shape(parameter) if kind == "momentum_buffer" else parameter.shape
            if value.dim() and piece in ("", PARTS[0]) and value.shape != shape:
                raise ValueError(
                    f"optimizer state '{key}' has shape {tuple(value.shape)}, the parameter {tuple(shape)}"
                )
            state = owners[parameter].state[parameter]
            if not piece:
                # AdamW keeps its step count on the CPU or, fused, on the parameter's device; both take a copy there.
                state[kind] = value.to(parameter.device).clone()
            elif piece == PARTS[0]:
                pieces = (tensors[f"{name}:{kind}.{part}"].to(parameter.device).clone() for part in PARTS)
                state[kind] = _torchao()[1](*pieces, kind == "exp_avg", parameter.dtype)


def _plain(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(suffix of its name, tensor) for the tensors that a state is made of."""
    if hasattr(value, PARTS[0]):
        yield from ((f".{part}", getattr(value, part)) for part in PARTS)
    else:
        yield "", value


def _build(names: Mapping[Tensor, str], config: OptimConfig, here: Here, compile: bool) -> Iterator[Rule]:
    """Matrices of the blocks (and an untied head) decay; norms, biases and embeddings do not.

    Embeddings and head keep 32-bit averages (Dettmers et al. 2022, section 2.3).
    """
    blocks = [p for p, name in names.items() if p.dim() == 2 and ".layers." in name]
    head = [p for p, name in names.items() if name == "lm_head.weight"]
    rest = [p for p, name in names.items() if not (p.dim() == 2 and ".layers." in name) and name != "lm_head.weight"]
    adamw_lr = config.lr if config.kind == "adamw" else config.adamw_lr or 3e-3
    apart = config.kind == "muon" or config.state == "8bit"
    decaying = head if apart else blocks + head
    how = {"lr": adamw_lr, "betas": config.betas}
    decayed: list[tuple[list[Tensor], float]] = [(rest, 0.0), (decaying, config.weight_decay)]
    if groups := [{"params": each, "weight_decay": decay, **how} for each, decay in decayed if each]:
        yield AdamW(groups)
    if not blocks:  # an adapter on the head alone
        return
    if config.kind == "muon":
        asked: dict[str, Any] = {"cautious": config.cautious, "compile": compile}
        yield Muon(blocks, config.lr, config.momentum, config.weight_decay, here, **asked)
    if config.state == "8bit":
        yield _torchao()[0](blocks, config.lr, config.betas, weight_decay=config.weight_decay)
