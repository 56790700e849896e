"""train(): the one loop, for pretraining and fine-tuning, on any device. Everything it needs is a noun built once before step 1.

A run is its name and its settings: the same call continues where it stopped; of other settings under the same name those that
may not change on the way are refused.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from gpt import config as settings
from gpt import durable, parallel, plan, resume, runtime, settle, signals
from gpt.averages import Average
from gpt.checkpoint import Checkpoints, load_optimizer, load_state
from gpt.data import Batch, Data, Loader, open_data, prefetched
from gpt.judge import Check, LossScale, finite
from gpt.log import WATCHER_GONE, Log, Silence, duration
from gpt.loss import Objective, n_terms
from gpt.optim import Optimizer
from gpt.parts import Parts
from gpt.plan import Choices
from gpt.preflight import Preflight
from gpt.profile import Profile
from gpt.ranks import ALONE, AXES, PATIENCE_S, Forward, Ranks, sizes
from gpt.run import RunDirectory
from gpt.saving import Writer
from gpt.schedule import due, factor
from gpt.session import Session, State, contents, kept, undone
from gpt.settle import RUNS, TrainConfig
from gpt.team import Elsewhere, Team
from gpt.watchdog import Watchdog

LOOK = 0.8  # of PATIENCE_S, after which a silent rank writes down where it stands
Status = Callable[[str, str, int | None], None]  # state, reason, exit code


def update(
    forward: Forward,
    optimizer: Optimizer,
    batch: Batch,
    config: TrainConfig,
    choices: Choices,
    step: int,
    ranks: Ranks = ALONE,
    check: Check = finite,
    scale: LossScale | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on `batch`, the whole one, of which each rank takes its share; (loss in nats per target or pair,
    gradient norm before clipping), on one rank still on the device.

    Raises Bad, a FloatingPointError, with the weights untouched, if either is not finite or `check` says so. With `scale`
    gradients that are too large for float16 are taken again with half of it.
    """
    n = max(1, n_terms(config.objective, batch))
    parts = list(zip(*(x.split(choices.micro_batch) for x in batch.given), strict=True))

    def share(i: int, factor: float) -> Tensor:
        nats = ranks.nats(forward, parts[i], choices, config.seed, step, i)
        (nats / n * (factor if scale is None else factor * scale.value)).backward()
        return nats.detach() / n

    before = [] if scale is None else scale.state
    with parallel.preferring(choices.fused):
        while True:
            times = 1.0 if scale is None else scale.value
            total = ranks.total(forward, optimizer, len(parts), share)
            loss, grad_norm = ranks.agreed(optimizer, total, times)
            if scale is None or not scale.too_large(loss, grad_norm):
                break
            optimizer.drop()
    try:
        check(step, loss, grad_norm)
    except FloatingPointError:
        if scale is not None and not grad_norm.isfinite():
            scale.become(before)  # a smaller one did not mend this batch, and loses small numbers of the next
        raise
    optimizer.step(factor(config.schedule, step, choices.steps), step, grad_norm)
    return loss, grad_norm


def train(
    given: TrainConfig,
    *,
    fresh: bool = False,
    allow: Sequence[str] = (),
    wait_lock: float = 0.0,
    runs: Path = RUNS,
    updates: int | None = None,
    console: Console,
) -> None:
    """Train the run `given.name` in `runs` from where it stands to its end; status.json says how it ended.

    `allow` names settings that may be others than those it was started with. Another process that still holds the run is
    waited for, `wait_lock` seconds at most. After that many `updates` it stops as if asked to. Raises signals.Stopped when
    asked to stop (the step is saved), ValueError for what the user can mend, FloatingPointError on non-finite numbers.
    """
    signals.check()  # here and below: what can be stopped before there is a step to save
    settle.check(given)
    resume.check_allowed(TrainConfig, allow)
    data = open_data(given.data)
    signals.check()
    device = runtime.chosen_device(given.train.device)
    runtime.check_device(device)
    with Team.joined(PATIENCE_S + wait_lock, device) as team:
        n = sizes(given.parallel, team.size)
        ranks = Ranks(team, n, canonical=given.parallel.canonical, device=device)
        _train(given, data, ranks, fresh, allow, wait_lock, runs, updates, console)


@contextmanager
def _held(run: RunDirectory, saves: Checkpoints, team: Team, wait_lock: float) -> Iterator[Path | None]:
    """The run's directory is this process's, or that of rank 0; the latest checkpoint, which is whole."""
    with ExitStack() as held:
        with team.together():
            if team.first:
                held.enter_context(run.lock(wait_lock))
                saves.sweep()
                undone(run, saves)
        yield saves.latest(team)


def _train(
    given: TrainConfig,
    data: Data,
    ranks: Ranks,
    fresh: bool,
    allow: Sequence[str],
    wait_lock: float,
    runs: Path,
    updates: int | None,
    console: Console,
) -> None:
    """What each rank does of `train`; rank 0 alone writes and speaks."""
    began, team = time.monotonic(), ranks.team

    def say(line: str) -> None:
        if team.first:
            with suppress(*WATCHER_GONE):
                console.print(line, highlight=False, markup=False, soft_wrap=True)

    if fresh:
        given = given.model_copy(update={"name": team.told(settle.unused(given.name, runs))})
        say(f"starting {given.name}; continue it with name={given.name}, without --fresh")
    if given.branch_from is not None and not (runs / given.name).exists():
        resume.trunk(given.branch_from)  # what it cannot begin from leaves no run behind
    run = RunDirectory(runs, given.name)
    saves = Checkpoints(run.checkpoints, given.checkpoint.keep)
    with _held(run, saves, team, wait_lock) as latest:
        origin = resume.origin(given, latest, team)
        state = State(**origin.state)

        def elapsed() -> float:
            return state.elapsed_s + time.monotonic() - began

        base = settle.base(given, origin.path)
        wanted = origin.path is None or base is not None or settle.needs_source(given)
        read_source = partial(settle.source, given, data, settle.begun_from(given, base))
        source = read_source(say) if wanted else None
        config = settle.agree(given, run, data, source, origin, allow)
        ends_at = _time_limit(say)
        with _recorded(run, saves, team) as status, _watched(run, config, status, ends_at, team) as watch:
            ranks.check()
            with team.together():
                preflight = Preflight(run, data, say)
            _say_ranks(ranks, given.log.sample_every is not None, say)
            model = settle.build(config, source, say, in_parts=ranks.n.in_parts)
            source = source if settle.needs_source(config) else None
            with team.together():
                settle.check_space(run, saves, given.checkpoint.keep, model, config.optim.ema)
            watch.expect_saves(plan.save_s(plan.n_trained(model), config.optim.ema))
            loader = Loader(data, config.data, settle.rows(config), config.seed, prefix=config.model.prefix_lm)
            ranks.check()
            objective = settle.objective(config, model, source)
            if ranks.n.in_parts:
                parallel.in_parts(objective, ranks, settle.device(config))
            parts = Parts(ranks, model)
            fill = partial(settle.fill, model, parts, config, read_source=partial(read_source, lambda line: None))
            made = partial(contents, parts=parts, data=data, base=base)
            rehearse = partial(preflight.rehearse, objective, loader, update, state, made, parts)
            first = partial(fill, origin.path)
            config = settle.settle(
                config, objective, source, first, data, loader, update, elapsed, say, parts, rehearse
            )
            assert config.choices is not None
            optimizer, average, restore = _restored(config, objective, parts, origin, saves, fill)
            if origin.path is not None:
                resume.report(given, run.config_path, config, origin, loader, say)
            ranks.check()
            judge, loader.skipped = kept(run, config, state)
            _agreed(run, config, -1 if latest is None else state.step, team)
            beside: dict[str, Any] = {"background": config.checkpoint.background, "say": say, "watch": watch}
            with _logged(run, config, console, team) as log, Writer(team, **beside) as writer:
                how: dict[str, Any] = {"compile": config.choices.compile, "checkpointing": config.train.checkpointing}
                forward = parallel.applied(objective, **how, ranks=ranks)
                at_work = (run, saves, log, data, loader, objective, optimizer, average, elapsed, base, parts)
                session = Session(config, config.choices, *at_work, forward, update, writer, judge, watch, restore)
                if origin.branches:
                    session.save(state.step)  # from here on it needs the trunk no more
                last = _loop(session, state.step, updates)
        if team.first:
            _farewell(session, last, say)


def _restored(
    config: TrainConfig,
    objective: Objective,
    parts: Parts,
    origin: resume.Origin,
    saves: Checkpoints,
    fill: Callable[[Path | None], None],
) -> tuple[Optimizer, Average, Callable[[], State]]:
    """(the optimizer and the average as they were at `origin`, whose weights the model has, what gives all three what the
    latest checkpoint holds)."""
    assert config.choices is not None
    optimizer = Optimizer(objective.model, config.optim, parts, compile=config.choices.compile)
    average = Average(parts, config.optim.ema, config.choices.steps, partial(parallel.resharded, objective))

    def load(path: Path | None) -> None:
        stored = None if path is None else load_optimizer(path, parts.wanted)
        average.begin(stored)
        if stored is not None:
            optimizer.load_state(stored)

    def restore() -> State:
        parallel.resharded(objective)
        latest = saves.latest(parts.ranks.team)
        fill(latest)
        optimizer.reset()
        load(latest)
        return State() if latest is None else State(**load_state(latest))

    load(origin.path)
    return optimizer, average, restore


def _say_ranks(ranks: Ranks, sampling: bool, say: Callable[[str], None]) -> None:
    """How the ranks share the work, and what they cannot do, in words; nothing of one alone."""
    told = " x ".join(f"{axis} {n}" for axis, n in zip(AXES, ranks.n, strict=True) if n > 1)
    if told:
        say(f"ranks: {ranks.team.size} ({told}{', canonical' if ranks.canonical else ''})")
    if sampling and ranks.n.in_parts:
        say(
            "samples: left out, since one rank writes them and holds a part of the model; sample.py reads the checkpoints"
        )


def _agreed(run: RunDirectory, config: TrainConfig, step: int, team: Team) -> None:
    """Write down what the run goes on with from `step` on."""
    with team.together():
        if team.first:
            durable.write_file(run.config_path, settings.dump(config).encode())
            run.truncate_metrics(step)
            if not run.metrics_path.exists():
                durable.write_file(run.metrics_path, b"")  # its name too is on the disk before a line is


def _logged(run: RunDirectory, config: TrainConfig, console: Console, team: Team) -> Log:
    """Where this rank's records go."""
    assert config.choices is not None
    if not team.first:
        return Silence()
    how: dict[str, Any] = {"steps": config.choices.steps, "console": console, "clock": not config.parallel.canonical}
    return Log(run.path, config.log, run_config=_public(config), **how)


def _time_limit(say: Callable[[str], None]) -> float | None:
    """When the job is ended, if it is and still to come; said in one line."""
    ends_at = runtime.job_ends_at()
    if ends_at is None or (left := ends_at - time.time()) <= 0:
        return None
    at = time.strftime("%H:%M:%S", time.localtime(ends_at))
    say(f"time limit: the job ends at {at}, in {duration(left)}; the run is saved and stops two saves before")
    return ends_at


def _watched(run: RunDirectory, config: TrainConfig, status: Status, ends_at: float | None, team: Team) -> Watchdog:
    def tell(reason: str) -> None:
        status("failed", reason, signals.STUCK)

    stacks = "hung_stacks.txt" if team.first else f"hung_stacks_{team.rank}.txt"
    # Those that wait for a hung rank end before it does, and the launcher then kills it: by that time its stacks are written.
    look_s = None if team.size == 1 else LOOK * PATIENCE_S
    return Watchdog(config.train.hang, run.path / stacks, tell, ends_at, look_s)


def _loop(session: Session, start: int, most: int | None = None) -> int:
    """Make updates start + 1 .. steps, or so many, and do what is due after each; return the last step made.

    Where numbers go wrong and the settings say so, go on from the last checkpoint.
    """
    n = session.config.train.profile if session.team.first else None
    what = (session.choices.device, session.choices.dtype, session.flops(), session.run.path)
    with Profile(n or 0, *what, session.disturbed, session.log.note) as profile:
        while True:
            try:
                return _updates(session, start, most, profile)
            except (FloatingPointError, Elsewhere) as error:
                start = session.rolled_back(error)


def _updates(session: Session, start: int, most: int | None, profile: Profile) -> int:
    config, choices = session.config, session.choices
    session.at = start
    session.observe(start)
    if session.out_of_patience():
        return start
    reported, clock = start, time.monotonic()
    pin = choices.device.startswith("cuda")
    with closing(prefetched(session.loader, start + 1, choices.steps, pin)) as batches:
        for step, batch in enumerate(batches, start + 1):
            numbers = session.made(batch, step)
            clock += profile.made(step)
            session.writer.check()
            if numbers is not None and due(step, config.log.every, choices.steps):
                session.report(step, *numbers, (step - reported) / (time.monotonic() - clock))
                reported, clock = step, time.monotonic()
            if session.parts.ranks.stopping or step - start == most:
                session.stop(step)
            if due(step, config.checkpoint.every, choices.steps):
                session.save(step)
                if step < choices.steps and session.parts.ranks.asked():
                    session.stop(step)
            if due(step, config.eval.every, choices.steps) or due(step, config.log.sample_every, choices.steps):
                away = time.monotonic()
                session.observe(step)
                clock += time.monotonic() - away
                if session.out_of_patience():
                    session.save(step)
                    return step
    return choices.steps


@contextmanager
def _recorded(run: RunDirectory, saves: Checkpoints, team: Team) -> Iterator[Status]:
    """Tell in status.json that the run is at work, and how it stopped if it did not come to its end."""

    def status(state: str, reason: str, exit_code: int | None) -> None:
        with suppress(OSError):  # a full disk must not hide what went wrong
            if team.first:
                run.status(state, max(saves.steps(), default=0), reason, exit_code)

    status("running", "", None)
    try:
        yield status
    except BaseException as error:
        code = signals.exit_code(error)
        named = str(error) if code == signals.PREEMPTED else f"{type(error).__name__}: {error}"
        named = signals.explain(error, code) if signals.secondary(error) and code != signals.PREEMPTED else named
        status("preempted" if code == signals.PREEMPTED else "failed", named, code)
        raise


def _public(config: TrainConfig) -> dict[str, object]:
    """What a tracker may know: sizes and rates, no paths."""
    hidden = (
        "name",
        "init_from",
        "branch_from",
        "history",
        "data.path",
        "data.tokenizer",
        "data.mixture",
        "data.sources",
        "log.",
    )
    return {name: value for name, value in settings.flatten(config).items() if not name.startswith(hidden)}


def _farewell(session: Session, last: int, say: Callable[[str], None]) -> None:
    """Say how it ended, in status.json too, and what to type next."""
    early = f"no better score in {session.config.train.patience} evaluations"
    session.run.status("done", last, "all steps made" if last == session.choices.steps else early, signals.DONE)
    best = session.best()
    if best is not None:
        unit = "nats/pair" if session.config.objective.of_pairs else "bits/byte"
        say(f"best: {session.scores[best]:.4f} {unit} at step {best}, {session.saves.path(best)}")
    say(f'next: python sample.py {session.run.path} --prompt "..."')
