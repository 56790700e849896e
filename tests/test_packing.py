"""Packing: every token stands in a row exactly once an epoch, rows are full, and neighbours change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.packing import GAP, Plan, permute, plan


def planned(lengths: list[int], seq_len: int, *, cut: bool = True) -> Plan:
    array = np.array(lengths, dtype=np.int64)
    return plan(np.cumsum(array) - array, array, seq_len, cut=cut)


def rows(found: Plan, seed: int = 1, epoch: int = 0) -> list[list[tuple[int, int]]]:
    """(first token, tokens) of the pieces of every row of an epoch."""
    made: list[list[tuple[int, int]]] = [[] for _ in range(found.n_rows)]
    pieces = found.pieces(np.arange(found.n_rows), seed, epoch)
    for row, start, length in zip(*(x.tolist() for x in pieces), strict=True):
        made[row].append((start, length))
    return made


# The permutation


def test_a_permutation_reaches_every_place_once() -> None:
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, seed=n)) == list(range(n))


@given(n=st.integers(301, 5000), seed=st.integers(0, 2**63 - 1))
def test_a_larger_permutation_does_too(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed)), np.arange(n))


@given(n=st.integers(1, 10**12), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_an_index_goes_where_it_goes_whatever_is_asked_beside_it(n: int, seed: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5, unique=True)))
    together = permute(index, n, seed)
    assert [permute(index[i : i + 1], n, seed)[0] for i in range(len(index))] == together.tolist()
    assert len(set(together.tolist())) == len(index)
    assert together.min() >= 0 and together.max() < n


def test_permutations_of_a_trillion_are_cheap_and_look_random() -> None:
    n = 10**12
    places = permute(np.arange(20_000), n, seed=1)
    assert np.histogram(places, bins=10, range=(0, n))[0].min() > 1800  # 2000 expected, deviation 42
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.03


def test_other_seeds_permute_otherwise_and_leave_nothing_in_place() -> None:
    orders = np.array([permute(np.arange(1000), 1000, seed) for seed in range(30)])
    assert len({tuple(order) for order in orders.tolist()}) == 30
    assert (orders == np.arange(1000)).sum(axis=1).mean() < 3  # one fixed point expected


@given(n=st.integers(1, 5000), sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_permutations_of_several_sizes_at_once_are_those_of_each_alone(n: int, sizes: list[int], seed: int) -> None:
    index = np.concatenate([np.arange(n) for n in sizes])
    size, twist = (
        np.concatenate([np.full(n, x) for n, x in zip(sizes, of, strict=True)]) for of in (sizes, sizes[::-1])
    )
    together = permute(index, size, seed, twist)
    at = 0
    for n, turn in zip(sizes, sizes[::-1], strict=True):
        alone = permute(np.arange(n), n, seed, np.full(n, turn))
        assert np.array_equal(together[at : at + n], alone)
        assert np.array_equal(np.sort(alone), np.arange(n))
        at += n


# Plans

corpora = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@given(lengths=corpora, seq_len=st.integers(1, 60), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_token_stands_in_one_row_and_no_piece_crosses_a_document(
    lengths: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    found = planned(lengths, seq_len)
    made = rows(found, seed, epoch)
    ends = set(np.cumsum(lengths).tolist())
    tokens: list[int] = []
    for row in made:
        assert row and sum(length for _, length in row) <= seq_len
        for start, length in row:
            tokens += range(start, start + length)
            assert not ends & set(range(start + 1, start + length))
    assert sorted(tokens) == list(range(sum(lengths)))
    assert found.waste == pytest.approx(1 - sum(lengths) / (len(made) * seq_len))


@given(lengths=corpora, seq_len=st.integers(1, 600))
def test_every_row_but_the_last_is_full_to_a_tolerance_below_one_percent(lengths: list[int], seq_len: int) -> None:
    gaps = sorted(seq_len - sum(length for _, length in row) for row in rows(planned(lengths, seq_len)))
    assert all(gap <= seq_len // GAP for gap in gaps[:-1])


@given(lengths=corpora, seq_len=st.integers(1, 60))
def test_documents_are_whole_unless_they_are_longer_than_a_row_or_counted_as_cut(
    lengths: list[int], seq_len: int
) -> None:
    found = planned(lengths, seq_len)
    n_pieces = sum(map(len, rows(found)))
    assert n_pieces == sum(-(-n // seq_len) for n in lengths) + found.n_cut


def test_documents_that_fill_rows_exactly_are_never_cut() -> None:
    found = planned([60, 40, 30, 70, 50, 25, 25, 100, 1, 99], 100)
    assert (found.n_rows, found.n_cut, found.waste) == (5, 0, 0)


def test_pieces_change_neighbours_with_the_epoch_and_the_seed() -> None:
    found = planned([100, 156, 56, 200] * 200, 256)
    neighbours = [{frozenset(row) for row in rows(found, seed, epoch)} for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(neighbours[a] & neighbours[b]) < 0.05 * found.n_rows


def test_rows_asked_for_alone_are_those_of_the_whole_epoch() -> None:
    found = planned([3, 50, 47, 120, 9, 9, 200, 64, 31] * 20, 64)
    made = rows(found, seed=4, epoch=2)
    for wanted in (np.array([5]), np.array([7, 3, 3]), np.arange(found.n_rows)[::-1]):
        row, start, length = (x.tolist() for x in found.pieces(wanted, 4, 2))
        expected = [(i, *piece) for i, r in enumerate(wanted.tolist()) for piece in made[r]]
        assert list(zip(row, start, length, strict=True)) == expected


def test_a_long_tailed_corpus_is_packed_almost_without_waste_or_cuts() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 50_000).astype(np.int64) + 1
    found = planned(lengths.tolist(), 1024)
    assert found.waste < 0.001
    assert found.n_cut < 0.001 * len(lengths)
    assert len(found.row_bounds) < 3 * 1024  # patterns: what planning costs


def test_millions_of_empty_documents_are_one_pattern() -> None:
    found = planned([1] * 1_000_000, 256)
    assert len(found.row_bounds) - 1 == 2
    assert found.n_rows == -(-1_000_000 // 256)
    row, start, _ = found.pieces(np.arange(found.n_rows), 1, 1)
    assert np.array_equal(np.sort(start), np.arange(1_000_000))
    assert np.bincount(row).max() == 256


@given(lengths=corpora, seq_len=st.integers(1, 60), seed=st.integers(0, 9))
def test_without_cuts_a_document_that_fits_a_row_is_a_piece(lengths: list[int], seq_len: int, seed: int) -> None:
    found = planned(lengths, seq_len, cut=False)
    assert found.n_cut == 0
    pieces = [piece for row in rows(found, seed) for piece in row]
    starts = np.cumsum(lengths) - lengths
    expected = []
    for start, length in zip(starts.tolist(), lengths, strict=True):
        n_full, rest = divmod(length, seq_len)
        expected += [(start + i * seq_len, seq_len) for i in range(n_full)] + [(start + n_full * seq_len, rest)] * bool(
            rest
        )
    assert sorted(pieces) == sorted(expected)
    assert all(sum(n for _, n in row) <= seq_len for row in rows(found, seed))
