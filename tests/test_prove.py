"""The runner of the proofs: what it counts, and that nothing lost goes unsaid."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kills
import prove
import pytest
import runs
import soak
from prove import GUARANTEES, ROOT, Chosen, Proof
from proving import Row
from struck import MOMENTS

TESTED = """
import faults, pytest
def test_counts(): faults.count(7)
def test_is_one(): pass
def test_is_lost():
    faults.count(3)
    assert WRONG == 0
@pytest.mark.skip("not here")
def test_is_skipped(): pass
"""


def proof(guarantees: str, *, tried: int = 3, survived: int = 3) -> Proof:
    return Proof(guarantees, lambda scale, say: [Row(guarantees, "harm", round(tried * scale), survived, 0.5)])


def told(proofs: list[Proof], wanted: list[str]) -> tuple[int, str]:
    """(exit code, what was printed)."""
    lines: list[str] = []
    return prove.prove(proofs, wanted, 1.0, lines.append), "\n".join(lines)


def test_all_that_survives_is_a_row_and_exit_code_0() -> None:
    code, said = told([proof("G1 G2"), proof("G5")], ["G1", "G2", "G5"])
    assert code == 0
    assert "6 faults, 6 survived" in said and "LOST" not in said


def test_one_lost_fault_is_exit_code_1_and_is_named() -> None:
    code, said = told([proof("G1", survived=2), proof("G5")], ["G1", "G5"])
    assert code == 1
    assert "LOST" in said and "1 of 3 lost: harm" in said


def test_a_guarantee_of_which_nothing_was_tried_is_exit_code_1() -> None:
    nothing = Proof("G2", lambda scale, say: [])
    for proofs in ([proof("G1")], [proof("G1"), nothing], [proof("G1"), proof("G2", tried=0, survived=0)]):
        code, said = told(proofs, ["G1", "G2"])
        assert code == 1 and "G2: nothing was tried" in said


def test_a_proof_that_breaks_has_lost_and_the_others_go_on() -> None:
    def broken(scale: float, say: prove.Say) -> list[Row]:
        raise RuntimeError("no such disk")

    code, said = told([Proof("G1", broken), proof("G5")], ["G1", "G5"])
    assert code == 1
    assert "no such disk" in said and "a proof that broke" in said and "harm" in said


def test_only_proofs_of_what_is_wanted_are_tried() -> None:
    code, said = told([proof("G1", survived=0), proof("G5")], ["G5"])
    assert code == 0 and "G1" not in said


def test_every_guarantee_has_a_proof_and_a_place_in_the_documentation() -> None:
    stated = {each for proof in prove.proofs(1.0) for each in proof.guarantees.split()}
    assert stated == set(GUARANTEES)
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [each for each in GUARANTEES if f"| {each} |" not in page] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = [each for row in re.findall(r"^\| (G[G\d,]*) \|", readme, re.M) for each in row.split(",")]
    assert sorted(told) == sorted(GUARANTEES)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_row_of_tests_counts_their_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "counted.py").symlink_to(ROOT / "tests" / "counted.py")
    (tmp_path / "tests" / "faults.py").write_text("tried = 0\ndef count(n=1):\n    global tried\n    tried += n\n")
    (tmp_path / "tests" / "test_x.py").write_text(TESTED.replace("WRONG", str(wrong)))
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    lines: list[str] = []
    (row,) = prove.tested(Chosen("G1", "x", {"test_x.py": ""}), 0.1, lines.append)
    assert (row.tried, row.survived) == (11, 11 - 3 * wrong)
    assert wrong == any("assert 1 == 0" in line for line in lines)
    for file, names in (("test_x.py", "no_such_name"), ("test_gone.py", "")):
        (none,) = prove.tested(Chosen("G1", "x", {file: names}), 0.1, lines.append)
        assert (none.tried, none.survived) == (1, 0), "what selects nothing has lost"
    (tmp_path / "tests" / "test_y.py").write_text("import os\ndef test_is_one(): pass\ndef test_dies(): os._exit(7)\n")
    (dead,) = prove.tested(Chosen("G1", "x", {"test_y.py": ""}), 0.1, lines.append)
    assert (dead.tried, dead.survived) == (2, 1), "what ends the process has lost"


def test_the_tests_that_stand_for_guarantees_are_there() -> None:
    """A test that is renamed must not leave its row."""
    chosen = [pair for each in prove.stated(prove.TESTS) for pair in each.files.items()]
    files = sorted({f"tests/{file}" for file, _ in chosen})
    assert [file for file in files if not (ROOT / file).is_file()] == []
    line = [sys.executable, "-m", "pytest", "--collect-only", *files]
    collected = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=280).stdout
    for file, names in chosen:
        for name in names.split(" or ") if names else []:
            assert any(f"{file}::" in each and name in each for each in collected.splitlines()), (file, name)


def test_a_guarantee_that_there_is_not_is_refused() -> None:
    line = [sys.executable, str(ROOT / "tests" / "prove.py"), "--only", "G1,G20"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "there is no G20" in done.stderr


@pytest.mark.parametrize("moment", [pytest.param(each, marks=pytest.mark.slow) for each in MOMENTS])
def test_each_moment_comes_in_a_run(tmp_path: Path, moment: str) -> None:
    home = runs.prepared(tmp_path / "home")
    later = ("data.path=data/later",)
    needed = {
        "preparation": later,
        "encoding": later,
        "probing": ("train.compile=auto",),
        "compile": ("train.compile=true",),
    }
    line = runs.struck(moment, 1, signal.SIGKILL, "small.yaml", *needed.get(moment, ()))
    assert runs.ended(home, line).code == -signal.SIGKILL


def test_a_run_that_differs_is_lost_if_no_fault_met_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kills, soak):
        monkeypatch.setattr(module, "differences", lambda run, golden: ["a byte"])
    monkeypatch.setattr(kills, "met", lambda *given: (False, "", 1.0))
    monkeypatch.setattr(kills, "ended", lambda *given: runs.Ended(0, "", 1.0, ""))
    assert kills.chain(tmp_path, tmp_path, 1, 1, 1.0, lambda line: None) == (1, 0)
    ended = SimpleNamespace(poll=lambda: 0)
    calm = SimpleNamespace(
        done=Counter(), wrong=[], run=tmp_path, process=ended, disturbed=lambda *given: time.sleep(0.01)
    )
    monkeypatch.setattr(soak, "Soak", lambda *given: calm)
    monkeypatch.setattr(soak, "trained", lambda *given: tmp_path)
    faults, survived = soak.soaked(tmp_path, 0.0005, 20.0, 1, lambda line: None)
    assert faults.total() >= 1 and survived == 0


LAUNCHER = """
import signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def passed_on(*args):
    rank.kill(), rank.wait()
    sys.exit(1)
signal.signal(signal.SIGTERM, passed_on)
print(rank.pid, flush=True)
open("ready", "w").close()
time.sleep(600)
"""


def test_ranks_of_a_command_that_does_not_end_are_gone_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun does, the launcher starts them in sessions of their own; they keep its pipes open."""
    real = runs.begun

    def begun(*given: Any, **environment: str) -> subprocess.Popen[str]:
        process, until = real(*given, **environment), time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < until:
            time.sleep(0.02)
        return process

    monkeypatch.setattr(runs, "begun", begun)
    monkeypatch.setattr(runs, "PATIENCE_S", 1)
    done = runs.ended(tmp_path, [sys.executable, "-c", LAUNCHER])
    assert done.code == runs.TOO_LONG and "it did not end within 1 s" in done.said
    assert (rank := done.printed.strip()) and not Path("/proc", rank).exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_smoke_run_proves_every_guarantee(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "tests" / "prove.py"), "--scale", "0.02"]
    done = subprocess.run(line, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
