import hashlib
import json
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import FAULTS, Unsynced, every_sync_watched, failed, installed, n_operations

from gpt import durable, shards
from gpt.durable import CorruptError
from gpt.shards import HEADER, Document, Span, TokenSet, write_manifest, write_shard

SEAL = "a" * 64


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with installed(Unsynced()):
        yield


def documents(seed: int, n: int, vocab_size: int, longest: int = 30, spans: bool = False) -> list[Document]:
    """n documents with start token 0, of 1 to `longest` tokens, from three sources."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        ids = [0, *(rng.randrange(1, vocab_size) for _ in range(rng.randrange(longest)))]
        bounds = [sorted(rng.sample(range(len(ids) + 1), 2)) for _ in range(rng.randrange(4) if spans else 0)]
        marked = tuple(Span(a, b, rng.choice(["train", "prefix"])) for a, b in bounds)
        made.append(Document(ids, rng.randrange(200), rng.randrange(3), marked))
    return made


def write(path: Path, parts: list[list[Document]], vocab_size: int = 500, **settings: Any) -> Path:
    """A data set at `path` whose train split has a shard for each part."""
    seals: dict[str, Any] = {"vocab_size": vocab_size, "tokenizer_sha256": SEAL}
    with durable.Directory(path) as directory:
        entries = [write_shard(directory, f"train-{i:05d}.tok", part, **seals) for i, part in enumerate(parts)]
        splits = {"train": entries, "val": []}
        write_manifest(directory, **seals, start_id=0, splits=splits, sources=["a", "b", "c"], settings=settings)
    return path


def everything(path: Path) -> tuple[Any, ...]:
    """All that a reader can learn of the train split."""
    found = TokenSet(path, "train")
    arrays = (found.read(0, found.n_tokens), found.document_starts, found.document_bytes, found.document_sources)
    numbers = (found.n_tokens, found.n_documents, found.n_bytes, found.vocab_size, found.start_id)
    spans = found.spans(0, found.n_tokens)
    return (*numbers, found.tokenizer_sha256, found.sources, spans, [array.tolist() for array in arrays])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small", [documents(1, 5, 500, longest=8, spans=True)])


def test_the_manifest_says_whether_documents_are_conversations_or_pairs(tmp_path: Path) -> None:
    seals: dict[str, Any] = {"vocab_size": 9, "tokenizer_sha256": SEAL}
    for kinds, expected in (
        ({}, (False, False)),
        ({"conversations": True}, (True, False)),
        ({"pairs": True}, (True, True)),
    ):
        with durable.Directory(tmp_path / "-".join(["set", *kinds])) as directory:
            entry = write_shard(directory, "train-0.tok", [Document([0, 1], 1, 0), Document([2], 1, 0)], **seals)
            write_manifest(
                directory, **seals, start_id=0, splits={"train": [entry]}, sources=["a"], settings={}, **kinds
            )
        found = TokenSet(tmp_path / "-".join(["set", *kinds]), "train")
        assert (found.conversations, found.pairs) == expected
        assert found.has_spans == found.conversations, "a conversation without a mark has nothing that is learned"
        old = json.loads((found.path / "manifest.json").read_text())
        del old["conversations"], old["pairs"], old["checksum"]
        old["checksum"] = shards._manifest_checksum(old)
        (found.path / "manifest.json").write_text(json.dumps(old))
        assert not TokenSet(found.path, "train").pairs, "older data sets are of text"


def rewrite(path: Path, **changes: Any) -> None:
    """Change the manifest and seal it again, as only someone who means it does."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest |= changes
    manifest["checksum"] = shards._manifest_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_read_is_what_was_written_across_shards(tmp_path: Path) -> None:
    parts = [documents(seed, n, 500) for seed, n in enumerate([7, 0, 1, 20])]
    found = TokenSet(write(tmp_path / "set", parts), "train")
    flat = [document for part in parts for document in part]
    ids = [token for document in flat for token in document.ids]
    lengths = [len(document.ids) for document in flat]
    assert found.n_tokens == len(ids) and found.n_documents == 28
    assert found.n_bytes == sum(document.n_bytes for document in flat)
    assert found.document_starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    assert found.document_bytes.tolist() == [document.n_bytes for document in flat]
    assert found.document_sources.tolist() == [document.source for document in flat]
    assert not found.has_spans and found.spans(0, len(ids)) == []
    for start in range(len(ids)):
        for stop in (start, start + 1, (start + len(ids)) // 2, len(ids)):
            assert found.read(start, max(0, stop - start)).tolist() == ids[start:stop]
    assert found.read(0, 5).dtype == found.read(0, 0).dtype == found.dtype
    found.verify()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, -1), (0, 10**9), (10**9, 1)])
def test_reading_outside_the_split_is_refused(small: Path, start: int, count: int) -> None:
    with pytest.raises(IndexError):
        TokenSet(small, "train").read(start, count)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32"), (1 << 20, "uint32")])
def test_the_last_id_of_a_vocabulary_survives(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    found = TokenSet(write(tmp_path / "set", [[Document([0, vocab_size - 1], 1, 0)]], vocab_size), "train")
    assert found.read(0, 2).tolist() == [0, vocab_size - 1]
    assert found.dtype == dtype


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (Document([0, 500], 1, 0), r"train-00000\.tok: document 1 has ids from 0 to 500; the vocabulary ends at 499"),
        (Document([0, -1], 1, 0), "ids from -1 to 0"),
        (Document([0, 1 << 80], 1, 0), "ids from 0 to 1208925819614629174706176"),
        (Document([], 1, 0), "document 1 has no ids"),
        (Document([0, 1], 1, 0, (Span(1, 3, "train"),)), "2 tokens, and a span from 1 to 3"),
        (Document([0, 1], 1, 0, (Span(1, 1, "train"),)), "a span from 1 to 1"),
        (Document([0, 1], 1, 0, (Span(-1, 1, "train"),)), "a span from -1 to 1"),
    ],
)
def test_a_wrong_document_is_refused_and_nothing_written(tmp_path: Path, document: Document, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "set", [[Document([0, 1], 1, 0), document]])
    assert list(tmp_path.iterdir()) == []


def test_arrays_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    index, spans = np.array([(0, 1, 0)], shards.DOCUMENT), np.empty(0, shards.SPAN)
    for wrong in (500, -1):
        with (
            durable.Directory(tmp_path / str(wrong)) as directory,
            pytest.raises(ValueError, match="the vocabulary ends at 499"),
        ):
            blocks = [np.array([0, 1]), np.array([wrong])]
            shards.write_arrays(directory, "x.tok", blocks, index, spans, 1, vocab_size=500, tokenizer_sha256=SEAL)


def test_a_manifest_that_is_a_link_is_not_followed(small: Path, tmp_path: Path) -> None:
    (small / "manifest.json").rename(tmp_path / "elsewhere.json")
    (small / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CorruptError, match=r"manifest\.json: it is a symbolic link, which is not followed"):
        TokenSet(small, "train")


def test_spans_are_those_that_touch_the_tokens_asked_for(tmp_path: Path) -> None:
    parts = [documents(seed, 12, 500, spans=True) for seed in range(3)]
    found = TokenSet(write(tmp_path / "set", parts), "train")
    flat = [document for part in parts for document in part]
    expected = []
    for first, document in zip(found.document_starts.tolist(), flat, strict=True):
        expected += [Span(first + s.start, first + s.end, s.kind) for s in document.spans]
    assert found.has_spans and len(expected) > 20
    for start in range(0, found.n_tokens, 3):
        for count in (1, 7, 60):
            touching = [span for span in expected if span.start < start + count and span.end > start]
            assert sorted(found.spans(start, count)) == sorted(touching)


def test_the_same_documents_are_the_same_bytes_and_other_settings_another_fingerprint(tmp_path: Path) -> None:
    parts = [documents(1, 9, 500, spans=True)]
    a, b, c = write(tmp_path / "a", parts), write(tmp_path / "b", parts), write(tmp_path / "c", parts, val_fraction=0.2)
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes()
    assert TokenSet(a, "train").fingerprint == TokenSet(a, "val").fingerprint == TokenSet(b, "train").fingerprint
    assert TokenSet(a, "train").fingerprint != TokenSet(c, "train").fingerprint


def test_every_flipped_byte_of_a_shard_is_found_and_named(small: Path) -> None:
    file = small / "train-00000.tok"
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(CorruptError, match=r"train-00000\.tok"):
            everything(small)
    file.write_bytes(whole)
    everything(small)


def test_every_flipped_byte_of_a_manifest_is_found_or_changes_nothing(small: Path) -> None:
    file = small / "manifest.json"
    whole, before = file.read_bytes(), everything(small)
    n_found = 0
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 7)]) + whole[at + 1 :])
        try:
            assert everything(small) == before, f"byte {at}"
        except CorruptError as error:
            n_found += 1
            assert "manifest.json" in str(error)
    assert n_found > len(whole) - whole.count(b" ") - whole.count(b"\n") - 10


def test_a_shard_sealed_again_with_other_numbers_is_refused(small: Path) -> None:
    file, rng = small / "train-00000.tok", np.random.default_rng(3)
    whole = file.read_bytes()
    for field in ("token_bytes", "n_tokens", "n_documents", "n_spans", "max_id"):
        for value in (0, 1, 499, 500, 1 << 31, (1 << 32) - 1, *rng.integers(0, 1 << 20, 5).tolist()):
            header = np.frombuffer(whole[: HEADER.itemsize], HEADER)[0].copy()
            if header[field] == value or (field == "max_id" and value < 500):
                continue
            header[field] = value
            header["checksum"] = shards._header_checksum(header)
            body = header.tobytes() + whole[HEADER.itemsize : -32]
            file.write_bytes(body + hashlib.sha256(body).digest())
            with pytest.raises(CorruptError, match=r"train-00000\.tok: it h"):
                TokenSet(small, "train")


def test_a_changed_header_is_found_at_open(small: Path) -> None:
    file = small / "train-00000.tok"
    whole = file.read_bytes()
    for at in range(HEADER.itemsize):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptError, match=r"train-00000\.tok: it"):
            TokenSet(small, "train")


def test_a_shard_whose_index_or_spans_make_no_sense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [Document([0, 1, 2], 3, 0, (Span(0, 1, "train"), Span(1, 3, "prefix"))), Document([0, 4], 2, 2)]
    real = np.array
    for number, (dtype, rows) in enumerate(
        [
            (shards.DOCUMENT, [(1, 3, 0), (3, 2, 2)]),
            (shards.DOCUMENT, [(0, 3, 0), (5, 2, 2)]),
            (shards.DOCUMENT, [(0, 3, 0), (0, 2, 2)]),
            (shards.DOCUMENT, [(0, 3, 0), ((1 << 64) - 1, 2, 2)]),
            (shards.DOCUMENT, [(0, 3, 0), (3, 9, 2)]),
            (shards.DOCUMENT, [(0, 3, 0), (3, 2, 3)]),
            (shards.SPAN, [(0, 1, 0), (1, 6, 1)]),
            (shards.SPAN, [(2, 3, 0), (1, 2, 1)]),
            (shards.SPAN, [(0, 0, 0), (1, 2, 1)]),
            (shards.SPAN, [(0, 1, 2), (1, 2, 1)]),
        ]
    ):
        monkeypatch.setattr(np, "array", lambda x, d=None, dtype=dtype, rows=rows: real(rows if d == dtype else x, d))
        path = write(tmp_path / str(number), [whole])
        monkeypatch.undo()
        with pytest.raises(CorruptError, match=r"train-00000\.tok"):
            everything(path)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A shard of several blocks."""
    ids = np.arange(1_300_000) % 500
    return write(tmp_path / "large", [[Document(ids, 5, 0)]])


def test_a_block_is_hashed_once_and_damage_elsewhere_does_not_matter_to_it(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = large / "train-00000.tok"
    with file.open("r+b") as raw:
        raw.seek((1 << 20) + 77)
        raw.write(b"\xff\xff")
    found, hashed = TokenSet(large, "train"), []
    monkeypatch.setattr(shards.hashlib, "sha256", lambda data: hashed.append(len(data)) or hashlib.new("sha256", data))
    for start in (0, 100_000, 0, 400_000):
        assert found.read(start, 300).tolist() == [(start + i) % 500 for i in range(300)]
    assert hashed == [1 << 20]
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"train-00000\.tok: bytes 1048576 to 2097152 are not what was written"):
            found.read(520_000, 300_000)
    assert found.read(1_200_000, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(CorruptError, match=r"train-00000\.tok"):
        found.verify()


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
@pytest.mark.parametrize("width", [1, 7, 40, 700_000])
def test_rows_read_together_are_those_read_alone(tmp_path: Path, large: Path, dtype: type, width: int) -> None:
    parts = [documents(seed, 40, 500) for seed in range(3)]
    found = TokenSet(large if width > 40 else write(tmp_path / "set", parts), "train")
    for _ in range(2):  # blocks not seen before, and seen
        starts = np.random.default_rng(width).integers(0, found.n_tokens - width + 1, 60 if width <= 40 else 2)
        rows = np.empty((len(starts), width), dtype)
        found.read_rows(starts, rows)
        assert rows.tolist() == [found.read(start, width).tolist() for start in starts.tolist()]
    found.read_rows(starts[:0], rows[:0])
    for wrong in (-1, found.n_tokens - width + 1):
        with pytest.raises(IndexError):
            found.read_rows(np.array([0, wrong]), rows[:2])


def test_damage_and_truncation_are_found_when_rows_are_read_together(large: Path) -> None:
    file, rows = large / "train-00000.tok", np.empty((2, 9), np.int64)
    with file.open("r+b") as raw:
        raw.seek((1 << 20) + 77)
        raw.write(b"\xff\xff")
    found = TokenSet(large, "train")
    for _ in range(2):
        with pytest.raises(CorruptError, match="bytes 1048576 to 2097152 are not what was written"):
            found.read_rows(np.array([0, 600_000]), rows)
        found.read_rows(np.array([0, 400_000]), rows)
    os.truncate(file, 5000)
    with pytest.raises(CorruptError, match="truncated"):
        found.read_rows(np.array([0, 400_000]), rows)


def test_a_shard_cut_off_while_open_is_an_error_and_no_crash(large: Path) -> None:
    found = TokenSet(large, "train")
    found.read(0, 10)
    os.truncate(large / "train-00000.tok", 5000)
    assert found.read(0, 10).tolist() == list(range(10))
    with pytest.raises(CorruptError, match="truncated"):
        found.read(10_000, 10)


def test_a_cut_or_lengthened_shard_is_refused_at_open(small: Path) -> None:
    file = small / "train-00000.tok"
    whole = file.read_bytes()
    for data in [*(whole[:n] for n in range(0, len(whole), 7)), whole + b"\0", whole * 2]:
        file.write_bytes(data)
        with pytest.raises(CorruptError, match=r"train-00000\.tok: it (has|is truncated)"):
            TokenSet(small, "train")


def test_a_missing_or_linked_shard_is_refused(small: Path, tmp_path: Path) -> None:
    file, elsewhere = small / "train-00000.tok", tmp_path / "elsewhere"
    file.rename(elsewhere)
    with pytest.raises(CorruptError, match="missing"):
        TokenSet(small, "train")
    file.symlink_to(elsewhere)
    with pytest.raises(CorruptError, match="links are not followed"):
        TokenSet(small, "train")
    file.unlink()
    os.mkfifo(file)  # opening one would wait for ever
    with pytest.raises(CorruptError, match="not a plain file"):
        TokenSet(small, "train")


def test_a_file_that_is_no_shard_is_said_to_be_none(small: Path) -> None:
    (small / "train-00000.tok").write_text("To be, or not to be: " * 100)
    with pytest.raises(CorruptError, match=r"train-00000\.tok: it is not a token shard; prepare the data set again"):
        TokenSet(small, "train")


def test_a_shard_of_another_data_set_is_refused(small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tok"
    with durable.Directory(tmp_path / "d") as directory:
        write_shard(directory, "other.tok", documents(1, 5, 500), vocab_size=500, tokenizer_sha256="b" * 64)
    (tmp_path / "d" / "other.tok").rename(other)
    other.replace(small / "train-00000.tok")
    with pytest.raises(CorruptError, match="another tokenizer"):
        TokenSet(small, "train")


def test_other_format_versions_are_named(small: Path) -> None:
    file = small / "train-00000.tok"
    header = np.frombuffer(file.read_bytes()[: HEADER.itemsize], HEADER)[0].copy()
    header["version"] = 2
    file.write_bytes(header.tobytes() + file.read_bytes()[HEADER.itemsize :])
    with pytest.raises(CorruptError, match="format version is 2, this program reads 1"):
        TokenSet(small, "train")
    rewrite(small, format=2)
    with pytest.raises(CorruptError, match=r"manifest\.json: its format version is 2, this program reads 1"):
        TokenSet(small, "train")


ENTRY = {"file": "train-00000.tok", "sha256": "0" * 64, "n_tokens": 1, "n_documents": 1, "n_bytes": 1}


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"splits": {"train": [ENTRY | {"file": name}]}}
            for name in ("../x", "/etc/passwd", "a/b", "", ".", "..", ".x")
        ),
        *({"splits": {"train": [ENTRY | {key: value}]}} for key in ENTRY for value in (None, True, -1, 1.0, [], {})),
        *({"splits": {"train": [{k: v for k, v in ENTRY.items() if k != key}]}} for key in ENTRY),
        *(
            {"splits": value}
            for value in (None, [], 1, {"train": None}, {"train": {}}, {"train": [1]}, {"train": ["x"]})
        ),
        *({key: value} for key in ("vocab_size", "start_id") for value in (None, True, "1", 1.0, [])),
        *({key: value} for key in ("sources", "tokenizer_sha256") for value in (None, 1, {})),
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_refused(small: Path, changes: dict[str, Any]) -> None:
    rewrite(small, **changes)
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        TokenSet(small, "train")


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', "1", "[" * 100_000, '{"format": 1}', "9" * 10_000, "\udcff"])
def test_a_manifest_that_is_none_is_refused(small: Path, text: str) -> None:
    (small / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptError, match=r"manifest\.json: it is not a data set's manifest, or is damaged"):
        TokenSet(small, "train")


def test_a_directory_that_is_not_prepared_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"make it: python data/prepare\.py FILES --out data/x$"):
        TokenSet(Path("data/x"), "train")
    Path("data/x").mkdir(parents=True)
    Path("data/x.yaml").write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"data/x is not a prepared .*make it: python data/prepare.py data/x\.yaml$"
    ):
        TokenSet(Path("data/x"), "train")


def test_a_missing_split_names_those_that_are_there(small: Path) -> None:
    with pytest.raises(ValueError, match="no split 'test'; there is train, val"):
        TokenSet(small, "test")
    assert TokenSet(small, "val").n_tokens == 0


def test_more_shards_than_the_limit_of_open_files_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [[Document([0, i], 1, 0)] for i in range(150)])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, before[1]))
    try:
        found = TokenSet(path, "train")
        assert found.read(0, 300).tolist() == [x for i in range(150) for x in (0, i)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_data_set_is_whole_or_absent_and_the_next_attempt_gives_the_same_bytes(
    tmp_path: Path, fault: BaseException
) -> None:
    parts = [documents(1, 3, 500), documents(2, 3, 500)]
    with every_sync_watched():
        write(tmp_path / "golden", parts)
    golden = everything(tmp_path / "golden")
    for k in range(1, n_operations(lambda: write(tmp_path / "count", parts)) + 1):
        parent = tmp_path / str(k)
        parent.mkdir()
        assert failed(k, fault, lambda: write(parent / "set", parts))  # noqa: B023 (called at once)
        durable.sweep(parent)
        assert [path.name for path in parent.iterdir()] in ([], ["set"])
        if not (parent / "set").exists():
            write(parent / "set", parts)
        assert everything(parent / "set") == golden
        TokenSet(parent / "set", "train").verify()
