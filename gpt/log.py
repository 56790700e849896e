"""What people watch: metrics.jsonl, the console, and wandb where it is asked for. No sink can stop the training."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from gpt import durable
from gpt.config import Count, Settings


class WandbConfig(Settings):
    """Where wandb files the run."""

    project: str = Field("gpt", description="wandb project")
    entity: str | None = Field(None, description="wandb user or team; null: the default one")
    group: str | None = Field(None, description="group of runs")
    tags: tuple[str, ...] = Field((), description="labels")
    mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="offline keeps the files here for `wandb sync`"
    )


class LogConfig(Settings):
    """What is written down and how often."""

    every: Count = Field(10, ge=1, description="steps between training lines")
    sample_every: Count | None = Field(None, ge=1, description="steps between samples of text; null: none")
    wandb: WandbConfig | None = Field(None, description="track with wandb; null: not")


class Log:
    """One line in metrics.jsonl for every record, the same to the console and to wandb."""

    def __init__(
        self, path: Path, config: LogConfig, *, run_config: Mapping[str, Any], steps: int, console: Console
    ) -> None:
        self.steps, self.console = steps, console
        self._file = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._wandb = None if config.wandb is None else Wandb(path, config.wandb, run_config, self.note)
        self._bar = Progress(
            BarColumn(40),
            TextColumn("{task.completed}/{task.total}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps)
        self._began: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self.sync()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None)

    def train(self, step: int, **values: Any) -> None:
        """Record an update."""
        self._write("train", step, values)
        if self._began is None:
            self._began = step, time.monotonic()
        rate = (
            f"{values['tokens_per_second'] / 1000:.1f}k tok/s"
            if values["tokens_per_second"] < 1e6
            else f"{values['tokens_per_second'] / 1e6:.2f}M tok/s"
        )
        mfu = "" if values.get("mfu") is None else f"  mfu {values['mfu']:.2f}"
        self.note(
            f"step {step}/{self.steps}  loss {values['loss']:.3f}  lr {values['lr']:.1e}  grad {values['grad_norm']:.2f}  "
            f"{rate}{mfu}  eta {self._eta(step)}"
        )

    def eval(self, step: int, **values: Any) -> None:
        """Record an evaluation."""
        self._write("eval", step, values)
        self.note(f"step {step}/{self.steps}  val_loss {values['val_loss']:.4f}  val_bpb {values['val_bpb']:.4f}")

    def sample(self, step: int, **values: Any) -> None:
        """Record text that the model wrote."""
        self._write("sample", step, values)
        self.note("\n".join(f"    | {line}" for line in values["text"].strip("\n").split("\n")))

    def note(self, text: str) -> None:
        """A line for people only."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def sync(self) -> None:
        """What was recorded so far is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        self._bar.update(self._task, completed=step)
        if self._wandb is not None:
            self._wandb.log(kind, step, values)

    def _eta(self, step: int) -> str:
        assert self._began is not None
        first, began = self._began
        left = int((self.steps - step) * (time.monotonic() - began) / (step - first)) if step > first else None
        if left is None:
            return "--:--"
        hours, seconds = divmod(left, 3600)
        return (f"{hours}:" if hours else "") + f"{seconds // 60:02d}:{seconds % 60:02d}"


class Wandb:
    """wandb behind a guard: whatever it does, training goes on without it. Its id and last step live in wandb.json.

    x-axis is tokens; a step at or below the last one logged, which a resume from an older checkpoint makes again, is not
    logged twice. It is told an allowlist of settings; no code, arguments, environment or machine statistics.
    """

    def __init__(self, path: Path, config: WandbConfig, run_config: Mapping[str, Any], note: Any) -> None:
        self._state_path, self._note, self._run = path / "wandb.json", note, None
        self._state: dict[str, Any] = {"id": None, "last": {}}
        try:
            import wandb  # here: it takes seconds, and a run without it must not need it

            if self._state_path.exists():
                self._state = json.loads(self._state_path.read_bytes())
            quiet = wandb.Settings(
                init_timeout=30,
                save_code=False,
                disable_git=True,
                console="off",
                x_disable_stats=True,
                x_disable_meta=True,
                silent=True,
            )
            self._run = wandb.init(
                dir=path,
                name=path.name,
                id=self._state["id"],
                resume="allow",
                config=dict(run_config),
                settings=quiet,
                **config.model_dump(),
            )
            self._run.define_metric("*", step_metric="tokens")
            self._state["id"] = self._run.id
            self._keep()
        except Exception as error:
            self._detach(error)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._run is None or step <= self._state["last"].get(kind, -1):
            return
        try:
            prefixed = {
                name if name == "tokens" else f"{kind}/{name}": value
                for name, value in values.items()
                if value is not None
            }
            self._run.log(prefixed)
            self._state["last"][kind] = step
            self._keep()
        except Exception as error:
            self._detach(error)

    def finish(self, failed: bool) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=int(failed))
            except Exception as error:
                self._detach(error)

    def _keep(self) -> None:
        durable.write_file(self._state_path, json.dumps(self._state).encode())

    def _detach(self, error: Exception) -> None:
        self._run = None
        self._note(
            f"wandb: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; training goes on without it"
        )
