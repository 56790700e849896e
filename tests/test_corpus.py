"""Finding and reading text: every kind of input, and an error in words for every kind of bad one."""

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import os
import random
import sysconfig
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import corpus, formats
from gpt.corpus import BadRecord, File, Source

SAID: list[str] = []


def files(source: Source, where: Path) -> list[File]:
    return corpus.files(source, where / "downloads", where / "spool", SAID.append)


def texts(where: Path, **source: object) -> list[str]:
    return [doc.text for file in files(Source(**source), where) for doc in corpus.documents(file)]  # type: ignore[arg-type]


# What is read


def test_a_text_file_is_one_document_whatever_its_suffix(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.py", "d"):
        (tmp_path / name).write_text("one\n\ntwo 床前\r\n", newline="")
        assert texts(tmp_path, path=str(tmp_path / name)) == ["one\n\ntwo 床前\r\n"]


def test_a_separator_parts_a_text_file_and_empty_parts_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n---\n---\ntwo\n---\n")
    assert texts(tmp_path, path=str(tmp_path / "a.txt"), separator="---\n") == ["one\n", "two\n"]


def test_a_jsonl_line_is_a_document_and_a_blank_one_is_none(tmp_path: Path) -> None:
    lines = [{"text": "a\nb", "n": 1}, {"text": ""}, {"text": "床"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert texts(tmp_path, path=str(tmp_path / "a.jsonl")) == ["a\nb", "床"]


def test_a_stated_field_makes_any_file_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text('{"body": "x"}\n')
    assert texts(tmp_path, path=str(tmp_path / "a.data"), field="body") == ["x"]


def test_gzip_is_read_through(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("text 床".encode(), mtime=0))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "line"}\n', mtime=0))
    assert texts(tmp_path, path=str(tmp_path / "a.txt.gz")) == ["text 床"]
    assert texts(tmp_path, path=str(tmp_path / "b.jsonl.gz")) == ["line"]


def test_a_directory_is_read_by_relative_path_without_hidden_excluded_and_empty_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b.txt", "a/z.txt", "a/tests/t.txt", ".git/x", "a.txt", "notes.log", "a/keep/deep.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty.txt").touch()
    found = texts(tmp_path, path=str(root), exclude=("tests", "*.log", "a/keep/*"))
    assert found == ["a/z.txt", "a.txt", "b.txt"]


def test_a_glob_is_sorted(tmp_path: Path) -> None:
    for name in ("c.txt", "a.txt", "b.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, path=f"{tmp_path}/*.txt") == ["a.txt", "c.txt"]


def test_standard_input_is_copied_so_that_it_can_be_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"typed")))
    (file,) = files(Source(path="-"), tmp_path)
    assert [[doc.text for doc in corpus.documents(file)] for _ in range(2)] == [["typed"]] * 2


def test_the_standard_library_is_read_without_what_is_excluded(tmp_path: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        f.path.relative_to(root)
        for f in files(Source(python="stdlib", exclude=("site-packages", "test", "json")), tmp_path)
    ]
    assert Path("argparse.py") in found
    assert found == sorted(found, key=lambda path: path.parts)
    assert not any({"test", "json"} & set(path.parts) or path.suffix != ".py" for path in found)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"path": "a/tiny.txt"}, "tiny"),
        ({"path": "a/b.jsonl.gz"}, "b"),
        ({"path": "books/*.txt"}, "books"),
        ({"path": "-"}, "stdin"),
        ({"url": "https://x.org/a/input.txt?q=1"}, "input"),
        ({"python": "stdlib"}, "python"),
        ({"path": "a.txt", "name": "mine"}, "mine"),
    ],
)
def test_a_source_is_named_by_its_file_unless_it_says_otherwise(source: dict[str, str], name: str) -> None:
    assert Source(**source).label == name  # type: ignore[arg-type]


@given(st.lists(st.text(alphabet="ab床\n", max_size=9)), st.integers(1, 7), st.sampled_from(["\n\n", "床a", "|"]))
def test_any_range_that_begins_and_ends_at_documents_gives_them_again(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], block: int, separator: str
) -> None:
    where = tmp_path_factory.mktemp("ranges")
    (where / "a.txt").write_text(separator.join([*parts, "end"]), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", block)
        (file,) = files(Source(path=str(where / "a.txt"), separator=separator), where)
        whole = list(corpus.documents(file))
        assert [doc.text for doc in whole] == [
            part for part in separator.join([*parts, "end"]).split(separator) if part
        ]
        for i in range(len(whole)):
            for j in range(i, len(whole)):
                assert list(corpus.documents(file, whole[i].start, whole[j].end)) == whole[i : j + 1]


# What is refused


def refused(where: Path, **source: object) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        texts(where, **source)
    return str(caught.value)


def test_a_missing_file_is_named_with_how_to_obtain_it(tmp_path: Path) -> None:
    assert "no.txt: no such file" in refused(tmp_path, path=f"{tmp_path}/no.txt")
    assert "make it so" in refused(tmp_path, path=f"{tmp_path}/no.txt", obtain="make it so")
    assert "nothing matches" in refused(tmp_path, path=f"{tmp_path}/*.txt")
    (tmp_path / "dir").mkdir()
    assert "no file in this directory" in refused(tmp_path, path=f"{tmp_path}/dir")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz: the file is empty"),
        ("a.txt", b"\x89PNG\0\0", "a.txt: a binary file"),
        ("a.txt", "text".encode("utf-16"), "or UTF-16"),
        ("a.txt", b"ab\xffc", "a.txt: not UTF-8 at byte 2 (0xff)"),
        ("a.txt.gz", b"no gzip at all", "a.txt.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz: not a whole gzip file"),
        ("a.zip", b"PK", ".zip is not read here"),
        ("a.pdf", b"%PDF", ".pdf is not plain text"),
        ("a.pt", b"PK\3\4", ".pt is binary"),
        ("a.jsonl", b'{"text": "a"}\n{"body": 1, "id": 2}\n', "a.jsonl:2: no field 'text'; it has 'body', 'id'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl:3: broken JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: broken JSON"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: expected a JSON object with a field 'text', got list"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: field 'text' is int, expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8 at byte 24 of the file (0xff)"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert words in refused(tmp_path, path=str(tmp_path / name))


def test_an_offset_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one|two|th\xffree")
    assert "byte 10" in refused(tmp_path, path=str(tmp_path / "a.txt"), separator="|")


def test_what_is_bad_can_be_skipped_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": 5}\nno\n{"text": "b"}\n')
    (tmp_path / "b.png").write_bytes(b"\0")
    told: list[BadRecord] = []
    found = [
        doc.text
        for file in files(Source(path=str(tmp_path), exclude=("spool",)), tmp_path)
        for doc in corpus.documents(file, skip=told.append)
    ]
    assert found == ["a", "b"]
    assert [str(error).partition(": ")[0].rpartition("/")[2] for error in told] == ["a.jsonl:2", "a.jsonl:3", "b.png"]


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"path": "a", "url": "http://b"},
        {"path": "a", "field": "t", "separator": "|"},
        {"path": "a", "separator": ""},
    ],
)
def test_a_contradictory_source_is_refused(source: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        Source(**source)  # type: ignore[arg-type]


# Formats


ROWS = [{"text": f"text {i} 床", "title": f"T{i}", "lines": ["a", f"b{i}"], "meta": {"n": i}} for i in range(5)]


def write(path: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the name says."""
    form, path = formats.form_of(name), path / name
    if form.kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if form.kind in formats.DELIMITERS:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter=formats.DELIMITERS[form.kind])
        writer.writeheader()
        writer.writerows(rows)
        data = out.getvalue().encode()
    elif form.kind == "json":
        data = json.dumps(rows).encode()
    elif form.kind == "jsonl":
        data = "\n".join(map(json.dumps, rows)).encode()
    elif form.kind == "tar":
        held = io.BytesIO()
        with tarfile.open(fileobj=held, mode="w") as archive:
            for i, row in enumerate(rows):
                info = tarfile.TarInfo(f"part/{i}.txt")
                info.size = len(row["text"].encode())
                archive.addfile(info, io.BytesIO(row["text"].encode()))
        data = held.getvalue()
    else:
        data = "|".join(row["text"] for row in rows).encode()
    pack = {"gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress, "": bytes}
    path.write_bytes(
        pyarrow.compress(data, "zstd", asbytes=True) if form.packing == "zstd" else pack[form.packing](data)
    )
    return path


NAMES = (
    "a.jsonl", "a.jsonl.zst", "a.json", "a.json.xz", "a.csv", "a.csv.bz2", "a.tsv.gz", "a.parquet", "a.tar", "a.tar.zst", "a.tgz",
    "a.txt", "a.txt.xz",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, ROWS)
    separator = "|" if ".txt" in name else None
    (file,) = files(Source(path=str(path), separator=separator), tmp_path)
    found = list(corpus.documents(file))
    assert [doc.text for doc in found] == [row["text"] for row in ROWS]
    for doc in found:
        assert doc.utf8 == doc.text.encode()
        assert doc.n_bytes == len(doc.text.encode())
    assert file.direct == (name in ("a.jsonl", "a.txt"))
    assert file.size == path.stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_any_run_of_documents_is_found_again_in_every_format(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, ROWS)
    (file,) = files(Source(path=str(path), separator="|" if ".txt" in name else None), tmp_path)
    whole = list(corpus.documents(file))
    for i in range(len(whole)):
        for j in range(i, len(whole)):
            assert list(corpus.documents(file, whole[i].start, whole[j].end)) == whole[i : j + 1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"field": "title"}, "T3"),
        ({"field": "lines"}, "a\nb3"),
        ({"template": "{title}\n{lines}\n{{{meta.n}}}"}, "T3\na\nb3\n{3}"),
    ],
)
def test_fields_lists_and_templates_make_the_text(tmp_path: Path, name: str, source: dict[str, str], text: str) -> None:
    assert texts(tmp_path, path=str(write(tmp_path, name, ROWS)), **source)[3] == text


def test_dots_lead_inside_unless_a_field_is_called_so(tmp_path: Path) -> None:
    rows = [{"a": {"b": {"c": "deep"}}, "x.y": "flat", "x": {"y": "no"}}]
    for name in ("a.jsonl", "a.parquet"):
        path = str(write(tmp_path, name, rows))
        assert texts(tmp_path, path=path, field="a.b.c") == ["deep"]
        assert texts(tmp_path, path=path, field="x.y") == ["flat"]
        assert "no field 'a.b.d'" in refused(tmp_path, path=path, field="a.b.d")


def test_a_json_array_of_texts_needs_no_field(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["one", "two"]')
    assert texts(tmp_path, path=f"{tmp_path}/a.json") == ["one", "two"]
    assert "expected a JSON object" in refused(tmp_path, path=f"{tmp_path}/a.json", field="text")


def test_ids_are_a_text_of_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"ids": [0, 70000, 5]}, {"ids": []}, {"ids": [1]}])
    assert texts(tmp_path, path=str(path), ids="ids") == ["0 70000 5", "1"]
    for bad in ([1, -1], [1.5], [True], "1 2", [None]):
        path = write(tmp_path, "bad.jsonl", [{"ids": bad}])
        assert "expected a list of ids" in refused(tmp_path, path=str(path), ids="ids")


@pytest.mark.parametrize("template", ["{}", "{0.__class__[x]}", "{a!r}", "{a:>9}", "{a[b]}", "{a", "a}", "plain"])
def test_a_template_holds_plain_fields_only(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        Source(path="a", template=template)


def test_a_template_reaches_values_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "x"}])
    assert "no field 'text.__class__'" in refused(tmp_path, path=str(path), template="{text.__class__}")


def test_nothing_in_a_field_is_an_empty_document(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.parquet"):
        path = write(tmp_path, name, [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}])
        tally: Counter[str] = Counter()
        (file,) = files(Source(path=str(path)), tmp_path)
        assert [doc.text for doc in corpus.documents(file, tally=tally)] == ["a", "b"]
        assert tally == {"empty": 2}


def test_documents_of_other_lengths_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "床" * n} for n in (0, 1, 2, 3, 4, 5, 0)])
    tally: Counter[str] = Counter()
    (file,) = files(Source(path=str(path), min_chars=2, max_chars=4), tmp_path)
    assert [len(doc.text) for doc in corpus.documents(file, tally=tally)] == [2, 3, 4]
    assert tally == {"empty": 2, "too short": 1, "too long": 1}


def test_nfc_makes_one_of_two_spellings_and_counts_the_bytes_that_were_there(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "e\u0301"}, {"text": "\u00e9"}, {"text": "e"}])
    (file,) = files(Source(path=str(path), normalize="nfc"), tmp_path)
    found = list(corpus.documents(file))
    assert [doc.text for doc in found] == ["\u00e9", "\u00e9", "e"]
    assert found[0].utf8 == found[1].utf8
    assert [doc.n_bytes for doc in found] == [3, 2, 1]
    assert texts(tmp_path, path=str(path))[0] == "e\u0301"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.jsonl.zst"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    data = {"text": b"one", "jsonl": b'{"text": "one"}', "json": b'["one"]', "csv": b"text\none\n"}[
        formats.form_of(name).kind
    ]
    data = b"\xef\xbb\xbf" + data
    packing = formats.form_of(name).packing
    data = (
        gzip.compress(data, mtime=0)
        if packing == "gzip"
        else pyarrow.compress(data, "zstd", asbytes=True)
        if packing
        else data
    )
    (tmp_path / name).write_bytes(data)
    (file,) = files(Source(path=str(tmp_path / name)), tmp_path)
    (document,) = corpus.documents(file)
    assert document.text == "one"
    assert list(corpus.documents(file, document.start, document.end)) == [document]


def test_a_tar_is_read_like_a_directory(tmp_path: Path) -> None:
    out = io.BytesIO()
    held = {
        "a/one.txt": b"one", "a/.hidden": b"no", ".git/x": b"no", "a/lines.jsonl": b'{"text": "two"}\n{"text": "three"}\n',
        "logs/x.txt": b"no", "packed.txt.gz": gzip.compress(b"four", mtime=0), "empty.txt": b"",
    }  # fmt: skip
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in held.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar.gz").write_bytes(out.getvalue())
    assert texts(tmp_path, path=f"{tmp_path}/a.tar.gz", exclude=("logs",)) == ["one", "two", "three", "four"]


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE_BYTES", 1000)
    text = "".join(f"line {i} 床前明月光\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    found = texts(tmp_path, path=f"{tmp_path}/a.txt")
    assert "".join(found) == text
    assert all(900 < len(part.encode()) <= 1000 and part.endswith("\n") for part in found[:-1])


def test_a_pipe_is_copied_so_that_it_can_be_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("piped"))
    writer.start()
    (file,) = files(Source(path=f"{tmp_path}/pipe"), tmp_path)
    writer.join()
    assert [[doc.text for doc in corpus.documents(file)] for _ in range(2)] == [["piped"]] * 2


# Bad input


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"good\n" * 9000 + b"a\0b", "a.txt: a NUL byte"),
        ("a.txt", "床".encode("utf-16"), "a.txt: a binary file, or UTF-16"),
        ("a.txt", "床".encode("utf-16-le"), "a.txt: not UTF-8"),
        ("a.txt", b"gut\n" + "schön".encode("latin-1"), "a.txt: not UTF-8 at byte 7 (0xf6)"),
        ("a.csv", b"id,text\n1,ok\n2,sch\xf6n\n", "a.csv:3: not UTF-8 (0xf6)"),
        ("a.csv", b"id,body\n1,ok\n", "a.csv: no field 'text'; it has 'id', 'body'"),
        ("a.json", b'[{"text": "a"}, {"body": 1}]', "a.json: element 2: no field 'text'; it has 'body'"),
        ("a.json", b'{"text": "a"}', "a.json: expected one JSON array"),
        ("a.json", b'[{"text": "a"}, {"te', "a.json: broken JSON"),
        ("a.json", b'[{}]', "a.json: element 1: no field 'text'; it has none"),
        ("a.jsonl", b'{"text": "\\udc80"}', "a.jsonl:1: its text has half of a surrogate pair"),
        ("a.jsonl", b'{"text": {"a": 1}}', "a.jsonl:1: field 'text' is dict, expected text"),
        ("a.jsonl", b'{"text": ["a", 1]}', "a.jsonl:1: field 'text' is int, expected text"),
        ("a.parquet", b"PAR1", "a.parquet: not a whole parquet file"),
        ("a.parquet", b"", "a.parquet: the file is empty"),
        ("a.tar", b"x" * 2000, "a.tar: not a whole tar file"),
        ("a.jsonl.zst", b"(\xb5/\xfd", "a.jsonl.zst: not a whole zstd file"),
        ("a.txt.xz", b"no", "a.txt.xz: not a whole xz file"),
        ("a.txt.bz2", b"no", "a.txt.bz2: not a whole bzip2 file"),
        ("a.parquet.gz", b"", "a compressed .parquet is not read here"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_any_format_is_refused_with_the_place(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert words in refused(tmp_path, path=str(tmp_path / name))


def test_what_cannot_be_skipped_over_ends_its_file_and_no_other(tmp_path: Path) -> None:
    held = {
        "1.json": b'[{"text": "a"}, {"text": 5}, {"text": "b"}, nope, {"text": "c"}]',
        "2.csv": b"id,body\n1,x\n",
        "3.csv": b'id,text\n1,"d\xff"\n2,e\n',
        "4.txt": b"f",
    }
    (tmp_path / "in").mkdir()
    for name, data in held.items():
        (tmp_path / "in" / name).write_bytes(data)
    told: list[str] = []
    found = [
        doc.text
        for file in files(Source(path=f"{tmp_path}/in"), tmp_path)
        for doc in corpus.documents(file, skip=lambda error: told.append(str(error).partition("/in/")[2]))
    ]
    assert found == ["a", "b", "e", "f"]
    assert [words.partition(": ")[0] for words in told] == ["1.json", "1.json", "2.csv", "3.csv:2"]


def test_a_file_that_has_gone_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (file,) = files(Source(path=f"{tmp_path}/a.txt"), tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.txt: it was there and is gone"):
        list(corpus.documents(file))


def test_what_the_disk_says_while_reading_keeps_its_number_and_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"a\.txt: Stale file handle") as caught,
        formats.faults("a.txt", formats.form_of("a.txt")),
    ):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    assert caught.value.errno == errno.ESTALE


def test_a_line_that_is_too_long_is_skipped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 2 << 20)
    with (tmp_path / "a.jsonl").open("w") as out:
        for text in ("a", "x" * (5 << 20), "b"):
            out.write(json.dumps({"text": text}) + "\n")
    told: list[BadRecord] = []
    (file,) = files(Source(path=f"{tmp_path}/a.jsonl"), tmp_path)
    assert [doc.text for doc in corpus.documents(file, skip=told.append)] == ["a", "b"]
    assert "a.jsonl:2: a record longer than 2 MiB" in str(told[0])
    (file,) = files(Source(path=f"{tmp_path}/a.jsonl", separator="\n"), tmp_path)
    assert len(list(corpus.documents(file, skip=told.append))) == 2
    assert "(in what begins at byte 14)" in str(told[1])


def test_a_hundred_thousand_empty_documents_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("|" * 100_000)
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n' * 100_000)
    for name, separator in (("a.txt", "|"), ("b.jsonl", None)):
        tally: Counter[str] = Counter()
        (file,) = files(Source(path=f"{tmp_path}/{name}", separator=separator), tmp_path)
        assert list(corpus.documents(file, tally=tally)) == []
        assert tally == {"empty": 100_000}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "a", "field": "b", "template": "{c}"}, "field and template"),
        ({"path": "a", "ids": "b", "separator": "|"}, "has ids"),
        ({"path": "a", "min_chars": 5, "max_chars": 4}, "max_chars 4 is below min_chars 5"),
        ({"path": "a", "sha256": "0"}, "sha256"),
        ({"path": "a", "config": "b"}, "belong to hub inputs"),
        ({"path": "a", "split": "test"}, "belong to hub inputs"),
        ({"hub": "a b"}, "no repository's name"),
        ({"hub": "a/b", "data_files": "*", "config": "c"}, "data_files stands instead"),
        ({"hub": "a/b", "path": "c"}, "exactly one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Source(**source)


def test_a_separator_does_not_part_tables(tmp_path: Path) -> None:
    assert "a separator parts text" in refused(tmp_path, path=str(write(tmp_path, "a.csv", ROWS)), separator="|")


# Records put together


LINES = ["", " = One = \n", "", " text a \n", " = = Part = = \n", " text b \n", "", " = Two = \n", " text c \n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json"])
def test_records_are_put_together_until_one_begins_the_next_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [{"text": line} for line in LINES])
    (file,) = files(Source(path=str(path), begins=r" = [^=].* = \n"), tmp_path)
    whole = list(corpus.documents(file))
    assert [doc.text for doc in whole] == [" = One = \n text a \n = = Part = = \n text b \n", " = Two = \n text c \n"]
    for doc in whole:
        assert list(corpus.documents(file, doc.start, doc.end)) == [doc]


def test_what_parts_records_stands_between_those_that_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# One\ntext\nmore\n# Two\nend")
    assert texts(tmp_path, path=f"{tmp_path}/a.txt", separator="\n", begins="# ") == ["# One\ntext\nmore", "# Two\nend"]


def test_what_is_said_is_composed_and_the_escapes_around_it_are_not(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a\n\u0303b"}, {"role": "assistant", "content": "e\u0301"}]
    path = write(tmp_path, "a.jsonl", [{"messages": said}])
    (file,) = files(Source(path=str(path), chat=True, normalize="nfc"), tmp_path)
    (doc,) = corpus.documents(file)
    assert [message["content"] for message in json.loads(doc.text)["messages"]] == ["a\n\u0303b", "\u00e9"]


def test_exclude_leaves_out_what_a_glob_would_match(tmp_path: Path) -> None:
    for name in ("a.md", "README.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, path=f"{tmp_path}/*.md", exclude=("README.md",)) == ["a.md"]
    with pytest.raises(FileNotFoundError, match="no file that it matches is left by exclude"):
        texts(tmp_path, path=f"{tmp_path}/*.md", exclude=("*",))


def test_a_directory_with_a_point_keeps_its_whole_name(tmp_path: Path) -> None:
    for name in ("wiki.en", "wiki.de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    named = [Source(path=f"{tmp_path}/{path}").label for path in ("wiki.en", "wiki.de/*.txt", "wiki.en/a.txt")]
    assert named == ["wiki.en", "wiki.de", "a"]


def test_a_bad_record_among_joined_ones_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "#a"}\nno\n\n{"text": "b"}\n{"text": "#c"}\n')
    told: list[BadRecord] = []
    (file,) = files(Source(path=f"{tmp_path}/a.jsonl", begins="#"), tmp_path)
    assert [doc.text for doc in corpus.documents(file, skip=told.append)] == ["#ab", "#c"]
    assert "a.jsonl: byte 15: broken JSON" in str(told[0])


def test_what_begins_a_document_must_be_there_and_make_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 50)
    path = write(tmp_path, "a.jsonl", [{"text": "x" * 20}] * 5)
    assert "no record begins a document" in refused(tmp_path, path=str(path), begins="#")
    (tmp_path / "a.txt").write_text("one")
    assert "part it with a separator" in refused(tmp_path, path=f"{tmp_path}/a.txt", begins="#")
    with pytest.raises(ValueError, match="no regular expression"):
        Source(path="a", begins="(")


# Mutants


def reference(data: bytes) -> list[str] | None:
    """The texts of JSON lines, read the obvious way; None if something in them is no text of a field."""
    texts = []
    for i, line in enumerate(data.split(b"\n")):
        try:
            line_text = line.decode("utf-8-sig" if i == 0 else "utf-8")
            if not line_text.strip():
                continue
            record = json.loads(line_text)
            text = record["text"] if isinstance(record, dict) else None
            if isinstance(text, list) and all(isinstance(part, str) for part in text):
                text = "\n".join(text)
            if text is not None and not isinstance(text, str):
                return None
            if not isinstance(record, dict):
                return None
            (text or "").encode()
        except (ValueError, KeyError, RecursionError):
            return None
        texts += [text] if text else []
    return texts


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutant_of_json_lines_is_read_right_or_refused_by_name(tmp_path: Path, n: int) -> None:
    draw = random.Random(n)
    lines = [
        json.dumps({"id": i, "text": "床前 light\ud83c\udf19 " * (i % 4) + str(i)}, ensure_ascii=i % 2 == 0)
        for i in range(12)
    ]
    whole = (
        ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass").replace(b"\xed\xa0\xbc\xed\xbc\x99", "🌙".encode())
    )
    path, refused = tmp_path / "mutant.jsonl", 0
    for _ in range(n):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            at, kind = draw.randrange(len(data)), draw.randrange(4)
            if kind == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[at : at + draw.randrange(1, 40)]
            elif kind == 2:
                data[at:at] = draw.choice(
                    [b"\n", b'"', b"\\", b"\xff", b"{}", b"[", b"\\ud800", b"\x00", b"null", bytes(draw.randbytes(5))]
                )
            else:
                del data[max(1, at) :]
            data = data or bytearray(b" ")
        path.write_bytes(data)
        began = time.thread_time()
        expected = reference(bytes(data))
        try:
            got = [document.text for document in documents_of(path)]
        except ValueError as error:
            assert "mutant.jsonl" in str(error)
            assert expected is None or b"\x00" in data or not data.strip() or not expected, (bytes(data), error)
            refused += 1
        else:
            assert got == expected, bytes(data)
        assert time.thread_time() - began < 10
    assert 0 < refused < n


def documents_of(path: Path) -> list[corpus.Document]:
    (file,) = corpus.files(corpus.Source(path=str(path)), path.parent, path.parent, print)
    return list(corpus.documents(file))


TALKS = [
    {"messages": [{"role": "user", "content": f"Frage {i}: é?"}, {"role": "assistant", "content": "Ho" * i}]}
    for i in range(1, 6)
]


def spoken_in(path: Path, **settings: Any) -> list[corpus.Document]:
    source = corpus.Source.model_validate({"path": str(path), "chat": True, **settings})
    (file,) = corpus.files(source, path.parent, path.parent, print)
    return list(corpus.documents(file))


def test_conversations_are_read_from_lines_arrays_and_tables(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (lines := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, TALKS)))
    (bare := tmp_path / "a.txt").write_text("\n".join(map(json.dumps, TALKS)))
    (array := tmp_path / "a.json").write_text(json.dumps(TALKS))
    (table := tmp_path / "a.csv").write_text(
        "n,prompt,completion\n" + "".join(f"{i},Frage {i}: é?,{'Ho' * i}\n" for i in range(1, 6))
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TALKS), columns := tmp_path / "a.parquet")
    expected = [
        f'{{"messages":[{{"role":"user","content":"Frage {i}: é?"}},{{"role":"assistant","content":"{"Ho" * i}"}}]}}'
        for i in range(1, 6)
    ]
    for path in (lines, bare, array, table, columns):
        found = spoken_in(path)
        assert [document.text for document in found] == expected, path
        assert [document.n_bytes for document in found] == [
            len(f"Frage {i}: é?\n{'Ho' * i}".encode()) for i in range(1, 6)
        ]
    assert len(spoken_in(lines, min_chars=len("Frage 1: é?\nHoHoHo"))) == 3, "what is said is counted, not the JSON"
    with pytest.raises(ValueError, match=r"a\.json: element 2: no turn of an assistant"):
        array.write_text(json.dumps([TALKS[0], {"messages": TALKS[1]["messages"][:1]}]))
        spoken_in(array)
