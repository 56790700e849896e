"""Positions: each part against its formula, and what it tells."""

import pytest
import torch
from torch import Tensor

from gpt.positions import At, Rotary, rotate


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotary(D: int = 8, length: int = 64, theta: float = 10_000.0) -> Rotary:
    return Rotary(D, length, theta)


def rotated(x: Tensor, rope: Rotary, first: int = 0) -> Tensor:
    """x (T, D) at positions first, first + 1, ..."""
    at = At(torch.arange(first, first + len(x))[None], len(x), first + len(x))
    return rotate(x[None, None], x[None, None], rope.angles(at))[0][0, 0]


def test_a_rotated_score_depends_on_the_distance_alone() -> None:
    rope, q, k = rotary(), normal(1, 8), normal(1, 8, seed=1)
    scores = [float(rotated(q, rope, m + 7) @ rotated(k, rope, m).T) for m in (0, 1, 19, 56)]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-5)
    others = [float(rotated(q, rope, d) @ rotated(k, rope, 0).T) for d in range(12)]
    assert len({round(score, 3) for score in others}) == 12


def test_rotation_keeps_norms() -> None:
    x = normal(64, 8)
    torch.testing.assert_close(rotated(x, rotary()).norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=0)


def test_position_zero_is_not_rotated() -> None:
    x = normal(1, 8)
    assert torch.equal(rotated(x, rotary()), x)


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotation_is_multiplication_by_complex_phases(theta: float) -> None:
    D, T = 8, 64
    x = normal(T, D)
    phase = torch.arange(T, dtype=torch.float64)[:, None] * theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    pairs = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * torch.polar(torch.ones_like(phase), phase)
    expected = torch.cat([pairs.real, pairs.imag], dim=-1)
    torch.testing.assert_close(rotated(x, rotary(D, T, theta), 0), expected, atol=2e-5, rtol=0)


def test_positions_left_open_count_from_zero() -> None:
    rope, x = rotary(), normal(1, 1, 10, 8)
    assert torch.equal(rotate(x, x, rope.angles(At(None, 10, 10)))[1][0, 0], rotated(x[0, 0], rope))
