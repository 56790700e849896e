"""What a process owes the shell: stop requests by signal, exit codes, errors in words. Stdlib only; each verb imports it first."""

import argparse
import contextlib
import errno
import gc
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
DONE, BUG, USER_ERROR, NON_FINITE, NO_SPACE, STUCK, PREEMPTED = 0, 1, 2, 4, 5, 6, 75
NO_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)  # the system takes them for no path at all
USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)

# What torch says of a rank that is gone: gloo, NCCL and the store, by the names of their errors or in words only.
LOST_KINDS = ("DistBackendError", "DistNetworkError", "DistStoreError")
LOST_WORDS = "Connection (closed|reset) by peer|Timed out waiting .*(send|recv|operation)|Socket closed|connectFullMesh"
LAST_WORD_S = 0.5  # by which the rank that failed by itself lets the others speak first
ECHO_S = 5.0  # in which a rank may hear of one request twice: of the scheduler, and of torchrun, which passes it on

_requested: str | None = None
_signalled: float | None = None  # when the first signal came
_beats = 0
_at_once = False


class Stopped(Exception):
    """A stop request was obeyed; the message says what was kept and what to run next."""

    exit_code = PREEMPTED


def install() -> None:
    """From now on the first stop signal is remembered, and a second one ends the process at once (of a rank: `ECHO_S` later)."""
    for number in STOP_SIGNALS:
        signal.signal(number, _request)


def ignore() -> None:
    """For worker processes: the parent, which gets the same signals, decides when they stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _request(number: int, frame: FrameType | None) -> None:
    global _requested, _signalled
    now, before = time.monotonic(), _signalled
    if before is not None:
        if now - before >= (ECHO_S if _ranked() else 0.0):
            os._exit(PREEMPTED)
        return
    _signalled, name = now, signal.Signals(number).name
    _requested = _requested or name  # a first signal does not cut short a process that stops of its own accord
    with contextlib.suppress(OSError):  # not print: a handler may interrupt one
        os.write(2, f"\n{name}: stopping at the next safe point; once more stops at once\n".encode())


def _ranked() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def request(reason: str) -> None:
    """Ask this process to stop at its next safe point, as a signal would; a request that was made already stands."""
    global _requested
    _requested = _requested or reason


def stop_requested() -> str | None:
    """What asked this process to stop, the name of a signal mostly, or None."""
    beat()
    return _requested


def beat() -> None:
    """Say that the process moves on; what asks whether it should stop says so too."""
    global _beats
    _beats += 1


def beats() -> int:
    """How often it was said; a watcher sees by it whether anything happens."""
    return _beats


def check() -> None:
    """Raise Stopped if a stop was requested; for safe points where nothing needs saving."""
    beat()
    if _requested is not None:
        raise Stopped(f"stopped by {_requested}; run the same command again to continue")


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers, for flags."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got '{text}'")
        return value

    return parse


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around a verb's imports: what they make stays, so nothing of it is searched for garbage, now or later.

    torch's own takes a seventh less without that, and a full search of what it leaves behind takes a tenth of a second.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def end_with(parent: Any) -> None:
    """This process ends when the one that started it (multiprocessing.parent_process()) does, however that ended."""

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def end_at_once() -> None:
    """The process is to end without the interpreter's own end: torch's threads to other ranks may abort that."""
    global _at_once
    _at_once = True


def exit_code(error: BaseException) -> int:
    """What an error means to the shell."""
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NO_SPACE
    if isinstance(error, OSError) and error.errno == errno.EROFS:  # as a directory without permission
        return USER_ERROR
    # torch.OutOfMemoryError by its name: torch is not imported for the sake of an error
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return NO_SPACE
    if isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", str(error)):
        return NO_SPACE  # torch on a CPU or an Apple GPU says so in words only
    if isinstance(error, FloatingPointError):
        return NON_FINITE
    if lost(error):
        return STUCK
    is_no_name = isinstance(error, OSError) and error.errno in NO_NAMES
    return USER_ERROR if is_no_name or isinstance(error, USER_ERRORS) else BUG


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a verb: install the handlers, call `main` with the arguments, print what went wrong in words, exit with its code."""
    install()
    for name in ("stdin", "stdout", "stderr"):  # a stream that the shell closed is None, which print cannot write to
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    # Before torch loads libgomp: by default its threads spin for long at every barrier, which makes a busy machine many
    # times slower (docs/experiments.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        try:
            code = main(sys.argv[1:]) or DONE
        finally:
            sys.stdout.flush()  # here, where a reader that has left can still be told from a mistake
    except BrokenPipeError:  # the reader of our output has left, as `head` does: nothing went wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = DONE
    except SystemExit:  # argparse has said what it had to
        raise
    except BaseException as error:  # also KeyboardInterrupt, and the panics of Rust libraries, which are no Exceptions
        code = exit_code(Stopped() if isinstance(error, KeyboardInterrupt) else error)
        if "--debug" in sys.argv:
            traceback.print_exc()
        if not secondary(error) and _ranked():
            time.sleep(LAST_WORD_S)
        with contextlib.suppress(OSError):
            print(explain(error, code), file=sys.stderr)
    if _at_once:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def lost(error: BaseException) -> bool:
    """Whether torch says that another rank does not answer."""
    named = any(kind.__name__ in LOST_KINDS for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and re.search(LOST_WORDS, str(error)) is not None)


def secondary(error: BaseException) -> bool:
    """Whether the error only follows from one of another rank, which tells it."""
    return lost(error) or getattr(type(error), "elsewhere", False) is True


def reason(error: BaseException) -> str:
    """The first line of an error, for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def explain(error: BaseException, code: int) -> str:
    """An error for people: what happened and what to do, each further line under the first."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = str(error.filename)
        text = f"{name[:60] + '...' if error.errno == errno.ENAMETOOLONG else name}: {error.strerror}"
    if secondary(error):
        rank = os.environ.get("RANK", "0")
        if code == PREEMPTED:
            return f"rank {rank}: stopped with the others"
        told = "a rank that does not answer" if lost(error) else "another one's error"
        return f"rank {rank}: ended by {told} ({reason(error)})"
    if code == PREEMPTED:
        return "stopped" if isinstance(error, KeyboardInterrupt) else text
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "gpt":
        text = (
            f"{error.name.partition('.')[0]} is not installed for {sys.executable}\nactivate the environment that has it (source "
            ".venv/bin/activate), or install what is needed: pip install -r requirements.txt"
        )
    elif code == BUG:
        text = f"{type(error).__name__}: {text}"
        text += "\nthis is a bug" + ("" if "--debug" in sys.argv else "; run again with --debug for the traceback")
    if code == NO_SPACE:
        text = (
            f"out of disk or memory: {text}\nfinished checkpoints are whole; make room and run the same command again"
        )
    return "error: " + textwrap.indent(text, "       ").lstrip()
