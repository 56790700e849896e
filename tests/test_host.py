"""What a process has of its machine: the cores that it may use, the memory that it took."""

import mmap
import os
from pathlib import Path

import pytest

from gpt import host


def test_what_a_process_holds_is_what_it_took() -> None:
    n_bytes, before = 64 << 20, host.resident_bytes()
    with mmap.mmap(-1, n_bytes) as held:  # new memory, whatever the heap still has
        held.write(b"1" * n_bytes)
        assert 0.9 * n_bytes < host.resident_bytes() - before < 2.5 * n_bytes


def test_cores_are_those_that_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MEMBER", Path("nowhere"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert host.n_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert host.n_cores() == 4


GB = 1 << 30
LIMITS = {  # by what Linux says of a process in a container or a job: files, cores, bytes that are left
    "version 2, a job in a slice": (
        {
            "cgroup": "0::/slice/job",
            "slice/job/cpu.max": "250000 100000",
            "slice/cpu.max": "max 100000",
            "slice/job/memory.max": "max",
            "slice/memory.max": f"{8 * GB}",
            "slice/memory.current": f"{6 * GB}",
            "slice/memory.stat": f"anon 1\ninactive_file {GB}\n",
        },
        3,
        3 * GB,
    ),
    "version 2, seen from inside": (
        {"cgroup": "0::/", "cpu.max": "50000 100000", "memory.max": f"{4 * GB}", "memory.current": f"{5 * GB}"},
        1,
        0,
    ),
    "version 1": (
        {
            "cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/",
            "cpu/job/cpu.cfs_quota_us": "400000",
            "cpu/job/cpu.cfs_period_us": "100000",
            "memory/job/memory.limit_in_bytes": f"{2 * GB}",
            "memory/job/memory.usage_in_bytes": f"{GB}",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": f"{GB}",
        },
        4,
        GB,
    ),
    "no limit": ({"cgroup": "0::/\n4:memory:/", "cpu.max": "max 100000", "memory.max": "max"}, 8, None),
    "no words of it": ({"cgroup": "0::/gone"}, 8, None),
}


@pytest.mark.parametrize("case", LIMITS)
def test_what_a_container_or_a_job_may_have_is_what_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    files, cores, left = LIMITS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    monkeypatch.setattr(host, "MEMBER", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert (host.n_cores(), host.memory_left()) == (cores, left)
