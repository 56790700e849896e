"""What would stop a run hours later, tried before its first step: the disk, the data, the tokenizer, memory, a save.

Everything is tried on scratch names and throw-away state: when it is over the run is as it was.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gpt import durable, runtime, settle, signals
from gpt.checkpoint import save
from gpt.data import Data, Loader
from gpt.log import thousands
from gpt.loss import Objective
from gpt.optim import Optimizer
from gpt.parts import Parts
from gpt.run import RunDirectory
from gpt.settle import TrainConfig
from gpt.shards import Tokens
from gpt.slices import Slice
from gpt.team import Elsewhere
from gpt.tokenizer import Tokenizer

T = TypeVar("T", Tensor, Slice)
SPOTS = 8  # places of a split that are read, each with the MiB around it
SPOT_TOKENS = 256
ENOUGH = 256 << 20  # bytes of weights, and of optimizer state, that a trial save writes at most


class Preflight:
    """The checks of one start, and what they took. Made, it has tried the disk, the data and the tokenizer."""

    def __init__(self, run: RunDirectory, data: Data, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.checked: list[str] = []
        self.seconds = 0.0
        with self._clock():
            check_writing(run.path)
            n_bytes = sum(
                check_split(tokens, data.tokenizer) for part in data.parts for tokens in (part.train, part.val)
            )
            self.checked += ["the disk", f"{thousands(n_bytes)}B of data"]
            if (lost := lost_by(data.tokenizer, data.parts[0].val)) is None:
                self.checked.append("the tokenizer")
            else:
                say(f"warning: the tokenizer does not give back the text that it cut: {lost}")

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds += time.monotonic() - start

    def rehearse(
        self,
        objective: Objective,
        loader: Loader,
        update: settle.Update,
        state: Any,
        contents: Callable[..., dict[str, Any]],
        parts: Parts,
        config: TrainConfig,
        optimizer: Optimizer | None,
    ) -> bool:
        """Make an update of full size, unless `optimizer` just did, and save what it leaves; whether the weights moved.

        Memory that is short is an OutOfMemoryError with what to do, a disk that is full an OSError. Says all that was checked.
        """
        choices, moves = config.choices, optimizer is None
        assert choices is not None
        if state.step >= choices.steps:  # there is no first step
            return False
        with self._clock():
            if optimizer is None:
                optimizer = self._updated(config, objective, loader, update, parts)
            team = parts.ranks.team
            path = Path(team.told(str(durable.scratch(self.run.checkpoints, "trial"))))
            try:
                save(path, team, **contents(config, objective.model, optimizer, state, most=ENOUGH))
            except (FloatingPointError, Elsewhere) as error:  # the first step will say so, where it is true
                if signals.exit_code(error) != signals.NON_FINITE:
                    raise
            finally:
                if team.first and path.exists():
                    with suppress(OSError):  # swept later
                        durable.fs.rmtree(path)
        row = settle.row_length(config)
        self.checked += [f"an update of {choices.micro_batch} x {row} tokens a pass", "a save"]
        peak = runtime.peak_memory_bytes(choices.device) / 1e9
        self.say(f"preflight: {', '.join(self.checked)}; {peak:.2f} GB of memory at most; {self.seconds:.1f} s")
        return moves

    def _updated(
        self, config: TrainConfig, objective: Objective, loader: Loader, update: settle.Update, parts: Parts
    ) -> Optimizer:
        """The optimizer of one update with the run's own choices, which moves weights and leaves gradients to nobody."""
        choices = config.choices
        assert choices is not None
        try:
            return settle.trial(config, choices, objective, loader, update, 1, 0.0, parts)[1]
        except (MemoryError, torch.OutOfMemoryError) as error:
            less = "a smaller train.micro_batch, " if choices.micro_batch > 1 else ""
            raise torch.OutOfMemoryError(
                f"an update of {choices.micro_batch} rows of {settle.row_length(config)} tokens a pass does not fit "
                f"({signals.reason(error)}): {less}train.checkpointing=full or a smaller model; --plan shows what fits"
            ) from None


def check_writing(directory: Path) -> None:
    """OSError unless a file can be written, read back and deleted in `directory`."""
    path, content = durable.scratch(directory, "trial"), b"preflight\n"
    durable.write_file(path, content)
    same = path.read_bytes() == content
    durable.fs.unlink(path)
    if not same:
        raise OSError(f"{directory}: a file that was written there reads otherwise; check the disk")


def check_split(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """Read some places of a split, whose blocks are checked by that; how many bytes they hold.

    CorruptError for a block that is not what was written, and for ids that the tokenizer does not know.
    """
    count, places = min(tokens.n_tokens, SPOT_TOKENS), {0}
    if count == 0:
        return 0
    places |= {(tokens.n_tokens - count) * i // (SPOTS - 1) for i in range(SPOTS)}
    for start in sorted(places):
        signals.check()
        largest = int(tokens.read(start, count).max())
        if largest >= tokenizer.padded_size:
            raise durable.CorruptError(
                f"{tokens.path}: id {largest} near token {start}, and the tokenizer has {tokenizer.size} entries; prepare the "
                "data set again"
            )
    width = torch.iinfo(torch.int16).bits // 8 if tokenizer.padded_size <= 1 << 16 else 4
    return min(len(places) * durable.BLOCK, tokens.n_tokens * width)


def lost_by(tokenizer: Tokenizer, tokens: Tokens) -> str | None:
    """The beginning of a held-out text that is another one when it is cut into tokens and put together again; None if it is not."""
    text = tokenizer.decode(tokens.read(0, min(tokens.n_tokens, SPOT_TOKENS)).tolist()).rstrip("\ufffd")
    try:
        again = tokenizer.decode(tokenizer.encode(text))
    except ValueError as error:
        return str(error)
    return None if again == text else f"{text[:40]!r} becomes {again[:40]!r}"


def portion(tensors: Mapping[str, T], most: int | None) -> dict[str, T]:
    """The first of `tensors`, or blocks of some, up to `most` bytes; all without a limit."""
    whole = {name: held.tensor if isinstance(held, Slice) else held for name, held in tensors.items()}
    return {
        name: tensors[name] for name in within({name: t.numel() * t.element_size() for name, t in whole.items()}, most)
    }


def within(sizes: Mapping[str, int], most: int | None) -> dict[str, int]:
    """The first of `sizes` that make no more than `most` together; all without a limit."""
    kept: dict[str, int] = {}
    for name, size in sizes.items():
        if most is None or sum(kept.values()) + size <= most:
            kept[name] = size
    return kept
