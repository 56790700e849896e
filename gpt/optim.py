"""Optimizers: which rule updates which parameter. AdamW for all, or Muon or 8-bit AdamW for the blocks' matrices beside it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gpt import runtime
from gpt.config import Settings

PARTS = ("codes", "scale", "qmap")  # of an 8-bit state: a byte an element, a number a block of 256, what a byte means


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
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's averages")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null: no clipping")
    state: Literal["fp32", "8bit"] = Field(
        "fp32", description="AdamW's averages of the blocks' matrices; 8bit: by torchao (pip install torchao)"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "adamw" and self.adamw_lr is not None:
            raise ValueError(f"adamw_lr ({self.adamw_lr}) is for kind 'muon'; with kind 'adamw' set lr alone")
        if self.kind == "muon" and self.state != "fp32":
            raise ValueError(
                f"state ({self.state}) is for kind 'adamw': Muon's momentum stays fp32, and so do AdamW's averages beside it"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


def orthogonalize(g: Tensor) -> Tensor:
    """About the semi-orthogonal matrices nearest to g (N, rows, cols): 5 Newton-Schulz steps in bf16 (Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized (Jordan et al. 2024); equal shapes are stacked: many small products become few.

    The step is lr * max(1, rows / cols)^0.5 as in torch.optim.Muon's "original", decay is decoupled.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, here: Here = HERE
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.here = here

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(self.here.shape(parameter), []).append(parameter)
            for (rows, cols), parameters in shapes.items():
                gradients = self.here.collect(parameters)
                moved = [self._momentum(parameter, gradient, group["momentum"]) for parameter, gradient in gradients]
                whole = list(orthogonalize(torch.stack(moved)).to(parameters[0].dtype)) if moved else []
                updates = self.here.deal(parameters, whole)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                step_size = group["lr"] * max(1, rows / cols) ** 0.5
                torch._foreach_add_(parameters, updates, alpha=-step_size)

    def _momentum(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


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

    def __init__(self, model: nn.Module, config: OptimConfig, here: Here = HERE) -> None:
        self.names: dict[Tensor, str] = {p: name for p, name in here.handles(model).items() if p.requires_grad}
        self.here = here
        self.parts = list(_build(self.names, config, here))
        self.around: Callable[[], AbstractContextManager[None]] = (
            runtime.uncompiled if config.state == "8bit" else nullcontext
        )
        self.peaks = [[float(group["lr"]) for group in part.param_groups] for part in self.parts]

    def step(self, factor: float) -> None:
        """Update every parameter from its gradient at `factor` times the peak learning rates; drop the gradients."""
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                if isinstance(group["lr"], Tensor):  # torchao's, which wants the same tensor filled
                    group["lr"].fill_(peak * factor)
                else:
                    group["lr"] = peak * factor
            with self.around():
                part.step()
            part.zero_grad()

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
        for key, value in tensors.items():
            name, _, kind = key.rpartition(":")
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


def _build(names: Mapping[Tensor, str], config: OptimConfig, here: Here) -> Iterator[torch.optim.Optimizer]:
    """Matrices of the blocks (and an untied head) decay; norms, biases and embeddings do not.

    Embeddings and head keep 32-bit averages (Dettmers et al. 2022, section 2.3).
    """
    blocks = [p for p, name in names.items() if p.dim() == 2 and ".layers." in name]
    head = [p for p, name in names.items() if name == "lm_head.weight"]
    rest = [p for p, name in names.items() if not (p.dim() == 2 and ".layers." in name) and name != "lm_head.weight"]
    adamw_lr = config.lr if config.kind == "adamw" else config.adamw_lr or 3e-3
    apart = config.kind == "muon" or config.state == "8bit"
    decaying = head if apart else blocks + head
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": 0.0}]
    if decaying:
        groups.append({"params": decaying, "weight_decay": config.weight_decay})
    yield torch.optim.AdamW(groups, lr=adamw_lr, betas=config.betas, fused=True)
    if config.kind == "muon":
        yield Muon(blocks, config.lr, config.momentum, config.weight_decay, here)
    if config.state == "8bit":
        yield _torchao()[0](blocks, config.lr, config.betas, weight_decay=config.weight_decay)
