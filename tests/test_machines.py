"""Machines that are known: found by what their drivers and people call them, each fact in one place."""

import pytest

from gpt import machines
from gpt.machines import MACHINES


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("Abacus", None),
    ],
)
def test_a_card_is_that_machine_and_no_other(card: str, name: str | None) -> None:
    found = machines.of_card(card)
    assert (found.name if found else None) == name


def test_people_may_write_a_name_as_they_like_and_are_told_the_others() -> None:
    assert {machines.named(text).name for text in ("rtx4090", "RTX 4090", "rtx-4090", "rtx_4090")} == {"RTX 4090"}
    for machine in MACHINES:
        assert machines.named(machine.name) is machine
    with pytest.raises(ValueError, match=r"'h1000' is no machine known here: it may be b200, h200, h100.*say --memory"):
        machines.named("h1000")


def test_nothing_reaches_more_than_its_data_sheet_says() -> None:
    for machine in MACHINES:
        assert 0.5 * machine.peak < machine.matmul < machine.peak
        assert machine.far <= machine.near < machine.bandwidth
        assert machine.memory < machine.bandwidth
