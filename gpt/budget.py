"""Which settings fit into a memory: what `python train.py CONFIG --plan` prints, from the settings and headers alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from gpt import hf, memory, page, runtime, tensors
from gpt.adapters import AdapterConfig
from gpt.data import open_data
from gpt.memory import Need, Setting
from gpt.model import ModelConfig
from gpt.quantize import GROUP
from gpt.run import resolve
from gpt.settle import TrainConfig, row_length

GB = 1e9
BASES: tuple[Literal["fp32", "bf16", "int8", "int4"], ...] = ("fp32", "bf16", "int8", "int4")
STATES, KEPT = ("fp32", "8bit"), ("none", "full")


@dataclass(frozen=True)
class Way:
    """One way to train the model: what it needs, and the settings that ask for it."""

    cells: tuple[str, str, str, str]  # what is trained, its base, checkpointing, the optimizer's state
    settings: list[str]
    need: Need


def blocks(config: TrainConfig, size: int | None) -> Iterator[page.Block]:
    """Parameters by part, a table of memory for each way of training, and the settings of the first ways that fit.

    `size` is in bytes; None: what this machine has free. No weight is read and none is made.
    """
    device, dtype = _machine(config)
    if size is None:
        try:
            runtime.check_device(device)
        except ValueError as error:
            raise ValueError(
                f"{error}; to plan for a machine that is not this one, say its memory: --memory 12GB"
            ) from None
        size = runtime.free_memory_bytes(device)
    shape, source = _shape(config)
    if config.data.seq_len > (shape.max_seq_len or 0):
        raise ValueError(f"data.seq_len ({config.data.seq_len}) exceeds the model's context ({shape.max_seq_len})")
    rows = 1 if config.train.micro_batch == "auto" else config.train.micro_batch
    setting = Setting(
        rows=rows,
        seq_len=config.data.seq_len,
        device=device,
        dtype=dtype,
        optim=config.optim,
        documents=config.data.document_mask,
        objective=config.objective,
    )
    yield page.Heading(f"{config.name}: {rows} x {row_length(config):,} tokens at a time, {dtype} on {device}")
    yield page.Note(source)
    counts = memory.parameters(
        shape, replace(setting, adapter=(config.adapter or AdapterConfig()).model_copy(update={"base_dtype": "fp32"}))
    )
    yield page.Table(("part", "parameters"), [(part, f"{n:,}") for part, n in counts.items()])
    ways = list(_ways(config, shape, setting))
    room = (1 - memory.SPARE) * size
    yield _table(ways, room)
    yield page.Note(
        f"GB = 1e9 bytes. fits: total is at most {room / GB:.1f} GB, that is {size / GB:.1f} GB less {memory.SPARE:.0%} for "
        "what no tensor of the run holds. work: logits, and the gradients of one block, for a moment."
    )
    if not _grouped(shape):
        yield page.Note(
            f"no base in int4: it groups columns by {GROUP}, which does not divide the widths of this model"
        )
    for what in ("everything", "adapter"):
        yield page.Note(_advice(what, [way for way in ways if way.cells[0] == what], room, rows))


def _machine(config: TrainConfig) -> tuple[str, str]:
    """(device, dtype): as set, or this machine's; a GPU need not be here, and is taken for one that computes bfloat16."""
    device = runtime.best_device()[0] if config.train.device == "auto" else config.train.device
    if config.train.dtype != "auto":
        return device, config.train.dtype
    absent = device.startswith("cuda") and runtime.best_device()[0] != "cuda"
    return device, "bfloat16" if absent else runtime.best_dtype(device)[0]


def _shape(config: TrainConfig) -> tuple[ModelConfig, str]:
    """(the model's shape, a sentence on where it is from): config.json of init_from, or the settings and the tokenizer."""
    if config.init_from is not None:
        path, described = resolve(config.init_from)
        shape = hf.load_config(path).model_copy(update={"dropout": config.model.dropout})
        held = [entry for file in sorted(path.glob("model*.safetensors")) for entry in tensors.stored(file).values()]
        n_bytes = sum(_bytes(entry) for entry in held)
        return shape, f"{described}: {len(held)} tensors, {n_bytes / GB:.2f} GB on disk"
    missing = {}
    if config.model.vocab_size is None:
        try:
            missing["vocab_size"] = open_data(config.data).tokenizer.padded_size
        except FileNotFoundError as error:
            raise ValueError(f"{error}; to plan before the data is prepared, set model.vocab_size=N") from None
    if config.model.max_seq_len is None:
        missing["max_seq_len"] = config.data.seq_len
    return config.model.model_copy(update=missing), "a model with fresh weights"


def _bytes(entry: tensors.Stored) -> int:
    count = tensors.WIDTHS[entry.dtype]
    for length in entry.shape:
        count *= length
    return count


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
        numbers = (need.weights, need.gradients, need.optimizer, need.activations, need.work, need.total)
        rows.append((*way.cells, *(f"{n / GB:.2f}" for n in numbers), "yes" if need.total <= room else "no"))
    return page.Table((*columns, "total GB", "fits"), rows, words=4, tail=1)


def _advice(what: str, ways: list[Way], room: float, rows: int) -> str:
    for way in ways:
        if way.need.total <= room:
            return f"{what} fits: {' '.join((f'train.micro_batch={rows}', *way.settings))}"
    least = min(way.need.total for way in ways)
    return f"{what} does not fit: the least is {least / GB:.2f} GB; lower data.seq_len or train.micro_batch"
