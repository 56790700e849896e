import errno
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ranks
from torch import distributed

from gpt import signals, team
from gpt.team import Elsewhere, Team


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


def test_an_error_that_cannot_be_told_any_more_is_still_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(team: Team, value: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Team, "gather", gone)
    with pytest.raises(OSError, match="No space left") as raised, Team().together():
        raise OSError(errno.ENOSPC, "No space left on device")
    assert signals.exit_code(raised.value) == signals.NO_SPACE and isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="closed by peer"), Team().together():
        pass


def test_a_stop_is_heard_while_the_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def rendezvous(*args: object, **how: object) -> Iterator[tuple[object, int, int]]:
        over.wait(60)
        yield distributed.HashStore(), 0, 2

    monkeypatch.setattr(distributed, "rendezvous", rendezvous)
    monkeypatch.setattr(signals, "_at_once", False)
    monkeypatch.setattr(signals, "_requested", "SIGTERM")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(signals.Stopped, match="SIGTERM"), Team.joined(60):
        pass
    over.set()
    with pytest.raises(signals.Stopped, match="SIGTERM"):
        team._agreed(distributed.HashStore(), 0, 2, 60)


def test_ranks_hear_each_other_and_all_raise_what_one_raises() -> None:
    code = """\
from gpt.team import Elsewhere
said = team.gather({"rank": team.rank, "text": "é" * team.rank * 9})
first = team.told(f"rank {team.rank}")
try:
    with team.together():
        if team.rank == 1:
            raise FloatingPointError("not finite")
    raised = None
except (Elsewhere, FloatingPointError) as error:
    raised = [type(error).__name__, str(error), getattr(error, "exit_code", None)]
return [said, first, raised]
"""
    for rank, (said, first, raised) in enumerate(ranks.found(code, 3)):
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
