"""Token files of nanoGPT and llm.c: the ids that were written, documents and bytes that follow from them, and what is refused."""

import json
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt import bins, durable, tokenizer
from gpt.bins import open_bins
from gpt.tokenizer import END, Tokenizer

TEXTS = ["the cat sees a dog", "", "a bird sings; naïve 漢字", "the dog hears the rain today"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A vocabulary of 300, whose start token has the id 0."""
    return tokenizer.train(TEXTS * 3, "bpe", 290)


def llmc(path: Path, ids: np.ndarray, *, magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.tobytes())


def documents(vocabulary: Tokenizer) -> list[list[int]]:
    return [vocabulary.encode(text) for text in TEXTS]


def write_nanogpt(directory: Path, vocabulary: Tokenizer) -> Path:
    ids = [i for document in documents(vocabulary) for i in [*document, vocabulary.start_id]]
    for split in ("train", "val"):
        (directory / f"{split}.bin").write_bytes(np.array(ids, "<u2").tobytes())
    return directory


def write_llmc(directory: Path, vocabulary: Tokenizer, dtype: str = "<u2", magic: int = 20240520) -> Path:
    """Two shards of the training split, cut inside a document, and one of the other."""
    ids = np.array([i for document in documents(vocabulary) for i in [vocabulary.start_id, *document]], dtype)
    version = 1 if dtype == "<u2" else 7
    for name, part in {"train_000001": ids[:9], "train_000002": ids[9:], "val_000000": ids}.items():
        llmc(directory / f"poems_{name}.bin", part, magic=magic, version=version)
    return directory


WRITERS: dict[str, Callable[[Path, Tokenizer], Path]] = {
    "nanoGPT": write_nanogpt,
    "llm.c": write_llmc,
    "llm.c for Llama 3": lambda path, vocabulary: write_llmc(path, vocabulary, "<u4", 20240801),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("chunk", [1 << 22, 5])
def test_documents_are_those_that_were_written(
    tmp_path: Path, bpe: Tokenizer, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bins, "CHUNK", chunk)
    for split in ("train", "val"):
        found = open_bins(WRITERS[kind](tmp_path, bpe), split, bpe)
        expected = [[bpe.start_id, *document] for document in documents(bpe)]
        flat = [i for document in expected for i in document]
        assert found.read(0, found.n_tokens).tolist() == flat
        assert found.document_starts.tolist() == np.cumsum([0, *map(len, expected[:-1])]).tolist()
        assert found.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
        assert (found.n_documents, found.n_bytes) == (4, sum(len(text.encode()) for text in TEXTS))
        assert all(found.read(at, 4).tolist() == flat[at : at + 4] for at in range(found.n_tokens - 3))
        rows = np.empty((2, 7), np.int64)
        found.read_rows(np.array([0, 5]), rows)
        assert rows.tolist() == [flat[:7], flat[5:12]]
        with pytest.raises(IndexError):
            found.read(found.n_tokens - 1, 2)


def test_a_text_without_delimiters_is_one_document_opened_by_a_start_token(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "train.bin").write_bytes(np.array(bpe.encode(TEXTS[0]), "<u2").tobytes())
    found = open_bins(tmp_path, "train", bpe)
    assert found.read(0, found.n_tokens).tolist() == [bpe.start_id, *bpe.encode(TEXTS[0])]
    assert found.document_starts.tolist() == [0] and found.document_bytes.tolist() == [len(TEXTS[0])]


def test_the_fingerprint_is_of_the_contents_and_a_change_is_found(tmp_path: Path, bpe: Tokenizer) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        directory.mkdir()
        write_nanogpt(directory, bpe)
    found = open_bins(one, "train", bpe)
    assert found.fingerprint == open_bins(other, "train", bpe).fingerprint
    found.verify()
    ids = np.fromfile(one / "train.bin", "<u2")
    ids[2] ^= 1
    with (one / "train.bin").open("r+b") as file:
        file.write(ids.tobytes())
    with pytest.raises(durable.CorruptError, match="changed since"):
        found.verify()
    assert open_bins(one, "train", bpe).fingerprint != found.fingerprint
    with (one / "train.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(durable.CorruptError, match="became shorter"):
        found.read(0, 10)


def test_an_id_past_the_vocabulary_is_named_with_its_place(tmp_path: Path, bpe: Tokenizer) -> None:
    write_llmc(tmp_path, bpe)
    ids = np.array([*bpe.encode(TEXTS[0])[:5], 7000], "<u2")
    llmc(tmp_path / "poems_train_000002.bin", ids)
    with pytest.raises(ValueError, match=r"poems_train_000002.bin: id 7000 at position 5.*ends at 289.*data.tokenizer"):
        open_bins(tmp_path, "train", bpe)


def ids32(n: int) -> bytes:
    return (np.arange(n) % 250).astype("<i4").tobytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x01\x00\x02", "3 bytes, an odd number"),
        (b"", "0 tokens in the train split"),
        (ids32(100), "32-bit integers"),
        ((np.arange(100) % 250).astype("<i8").tobytes(), "64-bit integers"),
        ("To be, or not to be: that is the question. 漢字\n".encode() * 5000, "is text"),
        (np.random.default_rng(0).normal(size=100).astype("<f4").tobytes(), "past the vocabulary|vocabulary ends at"),
        (b"\x93NUMPY\x01\x00" + ids32(20), "numpy array"),
        (b"PK\x03\x04" + ids32(20), "zip archive"),
        (b"\x1f\x8b" + ids32(20), "gzip"),
    ],
)
def test_what_is_no_row_of_uint16_ids_is_refused_in_words(
    tmp_path: Path, bpe: Tokenizer, content: bytes, words: str
) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        open_bins(tmp_path, "train", bpe)
    assert "train.bin" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2 of llm.c's token files; version 1"),
        ({"count": 99}, "promises 99 tokens"),
        ({"count": -1}, "promises -1 tokens"),
    ],
)
def test_a_header_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, bpe: Tokenizer, change: dict[str, int], words: str
) -> None:
    llmc(tmp_path / "x_train.bin", np.arange(20, dtype="<u2"), **change)
    with pytest.raises(ValueError, match=words):
        open_bins(tmp_path, "train", bpe)
    (tmp_path / "x_train.bin").write_bytes((20240520).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ValueError, match="ends inside its header"):
        open_bins(tmp_path, "train", bpe)


def test_a_missing_split_and_two_data_sets_in_one_place_are_named(tmp_path: Path, bpe: Tokenizer) -> None:
    write_nanogpt(tmp_path, bpe)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no val split; expected val.bin \(nanoGPT\)"):
        open_bins(tmp_path, "val", bpe)
    write_llmc(tmp_path, bpe)
    with pytest.raises(ValueError, match="several data sets"):
        open_bins(tmp_path, "train", bpe)
    assert open_bins(tmp_path / "poems_train_000001.bin", "val", bpe).n_documents == 4
    assert open_bins(tmp_path / "train.bin", "train", bpe).n_documents == 4
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_bins(tmp_path / "nowhere", "train", bpe)


def test_token_files_are_told_from_prepared_sets(tmp_path: Path, bpe: Tokenizer) -> None:
    assert not bins.found(tmp_path) and not bins.found(tmp_path / "nowhere")
    write_nanogpt(tmp_path, bpe)
    assert bins.found(tmp_path) and bins.found(tmp_path / "train.bin")
    (tmp_path / "manifest.json").write_text("{}")
    assert not bins.found(tmp_path)


# Vocabularies


@pytest.mark.parametrize("form", ["stoi", "list", "itos"])
def test_characters_of_meta_json_keep_their_ids(tmp_path: Path, form: str) -> None:
    chars = sorted(set("hello, world\n"))
    stoi = {c: i for i, c in enumerate(chars)}
    meta = {"stoi": stoi, "list": chars, "itos": {str(i): c for c, i in stoi.items()}}[form]
    key = "stoi" if form == "stoi" else "itos"
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": len(chars), key: meta}))
    vocabulary = bins.load_tokenizer(tmp_path, None)
    assert vocabulary.encode("hello\nworld") == [stoi[c] for c in "hello\nworld"]
    assert vocabulary.decode(vocabulary.encode("hello, world\n")) == "hello, world\n"
    assert vocabulary.start_id == len(chars) and vocabulary.size == len(chars) + 2
    assert END not in vocabulary.decode(vocabulary.encode(END)) and vocabulary.start_id not in vocabulary.encode(END)
    assert vocabulary.encode("h!")[1] == len(chars) + 1  # a character that it does not know
    assert vocabulary.byte_lengths.tolist() == [1] * len(chars) + [0, 0]


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("[1]", "expected"),
        ("{", "expected"),
        ('{"vocab_size": 2}', "expected"),
        ('{"vocab_size": 3, "stoi": {"a": 0, "b": 1}}', "every id from 0"),
        ('{"stoi": {"a": 0, "b": 2}}', "every id from 0"),
        ('{"stoi": {"a": 0, "be": 1}}', "no single character"),
        ('{"itos": [1, 2]}', "no single character"),
    ],
)
def test_a_meta_json_that_is_no_vocabulary_is_refused(tmp_path: Path, meta: str, words: str) -> None:
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(ValueError, match=words):
        bins.load_tokenizer(tmp_path, None)


def test_a_meta_json_that_is_a_link_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("[]")
    (tmp_path / "meta.json").symlink_to(tmp_path / "mine.json")
    with pytest.raises(ValueError, match=r"meta\.json: is a symbolic link, which is not followed"):
        bins.load_tokenizer(tmp_path, None)


def test_a_pickle_is_not_read_and_its_conversion_is_a_command_that_works(tmp_path: Path, bpe: Tokenizer) -> None:
    write_nanogpt(tmp_path, bpe)
    with pytest.raises(ValueError, match=r"name it: data.tokenizer=PATH"):
        bins.load_tokenizer(tmp_path, None)
    chars = ["\n", "a", "b"]
    meta = {"vocab_size": 3, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="can run code") as refused:
        bins.load_tokenizer(tmp_path, None)
    command = shlex.split(str(refused.value).partition("meta.json: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert bins.load_tokenizer(tmp_path, None).encode("ab\n") == [1, 2, 0]
