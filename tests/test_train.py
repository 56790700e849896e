"""train.py as a user runs it: killed, stopped, started twice."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = 100
SETTINGS = """
data: {path: data/small, seq_len: 32}
model: {n_layer: 2, d_model: 64, n_head: 2, dropout: 0.1}
train: {steps: STEPS, batch_tokens: 512, compile: COMPILE, threads: 1}
optim: {kind: muon, lr: 0.02}
eval: {every: 10, tokens: 2000}
checkpoint: {every: 5, keep: 2}
log: {every: 1, sample_every: 30}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a prepared set, data/small."""
    root = tmp_path_factory.mktemp("train")
    draw = random.Random(2)
    words = ["rose", "sings", "river", "under", "a", "green", "moon", "and", "waits", "softly"]
    (root / "poems.jsonl").write_text(
        "\n".join(json.dumps({"text": " ".join(draw.choices(words, k=40))}) for _ in range(300))
    )
    (root / "data").mkdir()
    run = [
        sys.executable,
        str(ROOT / "data" / "prepare.py"),
        "poems.jsonl",
        "--out",
        "data/small",
        "--vocab-size",
        "300",
    ]
    subprocess.run(run, cwd=root, check=True, capture_output=True)
    return root


def settings(compile: str = "false", steps: int = STEPS) -> str:
    return SETTINGS.replace("COMPILE", compile).replace("STEPS", str(steps))


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def curve(run: Path) -> list[tuple]:
    """Everything in metrics.jsonl that does not depend on the clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    clocks = ("elapsed_s", "tokens_per_second", "mfu", "peak_memory_bytes")
    return [tuple((k, v) for k, v in line.items() if k not in clocks) for line in lines]


def killed_until_done(root: Path, kills: int, seed: int) -> None:
    """Run the command, kill it with SIGKILL `kills` times at random moments of start-up, updates, saves; let it finish."""
    draw = random.Random(seed)
    for _ in range(kills):
        awaited = draw.randint(0, STEPS // kills)  # updates; with 0 the kill comes somewhere in the start-up
        with subprocess.Popen(
            command("small.yaml"), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            while awaited and (line := process.stdout.readline()):
                awaited -= " loss " in line
            time.sleep(draw.uniform(0.0, 0.1))
            killed = process.poll() is None
            process.kill()
            errors = process.communicate()[1]
        assert killed and "error" not in errors, errors
    subprocess.run(command("small.yaml"), cwd=root, check=True, capture_output=True)


def check_kills(root: Path, compile: str, kills: int) -> None:
    (root / "small.yaml").write_text(settings(compile))
    subprocess.run(command("small.yaml", "name=golden"), cwd=root, check=True, capture_output=True)
    killed_until_done(root, kills, seed=kills)
    small, golden = root / "runs" / "small", root / "runs" / "golden"
    assert curve(small) == curve(golden)
    weights = f"checkpoints/step_{STEPS:08d}/model.safetensors"
    assert (small / weights).read_bytes() == (golden / weights).read_bytes()
    assert not [path for path in (small / "checkpoints").iterdir() if path.name.startswith(".")], (
        "temporaries are swept"
    )


@pytest.mark.timeout(600)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    check_kills(tmp_path, "false", kills=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compile", ["false", "true"])
def test_ten_kills_change_nothing_eager_or_compiled(corpus: Path, tmp_path: Path, compile: str) -> None:
    (tmp_path / "data").symlink_to(corpus / "data")
    check_kills(tmp_path, compile, kills=10)


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


def test_a_missing_data_set_is_prepared_from_its_recipe(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "small.yaml").write_text(f"input: [{corpus / 'poems.jsonl'}]\nvocab_size: 300\n")
    (tmp_path / "small.yaml").write_text(settings(steps=2))
    done = subprocess.run(command("small.yaml"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/small/manifest.json").is_file()


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
