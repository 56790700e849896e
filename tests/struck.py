"""train.py, which sends itself a signal when a moment comes for the nth time. What it does is otherwise the command's own.

    python tests/struck.py MOMENT NTH SIGNAL RANK train.py's arguments

Under torchrun the rank RANK is struck, and only before the first restart.
"""

import os
import signal
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpt import signals

KILLED = "struck by SIGKILL\n"  # the last words of what was
MOMENTS = (
    "import",
    "preparation",
    "encoding",
    "compile",
    "probing",
    "preflight",
    "step",
    "inside a step",
    "save",
    "disk",
    "prune",
    "evaluation",
    "sampling",
)


# Updates that only try how fast a choice is, or whether one fits, are no steps.
TRIED = {"probing": True, "step": False, "inside a step": False}


class OnImport(MetaPathFinder):
    def __init__(self, strike: Callable[[], None]) -> None:
        self.strike = strike

    def find_spec(self, name: str, *others: Any) -> None:
        if name == "torch":
            self.strike()


def before(owner: Any, name: str, strike: Callable[[], None]) -> None:
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        strike()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def arm(moment: str, nth: int, number: int) -> None:
    """From now on the signal comes when `moment` does for the nth time."""
    assert moment in MOMENTS, moment
    seen = trials = 0

    def strike() -> None:
        nonlocal seen
        if moment in TRIED and (trials > 0) != TRIED[moment]:
            return
        seen += 1
        if seen == nth:
            if (
                number == signal.SIGKILL
            ):  # of which nothing else tells for sure: another rank may be named as the first to fail
                os.write(2, KILLED.encode())
            os.kill(os.getpid(), number)

    def tried(*args: Any) -> Any:
        nonlocal trials
        trials += 1
        try:
            return trial(*args)
        finally:
            trials -= 1

    if moment == "import":
        sys.meta_path.insert(0, OnImport(strike))
        return
    import torch

    from gpt import durable, evaluate, optim, preflight, prepare, session, settle, trainer, workers

    trial, settle.trial = settle.trial, tried
    places: dict[str, list[tuple[Any, str]]] = {
        "preparation": [(prepare.tokenizers, "train")],
        "encoding": [(workers.Meter, "advance")],
        "compile": [(torch, "compile")],
        "probing": [(optim.Optimizer, "step")],
        "preflight": [(preflight.Preflight, "rehearse")],
        "step": [(trainer, "update")],
        "inside a step": [(optim.Optimizer, "step")],  # between the gradients and the update
        "save": [(session.Session, "save")],
        "disk": [(durable.fs, each) for each in ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmtree")],
        "prune": [(durable.fs, "rmtree")],
        "evaluation": [(evaluate, "validation_batches")],
        "sampling": [(session, "complete")],
    }
    for owner, name in places[moment]:
        before(owner, name, strike)


def main(argv: list[str]) -> None:
    moment, nth, number, rank, *arguments = argv
    mine = os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if mine:
        arm(moment, int(nth), int(number))
    import train

    train.main(arguments)


if __name__ == "__main__":
    signals.run(main)
