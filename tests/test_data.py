"""The order of data: every token once an epoch, the same on every call, and nothing lost at the edges."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt import durable
from gpt.data import IGNORED, Batch, Loader, evaluated_bytes, evaluated_tokens, permute, validation_batches
from gpt.shards import Document, Span, TokenSet, write_manifest, write_shard

Split = Callable[..., TokenSet]  # a stand-in of conftest.py, except where a test writes a real one
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def learned(batch: Batch) -> list[tuple[int, int]]:
    """(input, target) of everything that is trained on."""
    trained = batch.targets != IGNORED
    return list(zip(batch.tokens[trained].tolist(), batch.targets[trained].tolist(), strict=True))


def circle(split: TokenSet, end: int | None = None) -> list[tuple[int, int]]:
    """Every token with the one after it, the first again after the last."""
    ids = split.read(0, split.n_tokens if end is None else end).tolist()
    return list(zip(ids, [*ids[1:], ids[0]], strict=True))


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


# Training batches


@given(lengths=lengths, seq_len=st.integers(1, 40), batch_rows=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_token_is_a_target_once_an_epoch(
    split: Split, lengths: list[int], seq_len: int, batch_rows: int, seed: int
) -> None:
    tokens = split(*lengths)
    seq_len = min(seq_len, tokens.n_tokens)
    loader = Loader(tokens, seq_len, batch_rows, seed)
    batches = [loader.batch(step) for step in range(1, 1 + -(-2 * loader.rows_per_epoch // batch_rows))]
    for rows in zip(
        *(torch.cat(part).split(loader.rows_per_epoch)[:2] for part in zip(*batches, strict=True)), strict=True
    ):
        assert Counter(learned(Batch(*rows))) == Counter(circle(tokens))


@given(lengths=lengths, seq_len=st.integers(1, 40), step=st.integers(1, 10**9))
def test_a_row_reads_on_in_the_text_and_its_targets_are_its_next_tokens(
    split: Split, lengths: list[int], seq_len: int, step: int
) -> None:
    tokens = split(*lengths)
    batch = Loader(tokens, min(seq_len, tokens.n_tokens), 4, seed=3).batch(step)
    trained = batch.targets != IGNORED
    assert (trained[:, :-1] >= trained[:, 1:]).all()  # nothing trained after the filling has begun
    inner = trained[:, 1:]
    assert torch.equal(batch.tokens[:, 1:][inner], batch.targets[:, :-1][inner])
    assert (batch.tokens[~trained] == tokens.start_id).all()


def test_a_batch_is_the_same_in_any_order_of_calls_and_in_a_new_loader(split: Split) -> None:
    tokens = split(40, 60, 33)
    forward, backward = Loader(tokens, 8, 3, seed=1), Loader(tokens, 8, 3, seed=1)
    first = {step: forward.batch(step) for step in range(1, 30)}
    for step in reversed(range(1, 30)):
        again = backward.batch(step)
        assert torch.equal(again.tokens, first[step].tokens) and torch.equal(again.targets, first[step].targets)
    assert torch.equal(Loader(tokens, 8, 3, seed=1).batch(17).tokens, first[17].tokens)


def test_the_rows_of_a_batch_do_not_depend_on_its_size(split: Split) -> None:
    tokens = split(40, 60, 33)
    small, large = Loader(tokens, 8, 2, seed=1), Loader(tokens, 8, 6, seed=1)
    joined = torch.cat([small.batch(step).tokens for step in range(1, 31)])
    assert torch.equal(joined, torch.cat([large.batch(step).tokens for step in range(1, 11)]))


def test_other_seeds_give_other_orders(split: Split) -> None:
    tokens = split(500)
    assert not torch.equal(Loader(tokens, 8, 8, seed=1).batch(1).tokens, Loader(tokens, 8, 8, seed=2).batch(1).tokens)


def test_epochs_differ_in_order_and_in_where_rows_are_cut(split: Split) -> None:
    loader = Loader(split(500), 16, 1, seed=5)
    starts = [loader.batch(step).tokens[0, 0].item() for step in range(1, 5 * loader.rows_per_epoch + 1)]
    epochs = np.array(starts).reshape(5, -1)
    assert len({tuple(order) for order in np.argsort(epochs).tolist()}) == 5
    assert len({frozenset(cuts) for cuts in epochs.tolist()}) > 1


def test_a_training_split_shorter_than_a_row_is_refused_with_both_numbers(split: Split) -> None:
    with pytest.raises(ValueError, match=r"has 9 tokens, fewer than data\.seq_len \(10\)"):
        Loader(split(4, 5), 10, 1, seed=0)
    assert Loader(split(4, 6), 10, 1, seed=0).batch(1).tokens.shape == (1, 10)


def test_batches_are_int64_of_rows_by_seq_len(split: Split) -> None:
    tokens = split(40, 60)
    for batch in (Loader(tokens, 8, 3, seed=1).batch(1), next(validation_batches(tokens, 8, 3, None))):
        assert all(x.dtype == torch.int64 and x.shape == (3, 8) and x.is_contiguous() for x in batch)
        assert batch.n_targets == len(learned(batch))


# Validation


@given(lengths=lengths, seq_len=st.integers(1, 40), batch_rows=st.integers(1, 7))
def test_an_evaluation_reads_every_target_once_in_order(
    split: Split, lengths: list[int], seq_len: int, batch_rows: int
) -> None:
    tokens = split(*lengths)
    batches = list(validation_batches(tokens, seq_len, batch_rows, None))
    assert [pair for batch in batches for pair in learned(batch)] == circle(tokens)
    assert all(len(batch.tokens) == batch_rows for batch in batches[:-1])


@given(lengths=lengths, max_tokens=st.integers(1, 250), seq_len=st.integers(1, 20))
def test_a_partial_evaluation_reads_the_first_whole_documents_that_reach_it(
    split: Split, lengths: list[int], max_tokens: int, seq_len: int
) -> None:
    tokens = split(*lengths)
    whole = next((n for n in range(1, len(lengths) + 1) if sum(lengths[:n]) >= max_tokens), len(lengths))
    end = sum(lengths[:whole])
    assert evaluated_tokens(tokens, max_tokens) == end
    assert evaluated_bytes(tokens, max_tokens) == 10 * end
    pairs = [pair for batch in validation_batches(tokens, seq_len, 3, max_tokens) for pair in learned(batch)]
    assert pairs == circle(tokens, end)


def test_a_whole_evaluation_counts_every_byte(split: Split) -> None:
    tokens = split(3, 4, 5)
    assert (evaluated_tokens(tokens, None), evaluated_bytes(tokens, None)) == (12, 120)


# On disk


def test_a_data_set_on_disk_is_read_like_one_in_memory(split: Split, tmp_path: Path) -> None:
    memory, seal = split(30, 1, 25, 44), "0" * 64
    bounds = [*memory.document_starts.tolist(), memory.n_tokens]
    documents = [Document(memory.read(a, b - a), n_bytes=10 * (b - a), source=0) for a, b in itertools.pairwise(bounds)]
    with durable.Directory(tmp_path / "set") as directory:
        entries = [
            write_shard(directory, f"train-{i:05}.tok", part, vocab_size=128, tokenizer_sha256=seal)
            for i, part in enumerate((documents[:2], documents[2:]))
        ]
        write_manifest(
            directory,
            tokenizer_sha256=seal,
            vocab_size=128,
            start_id=0,
            splits={"train": entries},
            sources=["memory"],
            settings={},
        )
    disk = TokenSet(tmp_path / "set", "train")
    a, b = Loader(disk, 7, 4, seed=2), Loader(memory, 7, 4, seed=2)
    for step in range(1, 10):
        assert torch.equal(a.batch(step).tokens, b.batch(step).tokens)
        assert torch.equal(a.batch(step).targets, b.batch(step).targets)
    assert [learned(x) for x in validation_batches(disk, 7, 4, 40)] == [
        learned(x) for x in validation_batches(memory, 7, 4, 40)
    ]
    assert evaluated_bytes(disk, 40) == evaluated_bytes(memory, 40) == 560


def test_only_what_train_spans_cover_is_learned(tmp_path: Path) -> None:
    ids = np.arange(100) % 50
    with durable.Directory(tmp_path / "chat") as directory:
        spans = (Span(1, 10, "prefix"), Span(10, 20, "train"), Span(70, 90, "train"))
        entry = write_shard(
            directory, "train-00000.tok", [Document(ids, 99, 0, spans)], vocab_size=64, tokenizer_sha256="a" * 64
        )
        write_manifest(
            directory,
            tokenizer_sha256="a" * 64,
            vocab_size=64,
            start_id=0,
            splits={"train": [entry]},
            sources=["chat"],
            settings={},
        )
    loader = Loader(TokenSet(tmp_path / "chat", "train"), 16, 8, seed=3)  # one epoch a step
    batch = loader.batch(1)
    learned = batch.targets[batch.targets != IGNORED]
    assert sorted(learned.tolist()) == sorted([*ids[10:20], *ids[70:90]])
