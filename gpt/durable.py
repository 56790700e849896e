"""Every lasting write: a file or a directory exists whole or not at all, whatever stops the process or the disk.

Temporaries stand beside their target, hidden (a leading dot), and are swept by the next writer that holds the lock.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

BLOCK = 1 << 20
TEMPORARY = ".tmp-"


class CorruptError(ValueError):
    """Bytes on disk are not what was written."""

    exit_code = 3


class FileSystem:
    """The operations that change the disk; a test puts one in `fs` that fails at the k-th."""

    def open(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmtree(self, path: Path) -> None:
        shutil.rmtree(path)


fs = FileSystem()


def write_file(path: Path, chunks: bytes | Iterable[bytes | memoryview]) -> str:
    """Replace `path` by `chunks` atomically and durably; the sha256 of what was written."""
    temporary = _temporary(path)
    try:
        digest = _write_new(temporary, chunks)
        fs.rename(temporary, path)
    except BaseException:
        _discard(temporary)
        raise
    _sync_directory(path.parent)
    return digest


class Directory:
    """Build a directory under a temporary name; it appears at `path`, which must not exist, when the `with` block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = _temporary(path)

    def __enter__(self) -> Self:
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists already")
        fs.mkdir(self._temporary)
        return self

    def write(self, name: str, chunks: bytes | Iterable[bytes | memoryview]) -> str:
        """Write the file `name` of the directory; its sha256."""
        if Path(name).name != name:
            raise ValueError(f"'{name}' is not a plain file name")
        return _write_new(self._temporary / name, chunks)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                _sync_directory(self._temporary)
                fs.rename(self._temporary, self.path)
        finally:
            _discard(self._temporary)
        if kind is None:
            _sync_directory(self.path.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory so that it is never seen in part: renamed away first."""
    doomed = _temporary(path)
    fs.rename(path, doomed)
    _sync_directory(path.parent)
    fs.rmtree(doomed)


def publish(work: Path, target: Path) -> None:
    """Give a finished directory its name; what stood there before goes only when the new one is durable."""
    _sync_directory(work)
    old = _temporary(target)
    if target.exists():
        fs.rename(target, old)
    fs.rename(work, target)
    _sync_directory(target.parent)
    _discard(old)


def sweep(parent: Path) -> None:
    """Delete the temporaries of writers that died; call it only while holding the lock on what stands in `parent`."""
    for path in parent.glob(f".*{TEMPORARY}*"):
        _discard(path)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(directory: Path, n_bytes: int) -> None:
    """OSError (no space) in words unless `directory` may be written and its disk has `n_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        need, have = f"{n_bytes / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise OSError(errno.ENOSPC, f"{directory}: {need} are needed, {have} are free; free some, or lower checkpoint.keep")
    with tempfile.TemporaryFile(dir=directory):  # a read-only directory says so here
        pass


class Lock:
    """One process at a time: an flock on `path`, held until the object is released or the process ends, however it ends."""

    def __init__(self, path: Path, what: str) -> None:
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._holder()
            self._file.close()
            raise ValueError(f"{what} is in use{holder}; wait for it to end, or stop it") from None
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "what": what}, self._file)
        self._file.flush()

    def _holder(self) -> str:
        try:
            self._file.seek(0)
            owner = json.load(self._file)
            return f" by process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError):
            return ""

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")


def _write_new(path: Path, chunks: bytes | Iterable[bytes | memoryview]) -> str:
    """Create `path` with `chunks`, on the disk when this returns; hashed while writing."""
    digest = hashlib.sha256()
    fd = fs.open(path)
    try:
        for chunk in (chunks,) if isinstance(chunks, bytes) else chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            while view:
                view = view[fs.write(fd, view[:BLOCK]) :]
        fs.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fs.fsync(fd)
    finally:
        os.close(fd)


def _discard(path: Path) -> None:
    """Delete what a failed write left; what cannot be deleted now is swept later."""
    try:
        if path.is_dir():
            fs.rmtree(path)
        elif path.exists():
            fs.unlink(path)
    except OSError:
        pass
