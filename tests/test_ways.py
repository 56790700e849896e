"""The ways to tune a model, which of them fit into a memory, and the settings that ask for the first that does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpt import page, settle, ways
from gpt.adapters import AdapterConfig
from gpt.config import load
from gpt.model import GPT, ModelConfig
from gpt.settle import TrainConfig

QWEN3 = {
    "vocab_size": 151936, "max_seq_len": 40960, "n_layer": 28, "d_model": 1024, "n_head": 16, "n_kv_head": 8, "head_dim": 128,
    "d_ff": 3072,
}  # fmt: skip
TINY = {"vocab_size": 64, "max_seq_len": 32, "n_layer": 1, "d_model": 32, "n_head": 2}
SMALL = """
name: small
data: {path: data/none, seq_len: 32}
train: {steps: 1, batch_tokens: 64}
"""


def planned(
    tmp_path: Path, shape: dict[str, int], room: float, *overrides: str, device: str = "cpu", dtype: str = "float32"
) -> dict[str, Any]:
    """What is printed: {"notes": sentences, "rows": the rows of the table, by what they vary}."""
    (tmp_path / "x.yaml").write_text(SMALL)
    config = load(TrainConfig, tmp_path / "x.yaml", list(overrides), {})
    model = ModelConfig(**shape)
    setting = replace(settle.setting(config, device, dtype), adapter=None)
    found = list(ways.blocks(config, model, setting, room))
    for block in found:
        page.draw(block, Console(quiet=True))
    (table,) = [block for block in found if isinstance(block, page.Table)]
    rows = {tuple(row[:4]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    return {"notes": [block.text for block in found if isinstance(block, page.Note)], "rows": rows}


def test_qwen3_of_0_6b_on_12_gb_is_answered(tmp_path: Path) -> None:
    plan = planned(tmp_path, QWEN3, 10.8e9, "data.seq_len=1024", device="cuda", dtype="bfloat16")
    total = {way: float(row["total GB"]) for way, row in plan["rows"].items()}
    assert len(total) == 4 + 16
    assert total["everything", "-", "none", "fp32"] > 12 > total["everything", "-", "full", "8bit"]
    assert all(n < 10.8 for way, n in total.items() if way[0] == "adapter")
    fitting = {way for way, row in plan["rows"].items() if row["fits"] == "yes"}
    assert fitting == {way for way, n in total.items() if n <= 10.8}
    everything, adapter = plan["notes"][-2:]
    assert everything == "everything fits: train.micro_batch=1 train.checkpointing=full optim.state=8bit adapter=null"
    assert adapter.startswith(
        "adapter fits: train.micro_batch=1 train.checkpointing=none optim.state=fp32 adapter.base"
    )


def test_the_settings_that_it_names_can_be_written(tmp_path: Path) -> None:
    for note in planned(tmp_path, TINY, 1e12)["notes"][-2:]:
        overrides = note.partition(": ")[2].split()
        assert "fits" in note
        assert load(TrainConfig, tmp_path / "x.yaml", overrides, {}).train.micro_batch == 1


def test_where_nothing_fits_the_least_is_said_and_muon_has_no_8_bit_state(tmp_path: Path) -> None:
    plan = planned(tmp_path, TINY, 1000, "optim.kind=muon")
    assert all(row["fits"] == "no" for row in plan["rows"].values())
    assert "everything does not fit: the least is 0.00 GB; lower data.seq_len or train.micro_batch" in plan["notes"]
    assert {way[3] for way in plan["rows"]} == {"fp32"}


def test_widths_that_int4_cannot_group_are_planned_without_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, TINY | {"d_model": 40}, 1e12, "optim.kind=muon")
    assert {way[1] for way in plan["rows"]} == {"-", "fp32", "bf16", "int8"}
    assert any("no base in int4" in note for note in plan["notes"])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the ways those that a test asks for, since each is gone through."""
    monkeypatch.setattr(ways, "BASES", ("bf16",))
    monkeypatch.setattr(ways, "KEPT", ("none",))


@pytest.mark.usefixtures("few")
def test_pairs_need_more_than_texts(tmp_path: Path) -> None:
    large = TINY | {"vocab_size": 8192, "d_model": 512, "n_head": 8, "max_seq_len": 256}
    totals = {
        kind: float(
            planned(tmp_path, large, 1e12, "data.seq_len=256", "optim.kind=muon", f"objective.kind={kind}")["rows"][
                "everything", "-", "none", "fp32"
            ]["total GB"]
        )
        for kind in ("next_token", "simpo", "dpo")
    }
    assert totals["next_token"] < totals["simpo"] < totals["dpo"]


@pytest.mark.usefixtures("few")
def test_the_run_s_own_adapter_is_planned(tmp_path: Path) -> None:
    wide = TINY | {"d_model": 1024, "n_head": 8}
    v = GPT(ModelConfig(**wide)).model.layers[0].self_attn.v_proj

    def gradients(*overrides: str) -> float:
        rows = planned(tmp_path, wide, 1e12, "optim.kind=muon", *overrides)["rows"]
        return float(rows["adapter", "bf16", "none", "fp32"]["gradients"])

    own = 4 * 1024 * (v.in_features + v.out_features) / 1e9
    assert gradients("adapter.rank=1024", "adapter.targets=[v_proj]") == pytest.approx(own, abs=0.006)
    assert gradients("adapter.rank=1024") > own
    assert AdapterConfig().targets == "all"
