"""The pass over a corpus: what it draws, counts and cuts does not depend on anything but the text."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from gpt import corpus, scan
from gpt.scan import Input, Sample, Split, Table

WHOLE = Split("given", 0, 0)


def draw(sample: Sample, texts: list[str], source: int = 0) -> None:
    for i, text in enumerate(texts):
        sample.add(text, hashlib.sha256(text.encode()).digest(), source, i)


def lines(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(["one", "two", "床前", "three"], k=rng.randrange(3, 30))) + str(i) for i in range(n)]


def look(path: Path, work: Path, *, drop: bool = False, **source: object) -> tuple[scan.Scan, list[Input]]:
    """Scan a file into `work`."""
    work.mkdir(exist_ok=True)
    files = corpus.files(corpus.Source(path=str(path), **source), work, work, print)  # type: ignore[arg-type]
    inputs = [Input(file, 0, None) for file in files]
    settings = {"sample_bytes": 10_000, "seed": 1, "skip_bad": False, "drop_duplicates": drop, "check": None}
    return scan.scan(inputs, work, advance=lambda n: None, **settings), inputs  # type: ignore[arg-type]


# The sample


def test_a_bounded_sample_does_not_depend_on_the_order_of_the_text() -> None:
    texts, samples = lines(200), []
    for order in (texts, texts[::-1]):
        sample = Sample(4000, seed=7)
        draw(sample, order)
        samples.append(sorted(sample.texts(WHOLE)))
    assert samples[0] == samples[1]
    assert 3000 < len("".join(samples[0]).encode()) <= 4000


def test_a_text_that_is_there_twice_is_drawn_once() -> None:
    sample = Sample(100_000, seed=7)
    draw(sample, [*lines(20), *lines(20)])
    assert sorted(sample.texts(WHOLE)) == sorted(lines(20))


def test_every_source_is_drawn_from_at_the_same_rate() -> None:
    sample = Sample(20_000, seed=7)
    draw(sample, lines(2000, seed=1), source=0)
    draw(sample, lines(500, seed=2), source=1)
    sizes = dict.fromkeys(lines(2000, seed=1), 0)
    kept = [len(text.encode()) for text in sample.texts(WHOLE) if text in sizes]
    rest = [len(text.encode()) for text in sample.texts(WHOLE) if text not in sizes]
    given = [sum(len(text.encode()) for text in lines(n, seed)) for n, seed in ((2000, 1), (500, 2))]
    assert 19_000 < sum(kept) + sum(rest) <= 20_000
    assert sum(kept) / given[0] == pytest.approx(sum(rest) / given[1], rel=0.1)


def test_a_long_document_is_drawn_in_pieces_and_never_the_whole_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SAMPLE_CHARACTERS", 10)
    text = "".join(f"{i:010d}" for i in range(1000))
    sample = Sample(1000, seed=1)
    draw(sample, [text])
    assert len(sample.texts(WHOLE)) == scan.DOCUMENT_PIECES
    assert all(piece in text for piece in sample.texts(WHOLE))


def test_the_tail_that_is_held_out_is_not_in_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SAMPLE_CHARACTERS", 10)
    sample = Sample(1000, seed=1)
    draw(sample, ["0123456789" * 3 + "abc"])
    assert "".join(sorted(sample.texts(Split("tail", 0.2, 0)))).strip("0123456789") == ""


# The table


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_duplicates_are_counted_and_all_but_the_first_are_dropped_if_asked(tmp_path: Path) -> None:
    texts = [*lines(50), lines(50)[7], *lines(50)[:3], lines(50)[7]]
    path = write(tmp_path / "a.jsonl", texts)
    kept, _ = look(path, tmp_path / "keep")
    assert (kept.n_duplicates, kept.n_bytes) == (5, sum(len(text.encode()) for text in texts))
    dropped, inputs = look(path, tmp_path / "drop", drop=True)
    assert (dropped.n_duplicates, dropped.n_bytes) == (5, sum(len(text.encode()) for text in lines(50)))
    parts = [
        part for chunk in dropped.chunks for part in scan.parts(inputs, tmp_path / "drop", chunk, WHOLE, skip_bad=False)
    ]
    assert [part.text for part in parts] == lines(50)
    assert dropped.content == look(write(tmp_path / "b.jsonl", lines(50)), tmp_path / "other")[0].content


def test_equal_first_halves_of_hashes_are_no_duplicates(tmp_path: Path) -> None:
    rows = np.zeros(4, scan.ROW)
    rows["value"], rows["rest"] = 5, [1, 2, 1, 3]
    (tmp_path / "documents").write_bytes(rows.tobytes())
    assert Table(tmp_path / "documents").mark_duplicates(drop=True) == 1
    assert Table(tmp_path / "documents").read(0, 4)["dropped"].tolist() == [0, 0, 1, 0]


def test_chunks_hold_every_row_once_and_end_where_they_are_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "ROWS", 7)
    monkeypatch.setattr(scan, "CHUNK_BYTES", 500)
    path = write(tmp_path / "a.jsonl", lines(90))
    found, _ = look(path, tmp_path / "work")
    sizes = [len(text.encode()) for text in lines(90)]
    expected, first, n = [], 0, 0
    for i, size in enumerate(sizes):
        n += size
        if n >= 500:
            expected.append((first, i + 1, n))
            first, n = i + 1, 0
    expected += [(first, 90, n)] if n else []
    assert [(chunk.first, chunk.last, chunk.n_bytes) for chunk in found.chunks] == expected


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_chunk_is_read_again_from_the_file_or_the_spool(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    monkeypatch.setattr(scan, "CHUNK_BYTES", 400)
    data = "\n".join(json.dumps({"text": text}) for text in lines(60)).encode()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    found, inputs = look(path, tmp_path / "work")
    if suffix.endswith("gz"):
        path.unlink()
    chunks = reversed(found.chunks)
    texts = [[part.text for part in scan.parts(inputs, tmp_path / "work", c, WHOLE, skip_bad=False)] for c in chunks]
    assert [text for part in reversed(texts) for text in part] == lines(60)


@pytest.mark.parametrize("change", ["other", "fewer", "more"])
def test_text_that_changed_since_the_scan_is_refused(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.jsonl", lines(30))
    found, inputs = look(path, tmp_path / "work")
    data = path.read_bytes()
    path.write_bytes(
        {"other": data.replace(b"one", b"two", 1), "fewer": data[:200], "more": b'{"text": "x"}\n' + data}[change]
    )
    with pytest.raises(ValueError, match=r"a\.jsonl.*(changed while it was prepared|broken JSON)"):
        list(scan.parts(inputs, tmp_path / "work", found.chunks[0], WHOLE, skip_bad=False))


def test_a_spool_that_changed_is_refused(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("text ä".encode() * 100))
    found, inputs = look(path, tmp_path / "work")
    spool = tmp_path / "work" / "spool"
    spool.write_bytes(spool.read_bytes().replace(b"text", b"next", 1))
    with pytest.raises(ValueError, match="changed"):
        list(scan.parts(inputs, tmp_path / "work", found.chunks[0], WHOLE, skip_bad=False))
