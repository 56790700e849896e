"""The causal decoder: positions, attention with shared key/value heads, gated or plain MLPs, residual blocks.

It knows tensors and its own settings. Loss, optimizer, sampling, devices and files live elsewhere. A variant is a part
chosen in `__init__`; no `forward` asks which.

Dimensions:  B batch rows   T query positions   S key positions (cache included)   C model width (d_model)
             H query heads  G key/value heads   D head size   F MLP hidden width   V vocabulary   L layers
Inside attention tensors are (B, heads, positions, D). Parameters carry the names of Hugging Face's Llama and Qwen3.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.attention import Flex, Mask, attend, joined, masked, masked_blocks
from gpt.cache import KVCache, visible
from gpt.config import Count, Settings
from gpt.positions import (
    Angles,
    At,
    Learned,
    Position,
    RelativeBias,
    RopeScaling,
    Rotary,
    Sinusoidal,
    by_length,
    keep,
    rotate,
)


class ModelConfig(Settings):
    """The shape of a decoder."""

    vocab_size: int | None = Field(None, ge=1, description="rows of the embedding; null: the tokenizer's, up to 64")
    max_seq_len: Count | None = Field(None, ge=1, description="longest context in tokens; null: data.seq_len")
    n_layer: int = Field(6, ge=1, description="residual blocks")
    d_model: int = Field(256, ge=1, description="width of the residual stream")
    n_head: int = Field(4, ge=1, description="query heads")
    n_kv_head: int | None = Field(None, ge=1, description="key/value heads, a divisor of n_head; null: n_head")
    head_dim: int | None = Field(None, ge=1, description="size of a head; null: d_model / n_head")
    d_ff: int | None = Field(
        None, ge=1, description="hidden width of the MLP; null: 8/3 d_model (gated) or 4 d_model, up to 64"
    )
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2"] = Field(
        "swiglu", description="kind of MLP; the first two are gated"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="kind of normalization")
    norm_at: Literal["pre", "post", "output"] = Field(
        "pre",
        description="pre: of what a sub-layer reads; post: of the stream after it was added; output: of what is added",
    )
    norm_gain: bool = Field(True, description="norms have trained gains (and, layernorm, biases)")
    norm_eps: float = Field(1e-6, gt=0, description="added to the variance")
    embed_norm: bool = Field(False, description="normalize the embeddings")
    position: Literal["rotary", "learned", "sinusoidal", "relative", "none"] = Field(
        "rotary", description="how order is known; relative: T5's bias of the scores"
    )
    rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary and sinusoidal wavelengths")
    rope_scaling: RopeScaling | None = Field(None, description="stretches rotary angles for a longer context")
    rotary_dim: int | None = Field(None, ge=2, description="columns of a head that turn, even; null: all")
    nope_layers: tuple[int, ...] = Field((), strict=False, description="layers, from 0, whose heads do not turn")
    relative_buckets: int = Field(32, ge=2, description="relative: kinds of distances")
    relative_max_distance: int = Field(128, ge=2, description="relative: from here on distances are one kind")
    window: Count | None = Field(None, ge=1, description="sliding window: keys that a query sees, itself included")
    full_layers: tuple[int, ...] = Field((), strict=False, description="layers, from 0, without the sliding window")
    prefix_lm: bool = Field(False, description="tokens of a prompt see each other both ways")
    qk_norm: bool | Literal["whole"] = Field(True, description="normalize each head's q and k; whole: all heads'")
    attention_bias: bool | Literal["qkv"] = Field(
        False, description="biases in the attention's four projections, or in the three of queries, keys and values"
    )
    mlp_bias: bool = Field(False, description="biases in the MLP's projections")
    tie_embeddings: bool = Field(True, description="the output head is the embedding matrix")
    logit_softcap: float | None = Field(None, gt=0, description="logits are softcap * tanh(logits / softcap)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the embeddings and of each branch as it is added")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    init_output: Literal["scaled", "zero"] = Field(
        "scaled", description="projections back into the residual stream: init_std / sqrt(2 n_layer), or zero"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self)
        _check_positions(self)
        _check_layers(self)
        return self

    @property
    def d_head(self) -> int:
        return self.head_dim or self.d_model // self.n_head

    @property
    def d_rotary(self) -> int:
        return self.rotary_dim or self.d_head

    @property
    def n_group(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def gated(self) -> bool:
        return self.mlp in GATES

    @property
    def d_hidden(self) -> int:
        return self.d_ff or 64 * math.ceil((8 * self.d_model / 3 if self.gated else 4 * self.d_model) / 64)

    def window_of(self, layer: int) -> int | None:
        return None if layer in self.full_layers else self.window


def _check_heads(config: ModelConfig) -> None:
    if config.head_dim is None and config.d_model % config.n_head:
        raise ValueError(f"d_model ({config.d_model}) must be a multiple of n_head ({config.n_head}), or set head_dim")
    if config.n_head % config.n_group:
        raise ValueError(f"n_head ({config.n_head}) must be a multiple of n_kv_head ({config.n_group})")


def _check_positions(config: ModelConfig) -> None:
    scaling, buckets, furthest = config.rope_scaling, config.relative_buckets, config.relative_max_distance
    if config.position == "rotary":
        if config.d_rotary % 2:
            name = "head_dim" if config.rotary_dim is None else "rotary_dim"
            raise ValueError(f"{name} ({config.d_rotary}) must be even: RoPE rotates pairs")
        if config.d_rotary > config.d_head:
            raise ValueError(f"rotary_dim ({config.d_rotary}) must be at most head_dim ({config.d_head})")
        if by_length(scaling) and config.d_rotary == 2:
            raise ValueError("dynamic scaling stretches the slower pairs, and 2 columns are one pair: use 'linear'")
    elif scaling is not None or config.rotary_dim is not None or config.nope_layers:
        raise ValueError(f"rope_scaling, rotary_dim and nope_layers are for position 'rotary', not {config.position!r}")
    if config.position == "relative" and furthest <= buckets // 2:
        raise ValueError(f"relative_max_distance ({furthest}) must be above half of relative_buckets ({buckets})")


def _check_layers(config: ModelConfig) -> None:
    for name, layers in (("nope_layers", config.nope_layers), ("full_layers", config.full_layers)):
        if beyond := [layer for layer in layers if not 0 <= layer < config.n_layer]:
            raise ValueError(f"{name} names layer {beyond[0]}; the layers are 0 to {config.n_layer - 1}")
    if config.full_layers and config.window is None:
        raise ValueError("full_layers are layers without the sliding window; set window, or leave them out")


def position_of(config: ModelConfig) -> Position:
    """The part that tells a decoder the order of its tokens."""
    assert config.max_seq_len is not None
    parts: dict[str, Callable[[int], Position]] = {
        "rotary": lambda n: Rotary(config.d_rotary, n, config.rope_theta, config.rope_scaling),
        "learned": lambda n: Learned(n, config.d_model),
        "sinusoidal": lambda n: Sinusoidal(n, config.d_model, config.rope_theta),
        "relative": lambda n: RelativeBias(config.n_head, config.relative_buckets, config.relative_max_distance),
        "none": lambda n: Position(),
    }
    return parts[config.position](config.max_seq_len)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products of x: autocast's, or that of x."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no such device
        return x.dtype
    return torch.get_autocast_dtype(device)


class RMSNorm(nn.Module):
    """x / rms(x) * gain, computed in at least fp32 and returned in the dtype of x (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class GainFreeRMSNorm(nn.Module):
    """x / rms(x)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, (self.width,), None, self.eps).to(x.dtype)


def norm_of(config: ModelConfig, width: int) -> nn.Module:
    """A norm over `width` columns."""
    if config.norm == "layernorm":
        return nn.LayerNorm(width, config.norm_eps, elementwise_affine=config.norm_gain)
    return (RMSNorm if config.norm_gain else GainFreeRMSNorm)(width, config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, G, D = config.d_model, config.n_head, config.n_group, config.d_head
        self.layer, self.d_head = layer, D
        self.q_proj = nn.Linear(C, H * D, bias=bool(config.attention_bias))
        self.k_proj = nn.Linear(C, G * D, bias=bool(config.attention_bias))
        self.v_proj = nn.Linear(C, G * D, bias=bool(config.attention_bias))
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias is True)
        whole = config.qk_norm == "whole"
        self.q_normed, self.k_normed = (H * D, G * D) if whole else (D, D)
        self.q_norm = norm_of(config, self.q_normed) if config.qk_norm else nn.Identity()
        self.k_norm = norm_of(config, self.k_normed) if config.qk_norm else nn.Identity()
        self.turn = keep if layer in config.nope_layers else rotate

    def project(self, x: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, T, D), k and v (B, G, T, D), rotated to their positions."""
        return self.placed(self.q_proj(x), self.k_proj(x), self.v_proj(x), angles)

    def placed(self, q: Tensor, k: Tensor, v: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the three projections gave, (B, T, heads * D) each, as `project` returns it."""
        B, T, _ = q.shape
        q = self.q_norm(q.view(B, T, -1, self.q_normed)).view(B, T, -1, self.d_head)
        k = self.k_norm(k.view(B, T, -1, self.k_normed)).view(B, T, -1, self.d_head)
        v = v.view(B, T, -1, self.d_head)
        return self.turn(q.transpose(1, 2), angles), self.turn(k.transpose(1, 2), angles), v.transpose(1, 2)

    def forward(self, x: Tensor, angles: Angles | None, mask: Mask, cache: KVCache | None, at: Tensor | None) -> Tensor:
        q, k, v = self.project(x, angles)
        if cache is not None:
            assert at is not None
            k, v = cache.append(self.layer, k, v, at)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation (Hendrycks and Gimpel 2016, section 2), as GPT-1 and GPT-2 compute it."""
    return F.gelu(x, approximate="tanh")


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """The same, since (1 + tanh(z)) / 2 = sigmoid(2 z): what a compiler makes of it takes a CPU half the time."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, SwiGLU and GEGLU)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, F_ = config.d_model, config.d_hidden
        self.gate_proj = nn.Linear(C, F_, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, F_, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F_, C, bias=config.mlp_bias)
        self.activation = GATES[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """down(activation(up(x))) (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_hidden, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.mlp]
        self.down_proj = nn.Linear(config.d_hidden, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm: each sub-layer reads a normalized copy of the stream and adds its answer."""

    norms = ("input_layernorm", "post_attention_layernorm")
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        for name in self.norms:
            setattr(self, name, norm_of(config, config.d_model))
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(config) if config.gated else PlainMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, angles: Angles | None, mask: Mask, cache: KVCache | None, at: Tensor | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), angles, mask, cache, at))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class PostNormBlock(Block):
    """Post-norm: the stream itself is normalized after each addition (Vaswani et al. 2017; Radford et al. 2018)."""

    norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    def forward(self, x: Tensor, angles: Angles | None, mask: Mask, cache: KVCache | None, at: Tensor | None) -> Tensor:
        x = self.post_attention_layernorm(x + self.dropout(self.self_attn(x, angles, mask, cache, at)))
        return self.post_feedforward_layernorm(x + self.dropout(self.mlp(x)))


class OutputNormBlock(Block):
    """Each sub-layer reads the stream as it is, and its answer is normalized (OLMo 2, Walsh et al. 2025, section 3.2)."""

    norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    def forward(self, x: Tensor, angles: Angles | None, mask: Mask, cache: KVCache | None, at: Tensor | None) -> Tensor:
        x = x + self.dropout(self.post_attention_layernorm(self.self_attn(x, angles, mask, cache, at)))
        return x + self.dropout(self.post_feedforward_layernorm(self.mlp(x)))


BLOCKS: dict[str, type[Block]] = {"pre": Block, "post": PostNormBlock, "output": OutputNormBlock}


class Decoder(nn.Module):
    """Tokens to features: everything but the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None and config.max_seq_len is not None
        self.max_seq_len = config.max_seq_len
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.position = position_of(config)
        self.embed_norm = norm_of(config, config.d_model) if config.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BLOCKS[config.norm_at](config, layer) for layer in range(config.n_layer))
        self.windows = [config.window_of(layer) for layer in range(config.n_layer)]
        self.norm = nn.Identity() if config.norm_at == "post" else norm_of(config, config.d_model)
        self.flex: Flex | None = None  # a kernel for documents and windows, where one is applied

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        T, device = tokens.shape[1], tokens.device
        total = T if cache is None else cache.end(T)
        if total > self.max_seq_len:
            raise ValueError(f"{total} tokens do not fit the model's context (max_seq_len {self.max_seq_len})")
        slots = None if cache is None else cache.positions(T)  # of the cache's rows
        at = At(slots if positions is None else positions, T, total)
        queries = at.rows(device)
        keys = queries if cache is None or cache.empty else torch.arange(total, device=device)[None]
        angles, bias = self.position.angles(at), self.position.bias(queries, keys)
        masks = {window: self.mask(window, bias, tokens, doc_ids, cache, slots, prefix) for window in set(self.windows)}
        x = self.dropout(self.embed_norm(self.position.embed(self.embed_tokens(tokens), at)))  # (B, T, C)
        x = x.to(product_dtype(x))  # the stream itself: each projection would copy what it reads into that dtype
        for block, window in zip(self.layers, self.windows, strict=True):
            x = block(x, angles, masks[window], cache, slots)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def mask(
        self,
        window: int | None,
        bias: Tensor | None,
        tokens: Tensor,
        doc_ids: Tensor | None,
        cache: KVCache | None,
        slots: Tensor | None,
        prefix: Tensor | None,
    ) -> Mask:
        """What these queries see: inside documents, over the cache, within the window, with the scores' bias."""
        if cache is not None and not cache.empty:
            assert slots is not None and doc_ids is None and prefix is None, "a cache holds one document a row"
            T = tokens.shape[1]
            return joined(
                (rows, end, Mask(causal=T > 1, allowed=visible(cache, slots, window, rows, end), bias=bias))
                for rows, end in cache.spans(T)
            )
        T, device = tokens.shape[1], tokens.device
        hiding = doc_ids is not None or (cache is None and window is not None and window < T)
        if self.flex is not None and hiding and prefix is None and bias is None:
            return masked_blocks(T, self.flex, doc_ids=doc_ids, window=window, device=device)
        return masked(T, doc_ids=doc_ids, window=window, prefix=prefix, bias=bias, device=device)


class Softcap(nn.Module):
    """Logits that stay within +-cap (Gemma Team 2024, section 2)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        return self.cap * torch.tanh(logits / self.cap)


class GPT(nn.Module):
    """A decoder and its output head: tokens (B, T) int64 -> logits (B, T, V) for the token after each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.d_model, self.model.embed_tokens.num_embeddings, bias=False)
        self.softcap = nn.Identity() if config.logit_softcap is None else Softcap(config.logit_softcap)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def features(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Normalized features (B, T, C) that `logits` turns into logits.

        `positions` (B, T) int64 default to 0 .. T-1, after the cache's rows where there is one; `doc_ids` (B, T) keep
        attention inside equal ids; `cache` is read, extended and advanced; positions of a row where `prefix` (B, T) bool
        is true see each other both ways.
        """
        return self.model(tokens, positions, doc_ids, cache, prefix)

    def logits(self, features: Tensor) -> Tensor:
        """Features (..., C) -> logits (..., V)."""
        return self.softcap(self.lm_head(features))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        return self.logits(self.features(tokens, positions, doc_ids, cache, prefix))

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache of this model's shape, device and dtype."""
        c, weight = self.config, self.model.embed_tokens.weight
        return KVCache(c.n_layer, batch, c.n_group, max_len, c.d_head, weight.device, weight.dtype)


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter in place."""
    for parameter, value in initial_weights(model, seed):
        parameter.copy_(value)


def initial_weights(model: GPT, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter and what it begins as, a pure function of (config, seed) on the CPU, whatever the model's device.

    Matrices are normal with `init_std`; the two projections back into the stream shrink with depth or start at zero
    (GPT-2, section 2.3); gains are one and biases zero.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    output_std = {"scaled": config.init_std / math.sqrt(2 * config.n_layer), "zero": 0.0}[config.init_output]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield parameter, torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")
        else:
            std = output_std if name.endswith(("o_proj.weight", "down_proj.weight")) else config.init_std
            yield parameter, torch.randn(parameter.shape, generator=generator, device="cpu") * std
