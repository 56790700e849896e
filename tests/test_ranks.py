"""Sizes that fit the ranks that were started, or the ones that would."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import teams
from trained import CHOICES, batch, config_of

from gpt import parallel, plan, settle
from gpt.loss import NextToken
from gpt.model import GPT, ModelConfig
from gpt.parts import Parts
from gpt.plan import Choices
from gpt.ranks import ParallelConfig, Ranks, Sizes, check_model, check_rows, sizes
from gpt.team import Team

Build = Callable[..., GPT]


@pytest.mark.parametrize(
    ("config", "world", "is_so"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 4, (4, 1, 1)),
        ({"shard": 2}, 8, (4, 2, 1)),
        ({"shard": "auto", "replicate": 1, "tensor": 2}, 8, (1, 4, 2)),
        ({"replicate": 2, "shard": 2, "tensor": 2}, 8, (2, 2, 2)),
    ],
)
def test_auto_is_what_is_left(config: dict[str, Any], world: int, is_so: tuple[int, int, int]) -> None:
    assert sizes(ParallelConfig.model_validate(config), world) == is_so


@pytest.mark.parametrize(
    ("config", "world", "told"),
    [
        ({"shard": 3}, 8, "parallel.shard may be 1, 2, 4 or 8 of 8 ranks"),
        ({"replicate": 2, "shard": 2}, 8, "set parallel.replicate=4, or start 4 with torchrun"),
        (
            {"replicate": 1, "tensor": 2},
            1,
            "does not fit the 1 rank that was started: .*tensor=1, or start 2 with torchrun",
        ),
        ({"shard": 8}, 1, "parallel.shard may be 1 of 1 rank, or start a multiple of 8 with torchrun"),
        ({"shard": 4, "tensor": 4}, 8, "parallel.shard may be 1 or 2 of 8 ranks, or start a multiple of 16"),
        ({"shard": 3, "tensor": 3}, 8, "start a multiple of 9 with torchrun, or set sizes whose product divides 8"),
        ({"replicate": 3, "shard": 3, "tensor": 1}, 8, "start 9 with torchrun, or set sizes whose product is 8"),
    ],
)
def test_sizes_that_are_not_the_ranks_are_refused_with_those_that_are(
    config: dict[str, Any], world: int, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        sizes(ParallelConfig.model_validate(config), world)


def test_what_cannot_be_divided_is_refused_with_what_can() -> None:
    model = ModelConfig(vocab_size=64, max_seq_len=32, n_head=12, n_kv_head=4, d_model=48, d_ff=96)
    check_model(Sizes(tensor=4), model)
    with pytest.raises(ValueError, match=r"tensor \(3\) must divide model.n_kv_head \(4\).*may be 1, 2 or 4"):
        check_model(Sizes(tensor=3), model)
    for name, change in {"qk_norm=whole": {"qk_norm": "whole"}, "position=relative": {"position": "relative"}}.items():
        with pytest.raises(ValueError, match=f"model.{name} needs all heads in one place"):
            check_model(Sizes(tensor=2), model.model_copy(update=change))
        check_model(Sizes(shard=2), model.model_copy(update=change))
    check_rows(Sizes(replicate=2, shard=2), 8, 32, 2)
    with pytest.raises(ValueError, match=r"6 rows, which 4 ranks .* 1, 2, 3 or 6 can.*multiple of 128"):
        check_rows(Sizes(shard=4), 6, 32, None)
    with pytest.raises(ValueError, match=r"micro_batch \(4\) must divide the 2 rows .* it may be 1 or 2"):
        check_rows(Sizes(replicate=4), 8, 32, 4)
    with pytest.raises(ValueError, match=r"seq_len \(33\)"):
        check_rows(Sizes(tensor=2), 8, 33, None)


def tried(team: Team, size: int, update: Callable[..., None], *, compile: bool = False) -> Any:
    """What `settle.trial` with this update is, by rows of a pass."""
    config = config_of({"parallel": {"canonical": True}})
    objective = NextToken(GPT(config.model))
    parts = Parts(Ranks(team, Sizes(replicate=size), canonical=True), objective.model)
    loader = SimpleNamespace(batch=lambda step: batch(step))

    def trial(rows: int, compiled: bool) -> float:
        made = CHOICES.model_copy(update={"micro_batch": rows, "compile": compile})
        return settle.trial(config, made, objective, loader, update, 2, 0.0, parts)[0]  # type: ignore[arg-type]

    return trial


def of_last(size: int, look: Callable[[Team], Any]) -> Any:
    """What `look` returns, or raises, on the last rank; the others wait for it no longer then."""

    def ended(team: Team) -> Any:
        try:
            return look(team)
        finally:
            if team.rank == size - 1:
                team.group.barrier.abort()

    return teams.ranks(size, ended)[-1]


@pytest.mark.parametrize("size", [1, 2])
def test_several_ranks_do_not_look_for_a_micro_batch_that_fits(size: int) -> None:
    """One that tried again would meet the others amid the update in which it failed."""

    def look(team: Team) -> tuple[int, float]:
        def update(forward: Any, optimizer: Any, given: Any, config: Any, choices: Choices, *rest: Any) -> None:
            if team.rank == size - 1 and choices.micro_batch > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        return plan.fitting(tried(team, size, update), 8, False, lambda line: None)

    found = of_last(size, look)
    if size == 1:
        assert found[0] == 2
        return
    assert isinstance(found, MemoryError) and "set a smaller train.micro_batch" in str(found)


@pytest.mark.parametrize("size", [1, 2])
def test_several_ranks_do_not_fall_back_from_the_compiler_each_by_itself(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "applied", lambda objective, **how: objective)

    def look(team: Team) -> float:
        def update(*given: Any) -> None:
            if team.rank == size - 1:
                raise RuntimeError("g++: exit 1\nat line 3")

        return tried(team, size, update, compile=True)(2, True)

    failed = of_last(size, look)
    assert type(failed) is (RuntimeError if size == 1 else ValueError)
    assert size == 1 or str(failed) == (
        "compiling failed (g++: exit 1): ranks cannot fall back alone, set train.compile=false"
    )


def test_a_kernel_that_fails_on_one_rank_is_used_on_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {0: ("flex", "it works"), 1: ("dense", "no compiler")}

    def look(team: Team) -> tuple[tuple[str, str], object]:
        model = GPT(config_of({}).model)
        model.model.flex, model.rank = found, team.rank  # type: ignore[assignment]
        return settle._kernel(model, Ranks(team, Sizes(replicate=2))), model.model.flex

    monkeypatch.setattr(parallel, "hiding_kernel", lambda model: found[model.rank])
    for rank in teams.ranks(2, look):
        assert tuple(rank[0]) == ("dense", "no compiler") and rank[1] is None
