"""The run directory: its name, lock, settings, status and metrics; and from a source that a user names to the model directory meant."""

import json
from pathlib import Path
from typing import Any

from gpt import durable

MANIFEST = "manifest.json"  # written last: a checkpoint without it does not count
STATES = ("running", "preempted", "done", "failed")


class RunDirectory:
    """runs/NAME, made when it does not exist."""

    def __init__(self, root: Path, name: str) -> None:
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"'{name}' cannot be a run's name: use letters, digits, '-' and '_'")
        self.path = root / name
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.path / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"

    def lock(self) -> durable.Lock:
        """Hold the directory; ValueError if another process does. What dead writers left is swept."""
        lock = durable.Lock(self.path / ".lock", str(self.path))
        durable.sweep(self.path)
        return lock

    def status(self, state: str, step: int, reason: str) -> None:
        """Write status.json durably: how the run stands, for people and job scripts."""
        assert state in STATES, state
        text = json.dumps({"state": state, "step": step, "reason": reason}) + "\n"
        durable.write_file(self.path / "status.json", text.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a torn last line is left out."""
        return read_metrics(self.metrics_path)

    def truncate_metrics(self, step: int) -> None:
        """Drop what was logged past `step`, the checkpoint that training continues from."""
        if self.metrics_path.exists():
            kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
            durable.write_file(self.metrics_path, "".join(kept).encode())

    def best(self, steps: list[int]) -> int | None:
        """The step among `steps` with the lowest val_bpb."""
        return _best(self.metrics(), steps)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One object a line; CorruptError for a line that is none, except a torn last one."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    metrics = []
    for number, line in enumerate(lines[:-1], 1):  # what stands behind the last newline was never finished
        try:
            metrics.append(json.loads(line))
        except ValueError:
            raise durable.CorruptError(f"{path}:{number} is not JSON; delete that line") from None
    return metrics


def _best(metrics: list[dict[str, Any]], steps: list[int]) -> int | None:
    scores = [(line["val_bpb"], line["step"]) for line in metrics if line["kind"] == "eval" and line["step"] in steps]
    return min(scores)[1] if scores else None


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return directory / f"step_{step:08d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending: from their names, never from a pointer or a clock."""
    return sorted(int(file.parent.name[5:]) for file in directory.glob(f"step_[0-9]*/{MANIFEST}"))


def resolve(source: str) -> tuple[Path, str]:
    """(model directory, what it is in words) for RUN, RUN@STEP, RUN@best, RUN@last, a checkpoint or a Hugging Face directory.

    A run alone means its best checkpoint. Raises ValueError or FileNotFoundError in words.
    """
    name, at, which = source.rpartition("@") if "@" in source and not Path(source).exists() else (source, "", "best")
    path = Path(name)
    if path.is_file():
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
            raise ValueError(
                f"{path} is a pickle, which can run code when loaded; name a directory with model.safetensors instead"
            )
        raise ValueError(f"{path} is a file; name a run, a checkpoint or a Hugging Face model directory")
    if not path.is_dir():
        hint = f"; did you mean runs/{name}?" if Path("runs", name).is_dir() else ""
        raise FileNotFoundError(f"{path} does not exist{hint}")
    if (path / "checkpoints").is_dir():
        return _in_run(path, which)
    if at:
        raise ValueError(f"{path} is not a run, so '@{which}' names nothing in it")
    if (path / "config.json").is_file():
        return path, f"{path}"
    raise ValueError(
        f"{path} is none of the three kinds of source: a run (with checkpoints/), a checkpoint, or a Hugging Face model "
        f"directory (with config.json and model.safetensors)"
    )


def _in_run(path: Path, which: str) -> tuple[Path, str]:
    steps = saved_steps(path / "checkpoints")
    if not steps:
        raise ValueError(f"{path} has no checkpoint yet; let it train until the first save (checkpoint.every)")
    metrics = read_metrics(path / "metrics.jsonl")
    best = _best(metrics, steps)
    if which not in ("best", "last") and not (which.isdigit() and int(which) in steps):
        raise ValueError(f"{path} has no checkpoint '{which}'; there is {', '.join(map(str, steps))}, best and last")
    step = {"best": steps[-1] if best is None else best, "last": steps[-1]}.get(which) or int(which)
    score = next(
        (f", {line['val_bpb']:.4f} bits/byte" for line in metrics if line["kind"] == "eval" and line["step"] == step),
        "",
    )
    found = checkpoint_path(path / "checkpoints", step)
    return found, f"{found} (step {step}{', the best' if step == best else ''}{score})"
