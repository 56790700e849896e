"""Try to break every guarantee of docs/reliability.md, and print what was tried and what survived.

    python tests/prove.py [--scale F] [--only G1,G5] [--minutes M]

One row a proof: the guarantees it stands for, what was done, faults tried, faults survived, seconds. The exit code is 0 only if
all survived and every guarantee has a row.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from proving import Row

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 2
GUARANTEES = [f"G{i}" for i in range(1, 20)]
Say = Callable[[str], None]
Prover = Callable[[float, Say], list[Row]]


class Proof(NamedTuple):
    guarantees: str
    prove: Prover
    apart: bool = False  # in processes of its own, so that two may go on at a time


# Guarantees that tests prove as they stand: what they try, and where. A name selects every test that contains it, none all.
TESTS = """
G1 G2: disk operations of save, prune and recovery broken
    test_checkpoint.py whatever_fails or any_operation or while_it_recovers
G2: disk operations of files, directories and metrics broken
    test_durable.py operation or publishing or synced
    test_run.py whatever_fails
G10: disk operations of data preparation broken
    test_prepare.py broken
    test_shards.py whole_or_absent
G10: data prepared by 1, 2, 3 workers, in parts, killed
    test_prepare.py one_process or parts_made_apart or killed_command or mixed_recipe
G3: bytes of checkpoints and shards changed
    test_checkpoint.py changed_file or damaged or corrupt
    test_shards.py flipped or damage or cut
G4: losses, gradients and weights not finite
    test_trainer.py finite
    test_checkpoint.py finite
    test_bad_numbers.py
G6: a second process on one run, a lock kept by the dead
    test_train.py second_process
    test_durable.py lock
    test_run.py in_use
G7: interrupted after each step, five times in a row
    test_trainer.py stopped_run_continues or five_times
G8 G9: updates of any number of ranks compared with those of one
    test_parallel.py ranks
G8: the order of samples, asked for in any order
    test_data.py same_in_any_order or rows_of_a_batch or target_once
G11: code that could load code, in every file of the package
    test_architecture.py run_code or gate
    test_run.py no_model
G12: mistakes of users and malformed files
    test_mistakes.py
    test_tokenizer.py refused or panic
    test_config.py mutilated
G13: control tokens spelled in text
    test_tokenizer.py control
    test_chat.py control
    test_prepare.py control
G14: names and links that lead out of a directory
    test_checkpoint.py leaves_its_directory
    test_durable.py leave_its_directory
    test_shards.py linked
    test_hub.py link_out
    test_run.py leave_the_runs
G15: what wandb and the network are told
    test_log.py secret or look_at_nothing or public or unless_asked
G16: a tracker that fails, hangs or is absent
    test_log.py failing or absent or waited_for or detaches or console_that_is_gone
G17: settings unknown, twice, mistyped
    test_config.py
G18: another tokenizer, data set, shape or seed on resume
    test_trainer.py refused
    test_settle.py refused or another_run
    test_resume.py refused or allowed or identity
G19: every end has its exit code and words
    test_signals.py
    test_mistakes.py disk or processes_end or may_not_grow
"""


class Chosen(NamedTuple):
    guarantees: str
    what: str
    files: dict[str, str]


def stated(text: str) -> Iterator[Chosen]:
    for block in re.split(r"\n(?=G)", text.strip()):
        first, *rest = block.splitlines()
        guarantees, _, what = first.partition(": ")
        yield Chosen(
            guarantees, what, {file: names for file, _, names in (line.strip().partition(" ") for line in rest)}
        )


def tested(tests: Chosen, scale: float, say: Say) -> list[Row]:
    """A row from tests: those of each file whose names match; the slow ones from scale 0.2 on."""
    began, found = time.monotonic(), []
    guarantees, what, files = tests
    for file, names in files.items():
        with tempfile.TemporaryDirectory() as scratch:
            to = Path(scratch) / "counted"
            line = [sys.executable, "-m", "pytest", "-p", "counted", "--counted", str(to), "-q", f"tests/{file}"]
            line += ["-k", names] * (names != "") + ["-m", "not gpu" if scale >= 0.2 else "not gpu and not slow"]
            told = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT / "tests")}
            done = subprocess.run(line, cwd=ROOT, env=told, capture_output=True, text=True)
            lines = [json.loads(each) for each in to.read_text().splitlines()] if to.exists() else []
        if done.returncode or not lines:
            say(f"{what}: {file}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            if all(each["passed"] for each in lines):  # it ended half way, or before its first test
                lines.append({"test": file, "tried": 1, "passed": False})
        found += lines
    tried = sum(each["tried"] for each in found)
    survived = sum(each["tried"] for each in found if each["passed"])
    return [Row(guarantees, what, tried, survived, time.monotonic() - began)]


def module(name: str, **options: object) -> Prover:
    """`prove` of tests/NAME.py."""

    def prove(scale: float, say: Say) -> list[Row]:
        return importlib.import_module(name).prove(scale, say, **options)

    return prove


def proofs(minutes: float) -> list[Proof]:
    """Every proof, the quick ones first."""

    def of_tests(tests: Chosen) -> Proof:
        return Proof(tests.guarantees, lambda scale, say: tested(tests, scale, say), apart=True)

    return [
        *(of_tests(each) for each in stated(TESTS)),
        Proof("G11 G12 G14", module("hostile")),
        Proof("G12", module("fuzz")),
        Proof("G2 G3", module("mutations")),
        Proof("G16", module("trackers")),
        Proof("G2 G19", module("disks")),
        Proof("G1 G5 G8 G9 G19", module("stops")),
        Proof("G1 G2 G7", module("kills")),
        Proof("G1 G2 G3 G5", module("soak", minutes=minutes)),
    ]


def attempted(proof: Proof, scale: float, say: Say) -> list[Row]:
    """Its rows; a proof that itself breaks has lost its fault."""
    began = time.monotonic()
    try:
        return proof.prove(scale, say)
    except Exception:
        say(traceback.format_exc())
        return [Row(proof.guarantees, "a proof that broke", 1, 0, time.monotonic() - began)]


def table(rows: Sequence[Row]) -> Iterator[str]:
    widest = max([len(row.what) for row in rows] + [20])
    yield f"{'guarantees':16} {'what was done':{widest}} {'tried':>7} {'survived':>9} {'seconds':>8}"
    for row in rows:
        lost = "" if row.tried == row.survived else "   LOST"
        yield f"{row.guarantee:16} {row.what:{widest}} {row.tried:7} {row.survived:9} {row.seconds:8.0f}{lost}"


def verdict(rows: Sequence[Row], wanted: Sequence[str]) -> list[str]:
    """What is missing for a proof of the guarantees `wanted`."""
    lost = [f"{row.tried - row.survived} of {row.tried} lost: {row.what}" for row in rows if row.tried != row.survived]
    proved = {each for row in rows if row.tried for each in row.guarantee.split()}
    return lost + [f"{each}: nothing was tried" for each in wanted if each not in proved]


def prove(found: Sequence[Proof], wanted: Sequence[str], scale: float, say: Say) -> int:
    """Try the proofs of the guarantees `wanted`, print the table; the exit code."""
    rows: list[Row] = []
    began = time.monotonic()
    chosen = [proof for proof in found if set(proof.guarantees.split()) & set(wanted)]

    def attempt(proof: Proof) -> list[Row]:
        return attempted(proof, scale, lambda line: say(f"  {line}"))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ahead = {id(proof): pool.submit(attempt, proof) for proof in chosen if proof.apart}
        for proof in chosen:
            for row in ahead[id(proof)].result() if proof.apart else attempt(proof):
                rows.append(row)
                say(f"{row.guarantee}: {row.what}: {row.survived} of {row.tried}, {row.seconds:.0f} s")
    say("")
    for line in table(rows):
        say(line)
    missing = verdict(rows, wanted)
    tried = sum(row.tried for row in rows)
    say(
        f"\n{tried} faults, {sum(row.survived for row in rows)} survived, {(time.monotonic() - began) / 60:.1f} minutes"
    )
    for line in missing:
        say(line)
    return 1 if missing else 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="how many faults, 1 being all; 0.02 is a smoke run")
    parser.add_argument(
        "--only", default=",".join(GUARANTEES), metavar="G1,G5", help="guarantees to try, all by default"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long the soak lasts, times the scale")
    args = parser.parse_args(argv)
    wanted = args.only.split(",")
    if unknown := [each for each in wanted if each not in GUARANTEES]:
        parser.error(f"there is no {', '.join(unknown)}; guarantees are G1 to G19")
    return prove(proofs(args.minutes), wanted, args.scale, partial(print, flush=True))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
