"""The real command on a disk without room: 16 MiB that fill up, a limit on the size of a file, a disk that may not be written.

    python tests/disks.py

Each attempt ends with an exit code and words, leaves the checkpoints before it whole, and the same command finishes later. The
small disks are mounted in a name space of this test's own (unshare), which needs no rights and ends with it.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from proving import Row
from runs import PATIENCE_S, ROOT, Ended, command, differences, ended, prepared, settings, struck, trained

STEPS = 40
SPACE = ["unshare", "--map-root-user", "--mount"]
LEFT = (0, 100_000, 400_000, 700_000, 1_000_000)  # bytes that the full disk still has: a checkpoint needs 1.1 MB
LIMITS = (1_000, 20_000, 300_000, 550_000)  # of a file: the largest is 0.6 MB


def whole(run: Path) -> str:
    """What is wrong with the checkpoints of a run, "" if nothing."""
    from gpt import checkpoint

    try:
        for path in (run / "checkpoints").glob("step_*"):
            checkpoint.verify(path)
    except ValueError as error:
        return str(error)
    return ""


def refused(done: Ended, code: int, words: str, run: Path) -> str:
    """What is wrong with how a command ended that had no room."""
    if done.code != code or words not in done.said or "Traceback" in done.said:
        return f"exit code {done.code}, not {code} with '{words}': {done.said[-600:]}"
    return whole(run)


def continued(home: Path, golden: Path, run: Path) -> str:
    done = ended(home, command("small.yaml", f"name={run.name}"))
    return done.said[-600:] if done.code else "; ".join(differences(run, golden))


def begun(home: Path, name: str) -> Path:
    """A run that was stopped in its second save: one checkpoint stands."""
    done = ended(home, struck("save", 2, signal.SIGTERM, "small.yaml", f"name={name}"))
    assert done.code == 75, done.said
    return home / "runs" / name


FILLER = """
import errno, glob, os, sys, time
run, ballast, left = sys.argv[1:]
while not glob.glob(f"{run}/checkpoints/step_*/manifest.json"):
    time.sleep(0.01)
with open(ballast, "wb") as file:
    while True:
        free = os.statvfs(os.path.dirname(ballast))
        try:
            os.posix_fallocate(file.fileno(), 0, max(4096, free.f_bavail * free.f_frsize - int(left)))
            break
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            time.sleep(0.001)  # the run took a page meanwhile
"""
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.executable, sys.argv[2:])
"""


@contextmanager
def filled(home: Path, run: Path, left: int) -> Iterator[None]:
    """The disk full but for `left` bytes, as soon as the run has a checkpoint."""
    ballast = home / "runs" / "ballast"
    process = subprocess.Popen(
        [sys.executable, "-c", FILLER, str(run), str(ballast), str(left)], stderr=subprocess.PIPE
    )
    try:
        yield
    finally:
        process.kill()
        process.communicate()
        ballast.unlink(missing_ok=True)


def on_a_full_disk(home: Path, golden: Path, left: int) -> str:
    """On 16 MiB mounted at runs/, which fill up once the run has a checkpoint; what was wrong."""
    run = home / "runs" / f"full-{left}"
    with filled(home, run, left):
        done = ended(home, command("small.yaml", f"name={run.name}"))
    wrong = refused(done, 5, "out of disk", run) or continued(home, golden, run)
    shutil.rmtree(run)
    return wrong


def on_a_disk_too_small(home: Path, golden: Path) -> str:
    """A run that cannot fit says so before its first step."""
    ballast = home / "runs" / "ballast"
    free = os.statvfs(ballast.parent)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 500_000)
    run = home / "runs" / "small-disk"
    done = ended(home, command("small.yaml", f"name={run.name}"))
    ballast.unlink()
    wrong = refused(done, 5, "are needed", run) or continued(home, golden, run)
    shutil.rmtree(run)
    return wrong


def on_a_disk_that_may_not_be_written(home: Path, golden: Path) -> str:
    run = begun(home, "read-only")
    mount = [str(home / "runs"), str(home / "runs")]
    subprocess.run(["mount", "--bind", *mount], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", mount[0]], check=True)
    done = ended(home, command("small.yaml", f"name={run.name}"))
    subprocess.run(["umount", mount[0]], check=True)
    return refused(done, 2, "Read-only file system", run) or continued(home, golden, run)


def under_a_limit(home: Path, golden: Path, limit: int) -> str:
    """A run that has a checkpoint goes on where no file may be larger than `limit`; what was wrong."""
    run = begun(home, f"limit-{limit}")
    line = command("small.yaml", f"name={run.name}")
    done = ended(home, [sys.executable, "-c", LIMITED, str(limit), *line])
    return refused(done, 5, "out of disk", run) or continued(home, golden, run)


def attempts(home: Path, golden: Path, few: bool) -> dict[str, Callable[[], str]]:
    limits, left = (LIMITS[2:3], LEFT[2:3]) if few else (LIMITS, LEFT)
    made: dict[str, Callable[[], str]] = {}
    for limit in limits:
        made[f"no file above {limit} bytes"] = lambda limit=limit: under_a_limit(home, golden, limit)
    made["a disk that is mounted read-only"] = lambda: in_a_space(home, golden, "read-only")
    for n in left:
        made[f"16 MiB fill up, {n} bytes are left"] = lambda n=n: in_a_space(home, golden, str(n))
    if not few:
        made["16 MiB are nearly full from the start"] = lambda: in_a_space(home, golden, "small")
    return made


def in_a_space(home: Path, golden: Path, what: str) -> str:
    """An attempt in a process with mounts of its own."""
    line = [*SPACE, sys.executable, __file__, "--in-a-space", str(home), str(golden), what]
    done = subprocess.run(line, capture_output=True, text=True, timeout=3 * PATIENCE_S)
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(done.stdout.splitlines()[-1])
    return f"it said nothing: {done.stderr[-600:]}"


def within(home: Path, golden: Path, what: str) -> str:
    if what == "read-only":
        return on_a_disk_that_may_not_be_written(home, golden)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(home / "runs")], check=True)
    return on_a_disk_too_small(home, golden) if what == "small" else on_a_full_disk(home, golden, int(what))


def mountable() -> str | None:
    """Why no disk of our own can be mounted here, or None."""
    with tempfile.TemporaryDirectory() as place:
        line = [*SPACE, "mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        except OSError as error:
            return str(error)
    return None if done.returncode == 0 else done.stderr.strip()


def prove(scale: float, say: Callable[[str], None]) -> list[Row]:
    began, tried, survived = time.monotonic(), 0, 0
    missing = mountable()
    if missing:
        say(f"no 16 MiB disk and none that is read-only: nothing can be mounted here ({missing})")
    with tempfile.TemporaryDirectory() as scratch:
        home = prepared(Path(scratch) / "home")
        (home / "small.yaml").write_text(settings(steps=STEPS))
        golden = trained(home, "golden").rename(Path(scratch) / "golden")
        for name, attempt in attempts(home, golden, few=scale < 0.2).items():
            if missing and not name.startswith("no file"):
                continue
            wrong = attempt()
            tried, survived = tried + 1, survived + (not wrong)
            say(f"{name}: {wrong or 'refused in words, and no difference later'}")
    what = "full disk, file limit" + ("" if missing else ", read-only disk")
    return [Row("G2 G19", what, tried, survived, time.monotonic() - began)]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--in-a-space"]:
        print(json.dumps(within(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])))
    else:
        print(*prove(1.0, print), sep="\n")
