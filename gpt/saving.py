"""Saving beside the training: one copy of what is saved, and a thread that writes it while the next updates are made.

Nothing of the order changes with it: a checkpoint appears whole, is verified, and only then do others go.
"""

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gpt import runtime
from gpt.checkpoint import ALONE, check_finite, save
from gpt.slices import Slice
from gpt.team import Team
from gpt.watchdog import Watchdog

PATIENCE_S = 3600.0  # for the slowest rank's disk; one that has died is noticed at once
SPARE = 0.8  # of the free memory, what a copy may take


class Writer:
    """Writes a run's checkpoints, one at a time; every rank makes the same calls.

    What fails is raised on all ranks by the next `check` or `wait`, and at the latest when the `with` block ends, which
    waits for what is in flight. An error of the block itself goes before. `watch` learns how long a save takes, and has
    patience with who waits for one.
    """

    def __init__(
        self,
        team: Team = ALONE,
        *,
        background: bool = True,
        say: Callable[[str], None],
        watch: Watchdog | None = None,
    ) -> None:
        self.team, self._say, self._background, self._watch = team, say, background, watch
        self._aside = team.aside(PATIENCE_S)  # what the threads say must not meet what the loop says
        self._room: dict[str, Tensor] = {}  # copies, kept from save to save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        path: Path,
        *,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor | Slice],
        before: Callable[[], None],
        after: Callable[[], None],
        **rest: Any,
    ) -> None:
        """`checkpoint.save`, of what the tensors hold now: they may change when this returns.

        Each rank does `before` first; the first rank does `after`, when the checkpoint is durable and verified on all.
        FloatingPointError, here and not later, for weights that are not finite.
        """
        self.wait()
        with self.team.together():
            check_finite(path, weights)
        if self._background and self._fits(weights, optimizer):
            with self.team.together():  # or threads of the others would wait for one that never begins
                weights, optimizer = self._copies(weights, optimizer)
            job = (path, weights, optimizer, before, after, rest)
            self._thread = threading.Thread(target=self._try, args=job, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(path, weights, optimizer, before, after, rest)

    def _try(self, *job: Any) -> None:
        try:
            self._write(*job)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the copies, and the threads' line
            self._error = error

    def _write(
        self,
        path: Path,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor | Slice],
        before: Callable[[], None],
        after: Callable[[], None],
        rest: dict[str, Any],
    ) -> None:
        began = time.monotonic()
        with self._aside.together():
            before()
        save(path, self._aside, weights=weights, optimizer=optimizer, **rest)
        with self._aside.together():
            if self.team.first:
                after()
        if self._watch is not None:
            self._watch.expect_saves(time.monotonic() - began)

    def check(self) -> None:
        """Raise what a write in flight met, if it met something on any rank by now.

        It costs a word between the ranks, and nothing once they know that all of it is written.
        """
        if self._thread is None:  # on every rank or on none
            return
        told = self.team.gather([not self._thread.is_alive(), self._error is not None])
        if all(over for over, _ in told) or any(failed for _, failed in told):
            self.wait()

    def wait(self) -> None:
        """Wait for the write in flight, and raise what it met."""
        self._join()
        error, self._error = self._error, None
        with self.team.together():
            if error is not None:
                raise error

    def _join(self) -> None:
        if self._thread is not None:
            with self._watch.patient() if self._watch is not None else nullcontext():
                self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        else:  # the other ranks may be anywhere, so there is nobody to talk to
            self._join()
        self._room.clear()
        self._aside = (
            ALONE  # torch ends its threads with the line: any that is left when Python ends may abort the process
        )

    # The copy

    def _fits(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor | Slice]) -> bool:
        """Whether every rank has memory for its copy, beside those of its neighbours, or has it already."""
        given = [*weights.values(), *(_tensor(value) for value in optimizer.values())]
        more = sum(map(_room_of, given)) - sum(map(_room_of, self._room.values()))
        free, each = runtime.free_memory_bytes("cpu"), min(runtime.local_world_size(), self.team.size)
        first = self.team.rank // each * each  # of those on this machine, as torchrun numbers them
        here = sum(self.team.gather(more)[first : first + each])
        lacking = [short for short in self.team.gather([here, free] if here > SPARE * free else None) if short]
        if not lacking:
            return True
        needed, free = lacking[0]
        self._say(
            f"saving: a copy to write in the background needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: training"
            " waits for each save (checkpoint.background=false says so from the start)"
        )
        self._background = False
        return False

    def _copies(
        self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor | Slice]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | Slice]]:
        """The same in memory of our own, complete when this returns."""
        before, self._room = self._room, {}

        def copy(key: str, tensor: Tensor) -> Tensor:
            room = before.get(key)
            if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._room[key] = room.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            return room

        copied = {name: copy(f"weight {name}", tensor) for name, tensor in weights.items()}
        blocks: dict[str, Tensor | Slice] = {}
        for name, value in optimizer.items():
            room = copy(f"state {name}", _tensor(value))
            blocks[name] = value._replace(tensor=room) if isinstance(value, Slice) else room
        for device in {str(t.device) for t in (*weights.values(), *map(_tensor, optimizer.values()))}:
            runtime.synchronize(device)
        return copied, blocks


def _room_of(tensor: Tensor) -> int:
    """Bytes that a copy takes. Memory that a GPU writes to is given out in powers of two."""
    n_bytes = tensor.numel() * tensor.element_size()
    return 1 << (n_bytes - 1).bit_length() if n_bytes and (tensor.is_cuda or tensor.is_pinned()) else n_bytes


def _tensor(value: Tensor | Slice) -> Tensor:
    return value.tensor if isinstance(value, Slice) else value
