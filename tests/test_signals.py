"""What a process owes the shell, tried on real processes."""

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gpt import signals

ROOT = Path(__file__).resolve().parent.parent


def verb(body: str) -> list[str]:
    """A command whose main(argv) is `body`."""
    source = "import sys, os, time, errno\nfrom gpt import signals\ndef main(argv):\n"
    return [sys.executable, "-c", source + textwrap.indent(textwrap.dedent(body), "    ") + "\nsignals.run(main)"]


def outcome(body: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*verb(body), *flags], cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


def started(body: str) -> subprocess.Popen[str]:
    """A verb that has said "ready" and runs."""
    process = subprocess.Popen(verb(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def handlers():
    """Leaves this process's handlers and stop request as they were."""
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    signals._requested = signals._signalled = None
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_first_signal_is_remembered_and_obeyed_at_the_next_safe_point(handlers, capfd, number):
    signals.install()
    signals.check()
    assert signals.stop_requested() is None
    os.kill(os.getpid(), number)
    assert signals.stop_requested() == number.name
    assert number.name in capfd.readouterr().err
    with pytest.raises(signals.Stopped, match=f"{number.name}.*same command"):
        signals.check()


def test_a_second_signal_ends_the_process_at_once():
    process = started("print('ready', flush=True)\nwhile True: time.sleep(0.01)")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None, "one signal must not end it"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    process.communicate()


def test_a_first_signal_does_not_cut_short_what_a_request_without_one_began_to_save():
    process = started(
        "signals.request('the end of its time')\nprint('ready', flush=True)\nwhile True: time.sleep(0.01)"
    )
    process.send_signal(signal.SIGUSR1)  # as a scheduler's warning, which comes while the run is being saved already
    time.sleep(0.3)
    assert process.poll() is None, "it is the first signal"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    process.communicate()


def test_a_rank_that_hears_of_one_request_twice_still_saves(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = started(
        """
        import signal
        heard = []
        signals.ECHO_S = 3600.0
        signal.signal(signal.SIGTERM, lambda *given: (signals._request(*given), heard.append(1)))
        print('ready', flush=True)
        for n in (1, 2):
            while len(heard) < n: time.sleep(0.01)
            print('heard', flush=True)
        signals.ECHO_S = 0.0
        print('later', flush=True)
        while True: time.sleep(0.01)
        """
    )
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "heard\n"
    process.send_signal(signal.SIGTERM)  # torchrun's, after the scheduler's
    assert [process.stdout.readline() for _ in range(2)] == ["heard\n", "later\n"], "it goes on"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    process.communicate()


def test_an_obeyed_request_exits_75_and_says_what_to_run_next():
    process = started("print('ready', flush=True)\nwhile True: time.sleep(0.01); signals.check()")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "run the same command again" in err
    assert "Traceback" not in err and "error" not in err


def test_a_worker_that_ignores_signals_outlives_them():
    process = started(
        "signals.ignore()\nprint('ready', flush=True)\nfor _ in range(50): time.sleep(0.01)\nprint('finished')"
    )
    for number in signals.STOP_SIGNALS:
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "finished\n")


@pytest.mark.parametrize(
    ("statement", "code", "words"),
    [
        ("return None", 0, ""),
        ("return 7", 7, ""),
        ("raise ValueError('n_head (12) is odd')", 2, "error: n_head (12) is odd"),
        ("open('no/such/file')", 2, "error: no/such/file: No such file or directory"),
        ("os.mkdir('gpt')", 2, "error: gpt: File exists"),
        ("open('gpt')", 2, "error: gpt: Is a directory"),
        ("open('x' * 5000)", 2, f"error: {'x' * 60}...: File name too long\n"),
        ("raise OSError(errno.ELOOP, 'Too many levels of symbolic links', 'x')", 2, "error: x: Too many levels"),
        ("raise FloatingPointError('loss is nan')", 4, "error: loss is nan"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'x.bin')",
            5,
            "out of disk or memory: x.bin: No space",
        ),
        ("raise OSError(errno.EFBIG, 'File too large')", 5, "out of disk or memory: [Errno 27] File too large"),
        ("raise OSError(errno.EROFS, 'Read-only file system', 'runs/x')", 2, "error: runs/x: Read-only file system"),
        ("raise MemoryError", 5, "out of disk or memory: MemoryError"),
        ("raise type('OutOfMemoryError', (RuntimeError,), {})('GPU full')", 5, "out of disk or memory: GPU full"),
        ("raise type('Corrupt', (ValueError,), {'exit_code': 3})('x.tok: altered')", 3, "error: x.tok: altered"),
        (
            "raise KeyError('k')",
            1,
            "error: KeyError: 'k'\n       this is a bug; run again with --debug for the traceback",
        ),
        ("import numpyy.sub", 1, "error: numpyy is not installed for "),
        ("import gpt.absent", 1, "error: ModuleNotFoundError: No module named 'gpt.absent'\n       this is a bug"),
        ("raise type('PanicException', (BaseException,), {})('rust')", 1, "error: PanicException: rust"),
        ("raise KeyboardInterrupt", 75, "stopped"),
    ],
)
def test_every_end_has_its_exit_code_and_its_words(statement, code, words):
    result = outcome(statement)
    assert result.returncode == code
    assert result.stderr.startswith(words) or words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback_as_well():
    result = outcome("raise ValueError('bad')", "--debug")
    assert result.returncode == 2
    assert "Traceback" in result.stderr and result.stderr.endswith("error: bad\n")


def test_the_lines_of_a_longer_message_stand_under_each_other():
    assert outcome("raise ValueError('a.yaml:1: x\\na.yaml:2: y')").stderr == "error: a.yaml:1: x\n       a.yaml:2: y\n"


def test_bad_flags_keep_the_parsers_own_exit():
    result = outcome("import argparse; argparse.ArgumentParser(prog='v').parse_args(argv)", "--nonsense")
    assert result.returncode == 2
    assert "unrecognized arguments: --nonsense" in result.stderr


def test_a_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        verb("for _ in range(100000): print('text')"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_error_that_a_full_disk_causes_is_told_from_other_io_errors():
    assert signals.exit_code(OSError(errno.EDQUOT, "quota")) == 5
    assert signals.exit_code(OSError(errno.EIO, "bad disk")) == 1


def test_a_request_without_a_signal_is_obeyed_and_does_not_replace_an_earlier_one(handlers):
    signals.request("the end of the job's time")
    signals.request("another")
    with pytest.raises(signals.Stopped, match="stopped by the end of the job's time"):
        signals.check()


def test_every_safe_point_is_a_sign_of_life():
    before = signals.beats()
    signals.check()
    assert signals.beats() == before + 1


@pytest.mark.parametrize(
    ("statement", "code", "words"),
    [
        (
            "from gpt.team import Elsewhere; raise Elsewhere('rank 0: disk full\\nmore', 5)",
            5,
            "rank 3: ended by another one's error (rank 0: disk full)\n",
        ),
        (
            "from gpt.team import Elsewhere; raise Elsewhere('rank 0: stopped by SIGTERM at step 7', 75)",
            75,
            "rank 3: stopped with the others\n",
        ),
        (
            "raise RuntimeError('[gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:9')",
            6,
            "rank 3: ended by a rank that does not answer ([gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:9)\n",
        ),
    ],
)
def test_a_rank_that_ends_because_of_another_says_one_short_line(monkeypatch, statement, code, words):
    monkeypatch.setenv("RANK", "3")
    result = outcome(statement)
    assert (result.returncode, result.stderr) == (code, words)


def test_what_imports_leave_behind_is_searched_for_garbage_neither_then_nor_later():
    try:
        before = gc.get_freeze_count()
        with signals.loading():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
    with pytest.raises(ImportError), signals.loading():
        raise ImportError
    assert gc.isenabled()
