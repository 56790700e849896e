"""What a process has of its machine: the cores that it may use, the memory that it took."""

import mmap
import os

import pytest

from gpt import host


def test_what_a_process_holds_is_what_it_took() -> None:
    n_bytes, before = 64 << 20, host.resident_bytes()
    with mmap.mmap(-1, n_bytes) as held:  # new memory, whatever the heap still has
        held.write(b"1" * n_bytes)
        assert 0.9 * n_bytes < host.resident_bytes() - before < 2.5 * n_bytes


def test_cores_are_those_that_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert host.n_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert host.n_cores() == 4
