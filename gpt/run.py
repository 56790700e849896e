"""The run directory: its lock, settings, status and metrics; and the model directory that a user's SOURCE names.

It writes no checkpoint and reads no tensor: it knows only where checkpoints stand.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt import durable, hub, signals

SKIPPED = "skipped.json"  # windows of data that were rolled back
MANIFEST = "manifest.json"  # written last: a checkpoint without it does not count
STATES = ("running", "preempted", "done", "failed")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
ADAPTER = "adapter_config.json"  # a directory that holds it is an adapter; its base stands elsewhere
KINDS = (
    "a run (runs/NAME), a checkpoint in it, or a Hugging Face model: a directory (config.json, model.safetensors) or"
    " hub:ORG/NAME[@REVISION]"
)
HUB = "hub:"


class RunDirectory:
    """runs/NAME, made when it does not exist."""

    def __init__(self, root: Path, name: str) -> None:
        if not durable.is_plain(name):
            raise ValueError(f"'{name}' cannot be a run's name: use letters, digits, '-' and '_'")
        self.path = root / name
        self.checkpoints = self.path / "checkpoints"
        durable.make_directory(self.checkpoints)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        for each in (self.checkpoints, self.config_path, self.metrics_path, self.path / "status.json"):
            if each.is_symlink():
                raise ValueError(f"{each}: is a symbolic link, which is not followed; move here what it points at")

    def lock(self, wait_s: float = 0.0) -> durable.Lock:
        """Hold the directory; ValueError if another process still does after `wait_s`. What dead writers left is swept."""
        lock = durable.Lock(self.path / ".lock", str(self.path), wait_s=wait_s, meanwhile=signals.check)
        durable.sweep(self.path)
        return lock

    def status(self, state: str, step: int, reason: str, exit_code: int | None = None) -> None:
        """Write status.json durably: how the run stands, for people and job scripts; how it ended, with its exit code."""
        assert state in STATES, state
        ended = {} if exit_code is None else {"exit_code": exit_code}
        text = json.dumps({"state": state, "step": step, "reason": reason} | ended) + "\n"
        durable.write_file(self.path / "status.json", text.encode())

    def skip(self, first: int, last: int, why: str) -> None:
        """Record durably that no update reads batches `first` to `last` from now on."""
        windows = [*self._windows(), {"first": first, "last": last, "why": why}]
        durable.write_file(self.path / SKIPPED, (json.dumps(windows, indent=1, ensure_ascii=False) + "\n").encode())

    def skipped(self) -> list[tuple[int, int]]:
        """(first, last) of the windows of batches that no update reads."""
        return [(each["first"], each["last"]) for each in self._windows()]

    def _windows(self) -> list[dict[str, Any]]:
        path = self.path / SKIPPED
        try:
            windows = json.loads(path.read_bytes())
            if not all(type(each[name]) is int for each in windows for name in ("first", "last")):
                raise TypeError
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError, RecursionError):
            raise durable.CorruptError(
                f"{path}: not the record of batches that are left out; restore it, or start another run with --fresh"
            ) from None
        return windows

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a torn last line is left out."""
        return read_metrics(self.metrics_path)

    def truncate_metrics(self, step: int) -> None:
        """Drop what was logged past `step`, the checkpoint that training continues from; the rest keeps its bytes."""
        if self.metrics_path.exists():
            kept = [line for line, values in _lines(self.metrics_path) if values["step"] <= step]
            durable.write_file(self.metrics_path, b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One object a line; CorruptError for a line that is none, except a torn last one."""
    return [values for _, values in _lines(durable.plain(path))] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(the line, what it says) for every finished line: what stands behind the last newline was never finished."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = json.loads(line)
            if type(values["step"]) is not int or type(values["kind"]) is not str:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise durable.CorruptError(f"{path}:{number}: not a line of metrics; delete that line") from None
        yield line + b"\n", values


def scores_of(metrics: Iterable[dict[str, Any]]) -> dict[int, float]:
    """val_bpb (of pairs, which have none, val_loss) by step, of the evaluations that gave a finite number."""
    scores = {line["step"]: line.get("val_bpb", line.get("val_loss")) for line in metrics if line["kind"] == "eval"}
    return {step: score for step, score in scores.items() if isinstance(score, float) and math.isfinite(score)}


def best_of(scores: Mapping[int, float], steps: Iterable[int]) -> int | None:
    """The step among `steps` with the lowest score, the first of equals; None where none was evaluated."""
    return min((step for step in steps if step in scores), key=scores.__getitem__, default=None)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return directory / f"step_{step:08d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending: from their names, never from a pointer or a clock."""
    names = [file.parent.name for file in directory.glob(f"step_*/{MANIFEST}")]
    if links := [directory / name for name in names if (directory / name).is_symlink()]:
        raise ValueError(f"{links[0]}: is a symbolic link, which is not followed; move here what it points at")
    steps = [int(digits) for name in names if (digits := name.removeprefix("step_")).isdecimal()]
    return sorted(step for step in steps if checkpoint_path(directory, step).name in names)


def resolve(source: str) -> tuple[Path, str]:
    """(model directory, what it is in words) for RUN, RUN@STEP, RUN@best, RUN@last, a checkpoint, a Hugging Face directory,
    hub:ORG/NAME[@REVISION].

    A run alone means its best checkpoint, its last where none was evaluated; a model of the hub is fetched into the hub's
    own cache. ValueError or FileNotFoundError in words.
    """
    try:
        given = Path(source).exists()
    except OSError as error:  # it is too long to be a path
        raise ValueError(f"{source[:60]!r}...: {error.strerror}; expected {KINDS}") from None
    if source.startswith(HUB) and not given:
        path = hub.model(source.removeprefix(HUB))
        return path, f"{source} ({path})"
    name, at, which = (source, "", "best") if given or "@" not in source else source.rpartition("@")
    path = Path(name)
    if not name or not path.exists():
        hint = (
            f"; did you mean {Path('runs', source)}?" if name and Path("runs", name).is_dir() else f"; expected {KINDS}"
        )
        raise FileNotFoundError(f"'{name}' does not exist{hint}")
    _refuse_pickles(path)
    if (path / "checkpoints").is_dir():
        return _in_run(path, which)
    if at:
        raise ValueError(f"{path} is not a run, so '@{which}' names nothing in it")
    if (path / "config.json").is_file() or (path / ADAPTER).is_file():
        return path, str(path)
    raise ValueError(f"{path} is not a model; expected {KINDS}")


def vocabulary(source: str) -> Path:
    """Where the tokenizer that `source` names stands, for `Tokenizer.load`: a path as it is, RUN@STEP as `resolve` means it, or
    what is fetched of hub:ORG/NAME[@REVISION], without its weights."""
    if Path(source.partition("#")[0]).exists():
        return Path(source)
    if source.startswith(HUB):
        return hub.vocabulary(source.removeprefix(HUB))
    return resolve(source)[0] if "@" in source else Path(source)


def _refuse_pickles(path: Path) -> None:
    """ValueError for a pickle, or a directory with no other weights."""
    files = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else []
    pickles = sorted(file for file in files if file.suffix in PICKLES)
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code when it is read, so it is not read; expected {KINDS}"
        )


def _in_run(path: Path, which: str) -> tuple[Path, str]:
    steps = saved_steps(path / "checkpoints")
    if not steps:
        raise ValueError(f"{path} has no checkpoint yet; let it train until its first save (checkpoint.every)")
    if which not in ("best", "last") and not (which.isdecimal() and int(which) in steps):
        raise ValueError(f"{path} has no checkpoint '{which}'; it has {', '.join(map(str, steps))}, best and last")
    lines = read_metrics(path / "metrics.jsonl")
    scores, unit = scores_of(lines), "bits/byte" if any("val_bpb" in line for line in lines) else "nats/pair"
    best = best_of(scores, steps) or steps[-1]
    step = {"best": best, "last": steps[-1]}.get(which) or int(which)
    score = f", {scores[step]:.4f} {unit}" if step in scores else ""
    found = checkpoint_path(path / "checkpoints", step)
    return found, f"{found} (step {step}{', the best' if step == best and score else ''}{score})"
