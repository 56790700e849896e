"""What this process has of its machine, known without torch: cores, and the memory that it holds."""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

GROUPS, MEMBER = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # where Linux says what containers and jobs may have


def n_cores() -> int:
    """Cores this process may run on, and its container or job may keep busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        v1 = (*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us"))
        match _words(group / "cpu.max") or v1:
            case quota, period if quota.isdecimal() and period.isdecimal():
                cores = min(cores, max(1, math.ceil(int(quota) / max(1, int(period)))))
    return cores


def memory_left() -> int | None:
    """Bytes that this process's container or job may still take, what the system would let go of counted in; None where
    nothing limits it."""
    left = list[int]()
    for group in _groups("memory"):
        for most, used, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, taken = _words(group / most), _words(group / used)
            if limit and taken and limit[0].isdecimal() and int(limit[0]) < 1 << 60:  # v1 says "none" by a huge number
                words = _words(group / "memory.stat")
                kept = dict(zip(words[::2], words[1::2], strict=False)).get(idle, "0")
                left.append(max(0, int(limit[0]) - int(taken[0]) + int(kept)))
    return min(left, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """The control groups that this process is in, from its own upwards: of version 2, and of 1 those of the controller."""
    try:
        lines = MEMBER.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = GROUPS / controller if controllers else GROUPS
            place = root / path.lstrip("/")
            yield from (place, *(above for above in place.parents if above == root or root in above.parents))


def _words(file: Path) -> tuple[str, ...]:
    """What a file of few words says; none where it cannot be read."""
    try:
        return tuple(file.read_text().split())
    except OSError:
        return ()


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
