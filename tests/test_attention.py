"""Attention: each kernel against the formula written out, and the masks against what a pair may see."""

import math

import pytest
import torch
from conftest import Build, Tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from gpt.attention import Mask, attend, every_head, masked, masked_blocks, written_out

HEADS = [(4, 4), (4, 2), (4, 1)]  # multi-head, grouped, multi-query


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(H: int, G: int, T: int, D: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(2, n, T, D, seed=i, dtype=dtype) for i, n in enumerate((H, G, G)))  # type: ignore[return-value]


@pytest.mark.parametrize(("H", "G"), HEADS)
def test_attention_is_the_written_formula(H: int, G: int) -> None:
    q, k, v = heads(H, G, T=7)
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(H):
            for t in range(7):
                past = [q[b, h, t] @ k[b, h * G // H, s] / math.sqrt(8) for s in range(t + 1)]
                weights = torch.stack(past).exp()
                expected[b, h, t] = (weights / weights.sum()) @ v[b, h * G // H, : t + 1]
    torch.testing.assert_close(attend(q, k, v, Mask()), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("H", "G"), HEADS)
def test_on_a_gpu_heads_share_keys_where_its_kernels_can_and_have_their_own_elsewhere(
    monkeypatch: pytest.MonkeyPatch, H: int, G: int
) -> None:
    """Else torch would write all scores out. Told from tensors that say they stand on one, and have no numbers."""
    asked: list[tuple[int, bool]] = []

    def fused(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **how: object) -> Tensor:
        asked.append((k.shape[1], enable_gqa))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    hidden = Mask(allowed=torch.ones(1, 1, 7, 7, dtype=torch.bool))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype, mask in ((torch.bfloat16, Mask()), (torch.float16, Mask()), (torch.bfloat16, hidden)):
            q, k, v = (torch.empty(2, n, 7, 8, dtype=dtype, device="cuda") for n in (H, G, G))
            assert attend(q, k, v, mask).shape == q.shape
    assert asked == [(G, G != H), (H, False), (H, False)]
    q, k, v = heads(H, G, 7)
    ours = attend(q, *every_head(q, k, v), Mask())
    torch.testing.assert_close(ours, attend(q, k, v, Mask()))


def masks(T: int) -> dict[str, tuple[Mask, Tensor]]:
    """Each mask with the (B, 1, T, T) table of what it allows."""
    causal = torch.ones(2, 1, T, T, dtype=torch.bool).tril()
    doc_ids = torch.stack([torch.arange(T) // 100, torch.arange(T) // 270])
    documents = causal & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])
    scattered = (normal(2, 1, T, T, seed=9) > 0) | torch.eye(T, dtype=torch.bool)
    return {
        "causal": (Mask(), causal),
        "documents": (Mask(allowed=documents), documents),
        "not causal": (Mask(causal=False, allowed=scattered), scattered),
        "all": (Mask(causal=False), torch.ones_like(causal)),
    }


def test_a_mask_allows_the_pairs_that_a_loop_over_all_of_them_allows() -> None:
    ids, T = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 3, 3, 3, 3, 3, 3]]), 8
    prompt = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    for documents in (None, ids):
        for prefix in (None, prompt):
            for window in (None, 1, 3, 20):
                expected = torch.zeros(2, 1, T, T, dtype=torch.bool)
                for b in range(2):
                    for t in range(T):
                        for s in range(T):
                            past = s <= t and (window is None or t - s < window)
                            both = prefix is not None and bool(prefix[b, t] and prefix[b, s])
                            same = documents is None or documents[b, t] == documents[b, s]
                            expected[b, 0, t, s] = (past or both) and same
                mask = masked(T, doc_ids=documents, window=window, prefix=prefix)
                allowed = torch.ones(1, 1, T, T, dtype=torch.bool) if mask.allowed is None else mask.allowed
                allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril() if mask.causal else allowed
                assert torch.equal(allowed.expand_as(expected), expected)


@pytest.mark.parametrize("kind", masks(1))
@pytest.mark.parametrize("T", [5, 300])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_bias_is_added_to_the_scores_before_the_softmax(kind: str, T: int, rows: int) -> None:
    mask, allowed = masks(T)[kind]
    bias = normal(rows, 4, T, T, seed=7).requires_grad_()
    q, k, v = heads(4, 2, T)
    scores = q @ k.repeat_interleave(2, dim=1).mT / math.sqrt(8) + bias
    expected = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1) @ v.repeat_interleave(2, dim=1)
    biased = Mask(mask.causal, mask.allowed, bias)
    direction = normal(*expected.shape, seed=5)
    slow = torch.autograd.grad(expected, bias, direction)[0]
    for ours in (written_out(q, k, v, biased), attend(q, k, v, biased)):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(ours, bias, direction)[0], slow, atol=1e-11, rtol=1e-11)


def test_torchs_kernel_is_given_the_bias_and_the_mask() -> None:
    q, k, v = heads(4, 2, T=520)
    bias = normal(1, 4, 520, 520, seed=7)
    for kind, (mask, _) in masks(520).items():
        biased = Mask(mask.causal, mask.allowed, bias)
        torch.testing.assert_close(
            attend(q, k, v, biased),
            written_out(q, k, v, biased),
            atol=1e-12,
            rtol=0,
            msg=lambda text, kind=kind: kind + text,
        )


def test_what_is_hidden_has_no_weight_at_all() -> None:
    """-inf before the softmax: scores multiplied by zeros would leave it a weight."""
    q, k, v = heads(4, 4, T=6)
    v[:, :, 3:] = 1e9
    assert attend(q, k, v, Mask())[:, :, :3].abs().max() < 10


@pytest.mark.parametrize("kind", masks(1))
@pytest.mark.parametrize("T", [5, 256, 600])
@pytest.mark.parametrize(("H", "G"), HEADS)
def test_written_out_attention_and_its_gradients_equal_torchs(H: int, G: int, T: int, kind: str) -> None:
    mask, allowed = masks(T)[kind]
    inputs = [x.requires_grad_() for x in heads(H, G, T)]
    ours = written_out(*inputs, mask)
    torchs = F.scaled_dot_product_attention(*inputs, attn_mask=allowed, enable_gqa=H != G)
    torch.testing.assert_close(ours, torchs, atol=1e-12, rtol=1e-12)
    direction = normal(*ours.shape, seed=5)
    for our_grad, torchs_grad in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(torchs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(our_grad, torchs_grad, atol=1e-11, rtol=1e-11)


def test_causal_attention_skips_keys_in_the_future() -> None:
    q, k, v = heads(4, 2, T=1024)
    with FlopCounterMode(display=False) as causal:
        written_out(q, k, v, Mask())
    with FlopCounterMode(display=False) as full:
        written_out(q, k, v, Mask(causal=False))
    assert causal.get_total_flops() < 0.65 * full.get_total_flops()


def test_written_out_attention_in_bf16_is_as_close_as_torchs() -> None:
    q, k, v = heads(4, 2, T=300, D=32)
    exact = written_out(q, k, v, Mask())
    q, k, v = (x.bfloat16() for x in (q, k, v))
    ours = (written_out(q, k, v, Mask()).double() - exact).abs().mean()
    torchs = (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).double() - exact).abs().mean()
    assert ours < 1.5 * torchs < 0.01


@pytest.mark.parametrize("kind", masks(1))
def test_both_ways_to_attend_agree_where_one_hands_over_to_the_other(kind: str) -> None:
    q, k, v = heads(4, 2, T=513)
    mask, _ = masks(513)[kind]
    assert attend(q, k, v, mask).shape == q.shape
    torch.testing.assert_close(attend(q, k, v, mask), written_out(q, k, v, mask), atol=1e-12, rtol=0)


# FlexAttention's description of a document mask


def packed_documents(rows: int, length: int, longest: int, seed: int = 0) -> Tensor:
    """(rows, length) document numbers that ascend along a row."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, length, generator=generator) < 2 / longest).cumsum(dim=-1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [1, 5, 128, 200, 384])
@pytest.mark.parametrize("longest", [3, 60, 10**6])
@pytest.mark.parametrize("window", [None, 1, 100, 129, 300])
def test_flex_attention_computes_the_mask_of_every_pair(length: int, longest: int, window: int | None) -> None:
    ids = packed_documents(2, length, longest)
    q, k, v = (torch.randn(2, heads, length, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    ours = attend(q, k, v, masked_blocks(ids.shape[1], flex_attention, doc_ids=ids, window=window))
    torch.testing.assert_close(ours, attend(q, k, v, masked(length, doc_ids=ids, window=window)), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [5, 300])
@pytest.mark.parametrize("window", [1, 100, 200])
def test_a_window_without_documents_is_one_mask_for_all_rows(length: int, window: int) -> None:
    q, k, v = (torch.randn(2, heads, length, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    mask = masked_blocks(length, flex_attention, window=window)
    assert mask.blocks is not None and mask.blocks.shape[0] == 1
    torch.testing.assert_close(
        attend(q, k, v, mask), attend(q, k, v, masked(length, window=window)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.inference_mode()
def test_a_model_with_windows_has_the_same_logits_by_either_kernel_and_over_a_cache(
    build: Build, tokens: Tokens
) -> None:
    x, model = tokens(2, 32), build(n_kv_head=2, window=5, full_layers=(1,))
    dense = model(x)
    model.model.flex = flex_attention
    assert (model(x) - dense).abs().max() < 1e-4
    cache = model.new_cache(2, 32)
    steps = [model(x[:, :20], cache=cache), *(model(x[:, i : i + 1], cache=cache) for i in range(20, 32))]
    assert (torch.cat(steps, dim=1) - dense).abs().max() < 1e-4


@pytest.mark.parametrize("longest", [3, 60, 300, 10**6])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 200, 256, 300])
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(longest: int, window: int | None) -> None:
    """Those without a visible pair are skipped; those with no hidden pair are computed without a mask."""
    ids = packed_documents(3, 640, longest, seed=1)
    ids[1] = ids[1].flip(0)  # numbers need not ascend

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < (window or 640)) & (ids[b, q] == ids[b, k])

    ours = masked_blocks(640, flex_attention, doc_ids=ids, window=window).blocks
    torchs = create_block_mask(seen, 3, None, 640, 640, device="cpu")
    assert ours is not None
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, torchs.full_kv_num_blocks)
    for name in ("q_num_blocks", "full_q_num_blocks"):  # the backward pass goes by these
        assert torch.equal(getattr(ours, name), getattr(torchs, name))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.inference_mode()
def test_a_document_has_the_same_logits_alone_and_packed_by_either_kernel(build: Build, tokens: Tokens) -> None:
    lengths = [7, 1, 15, 9]
    x, model = tokens(1, 32), build(n_kv_head=2)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    dense = model(x, positions, ids)
    model.model.flex = flex_attention
    flex = model(x, positions, ids)
    for start, n in zip([0, 7, 8, 23], lengths, strict=True):
        alone = model(x[:, start : start + n])
        for packed in (dense, flex):
            assert (packed[:, start : start + n] - alone).abs().max() < 1e-4
