"""A run among devices that need not be here: what each holds, what they tell each other, which sizes are allowed and fit."""

from dataclasses import replace
from math import prod

import pytest

from gpt import division, machines, memory, plan
from gpt.division import Portions, Update
from gpt.memory import Need
from gpt.model import ModelConfig
from gpt.ranks import Sizes
from gpt.speed import Pace

H100 = machines.named("h100")
CONFIG = ModelConfig(vocab_size=1024, max_seq_len=64, n_layer=4, d_model=64, n_head=8, n_kv_head=4, d_ff=128)
PORTIONS = Portions(CONFIG, block=1000, rest=6000, trained=10_000)
NEED = Need(weights=40_000, gradients=40_000, optimizer=80_000, activations=16_000, work=8_000, step=4_000)


def test_portions_are_those_of_the_model() -> None:
    found = division.portions(CONFIG)
    model = memory.bare(CONFIG)
    assert found.parameters == plan.n_parameters(model)
    assert found.block == plan.n_parameters(model.model.layers[2])


def test_copies_hold_everything_and_shards_their_part_and_what_is_gathered() -> None:
    assert division.held(NEED, PORTIONS, Sizes(8, 1, 1)) == NEED
    gathered = 4 * (2 * 1000 + 6000)
    sharded = division.held(NEED, PORTIONS, Sizes(1, 8, 1))
    assert (sharded.weights, sharded.gradients) == (5_000 + gathered, 5_000 + gathered)
    assert (sharded.optimizer, sharded.activations, sharded.work) == (10_000, 16_000, 8_000)
    both = division.held(NEED, PORTIONS, Sizes(1, 4, 2))
    assert (both.weights, both.optimizer, both.activations, both.work) == (5_000 + gathered // 2, 10_000, 8_000, 4_000)
    assert division.held(NEED, PORTIONS, Sizes(5, 4, 2)) == both


def test_what_answers_are_compared_with_is_held_whole() -> None:
    beside = division.held(replace(NEED, reference=40_000), PORTIONS, Sizes(1, 4, 2))
    assert beside.total == division.held(NEED, PORTIONS, Sizes(1, 4, 2)).total + 40_000


def test_what_is_told_is_what_rings_move() -> None:
    assert division.told(PORTIONS, Sizes(), 512, H100) == (0, 0, 0)
    n_bytes = 4 * PORTIONS.parameters
    shards, layers, copies = division.told(PORTIONS, Sizes(1, 4, 1), 512, H100)
    assert (layers, copies) == (0, 0) and shards == pytest.approx(3 * n_bytes * 3 / 4 / H100.near)
    shards, layers, copies = division.told(PORTIONS, Sizes(16, 1, 1), 512, H100)
    assert (shards, layers) == (0, 0) and copies == pytest.approx(2 * n_bytes * 15 / 16 / H100.far)
    shards, layers, copies = division.told(PORTIONS, Sizes(1, 1, 8), 512, H100)
    assert (shards, copies) == (0, 0) and layers == pytest.approx(8 * 4 * 2 * 512 * 64 * 7 / 8 / H100.near)
    beyond = division.told(PORTIONS, Sizes(1, 8, 2), 512, H100)[0]
    assert beyond == pytest.approx(3 * n_bytes / 2 * 7 / 8 / H100.far), "sixteen do not fit into a box"


def test_of_an_adapter_its_gradients_alone_are_told() -> None:
    whole, lora = division.portions(CONFIG), division.portions(CONFIG, trained=500)
    n = Sizes(8, 1, 1)
    ratio = division.told(lora, n, 512, H100)[2] / division.told(whole, n, 512, H100)[2]
    assert ratio == pytest.approx(500 / whole.parameters)


def test_an_update_waits_for_what_is_not_told_while_it_computes() -> None:
    pace = Pace(pass_s=1.0, step_s=0.5)
    alone = division.divided(PORTIONS, Update(8, 64), Sizes(), 2, NEED, pace, H100)
    assert (alone.update_s, alone.waiting_s) == (4 * 1.0 + 0.5, 0.0)
    shared = division.divided(PORTIONS, Update(8, 64), Sizes(1, 4, 1), 2, NEED, pace, H100)
    assert shared.update_s == pytest.approx(1.0 + 0.5 / 4) and shared.waiting_s == 0
    slow = machines.Machine("slow", 1e12, 1e9, 1e9, near=1.0, far=1.0)
    waits = division.divided(PORTIONS, Update(8, 64), Sizes(1, 4, 1), 2, NEED, pace, slow)
    assert waits.waiting_s == pytest.approx(3 * 4 * PORTIONS.parameters * 3 / 4 - 1.0)


def ways(devices: int, room: float, rows: int = 64) -> list[division.Divided]:
    def needs(rows: int) -> Need:
        return Need(40_000, 40_000, 80_000, 16_000 * rows, 8_000, 4_000)

    given = (needs, lambda rows: Pace(0.1 * rows, 0.01), H100)
    return list(division.ways(PORTIONS, Update(rows, 64), devices, room, *given))


def test_every_way_divides_what_there_is_and_fits() -> None:
    found = ways(16, 200_000)
    assert found
    for way in found:
        assert prod(way.n) == 16 and 64 % (way.n.n_data * way.rows) == 0
        assert CONFIG.n_group % way.n.tensor == 0
        assert way.need.total <= 200_000
    assert max(way.n.tensor for way in found) == 4, "of four key/value heads eight ranks cannot each have one"
    larger = list(ways(16, 400_000))
    assert {way.n for way in larger} >= {way.n for way in found}
    assert all(way.rows >= {w.n: w.rows for w in found}.get(way.n, 0) for way in larger)


def test_more_devices_than_rows_need_several_for_each() -> None:
    assert {way.n.tensor for way in ways(128, 1e9)} == {2, 4}
    assert ways(1024, 1e9) == []
    assert ways(16, 1000) == []
