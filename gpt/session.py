"""Session: one run at work. What is due at a step (update, report, save, evaluation, sample) is a method; `trainer` says when."""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from gpt import adapters, doctor, durable, families, hf, inference, plan, resume, runtime, settle, signals
from gpt import config as settings
from gpt.averages import Average
from gpt.checkpoint import ADAPTER_WEIGHTS, Checkpoints, load_state, owners
from gpt.data import Batch, Data, Loader, Window, merged, numbered
from gpt.doctor import Doctor, Finding
from gpt.evaluate import Evaluation, Preferred, evaluate, prefer, views
from gpt.generate import Sampling, complete
from gpt.judge import Bad, Judge, LossScale
from gpt.log import Log
from gpt.loss import Objective, Preferences
from gpt.model import GPT
from gpt.optim import Optimizer
from gpt.parts import Parts
from gpt.plan import Choices
from gpt.preflight import portion, within
from gpt.ranks import Forward
from gpt.run import RunDirectory, best_of, scores_of
from gpt.saving import Writer
from gpt.schedule import due, factor
from gpt.settle import TrainConfig
from gpt.team import Elsewhere, Team
from gpt.watchdog import Watchdog

SAMPLE_TOKENS = 100
EVAL_TOKENS = 4096  # of one forward pass of an evaluation, which keeps no activations


@dataclass(frozen=True)
class State:
    """Where a checkpoint stands; everything else follows from the step and the settings."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of the last updates
    bad: list[int] = field(default_factory=list)  # numbers of the batches that were skipped or rolled back
    skipped: list[list[int]] = field(default_factory=list)  # windows of batches that no update reads
    scale: list[float] = field(default_factory=list)  # float16's loss scale, and updates since it changed


class Examined(FloatingPointError):
    """A bad update, with its likely cause and what to set."""


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
    average: Average
    elapsed: Callable[[], float]  # seconds of training, over all resumes
    base: hf.Base | None  # what an adapter stands on
    parts: Parts  # of the model, that this rank holds
    forward: Forward
    update: Callable[..., tuple[Tensor, Tensor]]
    writer: Writer
    judge: Judge
    watch: Watchdog
    restore: Callable[[], State]  # gives model and optimizer what the last checkpoint holds
    at: int = 0  # the update that is being made, or was last
    scores: dict[int, float] = field(init=False)  # val_bpb (of pairs val_loss) by step
    health: Doctor = field(init=False)
    sampled: set[int] = field(init=False)  # steps whose sample stands in metrics.jsonl

    def __post_init__(self) -> None:
        self._remember()

    def _remember(self) -> None:
        """What metrics.jsonl says of the run so far; rank 0 reads it."""
        lines = self.run.metrics() if self.team.first else []
        vocab_size = self.objective.model.config.vocab_size
        assert vocab_size is not None
        self.health = Doctor(self.config, self.choices.steps, vocab_size, lines)
        sampled = [line["step"] for line in lines if line["kind"] == "sample"]
        scores, sampled = self.team.told([list(scores_of(lines).items()), sampled])
        self.scores, self.sampled = dict(scores), set(sampled)

    @property
    def team(self) -> Team:
        return self.parts.ranks.team

    def tokens(self, step: int) -> int:
        return step * self.config.train.batch_tokens

    def made(self, batch: Batch, step: int) -> tuple[Tensor, Tensor] | None:
        """Make update `step`: its loss and gradient norm, or None if they were bad and it was skipped.

        Raises FloatingPointError, with the likely cause and the batch kept as text, where it may not be skipped.
        """
        self.at = step
        try:
            how = (self.config, self.choices, step, self.parts.ranks, self.judge, self.judge.scale)
            numbers = self.update(self.forward, self.optimizer, batch, *how)
        except Bad as bad:
            finding = self._examine(bad, batch)
            if self.config.numbers.on_bad != "skip" or not self.judge.may_go_on(self.loader.number(step)):
                raise Examined(finding.text) from None
            self.judge.bad.append(self.loader.number(step))
            self._tell([finding], step)
            return None
        finally:
            self.watch.begun()
        self.average.follow(step)
        if self.judge.spike is not None:
            self._tell(self.health.spiked(step, self.judge.spike), step)
        return numbers

    def _limits(self, step: int) -> str:
        """Why a bad update ends the run."""
        numbers, saved = self.config.numbers, self.team.told(max(self.saves.steps(), default=0))
        kept = f"the checkpoint of step {saved} is whole" if saved else "there is no checkpoint yet"
        if numbers.on_bad == "stop" or self.judge.may_go_on(self.loader.number(step)):
            return f"{kept}; the same command tries again from there"
        return f"numbers.at_most={numbers.at_most} bad updates in {numbers.within} are reached; {kept}"

    def _examine(self, bad: Bad, batch: Batch) -> Finding:
        """The likely cause of a bad update; its batch stands as text in the run directory when this returns."""
        step, config, choices = bad.step, self.config, self.choices
        held = doctor.broken({name: self.parts.local(name) for name in self.parts.parameters})
        weights = sorted({name for each in self.team.gather(held) for name in each})
        scale = self.judge.scale if math.isfinite(bad.grad_norm) else None  # else no scale mended it, not even 1
        times = 1.0 if scale is None else scale.value
        with self.watch.patient():
            looks = doctor.second_look(
                self.forward, self.optimizer, batch, config, choices, step, self.parts.ranks, times
            )
        labels = doctor.sources(self.loader, step)
        finding = doctor.of_bad(bad, config, choices.steps, list(self.judge.recent), weights, looks, labels)
        path, where = self.run.path / f"bad_batch_{step}.txt", ""
        if self.team.first:
            text = doctor.as_text(finding, self.loader, step, self.data.tokenizer, looks, labels)
            try:
                durable.write_file(path, text.encode())
                where = str(path)
            except OSError as error:  # it is not what the run ends for, or goes on without
                where = f"not kept ({error.strerror})"
        return replace(finding, text=f"{finding.text}\nbatch: {self.team.told(where)}")

    def _tell(self, findings: Iterable[Finding], step: int) -> None:
        for finding in findings:
            self.health.said[finding.about] = step
            self.log.finding(step, finding.about, finding.text)

    def rolled_back(self, error: Exception) -> int:
        """Restore the checkpoint that was due last, leave out the data from there to here, and return its step.

        Raises `error` where the settings do not ask for that, or not any more. The window is on the disk before anything
        else, so that a run killed here does the same when it is resumed.
        """
        if signals.exit_code(error) != signals.NON_FINITE:  # not all ranks need be here
            raise error
        self.writer.wait()
        step = self.at
        saved, whole = self.team.told([self._anchor(step), step == 0 or step in self.saves.steps()])
        first, last = self.loader.number(saved + 1), self.loader.number(step)
        limits = self._limits(step)  # all ask here: whoever tells of the error is one of them
        if whole or self.config.numbers.on_bad != "rollback" or not self.judge.may_go_on(last):
            if isinstance(error, Elsewhere):
                raise error
            if isinstance(error, Examined):
                raise Examined(f"{error}\n{limits}") from None
            lower = f"name=NEW branch_from={self.run.path}@STEP optim.lr={self.config.optim.lr / 3:.2g}"
            advice = f"{lower}, from a checkpoint before it" if whole else "numbers.on_bad=rollback"
            if not step:  # no update was made yet
                advice = "train.dtype=float32, or init_from=MODEL, another one"
            raise FloatingPointError(f"{error}\nset: {advice}\n{limits}") from None
        with self.watch.patient():
            self._roll_back(error, saved, first, last)
        return saved

    def _roll_back(self, error: Exception, saved: int, first: int, last: int) -> None:
        """Leave out batches `first` to `last`, and be what the checkpoint of step `saved` holds."""
        with self.team.together():
            if self.team.first:
                self.run.skip(first, last, str(error))
                undone(self.run, self.saves)
        state = self.restore()
        assert state.step == saved, (state.step, saved)
        self.judge, self.loader.skipped = kept(self.run, self.config, state)
        with self.team.together():
            if self.team.first:
                self.log.sync()
                self.run.truncate_metrics(saved)
                self.log.reopen(saved)
        self._remember()
        self.log.note(f"{error}\nrolled back to step {saved}; batches {first} to {last} are left out from now on")

    def _anchor(self, step: int) -> int:
        """Where a rollback of `step` goes: to the save that was due last, or to the beginning; never to what a stop saved.

        If that is gone, to the newest one that is there.
        """
        began = resume.trunk_step(self.config.branch_from)
        due_last = max(began, (step - 1) // self.config.checkpoint.every * self.config.checkpoint.every)
        saved = [each for each in self.saves.steps() if each < step]
        return due_last if due_last == 0 or due_last in saved else max(saved, default=0)

    def report(self, step: int, loss: Tensor, grad_norm: Tensor, steps_per_s: float) -> None:
        """Log update `step`, whose numbers were fetched for the decision to make it."""
        config, rate = self.config, steps_per_s * self.config.train.batch_tokens
        peak = plan.peak_flops(self.choices.device)
        self.log.train(
            step,
            tokens=self.tokens(step),
            loss=float(loss),
            lr=config.optim.lr * factor(config.schedule, step, self.choices.steps),
            grad_norm=float(grad_norm),
            tokens_per_second=rate,
            mfu=steps_per_s * self.flops() / peak if peak else None,
            elapsed_s=self.elapsed(),
            peak_memory_bytes=runtime.peak_memory_bytes(self.choices.device),
        )
        self._tell(self.health.trained(step, float(loss), float(grad_norm)), step)

    def flops(self) -> float:
        """This rank's share of an update's FLOPs."""
        compares, seq_len = self.config.objective.compares, self.config.data.seq_len
        each = plan.flops_per_token(self.objective.model, seq_len, reference=compares)
        return each * self.config.train.batch_tokens / self.team.size

    def disturbed(self, step: int) -> bool:
        """Whether anything beside a report is due after update `step`."""
        config = self.config
        every = (config.checkpoint.every, config.eval.every, config.log.sample_every)
        return any(due(step, each, self.choices.steps) for each in every)

    def save(self, step: int) -> None:
        """Begin to write the checkpoint of `step`, if it is not there, and then to let go of those that are neither new nor best.

        What it holds is as it is now; `writer` says when it is written.
        """
        self.writer.wait()
        steps = self.saves.steps()
        if self.team.told(step in steps):
            return
        back = self._anchor(step + 1) if self.config.numbers.on_bad == "rollback" else None
        best = best_of(self.scores, [*steps, step])
        held = (self.state(step), self.parts, self.data, self.base, self.average)
        with self.watch.saving(), self.average.shown():
            self.writer.begin(
                self.saves.path(step),
                **contents(self.config, self.objective.model, self.optimizer, *held),
                before=self.log.sync,
                after=partial(self.saves.prune, best, back, whole=step),
            )

    def state(self, step: int) -> State:
        """What a checkpoint of `step` says of where it stands."""
        recent, skipped = [list(pair) for pair in self.judge.recent], [list(window) for window in self.loader.skipped]
        scale = [] if self.judge.scale is None else self.judge.scale.state
        return State(step, self.tokens(step), self.elapsed(), recent, list(self.judge.bad), skipped, scale)

    def best(self) -> int | None:
        """The step of the best checkpoint."""
        return best_of(self.scores, self.saves.steps())

    def observe(self, step: int) -> None:
        """What follows the save of `step`: its evaluation and its sample, where due and not yet in metrics.jsonl.

        A stop request during them saves the step first, then raises signals.Stopped.
        """
        config, steps = self.config, self.choices.steps
        evaluating = due(step, config.eval.every, steps) if step else config.init_from is not None
        sampling = step > 0 and due(step, config.log.sample_every, steps) and not self.parts.ranks.n.in_parts
        try:
            if evaluating and step not in self.scores:
                with self.average.shown():
                    self._evaluate(step)
            if evaluating and step:
                epochs = max((times for _, times in self.loader.epochs(step)), default=0.0)
                self._tell(self.health.evaluated(step, self.scores, epochs), step)
            if sampling and step not in self.sampled:
                with self.average.shown():
                    self._sample(step)
        except signals.Stopped:
            self.stop(step)

    def stop(self, step: int) -> NoReturn:
        """Save `step` and raise signals.Stopped.

        The status says so before any rank goes: a launcher ends the others when the first has left.
        """
        if step:
            with self.watch.saving():
                self.save(step)
                self.writer.wait()
        asked = next(filter(None, self.team.gather(signals.stop_requested())), "request")
        reason = f"stopped by {asked} at step {step}; the same command continues from there"
        if self.team.first:
            with suppress(OSError):  # as where a run's end is recorded
                self.run.status("preempted", max(self.saves.steps(), default=0), reason, signals.PREEMPTED)
        self.team.gather(None)
        raise signals.Stopped(reason)

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
            "dealt": self.parts.ranks.dealt,
        }
        if isinstance(self.objective, Preferences):
            result: Evaluation | Preferred = prefer(self.objective, views(self.data), config.eval, **how)
        else:
            result = evaluate(self.objective, views(self.data), config.eval, self.data.tokenizer, **how)
        self.scores[step] = result.score
        self.log.evaluated(step, tokens=self.tokens(step), **asdict(result), elapsed_s=self.elapsed())

    def _sample(self, step: int) -> None:
        model, tokenizer = self.objective.model, self.data.tokenizer
        seed = runtime.key(self.config.seed, step, "sample")
        asked, ends = opening(self.data, self.config.data.seq_len)
        text, stopped = "", None
        if self.team.first:
            try:
                text = tokenizer.decode(asked[1:])
                writer = inference.beside(model, self.choices.dtype)
                for event in complete(
                    writer, tokenizer, [asked], Sampling(), SAMPLE_TOKENS, seed=seed, stop_ids=ends, logprobs=False
                ):
                    signals.check()
                    text += event.text
            except signals.Stopped as stop:
                stopped = str(stop)
            except FloatingPointError as error:  # in the dtype that it is written in; an update would say so itself
                self.log.note(f"the sample of step {step}: {error}")
        if stopped := self.team.told(stopped):
            raise signals.Stopped(stopped)
        self.log.sample(step, tokens=self.tokens(step), text=text)

    def out_of_patience(self) -> bool:
        """Whether the last `train.patience` evaluations all failed to improve on the best before them."""
        patience, scores = self.config.train.patience, list(self.scores.values())
        return patience is not None and len(scores) > patience and min(scores[-patience:]) >= min(scores[:-patience])


def contents(
    config: TrainConfig,
    model: GPT,
    optimizer: Optimizer,
    state: State,
    parts: Parts,
    data: Data,
    base: hf.Base | None,
    average: Average | None = None,
    most: int | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds, as `checkpoint.save` takes it: of weights and optimizer state what this rank writes.

    `average`: which is shown, if there is one. `most`: bytes of weights, and of a rank's optimizer state, that are enough.
    """
    told: dict[str, Any] = {"run_yaml": settings.dump(config), "state": asdict(state)}
    beside = {} if average is None else average.state()
    told["optimizer"] = portion(parts.slices(optimizer.state() | beside), most)
    team = parts.ranks.team
    if config.adapter is not None and base is not None:
        files = hf.adapter_files(model, data.tokenizer, config.adapter, base)
        weights = portion(adapters.to_peft(model), most) if team.first else {}
        return told | {"model_files": files, "weights": weights, "weights_file": ADAPTER_WEIGHTS}
    places = hf.places(model.config, model.state_dict())
    sizes = {disk: sum(parts.n_bytes(name) for name in place.memory) for disk, place in places.items()}
    sizes = within(sizes, most)
    owner, disks = owners(sizes, team.size), {name: disk for disk in sizes for name in places[disk].memory}
    return told | {
        "model_files": hf.model_files(model.config, data.tokenizer),
        "weights": parts.whole(disks, {name: parts.local(name) for name in disks}, lambda name: owner[disks[name]]),
        "sizes": sizes,
        "pack": lambda disk, tensors: families.pack(places[disk], tensors),
    }


def opening(data: Data, seq_len: int) -> tuple[list[int], set[int]]:
    """What a sample continues, and what ends it: the first prompt of the validation split, or else the start of a text."""
    tokenizer = data.tokenizer
    for val in (part.val for part in data.parts if part.val.has_spans and part.val.n_tokens):
        start, end = [*val.document_starts[:2].tolist(), val.n_tokens][:2]
        learned = (span for span in val.spans(start, end - start) if span.kind == "train" and span.start > start + 1)
        span = next(learned, None)
        if span is not None and span.start - start < seq_len:
            *_, last = val.read(start, span.end - start).tolist()
            ends = {tokenizer.end_id, last} & {tokenizer.end_id, *tokenizer.control_ids}
            return val.read(start, span.start - start).tolist(), ends
    return [tokenizer.start_id], {tokenizer.end_id}


def undone(run: RunDirectory, saves: Checkpoints) -> None:
    """Delete the newest checkpoints as far as they have read batches that a rollback left out since."""
    windows = run.skipped()
    while windows and (latest := saves.latest()) is not None:
        state = State(**load_state(latest))
        at, own = np.array([state.step]), merged(state.skipped)
        if numbered(at, own) == numbered(at, merged([*own, *windows])):
            return
        durable.remove_directory(latest)


def kept(run: RunDirectory, config: TrainConfig, state: State) -> tuple[Judge, list[Window]]:
    """(the judge, the windows of data that are left out) as a checkpoint and the run's record of windows have them."""
    windows = run.skipped()
    bad = sorted({*state.bad, *(last for _, last in windows)})
    fp16 = config.choices is not None and config.choices.dtype == "float16"
    judge = Judge(config.numbers, state.recent, bad, LossScale(state.scale) if fp16 else None)
    return judge, merged([*state.skipped, *windows])
