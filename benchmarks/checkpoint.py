"""How long does training wait for a checkpoint, and how long does it take to check one? Ours against safetensors and a sync.

    python benchmarks/checkpoint.py [--quick] [--rounds N] [--dir DIRECTORY]

The weights of a 124M GPT with AdamW's averages, 1.5 GB, in DIRECTORY (a temporary one). Ours is `saving.Writer`, which the
training loop calls: the wait is until it returns, *behind* until the checkpoint is durable and verified. The peer is
`safetensors.torch.save_file` of the same tensors, and an fsync of file and directory. Rounds alternate, nothing else is in flight
when one begins, and what was written goes after each. Then sha256 of the checkpoint's files, in the page cache: one
thread, and all cores as `checkpoint.verify` does it. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = {"vocab_size": 50_304, "max_seq_len": 1024, "n_layer": 12, "d_model": 768, "n_head": 12, "tie_embeddings": True}
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "mlp": "gelu_tanh",
    "attention_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
}
SMALL = SHAPE | {"n_layer": 2, "vocab_size": 8_064}
ROUNDS, QUICK_ROUNDS = 7, 3


def content(shape: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a checkpoint is made of, weights and averages as one dictionary), of numbers as they are after a step."""
    import torch

    from gpt import families, hf
    from gpt.model import GPT, ModelConfig
    from gpt.optim import OptimConfig, Optimizer

    config = ModelConfig(**shape, **GPT2)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = Optimizer(model, OptimConfig())
    optimizer.step(1.0)
    state, averages = model.state_dict(), optimizer.state()
    places = hf.places(config, state)
    sizes = {disk: sum(state[name].nbytes for name in place.memory) for disk, place in places.items()}
    ours = {
        "weights": {name: state[name] for place in places.values() for name in place.memory},
        "sizes": sizes,
        "pack": lambda disk, weights: families.pack(places[disk], weights),
        "optimizer": averages,
        "model_files": {"config.json": b"{}"},
        "run_yaml": "",
        "state": {"step": 1},
    }
    return ours, {**ours["weights"], **averages}


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def synced(path: Path) -> None:
    for each in (path, path.parent):
        fd = os.open(each, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, three rounds: within a minute")
    parser.add_argument("--rounds", type=int, help=f"of each side ({ROUNDS}, with --quick {QUICK_ROUNDS})")
    parser.add_argument("--dir", type=Path, help="where checkpoints are written (a temporary directory)")
    args = parser.parse_args()
    from safetensors.torch import save_file

    from gpt import checkpoint, durable, host
    from gpt.saving import Writer

    given, tensors = content(SMALL if args.quick else SHAPE)
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    waits: list[float] = []
    behind: list[float] = []
    peers: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        ours, theirs = Path(scratch) / "step_00000001", Path(scratch) / "all.safetensors"
        with Writer(say=print) as writer:

            def begin() -> None:
                writer.begin(ours, before=lambda: None, after=lambda: None, **given)

            for turn in range(1 + (args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS))):
                waits.append(seconds(begin))
                behind.append(waits[-1] + seconds(writer.wait))
                if turn == 0:
                    one = statistics.median(
                        seconds(lambda: [*map(durable.sha256_file, sorted(ours.iterdir()))]) for _ in range(3)
                    )
                    every = statistics.median(seconds(lambda: checkpoint.verify(ours)) for _ in range(3))
                shutil.rmtree(ours)
                peers.append(seconds(lambda: (save_file(tensors, theirs), synced(theirs))))
                theirs.unlink()
    first, waits, behind, peers = waits[0], waits[1:], behind[1:], peers[1:]  # the first makes room for the copy
    wait, peer = statistics.median(waits), statistics.median(peers)
    print(f"{n_bytes / 1e9:.2f} GB, {host.n_cores()} cores\n{'':34}{'median s':>10}{'fastest':>10}{'slowest':>10}")
    for name, times in (("wait, ours", waits), ("behind, ours", behind), ("save_file and sync", peers)):
        print(f"{name:34}{statistics.median(times):10.3f}{min(times):10.3f}{max(times):10.3f}")
    print(
        f"{'wait of the first save':34}{first:10.3f}\n{'sha256, one thread':34}{one:10.3f}\n{'sha256, all cores':34}{every:10.3f}"
    )
    print(json.dumps([
        entry("wait for a save", wait, peer, "safetensors and fsync"),
        entry("sha256 of a checkpoint", every, one, "one thread"),
    ]))  # fmt: skip


def entry(case: str, ours: float, peer: float, name: str) -> dict[str, object]:
    return {
        "case": case, "ours": round(ours, 4), "peer": round(peer, 4), "peer_name": name, "unit": "s",
        "ratio": round(ours / peer, 4), "limit_share": None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
