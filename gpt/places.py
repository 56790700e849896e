"""Where the rows of a batch come from: which documents of which source stand in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpt.data import Loader, Pieces
from gpt.shards import Tokens


@dataclass(frozen=True)
class Place:
    """Where a piece of a row comes from: tokens start .. start + count - 1 of `tokens` stand from `column` on."""

    row: int
    column: int
    start: int
    count: int
    name: str
    tokens: Tokens


def of_batch(loader: Loader, step: int) -> list[Place]:
    """All pieces of the batch of update `step`."""
    read_from = zip(loader.parts, loader.places(step), strict=True)
    return [place for part, pieces in read_from for place in named(pieces, part.name, part.train)]


def named(pieces: Pieces, name: str, tokens: Tokens) -> Iterator[Place]:
    """Pieces of one split as places; those without tokens are left out."""
    for row, column, start, count in np.stack(pieces, axis=1).tolist():
        if count:
            yield Place(row, column, start, count, name, tokens)


def openings(places: Sequence[Place]) -> list[tuple[int, str]]:
    """(column, what stands from there on) of each document in a row, by column."""
    found = []
    for place in places:
        starts, sources = place.tokens.document_starts, place.tokens.document_sources
        low = max(0, int(np.searchsorted(starts, place.start, side="right")) - 1)
        high = int(np.searchsorted(starts, place.start + place.count))
        for document in range(low, high):
            begins = int(starts[document])
            source = place.tokens.sources[int(sources[document])]
            from_inside = f", from its token {place.start - begins:,} on" if begins < place.start else ""
            what = f"document {document:,}"
            if place.tokens.pairs:
                what = f"pair {document // 2:,}, {'rejected' if document % 2 else 'chosen'}"
            found.append((place.column + max(0, begins - place.start), f"{what} ({source}){from_inside}"))
    return found
