"""The real command killed at random moments, any number of times, and then let finish: nothing may differ from the golden run.

python tests/kills.py 30
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from proving import Row
from runs import command, differences, ended, prepared, settings, struck, trained

PER_RUN = 12  # kills of one run, before it may finish
AIMED = {  # moments that are hard to meet by chance, and how often they come at most before the kill
    "import": 1,
    "step": 40,
    "inside a step": 40,
    "save": 4,
    "disk": 140,
    "prune": 2,
    "evaluation": 3,
    "sampling": 1,
}


class Kill(NamedTuple):
    """After some seconds, or, where `moment` says so, when it comes for the nth time."""

    seconds: float
    moment: str = ""
    nth: int = 0


def draw(rng: random.Random, span: float) -> Kill:
    """Half of the kills come at any time of an undisturbed run (`span` seconds), half at moments that are hard to meet so."""
    if rng.random() < 0.5:
        return Kill(rng.uniform(0, span))
    moment, most = rng.choice(list(AIMED.items()))
    return Kill(0.0, moment, rng.randint(1, most))


def met(home: Path, name: str, kill: Kill) -> tuple[bool, str, float]:
    """Run the command with a kill; (whether it met a living process, what was wrong, how long the process was there)."""
    arguments = ("small.yaml", f"name={name}")
    if kill.moment:
        code, said, seconds, _ = ended(home, struck(kill.moment, kill.nth, signal.SIGKILL, *arguments))
    else:
        code, said, seconds, _ = ended(home, command(*arguments), kill_after=kill.seconds)
    if code not in (0, -signal.SIGKILL) or "error" in said:
        return code != 0, f"{kill}: exit code {code}: {said[-600:]}", seconds
    return code != 0, "", seconds


def chain(home: Path, golden: Path, wanted: int, seed: int, span: float, say: Callable[[str], None]) -> tuple[int, int]:
    """(kills that met a living process, those among them whose run ended as `golden` did)."""
    rng = random.Random(seed)
    tried = survived = n_runs = 0
    while tried < wanted:
        n_runs += 1
        name, here, wrong = f"killed-{seed}-{n_runs}", 0, []
        while here < PER_RUN and tried + here < wanted:
            alive, fault, seconds = met(home, name, draw(rng, span))
            # The whole of a run, quicker than `span`: by that, later kills would come too late as well.
            if not alive and here == 0:
                span = min(span, seconds)
            here += alive
            wrong += [fault] if fault else []
            if not alive or fault:
                break
        done = ended(home, command("small.yaml", f"name={name}"))
        wrong += [done.said] if done.code else differences(home / "runs" / name, golden)
        here = max(here, len(wrong) > 0)  # a run that differs is lost, if no kill came in time, too
        say(f"{name}: {here} kills{': ' if wrong else ', no difference'}{'; '.join(wrong)}")
        tried, survived = tried + here, survived + (0 if wrong else here)
        if not wrong:
            shutil.rmtree(home / "runs" / name)
    return tried, survived


def killed(home: Path, n: int, say: Callable[[str], None], processes: int = 2) -> tuple[int, int]:
    """`n` kills of runs in `home`, as many at once as there are cores; the golden run is made first."""
    began = time.monotonic()
    golden = trained(home, "golden")
    span = time.monotonic() - began
    shares = [n // processes + (i < n % processes) for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(lambda i: chain(home, golden, shares[i], i + 1, span, say), range(processes)))
    return sum(tried for tried, _ in results), sum(survived for _, survived in results)


def prove(scale: float, say: Callable[[str], None]) -> list[Row]:
    """300 kills, times `scale`; a tenth as many where the model is compiled."""
    rows = []
    for compile, n, what in (
        ("false", 300, "SIGKILL of the command at random moments"),
        ("true", 20, "the same, compiled"),
    ):
        began = time.monotonic()
        if compile == "true" and scale < 0.5:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            home = prepared(Path(scratch) / "home")
            (home / "small.yaml").write_text(settings(compile))
            tried, survived = killed(home, max(2, round(n * scale)), say)
        rows.append(Row("G1 G2 G7", what, tried, survived, time.monotonic() - began))
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = killed(prepared(Path(scratch) / "home"), int(sys.argv[1]), print)
    print(f"{found[1]} of {found[0]} kills made no difference")
    sys.exit(found[0] != found[1])
