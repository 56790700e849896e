"""Steps of fixed shape: what a CUDA graph would repeat, computed uncaptured, against steps that read what is in use."""

import pytest
import torch
from conftest import Build, Tokens
from variants import VARIANTS

from gpt import generate
from gpt.cache import leave
from gpt.generate import Sampling
from gpt.graphs import Graphs, rounded
from gpt.model import GPT


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_steps_of_fixed_shape_give_the_same_logits(name: str, build: Build, tokens: Tokens) -> None:
    model = build(**VARIANTS[name])
    x, lengths = tokens(3, 12), torch.tensor([7, 5, 2])
    free, fixed = model.new_cache(3, 12), model.new_cache(3, 12)
    for cache in (free, fixed):
        model(x[:, :7], cache=cache)
        cache.rewind(lengths)
    graphs = Graphs(model, fixed)
    for i in range(4):
        new = x[torch.arange(3), lengths + i][:, None]
        torch.testing.assert_close(graphs.step(new, fixed), model(new, cache=free)[:, -1], atol=1e-5, rtol=0)
        assert fixed.host.known == free.host.known == fixed.lengths.tolist()


@torch.inference_mode()
def test_rows_that_have_left_are_computed_no_more_and_disturb_none(build: Build, tokens: Tokens) -> None:
    model, x = build(), tokens(9, 6)
    free, fixed = model.new_cache(9, 12), model.new_cache(9, 12)
    for cache in (free, fixed):
        model(x, cache=cache)
    graphs = Graphs(model, fixed)
    new = tokens(9, 1, seed=3)
    for gone in ([], [0, 4], [1], [], [2, 3]):
        order = leave(fixed, gone) if gone else list(range(len(new)))
        assert order == (leave(free, gone) if gone else order)
        new = new[order]
        torch.testing.assert_close(graphs.step(new, fixed), model(new, cache=free)[:, -1], atol=1e-5, rtol=0)


def test_rounding_computes_little_too_much_and_makes_few_graphs() -> None:
    shapes = set()
    for n in range(1, 65):
        for reach in range(1, 5000, 37):
            rows, keys = rounded(n, 64, reach, 4096 + 1000)
            assert n <= rows <= 1.25 * n
            assert reach <= keys <= max(256, 1.25 * reach, (reach < 1024) * (reach + 255))
            shapes.add((rows, keys))
    assert len({rows for rows, _ in shapes}) == 20
    assert len({keys for _, keys in shapes}) <= 14
    assert rounded(3, 3, 90, 100) == (3, 100)


def test_the_loop_writes_the_same_with_steps_of_fixed_shape(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(max_seq_len=24)
    prompts = [[1], [1, 7, 7, 30, 2, 9], [1, 40, 3]]
    sampling = Sampling(temperature=1.5, repetition_penalty=1.2)

    def written() -> list[list[int | None]]:
        columns = generate.generate(model, prompts, sampling, 40, seed=3, n_tokens_valid=64, stop_ids={5, 11})
        return [column.ids for column in columns]

    expected, steps = written(), []
    batch = generate._Batch.__init__
    step = Graphs.step

    def fixed(self: generate._Batch, *args: object) -> None:
        batch(self, *args)
        self.graphs = Graphs(self.model, self.cache)

    def counted(self: Graphs, tokens: torch.Tensor, cache: object) -> torch.Tensor:
        steps.append(len(tokens))
        return step(self, tokens, cache)

    monkeypatch.setattr(generate._Batch, "__init__", fixed)
    monkeypatch.setattr(Graphs, "step", counted)
    assert written() == expected
    assert len(steps) == len(expected) - 1


@pytest.mark.gpu
def test_a_captured_step_is_the_uncaptured_one(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model: GPT = build(max_seq_len=600).cuda()

    def written(max_tokens: int) -> list[list[int | None]]:
        columns = generate.generate(
            model, [[1, 2], [3] * 250], Sampling(temperature=0), max_tokens, seed=1, n_tokens_valid=64, stop_ids=()
        )
        return [column.ids for column in columns]

    captured: list[Graphs] = []
    real = Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", lambda self, *given: captured.append(self) or real(self, *given))
    assert written(40)[: generate.WORTH - 1] == written(generate.WORTH - 1)
    assert [graphs.pool is not None and len(graphs.captured) > 0 for graphs in captured] == [True]
