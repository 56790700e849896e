"""What a run will need, before its first step and without its weights: what `python train.py CONFIG --plan` prints.

Work, memory, time and disk of these settings on this machine, or on known ones that are not here, and what is unwise in them.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path

from gpt import division, hf, host, machines, memory, page, plan, probe, runtime, settle, speed, tensors, ways
from gpt.data import Data, Loader, open_data
from gpt.division import Divided
from gpt.evaluate import evaluated, learned, views
from gpt.log import duration, thousands
from gpt.machines import Machine
from gpt.model import GPT, ModelConfig
from gpt.probe import Rates
from gpt.ranks import AXES, Sizes, check_model, check_rows, sizes
from gpt.run import resolve
from gpt.settle import RUNS, TrainConfig

GB = 1e9
KERNELS = (
    65_000_000  # bytes of libraries' code and kernels that come into a CPU's memory with the first update (measured)
)
SHOWN = 4  # divisions of a run among devices
MUON_SHARE = 0.35  # of an update's arithmetic; up to 0.3 it was worth what it costs (docs/experiments.md)
FEW_TARGETS = 20_000  # of validation, below which a mean of nats per token is known to no better than about 0.02
LEAST_PER_PARAMETER, MOST_PER_PARAMETER = (
    4,
    400,
)  # training tokens; 20 are the best use of arithmetic (Hoffmann et al. 2022)
ASIDE = 0.25  # of the time, for evaluations and saves
LOOKED_UP = 0.6  # of the parameters, in embeddings and head


@dataclass(frozen=True)
class Target:
    """Where a run is planned to be: how many devices, what each has, and how fast it is (None: nobody said which it is)."""

    device: str
    dtype: str
    size: float
    process: int  # bytes that the process takes before there is a model, of the same memory
    devices: int
    machine: Machine | None  # that need not be here
    rates: Rates | None
    words: str

    @property
    def room(self) -> float:
        return (1 - memory.SPARE) * self.size

    @property
    def here(self) -> bool:
        return self.machine is None and self.device == "cpu"


@dataclass(frozen=True)
class Facts:
    """What a plan is made of, besides the settings."""

    config: TrainConfig
    target: Target
    shape: ModelConfig
    source: str  # in words
    model: GPT  # without storage
    counts: dict[str, int]
    data: Data | None
    way: Divided  # the sizes, micro-batch, memory and time that are planned with
    others: list[Divided]
    fits: bool

    @cached_property
    def flops(self) -> float:
        """Of a token."""
        return plan.flops_per_token(self.model, self.config.data.seq_len, reference=self.config.objective.compares)

    @cached_property
    def evaluated(self) -> int:
        return 0 if self.data is None else evaluated(views(self.data), self.config.eval.tokens)

    @property
    def _saved(self) -> int:
        """Parameters that a machine's disk takes of each save."""
        box = 1 if self.target.machine is None else self.target.machine.box
        return plan.n_trained(self.model) // -(-self.target.devices // box)

    @cached_property
    def aside_s(self) -> float:
        """Seconds of a step beside its update, on average."""
        return settle.aside_s(self.config, self.evaluated, self._saved, self.way.update_s)

    @cached_property
    def once_s(self) -> float:
        """Seconds of the evaluations and the save that are due whatever the steps."""
        return settle.once_s(self.config, self.evaluated, self._saved, self.way.update_s)

    @cached_property
    def steps(self) -> int | None:
        budget_s = self.config.train.time
        if budget_s is None or self.target.rates is None:
            return plan.fixed_steps(self.config.train)
        return max(1, int((budget_s - self.once_s) / (self.way.update_s + self.aside_s)))

    @cached_property
    def epochs(self) -> list[tuple[str, float]]:
        """Of each source, how often it is read; empty where that is not known."""
        if self.data is None or self.steps is None:
            return []
        config = self.config
        loader = Loader(self.data, config.data, settle.rows(config), config.seed, prefix=self.shape.prefix_lm)
        return loader.epochs(self.steps)

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Weights that are trained, in fp32, and the optimizer's state, of all devices."""
        setting = settle.setting(self.config, self.target.device, self.target.dtype)
        return 4 * plan.n_trained(self.model) + memory.need(self.shape, setting).optimizer


def blocks(
    config: TrainConfig, size: int | None = None, card: str | None = None, devices: int | None = None
) -> Iterator[page.Block]:
    """The plan, for `devices` of a `card` that need not be here, or for this machine; `size`: bytes of memory instead of theirs.

    No weight is read and none is made.
    """
    found = facts(config, size, card, devices)
    yield page.Heading(f"{config.name}: {found.source}, {found.target.words}")
    yield page.Table(
        ("part", "parameters"), [(part, f"{n:,}") for part, n in found.counts.items() if n or part != "adapter"]
    )
    yield page.Table(("work", "planned"), list(_work(found)), tail=1)
    yield page.Table(("memory", "planned"), list(_memory(found)), tail=1)
    if found.others:
        yield _divisions(found)
    yield page.Table(("time and disk", "planned"), [*_time(found), *_disk(found)], tail=1)
    for warning in _warnings(found):
        yield page.Note(f"warning: {warning}")
    if config.init_from is not None:
        setting = settle.setting(config, found.target.device, found.target.dtype, found.way.rows)
        yield from ways.blocks(config, found.shape, replace(setting, adapter=None), found.target.room)
    else:
        yield page.Note(_settings(found))


def facts(config: TrainConfig, size: int | None = None, card: str | None = None, devices: int | None = None) -> Facts:
    """What `blocks` tells of."""
    settle.check_anywhere(config)
    shape, source = _shape(config)
    if config.data.seq_len > (shape.max_seq_len or 0):
        raise ValueError(f"data.seq_len ({config.data.seq_len}) exceeds the model's context ({shape.max_seq_len})")
    held = host.resident_bytes()  # by what a run imports too; the plan's own means come after
    model = memory.bare(shape, config.adapter)
    target = _target(config, model, held, size, card, devices)
    counts = memory.parameters(shape, config.adapter)
    try:
        data = open_data(config.data)
    except FileNotFoundError:
        data = None
    trained = plan.n_trained(model)
    chosen, others = _alone(config, target, shape) if target.devices == 1 else _among(config, target, shape, trained)
    fits = chosen.need.total <= target.room
    return Facts(config, target, shape, source, model, counts, data, chosen, others, fits)


def _target(
    config: TrainConfig, model: GPT, held: int, size: int | None, card: str | None, devices: int | None
) -> Target:
    given = [getattr(config.parallel, axis) for axis in AXES]
    n = devices or prod(each for each in given if each != "auto")
    if card is not None:
        machine = machines.named(card)
        dtype: str = "bfloat16" if config.train.dtype == "auto" else config.train.dtype
        memory_size = machine.memory if size is None else size
        words = f"{n:,} x {machine.name}" if n > 1 else machine.name
        return Target("cuda", dtype, memory_size, 0, n, machine, probe.known(machine, dtype), f"{words}, {dtype}")
    if n > 1:
        raise ValueError(f"to plan for {n} devices, say which they are: --device h100 --devices {n}")
    device, dtype = _machine(config)
    try:
        runtime.check_device(device)
    except ValueError as error:
        if size is None:
            raise ValueError(
                f"{error}; to plan for a machine that is not this one, say which, or its memory: --device h100, --memory 12GB"
            ) from None
        return Target(device, dtype, size, 0, 1, None, None, f"{device}, {dtype}")
    process = held + KERNELS if device == "cpu" else 0
    threads = settle.threads(config, model)
    runtime.setup(device, threads)
    rates = probe.measured(device, dtype)
    rates = speed.with_asking(rates, dtype) if device == "cpu" else rates
    words = f"{device}, {dtype}" + (f", {threads} threads" if device == "cpu" else "")
    free = runtime.free_memory_bytes(device) if size is None else max(0, size - process)
    return Target(device, dtype, free, process, 1, None, rates, words)


def _machine(config: TrainConfig) -> tuple[str, str]:
    """(device, dtype): as set, or this machine's; a GPU need not be here, and is taken for one that computes bfloat16."""
    device = runtime.chosen_device(config.train.device)
    if config.train.dtype != "auto":
        return device, config.train.dtype
    try:
        runtime.check_device(device)
    except ValueError:
        return device, "bfloat16" if device.startswith("cuda") else "float32"
    return device, runtime.best_dtype(device)[0]


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
    return tensors.WIDTHS[entry.dtype] * prod(entry.shape)


def _clock(config: TrainConfig, target: Target) -> probe.Clock | None:
    if target.rates is None:
        return None
    return probe.Clock(
        target.rates, "cpu" if target.here else None, compiled=not target.here and config.train.compile is not False
    )


def _alone(config: TrainConfig, target: Target, shape: ModelConfig) -> tuple[Divided, list[Divided]]:
    """On one device: with the micro-batch that is set, or the largest that fits."""
    n_rows, setting = settle.rows(config), settle.setting(config, target.device, target.dtype)
    fits = settle.fits(shape, setting, target.room)
    rows = plan.micro_batch(config.train, n_rows, settle.row_length(config), target.device, fits)
    setting = replace(setting, rows=rows, summed=rows < n_rows)
    clock = _clock(config, target)
    update_s = 0.0 if clock is None else speed.pace(shape, setting, clock).update_s(n_rows // rows)
    return Divided(Sizes(), rows, memory.need(shape, setting), update_s, 0.0), []


def _among(config: TrainConfig, target: Target, shape: ModelConfig, trained: int) -> tuple[Divided, list[Divided]]:
    """(the fastest division, or the one that is set; it and those that come next). ValueError where none fits."""
    machine, clock = target.machine, _clock(config, target)
    assert machine is not None and clock is not None
    setting = settle.setting(config, target.device, target.dtype)
    each = None if config.train.micro_batch == "auto" else config.train.micro_batch
    portions = division.portions(shape, trained)
    update = division.Update(settle.rows(config), settle.row_length(config), each)
    check = partial(settle.check_parts, config)
    needs, paces = memory.needs(shape, setting), speed.paces(shape, setting, clock)
    found = sorted(
        division.ways(portions, update, target.devices, target.room, needs, paces, machine, check),
        key=lambda way: (way.update_s, way.n),
    )
    if config.parallel.model_fields_set & {*AXES}:
        asked = sizes(config.parallel, target.devices)
        found.sort(key=lambda way: way.n != asked)
        settle.check_parts(config, asked)
        check_model(asked, shape)
        check_rows(asked, settle.rows(config), settle.row_length(config), each)
        if not found or found[0].n != asked:
            takes = division.held(needs(1), portions, asked).total / GB
            raise ValueError(
                f"parallel ({' x '.join(f'{a} {k}' for a, k in zip(AXES, asked, strict=True))}) does not fit {target.words}: with "
                f"one row each takes {takes:.1f} of {target.room / GB:.1f} GB; leave the sizes out to see which do"
            )
    if not found:
        raise ValueError(
            f"no division of {settle.rows(config):,} rows among {target.words} fits {target.room / GB:.1f} GB each: set "
            "train.checkpointing=full, a larger train.batch_tokens (each device takes a row at least) or fewer --devices"
        )
    return found[0], found[:SHOWN]


# What is printed


def _work(facts: Facts) -> Iterator[tuple[str, str]]:
    config, steps = facts.config, facts.steps
    yield "FLOPs a token, forward and backward", f"{facts.flops / 1e9:,.3f} billion"
    yield (
        "tokens an update",
        f"{config.train.batch_tokens:,} ({settle.rows(config):,} rows of {settle.row_length(config):,})",
    )
    if steps is None:
        return
    total = steps * config.train.batch_tokens
    yield "updates", f"{steps:,}"
    yield "tokens in all", f"{total:,} ({total / sum(facts.counts.values()):.1f} a parameter)"
    for name, times in facts.epochs:
        yield f"epochs of {name}", f"{times:.2f}"
    if facts.data is None:
        yield "epochs", f"not known: {config.data.path or 'its parts'} are not prepared"


def _memory(facts: Facts) -> Iterator[tuple[str, str]]:
    need, target = facts.way.need, facts.target
    each = "" if target.devices == 1 else ", each device"
    yield (
        f"rows of a micro-batch{each}",
        f"{facts.way.rows} ({facts.way.rows * settle.row_length(facts.config):,} tokens)",
    )
    parts = {name: getattr(need, name) for name in ("weights", "gradients", "optimizer", "activations")}
    parts["work: logits, one block's gradients"] = need.work
    if need.reference:
        parts["the reference"] = need.reference
    if need.holes:
        parts[f"holes in the heap, about {need.holes:.0%} of both"] = int(need.holes * (need.activations + need.work))
    if target.process:
        parts["the process itself"] = target.process
    for name, n_bytes in parts.items():
        yield name, f"{n_bytes / GB:.3f} GB"
    yield (
        "at most",
        f"{(need.total + target.process) / GB:.3f} GB{'' if need.summed else ' (gradients come as activations go)'}",
    )
    yield (
        "fits",
        f"{'yes' if facts.fits else 'no'}: {target.size / GB:.1f} GB less {memory.SPARE:.0%} for what no tensor of the run holds",
    )


def _divisions(facts: Facts) -> page.Table:
    rows = []
    for way in facts.others:
        rate = facts.config.train.batch_tokens / way.update_s
        rows.append(
            (
                *(str(k) for k in way.n),
                str(way.rows),
                f"{way.need.total / GB:.1f}",
                f"{way.update_s:.2f}",
                f"{way.waiting_s / way.update_s:.0%}",
                thousands(rate),
            )
        )
    return page.Table((*AXES, "micro-batch", "GB each", "s an update", "waiting", "tokens/s"), rows, words=0)


def _time(facts: Facts) -> Iterator[tuple[str, str]]:
    rates, way, tokens = facts.target.rates, facts.way, facts.config.train.batch_tokens
    if rates is None:
        yield "time", "not known: name the machine, --device h100"
        return
    known = facts.target.machine is not None
    yield f"large products, {'as published' if known else 'measured'}", f"{rates.matmul / 1e12:,.2f} TFLOP/s"
    yield f"memory, {'as published' if known else 'measured'}", f"{rates.bandwidth / GB:,.1f} GB/s"
    share = facts.flops * tokens / way.update_s / rates.matmul / facts.target.devices
    yield (
        "an update",
        f"{way.update_s:.3g} s, {thousands(tokens / way.update_s)} tokens/s, {share:.0%} of the large products",
    )
    if (steps := facts.steps) is not None:
        seconds = steps * (way.update_s + facts.aside_s) + facts.once_s
        aside = 1 - steps * way.update_s / seconds
        yield "the run", f"{duration(seconds)} ({seconds / 3600:,.2f} hours), of it evaluations and saves {aside:.0%}"


def _disk(facts: Facts) -> Iterator[tuple[str, str]]:
    one, keep = facts.checkpoint_bytes, facts.config.checkpoint.keep
    yield "a checkpoint", f"{one / GB:.2f} GB"
    free = f"{shutil.disk_usage(_nearest(RUNS)).free / GB:.1f} GB are free here"
    yield "the disk", f"{(keep + 2) * one / GB:.2f} GB for the {keep} newest, the best and the next; {free}"


def _nearest(path: Path) -> Path:
    """`path`, or the directory that it would be made in."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _warnings(facts: Facts) -> Iterator[str]:
    """What is unwise in these settings, and what to set instead."""
    config, data, steps = facts.config, facts.data, facts.steps
    if not facts.fits:
        less = "a smaller train.micro_batch, " if facts.way.rows > 1 else "a smaller data.seq_len, "
        yield f"it does not fit: set {less}train.checkpointing=full, or a smaller model"
    if (share := _muon_share(facts)) > MUON_SHARE:
        at_least = config.train.batch_tokens * share / (1 - share) * (1 - MUON_SHARE) / MUON_SHARE
        yield (
            f"Muon takes {share:.0%} of an update's arithmetic, the same whatever the batch: set train.batch_tokens to "
            f"{thousands(at_least)} or more, or optim.kind=adamw"
        )
    yield from settle.worn(facts.epochs)
    if (
        data is not None
        and not config.objective.of_pairs
        and (n_targets := learned(views(data), config.eval.tokens)) < FEW_TARGETS
    ):
        yield (
            f"an evaluation is a mean over {n_targets:,} tokens; below {FEW_TARGETS:,} chance moves val_loss by more than most "
            "settings do: prepare with a larger val_fraction, or raise eval.tokens"
        )
    if steps is not None and config.init_from is None:
        each = steps * config.train.batch_tokens / plan.n_parameters(facts.model)
        if each < LEAST_PER_PARAMETER:
            yield f"{each:.1f} training tokens a parameter: a smaller model learns more of so few in the same time (20 are usual)"
        if each > MOST_PER_PARAMETER:
            yield f"{each:,.0f} training tokens a parameter: a larger model would learn more from them (20 are usual)"
    looked_up = (facts.counts["embeddings"] + facts.counts["head"]) / max(1, plan.n_parameters(facts.model))
    if looked_up > LOOKED_UP and config.init_from is None:
        yield f"{looked_up:.0%} of the parameters are embeddings: a smaller vocabulary leaves more to the blocks"
    if facts.target.rates is not None and facts.aside_s > ASIDE * (facts.way.update_s + facts.aside_s):
        aside = facts.aside_s / (facts.way.update_s + facts.aside_s)
        yield f"evaluations and saves take {aside:.0%} of the time: raise eval.every or checkpoint.every, or set eval.tokens"
    is_here = facts.target.machine is None and facts.target.rates is not None
    if is_here and (needed := (config.checkpoint.keep + 2) * facts.checkpoint_bytes) > (
        free := shutil.disk_usage(_nearest(RUNS)).free
    ):
        yield f"checkpoints take {needed / GB:.1f} GB, and {free / GB:.1f} GB are free: lower checkpoint.keep, or make room"


def _muon_share(facts: Facts) -> float:
    """Of an update's arithmetic: five Newton-Schulz steps of 4 m^2 n + 2 m^3 for each matrix of m <= n."""
    if facts.config.optim.kind != "muon":
        return 0.0
    own = 0.0
    for name, parameter in facts.model.named_parameters():
        if parameter.dim() == 2 and ".layers." in name and parameter.requires_grad:
            m, n = sorted(parameter.shape)
            own += 5 * (4 * m * m * n + 2 * m**3)
    return own / (own + facts.flops * facts.config.train.batch_tokens)


def _settings(facts: Facts) -> str:
    """The settings that were planned with, as they can be written."""
    named = [f"train.micro_batch={facts.way.rows}"]
    if facts.target.devices > 1:
        named = [f"parallel.{axis}={k}" for axis, k in zip(AXES, facts.way.n, strict=True)] + named
    return f"planned with: {' '.join(named)}"
