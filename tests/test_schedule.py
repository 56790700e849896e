"""The learning rate over a run, and when things are due."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gpt.schedule import ScheduleConfig, due, factor

KINDS = ["constant", "cosine", "linear", "wsd"]


def curve(steps: int, **settings: object) -> list[float]:
    return [factor(ScheduleConfig(**settings), step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_steps_and_reaches_the_peak_at_its_last_step(kind):
    assert curve(100, kind=kind, warmup=4.0)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert curve(100, kind=kind, warmup=0.04)[:4] == [0.25, 0.5, 0.75, 1.0]


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 300),
    warmup=st.one_of(st.floats(0, 0.5), st.integers(1, 400).map(float)),
)
def test_every_update_moves_and_none_exceeds_the_peak(kind, steps, warmup):
    assert all(0 < value <= 1 for value in curve(steps, kind=kind, warmup=warmup))


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_after_the_warm_up_the_rate_only_falls_and_ends_one_update_above_the_floor(kind):
    values = curve(1000, kind=kind, warmup=0.0, floor=0.1)
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert 0.1 < values[-1] < 0.11


def test_constant_stays_at_the_peak():
    assert curve(50, kind="constant", warmup=0.0) == [1.0] * 50


def test_wsd_is_stable_until_the_decay_and_then_linear():
    values = curve(100, kind="wsd", warmup=0.0, decay=0.25)
    assert values[:76] == [1.0] * 76
    assert values[76:] == pytest.approx([left / 25 for left in range(24, 0, -1)])


def test_a_decay_above_one_counts_steps_and_begins_where_the_stable_phase_ends():
    values = curve(100, kind="wsd", warmup=0.0, decay=25.0)
    assert values == curve(100, kind="wsd", warmup=0.0, decay=0.25)
    assert values[75] == 1.0  # its first step: 25 of 25 left


def test_cosine_is_half_way_down_in_the_middle():
    assert curve(99, kind="cosine", warmup=0.0)[50] == pytest.approx(0.5 - 0.5 * math.cos(math.pi * 49 / 100))


def test_the_rate_does_not_jump_when_the_warm_up_ends():
    for kind in KINDS:
        values = curve(1000, kind=kind, warmup=0.1)
        assert max(abs(a - b) for a, b in itertools.pairwise(values[50:])) <= 0.0101


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "cosine", "decay": 0.2}, "decay .0.2. is for kind 'wsd', not 'cosine'"),
        ({"kind": "constant", "floor": 0.1}, "floor .0.1. has no meaning with kind 'constant'"),
        ({"kind": "wsd", "warmup": 0.5, "decay": 0.6}, "more than the whole run"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_both_values(settings, words):
    with pytest.raises(ValidationError, match=words):
        ScheduleConfig(**settings)


def test_things_are_due_every_n_steps_and_after_the_last_one():
    assert [step for step in range(1, 26) if due(step, 10, 25)] == [10, 20, 25]
    assert [step for step in range(1, 26) if due(step, 10)] == [10, 20]


def test_without_a_period_nothing_is_ever_due():
    assert not any(due(step, None, 5) for step in range(6))
