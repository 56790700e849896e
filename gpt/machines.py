"""Accelerators that are known: what their data sheets say, what was measured on them, and how they reach each other.

Bytes are of 10^9 to the GB, rates a second, links one way and of one device.
"""

import re
from dataclasses import dataclass

REACHED = (
    0.8  # of the peak, by a large product, where nobody's measurement is known: what the measured ones have in common
)


@dataclass(frozen=True)
class Machine:
    """One device. `peak`: dense bf16 FLOP/s of the data sheet; `near`: to others of its box, `far`: to other boxes."""

    name: str
    peak: float
    memory: float
    bandwidth: float
    near: float
    far: float
    box: int = 8
    measured: float | None = None  # FLOP/s of the best large bf16 product

    @property
    def matmul(self) -> float:
        """FLOP/s of a large bf16 product: measured, or about."""
        return self.measured or REACHED * self.peak


# Peaks, memory and links: NVIDIA's data sheets; far: the usual adapter of a box with so many, 400 or 200 Gbit/s a device, or
# 100 Gbit/s among eight. Measured: "maximum achievable matmul FLOPS", Bekman, ml-engineering (2026), torch 2.6 to 2.7; an H200
# is there said to reach what an H100 does.
MACHINES = (
    Machine("B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, measured=1745e12),
    Machine("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, measured=794.5e12),
    Machine("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9, measured=794.5e12),
    Machine("A100", 312e12, 80e9, 2.04e12, 300e9, 25e9, measured=271.2e12),
    Machine("L40S", 362e12, 48e9, 0.864e12, 32e9, 12.5e9),
    Machine("RTX 4090", 165e12, 24e9, 1.008e12, 32e9, 12.5e9),
    Machine("RTX 3090", 71e12, 24e9, 0.936e12, 32e9, 12.5e9),
    Machine("A10G", 70e12, 24e9, 0.6e12, 32e9, 12.5e9),
    Machine("L4", 121e12, 24e9, 0.3e12, 32e9, 12.5e9),
)


def of_card(card: str) -> Machine | None:
    """The machine of a card as its driver names it, None where we know none."""
    return next((machine for machine in MACHINES if re.search(rf"\b{machine.name}\b", card)), None)


def named(name: str) -> Machine:
    """The machine that a person calls so, like h100 or rtx4090; ValueError with those that there are."""

    def plain(text: str) -> str:
        return re.sub(r"[\W_]", "", text).lower()

    for machine in MACHINES:
        if plain(name) == plain(machine.name):
            return machine
    known = ", ".join(plain(machine.name) for machine in MACHINES)
    raise ValueError(
        f"'{name:.40}' is no machine known here: it may be {known}; or leave --device out and say --memory"
    )
