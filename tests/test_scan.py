"""What looks at the whole corpus does not depend on anything but the text, and is the same from its table as from itself."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from gpt import corpus, scan, table
from gpt.scan import Chunk, Sample, Split
from gpt.table import Input

WHOLE = Split("given", 0, 0)


def lines(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(["one", "two", "床前", "three"], k=rng.randrange(3, 30))) + str(i) for i in range(n)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def look(work: Path, *paths: Path, given: str | None = None, **source: object) -> list[Input]:
    """Scan files into `work`, each a source of its own."""
    work.mkdir(exist_ok=True)
    inputs = []
    for number, path in enumerate(paths):
        files = corpus.files(corpus.Source(path=str(path), **source), work, work, print)  # type: ignore[arg-type]
        inputs += [Input(file, number, given) for file in files]
    scan.scan(inputs, work, skip_bad=False, check=None, advance=lambda n: None)
    scan.survey(work, drop=False)
    return inputs


def draw(inputs: list[Input], work: Path, n_bytes: int, split: Split = WHOLE, seed: int = 7) -> list[str]:
    return list(Sample(inputs, work, split, n_bytes=n_bytes, seed=seed, skip_bad=False))


# The split


def test_the_parts_of_a_document_hold_its_text_and_its_bytes_once() -> None:
    for text, n_bytes in (("some text here é床", 30), ("x", 1), ("é", 3), ("ab", 9)):  # raw bytes, before composition
        for split in (Split("tail", 0.1, 0), Split("tail", 0.9, 0), Split("hash", 0, 5), WHOLE):
            parts = list(split.parts(None, text, n_bytes, 4, 2, False))
            assert "".join(part.text for part in parts) == text
            assert sum(part.n_bytes for part in parts) == n_bytes
            assert [part.begins for part in parts] == [True, False][: len(parts)]
            assert {part.source for part in parts} == {2}


# The pass


def test_chunks_hold_every_row_once_and_end_where_they_are_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROWS", 7)
    monkeypatch.setattr(scan, "CHUNK_BYTES", 500)
    look(tmp_path / "work", write(tmp_path / "a.jsonl", lines(90)))
    for most in (1 << 20, 5):
        monkeypatch.setattr(scan, "CHUNK_DOCUMENTS", most)
        expected, first, n = [], 0, 0
        for i, text in enumerate(lines(90)):
            n += len(text.encode())
            if n >= 500 or i + 1 - first == most:
                expected.append(Chunk(first, i + 1, n))
                first, n = i + 1, 0
        expected += [Chunk(first, 90, n)] if n else []
        assert scan.survey(tmp_path / "work", drop=False).chunks == expected


def test_a_small_corpus_has_smaller_chunks_but_not_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look(tmp_path / "work", write(tmp_path / "a.jsonl", [f"{i:010d}" for i in range(1000)]))
    for largest, least, n in ((1 << 20, 50, 32), (1 << 20, 2000, 5), (200, 50, 50), (1 << 20, 1 << 20, 1)):
        monkeypatch.setattr(scan, "CHUNK_BYTES", largest)
        monkeypatch.setattr(scan, "LEAST_BYTES", least)
        assert len(scan.survey(tmp_path / "work", drop=False).chunks) == n


def test_what_is_left_out_is_counted_and_checked_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["ab", "", "x", "abcdef"])
    (file,) = corpus.files(corpus.Source(path=str(path), min_chars=2, max_chars=5), tmp_path, tmp_path, print)
    seen: list[tuple[str, str]] = []
    options = {"skip_bad": False, "advance": lambda n: None}
    found = scan.scan([Input(file, 0, None)], tmp_path, check=lambda *each: seen.append(each), **options)  # type: ignore[arg-type]
    assert found == scan.Pass({"empty": 1, "too short": 1, "too long": 1}, 0, [])
    assert seen == [("ab", f"{path}: document 1")]


def test_bad_records_are_counted_and_the_first_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n" * (scan.SHOWN_RECORDS + 5) + '{"text": "x"}')
    (file,) = corpus.files(corpus.Source(path=str(tmp_path / "a.jsonl")), tmp_path, tmp_path, print)
    found = scan.scan([Input(file, 0, None)], tmp_path, skip_bad=True, check=None, advance=lambda n: None)
    assert (found.n_skipped, len(found.skipped)) == (scan.SHOWN_RECORDS + 5, scan.SHOWN_RECORDS)


def test_duplicates_are_counted_and_all_but_the_first_are_dropped_if_asked(tmp_path: Path) -> None:
    extra = [lines(50)[7], *lines(50)[:3], lines(50)[7]]
    inputs = look(tmp_path / "work", write(tmp_path / "a.jsonl", [*lines(50), *extra]))
    kept = scan.survey(tmp_path / "work", drop=False)
    sizes = [sum(len(text.encode()) for text in texts) for texts in (lines(50), extra)]
    assert (kept.n_repeated, kept.repeated_bytes, kept.n_documents, kept.n_bytes) == (5, sizes[1], 55, sum(sizes))
    dropped = scan.survey(tmp_path / "work", drop=True)
    assert (dropped.n_repeated, dropped.repeated_bytes, dropped.n_documents, dropped.n_bytes) == (
        5,
        sizes[1],
        50,
        sizes[0],
    )
    found = [p for c in dropped.chunks for p in scan.parts(inputs, tmp_path / "work", c, WHOLE, skip_bad=False)]
    assert [part.text for part in found] == lines(50)
    look(tmp_path / "other", write(tmp_path / "b.jsonl", lines(50)))
    assert dropped.content == scan.survey(tmp_path / "other", drop=False).content != kept.content


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_chunk_is_read_again_alone_in_any_order(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr(scan, "CHUNK_BYTES", 400)
    data = "\n".join(json.dumps({"text": text}) for text in lines(60)).encode()
    path, work = tmp_path / f"a.{suffix}", tmp_path / "work"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    inputs = look(work, path)
    chunks = scan.survey(work, drop=False).chunks
    texts = [[part.text for part in scan.parts(inputs, work, c, WHOLE, skip_bad=False)] for c in reversed(chunks)]
    assert [text for part in reversed(texts) for text in part] == lines(60)


# The sample


def test_a_sample_with_room_has_all_training_text_in_order(tmp_path: Path) -> None:
    inputs, everything = look(tmp_path / "work", write(tmp_path / "a.jsonl", lines(90))), lines(90)
    assert draw(inputs, tmp_path / "work", 1 << 20) == everything
    values = table.Table(tmp_path / "work").read(0, 90)["value"]
    half = Split("hash", 0, 1 << 63)
    assert draw(inputs, tmp_path / "work", 1 << 20, half) == [
        text for text, value in zip(everything, values.tolist(), strict=True) if value >= 1 << 63
    ]


def test_a_bounded_sample_does_not_depend_on_the_order_of_the_text(tmp_path: Path) -> None:
    samples = []
    for name, texts in (("a", lines(200)), ("b", lines(200)[::-1])):
        inputs = look(tmp_path / name, write(tmp_path / f"{name}.jsonl", texts))
        samples.append(draw(inputs, tmp_path / name, 4000))
    assert sorted(samples[0]) == sorted(samples[1])
    assert [text for text in lines(200) if text in samples[0]] == samples[0]
    assert 3800 < len("".join(samples[0]).encode()) <= 4000
    assert draw(inputs, tmp_path / "b", 4000, seed=8) != samples[1]


def test_every_source_gives_its_share_and_at_least_something(tmp_path: Path) -> None:
    names = {"a": lines(2000, 1), "b": lines(500, 2), "c": ["one text of the third"]}
    inputs = look(tmp_path / "work", *(write(tmp_path / f"{name}.jsonl", texts) for name, texts in names.items()))
    drawn = set(draw(inputs, tmp_path / "work", 20_000))
    kept = [sum(len(text.encode()) for text in texts if text in drawn) for texts in names.values()]
    given = [sum(len(text.encode()) for text in texts) for texts in names.values()]
    assert 19_500 < sum(kept) <= 20_000 + 30
    assert kept[0] / given[0] == pytest.approx(kept[1] / given[1], rel=0.05)
    assert kept[2] == given[2]


def test_validation_inputs_and_dropped_duplicates_are_not_in_the_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*lines(20), *lines(20)])
    assert draw(look(tmp_path / "val", path, given="val"), tmp_path / "val", 1 << 20) == []
    inputs = look(tmp_path / "work", path)
    scan.survey(tmp_path / "work", drop=True)
    assert draw(inputs, tmp_path / "work", 1 << 20) == lines(20)


def test_a_long_document_is_drawn_in_pieces_and_leaves_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "PIECE_CHARACTERS", 10)
    long = "".join(f"{i:010d}" for i in range(1000))
    others = [f"text {i:05d}" for i in range(300)]
    inputs = look(tmp_path / "work", write(tmp_path / "a.jsonl", [*others[:50], long, *others[50:]]))
    drawn = draw(inputs, tmp_path / "work", 1600)
    pieces = [piece for piece in drawn if piece.isdecimal()]
    assert len(pieces) == 1600 // 10 // scan.DOCUMENT_SHARE and all(int(piece) < 1000 for piece in pieces)
    assert len(drawn) == 160
    assert "".join(draw(inputs, tmp_path / "work", 1 << 20)) == "".join([*others[:50], long, *others[50:]])
    alone = look(tmp_path / "alone", write(tmp_path / "b.jsonl", [long]))
    assert len(draw(alone, tmp_path / "alone", 1600)) == 160  # there is nothing else


def test_the_tail_that_is_held_out_is_not_in_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PIECE_CHARACTERS", 10)
    texts = [text * 3 for text in lines(9)]
    inputs, split = look(tmp_path / "work", write(tmp_path / "a.jsonl", texts)), Split("tail", 0.2, 0)
    assert "".join(draw(inputs, tmp_path / "work", 1 << 20, split)) == "".join(t[: split.cut(len(t))] for t in texts)


def test_the_sample_says_how_large_it_is(tmp_path: Path) -> None:
    inputs = look(tmp_path / "work", write(tmp_path / "a.jsonl", lines(300)))
    for n_bytes in (3000, 1 << 20):
        sample = Sample(inputs, tmp_path / "work", WHOLE, n_bytes=n_bytes, seed=1, skip_bad=False)
        assert sample.n_bytes == sum(len(text.encode()) for text in sample)


def test_the_draw_has_no_pattern() -> None:
    keys = scan._mixed(np.arange(1 << 16, dtype=np.uint64))
    assert len(np.unique(keys)) == len(keys)
    counts = np.bincount((keys >> np.uint64(56)).astype(np.int64), minlength=256)
    assert counts.min() > 180 and counts.max() < 340  # 256 each, give or take five deviations
