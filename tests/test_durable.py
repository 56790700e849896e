import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FAULTS, Killed, Unsynced, every_sync_watched, failed, installed, n_operations

from gpt import durable

OLD = {"a": b"old " * 50, "b": b"", "c": b"old"}
NEW = {"a": b"new" * 70, "b": b"new", "c": b""}
faults = pytest.mark.parametrize("fault", FAULTS, ids=str)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with installed(Unsynced()):
        yield


def make(path: Path, files: dict[str, bytes]) -> None:
    with durable.Directory(path) as directory:
        for name, data in files.items():
            directory.write(name, data)


def content(path: Path) -> dict[str, bytes] | None:
    """The files of a directory, None where there is none."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.exists() else None


def test_a_file_is_replaced_whole_and_its_hash_returned(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for data in (b"first", b"", b"x" * (3 << 20)):
        assert durable.write_file(file, data) == hashlib.sha256(data).hexdigest() == durable.sha256_file(file)
        assert content(tmp_path) == {"file": data}
    assert durable.write_file(file, iter([b"in ", memoryview(b"parts")])) == durable.sha256_file(file)
    assert file.read_bytes() == b"in parts"


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        durable.write_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_sync_is_one_of_the_operating_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    with installed(durable.FileSystem()):
        durable.write_file(tmp_path / "file", b"x")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_everything_is_synced_before_it_is_renamed_and_replaced_before_it_is_deleted(tmp_path: Path) -> None:
    with every_sync_watched():
        durable.write_file(tmp_path / "file", b"1")
        durable.write_file(tmp_path / "file", b"2")
    with every_sync_watched():
        make(tmp_path / "directory", OLD)
    with every_sync_watched():
        durable.fs.mkdir(tmp_path / "work")
        fd = durable.fs.open(tmp_path / "work" / "file")  # the file is synced, its entry in the directory is not
        durable.fs.fsync(fd)
        os.close(fd)
        durable.publish(tmp_path / "work", tmp_path / "directory")
    with every_sync_watched():
        durable.remove_directory(tmp_path / "directory")
    with every_sync_watched():
        durable.make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


@faults
def test_a_file_is_old_or_new_whatever_operation_fails(tmp_path: Path, fault: BaseException) -> None:
    file = tmp_path / "file"

    def write() -> None:
        durable.write_file(file, [b"new", b" and longer"])

    for k in range(1, n_operations(write) + 1):
        durable.write_file(file, b"old")
        assert failed(k, fault, write)
        assert file.read_bytes() in (b"old", b"new and longer")
        if not isinstance(fault, Killed):
            assert list(tmp_path.iterdir()) == [file], "a failing write leaves nothing behind"
        write()  # what a dead writer left is not in the way
        durable.sweep(tmp_path)
        assert content(tmp_path) == {"file": b"new and longer"}


def test_an_error_while_content_is_made_leaves_the_old_file_alone(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("tokenizer failed")

    durable.write_file(tmp_path / "file", b"old")
    with pytest.raises(RuntimeError):
        durable.write_file(tmp_path / "file", chunks())
    with pytest.raises(RuntimeError), durable.Directory(tmp_path / "directory") as directory:
        directory.write("a", chunks())
    assert content(tmp_path) == {"file": b"old"}


@faults
def test_a_directory_is_whole_or_absent_whatever_operation_fails(tmp_path: Path, fault: BaseException) -> None:
    n = n_operations(lambda: make(tmp_path / "count", NEW))
    for k in range(1, n + 1):
        parent = tmp_path / str(k)
        parent.mkdir()
        assert failed(k, fault, lambda: make(parent / "d", NEW))  # noqa: B023 (called at once)
        assert content(parent / "d") in (None, NEW)
        if not isinstance(fault, Killed):
            assert [path.name for path in parent.iterdir()] in ([], ["d"])
        durable.sweep(parent)
        if not (parent / "d").exists():
            make(parent / "d", NEW)
        assert content(parent / "d") == NEW and len(list(parent.iterdir())) == 1


def test_a_crash_while_recovering_from_a_crash_leaves_a_directory_whole_or_absent(tmp_path: Path) -> None:
    def recover(parent: Path) -> None:
        durable.sweep(parent)
        if not (parent / "d").exists():
            make(parent / "d", NEW)

    n = n_operations(lambda: make(tmp_path / "count", NEW))
    for first in range(1, n + 1):
        for second in range(1, n + 2):
            parent = tmp_path / f"{first}-{second}"
            parent.mkdir()
            failed(first, Killed(), lambda: make(parent / "d", NEW))  # noqa: B023
            failed(second, Killed(), lambda: recover(parent))  # noqa: B023
            assert content(parent / "d") in (None, NEW)
            recover(parent)
            assert content(parent / "d") == NEW and len(list(parent.iterdir())) == 1


@faults
def test_a_removed_directory_is_whole_or_absent_whatever_operation_fails(tmp_path: Path, fault: BaseException) -> None:
    make(tmp_path / "count", OLD)
    n = n_operations(lambda: durable.remove_directory(tmp_path / "count"))
    for k in range(1, n + 1):
        make(tmp_path / "d", OLD)
        told = failed(k, fault, lambda: durable.remove_directory(tmp_path / "d"))
        assert told or k == n, "under its other name it waits to be swept: somebody may read it still"
        assert content(tmp_path / "d") in (None, OLD)
        durable.sweep(tmp_path)
        assert content(tmp_path / "d") in (None, OLD)
        if (tmp_path / "d").exists():
            durable.remove_directory(tmp_path / "d")
        assert list(tmp_path.iterdir()) == []


@faults
def test_publishing_leaves_the_old_or_the_new_directory_whole(tmp_path: Path, fault: BaseException) -> None:
    def publish(parent: Path) -> None:
        durable.publish(parent / "work", parent / "d")

    def begin(parent: Path) -> Path:
        parent.mkdir()
        make(parent / "d", OLD)
        make(parent / "work", NEW)
        return parent

    count = begin(tmp_path / "count")
    for k in range(1, n_operations(lambda: publish(count)) + 1):
        parent = begin(tmp_path / str(k))
        failed(k, fault, lambda: publish(parent))  # noqa: B023 (called at once)
        whole = [content(path) for path in parent.iterdir()]
        assert NEW in whole, "the new directory is never lost"
        if content(parent / "d") is None:  # killed between the two renames
            assert isinstance(fault, Killed) and OLD in whole
        else:
            assert content(parent / "d") in (OLD, NEW)
        if (parent / "work").exists():
            publish(parent)
        durable.sweep(parent)
        assert content(parent / "d") == NEW and len(list(parent.iterdir())) == 1
    assert content(count / "d") == NEW


def test_a_directory_that_another_process_makes_first_is_as_good(tmp_path: Path) -> None:
    class Late(Unsynced):
        def mkdir(self, path: Path) -> None:
            path.mkdir()
            super().mkdir(path)

    with installed(Late()):
        durable.make_directory(tmp_path / "runs" / "x")
    assert (tmp_path / "runs" / "x").is_dir()


def test_a_directory_that_exists_is_never_written_over(tmp_path: Path) -> None:
    make(tmp_path / "d", OLD)
    with pytest.raises(FileExistsError, match="exists already; move it away"):
        make(tmp_path / "d", NEW)
    assert content(tmp_path / "d") == OLD and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/x", ".hidden", "a\0", "\ud800", "x" * 256])
def test_a_name_that_could_leave_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        make(tmp_path / "d", {name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_sweeping_deletes_temporaries_and_nothing_else(tmp_path: Path) -> None:
    for name in (".gitignore", ".lock", "a.tmp-1-00000000", ".a.tmp-x", ".notes.tmp-2024"):
        (tmp_path / name).write_bytes(b"")
    kept = content(tmp_path)
    failed(2, Killed(), lambda: durable.write_file(tmp_path / "file", b"new"))
    failed(4, Killed(), lambda: make(tmp_path / "d", NEW))
    assert len(list(tmp_path.iterdir())) == len(kept or {}) + 2
    durable.sweep(tmp_path)
    assert content(tmp_path) == kept


def test_a_file_size_limit_leaves_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    durable.write_file(file, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            durable.write_file(file, b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert content(tmp_path) == {"file": b"old"}


def test_space_is_checked_in_words_and_nothing_is_left(tmp_path: Path) -> None:
    durable.check_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"2000000000\.00 GB are needed, .* are free") as caught:
        durable.check_space(tmp_path, 2 * 10**18)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from gpt import durable
lock = durable.Lock(Path(sys.argv[1]), "runs/x")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_lock_says_who_holds_it_and_survives_no_kill(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    path = tmp_path / ".lock"
    with pytest.raises(ValueError) as caught:
        durable.Lock(path, "runs/x")
    words = f"runs/x is in use by pid {holder.pid} on host {socket.gethostname()} since 20"
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith(f": wait for it or stop it (kill {holder.pid})")
    assert json.loads(path.read_text())["pid"] == holder.pid, "asking does not change who holds it"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with durable.Lock(path, "runs/x"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_is_free_after_its_block_and_its_file_stays(tmp_path: Path) -> None:
    for _ in range(2):
        with durable.Lock(tmp_path / ".lock", "x"), pytest.raises(ValueError, match="x is in use"):
            durable.Lock(tmp_path / ".lock", "x")
    assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}'])
def test_a_held_lock_that_says_nothing_is_still_held(tmp_path: Path, text: str) -> None:
    with durable.Lock(tmp_path / ".lock", "x"):
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(ValueError, match="x is in use by another process"):
            durable.Lock(tmp_path / ".lock", "x")


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match=r"\.lock cannot be locked \(No locks available\); use a disk of this machine"):
        durable.Lock(tmp_path / ".lock", "x")


@pytest.mark.parametrize("target", ["mine", "nowhere/at/all"])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "mine").write_text("my own words")
    (tmp_path / ".lock").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"\.lock: is a symbolic link, which is not followed; delete it"):
        durable.Lock(tmp_path / ".lock", "x", wait_s=5)
    assert (tmp_path / "mine").read_text() == "my own words" and not (tmp_path / "nowhere").exists()


def test_a_lock_that_is_waited_for_is_taken_when_it_is_free(tmp_path: Path) -> None:
    held = durable.Lock(tmp_path / "lock", "it")
    looks: list[int] = []

    def meanwhile() -> None:
        looks.append(1)
        if len(looks) == 3:
            held.release()

    with durable.Lock(tmp_path / "lock", "it", wait_s=60, meanwhile=meanwhile):
        assert len(looks) == 3
        with pytest.raises(ValueError, match=r"it is in use by .*\(waited 0.2 s\)"):
            durable.Lock(tmp_path / "lock", "it", wait_s=0.2)


def test_a_temporary_that_exists_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"of another writer")
    with pytest.raises(FileExistsError):
        durable.fs.open(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(FileExistsError):
        durable.fs.open(tmp_path / "link")
    assert (tmp_path / "file").read_bytes() == b"of another writer"


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path) -> None:
    class Short(Unsynced):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            return super().write(fd, data[:7])

    with installed(Short()):
        durable.write_file(tmp_path / "file", b"0123456789" * 9)
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 9


def test_when_everything_is_replaced_nothing_is_left_of_it(tmp_path: Path) -> None:
    for files in (OLD, NEW, OLD):
        make(tmp_path / "work", files)
        durable.publish(tmp_path / "work", tmp_path / "d")
        assert [path.name for path in tmp_path.iterdir()] == ["d"] and content(tmp_path / "d") == files


def test_a_link_is_not_followed_but_where_the_hub_made_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert durable.plain(tmp_path / "file") == tmp_path / "file"
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ValueError, match="link: is a symbolic link, which is not followed"):
        durable.plain(tmp_path / "link")
    with pytest.raises(FileNotFoundError, match="no: no such file"):
        durable.plain(tmp_path / "no")
    snapshot, blobs = tmp_path / "model" / "snapshots" / "abc", tmp_path / "model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0").write_bytes(b"x")
    (snapshot / "config.json").symlink_to("../../blobs/0")
    assert durable.plain(snapshot / "config.json").read_bytes() == b"x"
    (snapshot / "outside").symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match="outside: is a symbolic link"):
        durable.plain(snapshot / "outside")


def test_a_lock_whose_file_was_deleted_while_it_was_waited_for_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, taken = tmp_path / ".lock", fcntl.flock, []

    def deleted(file: object, operation: int) -> None:
        real(file, operation)  # type: ignore[arg-type]
        if not taken:
            path.unlink()
        taken.append(file)

    monkeypatch.setattr(fcntl, "flock", deleted)
    with durable.Lock(path, "x"):
        assert len(taken) == 2 and path.exists()
        with pytest.raises(ValueError, match="x is in use"):
            durable.Lock(path, "x")
