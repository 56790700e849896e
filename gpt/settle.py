"""What a run is before step 1: its settings agreed with what it was started with, its model built, every choice made."""

import hashlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gpt import adapters, division, durable, growth, hf, memory, parallel, plan, quantize, resume, runtime, signals
from gpt import config as settings
from gpt.adapters import AdapterConfig
from gpt.checkpoint import SETTINGS, CheckpointConfig, Checkpoints, serialize
from gpt.config import Settings
from gpt.data import Batch, Data, DataConfig, Loader, Packed, Pairs
from gpt.evaluate import EvalConfig, evaluated, views
from gpt.judge import NumbersConfig
from gpt.log import LogConfig
from gpt.loss import Objective, ObjectiveConfig, around
from gpt.model import GPT, ModelConfig, initial_weights
from gpt.optim import OptimConfig, Optimizer
from gpt.parts import Parts
from gpt.plan import Choices, TrainingConfig
from gpt.ranks import Forward, ParallelConfig, Ranks, Sizes, check_model, check_rows, sizes
from gpt.resume import Origin
from gpt.run import ADAPTER, RunDirectory, resolve
from gpt.schedule import ScheduleConfig, updates
from gpt.tokenizer import Tokenizer

RUNS = Path("runs")
PROBE_UPDATES = 6  # which tell the speed of an update; two, where they are slow
PROBE_S = 5.0  # slow are those that take longer
PROBE_SHARE = 0.03  # of a time budget: a shared machine's speed of one second says little about the next
REPEATS = 4  # epochs past which repeated text teaches much less than new text would (Muennighoff et al. 2023)

ALONE = Sizes()

Say = Callable[[str], None]


class TrainConfig(Settings):
    """A run, whole: a table of contents."""

    name: str = Field(description="the run's directory under runs/; defaults to the file's stem")
    seed: int = Field(1337, description="of the weights, the order of data and dropout")
    init_from: str | None = Field(
        None,
        description="run, checkpoint or Hugging Face model (a directory, hub:ORG/NAME) whose weights and tokenizer to start from",
    )
    branch_from: str | None = Field(
        None,
        description="RUN@STEP whose training this run goes on with: its weights, optimizer state, step and place in the data, "
        "under this run's schedule; steps are counted from that run's beginning",
    )
    data: DataConfig = Field(description="what is trained on")
    model: ModelConfig = Field(
        default_factory=ModelConfig, description="the decoder's shape; with init_from only dropout may be set"
    )
    adapter: AdapterConfig | None = Field(
        None, description="train an adapter on init_from, which stays as it is; null: train everything"
    )
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="what is minimized")
    train: TrainingConfig = Field(description="how long, in what portions and on what")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="how parameters move")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="how ranks share the work")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="learning rate over the run")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="when and on what to evaluate")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="when to save and what to keep")
    numbers: NumbersConfig = Field(default_factory=NumbersConfig, description="what becomes of bad updates")
    log: LogConfig = Field(default_factory=LogConfig, description="what people watch")
    choices: Choices | None = Field(
        None, description="what settled itself before step 1; written by the run, obeyed when present"
    )
    history: tuple[resume.Change, ...] = Field(
        (), description="what --allow changed on the way, and when; written by the run"
    )


def check(given: TrainConfig) -> None:
    """ValueError for what cannot be trained here, before anything is made for it."""
    check_anywhere(given)
    if given.train.device != "auto":
        runtime.check_device(given.train.device)
    _check_ranks(given, sizes(given.parallel, runtime.world_size()), runtime.world_size())


def check_anywhere(given: TrainConfig) -> None:
    """ValueError for what cannot be trained on any machine: an update of parts of rows, tuning without a model."""
    check_batch(given)
    if given.objective.of_pairs and given.init_from is None:
        raise ValueError(
            f"objective.kind={given.objective.kind} teaches a model that can answer which answers are preferred: name it, "
            "init_from: runs/NAME (trained on chats, data with chat: true)"
        )
    if given.adapter is not None and given.init_from is None:
        raise ValueError(
            "an adapter is trained on a model that is there: name it, init_from: runs/NAME, or set adapter=null"
        )


def check_batch(given: TrainConfig) -> None:
    """ValueError unless an update is of whole rows."""
    if given.train.batch_tokens % row_length(given):
        twice = "twice data.seq_len, a row of chosen and one of rejected replies"
        of = twice if given.objective.of_pairs else "data.seq_len"
        raise ValueError(
            f"train.batch_tokens ({given.train.batch_tokens}) must be a multiple of {of} ({row_length(given)})"
        )


def _check_ranks(given: TrainConfig, n: Sizes, world: int) -> None:
    """ValueError for what these ranks cannot do together."""
    micro_batch = None if given.train.micro_batch == "auto" or world == 1 else given.train.micro_batch
    if not given.parallel.canonical:  # which takes micro-batches as they come
        check_rows(n, rows(given), row_length(given), micro_batch)
    device = runtime.chosen_device(given.train.device)
    if given.parallel.canonical and device != "cpu":
        raise ValueError(f"parallel.canonical repeats bytes on the CPU alone, this is {device}: set train.device=cpu")
    if world > 1 and device == "mps":
        raise ValueError(f"{world} ranks cannot compute on one Apple GPU: start one process, or set train.device=cpu")
    if world > 1 and ":" in device:
        raise ValueError(
            f"train.device ({device}) is one of several, and {world} ranks take one each: set train.device=cuda"
        )
    check_parts(given, n)


def check_parts(given: TrainConfig, n: Sizes) -> None:
    """ValueError for what cannot be divided so."""
    if n.in_parts and given.adapter is not None:
        raise ValueError("an adapter is small, and each rank holds all of it: set parallel.shard=1 parallel.tensor=1")
    if n.in_parts and given.optim.state != "fp32":
        raise ValueError(
            "optim.state=8bit is of whole matrices: set parallel.shard=1 parallel.tensor=1, or optim.state=fp32"
        )
    if n.tensor > 1 and given.objective.of_pairs:
        raise ValueError(
            f"objective.kind={given.objective.kind} reads the head whole: set parallel.tensor=1 (shard may stay)"
        )


def agree(
    given: TrainConfig,
    run: RunDirectory,
    data: Data,
    source: GPT | None,
    origin: Origin,
    allow: Sequence[str] = (),
) -> TrainConfig:
    """The run's settings, the model's filled in: `given`, where it agrees with what the run, or its trunk, was started with.

    What differs may be free, or named in `allow`; ValueError with the other differences and what to run instead.
    """
    stored = resume.stored(given, run.config_path, origin)
    trunk = settings.load(TrainConfig, origin.path / SETTINGS) if stored is None and origin.path is not None else None
    if (before := stored or trunk) is not None:
        open_model = {name: getattr(before.model, name) for name in _filled(given)}
        asked = given.model_copy(update={"model": given.model.model_copy(update=open_model)})
        if stored is not None:
            config = resume.continued(stored, asked, origin, allow, run.path, unused(given.name, run.path.parent))
        else:
            config = resume.branched(trunk, asked, origin)
    elif source is not None:
        config = given.model_copy(update={"model": _source_shape(given, source)})
    else:
        filled = {"vocab_size": data.tokenizer.padded_size, "max_seq_len": given.data.seq_len}
        model = given.model.model_copy(update={k: v for k, v in filled.items() if getattr(given.model, k) is None})
        config = given.model_copy(update={"model": model})
    if before is None:  # the settings of a run that changed some on its way are another run's from its first step
        config = config.model_copy(update={"history": ()})
    config = _dealt(config)
    assert config.model.max_seq_len is not None
    if config.data.seq_len > config.model.max_seq_len:
        raise ValueError(
            f"data.seq_len ({config.data.seq_len}) exceeds the model's context ({config.model.max_seq_len})"
        )
    check_model(sizes(config.parallel, runtime.world_size()), config.model)
    if config.model.prefix_lm:
        _check_prompts(config, data)
    _check_pairs(config, data)
    if config.choices is not None:
        _check_choices(config, config.choices, data)
    return config


def _dealt(config: TrainConfig) -> TrainConfig:
    """The settings with choices that these ranks can obey: of a micro-batch what divides the rows of each."""
    choices, n_data = config.choices, sizes(config.parallel, runtime.world_size()).n_data
    if choices is None or config.parallel.canonical or n_data == 1:
        return config
    chosen, train = choices.micro_batch, config.train
    each = math.gcd(chosen, rows(config) // n_data)
    if train.micro_batch == chosen:  # what was asked for then, and is not now
        train = train.model_copy(update={"micro_batch": each})
    return config.model_copy(update={"choices": choices.model_copy(update={"micro_batch": each}), "train": train})


def _check_prompts(config: TrainConfig, data: Data) -> None:
    """ValueError unless there are prompts that a prefix-LM can read both ways, and their borders are known."""
    if not config.data.document_mask:
        raise ValueError("model.prefix_lm reads each document's prompt both ways: set data.document_mask=true")
    if not any(part.train.has_spans for part in data.parts):
        raise ValueError(
            f"model.prefix_lm reads prompts both ways, and {names(data)} has none: prepare it from records with a "
            "prompt (prompt: FIELD in its recipe), or set model.prefix_lm=false"
        )


def _check_pairs(config: TrainConfig, data: Data) -> None:
    """ValueError unless pairs are what the objective learns from, and each reply sees its own conversation alone."""
    kind, of_pairs = config.objective.kind, [part.name for part in data.parts if part.train.pairs]
    if not config.objective.of_pairs and of_pairs:
        raise ValueError(
            f"{of_pairs[0]} holds pairs, of which next_token would learn the rejected replies too: set objective.kind=dpo, or "
            "prepare the chosen ones as conversations (chat: true in its recipe)"
        )
    if config.objective.of_pairs and len(of_pairs) < len(data.parts):
        other = next(part.name for part in data.parts if not part.train.pairs)
        raise ValueError(
            f"objective.kind={kind} learns from pairs, and {other} has none: prepare it from records with chosen and rejected "
            "(preference: true in its recipe), or set objective.kind=next_token"
        )
    if of_pairs and not config.data.document_mask:
        raise ValueError(
            f"several pairs share a row of {of_pairs[0]}, and no reply may read another: set data.document_mask=true"
        )


def _check_choices(config: TrainConfig, choices: Choices, data: Data) -> None:
    """ValueError if choices made earlier are for another data set, or the settings now ask for something else."""
    if choices.data != data.fingerprint:
        raise ValueError(
            f"{names(data)} is not the data set this run was started with: its fingerprint is "
            f"{data.fingerprint[:12]}, the run's is {choices.data[:12]}; restore it, or start another run with --fresh"
        )
    train = config.train
    if rows(config) % choices.micro_batch:
        raise ValueError(f"train.micro_batch ({choices.micro_batch}) must divide the batch's {rows(config)} rows")
    asked = {name: getattr(train, name) for name in resume.CHOSEN}
    asked["steps"] = plan.fixed_steps(train)
    for name, value in asked.items():
        if value not in (None, "auto", getattr(choices, name), choices.fallbacks.get(name)):
            raise ValueError(
                f"train.{name} asks for {value}, the choices in the settings say {getattr(choices, name)}; "
                f"choices=null makes them anew"
            )


def _filled(given: TrainConfig) -> list[str]:
    """Settings of the model that the run fills in when the file leaves them open."""
    if given.init_from is not None:
        return [name for name in ModelConfig.model_fields if name not in {"dropout", *given.model.model_fields_set}]
    return [name for name in ("vocab_size", "max_seq_len") if getattr(given.model, name) is None]


def base(given: TrainConfig, latest: Path | None) -> hf.Base | None:
    """What the run's adapter stands on: what its latest checkpoint names, or else init_from; None without an adapter."""
    if given.adapter is None or given.init_from is None:
        return None
    if latest is None:
        return hf.base(given.init_from)
    return hf.base_of(latest) if (latest / ADAPTER).exists() else None  # `agree` will say what is wrong


def begun_from(given: TrainConfig, base: hf.Base | None) -> Callable[[], tuple[Path, str]]:
    """(the directory of init_from's model, what it is in words), looked up once: of a run that goes on, the best checkpoint may
    be another one a minute later. An adapter's is `base`.
    """
    return cache(lambda: resolve(str(given.init_from)) if base is None else (base.path, str(base.path)))


def source(given: TrainConfig, data: Data, begun: Callable[[], tuple[Path, str]], say: Say) -> GPT | None:
    """The model of init_from, which stands where `begun` says, grown if the data set's tokenizer is its own grown; ValueError
    if it is another one."""
    if given.init_from is None:
        return None
    path, what = begun()
    say(f"init_from: {what}")
    model, tokenizer = hf.load(path)
    if tokenizer.sha256 == data.tokenizer.sha256:
        return model
    try:
        new = growth.replaced(tokenizer, data.tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{names(data)} was prepared with another tokenizer than {path} ({error}): "
            f"prepare the text again with --tokenizer {given.init_from}"
        ) from None
    if given.adapter is not None and not given.adapter.embeddings:
        raise ValueError(
            f"{names(data)} has {len(new):,} tokens that {path} does not know, and an adapter would leave them untrained: set "
            f"adapter.embeddings=true, or prepare the text with --tokenizer {given.init_from}"
        )
    say(f"vocabulary: {len(new):,} new tokens, each begins as the mean of those it takes the place of")
    return _grown(model, tokenizer, data.tokenizer)


def _grown(model: GPT, old: Tokenizer, new: Tokenizer) -> GPT:
    """`model` with rows for the tokens that `new` has more than `old`."""
    assert model.config.vocab_size is not None
    rows = max(model.config.vocab_size, new.padded_size)
    grown = model.config.model_copy(update={"vocab_size": rows})
    return hf.adopt(grown, growth.extend(model.state_dict(), old, new, rows))


def _source_shape(given: TrainConfig, source: GPT) -> ModelConfig:
    """The source's shape with the dropout that `given` asks for; ValueError if it asks for more."""
    asked = given.model.model_fields_set - {"dropout"}
    if extra := [name for name in sorted(asked) if getattr(given.model, name) != getattr(source.config, name)]:
        raise ValueError(
            f"with init_from the model is the source's: remove model.{', model.'.join(extra)} (dropout may stay)"
        )
    return source.config.model_copy(update={"dropout": given.model.dropout})


def machine(config: TrainConfig) -> tuple[str, str, int, str]:
    """`plan.machine`; the sums of canonical runs depend on how many threads there are, so there is one."""
    one = config.parallel.canonical and config.train.threads == "auto"
    return plan.machine(config.train.model_copy(update={"threads": 1}) if one else config.train)


def threads(config: TrainConfig, model: GPT) -> int:
    """CPU threads of a new run."""
    device, _, most, _ = machine(config)
    if device != "cpu" or config.train.threads != "auto":
        return most
    micro_batch, seq_len = config.train.micro_batch, config.data.seq_len
    fitting = max(seq_len, min(config.train.batch_tokens, plan.CPU_MICRO_BATCH_TOKENS))
    return plan.threads_for(model, fitting if micro_batch == "auto" else seq_len * micro_batch, seq_len, most)


def device(config: TrainConfig) -> str:
    """Where the run computes: as it was started, or as it will be."""
    return machine(config)[0] if config.choices is None else config.choices.device


def build(config: TrainConfig, source: GPT | None, say: Say, *, in_parts: bool = False) -> GPT:
    """The model on its device, its weights still to be filled in; this process is set up for it.

    Under an adapter the source's own tensors are the frozen base, without a copy. What is to be divided has no memory yet.
    """
    device, dtype, threads, why = machine(config)
    if (choices := config.choices) is not None:
        device, dtype, threads = choices.device, choices.dtype, resume.threads(config)
        why = f"{device}, {dtype}, {threads} threads (as the run was started)"
        try:
            runtime.check_device(device)
        except ValueError as error:
            raise ValueError(
                f"the run computes on {device}: {error}. Continue it where there is one, or here, with other roundings: "
                f"train.device=cpu --allow train.device"
            ) from None
    say(f"device: {why}")
    runtime.setup(device, threads)
    if config.adapter is None:
        with torch.device("meta" if in_parts else "cpu"):
            model = GPT(config.model)
        if not in_parts:
            model.to(device)
        say(f"model: {plan.n_parameters(model) / 1e6:.2f}M parameters")
        return model
    assert source is not None
    model = hf.adopt(config.model, source.state_dict())
    n_base = plan.n_parameters(model)
    if config.adapter.base_dtype != "fp32":
        quantize.quantized(model, config.adapter.base_dtype)
    model.to(device)
    adapters.put_on(model, config.adapter)
    n_trained = plan.n_trained(model)
    say(f"model: {n_base / 1e6:.2f}M parameters, {n_trained / 1e6:.2f}M trained ({config.adapter.kind})")
    return model


def check_space(run: RunDirectory, saves: Checkpoints, keep: int, model: GPT, ema: float | None = None) -> None:
    """OSError unless the run's checkpoints, with one more while it is written, fit on the disk."""
    to_come = max(0, keep + 1 - len(saves.steps())) + 1
    durable.check_space(run.path, to_come * plan.saved_bytes(plan.n_trained(model), ema))


def fill(
    model: GPT, parts: Parts, config: TrainConfig, latest: Path | None, read_source: Callable[[], GPT | None]
) -> None:
    """Give the model its weights: the latest checkpoint's, the source's, or fresh ones from the seed.

    The source is read for it each time, so that no second copy stands in memory while the run trains. Each rank takes its
    parts of the whole.
    """
    if config.adapter is not None:
        if latest is None:
            adapters.fill(model, runtime.key(config.seed, 0, "adapter"))
        else:
            hf.load_adapter(model, latest)
    elif latest is not None:
        hf.fill(config.model, latest, parts.held())
    elif (source := read_source()) is not None:
        for name, given in source.named_parameters():
            parts.put(name, given)
    else:
        names = {parameter: name for name, parameter in parts.parameters.items()}
        for parameter, value in initial_weights(model, runtime.key(config.seed, 0, "init")):
            parts.put(names[parameter], value)


def objective(config: TrainConfig, model: GPT, source: GPT | None) -> Objective:
    """What is minimized, around the model; `source` becomes the frozen reference where it needs one of its own."""
    reference = partial(_without_adapter, model)
    if needs_source(config):
        assert source is not None
        reference = partial(_frozen, source.to(device(config)).requires_grad_(False), model)
    return around(model, config.objective, reference)


@contextmanager
def _without_adapter(model: GPT) -> Iterator[GPT]:
    """`model` as its adapter found it, without dropout; afterwards it is as it was."""
    with runtime.evaluating(model), adapters.off(model):
        yield model


@contextmanager
def _frozen(reference: GPT, model: GPT) -> Iterator[GPT]:
    """`reference`, without dropout and with the kernels of `model`."""
    parallel.equipped(reference, model)
    yield reference.eval()


def needs_source(given: TrainConfig) -> bool:
    """Whether the model of init_from is looked at in every step."""
    return given.objective.compares and given.adapter is None


def _seal(source: GPT) -> str:
    """The sha256 of a model's weights."""
    digest = hashlib.sha256()
    for chunk in serialize(source.state_dict(), {}):
        digest.update(chunk)
    return digest.hexdigest()


Update = Callable[[Forward, Optimizer, Batch, TrainConfig, Choices, int, Ranks], tuple[Tensor, Tensor]]
Rehearse = Callable[[TrainConfig, Optimizer | None], bool]


def settle(
    config: TrainConfig,
    objective: Objective,
    source: GPT | None,
    fill: Callable[[], None],
    data: Data,
    loader: Loader,
    update: Update,
    elapsed: Callable[[], float],
    say: Say,
    parts: Parts,
    rehearse: Rehearse,
) -> TrainConfig:
    """The settings with every choice made; `fill` has given the model its weights when this returns.

    Speed is measured, where a choice depends on it, by real updates; `elapsed()` is what a time budget has lost already.
    `rehearse` may use the weights before that, with the optimizer of the last of those updates; it says whether they moved.
    Rank 0 chooses, and tells the others.
    """
    fill()
    reference = _seal(source) if source is not None and needs_source(config) else None
    made: list[Optimizer] = []
    if (choices := config.choices) is None:
        choices = _choose(config, objective, data, loader, update, elapsed, say, parts, made)
        choices = choices.model_copy(update={"reference": reference})
    elif choices.reference != reference:
        raise ValueError(
            f"{config.init_from} is not the model that this run compares its answers with: its weights have changed since "
            "the run was started, or another checkpoint of it is the best now; name the one of then, init_from=RUN@STEP, "
            "restore it, or start another run with --fresh"
        )
    elif choices.attention == "flex":
        parallel.flexible(objective.model)
    moved, config = config.choices is None, config.model_copy(update={"choices": choices})
    moved |= rehearse(config, made[-1] if made else None)
    made.clear()
    if moved:
        fill()
    _report(data, loader, choices.steps, say)
    if (half_life := config.optim.ema) is not None:
        n = updates(half_life, choices.steps)
        say(f"weights: an average of them with a half-life of {n:.0f} updates is evaluated and saved")
    return config


def trial(
    config: TrainConfig,
    choices: Choices,
    objective: Objective,
    loader: Loader,
    update: Update,
    n: int,
    enough_s: float,
    parts: Parts,
) -> tuple[float, Optimizer]:
    """Seconds of an update, and the optimizer that made `n` of them, or two slow ones, for at least `enough_s` seconds; the
    weights moved. Of several the slowest does not count: a moment in which the machine did something else must not decide.

    An update of bad numbers is not made, as far as this goes: the run itself will meet them. torch.OutOfMemoryError where
    memory is short; of several ranks an error that nobody answers with another try, as that would meet the others amid theirs.
    """
    # Speed does not depend on the learning rate, and without a warm-up a full one might not stay finite.
    still = config.model_copy(update={"schedule": ScheduleConfig(kind="constant", warmup=1e12)})
    ranks, told = parts.ranks, parts.ranks.team.told
    how: dict[str, Any] = {"compile": choices.compile, "checkpointing": config.train.checkpointing}
    forward = parallel.applied(objective, **how, ranks=ranks)
    optimizer = Optimizer(objective.model, config.optim, parts, compile=choices.compile)
    runtime.forget_peak(choices.device)  # one that did not fit says nothing of this one
    step, start, seconds = 0, time.perf_counter(), list[float]()
    while step < min(n, 2) or told(time.perf_counter() - start < (max(PROBE_S, enough_s) if step < n else enough_s)):
        ranks.check()
        step, began = step + 1, time.perf_counter()
        try:
            update(forward, optimizer, loader.batch(step), still, choices, step, ranks)
        except FloatingPointError:
            optimizer.drop()
        except (RuntimeError, ImportError) as error:
            if (meant := _meant(error, choices, ranks)) is not None:
                raise meant from error
            raise
        runtime.synchronize(choices.device)
        if step == 1:  # it warms up, or compiles
            start = time.perf_counter()
        seconds.append(time.perf_counter() - began)
    counted = sorted(seconds[1:] or seconds)
    return statistics.fmean(counted[:-1] or counted), optimizer


def _meant(error: Exception, choices: Choices, ranks: Ranks) -> Exception | None:
    """What an error of an update that is tried stands for; None: for itself."""
    if signals.exit_code(error) == signals.NO_SPACE:  # CPUs say in words only that memory is short
        if ranks.alone:
            return torch.OutOfMemoryError(str(error))
        return MemoryError(f"{error}; ranks cannot look for what fits: set a smaller train.micro_batch")
    if choices.compile and not ranks.alone and not signals.lost(error):
        return ValueError(
            f"compiling failed ({signals.reason(error)}): ranks cannot fall back alone, set train.compile=false"
        )
    return None


def _report(data: Data, loader: Loader, steps: int, say: Say) -> None:
    """Say what the run will read: of each part how much and how often, and how it is packed."""
    epochs = loader.epochs(steps)
    if len(data.parts) == 1:
        say(f"data: {data.n_tokens:,} tokens, {steps:,} steps are {epochs[0][1]:.1f} epochs")
    else:
        total = sum(part.weight for part in data.parts)
        say(f"data: {data.n_tokens:,} tokens in {len(data.parts)} parts, {steps:,} steps")
        for part, (_, times) in zip(data.parts, epochs, strict=True):
            say(
                f"  {part.name}: {part.weight / total:.1%} of what is read, {part.n_tokens:,} tokens, {times:.1f} epochs"
            )
    for line in worn(epochs):
        say(f"warning: {line}")
    for part, order in zip(data.parts, loader.orders, strict=True):
        if isinstance(order, Packed | Pairs):
            say(f"packing: {part.name}: {order.told}")


def worn(epochs: Sequence[tuple[str, float]]) -> Iterator[str]:
    """What is read so often that it teaches little, in words."""
    for name, times in epochs:
        if times > REPEATS:
            yield (
                f"{name} is read {times:.1f} times; past {REPEATS} repetition teaches much less than new text: add some, or "
                "lower its share or the steps"
            )


def _choose(
    config: TrainConfig,
    objective: Objective,
    data: Data,
    loader: Loader,
    update: Update,
    elapsed: Callable[[], float],
    say: Say,
    parts: Parts,
    made: list[Optimizer],
) -> Choices:
    """Settle what is left to choose, by a few updates on real batches where it depends on speed.

    `made` gets the optimizer of the last of them.
    """
    device, dtype, most, _ = machine(config)
    model, attention, ranks = objective.model, "dense", parts.ranks
    told, dtype = ranks.team.told, ranks.team.told(dtype)
    if (n_threads := threads(config, model)) < most:
        say(f"threads: {n_threads} (another would be awake when operations of this size are over)")
        runtime.setup(device, n_threads)
    if config.data.document_mask or config.model.window is not None:
        attention, why = _kernel(model, ranks)
        say(f"attention inside {'documents' if config.data.document_mask else 'windows'}: {why}")
    fused, why = told(parallel.fused_kernel(config.model, device, runtime.DTYPES[dtype], config.data.seq_len))
    if device.startswith("cuda"):
        say(f"attention: {fused} ({why})")

    def measure(micro_batch: int, compile: bool, n: int = PROBE_UPDATES) -> float:
        choices = first.model_copy(update={"micro_batch": micro_batch, "compile": compile})
        made.clear()  # its memory is the next one's
        enough_s = PROBE_SHARE * (config.train.time or 0)
        seconds, optimizer = trial(config, choices, objective, loader, update, n, enough_s, parts)
        made.append(optimizer)
        return told(seconds)

    n_evaluated = evaluated(views(data), config.eval.tokens)
    train, share = config.train, rows(config) // ranks.n.n_data
    if config.parallel.canonical:  # what ranks and machines have no say in
        train = train.model_copy(update={"compile": False if train.compile == "auto" else train.compile})
        share = rows(config)
    first = Choices(
        device=device,
        dtype=dtype,
        threads=n_threads,
        micro_batch=min(ranks.team.gather(_rows_that_fit(config, train, ranks, share, device, dtype, say))),
        compile=False,
        steps=PROBE_UPDATES,
        data=data.fingerprint,
        attention=attention,
        fused=fused,
        torch=runtime.torch_version(),
        cpu=runtime.cpu_kind(),
    )
    choices = plan.choose(
        train,
        first,
        once=lambda seconds: once_s(config, n_evaluated, plan.n_trained(model), seconds),
        extra=lambda seconds: aside_s(config, n_evaluated, plan.n_trained(model), seconds),
        elapsed=lambda: told(elapsed()),
        measure=measure,
        note=say,
        missing=next(filter(None, ranks.team.gather(runtime.compiler_missing())), None),
    )
    if train.micro_batch == "auto" and not made:  # one update tells whether memory is as was thought
        fitted = choices.micro_batch
        try:
            fitted, _ = plan.fitting(partial(measure, n=1), choices.micro_batch, choices.compile, say)
        except torch.OutOfMemoryError:  # of one row: the preflight says so
            fitted = 1
        choices = choices.model_copy(update={"micro_batch": fitted})
    return choices


def aside_s(config: TrainConfig, n_evaluated: int, n_trained: int, update_s: float) -> float:
    """Seconds that evaluations and saves add to an update, on average."""
    evaluation = _evaluation_s(config, n_evaluated, update_s)
    return evaluation / config.eval.every + plan.save_s(n_trained, config.optim.ema) / config.checkpoint.every


def once_s(config: TrainConfig, n_evaluated: int, n_trained: int, update_s: float) -> float:
    """Seconds of what is due whatever the steps: an evaluation and a save at the end, one before tuning begins."""
    n = 1 if config.init_from is None else 2
    return n * _evaluation_s(config, n_evaluated, update_s) + plan.save_s(n_trained, config.optim.ema)


def _evaluation_s(config: TrainConfig, n_evaluated: int, update_s: float) -> float:
    """An evaluated token costs a third of a trained one."""
    return update_s / 3 * n_evaluated / config.train.batch_tokens


def _rows_that_fit(
    config: TrainConfig, train: TrainingConfig, ranks: Ranks, share: int, device: str, dtype: str, say: Say
) -> int:
    """Rows of a micro-batch of a rank's `share` of an update: as set, or by what memory has left beside the model."""
    if config.parallel.canonical:  # what a machine has room for has no say in it
        return plan.micro_batch(train, share, row_length(config), "cpu", lambda rows: True, say)
    shared_by = 1 if device.startswith("cuda") else runtime.local_world_size()
    room = (1 - memory.SPARE) * runtime.free_memory_bytes(device) / shared_by
    of = setting(config, device, dtype)
    fit = fits(config.model, of, room, ranks.n, beside=True)
    return plan.micro_batch(train, share, row_length(config), device, fit, say)


def setting(config: TrainConfig, device: str, dtype: str, rows: int = 1) -> memory.Setting:
    """What the memory of an update depends on, of these settings."""
    return memory.Setting(
        rows=rows,
        seq_len=config.data.seq_len,
        device=device,
        dtype=dtype,
        optim=config.optim,
        adapter=config.adapter,
        checkpointing=config.train.checkpointing,
        documents=config.data.document_mask,
        objective=config.objective,
    )


def fits(
    shape: ModelConfig, of: memory.Setting, room: float, n: Sizes = ALONE, *, beside: bool = False
) -> Callable[[int], bool]:
    """Whether so many rows fit into `room` bytes, of each of `n` devices; `beside`: beside the weights, which are there already.

    Gone through only where a count of more than it takes does not fit.
    """
    needs = memory.needs(shape, of)

    def so_many(rows: int) -> bool:
        if memory.at_most(shape, of, rows) <= room:
            return True
        whole = needs(rows)
        # What FSDP2 gathers is to come.
        there = whole.weights // (n.shard * n.tensor) + whole.reference if beside else 0
        return division.held(whole, division.portions(shape), n).total - there <= room

    return so_many


def _kernel(model: GPT, ranks: Ranks) -> tuple[str, str]:
    """`parallel.hiding_kernel` that works on every rank, and why."""
    found = ranks.team.gather(parallel.hiding_kernel(model))
    kernel, why = next((each for each in found if each[0] == "dense"), found[0])
    if kernel == "dense":
        model.model.flex = None
    return kernel, why


def rows(config: TrainConfig) -> int:
    """Rows of one update."""
    return config.train.batch_tokens // row_length(config)


def row_length(config: TrainConfig) -> int:
    """Tokens of a row: of pairs it holds both sides."""
    return config.data.seq_len * (2 if config.objective.of_pairs else 1)


def unused(name: str, runs: Path) -> str:
    """NAME-2, NAME-3, ...: the first that is free in `runs`."""
    return next(candidate for i in itertools.count(2) if not (runs / (candidate := f"{name}-{i}")).exists())


def names(data: Data) -> str:
    """The data sets, for people."""
    return ", ".join(dict.fromkeys(str(part.train.path) for part in data.parts))
