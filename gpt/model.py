"""The causal decoder: RoPE, pre-norm residual blocks, attention with shared key/value heads, gated or plain MLPs.

It knows tensors and its own settings. Loss, optimizer, sampling, devices and files live elsewhere.

Dimensions:  B batch rows   T query positions   S key positions (cache included)   C model width (d_model)
             H query heads  G key/value heads   D head size   F MLP hidden width   V vocabulary   L layers
Inside attention tensors are (B, heads, positions, D). Parameters carry the names of Hugging Face's Llama and Qwen3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from gpt.cache import KVCache
from gpt.config import Count, Settings


class ModelConfig(Settings):
    """The shape of a decoder."""

    vocab_size: int | None = Field(
        None, ge=1, description="rows of the embedding; null: the tokenizer's size rounded up to 64"
    )
    max_seq_len: Count | None = Field(None, ge=1, description="longest context in tokens; null: data.seq_len")
    n_layer: int = Field(6, ge=1, description="residual blocks")
    d_model: int = Field(256, ge=1, description="width of the residual stream")
    n_head: int = Field(4, ge=1, description="query heads")
    n_kv_head: int | None = Field(
        None, ge=1, description="key/value heads, a divisor of n_head; null: n_head, 1: multi-query"
    )
    head_dim: int | None = Field(None, ge=2, description="size of a head, even; null: d_model / n_head")
    d_ff: int | None = Field(
        None, ge=1, description="hidden width of the MLP; null: 8/3 d_model (swiglu) or 4 d_model, up to 64"
    )
    mlp: Literal["swiglu", "gelu", "relu", "relu2"] = Field("swiglu", description="kind of MLP")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="kind of normalization")
    norm_eps: float = Field(1e-6, gt=0, description="added to the variance")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary wavelengths")
    qk_norm: bool = Field(True, description="normalize each head's query and key (Qwen3)")
    attention_bias: bool = Field(False, description="biases in the attention's four projections")
    mlp_bias: bool = Field(False, description="biases in the MLP's projections")
    tie_embeddings: bool = Field(True, description="the output head is the embedding matrix")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of the embeddings and of each branch before it is added"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    init_output: Literal["scaled", "zero"] = Field(
        "scaled", description="projections back into the residual stream: init_std / sqrt(2 n_layer), or zero"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_head:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_head ({self.n_head}), or set head_dim")
        if self.d_head % 2:
            raise ValueError(f"head_dim ({self.d_head}) must be even: RoPE rotates pairs")
        if self.n_head % self.n_group:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_group})")
        return self

    @property
    def d_head(self) -> int:
        return self.head_dim or self.d_model // self.n_head

    @property
    def n_group(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def d_hidden(self) -> int:
        width = 8 * self.d_model / 3 if self.mlp == "swiglu" else 4 * self.d_model
        return self.d_ff or 64 * math.ceil(width / 64)


class Rotary(nn.Module):
    """Rotary positions: turn each pair (i, i + D/2) of a head by position * theta^(-2i/D) (Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.max_seq_len is not None
        half = torch.arange(0, config.d_head, 2, device="cpu") / config.d_head
        angles = torch.outer(torch.arange(config.max_seq_len, device="cpu"), config.rope_theta**-half).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (max_seq_len, D)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: Tensor | None, n_tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin at `positions` (B, T), None meaning 0 .. n_tokens - 1; broadcastable to (B, heads, T, D)."""
        if n_tokens > len(self.cos):
            raise ValueError(f"{n_tokens} tokens do not fit the model's context (max_seq_len {len(self.cos)})")
        if positions is None:
            return self.cos[:n_tokens], self.sin[:n_tokens]
        return self.cos[positions][:, None], self.sin[positions][:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, T, D) by the angles of `Rotary`."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


Flex = Callable[..., Tensor]  # FlexAttention's kernel (Dong et al. 2024), compiled


@dataclass(frozen=True)
class Mask:
    """What a query may see: `allowed` (B, 1, T, S) bool; else all, or if `causal` (T = S) the past and itself.

    With `blocks` the kernel `flex` computes it, and skips what no query of a block may see.
    """

    causal: bool = True
    allowed: Tensor | None = None
    blocks: BlockMask | None = None
    flex: Flex | None = None


BLOCK = 128  # positions of a block mask's block: FlexAttention's own


def same_document(doc_ids: Tensor) -> Mask:
    """Causal, inside one document: positions of a row with equal ids; doc_ids (B, T)."""
    same = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]  # (B, 1, T, T)
    return Mask(allowed=same.tril())


def same_document_blocks(doc_ids: Tensor, flex: Flex) -> Mask:
    """What `same_document` allows, for `flex`: which blocks of keys a block of queries sees, from the ids in each."""
    B, T = doc_ids.shape
    n = -(-T // BLOCK)
    padded = F.pad(doc_ids, (0, n * BLOCK - T), mode="replicate" if T else "constant").view(B, n, BLOCK)
    low, high = padded.amin(dim=-1), padded.amax(dim=-1)  # (B, n)
    past = torch.ones(n, n, dtype=torch.bool, device=doc_ids.device).tril()
    touching = (high[:, None] >= low[:, :, None]) & (low[:, None] <= high[:, :, None]) & past  # (B, queries, keys)
    pure = low == high
    whole = touching & pure[:, None] & pure[:, :, None] & past.tril(-1)  # nothing hidden: computed without the mask
    if T % BLOCK:
        whole[:, :, -1] = False

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(how many keys' blocks, which: those first) of each block of queries."""
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(dim=-1, dtype=torch.int32)[:, None], order.int()[:, None]

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (doc_ids[b, q] == doc_ids[b, k])

    part, full = listed(touching & ~whole), listed(whole)
    blocks = BlockMask.from_kv_blocks(*part, *full, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(T, T))
    return Mask(blocks=blocks, flex=flex)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under `mask`: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

    Each group of H / G query heads shares a key/value head (Shazeer 2019; Ainslie et al. 2023). torch's fused kernel,
    except on the CPU at lengths where writing the scores out is faster (measured: docs/experiments.md).
    """
    if mask.flex is not None:
        return mask.flex(q, k, v, block_mask=mask.blocks, enable_gqa=q.shape[1] != k.shape[1])
    if q.device.type == "cpu" and k.shape[2] <= (2048 if q.dtype == torch.bfloat16 else 512):
        return _attend_written_out(q, k, v, mask)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.allowed,
        is_causal=mask.causal and mask.allowed is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _attend_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The formula, queries in chunks so that causal attention skips most keys that it may not see."""
    (B, H, T, D), G, chunk = q.shape, k.shape[1], 256
    q = q * D**-0.5
    parts = []
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        seen = stop if mask.causal else k.shape[2]
        rows = q[:, :, start:stop].reshape(B, G, -1, D)  # the H / G heads of a group, one below the other
        scores = (rows @ k[:, :, :seen].mT).view(B, H, stop - start, seen)
        if mask.allowed is not None:
            scores = scores + _minus_infinity(~mask.allowed[:, :, start:stop, :seen], q.dtype)
        elif mask.causal:
            hidden = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).triu(start + 1)
            scores = scores + _minus_infinity(hidden, q.dtype)
        weights = scores.softmax(dim=-1).view(B, G, -1, seen)
        parts.append((weights @ v[:, :, :seen]).view(B, H, stop - start, D))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where `hidden`, else 0: adding it costs no copy of the scores in the backward pass, as masked_fill does."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -math.inf)


class RMSNorm(nn.Module):
    """x / rms(x) * gain, computed in fp32 and returned in the dtype of x (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, G, D = config.d_model, config.n_head, config.n_group, config.d_head
        norm = NORMS[config.norm]
        self.layer, self.d_head = layer, D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)
        self.q_norm = norm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = norm(D, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, T, D), k and v (B, G, T, D), rotated to their positions."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.d_head)
        k = self.k_proj(x).view(B, T, -1, self.d_head)
        v = self.v_proj(x).view(B, T, -1, self.d_head)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        return q, k, v.transpose(1, 2)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None, at: Tensor | None
    ) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            assert at is not None
            k, v = cache.append(self.layer, k, v, at)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, F_ = config.d_model, config.d_hidden
        self.gate_proj = nn.Linear(C, F_, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, F_, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F_, C, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021
}


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

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.input_layernorm = norm(config.d_model, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm(config.d_model, eps=config.norm_eps)
        self.mlp = GatedMLP(config) if config.mlp == "swiglu" else PlainMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None, at: Tensor | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, at))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Tokens to features: everything but the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.rotary = Rotary(config)
        self.flex: Flex | None = None  # a kernel for attention inside documents, where one is applied

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        at = None if cache is None else cache.positions(tokens.shape[1])
        mask = self.mask(doc_ids, cache, at)
        x = self.dropout(self.embed_tokens(tokens))  # (B, T, C)
        cos, sin = self.rotary(at if positions is None else positions, tokens.shape[1])
        for block in self.layers:
            x = block(x, cos, sin, mask, cache, at)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def mask(self, doc_ids: Tensor | None, cache: KVCache | None, at: Tensor | None) -> Mask:
        """Causal; inside one document where `doc_ids` (B, T) says so; over the cache where there is one."""
        if cache is not None and not cache.empty:
            assert at is not None and doc_ids is None, "a cache holds one document a row"
            return Mask(causal=False, allowed=cache.visible(at))
        if doc_ids is None:
            return Mask()
        return same_document(doc_ids) if self.flex is None else same_document_blocks(doc_ids, self.flex)


class GPT(nn.Module):
    """A decoder and its output head: tokens (B, T) int64 -> logits (B, T, V) for the token after each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.d_model, self.model.embed_tokens.num_embeddings, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def features(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Normalized features (B, T, C) that `lm_head` turns into logits.

        `positions` (B, T) int64 default to 0 .. T-1, after the cache's rows where there is one; `doc_ids` (B, T) keep
        attention inside equal ids; `cache` is read, extended and advanced.
        """
        return self.model(tokens, positions, doc_ids, cache)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        return self.lm_head(self.features(tokens, positions, doc_ids, cache))

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache of this model's shape, device and dtype."""
        c, weight = self.config, self.lm_head.weight
        return KVCache(c.n_layer, batch, c.n_group, max_len, c.d_head, weight.device, weight.dtype)


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter in place, a pure function of (config, seed) on the CPU, whatever the model's device.

    Matrices are normal with `init_std`; the two projections back into the stream shrink with depth or start at zero
    (GPT-2, section 2.3); gains are one and biases zero.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    output_std = {"scaled": config.init_std / math.sqrt(2 * config.n_layer), "zero": 0.0}[config.init_output]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            std = output_std if name.endswith(("o_proj.weight", "down_proj.weight")) else config.init_std
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
