"""Texts in memory are the split that preparing them would make."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MemorySplit

from gpt import texts, tokenizer
from gpt.data import Batch, validation_batches
from gpt.texts import TextSet
from gpt.tokenizer import Tokenizer

DOCUMENTS = ["the river runs\nto the sea", "床前明月光 🐙", "the sea"]


@pytest.fixture(scope="module")
def cutter() -> Tokenizer:
    return tokenizer.train(DOCUMENTS, "bpe", None)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def read(place: Any, limit: int | None = None) -> texts.Text:
    return texts.read(str(place), limit, lambda line: None)


def test_every_kind_of_file_gives_the_same_documents(lines: Path, tmp_path: Path) -> None:
    packed = tmp_path / "text.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "files").mkdir()
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / "files" / f"{i}.txt").write_text(text)
    found = [read(place) for place in (lines, packed, tmp_path / "files")]
    assert [text.documents for text in found] == [DOCUMENTS] * 3
    assert found[0].n_bytes == [len(text.encode()) for text in DOCUMENTS]
    assert found[0].n_words == 6 + 2 + 2


def test_a_limit_takes_the_first_documents(lines: Path) -> None:
    assert read(lines, 2).documents == DOCUMENTS[:2]


def test_mistakes_are_named(lines: Path, tmp_path: Path) -> None:
    with lines.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:4: field 'text' is int, expected text or a list of texts$"):
        read(lines)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "none.txt")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="no document with text in it"):
        read(tmp_path / "blank.jsonl")


def test_documents_stand_one_after_another_behind_start_tokens(lines: Path, cutter: Tokenizer) -> None:
    tokens = TextSet(read(lines), cutter)
    rows = [[cutter.start_id, *cutter.encode(text)] for text in DOCUMENTS]
    assert tokens.read(0, tokens.n_tokens).tolist() == [token for row in rows for token in row]
    assert tokens.document_starts.tolist() == [0, len(rows[0]), len(rows[0]) + len(rows[1])]
    assert tokens.document_bytes.tolist() == [len(text.encode()) for text in DOCUMENTS]
    assert tokens.n_bytes == sum(tokens.document_bytes)


def test_batches_of_a_text_are_those_of_a_split(lines: Path, cutter: Tokenizer) -> None:
    tokens = TextSet(read(lines), cutter)
    lengths = np.diff(tokens.document_starts, append=tokens.n_tokens).tolist()
    stored = MemorySplit(lengths, start_id=cutter.start_id)
    object.__setattr__(stored, "ids", tokens.read(0, tokens.n_tokens))
    for mask in (False, True):
        ours, theirs = (list(validation_batches(some, 5, 2, None, mask)) for some in (tokens, stored))
        assert len(ours) == len(theirs)
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def same(a: Batch, b: Batch) -> bool:
    return all(x.equal(y) for x, y in zip(a.given, b.given, strict=True))
