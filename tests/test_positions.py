"""Positions: each part against its formula, and what it tells."""

import math

import pytest
import torch
import written
from conftest import Build, Tokens
from torch import Tensor

from gpt.model import ModelConfig, position_of
from gpt.positions import At, Learned, RelativeBias, RopeScaling, Rotary, Sinusoidal, keep, rope_frequencies, rotate


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotary(D: int = 8, length: int = 64, theta: float = 10_000.0) -> Rotary:
    return Rotary(D, length, theta)


def rotated(x: Tensor, rope: Rotary, first: int = 0) -> Tensor:
    """x (T, D) at positions first, first + 1, ..."""
    at = At(torch.arange(first, first + len(x))[None], len(x), first + len(x))
    return rotate(x[None, None], rope.angles(at))[0, 0]


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
    assert torch.equal(rotate(x, rope.angles(At(None, 10, 10)))[0, 0], rotated(x[0, 0], rope))


def test_adjacent_pairs_are_the_same_rotation_with_the_columns_in_another_order() -> None:
    """RoFormer turns columns (2i, 2i + 1), rotate_half (i, i + D/2): one permutation of q and k leads from one to the other."""
    rope, x = rotary(), normal(12, 8)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # where (0, 1), (2, 3), ... of an adjacent layout come from
    adjacent = x.clone()
    for t in range(12):
        for i in range(4):
            angle = t * 10_000 ** (-2 * i / 8)
            a, b = x[t, order[2 * i]], x[t, order[2 * i + 1]]
            adjacent[t, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            adjacent[t, 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    torch.testing.assert_close(rotated(x, rope)[:, order], adjacent, atol=1e-5, rtol=0)


def test_columns_past_the_rotary_ones_stay() -> None:
    rope, x = rotary(D=4), normal(10, 8)
    torch.testing.assert_close(rotated(x, rope)[:, :4], rotated(x[:, :4], rope), atol=0, rtol=0)
    assert torch.equal(rotated(x, rope)[:, 4:], x[:, 4:])


def test_nothing_turns_without_angles_or_in_a_layer_that_keeps() -> None:
    q = normal(1, 4, 5, 8)
    assert rotate(q, None) is q and keep(q, rotary().angles(At(None, 5, 5))) is q


# Scalings

SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=4.0),
    "dynamic": RopeScaling(kind="dynamic", factor=4.0, original_max_seq_len=256),
    "dynamic, null": RopeScaling(kind="dynamic", factor=4.0),
    "yarn": RopeScaling(kind="yarn", factor=4.0),
    "yarn, as set": RopeScaling(
        kind="yarn", factor=8.0, original_max_seq_len=100, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3
    ),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=256),
    "llama3, as set": RopeScaling(
        kind="llama3", factor=32.0, original_max_seq_len=128, low_freq_factor=2.0, high_freq_factor=8.0
    ),
}


@pytest.mark.parametrize("total", [7, 256, 300, 1024])
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_scaled_frequencies_are_those_of_the_papers(scaling: RopeScaling | None, theta: float, total: int) -> None:
    ours, _ = rope_frequencies(64, theta, scaling, 1024, total)
    slow = torch.tensor(written.frequencies(64, theta, scaling, 1024, total), dtype=torch.float64)
    torch.testing.assert_close(ours.double(), slow, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_scalings_by_parts_keep_fast_pairs_and_divide_slow_ones(kind: str) -> None:
    scaling = RopeScaling(kind=kind, factor=8.0, original_max_seq_len=512)
    plain, _ = rope_frequencies(64, 10_000.0, None, 4096, 4096)
    scaled, _ = rope_frequencies(64, 10_000.0, scaling, 4096, 4096)
    turns, ratio = 512 * plain / (2 * math.pi), plain / scaled
    fast, slow = (32, 1) if kind == "yarn" else (4, 1)
    torch.testing.assert_close(ratio[turns > fast * 1.4], torch.ones(int((turns > fast * 1.4).sum())))
    torch.testing.assert_close(ratio[turns < slow / 1.4], torch.full((int((turns < slow / 1.4).sum()),), 8.0))
    assert (ratio.diff() > -1e-5).all() and ((ratio > 1.1) & (ratio < 7.9)).sum() > 3


def test_yarn_sharpens_attention_by_its_temperature() -> None:
    """Section 3.4: scores are divided by t, with sqrt(1 / t) = 0.1 ln(s) + 1 on queries and on keys."""
    rope = Rotary(8, 64, 10_000.0, RopeScaling(kind="yarn", factor=4.0))
    x = normal(3, 8)
    assert (rotated(x, rope).norm() / x.norm()).item() == pytest.approx(0.1 * math.log(4) + 1, rel=1e-6)
    mine = RopeScaling(kind="yarn", factor=4.0, attention_factor=2.5)
    assert (rotated(x, Rotary(8, 64, 10_000.0, mine)).norm() / x.norm()).item() == pytest.approx(2.5, rel=1e-6)


def test_linear_scaling_is_interpolation_of_positions() -> None:
    near, far = rotary(length=16), Rotary(8, 64, 10_000.0, RopeScaling(kind="linear", factor=4.0))
    x = normal(1, 8)
    for position in range(16):
        torch.testing.assert_close(rotated(x, far, 4 * position), rotated(x, near, position), atol=1e-6, rtol=0)


def test_dynamic_scaling_begins_where_the_original_context_ends() -> None:
    plain, grown = (
        rotary(length=64),
        Rotary(8, 64, 10_000.0, SCALINGS["dynamic"].model_copy(update={"original_max_seq_len": 16})),
    )
    for total in (1, 16):
        for a, b in zip(plain.angles(At(None, total, total)), grown.angles(At(None, total, total)), strict=True):
            assert torch.equal(a, b)
    before = plain.angles(At(None, 17, 17))[1]
    angles = [grown.angles(At(None, 17, total))[1] for total in (17, 30, 64)]
    slowest = [float(sines[16, 3]) for sines in (before, *angles)]
    assert slowest == sorted(slowest, reverse=True) and len(set(slowest)) == 4, "the longer, the slower"
    assert all(torch.equal(sines[:, 0], before[:, 0]) for sines in angles), "the fastest pair never changes"


@torch.inference_mode()
def test_dynamic_angles_of_a_packed_row_follow_its_longest_document(build: Build, tokens: Tokens) -> None:
    scaling = {"kind": "dynamic", "factor": 2.0, "original_max_seq_len": 16}
    model, x = build(max_seq_len=64, rope_scaling=scaling), tokens(1, 24)
    positions = torch.cat([torch.arange(12), torch.arange(12)])[None]
    packed = model(x, positions, (torch.arange(24) >= 12).long()[None])
    apart = torch.cat([model(part) for part in x.split(12, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_keys_cached_beyond_the_original_context_keep_their_angles_as_in_transformers(
    build: Build, tokens: Tokens
) -> None:
    """With dynamic NTK the angles depend on the length so far. A query turns by those of now, a cached key by those of when
    it was read; so decoding is no longer the full forward pass, here as in transformers, whose logits these are."""
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=16, rope_parameters=scaling, tie_word_embeddings=True,
            rms_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    ours = build(
        qk_norm=False, d_ff=128, max_seq_len=64, rope_theta=100.0,
        rope_scaling={"kind": "dynamic", "factor": 2.0, "original_max_seq_len": 16},
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x = tokens(2, 40)
    cache, past = ours.new_cache(2, 40), None
    for part in x.split([20, *[1] * 20], dim=1):
        answer = theirs(part, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        stepped = ours(part, cache=cache)
        torch.testing.assert_close(stepped, answer.logits, atol=1e-4, rtol=1e-4)
    assert (stepped[:, -1] - ours(x)[:, -1]).abs().max() > 1e-2
    short = ours.new_cache(2, 16)
    within = torch.cat([ours(part, cache=short) for part in x[:, :16].split(1, dim=1)], dim=1)
    torch.testing.assert_close(within, ours(x[:, :16]), atol=1e-5, rtol=0)


# Added to the embeddings


@pytest.mark.parametrize(("width", "theta"), [(16, 10_000.0), (7, 10_000.0), (16, 12_000.0)])
def test_sinusoidal_codes_are_their_formula_beside_the_scaled_embedding(width: int, theta: float) -> None:
    part, x = Sinusoidal(50, width, theta), normal(2, 50, width)
    codes = torch.stack([written.sinusoid(position, width, theta) for position in range(50)])
    torch.testing.assert_close(part.embed(x, At(None, 50, 50)), x * math.sqrt(width) + codes, atol=1e-5, rtol=0)
    places = torch.tensor([[3, 49], [0, 7]])
    there = part.embed(torch.zeros(2, 2, width, dtype=torch.float64), At(places, 2, 50))
    torch.testing.assert_close(there, codes[places], atol=1e-5, rtol=0)


def test_sinusoidal_codes_of_a_distance_are_one_rotation_wherever_it_starts() -> None:
    """PE(pos + k) is a linear function of PE(pos) (Vaswani et al. 2017, section 3.5)."""
    codes = Sinusoidal(60, 8, 10_000.0).codes.double()
    move = torch.linalg.lstsq(codes[:40], codes[9:49]).solution
    torch.testing.assert_close(codes[11:51] @ move, codes[20:60], atol=1e-4, rtol=0)


def test_learned_positions_are_rows_of_their_table() -> None:
    part, x = Learned(10, 4), normal(2, 3, 4, dtype=torch.float32)
    assert torch.equal(part.embed(x, At(None, 3, 3)), x + part.weight[:3])
    places = torch.tensor([[7, 8, 9], [0, 1, 0]])
    assert torch.equal(part.embed(x, At(places, 3, 10)), x + part.weight[places])


# Added to the scores


@pytest.mark.parametrize(("n_bucket", "furthest"), [(32, 128), (8, 10), (2, 2), (9, 100)])
def test_relative_buckets_are_those_of_a_plain_loop(n_bucket: int, furthest: int) -> None:
    part = RelativeBias(4, n_bucket, furthest)
    queries, keys = torch.tensor([[0, 40, 399]]), torch.arange(400)[None]
    bias = part.bias(queries, keys)
    assert bias.shape == (1, 4, 3, 400)
    for i, t in enumerate(queries[0].tolist()):
        kinds = [written.bucket(t - s, n_bucket, furthest) for s in range(400)]
        assert torch.equal(bias[0, :, i], part.weight[kinds].T)
    assert set(kinds) == set(range(n_bucket)), "every kind of distance occurs"


def test_relative_buckets_are_those_of_transformers_decoder() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-5, 3000)
    theirs = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(RelativeBias(1, 32, 128).bucket(distance.clamp(min=0)), theirs)


def test_the_part_is_the_one_the_settings_name() -> None:
    kinds = {"rotary": Rotary, "learned": Learned, "sinusoidal": Sinusoidal, "relative": RelativeBias}
    for name, kind in kinds.items():
        assert isinstance(position_of(ModelConfig(max_seq_len=8, position=name)), kind)
