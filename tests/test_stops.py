"""Stop requests in every phase of the real command, a lock that is waited for, a job that ends, a run that hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from runs import ROOT, command, curve, settings
from test_train import corpus  # noqa: F401 (a fixture)
from test_trainer import data_set, here  # noqa: F401 (fixtures)
from test_trainer import settings as of_trainer

from gpt import signals
from gpt.trainer import train

# Each sends this process a real signal at one moment of a phase, once.
PATCH = """
import os, signal, sys
sys.path.insert(0, {root!r})
from gpt import signals

def once(owner, name, when=lambda *a, **k: True, after=False):
    real, sent = getattr(owner, name), []
    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs) if after else None
        if not sent and when(*args, **kwargs):
            sent.append(1)
            os.kill(os.getpid(), signal.{number})
        return result if after else real(*args, **kwargs)
    setattr(owner, name, wrapped)

class OnImport:
    def find_spec(self, name, *others):
        if name == "torch":
            os.kill(os.getpid(), signal.{number})

def main(argv):
    phase = {phase!r}
    if phase == "import":
        sys.meta_path.insert(0, OnImport())
    else:
        from gpt import checkpoint, data, evaluate, generate, parallel, prepare, session, settle, tokenizer, trainer, workers
        import torch
    if phase == "data":
        once(prepare.tokenizers, "train")
    if phase == "encoding":
        once(workers.Meter, "advance")
    if phase == "probing":
        once(settle.Optimizer, "step")
    if phase == "compile":
        once(torch, "compile", after=True)
    if phase == "first step":
        once(trainer, "update", lambda *a, **k: a[5] == 1)
    if phase == "training":
        once(trainer, "update", lambda *a, **k: a[5] == 7)
    if phase == "evaluation":
        once(evaluate, "validation_batches")
    if phase == "sampling":
        once(session, "complete")
    if phase == "save":
        once(checkpoint.durable.fs, "rename", lambda old, new: "step_00000005" in str(new))
    import train
    train.main(argv)

if __name__ == "__main__":
    signals.run(main)
"""
PHASES = {  # the step that stands saved afterwards
    "import": 0,
    "data": 0,
    "encoding": 0,
    "probing": 0,
    "compile": 0,
    "first step": 1,
    "training": 7,
    "save": 5,
    "evaluation": 10,
    "sampling": 30,
}


def patched(phase: str, number: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", PATCH.format(root=str(ROOT), phase=phase, number=number), *arguments]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_saves_the_step_and_the_same_command_ends_as_if_it_had_not_come(
    corpus: Path,  # noqa: F811
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
    number = {"import": "SIGTERM", "save": "SIGUSR1"}.get(phase, "SIGINT")
    done = subprocess.run(
        patched(phase, number, "small.yaml"), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr and number in done.stderr
    run = tmp_path / "runs/small"
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")) if run.exists() else []
    assert max(saved, default=0) == PHASES[phase]
    if run.exists():
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["step"], status["exit_code"]) == ("preempted", PHASES[phase], 75)
    if phase == "probing":
        return
    for name in ("small", "golden"):
        subprocess.run(command("small.yaml", f"name={name}"), cwd=tmp_path, check=True, capture_output=True)
    assert curve(run) == curve(tmp_path / "runs/golden")


def holder(root: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the run for so long; it says "held" first."""
    body = f"with RunDirectory(Path('runs'), 'small').lock():\n    print('held', flush=True); time.sleep({seconds})"
    source = f"import time\nfrom pathlib import Path\nfrom gpt.run import RunDirectory\n{body}"
    running = subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert running.stdout is not None and running.stdout.readline() == "held\n"
    return running


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dying_predecessor_is_waited_for_and_one_that_stays_is_named(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=2))
    before = holder(tmp_path, 300)
    began = time.monotonic()
    refused = subprocess.run(command("small.yaml", "--wait-lock", "0.5"), cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and f"pid {before.pid}" in refused.stderr and "(waited 0.5 s)" in refused.stderr
    took = time.monotonic() - began
    waiting = subprocess.Popen(command("small.yaml", "--wait-lock", "120"), cwd=tmp_path, stdout=subprocess.DEVNULL)
    time.sleep(took)  # it is at the lock by now
    assert waiting.poll() is None
    before.kill()
    before.communicate()
    assert waiting.wait(60) == 0


@pytest.mark.slow
def test_a_stop_while_the_lock_is_waited_for_is_obeyed(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=2))
    before = holder(tmp_path, 300)
    waiting = subprocess.Popen(
        command("small.yaml", "--wait-lock", "200"), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    time.sleep(4)
    waiting.send_signal(signal.SIGTERM)
    waiting.communicate(timeout=60)
    assert waiting.returncode == 75
    before.kill()
    before.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_ends_with_a_save_before_its_job_does(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=1_000_000))
    ends_at = time.time() + 90
    limited = os.environ | {"SLURM_JOB_END_TIME": str(int(ends_at))}
    done = subprocess.run(
        command("small.yaml", "log.every=1000", "eval.every=100000", "log.sample_every=null"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=limited,
        timeout=300,
    )
    assert done.returncode == 75, done.stderr
    assert time.time() < ends_at
    assert "time limit: the job ends at " in done.stdout
    assert "stopped by the end of the job's time at step" in done.stderr
    status = json.loads((tmp_path / "runs/small/status.json").read_text())
    assert status["state"] == "preempted" and status["exit_code"] == 75 and status["step"] > 0
    assert (tmp_path / f"runs/small/checkpoints/step_{status['step']:08d}").is_dir()


def test_a_run_stops_by_itself_before_the_end_of_its_job(
    here: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends_at = time.time() + 8
    monkeypatch.setattr("gpt.runtime.job_ends_at", lambda: ends_at)
    monkeypatch.setattr(signals, "_requested", None)
    given = of_trainer("train.steps=1000000", "eval.every=1000000", "checkpoint.every=50", "log.every=50")
    with pytest.raises(signals.Stopped, match="stopped by the end of the job's time at step"):
        train(given, console=Console(quiet=True))
    assert time.time() < ends_at
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


def test_a_run_that_hangs_says_where_and_ends_with_its_code(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
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
