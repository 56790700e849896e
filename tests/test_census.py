"""The report counts what is in the shards, and says what is in their text."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from gpt.census import census, script_of, show
from gpt.durable import CorruptError, Directory
from gpt.shards import Document, Span, write_manifest, write_shard
from gpt.tokenizer import train


@pytest.mark.parametrize(
    ("data", "script"),
    [
        (" the", "Latin"),
        ("床前", "Han"),
        ("かな", "kana"),
        ("мир", "Cyrillic"),
        ("123", "digits"),
        ("\n\t", "space"),
        ("(x, y)", "punctuation"),
        ("ไทย", "other"),
    ],
)
def test_a_token_has_the_script_of_most_of_it(data: str, script: str) -> None:
    assert script_of(data.encode()) == script
    assert script_of("床".encode()[:2]) == "parts of characters"


def made(path: Path, shards: dict[str, list[list[Document]]]) -> Path:
    """A data set of the given documents, one shard for each list."""
    tokenizer = train(["some text here " * 20], "char", None)
    with Directory(path) as directory:
        for name, data in tokenizer.files().items():
            directory.write(name, data)
        made_with = {"vocab_size": tokenizer.size, "tokenizer_sha256": tokenizer.sha256}
        entries = {
            split: [write_shard(directory, f"{split}-{i}.tok", some, **made_with) for i, some in enumerate(each)]  # type: ignore[arg-type]
            for split, each in shards.items()
        }
        rest = {"start_id": tokenizer.start_id, "sources": ["a", "b"], "settings": {}}
        write_manifest(directory, splits=entries, **made_with, **rest)  # type: ignore[arg-type]
    return path


def test_documents_bytes_and_tokens_are_counted_by_source_over_all_shards(tmp_path: Path) -> None:
    one, two, three = Document([0, 9, 10], 2, 0), Document([0, 9], 1, 1), Document([0, 11, 12, 13], 3, 1)
    report = census(made(tmp_path / "set", {"train": [[one, two], [three, one]], "val": [[two]]}))
    assert report.sources == [("a", 2, 4, 6), ("b", 3, 5, 8)]
    assert (report.documents, report.bytes) == ({"train": 4, "val": 1}, {"train": 8, "val": 1})
    assert report.tokens == {"train": 12, "val": 2}


def test_the_share_of_tokens_that_is_learned_is_counted_and_shown(tmp_path: Path) -> None:
    answers = (Span(0, 2, "prefix"), Span(1, 2, "train"), Span(3, 4, "train"))
    shards = {
        "train": [[Document([0, 9, 10, 9], 3, 0, answers)], [Document([0, 9], 1, 0)]],
        "val": [[Document([0, 9], 1, 0)]],
    }
    report = census(made(tmp_path / "set", shards))
    assert report.learned == {"train": 2, "val": 2}
    show(report, console := Console(file=io.StringIO(), width=80))
    assert "trained: 33.3% of train and 100.0% of val" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_index_that_names_no_source_is_damage(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"train-0\.tok: its document index"):
        census(made(tmp_path / "set", {"train": [[Document([0, 9], 1, 2)]], "val": [[Document([0, 9], 1, 0)]]}))


def test_what_was_noted_while_it_was_made_is_shown(tmp_path: Path) -> None:
    path = made(tmp_path / "set", {split: [[Document([0, 9], 1, 0)]] for split in ("train", "val")})
    console = Console(file=io.StringIO(), width=80)
    show(census(path, notes=["5 documents were empty"], skipped=["a.txt:3: broken"], n_skipped=1234), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5 documents were empty" in said and "1,234 bad records were skipped:\n  a.txt:3: broken\n" in said
