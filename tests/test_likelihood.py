"""Likelihoods against the slow way: each pair alone, by one full forward pass."""

from typing import Any

import pytest
import torch
from conftest import Build
from variants import VARIANTS

from gpt.likelihood import Pair, log_likelihoods
from gpt.model import GPT

PROMPT = [0, 5, 9, 3]
PAIRS: list[Pair] = [
    (PROMPT, [7]),
    (PROMPT, [8, 2, 2]),
    (PROMPT, [7, 1]),
    ([0], [4, 4, 4, 4, 4, 4]),
    ([0, 11, 12, 13, 14, 15, 16, 17, 18], [19]),
    ([6], [1]),
]


@torch.inference_mode()
def slowly(model: GPT, pair: Pair) -> tuple[float, bool]:
    prompt, more = pair
    tokens = torch.tensor([[*prompt, *more][: -1 if more else None]])
    prefix = torch.arange(tokens.shape[1])[None] < len(prompt) if model.config.prefix_lm else None
    log_p = model(tokens, prefix=prefix)[0, len(prompt) - 1 :].double().log_softmax(-1)
    return float(sum(row[token] for row, token in zip(log_p, more, strict=True))), log_p.argmax(-1).tolist() == more


@pytest.fixture(params=[*VARIANTS.values(), {"prefix_lm": True}], ids=[*VARIANTS, "prefix-LM"])
def model(request: pytest.FixtureRequest, build: Build) -> GPT:
    return build(**request.param)


def test_scores_are_those_of_each_pair_alone(model: GPT) -> None:
    scores = log_likelihoods(model, PAIRS, 1000)
    slow = [slowly(model, pair) for pair in PAIRS]
    assert [score.logprob for score in scores] == pytest.approx([logprob for logprob, _ in slow], abs=1e-4)
    assert [score.greedy for score in scores] == [greedy for _, greedy in slow]


def test_scores_do_not_depend_on_what_shares_a_batch(build: Build) -> None:
    model = build()
    whole = log_likelihoods(model, PAIRS, 1000)
    for some in (log_likelihoods(model, PAIRS, 1), log_likelihoods(model, PAIRS[::-1], 30)[::-1]):
        assert [score.logprob for score in some] == pytest.approx([score.logprob for score in whole], abs=1e-5)
        assert [score.greedy for score in some] == [score.greedy for score in whole]


def test_rows_that_turn_by_their_own_lengths_are_scored_alike_in_any_batch(build: Build) -> None:
    model = build(max_seq_len=64, **VARIANTS["dynamic scaling"])
    pairs: list[Pair] = [(list(range(30)), [7, 3]), ([5, 9], [8, 2, 2]), (list(range(20, 34)), [1] * 9), ([5, 9], [4])]
    scores = log_likelihoods(model, pairs, 1000)
    assert [s.logprob for s in scores] == pytest.approx([slowly(model, pair)[0] for pair in pairs], abs=1e-4)


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else_is(build: Build) -> None:
    model, written = build(), list(PROMPT)
    for _ in range(3):
        written.append(int(model(torch.tensor([written]))[0, -1].argmax()))
    best = written[len(PROMPT) :]
    other = [*best[:-1], (best[-1] + 1) % 64]
    scores = log_likelihoods(model, [(PROMPT, best), (PROMPT, other)], 1000)
    assert [score.greedy for score in scores] == [True, False]


def test_a_prompt_is_read_once_for_all_that_follows_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = build(), list[int]()
    features = model.features

    def counted(tokens: torch.Tensor, **given: Any) -> torch.Tensor:
        read.append(tokens.numel())
        return features(tokens, **given)

    monkeypatch.setattr(model, "features", counted)
    log_likelihoods(model, [(PROMPT, [token]) for token in range(20)], 1000)
    assert read == [len(PROMPT)]


def test_a_batch_stays_small_when_everything_follows_one_prompt(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first windows of all texts do, which follow the start token."""
    model, sizes = build(), list[int]()
    features = model.features

    def counted(tokens: torch.Tensor, **given: Any) -> torch.Tensor:
        sizes.append(tokens.numel())
        return features(tokens, **given)

    pairs: list[Pair] = [([0], [i % 60] * (2 + i % 9)) for i in range(100)]
    slow = [slowly(model, pair)[0] for pair in pairs]
    monkeypatch.setattr(model, "features", counted)
    scores = log_likelihoods(model, pairs, 50)
    assert [score.logprob for score in scores] == pytest.approx(slow, abs=1e-4)
    assert max(sizes) <= 50 and sum(sizes) < 2 * sum(len(more) for _, more in pairs)


def test_a_pair_longer_than_the_context_loses_the_beginning_of_its_prompt(build: Build) -> None:
    model, prompt = build(max_seq_len=8), [0, *range(1, 12)]
    long, cut = log_likelihoods(model, [(prompt, [3, 4, 5]), (prompt[-6:], [3, 4, 5])], 1000)
    assert long.logprob == pytest.approx(cut.logprob, abs=1e-5)
    assert long.logprob == pytest.approx(slowly(model, (prompt[-6:], [3, 4, 5]))[0], abs=1e-4)


def test_rows_that_fit_the_context_alone_are_not_padded_past_it(build: Build) -> None:
    """A long prompt with a short continuation beside a short prompt with a long one."""
    model = build(max_seq_len=8)
    pairs: list[Pair] = [([1] * 8, [2]), ([3], [4] * 8), ([5] * 4, [6] * 5)]
    scores = log_likelihoods(model, pairs, 1000)
    assert [score.logprob for score in scores] == pytest.approx([slowly(model, p)[0] for p in pairs], abs=1e-4)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 33)], ids=["no prompt", "nothing", "too long"])
def test_a_pair_that_cannot_be_scored_is_refused(build: Build, pair: Pair) -> None:
    with pytest.raises(ValueError, match="fits the model's context of 32"):
        log_likelihoods(build(), [pair], 1000)
