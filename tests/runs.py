"""The real command on a small model, whose undisturbed run is seconds long: what kills, signals and full disks are tried on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 300  # with a command that should end by itself
GRACE_S = 60  # with one that was asked to; torchrun waits half of that for its ranks
TOO_LONG = 124  # as timeout(1) says it
STEPS = 100
SETTINGS = """
data: {path: data/small, seq_len: 32}
model: {n_layer: 2, d_model: 64, n_head: 2, dropout: 0.1}
train: {steps: STEPS, batch_tokens: 512, compile: COMPILE, threads: 1}
optim: {kind: muon, lr: 0.02, ema: 8}
eval: {every: 10, tokens: 2000}
checkpoint: {every: 5, keep: 2}
log: {every: 1, sample_every: 30}
"""
CLOCKS = ("elapsed_s", "tokens_per_second", "mfu", "peak_memory_bytes")


def settings(compile: str = "false", steps: int = STEPS) -> str:
    return SETTINGS.replace("COMPILE", compile).replace("STEPS", str(steps))


def prepared(root: Path) -> Path:
    """`root` with a text, its recipe data/later.yaml, and the set that was made of it, data/small."""
    (root / "data").mkdir(parents=True)
    draw = random.Random(2)
    words = ["rose", "sings", "river", "under", "a", "green", "moon", "and", "waits", "softly"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=40))}) for _ in range(300)]
    (root / "poems.jsonl").write_text("\n".join(lines))
    (root / "data" / "later.yaml").write_text("input: [poems.jsonl]\nvocab_size: 300\nworkers: 1\n")
    (root / "small.yaml").write_text(settings())
    made = [sys.executable, str(ROOT / "data" / "prepare.py"), "data/later.yaml", "--out", "data/small"]
    done = subprocess.run(made, cwd=root, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return root


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def struck(moment: str, nth: int, number: signal.Signals, *arguments: str, rank: int = 0) -> list[str]:
    """The command, which sends itself the signal when the moment of struck.py comes for the nth time."""
    script = str(ROOT / "tests" / "struck.py")
    return [sys.executable, script, moment, str(nth), str(int(number)), str(rank), *arguments]


def torchrun(line: Sequence[str], *flags: str, ranks: int = 2) -> list[str]:
    """A command as `ranks` processes of one run."""
    python, script, *arguments = line
    launch = [python, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *(flags or ("--standalone",))]
    return [*launch, script, *arguments]


class Ended(NamedTuple):
    code: int  # TOO_LONG of one that did not end by itself
    said: str  # on stderr
    seconds: float
    printed: str  # on stdout


def begun(home: Path, line: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    told = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(line), cwd=home, env=told, start_new_session=True, **pipes)


def ended(home: Path, line: Sequence[str], kill_after: float | None = None, **environment: str) -> Ended:
    """Run a command in `home` to its end, or kill it (and the processes it started) after so many seconds."""
    start = time.monotonic()
    process = begun(home, line, **environment)
    try:
        printed, said = process.communicate(timeout=PATIENCE_S if kill_after is None else kill_after)
        code = process.returncode
    except subprocess.TimeoutExpired:
        if kill_after is None:
            printed, said = gone(process)
            code, said = TOO_LONG, f"{said}\nit did not end within {PATIENCE_S} s"
        else:
            os.killpg(process.pid, signal.SIGKILL)
            printed, said = process.communicate()
            code = process.returncode
    return Ended(code, said, time.monotonic() - start, printed)


def gone(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process of `begun` that may not have ended; what it printed and said.

    It is asked first: torchrun's ranks are in sessions of their own, and only torchrun ends them.
    """
    process.terminate()
    try:
        return process.communicate(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def trained(home: Path, name: str, line: Sequence[str] | None = None) -> Path:
    """The run `name`, begun or continued to its end."""
    done = ended(home, [*(line or command("small.yaml")), f"name={name}"])
    assert done.code == 0, done.said
    return home / "runs" / name


def curve(run: Path) -> list[tuple]:
    """Everything in metrics.jsonl that does not depend on the clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple((k, v) for k, v in line.items() if k not in CLOCKS) for line in lines]


def last_bytes(run: Path) -> dict[str, bytes]:
    """What the last checkpoint holds: the files of weights, and each tensor of the optimizer's state, in any order."""
    last = max((run / "checkpoints").glob("step_*"), default=run)
    found = {file.name: file.read_bytes() for file in last.glob("model*.safetensors")}
    for file in last.glob("optimizer-*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            found |= {f"{file.name} {name}": opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
    return found


def differences(run: Path, golden: Path) -> list[str]:
    """How a run that ended differs from the one that nothing disturbed."""
    found = []
    if not (run / "checkpoints").is_dir() or not (run / "metrics.jsonl").is_file():
        return ["there is no run"]
    if curve(run) != curve(golden):
        wrong = sum(a != b for a, b in zip(curve(run), curve(golden), strict=False))
        found.append(f"{wrong} lines of metrics differ, {len(curve(run))} against {len(curve(golden))}")
    last = last_bytes(golden)
    if last_bytes(run) != last or not last:
        found.append("the bytes of the last tensors differ")
    left = [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step_")]
    if left:
        found.append(f"left behind: {', '.join(left)}")
    state = json.loads((run / "status.json").read_text())["state"]
    return found if state == "done" else [*found, f"status.json says {state}"]
