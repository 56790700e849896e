"""metrics.jsonl, the console and wandb: what is recorded, what is shown, and that no sink can stop training."""

import io
import json
import math
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpt import log as log_module
from gpt.log import Log, LogConfig, WandbConfig, duration, power, thousands
from gpt.signals import Stopped

PUBLIC = {"model.n_layer": 6, "optim.lr": 0.02}
UPDATE = {"loss": 3.4123, "lr": 3e-4, "grad_norm": 0.8, "tokens_per_second": 12_345.0}


def console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    shown = io.StringIO()
    return Console(file=shown, force_terminal=terminal, width=60, color_system="truecolor" if terminal else None), shown


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def opened(tmp_path):
    """opened(wandb=...) -> (log, what the console shows)."""

    def make(*, terminal: bool = False, wandb: WandbConfig | None = None, steps: int = 3000) -> tuple[Log, io.StringIO]:
        to, shown = console(terminal=terminal)
        return Log(tmp_path, LogConfig(wandb=wandb), run_config=PUBLIC, steps=steps, console=to), shown

    return make


class FakeWandb(types.ModuleType):
    """A stand-in for the package that remembers what it was told, and fails where it is asked to."""

    def __init__(self, failing: str = "", *, logged_in: bool = True) -> None:
        super().__init__("wandb")
        self.failing, self.logged_in = failing, logged_in
        self.given: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.metrics: list[tuple[tuple, dict]] = []
        self.exit_code: int | None = None

    def fail(self, where: str) -> None:
        if where == self.failing:
            raise RuntimeError(f"{where} failed\nwith details")

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, **given: Any) -> "FakeWandb":
        self.fail("init")
        self.given = given
        return self

    def define_metric(self, *names: str, **how: str) -> None:
        self.metrics.append((names, how))

    def log(self, record: dict[str, Any]) -> None:
        self.fail("log")
        self.records.append(record)

    def finish(self, *, exit_code: int) -> None:
        self.fail("finish")
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
    """fake(...) puts a FakeWandb in the package's place."""

    def put(*args: Any, **kwargs: Any) -> FakeWandb:
        monkeypatch.setitem(sys.modules, "wandb", module := FakeWandb(*args, **kwargs))
        return module

    return put


def test_each_record_is_one_line_of_json_with_its_kind_and_step(opened, tmp_path):
    log, _ = opened()
    with log:
        log.train(10, tokens=40960, **UPDATE, mfu=None, elapsed_s=1.5)
        log.evaluated(10, tokens=40960, val_loss=3.5, val_bpb=2.1, elapsed_s=2.0)
        log.sample(10, tokens=40960, text="def f():\n    '詩🙂'\n")
    assert lines(tmp_path) == [
        {"kind": "train", "step": 10, "tokens": 40960, **UPDATE, "mfu": None, "elapsed_s": 1.5},
        {"kind": "eval", "step": 10, "tokens": 40960, "val_loss": 3.5, "val_bpb": 2.1, "elapsed_s": 2.0},
        {"kind": "sample", "step": 10, "tokens": 40960, "text": "def f():\n    '詩🙂'\n"},
    ]


def test_a_record_is_in_the_file_before_the_next_one_is_made(opened, tmp_path):
    log, _ = opened()
    with log:
        log.train(1, tokens=1, **UPDATE)
        assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_resumed_run_appends(opened, tmp_path):
    for step in (1, 2):
        log, _ = opened()
        with log:
            log.train(step, tokens=step, **UPDATE)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_is_not_finite_becomes_null_and_the_file_stays_json(opened, tmp_path):
    log, shown = opened()
    with log:
        log.evaluated(1, tokens=1, val_loss=math.nan, val_bpb=math.inf)
    assert lines(tmp_path)[0] | {"kind": ""} == {"kind": "", "step": 1, "tokens": 1, "val_loss": None, "val_bpb": None}
    assert "val_loss nan" in shown.getvalue()


def test_a_plain_console_gets_one_unbroken_line_for_each_record(opened):
    log, shown = opened()
    with log:
        log.train(120, tokens=120 * 4096, **UPDATE)
        log.evaluated(120, tokens=1, val_loss=3.40001, val_bpb=2.05)
    rate = 12_345.0 / 4096
    assert shown.getvalue() == (
        f"step 120/3000  loss 3.412  lr 3.0e-4  grad 0.80  12.3k tok/s  eta {duration(2880 / rate)}\n"
        "step 120/3000  val_loss 3.4000  val_bpb 2.0500\n"
    )


def test_the_time_left_follows_the_clock_of_this_process_once_it_can(opened, monkeypatch):
    clock = iter([100.0, 120.0, 150.0])
    log, shown = opened(steps=1100)
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(clock))
    with log:
        for step in (1000, 1010, 1020):  # 2 s, then 2.5 s a step: evaluations and saves count too
            log.train(step, tokens=step * 100, **UPDATE | {"tokens_per_second": 100.0})
    assert re.findall(r"eta (\S+)", shown.getvalue()) == ["01:40", "03:00", "03:20"]


def test_a_terminal_has_a_bar_that_leaves_with_the_log(opened):
    log, shown = opened(terminal=True)
    with log:
        log.train(1500, tokens=1, **UPDATE)
        assert "1500/3000" in re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue().split("eta")[1])
    assert shown.getvalue().endswith("\x1b[2K"), "the bar's line was cleared"
    assert "\x1b[?25h" in shown.getvalue().rsplit("\x1b[?25l", 1)[1], "the cursor is back"


def test_text_of_the_model_is_shown_as_text_and_cannot_drive_the_terminal(opened, tmp_path):
    log, shown = opened(terminal=False)
    text = "[bold]a[/bold] :smile: [/nope]\n\x1b[2J\x07 ok 詩 12"
    with log:
        log.sample(5, tokens=1, text=text)
    assert shown.getvalue() == (
        "step 5/3000  sample\n  | [bold]a[/bold] :smile: [/nope]\n  | \ufffd[2J\ufffd ok 詩 12\n"
    )
    assert lines(tmp_path)[0]["text"] == text


def test_a_console_that_is_gone_stops_nothing(tmp_path):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for terminal in (False, True):
        log = Log(tmp_path, LogConfig(), run_config={}, steps=9, console=Console(file=Gone(), force_terminal=terminal))
        with log:
            log.train(1, tokens=1, **UPDATE)
    assert len(lines(tmp_path)) == 2


def test_a_metrics_file_that_cannot_be_written_does_stop_the_run(tmp_path):
    with pytest.raises(OSError):
        Log(tmp_path / "missing", LogConfig(), run_config={}, steps=9, console=console()[0])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (59.6, "01:00"), (252, "04:12"), (3599, "59:59"), (11052, "3:04:12"), (math.inf, "--:--")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_numbers_are_short():
    assert [thousands(n) for n in (950, 1000, 12_345, 999_949, 999_950, 1_240_000)] == [
        "950",
        "1.0k",
        "12.3k",
        "999.9k",
        "1.00M",
        "1.24M",
    ]
    assert [power(n) for n in (3e-4, 0.02, 1, 0)] == ["3.0e-4", "2.0e-2", "1.0e0", "0.0e0"]


def test_wandb_gets_the_public_settings_and_the_records_over_tokens(opened, fake, tmp_path):
    module = fake()
    log, _ = opened(wandb=WandbConfig(project="p", entity="e", group="g", tags=("a", "b")))
    with log:
        log.train(10, tokens=40, **UPDATE, mfu=None)
        log.evaluated(10, tokens=40, val_loss=3.0, val_bpb=2.0)
    asked = {name: module.given[name] for name in ("project", "entity", "group", "tags", "mode", "resume")}
    assert asked == {
        "project": "p",
        "entity": "e",
        "group": "g",
        "tags": ("a", "b"),
        "mode": "online",
        "resume": "allow",
    }
    assert module.given["config"] == PUBLIC
    assert (("*",), {"step_metric": "tokens"}) in module.metrics
    assert module.records == [
        {"tokens": 40, **{f"train/{name}": value for name, value in UPDATE.items()}},
        {"tokens": 40, "eval/val_loss": 3.0, "eval/val_bpb": 2.0},
    ]
    assert module.exit_code == 0
    assert json.loads((tmp_path / "wandb.json").read_text()) == {
        "id": module.given["id"],
        "sent": {"train": 10, "eval": 10},
    }


def test_wandb_is_told_to_look_at_nothing_itself(opened, fake):
    module = fake()
    log, _ = opened(wandb=WandbConfig())
    log.close()
    off = {
        name
        for name, value in module.given["settings"].items()
        if name.startswith(("disable_", "x_disable_")) and value
    }
    assert off == {"disable_code", "disable_git", "disable_job_creation"} | {
        f"x_disable_{what}" for what in ("meta", "machine_info", "stats")
    }
    assert not module.given["settings"]["save_code"] and not module.given["settings"]["x_save_requirements"]
    assert module.given["settings"]["console"] == "off" and module.given["settings"]["init_timeout"] <= 60


def test_a_resume_continues_the_wandb_run_and_sends_no_step_twice(opened, fake):
    ids = set()
    sent = []
    for steps in ((10, 20, 30), (20, 30, 40)):  # killed after 30, resumed from the checkpoint of 10
        module = fake()
        log, _ = opened(wandb=WandbConfig())
        with log:
            for step in steps:
                log.train(step, tokens=step, **UPDATE)
                log.evaluated(step, tokens=step, val_loss=1.0, val_bpb=1.0)
        ids.add(module.given["id"])
        sent += [(record["tokens"], "eval/val_bpb" in record) for record in module.records]
    assert len(ids) == 1
    assert sorted(sent) == [(step, evaluated) for step in (10, 20, 30, 40) for evaluated in (False, True)]


def test_a_run_that_was_rolled_back_sends_its_new_course(opened, fake):
    module = fake()
    log, _ = opened(wandb=WandbConfig())
    with log:
        for steps in ((10, 20, 30), (20, 30)):
            for step in steps:
                log.train(step, tokens=step, **UPDATE)
            log.reopen(10)
    assert [record["tokens"] for record in module.records] == [10, 20, 30, 20, 30]


def test_a_step_is_noted_before_it_is_sent_so_that_a_kill_in_between_cannot_double_it(opened, fake, tmp_path):
    module = fake()
    log, _ = opened(wandb=WandbConfig())
    seen = []
    module.log = lambda record: seen.append(json.loads((tmp_path / "wandb.json").read_text())["sent"])  # type: ignore[method-assign]
    with log:
        log.train(10, tokens=1, **UPDATE)
    assert seen == [{"train": 10}]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failing_wandb_is_noted_once_and_training_goes_on(opened, fake, tmp_path, failing):
    fake(failing)
    log, shown = opened(wandb=WandbConfig())
    with log:
        for step in (1, 2, 3):
            log.train(step, tokens=step, **UPDATE)
    assert shown.getvalue().count("wandb") == 1
    assert f"wandb: {failing} failed; training goes on without it\n" in shown.getvalue()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_wandb_may_be_absent(opened, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log, shown = opened(wandb=WandbConfig())
    with log:
        log.train(1, tokens=1, **UPDATE)
    assert shown.getvalue().count("training goes on without it") == 1
    assert len(lines(tmp_path)) == 1


def test_wandb_without_a_login_is_not_waited_for(opened, fake):
    module = fake(logged_in=False)
    log, shown = opened(wandb=WandbConfig())
    with log:
        log.train(1, tokens=1, **UPDATE)
    assert "wandb: not logged in; run `wandb login`" in shown.getvalue()
    assert module.records == []


def test_a_damaged_wandb_json_detaches_wandb_only(opened, fake, tmp_path):
    fake()
    (tmp_path / "wandb.json").write_text("{")
    log, shown = opened(wandb=WandbConfig())
    with log:
        log.train(1, tokens=1, **UPDATE)
    assert "training goes on without it" in shown.getvalue()


@pytest.mark.parametrize(("error", "code"), [(ValueError("bad"), 1), (Stopped("later"), 0)])
def test_wandb_learns_whether_the_run_failed(opened, fake, error, code):
    module = fake()
    log, _ = opened(wandb=WandbConfig())
    with pytest.raises(type(error)), log:
        raise error
    assert module.exit_code == code


def test_wandb_is_not_imported_unless_asked_for(opened, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    log, _ = opened()
    with log:
        log.train(1, tokens=1, **UPDATE)
    assert "wandb" not in sys.modules


def test_the_real_wandb_offline_records_a_resumed_run_and_no_secret(opened, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2-environment")
    monkeypatch.setattr(sys, "argv", ["train.py", "--hunter2-argument"])
    for step in (10, 20):
        log, shown = opened(wandb=WandbConfig(project="p", mode="offline", tags=("t",)))
        with log:
            log.train(step, tokens=step, **UPDATE)
            log.sample(step, tokens=step, text="some text")
        assert "without it" not in shown.getvalue()
    until = time.monotonic() + 30  # wandb's own process may still write
    while b"train/loss" not in next((tmp_path / "wandb").rglob("*.wandb")).read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
    records = [path.read_bytes() for path in files if path.suffix == ".wandb"]
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert len(records) == 2 and all(f"run-{identity}" in path.name for path in files if path.suffix == ".wandb")
    assert b"train/loss" in records[0] and b"model.n_layer" in records[0]
    everything = b"".join(path.read_bytes() for path in files)
    for secret in (b"hunter2-environment", b"hunter2-argument", b"import pytest", Path(__file__).name.encode()):
        assert secret not in everything


def test_the_scores_of_several_sources_are_recorded_shown_and_sent_one_by_one(opened, fake, tmp_path):
    module = fake()
    log, shown = opened(wandb=WandbConfig())
    with log:
        log.evaluated(10, tokens=40, val_loss=3.0, val_bpb=2.0, sources={"poems": 2.5, "plays": math.nan})
        log.evaluated(20, tokens=80, val_loss=3.0, val_bpb=2.0, sources={"poems": 2.0})
    several, one = lines(tmp_path)
    assert several["sources"] == {"poems": 2.5, "plays": None}
    assert "sources" not in one
    assert "val_bpb 2.0000  poems 2.5000  plays nan" in shown.getvalue()
    assert module.records[0]["eval/sources/poems"] == 2.5
    assert "eval/sources/poems" not in module.records[1]


def test_wandb_is_told_numbers_and_neither_text_nor_directories(opened, fake):
    module = fake()
    log, _ = opened(wandb=WandbConfig())
    with log:
        log.evaluated(
            10, tokens=40, val_bpb=2.0, sources={"/home/me/a/x": 2.5, "/home/me/b/x": 2.0, "/home/me/b/x/poems": 1.5}
        )
        log.sample(10, tokens=40, text="what a model wrote")
        log.finding(10, "spike", "batch: /home/me/runs/a/bad_batch_10.txt")
    assert module.records == [
        {
            "tokens": 40,
            "eval/val_bpb": 2.0,
            "eval/sources/a/x": 2.5,
            "eval/sources/b/x": 2.0,
            "eval/sources/x/poems": 1.5,
        }
    ]
