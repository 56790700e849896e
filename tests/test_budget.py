"""--plan: the ways to train a model, which of them fit into a memory, and the settings that ask for the first that does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpt import budget, hf, page
from gpt.adapters import AdapterConfig
from gpt.checkpoint import serialize
from gpt.config import load
from gpt.model import GPT, ModelConfig
from gpt.settle import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
QWEN3 = """
name: qwen
data: {path: data/none, seq_len: 1024}
model: {vocab_size: 151936, max_seq_len: 40960, n_layer: 28, d_model: 1024, n_head: 16, n_kv_head: 8, head_dim: 128, d_ff: 3072}
train: {steps: 100, batch_tokens: 16384, micro_batch: 1, device: cuda}
"""
SMALL = """
name: small
data: {path: data/none, seq_len: 32}
model: {vocab_size: 64, n_layer: 2, d_model: 32, n_head: 2}
train: {steps: 1, batch_tokens: 64, device: cpu, dtype: float32}
"""


def planned(tmp_path: Path, text: str, size: float | None, *overrides: str) -> dict[str, Any]:
    """What is printed: {"notes": sentences, "rows": the rows of the second table, by what they vary}."""
    (tmp_path / "x.yaml").write_text(text)
    config = load(TrainConfig, tmp_path / "x.yaml", list(overrides), {})
    blocks = list(budget.blocks(config, None if size is None else int(size)))
    tables = [block for block in blocks if isinstance(block, page.Table)]
    for block in blocks:
        page.draw(block, Console(quiet=True))
    rows = {tuple(row[:4]): dict(zip(tables[1].columns, row, strict=True)) for row in tables[1].rows}
    notes = [block.text for block in blocks if isinstance(block, page.Note)]
    return {"notes": notes, "rows": rows, "parameters": dict(tables[0].rows)}


def test_qwen3_of_0_6b_on_12_gb_is_answered(tmp_path: Path) -> None:
    plan = planned(tmp_path, QWEN3, 12e9)
    total = {way: float(row["total GB"]) for way, row in plan["rows"].items()}
    assert len(total) == 4 + 16
    assert sum(int(n.replace(",", "")) for part, n in plan["parameters"].items() if part != "adapter") == 596_049_920
    assert total["everything", "-", "none", "fp32"] > 12 > total["everything", "-", "full", "8bit"]
    assert all(n < 10.8 for way, n in total.items() if way[0] == "adapter")
    assert {way for way, row in plan["rows"].items() if row["fits"] == "yes"} == {
        way for way, n in total.items() if n <= 10.8
    }
    everything, adapter = plan["notes"][-2:]
    assert everything == "everything fits: train.micro_batch=1 train.checkpointing=full optim.state=8bit adapter=null"
    assert adapter.startswith(
        "adapter fits: train.micro_batch=1 train.checkpointing=none optim.state=fp32 adapter.base"
    )


def test_the_settings_that_it_names_can_be_written(tmp_path: Path) -> None:
    for note in planned(tmp_path, SMALL, 1e12)["notes"][-2:]:
        overrides = note.partition(": ")[2].split()
        assert "fits" in note
        assert load(TrainConfig, tmp_path / "x.yaml", overrides, {}).train.micro_batch == 1


def test_where_nothing_fits_the_least_is_said(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL, 1000)
    assert all(row["fits"] == "no" for row in plan["rows"].values())
    assert "everything does not fit: the least is 0.00 GB; lower data.seq_len or train.micro_batch" in plan["notes"]


def test_widths_that_int4_cannot_group_are_planned_without_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, SMALL, 1e12, "model.d_model=40")
    assert {way[1] for way in plan["rows"]} == {"-", "fp32", "bf16", "int8"}
    assert any("no base in int4" in note for note in plan["notes"])
    assert {way[1] for way in planned(tmp_path, SMALL, 1e12)["rows"]} == {"-", "fp32", "bf16", "int8", "int4"}


def test_pairs_need_more_than_texts(tmp_path: Path) -> None:
    large = (
        "model.vocab_size=8192",
        "model.d_model=512",
        "model.n_head=8",
        "model.max_seq_len=256",
        "data.seq_len=256",
    )
    totals = {
        kind: float(planned(tmp_path, SMALL, 1e12, *large, f"objective.kind={kind}")["rows"][way]["total GB"])
        for kind in ("next_token", "simpo", "dpo")
        for way in [("everything", "-", "none", "fp32")]
    }
    assert totals["next_token"] < totals["simpo"] < totals["dpo"]


def test_muon_has_no_8_bit_state(tmp_path: Path) -> None:
    assert {way[3] for way in planned(tmp_path, SMALL, 1e12, "optim.kind=muon")["rows"]} == {"fp32"}


def test_the_run_s_own_adapter_is_planned(tmp_path: Path) -> None:
    model = GPT(ModelConfig(vocab_size=64, max_seq_len=32, n_layer=2, d_model=32, n_head=2))
    v = model.model.layers[0].self_attn.v_proj
    plan = planned(tmp_path, SMALL, 1e12, "adapter.rank=4", "adapter.targets=[v_proj]")
    assert plan["parameters"]["adapter"] == f"{2 * 4 * (v.in_features + v.out_features)}"
    assert planned(tmp_path, SMALL, 1e12)["parameters"]["adapter"] != plan["parameters"]["adapter"]
    assert AdapterConfig().targets == "all"


def test_of_init_from_only_the_settings_and_headers_are_read(tmp_path: Path) -> None:
    """A weight that is not finite would be refused by anything that reads it."""
    shape = ModelConfig(vocab_size=64, max_seq_len=32, n_layer=2, d_model=32, n_head=2)
    model = GPT(shape)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    source = tmp_path / "source"
    source.mkdir()
    files = hf.to_disk(shape, model.state_dict())
    (source / "model.safetensors").write_bytes(b"".join(serialize(files, {})))
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 64,
        "max_position_embeddings": 32,
    }
    raw |= {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    raw |= {
        "intermediate_size": shape.d_hidden,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (source / "config.json").write_text(json.dumps(raw))
    text = SMALL.replace("model: {vocab_size: 64, n_layer: 2, d_model: 32, n_head: 2}", f"init_from: {source}")
    plan = planned(tmp_path, text, 1e12)
    assert f"{len(files)} tensors" in plan["notes"][0]
    assert sum(int(n.replace(",", "")) for part, n in plan["parameters"].items() if part != "adapter") == sum(
        p.numel() for p in model.parameters()
    )


def test_without_data_or_a_vocabulary_it_is_said_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/none.*before the data is prepared, set model\.vocab_size=N"):
        planned(tmp_path, SMALL.replace("vocab_size: 64, ", ""), 1e12)


def test_a_machine_that_is_not_here_needs_its_memory_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:7' is not available here.*say its memory: --memory 12GB"):
        planned(tmp_path, SMALL, None, "train.device=cuda:7")
    assert planned(tmp_path, SMALL, None)["rows"]


def test_rows_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len \(32\) exceeds the model's context \(16\)"):
        planned(tmp_path, SMALL, 1e12, "model.max_seq_len=16")


def test_the_command_prints_it_and_trains_nothing(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    command = [sys.executable, str(ROOT / "train.py"), "small.yaml", "--plan"]
    done = subprocess.run([*command, "--memory", "1GB"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "everything fits: train.micro_batch=1 train.checkpointing=none optim.state=fp32" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]
    wrong = subprocess.run([*command, "--memory", "a lot"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "'a lot' is no size of a memory" in wrong.stderr
    alone = subprocess.run([*command[:-1], "--memory", "1GB"], cwd=tmp_path, capture_output=True, text=True)
    assert alone.returncode == 2 and "say --plan too" in alone.stderr
