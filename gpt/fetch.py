"""A URL to a file: whole or not at all, resumed where the last attempt stopped, hashed, refused if it is something else."""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from gpt import durable, signals

BLOCK = 1 << 20
USER_AGENT = "gpt-trainer"
TIMEOUT_S = 30
ATTEMPTS = 4  # in a row that bring nothing new, before giving up
PAUSE_S = 2.0
TELL_S = 30.0
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
BUSY = (408, 429, 500, 502, 503, 504)  # answers that may be others the next time
Say = Callable[[str], None]


class _Again(Exception):
    """An attempt ended early; what has come is kept, and the next attempt may bring more."""


def fetch(url: str, sha256: str | None, directory: Path, say: Say) -> Path:
    """The file behind `url` in `directory`: reused if it has the hash (or none is stated), else fetched.

    What an earlier attempt left is continued if the server still has the same file. ValueError in words for what is not
    there, is not whole, has another hash, or is a web page where a file was asked for.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: not an http(s) address")
    name = PurePosixPath(urllib.parse.unquote(parts.path)).name or "index"
    path = directory / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name[-100:]}"
    sha256 = sha256 and sha256.lower()
    if path.is_file() and (sha256 is None or durable.sha256_file(path) == sha256):
        return path
    durable.make_directory(directory)
    with durable.Lock(directory / f".{path.name}.lock", url):
        part = path.with_name(f".{path.name}.part")
        say(f"{'continuing with' if part.exists() else 'fetching'} {url}")
        _complete(url, sha256, part, say)
        digest = durable.sha256_file(part)
        if sha256 is not None and digest != sha256:
            _forget(part)
            raise ValueError(f"{url}: its sha256 is {digest}, expected {sha256}; nothing was kept")
        durable.publish(part, path)
        _forget(part)
    if sha256 is None:
        say(f"its sha256 is {digest}")
    return path


def _complete(url: str, sha256: str | None, part: Path, say: Say) -> None:
    """Make `part` whole: attempt after attempt, as long as they bring something."""
    failures = 0
    while True:
        size = _size(part)
        try:
            _attempt(url, sha256, part, say)
            return
        except (_Again, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(error) or type(error).__name__
        except urllib.error.URLError as error:  # nobody answers: a wrong name, or no network
            raise ValueError(f"{url}: could not be fetched ({error.reason}); {_advice(part)}") from None
        failures = 0 if _size(part) > size else failures + 1
        if failures == ATTEMPTS:
            raise ValueError(f"{url}: {problem}; {_advice(part)}")
        say(f"{url}: {problem}; trying again")
        _pause(PAUSE_S * failures)


def _advice(part: Path) -> str:
    if size := _size(part):
        return f"{size} bytes are kept, and the same command continues behind them"
    return "run the same command again later, or fetch it yourself and give input=PATH"


def _pause(seconds: float) -> None:
    """Wait, but not for long once a stop was requested."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        signals.check()
        time.sleep(min(left, 0.2))


def _attempt(url: str, sha256: str | None, part: Path, say: Say) -> None:
    """One request for what is missing, appended to `part` as it comes."""
    have, validator = _size(part), _validator(part)
    if have and validator is None and sha256 is None:
        have = 0  # nothing would tell whether the rest belongs to it
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        headers |= {"If-Range": validator} if validator is not None else {}
    try:
        response = _open(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:
            if sha256 is not None and error.headers.get("Content-Range") == f"bytes */{have}":
                return  # nothing was missing; the hash will tell whether it is this file
            _forget(part)
            raise _Again("the server's file is another one now, or nothing was missing; from the start") from None
        if error.code in BUSY:
            raise _Again(f"the server answered {error.code} {error.reason}") from None
        raise ValueError(f"{url}: the server answered {error.code} {error.reason}") from None
    with response:
        if not (response.status == 206 and have == _first_byte(response)):
            _forget(part)
            have = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        if have == 0:
            durable.write_file(_state(part), json.dumps({"validator": _validator_of(response)}).encode())
        if total is not None:
            durable.check_space(part.parent, total - have)
        _append(url, response, part, total, say)
    if total is not None and _size(part) < total:
        raise _Again(f"the connection ended after {_size(part)} of {total} bytes")


def _open(request: urllib.request.Request) -> Any:
    local = urllib.parse.urlsplit(request.full_url).hostname in ("localhost", "127.0.0.1", "::1")  # through no proxy
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    return opener.open(request, timeout=TIMEOUT_S)


def _append(url: str, response: Any, part: Path, total: int | None, say: Say) -> None:
    done, told = _size(part), time.monotonic()
    with part.open("ab") as file:
        try:
            while block := response.read(BLOCK):
                signals.check()
                if done == 0 and not url.lower().endswith((".html", ".htm", ".xhtml")) and PAGE.match(block):
                    _forget(part)
                    raise ValueError(
                        f"{url}: the server answered with a web page (HTML), not with a file: to log in, to accept a "
                        "licence, or an error; nothing was kept; fetch it yourself and give input=PATH"
                    )
                file.write(block)
                done += len(block)
                if time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    say(f"{url}: {done / 1e6:.0f}{f' of {total / 1e6:.0f}' if total else ''} MB")
        except http.client.IncompleteRead as error:
            file.write(error.partial)
        file.flush()
        os.fsync(file.fileno())
    if done == 0:
        _forget(part)
        if total == 0:
            raise ValueError(f"{url}: the server answered with an empty file; nothing was kept")
        raise _Again("the server sent nothing")


def _first_byte(response: Any) -> int | None:
    """Where the bytes of a partial answer begin."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _validator_of(response: Any) -> str | None:
    """What If-Range compares: a strong ETag, else the time of the last change."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _validator(part: Path) -> str | None:
    try:
        validator = json.loads(_state(part).read_bytes())["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return validator if isinstance(validator, str) else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _forget(part: Path) -> None:
    for path in (part, _state(part)):
        if path.exists():
            durable.fs.unlink(path)
