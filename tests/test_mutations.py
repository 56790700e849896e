"""A handful of the syncs and checks that the promises stand on are taken away, and the tests see it; `make prove` takes all."""

import mutations
import pytest
from mutations import MUTANTS, Mutant, attempts

HANDFUL = ["durable: a file is synced", "checkpoint: a manifest's hashes are right", "shards: a header is whole"]


def test_every_entry_stands_in_the_source_once() -> None:
    for mutant in MUTANTS:
        assert mutations.mutated(mutant)
    names = [f"{mutant.room}: {mutant.name}" for mutant in MUTANTS]
    assert len(names) == len(set(names)) >= 40 and {mutant.room for mutant in MUTANTS} == {
        "durable",
        "checkpoint",
        "saving",
        "slices",
        "shards",
    }


def test_a_handful_is_caught() -> None:
    chosen = [mutant for mutant in MUTANTS if f"{mutant.room}: {mutant.name}" in HANDFUL]
    assert [(name, caught) for name, caught, _, _ in attempts(chosen)] == [(name, True) for name in HANDFUL]


def test_what_no_test_catches_and_what_does_not_fit_any_more_is_told() -> None:
    harmless = Mutant("durable", "harmless", "BLOCK = 1 << 20", "BLOCK = 1 << 19", "a_name_that_could_leave")
    gone = Mutant("durable", "gone", "no such text", "", "a_name_that_could_leave")
    untested = harmless._replace(name="untested", caught_by="no_test_has_this_name")
    found = {name: (caught, wrong) for name, caught, _, wrong in attempts([harmless, gone])}
    assert found["durable: harmless"] == (False, "no test fails (a_name_that_could_leave)")
    assert found["durable: gone"][0] is False and "stands 0 times" in found["durable: gone"][1]
    assert [caught for _, caught, _, _ in attempts([untested])] == [False]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_mutant_is_caught() -> None:
    said: list[str] = []
    (row,) = mutations.prove(1, said.append)
    assert row.survived == row.tried == len(MUTANTS), [line for line in said if line.startswith("NOT")]
