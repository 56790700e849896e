"""How fast does a model write on the CPU? Ours against transformers' generate, and both against what the machine can do.

    python benchmarks/decode.py [--quick] [--pairs N] [--threads N] [--kv-heads G]

A Llama of GPT-2's 124M shape (12 layers of 768, 12 heads, SwiGLU of 2,048, 50,304 ids, the head tied), the same random weights
on both sides, bf16 where the CPU computes it: greedy decoding of 1 and of 64 rows, and reading a prompt of 1,000 tokens. A
step is the time of N tokens less that of one, over N - 1. First the ids of both sides are compared in fp32, where no tie
is to be expected, and then in bf16, as far as they agree. The machine's limits: bytes read, the faster of a streaming sum
and a packed matrix-vector product over as many bytes as the weights have, and the products of two matrices of 2,048.
Prints a table and, last, one JSON line. Sets OMP_WAIT_POLICY=PASSIVE for both.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpt import host, inference, probe, runtime
from gpt.generate import Sampling, generate
from gpt.model import GPT, ModelConfig, init_weights

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, CONTEXT = 50_304, 768, 2048, 12, 12, 2048
GREEDY = Sampling(temperature=0)


def pair(kv_heads: int) -> tuple[GPT, Any]:
    """Our model and theirs, with the same weights, fp32."""
    shape = {"n_layer": LAYERS, "d_model": WIDTH, "n_head": HEADS, "n_kv_head": kv_heads, "d_ff": HIDDEN}
    config = ModelConfig(vocab_size=VOCABULARY, max_seq_len=CONTEXT, qk_norm=False, tie_embeddings=True, **shape)
    ours = GPT(config)
    init_weights(ours, seed=1)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=CONTEXT,
            rms_norm_eps=config.norm_eps, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def we_write(model: GPT, prompts: torch.Tensor, n: int) -> list[list[int]]:
    columns = generate(
        model, prompts.tolist(), GREEDY, n, seed=0, n_tokens_valid=VOCABULARY, stop_ids=(), logprobs=False
    )
    return [list(row) for row in zip(*(column.ids for column in columns), strict=True)]


def they_write(model: Any, prompts: torch.Tensor, n: int) -> list[list[int]]:
    with torch.inference_mode():
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, do_sample=False, use_cache=True
        )
    return out[:, prompts.shape[1] :].tolist()


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def bandwidth(n_bytes: int) -> float:
    """Bytes read a second, the best of several ways."""
    floats = torch.rand(n_bytes // 4)
    rows = n_bytes // 2 // WIDTH
    weight = torch.randn(rows, WIDTH, dtype=torch.bfloat16)
    calls: list[Callable[[], object]] = [floats.sum]
    if not inference._unfit(torch.bfloat16):
        packed, x = inference.PackedLinear(weight, None), torch.randn(1, WIDTH, dtype=torch.bfloat16)
        calls.append(lambda: packed(x))
    with torch.inference_mode():
        return n_bytes / min(seconds(call) for call in calls for _ in range(12))


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """How much of the rows comes before the first token that differs."""
    shared = [
        next((i for i, (x, y) in enumerate(zip(*rows, strict=True)) if x != y), len(rows[0]))
        for rows in zip(a, b, strict=True)
    ]
    return sum(shared) / sum(map(len, a))


def flops(n_tokens: int, kv_heads: int) -> float:
    """Of reading a prompt: products with the blocks' matrices, causal attention, and the head once."""
    head = WIDTH // HEADS
    matrices = LAYERS * (WIDTH * head * (2 * HEADS + 2 * kv_heads) + 3 * WIDTH * HIDDEN)
    return 2 * n_tokens * matrices + LAYERS * 4 * WIDTH * n_tokens * (n_tokens + 1) / 2 + 2 * WIDTH * VOCABULARY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs and few tokens: within a minute")
    parser.add_argument("--pairs", type=int, help="rounds of both sides in turn (5; --quick: 2)")
    parser.add_argument("--threads", type=int, default=host.n_cores(), help="threads of both sides (all cores)")
    parser.add_argument("--kv-heads", type=int, default=HEADS, help="key/value heads (12)")
    args = parser.parse_args()
    pairs = args.pairs or (2 if args.quick else 5)
    runtime.setup("cpu", args.threads)
    ours, theirs = pair(args.kv_heads)
    matrices = sum(p.numel() for p in ours.parameters() if p.dim() > 1)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(VOCABULARY, (64, 32), generator=generator)
    long = torch.randint(VOCABULARY, (1, 1000), generator=generator)
    n_same = 8 if args.quick else 24
    same = agreement(we_write(ours, prompts[:4], n_same), they_write(theirs, prompts[:4], n_same))
    how = inference.ready(ours, "cpu")
    dtype = ours.model.embed_tokens.weight.dtype
    theirs.to(dtype)
    read, rate = bandwidth(matrices * dtype.itemsize), probe.matmul_rate("cpu", str(dtype)[6:])
    print(f"{how}; transformers in {str(dtype)[6:]}; {args.threads} threads; load {os.getloadavg()[0]:.1f}")
    print(f"the machine: {read / 1e9:.1f} GB/s read, {rate / 1e9:.0f} GFLOP/s; same ids in fp32: {same:.0%}")
    n = 16 if args.quick else 48
    few = n // 2
    cases: list[tuple[str, torch.Tensor, int, str]] = [
        ("decode, 1 row", prompts[:1], n, "tokens/s"),
        ("decode, 64 rows", prompts, few, "tokens/s"),
        ("prefill, 1,000 tokens", long, 1, "tokens/s"),
    ]
    results = []
    print(f"{'':24}{'ours':>10}{'theirs':>10}{'ratio':>8}{'limit':>8}{'ids':>7}   tokens/s; medians of {pairs} pairs")
    for case, given, n_tokens, unit in cases:
        taken: list[list[float]] = [[], []]
        agreed = agreement(we_write(ours, given, n_tokens), they_write(theirs, given, n_tokens))
        for turn in range(pairs):
            sides: list[tuple[int, Callable[[int], object]]] = [
                (0, lambda n, given=given: we_write(ours, given, n)),
                (1, lambda n, given=given: they_write(theirs, given, n)),
            ]
            for side, write in sides if turn % 2 == 0 else sides[::-1]:
                whole = seconds(lambda: write(n_tokens))  # noqa: B023
                first = seconds(lambda: write(1)) if n_tokens > 1 else 0.0  # noqa: B023
                taken[side].append((whole - first) / max(1, n_tokens - 1))
        mine, peer = (statistics.median(times) for times in taken)
        ratio = statistics.median(t / m for m, t in zip(*taken, strict=True))
        if n_tokens == 1:
            share, count = flops(given.shape[1], args.kv_heads) / mine / rate, given.shape[1]
        else:
            count = len(given)
            share = max(matrices * dtype.itemsize / mine / read, 2 * matrices * count / mine / rate)
        print(f"{case:24}{count / mine:10.1f}{count / peer:10.1f}{ratio:8.2f}{share:8.0%}{agreed:7.0%}", flush=True)
        results.append({
            "case": case, "ours": round(count / mine, 1), "peer": round(count / peer, 1), "peer_name": "transformers",
            "unit": unit, "ratio": round(ratio, 3), "limit_share": round(share, 3),
        })  # fmt: skip
    print(f"load {os.getloadavg()[0]:.1f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
