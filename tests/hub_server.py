"""A server on this machine that answers what huggingface_hub asks of the hub, about data sets and models given to it."""

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    """A data set or a model: its card's metadata and its files."""

    files: dict[str, bytes]
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False

    @property
    def sha(self) -> str:
        """The commit: 40 hexadecimal digits that depend on the content."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[tuple[str, list[str]]]:
    """(address, what was asked so far)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._handle()

        do_HEAD = do_POST = do_GET

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            url = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(url.path)
            asked.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
            match = re.fullmatch(
                r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
            )
            file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = repositories.get((match or file or [None, ""])[1])
            if found is None:
                return self._error(404, "RepoNotFound")
            if found.gated:
                return self._error(403, "GatedRepo")
            revision = (match[3] if match else file[2] if file else None) or "main"
            if revision not in ("main", found.sha):
                return self._error(404, "RevisionNotFound")
            if file:
                return self._file(found, file[3])
            assert match
            if match[2] in (None, "revision"):
                siblings = [{"rfilename": name} for name in found.files]
                info = {
                    "id": match[1],
                    "sha": found.sha,
                    "siblings": siblings,
                    "cardData": found.card,
                    "private": False,
                }
                return self._json(info | {"gated": False, "tags": [], "downloads": 0, "likes": 0})
            entries = [self._entry(found, name) for name in found.files]
            if match[2] == "paths-info":
                wanted = urllib.parse.parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                entries = [entry for entry in entries if entry["path"] in wanted]
            return self._json(entries)

        def _entry(self, found: Repository, name: str) -> dict[str, Any]:
            data = found.files[name]
            return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

        def _file(self, found: Repository, name: str) -> None:
            if name not in found.files:
                return self._error(404, "EntryNotFound")
            data, code, headers = found.files[name], 200, {}
            headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            headers |= {"X-Repo-Commit": found.sha, "Accept-Ranges": "bytes"}
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(match[1]), int(match[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                data, code = data[first : last + 1], 206
            return self._answer(code, data, headers)

        def _json(self, value: Any) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, code: int, kind: str) -> None:
            self._answer(code, b'{"error": "no"}', {"X-Error-Code": kind, "X-Error-Message": kind})

        def _answer(self, code: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", asked
        finally:
            http.shutdown()
            thread.join()
