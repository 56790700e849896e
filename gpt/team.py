"""The processes of one run, as torchrun starts them: who they are, and what they tell each other.

Words travel as JSON through gloo, on CPUs, whatever carries the gradients: torch's own calls for objects are pickles.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
from torch import distributed

from gpt import runtime, signals


class Elsewhere(Exception):
    """Another rank failed, and says so itself; `code` is the exit code of what it met."""

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
    def joined(cls, patience_s: float) -> Iterator[Self]:
        """The team of this process for as long as the block runs; a rank that is silent for `patience_s` has failed."""
        if (size := runtime.world_size()) == 1:
            yield cls()
            return
        distributed.init_process_group("gloo", timeout=timedelta(seconds=patience_s))
        try:
            yield cls(distributed.get_rank(), size, distributed.group.WORLD)
        finally:
            distributed.destroy_process_group()

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
        said = self.gather(told)
        if error is not None:
            raise error
        for rank, each in enumerate(said):
            if each is not None:
                raise Elsewhere(f"rank {rank}: {each[0]}", each[1])
