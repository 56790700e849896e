"""Views: the documents of chosen sources, as if a data set held nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.shards import Span, Tokens
from gpt.views import View, by_source

Split = Callable[..., Tokens]
corpora = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=12)


@given(corpus=corpora, chosen=st.sets(st.integers(0, 2)))
def test_a_view_holds_the_chosen_documents_and_only_those(
    split: Split, corpus: list[tuple[int, int]], chosen: set[int]
) -> None:
    base = split(*(n for n, _ in corpus), by=[source for _, source in corpus])
    view = View(base, sorted(chosen))
    kept = [i for i, (_, source) in enumerate(corpus) if source in chosen]
    bounds = [*base.document_starts.tolist(), base.n_tokens]
    ids = [token for i in kept for token in base.read(bounds[i], bounds[i + 1] - bounds[i]).tolist()]
    lengths = [corpus[i][0] for i in kept]
    assert view.n_tokens == len(ids) and view.n_documents == len(kept) and view.n_bytes == 10 * len(ids)
    assert view.document_starts.tolist() == np.cumsum([0, *lengths]).tolist()[:-1]
    assert view.document_bytes.tolist() == [10 * n for n in lengths]
    assert view.document_sources.tolist() == [corpus[i][1] for i in kept]
    for start in range(len(ids) + 1):
        for stop in range(start, len(ids) + 1):
            assert view.read(start, stop - start).tolist() == ids[start:stop]
    for width in {1, len(ids) // 2, len(ids)} - {0}:
        starts = np.arange(len(ids) - width + 1)
        rows = np.empty((len(starts), width), dtype=np.int64)
        view.read_rows(starts, rows)
        assert rows.tolist() == [ids[i : i + width] for i in starts]


def test_reading_outside_a_view_is_refused(split: Split) -> None:
    view = View(split(5, 6, 7, by=[0, 1, 0]), [0])
    for start, count in ((-1, 2), (0, 13), (13, 0)):
        with pytest.raises(IndexError):
            view.read(start, count)
    for starts in ([-1, 0], [0, 10]):
        with pytest.raises(IndexError):
            view.read_rows(np.array(starts), np.empty((2, 3), dtype=np.int64))


def test_sources_of_one_name_are_one_and_those_without_documents_are_none(split: Split) -> None:
    base = split(5, 6, 7, 8, by=[0, 1, 2, 0])
    object.__setattr__(base, "sources", ["a", "b", "a", "empty"])
    found = by_source(base)
    assert {name: view.n_tokens for name, view in found.items()} == {"a": 20, "b": 6}
    object.__setattr__(base, "sources", ["a", "a", "a"])
    assert by_source(base) == {"a": base}


def test_spans_of_a_view_are_those_of_its_documents_moved(split: Split) -> None:
    base = split(5, 6, 7, by=[0, 1, 0])
    marks = [Span(1, 3, "train"), Span(6, 9, "train"), Span(12, 18, "prefix")]

    def spans(start: int, count: int) -> list[Span]:
        return [s for s in marks if s.start < start + count and s.end > start]

    object.__setattr__(base, "spans", spans)
    object.__setattr__(base, "has_spans", True)
    object.__setattr__(base, "conversations", True)
    view = View(base, [0])
    assert view.has_spans and view.conversations and not view.pairs
    assert view.spans(0, 12) == [Span(1, 3, "train"), Span(6, 12, "prefix")]
    assert view.spans(3, 3) == []
    assert view.spans(3, 4) == [Span(6, 12, "prefix")]
