"""The machine: one source of randomness, and choices of device and dtype that say why."""

import ctypes
import os
import re
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import deterministic

from gpt import host, runtime


@pytest.fixture
def machine_restored() -> Iterator[None]:
    kept = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(kept[0])
    torch.set_float32_matmul_precision(kept[1])
    torch.use_deterministic_algorithms(kept[2])
    deterministic.fill_uninitialized_memory = fill


# Randomness


@given(
    seed=st.integers(-(2**70), 2**70), step=st.integers(0, 2**40), purpose=st.text(), micro_batch=st.integers(0, 999)
)
def test_a_key_has_63_bits_and_is_a_pure_function(seed: int, step: int, purpose: str, micro_batch: int) -> None:
    first = runtime.key(seed, step, purpose, micro_batch)
    torch.manual_seed(first)  # takes it
    assert 0 <= first < 2**63
    assert runtime.key(seed, step, purpose, micro_batch) == first


def test_keys_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert runtime.key(1337, 1, "dropout", 2) == 4368036639757114491
    assert runtime.key(0, 0, "init") == 6551482779054000193


def test_keys_of_other_seeds_steps_purposes_and_micro_batches_differ() -> None:
    keys = {
        runtime.key(seed, step, purpose, micro_batch)
        for seed in range(12)
        for step in range(12)
        for purpose in ("dropout", "order", "shift", "1", "1/1")
        for micro_batch in range(12)
    }
    assert len(keys) == 12 * 12 * 5 * 12
    assert any(key >= 2**62 for key in keys)


# Device and dtype


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    runtime.check_device("cpu")
    for device in ("cuda", "cuda:1", "mps", "tpu", ""):
        words = re.escape(f"device '{device}' is not available here (there is: cpu)")
        with pytest.raises(ValueError, match=words):
            runtime.check_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    runtime.check_device("cuda:0")
    runtime.check_device("cuda")
    with pytest.raises(ValueError, match="'cuda:1' is not available here"):
        runtime.check_device("cuda:1")
    with pytest.raises(ValueError, match=r"there is: cpu, cuda"):
        runtime.check_device("mps")


def test_without_an_accelerator_the_cpu_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.best_device() == ("cpu", f"{host.n_cores()} cores")


@pytest.mark.parametrize(
    ("flags", "dtype", "why"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "bfloat16", "the CPU has avx512_bf16"),
        ({"avx2", "amx_bf16"}, "bfloat16", "the CPU has amx_bf16"),
        ({"avx2", "avx512f"}, "float32", "the CPU has no bfloat16 instructions"),
        (set(), "float32", "the CPU has no bfloat16 instructions"),
    ],
)
def test_cpus_compute_in_bf16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], dtype: str, why: str
) -> None:
    monkeypatch.setattr(runtime, "cpu_flags", lambda: flags)
    assert runtime.best_dtype("cpu") == (dtype, why)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), "float32"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_gpus_compute_in_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.best_dtype("cuda:0")[0] == dtype


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert "g++" in (runtime.compiler_missing() or "")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert runtime.compiler_missing() is None


def test_a_lone_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert runtime.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert runtime.world_size() == 4


def test_the_kind_of_cpu_names_the_instructions_that_decide_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx2", "sse"})
    first = runtime.cpu_kind()
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert runtime.cpu_kind() != first
    assert first.endswith(" avx2")


@pytest.mark.usefixtures("machine_restored")
def test_setup_on_the_cpu_is_deterministic_with_the_threads_asked_for() -> None:
    runtime.setup("cpu", 1)
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x @ x, (x.double() @ x.double()).float(), rtol=1e-5, atol=1e-4)  # still fp32 arithmetic


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this is glibc's")
@pytest.mark.usefixtures("machine_restored")
def test_memory_that_an_update_frees_is_there_for_the_next_one() -> None:
    runtime.setup("cpu", 1)
    n = 1 << 26  # bytes, which is past what malloc keeps by itself

    def faults(n_bytes: int) -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        torch.zeros(n_bytes, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    faults(n)
    # A little less: glibc looks for an aligned place where there is room to spare, and what stands behind may be in use.
    assert faults(n - (1 << 12)) < n // resource.getpagesize() // 10


def test_autocast_computes_products_in_the_dtype_and_fp32_is_none() -> None:
    x = torch.ones(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with runtime.autocast("cpu", "bfloat16"):
            assert (x @ x).dtype == torch.bfloat16
        with runtime.autocast("cpu", "float32"):
            assert (x @ x).dtype == torch.float32


def test_memory_is_in_bytes() -> None:
    assert 10 * 2**20 < runtime.peak_memory_bytes("cpu") < 2**40
    assert 2**20 < runtime.free_memory_bytes("cpu") < 2**50


def test_what_torch_keeps_of_a_gpu_is_free_and_without_a_word_of_the_system_half_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, told in {"mem_get_info": (100, 500), "memory_reserved": 30, "memory_allocated": 10}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: told)
    assert runtime.free_memory_bytes("cuda:0") == 120
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 1 kB")
    assert runtime.free_memory_bytes("cpu") == there // 2
    monkeypatch.setattr(os, "sysconf", lambda name: int("none"))
    assert runtime.free_memory_bytes("cpu") == 8 << 30


def test_the_end_of_a_job_is_what_slurm_says_if_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert runtime.job_ends_at() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1790000000")
    assert runtime.job_ends_at() == 1790000000.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    assert runtime.job_ends_at() is None
