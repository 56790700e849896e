"""trl computes the same losses and gradients: of chats (assistant turns only) and of pairs, however a batch is accumulated."""

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_preferences import Pair, data_config, drawn, opened, write

from gpt import hf, settle
from gpt.data import Loader
from gpt.loss import NextToken, Objective, ObjectiveConfig
from gpt.model import GPT, ModelConfig, init_weights
from gpt.optim import Optimizer
from gpt.plan import Choices
from gpt.settle import TrainConfig
from gpt.trainer import update

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # they are of the peer
N = 8  # pairs, or conversations, of a batch
SHAPE = {"vocab_size": 64, "max_seq_len": 64, "n_layer": 2, "d_model": 32, "n_head": 4, "init_std": 0.3}


def made(seed: int) -> GPT:
    model = GPT(ModelConfig(**SHAPE))
    init_weights(model, seed)
    return model


def theirs(model: GPT, path: Path) -> Any:
    """The same model as transformers reads it."""
    from safetensors.torch import save_file

    path.mkdir()
    raw = hf.model_files(model.config, _Nobody())["config.json"]
    (path / "config.json").write_bytes(raw)
    state = {name: tensor.clone() for name, tensor in hf.to_disk(model.config, model.state_dict()).items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
