"""Do many ranks learn what one process learns? The real command on 1, 2 and 4 gloo ranks, curve against curve.

    python benchmarks/ranks.py [--quick] [--dir DIRECTORY]

Trains a small model on this project's own source, 50 steps with AdamW in fp32, under DDP, FSDP2, tensor parallelism and both;
then with dropout in canonical mode on 1, 2 and 4 ranks, and on 1 -> 4 -> 2 -> 1, whose logs are compared byte by byte.
Prints a table and, last, one JSON line. All on one machine's CPUs: about agreement, not about speed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {  # name -> (ranks, settings)
    "1 process": (1, []),
    "1 process, 4 rows": (1, ["train.micro_batch=4"]),  # what another order of sums does by itself
    "DDP x 2": (2, []),
    "DDP x 4": (4, []),
    "FSDP2 x 2": (2, ["parallel.shard=2"]),
    "FSDP2 x 4": (4, ["parallel.shard=4"]),
    "HSDP 2 x 2": (4, ["parallel.shard=2"]),
    "TP 2": (2, ["parallel.tensor=2"]),
    "TP 4": (4, ["parallel.tensor=4"]),
    "FSDP2 x TP 2 x 2": (4, ["parallel.shard=2", "parallel.tensor=2"]),
}
SETTINGS = """
name: x
data: {path: data/code, seq_len: 128}
model: {n_layer: 4, d_model: 64, n_head: 4, n_kv_head: 4, d_ff: 192}
train: {steps: 50, batch_tokens: 2048, micro_batch: 2, compile: false, device: cpu, dtype: float32, threads: 1}
optim: {lr: 0.0003}  # far from where training is unstable, which makes of the last bit of a sum whatever it likes
schedule: {warmup: 0.2}
eval: {every: 25, tokens: 10000}
checkpoint: {every: 10, keep: 9}
log: {every: 1}
"""


def train(home: Path, n_ranks: int, name: str, *overrides: str) -> None:
    """The real command; what it says is shown only if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command = [*(launcher if n_ranks > 1 else [sys.executable]), str(ROOT / "train.py"), "x.yaml", f"name={name}"]
    ended = subprocess.run([*command, *overrides], cwd=home, capture_output=True, text=True, timeout=900)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")


def curve(home: Path, name: str) -> list[dict[str, float]]:
    """The lines of its log."""
    return [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def furthest(ours: list[dict[str, float]], one: list[dict[str, float]], kind: str, value: str) -> float:
    pairs = zip(ours, one, strict=True)
    return max(abs(a[value] - b[value]) for a, b in pairs if a["kind"] == kind)


def curves(home: Path, quick: bool) -> list[dict[str, object]]:
    """Every way of sharing the work against one process; a row of the table each."""
    results: list[dict[str, object]] = []
    print(f"{'ranks':20}{'last loss':>12}{'max difference':>16}{'of grad norm':>14}{'of val_loss':>13}")
    for name, (n_ranks, settings) in WAYS.items():
        if quick and n_ranks > 2:
            continue
        own = name.replace(" ", "").replace(",", "")
        train(home, n_ranks, own, *settings)
        ours, one = curve(home, own), curve(home, "1process")
        loss, norm = furthest(ours, one, "train", "loss"), furthest(ours, one, "train", "grad_norm")
        val = furthest(ours, one, "eval", "val_loss")
        last = [line["loss"] for line in ours if line["kind"] == "train"][-1]
        print(f"{name:20}{last:12.6f}{loss:16.1e}{norm:14.1e}{val:13.1e}", flush=True)
        row = {"peer": 0.0, "peer_name": "one process", "unit": "nats", "ratio": None, "limit_share": None}
        results.append({"case": f"{name}: largest difference of a loss", "ours": loss, **row})
    return results


def cut(home: Path, name: str, step: int) -> None:
    """Make the checkpoint of `step` its last."""
    for made in (home / "runs" / name / "checkpoints").glob("step_*"):
        if int(made.name.removeprefix("step_")) > step:
            shutil.rmtree(made)


def in_order(home: Path, quick: bool) -> list[dict[str, object]]:
    """Canonical runs on several numbers of ranks, and on changing ones: are their bytes the same?"""
    how = ["parallel.canonical=true", "model.dropout=0.1"]
    sizes = (1, 2) if quick else (1, 2, 4)
    for n_ranks in sizes:
        train(home, n_ranks, f"canonical{n_ranks}", *how)
    names = [f"canonical{n}" for n in sizes]
    train(home, 1, "chain", *how)
    chain = [(2, 4)] if quick else [(4, 10), (2, 20), (1, 30)]
    for n_ranks, step in chain:
        cut(home, "chain", step)
        train(home, n_ranks, "chain", *how)
    results: list[dict[str, object]] = []
    for name in [*names[1:], "chain"]:
        files = ["metrics.jsonl", f"checkpoints/{newest(home, name)}/model.safetensors"]
        same = all(
            (home / "runs" / name / f).read_bytes() == (home / "runs" / names[0] / f).read_bytes() for f in files
        )
        told = " -> ".join(["1", *(str(n) for n, _ in chain)]) if name == "chain" else f"{name[9:]} ranks"
        size = (home / "runs" / name / files[0]).stat().st_size
        print(f"canonical, {told}: log ({size:,} bytes) and weights {'are' if same else 'ARE NOT'} those of 1 rank")
        row = {"peer": 1, "peer_name": "1 rank", "unit": "same bytes", "ratio": None, "limit_share": None}
        results.append({"case": f"canonical, {told}", "ours": int(same), **row})
    return results


def newest(home: Path, name: str) -> str:
    return max(made.name for made in (home / "runs" / name / "checkpoints").glob("step_*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 steps, at most two ranks")
    parser.add_argument(
        "--dir", type=Path, help="where `ranks`, with the runs, is made and stays (a temporary directory)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        home = (args.dir or Path(temporary)) / "ranks"  # a directory of its own: what is there from before is deleted
        home.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(home / "runs", ignore_errors=True)
        steps = {"steps: 50": "steps: 10", "every: 25": "every: 5", "checkpoint: {every: 10": "checkpoint: {every: 2"}
        text = SETTINGS
        for old, new in (steps if args.quick else {}).items():
            text = text.replace(old, new)
        (home / "x.yaml").write_text(text)
        if not (home / "data" / "code").exists():
            made = [sys.executable, str(ROOT / "data" / "prepare.py"), str(ROOT / "gpt")]
            subprocess.run(
                [*made, "--out", "data/code", "--vocab-size", "512"], cwd=home, check=True, capture_output=True
            )
        print(json.dumps([*curves(home, args.quick), *in_order(home, args.quick)]))


if __name__ == "__main__":
    main()
