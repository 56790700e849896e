"""What a child process that opens bad files may take. A process beyond it is ended by the system, which its parent sees."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def address_space() -> int:
    """Bytes that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def limit_memory(n_bytes: int) -> None:
    """From now on this process has no more address space than that, and leaves no core."""
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def timed(cpu_s: float, wall_s: float) -> Iterator[None]:
    """What takes longer ends the process, by SIGPROF or SIGALRM."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
