"""Does `--plan` predict a run? Five models on this machine: parameters, peak memory and seconds of an update, planned and real.

    python benchmarks/plan.py [--quick] [--rounds 3]

Each side is a process of its own, and they take turns. The plan is what `--plan` computes; the real side makes updates by the
trainer's own `update()`, its peak resident memory told by the system. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GPT2 = {"mlp": "gelu", "norm": "layernorm", "qk_norm": False, "attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[dict[str, Any], int, str]] = {  # shape, rows of an update, optimizer
    "tinyshakespeare, 1.0M": ({"vocab_size": 1024, "max_seq_len": 64, "n_layer": 4, "d_model": 128, "n_head": 4}, 16, "muon"),
    "quickstart, 2.4M": (
        {"vocab_size": 4096, "max_seq_len": 128, "n_layer": 4, "d_model": 192, "n_head": 3, "n_kv_head": 1}, 16, "muon",
    ),
    "6 x 384, T 256, 11M": ({"vocab_size": 1024, "max_seq_len": 256, "n_layer": 6, "d_model": 384, "n_head": 6}, 16, "adamw"),
    "8 x 512, T 512, 34M": ({"vocab_size": 16384, "max_seq_len": 512, "n_layer": 8, "d_model": 512, "n_head": 8}, 16, "muon"),
    "GPT-2, T 1024, 124M": (
        {"vocab_size": 50304, "max_seq_len": 1024, "n_layer": 12, "d_model": 768, "n_head": 12, **GPT2}, 1, "adamw",
    ),
}  # fmt: skip
WITHIN = {"memory": 0.15, "time": 0.25}
LEAST_S, LEAST, MOST = 5.0, 4, 40  # seconds of updates, and how many


def settings(name: str) -> Any:
    from gpt.settle import TrainConfig

    shape, rows, kind = CASES[name]
    T = shape["max_seq_len"]
    train = {"steps": 1000, "batch_tokens": rows * T, "device": "cpu", "compile": False}
    return TrainConfig(
        name="x", data={"path": "data/none", "seq_len": T}, model=shape, train=train, optim={"kind": kind}
    )  # type: ignore[arg-type]


def planned(name: str) -> dict[str, Any]:
    from gpt import budget

    start = time.perf_counter()
    facts = budget.facts(settings(name))
    way, target = facts.way, facts.target
    return {
        "parameters": sum(facts.counts.values()),
        "memory": way.need.total + target.process,
        "time": way.update_s,
        "matmul": target.rates.matmul if target.rates else None,
        "rows": way.rows,
        "flops": facts.flops,
        "took": time.perf_counter() - start,
    }


def real(name: str, rows: int) -> dict[str, Any]:
    import torch

    from gpt import plan, runtime, settle
    from gpt.data import Batch
    from gpt.model import GPT, init_weights
    from gpt.optim import Optimizer
    from gpt.parallel import applied
    from gpt.plan import Choices
    from gpt.trainer import update

    config = settings(name)
    device, dtype, _, _ = settle.machine(config)
    model = GPT(config.model)
    threads = settle.threads(config, model)
    runtime.setup(device, threads)
    facts = {"data": "", "torch": "", "cpu": "", "steps": config.train.steps}
    choices = Choices(device=device, dtype=dtype, threads=threads, compile=False, micro_batch=rows, **facts)
    init_weights(model, 1)
    objective = settle.objective(config, model, None)
    forward, optimizer = applied(objective, compile=False), Optimizer(model, config.optim)
    ids = torch.randint(0, config.model.vocab_size, (settle.rows(config), config.data.seq_len + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    seconds: list[float] = []
    while len(seconds) <= LEAST or (sum(seconds) < LEAST_S and len(seconds) < MOST):
        start = time.perf_counter()
        update(forward, optimizer, batch, config, choices, len(seconds) + 1)
        seconds.append(time.perf_counter() - start)
    memory = runtime.peak_memory_bytes(device)
    return {"parameters": plan.n_parameters(model), "memory": memory, "time": statistics.median(seconds[1:])}


def asked(*side: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *side],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three smallest, one round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is asked")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        how, name, *rest = args.side
        print(json.dumps(planned(name) if how == "planned" else real(name, int(rest[0]))))
        return
    results: list[dict[str, Any]] = []
    for name in list(CASES)[: 3 if args.quick else None]:
        sides: dict[str, list[dict[str, Any]]] = {"planned": [], "real": []}
        for _ in range(1 if args.quick else args.rounds):
            sides["planned"].append(asked("--side", "planned", name))
            sides["real"].append(asked("--side", "real", name, str(sides["planned"][-1]["rows"])))
        told, found = ({k: statistics.median(x[k] for x in sides[s]) for k in sides[s][0]} for s in sides)
        assert told["parameters"] == found["parameters"], (told, found)
        for what, unit in (("memory", "GB"), ("time", "s")):
            scale = 1e9 if unit == "GB" else 1
            ratio = told[what] / found[what]
            verdict = "within" if abs(ratio - 1) <= WITHIN[what] else "NOT WITHIN"
            print(
                f"{name:24} {what:6} planned {told[what] / scale:8.3f} {unit:2} real {found[what] / scale:8.3f} {unit:2} "
                f"ratio {ratio:.2f} ({verdict} {WITHIN[what]:.0%})",
                flush=True,
            )
            limit = told["flops"] * CASES[name][1] * CASES[name][0]["max_seq_len"] / found["time"] / told["matmul"]
            row = {
                "case": f"{name}, {what}",
                "ours": told[what] / scale,
                "peer": found[what] / scale,
                "peer_name": "real",
            }
            results.append({**row, "unit": unit, "ratio": ratio, "limit_share": limit if what == "time" else None})
        print(f"{name:24} parameters {told['parameters']:,.0f}, exact; the plan took {told['took']:.1f} s", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
