"""What an update costs: the right updates are traced, the costs are theirs, and training does not notice."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import settings, trained
from torch import Tensor

from gpt import durable, probe, profile, signals, trainer
from gpt.profile import LARGEST, WARM_UP, Cost, Profile, table
from gpt.trainer import train

A = torch.ones(4, 4)


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(probe, "matmul_rate", lambda device, dtype: 2e9)
    return 2e9


def followed(
    n: int, steps: range, path: Path, disturbed: Callable[[int], bool] = lambda step: False, flops: float = 1e3
) -> tuple[list[str], dict[str, int]]:
    """(what is said of updates of two products each, between which `disturbed` ones are followed by a sine; calls traced)."""
    said: list[str] = []
    with Profile(n, "cpu", "float32", flops, path, disturbed, said.append) as followed:
        for step in steps:
            A @ A @ A
            followed.made(step)
            if disturbed(step):
                A.sin()
    calls: dict[str, int] = {}
    if (path / profile.TRACE).exists():
        for event in json.loads(gzip.decompress((path / profile.TRACE).read_bytes()))["traceEvents"]:
            if event.get("cat") == "cpu_op":
                calls[event["name"]] = calls.get(event["name"], 0) + 1
    return said, calls


@pytest.mark.parametrize("n", [1, 3])
def test_the_updates_after_a_warm_up_and_a_measurement_are_traced_once(tmp_path: Path, n: int) -> None:
    last = WARM_UP + 2 * n
    assert not followed(n, range(1, last), tmp_path)[1]
    said, calls = followed(n, range(1, 3 * last), tmp_path)
    assert calls["aten::mm"] == 2 * n
    assert len([line for line in said if line.startswith("profile:")]) == 1
    assert any(line.split()[2:] == ["2", "aten::mm"] for line in said), "calls of one update"


def test_what_is_due_between_updates_is_left_out_where_that_is_possible(tmp_path: Path) -> None:
    said, calls = followed(2, range(1, 40), tmp_path, lambda step: step % 7 == 0)
    assert calls["aten::mm"] == 4 and "aten::sin" not in calls
    assert not any("counted too" in line for line in said)
    (tmp_path / profile.TRACE).unlink()
    said, calls = followed(2, range(1, 40), tmp_path, lambda step: step % 3 == 0)
    assert calls["aten::mm"] == 4 and "aten::sin" in calls
    assert any(line.startswith("profile: evaluations, samples and saves") for line in said)


def test_a_run_that_goes_back_is_followed_anew(tmp_path: Path) -> None:
    began = [*range(1, WARM_UP + 5), *range(2, 20)]  # it is being traced, and goes back
    said, calls = followed(3, began, tmp_path)  # type: ignore[arg-type]
    assert calls["aten::mm"] == 6
    assert len([line for line in said if line.startswith("profile:")]) == 1


def test_a_run_that_is_too_short_says_what_it_takes_and_one_that_fails_does_not(tmp_path: Path) -> None:
    said, _ = followed(4, range(1, 9), tmp_path)
    assert said == [f"profile: nothing was traced; it takes {WARM_UP + 8} updates, here were 8"]
    said, _ = followed(4, range(1, WARM_UP + 12), tmp_path, lambda step: step % 3 == 0)
    assert said == [f"profile: nothing was traced; it takes {WARM_UP + 16} updates, here were {WARM_UP + 11}"]
    heard: list[str] = []
    with (
        pytest.raises(KeyError),
        Profile(1, "cpu", "float32", 1.0, tmp_path, lambda s: False, heard.append) as profiled,
    ):
        for step in range(1, WARM_UP + 2):
            profiled.made(step)
        raise KeyError
    assert not heard
    assert not torch.autograd._profiler_enabled()


def test_the_share_of_the_limit_is_of_the_updates_that_were_not_traced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rate: float
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    said: list[str] = []
    with Profile(2, "cpu", "float32", 1e8, tmp_path, lambda step: False, said.append) as profiled:
        for step in range(1, WARM_UP + 5):
            now[0] += 0.1 if step <= WARM_UP + 2 else 0.4  # a profiler slows down
            profiled.made(step)
    assert "2 updates of 100.00 ms (400.00 ms while traced)" in said[0]
    assert f"1.0 GFLOP/s, {1e9 / rate:.1%} of the 2.0" in said[-1]


def test_a_trace_that_cannot_be_kept_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*given: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write_file", full)
    said, calls = followed(1, range(1, 9), tmp_path)
    assert not calls and "not kept (No space left on device)" in said[0]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_the_table_has_the_largest_the_others_and_the_rest() -> None:
    found = [Cost(f"void kernel{i}<{'x' * 100}>", i, 0.001 * (20 - i)) for i in range(20)]
    _, *rows, others, outside = table(found, 0.42)
    assert len(rows) == LARGEST
    assert rows[0].split()[:2] == ["20.00", "4.8%"] and "kernel0<" in rows[0] and max(map(len, rows)) < 100
    shares = [float(row.split()[1].rstrip("%")) for row in (*rows, others, outside)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "10 others" in others and outside.split()[0] == "210.00"


# In a run


def results(name: str) -> tuple[list[dict[str, float]], bytes]:
    """(what was logged but for clocks, the last weights)."""
    lines = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    kept = ("kind", "step", "loss", "grad_norm", "lr", "val_loss")
    weights = Path("runs", name, "checkpoints", "step_00000012", "model.safetensors").read_bytes()
    return [{key: line[key] for key in kept if key in line} for line in lines], weights


def test_training_goes_on_as_if_nobody_had_looked(here: Path) -> None:
    trained("name=plain")
    said = trained("name=seen", "train.profile=2")
    assert results("seen") == results("plain")
    found = said[said.index("profile: 2 updates") :].splitlines()
    assert f"runs/seen/{profile.TRACE}" in found[0] and any("aten::" in line for line in found[2 : 2 + LARGEST])
    assert "GFLOP/s" in said and not list(here.glob("runs/plain/*.gz"))
    events = json.loads(gzip.decompress(Path("runs/seen", profile.TRACE).read_bytes()))["traceEvents"]
    backward = [event for event in events if "Backward" in event.get("name", "")]
    assert backward, "gradients are traced too"


def test_a_stop_request_amid_a_trace_is_obeyed_and_the_setting_is_free(here: Path) -> None:
    trained("name=plain")
    at = WARM_UP + 3  # of two that are traced the first
    with pytest.raises(signals.Stopped):
        train(settings("name=stopped", "train.profile=2"), updates=at, console=Console(quiet=True))
    assert not torch.autograd._profiler_enabled()
    assert not Path("runs/stopped", profile.TRACE).exists()
    assert "train.profile 2 -> null (free)" in trained("name=stopped")
    assert results("stopped") == results("plain")


@pytest.mark.parametrize(("first", "n"), [(True, 4), (False, 0)])
def test_of_several_ranks_the_first_is_followed(
    monkeypatch: pytest.MonkeyPatch, here: Path, tmp_path: Path, first: bool, n: int
) -> None:
    passed: list[Profile] = []
    monkeypatch.setattr(trainer, "_updates", lambda session, start, most, profile: passed.append(profile))
    session = SimpleNamespace(
        config=settings("train.profile=4"),
        choices=SimpleNamespace(device="cpu", dtype="float32"),
        team=SimpleNamespace(first=first),
        run=SimpleNamespace(path=tmp_path),
        flops=lambda: 1.0,
        disturbed=lambda step: False,
        log=SimpleNamespace(note=lambda line: None),
    )
    trainer._loop(session, 0)  # type: ignore[arg-type]
    assert [profile.n for profile in passed] == [n]


def test_random_numbers_and_gradients_of_a_run_are_not_touched(tmp_path: Path) -> None:
    def drawn(n: int) -> list[Tensor]:
        torch.manual_seed(5)
        with Profile(n, "cpu", "float32", 1.0, tmp_path, lambda step: False, lambda line: None) as profiled:
            found = []
            for step in range(1, 9):
                weight = torch.randn(3, 3, requires_grad=True)
                (weight @ torch.randn(3)).sum().backward()
                assert weight.grad is not None
                found.append(weight.grad)
                profiled.made(step)
        return found

    assert all(torch.equal(a, b) for a, b in zip(drawn(0), drawn(2), strict=True))
