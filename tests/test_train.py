"""train.py as a user runs it: killed, stopped, started twice."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kills import killed
from runs import command, curve, settings


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("compile", "kills"),
    [
        ("false", 3),
        pytest.param("false", 30, marks=pytest.mark.slow),
        pytest.param("true", 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    corpus: Path, tmp_path: Path, compile: str, kills: int
) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(compile))
    tried, survived = killed(tmp_path, kills, print, processes=1 if kills == 3 else 2)
    assert tried == kills == survived


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_the_step_and_exits_75(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=100_000))
    process = subprocess.Popen(
        command("small.yaml"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors and "the same command continues" in errors
    status = json.loads((tmp_path / "runs/small/status.json").read_text())
    assert status["state"] == "preempted"
    assert (tmp_path / f"runs/small/checkpoints/step_{status['step']:08d}").is_dir()
    steps = [dict(line)["step"] for line in curve(tmp_path / "runs/small") if dict(line)["kind"] == "train"]
    assert steps == list(range(1, status["step"] + 1))


def test_a_second_process_on_the_same_run_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=100_000))
    first = subprocess.Popen(
        command("small.yaml"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert first.stdout is not None
    next(line for line in first.stdout if line.startswith("step 1/"))
    second = subprocess.run(command("small.yaml"), cwd=tmp_path, capture_output=True, text=True)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and f"pid {first.pid}" in second.stderr


def test_nothing_is_imported_for_ranks_compiling_or_tables_that_a_run_does_not_have(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    (tmp_path / "small.yaml").write_text(settings(steps=2))
    line = [sys.executable, "-X", "importtime", *command("small.yaml", "log.sample_every=null")[1:]]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "pydantic", "gpt.trainer"} <= loaded
    slow = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "numpy.ma",
            "wandb", "transformers", "pyarrow", "torchao", "gpt.prepare", "gpt.budget", "gpt.rehearsal"}  # fmt: skip
    assert not loaded & slow


def test_a_missing_data_set_is_prepared_from_its_recipe(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "small.yaml").write_text(f"input: [{corpus / 'poems.jsonl'}]\nvocab_size: 300\n")
    (tmp_path / "small.yaml").write_text(settings(steps=6))
    done = subprocess.run(command("small.yaml", "train.profile=1"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/small/manifest.json").is_file()
    assert "runs/small/trace.json.gz" in done.stdout
    assert done.stderr == "", "nor does torch's profiler tell of itself"


def test_help_keys_and_print_answer(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(settings())
    keys = subprocess.run(command("--keys", "optim."), cwd=tmp_path, capture_output=True, text=True)
    assert keys.returncode == 0 and "weight_decay" in keys.stdout and "n_layer" not in keys.stdout
    printed = subprocess.run(
        command("small.yaml", "optim.lr=0.5", "--print"), cwd=tmp_path, capture_output=True, text=True
    )
    assert printed.returncode == 0 and "lr: 0.5" in printed.stdout
    (tmp_path / "again.yaml").write_text(printed.stdout)
    again = subprocess.run(command("again.yaml", "--print"), cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == printed.stdout, "what it prints is itself a settings file"
