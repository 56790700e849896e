"""Every lasting write: a file or a directory exists whole or not at all, whatever stops the process or the disk.

Temporaries stand beside their target, hidden (a leading dot), and are swept by the next writer that holds the lock.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

BLOCK = 1 << 20
POLL_S = 0.1  # between two looks at a lock that is waited for
TEMPORARY = re.compile(r"\..+\.tmp-[0-9]+-[0-9a-f]{8}")


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
    """Build a directory under a temporary name; it appears at `path`, new, when the `with` block ends well.

    Other processes may write into it: they are told `temporary`, its name until then, and use no `with`.
    """

    def __init__(self, path: Path, temporary: str | None = None) -> None:
        self.path = path
        self._temporary = _temporary(path) if temporary is None else path.with_name(temporary)

    @property
    def temporary(self) -> str:
        return self._temporary.name

    def __enter__(self) -> Self:
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists already; move it away, or delete it if it is not needed")
        fs.mkdir(self._temporary)
        return self

    def write(self, name: str, chunks: bytes | Iterable[bytes | memoryview]) -> str:
        """Write the file `name` of the directory; its sha256."""
        if not is_plain(name):
            raise ValueError(f"{name!r} is not a plain file name")
        return _write_new(self._temporary / name, chunks)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                _sync_directory(self._temporary)
                fs.rename(self._temporary, self.path)
        finally:
            _discard(self._temporary)
        if kind is None:
            _sync_directory(self.path.parent)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it that are missing, durably; one that exists is left alone."""
    for directory in reversed((path, *path.parents)):
        if not directory.exists():
            with suppress(FileExistsError):  # another process was faster
                fs.mkdir(directory)
            _sync_directory(directory.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory so that it is never seen in part: it is renamed away first, and swept later if somebody still reads it."""
    doomed = _temporary(path)
    fs.rename(path, doomed)
    _sync_directory(path.parent)
    _discard(doomed)


def publish(work: Path, target: Path) -> None:
    """Give a finished directory its name; what stood there before goes only when the new one is durable.

    A crash between the two renames leaves nothing at `target`, and both directories whole beside it.
    """
    _sync_directory(work)
    old = _temporary(target)
    replaces = target.exists()
    if replaces:
        fs.rename(target, old)
    try:
        fs.rename(work, target)
    except OSError:
        if replaces:
            fs.rename(old, target)
        raise
    _sync_directory(target.parent)
    _discard(old)


def sweep(parent: Path) -> None:
    """Delete the temporaries of writers that died; call it only while holding the lock on what stands in `parent`."""
    for path in parent.iterdir():
        if TEMPORARY.fullmatch(path.name):
            _discard(path)


def scratch(directory: Path, name: str) -> Path:
    """A new name in `directory`, which a sweep deletes if the process that uses it dies."""
    return _temporary(directory / name)


def is_plain(name: str) -> bool:
    """Whether `name` is a file of its directory: no separator, no parent, not hidden, and a name that a file can have."""
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:  # half a character
        return False
    return 0 < size < 256 and "\0" not in name and Path(name).name == name and not name.startswith(".")


def plain(file: Path) -> Path:
    """`file`, which was found in a directory, if it is a file of its own or the hub's cache has it, where a snapshot links
    to blobs beside it. ValueError for any other link, FileNotFoundError for what is no file.
    """
    blobs = file.absolute().parents[2] / "blobs" if len(file.absolute().parents) > 2 else file
    if file.is_symlink() and (blobs.is_symlink() or file.resolve().parent != blobs.resolve()):
        raise ValueError(f"{file}: is a symbolic link, which is not followed; copy the file itself here (cp -L)")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file


def unfollowed(path: str, flags: int) -> int:
    """An opener for `open`, of a file that is written in place: OSError (ELOOP) where a symbolic link stands there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(directory: Path, n_bytes: int) -> None:
    """OSError (no space) in words unless `directory` may be written and its disk has `n_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        need, have = f"{n_bytes / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise OSError(errno.ENOSPC, f"{directory}: {need} are needed, {have} are free; free some, or use another disk")
    with tempfile.TemporaryFile(dir=directory):  # a read-only directory says so here
        pass


class Lock:
    """One process at a time: an flock on `path`, held until released or the process ends, however it ends.

    Those that ask for it `shared` may hold it together, and no other with them. One that is held is waited for up to
    `wait_s`, with `meanwhile` called now and then.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        *,
        shared: bool = False,
        wait_s: float = 0.0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        patient_until = time.monotonic() + wait_s
        while True:
            make_directory(path.parent)
            try:
                self._file = open(path, "a+", opener=unfollowed)  # noqa: SIM115 (held until released)
            except FileNotFoundError:  # the last holder is just deleting it
                continue
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise ValueError(f"{path}: is a symbolic link, which is not followed; delete it") from None
                raise
            try:
                fcntl.flock(self._file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                self._file.close()
                if time.monotonic() < patient_until:
                    meanwhile()
                    time.sleep(POLL_S)
                    continue
                waited = f" (waited {wait_s:g} s)" if wait_s else ""
                raise ValueError(f"{what} is in use by {holder}{waited}") from None
            except OSError as error:
                self._file.close()
                raise ValueError(f"{path} cannot be locked ({error.strerror}); use a disk of this machine") from None
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(self._file.fileno())):
                    break
            self._file.close()  # a lock on a file that was deleted, or moved away with its directory, keeps nobody out
        self._file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "what": what, "since": since}, self._file)
        self._file.flush()

    def _holder(self) -> str:
        try:
            self._file.seek(0)
            holder = json.load(self._file)
            pid = holder["pid"]
            return f"pid {pid} on host {holder['host']} since {holder['since']}: wait for it or stop it (kill {pid})"
        except (ValueError, KeyError, TypeError):  # its holder is just writing this
            return "another process: wait for it or stop it"

    def release(self) -> None:
        """Let others in. Only who holds it alone may move its directory away, and then delete it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")


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
