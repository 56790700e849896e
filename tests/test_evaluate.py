"""Evaluation against the slow way: window by window, token by token."""

import math
from collections.abc import Callable

import pytest
import torch

from gpt.evaluate import EvalConfig, Evaluation, evaluate
from gpt.loss import NextToken
from gpt.model import GPT
from gpt.shards import TokenSet

Build = Callable[..., GPT]
Split = Callable[..., TokenSet]
LENGTHS = (9, 1, 20, 14)  # 44 tokens: ids below the small models' vocabulary of 64


def scored(
    model: GPT,
    tokens: TokenSet,
    max_tokens: int | None = None,
    *,
    seq_len: int = 8,
    batch_rows: int = 3,
    dtype: str = "float32",
) -> Evaluation:
    config = EvalConfig(tokens=max_tokens)
    return evaluate(NextToken(model), tokens, config, seq_len=seq_len, batch_rows=batch_rows, device="cpu", dtype=dtype)


@torch.inference_mode()
def slowly(model: GPT, ids: list[int], seq_len: int, n_bytes: int) -> Evaluation:
    """One forward pass per window, each target looked up alone; the target of the last token is the first."""
    nats = 0.0
    for start in range(0, len(ids), seq_len):
        window = ids[start : start + seq_len]
        log_p = model(torch.tensor([window]))[0].double().log_softmax(dim=-1)
        nats -= sum(log_p[i, ids[(start + i + 1) % len(ids)]].item() for i in range(len(window)))
    return Evaluation(val_loss=nats / len(ids), val_bpb=nats / math.log(2) / n_bytes)


@pytest.mark.parametrize("seq_len", [1, 7, 8, 32])
def test_scores_are_those_of_the_slow_way(build: Build, split: Split, seq_len: int) -> None:
    model, tokens = build(), split(*LENGTHS)
    ours, slow = (
        scored(model, tokens, seq_len=seq_len),
        slowly(model, tokens.read(0, 44).tolist(), seq_len, n_bytes=440),
    )
    assert ours.val_loss == pytest.approx(slow.val_loss, rel=1e-6)
    assert ours.val_bpb == pytest.approx(slow.val_bpb, rel=1e-6)


@pytest.mark.parametrize(("max_tokens", "whole"), [(1, 9), (9, 9), (10, 10), (11, 30), (40, 44), (1000, 44)])
def test_a_partial_score_is_that_of_its_whole_documents(
    build: Build, split: Split, max_tokens: int, whole: int
) -> None:
    model, tokens = build(), split(*LENGTHS)
    slow = slowly(model, tokens.read(0, whole).tolist(), 8, n_bytes=10 * whole)
    ours = scored(model, tokens, max_tokens)
    assert (ours.val_loss, ours.val_bpb) == pytest.approx((slow.val_loss, slow.val_bpb), rel=1e-6)


def test_scores_do_not_depend_on_the_rows_of_a_batch(build: Build, split: Split) -> None:
    model, tokens = build(), split(*LENGTHS)
    scores = [scored(model, tokens, batch_rows=rows).val_loss for rows in (1, 2, 5, 100)]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-6)


def test_a_model_that_knows_nothing_scores_the_logarithm_of_its_vocabulary(build: Build, split: Split) -> None:
    model = build()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = scored(model, split(*LENGTHS))
    assert score.val_loss == pytest.approx(math.log(64), rel=1e-6)
    assert score.val_bpb == pytest.approx(44 * 6 / 440, rel=1e-6)  # 6 bits for each of 44 targets


def test_bf16_scores_are_close(build: Build, split: Split) -> None:
    model, tokens = build(init_std=0.1), split(*LENGTHS)
    assert scored(model, tokens, dtype="bfloat16").val_loss == pytest.approx(scored(model, tokens).val_loss, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_is_without_dropout_and_leaves_the_mode_as_found(
    build: Build, split: Split, training: bool
) -> None:
    model, tokens = build(dropout=0.5).train(training), split(*LENGTHS)
    objective = NextToken(model).train(training)
    score = evaluate(objective, tokens, EvalConfig(), seq_len=8, batch_rows=2, device="cpu", dtype="float32")
    assert score == scored(build(), tokens, batch_rows=2)
    assert all(module.training is training for module in objective.modules())


def test_an_evaluation_leaves_no_gradient_and_draws_nothing(build: Build, split: Split) -> None:
    model, before = build().train(), torch.get_rng_state()
    scored(model, split(*LENGTHS))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
