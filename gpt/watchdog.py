"""A thread that watches whether the process moves on: if not, it writes down where every thread stands, and ends it.

What moves on says so (`signals.beat`, and with it every safe point). The time that a process was stopped by SIGSTOP or slept
with its laptop counts for nothing: the watcher did not run then either, and counts by its own ticks.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from gpt import durable, signals

PATIENCE = 4  # times the limit: how long may take what is known to be long, as a compilation or a save
TICK_S = 1.0
LAST_WORDS_S = 10.0  # that a hung disk may take from the end of a hung process


class Watchdog:
    """Watches while its block runs. `tell(reason)` is called before the process ends, and may fail.

    `limit_s` None waits forever. Before `ends_at` (of the Unix clock) a stop is requested so early that a save fits in twice.
    After `look_s` of silence, if given, the stacks are written already, and the process goes on.
    """

    def __init__(
        self,
        limit_s: float | None,
        stacks: Path,
        tell: Callable[[str], None],
        ends_at: float | None = None,
        look_s: float | None = None,
    ) -> None:
        self._limit_s, self._stacks, self._tell, self._ends_at = limit_s, stacks, tell, ends_at
        self._look_s = math.inf if look_s is None else look_s
        self._tick_s = TICK_S if limit_s is None else min(TICK_S, limit_s / 4)
        self._over, self._patient = threading.Event(), 1
        self._save_s = self._longest_s = 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def expect_saves(self, seconds: float) -> None:
        """So long a save takes, as far as is known before the first."""
        self._save_s = max(self._save_s, seconds)

    def begun(self) -> None:
        """The first update is made: from now on the limit is the one that was set."""
        self._patient = 0

    @property
    def early_s(self) -> float:
        """How long before the end the stop is requested: two saves, and the longest that nothing was heard so far."""
        return 2 * self._save_s + self._longest_s + 2 * TICK_S

    @contextmanager
    def saving(self) -> Iterator[None]:
        """In the block the run is saved; how long that takes is remembered."""
        began = time.monotonic()
        with self.patient():
            yield
        self.expect_saves(time.monotonic() - began)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """In the block, silence may be `PATIENCE` times as long."""
        signals.beat()
        self._patient += 1
        try:
            yield
        finally:
            self._patient -= 1
            signals.beat()

    def _watch(self) -> None:
        seen, silent_s, before, looked = signals.beats(), 0.0, time.monotonic(), False
        while not self._over.wait(self._tick_s):
            now = time.monotonic()
            # A tick that took much longer was not this thread's: the process was suspended, or starved.
            silent_s, before = silent_s + min(now - before, 2 * self._tick_s), now
            if self._ends_at is not None and time.time() + self.early_s > self._ends_at:
                signals.request("the end of the job's time")
            if signals.beats() != seen:
                if not self._patient:
                    self._longest_s = max(self._longest_s, silent_s)
                seen, silent_s, looked = signals.beats(), 0.0, False
            if silent_s > self._look_s and not looked:
                looked = True
                self._write(f"nothing happened for {silent_s:.0f} s; it was not ended for that yet")
            limit = None if self._limit_s is None else self._limit_s * (PATIENCE if self._patient else 1)
            if limit is not None and silent_s > limit:
                self._end(f"hung: nothing happened for {silent_s:.0f} s")

    def _write(self, reason: str) -> None:
        with suppress(OSError), open(self._stacks, "w", opener=durable.unfollowed) as file:
            file.write(f"{reason}\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def _end(self, reason: str) -> None:
        """Say where everything stands, and end the process; in any case soon."""
        last = threading.Timer(LAST_WORDS_S, os._exit, [signals.STUCK])
        last.daemon = True
        last.start()
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        self._write(reason)
        with suppress(Exception):
            self._tell(reason)
        text = f"error: {reason}; where every thread stood is above and in {self._stacks}\n       the same command continues\n"
        with suppress(OSError):
            os.write(2, text.encode())
        os._exit(signals.STUCK)
