"""Positions: how a decoder knows the order of its tokens. A part has three hooks, and each kind here fills one.

    embed(x, at)          what is added to the embeddings x (B, T, C)
    angles(at)            by what queries and keys turn: `rotate` applies it, once computed for all layers
    bias(queries, keys)   what is added to the scores, (B or 1, H, T, S)

Where tokens stand is an `At`: (B, T) int64 positions, or None for 0 .. T - 1 in every row.
"""

import math
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gpt.config import Count, Settings

Angles = tuple[Tensor, Tensor]  # cosines and sines, broadcastable to (B, heads, T, rotated part of D)


class At(NamedTuple):
    """Where T tokens stand: `positions` (B, T) int64, None: 0 .. T - 1; `total` counts the longest row so far."""

    positions: Tensor | None
    n_tokens: int
    total: int

    def rows(self, device: torch.device) -> Tensor:
        """(B, T) int64, or (1, T) for the same in every row."""
        return torch.arange(self.n_tokens, device=device)[None] if self.positions is None else self.positions

    def of(self, table: Tensor) -> Tensor:
        """Rows of a table (positions, width): (B, T, width), or (T, width) for the same in every row."""
        return table[: self.n_tokens] if self.positions is None else table[self.positions]


class Position(nn.Module):
    """No positions: order is known through the causal mask alone (Kazemnejad et al. 2023). The base of all parts."""

    def embed(self, x: Tensor, at: At) -> Tensor:
        return x

    def angles(self, at: At) -> Angles | None:
        return None

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """`queries` (B or 1, T) and `keys` (B or 1, S) are positions."""
        return None


class Learned(Position):
    """A trained vector for each position (Radford et al. 2018)."""

    def __init__(self, max_seq_len: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_seq_len, d_model).normal_(std=0.02))

    def embed(self, x: Tensor, at: At) -> Tensor:
        return x + at.of(self.weight)


class Sinusoidal(Position):
    """sin and cos of position / theta^(2i/C) beside sqrt(C) times the embedding (Vaswani et al. 2017, sections 3.4, 3.5)."""

    codes: Tensor

    def __init__(self, max_seq_len: int, d_model: int, theta: float) -> None:
        super().__init__()
        columns = torch.arange(0, d_model, 2, device="cpu") / d_model
        waves = torch.outer(torch.arange(max_seq_len, device="cpu"), theta**-columns)
        codes = torch.stack([waves.sin(), waves.cos()], dim=-1).flatten(1)[:, :d_model]
        self.register_buffer("codes", codes, persistent=False)  # (max_seq_len, C)
        self.scale = math.sqrt(d_model)

    def embed(self, x: Tensor, at: At) -> Tensor:
        return x * self.scale + at.of(self.codes).to(x.dtype)


class RelativeBias(Position):
    """A trained number for each head and bucket of distances, half of them exact, the others ever wider (Raffel et al.
    2020, section 2.1)."""

    def __init__(self, n_head: int, n_bucket: int, max_distance: int) -> None:
        super().__init__()
        self.n_bucket, self.max_distance = n_bucket, max_distance
        self.weight = nn.Parameter(torch.empty(n_bucket, n_head).normal_(std=0.02))

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = (queries[:, :, None] - keys[:, None]).clamp(min=0)  # what comes later is at distance 0
        return self.weight[self.bucket(distance)].permute(0, 3, 1, 2)  # (B or 1, H, T, S)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance: itself up to half the buckets, then logarithmic up to max_distance."""
        exact = self.n_bucket // 2
        beyond = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        wide = exact + (beyond * (self.n_bucket - exact)).long()
        return torch.where(distance < exact, distance, wide.clamp(max=self.n_bucket - 1))


class RopeScaling(Settings):
    """How rotary angles are stretched for contexts longer than those of pretraining."""

    kind: Literal["linear", "dynamic", "yarn", "llama3"] = Field(
        description="linear: all angles / factor (Chen et al. 2023); dynamic: a base that grows with the length (NTK, "
        "bloc97 2023); yarn (Peng et al. 2023); llama3: Llama 3.1's"
    )
    factor: float = Field(ge=1, description="by how much the context grows")
    original_max_seq_len: Count | None = Field(
        None, ge=1, description="context of pretraining; null: max_seq_len (dynamic), max_seq_len / factor (yarn)"
    )
    beta_fast: float = Field(
        32.0, gt=0, description="yarn: pairs that turn more often than this in it keep their angle"
    )
    beta_slow: float = Field(1.0, gt=0, description="yarn: pairs that turn less often are divided by factor")
    attention_factor: float | None = Field(
        None, gt=0, description="yarn: cosines and sines are multiplied by it; null: 0.1 ln(factor) + 1"
    )
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: pairs that turn less often are divided by factor")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: pairs that turn more often keep their angle")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "llama3" and self.original_max_seq_len is None:
            raise ValueError("llama3 scaling needs original_max_seq_len, the context of pretraining")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor ({self.high_freq_factor})"
            )
        return self


def by_length(scaling: RopeScaling | None) -> bool:
    """Whether the length of a sequence decides by what angles all its positions turn."""
    return scaling is not None and scaling.kind == "dynamic"


class Rotary(Position):
    """Turn each pair (i, i + D/2) of a head by position * theta^(-2i/D) (Su et al. 2021).

    With `rotary_dim` below the head's size only its first columns turn.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rotary_dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.rotary_dim, self.max_seq_len, self.theta, self.scaling = rotary_dim, max_seq_len, theta, scaling
        self.grows = by_length(scaling)
        self.original = (scaling.original_max_seq_len if scaling else None) or max_seq_len
        cos, sin = self.tables(max_seq_len, self.original)
        self.register_buffer("cos", cos, persistent=False)  # (max_seq_len, rotary_dim)
        self.register_buffer("sin", sin, persistent=False)

    def tables(self, n_positions: int, total: int) -> Angles:
        """Cosines and sines of positions 0 .. n_positions - 1 in a sequence of `total`, each (n_positions, rotary_dim)."""
        frequencies, factor = rope_frequencies(self.rotary_dim, self.theta, self.scaling, self.max_seq_len, total)
        angles = torch.outer(torch.arange(n_positions, device="cpu").float(), frequencies)
        return _of_pairs(angles.cos() * factor, angles.sin() * factor)

    def angles(self, at: At) -> Angles:
        cos, sin = self.cos, self.sin
        grown = self.grows and at.total > self.original
        if at.positions is None:
            if grown:
                cos, sin = (table.to(cos.device) for table in self.tables(at.total, at.total))
            return at.of(cos), at.of(sin)
        if grown:  # each row by the furthest that it has come itself, whatever stands beside it
            totals = at.positions.amax(dim=-1, keepdim=True) + 1
            frequencies, _ = rope_frequencies(self.rotary_dim, self.theta, self.scaling, self.max_seq_len, totals)
            turns = (at.positions[..., None].float() * frequencies[:, None])[:, None]
            return _of_pairs(turns.cos(), turns.sin())
        return at.of(cos)[:, None], at.of(sin)[:, None]


def rope_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None, max_seq_len: int, total: int | Tensor
) -> tuple[Tensor, float]:
    """(angle per position of each pair (rotary_dim / 2,) fp32, factor of cosines and sines) in a sequence of `total`.

    Where `total` is (B, 1), of dynamic scaling, the angles are (B, rotary_dim / 2).
    """
    where = total.device if isinstance(total, Tensor) else "cpu"
    exponents = torch.arange(0, rotary_dim, 2, device=where).float() / rotary_dim
    wavelengths = theta**exponents  # over 2 pi
    plain = 1.0 / wavelengths
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        original = scaling.original_max_seq_len or max_seq_len
        longest: Tensor | int
        if isinstance(total, Tensor):
            longest = total.clamp(min=original)
        else:
            longest = torch.tensor(total) if total > original else original  # fp32 where it grows, as in transformers
        stretch = scaling.factor * longest / original - (scaling.factor - 1)
        return 1.0 / (theta * stretch ** (rotary_dim / (rotary_dim - 2))) ** exponents, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return _yarn(wavelengths, rotary_dim, theta, scaling, max_seq_len), factor


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow pairs are divided, fast ones kept, those between blended by their turns within the original context."""
    assert scaling.original_max_seq_len is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_seq_len / (2 * math.pi / plain)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(wavelengths: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling, max_seq_len: int) -> Tensor:
    """Between two pairs, found by how often they turn within the original context, a linear ramp from kept to divided."""
    original = scaling.original_max_seq_len or max_seq_len / scaling.factor

    def pair(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), rotary_dim - 1)
    steps = torch.arange(rotary_dim // 2, device="cpu").float()
    divided = ((steps - first) / (last - first or 0.001)).clamp(0, 1)
    kept = 1 - divided
    return 1 / (scaling.factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept


def _of_pairs(cos: Tensor, sin: Tensor) -> Angles:
    """Of each pair's angle (..., rotary_dim / 2): of both its columns."""
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def rotate(x: Tensor, angles: Angles | None) -> Tensor:
    """Turn queries or keys (B, heads, T, D) by the angles of `Rotary`; columns past the angles' width stay."""
    if angles is None:
        return x
    cos, sin = (table.to(x.dtype) for table in angles)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turned.chunk(2, dim=-1)
    turned = torch.addcmul(turned * cos, torch.cat((-right, left), dim=-1), sin)
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def keep(x: Tensor, angles: Angles | None) -> Tensor:
    """`rotate` in a layer whose heads do not turn."""
    return x
