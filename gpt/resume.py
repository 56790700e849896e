"""How a run goes on: which of its settings may change, what a branch takes over from its trunk, and what is said of both.

It changes nothing on disk: what it settles goes into the run's settings, and with them into every checkpoint.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from gpt import config as settings
from gpt import host, plan, runtime
from gpt.checkpoint import ALONE, OPTIMIZER, SETTINGS, load_state, verify
from gpt.config import Settings
from gpt.data import Loader
from gpt.log import power
from gpt.plan import Choices
from gpt.run import MANIFEST, resolve, saved_steps
from gpt.schedule import ScheduleConfig, factor
from gpt.team import Team

# Every setting is of one of three kinds. What stands in neither list is what makes the run what it is: never another one.
FREE = (  # changes no update, or only how it is rounded; the data set is known by its fingerprint
    "name", "choices", "history", "data.path", "log", "checkpoint", "eval.every", "train.micro_batch",
    "numbers", "train.hang", "train.profile", "parallel.replicate", "parallel.shard", "parallel.tensor",
)  # fmt: skip
BY_NAME = (  # changes updates to come, their rounding or what scores mean; with --allow KEY
    "optim.lr", "optim.adamw_lr", "optim.weight_decay", "optim.cautious", "optim.scheduled_decay", "optim.betas", "optim.momentum",
    "optim.momentum_warmup", "optim.clip", "optim.ema", "schedule",
    "train.steps", "train.tokens", "train.time", "train.patience", "model.dropout", "adapter.dropout", "eval.tokens",
    "train.device", "train.dtype", "train.compile", "train.threads", "train.checkpointing",
)  # fmt: skip
BUDGET = ("train.steps", "train.tokens", "train.time")  # one says how long, so one name allows them all
CHOSEN = ("device", "dtype", "compile", "threads", "micro_batch")  # of train: what is recorded as a choice
UNTOLD = ("name", "choices", "history", "branch_from")

Config = Any  # settle.TrainConfig, which stands above this room


class Change(Settings):
    """A setting that a run changed on its way."""

    step: int = Field(description="the last update made before the change")
    key: str = Field(description="the setting")
    was: Any = Field(description="its value up to that update")
    now: Any = Field(description="its value from then on")

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.was)} -> {_shown(self.now)} after step {self.step}"


class Origin(NamedTuple):
    """Where training goes on: a checkpoint of the run itself, or of the trunk that it branches from; without one, at step 0."""

    path: Path | None = None
    state: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    pace_s: float | None = None  # seconds of a step so far, evaluations and saves included
    branches: bool = False

    @property
    def step(self) -> int:
        return self.state.get("step", 0)


def origin(given: Config, latest: Path | None, team: Team = ALONE) -> Origin:
    """The run's latest checkpoint or else the trunk's, verified by all; ValueError where branch_from names none."""
    path = latest
    if path is None and given.branch_from is not None:
        path = trunk(given.branch_from)
        verify(path, team)
    if path is None:
        return Origin()
    state = load_state(path)
    pace_s = state["elapsed_s"] / state["step"] if state["step"] else None
    if latest is None:
        state["elapsed_s"] = 0.0  # a branch has not taken any time yet
    return Origin(path, state, pace_s, latest is None)


def trunk(source: str) -> Path:
    """The checkpoint that `branch_from` names; ValueError or FileNotFoundError where it names none, or not one for good."""
    which = source.rpartition("@")[2] if "@" in source and not Path(source).exists() else ""
    path, _ = resolve(source)
    if not (path / MANIFEST).is_file() or not any(OPTIMIZER.fullmatch(file.name) for file in path.iterdir()):
        raise ValueError(
            f"branch_from: {path} is not a checkpoint of a run, with the optimizer's state; a model is a start too, at step 0: "
            f"init_from={source}"
        )
    if (path != Path(source) and not which.isdecimal()) or not re.search(
        r"\d/*$", source
    ):  # tomorrow it would mean another one
        steps = ", ".join(map(str, saved_steps(path.parent)))
        run = source.removesuffix(f"@{which}")
        raise ValueError(f"branch_from: {source} does not name one step; write {run}@STEP (it has {steps})")
    return path


def trunk_step(source: str | None) -> int:
    """The step at which a branch from `source` begins: RUN@STEP or a checkpoint's path; 0 for none."""
    return 0 if source is None else int(re.search(r"(\d+)/*$", source)[1])  # type: ignore[index]  # `trunk` saw it


# Which settings may change


def kind(key: str) -> str:
    """ "free", "by name" or "identity"."""
    for name, keys in (("by name", BY_NAME), ("free", FREE)):
        if _within(key, keys):
            return name
    return "identity"


def _within(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of these settings, or stands in a section that is."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def check_allowed(schema: type[Settings], keys: Sequence[str]) -> None:
    """ValueError for a KEY of --allow that is no setting, or that no run may change."""
    known = [row[0] for row in settings.describe(schema)]
    for key in keys:
        meant = [each for each in known if _within(each, [key])]
        if not meant:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(
                f"--allow {key}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")
            )
        if all(kind(each) == "identity" for each in meant):
            raise ValueError(
                f"--allow {key}: another {key} makes another run; start one beside it: name=NEW {key}=VALUE, or --fresh"
            )


def _allowed(key: str, keys: Sequence[str]) -> bool:
    return _within(key, keys) or (key in BUDGET and any(each in BUDGET for each in keys))


def stored(given: Config, config_path: Path, origin: Origin) -> Config | None:
    """The settings that the run has now: those of its latest checkpoint, which are verified, with what was allowed since.

    None for a run that has not begun. `config_path` is written before a step is made with other settings, so that a run
    killed before its next save still knows what it was allowed.
    """
    written = settings.load(type(given), config_path) if config_path.exists() else None
    if origin.path is None or origin.branches:
        return written
    saved = settings.load(type(given), origin.path / SETTINGS)
    n = len(saved.history)
    if written is None or written.history[:n] != saved.history:
        return saved
    since = tuple(each.model_copy(update={"step": min(each.step, origin.step)}) for each in written.history[n:])
    return _moved(saved, _with(saved, since), since, origin)


def _with(config: Config, changes: Sequence[Change]) -> Config:
    """`config` after these changes."""
    values = config.model_dump(mode="json")
    for change in changes:
        *sections, name = change.key.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[name] = change.now
    return type(config).model_validate_json(json.dumps(values))


def continued(stored: Config, asked: Config, origin: Origin, allow: Sequence[str], where: Path, fresh: str) -> Config:
    """What the run in `where` goes on with: `asked`, where it differs from `stored` only as is free or allowed by name.

    ValueError with every other difference and what to do instead; `fresh` is the name that --fresh would give.
    """
    asked = _as_chosen(stored, asked)
    # A reference is known by its fingerprint too: of a run, another checkpoint may be the best by now.
    known = () if stored.choices is None or stored.choices.reference is None else ("init_from",)
    differences = settings.differences(stored, asked)
    changed = [each for each in differences if kind(each[0]) != "free" and each[0] not in known]
    refused = [each for each in changed if kind(each[0]) == "identity" or not _allowed(each[0], allow)]
    if refused:
        earlier = {change.key: change for change in stored.history}
        rows = [f"  {key}: {_shown(old)} -> {_shown(new)}" for key, old, new in refused]
        rows += [f"  (the run changed {earlier[key]})" for key, *_ in refused if key in earlier]
        names = list(dict.fromkeys(key for key, *_ in refused if kind(key) == "by name"))
        flags = " ".join(f"--allow {key}" for key in names)
        may = f"change what may change by name: {flags}, " if len(names) == len(refused) else ""
        raise ValueError(
            f"{where} was started with other settings:\n" + "\n".join(rows) + "\n"
            f"continue it with its own settings, {may}or start another run: name=NEW, or --fresh (as {fresh})"
        )
    return _moved(stored, asked, _changes(stored, asked, origin.step), origin, allow)


def branched(trunk: Config, asked: Config, origin: Origin) -> Config:
    """What a branch begins with: `asked`, where it differs from the trunk's settings only in what may change on the way."""
    asked = _as_chosen(trunk, asked)
    changed = [each for each in settings.differences(trunk, asked) if not _within(each[0], UNTOLD)]
    if refused := [each for each in changed if kind(each[0]) == "identity"]:
        rows = "\n".join(f"  {key}: {_shown(old)} -> {_shown(new)}" for key, old, new in refused)
        raise ValueError(
            f"{asked.branch_from} was trained with other settings, which a branch has to share:\n{rows}\n"
            f"leave them as they were, or start at step 0 from its weights alone: branch_from=null init_from={asked.branch_from}"
        )
    config = _moved(trunk, asked, _changes(trunk, asked, origin.step), origin)
    if config.choices.steps <= origin.step:
        raise ValueError(
            f"the branch begins after step {origin.step} and is to end at step {config.choices.steps}: steps and tokens are "
            f"counted from the trunk's beginning; raise train.steps or train.tokens"
        )
    return config


def _as_chosen(stored: Config, asked: Config) -> Config:
    """What is left open, or asked to be what was chosen, is no other setting."""
    if stored.choices is None:
        return asked
    same = {
        n: getattr(stored.train, n) for n in CHOSEN if getattr(asked.train, n) in ("auto", getattr(stored.choices, n))
    }
    return asked.model_copy(update={"train": asked.train.model_copy(update=same)})


def _changes(was: Config, now: Config, step: int) -> tuple[Change, ...]:
    """What of `now` makes other updates than `was`."""
    rows = settings.differences(was, now)
    bits = [row for row in rows if kind(row[0]) == "by name" or row[0] == "train.micro_batch"]
    return tuple(Change(step=step, key=key, was=old, now=new) for key, old, new in bits)


def _moved(was: Config, now: Config, changes: Sequence[Change], origin: Origin, allow: Sequence[str] = ()) -> Config:
    """`now` with the history and the choices of `was`, and in both what changed; what could not be had as asked is tried
    again where `allow` names it."""
    choices: Choices | None = was.choices
    if choices is not None:
        failed = {
            name: value
            for name, value in choices.fallbacks.items()
            if getattr(now.train, name) == value and not _within(f"train.{name}", allow)
        }
        asked = {name: getattr(now.train, name) for name in CHOSEN if name not in failed}
        update: dict[str, Any] = {name: value for name, value in asked.items() if value != "auto"}
        update["fallbacks"] = failed
        if not str(update.get("device", choices.device)).startswith("cuda"):  # whose kernels these are
            update |= {"attention": "dense", "fused": "any"}
        if any(change.key in BUDGET for change in changes):
            update["steps"] = _steps(now, origin)
        choices = None if update.get("steps", 1) is None else choices.model_copy(update=update)
    if choices is not None and choices.steps < origin.step:
        raise ValueError(
            f"train.{_budget(now)} ends at step {choices.steps}, and the run has made {origin.step} already"
        )
    return now.model_copy(update={"choices": choices, "history": (*was.history, *changes)})


def _steps(config: Config, origin: Origin) -> int | None:
    """Updates of the whole run under another budget; None where its speed is not known yet."""
    if (fixed := plan.fixed_steps(config.train)) is not None:
        return fixed
    if not origin.pace_s:
        return None
    return origin.step + max(0, int((config.train.time - origin.state["elapsed_s"]) / origin.pace_s))


def _budget(config: Config) -> str:
    return next(f"{key[6:]} ({value:g})" for key in BUDGET if (value := getattr(config.train, key[6:])) is not None)


# What is said before a run goes on


def report(
    given: Config, config_path: Path, config: Config, origin: Origin, loader: Loader, say: Callable[[str], None]
) -> None:
    """Say where the run stands, what changed since, on which machine it goes on and what it will write.

    To be called before `config`, which it goes on with, is written to `config_path`.
    """
    assert origin.path is not None
    was = stored(given, config_path, origin) or settings.load(type(given), origin.path / SETTINGS)
    for line in told(was, config, origin, loader):
        say(line)


def told(was: Config, config: Config, origin: Origin, loader: Loader) -> Iterator[str]:
    """The lines of a report on a run that goes on from `origin` with `config`, where `was` were its settings before."""
    assert origin.path is not None and config.choices is not None
    step, steps = origin.step, config.choices.steps
    begins = f"branch {config.name} begins" if origin.branches else f"{config.name} goes on"
    yield f"{begins} after step {step:,} of {steps:,} ({origin.state['tokens']:,} tokens), from {origin.path}"
    read = ", ".join(f"{name} {times:.2f} epochs" for name, times in loader.epochs(step))
    yield f"  data read: {read}"
    if step < steps:
        yield from _rates(was, config, origin)
    for change in was.history:
        yield f"  changed before: {change}"
    for key, old, new in settings.differences(was, config):
        if not _within(key, UNTOLD):
            # What is of neither kind passed `continued` because it names the same: a reference, by its fingerprint.
            how = f"allowed, from step {step + 1} on" if kind(key) == "by name" else "free"
            yield f"  changed: {key} {_shown(old)} -> {_shown(new)} ({how})"
    if was.choices is not None and was.train.micro_batch == config.train.micro_batch:
        rows, dealt = was.choices.micro_batch, config.choices.micro_batch
        if rows != dealt:  # nobody asked for it
            yield f"  ranks: {dealt} rows a pass instead of {rows}, so that they share a batch equally; its bits may differ"
    for name, asked in config.choices.fallbacks.items():
        had = getattr(config.choices, name)
        yield f"  train.{name}: {_shown(had)}, since {_shown(asked)} could not be had; to try again: --allow train.{name}"
    yield from _machine(config)
    if step >= steps:
        yield f"  all {steps:,} steps are made; more: train.steps=N --allow train.steps"
        return
    evaluation, saved = (
        min(steps, (step // every + 1) * every) for every in (config.eval.every, config.checkpoint.every)
    )
    yield f"  next: evaluation at step {evaluation:,}, checkpoint at step {saved:,}, end at step {steps:,}"


def _rate(config: Config, step: int) -> float:
    steps = config.choices.steps
    return config.optim.lr * factor(config.schedule, min(step, steps), steps)


def _rates(was: Config, config: Config, origin: Origin) -> Iterator[str]:
    """The learning rate of the next update, and whether it is the one that it would have been."""
    assert origin.path is not None
    step = origin.step
    if was.choices is None:
        return
    then, now, last = _rate(was, step + 1), _rate(config, step + 1), _rate(config, config.choices.steps)
    if math.isclose(then, now, rel_tol=1e-6):
        yield f"  lr: {power(now)} at step {step + 1:,}, without a jump, and {power(last)} at the last step"
        return
    yield f"  lr: {power(now)} at step {step + 1:,}, a jump from {power(then)}, and {power(last)} at the last step"
    if now > then and was.optim == config.optim and was.schedule.kind != "constant":
        run, stable = origin.path.parent.parent, _before_decay(was, origin.path)
        at = f"{run}@{stable}" if stable is not None else f"{run}@STEP, a checkpoint from before the decay"
        yield f"  it had decayed; without a jump: name=NEW branch_from={at} schedule.decay=N (steps of a decay of its own)"


def _before_decay(config: Config, path: Path) -> int | None:
    """The newest checkpoint beside `path` after which the rate was at its peak."""
    steps = config.choices.steps
    peak = ScheduleConfig(kind="constant", warmup=config.schedule.warmup)
    stable = (
        s for s in saved_steps(path.parent) if factor(config.schedule, s + 1, steps) == factor(peak, s + 1, steps)
    )
    return max(stable, default=None)


def threads(config: Config) -> int:
    """CPU threads that a run with choices goes on with: as chosen, or fewer where nobody asked and more ranks share the cores."""
    chosen: int = config.choices.threads
    if config.train.threads != "auto" or config.parallel.canonical or runtime.world_size() == 1:
        return chosen
    return min(chosen, plan.share_of_cores())


def _machine(config: Config) -> Iterator[str]:
    """What of the machine is another than the one that the run began on."""
    choices, now = config.choices, threads(config)
    facts = ((choices.torch, runtime.torch_version()), (choices.cpu, runtime.cpu_kind()))
    changed = [f"{was} -> {now}" for was, now in facts if was != now]
    if now < choices.threads:
        changed.append(f"{now} threads a rank instead of {choices.threads}, of {host.n_cores()} cores")
    elif now > host.n_cores():
        changed.append(f"{now} threads as before, on {host.n_cores()} cores")
    if changed:
        yield f"  machine: {'; '.join(changed)}: the run goes on, its bits may differ"
    else:
        yield f"  machine: as it was ({choices.torch}, {choices.cpu}, {now} threads)"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
