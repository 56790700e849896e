"""Processes as torchrun starts them, on this machine: each runs the same lines, and says what it found as JSON."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    fixed = {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "0",
    }
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {name: str(value) for name, value in told.items()} | fixed | {"PYTHONPATH": path}


def start(command: Sequence[str], size: int, cwd: Path = ROOT, **environ: str) -> list[subprocess.Popen[str]]:
    """`size` processes of one run; `finished` waits for them."""
    port = int(environ.get("MASTER_PORT") or free_port())
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    return [
        subprocess.Popen(list(command), env=environment(rank, size, port) | environ, start_new_session=True, **pipes)
        for rank in range(size)
    ]


def finished(
    running: Sequence[subprocess.Popen[str]], timeout_s: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """How each ended; none is left behind, however this does."""
    try:
        ended = [(process, *process.communicate(timeout=timeout_s)) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in ended]


def run(
    command: Sequence[str], size: int, cwd: Path = ROOT, timeout_s: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """The same command in `size` processes of one run, of which rank 0 keeps what they tell each other."""
    return finished(start(command, size, cwd), timeout_s)


def launched(command: Sequence[str], size: int, cwd: Path, timeout_s: float) -> list[subprocess.CompletedProcess[str]]:
    """As `run`, but this process keeps it, as torchrun does, so that no rank's end cuts short what another would look up."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return finished(start(command, size, cwd, MASTER_PORT=str(store.port), **agent), timeout_s)


# As the commands end (signals.run): torch's threads to other ranks may abort the interpreter's own end.
ENDED = "import os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def found(code: str, size: int, timeout_s: float = 120) -> list[Any]:
    """What `code`, a function's body with `team` at hand, returns on each of `size` ranks, as JSON; AssertionError with what
    a rank said if it failed."""
    program = f"import json\nfrom gpt.team import Team\ndef work(team):\n{textwrap.indent(code, '    ')}\n"
    program += "with Team.joined(60) as team:\n    print('\\n' + json.dumps(work(team)))\n" + ENDED
    compilers = ["ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"]  # torch's own, of itself
    warnings = [flag for what in ("error", *compilers) for flag in ("-W", what)]
    ended = run([sys.executable, *warnings, "-c", program], size, timeout_s=timeout_s)
    for rank, each in enumerate(ended):
        assert each.returncode == 0, f"rank {rank}: {each.stderr[-3000:]}"
    return [json.loads(each.stdout.splitlines()[-1]) for each in ended]
