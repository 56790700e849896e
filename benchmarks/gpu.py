"""What is this code worth on a GPU? Its limits, whether it computes what a CPU does, training, decoding, memory, compiling.

    python benchmarks/gpu.py [--only NAME,NAME] [--out FILE.json]

Every section is a process of its own with a time limit, so that one that fails or hangs costs the others nothing; all
together are to end within ten minutes on one data-centre GPU. Shares are of this GPU's own rates: of a product of random
8192 x 8192 matrices in bf16, and of a copy within its memory.
Peers (transformers, eager and compiled) are measured where they can be imported, on as many rows as they can hold. Without
CUDA everything runs on the CPU at toy size, and the tables say so: that shows that the script works, and measures nothing.
Prints tables and, last, one JSON line; `--out` writes the same as a file.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from gpt import host, parallel, plan, runtime, trainer  # noqa: E402
from gpt.data import Batch  # noqa: E402
from gpt.generate import Sampling, generate  # noqa: E402
from gpt.judge import LossScale  # noqa: E402
from gpt.loss import NextToken  # noqa: E402
from gpt.model import GPT, ModelConfig, init_weights  # noqa: E402
from gpt.optim import Optimizer  # noqa: E402
from gpt.plan import Choices  # noqa: E402
from gpt.trainer import TrainConfig  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOTAL_S = 590
GPT2 = {"vocab_size": 50304, "max_seq_len": 1024, "n_layer": 12, "d_model": 768, "n_head": 12, "norm": "layernorm",
        "norm_eps": 1e-5, "mlp": "gelu_tanh", "position": "learned", "qk_norm": False, "attention_bias": True,
        "mlp_bias": True}  # fmt: skip
LLAMA = {"vocab_size": 128256, "max_seq_len": 2048, "n_layer": 16, "d_model": 2048, "n_head": 32, "n_kv_head": 8,
         "d_ff": 8192, "rope_theta": 500_000.0, "norm_eps": 1e-5, "qk_norm": False}  # fmt: skip
TOY = {"vocab_size": 512, "max_seq_len": 64, "n_layer": 2, "d_model": 64, "n_head": 4, "d_ff": 128}
ROWS = {"gpt2": (64, 8), "llama": (8, 8)}  # of a micro-batch, and micro-batches of an update
Row = dict[str, Any]


def shape(name: str) -> ModelConfig:
    """The model of that name, or a toy of its kind where there is no GPU."""
    settings = {"gpt2": GPT2, "llama": LLAMA}[name]
    small = TOY | ({"n_kv_head": 2} if name == "llama" else {})
    return ModelConfig(**(settings if CUDA else settings | small))


def row(
    case: str, ours: float | str, unit: str, peer: float | None = None, peer_name: str = "", share: float | None = None
) -> Row:
    """One line of the tables; a ratio is by how much ours is better: more of a rate, less of seconds or memory."""
    ratio = None
    if peer and isinstance(ours, int | float) and ours:
        ratio = peer / ours if unit in ("s", "ms", "us", "GB") else ours / peer
    return {
        "case": case,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "unit": unit,
        "ratio": ratio,
        "limit_share": share,
    }


def seconds(work: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
    """Median seconds of `work`, the device waited for on both sides."""
    times = []
    for i in range(warm + repeats):
        runtime.synchronize(DEVICE)
        start = time.perf_counter()
        work()
        runtime.synchronize(DEVICE)
        if i >= warm:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def freed() -> None:
    """Memory of what is gone is given back, and the peak begins anew."""
    import gc

    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fresh(config: ModelConfig, device: str) -> GPT:
    """A model with random weights; a large one's are drawn on the device, which is soon done."""
    if config.n_layer <= TOY["n_layer"]:
        model = GPT(config)
        init_weights(model, 1)
        return model.to(device)
    with torch.device(device), torch.no_grad():
        model = GPT(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    return model.to(device)  # tables of angles are made on the CPU


# An update, as training makes it


class Training:
    """A model, its optimizer and random batches; `update` is the trainer's own."""

    def __init__(self, config: ModelConfig, rows: int, n_micro: int, seq_len: int, **how: Any) -> None:
        train = {"steps": 10**6, "batch_tokens": rows * n_micro * seq_len, "micro_batch": rows, "compile": False,
                 "checkpointing": how.get("checkpointing", "none")}  # fmt: skip
        data = {"path": "x", "seq_len": seq_len, "document_mask": how.get("documents", 0) > 0}
        self.config = TrainConfig.model_validate(
            {
                "name": "x",
                "data": data,
                "model": config.model_dump(),
                "train": train,
                "schedule": {"kind": "constant", "warmup": 0},
            }
        )
        dtype, device = how.get("dtype", "bfloat16"), how.get("device", DEVICE)
        fused = how.get("fused") or parallel.fused_kernel(config, device, runtime.DTYPES[dtype], seq_len)[0]
        self.choices = Choices(device=device, dtype=dtype, compile=how.get("compile", CUDA), micro_batch=rows, threads=2,
                               steps=10**6, data="", fused=fused, torch=runtime.torch_version(), cpu="")  # fmt: skip
        self.model = fresh(config, device).train()
        if how.get("flex"):
            parallel.hiding_kernel(self.model)
        self.objective = NextToken(self.model)
        self.forward = parallel.applied(
            self.objective,
            compile=self.choices.compile,
            checkpointing=how.get("checkpointing", "none"),
        )
        self.optimizer = Optimizer(self.model, self.config.optim)
        self.tokens, self.step = rows * n_micro * seq_len, 0
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size or 2, (rows * n_micro, seq_len + 1), generator=draw)
        given = [ids[:, :-1].contiguous(), ids[:, 1:].contiguous()]
        if length := how.get("documents", 0):
            at = torch.arange(seq_len).expand(rows * n_micro, -1)
            given += [(at % length).contiguous(), (at // length).contiguous()]
        self.batch = Batch(*(x.pin_memory() if CUDA else x for x in given))

    def update(
        self, check: Callable[..., object] | None = None, scale: LossScale | None = None
    ) -> tuple[Tensor, Tensor]:
        self.step += 1
        check = check or trainer.finite
        return trainer.update(
            self.forward, self.optimizer, self.batch, self.config, self.choices, self.step, check=check, scale=scale
        )

    def rate(self, repeats: int = 4) -> float:
        """Tokens a second."""
        return self.tokens / seconds(self.update, repeats if CUDA else 1, warm=2 if CUDA else 1)


def fitting(make: Callable[[int], Any], rows: int) -> tuple[int, Any]:
    """(rows, what `make` gives of them): as many as there is memory for, halved until then."""
    while True:
        try:
            return rows, make(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        freed()  # here the error, and what it holds, is gone


# Sections


def limits() -> Iterator[Row]:
    n = 8192 if CUDA else 512
    dtype = torch.bfloat16 if CUDA else torch.float32
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    yield row("matmul", 2 * n**3 / seconds(lambda: a @ b, 10) / 1e12, "TFLOP/s")
    source = torch.empty(2**30 if CUDA else 2**22, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    yield row("copy", 2 * source.nbytes / seconds(lambda: target.copy_(source), 10) / 1e12, "TB/s")
    if CUDA:
        x, graph = torch.zeros(1, device=DEVICE), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(1000):
                x.add_(1)
        yield row("kernel in a graph", seconds(graph.replay) / 1000 * 1e6, "us")


def correct() -> Iterator[Row]:
    """What must hold before any speed means something; each line is caught by itself."""
    checks = {
        "losses as on the CPU, fp32": partial(_losses, "float32", 1e-4),
        "losses as on the CPU, 16 bits": partial(_losses, "bfloat16", 2e-2),
        "attention, each fused kernel": _kernels,
        "documents and windows: FlexAttention": _flex,
        "checkpointing, same loss": _checkpointing,
        "an update waits for nothing": _waits,
        "float16 with a loss scale": _float16,
    }
    for name, check in checks.items():
        try:
            yield row(name, check(), "")
        except Exception as error:  # the table tells; the others go on
            yield row(name, f"FAILED: {_brief(error)}", "")


def _losses(dtype: str, tolerance: float) -> str:
    """Three updates of a small model on both devices."""
    config, curves = ModelConfig(**(TOY | {"n_kv_head": 2})), []
    for device, kind in (("cpu", "float32"), (DEVICE, dtype)):
        training = Training(config, 4, 2, 64, dtype=kind, device=device, compile=False)
        curves.append([float(training.update()[0]) for _ in range(3)])
    apart = max(abs(a - b) / a for a, b in zip(*curves, strict=True))
    assert apart < tolerance, f"{apart:.1e} apart"
    return f"{apart:.1e} apart"


def _kernels() -> str:
    if not CUDA:
        return "not measured on GPU"
    found = []
    for kernel in parallel.ORDERS:
        for heads, groups, d in ((12, 12, 64), (32, 8, 64), (16, 8, 128)):
            ms = 1000 * parallel._timed_attention(kernel, (8, heads, groups, 1024, d), DEVICE, torch.bfloat16)
            found.append(f"{kernel} {heads}/{groups}x{d} {ms:.2f} ms")
    return ", ".join(found)


def _flex() -> str:
    if not CUDA:
        return "not measured on GPU"
    config = ModelConfig(**(TOY | {"max_seq_len": 512, "n_kv_head": 2, "n_head": 4, "d_model": 256, "window": 100}))
    results = []
    for flex in (False, True):
        training = Training(config, 2, 1, 512, documents=190, flex=flex, compile=False)
        given = [x.to(DEVICE) for x in training.batch.given]
        with runtime.autocast(DEVICE, "bfloat16"):
            loss = training.forward(*given)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in training.model.parameters())])
        assert bool(training.model.model.flex) == flex, "FlexAttention does not work here"
    apart = max(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))
    assert apart < 5e-2, f"{apart:.1e} apart"
    return f"{apart:.1e} apart, gradients included"


def _checkpointing() -> str:
    config, losses = ModelConfig(**(TOY | {"dropout": 0.1})), {}
    for kind in ("none", "selective", "full"):
        training = Training(config, 4, 1, 64, checkpointing=kind, compile=False)
        losses[kind] = [float(training.update()[0]) for _ in range(3)]
    assert max(abs(a - b) for other in losses.values() for a, b in zip(losses["none"], other, strict=True)) < 1e-3, (
        losses
    )
    return "the same bits" if len({str(each) for each in losses.values()}) == 1 else "the same but for rounding"


def _waits() -> str:
    """An update whose numbers nobody reads makes no call that waits; the check of them is one."""
    training = Training(ModelConfig(**TOY), 4, 2, 64)
    training.update()
    training.update()
    if not CUDA:
        return "not measured on GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.update(check=lambda *numbers: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none without the check of its numbers"


def _float16() -> str:
    training, scale = Training(ModelConfig(**TOY), 4, 1, 64, dtype="float16", compile=False), LossScale()
    losses = [float(training.update(scale=scale)[0]) for _ in range(5)]
    assert losses[-1] < losses[0], losses
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, scale {scale.value:g}"


def training_of(name: str) -> Iterator[Row]:
    """Ours: tokens a second, share of the matmul rate, peak of memory."""
    config = shape(name)
    rows, n_micro = ROWS[name] if CUDA else (2, 2)
    seq_len = config.max_seq_len or 0
    freed()

    def measured(rows: int) -> tuple[float, Training]:
        training = Training(config, rows, n_micro, seq_len)
        return training.rate(), training

    rows, (rate, training) = fitting(measured, rows)
    loss = float(training.update()[0])
    label = f"{name} {plan.n_parameters(training.model) / 1e6:.0f}M T{seq_len} B{rows} x {n_micro}"
    yield row(f"{label}: train", rate, "tok/s") | {"flops": rate * plan.flops_per_token(training.model, seq_len)}
    yield row(f"{label}: peak memory", runtime.peak_memory_bytes(DEVICE) / 1e9, "GB")
    yield row(f"{label}: attention, loss", f"{training.choices.fused}, {loss:.3f}", "")
    del training
    freed()
    if CUDA:
        for fused in parallel.ORDERS:
            yield row(f"{label}: {fused} first", Training(config, rows, 2, seq_len, fused=fused).rate(3), "tok/s")
            freed()


def peers_of(name: str) -> Iterator[Row]:
    """transformers' model of this shape, eager and compiled: bf16 autocast, fused AdamW, SDPA; ours on the same rows beside it."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    c, rows = shape(name), ROWS[name][0] if CUDA else 2
    seq_len, vocab = c.max_seq_len or 0, c.vocab_size or 2
    if name == "gpt2":
        peer_config = GPT2Config(vocab_size=vocab, n_positions=seq_len, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head,
                                 n_inner=c.d_hidden, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        family: Any = GPT2LMHeadModel
    else:
        peer_config = LlamaConfig(vocab_size=vocab, max_position_embeddings=seq_len, hidden_size=c.d_model,
                                  num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_group,
                                  intermediate_size=c.d_hidden, tie_word_embeddings=True)  # fmt: skip
        family = LlamaForCausalLM
    for kind in ("eager", "compiled"):

        def peer(rows: int, kind: str = kind) -> float:
            model = family(peer_config).to(DEVICE).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            forward = torch.compile(model) if kind == "compiled" else model
            ids = torch.randint(vocab, (rows, seq_len), device=DEVICE)

            def step() -> None:
                with torch.autocast(DEVICE, torch.bfloat16):
                    loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            return rows * seq_len / seconds(step, 4 if CUDA else 1, warm=2 if CUDA else 1)

        if kind == "compiled" and not CUDA:
            continue
        freed()
        rows, theirs = fitting(peer, rows)
        peak = runtime.peak_memory_bytes(DEVICE) / 1e9
        freed()
        ours = Training(c, rows, 1, seq_len).rate()
        label, what = f"{name} T{seq_len} B{rows}", f"transformers {kind}"
        yield row(f"{label}: train", ours, "tok/s", theirs, what)
        yield row(f"{label}: peak memory", runtime.peak_memory_bytes(DEVICE) / 1e9, "GB", peak, what)


def checkpointing() -> Iterator[Row]:
    config, rows = shape("llama"), ROWS["llama"][0] if CUDA else 2
    for kind in ("none", "selective", "full"):
        freed()
        training = Training(config, rows, 1, config.max_seq_len or 0, checkpointing=kind)
        rate = training.rate(3)
        peak = runtime.peak_memory_bytes(DEVICE) / 1e9
        yield row(f"llama, checkpointing {kind}", rate, "tok/s")
        yield row(f"llama, checkpointing {kind}: peak memory", peak, "GB")
        del training


def documents() -> Iterator[Row]:
    """Attention inside documents and windows against plain causal attention."""
    config = shape("gpt2").model_copy(update={"max_seq_len": 4096 if CUDA else 64, "position": "rotary"})
    rows, T = (16, 4096) if CUDA else (2, 64)
    plain = Training(config, rows, 1, T).rate(3)
    yield row(f"T{T}, causal", plain, "tok/s")
    window = config.model_copy(update={"window": T // 8, "full_layers": (0, config.n_layer - 1)})
    for name, shape_, length in (("documents", config, T // 8), ("windows", window, 0), ("both", window, T // 8)):
        freed()
        training = Training(shape_, rows, 1, T, documents=length, flex=True)
        kernel = "flex" if training.model.model.flex else "dense"
        yield row(f"T{T}, {name} of {T // 8} ({kernel})", training.rate(3), "tok/s", plain, "causal")
        del training


def compiling() -> Iterator[Row]:
    """Seconds to the end of the first update, imports included, without and with what was kept on disk."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
            start = time.perf_counter()
            command = [sys.executable, __file__, "--first-update"]
            subprocess.run(command, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, timeout=150)
            yield row(f"first update, compiled, {state}", time.perf_counter() - start, "s")


def first_update() -> None:
    config = shape("gpt2")
    Training(config, 8 if CUDA else 2, 1, config.max_seq_len or 0, compile=True).update()
    runtime.synchronize(DEVICE)


def decoding() -> Iterator[Row]:
    """Greedy tokens a second; the share is of the time in which memory gives every weight once a step."""
    for name, batch in (("llama", 1), ("llama", 64), ("gpt2", 1)):
        freed()
        config = shape(name)
        model = fresh(config, DEVICE).to(torch.bfloat16 if CUDA else torch.float32).eval()
        n_prompt, n = (512 if batch > 1 else 128, 128) if CUDA else (8, 8)
        prompts = [[1 + i for i in range(n_prompt)] for _ in range(batch)]

        def columns(
            model: GPT = model, prompts: list[list[int]] = prompts, n: int = n, config: ModelConfig = config
        ) -> list[float]:
            how: dict[str, Any] = {"seed": 1, "n_tokens_valid": config.vocab_size, "stop_ids": ()}
            return [time.perf_counter() for _ in generate(model, prompts, Sampling(temperature=0), n, **how)]

        columns()
        start = time.perf_counter()
        times = columns()
        first = len(times) // 4  # graphs are captured by then
        rate = batch * (len(times) - 1 - first) / (times[-1] - times[first])
        n_bytes = sum(p.nbytes for p in model.parameters())
        yield row(f"{name} decode b{batch}", rate, "tok/s") | {"bytes_a_second": rate / batch * n_bytes}
        yield row(f"{name} prefill b{batch} of {n_prompt}", batch * n_prompt / (times[0] - start), "tok/s")
        del model


SECTIONS: dict[str, tuple[Callable[[], Iterator[Row]], int]] = {  # with the most seconds each may take
    "limits": (limits, 40),
    "correct": (correct, 90),
    "gpt2": (partial(training_of, "gpt2"), 100),
    "llama": (partial(training_of, "llama"), 100),
    "gpt2-peers": (partial(peers_of, "gpt2"), 100),
    "llama-peers": (partial(peers_of, "llama"), 100),
    "documents": (documents, 90),
    "checkpointing": (checkpointing, 80),
    "decoding": (decoding, 80),
    "compiling": (compiling, 150),
}
LEFT_OUT = (
    "no fp8 here; saving: benchmarks/checkpoint.py; loss per second: train.py configs/tinyshakespeare_gpu.yaml",
)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"


def section(name: str) -> Iterator[Row]:
    """The rows of a section; where it fails, what it had and why."""
    try:
        yield from SECTIONS[name][0]()
    except Exception as error:  # told in the table
        yield row(name, f"FAILED: {_brief(error)}", "")


def in_a_process(name: str, limit_s: float) -> list[Row]:
    """The rows of a section that another process finds; those it found until it was ended."""
    with tempfile.NamedTemporaryFile("r") as file:
        command = [sys.executable, __file__, "--section", name, "--rows", file.name]
        why = ""
        try:
            ended = subprocess.run(
                command, timeout=limit_s, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            why = f"FAILED: exit code {ended.returncode}: {ended.stderr.strip()[-200:]}" if ended.returncode else ""
        except subprocess.TimeoutExpired:
            why = f"ended after {limit_s:.0f} s"
        rows = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    return [*rows, row(name, why, "")] if why else rows


def shared(rows: list[Row], rates: dict[str, float]) -> list[Row]:
    """Rows with their share of this machine's limits, where they have been measured."""
    for each in rows:
        flops, n_bytes = each.pop("flops", None), each.pop("bytes_a_second", None)
        if flops and "matmul" in rates:
            each["limit_share"] = flops / rates["matmul"] / 1e12
        if n_bytes and "copy" in rates:
            each["limit_share"] = n_bytes / rates["copy"] / 1e12
    return rows


def show(name: str, rows: list[Row]) -> None:
    print(f"\n{name}" + ("" if CUDA else "  (toy size on the CPU: not measured on GPU)"), flush=True)
    for each in rows:
        number = each["ours"] if isinstance(each["ours"], str) else f"{each['ours']:,.4g} {each['unit']}"
        share = f"  {each['limit_share']:.0%} of the limit" if each["limit_share"] else ""
        beside = (
            f"  {each['ratio']:.2f} times as good as {each['peer_name']} ({each['peer']:,.4g})" if each["ratio"] else ""
        )
        print(f"  {each['case']:<52} {number}{share}{beside}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    for hidden in ("--section", "--rows"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--first-update", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    runtime.setup(DEVICE, 2 if not CUDA else host.n_cores())
    if args.first_update:
        return first_update()
    if args.section:
        with open(args.rows, "a") as file:
            for each in section(args.section):
                file.write(json.dumps(each) + "\n")
                file.flush()
        return None
    if unknown := set(args.only.split(",")) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    began, found, rates = time.monotonic(), [], {}
    print(f"{runtime.best_device()[1]}, torch {runtime.torch_version()}" + ("" if CUDA else ": NOT MEASURED ON GPU"))
    for name in args.only.split(","):
        left = TOTAL_S - (time.monotonic() - began)
        rows = in_a_process(name, min(left, SECTIONS[name][1])) if left > 5 else [row(name, "left out: no time", "")]
        if name == "limits":
            rates = {each["case"]: each["ours"] for each in rows if isinstance(each["ours"], float)}
        found += shared(rows, rates)
        show(name, rows)
    print(f"\n{time.monotonic() - began:.0f} s; not here: {LEFT_OUT[0]}")
    device = runtime.best_device()[1] if CUDA else "not measured on GPU"
    line = json.dumps([each | {"device": device} for each in found])
    if args.out:
        args.out.write_text(line + "\n")
    print(line)
    return None


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
