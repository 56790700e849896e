"""Comparing two models: the differences are those of their tensors and logits, the worst first."""

from typing import Any

import pytest
import torch

from gpt import compare, page, tokenizer
from gpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer.train(["the river runs to the sea"], "char", None)


def said(a: Any, b: Any, words: Tokenizer, text: str | None = None) -> list[page.Block]:
    return list(compare.blocks("A", (a, words), "B", (b, words), text))


def notes(blocks: list[page.Block]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, page.Note))


def test_a_model_is_equal_to_itself(build: Any, words: Tokenizer) -> None:
    blocks = said(build(), build(), words)
    n = len(build().state_dict())
    assert f"{n} of {n} parameters are equal" in notes(blocks)
    assert "largest difference 0," in notes(blocks)


def test_the_largest_difference_comes_first_and_shows_in_the_logits(build: Any, words: Tokenizer) -> None:
    a, b = build(), build()
    with torch.no_grad():
        b.model.layers[1].mlp.up_proj.weight[2, 3] += 0.25
        b.model.norm.weight[0] -= 2
    blocks = said(a, b, words, "the river")
    table = next(block for block in blocks if isinstance(block, page.Table))
    assert [row[:2] for row in table.rows[:2]] == [
        ("model.norm.weight", "2"),
        ("model.layers.1.mlp.up_proj.weight", "0.25"),
    ]
    ids = torch.tensor([[words.start_id, *words.encode("the river")]])
    expected = (a(ids) - b(ids))[..., : words.size].abs().max().item()
    assert f"logits of {ids.shape[1]} tokens of the text: largest difference {expected:.3g}," in notes(blocks)


def test_settings_that_differ_are_named(build: Any, words: Tokenizer) -> None:
    assert "norm_eps: 1e-06 and 0.001" in notes(said(build(), build(norm_eps=1e-3), words))


def test_models_of_other_shapes_cannot_be_compared(build: Any, words: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(64, 32\) in A and \(64, 16\) in B"):
        said(build(), build(d_model=16, head_dim=8), words)
