"""SIGTERM to the real command in each phase, alone and to one of two ranks under torchrun; a rank killed and all started again.

python tests/stops.py
"""

import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proving import Row
from ranks import free_port
from runs import command, differences, ended, prepared, settings, struck, torchrun, trained
from struck import KILLED

STEPS = 34
PHASES = {  # the moment, which time it comes, the step that is saved then, and what the command is told besides
    "import": ("import", 1, 0, ()),
    "data preparation": ("preparation", 1, 0, ("data.path=data/later",)),
    "probing": ("probing", 1, 0, ("train.compile=auto",)),
    "preflight": ("preflight", 1, 0, ()),
    "first step": ("inside a step", 1, 1, ()),
    "training": ("inside a step", 8, 8, ()),
    "evaluation": ("evaluation", 2, 20, ()),
    "sampling": ("sampling", 1, 30, ()),
    "save": ("save", 2, 10, ()),
}
OBEYED = re.compile(r"exitcode\s*: 75")  # as torchrun tells of a rank, when it ends with 1 itself
RANK_KILLS = {"mid-step": ("inside a step", 12), "mid-save": ("save", 2), "mid-evaluation": ("evaluation", 2)}


def small(scratch: Path) -> Path:
    home = prepared(scratch / "home")
    (home / "small.yaml").write_text(settings(steps=STEPS))
    return home


def stopped(home: Path, golden: Path, phase: str, ranks: int) -> str:
    """Stop a new run in a phase, let the same command finish; what was wrong, "" if nothing."""
    moment, nth, step, more = PHASES[phase]
    run = home / "runs" / f"stopped-{phase.replace(' ', '-')}-{ranks}"
    arguments = ("small.yaml", f"name={run.name}", *more)
    rank = 0 if phase == "sampling" else ranks - 1  # samples are rank 0's
    first, again = struck(moment, nth, signal.SIGTERM, *arguments, rank=rank), command(*arguments)
    if ranks > 1:
        first, again = torchrun(first, ranks=ranks), torchrun(again, ranks=ranks)
    for later in (home / "data" / "later", home / "data" / ".later.preparing"):
        shutil.rmtree(later, ignore_errors=True)
    code, said, seconds, _ = ended(home, first)
    if code != (75 if ranks == 1 else 1) or (ranks > 1 and not OBEYED.search(said)):
        return f"exit code {code} after {seconds:.0f} s: {said[-600:]}"
    if "Traceback (most recent call last)" in said and ranks == 1:
        return said
    status = run / "status.json"
    told = json.loads(status.read_text()) if status.is_file() else {"state": "preempted", "step": 0}
    # Ranks agree upon a stop along with their gradients: what comes behind that is heard in the next step.
    step += ranks > 1 and moment == "inside a step"
    if (told["state"], told["step"]) != ("preempted", step):
        return f"status.json says {told['state']} at step {told['step']}, not preempted at {step}"
    done = ended(home, again)
    return done.said[-600:] if done.code else "; ".join(differences(run, golden))


def restarted(home: Path, golden: Path, when: str) -> str:
    """Kill rank 1 of two at a moment; torchrun starts both again. What was wrong, "" if nothing."""
    moment, nth = RANK_KILLS[when]
    run = home / "runs" / f"restarted-{when}"
    line = struck(moment, nth, signal.SIGKILL, "small.yaml", f"name={run.name}", rank=1)
    code, said, *_ = ended(home, torchrun(line, "--standalone", "--max-restarts=3"))
    if code:
        return f"exit code {code}: {said[-600:]}"
    if KILLED not in said:
        return "rank 1 was not killed"
    return "; ".join(differences(run, golden))


def two_nodes(home: Path, golden: Path) -> str:
    """Two torchruns, each with one rank and an address of its own, as two machines have; what was wrong."""
    port, run = free_port(), home / "runs" / "two-nodes"
    line = command("small.yaml", f"name={run.name}")
    nodes = []
    for rank in range(2):
        flags = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}")
        nodes.append(torchrun(line, *flags, f"--local-addr=127.0.0.{rank + 1}", ranks=1))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ended, home, nodes[1])
        code, said, *_ = ended(home, nodes[0])
        codes = (code, other.result().code)
    return f"exit codes {codes}: {said[-600:]}" if any(codes) else "; ".join(differences(run, golden))


def row(guarantees: str, what: str, attempts: dict[str, Callable[[], str]], say: Callable[[str], None]) -> Row:
    began, survived = time.monotonic(), 0
    for name, attempt in attempts.items():
        wrong = attempt()
        survived += not wrong
        say(f"{what}: {name}: {wrong or 'no difference'}")
    return Row(guarantees, what, len(attempts), survived, time.monotonic() - began)


def prove(scale: float, say: Callable[[str], None]) -> list[Row]:
    """Nine phases on one rank, eight on two, rank 1 killed at three moments, two nodes; below scale 0.2 three phases on one."""
    rows = []
    phases = list(PHASES) if scale >= 0.2 else ["import", "save", "sampling"]
    with tempfile.TemporaryDirectory() as scratch:
        home = small(Path(scratch))
        golden = trained(home, "golden")
        alone = {phase: lambda phase=phase: stopped(home, golden, phase, 1) for phase in phases}
        rows.append(row("G5 G19", "SIGTERM in a phase, 1 rank", alone, say))
        if scale < 0.2:
            say("ranks: left out of a smoke run")
            return rows
        golden = trained(home, "golden-2", torchrun(command("small.yaml")))
        # Under torchrun a data set is not prepared: that is done before, by one process.
        both = {p: lambda p=p: stopped(home, golden, p, 2) for p in phases if p != "data preparation"}
        rows.append(row("G5 G8", "SIGTERM to one of 2 ranks in a phase", both, say))
        kills = {when: lambda when=when: restarted(home, golden, when) for when in RANK_KILLS}
        rows.append(row("G1 G8", "rank 1 of 2 killed, torchrun starts again", kills, say))
        rows.append(row("G8", "two nodes on two addresses", {"127.0.0.1": lambda: two_nodes(home, golden)}, say))
        canonical = canonical_runs(home)
        rows.append(row("G9", "canonical sums on 1, 2 and 4 ranks", canonical, say))
    return rows


def canonical_runs(home: Path) -> dict[str, Callable[[], str]]:
    """The same run on two and four ranks, against one."""
    line = command("small.yaml", "parallel.canonical=true", "train.micro_batch=2")

    def log(ranks: int) -> bytes:
        name = f"canonical-{ranks}"
        return (trained(home, name, line if ranks == 1 else torchrun(line, ranks=ranks)) / "metrics.jsonl").read_bytes()

    alone: list[bytes] = []

    def same(ranks: int) -> str:
        alone[:] = alone or [log(1)]
        return "" if log(ranks) == alone[0] else "the logs differ"

    return {f"{ranks} ranks": lambda ranks=ranks: same(ranks) for ranks in (2, 4)}


if __name__ == "__main__":
    found = prove(1.0, print)
    print(*found, sep="\n")
    sys.exit(any(each.tried != each.survived for each in found))
