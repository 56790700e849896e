"""A run of a second on characters: settings, a set as nanoGPT prepares them, and what the run says."""

import io
import json
import random
from pathlib import Path

import numpy as np
from rich.console import Console

from gpt import config
from gpt.trainer import TrainConfig, train

SETTINGS = """
name: tiny
data: {path: data/cats, seq_len: 16}
model: {n_layer: 1, d_model: 16, n_head: 2, dropout: 0.1}
train: {steps: 12, batch_tokens: 64, micro_batch: 4, compile: false, threads: 1, device: cpu, dtype: float32}
optim: {kind: adamw, lr: 0.01}
schedule: {kind: wsd, warmup: 2, decay: 4}
eval: {every: 6, tokens: 100}
checkpoint: {every: 4, keep: 9}
log: {every: 1}
"""


def write_characters(path: Path, seed: int) -> None:
    """A set as nanoGPT prepares characters."""
    path.mkdir(parents=True)
    stoi = {c: i for i, c in enumerate(" .\nabcdefghijklmnopqrstuvwxyz")}
    (path / "meta.json").write_text(json.dumps({"vocab_size": len(stoi), "stoi": stoi}))
    draw = random.Random(seed)
    for split, n in (("train", 300), ("val", 60)):
        text = " ".join(draw.choices(["the cat", "a dog", "sees", "hears", "my bird"], k=n)) + ".\n"
        (path / f"{split}.bin").write_bytes(np.array([stoi[c] for c in text], "<u2").tobytes())


def settings(*overrides: str) -> TrainConfig:
    return config.load(TrainConfig, Path("tiny.yaml"), overrides)


def trained(*overrides: str, **how: object) -> str:
    """What a run says."""
    console = Console(record=True, file=io.StringIO(), width=250)
    train(settings(*overrides), console=console, **how)  # type: ignore[arg-type]
    return console.export_text()


def weights(name: str, step: int) -> bytes:
    return Path("runs", name, "checkpoints", f"step_{step:08d}", "model.safetensors").read_bytes()
