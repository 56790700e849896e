"""--plan: work, memory, time and disk of a run before there is one, here or elsewhere, and what is unwise in its settings."""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny import settings, trained, write_characters

from gpt import budget, hf, host, memory, page, plan, probe, runtime, settle, speed, ways
from gpt.checkpoint import serialize
from gpt.config import load
from gpt.model import GPT, ModelConfig
from gpt.probe import Rates
from gpt.settle import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = """
name: small
data: {path: data/none, seq_len: 32}
model: {vocab_size: 64, n_layer: 2, d_model: 32, n_head: 2}
train: {steps: 10, batch_tokens: 64, device: cpu, dtype: float32, threads: 1}
"""
LLAMA_70B = [
    "model.vocab_size=128256", "model.n_layer=80", "model.d_model=8192", "model.n_head=64", "model.n_kv_head=8",
    "model.d_ff=28672", "model.tie_embeddings=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not measured anew for each test, and is left as it was."""
    monkeypatch.setattr(probe, "measured", lambda device, dtype: Rates(1e12, 1e10, 1e-6))
    monkeypatch.setattr(speed, "with_asking", lambda rates, dtype: rates)
    monkeypatch.setattr(probe, "BUDGET_S", 0.0)
    monkeypatch.setattr(runtime, "setup", lambda device, threads: None)


def blocks(tmp_path: Path, text: str, *overrides: str, **how: Any) -> list[page.Block]:
    (tmp_path / "x.yaml").write_text(text)
    found = list(budget.blocks(load(TrainConfig, tmp_path / "x.yaml", list(overrides), {}), **how))
    for block in found:
        page.draw(block, Console(quiet=True))
    return found


def planned(tmp_path: Path, text: str, *overrides: str, **how: Any) -> dict[str, str]:
    """What is planned, by what: the rows of two cells of all tables."""
    found = blocks(tmp_path, text, *overrides, **how)
    return {row[0]: row[1] for block in found if isinstance(block, page.Table) for row in block.rows if len(row) == 2}


def notes(tmp_path: Path, text: str, *overrides: str, **how: Any) -> list[str]:
    return [block.text for block in blocks(tmp_path, text, *overrides, **how) if isinstance(block, page.Note)]


def number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


# Work


def test_parameters_and_arithmetic_are_those_of_the_model(tmp_path: Path) -> None:
    told = planned(tmp_path, SMALL)
    model = GPT(ModelConfig(vocab_size=64, max_seq_len=32, n_layer=2, d_model=32, n_head=2))
    parts = ("embeddings", "head", "norms", "attention", "MLP")
    assert sum(number(told[part]) for part in parts if part in told) == plan.n_parameters(model)
    assert number(told["FLOPs a token, forward and backward"]) == pytest.approx(
        plan.flops_per_token(model, 32) / 1e9, abs=1e-3
    )
    assert told["tokens in all"].startswith(f"640 ({640 / plan.n_parameters(model):.1f} a parameter)")


def test_epochs_of_each_source_are_told_where_the_data_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("cats", "dogs")):
        write_characters(Path("data", name), seed)
    sizes = {name: np.fromfile(f"data/{name}/train.bin", "<u2").size for name in ("cats", "dogs")}
    mixed = SMALL.replace("path: data/none", "mixture: {data/cats: 0.75, data/dogs: 0.25}")
    told = planned(tmp_path, mixed, "train.steps=1000")
    for name, share in (("cats", 0.75), ("dogs", 0.25)):
        assert number(told[f"epochs of data/{name}"]) == pytest.approx(64_000 * share / sizes[name], rel=0.05)
    assert "not prepared" not in str(told)
    assert planned(tmp_path, SMALL)["epochs"] == "not known: data/none are not prepared"


def test_a_time_budget_is_turned_into_updates_by_the_time_of_one(tmp_path: Path) -> None:
    timed = SMALL.replace("steps: 10", "time: 1h")
    told = planned(tmp_path, timed)
    seconds = number(told["an update"])
    assert number(told["updates"]) == pytest.approx(3600 / (seconds + plan.save_s(1) / 250), rel=0.5)
    assert told["the run"].startswith(("59:", "1:00:00"))


# Memory


def test_the_micro_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    shape = ("train.batch_tokens=2048", "model.d_model=256", "model.n_layer=4")

    def rows(size: float) -> str:
        return notes(tmp_path, SMALL, *shape, card="h100", size=int(size))[-1].partition("train.micro_batch=")[2]

    assert rows(80e9) == "64"
    told = {size: int(rows(size)) for size in (100e6, 80e6, 70e6)}
    model = ModelConfig(vocab_size=64, max_seq_len=32, n_layer=4, d_model=256, n_head=2)
    config = load(TrainConfig, tmp_path / "x.yaml", list(shape), {})
    for size, fitted in told.items():
        totals = {
            n: memory.need(model, settle.setting(config, "cuda", "float32", n)).total for n in (fitted, 2 * fitted)
        }
        assert totals[fitted] <= 0.9 * size < totals[2 * fitted] * 1.02, (size, fitted, totals)
    assert list(told.values()) == sorted(told.values(), reverse=True)


def test_what_does_not_fit_is_said_with_what_to_set(tmp_path: Path) -> None:
    (warning,) = [note for note in notes(tmp_path, SMALL, size=1000) if "does not fit" in note]
    assert "smaller data.seq_len, train.checkpointing=full, or a smaller model" in warning


def test_a_process_is_counted_where_memory_is_the_machine_s(tmp_path: Path) -> None:
    here, there = planned(tmp_path, SMALL), planned(tmp_path, SMALL, card="h100")
    assert number(here["the process itself"]) > 0.1 and "the process itself" not in there


def test_memory_that_is_said_holds_the_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "resident_bytes", lambda: 300 << 20)  # the same at each of three times
    told = planned(tmp_path, SMALL)
    most = number(told["at most"])
    assert planned(tmp_path, SMALL, size=int(2 * most * 1e9))["fits"].startswith("yes")
    assert planned(tmp_path, SMALL, size=int(0.9 * most * 1e9))["fits"].startswith("no")


# Machines that are not here


def test_70_billion_parameters_on_1024_devices_are_planned_in_seconds(tmp_path: Path) -> None:
    start = time.thread_time()  # the machine may do other work too
    text = (ROOT / "configs" / "llama_1b.yaml").read_text()
    found = blocks(tmp_path, text + "\nname: large\n", *LLAMA_70B, card="h100", devices=1024)
    assert time.thread_time() - start < 30
    (ways,) = [block for block in found if isinstance(block, page.Table) and block.columns[0] == "replicate"]
    assert ways.rows
    for row in ways.rows:
        replicate, shard, tensor, rows = map(int, row[:4])
        assert replicate * shard * tensor == 1024 and 512 % (replicate * shard * rows) == 0
        assert 10 < float(row[4]) <= 72, "of 80 GB a tenth is left"
    settings = found[-1].text.partition(": ")[2].split()  # type: ignore[union-attr]
    config = load(TrainConfig, tmp_path / "x.yaml", [*LLAMA_70B, *settings], {})
    assert [getattr(config.parallel, axis) for axis in ("replicate", "shard", "tensor")] == [
        int(n) for n in ways.rows[0][:3]
    ]


def test_the_sizes_that_are_set_are_planned_with_or_refused(tmp_path: Path) -> None:
    rows = ("train.batch_tokens=2048",)
    found = notes(tmp_path, SMALL, *rows, "parallel.shard=4", card="a100", devices=8)
    assert "parallel.replicate=2 parallel.shard=4 parallel.tensor=1" in found[-1]
    with pytest.raises(
        ValueError, match=r"parallel \(replicate 8 x shard 1 x tensor 1\) does not fit 8 x A100.*leave the sizes"
    ):
        blocks(tmp_path, SMALL, *rows, "parallel.shard=1", card="a100", devices=8, size=1000)
    with pytest.raises(ValueError, match=r"12 rows, which 8 ranks"):
        blocks(tmp_path, SMALL, "train.batch_tokens=384", "parallel.replicate=8", card="a100", devices=8)
    with pytest.raises(ValueError, match=r"no division of 64 rows among 8 x A100.* set train.checkpointing=full"):
        blocks(tmp_path, SMALL, *rows, card="a100", devices=8, size=1000)


def test_only_what_a_run_takes_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "train.batch_tokens=2048"
    eight = {"card": "a100", "devices": 8}
    found = notes(tmp_path, SMALL, rows, "train.micro_batch=2", **eight)
    assert "train.micro_batch=2" in found[-1]
    narrow = ("optim.state=8bit", "model.d_model=64")
    ways = [block for block in blocks(tmp_path, SMALL, rows, *narrow, **eight) if isinstance(block, page.Table)]
    (divisions,) = [block for block in ways if block.columns[0] == "replicate"]
    assert [row[:3] for row in divisions.rows] == [("8", "1", "1")]
    with pytest.raises(ValueError, match="8bit is of whole matrices"):
        blocks(tmp_path, SMALL, rows, *narrow, "parallel.shard=8", **eight)


def test_a_gpu_that_is_not_here_is_planned_with_the_memory_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with one GPU the eighth is as absent as on one with none."""
    monkeypatch.setattr(runtime, "best_device", lambda: ("cuda", "a GPU"))
    told = planned(tmp_path, SMALL, "train.device=cuda:7", "train.dtype=auto", size=int(1e9))
    assert told["fits"].startswith("yes")


def test_devices_need_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to plan for 8 devices, say which they are: --device h100 --devices 8"):
        blocks(tmp_path, SMALL, devices=8)
    with pytest.raises(ValueError, match="'abacus' is no machine known here"):
        blocks(tmp_path, SMALL, card="abacus")


def test_a_machine_that_is_not_here_needs_its_name_or_its_memory_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device 'cuda:7' is not available here.*--device h100, --memory 12GB"):
        blocks(tmp_path, SMALL, "train.device=cuda:7")
    told = planned(tmp_path, SMALL, "train.device=cuda:7", size=12_000_000_000)
    assert told["time"] == "not known: name the machine, --device h100" and "an update" not in told


# Disk


def test_a_checkpoint_is_as_large_as_one_that_is_written(here: Path) -> None:
    wide = ("train.steps=1", "model.d_model=256", "model.n_layer=2", "optim.kind=muon")
    trained(*wide)
    n_bytes = sum(file.stat().st_size for file in Path("runs/tiny/checkpoints/step_00000001").iterdir())
    told = {
        row[0]: row[1]
        for block in budget.blocks(settings(*wide))
        if isinstance(block, page.Table)
        for row in block.rows
        if len(row) == 2
    }
    assert number(told["a checkpoint"]) == pytest.approx(n_bytes / 1e9, abs=0.006)
    assert number(told["the disk"]) == pytest.approx(11 * n_bytes / 1e9, abs=0.06)


# Warnings


def warned(tmp_path: Path, *overrides: str) -> list[str]:
    text = SMALL.replace("steps: 10", "steps: 2000")
    return [note for note in notes(tmp_path, text, *overrides, card="h100") if note.startswith("warning")]


def test_a_batch_that_is_small_for_muon_is_warned_of_and_the_one_that_it_names_is_not(tmp_path: Path) -> None:
    wide = ("model.d_model=512", "optim.kind=muon", "train.steps=null", "train.tokens=100M")
    (warning,) = [each for each in warned(tmp_path, *wide) if "Muon" in each]
    assert "train.batch_tokens" in warning and "optim.kind=adamw" in warning
    text = warning.partition("set train.batch_tokens to ")[2].split()[0]
    least = int(float(text.removesuffix("k")) * (1000 if text.endswith("k") else 1) * 1.1) // 32 * 32
    assert not [each for each in warned(tmp_path, *wide, f"train.batch_tokens={least}") if "Muon" in each]
    assert [each for each in warned(tmp_path, *wide, f"train.batch_tokens={least // 64 * 32}") if "Muon" in each]
    assert not [each for each in warned(tmp_path, "model.d_model=512") if "Muon" in each]


@pytest.mark.parametrize("name", ["quickstart", "tang_poems_cpu", "tinyshakespeare_cpu", "papers/default"])
def test_the_recipes_are_not_warned_of_what_they_were_measured_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    found = notes(tmp_path, text, "name=x", "model.vocab_size=8192", card="h100")
    assert not [each for each in found if "Muon" in each]


def test_a_disk_that_is_too_small_is_warned_of_whatever_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "x.yaml").write_text(SMALL)
    found = budget.facts(load(TrainConfig, tmp_path / "x.yaml", ["train.device=cpu"], {}))

    def told(found: budget.Facts) -> list[str]:
        return [each for each in budget._warnings(found) if "GB are free: lower checkpoint.keep" in each]

    assert told(found) and told(replace(found, target=replace(found.target, device="cuda")))
    assert not told(replace(found, target=replace(found.target, device="cuda", rates=None))), "a GPU that is not here"
    assert not [each for each in warned(tmp_path) if "GB are free" in each], "another machine has another disk"


def test_a_budget_of_time_counts_the_last_evaluation_and_the_first_of_tuning(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(SMALL)
    config = load(TrainConfig, tmp_path / "x.yaml", [], {})
    tuned = config.model_copy(update={"init_from": "runs/y"})
    batch = config.train.batch_tokens
    save = plan.save_s(1000)
    assert settle.once_s(config, 30 * batch, 1000, 0.5) == pytest.approx(5 + save)
    assert settle.once_s(tuned, 30 * batch, 1000, 0.5) == pytest.approx(10 + save)
    timed = ["train.steps=null", "train.time=1000s", "eval.every=1000000000000", "checkpoint.every=1000000000000"]
    card = {"card": "h100"}
    few, many = (budget.facts(load(TrainConfig, tmp_path / "x.yaml", timed, {}), **card) for _ in range(2))
    vars(many)["evaluated"] = 3 * int(500 / many.way.update_s) * batch
    assert many.once_s == pytest.approx(500, rel=0.01) and many.steps == pytest.approx(few.steps / 2, rel=0.01)
    (hours,) = (cell[1] for cell in budget._time(many) if cell[0] == "the run")
    assert hours.startswith("16:40")


def test_repetition_and_little_validation_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_characters(Path("data/none"), 1)
    size = np.fromfile("data/none/train.bin", "<u2").size
    for times, expected in ((3.5, False), (4.5, True)):
        found = warned(tmp_path, f"train.steps={int(times * size / 64)}")
        assert bool([each for each in found if "past 4 repetition" in each]) is expected
    assert [each for each in warned(tmp_path) if "an evaluation is a mean over" in each and "val_fraction" in each]
    monkeypatch.setattr(budget, "FEW_TARGETS", 10)
    assert not [each for each in warned(tmp_path) if "an evaluation is a mean over" in each]


@pytest.mark.parametrize(("per_parameter", "word"), [(2, "smaller model"), (20, None), (1000, "larger model")])
def test_tokens_far_from_the_parameters_are_warned_of(tmp_path: Path, per_parameter: int, word: str | None) -> None:
    n = plan.n_parameters(GPT(ModelConfig(vocab_size=64, max_seq_len=32, n_layer=2, d_model=32, n_head=2)))
    found = [
        each for each in warned(tmp_path, f"train.steps={per_parameter * n // 64}") if "tokens a parameter" in each
    ]
    assert [word in each for each in found if word] == ([True] if word else [])


def test_a_model_of_embeddings_is_warned_of(tmp_path: Path) -> None:
    assert [each for each in warned(tmp_path, "model.vocab_size=8192") if "of the parameters are embeddings" in each]
    assert not [each for each in warned(tmp_path) if "embeddings" in each]


# Models that are there


def test_of_init_from_only_the_settings_and_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is not finite would be refused by anything that reads it."""
    monkeypatch.setattr(ways, "BASES", ("fp32",))
    shape = ModelConfig(vocab_size=64, max_seq_len=32, n_layer=2, d_model=32, n_head=2)
    model = GPT(shape)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    source = tmp_path / "source"
    source.mkdir()
    files = hf.to_disk(shape, model.state_dict())
    (source / "model.safetensors").write_bytes(b"".join(serialize(files, {})))
    raw = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 64, "max_position_embeddings": 32,
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": shape.d_hidden, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(raw))
    text = SMALL.replace("model: {vocab_size: 64, n_layer: 2, d_model: 32, n_head: 2}", f"init_from: {source}")
    found = blocks(tmp_path, text, size=10**12)
    assert isinstance(found[0], page.Heading) and f"{len(files)} tensors" in found[0].text
    assert any(isinstance(block, page.Heading) and "ways to tune it" in block.text for block in found)
    counts = {row[0]: number(row[1]) for row in found[1].rows}  # type: ignore[union-attr]
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_without_data_or_a_vocabulary_it_is_said_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/none.*before the data is prepared, set model\.vocab_size=N"):
        blocks(tmp_path, SMALL.replace("vocab_size: 64, ", ""))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.max_seq_len=16", r"data\.seq_len \(32\) exceeds the model's context \(16\)"),
        ("train.batch_tokens=65", r"train\.batch_tokens \(65\) must be a multiple of data\.seq_len"),
        ("train.micro_batch=3", r"train\.micro_batch \(3\) must divide the batch's 2 rows"),
        ("adapter.rank=4", r"an adapter is trained on a model that is there: name it, init_from: runs/NAME"),
        ("objective.kind=dpo", r"which answers are preferred: name it, init_from: runs/NAME"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        blocks(tmp_path, SMALL, override)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--memory", "1GB"], ["planned with: train.micro_batch=2", "measured"]),
        (["--device", "h100", "--devices", "2"], ["2 x ", "each device", "as published"]),
    ],
)
def test_the_command_prints_it_and_trains_nothing(tmp_path: Path, flags: list[str], said: list[str]) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    command = [sys.executable, str(ROOT / "train.py"), "small.yaml", "--plan", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in said), done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.yaml"]


@pytest.mark.parametrize("flags", [["--memory", "1GB"], ["--device", "h100"], ["--plan", "--devices", "0"]])
def test_flags_of_a_plan_are_refused_without_one(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("verb", ROOT / "train.py")
    assert spec is not None and spec.loader is not None
    verb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verb)
    with pytest.raises(SystemExit):
        verb.arguments(["x.yaml", *flags])
    said = capsys.readouterr().err
    assert "say --plan too" in said or "must be at least 1" in said
