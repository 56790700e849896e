"""The table finds every text again, and notices when it is not what it was."""

import copy
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from faults import FAULTS, Failing, installed

from gpt import corpus, durable, table
from gpt.table import Changed, Input, Table, Writer, texts

TEXTS = [f"text {i} ä床 {'word ' * (i % 5)}".strip() for i in range(60)]


def store(work: Path, *paths: Path) -> list[Input]:
    """Write the documents of files into a table."""
    work.mkdir(exist_ok=True)
    inputs = [
        Input(file, number, (None, "train", "val")[number % 3])
        for number, path in enumerate(paths)
        for file in corpus.files(corpus.Source(path=str(path)), work, work, print)
    ]
    with Writer(work) as writer:
        for number, item in enumerate(inputs):
            for document in corpus.documents(item.file):
                writer.add(document, number, item)
    return inputs


def write(path: Path, some: list[str]) -> Path:
    data = "\n".join(json.dumps({"text": text}) for text in some).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(inputs: list[Input], work: Path, rows: np.ndarray) -> list[str]:
    return list(texts(inputs, work, rows, skip_bad=False))


def test_any_run_of_rows_gives_its_texts_from_files_and_from_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROWS", 7)
    monkeypatch.setattr(table, "RUN_BYTES", 50)
    inputs = store(
        tmp_path / "work",
        write(tmp_path / "a.jsonl", TEXTS[:20]),
        write(tmp_path / "b.jsonl.gz", TEXTS[20:45]),
        write(tmp_path / "c.jsonl", TEXTS[45:]),
    )
    rows = Table(tmp_path / "work")
    assert rows.n_rows == 60
    for first, last in ((0, 60), (0, 1), (19, 21), (30, 44), (44, 46), (59, 60), (5, 5)):
        assert read(inputs, tmp_path / "work", rows.read(first, last)) == TEXTS[first:last]
    blocks = list(rows.blocks())
    assert [first for first, _ in blocks] == list(range(0, 60, 7))
    whole = np.concatenate([block for _, block in blocks])
    assert whole["n_bytes"].tolist() == [len(text.encode()) for text in TEXTS]
    assert whole["n_chars"].tolist() == [len(text) for text in TEXTS]
    assert whole["given"].tolist() == [0] * 20 + [1] * 25 + [2] * 15
    assert (tmp_path / "work" / "spool").stat().st_size == sum(len(text.encode()) for text in TEXTS[20:45])


def test_lines_parsed_together_give_what_each_gave(tmp_path: Path) -> None:
    path, options = tmp_path / "a.jsonl", {"normalize": "nfc", "template": "{a}-{b}", "min_chars": 3}
    lines = ['{"a": "e\u0301", "b": 1.50}', "", '{"a": "", "b": 2}', ' {"b": 1e400, "a": ["x", "y"]}\r', "  "]
    path.write_text("\n".join([*lines, '{"a": "床", "a": "前", "b": NaN}']), encoding="utf-8-sig", newline="")
    (file,) = corpus.files(corpus.Source(path=str(path), **options), tmp_path, tmp_path, print)  # type: ignore[arg-type]
    with Writer(tmp_path) as writer:
        for document in corpus.documents(file):
            writer.add(document, 0, Input(file, 0, None))
    found = corpus.again(file, [(document.start, document.end) for document in corpus.documents(file)])
    assert found is not None and found[0] == ["é-1.5", "x\ny-Infinity", "前-NaN"]
    assert read([Input(file, 0, None)], tmp_path, Table(tmp_path).read(0, 3)) == found[0]


def test_broken_lines_that_mend_one_another_are_a_change(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "def"}\n')
    inputs = store(tmp_path / "work", path)
    rows = Table(tmp_path / "work").read(0, 2)
    path.write_text('{"text": "abc"}\n{"text": "\\ud800"}')
    for changed in (path.read_text(), '{"text": "abc", \n"x" :  "def"}\n', '{"text": "abc"},{}\n"text": "def"}\n'):
        path.write_text(changed)
        with pytest.raises(Changed):
            read(inputs, tmp_path / "work", rows)


def test_duplicates_are_found_whatever_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows = np.zeros(3000, table.ROW)
    rows["value"] = rng.integers(0, 400, 3000).astype(np.uint64) << np.uint64(55)
    rows["rest"] = rng.integers(0, 3, 3000)
    (tmp_path / "documents").write_bytes(rows.tobytes())
    seen: set[tuple[int, int]] = set()
    expected = []
    for row in rows.tolist():
        expected.append(row[:2] in seen)
        seen.add(row[:2])
    for size in (1 << 22, 3000, 700, 11):
        monkeypatch.setattr(table, "GROUP_ROWS", size)
        assert Table(tmp_path).repeated().tolist() == expected
    Table(tmp_path).drop(np.array(expected))
    assert Table(tmp_path).read(100, 900)["dropped"].tolist() == expected[100:900]


def test_a_new_table_has_no_marks_of_the_old_one(tmp_path: Path) -> None:
    store(tmp_path / "work", write(tmp_path / "a.jsonl", TEXTS))
    Table(tmp_path / "work").drop(np.ones(60, dtype=bool))
    store(tmp_path / "work", tmp_path / "a.jsonl")
    assert not Table(tmp_path / "work").read(0, 60)["dropped"].any()


def test_no_documents_are_no_rows(tmp_path: Path) -> None:
    store(tmp_path / "work", write(tmp_path / "a.jsonl", ["", ""]))
    rows = Table(tmp_path / "work")
    assert (rows.n_rows, list(rows.blocks()), rows.repeated().tolist()) == (0, [], [])


@pytest.mark.parametrize("change", ["other", "fewer", "more", "broken", "gone"])
def test_text_that_changed_since_is_refused_by_the_name_of_its_file(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    inputs = store(tmp_path / "work", path)
    rows, data = Table(tmp_path / "work").read(0, 60), path.read_bytes()
    new = {
        "other": data.replace(b"text 7", b"next 7", 1),
        "fewer": data[: data.index(b"\n", 200)],
        "more": data[:-1] + b'\\n"}',
        "broken": data.replace(b'"}', b"!!", 1),
    }
    path.unlink() if change == "gone" else path.write_bytes(new[change])
    kind = FileNotFoundError if change == "gone" else Changed
    with pytest.raises(kind, match=r"a\.jsonl: .*(changed while it was prepared|is gone).*run the same command"):
        read(inputs, tmp_path / "work", rows)


def test_the_error_survives_the_way_from_another_process() -> None:
    assert str(copy.deepcopy(Changed("a.txt"))) == str(Changed("a.txt"))


@pytest.mark.parametrize("damage", ["flipped", "short"])
def test_a_damaged_spool_or_table_is_named(tmp_path: Path, damage: str) -> None:
    work = tmp_path / "work"
    inputs = store(work, write(tmp_path / "a.jsonl.gz", TEXTS))
    rows = Table(work).read(0, 60)
    spool = (work / "spool").read_bytes()
    (work / "spool").write_bytes(spool.replace(b"text 9", b"next 9") if damage == "flipped" else spool[:-1])
    with pytest.raises(
        durable.CorruptError, match=r"spool: it does not hold the text of .*; delete .* and prepare again"
    ):
        read(inputs, work, rows)
    (work / "documents").write_bytes((work / "documents").read_bytes()[:-1])
    with pytest.raises(durable.CorruptError, match="documents: it ends before document 60"):
        Table(work).read(50, 60)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_writer_that_fails_leaves_files_that_the_next_one_replaces(tmp_path: Path, fault: BaseException) -> None:
    path = write(tmp_path / "a.jsonl.gz", TEXTS)
    for k in range(1, 9):
        with installed(Failing(k, fault)):
            try:
                store(tmp_path / "work", path)
            except type(fault):
                pass
            else:
                break
        inputs = store(tmp_path / "work", path)
        assert read(inputs, tmp_path / "work", Table(tmp_path / "work").read(0, 60)) == TEXTS
    assert k > 5
