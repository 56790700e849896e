"""The ranks of a run: how many along each axis, what each does of an update and of an evaluation.

World = replicate x shard x tensor. Ranks that differ in `replicate` hold the same blocks of the weights (DDP; with `shard`
HSDP), those that differ in `shard` hold different rows of them and other rows of a batch (FSDP2), those that differ in `tensor`
compute one batch together: heads, hidden columns and vocabulary divided, the residual stream between them by position
(Shoeybi et al. 2019; Korthikanti et al. 2022). Rank = (replicate * n_shard + shard) * n_tensor + tensor.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeGuard, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from gpt import runtime, signals
from gpt.config import Settings
from gpt.model import ModelConfig
from gpt.optim import Optimizer
from gpt.plan import Choices
from gpt.team import Team

if TYPE_CHECKING:  # it takes a second to import, and of one process there is none
    from torch.distributed.tensor import DTensor

Forward = Callable[..., Tensor]  # NextToken.forward's arguments
PATIENCE_S = 600  # with a rank from which nothing is heard
AXES = ("replicate", "shard", "tensor")
T = TypeVar("T")


class ParallelConfig(Settings):
    """How the processes that torchrun starts share the work; their number is the product of the three sizes."""

    replicate: Literal["auto"] | int = Field(
        "auto", description="copies of the model, each of its own rows; auto: what is left"
    )
    shard: Literal["auto"] | int = Field(
        1, description="ranks that share one copy's weights, gradients and averages (FSDP2)"
    )
    tensor: Literal["auto"] | int = Field(
        1, description="ranks that compute the same rows together, each a part of every layer"
    )
    canonical: bool = Field(
        False,
        description="CPU: gradients summed in the order of micro-batches, so that any number of copies logs the same bytes; slow",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {axis: getattr(self, axis) for axis in AXES}
        if len(autos := [axis for axis, size in given.items() if size == "auto"]) > 1:
            raise ValueError(f"one size may be auto, what is left; {' and '.join(autos)} are")
        for axis, size in given.items():
            if size != "auto" and size < 1:
                raise ValueError(f"{axis} ({size}) must be at least 1")
        for axis in ("shard", "tensor"):
            if self.canonical and given[axis] != 1:
                raise ValueError(f"canonical sums are those of whole copies: set {axis}=1, or canonical=false")
        return self


class Sizes(NamedTuple):
    """Ranks along each axis."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def n_data(self) -> int:
        """Ranks, or groups of them, that read rows of their own."""
        return self.replicate * self.shard

    @property
    def in_parts(self) -> bool:
        """Whether a rank holds a part of the model only."""
        return self.shard * self.tensor > 1


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def sizes(config: ParallelConfig, world: int) -> Sizes:
    """The sizes of this many ranks, `auto` filled in; ValueError with the valid ones if they cannot be."""
    given = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in given.values() if size != "auto")
    open_ended = "auto" in given.values()
    if fixed == world or (open_ended and world % fixed == 0):
        return Sizes(*(world // fixed if size == "auto" else size for size in given.values()))
    told, started = (
        " x ".join(f"{a} {s}" for a, s in given.items()),
        "rank that was" if world == 1 else "ranks that were",
    )
    advice = [f"start {'a multiple of ' if open_ended else ''}{fixed} with torchrun"]
    for axis, size in sorted(given.items(), key=lambda item: item[1] == 1):  # first those that were asked for
        left, rest = divmod(world, 1 if size == "auto" else fixed // size)
        if size != "auto" and rest == 0:
            may = f"parallel.{axis} may be {_listed(divisors(left))} of {world} {'rank' if world == 1 else 'ranks'}"
            advice.insert(0, may if open_ended else f"set parallel.{axis}={left}")
            break
    else:
        advice.append(f"set sizes whose product {'divides' if open_ended else 'is'} {world}")
    raise ValueError(f"parallel ({told}) does not fit the {world} {started} started: {', or '.join(advice)}")


def _listed(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def check_rows(n: Sizes, rows: int, seq_len: int, micro_batch: int | None) -> None:
    """ValueError unless the batch's rows can be dealt, and positions divided."""
    if rows % n.n_data:
        raise ValueError(
            f"train.batch_tokens is {rows} rows, which {n.n_data} ranks (parallel.replicate x parallel.shard) cannot share "
            f"equally: {_listed(divisors(rows))} can, or set train.batch_tokens to a multiple of {n.n_data * seq_len}"
        )
    if micro_batch is not None and (rows // n.n_data) % micro_batch:
        raise ValueError(
            f"train.micro_batch ({micro_batch}) must divide the {rows // n.n_data} rows that each of {n.n_data} ranks takes of a "
            f"batch: it may be {_listed(divisors(rows // n.n_data))}"
        )
    if seq_len % n.tensor:
        raise ValueError(
            f"data.seq_len ({seq_len}) is divided among parallel.tensor ({n.tensor}) ranks: set a multiple of that"
        )


def check_model(n: Sizes, model: ModelConfig) -> None:
    """ValueError for a model that cannot be divided as asked."""
    if n.tensor == 1:
        return
    assert model.vocab_size is not None
    counts = {
        "model.n_head": model.n_head,
        "model.n_kv_head": model.n_group,
        "model.d_ff": model.d_hidden,
        "model.vocab_size": model.vocab_size,
    }
    valid = [d for d in divisors(math.gcd(*counts.values())) if d > 1]
    for name, count in counts.items():
        if count % n.tensor:
            raise ValueError(
                f"parallel.tensor ({n.tensor}) must divide {name} ({count}); for this model it may be "
                f"{_listed([1, *valid])}, or use parallel.shard, which divides anything"
            )
    cannot = {
        "model.qk_norm=whole": model.qk_norm == "whole",
        "model.position=relative": model.position == "relative",
    }
    if refused := [name for name, is_so in cannot.items() if is_so]:
        raise ValueError(
            f"{refused[0]} needs all heads in one place: set parallel.tensor=1 (parallel.shard divides anything)"
        )


class Ranks:
    """The ranks of a run and what each does; of one process everything is as if there were no such thing."""

    def __init__(
        self, team: Team | None = None, n: Sizes | None = None, *, canonical: bool = False, device: str = "cpu"
    ) -> None:
        self.team, self.n, self.canonical = team or Team(), n or Sizes(), canonical
        assert math.prod(self.n) == self.team.size, (self.n, self.team.size)
        self.at = Sizes(*(int(i) for i in _coordinates(self.team.rank, self.n)))
        self.mesh: DeviceMesh | None = None
        self.holders: Any = None  # the group of those that hold one copy of the model together
        self._stopping = False
        if self.n.in_parts:  # groups of torch's own making would wait as long as it likes
            grid = torch.arange(self.team.size).view(*self.n)
            along = [_together(grid.movedim(axis, -1).reshape(-1, n)) for axis, n in enumerate(self.n)]
            kind = device.partition(":")[0]
            self.mesh = DeviceMesh.from_group(along, kind, mesh=grid, mesh_dim_names=AXES)
            self.holders = _together(grid.view(self.n.replicate, -1))

    @property
    def alone(self) -> bool:
        return self.team.size == 1

    @property
    def place(self) -> int:
        """Which of the n_data that read rows of their own this rank is, or belongs to."""
        return self.team.rank // self.n.tensor

    @property
    def holder(self) -> int:
        """Which of those that hold one copy of the model together this rank is."""
        return self.at.shard * self.n.tensor + self.at.tensor

    @property
    def stopping(self) -> bool:
        """Whether this process, or at the end of the last update any, was asked to stop; all ranks say the same."""
        return signals.stop_requested() is not None if self.alone else self._stopping

    def asked(self) -> bool:
        """Whether any rank was asked to stop by now."""
        if not self.alone:
            self._stopping = any(self.team.gather(signals.stop_requested()))
        return self.stopping

    def check(self) -> None:
        """Raise signals.Stopped on all ranks if one was asked to stop; for safe points where nothing needs saving."""
        if self.alone:
            signals.check()
        else:
            self._heed(self.team.gather(signals.stop_requested()))

    def _heed(self, asked: list[str | None]) -> None:
        if stop := next(filter(None, asked), None):
            self._stopping = True
            raise signals.Stopped(f"stopped by {stop}; run the same command again to continue")

    # One update

    def nats(self, forward: Forward, given: Iterable[Tensor], choices: Choices, seed: int, step: int, i: int) -> Tensor:
        """What `forward` makes of micro-batch `i` of update `step`, with dropout of its own and products in the run's dtype."""
        hides = (
            f"dropout/{self.at.tensor}" if self.at.tensor else "dropout"
        )  # those that divide a row's positions, others
        torch.manual_seed(runtime.key(seed, step, hides, i))
        with runtime.autocast(choices.device, choices.dtype):
            return forward(*(x.to(choices.device, non_blocking=True) for x in given))

    def total(
        self, forward: Forward, optimizer: Optimizer, n_micro: int, share: Callable[[int, float], Tensor]
    ) -> Tensor:
        """The sum of what `share` gives for each micro-batch that is dealt here; their gradients are left in the parameters.

        `share(i, factor)` takes the gradient of micro-batch i times `factor`, which undoes an average over ranks.
        """
        if self.canonical:
            return self._in_order(optimizer, n_micro, share)
        assert n_micro % self.n.n_data == 0, (n_micro, self.n)
        each = n_micro // self.n.n_data
        first, total = self.place * each, None
        for i in range(first, first + each):
            with _held_back(forward, i < first + each - 1):
                found = share(i, self.n.n_data)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _in_order(self, optimizer: Optimizer, n_micro: int, share: Callable[[int, float], Tensor]) -> Tensor:
        """Micro-batch i is done by rank i modulo their number from zeroed gradients, and all add them up from the first on."""
        parameters = list(optimizer.names)
        sums = [torch.zeros_like(p) for p in parameters]
        total, size = torch.zeros(()), self.team.size
        for start in range(0, n_micro, size):
            here = start + self.team.rank
            for parameter in parameters:
                parameter.grad = None
            loss = share(here, 1.0) if here < n_micro else torch.zeros(())
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            for rank in range(min(size, n_micro - start)):
                told = torch.cat([loss.reshape(1), *(g.reshape(-1) for g in grads)]) if not self.alone else None
                if told is not None:
                    distributed.broadcast(told, rank)
                    found, *pieces = told.split([1, *(g.numel() for g in grads)])
                    total = total + found[0]
                    torch._foreach_add_(sums, [piece.view_as(s) for piece, s in zip(pieces, sums, strict=True)])
                else:
                    total = total + loss
                    torch._foreach_add_(sums, grads)
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
        return total

    def agreed(self, optimizer: Optimizer, loss: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(loss of the whole batch, gradient norm): on every rank the same; the optimizer clips by it as it takes its step.

        Gradients are `scale` times what they should be, and are made right. Whether to stop is agreed upon along with
        them, so that ranks wait for each other once.
        """
        optimizer.here.take()
        if scale != 1:
            torch._foreach_mul_([h.grad for h in optimizer.names if h.grad is not None], 1 / scale)
        if self.alone:
            return loss, _norm(optimizer)
        told = torch.zeros(3, dtype=torch.float64, device=loss.device)
        told[2] = signals.stop_requested() is not None
        if not self.canonical:
            held = [(h.grad, optimizer.here.copies(optimizer.names[h])) for h in optimizer.names if h.grad is not None]
            norms = torch.stack(torch._foreach_norm([grad for grad, _ in held])).double()
            copies = torch.tensor([n for _, n in held], dtype=torch.float64, device=loss.device)
            told[0], told[1] = loss / self.n.tensor, (norms.square() / copies).sum()
        distributed.all_reduce(told)
        total, square, stop = told.tolist()
        self._stopping = stop > 0
        if self.canonical:
            return loss, _norm(optimizer)
        return torch.tensor(total, dtype=torch.float32), torch.tensor(math.sqrt(square), dtype=torch.float32)

    # One evaluation

    def dealt(self, items: Iterable[T], work: Callable[[T], list[float]]) -> Iterator[list[float]]:
        """What `work` finds of each item, in order; each is done by one of those that read rows of their own.

        signals.Stopped on all ranks if one was asked to stop. Where a model is in parts all go through it equally often.
        """
        items = iter(items)
        while some := list(islice(items, self.n.n_data)):
            if self.alone:
                signals.check()
            busy = self.place < len(some) or self.n.in_parts
            found = work(some[min(self.place, len(some) - 1)]) if busy else []
            if self.alone:
                yield found
                continue
            told = self.team.gather([signals.stop_requested(), found])
            self._heed([stop for stop, _ in told])
            for place in range(len(some)):
                yield told[place * self.n.tensor][1]


def _together(sets: Tensor) -> Any:
    """The group of the row of ranks that this one is in; all make those of all rows."""
    group, _ = distributed.new_subgroups_by_enumeration(sets.tolist(), timeout=timedelta(seconds=PATIENCE_S))
    return group


def _norm(optimizer: Optimizer) -> Tensor:
    """Of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in optimizer.names if p.grad is not None])


def _coordinates(rank: int, n: Sizes) -> tuple[int, int, int]:
    return rank // (n.shard * n.tensor), rank // n.tensor % n.shard, rank % n.tensor


ALONE = Ranks()  # one process


def _held_back(forward: Forward, more: bool) -> AbstractContextManager[None]:
    """Gradients of a micro-batch after which `more` come need not be told to other copies yet."""
    if isinstance(forward, DistributedDataParallel) and more:
        return forward.no_sync()
    if all_reduce := getattr(forward, "set_requires_all_reduce", None):  # of FSDP2's
        all_reduce(not more)
    return nullcontext()


def is_divided(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether ranks hold blocks of it."""
    return hasattr(tensor, "to_local")


def apart(forward: Forward) -> AbstractContextManager[None]:
    """Gradients stay those of this rank's rows, where it holds the whole model."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()
