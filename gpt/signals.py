"""What a process owes the shell: stop requests by signal, exit codes, errors in words. Stdlib only; each verb imports it first."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
USER_ERROR, NON_FINITE, NO_SPACE, PREEMPTED = 2, 4, 5, 75
USER_ERRORS = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)

_requested: str | None = None


class Stopped(Exception):
    """A stop request was obeyed; the message says what was kept and what to run next."""

    exit_code = PREEMPTED


def install() -> None:
    """From now on the first stop signal is remembered, and a second one ends the process at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, _request)


def ignore() -> None:
    """For worker processes: the parent decides when they stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _request(number: int, frame: FrameType | None) -> None:
    global _requested
    if _requested is not None:
        os._exit(PREEMPTED)
    _requested = signal.Signals(number).name


def stop_requested() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return _requested


def check() -> None:
    """Raise Stopped if a stop was requested; for safe points where nothing needs saving."""
    if _requested is not None:
        raise Stopped(f"stopped by {_requested}; run the same command again to continue")


def exit_code(error: BaseException) -> int:
    """What an error means to the shell; 1 is a bug of ours."""
    own = getattr(type(error), "exit_code", None)
    if isinstance(own, int):
        return own
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NO_SPACE
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return NO_SPACE
    if isinstance(error, FloatingPointError):
        return NON_FINITE
    return USER_ERROR if isinstance(error, USER_ERRORS) else 1


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a verb: install the handlers, call `main` with the arguments, print what went wrong in words, exit with its code."""
    install()
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = exit_code(error)
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(_words(error, code), file=sys.stderr)
    sys.exit(code)


def _words(error: Exception, code: int) -> str:
    text = str(error) or type(error).__name__
    if code == 1:
        return f"error: {type(error).__name__}: {text}\nThis is a bug; run again with --debug for the traceback."
    if code == NO_SPACE:
        return f"error: out of disk or memory: {text}\nCheckpoints already written are whole; free some and run the same command again."
    return text if code == PREEMPTED else f"error: {text}"
