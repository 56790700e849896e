"""Which ways of tuning a model fit into a memory: everything or an adapter, a base in fewer bits, checkpointing, 8-bit averages."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from gpt import memory, page
from gpt.adapters import AdapterConfig
from gpt.memory import Need, Setting
from gpt.model import ModelConfig
from gpt.quantize import GROUP
from gpt.settle import TrainConfig

GB = 1e9
BASES: tuple[Literal["fp32", "bf16", "int8", "int4"], ...] = ("fp32", "bf16", "int8", "int4")
STATES, KEPT = ("fp32", "8bit"), ("none", "full")


@dataclass(frozen=True)
class Way:
    """One way to train the model: what it needs, and the settings that ask for it."""

    cells: tuple[str, str, str, str]  # what is trained, its base, checkpointing, the optimizer's state
    settings: list[str]
    need: Need


def blocks(config: TrainConfig, shape: ModelConfig, setting: Setting, room: float) -> Iterator[page.Block]:
    """A table of memory for each way, and the settings of the first that fit into `room` bytes."""
    ways = list(_ways(config, shape, setting))
    yield page.Heading(f"ways to tune it, {setting.rows} x {setting.seq_len:,} tokens at a time")
    yield _table(ways, room)
    if not _grouped(shape):
        yield page.Note(
            f"no base in int4: it groups columns by {GROUP}, which does not divide the widths of this model"
        )
    for what in ("everything", "adapter"):
        yield page.Note(_advice(what, [way for way in ways if way.cells[0] == what], room, setting.rows))


def _ways(config: TrainConfig, shape: ModelConfig, setting: Setting) -> Iterator[Way]:
    """Every way, those that change the fewest numbers first: checkpointing changes none, 8 bits and a smaller base do."""
    adapter = config.adapter or AdapterConfig()
    states = STATES if config.optim.kind == "adamw" else ("fp32",)
    bases = BASES if _grouped(shape) else BASES[:-1]
    for base, state, kept in product((None, *bases), states, KEPT):
        optim = config.optim.model_copy(update={"state": state})
        wanted = replace(setting, optim=optim, checkpointing=kept)
        settings = [f"train.checkpointing={kept}", f"optim.state={state}"]
        if base is None:
            settings.append("adapter=null")
            yield Way(("everything", "-", kept, state), settings, memory.need(shape, wanted))
        else:
            wanted = replace(wanted, adapter=adapter.model_copy(update={"base_dtype": base}))
            settings.append(f"adapter.base_dtype={base}")
            yield Way(("adapter", base, kept, state), settings, memory.need(shape, wanted))


def _grouped(shape: ModelConfig) -> bool:
    """Whether int4 can group the columns of every matrix of the blocks."""
    return not any(width % GROUP for width in (shape.d_model, shape.n_head * shape.d_head, shape.d_hidden))


def _table(ways: list[Way], room: float) -> page.Table:
    columns = ("trained", "base", "checkpointing", "state", "weights", "gradients", "optimizer", "activations", "work")
    rows = []
    for way in ways:
        need = way.need
        numbers = (
            need.weights + need.reference,
            need.gradients,
            need.optimizer,
            need.activations,
            need.work,
            need.total,
        )
        rows.append((*way.cells, *(f"{n / GB:.2f}" for n in numbers), "yes" if need.total <= room else "no"))
    return page.Table((*columns, "total GB", "fits"), rows, words=4, tail=1)


def _advice(what: str, ways: list[Way], room: float, rows: int) -> str:
    for way in ways:
        if way.need.total <= room:
            return f"{what} fits: {' '.join((f'train.micro_batch={rows}', *way.settings))}"
    least = min(way.need.total for way in ways)
    return f"{what} does not fit: the least is {least / GB:.2f} GB; lower data.seq_len or train.micro_batch"
