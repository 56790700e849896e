"""The real command for minutes on end, with a fault every few seconds: its weights are those of a run that nothing disturbed.

    python tests/soak.py --minutes 30

Faults: SIGKILL, SIGTERM, a file that may not grow (a full disk), a flipped byte in the newest checkpoint (it must be refused by
name, and is then deleted as the error advises), a process that is stopped and goes on, files whose times are years off.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from proving import Row
from runs import PATIENCE_S, command, differences, prepared, settings, trained

EVERY_S = 20.0  # between two faults, on average
SAVE_S = 3.0  # between two saves, about
RUN_S = 120.0  # of training in one run at most: a few faults, then the comparison
FAULTS = ("kill", "stop request", "full disk", "flipped byte", "stopped for a while", "clock")
SMALL_FILE = 20_000  # bytes, of a disk that is full


class Soak:
    """One run in `home`, disturbed until it is done."""

    def __init__(self, home: Path, name: str, rng: random.Random) -> None:
        self.home, self.run, self.rng = home, home / "runs" / name, rng
        self.done = Counter[str]()
        self.wrong: list[str] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        line = command("small.yaml", f"name={self.run.name}")
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(line, cwd=self.home, text=True, **pipes)  # type: ignore[call-overload]

    def _ended(self, code: int, words: str = "") -> str:
        """Wait for the process, which must end so; what it said."""
        try:
            said = self.process.communicate(timeout=PATIENCE_S)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            said = f"it did not end within {PATIENCE_S} s: {self.process.communicate()[1]}"
        early = -signal.SIGTERM if code == 75 else 0  # a signal before the first line of Python has run
        if self.process.returncode not in (code, 0, early) or (self.process.returncode and words not in said):
            self.wrong.append(f"exit code {self.process.returncode}, not {code} with '{words}': {said[-600:]}")
        return said

    def _killed(self) -> None:
        self.process.kill()
        self.process.communicate()

    def newest(self) -> Path | None:
        """The newest checkpoint, where there is another before it."""
        found = sorted((self.run / "checkpoints").glob("step_*/manifest.json"))
        return found[-1].parent if len(found) > 1 else None

    def fault(self, kind: str) -> None:
        """Do harm of a kind, and start the command again if it ended."""
        if kind == "flipped byte" and self.newest() is None:
            kind = "kill"
        if kind == "kill":
            self._killed()
        elif kind == "stop request":
            self.process.send_signal(signal.SIGTERM)
            self._ended(75)
        elif kind == "full disk":
            with contextlib.suppress(ProcessLookupError):  # it has just finished
                resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))
            self._ended(5, "out of disk")
        elif kind == "stopped for a while":
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(self.rng.uniform(0.5, 5))
            self.process.send_signal(signal.SIGCONT)
        else:
            self._killed()
            {"flipped byte": self._flip, "clock": self._clock}[kind]()
        self.done[kind] += 1
        if self.process.poll() is not None and not self.wrong:
            self.process = self._start()

    def _flip(self) -> None:
        """Change a byte of the newest checkpoint: the command must name it. Then it is deleted, as the error says."""
        newest = self.newest()
        assert newest is not None
        file = self.rng.choice([path for path in newest.iterdir() if path.name != "manifest.json"])
        data = bytearray(file.read_bytes())
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(data)
        self.process = self._start()
        said = self._ended(3, file.name)
        if self.process.returncode != 3 or f"delete {newest.relative_to(self.home)}" not in said:
            self.wrong.append(f"{file} has a flipped byte: exit code {self.process.returncode}: {said[-600:]}")
        shutil.rmtree(newest)

    def _clock(self) -> None:
        """Every file of the run is dated years before or after: nothing may depend on that."""
        for path in [self.run, *self.run.rglob("*")]:
            at = time.time() + self.rng.uniform(-1, 1) * 3e8
            os.utime(path, (at, at))

    def disturbed(self, until: float, every_s: float) -> None:
        """Faults until the run is done, or until `until`, after which it may finish in peace."""
        while not self.wrong:
            pause = self.rng.uniform(0.2, 1.8) * every_s
            wait = None if time.monotonic() + pause > until else pause
            try:
                self.process.wait(wait)
            except subprocess.TimeoutExpired:
                self.fault(self.rng.choice(FAULTS))
                continue
            said = self.process.communicate()[1]
            if self.process.returncode:
                self.wrong.append(f"exit code {self.process.returncode}: {said[-600:]}")
            return


def soaked(
    home: Path, minutes: float, every_s: float, seed: int, say: Callable[[str], None]
) -> tuple[Counter[str], int]:
    """Runs one after the other for so many minutes; (faults by kind, those whose run ended as the golden one did)."""
    (home / "small.yaml").write_text(settings(steps=400))
    began = time.monotonic()
    trained(home, "speed")
    rate = 400 / (time.monotonic() - began)  # its start-up included, so that there are a few runs
    every = max(5, round(rate * SAVE_S))
    steps = max(400, round(rate * min(RUN_S, max(60.0, 60 * minutes / 3))))
    text = (
        settings(steps=steps)
        .replace("every: 5", f"every: {every}")
        .replace("eval: {every: 10", f"eval: {{every: {every}")
    )
    (home / "small.yaml").write_text(text.replace("sample_every: 30", f"sample_every: {5 * every}"))
    golden = trained(home, "golden")
    say(f"soak: {steps} steps a run, a save every {every}, a fault about every {every_s:g} s")
    rng, faults, survived, n = random.Random(seed), Counter[str](), 0, 0
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        n += 1
        soak = Soak(home, f"soak-{n}", rng)
        try:
            soak.disturbed(until, every_s)
        finally:
            if soak.process.poll() is None:
                soak.process.kill()
                soak.process.communicate()
        wrong = soak.wrong or differences(soak.run, golden)
        told = ", ".join(f"{count} x {kind}" for kind, count in soak.done.items())
        say(f"soak: run {n}: {told or 'no fault'}: {'; '.join(wrong) or 'no difference'}")
        faults += soak.done or Counter({"none": 1} if wrong else {})  # a run that differs is lost, undisturbed too
        survived += 0 if wrong else soak.done.total()
        if not wrong:
            shutil.rmtree(soak.run)
    return faults, survived


def prove(scale: float, say: Callable[[str], None], minutes: float = 5.0) -> list[Row]:
    """`minutes` of faults; below scale 1 that share of them, with faults as much closer together."""
    began = time.monotonic()
    short = min(1.0, max(scale, 0.1))
    with tempfile.TemporaryDirectory() as scratch:
        home = prepared(Path(scratch) / "home")
        faults, survived = soaked(home, minutes * min(1.0, scale), EVERY_S * short, 1, say)
    what = f"soak: {', '.join(kind for kind in FAULTS if faults[kind])}"
    return [Row("G1 G2 G3 G5", what, faults.total(), survived, time.monotonic() - began)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    (row,) = prove(1.0, lambda line: print(line, flush=True), parser.parse_args().minutes)
    print(f"{row.survived} of {row.tried} faults made no difference, {row.seconds / 60:.0f} minutes: {row.what}")
    sys.exit(row.survived != row.tried or not row.tried)
