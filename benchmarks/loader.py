"""How fast are batches made? Ours against nanoGPT's random-offset reads and torch's DataLoader, on one token file.

    python benchmarks/loader.py [--quick] [--memory] [--dir DIRECTORY]

Makes a data set of random ids in DIRECTORY (a temporary one), reads it once so that all sides find it in the page cache
and our blocks are verified, then alternates the sides. Prints a table and, last, one JSON line.

`--memory` asks instead what a process holds that makes batches of shards of 1 MB to 10 GB, each size in a process of its own: 2,000
batches of 16 random rows of 256 tokens, which at 10 GB touch most blocks once.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import durable, host, runtime  # noqa: E402
from gpt.data import Batch, Data, DataConfig, Loader, Part, prefetched  # noqa: E402
from gpt.shards import Document, TokenSet, write_manifest, write_shard  # noqa: E402

SHAPES = ((12, 1024), (64, 256), (512, 1024))  # nanoGPT's on one GPU; a small model's; a large batch
H200_TOKENS_PER_S = 600_000
VOCAB, SEAL = 50_257, "0" * 64


def make(directory: Path, n_tokens: int) -> tuple[TokenSet, Path]:
    """The same ids as a data set of shards of 32 Mi tokens and as nanoGPT's train.bin; documents of 1 to 1,600 tokens."""
    rng = np.random.default_rng(0)
    per_shard = min(n_tokens, 1 << 25)
    with durable.Directory(directory / "set") as target, (directory / "train.bin").open("wb") as raw:
        entries = []
        ids = rng.integers(1, VOCAB, per_shard, dtype=np.uint16)
        for i in range(-(-n_tokens // per_shard)):
            ids = np.roll(ids, i)  # other tokens at each place, sooner than drawing them
            bounds = np.append(np.cumsum(rng.integers(1, 1600, per_shard // 800)), per_shard).clip(max=per_shard)
            bounds = np.unique(np.append(0, bounds))
            ids[bounds[:-1]] = 0
            raw.write(ids.tobytes())
            documents = (Document(ids[a:b], 4 * int(b - a), 0) for a, b in itertools.pairwise(bounds.tolist()))
            entries.append(write_shard(target, f"{i}.tok", documents, vocab_size=VOCAB, tokenizer_sha256=SEAL))
        settings: dict[str, object] = {"splits": {"train": entries}, "sources": ["random"], "settings": {}}
        write_manifest(target, tokenizer_sha256=SEAL, vocab_size=VOCAB, start_id=0, **settings)  # type: ignore[arg-type]
    return TokenSet(directory / "set", "train"), directory / "train.bin"


def loader(tokens: TokenSet, rows: int, seq_len: int, **settings: object) -> Loader:
    config = DataConfig.model_validate({"path": "set", "seq_len": seq_len} | settings)
    return Loader(Data([Part("set", tokens, tokens)], None, ""), config, rows, seed=1)  # type: ignore[arg-type]


def nanogpt(file: Path, rows: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as nanoGPT's get_batch makes them (train.py, 2022-2024), the memmap opened anew for each."""
    while True:
        data = np.memmap(file, dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - seq_len, (rows,))
        x = torch.stack([torch.from_numpy((data[i : i + seq_len]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + seq_len]).astype(np.int64)) for i in ix])
        yield x, y


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Row i of a token file: what a map-style data set over a memmap is in its plainest form."""

    def __init__(self, file: Path, seq_len: int) -> None:
        self.data, self.seq_len = np.memmap(file, dtype=np.uint16, mode="r"), seq_len

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.seq_len

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        row = torch.from_numpy(self.data[i * self.seq_len : (i + 1) * self.seq_len + 1].astype(np.int64))
        return row[:-1], row[1:]


def ours(made: Loader) -> Iterator[Batch]:
    """Batches in this thread, one after another, a million steps at most."""
    return itertools.chain.from_iterable(made.portions(1, 1_000_000))


def rate(batches: Iterator[object], n: int, rows: int, seq_len: int) -> tuple[float, float]:
    """(tokens per second of wall time, of this process's processor time) over n batches."""
    next(batches)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(n):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return n * rows * seq_len / wall, n * rows * seq_len / max(cpu, 1e-9)


def converted(rows: int, seq_len: int) -> Iterator[np.ndarray]:
    """What no maker of int64 batches can do without: one conversion of ids that lie in a cache already."""
    ids = np.zeros((rows, seq_len + 1), np.uint16)
    while True:
        yield ids.astype(np.int64)


def blocked(made: Loader, step_s: float, steps: int) -> list[float]:
    """Seconds that each of `steps` training steps of `step_s` waits for its batch; the first, which fills, is left out."""
    waits = []
    batches = prefetched(made, 1, steps + 1)
    for _ in range(steps + 1):
        began = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - began)
        time.sleep(step_s)
    batches.close()  # type: ignore[attr-defined]
    return waits[1:]


def row(
    case: str, mine: float, peer: float | None, name: str | None, unit: str, share: float | None
) -> dict[str, object]:
    ratio = None if peer is None else (mine / peer if unit.startswith("Mtokens") else peer / mine)
    table = f"{case:44} {mine:14,.3f} {unit:16}"
    table += "" if peer is None else f" {peer:12,.3f} {name:34} {ratio:8.1f}x"
    print(table + ("" if share is None else f"  {share:.4%} of the limit"), flush=True)
    return {
        "case": case,
        "ours": mine,
        "peer": peer,
        "peer_name": name,
        "unit": unit,
        "ratio": ratio,
        "limit_share": share,
    }


def throughput(tokens: TokenSet, file: Path, rows: int, seq_len: int, rounds: int) -> list[dict[str, object]]:
    shape, scale = f"{rows}x{seq_len}", 1e6
    n = max(3, 6_000_000 // (rows * seq_len))
    workers = DataLoader(Rows(file, seq_len), batch_size=rows, shuffle=True, num_workers=2)
    made = loader(tokens, rows, seq_len)
    sides: dict[str, tuple[Callable[[], Iterator[object]], int]] = {
        "ours": (lambda: ours(made), 4 * n),
        "ours, through the thread": (lambda: prefetched(made, 1, 1_000_000), 4 * n),
        "nanoGPT get_batch": (lambda: nanogpt(file, rows, seq_len), n),
        "DataLoader, 2 workers": (lambda: iter(workers), max(24, n // 8)),  # past what its workers hold ready
        "conversion alone": (lambda: converted(rows, seq_len), 4 * n),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (open_side, count) in sides.items():
            batches = open_side()
            found[name].append(rate(batches, count, rows, seq_len))
            del batches
    wall, cpu = ({name: statistics.median(x[i] for x in f) / scale for name, f in found.items()} for i in (0, 1))
    unit, limit = "Mtokens/s", wall["ours"] / wall["conversion alone"]
    mine, threaded = wall["ours"], wall["ours, through the thread"]
    return [
        row(f"{shape} raw, wall", mine, wall["nanoGPT get_batch"], "nanoGPT get_batch", unit, limit),
        row(f"{shape} raw, CPU", cpu["ours"], cpu["nanoGPT get_batch"], "nanoGPT get_batch", "Mtokens/CPU-s", None),
        row(f"{shape} raw, wall", mine, wall["DataLoader, 2 workers"], "torch DataLoader, 2 workers", unit, limit),
        row(f"{shape} prefetched, drained, wall", threaded, wall["nanoGPT get_batch"], "nanoGPT get_batch", unit, None),
    ]


def waiting(tokens: TokenSet, rows: int, seq_len: int, seconds: float) -> dict[str, object]:
    step_s = rows * seq_len / H200_TOKENS_PER_S
    waits = blocked(loader(tokens, rows, seq_len), step_s, max(3, int(seconds / step_s)))
    share = statistics.mean(waits) / step_s
    return row(
        f"{rows}x{seq_len} blocked a step of {step_s * 1e3:.1f} ms",
        statistics.mean(waits) * 1e6,
        None,
        None,
        "us",
        share,
    )


def held(directory: Path, n_batches: int) -> None:
    """Make batches of the set in `directory` and print resident MB: before it is opened, afterwards, and the most."""
    before = host.resident_bytes()
    tokens = TokenSet(directory / "set", "train")
    made = ours(loader(tokens, 16, 256))
    next(made)
    opened = host.resident_bytes()
    for _ in itertools.islice(made, n_batches):
        pass
    print(json.dumps([before, opened, runtime.peak_memory_bytes("cpu")]))


def memory(scratch: Path, sizes: list[int], n_batches: int) -> list[dict[str, object]]:
    """How much of it follows the size of the data."""
    results = []
    for size in sizes:
        directory = scratch / str(size)
        directory.mkdir()
        tokens, file = make(directory, size // 2)
        file.unlink()
        command = [sys.executable, str(Path(__file__).resolve()), "--held", str(directory), "--batches", str(n_batches)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        before, opened, most = (n / 1e6 for n in told)
        name = f"{2 * tokens.n_tokens / 1e6:,.0f} MB of shards, {tokens.n_documents:,} documents"
        results.append(row(name, most - before, None, None, "MB above imports", None))
        print(f"{'':44} {before:,.0f} MB before, {opened:,.0f} after the first batch, {most:,.0f} at most", flush=True)
        shutil.rmtree(directory)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds: within a minute")
    parser.add_argument("--memory", action="store_true", help="how memory follows the size of the shards")
    parser.add_argument("--dir", type=Path, help="where the data set is made (a temporary directory)")
    parser.add_argument("--held", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=2000, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.held is not None:
        held(args.held, args.batches)
        return
    results = []
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        if args.memory:
            sizes = [10**6, 10**8] if args.quick else [10**6, 10**7, 10**8, 10**9, 10**10]
            print(json.dumps(memory(Path(scratch), sizes, 200 if args.quick else args.batches)))
            return
        tokens, file = make(Path(scratch), (1 << 24) if args.quick else (1 << 29))
        print(f"{tokens.n_tokens:,} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}")
        began = time.perf_counter()
        for shard in tokens.shards:
            for start in range(0, shard.n_tokens, 1 << 22):
                shard.read(start, min(1 << 22, shard.n_tokens - start))
        first = tokens.n_tokens / (time.perf_counter() - began) / 1e6
        results.append(row("first touch: every block hashed", first, None, None, "Mtokens/s", None))
        for rows, seq_len in SHAPES:
            results += throughput(tokens, file, rows, seq_len, 3 if args.quick else 7)
        for rows, seq_len in SHAPES:
            results.append(waiting(tokens, rows, seq_len, 3 if args.quick else 10))
        for packing in ("stream", "documents"):
            for mask in (False, True):
                made = loader(tokens, 64, 256, packing=packing, document_mask=mask)
                speed = rate(ours(made), 50 if args.quick else 300, 64, 256)[0] / 1e6
                case = f"64x256 {packing}, document_mask {str(mask).lower()}"
                results.append(row(case, speed, None, None, "Mtokens/s", None))
        for packing in ("stream", "documents"):
            made = loader(tokens, 12, 1024, packing=packing)
            began = time.perf_counter()
            made.batch(10**9)
            results.append(
                row(f"seek to step 10^9, {packing}", (time.perf_counter() - began) * 1e3, None, None, "ms", None)
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
