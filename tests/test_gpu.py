"""benchmarks/gpu.py at toy size; what a GPU must not be made to wait for, by tensors without numbers, and on one that is there."""

import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from trained import CHOICES, batch, config_of

from gpt import trainer
from gpt.judge import finite
from gpt.loss import NextToken
from gpt.model import GPT
from gpt.optim import Optimizer
from gpt.parallel import applied

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: list[dict[str, Any]] = [
    {},
    {"packed": True, "optim": {"kind": "muon", "lr": 0.02}, "checkpointing": "full"},
    {"model": {"window": 3, "position": "learned", "norm": "layernorm", "mlp": "gelu"}},
]


def update(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], check: Any) -> None:
    """An update of tensors that have shapes and no numbers: to ask one for its number is an error."""
    config, given = config_of(how), batch(1, packed=how.get("packed", False))
    targets = given.n_targets
    monkeypatch.setattr(
        trainer, "n_terms", lambda objective, batch: targets
    )  # of the batch on the host, not of the device's
    monkeypatch.setattr(Optimizer, "_within", lambda *numbers: False)  # as of a norm that a GPU has
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = NextToken(GPT(config.model).train())
        forward = applied(objective, compile=False, checkpointing=config.train.checkpointing)
        optimizer = Optimizer(objective.model, config.optim)
        for step in (1, 2):  # the first makes the optimizer's state
            trainer.update(forward, optimizer, given, config, CHOICES, step, check=check)


@pytest.mark.parametrize("how", SETTINGS)
def test_an_update_asks_the_device_for_no_number(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    update(monkeypatch, how, check=lambda *numbers: None)


def test_the_check_of_its_numbers_is_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataDependentOutputException):
        update(monkeypatch, {}, check=finite)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[types.ModuleType]:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def test_a_large_model_stands_on_the_device_with_all_that_it_has(benchmark: types.ModuleType) -> None:
    large = benchmark.ModelConfig(**benchmark.TOY | {"n_layer": benchmark.TOY["n_layer"] + 1, "position": "rotary"})
    model = benchmark.fresh(large, "meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_an_update_waits_once_for_its_numbers(benchmark: types.ModuleType) -> None:
    training = benchmark.Training(benchmark.ModelConfig(**benchmark.TOY), 4, 2, 64)
    for _ in range(2):
        training.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.update(check=lambda *numbers: None)
        with pytest.raises(RuntimeError, match="synchron"):
            training.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["correct", "gpt2", "documents", "checkpointing", "decoding"])
def test_a_section_of_the_benchmark_runs_at_toy_size(benchmark: types.ModuleType, name: str) -> None:
    rows = list(benchmark.section(name))
    assert rows and not [each for each in rows if "FAILED" in str(each["ours"])]
    assert all(each.keys() >= {"case", "ours", "peer", "peer_name", "unit", "ratio", "limit_share"} for each in rows)


def test_a_section_that_fails_or_hangs_costs_the_others_nothing(
    benchmark: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> Iterator[dict[str, Any]]:
        yield benchmark.row("before", 1.0, "s")
        raise RuntimeError("out of luck\nand a trace")

    monkeypatch.setitem(benchmark.SECTIONS, "limits", (breaks, 1))
    first, second = benchmark.section("limits")
    assert first["case"] == "before" and second["ours"] == "FAILED: RuntimeError: out of luck"
    (late,) = benchmark.in_a_process("limits", 0.01)
    assert late["ours"] == "ended after 0 s"


@pytest.mark.slow
def test_the_benchmark_prints_tables_and_json_and_says_that_no_gpu_was_measured(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--only",
        "limits",
        "--out",
        str(tmp_path / "x.json"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout.splitlines()[-1])
    assert rows == json.loads((tmp_path / "x.json").read_text())
    assert {"matmul", "copy"} <= {each["case"] for each in rows}
    assert ("not measured on GPU" in ended.stdout) != torch.cuda.is_available()
