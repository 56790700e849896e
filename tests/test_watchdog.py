"""A watcher, tried on real processes that hang, work, are suspended and end."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt import signals
from gpt.watchdog import Watchdog

ROOT = Path(__file__).resolve().parent.parent


def process(tmp_path: Path, body: str, limit: float = 0.6) -> subprocess.Popen[str]:
    """A watched process that runs `body`, begun; it says "ready" first."""
    source = f"""\
import sys, threading, time
from pathlib import Path
from gpt import signals
from gpt.watchdog import Watchdog
def tell(reason):
    Path({str(tmp_path / "told")!r}).write_text(reason)
def stuck_here():
    threading.Event().wait()
with Watchdog({limit}, Path({str(tmp_path / "stacks.txt")!r}), tell) as watch:
    watch.begun()
    print("ready", flush=True)
{textwrap.indent(body, "    ")}
"""
    running = subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    return running


def test_a_process_that_hangs_says_where_and_ends_with_its_code(tmp_path: Path) -> None:
    running = process(tmp_path, "stuck_here()")
    _, errors = running.communicate(timeout=120)
    assert running.returncode == signals.STUCK == 6
    assert "stuck_here" in errors and "error: hung: nothing happened for" in errors
    assert "stuck_here" in (tmp_path / "stacks.txt").read_text()
    assert (tmp_path / "told").read_text().startswith("hung: nothing happened for")


def test_where_a_link_stands_no_stacks_are_written(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("my own words")
    (tmp_path / "stacks.txt").symlink_to(tmp_path / "mine")
    Watchdog(None, tmp_path / "stacks.txt", print)._write("hung")
    assert (tmp_path / "mine").read_text() == "my own words"


def test_a_hung_process_ends_even_if_what_it_would_tell_hangs_too(tmp_path: Path) -> None:
    body = (
        "import gpt.watchdog\ngpt.watchdog.LAST_WORDS_S = 0.5\nwatch._tell = lambda reason: stuck_here()\nstuck_here()"
    )
    running = process(tmp_path, body)
    running.communicate(timeout=120)
    assert running.returncode == signals.STUCK


def test_a_process_that_beats_lives_and_its_watcher_ends_with_the_block(tmp_path: Path) -> None:
    running = process(tmp_path, "for _ in range(30):\n    time.sleep(0.05)\n    signals.check()\nprint('done')")
    out, errors = running.communicate(timeout=120)
    assert (running.returncode, out, errors) == (0, "done\n", "")


def test_a_process_that_was_suspended_for_longer_than_the_limit_is_not_taken_to_hang(tmp_path: Path) -> None:
    running = process(tmp_path, "for _ in range(20):\n    time.sleep(0.1)\n    signals.beat()\nprint('done')")
    for _ in range(2):
        time.sleep(0.3)
        os.kill(running.pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(running.pid, signal.SIGCONT)
    out, errors = running.communicate(timeout=120)
    assert (running.returncode, out, errors) == (0, "done\n", "")


@pytest.mark.parametrize(("seconds", "code"), [(1.2, 0), (60.0, 6)])
def test_what_is_known_to_be_long_may_take_longer_but_not_forever(tmp_path: Path, seconds: float, code: int) -> None:
    running = process(tmp_path, f"with watch.patient():\n    time.sleep({seconds})")
    running.communicate(timeout=120)
    assert running.returncode == code


def test_without_a_limit_nothing_is_watched(tmp_path: Path) -> None:
    running = process(tmp_path, "time.sleep(1.5)", limit=None)  # type: ignore[arg-type]
    running.communicate(timeout=120)
    assert running.returncode == 0


def test_a_stop_is_requested_two_saves_before_the_end_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.watchdog.TICK_S", 0.05)
    monkeypatch.setattr(signals, "_requested", None)
    now = [1000.85]
    monkeypatch.setattr("gpt.watchdog.time", SimpleNamespace(time=lambda: now[0], monotonic=time.monotonic))
    with Watchdog(None, tmp_path / "stacks.txt", print, ends_at=1003.0) as watch:
        watch.expect_saves(1.0)
        assert watch.early_s == pytest.approx(2.1)
        time.sleep(0.3)
        assert signals.stop_requested() is None
        now[0], until = 1000.95, time.monotonic() + 20
        while signals.stop_requested() is None and time.monotonic() < until:
            time.sleep(0.02)
    assert signals.stop_requested() == "the end of the job's time"


def test_a_silent_rank_writes_down_where_it_stands_before_the_others_give_up(tmp_path: Path) -> None:
    running = process(tmp_path, "watch._look_s = 0.3\nstuck_here()", limit=60)
    stacks = tmp_path / "stacks.txt"
    until = time.monotonic() + 20
    while "stuck_here" not in (stacks.read_text() if stacks.exists() else "") and time.monotonic() < until:
        time.sleep(0.1)
    assert "nothing happened for" in stacks.read_text() and "in stuck_here" in stacks.read_text()
    assert running.poll() is None, "it goes on"
    running.kill()
    running.communicate()
