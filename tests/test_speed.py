"""How long an update takes: what a model calls, extrapolated from one block and two, by the clock that it is given."""

from dataclasses import replace

import pytest

from gpt import memory, plan, speed
from gpt.memory import Setting
from gpt.model import ModelConfig
from gpt.optim import OptimConfig
from gpt.probe import Clock, Rates

SHAPE = {"vocab_size": 512, "max_seq_len": 64, "n_layer": 4, "d_model": 64, "n_head": 4, "qk_norm": False}
ARITHMETIC = Clock(Rates(matmul=1e9, bandwidth=1e30, asking=0.0))  # seconds are billions of FLOPs


def setting(**given: object) -> Setting:
    plain = {"rows": 2, "seq_len": 64, "device": "cuda", "dtype": "bfloat16", "optim": OptimConfig()}
    return Setting(**(plain | given))  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", [{}, {"tie_embeddings": False}, {"n_kv_head": 2, "mlp": "gelu"}], ids=str)
def test_arithmetic_of_a_pass_is_that_of_the_formula(variant: dict[str, object]) -> None:
    """Causal attention computes about half of what the convention counts: 6 of 12 H D T a layer, and 1 for its weights again."""
    config = ModelConfig(**(SHAPE | variant))
    found = speed.pace(config, setting(), ARITHMETIC).pass_s * 1e9
    convention = plan.flops_per_token(memory.bare(config), 64)
    attention = 12 * config.n_head * config.d_head * 64 * config.n_layer
    assert found == pytest.approx(2 * 64 * (convention - attention * 5 / 12), rel=0.01)


@pytest.mark.parametrize("optim", [{}, {"kind": "muon"}], ids=["adamw", "muon"])
def test_four_blocks_told_from_two_take_what_four_do(optim: dict[str, str]) -> None:
    config, clock = ModelConfig(**SHAPE), Clock(Rates(1e12, 1e10, 1e-6), compiled=True)
    given = setting(optim=OptimConfig(**optim))
    told = speed.pace(config, given, clock)
    whole = (memory.walked(config, given).calls, memory.stepped(config, given).calls)
    assert told.pass_s == pytest.approx(clock.seconds(whole[0]), rel=0.02)
    assert told.step_s == pytest.approx(clock.seconds(whole[1]), rel=0.02)


def test_muon_takes_more_arithmetic_than_adamw_and_the_count_of_it_is_that_of_its_products() -> None:
    config = ModelConfig(**SHAPE)
    adamw, muon = (speed.pace(config, setting(optim=OptimConfig(kind=kind)), ARITHMETIC) for kind in ("adamw", "muon"))
    matrices = [
        sorted(p.shape) for name, p in memory.bare(config).named_parameters() if p.dim() == 2 and ".layers." in name
    ]
    assert adamw.step_s < 1e-6
    assert muon.step_s == pytest.approx(sum(5 * (4 * m * m * n + 2 * m**3) for m, n in matrices) / 1e9, rel=0.01)


def test_checkpointing_computes_blocks_again() -> None:
    config = ModelConfig(**(SHAPE | {"n_layer": 16}))
    plain, again = (speed.pace(config, setting(checkpointing=kept), ARITHMETIC).pass_s for kept in ("none", "full"))
    assert 1.2 < again / plain < 1.35


def test_more_rows_take_as_much_more_time() -> None:
    config = ModelConfig(**SHAPE)
    told = speed.paces(config, setting(), ARITHMETIC)
    for rows in (2, 3, 7):
        assert told(rows).pass_s == pytest.approx(speed.pace(config, setting(rows=rows), ARITHMETIC).pass_s, rel=1e-6)
    assert 0 < told(1).pass_s < told(2).pass_s
    assert told(5).update_s(3) == 3 * told(5).pass_s + told(5).step_s


@pytest.mark.parametrize(("alone_s", "least", "most"), [(0.0, 1e-9, 1e-2), (1e6, 0.0, 0.0)])
def test_calling_costs_what_a_pass_takes_beyond_its_operations(
    monkeypatch: pytest.MonkeyPatch, alone_s: float, least: float, most: float
) -> None:
    monkeypatch.setattr(
        Clock, "seconds", lambda *_: alone_s
    )  # what was timed alone, which a noisy machine may tell too high
    speed.asking_s.cache_clear()
    try:
        rates = Rates(1e12, 1e10, 1.0)
        told = speed.with_asking(rates, "float32")
        assert least <= told.asking <= most
        assert replace(told, asking=1.0) == rates
    finally:
        speed.asking_s.cache_clear()
