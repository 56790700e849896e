"""A run on devices that need not be here: what each of them holds, what they tell each other, and which sizes fit, by formula.

What one device takes alone is gone through (`memory`); here it is divided as `parallel` divides it: weights, gradients and
averages along `shard` and `tensor`, a row's positions, heads and columns along `tensor`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gpt import memory, plan
from gpt.machines import Machine
from gpt.memory import Need
from gpt.model import ModelConfig
from gpt.ranks import Sizes, check_model, check_rows, divisors
from gpt.speed import Pace

FP32, STREAM = 4, 2  # bytes of a weight or gradient that is told, and of a number of the residual stream
TENSOR = 8  # ranks along `tensor` that are tried at most: they talk within each layer, so they share a box


@dataclass(frozen=True)
class Divided:
    """One way to divide a run: what a device holds, and seconds of an update, of them waiting for others."""

    n: Sizes
    rows: int  # of a micro-batch
    need: Need
    update_s: float
    waiting_s: float


@dataclass(frozen=True)
class Portions:
    """What FSDP2 gathers in one go: parameters of a block, and of all that is in no block; and how many are trained."""

    config: ModelConfig
    block: int
    rest: int
    trained: int

    @property
    def parameters(self) -> int:
        return self.config.n_layer * self.block + self.rest


def portions(config: ModelConfig, trained: int | None = None) -> Portions:
    """Of a model of this shape, of which all or so many parameters are trained."""
    one = memory.bare(memory.samples(config)[0])
    block = plan.n_parameters(one.model.layers[0])
    rest = plan.n_parameters(one) - block
    return Portions(config, block, rest, config.n_layer * block + rest if trained is None else trained)


@dataclass(frozen=True)
class Update:
    """Rows of an update, tokens of each, and rows of a micro-batch where they are set."""

    rows: int
    row: int
    micro_batch: int | None = None


def held(need: Need, shape: Portions, n: Sizes) -> Need:
    """Of a device: its parts, and in FSDP2's turn what is gathered of two blocks and, from beginning to end, of the rest."""
    each, gathered = n.shard * n.tensor, 0
    if n.shard > 1:
        gathered = FP32 * (2 * shape.block + shape.rest) // n.tensor
    return replace(
        need,
        weights=need.weights // each + gathered,
        gradients=need.gradients // each + (gathered if n.shard > 1 else 0),
        optimizer=need.optimizer // each,
        activations=need.activations // n.tensor,
        work=need.work // n.tensor,
        step=need.step // each,
    )


def told(shape: Portions, n: Sizes, tokens: int, machine: Machine) -> tuple[float, float, float]:
    """Seconds of talk: of a micro-batch between shards, within its layers along `tensor`, and between copies once an update.

    A ring moves (n - 1) / n of what is gathered or scattered, and twice that of what is summed.
    """

    def link(ranks: int) -> float:
        return machine.near if ranks <= machine.box else machine.far

    whole = FP32 * shape.parameters / n.tensor
    shards = 3 * whole * (n.shard - 1) / n.shard / link(n.shard * n.tensor)  # weights twice, gradients once
    stream = STREAM * tokens * shape.config.d_model
    layers = 8 * shape.config.n_layer * stream * (n.tensor - 1) / n.tensor / link(n.tensor)  # four forward, four back
    each = 2 * FP32 * shape.trained / (n.shard * n.tensor)
    copies = each * (n.replicate - 1) / n.replicate / link(n.replicate * n.shard * n.tensor)
    return shards, layers, copies


def divided(shape: Portions, update: Update, n: Sizes, rows: int, need: Need, pace: Pace, machine: Machine) -> Divided:
    """That way; between shards is told while a device computes, the rest is waited for."""
    passes = update.rows // n.n_data // rows
    shards, layers, copies = told(shape, n, rows * update.row, machine)
    computing = pace.pass_s / n.tensor
    each = max(computing + layers, shards)
    step = pace.step_s / (n.shard * n.tensor)
    return Divided(n, rows, held(need, shape, n), passes * each + step + copies, passes * (each - computing) + copies)


def ways(
    shape: Portions,
    update: Update,
    devices: int,
    room: float,
    needs: Callable[[int], Need],
    paces: Callable[[int], Pace],
    machine: Machine,
    check: Callable[[Sizes], object] = lambda n: None,
) -> Iterator[Divided]:
    """Every division that fits, unless `check` raises a ValueError: each with the micro-batch that is set, or the largest."""
    for tensor in (d for d in divisors(devices) if d <= min(TENSOR, machine.box)):
        for shard in divisors(devices // tensor):
            n = Sizes(devices // tensor // shard, shard, tensor)
            try:
                check_model(n, shape.config)
                check_rows(n, update.rows, update.row, update.micro_batch)
                check(n)
            except ValueError:
                continue
            several = divisors(update.rows // n.n_data)
            for rows in reversed(several if update.micro_batch is None else [update.micro_batch]):
                if held(needs(rows), shape, n).total <= room:
                    yield divided(shape, update, n, rows, needs(rows), paces(rows), machine)
                    break
