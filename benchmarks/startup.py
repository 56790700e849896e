"""How long until a command answers, and until a model learns? Against an empty interpreter, torch alone, and transformers.

    python benchmarks/startup.py [--quick] [--rounds N] [--dir DIRECTORY]

`--help` of every verb beside `python -c pass`; from the start of `python train.py configs/tinyshakespeare_cpu.yaml` to the
line of its first update (all that comes before one included: checks, a trial update, a trial save) beside `python -c "import
torch"`, and beside a plain script that imports transformers and makes one update of a model of the same shape. The data
set is made of this repository's pages in DIRECTORY (a temporary one). Sides alternate, each run is a process of its own
that the page cache knows already. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELP_LIMIT_S, FIRST_STEP_LIMIT_S = 0.15, 0.5  # the second: beyond torch's own import
VERBS = ["train.py", "sample.py", "data/prepare.py", *(f"gpt.{room}" for room in
         ("checkpoint", "evaluate", "harness", "hf", "look", "lora"))]  # fmt: skip
PEER = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=64, n_embd=128, n_layer=4, n_head=4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(0, 1024, (16, 64))
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("step 1/", float(loss), flush=True)
"""


def python(*arguments: str, directory: Path, until: str | None = None) -> float:
    """Seconds until the command has ended, or has printed a line that begins with `until`; then it is ended."""
    began, flags = time.perf_counter(), [sys.executable, *arguments]
    with subprocess.Popen(flags, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        if until is None:
            out, err = process.communicate()
            took = time.perf_counter() - began
        else:
            out = next((line for line in process.stdout if line.startswith(until)), None)
            took = time.perf_counter() - began
            process.kill()
            err = process.stderr.read()
    if out is None or (until is None and process.returncode):
        raise SystemExit(f"{' '.join(flags)}: {err}")
    return took


def make(directory: Path) -> None:
    """A data set of this repository's pages, as large as the config's own."""
    pages = [str(ROOT / "README.md"), str(ROOT / "docs" / "*.md"), str(ROOT / "gpt" / "*.py")]
    prepare = [
        str(ROOT / "data" / "prepare.py"),
        *pages,
        "--out",
        "data/pages",
        "--vocab-size",
        "1024",
        "--workers",
        "1",
    ]
    subprocess.run([sys.executable, *prepare], cwd=directory, check=True, capture_output=True)


def first_step(directory: Path, name: str) -> float:
    config = str(ROOT / "configs" / "tinyshakespeare_cpu.yaml")
    settings = [f"name={name}", "data.path=data/pages", "log.every=1"]
    return python(str(ROOT / "train.py"), config, *settings, directory=directory, until="step 1/")


def measure(directory: Path, rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {}

    def note(side: str, seconds: float) -> None:
        taken.setdefault(side, []).append(seconds)

    for turn in range(rounds + 1):
        if turn == 1:  # the first one brought files into the page cache
            taken.clear()
        note("pass", python("-c", "pass", directory=directory))
        for verb in VERBS:
            command = ["-m", verb] if verb.startswith("gpt.") else [verb]
            note(verb, python(*command, "--help", directory=ROOT))
        note("torch", python("-c", "import torch", directory=directory))
        note("ours", first_step(directory, f"run-{turn}"))
        note("transformers", python("-c", PEER, directory=directory, until="step 1/"))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds: within a minute")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each side (default 9)")
    parser.add_argument("--dir", type=Path, help="where data and runs are made (a temporary directory)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rounds, before = 2 if args.quick else args.rounds, os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        make(Path(scratch))
        taken = measure(Path(scratch), rounds)
    seconds = {side: statistics.median(values) for side, values in taken.items()}
    beyond = statistics.median(a - b for a, b in zip(taken["ours"], taken["torch"], strict=True))
    rows = [(f"{verb} --help", seconds[verb], "pass", HELP_LIMIT_S / seconds[verb]) for verb in VERBS]
    rows += [
        ("first step", seconds["ours"], "torch", (seconds["torch"] + FIRST_STEP_LIMIT_S) / seconds["ours"]),
        ("first step", seconds["ours"], "transformers", None),
    ]
    names = {"pass": "python -c pass", "torch": "import torch", "transformers": "transformers' first step"}
    print(f"{'':<28}{'ours, s':>10}  {'peer':<26}{'peer, s':>9}{'peer/ours':>11}{'limit/ours':>12}")
    for case, ours, peer, share in rows:
        shown = "" if share is None else f"{share:.2f}"
        print(
            f"{case:<28}{ours:>10.3f}  {names[peer]:<26}{seconds[peer]:>9.3f}{seconds[peer] / ours:>11.2f}{shown:>12}"
        )
    print(f"beyond torch's import: {beyond:.3f} s (limit {FIRST_STEP_LIMIT_S}); medians of {rounds} rounds, "
          f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after")  # fmt: skip
    print(
        json.dumps(
            [
                {
                    "case": case,
                    "ours": ours,
                    "peer": seconds[peer],
                    "peer_name": names[peer],
                    "unit": "s",
                    "ratio": seconds[peer] / ours,
                    "limit_share": share,
                }
                for case, ours, peer, share in rows
            ]
        )
    )


if __name__ == "__main__":
    main()
