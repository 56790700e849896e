"""train(): the one loop, for pretraining and fine-tuning, on any device. Everything it needs is a noun built once before step 1.

A run is its name and its settings: the same call continues where it stopped, other settings under the same name are refused.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from gpt import adapters, durable, hf, parallel, plan, runtime, settle, signals
from gpt import config as settings
from gpt.checkpoint import ADAPTER, WEIGHTS, Checkpoints, load_optimizer, load_state, save
from gpt.data import Batch, Data, Loader, open_data, prefetched
from gpt.evaluate import Evaluation, Preferred, evaluate, prefer, views
from gpt.generate import Sampling, complete
from gpt.log import WATCHER_GONE, Log
from gpt.loss import Objective, Preferences, n_terms
from gpt.optim import Optimizer
from gpt.plan import Choices
from gpt.run import RunDirectory, best_of, scores_of
from gpt.schedule import due, factor
from gpt.settle import RUNS, TrainConfig

SAMPLE_TOKENS = 100
EVAL_TOKENS = 4096  # of one forward pass of an evaluation, which keeps no activations


def update(
    forward: parallel.Forward, optimizer: Optimizer, batch: Batch, config: TrainConfig, choices: Choices, step: int
) -> tuple[Tensor, Tensor]:
    """One optimizer step on `batch`; (loss in nats per target or pair, gradient norm before clipping), still on the device.

    Raises FloatingPointError, with the weights untouched, if either is not finite.
    """
    n = max(1, n_terms(config.objective, batch))
    loss = torch.zeros((), device=choices.device)
    parts = zip(*(x.split(choices.micro_batch) for x in batch.given), strict=True)
    for i, part in enumerate(parts):
        torch.manual_seed(runtime.key(config.seed, step, "dropout", i))
        with runtime.autocast(choices.device, choices.dtype):
            nats = forward(*(x.to(choices.device, non_blocking=True) for x in part))
        (nats / n).backward()
        loss += nats.detach() / n
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


@dataclass
class Session:
    """One run at work: its settings with every choice made, its data, and what an update touches."""

    config: TrainConfig
    choices: Choices
    run: RunDirectory
    saves: Checkpoints
    log: Log
    data: Data
    loader: Loader
    objective: Objective
    optimizer: Optimizer
    elapsed: Callable[[], float]  # seconds of training, over all resumes
    base: hf.Base | None  # what an adapter stands on
    scores: dict[int, float] = field(init=False)  # val_bpb (of pairs val_loss) by step
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
        reference = config.objective.kind == "dpo"
        flops = rate * plan.flops_per_token(self.objective.model, config.data.seq_len, reference=reference)
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
        model, tokenizer, adapter = self.objective.model, self.data.tokenizer, self.config.adapter
        if adapter is None or self.base is None:
            files, weights = hf.model_files(model.config, tokenizer), hf.to_disk(model.config, model.state_dict())
        else:
            files, weights = hf.adapter_files(model, tokenizer, adapter, self.base), adapters.to_peft(model)
        self.log.sync()
        save(
            self.saves.path(step),
            model_files=files,
            weights=weights,
            weights_file=WEIGHTS if adapter is None else ADAPTER,
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
        config, choices = self.config, self.choices
        row = settle.row_length(config)
        how: dict[str, Any] = {
            "seq_len": config.data.seq_len,
            "document_mask": config.data.document_mask,
            "prefix": config.model.prefix_lm,
            "batch_rows": max(choices.micro_batch, EVAL_TOKENS // row),
            "device": choices.device,
            "dtype": choices.dtype,
        }
        if isinstance(self.objective, Preferences):
            result: Evaluation | Preferred = prefer(self.objective, views(self.data), config.eval, **how)
        else:
            result = evaluate(self.objective, views(self.data), config.eval, self.data.tokenizer, **how)
        self.scores[step] = result.score
        self.log.eval(step, tokens=self.tokens(step), **asdict(result), elapsed_s=self.elapsed())

    def _sample(self, step: int) -> None:
        model, tokenizer = self.objective.model, self.data.tokenizer
        seed, (asked, ends) = (
            runtime.key(self.config.seed, step, "sample"),
            opening(self.data, self.config.data.seq_len),
        )
        events = complete(model, tokenizer, [asked], Sampling(), SAMPLE_TOKENS, seed=seed, stop_ids=ends)
        text = tokenizer.decode(asked[1:]) + "".join(event.text for event in events)
        self.log.sample(step, tokens=self.tokens(step), text=text)

    def out_of_patience(self) -> bool:
        """Whether the last `train.patience` evaluations all failed to improve on the best before them."""
        patience, scores = self.config.train.patience, list(self.scores.values())
        return patience is not None and len(scores) > patience and min(scores[-patience:]) >= min(scores[:-patience])


def opening(data: Data, seq_len: int) -> tuple[list[int], set[int]]:
    """What a sample continues, and what ends it: the first prompt of the validation split, or else the start of a text."""
    tokenizer = data.tokenizer
    for val in (part.val for part in data.parts if part.val.has_spans):
        start, end = [*val.document_starts[:2].tolist(), val.n_tokens][:2]
        learned = (span for span in val.spans(start, end - start) if span.kind == "train" and span.start > start + 1)
        span = next(learned, None)
        if span is not None and span.start - start < seq_len:
            *_, last = val.read(start, span.end - start).tolist()
            ends = {tokenizer.end_id, last} & {tokenizer.end_id, *tokenizer.control_ids}
            return val.read(start, span.start - start).tolist(), ends
    return [tokenizer.start_id], {tokenizer.end_id}


def train(given: TrainConfig, *, fresh: bool = False, console: Console) -> None:
    """Train the run `given.name` from where it stands to its end; status.json says how it ended.

    Raises signals.Stopped when asked to stop (the step is saved), ValueError for what the user can mend, FloatingPointError
    on non-finite numbers.
    """
    began = time.monotonic()

    def say(line: str) -> None:
        with suppress(*WATCHER_GONE):
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    settle.check(given)
    data = open_data(given.data)
    if fresh:
        given = given.model_copy(update={"name": settle.unused(given.name)})
        say(f"starting {given.name}; continue it with name={given.name}, without --fresh")
    run = RunDirectory(RUNS, given.name)
    with run.lock():
        saves = Checkpoints(run.checkpoints, given.checkpoint.keep)
        saves.sweep()
        latest = saves.latest()
        state = State() if latest is None else State(**load_state(latest))

        def elapsed() -> float:
            return state.elapsed_s + time.monotonic() - began

        base = settle.base(given, latest)
        wanted = latest is None or base is not None or settle.needs_source(given)
        source = settle.source(given, data, say, base) if wanted else None
        config = settle.agree(given, run, latest, data, source)
        with _recorded(run, saves):
            model = settle.build(config, source, say)
            source = source if settle.needs_source(config) else None
            settle.check_space(run, saves, given.checkpoint.keep, model)
            loader = Loader(data, config.data, settle.rows(config), config.seed, prefix=config.model.prefix_lm)
            read_source = partial(settle.source, given, data, lambda line: None, base)
            fill = partial(settle.fill, model, config, latest, read_source)
            objective = settle.objective(config, model, source)
            config = settle.settle(config, objective, source, fill, data, loader, update, elapsed, say)
            assert config.choices is not None
            optimizer = Optimizer(model, config.optim)
            if latest is not None:
                optimizer.load_state(load_optimizer(latest))
            durable.write_file(run.config_path, settings.dump(config).encode())
            run.truncate_metrics(-1 if latest is None else state.step)
            steps = config.choices.steps
            with Log(run.path, config.log, run_config=_public(config), steps=steps, console=console) as log:
                at_work = (run, saves, log, data, loader, objective, optimizer, elapsed, base)
                session = Session(config, config.choices, *at_work)
                last = _loop(session, state.step)
        early = f"no better score in {config.train.patience} evaluations"
        run.status("done", last, "all steps made" if last == steps else early)
        _farewell(session, say)


def _loop(session: Session, start: int) -> int:
    """Make updates start + 1 .. steps and do what is due after each; return the last step made."""
    config, choices = session.config, session.choices
    forward = parallel.applied(session.objective, compile=choices.compile, checkpointing=config.train.checkpointing)
    session.observe(start)
    if session.out_of_patience():
        return start
    reported, clock = start, time.monotonic()
    pin = choices.device.startswith("cuda")
    with closing(prefetched(session.loader, start + 1, choices.steps, pin)) as batches:
        for step, batch in enumerate(batches, start + 1):
            loss, grad_norm = update(forward, session.optimizer, batch, config, choices, step)
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


def _public(config: TrainConfig) -> dict[str, object]:
    """What a tracker may know: sizes and rates, no paths."""
    hidden = ("name", "init_from", "data.path", "data.tokenizer", "data.mixture", "data.sources", "log.")
    return {name: value for name, value in settings.flatten(config).items() if not name.startswith(hidden)}


def _farewell(session: Session, say: Callable[[str], None]) -> None:
    """Say how it ended and what to type next."""
    best = session.best()
    if best is not None:
        unit = "nats/pair" if session.config.objective.of_pairs else "bits/byte"
        say(f"best: {session.scores[best]:.4f} {unit} at step {best}, {session.saves.path(best)}")
    say(f'next: python sample.py {session.run.path} --prompt "..."')
