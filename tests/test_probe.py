"""What a machine does in a second: by its limits, or each operation timed alone."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt import machines, probe, runtime
from gpt.operations import Tally
from gpt.probe import Clock, Rates

RATES = Rates(matmul=1e12, bandwidth=1e10, asking=1e-6)


def tally(*products: tuple[int, int, int], looks: int = 0, copied: int = 0) -> Tally:
    """Products of these sizes, views, and one copy of so many numbers."""
    found = Tally()
    for m, k, n in products:
        a, b = torch.empty(m, k, device="meta"), torch.empty(k, n, device="meta")
        found.add(torch.ops.aten.mm.default, (a, b), {}, a @ b)
    for _ in range(looks):
        x = torch.empty(6, device="meta")
        found.add(torch.ops.aten.view.default, (x, [2, 3]), {}, x.view(2, 3))
    if copied:
        x = torch.empty(copied, device="meta")
        found.add(torch.ops.aten.neg.default, (x,), {}, x.neg())
    return found


def test_an_operation_takes_as_long_as_the_limit_that_it_meets() -> None:
    large, thin = ((op for op, _ in tally(size)) for size in ((4096, 4096, 4096), (1, 4096, 4096)))
    assert RATES.seconds(next(large)) == 2 * 4096**3 / 1e12
    assert RATES.seconds(next(thin)) == 4 * (4096 * 4096 + 2 * 4096) / 1e10
    (copy, _) = next(iter(tally(copied=1000)))
    assert RATES.seconds(copy) == 8000 / 1e10
    assert RATES.seconds(copy, compiled=True) == pytest.approx(8000 / 1e10 * probe.FUSED)


def test_a_gpu_is_asked_while_it_works_and_a_cpu_before() -> None:
    busy, idle = tally((4096, 4096, 4096)), tally(looks=1000)
    work = 2 * 4096**3 / 1e12
    assert Clock(RATES).seconds(busy) == work
    assert Clock(RATES).seconds(idle) == pytest.approx(1e-3)
    assert Clock(RATES, "cpu").seconds(busy) == work + 1e-6
    assert Clock(RATES, compiled=True).seconds(idle) == 0, "a compiler leaves no looks"


def test_operations_are_timed_those_first_that_weigh_most_until_the_budget_is_spent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def timed(call: object, device: str) -> float:
        assert callable(call)
        out = call()
        assert isinstance(out, Tensor)
        made.append(out.shape[0])
        return 7.0

    monkeypatch.setattr(probe, "timed", timed)
    calls = tally((8, 8, 8), (64, 64, 64), (32, 32, 32), looks=5)
    clock = Clock(RATES, "cpu", budget_s=math.inf)
    clock.watch([calls])
    assert made == [64, 32, 8]
    assert clock.seconds(calls) == pytest.approx(21.0, abs=1e-4)
    clock.watch([calls])
    assert len(made) == 3, "once each"
    broke = Clock(RATES, "cpu", budget_s=-1.0)
    broke.watch([calls])
    assert len(made) == 3 and broke.seconds(calls) < 1
    elsewhere = Clock(RATES)
    elsewhere.watch([calls])
    assert len(made) == 3


def test_this_machine_s_rates_are_what_its_product_and_its_copy_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "matmul_rate", lambda device, dtype: 7e9 if dtype == "bfloat16" else 1e9)
    monkeypatch.setattr(probe, "COPIED", {"cpu": 1 << 20})
    made: list[object] = []

    def timed(call: Callable[[], object], device: str, *_: float) -> float:
        made.append(call())
        return 0.5

    monkeypatch.setattr(probe, "timed", timed)
    rates = probe.measured("cpu", "bfloat16")
    assert rates == Rates(matmul=7e9, bandwidth=2 * (1 << 20) / 0.5, asking=0.5 / 1000)
    copy, _ = made
    assert isinstance(copy, Tensor) and copy.nbytes == 1 << 20


def test_a_known_machine_is_slower_in_fp32() -> None:
    card = machines.named("h100")
    assert probe.known(card, "bfloat16").matmul == card.matmul == 2 * probe.known(card, "float32").matmul


def test_the_median_is_of_calls_after_the_first() -> None:
    calls: list[int] = []
    assert probe.timed(lambda: calls.append(1), "cpu", most=3) >= 0
    assert len(calls) == 4


class Hand:
    """Seconds that pass while something is computed, and no others."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Hand(monkeypatch)


def machine(monkeypatch, clock, flops, memory=None):
    """Products here take the time that `flops` a second give them; larger ones than `memory` rows do not fit. Returns sides."""
    sides, real = [], torch.mm

    def mm(a, b, *, out):
        assert a.dtype == b.dtype == out.dtype
        assert a.float().std() > 0.5, "zeros are multiplied faster"
        if memory is not None and len(a) > memory:
            raise torch.OutOfMemoryError("full")
        sides.append(len(a))
        clock.now += 2 * len(a) ** 3 / flops
        return real(a[:1], b, out=out[:1])  # the clock is enough

    monkeypatch.setattr(torch, "mm", mm)
    return sides


@pytest.mark.parametrize("dtype", runtime.DTYPES)
def test_the_rate_of_products_is_the_machines(monkeypatch, clock, dtype):
    machine(monkeypatch, clock, 1e12)
    assert probe.matmul_rate("cpu", dtype, 0.3) == pytest.approx(1e12, rel=1e-6)


def test_a_hiccup_does_not_decide(monkeypatch, clock):
    sides, slow = machine(monkeypatch, clock, 1e12), torch.mm

    def hiccup(a, b, *, out):
        clock.now += 0.01 if len(sides) % 4 == 3 else 0.0
        return slow(a, b, out=out)

    monkeypatch.setattr(torch, "mm", hiccup)
    assert probe.matmul_rate("cpu", "float32", 1.0) == pytest.approx(1e12, rel=1e-6)


def test_a_slow_machine_is_not_asked_for_more_than_there_is_time_for(monkeypatch, clock):
    sides = machine(monkeypatch, clock, 2e9)  # a product of side 1,024 takes a second
    began = clock.now
    assert probe.matmul_rate("cpu", "float32", 0.3) == pytest.approx(2e9, rel=1e-6)
    assert clock.now - began < 0.6
    fast = machine(monkeypatch, clock, 1e12)
    probe.matmul_rate("cpu", "float32", 0.3)
    assert max(fast) == probe.SIDES["cpu"][-1] > max(sides)


def test_products_that_do_not_fit_are_left_out(monkeypatch, clock):
    sides = machine(monkeypatch, clock, 1e12, memory=600)
    assert probe.matmul_rate("cpu", "float32", 0.3) == pytest.approx(1e12, rel=1e-6)
    assert max(sides) == 512
    machine(monkeypatch, clock, 1e12, memory=10)
    with pytest.raises(torch.OutOfMemoryError):
        probe.matmul_rate("cpu", "float32", 0.3)


def test_a_probe_draws_no_number_that_training_would():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert probe.matmul_rate("cpu", "bfloat16", 0.01) > 1e6
    assert torch.equal(torch.get_rng_state(), before)
