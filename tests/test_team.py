import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ranks import ENDED
from torch import distributed

from gpt import signals, team
from gpt.team import Elsewhere, Team

ROOT = Path(__file__).resolve().parent.parent


def launched(code: str, size: int) -> list[subprocess.CompletedProcess[str]]:
    """Run `code` in `size` processes as torchrun would start them; `team` is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    program = (
        f"from gpt.team import Elsewhere, Team\nwith Team.joined(60) as team:\n{textwrap.indent(code, '    ')}{ENDED}"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | told | {"RANK": str(rank)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    ended = [(process, *process.communicate()) for process in running]
    return [subprocess.CompletedProcess(process.args, process.returncode, out, err) for process, out, err in ended]


def test_a_team_of_one_hears_itself() -> None:
    with Team.joined(60) as team:
        assert team.first and team.size == 1
        assert team.gather({"a": [1, None]}) == [{"a": [1, None]}]
        assert team.told("x") == "x"
        with team.together():
            pass


def test_a_team_of_one_raises_its_own_error() -> None:
    with pytest.raises(FloatingPointError, match="not finite"), Team().together():
        raise FloatingPointError("not finite")


def test_ranks_hear_each_other_and_all_raise_what_one_raises() -> None:
    code = """\
import json
said = team.gather({"rank": team.rank, "text": "é" * team.rank * 9})
first = team.told(f"rank {team.rank}")
try:
    with team.together():
        if team.rank == 1:
            raise FloatingPointError("not finite")
    raised = None
except (Elsewhere, FloatingPointError) as error:
    raised = [type(error).__name__, str(error), getattr(error, "exit_code", None)]
print(json.dumps([said, first, raised]))
"""
    ended = launched(code, 3)
    assert [each.returncode for each in ended] == [0, 0, 0], ended[0].stderr
    answers = [json.loads(each.stdout) for each in ended]
    for rank, (said, first, raised) in enumerate(answers):
        assert said == [{"rank": i, "text": "é" * i * 9} for i in range(3)]
        assert first == "rank 0"
        elsewhere = ["Elsewhere", "rank 1: not finite", 4]
        assert raised == (["FloatingPointError", "not finite", None] if rank == 1 else elsewhere)
    assert Elsewhere("x", 4).exit_code == 4


def test_ranks_started_again_agree_on_a_word_whatever_dead_ones_left_in_their_store() -> None:
    store = distributed.HashStore()

    def agreed(late: int) -> list[str]:
        """What three ranks agree on, of which one comes late."""

        def joins(rank: int) -> str:
            time.sleep(0.3 * (rank == late))
            return team._agreed(store, rank, 3, 20)

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(joins, range(3)))

    words = [agreed(late) for late in (0, 1, 2, 0)]
    assert all(len(set(each)) == 1 for each in words)
    assert len({each[0] for each in words}) == len(words), "no attempt's word is another's"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waited_in_vain_says_so_as_one_that_others_failed(rank: int) -> None:
    store = distributed.HashStore()
    store.set("here/0", "of an attempt before")
    store.set("here/1", "of an attempt before")
    with pytest.raises(Elsewhere, match=r"did not come within 0.2 s.*all 2\?") as raised:
        team._agreed(store, rank, 2, 0.2)
    assert signals.secondary(raised.value) and signals.exit_code(raised.value) == signals.STUCK
