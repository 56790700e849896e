"""Which settings learn most in the same time?

    python benchmarks/recipes.py CONFIG [--quick] [--seconds N] [--seeds N] [--only NAME ...] [--data DIRECTORY]

Trains CONFIG as it stands and with one thing changed at a time, each for as many seconds and with each of the seeds, every run
on a core of its own, as many at once as there are cores; settings take turns, so that a slow minute of the machine meets all of
them. Printed: bits per byte of the last evaluation, the mean over seeds and the spread, and how many updates the time was
enough for. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHANGES: dict[str, list[str]] = {
    "as it stands": [],
    "ReLU squared": ["model.mlp=relu2"],
    "outputs begin at zero": ["model.init_output=zero"],
    "q and k not normalized": ["model.qk_norm=false"],
    "embeddings normalized": ["model.embed_norm=true"],
    "head of its own": ["model.tie_embeddings=false"],
    "logits capped at 15": ["model.logit_softcap=15"],
    "dropout 0.1": ["model.dropout=0.1"],
    "dropout 0.2": ["model.dropout=0.2"],
    "weight decay 0.4, falling": ["optim.weight_decay=0.4", "optim.scheduled_decay=true"],
    "weight decay 1.6, falling": ["optim.weight_decay=1.6", "optim.scheduled_decay=true"],
    "dropout 0.1 and weight decay 0.4, falling": [
        "model.dropout=0.1",
        "optim.weight_decay=0.4",
        "optim.scheduled_decay=true",
    ],
    "dropout 0.2 and weight decay 0.4, falling": [
        "model.dropout=0.2",
        "optim.weight_decay=0.4",
        "optim.scheduled_decay=true",
    ],
    "cautious decay": ["optim.cautious=true"],
    "momentum from 0.85": ["optim.momentum_warmup=300"],
    "average of the weights": ["optim.ema=0.02"],
    "lower learning rates": ["optim.lr=0.01", "optim.adamw_lr=0.005"],
    "AdamW at 0.004": ["optim.kind=adamw", "optim.lr=0.004", "optim.adamw_lr=null"],
}


def trained(
    cores: "Queue[int]", config: Path, runs: Path, seconds: float, seed: int, change: list[str]
) -> dict[str, Any]:
    """One run: what its last evaluation and its last update say."""
    core = cores.get()
    try:
        name = (
            f"{seed}-{'-'.join(change) or 'as-it-stands'}".replace("=", "_").replace("optim.", "").replace("model.", "")
        )
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            str(config),
            f"name={name}",
            f"seed={seed}",
            f"train.time={seconds}",
            "train.steps=null",
        ]
        quiet = [
            "train.threads=1",
            "train.compile=false",
            "log.sample_every=null",
            "checkpoint.every=100000",
            "eval.every=100000",
        ]
        ended = subprocess.run(
            [*command, *quiet, *change], cwd=runs, capture_output=True, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}), check=False,
        )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(f"{name}: {ended.stderr.strip()}")
        lines = [json.loads(line) for line in (runs / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "eval"][-1]
        return {"val_bpb": last["val_bpb"], "step": last["step"], "elapsed_s": last["elapsed_s"]}
    finally:
        cores.put(core)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--quick", action="store_true", help="two settings, a seed and six seconds each")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run, its start included (60)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (3)")
    parser.add_argument("--only", nargs="+", choices=sorted(CHANGES), help="these changes alone, beside none")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where the data sets are (data)")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.seeds, args.only = 6.0, 1, ["ReLU squared"]
    names = [name for name in CHANGES if args.only is None or name in args.only or not CHANGES[name]]
    free = sorted(os.sched_getaffinity(0))
    cores: Queue[int] = Queue()
    for core in free:
        cores.put(core)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(len(free)) as pool:
        runs = Path(directory)
        (runs / "data").symlink_to(args.data.resolve())
        given = (cores, args.config.resolve(), runs, args.seconds)
        jobs = {
            (name, seed): pool.submit(trained, *given, seed, CHANGES[name])
            for seed in range(1, args.seeds + 1)
            for name in names
        }
        found = {job: future.result() for job, future in jobs.items()}
    base = statistics.mean(found[names[0], seed]["val_bpb"] for seed in range(1, args.seeds + 1))
    print(
        f"{args.config.name}, {args.seconds:.0f} s on one core each, {args.seeds} seeds; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':42}{'bits/byte':>10}{'spread':>9}{'against':>9}{'updates':>9}")
    results = []
    for name in names:
        each = [found[name, seed] for seed in range(1, args.seeds + 1)]
        scores = [one["val_bpb"] for one in each]
        mean, updates = statistics.mean(scores), statistics.mean(one["step"] for one in each)
        print(f"{name:42}{mean:10.4f}{max(scores) - min(scores):9.4f}{mean - base:+9.4f}{updates:9.0f}")
        results.append({"case": name, "ours": mean, "peer": base, "peer_name": names[0], "unit": "bits/byte",
                        "ratio": base / mean, "limit_share": None})  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
