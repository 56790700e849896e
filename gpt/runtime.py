"""The machine a run stands on: device, dtype, threads, determinism, and the one source of randomness.

Beside `signals`, which comes before torch, this is the only room that reads the environment. It decides nothing that a setting
decides.
"""

import ctypes
import hashlib
import logging
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import deterministic

from gpt import host

# mallopt(3): no mappings for large blocks; the heap never shrinks, and grows by this much at once.
MALLOC = {-4: 0, -1: -1, -2: 64 << 20}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def key(seed: int, step: int, purpose: str, micro_batch: int = 0) -> int:
    """A 63-bit seed for one purpose at one step: a pure function, so a resumed run draws what the first one drew."""
    text = f"{seed}/{step}/{purpose}/{micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def world_size() -> int:
    """Processes launched together by torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of the processes of the run this is."""
    return int(os.environ.get("RANK", "0"))


def job_ends_at() -> float | None:
    """When the job that this process runs in is ended, in seconds of the Unix clock; None where nobody says so."""
    try:
        return float(os.environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return None


def local_rank() -> int:
    """Which of this machine's processes of the run this is; it computes on the GPU of that number."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of the run on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def best_device() -> tuple[str, str]:
    """The fastest device here and its name for people."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU"
    return "cpu", f"{host.n_cores()} cores"


def check_device(device: str) -> None:
    """Raise ValueError in words if `device` is not to be had here."""
    mps = ["mps"] if torch.backends.mps.is_available() else []
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *mps]
    if device not in available and not (device == "cuda" and "cuda:0" in available):
        here = ", ".join(available)
        raise ValueError(f"device '{device}' is not available here (there is: {here}); use another, or leave it out")
    if device == "cuda" and world_size() > 1 and local_rank() >= (n := torch.cuda.device_count()):
        raise ValueError(
            f"{local_world_size()} ranks were started on this machine, which has {n} GPU{'s' * (n != 1)}: start as many ranks "
            f"(torchrun --nproc-per-node {n}), or set train.device=cpu"
        )


def cpu_flags() -> set[str]:
    """Instruction set flags as Linux lists them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def chosen_device(asked: str) -> str:
    """The device as asked for, or the best one here for "auto"."""
    return best_device()[0] if asked == "auto" else asked


def best_dtype(device: str) -> tuple[str, str]:
    """The fastest dtype for matrix products on `device` that trains safely, and why."""
    if device.startswith("cuda"):
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return "bfloat16", "the GPU computes it natively"
        if capability >= (7, 0):  # Volta and Turing: tensor cores for float16 alone
            return "float16", "the GPU has no fast bfloat16; with a loss scale"
        return "float32", "the GPU has no fast 16-bit products"
    if device == "cpu":
        fast = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"})
        return ("bfloat16", f"the CPU has {fast[0]}") if fast else ("float32", "the CPU has no bfloat16 instructions")
    return "float32", f"bfloat16 is not measured on {device}"


def threads_sleep() -> bool:
    """Whether OpenMP's threads sleep as soon as they have nothing to do: to wake one takes tens of microseconds."""
    spins = os.environ.get("GOMP_SPINCOUNT")
    return os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" if spins is None else spins == "0"


@contextmanager
def lone_thread() -> Iterator[None]:
    """Where threads sleep, one computes alone, within, what is too small to wake others for."""
    threads = torch.get_num_threads()
    if threads == 1 or not threads_sleep():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compiler_missing() -> str | None:
    """Why torch.compile cannot work for CPU code here, or None."""
    if sys.platform == "win32":
        return "Windows"
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler (g++) found"


def torch_version() -> str:
    return torch.__version__


def cpu_kind() -> str:
    """What of the processor decides bits: another kind may round differently."""
    return " ".join([platform.machine(), *sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})])


def setup(device: str, threads: int) -> None:
    """Fix what changes bits or speed in this process: threads, deterministic algorithms on the CPU, fast fp32 products.

    "medium" sends fp32 products to oneDNN; without AMX that is still fp32 arithmetic, only faster. Deterministic
    algorithms alone make compiled CPU code repeat; the debug fill of fresh memory that comes with them buys nothing.
    """
    torch.set_num_threads(threads)
    if device == "cuda" and world_size() > 1:
        torch.cuda.set_device(local_rank())  # from here on "cuda" is this rank's own
    elif device.startswith("cuda:"):
        torch.cuda.set_device(device)  # streams, events and graphs are made on the current one
    torch.set_float32_matmul_precision("medium" if device == "cpu" and "amx_bf16" not in cpu_flags() else "high")
    # The public call imports the compiler, a second, to tell it too; `parallel.applied` does that where something compiles.
    torch._C._set_deterministic_algorithms(device == "cpu")
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_freed_memory()
    _private_compiler_cache()


def _keep_freed_memory() -> None:
    """What an update frees stays with the process, and the next one finds it there (glibc; elsewhere nothing happens).

    By default large tensors go back to the system when they are freed, and come again page by page, each filled with zeros:
    about a quarter of a step (docs/experiments.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in MALLOC.items():
            mallopt(parameter, value)


def _private_compiler_cache() -> None:
    """Keep compiled code, which is run when found, where nobody else can put any: torch's default stands in /tmp."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-trainer"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache.chmod(0o700)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: a directory of this process alone
        cache = Path(tempfile.mkdtemp(prefix="gpt-trainer-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")


def autocast(device: str, dtype: str) -> AbstractContextManager[None]:
    """Matrix products in `dtype`, weights and reductions in fp32."""
    return torch.autocast(device.partition(":")[0], DTYPES[dtype], enabled=dtype != "float32")


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, compiled anew for each shape that it is given."""
    return torch.compile(function, dynamic=False)


def uncompiled() -> AbstractContextManager[None]:
    """What would compile itself runs as it is written: it needs no compiler, and its bits repeat."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def hushed() -> Iterator[None]:
    """Loggers are silent: a library that reports while it loads which kernels of other machines it lacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def synchronize(device: str) -> None:
    """Wait for the device; needed around timings."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Within it `module` computes without dropout; then it is in the mode that it was in."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def hush_profiler() -> None:
    """Before its first start: torch's profiler does not tell on stderr when it begins and ends."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def forget_peak(device: str) -> None:
    """From now on `peak_memory_bytes` of a CUDA device counts anew; a process's counts from its start."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: str) -> int:
    """Most memory held so far: of a CUDA device, else resident memory of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss counts what the process that started this one held
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes(device: str) -> int:
    """Memory a run may still take: the GPU's free memory and what torch keeps for itself of it, else what the system and this
    process's container or job have left (half of what there is where it does not say, 8 GiB where it says nothing)."""
    if device.startswith("cuda"):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.startswith("mps"):
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, left = int(fields["MemAvailable"].split()[0]) * 1024, host.memory_left()
        return free if left is None else min(free, left)
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 8 << 30
