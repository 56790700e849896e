from collections.abc import Callable
from typing import Any

import torch

from gpt.data import Data, DataConfig, Loader, Part
from gpt.places import of_batch, openings


def test_every_token_of_a_batch_stands_where_its_place_says(split: Callable[..., Any]) -> None:
    parts = [Part("a", split(9, 30, 5), split(40), 0.5), Part("b", split(50, 12, by=[0, 1]), split(40), 0.5)]
    loader = Loader(Data(parts, None, ""), DataConfig(mixture={"a": 0.5, "b": 0.5}, seq_len=16), 4, seed=3)  # type: ignore[arg-type]
    loader.skipped = [(2, 2)]
    for step in (1, 2, 3):
        tokens = loader.batch(step).tokens
        covered = torch.zeros_like(tokens, dtype=torch.bool)
        for place in of_batch(loader, step):
            here = slice(place.column, place.column + place.count)
            assert tokens[place.row, here].tolist() == place.tokens.read(place.start, place.count).tolist()
            covered[place.row, here] = True
        assert (tokens[~covered] == 0).all()


def test_documents_are_named_by_number_and_source_and_by_where_they_are_entered(split: Callable[..., Any]) -> None:
    part = Part("b", split(50, 12, by=[0, 1]), split(40))
    loader = Loader(Data([part], None, ""), DataConfig(path="b", seq_len=16), 4, seed=3)  # type: ignore[arg-type]
    labels = [label for step in (1, 2) for _, label in openings(of_batch(loader, step))]
    assert any(label.startswith("document 0 (memory), from its token") for label in labels)
    assert "document 1 (another)" in labels
