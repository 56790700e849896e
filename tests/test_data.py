"""The order of data: every token once an epoch, the same on every call, and nothing lost at the edges."""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MemorySplit
from hypothesis import given
from hypothesis import strategies as st

from gpt import durable
from gpt.data import (
    CYCLE,
    IGNORED,
    WAITING,
    Batch,
    Data,
    DataConfig,
    Loader,
    Part,
    deal,
    evaluated_bytes,
    evaluated_tokens,
    merged,
    open_data,
    prefetched,
    validation_batches,
)
from gpt.session import opening
from gpt.shards import Document, Span, TokenSet, write_manifest, write_shard
from gpt.tokenizer import Tokenizer, train

ROOT = Path(__file__).parent.parent
Split = Callable[..., TokenSet]  # a stand-in of conftest.py, except where a test writes a real one
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def loading(tokens: Any, seq_len: int, batch_rows: int, seed: int, **settings: Any) -> Loader:
    """A loader of one split, or of several given as {name: (split, share)}."""
    shares = tokens if isinstance(tokens, dict) else {"memory": (tokens, 1.0)}
    parts = [Part(name, each, each, share) for name, (each, share) in shares.items()]
    config = DataConfig(path="memory", seq_len=seq_len, **settings)
    return Loader(Data(parts, None, "1" * 64), config, batch_rows, seed)  # type: ignore[arg-type]


def learned(batch: Batch) -> list[tuple[int, int]]:
    """(input, target) of everything that is trained on."""
    trained = batch.targets != IGNORED
    return list(zip(batch.tokens[trained].tolist(), batch.targets[trained].tolist(), strict=True))


def circle(split: TokenSet, end: int | None = None) -> list[tuple[int, int]]:
    """Every token with the one after it, the first again after the last."""
    ids = split.read(0, split.n_tokens if end is None else end).tolist()
    return list(zip(ids, [*ids[1:], ids[0]], strict=True))


# Training batches


@given(lengths=lengths, seq_len=st.integers(1, 40), batch_rows=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_token_is_a_target_once_an_epoch(
    split: Split, lengths: list[int], seq_len: int, batch_rows: int, seed: int
) -> None:
    tokens = split(*lengths)
    seq_len = min(seq_len, tokens.n_tokens)
    loader = loading(tokens, seq_len, batch_rows, seed)
    batches = [loader.batch(step) for step in range(1, 1 + -(-2 * loader.orders[0].n_rows // batch_rows))]
    for rows in zip(
        *(torch.cat(part).split(loader.orders[0].n_rows)[:2] for part in zip(*(b[:2] for b in batches), strict=True)),
        strict=True,
    ):
        assert Counter(learned(Batch(*rows))) == Counter(circle(tokens))


@given(lengths=lengths, seq_len=st.integers(1, 40), step=st.integers(1, 10**9))
def test_a_row_reads_on_in_the_text_and_its_targets_are_its_next_tokens(
    split: Split, lengths: list[int], seq_len: int, step: int
) -> None:
    tokens = split(*lengths)
    batch = loading(tokens, min(seq_len, tokens.n_tokens), 4, seed=3).batch(step)
    trained = batch.targets != IGNORED
    assert (trained[:, :-1] >= trained[:, 1:]).all()  # nothing trained after the filling has begun
    inner = trained[:, 1:]
    assert torch.equal(batch.tokens[:, 1:][inner], batch.targets[:, :-1][inner])
    assert (batch.tokens[~trained] == tokens.start_id).all()


def test_a_batch_is_the_same_in_any_order_of_calls_and_in_a_new_loader(split: Split) -> None:
    tokens = split(40, 60, 33)
    forward, backward = loading(tokens, 8, 3, seed=1), loading(tokens, 8, 3, seed=1)
    first = {step: forward.batch(step) for step in range(1, 30)}
    for step in reversed(range(1, 30)):
        again = backward.batch(step)
        assert torch.equal(again.tokens, first[step].tokens) and torch.equal(again.targets, first[step].targets)
    assert torch.equal(loading(tokens, 8, 3, seed=1).batch(17).tokens, first[17].tokens)


def test_the_rows_of_a_batch_do_not_depend_on_its_size(split: Split) -> None:
    tokens = split(40, 60, 33)
    small, large = loading(tokens, 8, 2, seed=1), loading(tokens, 8, 6, seed=1)
    joined = torch.cat([small.batch(step).tokens for step in range(1, 31)])
    assert torch.equal(joined, torch.cat([large.batch(step).tokens for step in range(1, 11)]))


def test_other_seeds_give_other_orders(split: Split) -> None:
    tokens = split(500)
    assert not torch.equal(loading(tokens, 8, 8, seed=1).batch(1).tokens, loading(tokens, 8, 8, seed=2).batch(1).tokens)


def test_epochs_differ_in_order_and_in_where_rows_are_cut(split: Split) -> None:
    loader = loading(split(500), 16, 1, seed=5)
    starts = [loader.batch(step).tokens[0, 0].item() for step in range(1, 5 * loader.orders[0].n_rows + 1)]
    epochs = np.array(starts).reshape(5, -1)
    assert len({tuple(order) for order in np.argsort(epochs).tolist()}) == 5
    assert len({frozenset(cuts) for cuts in epochs.tolist()}) > 1


def test_a_training_split_shorter_than_a_row_is_refused_with_both_numbers(split: Split) -> None:
    with pytest.raises(ValueError, match=r"has 9 tokens, fewer than data\.seq_len \(10\)"):
        loading(split(4, 5), 10, 1, seed=0)
    assert loading(split(4, 6), 10, 1, seed=0).batch(1).tokens.shape == (1, 10)


def test_batches_are_int64_of_rows_by_seq_len(split: Split) -> None:
    tokens = split(40, 60)
    for batch in (loading(tokens, 8, 3, seed=1).batch(1), next(validation_batches(tokens, 8, 3, None))):
        assert all(x.dtype == torch.int64 and x.shape == (3, 8) for x in batch[:2])
        assert batch.n_targets == len(learned(batch))


# Mixtures

shares = st.lists(st.floats(0.001, 1), min_size=2, max_size=6)


@given(weights=shares)
def test_a_cycle_is_dealt_in_exact_shares(weights: list[float]) -> None:
    quotas = deal(weights)
    assert quotas.sum() == CYCLE
    assert np.abs(quotas - np.array(weights) / sum(weights) * CYCLE).max() < 1


def test_a_share_below_one_row_in_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="less than one row in 65536"):
        deal([1.0, 1e-6])


def test_a_mixture_reads_its_parts_in_their_shares_and_says_where_rows_come_from(split: Split) -> None:
    parts = {"a": (split(50, 50, 60), 0.7), "b": (split(90, 200), 0.2), "c": (split(70), 0.1)}
    loader = loading(parts, 16, 64, seed=1)
    names = list(itertools.chain.from_iterable(loader.sources_of(step) for step in range(1, 1 + CYCLE // 64)))
    assert [names.count(name) for name in parts] == deal([0.7, 0.2, 0.1]).tolist()
    near = Counter(names[:6400])
    assert all(abs(near[name] / 6400 - share) < 0.02 for name, (_, share) in parts.items())


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_each_part_of_a_mixture_has_whole_epochs_of_its_own(split: Split, packing: str) -> None:
    parts = {"a": (split(50, 50, 60), 0.7), "b": (split(90, 20, 7, 200), 0.3)}
    loader = loading(parts, 16, 32, seed=1, packing=packing)
    found: dict[str, list[Batch]] = {"a": [], "b": []}
    for step in range(1, 40):
        for name, tokens, targets in zip(loader.sources_of(step), *loader.batch(step)[:2], strict=True):
            found[name].append(Batch(tokens[None], targets[None]))
    for (name, rows), order in zip(found.items(), loader.orders, strict=True):
        assert len(rows) > 3 * order.n_rows
        for i in range(3):
            epoch = rows[i * order.n_rows : (i + 1) * order.n_rows]
            assert Counter(pair for row in epoch for pair in learned(row)) == Counter(circle(parts[name][0]))
    assert loader.epochs(39) == [(n, len(r) / o.n_rows) for (n, r), o in zip(found.items(), loader.orders, strict=True)]


def test_epochs_are_counted_over_whole_cycles_too(split: Split) -> None:
    loader = loading({"a": (split(160), 0.75), "b": (split(320), 0.25)}, 16, CYCLE // 4, seed=1)
    a, b = (order.n_rows for order in loader.orders)
    assert loader.epochs(40) == [("a", 10 * 0.75 * CYCLE / a), ("b", 10 * 0.25 * CYCLE / b)]


# Packing and masks


@given(lengths=lengths, seq_len=st.integers(1, 40), batch_rows=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_token_is_a_target_once_an_epoch_of_packed_documents(
    split: Split, lengths: list[int], seq_len: int, batch_rows: int, seed: int
) -> None:
    tokens = split(*lengths)
    seq_len = min(seq_len, tokens.n_tokens)
    loader = loading(tokens, seq_len, batch_rows, seed, packing="documents")
    batches = [loader.batch(step) for step in range(1, 1 + -(-2 * loader.orders[0].n_rows // batch_rows))]
    ids, targets = (torch.cat(part).split(loader.orders[0].n_rows)[:2] for part in list(zip(*batches, strict=True))[:2])
    for epoch in zip(ids, targets, strict=True):
        assert Counter(learned(Batch(*epoch))) == Counter(circle(tokens))


@given(
    lengths=lengths,
    seq_len=st.integers(1, 40),
    step=st.integers(1, 1000),
    packing=st.sampled_from(["stream", "documents"]),
)
def test_documents_of_a_row_are_numbered_and_their_positions_restart(
    split: Split, lengths: list[int], seq_len: int, step: int, packing: str
) -> None:
    tokens = split(*lengths)
    seq_len = min(seq_len, tokens.n_tokens)
    loader = loading(tokens, seq_len, 5, 3, packing=packing, document_mask=True)
    batch, bare = loader.batch(step), loading(tokens, seq_len, 5, 3, packing=packing).batch(step)
    assert torch.equal(bare.tokens, batch.tokens) and torch.equal(bare.targets, batch.targets)
    assert bare.doc_ids is None and bare.positions is None
    assert batch.doc_ids is not None and batch.positions is not None
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.zeros((5, seq_len), dtype=bool)
    for row, column, start, count in zip(*loader.orders[0].pieces(np.arange(5 * step - 5, 5 * step)), strict=True):
        documents = document_of[start : start + count]
        begins[row, column : column + count] = np.diff(documents, prepend=-1) != 0
        if column + count < seq_len:
            begins[row, column + count] = True
    begins[:, 0] = True
    for row in range(5):
        starts = np.flatnonzero(begins[row]).tolist()
        for number, (a, b) in enumerate(itertools.pairwise([*starts, seq_len])):
            assert batch.doc_ids[row, a:b].tolist() == [number] * (b - a)
            assert batch.positions[row, a:b].tolist() == list(range(b - a))


@given(lengths=lengths, seq_len=st.integers(1, 20), max_tokens=st.none() | st.integers(1, 100))
def test_an_evaluation_with_a_mask_reads_the_same_targets(
    split: Split, lengths: list[int], seq_len: int, max_tokens: int | None
) -> None:
    tokens = split(*lengths)
    masked = list(validation_batches(tokens, seq_len, 3, max_tokens, True))
    for one, other in zip(masked, validation_batches(tokens, seq_len, 3, max_tokens), strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)
        assert one.doc_ids is not None and one.positions is not None
        starts = one.positions == 0
        assert torch.equal(starts[:, 1:], one.doc_ids.diff(dim=1) == 1)


# Reading ahead


def same(a: Batch, b: Batch) -> bool:
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("settings", [{}, {"packing": "documents", "document_mask": True}], ids=str)
@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 40), (7, 3000), (5, 4)])
def test_what_is_read_ahead_is_what_each_step_asks_for(
    split: Split, first: int, last: int, settings: dict[str, Any]
) -> None:
    loader = loading({"a": (split(300, 50), 0.5), "b": (split(40, 40, 41), 0.5)}, 16, 8, seed=2, **settings)
    batches = list(prefetched(loader, first, last))
    assert len(batches) == last - first + 1
    for step in {
        *range(first, min(first + 20, last + 1)),
        *range(first, last + 1, 97),
        *range(last, last + 1 - len(batches[:1]), -1),
    }:
        assert same(batches[step - first], loader.batch(step))


def test_an_error_while_reading_ahead_is_raised_where_batches_are_asked_for(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loading(split(5000), 16, 1024, seed=1)
    portions = loader.portions

    def failing(*args: Any) -> Iterator[list[Batch]]:
        yield next(portions(*args))
        raise OSError("the disk went away")

    monkeypatch.setattr(loader, "portions", failing)
    batches = prefetched(loader, 1, 1000)
    next(batches)
    with pytest.raises(OSError, match="the disk went away"):
        list(batches)
    assert not reading()


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_reading_ahead_is_bounded_and_ends_with_who_asks(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loading(split(5000), 64, 4096, seed=1)  # a batch is a portion
    portions, made = loader.portions, []

    def counted(*args: Any) -> Iterator[list[Batch]]:
        for portion in portions(*args):
            made.append(portion)
            yield portion

    monkeypatch.setattr(loader, "portions", counted)
    batches = prefetched(loader, 1, 10**9)
    for _ in range(3):
        next(batches)
    deadline = time.monotonic() + 20
    while len(made) < 3 + WAITING and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) <= 3 + WAITING + 1
    assert len(reading()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert not reading()


def test_an_iterator_left_open_does_not_hold_up_the_end_of_the_program() -> None:
    script = """
import sys
sys.path.insert(0, "tests")
from conftest import MemorySplit
from test_data import loading
from gpt.data import prefetched
batches = prefetched(loading(MemorySplit([5000]), 64, 512, seed=1), 1, 10**9)
next(batches)
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, check=True, timeout=60
    )


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either path .* or mixture .* got neither"),
        ({"path": "x", "mixture": {"a": 1.0}}, "got both"),
        ({"mixture": {"a": 0.7, "b": 0.2}}, r"sum to 1, got \{a: 0.7, b: 0.2\}, which sum to 0.9"),
        ({"mixture": {"a": 1.5, "b": -0.5}}, "shares above 0"),
        ({"mixture": {}}, "shares above 0"),
        ({"mixture": {"a": 1.0}, "sources": {"x": 1.0}}, "sources are shares within one data set"),
        ({"path": "x", "sources": {"a": 0.5}}, "which sum to 0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_what_was_got(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig.model_validate(settings)


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
    a, b = loading(disk, 7, 4, seed=2), loading(memory, 7, 4, seed=2)
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
    loader = loading(TokenSet(tmp_path / "chat", "train"), 16, 7, seed=3, long_documents="cut")  # one epoch a step
    batch = loader.batch(1)
    learned = batch.targets[batch.targets != IGNORED]
    assert sorted(learned.tolist()) == sorted([*ids[10:20], *ids[70:90]])

    masked = DataConfig(path="x", seq_len=16, document_mask=True, long_documents="cut")
    part = Part("chat", loader.parts[0].train, loader.parts[0].train)
    batch = Loader(Data([part], None, ""), masked, 7, 3, prefix=True).batch(1)  # type: ignore[arg-type]
    assert batch.prefix is not None and len(batch.given) == 5
    assert sorted(batch.tokens[batch.prefix].tolist()) == ids[1:10].tolist()
    [validation] = validation_batches(part.val, 110, 1, None, True, True)
    assert validation.prefix is not None and validation.prefix[0].nonzero()[:, 0].tolist() == list(range(1, 10))


def test_documents_with_prompts_are_evaluated_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = MemorySplit([9, 5, 30, 7, 3, 12])
    monkeypatch.setattr(MemorySplit, "spans", lambda self, start, count: [Span(start, start + count, "train")])
    object.__setattr__(tokens, "has_spans", True)
    for max_tokens, n in ((None, 6), (40, 3)):
        batches = list(validation_batches(tokens, 16, 2, max_tokens, True, True))
        seen: list[int] = []
        for row, targets, documents in (
            each for b in batches for each in zip(b.tokens, b.targets, b.doc_ids, strict=True)
        ):  # type: ignore[arg-type]
            for number in documents.unique():
                own = row[(documents == number) & (targets != IGNORED)].tolist()  # the end of the last one too
                if own:
                    assert own == tokens.ids[tokens.ids.tolist().index(own[-1]) - len(own) + 1 :][: len(own)].tolist()
                    seen.append(len(own))
        assert sorted(seen) == sorted([9, 5, 16, 14, 7, 3, 12] if n == 6 else [9, 5, 16, 14])


def marked(*documents: tuple[int, list[tuple[int, int]]]) -> MemorySplit:
    """A split of conversations: (length, where its answers stand) of each."""
    tokens = MemorySplit([length for length, _ in documents], has_spans=True, conversations=True)
    starts = tokens.document_starts.tolist()
    found = [
        Span(start + a, start + b, "train")
        for start, (_, answers) in zip(starts, documents, strict=True)
        for a, b in answers
    ]
    near = lambda start, count: [s for s in found if s.start < start + count and s.end > start]  # noqa: E731
    object.__setattr__(tokens, "spans", near)
    return tokens


LONG_TALK = (40, [(5, 9), (14, 20), (30, 38)])


@pytest.mark.parametrize(
    ("policy", "learned_tokens", "words"),
    [
        (
            "auto",
            [(5, 9), (14, 20)],
            "1 of 3 conversations are longer than a row: 1 end with the last answer that fits (8 of",
        ),
        ("begin", [(5, 9), (14, 20)], "1 end with the last answer that fits (8 of their tokens are not learned)"),
        ("drop", [], "1 are left out (18 of their tokens are not learned)"),
        ("cut", [(5, 9), (14, 20), (30, 38)], "1 of 3 conversations are longer than a row: 1 fill several"),
    ],
)
def test_a_conversation_longer_than_a_row_is_read_as_the_policy_says(
    policy: str, learned_tokens: list[tuple[int, int]], words: str
) -> None:
    tokens = marked((10, [(4, 9)]), LONG_TALK, (6, [(2, 6)]))
    loader = loading(tokens, 24, 4, seed=1, document_mask=True, long_documents=policy)
    assert words in loader.orders[0].told  # type: ignore[union-attr]
    batch = next(loader.portions(1, 1))[0]
    seen = {int(i) for i in batch.targets.flatten() if i != IGNORED}
    long = {int(tokens.ids[10 + i]) for a, b in learned_tokens for i in range(a, b)}
    assert seen == long | set(tokens.ids[4:9].tolist()) | set(tokens.ids[52:56].tolist())
    if policy != "cut":  # every answer has all that came before it in its row
        for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            for at, target in enumerate(targets):
                if target != IGNORED:
                    document = int(np.searchsorted(tokens.document_starts, target - 1, side="right")) - 1
                    first = int(tokens.document_starts[document])
                    assert row[at - (target - 2 - first) : at + 1] == tokens.ids[first : target - 1].tolist()


@given(
    st.lists(st.tuples(st.integers(3, 40), st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(8, 32),
    st.sampled_from(["stream", "documents"]),
)
def test_no_conversation_is_cut_or_sees_another(shapes: list[tuple[int, int, int]], seq_len: int, packing: str) -> None:
    documents = [(n, [(min(at, n - 1), min(at + more, n))]) for n, at, more in shapes]
    tokens = marked(*documents)
    try:
        loader = loading(tokens, seq_len, 3, seed=2, document_mask=True, packing=packing)
    except ValueError as error:
        assert "raise it, or set data.long_documents=cut" in str(error)
        assert all(n > seq_len and answers[0][1] > seq_len for n, answers in documents)
        return
    order, begun = loader.orders[0], Counter[int]()
    for pieces in (order.pieces(np.arange(order.n_rows)),):
        for start in pieces.start.tolist():
            assert start in tokens.document_starts
            begun[start] += 1
    assert not begun or max(begun.values()) == 1
    batch = next(loader.portions(1, 1))[0]
    assert batch.doc_ids is not None and batch.positions is not None
    for row, numbers, positions in zip(
        batch.tokens.tolist(), batch.doc_ids.tolist(), batch.positions.tolist(), strict=True
    ):
        for at, (token, number) in enumerate(zip(row, numbers, strict=True)):
            if positions[at]:  # it follows what stands before it in its own document, or is padding
                assert number == numbers[at - 1]
                assert token == row[at - 1] + 1 or tokens.start_id in (token, row[at - 1])


def test_a_text_among_conversations_may_be_cut() -> None:
    tokens = marked((50, [(0, 50)]), LONG_TALK, (6, [(2, 6)]))
    order = loading(tokens, 24, 4, seed=1, document_mask=True).orders[0]
    assert "2 of 3 conversations are longer than a row: 1 fill several, 1 end with the last answer" in order.told  # type: ignore[union-attr]
    begun = loading(tokens, 24, 4, seed=1, document_mask=True, long_documents="begin").orders[0]
    assert begun.long[:3] == (0, 2, 0)  # type: ignore[union-attr]
    plain = loading(MemorySplit([50, 10]), 24, 4, seed=1, packing="documents", long_documents="drop").orders[0]
    assert plain.long == (0, 0, 1, 50) and plain.plan.n_tokens == 10  # type: ignore[union-attr]


def test_conversations_are_refused_without_a_document_mask_or_if_none_fits() -> None:
    with pytest.raises(ValueError, match=r"memory holds conversations, .* set data\.document_mask=true"):
        loading(marked(LONG_TALK), 64, 2, seed=1)
    with pytest.raises(ValueError, match=r"none of its 1 conversations .* of 8 tokens .* set data\.long_documents=cut"):
        loading(marked(LONG_TALK), 8, 2, seed=1, document_mask=True)
    assert loading(marked(LONG_TALK), 8, 2, seed=1, document_mask=True, long_documents="cut").batch(1).n_targets >= 0


def test_conversations_are_evaluated_to_their_last_target() -> None:
    tokens = marked(LONG_TALK, (10, [(4, 9)]))
    batches = list(validation_batches(tokens, 24, 2, None, True))  # type: ignore[arg-type]
    assert sum(batch.n_targets for batch in batches) == 4 + 6 + 8 + 5


# Opening


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets a and b of one tokenizer, and c of another; a has sources x and y, b has z."""
    root = tmp_path_factory.mktemp("shelf")
    vocabularies = {name: train(["to be or not to be " * 20, name], "char", None) for name in ("ab", "c!")}
    for name, vocabulary, sources in (("a", "ab", ["x", "y"]), ("b", "ab", ["z"]), ("c", "c!", ["z"])):
        tokenizer = vocabularies[vocabulary]
        with durable.Directory(root / name) as directory:
            seals: dict[str, Any] = {"vocab_size": tokenizer.size, "tokenizer_sha256": tokenizer.sha256}
            splits = {}
            for split, n in (("train", 60), ("val", 40)):
                ids = [tokenizer.start_id, *tokenizer.encode("to be or not to be")]
                documents = [Document(ids, 18, i * len(sources) // n) for i in range(n)]
                splits[split] = [write_shard(directory, f"{split}-00000.tok", documents, **seals)]
            for file, data in tokenizer.files().items():
                directory.write(file, [data])
            write_manifest(
                directory, **seals, start_id=tokenizer.start_id, splits=splits, sources=sources, settings={"is": name}
            )
    return root


def test_a_data_set_opens_as_one_part(shelf: Path) -> None:
    data = open_data(DataConfig(path=str(shelf / "a"), seq_len=8))
    assert [(part.name, part.weight) for part in data.parts] == [(str(shelf / "a"), 1.0)]
    assert data.n_tokens == 60 * 19 and data.fingerprint == TokenSet(shelf / "a", "train").fingerprint
    assert data.tokenizer.sha256 == data.parts[0].val.tokenizer_sha256


def test_a_mixture_opens_as_its_data_sets(shelf: Path) -> None:
    mixture = {str(shelf / "a"): 0.25, str(shelf / "b"): 0.75}
    data = open_data(DataConfig(mixture=mixture, seq_len=8))
    assert {part.name: part.weight for part in data.parts} == mixture
    other = open_data(DataConfig(mixture={str(shelf / "b"): 0.5, str(shelf / "a"): 0.5}, seq_len=8))
    alone = open_data(DataConfig(mixture={str(shelf / "a"): 1.0}, seq_len=8))
    assert len({data.fingerprint, other.fingerprint, alone.fingerprint}) == 3
    assert Loader(data, DataConfig(mixture=mixture, seq_len=8), 4, 1).batch(3).tokens.shape == (4, 8)


def test_shares_of_sources_open_as_views_of_them(shelf: Path) -> None:
    config = DataConfig(path=str(shelf / "a"), sources={"y": 0.5, "x": 0.5}, seq_len=8)
    data = open_data(config)
    assert [(part.name, part.n_tokens, part.val.n_tokens) for part in data.parts] == [
        ("y", 30 * 19, 20 * 19),
        ("x", 30 * 19, 20 * 19),
    ]
    assert Loader(data, config, 4, 1).batch(3).tokens.shape == (4, 8)


def test_what_does_not_belong_together_is_refused_with_what_to_do(shelf: Path, tmp_path: Path) -> None:
    a, b, c = (str(shelf / name) for name in "abc")
    for settings, words in (
        ({"mixture": {a: 0.5, c: 0.5}}, "different tokenizers; prepare one again: --tokenizer"),
        ({"path": a, "sources": {"x": 0.5, "w": 0.5}}, "no training documents of 'w'; data.sources may name 'x', 'y'"),
        ({"path": a, "seq_len": 1000}, r"validation split has 760 tokens, fewer than data.seq_len \(1000\)"),
        ({"path": a, "tokenizer": b}, "prepared with a tokenizer and has it; remove data.tokenizer"),
    ):
        with pytest.raises(ValueError, match=words):
            open_data(DataConfig(**({"seq_len": 8} | settings)))
    with pytest.raises(FileNotFoundError, match="is not a prepared data set"):
        open_data(DataConfig(mixture={a: 0.5, str(tmp_path): 0.5}))


def test_a_source_of_chats_without_held_out_ones_begins_no_sample_and_none_at_all_is_refused(
    shelf: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(shelf / "a")
    ids = [tokenizer.start_id, *tokenizer.encode("to be or not to be")]
    seals: dict[str, Any] = {"vocab_size": tokenizer.size, "tokenizer_sha256": tokenizer.sha256}
    for name, held_out in (("none", slice(0)), ("one", slice(1, 2))):
        chats = [Document(ids, 18, source, (Span(1, 7, "prefix"), Span(7, 18, "train"))) for source in (0, 1)]
        with durable.Directory(tmp_path / name) as directory:
            parts = {"train": chats, "val": chats[held_out]}
            splits = {split: [write_shard(directory, f"{split}-0.tok", kept, **seals)] for split, kept in parts.items()}
            for file, data in tokenizer.files().items():
                directory.write(file, [data])
            write_manifest(
                directory, **seals, start_id=tokenizer.start_id, splits=splits, sources=["x", "y"], settings={}
            )
    shares = {"x": 0.5, "y": 0.5}
    with pytest.raises(ValueError, match="the validation split has 0 tokens"):
        open_data(DataConfig(path=str(tmp_path / "none"), sources=shares, seq_len=64))
    opened = open_data(DataConfig(path=str(tmp_path / "one"), sources=shares, seq_len=64))
    assert [part.val.n_tokens for part in opened.parts] == [0, 19]
    assert opening(opened, 64)[0] == ids[:7]


def test_token_files_of_others_train_where_they_are(shelf: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(shelf / "a")
    ids = [*tokenizer.encode("to be or not to be"), tokenizer.start_id]
    for split in ("train", "val"):
        np.array(ids * 50, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    config = DataConfig(path=str(tmp_path), tokenizer=str(shelf / "a"), seq_len=19, packing="documents")
    batch = Loader(open_data(config), config, 3, 1).batch(1)
    assert batch.tokens.tolist() == [[ids[-1], *ids[:-1]]] * 3 and batch.targets.tolist() == [ids] * 3


# Windows that are skipped


def test_skipped_windows_take_their_batches_out_of_the_order_and_change_no_other(split) -> None:
    loader, whole = loading(split(40, 25, 70), 8, 3, 1), loading(split(40, 25, 70), 8, 3, 1)
    windows = merged([(7, 9), (3, 4), (10, 10), (3, 3)])
    assert windows == [(3, 4), (7, 10)]
    loader.skipped = windows
    left = [n for n in range(1, 40) if not any(first <= n <= last for first, last in windows)]
    for step, number in enumerate(left[:25], 1):
        assert loader.number(step) == number
        assert same(loader.batch(step), whole.batch(number))
        assert loader.sources_of(step) == whole.sources_of(number)
    ahead = [batch for portion in loader.portions(2, 25) for batch in portion]
    assert all(same(batch, loader.batch(step)) for step, batch in enumerate(ahead, 2))
