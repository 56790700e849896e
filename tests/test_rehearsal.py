"""--check-resume: ten steps in one piece against two processes, said in words, without touching the run."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from runs import GRACE_S, PATIENCE_S, Ended, command, ended, torchrun
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import settings

from gpt import durable, rehearsal, signals
from gpt.trainer import TrainConfig, train

ROOT = Path(__file__).parent.parent


def here_in_process(monkeypatch: pytest.MonkeyPatch, between: object = None) -> None:
    """Each leg runs in this process, from state that is built anew; `between` is done to the first half's checkpoint."""

    def leg(given: TrainConfig, home: Path, name: str, updates: int) -> None:
        if between is not None and (home / name).exists():
            between(home / name)  # type: ignore[operator]
        with pytest.raises(signals.Stopped):
            named = given.model_copy(update={"name": name})
            train(named, runs=home, updates=updates, console=Console(quiet=True))

    monkeypatch.setattr(rehearsal, "_leg", leg)


def checked(*overrides: str) -> tuple[int, str]:
    console = Console(record=True, file=io.StringIO(), width=250)
    return rehearsal.check(settings(*overrides), console), console.export_text()


def files(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.slow  # four imports of torch
def test_the_command_proves_exact_resume_and_touches_nothing(here: Path) -> None:
    with pytest.raises(signals.Stopped):
        train(settings(), updates=3, console=Console(quiet=True))
    before = files(here)
    command = [sys.executable, str(ROOT / "train.py"), "tiny.yaml", "--check-resume"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 steps in one process, then 5 and 5 in two others" in done.stdout
    assert "exact resume: yes" in done.stdout
    assert files(here) == before


def test_an_adapter_is_proved_as_well(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here_in_process(monkeypatch)
    train(settings("train.steps=2", "name=base"), console=Console(quiet=True))
    code, text = checked("init_from=runs/base", "model={}", "adapter={rank: 2, dropout: 0.1}", "optim.lr=0.01")
    assert (code, "exact resume: yes" in text) == (0, True), text


def test_a_branch_is_proved_from_where_it_begins(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here_in_process(monkeypatch)
    train(settings(), console=Console(quiet=True))
    code, text = checked("name=side", "branch_from=runs/tiny@8", "train.steps=30")
    assert code == 0 and "at step 18" in text


def test_a_difference_is_found_and_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(run: Path) -> None:
        """A resume that forgets the first average of a matrix."""
        (step,) = (run / "checkpoints").glob("step_*")
        file, manifest = step / "optimizer-00000-of-00001.safetensors", step / "manifest.json"
        tensors = load_file(file)
        name = next(each for each in tensors if each.endswith("q_proj.weight:exp_avg"))
        tensors[name] = torch.zeros_like(tensors[name])
        with safe_open(file, framework="pt") as held:
            save_file(tensors, file, held.metadata())
        told = json.loads(manifest.read_bytes())
        told["sha256"][file.name] = durable.sha256_file(file)
        manifest.write_text(json.dumps(told))

    here_in_process(monkeypatch, forgetful)
    code, text = checked()
    assert code == 1
    assert "exact resume: NO" in text
    assert "step 7: loss" in text and "already before" not in text
    assert "tensors differ" in text and "model.safetensors" in text
    assert not Path("runs").exists() or list(Path("runs").iterdir()) == []


def test_a_machine_that_does_not_repeat_itself_is_told_from_a_resume_that_forgets(tmp_path: Path) -> None:
    for name, nudge in (("a", 0.0), ("b", 1e-7)):
        (tmp_path / name).mkdir()
        lines = [
            {"kind": "train", "step": s, "loss": 2.0 + nudge * (s > 2), "grad_norm": 1.0, "lr": 0.1}
            for s in range(1, 7)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rehearsal.differences(tmp_path / "a", tmp_path / "b", 6, half=3)
    assert next(found).startswith("step 3: loss 2.0 and ")
    assert "already before the resume" in next(found)


def test_bits_are_compared_and_not_numbers() -> None:
    assert not rehearsal._same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert rehearsal._same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not rehearsal._same(torch.zeros(1), None)


def test_a_run_too_short_to_be_parted_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match="parts a run in two, and tiny has 1 steps to make"):
        checked("train.steps=1")


def under_torchrun(*overrides: str) -> Ended:
    line = command("tiny.yaml", "train.micro_batch=auto", *overrides, "--check-resume")
    return ended(Path(), torchrun(line), OMP_NUM_THREADS="1")


@pytest.mark.slow  # ten imports of torch
@pytest.mark.timeout(PATIENCE_S + 2 * GRACE_S)
def test_ranks_that_torchrun_started_prove_it_together(here: Path) -> None:
    done = under_torchrun("parallel.shard=2")
    assert done.code == 0, done.printed + done.said
    assert done.printed.count("in two others of 2 ranks each") == 1
    assert done.printed.count("exact resume: yes") == 1
    assert list(Path("runs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S + 2 * GRACE_S)
def test_an_error_of_all_ranks_is_said_in_words(here: Path) -> None:
    done = under_torchrun("init_from=runs/absent")
    assert done.code == 1
    assert "stops within its first steps: 'runs/absent' does not exist" in done.said
    assert list(Path("runs").iterdir()) == []


def test_a_run_that_fails_by_itself_says_why_with_its_exit_code(here: Path) -> None:
    with pytest.raises(ValueError, match=r"stops within its first steps: 'runs/absent' does not exist"):
        checked("init_from=runs/absent")


@pytest.mark.parametrize(
    "flags",
    [["--check-resume", "--fresh"], ["--check-resume", "--allow", "x"], ["--fresh", "--allow", "x"], ["--allow"]],
)
def test_flags_that_do_not_go_together_are_refused(here: Path, flags: list[str]) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "tiny.yaml", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "usage:" in done.stderr
