"""How fast is tuning on this machine, and in how much memory? Everything, and LoRA, against transformers' Trainer and peft.

    python benchmarks/finetune.py [--quick] [--rounds N] [--dir DIRECTORY]

Makes a GPT-2 of 124M random weights as a Hugging Face directory and a data set of the standard library's text, then tunes
it by train.py and by Trainer (with peft for LoRA), the sides in turn, each a process of its own on the same number of rows
of the same length: tokens per second after the first two steps, and the process's peak of resident memory, imports
included. Trainer runs as it is by default (fp32) and with bf16=True. Needs transformers, accelerate and peft. Prints a
table and, last, one JSON line.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANK = 8
SIDES = ("everything, ours", "everything, Trainer fp32", "everything, Trainer bf16", "LoRA, ours", "LoRA, peft fp32",
         "LoRA, peft bf16")  # fmt: skip


def make(directory: Path, quick: bool) -> None:
    """The data set and the model, of its tokenizer and GPT-2's vocabulary size."""
    import torch

    from gpt import checkpoint, hf
    from gpt.model import GPT, ModelConfig, init_weights
    from gpt.tokenizer import Tokenizer

    prepare = [sys.executable, str(ROOT / "data" / "prepare.py"), str(ROOT / "data" / "quickstart.yaml")]
    subprocess.run([*prepare, "--out", str(directory / "data")], check=True, stdout=subprocess.DEVNULL)
    n_layer, d_model = (2, 256) if quick else (12, 768)
    shape = ModelConfig(
        vocab_size=8_192 if quick else 50_257, max_seq_len=1024, n_layer=n_layer, d_model=d_model, n_head=d_model // 64,
        position="learned", norm="layernorm", mlp="gelu_tanh", attention_bias=True, mlp_bias=True, qk_norm=False,
    )  # fmt: skip
    with torch.device("cpu"):
        model = GPT(shape)
    init_weights(model, 1)
    (directory / "model").mkdir()
    for name, data in hf.model_files(shape, Tokenizer.load(directory / "data")).items():
        (directory / "model" / name).write_bytes(data)
    weights = hf.to_disk(shape, model.state_dict())
    with (directory / "model" / "model.safetensors").open("wb") as file:
        file.writelines(checkpoint.serialize(weights, {"format": "pt"}))


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def ours(directory: Path, adapter: bool, rows: int, seq_len: int, steps: int) -> dict[str, float]:
    from rich.console import Console

    from gpt import config
    from gpt.trainer import TrainConfig, train

    name = f"run-{os.getpid()}"
    raw = [
        f"name={name}", f"init_from={directory / 'model'}", f"data.path={directory / 'data'}", f"data.seq_len={seq_len}",
        f"train.steps={steps}", f"train.batch_tokens={rows * seq_len}", "train.compile=false", "optim.kind=adamw",
        "optim.lr=1e-4", "log.every=1", f"log.sample_every={10**9}", f"eval.every={10**9}", "eval.tokens=1",
        f"checkpoint.every={10**9}",
    ]  # fmt: skip
    if adapter:
        raw.append(f"adapter={{rank: {RANK}, alpha: {2 * RANK}, targets: all}}")
    os.chdir(directory)
    train(config.load(TrainConfig, None, raw), console=Console(quiet=True))
    lines = map(json.loads, (directory / "runs" / name / "metrics.jsonl").read_text().splitlines())
    rates = [line["tokens_per_second"] for line in lines if line["kind"] == "train" and line["step"] > 2]
    saved = directory / "runs" / name / "checkpoints" / f"step_{steps:08d}"
    kept = saved / ("adapter_model.safetensors" if adapter else "model.safetensors")
    share = kept.stat().st_size / (directory / "model" / "model.safetensors").stat().st_size
    return {"rate": statistics.median(rates), "peak": peak_bytes(), "share": share}


def peer(directory: Path, adapter: bool, rows: int, seq_len: int, steps: int, bf16: bool) -> dict[str, float]:
    import torch
    import transformers

    from gpt.shards import TokenSet

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    ids = torch.from_numpy(TokenSet(directory / "data", "train").read(0, rows * seq_len * steps).astype("int64"))
    examples = [{"input_ids": row, "labels": row} for row in ids.view(-1, seq_len)]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    if adapter:
        import peft

        targets = ["c_attn", "c_proj", "c_fc"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, fan_in_fan_out=True)
        )
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=str(directory / "trainer"), per_device_train_batch_size=rows, max_steps=steps, use_cpu=True, bf16=bf16,
        learning_rate=1e-4, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Clock()]).train()
    seconds = [after - before for before, after in itertools.pairwise(ends[1:])]
    return {"rate": rows * seq_len / statistics.median(seconds), "peak": peak_bytes(), "share": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, one round: within a minute or two")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs (3)")
    parser.add_argument("--dir", type=Path, help="where model, data and runs are made (a temporary directory)")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows, seq_len, steps = (2, 128, 6) if args.quick else (4, 512, 7)
    if args.side is not None:
        side, directory = SIDES[int(args.side[0])], Path(args.side[1])
        adapter = side.startswith("LoRA")
        if side.endswith("ours"):
            print(json.dumps(ours(directory, adapter, rows, seq_len, steps)))
        else:
            print(json.dumps(peer(directory, adapter, rows, seq_len, steps, side.endswith("bf16"))))
        return
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        make(Path(scratch), args.quick)
        for _ in range(1 if args.quick else args.rounds):
            for number, side in enumerate(SIDES):
                command = [sys.executable, __file__, *["--quick"] * args.quick, "--side", str(number), scratch]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                taken[side].append(json.loads(done.stdout.splitlines()[-1]))
    report(taken)


def report(taken: dict[str, list[dict[str, float]]]) -> None:
    rates = {side: statistics.median(each["rate"] for each in runs) for side, runs in taken.items()}
    peaks = {side: statistics.median(each["peak"] for each in runs) for side, runs in taken.items()}
    print(f"{'':<28}{'tokens/s':>10}{'ours / it':>11}{'peak MB':>10}{'ours / it':>11}")
    results = []
    for side in SIDES:
        what = side.split(",")[0]
        mine = f"{what}, ours"
        speed, memory = rates[mine] / rates[side], peaks[mine] / peaks[side]
        print(f"{side:<28}{rates[side]:>10.0f}{speed:>11.2f}{peaks[side] / 1e6:>10.0f}{memory:>11.2f}")
        if side != mine:
            name = side.split(", ")[1]
            results.append(entry(f"{what}: speed", rates[mine], rates[side], name, "tokens/s", speed))
            results.append(entry(f"{what}: peak memory", peaks[mine], peaks[side], name, "bytes", memory))
    share = taken["LoRA, ours"][0]["share"]
    print(f"the adapter is {share:.2%} of the base on disk")
    print(json.dumps([*results, entry("adapter on disk", share, 1.0, "the base", "share", share)]))


def entry(case: str, ours: float, peer: float, name: str, unit: str, ratio: float) -> dict[str, object]:
    return {
        "case": case, "ours": round(ours, 4), "peer": round(peer, 4), "peer_name": name, "unit": unit,
        "ratio": round(ratio, 4), "limit_share": None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
