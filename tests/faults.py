"""File systems for `durable.fs`: one fails at the k-th operation as a disk or a kill does, one watches the order of syncs."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt import durable


class Killed(BaseException):
    """The process ended here: nothing after it happens."""


tried = 0  # faults that came, in this process: for who counts them

FAULTS = [Killed(), OSError(errno.ENOSPC, "no space left"), OSError(errno.EIO, "input/output error")]


@contextmanager
def installed(fs: durable.FileSystem) -> Iterator[None]:
    before, durable.fs = durable.fs, fs
    try:
        yield
    finally:
        durable.fs = before


class Unsynced(durable.FileSystem):
    """Waits for no disk: where only the order of operations counts, hundreds of them need not take minutes."""

    def fsync(self, fd: int) -> None:
        pass


class Failing(Unsynced):
    """Raises `fault` at operation k, half done where that is possible. Killed stays dead; a disk works again."""

    def __init__(self, k: int, fault: BaseException) -> None:
        self.k, self.fault, self.n_operations = k, fault, 0

    def _reach(self, half: Callable[[], object] = lambda: None) -> None:
        self.n_operations += 1
        if self.n_operations == self.k:
            half()
            raise self.fault
        if self.n_operations > self.k and isinstance(self.fault, Killed):
            raise self.fault

    def open(self, path: Path) -> int:
        self._reach()
        return super().open(path)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._reach(lambda: os.write(fd, data[: len(data) // 2]))
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._reach()
        super().fsync(fd)

    def mkdir(self, path: Path) -> None:
        self._reach()
        super().mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._reach()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._reach()
        super().unlink(path)

    def rmtree(self, path: Path) -> None:
        self._reach(lambda: [file.unlink() for file in list(path.iterdir())[:1]])
        super().rmtree(path)


def n_operations(action: Callable[[], object]) -> int:
    """How many operations `action` makes when none fails."""
    counting = Failing(1 << 60, Killed())
    with installed(counting):
        action()
    return counting.n_operations


def count(n: int = 1) -> None:
    global tried
    tried += n


def failed(k: int, fault: BaseException, action: Callable[[], object]) -> bool:
    """Do `action` with a fault at operation k; whether it was noticed."""
    disk = Failing(k, fault)
    with installed(disk):
        try:
            action()
        except (OSError, Killed):
            return True
        finally:
            count(disk.n_operations >= k)
    return False


class Watching(Unsynced):
    """Asserts that power may fail at any time: what is renamed is on the disk, what is deleted has a durable replacement."""

    def __init__(self) -> None:
        self.unsynced: dict[tuple[int, int], str] = {}

    def _touch(self, path: Path) -> None:
        self.unsynced[_inode(path.stat())] = str(path)

    def open(self, path: Path) -> int:
        fd = super().open(path)
        self._touch(path)
        self._touch(path.parent)
        return fd

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self.unsynced[_inode(os.fstat(fd))] = "a file written to after its sync"
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self.unsynced.pop(_inode(os.fstat(fd)), None)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._touch(path.parent)

    def rename(self, source: Path, target: Path) -> None:
        for path in (source, *source.rglob("*")):
            assert _inode(path.stat()) not in self.unsynced, f"{path} was renamed before it was synced"
        super().rename(source, target)
        self._touch(target.parent)

    def unlink(self, path: Path) -> None:
        self._delete(path)
        super().unlink(path)

    def rmtree(self, path: Path) -> None:
        self._delete(path)
        super().rmtree(path)

    def _delete(self, path: Path) -> None:
        assert durable.TEMPORARY.fullmatch(path.name), f"{path} was deleted under its own name"
        assert _inode(path.parent.stat()) not in self.unsynced, f"{path} was deleted before its replacement was durable"


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextmanager
def every_sync_watched() -> Iterator[None]:
    watching = Watching()
    with installed(watching):
        yield
    assert not watching.unsynced, f"never synced: {sorted(watching.unsynced.values())}"
