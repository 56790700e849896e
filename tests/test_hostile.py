"""Hundreds of files that would run code are opened by what the product opens them with: none runs, none leaves its directory."""

import hostile
import pytest


@pytest.fixture(scope="module")
def results() -> list[hostile.Result]:
    return hostile.attempts([])


def test_no_canary_runs_or_leaves_its_directory_and_each_ends_in_words(results: list[hostile.Result]) -> None:
    assert [(result.canary.kind, result.canary.name, result.wrong) for result in results if result.wrong] == []


def test_a_manifest_that_names_what_is_not_beside_it_is_refused_for_that(results: list[hostile.Result]) -> None:
    said = [result.ended for result in results if result.canary.kind == "checkpoint"]
    assert len(said) >= 7 and [each for each in said if "manifest.json names " not in each] == []


def test_variables_of_the_environment_reach_what_reads_them(results: list[hostile.Result]) -> None:
    said = {result.canary.name: result.ended for result in results if result.canary.kind == "environment"}
    assert all("invalid literal for int" in said[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def test_there_are_hundreds_and_no_two_are_the_same(results: list[hostile.Result]) -> None:
    names = [(result.canary.kind, result.canary.name) for result in results]
    assert len(names) == len(set(names)) >= 200
    assert len({kind for kind, _ in names}) >= 25


def test_none_takes_long(results: list[hostile.Result]) -> None:
    """The processor's seconds are limited for each; this bounds what a busy machine adds."""
    assert max(result.seconds for result in results) < hostile.WALL_S


def test_the_watch_sees_what_a_careless_loader_would_do() -> None:
    planted = hostile.attempts(["planted"])
    assert len(planted) >= 15 and [result.canary.name for result in planted if not result.wrong] == []
