"""How long does importing a model take, and how much memory? Ours against plainly reading the same bytes, and the package.

    python benchmarks/load.py [--quick] [--gigabytes G] [--dir DIRECTORY]

Makes a Llama-shaped directory of fp32 weights in DIRECTORY (a temporary one), reads it once so that all sides find it in
the page cache, then alternates the sides, each in a process of its own: reading every file whole, `gpt.hf.load`, and
safetensors' own reader with a copy of each tensor. Time is of the call alone, memory the process's peak less what it had
before the call. Prints a table and, last, one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = {"d_model": 2048, "n_head": 32, "n_kv_head": 8, "d_ff": 8192, "qk_norm": False, "tie_embeddings": True}
SHARD = 1 << 30  # bytes of a file


def make(directory: Path, gigabytes: float) -> int:
    """A Llama of about that size, each number other than zero, in shards; its bytes."""
    import torch
    from safetensors.torch import save_file

    from gpt import hf, tokenizer
    from gpt.model import GPT, ModelConfig

    words = tokenizer.train(["the river runs to the sea"], "char", None)
    with torch.device("meta"):
        n_layer = next(
            n
            for n in range(1, 1000)
            if 4 * sum(p.numel() for p in GPT(config_of(ModelConfig, n)).parameters()) > gigabytes * 2**30
        )
        config = config_of(ModelConfig, n_layer)
        shapes = {name: t.shape for name, t in hf.to_disk(config, GPT(config).state_dict()).items()}
    for name, data in hf.model_files(config, words).items():
        (directory / name).write_bytes(data)
    index, part, size, total = {}, {}, 0, 0
    for i, (name, shape) in enumerate(shapes.items()):
        part[name] = torch.full(shape, 0.5 + i)
        size += 4 * shape.numel()
        if size > SHARD or i + 1 == len(shapes):
            file = f"part-{total}.safetensors"
            save_file(part, directory / file)
            index |= dict.fromkeys(part, file)
            part, size, total = {}, 0, total + 1
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def config_of(kind: Callable[..., object], n_layer: int) -> object:
    return kind(vocab_size=32_000, max_seq_len=8192, n_layer=n_layer, **SHAPE)


def memory(key: str) -> int:
    """VmRSS or VmHWM, the peak, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(side: str, directory: Path) -> None:
    """One side in this process: prints seconds and bytes."""
    import torch
    from safetensors import safe_open

    from gpt import hf

    files = sorted(directory.glob("*.safetensors"))

    def packaged() -> list[torch.Tensor]:
        kept = []
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                kept += [tensors.get_tensor(name).clone() for name in tensors.keys()]  # noqa: SIM118
        return kept

    call: Callable[[], object] = {
        "read": lambda: [file.read_bytes() for file in files],
        "ours": lambda: hf.load(directory),
        "package": packaged,
    }[side]
    before, began = memory("VmRSS"), time.perf_counter()
    kept = call()
    print(json.dumps([time.perf_counter() - began, memory("VmHWM") - before]))
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a gigabyte, three rounds: within a minute")
    parser.add_argument("--gigabytes", type=float, help="size of the model (4.6: 1.2B parameters; --quick: 0.5)")
    parser.add_argument("--dir", type=Path, help="where the model is made (a temporary directory)")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        measure(args.side[0], Path(args.side[1]))
        return
    sides = ("read", "ours", "package")
    taken: dict[str, list[list[float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        size = make(Path(scratch), args.gigabytes or (0.5 if args.quick else 4.6))
        for file in Path(scratch).glob("*.safetensors"):
            file.read_bytes()
        for turn in range(3 if args.quick else 9):
            for side in sides[turn % 3 :] + sides[: turn % 3]:  # what one frees the next gets
                command = [sys.executable, __file__, "--side", side, scratch]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                taken[side].append(json.loads(done.stdout))
    seconds = {side: statistics.median(time for time, _ in taken[side]) for side in sides}
    peaks = {side: max(peak for _, peak in taken[side]) for side in sides}
    results = []
    print(f"{size / 1e9:.2f} GB of fp32 weights\n{'':10}{'seconds':>10}{'fastest':>10}{'peak / size':>14}")
    for side in sides:
        fastest = min(time for time, _ in taken[side])
        print(f"{side:10}{seconds[side]:10.2f}{fastest:10.2f}{peaks[side] / size:14.3f}")
    for peer in ("read", "package"):
        ratio = seconds["ours"] / seconds[peer]
        results.append(entry("load", seconds["ours"], seconds[peer], peer, "s", ratio))
        results.append(entry("peak memory", peaks["ours"], peaks[peer], peer, "bytes", peaks["ours"] / size))
    print(json.dumps(results))


def entry(case: str, ours: float, peer: float, name: str, unit: str, ratio: float) -> dict[str, object]:
    names = {"read": "reading the files", "package": "safetensors and a copy"}
    return {
        "case": case, "ours": round(ours, 4), "peer": round(peer, 4), "peer_name": names[name], "unit": unit,
        "ratio": round(ratio, 4), "limit_share": None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
