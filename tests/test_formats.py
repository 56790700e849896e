"""Bytes to records: every format against what its library writes, damaged files, and memory that does not grow with them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpt import formats
from gpt.formats import BadRecord, Form

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
WORDS = '床前明月光 mixed text, "quoted"\n' * 50


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress, "zstd": zstd, "": bytes,
}  # fmt: skip


class Drip(io.RawIOBase):
    """A stream that gives a few bytes at a time, as a socket does."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._at, self._step = data, 0, step

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + min(self._step, len(buffer))]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class Made(io.RawIOBase):
    """A stream whose parts are made as they are read."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts, self._rest = iter(parts), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._parts, b"")
        piece, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def peak_of(action: Callable[[], Any]) -> tuple[Any, int]:
    """(result, most bytes of memory that it took at a time)."""
    tracemalloc.start()
    try:
        return action(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read(stream: Iterator[tuple[int, int, Any]]) -> list[Any]:
    return [value for _, _, value in stream]


# Names


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.txt", ("text", "")),
        ("noname", ("text", "")),
        ("A.JSONL", ("jsonl", "")),
        ("a.ndjson.zst", ("jsonl", "zstd")),
        ("a.json.xz", ("json", "xz")),
        ("a.csv.bz2", ("csv", "bzip2")),
        ("a.tsv", ("tsv", "")),
        ("x/y.parquet", ("parquet", "")),
        ("a.tar", ("tar", "")),
        ("a.tar.gz", ("tar", "gzip")),
        ("a.tgz", ("tar", "gzip")),
        ("a.gz", ("text", "gzip")),
    ],
)
def test_a_name_says_the_form(name: str, form: tuple[str, str]) -> None:
    assert formats.form_of(name) == form


def test_a_stem_has_no_suffix_of_the_form() -> None:
    assert [formats.stem_of(name) for name in ("a.jsonl.gz", "b.tar.zst", "c.tgz", "d", "e.v2.txt")] == [
        "a", "b", "c", "d", "e.v2",
    ]  # fmt: skip


# Compression


@pytest.mark.parametrize("packing", PACK)
def test_what_was_packed_comes_back(packing: str) -> None:
    data = WORDS.encode() * 300
    assert formats.unpacked(io.BytesIO(PACK[packing](data)), packing).read() == data


@pytest.mark.parametrize("packing", PACK)
def test_packed_streams_one_after_another_are_one(packing: str) -> None:
    data = b"".join(PACK[packing](part) for part in (b"one\n", b"", b"two\n"))
    assert formats.unpacked(io.BytesIO(data), packing).read() == b"one\ntwo\n"


@pytest.mark.parametrize("packing", [name for name in PACK if name])
def test_a_packed_file_that_is_cut_or_altered_is_refused(packing: str) -> None:
    data = PACK[packing](bytes(range(256)) * 40 + WORDS.encode())
    form = Form("text", packing)
    for damaged in (data[: len(data) // 2], data[:-1], data[:3], b"never packed", data[:-12] + b"\xff" + data[-11:]):
        with pytest.raises(ValueError, match=f"a: not a whole {packing} file") as caught, formats.faults("a", form):
            formats.unpacked(io.BytesIO(damaged), packing).read()
        assert not isinstance(caught.value, BadRecord)


# Parts of a text


@given(
    st.lists(st.text(alphabet="ab床\n", max_size=9), min_size=1),
    st.sampled_from(["\n", "\n\n", "ba", "床"]),
    st.integers(1, 9),
)
def test_spans_are_what_split_gives_and_cover_every_byte(parts: list[str], delimiter: str, block: int) -> None:
    data, mark = delimiter.join(parts).encode(), delimiter.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", block)
        found = list(formats.spans(io.BytesIO(data), mark))
        expected = data.split(mark)
        assert [value for _, _, value in found] == (expected if expected[-1] else expected[:-1])
        assert [at for at, _, _ in found] == [0, *(end for _, end, _ in found)][: len(found)]
        assert not found or found[-1][1] == len(data)


@given(st.text(alphabet="ab\n床", max_size=80), st.integers(4, 12), st.integers(1, 5))
def test_pieces_end_at_line_ends_and_any_run_of_them_is_found_again(text: str, size: int, block: int) -> None:
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE_BYTES", size)
        found = list(formats.pieces(io.BufferedReader(Drip(data, block))))
        assert b"".join(value for _, _, value in found) == data
        assert all(value.endswith(b"\n") for _, _, value in found[:-1])
        for value in (value for _, _, value in found[:-1]):
            assert len(value) <= size or b"\n" not in value[: size - 1]
        for i in range(len(found)):
            for j in range(i, len(found)):
                stream = io.BytesIO(data)
                stream.seek(found[i][0])
                assert list(formats.pieces(stream, found[i][0], found[j][1])) == found[i : j + 1]


@pytest.mark.parametrize(
    ("reader", "mark"),
    [(lambda s: formats.spans(s, b"\n"), b"\n"), (lambda s: formats.spans(s, b"<>"), b"<>"), (formats.pieces, b"\n")],
)
def test_a_record_that_is_too_long_costs_little_memory_and_reading_goes_on_behind_it(
    monkeypatch: pytest.MonkeyPatch, reader: Any, mark: bytes
) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 4 << 20)
    monkeypatch.setattr(formats, "PIECE_BYTES", 1 << 20)
    n, length = 65, 1_000_003  # so that marks stand at any place of a block
    parts = (b"first" + mark, *(b"a" * length for _ in range(n)), mark[:1], mark[1:], b"last" + mark)
    found, peak = peak_of(lambda: list(reader(io.BufferedReader(Made(parts), 1 << 20))))
    assert peak < 24 << 20
    (bad,) = [each for each in found if isinstance(each[2], BadRecord)]
    assert bad[:2] == (5 + len(mark), 5 + 2 * len(mark) + n * length)
    assert "longer than 4 MiB" in str(bad[2])
    assert found[0][2].startswith(b"first")
    assert found[-1][2].startswith(b"last")


def test_what_stands_behind_a_record_that_is_too_long_is_parted_at_the_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 1 << 20)
    data = b"a" * (3 << 20) + b"<>x<>y<>z"
    for end in (None, len(data)):
        (at, after, bad), *others = formats.spans(io.BufferedReader(io.BytesIO(data)), b"<>", 0, end)
        assert isinstance(bad, BadRecord) and (at, after) == (0, (3 << 20) + 2)
        assert [part for _, _, part in others] == [b"x", b"y", b"z"]
        assert [data[at:after] for at, after, _ in others] == [b"x<>", b"y<>", b"z"]


def test_a_csv_whose_first_line_is_broken_is_a_bad_record() -> None:
    with pytest.raises(BadRecord, match="broken csv in its first line"):
        list(formats.table_rows(io.BufferedReader(io.BytesIO(b'"id" x,text\n1,2\n')), ",", frozenset()))


# JSON arrays


@example(values=[0.0], indent=None, block=1)  # a number cut where it could end
@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.integers(1, 7))
def test_an_array_is_read_as_the_library_reads_it(values: list[Any], indent: int | None, block: int) -> None:
    data = json.dumps(values, ensure_ascii=False, indent=indent).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:
        data = json.dumps(values, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", block)
        assert read(formats.array_values(io.BytesIO(b" " + data + b"\n"))) == values


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": [1]}', "expected one JSON array"),
        (b"", "expected one JSON array"),
        (b'["a", "b"', "ends inside the array"),
        (b'["a" "b"]', "does not go on"),
        (b'["a", ]', "broken JSON"),
        (b'["a", nope, "b"]', "broken JSON"),
        (b'["a"] "b"', "behind the array"),
        (b'["a", "b', "broken JSON (Unterminated string"),
        (b'["a", "\xff"]', "not UTF-8 at byte 7 (0xff)"),
        (b"[" * 100_000, "broken JSON"),
        (b'["a", ' + b"9" * 5000 + b"]", "broken JSON"),
    ],
)
def test_a_broken_array_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadRecord) as caught:
        read(formats.array_values(io.BytesIO(data)))
    assert words in str(caught.value)


def test_an_array_is_read_in_bounded_memory() -> None:
    parts = (b"[", *(b'"' + b"x" * 999_998 + b'",' for _ in range(60)), b'"end"]')
    n, peak = peak_of(lambda: sum(1 for _ in formats.array_values(io.BufferedReader(Made(parts), 1 << 20))))
    assert n == 61
    assert peak < 20 << 20


def test_a_value_of_an_array_that_is_too_long_ends_it_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 4 << 20)
    stream = io.BufferedReader(Made((b'["a","', *(b"x" * 999_999 for _ in range(60)), b'"]')), 1 << 20)

    def attempt() -> str:
        with pytest.raises(BadRecord) as caught:
            read(formats.array_values(stream))
        return str(caught.value)

    words, peak = peak_of(attempt)
    assert "longer than 4 MiB" in words
    assert peak < 40 << 20


# Tables


@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6), min_size=3, max_size=3)
    ),
    st.sampled_from(sorted(formats.DELIMITERS)),
)
def test_a_table_is_read_as_it_was_written(rows: list[list[str]], kind: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=formats.DELIMITERS[kind], quoting=csv.QUOTE_ALL)
    writer.writerows([["id", "text", "other"], *rows])
    stream = io.BytesIO(b"\xef\xbb\xbf" + out.getvalue().encode())
    found = read(formats.table_rows(stream, formats.DELIMITERS[kind], frozenset({"text", "id"})))
    assert found == [{"id": row[0], "text": row[1]} for row in rows]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"id,body\n1,x\n", "no field 'text'; it has 'id', 'body'"),
        (b"", "no field 'text'; it has none"),
        (b"id,text\n1\n", "1 cells, expected 2"),
        (b'id,text\n1,"open\n', "broken csv"),
    ],
)
def test_a_broken_table_is_told(data: bytes, words: str) -> None:
    try:
        (found,) = read(formats.table_rows(io.BytesIO(data), ",", frozenset({"text"})))
    except BadRecord as error:
        found = error
    assert words in str(found)


def test_a_table_goes_on_behind_a_bad_row() -> None:
    found = list(formats.table_rows(io.BytesIO(b'id,text\n1\n\n2,"b\nc"\n3,d\n'), ",", frozenset({"text"})))
    assert [at for at, _, _ in found] == [2, 5, 6]
    assert [value["text"] for _, _, value in found[1:]] == ["b\nc", "d"]


# Parquet


def test_parquet_gives_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    rows = [{"text": f"text {i} 床", "ids": [i, i + 1], "meta": {"a": {"b": str(i)}}, "x.y": i} for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    for columns, of in (
        ({"text"}, lambda row: {"text": row["text"]}),
        ({"ids", "text"}, lambda row: {"ids": row["ids"], "text": row["text"]}),
        ({"meta.a.b"}, lambda row: {"meta": row["meta"]}),
        ({"x.y"}, lambda row: {"x.y": row["x.y"]}),
    ):
        assert read(formats.parquet_rows(tmp_path / "a.parquet", frozenset(columns))) == list(map(of, rows))


def test_a_parquet_file_without_the_column_says_which_there_are(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(BadRecord, match="no field 'text'; it has 'body', 'id'"):
        read(formats.parquet_rows(tmp_path / "a.parquet", frozenset({"text"})))


def test_a_parquet_file_that_is_cut_or_altered_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [str(i) * 50 for i in range(2000)]}), path, compression="zstd", write_page_checksum=True
    )
    data = path.read_bytes()
    for damaged in (
        data[: len(data) // 2],
        data[:-1],
        b"PAR1",
        b"",
        b"no parquet at all",
        data[:40] + b"\xff" * 400 + data[440:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a: not a whole parquet file"), formats.faults("a", Form("parquet", "")):
            read(formats.parquet_rows(path, frozenset({"text"})))


def test_a_parquet_text_that_is_not_utf_8_is_a_bad_record(tmp_path: Path) -> None:
    values = pyarrow.array([b"good", b"b\xffd", b"fine"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    found = read(formats.parquet_rows(tmp_path / "a.parquet", frozenset({"text"})))
    assert [value["text"] for value in found if not isinstance(value, BadRecord)] == ["good", "fine"]
    assert "not UTF-8 at byte 1" in str(found[1])


# Tar


def tar(files: dict[str, bytes], **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return out.getvalue()


FILES = {"a.txt": b"one", "../../etc/evil": b"two", "deep/" + "long" * 60 + ".txt": b"x" * 2000, "empty": b""}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_gives_its_regular_files_in_order(form: int) -> None:
    data = tar(FILES, format=form)
    assert {name: content.read() for name, content in formats.members(io.BytesIO(data))} == FILES


def test_a_tar_that_is_cut_or_altered_anywhere_is_refused_or_gives_the_same() -> None:
    data = tar(FILES, format=tarfile.GNU_FORMAT)
    header = data.index(b"../../etc/evil")

    def content(damaged: bytes) -> dict[str, bytes]:
        with formats.faults("a", Form("tar", "")):
            return {name: member.read() for name, member in formats.members(io.BytesIO(damaged))}

    ends = data.rindex(b"link") + 512
    for cut in range(0, ends + 512, 256):
        with pytest.raises(ValueError, match="a: not a whole tar file"):
            content(data[:cut])
    for damaged in (
        data[:header] + b"??" + data[header + 2 :],
        data + b"more",
        data[: header + 512] + data[header + 1024 :],
    ):
        with pytest.raises(ValueError, match="a: not a whole tar file"):
            content(damaged)
    assert content(data[: ends + 1024]) == FILES  # both blocks of the end mark, without the padding
