"""Exact resume, proved on this machine: some steps in one piece, and the same in two processes, end in the same bytes?

The run itself is neither read from nor written to, but for the choices it has made: everything happens in a directory beside
it, which is deleted afterwards. Under torchrun each rank starts processes of its own, which meet as those of a run do.
"""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from gpt import config as settings
from gpt import durable, plan, resume, runtime, settle, signals
from gpt.checkpoint import SETTINGS, STATE, verify
from gpt.run import MANIFEST, checkpoint_path, read_metrics, saved_steps
from gpt.settle import RUNS, TrainConfig
from gpt.team import Elsewhere
from gpt.trainer import train

STEPS = 10
SAME, DIFFERENT = 0, 1
FAILURES: dict[int, type[Exception]] = {  # what ends with the exit code that a leg ended with
    signals.USER_ERROR: ValueError,
    durable.CorruptError.exit_code: durable.CorruptError,
    signals.NON_FINITE: FloatingPointError,
    signals.NO_SPACE: MemoryError,
}
STRAIGHT, PARTED = "straight", "parted"


def check(given: TrainConfig, console: Console) -> int:
    """Make STEPS updates in one process, and in two others half of them each; say whether that is the same. SAME or DIFFERENT.

    ValueError in words where it cannot be tried. Of several ranks the first speaks and compares; others say SAME.
    """
    settle.check(given)
    if not durable.is_plain(given.name):
        raise ValueError(f"'{given.name}' cannot be a run's name: use letters, digits, '-' and '_'")
    home, began, first = RUNS / f".{given.name}.check", time.monotonic(), runtime.rank() == 0

    def say(line: str) -> None:
        if first:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    with ExitStack() as held:
        if first:  # processes of others wait for its own before they touch anything
            held.enter_context(_own(home, given.name))
        legs = _legs(given)
        start = resume.origin(given, None).step
        n = min(STEPS, (plan.fixed_steps(given.train) or sys.maxsize) - start)
        if n < 2:
            raise ValueError(f"--check-resume parts a run in two, and {given.name} has {max(n, 0)} steps to make")
        half, of = n // 2, f" of {runtime.world_size()} ranks each" if runtime.world_size() > 1 else ""
        say(f"{n} steps in one process, then {half} and {n - half} in two others{of} ...")
        _leg(legs, home, STRAIGHT, n)
        legs = _same_choices(legs, home)
        _leg(legs, home, PARTED, half)
        _leg(legs, home, PARTED, n - half)
        if not first:
            return SAME
        ends = [home / name / "checkpoints" for name in (STRAIGHT, PARTED)]
        step = saved_steps(ends[0])[-1]
        found = list(differences(home / STRAIGHT, home / PARTED, step, start + half))
        n_files = len(json.loads((checkpoint_path(ends[0], step) / MANIFEST).read_bytes())["sha256"]) - 2
    seconds = time.monotonic() - began
    if found:
        say(f"exact resume: NO, on {runtime.torch_version()}, {runtime.cpu_kind()} ({seconds:.0f} s)")
        for line in found:
            say(f"  {line}")
        return DIFFERENT
    what = "losses and gradient norms of every step, every byte of weights and optimizer state"
    say(f"exact resume: yes; the same {what} ({n_files} files at step {step}; {seconds:.0f} s)")
    return SAME


@contextmanager
def _own(home: Path, name: str) -> Iterator[None]:
    """The directory is this check's, empty; nothing of it is left afterwards."""
    lock = home.with_name(f"{home.name}.lock")
    with durable.Lock(lock, f"--check-resume of {name}"):
        try:
            _clear(home)  # of a check that was killed
            yield
        finally:
            _clear(home)
            lock.unlink(missing_ok=True)


def _legs(given: TrainConfig) -> TrainConfig:
    """The settings of the trial: the run's own but for what is written, when, and how much is evaluated."""
    few = {"tokens": given.data.seq_len}  # of pairs the first one may not fit
    quiet = {
        "eval": given.eval.model_copy(update={"every": STEPS // 2} | ({} if given.objective.of_pairs else few)),
        "checkpoint": given.checkpoint.model_copy(update={"every": sys.maxsize, "keep": 2}),
        "log": given.log.model_copy(update={"every": 1, "sample_every": None, "wandb": None}),
        "train": given.train.model_copy(update={"patience": None, "profile": None}),
    }
    choices, own = given.choices, RUNS / given.name / "config.yaml"
    if own.exists():
        choices = settings.load(TrainConfig, own).choices
    if choices is not None:  # what this command asks for goes before what the run chose
        asked = {name: getattr(given.train, name) for name in resume.CHOSEN} | {"steps": plan.fixed_steps(given.train)}
        wanted = {name: value for name, value in asked.items() if choices.fallbacks.get(name) != value}
        choices = choices.model_copy(update={n: value for n, value in wanted.items() if value not in (None, "auto")})
    return given.model_copy(update=quiet | {"choices": choices})


def _same_choices(given: TrainConfig, home: Path) -> TrainConfig:
    """`given` with the choices that the straight leg made: speed measured again might choose otherwise."""
    made = settings.load(TrainConfig, home / STRAIGHT / "config.yaml").choices
    return given.model_copy(update={"choices": made})


def _leg(given: TrainConfig, home: Path, name: str, updates: int) -> None:
    """Make so many updates of the run `name` in a process of its own; its error is raised here as it was said."""
    context = multiprocessing.get_context("spawn")
    said, saying = context.Pipe(duplex=False)
    # As it was given: what was left open, such as the shape of a source, is left open.
    text = json.dumps(given.model_copy(update={"name": name}).model_dump(mode="json", exclude_unset=True))
    process = context.Process(target=_work, args=(text, str(home), updates, saying), daemon=True)
    signal.pthread_sigmask(
        signal.SIG_BLOCK, signals.STOP_SIGNALS
    )  # a child inherits it, and is asked to stop by its end
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)
    saying.close()
    try:
        while process.is_alive():
            process.join(0.1)
            signals.check()
    finally:
        process.kill()
        process.join()
    if process.exitcode != signals.PREEMPTED and process.exitcode != signals.DONE:
        hung = process.exitcode == signals.STUCK  # its watchdog, which tells nobody else, showed where it stood
        message, follows = "it hung" if hung else "it was killed, most likely for lack of memory", False
        with suppress(EOFError, OSError):
            message, follows = json.loads(said.recv_bytes())
        code = process.exitcode or signals.BUG
        if follows:  # from the error of another rank, whose own process says it
            raise Elsewhere(message, code)
        kind = FAILURES.get(code if code > 0 else signals.NO_SPACE, RuntimeError)
        raise kind(f"the run itself stops within its first steps: {message}")


def _work(text: str, home: str, updates: int, saying: Any) -> None:
    """What a leg's process does; its exit code is the verb's."""
    signals.end_with(multiprocessing.parent_process())
    code = signals.DONE
    try:
        given = TrainConfig.model_validate_json(text)
        train(given, runs=Path(home), updates=updates, console=Console(quiet=True))
    except signals.Stopped:
        code = signals.PREEMPTED
    except BaseException as error:
        code = signals.exit_code(error)
        saying.send_bytes(json.dumps([str(error)[:4096], signals.secondary(error)]).encode())
    os._exit(code)  # threads that talked to other ranks may abort the interpreter's own end


def _clear(home: Path) -> None:
    if home.exists():
        durable.remove_directory(home)


# What differs


def differences(straight: Path, parted: Path, step: int, half: int) -> Iterator[str]:
    """What two runs that made the same steps do not have in common, in words."""
    curves = [
        [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"] for run in (straight, parted)
    ]
    for one, two in zip(*curves, strict=False):
        unlike = [name for name in ("step", "loss", "grad_norm", "lr") if one[name] != two[name]]
        if unlike:
            yield f"step {one['step']}: " + ", ".join(f"{name} {one[name]!r} and {two[name]!r}" for name in unlike)
            if one["step"] <= half:
                yield (
                    "already before the resume: two processes here do not compute the same bits from the same numbers (GPUs and "
                    "compiled code need not); of resuming this says nothing"
                )
            break
    if len(curves[0]) != len(curves[1]):
        yield f"{len(curves[0])} steps were logged in one piece, {len(curves[1])} in two"
    ends = [checkpoint_path(run / "checkpoints", step) for run in (straight, parted)]
    for end in ends:
        verify(end)
    sums = [json.loads((end / MANIFEST).read_bytes())["sha256"] for end in ends]
    for file in sorted(sums[0].keys() | sums[1].keys()):
        if file in (STATE, SETTINGS) or sums[0].get(file) == sums[1].get(file):  # those hold clocks and names
            continue
        apart = _apart(*(end / file for end in ends)) if file.endswith(".safetensors") else "other bytes"
        if apart is not None:
            yield f"{file}: {apart}"


def _apart(one: Path, two: Path) -> str | None:
    """How many tensors of two files differ, and which one most; None if none does, in whatever order they stand."""
    if not one.exists() or not two.exists():
        return "only one has it"
    first, second = _tensors(one), _tensors(two)
    names = [n for n in first.keys() | second.keys() if not _same(first.get(n), second.get(n))]
    if not names:
        return None
    most, name = max((_distance(first.get(n), second.get(n)), n) for n in names)
    return f"{len(names)} of {len(first)} tensors differ, {name} by {most:.3g} at most"


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    """Bit for bit: a zero has a sign."""
    if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def _tensors(file: Path) -> dict[str, Tensor]:
    """By name, flat."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name).clone().flatten() for name in tensors.keys()}  # noqa: SIM118 (no mapping)


def _distance(one: Tensor | None, two: Tensor | None) -> float:
    if one is None or two is None or one.shape != two.shape:
        return math.inf
    return float((one.double() - two.double()).abs().max()) if one.numel() else 0.0
