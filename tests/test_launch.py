"""configs/launch/slurm.sh, under programs that stand in for Slurm's: what each rank is told, and when the job is queued again."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "configs" / "launch" / "slurm.sh"
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
for SLURM_PROCID in 0 1 2 3; do
    export SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % 2))
    "$@" || code=$?
done
[ -z "$WRITES" ] || touch runs/big/status.json
exit ${code:-0}
"""
SCONTROL = """#!/bin/sh
case $1 in show) printf 'node7\\nnode8\\n' ;; requeue) echo "$2" >> requeued ;; esac
"""
PYTHON = """#!/bin/sh
echo "$RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> ranks
exit "$EXIT"
"""


def submitted(
    home: Path, *settings: str, code: int, state: str, text: str = "", stale: bool = False
) -> tuple[int, list[str], bool]:
    """(exit code of the job, what each rank was told, whether it was queued again) where the run ends with `code`.

    `text` stands in the settings file; runs/big is what its status speaks of: written by this job, or `stale`.
    """
    (home / "configs").mkdir()
    (home / settings[0]).write_text(text)
    for name, lines in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        program = home / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(lines)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    status = home / "runs" / "big" / "status.json"
    status.parent.mkdir(parents=True)
    status.write_text(json.dumps({"state": state, "step": 7, "reason": ""}) + "\n")
    os.utime(status, (1e9, 1e9))
    slurm = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    told = (
        os.environ
        | slurm
        | {"EXIT": str(code), "WRITES": "" if stale else "yes", "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    )
    done = subprocess.run(["bash", str(SCRIPT), *settings], cwd=home, env=told, timeout=60)
    assert [each.name for each in (home / "runs").iterdir()] == ["big"], "its mark is gone"
    return done.returncode, (home / "ranks").read_text().splitlines(), (home / "requeued").exists()


@pytest.mark.parametrize(
    ("code", "state", "stale", "again"),
    [
        (75, "preempted", False, True),
        (143, "preempted", False, True),  # srun ended the slower ranks
        (0, "done", False, False),
        (4, "failed", False, False),
        (137, "running", False, False),
        (2, "preempted", True, False),  # refused before it began: the status is that of the job before
        (75, "preempted", True, False),  # and srun ended the other ranks, whose code is higher
        (137, "preempted", True, False),
        (143, "preempted", True, False),
    ],
)
def test_a_job_is_queued_again_only_when_its_run_was_preempted(
    tmp_path: Path, code: int, state: str, stale: bool, again: bool
) -> None:
    ended, _, requeued = submitted(tmp_path, "configs/big.yaml", "optim.lr=0.1", code=code, state=state, stale=stale)
    assert (ended, requeued) == (code, again)


def test_every_task_is_told_its_rank_and_where_the_first_one_is(tmp_path: Path) -> None:
    _, ranks, _ = submitted(tmp_path, "configs/x.yaml", "name=big", code=75, state="preempted")
    assert ranks == [f"{rank} {rank % 2} 2 4 node7 24242 train.py configs/x.yaml name=big" for rank in range(4)]
    assert (tmp_path / "requeued").read_text() == "4242\n"


@pytest.mark.parametrize("text", ["name: big  # of all\nseed: 1\n", "seed: 1\nname: 'big'\n"])
def test_the_run_s_name_may_stand_in_its_settings(tmp_path: Path, text: str) -> None:
    assert submitted(tmp_path, "configs/x.yaml", code=75, state="preempted", text=text)[2]


@pytest.mark.parametrize("script", sorted((ROOT / "configs" / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_the_shell_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
