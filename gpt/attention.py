"""Attention: what a query may see, as a frozen description, and the kernels that compute it.

Dimensions:  B batch rows   T query positions   S key positions   H query heads   G key/value heads   D head size
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

Flex = Callable[..., Tensor]  # FlexAttention's kernel (Dong et al. 2024), compiled
FEW = 16  # queries
SHORT = 1024  # keys of all rows and groups that one query each meets, below which torch's fused kernel costs a CPU less
BLOCK = 128  # positions of a block mask's block: FlexAttention's own


@dataclass(frozen=True)
class Mask:
    """What a query may see: `allowed` (B, 1, T, S) bool, nothing later than itself if `causal`: the queries are then the last
    T of S, and unless they are all of them `allowed` says so too.

    `bias` (B or 1, H, T, S) is added to the scores. With `blocks` the kernel `flex` computes it, and skips what no query
    of a block may see. The kernels take: written out and fused all but `blocks`, flex `blocks` alone. With `spans` some
    rows after others attend, each under a mask of its own, to as many keys as are said with it.
    """

    causal: bool = True
    allowed: Tensor | None = None
    bias: Tensor | None = None
    blocks: BlockMask | None = None
    flex: Flex | None = None
    spans: tuple[tuple[slice, int, "Mask"], ...] = ()


def joined(spans: Iterable[tuple[slice, int, Mask]]) -> Mask:
    """One mask of (rows, keys that they read, their mask); a bias in these is of all rows and keys."""
    parts = tuple(spans)
    if len(parts) == 1:
        return parts[0][2]
    return Mask(spans=tuple((rows, end, replace(mask, bias=_of(mask.bias, rows, end))) for rows, end, mask in parts))


def _of(bias: Tensor | None, rows: slice, end: int) -> Tensor | None:
    return bias if bias is None else bias[rows if len(bias) > 1 else slice(None), :, :, :end]


def masked(
    n_tokens: int,
    *,
    doc_ids: Tensor | None = None,
    window: int | None = None,
    prefix: Tensor | None = None,
    bias: Tensor | None = None,
    device: torch.device | None = None,
) -> Mask:
    """Causal, of a whole sequence: inside one document, the last `window` positions alone, or both ways in a prefix.

    `doc_ids` (B, T): positions of a row with equal ids are one document. `prefix` (B, T) bool: these see each other (Dong
    et al. 2019; Raffel et al. 2020, section 3.2.1).
    """
    if doc_ids is None and prefix is None and (window is None or window >= n_tokens):
        return Mask(bias=bias)
    at = torch.arange(n_tokens, device=device)
    distance = at[:, None] - at
    allowed = (distance >= 0)[None, None]  # (1 or B, 1, T, T)
    if window is not None:
        allowed = allowed & (distance < window)
    if prefix is not None:
        allowed = allowed | (prefix[:, None, :, None] & prefix[:, None, None, :])
    if doc_ids is not None:
        allowed = allowed & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
    return Mask(causal=prefix is None, allowed=allowed, bias=bias)


def masked_blocks(
    n_tokens: int,
    flex: Flex,
    *,
    doc_ids: Tensor | None = None,
    window: int | None = None,
    device: torch.device | None = None,
) -> Mask:
    """What `masked` allows inside documents and a window, for `flex`: which blocks of keys a block of queries sees.

    Told from the ids in each block alone. Without documents all rows have one mask.
    """
    T, reach = n_tokens, window or n_tokens
    ids = torch.zeros(1, T, dtype=torch.int64, device=device) if doc_ids is None else doc_ids
    n = -(-T // BLOCK)
    padded = F.pad(ids, (0, n * BLOCK - T), mode="replicate" if T else "constant").view(len(ids), n, BLOCK)
    low, high = padded.amin(dim=-1), padded.amax(dim=-1)  # (B, n)
    first = torch.arange(n, device=ids.device) * BLOCK
    apart = first[:, None] - first  # (queries, keys): from the first of one to the first of the other
    near = (apart >= 0) & (apart - BLOCK + 1 < reach)
    touching = (high[:, None] >= low[:, :, None]) & (low[:, None] <= high[:, :, None]) & near  # (B, queries, keys)
    pure = low == high
    inside = (apart > 0) & (apart + BLOCK - 1 < reach)
    whole = touching & pure[:, None] & pure[:, :, None] & inside  # nothing hidden: computed without the mask
    if T % BLOCK:
        whole[:, :, -1] = False

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(how many keys' blocks, which: those first) of each block of queries."""
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(dim=-1, dtype=torch.int32)[:, None], order.int()[:, None]

    def near_enough(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < reach)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < reach) & (ids[b, q] == ids[b, k])

    part, full = listed(touching & ~whole), listed(whole)
    rule = near_enough if doc_ids is None else seen
    blocks = BlockMask.from_kv_blocks(*part, *full, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(T, T))
    return Mask(blocks=blocks, flex=flex)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v under `mask`: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

    Each group of H / G query heads shares a key/value head (Shazeer 2019; Ainslie et al. 2023). torch's fused kernel,
    except on the CPU at lengths where writing the scores out is faster (measured: docs/experiments.md), and for one query
    a row that does not see all keys, of which the fused kernels would copy every group's.
    """
    grouped = q.shape[1] != k.shape[1]
    if mask.spans:
        return torch.cat([attend(q[rows], k[rows, :, :end], v[rows, :, :end], own) for rows, end, own in mask.spans])
    if mask.flex is not None:
        return mask.flex(q, k, v, block_mask=mask.blocks, enable_gqa=grouped)
    apart = grouped and q.is_cuda and needs_every_head(q, mask)
    if q.shape[2] == 1 and (q.device.type == "cpu" or mask.allowed is not None or apart):
        if q.device.type == "cpu" and mask.bias is None and k.shape[0] * k.shape[1] * k.shape[2] <= SHORT:
            queries = q.view(len(q), k.shape[1], -1, q.shape[-1])  # the heads of a group as so many queries
            return F.scaled_dot_product_attention(queries, k, v, attn_mask=mask.allowed).view(q.shape)
        return written_out(q, k, v, mask)
    if q.device.type == "cpu" and k.shape[2] <= (2048 if q.dtype == torch.bfloat16 else 512):
        return written_out(q, k, v, mask)
    if apart:
        k, v = every_head(q, k, v)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.allowed if mask.bias is None else _added(mask, q),
        is_causal=mask.causal and mask.allowed is None and mask.bias is None,
        enable_gqa=grouped and not apart,
    )


def needs_every_head(q: Tensor, mask: Mask) -> bool:
    """Whether torch's fused kernels for GPUs want keys and values for every query head of their own. Flash and cuDNN's share
    them, in bfloat16 and without a mask; where only the third kernel could go on, torch 2.13 would write all scores out."""
    return q.dtype != torch.bfloat16 or mask.allowed is not None or mask.bias is not None


def every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (B, G, S, D), those of a group repeated for each of its query heads -> (B, H, S, D)."""
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The formula, queries in chunks so that causal attention skips most keys that it may not see."""
    (B, H, T, D), G, chunk = q.shape, k.shape[1], 256
    q = q * D**-0.5
    parts = []
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        seen = k.shape[2] - T + stop if mask.causal else k.shape[2]
        rows = q[:, :, start:stop].reshape(B, G, -1, D)  # the H / G heads of a group, one below the other
        scores = _products(rows, k[:, :, :seen]).view(B, H, stop - start, seen)
        if mask.bias is not None:
            scores = scores + mask.bias[:, :, start:stop, :seen].to(q.dtype)
        if mask.allowed is not None:
            scores = scores + _minus_infinity(~mask.allowed[:, :, start:stop, :seen], q.dtype)
        elif mask.causal:
            scores = _without_later(scores)
        weights = scores.softmax(dim=-1).view(B, G, -1, seen)
        parts.append((weights @ v[:, :, :seen]).view(B, H, stop - start, D))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _products(rows: Tensor, k: Tensor) -> Tensor:
    """rows (B, G, n, D) k^T -> (B, G, n, S). Where few rows meet many keys these are read as they lie: turning them into
    what the CPU's kernels want as a second factor costs more than the product (measured: docs/experiments.md)."""
    return rows @ k.mT if rows.shape[2] > FEW else (k @ rows.mT).mT.contiguous()


def _added(mask: Mask, q: Tensor) -> Tensor:
    """All of the mask as one tensor to add to the scores."""
    assert mask.bias is not None
    bias = mask.bias.to(q.dtype)
    if mask.allowed is not None:
        return bias + _minus_infinity(~mask.allowed, q.dtype)
    return bias + _later(q.shape[2], q) if mask.causal else bias


def _without_later(scores: Tensor) -> Tensor:
    """Scores (B, H, n, S) of the last n of S positions, -inf for keys that come after their query: among the last n alone."""
    n, seen = scores.shape[2:]
    if scores.requires_grad:  # whole: to change a part costs the backward pass a copy
        return scores + F.pad(_later(n, scores), (seen - n, 0))
    scores[..., seen - n :] += _later(n, scores)
    return scores


def _later(n: int, like: Tensor) -> Tensor:
    """(n, n): -inf where a key comes after the query, else 0."""
    return torch.full((n, n), -math.inf, dtype=like.dtype, device=like.device).triu(1)


def _minus_infinity(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where `hidden`, else 0: adding it costs no copy of the scores in the backward pass, as masked_fill does."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -math.inf)
