"""How fast is a training step on this machine's CPU, against transformers and litgpt, and against the machine itself?

    python benchmarks/train_step.py [--quick] [--pairs N] [--only SHAPE ...] [--growth]

Four shapes: GPT-2 of 124M, a Llama of 125M, and two GPT-2s on characters (10M and 0.8M). Every side is a process of its own
that waits while another one works; each has the same weights (through our own export), the same random tokens and AdamW with
gradients clipped at 1. A round is three updates of every side, or as many as take a second; the first is not timed. Ours is
`trainer.update`, eager and compiled, in the dtype it chooses for itself; transformers is its own model class as it is (fp32)
and under bf16 autocast.
Printed: medians over the rounds, the loss after the same number of updates, the share of this machine's bf16 matrix products
(6 FLOPs a matrix parameter and 12 H D T a layer for a token), and the peak of resident memory.

`--growth` asks instead how the step grows: with the context from 128 to 4,096, and with the model from 1M to 350M parameters;
each against what the FLOP formula predicts from the smallest of them.

Prints tables and, last, one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GPT2 = {"position": "learned", "norm": "layernorm", "norm_eps": 1e-5, "mlp": "gelu_tanh", "attention_bias": True, "mlp_bias": True,
        "qk_norm": False}  # fmt: skip
LLAMA = {"tie_embeddings": False, "qk_norm": False, "norm_eps": 1e-5, "n_kv_head": 4}
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {  # the model, rows, tokens a row
    "GPT-2 124M": ({**GPT2, "n_layer": 12, "d_model": 768, "n_head": 12, "vocab_size": 50_304}, 2, 512),
    "Llama 125M": ({**LLAMA, "n_layer": 12, "d_model": 768, "n_head": 12, "vocab_size": 32_000}, 2, 512),
    "chars 10M": ({**GPT2, "n_layer": 6, "d_model": 384, "n_head": 6, "vocab_size": 128}, 16, 256),
    "chars 0.8M": ({**GPT2, "n_layer": 4, "d_model": 128, "n_head": 4, "vocab_size": 128}, 12, 64),
}
SIDES = ("ours", "ours, compiled", "transformers", "transformers bf16", "litgpt", "litgpt bf16")
LR, WARM = 1e-4, 2


def batches(vocab_size: int, rows: int, seq_len: int) -> Iterator[Any]:
    """Rows of tokens with one more each, so that targets are the next ones; the same for every side."""
    import torch

    generator = torch.Generator().manual_seed(7)
    while True:
        yield torch.randint(vocab_size, (rows, seq_len + 1), generator=generator)


def ours(shape: dict[str, Any], rows: int, seq_len: int, compile: bool) -> Callable[[Any], float]:
    from gpt import config, parallel, plan, runtime
    from gpt.data import Batch
    from gpt.loss import NextToken
    from gpt.model import GPT, ModelConfig, init_weights
    from gpt.optim import Optimizer
    from gpt.settle import TrainConfig
    from gpt.trainer import update

    raw = ["name=step", "data.path=none", f"data.seq_len={seq_len}", "train.steps=1000000", "train.device=cpu",
           f"train.batch_tokens={rows * seq_len}", f"optim={{kind: adamw, lr: {LR}, weight_decay: 0, betas: [0.9, 0.999]}}",
           "schedule={kind: constant, warmup: 0}"]  # fmt: skip
    given = config.load(TrainConfig, None, raw)
    device, dtype, threads, _ = plan.machine(given.train)
    model = GPT(ModelConfig(**shape, max_seq_len=seq_len))
    threads = plan.threads_for(model, rows * seq_len, seq_len, threads)
    runtime.setup(device, threads)
    init_weights(model, 1)
    objective, optimizer = NextToken(model), Optimizer(model, given.optim)
    forward = parallel.applied(objective, compile=compile)
    choices = plan.Choices(device=device, dtype=dtype, compile=compile, micro_batch=rows, threads=threads, steps=10**6,
                           data="", torch="", cpu="")  # fmt: skip
    n = 0

    def step(tokens: Any) -> float:
        nonlocal n
        n += 1
        return float(update(forward, optimizer, Batch(tokens[:, :-1], tokens[:, 1:]), given, choices, n)[0])

    return step


def theirs(logits: Callable[[Any], Any], model: Any, bf16: bool) -> Callable[[Any], float]:
    """The step that transformers' Trainer and litgpt's script make: AdamW, fused, gradients clipped at 1."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def step(tokens: Any) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = logits(tokens[:, :-1])
            loss = F.cross_entropy(found.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def transformers_side(weights: Path, bf16: bool) -> Callable[[Any], float]:
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype="float32").train()
    for module in model.modules():  # GPT-2's own default is 0.1, which ours does not have
        if hasattr(module, "p"):
            module.p = 0.0
    return theirs(lambda tokens: model(input_ids=tokens, use_cache=False).logits, model, bf16)


def litgpt_side(shape: dict[str, Any], seq_len: int, weights: Path, bf16: bool) -> Callable[[Any], float]:
    import litgpt
    import torch
    from safetensors.torch import load_file

    config = litgpt.Config(
        block_size=seq_len, n_layer=shape["n_layer"], n_embd=shape["d_model"], n_head=shape["n_head"],
        n_query_groups=shape["n_kv_head"], padded_vocab_size=shape["vocab_size"], vocab_size=shape["vocab_size"],
        intermediate_size=2048, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model, given = litgpt.GPT(config), load_file(weights / "model.safetensors")
    names = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
    for i in range(config.n_layer):
        here, there = f"transformer.h.{i}", f"model.layers.{i}"
        parts = [given[f"{there}.self_attn.{name}_proj.weight"] for name in "qkv"]
        given[f"{here}.attn.qkv.weight"] = torch.cat(parts)
        names |= {f"{here}.attn.proj": f"{there}.self_attn.o_proj", f"{here}.attn.qkv": f"{here}.attn.qkv",
                  f"{here}.norm_1": f"{there}.input_layernorm", f"{here}.norm_2": f"{there}.post_attention_layernorm",
                  f"{here}.mlp.fc_1": f"{there}.mlp.gate_proj", f"{here}.mlp.fc_2": f"{there}.mlp.up_proj",
                  f"{here}.mlp.proj": f"{there}.mlp.down_proj"}  # fmt: skip
    model.load_state_dict({f"{name}.weight": given[f"{at}.weight"] for name, at in names.items()})
    return theirs(model, model, bf16)


def work(side: str, name: str, weights: Path) -> None:
    """A side: make as many updates as each line of standard input asks for, and say how long they took."""
    import torch

    shape, rows, seq_len = SHAPES[name]
    make: dict[str, Callable[[], Callable[[Any], float]]] = {
        "ours": partial(ours, shape, rows, seq_len, compile=False),
        "ours, compiled": partial(ours, shape, rows, seq_len, compile=True),
        "transformers": partial(transformers_side, weights, bf16=False),
        "transformers bf16": partial(transformers_side, weights, bf16=True),
        "litgpt": partial(litgpt_side, shape, seq_len, weights, bf16=False),
        "litgpt bf16": partial(litgpt_side, shape, seq_len, weights, bf16=True),
    }
    torch.manual_seed(0)
    step, given, loss = make[side](), batches(shape["vocab_size"], rows, seq_len), 0.0
    print("ready", flush=True)
    for line in sys.stdin:
        loss = step(next(given))  # not timed: it finds caches and memory as the other sides left them
        start = time.perf_counter()
        for _ in range(int(line) - 1):
            loss = step(next(given))
        print(json.dumps([time.perf_counter() - start, loss, peak_bytes()]), flush=True)


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def export(name: str, directory: Path) -> None:
    """The shape's weights as its class of transformers reads them."""
    from gpt import checkpoint, families, hf
    from gpt.model import GPT, ModelConfig, init_weights

    shape, _, seq_len = SHAPES[name]
    model = GPT(ModelConfig(**shape, max_seq_len=seq_len))
    init_weights(model, 1)
    family = families.family_of(model.config)
    assert family is not None, f"transformers has no class for {name}"
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(families.write(family, model.config) | ends))
    with (directory / "model.safetensors").open("wb") as file:
        file.writelines(checkpoint.serialize(hf.to_disk(model.config, model.state_dict()), {"format": "pt"}))


class Side:
    """A process that makes updates when it is asked to."""

    def __init__(self, side: str, name: str, weights: Path) -> None:
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--side",
            side,
            "--only",
            name,
            "--weights",
            str(weights),
        ]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, **pipes)
        self.seconds: list[float] = []
        self.made, self.loss, self.peak = 0, 0.0, 0
        assert self.process.stdout is not None
        self.there = self.process.stdout.readline() == "ready\n"

    def go(self, updates: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(updates, file=self.process.stdin, flush=True)
        took, self.loss, self.peak = json.loads(self.process.stdout.readline())
        self.made += updates
        return took / (updates - 1)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def started(side: str, name: str, weights: Path) -> Iterator[Side]:
    made = Side(side, name, weights)
    try:
        yield made
    finally:
        made.end()


def missing(name: str) -> list[str]:
    """The sides that this shape has not, or that are not installed here."""
    import importlib.util

    found = {package: importlib.util.find_spec(package) is not None for package in ("transformers", "litgpt")}
    return [
        side
        for side in SIDES
        if not found.get(side.split()[0].strip(","), True)
        or (side.startswith("litgpt") and "n_kv_head" not in SHAPES[name][0])
    ]


def compared(name: str, pairs: int) -> list[dict[str, Any]]:
    """One shape by all sides, in turn; a row of the table each."""
    from gpt import plan, probe
    from gpt.model import GPT, ModelConfig

    shape, rows, seq_len = SHAPES[name]
    sides = [side for side in SIDES if side not in missing(name)]
    per_token = plan.flops_per_token(GPT(ModelConfig(**shape, max_seq_len=seq_len)), seq_len)
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        export(name, Path(directory))
        at_work = {side: stack.enter_context(started(side, name, Path(directory))) for side in sides}
        for side, each in at_work.items():
            if not each.there:
                raise RuntimeError(f"{side} ended before its first update")
            each.go(WARM)
        losses = {side: each.loss for side, each in at_work.items()}
        updates = max(3, int(1 / at_work["transformers"].go(2))) if "transformers" in at_work else 3
        for each in at_work.values():
            each.go(2)
        for _ in range(pairs):
            rates.append(probe.matmul_rate("cpu", "bfloat16"))
            for each in at_work.values():
                each.seconds.append(each.go(updates))
    seconds = {side: statistics.median(each.seconds) for side, each in at_work.items()}
    peak = statistics.median(rates)
    print(
        f"\n{name}: {rows} x {seq_len} tokens, {per_token / 1e9:.3f} GFLOP a token; bf16 products: {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':18} {'ms a step':>10} {'tokens/s':>9} {'of matmul':>10} {'ours is':>8} {'loss':>9} {'peak GB':>8}")
    for side, took in seconds.items():
        share, ratio = rows * seq_len * per_token / took / peak, took / seconds["ours, compiled"]
        shown = f"{side:18} {1000 * took:10.1f} {rows * seq_len / took:9,.0f} {share:10.2f} {ratio:7.2f}x"
        print(f"{shown} {losses[side]:9.5f} {at_work[side].peak / 1e9:8.2f}", flush=True)
    return [
        {"case": f"{name}: {mine}", "ours": seconds[mine], "peer": seconds[side], "peer_name": side, "unit": "s", "ratio":
         seconds[side] / seconds[mine], "limit_share": rows * seq_len * per_token / seconds[mine] / peak}
        for mine in ("ours", "ours, compiled") for side in sides if not side.startswith("ours")
    ]  # fmt: skip


def grown(pairs: int) -> list[dict[str, Any]]:
    """Our eager step at several lengths and sizes, in turn, each against what the FLOP formula makes of the smallest."""
    from gpt import plan, probe
    from gpt.model import GPT, ModelConfig

    base = {**LLAMA, "n_head": 8, "n_kv_head": 4, "n_layer": 6, "d_model": 512, "vocab_size": 8_192}
    lengths = {f"T {n:,}": (base, 4096 // n, n) for n in (128, 256, 512, 1024, 2048, 4096)}
    sizes = {}
    for size, (n_layer, d_model) in {
        "1M": (4, 64),
        "10M": (6, 256),
        "35M": (8, 512),
        "124M": (12, 768),
        "350M": (24, 1024),
    }.items():
        heads = max(2, d_model // 64)
        sizes[size] = ({**base, "n_layer": n_layer, "d_model": d_model, "n_head": heads, "n_kv_head": heads}, 4, 256)
    out = []
    for cases in (lengths, sizes):
        steps, flops, took = {}, {}, {name: [] for name in cases}  # type: ignore[var-annotated]
        for name, (shape, rows, seq_len) in cases.items():
            model = GPT(ModelConfig(**shape, max_seq_len=seq_len))
            flops[name] = rows * seq_len * plan.flops_per_token(model, seq_len)
            steps[name] = ours(shape, rows, seq_len, compile=False), batches(shape["vocab_size"], rows, seq_len)
            print(f"{name:8} {plan.n_parameters(model) / 1e6:6.1f}M parameters, {rows} x {seq_len:,} tokens")
            del model
        for i in range(pairs + 1):  # the first round warms up
            for name, (step, given) in steps.items():
                step(next(given))  # not timed, as of the sides
                start = time.perf_counter()
                step(next(given))
                if i:
                    took[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(each) for name, each in took.items()}
        first, rate = next(iter(cases)), probe.matmul_rate("cpu", "bfloat16")
        for name in cases:
            formula = seconds[first] * flops[name] / flops[first]
            share, ratio = flops[name] / seconds[name] / rate, seconds[name] / formula
            print(
                f"{name:8} {1000 * seconds[name]:9.1f} ms {flops[name] / 1e9:9.0f} GFLOP, {share:.2f} of products; "
                f"by the formula from {first}: {1000 * formula:9.1f} ms, {ratio:.2f} of it",
                flush=True,
            )
            out.append({"case": name, "ours": seconds[name], "peer": formula, "peer_name": f"the FLOPs, from {first}",
                        "unit": "s", "ratio": 1 / ratio, "limit_share": share})  # fmt: skip
        steps.clear()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, two rounds")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of which the median is taken")
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), default=None, help="these shapes")
    parser.add_argument("--growth", action="store_true", help="how the step grows with context and size")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args.side, args.only[0], args.weights)
        return
    names = ["chars 0.8M"] if args.quick else args.only or list(SHAPES)
    print(f"load average {os.getloadavg()[0]:.1f}")
    if args.growth:
        results = grown(args.pairs)
    else:
        results = [row for name in names for row in compared(name, 2 if args.quick else args.pairs)]
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(json.dumps(results))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
