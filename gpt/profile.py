"""What an update spends its time on: a trace for a browser, the ten largest costs, and the share of this machine's limit."""

import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpt import durable, probe, runtime

WARM_UP = 3  # updates that choose kernels, compile and fill caches
LARGEST = 10
TRACE = "trace.json.gz"
CHUNK = 1 << 20


class Cost(NamedTuple):
    """What one kind of operation takes of an update."""

    name: str
    calls: float
    seconds: float


class Profile:
    """Follows a run: after a warm-up `n` updates are timed and the `n` after them traced; then it says what it found, once.

    It reads clocks and waits for the device at four places; it draws no number and touches no tensor of the run. Updates
    between which something else is due (`disturbed(step)`: after that update) are left out as far as there are others.
    """

    def __init__(
        self, n: int, device: str, dtype: str, flops: float, directory: Path, disturbed: Callable[[int], bool],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.n, self._device, self._dtype, self._flops = n, device, dtype, flops
        self._directory, self._disturbed, self._say = directory, disturbed, say
        self._done = n == 0
        self._seen, self._last = 0, -1
        self._followed: int | None = None  # updates since the clock was started
        self._crowded = False
        self._clock = self._timed_s = 0.0
        self._traced: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whatever ends the run ends this; only a run that came to its end hears of what is missing."""
        if self._traced is not None:
            self._traced.stop()
        if kind is None and not self._done:
            takes = (
                WARM_UP + (4 if self._crowded else 2) * self.n
            )  # it waits for updates without other work between them
            self._say(f"profile: nothing was traced; it takes {takes} updates, here were {self._seen}")

    def made(self, step: int) -> float:
        """Update `step` was made; seconds that following it took by itself."""
        if self._done:
            return 0.0
        began = time.perf_counter()
        if step != self._last + 1:  # the first one, or the run went back
            self._seen, self._followed = 0, None
            if self._traced is not None:
                self._traced.stop()
                self._traced = None
        self._seen, self._last = self._seen + 1, step
        if self._followed is None:
            if self._may_begin(step):
                self._followed, self._clock = 0, self._now()
        else:
            self._followed += 1
            if self._followed == self.n:
                self._timed_s = (self._now() - self._clock) / self.n
                self._traced = _tracing(self._device)
                self._clock = self._now()
            elif self._followed == 2 * self.n:
                self._finish((self._now() - self._clock) / self.n)
        return time.perf_counter() - began

    def _may_begin(self, step: int) -> bool:
        """Whether it is warm, and no other work falls into what would be followed; for that it waits as long as it lasts."""
        disturbed = any(self._disturbed(each) for each in range(step, step + 2 * self.n))
        self._crowded = disturbed
        return self._seen >= WARM_UP and (not disturbed or self._seen >= WARM_UP + 2 * self.n)

    def _now(self) -> float:
        runtime.synchronize(self._device)
        return time.perf_counter()

    def _finish(self, traced_s: float) -> None:
        assert self._traced is not None
        done, self._traced, self._done = self._traced, None, True
        done.stop()
        try:
            where = str(_written(done, self._directory))
        except OSError as error:  # the run does not end for it
            where = f"not kept ({error.strerror})"
        found = costs(done, self.n)
        if self._crowded:
            self._say(
                "profile: evaluations, samples and saves between the updates are counted too; set fewer, train.profile=N"
            )
        self._say(
            f"profile: {self.n} updates of {1e3 * self._timed_s:.2f} ms ({1e3 * traced_s:.2f} ms while traced); {where}"
        )
        for line in table(found, traced_s):
            self._say(f"  {line}")
        reached = self._flops / self._timed_s
        try:
            rate = probe.matmul_rate(self._device, self._dtype)
        except torch.OutOfMemoryError:  # no reason to end it either
            return
        self._say(
            f"  {reached / 1e9:,.1f} GFLOP/s, {reached / rate:.1%} of the {rate / 1e9:,.1f} at which {self._device} multiplies "
            f"large matrices in {self._dtype}"
        )


def _tracing(device: str) -> profile:
    """A profiler that has begun."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    runtime.hush_profiler()
    made = profile(activities=kinds)
    made.start()
    return made


def _written(done: profile, directory: Path) -> Path:
    """The trace in `directory`, compressed, in place of an earlier one."""
    path, plain = directory / TRACE, durable.scratch(directory, "trace.json")
    try:
        done.export_chrome_trace(str(plain))
        durable.write_file(path, _compressed(plain))
    finally:
        plain.unlink(missing_ok=True)
    return path


def _compressed(path: Path) -> Iterator[bytes]:
    """A file's bytes as gzip's."""
    packer = zlib.compressobj(wbits=31)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield packer.compress(chunk)
    yield packer.flush()


def costs(done: profile, n: int) -> list[Cost]:
    """Of each of `n` updates, the largest first: kernels where there is a GPU, operations without what they call elsewhere."""
    events = done.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    if kernels:
        found = [Cost(e.key, e.count / n, e.self_device_time_total / 1e6 / n) for e in kernels]
    else:
        found = [Cost(e.key, e.count / n, e.self_cpu_time_total / 1e6 / n) for e in events]
    return sorted(found, key=lambda cost: cost.seconds, reverse=True)


def table(found: list[Cost], update_s: float) -> Iterator[str]:
    """The largest of an update's costs, then the rest of its time, as lines."""
    yield f"{'ms/update':>9} {'share':>6} {'calls':>6}"
    others, all_s = found[LARGEST:], sum(cost.seconds for cost in found)
    rows = [*found[:LARGEST]]
    if others:
        rows.append(Cost(f"{len(others)} others", sum(c.calls for c in others), sum(c.seconds for c in others)))
    for name, calls, seconds in rows:
        name = " ".join(name.removeprefix("void ").split())
        yield f"{1e3 * seconds:>9.2f} {seconds / update_s:>6.1%} {calls:>6.0f}  {name if len(name) <= 72 else name[:69] + '...'}"
    rest = max(0.0, update_s - all_s)
    yield f"{1e3 * rest:>9.2f} {rest / update_s:>6.1%} {'':>6}  outside of them: Python, data, waiting"
