"""train(): the one loop, for pretraining and fine-tuning, on any device. Everything it needs is a noun built once before step 1.

A run is its name and its settings: the same call continues where it stopped, other settings under the same name are refused.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from gpt import config as settings
from gpt import durable, hf, parallel, plan, runtime, signals
from gpt.checkpoint import CheckpointConfig, Checkpoints, load_optimizer, load_state, load_weights, save
from gpt.config import Settings
from gpt.data import Batch, DataConfig, Loader, evaluated_tokens
from gpt.evaluate import EvalConfig, evaluate
from gpt.generate import Sampling, complete
from gpt.log import WATCHER_GONE, Log, LogConfig
from gpt.loss import NextToken
from gpt.model import GPT, ModelConfig, init_weights
from gpt.optim import OptimConfig, Optimizer
from gpt.plan import Choices, TrainingConfig
from gpt.run import RunDirectory, best_of, resolve, scores_of
from gpt.schedule import ScheduleConfig, due, factor
from gpt.shards import TokenSet
from gpt.tokenizer import Tokenizer

# What may change between resumes, since it changes no update; the data set is known by its fingerprint.
FREE = ("name", "choices", "data.path", "log.", "checkpoint.", "eval.every")
RUNS = Path("runs")
PROBE_UPDATES = 6
PROBE_SHARE = 0.03  # of a time budget: a shared machine's speed of one second says little about the next
SAMPLE_TOKENS = 100
EVAL_TOKENS = 4096  # of one forward pass of an evaluation, which keeps no activations


class TrainConfig(Settings):
    """A run, whole: a table of contents."""

    name: str = Field(description="the run's directory under runs/; defaults to the file's stem")
    seed: int = Field(1337, description="of the weights, the order of data and dropout")
    init_from: str | None = Field(
        None, description="run, checkpoint or Hugging Face directory whose weights and tokenizer to start from"
    )
    data: DataConfig = Field(description="what is trained on")
    model: ModelConfig = Field(
        default_factory=ModelConfig, description="the decoder's shape; with init_from only dropout may be set"
    )
    train: TrainingConfig = Field(description="how long, in what portions and on what")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="how parameters move")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="learning rate over the run")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="when and on what to evaluate")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="when to save and what to keep")
    log: LogConfig = Field(default_factory=LogConfig, description="what people watch")
    choices: Choices | None = Field(
        None, description="what settled itself before step 1; written by the run, obeyed when present"
    )


def update(
    forward: parallel.Forward, optimizer: Optimizer, batch: Batch, config: TrainConfig, choices: Choices, step: int
) -> tuple[Tensor, Tensor]:
    """One optimizer step on `batch`; (loss in nats per target, gradient norm before clipping), still on the device.

    Raises FloatingPointError, with the weights untouched, if either is not finite.
    """
    n_targets = max(1, batch.n_targets)
    loss = torch.zeros((), device=choices.device)
    parts = zip(batch.tokens.split(choices.micro_batch), batch.targets.split(choices.micro_batch), strict=True)
    for i, (tokens, targets) in enumerate(parts):
        torch.manual_seed(runtime.key(config.seed, step, "dropout", i))
        with runtime.autocast(choices.device, choices.dtype):
            nats = forward(tokens.to(choices.device), targets.to(choices.device))
        (nats / n_targets).backward()
        loss += nats.detach() / n_targets
    grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.names, config.optim.clip or math.inf)
    if not torch.isfinite(loss + grad_norm):
        raise FloatingPointError(
            f"step {step}: loss {float(loss)}, gradient norm {float(grad_norm)}; the update was not made. "
            f"Lower optim.lr ({config.optim.lr}) or lengthen schedule.warmup, and start again with --fresh"
        )
    optimizer.step(factor(config.schedule, step, choices.steps))
    return loss, grad_norm


@dataclass(frozen=True)
class State:
    """Where a checkpoint stands; everything else follows from the step and the settings."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Data:
    """A prepared data set, opened and checked against the settings."""

    train: TokenSet
    val: TokenSet
    tokenizer: Tokenizer


def open_data(config: DataConfig) -> Data:
    """Open both splits and the tokenizer; ValueError or CorruptError in words if they do not belong together."""
    path = Path(config.path)
    data = Data(TokenSet(path, "train"), TokenSet(path, "val"), Tokenizer.load(path))
    if data.tokenizer.sha256 != data.train.tokenizer_sha256:
        raise ValueError(f"{path}: tokenizer.json is not the one the data set was made with; prepare it again")
    if data.val.n_tokens < config.seq_len:
        raise ValueError(
            f"{path}: the validation split has {data.val.n_tokens} tokens, fewer than data.seq_len ({config.seq_len}); "
            f"prepare it with a larger val_fraction or lower data.seq_len"
        )
    return data


@dataclass
class Session:
    """One run at work: its settings with every choice made, its data, and what an update touches."""

    config: TrainConfig
    choices: Choices
    run: RunDirectory
    saves: Checkpoints
    log: Log
    data: Data
    objective: NextToken
    optimizer: Optimizer
    elapsed: Callable[[], float]  # seconds of training, over all resumes
    scores: dict[int, float] = field(init=False)  # val_bpb by step
    sampled: set[int] = field(init=False)  # steps whose sample stands in metrics.jsonl

    def __post_init__(self) -> None:
        lines = self.run.metrics()
        self.scores = scores_of(lines)
        self.sampled = {line["step"] for line in lines if line["kind"] == "sample"}

    def tokens(self, step: int) -> int:
        return step * self.config.train.batch_tokens

    def report(self, step: int, loss: Tensor, grad_norm: Tensor, steps_per_s: float) -> None:
        """Log update `step`; the only place where training waits for metrics."""
        config, rate = self.config, steps_per_s * self.config.train.batch_tokens
        flops = rate * plan.flops_per_token(self.objective.model, config.data.seq_len)
        peak = plan.peak_flops(self.choices.device)
        self.log.train(
            step,
            tokens=self.tokens(step),
            loss=float(loss),
            lr=config.optim.lr * factor(config.schedule, step, self.choices.steps),
            grad_norm=float(grad_norm),
            tokens_per_second=rate,
            mfu=flops / peak if peak else None,
            elapsed_s=self.elapsed(),
            peak_memory_bytes=runtime.peak_memory_bytes(self.choices.device),
        )

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, if it is not there, then let go of those that are neither new nor best."""
        if step in self.saves.steps():
            return
        model = self.objective.model
        self.log.sync()
        save(
            self.saves.path(step),
            model_files=hf.model_files(model.config, self.data.tokenizer),
            weights=hf.to_disk(model.config, model.state_dict()),
            optimizer=self.optimizer.state(),
            run_yaml=settings.dump(self.config),
            state=asdict(State(step, self.tokens(step), self.elapsed())),
        )
        self.saves.prune(self.best())

    def best(self) -> int | None:
        """The step of the best checkpoint."""
        return best_of(self.scores, self.saves.steps())

    def observe(self, step: int) -> None:
        """What follows the save of `step`: its evaluation and its sample, where due and not yet in metrics.jsonl.

        A stop request during them saves the step first, then raises signals.Stopped.
        """
        config, steps = self.config, self.choices.steps
        evaluating = due(step, config.eval.every, steps) if step else config.init_from is not None
        sampling = step > 0 and due(step, config.log.sample_every, steps)
        try:
            if evaluating and step not in self.scores:
                self._evaluate(step)
            if sampling and step not in self.sampled:
                self._sample(step)
        except signals.Stopped:
            self.stop(step)

    def stop(self, step: int) -> NoReturn:
        """Save `step` and raise signals.Stopped."""
        if step:
            self.save(step)
        raise signals.Stopped(
            f"stopped by {signals.stop_requested()} at step {step}; the same command continues from there"
        )

    def _evaluate(self, step: int) -> None:
        config = self.config
        result = evaluate(
            self.objective,
            self.data.val,
            config.eval,
            seq_len=config.data.seq_len,
            batch_rows=max(self.choices.micro_batch, EVAL_TOKENS // config.data.seq_len),
            device=self.choices.device,
            dtype=self.choices.dtype,
        )
        self.scores[step] = result.val_bpb
        self.log.eval(
            step,
            tokens=self.tokens(step),
            val_loss=result.val_loss,
            val_bpb=result.val_bpb,
            elapsed_s=self.elapsed(),
        )

    def _sample(self, step: int) -> None:
        seed = runtime.key(self.config.seed, step, "sample")
        events = complete(self.objective.model, self.data.tokenizer, [""], Sampling(), SAMPLE_TOKENS, seed=seed)
        self.log.sample(step, tokens=self.tokens(step), text="".join(event.text for event in events))

    def out_of_patience(self) -> bool:
        """Whether the last `train.patience` evaluations all failed to improve on the best before them."""
        patience, scores = self.config.train.patience, list(self.scores.values())
        return patience is not None and len(scores) > patience and min(scores[-patience:]) >= min(scores[:-patience])


def train(given: TrainConfig, *, fresh: bool = False, console: Console) -> None:
    """Train the run `given.name` from where it stands to its end; status.json says how it ended.

    Raises signals.Stopped when asked to stop (the step is saved), ValueError for what the user can mend, FloatingPointError
    on non-finite numbers.
    """
    began = time.monotonic()

    def say(line: str) -> None:
        with suppress(*WATCHER_GONE):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    _check(given)
    data = open_data(given.data)
    if fresh:
        given = given.model_copy(update={"name": _unused(given.name)})
        say(f"starting {given.name}; continue it with name={given.name}, without --fresh")
    run = RunDirectory(RUNS, given.name)
    with run.lock():
        saves = Checkpoints(run.checkpoints, given.checkpoint.keep)
        saves.sweep()
        latest = saves.latest()
        state = State() if latest is None else State(**load_state(latest))

        def elapsed() -> float:
            return state.elapsed_s + time.monotonic() - began

        source = _source(given, data, say) if latest is None else None
        config = _agree(given, run, latest, data, source)
        with _recorded(run, saves):
            model = _build(config, say)
            _check_space(run, saves, given.checkpoint.keep, model)
            config = _settle(config, model, partial(_fill, model, config, latest, source), data, elapsed, say)
            assert config.choices is not None
            optimizer = Optimizer(model, config.optim)
            if latest is not None:
                optimizer.load_state(load_optimizer(latest))
            durable.write_file(run.config_path, settings.dump(config).encode())
            run.truncate_metrics(-1 if latest is None else state.step)
            steps = config.choices.steps
            with Log(run.path, config.log, run_config=_public(config), steps=steps, console=console) as log:
                session = Session(config, config.choices, run, saves, log, data, NextToken(model), optimizer, elapsed)
                last = _loop(session, state.step)
        early = f"no better val_bpb in {config.train.patience} evaluations"
        run.status("done", last, "all steps made" if last == steps else early)
        _farewell(session, say)


def _loop(session: Session, start: int) -> int:
    """Make updates start + 1 .. steps and do what is due after each; return the last step made."""
    config, choices = session.config, session.choices
    forward = parallel.applied(session.objective, compile=choices.compile)
    loader = Loader(session.data.train, config.data.seq_len, _rows(config), config.seed)
    session.observe(start)
    if session.out_of_patience():
        return start
    reported, clock = start, time.monotonic()
    for step in range(start + 1, choices.steps + 1):
        loss, grad_norm = update(forward, session.optimizer, loader.batch(step), config, choices, step)
        if due(step, config.log.every, choices.steps):
            session.report(step, loss, grad_norm, (step - reported) / (time.monotonic() - clock))
            reported, clock = step, time.monotonic()
        if signals.stop_requested():
            session.stop(step)
        if due(step, config.checkpoint.every, choices.steps):
            session.save(step)
        if due(step, config.eval.every, choices.steps) or due(step, config.log.sample_every, choices.steps):
            away = time.monotonic()
            session.observe(step)
            clock += time.monotonic() - away
            if session.out_of_patience():
                session.save(step)
                return step
    return choices.steps


@contextmanager
def _recorded(run: RunDirectory, saves: Checkpoints) -> Iterator[None]:
    """Tell in status.json that the run is at work, and how it stopped if it did not come to its end."""

    def status(state: str, reason: str) -> None:
        with suppress(OSError):  # a full disk must not hide what went wrong
            run.status(state, max(saves.steps(), default=0), reason)

    status("running", "")
    try:
        yield
    except signals.Stopped as stopped:
        status("preempted", str(stopped))
        raise
    except BaseException as error:
        status("failed", f"{type(error).__name__}: {error}")
        raise


def _check(given: TrainConfig) -> None:
    """ValueError for what cannot be trained here, before anything is made for it."""
    if runtime.world_size() > 1:
        raise ValueError("training runs in one process: start it with `python train.py`, without torchrun")
    if given.train.batch_tokens % given.data.seq_len:
        raise ValueError(
            f"train.batch_tokens ({given.train.batch_tokens}) must be a multiple of data.seq_len ({given.data.seq_len})"
        )
    if given.train.device != "auto":
        runtime.check_device(given.train.device)


def _agree(given: TrainConfig, run: RunDirectory, latest: Path | None, data: Data, source: GPT | None) -> TrainConfig:
    """The run's settings, the model's filled in: `given`, or what the run was started with, where both say the same.

    Raises ValueError with the differences and what to run instead if they do not.
    """
    written = run.config_path if latest is None else latest / "run.yaml"  # the one that is verified, if there is one
    if written.exists():
        stored = settings.load(TrainConfig, written)
        open_model = {name: getattr(stored.model, name) for name in _filled(given)}
        asked = given.model_copy(update={"model": given.model.model_copy(update=open_model)})
        changed = [d for d in settings.differences(stored, asked) if not d[0].startswith(FREE)]
        if changed:
            rows = "\n".join(f"  {name}: {old} -> {new}" for name, old, new in changed)
            raise ValueError(
                f"{run.path} was started with other settings:\n{rows}\n"
                f"continue it with its own settings, or start another run: name=NEW, or --fresh (as {_unused(given.name)})"
            )
        config = asked.model_copy(update={"choices": stored.choices})
    elif source is not None:
        config = given.model_copy(update={"model": _source_shape(given, source)})
    else:
        filled = {"vocab_size": data.tokenizer.padded_size, "max_seq_len": given.data.seq_len}
        model = given.model.model_copy(update={k: v for k, v in filled.items() if getattr(given.model, k) is None})
        config = given.model_copy(update={"model": model})
    assert config.model.max_seq_len is not None
    if config.data.seq_len > config.model.max_seq_len:
        raise ValueError(
            f"data.seq_len ({config.data.seq_len}) exceeds the model's context ({config.model.max_seq_len})"
        )
    if config.choices is not None:
        _check_choices(config, config.choices, data)
    return config


def _check_choices(config: TrainConfig, choices: Choices, data: Data) -> None:
    """ValueError if choices made earlier are for another data set, or the settings now ask for something else."""
    if choices.data != data.train.fingerprint:
        raise ValueError(
            f"{config.data.path} is not the data set this run was started with: its fingerprint is "
            f"{data.train.fingerprint[:12]}, the run's is {choices.data[:12]}; restore it, or start another run with --fresh"
        )
    train = config.train
    asked = {name: getattr(train, name) for name in ("device", "dtype", "compile", "micro_batch", "threads")}
    asked["steps"] = plan.fixed_steps(train)
    for name, value in asked.items():
        if value not in (None, "auto") and value != getattr(choices, name):
            raise ValueError(
                f"train.{name} asks for {value}, the choices in the settings say {getattr(choices, name)}; "
                f"choices=null makes them anew"
            )


def _filled(given: TrainConfig) -> list[str]:
    """Settings of the model that the run fills in when the file leaves them open."""
    if given.init_from is not None:
        return [name for name in ModelConfig.model_fields if name != "dropout"]
    return [name for name in ("vocab_size", "max_seq_len") if getattr(given.model, name) is None]


def _source(given: TrainConfig, data: Data, say: Callable[[str], None]) -> GPT | None:
    """The model of init_from; ValueError if the data set was prepared with another tokenizer than its."""
    if given.init_from is None:
        return None
    path, what = resolve(given.init_from)
    say(f"init_from: {what}")
    model, tokenizer = hf.load(path)
    if tokenizer.sha256 != data.tokenizer.sha256:
        raise ValueError(
            f"{given.data.path} was prepared with another tokenizer than {path}: "
            f"prepare the text again with --tokenizer {given.init_from}"
        )
    return model


def _source_shape(given: TrainConfig, source: GPT) -> ModelConfig:
    """The source's shape with the dropout that `given` asks for; ValueError if it asks for more."""
    asked = given.model.model_fields_set - {"dropout"}
    if extra := [name for name in sorted(asked) if getattr(given.model, name) != getattr(source.config, name)]:
        raise ValueError(
            f"with init_from the model is the source's: remove model.{', model.'.join(extra)} (dropout may stay)"
        )
    return source.config.model_copy(update={"dropout": given.model.dropout})


def _build(config: TrainConfig, say: Callable[[str], None]) -> GPT:
    """The model on its device, its weights still to be filled in; this process is set up for it."""
    device, dtype, threads, why = plan.machine(config.train)
    if (choices := config.choices) is not None:
        device, dtype, threads = choices.device, choices.dtype, choices.threads
        why = f"{device}, {dtype}, {threads} threads (as the run was started)"
        try:
            runtime.check_device(device)
        except ValueError as error:
            raise ValueError(
                f"the run computes on {device}: {error}. Continue it where there is one, or start from its weights: "
                f"name=NEW init_from={RUNS / config.name}@last"
            ) from None
        for was, now in ((choices.torch, runtime.torch_version()), (choices.cpu, runtime.cpu_kind())):
            if now != was:
                say(f"started on {was}, now on {now}: the run continues, its bits may differ")
    say(f"device: {why}")
    runtime.setup(device, threads)
    model = GPT(config.model).to(device)
    say(f"model: {plan.n_parameters(model) / 1e6:.2f}M parameters")
    return model


def _check_space(run: RunDirectory, saves: Checkpoints, keep: int, model: GPT) -> None:
    """OSError unless the run's checkpoints, with one more while it is written, fit on the disk."""
    to_come = max(0, keep + 1 - len(saves.steps())) + 1
    durable.check_space(run.path, to_come * 12 * plan.n_parameters(model))


def _settle(
    config: TrainConfig,
    model: GPT,
    fill: Callable[[], None],
    data: Data,
    elapsed: Callable[[], float],
    say: Callable[[str], None],
) -> TrainConfig:
    """The settings with every choice made; `fill` has given the model its weights when this returns."""
    fill()
    if (choices := config.choices) is None:
        choices = _choose(config, model, data, elapsed, say)
        fill()  # measuring moved them
    epochs = choices.steps * config.train.batch_tokens / data.train.n_tokens
    say(f"data: {data.train.n_tokens:,} tokens, {choices.steps:,} steps are {epochs:.1f} epochs")
    return config.model_copy(update={"choices": choices})


def _fill(model: GPT, config: TrainConfig, latest: Path | None, source: GPT | None) -> None:
    """Give the model its weights: the latest checkpoint's, the source's, or fresh ones from the seed."""
    if latest is not None:
        model.load_state_dict(hf.from_disk(config.model, load_weights(latest)))
    elif source is not None:
        model.load_state_dict(source.state_dict())
    else:
        init_weights(model, runtime.key(config.seed, 0, "init"))


def _choose(
    config: TrainConfig, model: GPT, data: Data, elapsed: Callable[[], float], say: Callable[[str], None]
) -> Choices:
    """Settle what is left to choose, by a few updates on real batches where it depends on speed."""
    device, dtype, threads, _ = plan.machine(config.train)
    objective, rows = NextToken(model), _rows(config)
    loader = Loader(data.train, config.data.seq_len, rows, config.seed)
    # Speed does not depend on the learning rate, and without a warm-up a full one might not stay finite.
    still = config.model_copy(update={"schedule": ScheduleConfig(kind="constant", warmup=1e12)})

    def measure(micro_batch: int, compile: bool) -> float:
        trial = Choices(
            device=device,
            dtype=dtype,
            threads=threads,
            micro_batch=micro_batch,
            compile=compile,
            steps=PROBE_UPDATES,
            data=data.train.fingerprint,
            torch=runtime.torch_version(),
            cpu=runtime.cpu_kind(),
        )
        forward, optimizer = parallel.applied(objective, compile=compile), Optimizer(model, config.optim)
        step, start, enough = 0, time.perf_counter(), PROBE_SHARE * (config.train.time or 0)
        while step < PROBE_UPDATES or time.perf_counter() - start < enough:
            signals.check()
            step += 1
            try:
                update(forward, optimizer, loader.batch(step), still, trial, step)
            except RuntimeError as error:  # CPUs say in words only that memory is short
                if signals.exit_code(error) == signals.NO_SPACE:
                    raise torch.OutOfMemoryError(str(error)) from None
                raise
            runtime.synchronize(device)
            if step == 1:  # it warms up, or compiles
                start = time.perf_counter()
        return (time.perf_counter() - start) / (step - 1)

    def extra(update_s: float) -> float:
        """An evaluated token costs a third of a trained one; a save writes 12 bytes a parameter at about 300 MB/s."""
        evaluation = update_s / 3 * evaluated_tokens(data.val, config.eval.tokens) / config.train.batch_tokens
        return evaluation / config.eval.every + 12 * plan.n_parameters(model) / 3e8 / config.checkpoint.every

    return plan.choose(
        config.train,
        rows=plan.micro_batch(config.train, config.model, rows, config.data.seq_len, device),
        device=device,
        dtype=dtype,
        threads=threads,
        data=data.train.fingerprint,
        extra=extra,
        elapsed=elapsed,
        measure=measure,
        note=say,
    )


def _rows(config: TrainConfig) -> int:
    """Rows of one update."""
    return config.train.batch_tokens // config.data.seq_len


def _unused(name: str) -> str:
    """NAME-2, NAME-3, ...: the first that is free."""
    return next(candidate for i in itertools.count(2) if not (RUNS / (candidate := f"{name}-{i}")).exists())


def _public(config: TrainConfig) -> dict[str, object]:
    """What a tracker may know: sizes and rates, no paths."""
    hidden = ("name", "init_from", "data.path", "log.")
    return {name: value for name, value in settings.flatten(config).items() if not name.startswith(hidden)}


def _farewell(session: Session, say: Callable[[str], None]) -> None:
    """Say how it ended and what to type next."""
    best = session.best()
    if best is not None:
        say(f"best: {session.scores[best]:.4f} bits/byte at step {best}, {session.saves.path(best)}")
    say(f'next: python sample.py {session.run.path} --prompt "..."')
