"""The processes of one run, as torchrun starts them: who they are, and what they tell each other.

Words travel as JSON through gloo, on CPUs, whatever carries the gradients: torch's own calls for objects are pickles.
"""

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
from torch import distributed

from gpt import runtime, signals

STORE_S = 5.0  # that a word in the store may take
POLL_S = 0.02  # between two looks for the other ranks


class Elsewhere(Exception):
    """Another rank failed, and says so itself; `code` is the exit code of what it met."""

    elsewhere = True

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True)
class Team:
    """The ranks of one run; of one process each call answers at once. Every rank must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    group: Any = None  # distributed.ProcessGroup of gloo

    @classmethod
    @contextmanager
    def joined(cls, patience_s: float, device: str = "cpu") -> Iterator[Self]:
        """The team of this process for as long as the block runs; a rank that is silent for `patience_s` has failed.

        What stands on a GPU travels through NCCL, all else through gloo.
        """
        if (size := runtime.world_size()) == 1:
            yield cls()
            return
        patience, cuda = timedelta(seconds=patience_s), device.startswith("cuda")
        if device == "cuda":
            torch.cuda.set_device(runtime.local_rank())
        signals.end_at_once()
        store, rank, size = _met(patience)
        fresh = distributed.PrefixStore(_agreed(store, rank, size, patience_s), store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        distributed.init_process_group(backend, timeout=patience, store=fresh, rank=rank, world_size=size)
        team, failed = cls(rank, size, distributed.group.WORLD), False
        try:
            yield team
        except BaseException as error:
            failed = True
            if not signals.secondary(error) and _told_already(fresh, error):
                raise Elsewhere(str(error), signals.exit_code(error)) from error
            raise
        finally:
            if not (failed and cuda):  # NCCL's own end waits for all ranks, and some may never come to theirs
                distributed.destroy_process_group()
            object.__setattr__(team, "group", None)  # torch ends its threads with the last that holds it

    def aside(self, patience_s: float) -> "Team":
        """The same ranks on a line of their own, for a thread of each: what is said there meets nothing that is said here."""
        if self.size == 1:
            return self
        return Team(self.rank, self.size, distributed.new_group(backend="gloo", timeout=timedelta(seconds=patience_s)))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, by rank: anything that JSON can say."""
        text = json.dumps(value).encode()
        if self.size == 1:
            return [json.loads(text)]
        length = torch.tensor([len(text)])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        distributed.all_gather(lengths, length, group=self.group)
        longest = max(int(each) for each in lengths)
        mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(texts, mine, group=self.group)
        return [json.loads(each.numpy().tobytes()) for each in texts]

    def told(self, value: Any) -> Any:
        """What rank 0 gave."""
        return self.gather(value if self.first else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What any rank raises in the block all raise when each has come to its end: itself its own error, others Elsewhere.

        Nothing in the block may wait for another rank.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        told = None if error is None else [str(error) or type(error).__name__, signals.exit_code(error)]
        try:
            said = self.gather(told)
        except Exception as gone:
            if error is not None:  # what others do not hear any more is still what happened here
                raise error from gone
            raise
        if error is not None:
            raise error
        for rank, each in enumerate(said):
            if each is not None:
                raise Elsewhere(f"rank {rank}: {each[0]}", each[1])


def _told_already(store: Any, error: BaseException) -> bool:
    """Whether another rank says the same as this error: what all ranks meet alike, one of them tells."""
    word = hashlib.sha256(f"{type(error).__name__}: {error}".encode()).hexdigest()
    try:
        store.set_timeout(timedelta(seconds=STORE_S))
        return bool(store.add(f"told/{word}", 1) > 1)
    except RuntimeError:  # who kept the store is gone
        return False


def _met(patience: timedelta) -> tuple[Any, int, int]:
    """(the store of all ranks, this one's number, how many there are). Stopped if asked to: torch waits for the others where
    no signal is heard, so a thread does that, and ends with the process.
    """
    met: Future[tuple[Any, int, int]] = Future()

    def meet() -> None:
        try:
            met.set_result(next(distributed.rendezvous("env://", timeout=patience)))
        except Exception as error:
            met.set_exception(error)

    threading.Thread(target=meet, daemon=True).start()
    while not wait([met], POLL_S).done:
        signals.check()
    return met.result()


def _agreed(store: Any, rank: int, size: int, patience_s: float) -> str:
    """A word that the ranks of this attempt share, and no rank of an attempt before: torchrun gives restarted ranks the store
    of those that died, where gloo would find addresses at which nobody listens any more.

    Rank 0 says whom it sees until each has said that it is seen. Elsewhere if they do not come, Stopped if asked to.
    """
    until, own, word = time.monotonic() + patience_s, secrets.token_hex(8), secrets.token_hex(8)
    store.set(f"here/{rank}", own)
    while time.monotonic() < until:
        signals.check()
        if rank == 0 and store.check([f"here/{i}" for i in range(size)]):
            present = [store.get(f"here/{i}").decode() for i in range(size)]
            store.set("present", json.dumps([word, *present]))
            seen = [store.get(f"seen/{i}").decode() if store.check([f"seen/{i}"]) else "" for i in range(1, size)]
            if seen == [word] * (size - 1):
                return word
        elif rank and store.check(["present"]):
            said, *present = json.loads(store.get("present"))
            if present[rank] == own:
                store.set(f"seen/{rank}", said)
                return str(said)
        time.sleep(POLL_S)
    raise Elsewhere(
        f"the other ranks did not come within {patience_s:g} s: was torchrun started for all {size}?", signals.STUCK
    )
