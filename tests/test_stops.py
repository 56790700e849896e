"""Stop requests in every phase of the real command, a lock that is waited for, a job that ends, a run that hangs."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from runs import ROOT, begun, command, curve, ended, settings, struck, trained
from test_trainer import settings as of_trainer

from gpt import signals
from gpt.trainer import train
from gpt.watchdog import Watchdog

PHASES = {  # the moment of struck.py, which time it comes, and the step that stands saved afterwards
    "import": ("import", 1, 0),
    "data": ("preparation", 1, 0),
    "encoding": ("encoding", 1, 0),
    "probing": ("probing", 1, 0),
    "compile": ("compile", 1, 0),
    "first step": ("step", 1, 1),
    "training": ("step", 7, 7),
    "save": ("save", 1, 5),
    "evaluation": ("evaluation", 1, 10),
    "sampling": ("sampling", 1, 30),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_saves_the_step_and_the_same_command_ends_as_if_it_had_not_come(
    corpus: Path,
    tmp_path: Path,
    phase: str,
) -> None:
    (tmp_path / "data").mkdir()
    if phase in ("data", "encoding"):
        recipe = f"input: [{corpus / 'poems.jsonl'}]\nvocab_size: 300\nworkers: 1\n"
        (tmp_path / "data" / "small.yaml").write_text(recipe)
    else:
        (tmp_path / "data" / "small").symlink_to(corpus / "data" / "small")
    text = settings("true" if phase == "compile" else "false", steps=32)
    if phase == "probing":
        text = text.replace("steps: 32", "time: 6s")
    (tmp_path / "small.yaml").write_text(text)
    number = {"import": signal.SIGTERM, "save": signal.SIGUSR1}.get(phase, signal.SIGINT)
    moment, nth, step = PHASES[phase]
    done = ended(tmp_path, struck(moment, nth, number, "small.yaml"))
    assert done.code == 75, done.said
    assert "Traceback" not in done.said and number.name in done.said
    run = tmp_path / "runs/small"
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")) if run.exists() else []
    assert max(saved, default=0) == step
    if run.exists():
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"], status["exit_code"]) == ("preempted", step, 75)
    if phase == "probing":
        return
    for name in ("small", "golden"):
        trained(tmp_path, name)
    assert curve(run) == curve(tmp_path / "runs/golden")


@contextmanager
def held(root: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run for so long, and does so when the block begins; it ends with the block at the latest."""
    body = f"with RunDirectory(Path('runs'), 'small').lock():\n    print('held', flush=True); time.sleep({seconds})"
    source = f"import time\nfrom pathlib import Path\nfrom gpt.run import RunDirectory\n{body}"
    running = begun(root, [sys.executable, "-c", source], PYTHONPATH=str(ROOT))
    try:
        assert running.stdout is not None and running.stdout.readline() == "held\n"
        yield running
    finally:
        running.kill()
        running.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dying_predecessor_is_waited_for_and_one_that_stays_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=2))
    with held(tmp_path, 300) as before:
        code, said, took, _ = ended(tmp_path, command("small.yaml", "--wait-lock", "0.5"))
        assert code == 2 and f"pid {before.pid}" in said and "(waited 0.5 s)" in said
        waiting = subprocess.Popen(command("small.yaml", "--wait-lock", "120"), cwd=tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(took)  # it is at the lock by now
        assert waiting.poll() is None
    assert waiting.wait(60) == 0


@pytest.mark.slow
def test_a_stop_while_the_lock_is_waited_for_is_obeyed(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=2))
    with held(tmp_path, 300):
        waiting = begun(tmp_path, command("small.yaml", "--wait-lock", "200"))
        time.sleep(4)
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=60)
        assert waiting.returncode == 75


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_ends_with_a_save_before_its_job_does(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=1_000_000))
    ends_at = time.time() + 90
    line = command("small.yaml", "log.every=1000", "eval.every=100000", "log.sample_every=null")
    done = ended(tmp_path, line, SLURM_JOB_END_TIME=str(int(ends_at)))
    assert done.code == 75, done.said
    assert time.time() < ends_at
    assert "time limit: the job ends at " in done.printed
    assert "stopped by the end of the job's time at step" in done.said
    status = json.loads((tmp_path / "runs/small/status.json").read_text())
    assert status["state"] == "preempted" and status["exit_code"] == 75 and status["step"] > 0
    assert (tmp_path / f"runs/small/checkpoints/step_{status['step']:08d}").is_dir()


def test_a_run_stops_by_itself_before_the_end_of_its_job(
    grammar: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job's end comes near when the first update is made: how long the start takes depends on the machine's other work."""
    far, near = time.time() + 3600, list[float]()
    real = Watchdog.begun

    def begun(watch: Watchdog) -> None:
        assert watch._ends_at in (far, *near)
        watch.expect_saves(4.0)
        near[:] = near or [time.time() + 15]
        watch._ends_at = near[0]
        real(watch)

    monkeypatch.setattr(Watchdog, "begun", begun)
    monkeypatch.setattr("gpt.runtime.job_ends_at", lambda: far)
    monkeypatch.setattr(signals, "_requested", None)
    given = of_trainer("train.steps=1000000", "eval.every=1000000", "checkpoint.every=50", "log.every=50")
    with pytest.raises(signals.Stopped, match="stopped by the end of the job's time at step"):
        train(given, console=Console(quiet=True))
    assert time.time() < near[0]
    status = json.loads(Path("runs/tiny/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75) and status["step"] > 0
    assert Path(f"runs/tiny/checkpoints/step_{status['step']:08d}").is_dir()


HANGS = """
import sys, threading
sys.path.insert(0, {root!r})
from gpt import signals
def main(argv):
    from gpt import trainer
    import train
    real = trainer.update
    def hanging(*args):
        if args[5] == 7:
            threading.Event().wait()
        return real(*args)
    trainer.update = hanging
    train.main(argv)
signals.run(main)
"""


def test_a_run_that_hangs_says_where_and_ends_with_its_code(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=12))
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(root=str(ROOT)), "small.yaml", "train.hang=5s"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 6, done.stderr
    assert "in hanging" in done.stderr and "in hanging" in (tmp_path / "runs/small/hung_stacks.txt").read_text()
    status = json.loads((tmp_path / "runs/small/status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 5, 6)
    assert status["reason"].startswith("hung: nothing happened for")
