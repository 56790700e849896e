"""Finding and reading text: every kind of input, and an error in words for every kind of bad one."""

import gzip
import hashlib
import io
import json
import sysconfig
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import corpus
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
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("text 床".encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "line"}\n'))
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
        patch.setattr(corpus, "BLOCK", block)
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
        ("a.txt.gz", gzip.compress(b""), "a.txt.gz: the file is empty"),
        ("a.txt", b"\x89PNG\0\0", "a.txt: a binary file"),
        ("a.txt", "text".encode("utf-16"), "or UTF-16"),
        ("a.txt", b"ab\xffc", "a.txt: not UTF-8 at byte 2 (0xff)"),
        ("a.txt.gz", b"no gzip at all", "a.txt.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], "a.txt.gz: not a whole gzip file"),
        ("a.parquet", b"PAR1", ".parquet is not read here"),
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


# URLs


class Server(BaseHTTPRequestHandler):
    """Serves /ok.txt; cuts /cut.txt short; knows nothing else."""

    body: ClassVar[bytes] = b"served text\n"
    hits: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.hits.append(self.path)
        if self.path not in ("/ok.txt", "/cut.txt"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body) + (self.path == "/cut.txt")))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # a proxy that would fail, if it were asked
    Server.hits.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_url_is_fetched_once_and_checked(tmp_path: Path, server: str) -> None:
    sha256 = hashlib.sha256(Server.body).hexdigest()
    for _ in range(2):
        assert texts(tmp_path, url=f"{server}/ok.txt", sha256=sha256) == ["served text\n"]
    assert Server.hits == ["/ok.txt"]
    (kept,) = (tmp_path / "downloads").iterdir()
    kept.write_text("altered")
    assert texts(tmp_path, url=f"{server}/ok.txt", sha256=sha256) == ["served text\n"]
    assert Server.hits == ["/ok.txt"] * 2


@pytest.mark.parametrize(
    ("path", "sha256", "words"),
    [
        ("/ok.txt", "0" * 64, "its sha256 is .*, expected 0000"),
        ("/cut.txt", None, "the connection ended after 12 of 13 bytes"),
        ("/no.txt", None, "the server answered 404 Not Found"),
    ],
)
def test_a_bad_answer_is_told_and_leaves_nothing(
    tmp_path: Path, server: str, path: str, sha256: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        texts(tmp_path, url=server + path, sha256=sha256)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_server_that_is_not_there_is_told_in_words(tmp_path: Path, server: str) -> None:
    assert "could not be fetched" in refused(tmp_path, url="http://127.0.0.1:1/a.txt")
    assert "not an http(s) address" in refused(tmp_path, url="file:///etc/passwd")
