"""A URL to a file: fetched once, resumed, checked, and refused in words when it is something else."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from gpt import corpus, durable, fetch, signals
from gpt.corpus import Source

BODY = b"".join(f"line {i} of the served text\n".encode() for i in range(120_000))  # over 3 MB: several blocks
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves BODY under every path, in ways that the path and `faults` say."""

    tag: ClassVar[str | None] = '"one"'
    body: ClassVar[bytes] = BODY
    cuts: ClassVar[list[int]] = []  # bytes after which the next answers break off
    codes: ClassVar[list[int]] = []  # what the next answers are instead
    hits: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.hits.append((self.path, asked))
        assert self.headers["Accept-Encoding"] == "identity"
        if self.path.startswith("/no") or self.codes:
            self.send_error(self.codes.pop(0) if self.codes else 404)
            return
        if self.path.startswith("/page"):
            self._answer(200, b"\n<!DOCTYPE html><html><body>please log in</body></html>")
            return
        if self.path.startswith("/empty"):
            self._answer(200, b"")
            return
        same = self.headers.get("If-Range") in (None, self.tag)
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        if match and same and not self.path.startswith("/plain"):
            start = int(match[1])
            if start >= len(self.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(self.body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._answer(206, self.body[start:], start)
        else:
            self._answer(200, self.body)

    def _answer(self, code: int, data: bytes, start: int = 0) -> None:
        self.send_response(code)
        if not self.path.startswith("/endless"):
            self.send_header("Content-Length", str(len(data)))
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{start + len(data)}")
        if self.tag:
            self.send_header("ETag", self.tag)
        self.end_headers()
        self.wfile.write(data[: self.cuts.pop(0)] if self.cuts else data)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # a proxy that would fail, if it were asked
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    for name, value in (("tag", '"one"'), ("body", BODY), ("cuts", []), ("codes", []), ("hits", [])):
        monkeypatch.setattr(Server, name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def get(url: str, where: Path, sha256: str | None = None, said: list[str] | None = None) -> bytes:
    return fetch.fetch(url, sha256, where, [].append if said is None else said.append).read_bytes()


def left(where: Path) -> list[str]:
    """What stands in a directory, locks aside."""
    return sorted(path.name.partition("-")[2] for path in where.iterdir() if not path.name.endswith(".lock"))


def ranges() -> list[str | None]:
    return [asked for _, asked in Server.hits]


def test_a_file_is_fetched_once_and_again_when_it_was_altered(tmp_path: Path, server: str) -> None:
    for _ in range(2):
        assert get(f"{server}/a.txt", tmp_path, SHA256) == BODY
    assert ranges() == [None]
    assert left(tmp_path) == ["a.txt"]
    next(path for path in tmp_path.iterdir() if path.name.endswith("-a.txt")).write_text("altered")
    assert get(f"{server}/a.txt", tmp_path, SHA256) == BODY
    assert ranges() == [None, None]


def test_a_hash_in_capitals_is_the_same_hash(tmp_path: Path, server: str) -> None:
    for _ in range(2):
        assert get(f"{server}/a.txt", tmp_path, SHA256.upper()) == BODY
    assert ranges() == [None]


def test_a_source_reads_what_its_url_gives(tmp_path: Path, server: str) -> None:
    (file,) = corpus.files(Source(url=f"{server}/a.txt", sha256=SHA256), tmp_path, tmp_path, [].append)
    assert "".join(doc.text for doc in corpus.documents(file)).encode() == BODY


def test_without_a_stated_hash_the_hash_is_told(tmp_path: Path, server: str) -> None:
    said: list[str] = []
    assert get(f"{server}/a.txt", tmp_path, None, said) == BODY
    assert said[-1] == f"its sha256 is {SHA256}"


def test_connections_that_end_early_are_continued_where_they_stopped(tmp_path: Path, server: str) -> None:
    Server.cuts[:] = [1_500_000, 0, 700_000, 3]
    assert get(f"{server}/a.txt", tmp_path) == BODY
    assert ranges() == [None, *(f"bytes={n}-" for n in (1_500_000, 1_500_000, 2_200_000, 2_200_003))]
    assert left(tmp_path) == ["a.txt"]


def test_a_later_call_continues_what_an_earlier_one_left(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # stopped by a signal in the second block
        seen = iter([False, True])
        patch.setattr(signals, "check", lambda: next(seen) and (_ for _ in ()).throw(signals.Stopped("stop")))
        with pytest.raises(signals.Stopped):
            get(f"{server}/a.txt", tmp_path)
    said: list[str] = []
    assert get(f"{server}/a.txt", tmp_path, None, said) == BODY
    assert said[0] == f"continuing with {server}/a.txt"
    assert ranges() == [None, f"bytes={1 << 20}-"]


def test_a_file_that_changed_between_attempts_is_fetched_from_its_start(tmp_path: Path, server: str) -> None:
    Server.cuts[:] = [1_500_000] + [0] * fetch.ATTEMPTS
    with pytest.raises(ValueError, match="1500000 bytes are kept, and the same command continues behind them"):
        get(f"{server}/a.txt", tmp_path)
    Server.cuts[:] = []
    Server.tag, Server.body = '"two"', b"another file\n" * 200_000
    assert get(f"{server}/a.txt", tmp_path) == Server.body


def test_what_nothing_vouches_for_is_not_continued(tmp_path: Path, server: str) -> None:
    Server.tag = None
    Server.cuts[:] = [1_500_000]
    assert get(f"{server}/a.txt", tmp_path) == BODY
    assert ranges() == [None, None]
    Server.hits.clear()
    Server.cuts[:] = [1_500_000]
    assert get(f"{server}/b.txt", tmp_path, SHA256) == BODY  # here the hash will tell
    assert ranges() == [None, "bytes=1500000-"]


def test_a_server_without_ranges_sends_the_whole_again(tmp_path: Path, server: str) -> None:
    Server.cuts[:] = [1_500_000]
    assert get(f"{server}/plain.txt", tmp_path) == BODY


def test_a_part_that_was_whole_already_is_taken_if_its_hash_says_so(tmp_path: Path, server: str) -> None:
    name = hashlib.sha256(f"{server}/a.txt".encode()).hexdigest()[:12]
    (tmp_path / f".{name}-a.txt.part").write_bytes(BODY)
    assert get(f"{server}/a.txt", tmp_path, SHA256) == BODY
    assert ranges() == [f"bytes={len(BODY)}-"]
    name = hashlib.sha256(f"{server}/b.txt".encode()).hexdigest()[:12]
    (tmp_path / f".{name}-b.txt.part").write_bytes(BODY + b"more")
    assert get(f"{server}/b.txt", tmp_path, SHA256) == BODY


def test_a_busy_server_is_asked_again(tmp_path: Path, server: str) -> None:
    Server.codes[:] = [503, 429]
    assert get(f"{server}/a.txt", tmp_path) == BODY
    Server.codes[:] = [503] * fetch.ATTEMPTS
    with pytest.raises(ValueError, match=r"503 .*run the same command again later"):
        get(f"{server}/b.txt", tmp_path)


@pytest.mark.parametrize(
    ("path", "sha256", "words"),
    [
        ("/ok.txt", "0" * 64, "its sha256 is .*, expected 0000.*; nothing was kept"),
        ("/no.txt", None, "the server answered 404 Not Found"),
        ("/page.txt", None, r"a web page \(HTML\), not with a file"),
        ("/page.jsonl.gz", SHA256, r"a web page \(HTML\), not with a file"),
        ("/empty.txt", None, "an empty file"),
    ],
)
def test_a_bad_answer_is_told_and_leaves_nothing(
    tmp_path: Path, server: str, path: str, sha256: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        get(server + path, tmp_path, sha256)
    assert left(tmp_path) == []


def test_a_page_may_be_asked_for_by_its_name(tmp_path: Path, server: str) -> None:
    assert b"<html>" in get(f"{server}/page.html", tmp_path)


def test_a_server_that_is_not_there_is_told_in_words(tmp_path: Path, server: str) -> None:
    with pytest.raises(ValueError, match=r"could not be fetched .*give input=PATH"):
        get("http://127.0.0.1:1/a.txt", tmp_path)
    with pytest.raises(ValueError, match=r"not an http\(s\) address"):
        get("file:///etc/passwd", tmp_path)


def test_a_name_in_a_url_leads_nowhere_else(tmp_path: Path, server: str) -> None:
    path = fetch.fetch(f"{server}/..%2f..%2fevil.txt", None, tmp_path / "in", [].append)
    assert path.parent == tmp_path / "in"
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def test_two_processes_do_not_write_into_one_part(tmp_path: Path, server: str) -> None:
    name = hashlib.sha256(f"{server}/a.txt".encode()).hexdigest()[:12]
    with (
        durable.Lock(tmp_path / f".{name}-a.txt.lock", "it"),
        pytest.raises(ValueError, match=r"a\.txt is in use by pid"),
    ):
        get(f"{server}/a.txt", tmp_path)


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="are needed"):
        get(f"{server}/a.txt", tmp_path)
