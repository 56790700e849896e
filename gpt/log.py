"""What people watch: metrics.jsonl, which is the record, the console, and wandb where it is asked for. Decides nothing."""

import contextlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from gpt import durable, signals
from gpt.config import Count, Settings
from gpt.signals import Stopped

WATCHER_GONE = (
    OSError,
    SystemExit,
)  # what rich raises when the terminal or the pipe is closed: no reason to stop training


CLOCK = ("tokens_per_second", "mfu", "elapsed_s", "peak_memory_bytes")


class WandbConfig(Settings):
    """Where wandb files the run."""

    project: str = Field("gpt", description="wandb project")
    entity: str | None = Field(None, description="wandb user or team; null: the account's own")
    group: str | None = Field(None, description="group of runs")
    tags: tuple[str, ...] = Field((), description="labels")
    mode: Literal["online", "offline"] = Field("online", description="offline keeps the files here for `wandb sync`")


class LogConfig(Settings):
    """What is written down, and how often."""

    every: Count = Field(10, ge=1, description="steps between training lines")
    sample_every: Count | None = Field(None, ge=1, description="steps between samples of text; null: none")
    wandb: WandbConfig | None = Field(None, description="track with wandb; null: not")


class Log:
    """Each record is one line of metrics.jsonl and goes to the console and to wandb. A context manager.

    Without `clock` the record leaves out what a clock or a memory says, and is the same for the same run anywhere.
    Only a metrics.jsonl that cannot be written raises (OSError).
    """

    def __init__(
        self,
        run_path: Path,
        config: LogConfig,
        *,
        run_config: Mapping[str, Any],
        steps: int,
        console: Console,
        clock: bool = True,
    ) -> None:
        self._steps, self._console, self._unsaid = steps, console, () if clock else CLOCK
        self._path = run_path / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = None if config.wandb is None else Wandb(run_path, config.wandb, run_config, self.note)
        columns = BarColumn(40), TextColumn("{task.completed}/{task.total}")
        # No refresh thread: it would take its share of the cores from training.
        self._bar = Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True, auto_refresh=False
        )
        self._task = self._bar.add_task("", total=steps)
        self._shown = contextlib.ExitStack()  # takes the bar away again, if it could be shown
        self._first: tuple[int, float] | None = None  # step and time of this process's first training line

    def __enter__(self) -> Self:
        with contextlib.suppress(*WATCHER_GONE):
            self._bar.start()
            self._shown.callback(self._bar.stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None and not issubclass(kind, Stopped))

    def close(self, *, failed: bool = False) -> None:
        """End every sink; `failed` is what wandb is told."""
        with contextlib.suppress(*WATCHER_GONE):
            self._shown.close()
        if self._wandb is not None:
            self._wandb.finish(failed)
        self.sync()
        self._file.close()

    def train(
        self,
        step: int,
        *,
        tokens: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens_per_second: float,
        **others: Any,
    ) -> None:
        """Record an update: nats per target, peak learning rate in force, gradient norm before clipping."""
        rates = {"lr": lr, "grad_norm": grad_norm, "tokens_per_second": tokens_per_second}
        self._record("train", step, {"tokens": tokens, "loss": loss, **rates, **others})
        eta = duration(self._seconds_left(step, tokens_per_second * step / max(1, tokens)))
        mfu = f"  mfu {others['mfu']:.2f}" if others.get("mfu") else ""
        rate = f"{thousands(tokens_per_second)} tok/s{mfu}  eta {eta}"
        self.note(f"step {step}/{self._steps}  loss {loss:.3f}  lr {power(lr)}  grad {grad_norm:.2f}  {rate}")

    def evaluated(
        self,
        step: int,
        *,
        tokens: int,
        elapsed_s: float | None = None,
        sources: Mapping[str, float] | None = None,
        **measures: float,
    ) -> None:
        """Record an evaluation: its measures by their names, and the best-known of them of each of several sources."""
        each = {"sources": dict(sources)} if sources and len(sources) > 1 else {}
        after = {} if elapsed_s is None else {"elapsed_s": elapsed_s}
        self._record("eval", step, {"tokens": tokens, **measures, **each, **after})
        parts = "".join(f"  {name} {value:.4f}" for name, value in (measures | each.get("sources", {})).items())
        self.note(f"step {step}/{self._steps}{parts}")

    def sample(self, step: int, *, tokens: int, text: str) -> None:
        """Record text that the model wrote."""
        self._record("sample", step, {"tokens": tokens, "text": text})
        self.note(
            f"step {step}/{self._steps}  sample\n" + "\n".join(f"  | {line}" for line in text.strip("\n").split("\n"))
        )

    def finding(self, step: int, about: str, text: str) -> None:
        """Record what is wrong with the training, its likely cause and what to set."""
        self._record("doctor", step, {"about": about, "text": text})
        first, *others = text.split("\n")
        self.note("\n".join([f"step {step}/{self._steps}  {first}", *(f"  | {line}" for line in others)]))

    def note(self, text: str) -> None:
        """A line for people only. Control characters, which a model can write too, do not reach the terminal."""
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        with contextlib.suppress(*WATCHER_GONE):
            self._console.print(Text(shown), soft_wrap=True)

    def sync(self) -> None:
        """What was recorded so far is on the disk when this returns; any thread may ask, since each line is flushed at once."""
        os.fsync(self._file.fileno())

    def reopen(self, step: int) -> None:
        """Go on in the file that stands there now, from `step`: what was recorded after it is recorded anew."""
        if self._wandb is not None:
            self._wandb.back_to(step)
        self._file.close()
        self._file = self._path.open("a", encoding="utf-8")

    def _record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        values = {name: value for name, value in values.items() if name not in self._unsaid}
        line = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(kind, step, values)
        with contextlib.suppress(*WATCHER_GONE):
            self._bar.update(self._task, completed=step, refresh=True)

    def _seconds_left(self, step: int, steps_per_s: float) -> float:
        """By the clock since this process's first line, evaluations and saves included; at that line by its own rate."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = step, now
        else:
            steps_per_s = (step - self._first[0]) / max(now - self._first[1], 1e-9)
        return (self._steps - step) / steps_per_s if steps_per_s > 0 else math.inf


class Silence(Log):
    """What ranks past the first say."""

    def __init__(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def close(self, *, failed: bool = False) -> None: ...

    def train(self, step: int, **values: Any) -> None: ...

    def evaluated(self, step: int, **values: Any) -> None: ...

    def sample(self, step: int, **values: Any) -> None: ...

    def finding(self, step: int, about: str, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def sync(self) -> None: ...

    def reopen(self, step: int) -> None: ...


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a tracker may know of a record: numbers, no text, and those of a mapping as MAPPING/NAME, without the directories."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            ends = _tails(value)
            yield from _numbers({f"{name}/{ends[inner]}": deeper for inner, deeper in value.items()})
        elif isinstance(value, int | float):
            yield name, value


def _tails(names: Iterable[str]) -> dict[str, str]:
    """The ends of several paths, as long as it takes to tell one from another."""
    apart = {name: name.strip("/").split("/") for name in names}
    for n in range(1, max(map(len, apart.values()), default=1) + 1):
        tails = {name: "/".join(parts[-n:]) for name, parts in apart.items()}
        if len(set(tails.values())) == len(tails):
            break
    return tails


def duration(seconds: float) -> str:
    """04:12, or 3:04:12 from an hour on."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes:02d}:{left:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


def thousands(number: float) -> str:
    """950, 12.3k or 1.24M."""
    if number >= 999_950:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.1f}k" if number >= 1000 else f"{number:.0f}"


def power(number: float) -> str:
    """3.0e-4."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


class Wandb:
    """wandb behind a guard: whatever it does, training goes on without it.

    wandb.json in the run directory keeps the run's id, so that a resume continues it, and the last step sent of each kind:
    the steps that a resume makes again are not sent twice. wandb is told `run_config` and the numbers of the records, and
    no text, paths, code, arguments, environment or machine.
    """

    def __init__(
        self, run_path: Path, config: WandbConfig, run_config: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self._path, self._note = run_path / "wandb.json", note
        self._run: Any = None
        self._sent: dict[str, int] = {}
        with self._guarded():
            self._run = self._start(run_path, config, run_config)

    def _start(self, run_path: Path, config: WandbConfig, run_config: Mapping[str, Any]) -> Any:
        import wandb  # here: it takes a second, and a run that does not ask for it must not need it

        if config.mode == "online" and not wandb.login(prompt=False):  # its prompt would hold up training
            raise ValueError("not logged in; run `wandb login`, or set log.wandb.mode=offline")
        state: dict[str, Any] = {"id": secrets.token_hex(4), "sent": {}}
        if self._path.exists():
            state = json.loads(self._path.read_bytes())
        if not re.fullmatch(r"[\w-]{1,64}", str(state["id"]), re.ASCII):  # it becomes part of a path
            raise ValueError(f"{self._path} holds no id of a run; delete it to begin a new one there")
        self._id, self._sent = str(state["id"]), dict(state["sent"])
        self._keep()
        silence = {"silent": True, "console": "off", "init_timeout": 30, "finish_timeout": 60}
        secrecy = {
            "disable_code": True,
            "save_code": False,
            "disable_git": True,
            "disable_job_creation": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        }
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            mode=config.mode,
            id=self._id,
            resume="allow",
            name=run_path.name,
            dir=str(run_path),
            config=dict(run_config),
            settings=wandb.Settings(**silence, **secrecy),
        )
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        return run

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Send a record, unless this step was sent before."""
        with self._guarded():
            told = {n if n == "tokens" else f"{kind}/{n}": v for n, v in _numbers(values)}
            if self._run is not None and told.keys() - {"tokens"} and step > self._sent.get(kind, -1):
                self._sent[kind] = step
                self._keep()  # first: killed in between, a step is missing there rather than twice
                self._run.log(told)

    def back_to(self, step: int) -> None:
        """Send what comes after `step` again: it is another course, whose points take the place of those before."""
        self._sent = {kind: min(sent, step) for kind, sent in self._sent.items()}

    def finish(self, failed: bool) -> None:
        """Close the run; waits a minute at most for what is still to be sent."""
        with self._guarded():
            if self._run is not None:
                self._run.finish(exit_code=int(failed))

    def _keep(self) -> None:
        durable.write_file(self._path, json.dumps({"id": self._id, "sent": self._sent}).encode())

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._run = None
            self._note(f"wandb: {signals.reason(error)}; training goes on without it")
