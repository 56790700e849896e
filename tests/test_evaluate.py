"""Evaluation against the slow way: window by window, token by token."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MemorySplit

from gpt.data import Data, Part
from gpt.evaluate import EvalConfig, Evaluation, evaluate, evaluated, limits, views
from gpt.loss import NextToken
from gpt.model import GPT
from gpt.shards import Span, TokenSet

Build = Callable[..., GPT]
Split = Callable[..., TokenSet]
LETTERS: Any = SimpleNamespace(byte_lengths=np.arange(64))  # a tokenizer: token n stands for n bytes
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
    return evaluate(
        NextToken(model),
        {"text": tokens},
        config,
        LETTERS,
        seq_len=seq_len,
        batch_rows=batch_rows,
        device="cpu",
        dtype=dtype,
    )


@torch.inference_mode()
def slowly(model: GPT, ids: list[int], seq_len: int, n_bytes: int) -> Evaluation:
    """One forward pass per window, each target looked up alone; the target of the last token is the first."""
    nats = 0.0
    for start in range(0, len(ids), seq_len):
        window = ids[start : start + seq_len]
        log_p = model(torch.tensor([window]))[0].double().log_softmax(dim=-1)
        nats -= sum(log_p[i, ids[(start + i + 1) % len(ids)]].item() for i in range(len(window)))
    bpb = nats / math.log(2) / n_bytes
    return Evaluation(val_loss=nats / len(ids), val_bpb=bpb, sources={"text": bpb})


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
    score = evaluate(
        objective, {"text": tokens}, EvalConfig(), LETTERS, seq_len=8, batch_rows=2, device="cpu", dtype="float32"
    )
    assert score == scored(build(), tokens, batch_rows=2)
    assert all(module.training is training for module in objective.modules())


def test_an_evaluation_leaves_no_gradient_and_draws_nothing(build: Build, split: Split) -> None:
    model, before = build().train(), torch.get_rng_state()
    scored(model, split(*LENGTHS))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


# Several sources


def test_sources_add_up_to_the_whole(build: Build, split: Split) -> None:
    model, parts = build(), {"a": split(9, 1), "b": split(20), "c": split(14, 3, 8)}
    every = EvalConfig()
    at = {"seq_len": 8, "batch_rows": 3, "device": "cpu", "dtype": "float32"}
    whole = evaluate(NextToken(model), parts, every, LETTERS, **at)
    alone = {name: evaluate(NextToken(model), {name: tokens}, every, LETTERS, **at) for name, tokens in parts.items()}
    assert whole.sources == {name: score.val_bpb for name, score in alone.items()}
    n_bytes = {name: tokens.n_bytes for name, tokens in parts.items()}
    n_tokens = {name: tokens.n_tokens for name, tokens in parts.items()}
    bits, nats = (
        sum(n_bytes[name] * score.val_bpb for name, score in alone.items()),
        sum(n_tokens[name] * score.val_loss for name, score in alone.items()),
    )
    assert whole.val_bpb == pytest.approx(bits / sum(n_bytes.values()), rel=1e-9)
    assert whole.val_loss == pytest.approx(nats / sum(n_tokens.values()), rel=1e-9)


def test_a_limit_is_shared_in_proportion_and_every_source_is_read(split: Split) -> None:
    parts = {"large": split(*[10] * 80), "small": split(*[10] * 20), "one": split(5)}
    each = limits(parts, 100)
    assert each["large"] == pytest.approx(4 * each["small"], abs=3) and each["one"] >= 1
    assert evaluated(parts, 100) == 80 + 20 + 5
    assert evaluated(parts, 1) == 10 + 10 + 5, "a document of each"
    assert evaluated(parts, None) == evaluated(parts, 10**9) == 1005
    alone = {"text": split(*LENGTHS)}
    assert limits(alone, 10) == {"text": 10}


def test_sources_are_named_by_their_data_set_where_there_are_several(split: Split) -> None:
    def part(name: str, *by: int) -> Part:
        tokens = replace(split(*[5] * len(by), by=by), path=Path(name))
        return Part(name, tokens, tokens)

    def names(*parts: Part) -> list[str]:
        return list(views(Data(list(parts), None, "")))  # type: ignore[arg-type]

    assert names(part("data/a", 0, 1, 1)) == ["memory", "another"]
    assert names(part("data/a", 0)) == ["memory"]
    assert names(part("data/a", 0), part("data/b", 1, 2)) == ["data/a", "data/b/another", "data/b/third"]


def test_documents_are_scored_alone_where_the_mask_says_so(build: Build, split: Split) -> None:
    """In a window the second document does not see the first."""
    model, tokens = build(), split(5, 3)
    at = {"seq_len": 8, "batch_rows": 1, "device": "cpu", "dtype": "float32"}
    ours = evaluate(NextToken(model), {"text": tokens}, EvalConfig(), LETTERS, **at, document_mask=True)
    ids = tokens.read(0, 8).tolist()
    alone = [slowly(model, part, 8, 10 * len(part)) for part in (ids[:5], ids[5:])]
    assert ours.val_loss == pytest.approx(sum(s.val_loss * n for s, n in zip(alone, (5, 3), strict=True)) / 8, rel=1e-6)
    unmasked = evaluate(NextToken(model), {"text": tokens}, EvalConfig(), LETTERS, **at)
    assert abs(unmasked.val_loss - ours.val_loss) > 1e-3


@torch.inference_mode()
def test_where_only_a_part_is_learned_its_own_bytes_count(build: Build, split: Split) -> None:
    @dataclass(frozen=True)
    class Prompted(MemorySplit):
        """Tokens 3 .. 8 are learned."""

        has_spans: bool = True

        def spans(self, start: int, count: int) -> list[Span]:
            return [Span(3, 9, "train")] if start < 9 and start + count > 3 else []

    model, tokens = build(), Prompted((9, 5))
    score = evaluate(
        NextToken(model),
        {"text": tokens},
        EvalConfig(),
        LETTERS,
        seq_len=14,
        batch_rows=1,
        device="cpu",
        dtype="float32",
    )
    log_p = model(torch.tensor(tokens.ids[None]))[0].log_softmax(dim=-1)
    nats = -sum(float(log_p[at - 1, tokens.ids[at]]) for at in range(3, 9))
    assert score.val_loss == pytest.approx(nats / 6, rel=1e-5)
    assert score.val_bpb == pytest.approx(nats / math.log(2) / sum(range(4, 10)), rel=1e-5)
