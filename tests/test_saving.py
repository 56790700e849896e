"""Saving beside the training: what is saved is the state of its step, and nothing of a save's promises changes by it."""

import errno
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FAULTS, Failing, Killed, Unsynced, every_sync_watched, failed, installed, n_operations
from teams import blocks, load_weights, on_all
from torch import Tensor

from gpt import durable, runtime
from gpt.checkpoint import ALONE, Checkpoints, load_optimizer, load_state, owners, verify
from gpt.saving import Writer
from gpt.team import Team
from gpt.watchdog import Watchdog

LAST = 4
REST: dict[str, Any] = {"model_files": {"config.json": b"{}"}, "run_yaml": "name: x\n"}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with installed(Unsynced()):
        yield


def mute(line: str) -> None: ...


def tensors(step: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"embed": (7, 4), "norm": (4,)}.items()}


def begin(writer: Writer, saves: Checkpoints, step: int, weights: Mapping[str, Tensor], **changes: Any) -> None:
    """Save `weights`, and averages that follow from them; of several ranks each its share."""
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    owner, rank = owners(sizes, writer.team.size), writer.team.rank
    averages = {f"{name}:exp_avg": 0.5 * tensor for name, tensor in weights.items()}
    given: dict[str, Any] = {
        "weights": {name: tensor for name, tensor in weights.items() if owner[name] == rank},
        "sizes": sizes,
        "optimizer": blocks(averages, (writer.team.size, 1))[rank],
        "state": {"step": step},
        "before": lambda: None,
        "after": lambda: saves.prune(1, whole=step),
        **REST,
    }
    writer.begin(saves.path(step), **given | changes)


def train(directory: Path, team: Team = ALONE, *, background: bool = True) -> None:
    """A run in small: continues from the newest checkpoint to step LAST; each state depends on the one before."""
    saves = Checkpoints(directory, keep=1)
    with team.together():
        if team.first:
            directory.mkdir(parents=True, exist_ok=True)
            saves.sweep()
    latest = saves.latest(team)
    with team.together():
        if team.first:
            saves.prune(best=1)  # it may have been stopped between a save and this
    start, weights = (load_state(latest)["step"], load_weights(latest)) if latest else (0, tensors())
    with Writer(team, background=background, say=mute) as writer:
        for step in range(start + 1, LAST + 1):
            for name, tensor in weights.items():  # in place, while the step before is being written
                tensor.mul_(0.9).add_(step + len(name))
            begin(writer, saves, step, weights)


def result(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def golden(directory: Path, size: int) -> tuple[int, dict[str, bytes]]:
    """(operations, every file) of a run that nothing disturbs and that waits for each save."""
    n = n_operations(lambda: on_all(size, lambda team: train(directory, team, background=False)))
    files = result(directory)
    assert {name.split("/")[0] for name in files} == {"step_00000001", f"step_{LAST:08d}"}
    return n, files


def ended_early(k: int, fault: BaseException, directory: Path, size: int) -> bool:
    """A run with a fault at operation k; whether it was noticed."""
    return failed(k, fault, lambda: on_all(size, lambda team: train(directory, team)))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_written_beside_the_training_or_not_the_bytes_are_the_same(tmp_path: Path, size: int) -> None:
    _, expected = golden(tmp_path / "waiting", size)
    with every_sync_watched():
        on_all(size, lambda team: train(tmp_path / "beside", team))
    assert result(tmp_path / "beside") == expected


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_whose_background_save_fails_at_any_operation_ends_with_the_same_bytes(
    tmp_path: Path, fault: BaseException, size: int, stride: int
) -> None:
    n, expected = golden(tmp_path / "golden", size)
    for k in range(1, n + 1, stride):
        directory = tmp_path / str(k)
        noticed = ended_early(k, fault, directory, size)
        saves = Checkpoints(directory, keep=1)
        for step in saves.steps():
            verify(saves.path(step))
        assert max(saves.steps(), default=0) >= (k - 1) * LAST // n - 1
        assert noticed or result(directory) == expected, "what fails is said, unless it was only a cleaning up"
        on_all(size, lambda team: train(directory, team))  # noqa: B023 (called at once)
        assert result(directory) == expected


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_is_killed_again_while_it_recovers_ends_with_the_same_bytes(
    tmp_path: Path, size: int, stride: int
) -> None:
    n, expected = golden(tmp_path / "golden", size)
    for pair in range(0, n * 12, stride):
        directory = tmp_path / str(pair)
        ended_early(pair // 12 + 1, Killed(), directory, size)
        ended_early(pair % 12 + 1, Killed(), directory, size)  # in what a recovery does first
        on_all(size, lambda team: train(directory, team))  # noqa: B023 (called at once)
        assert result(directory) == expected


class Held(Unsynced):
    """Writes nothing until it is let."""

    def __init__(self) -> None:
        self.let = threading.Event()

    def write(self, fd: int, data: bytes | memoryview) -> int:
        assert self.let.wait(60)
        return super().write(fd, data)


def test_what_is_saved_is_the_state_of_the_step_although_training_goes_on(tmp_path: Path) -> None:
    saves, weights, slow = Checkpoints(tmp_path, keep=2), tensors(), Held()
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    with installed(slow), Writer(say=mute) as writer:
        begin(writer, saves, 1, weights)
        for tensor in weights.values():
            tensor.fill_(7)
        assert saves.steps() == [], "training did not wait"
        slow.let.set()
    found = load_weights(saves.path(1))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(load_optimizer(saves.path(1))["norm:exp_avg"], 0.5 * expected["norm"])


def test_the_room_of_a_copy_is_kept_from_save_to_save_and_one_write_waits_for_another(tmp_path: Path) -> None:
    saves, weights, order, places = Checkpoints(tmp_path, keep=2), tensors(), [], []
    with Writer(say=mute) as writer:
        for step in (1, 2):
            begin(
                writer,
                saves,
                step,
                weights,
                before=lambda: (time.sleep(0.1), order.append("begins")),
                after=lambda: order.append("ends"),
            )
            places.append([room.data_ptr() for room in writer._room.values()])
        begin(writer, saves, 3, weights | {"norm": torch.ones(9)})
    assert places[0] == places[1]
    assert order == ["begins", "ends"] * 2
    assert load_weights(saves.path(3))["norm"].shape == (9,)


def test_what_a_write_met_is_raised_by_the_next_check_and_once(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, keep=2)
    with Writer(say=mute) as writer:
        writer.check()
        with installed(Failing(3, OSError(errno.ENOSPC, "no space left"))):
            begin(writer, saves, 1, tensors())
            writer._thread.join()
        with pytest.raises(OSError, match="no space left"):
            writer.check()
        writer.check()
        begin(writer, saves, 1, tensors())
    assert saves.steps() == [1]


def test_a_weight_that_is_not_finite_is_found_before_anything_is_written(tmp_path: Path) -> None:
    saves, weights = Checkpoints(tmp_path, keep=2), tensors()
    weights["embed"][3, 1] = torch.nan
    with Writer(say=mute) as writer:
        with pytest.raises(FloatingPointError, match="embed holds numbers that are not finite"):
            begin(writer, saves, 1, weights)
        assert writer._thread is None
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_block_goes_before_and_the_write_in_flight_is_finished(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, keep=2)
    with pytest.raises(RuntimeError, match="of the step"), Writer(say=mute) as writer:
        begin(writer, saves, 1, tensors(), before=lambda: time.sleep(0.1))
        raise RuntimeError("of the step")
    assert saves.steps() == [1]


@pytest.mark.parametrize("background", [True, False])
def test_what_one_rank_meets_all_raise_and_the_checkpoint_before_stays(tmp_path: Path, background: bool) -> None:
    saves = Checkpoints(tmp_path, keep=1)

    def work(team: Team) -> None:
        def full() -> None:
            if team.rank == 1:
                raise OSError(errno.ENOSPC, "no space left")

        with Writer(team, background=background, say=mute) as writer:
            begin(writer, saves, 1, tensors(1))
            begin(writer, saves, 2, tensors(2), before=full)

    with pytest.raises(OSError, match="no space left"):
        on_all(3, work)
    verify(saves.path(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_others_go_only_when_every_rank_has_seen_that_its_own_files_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, real = Checkpoints(tmp_path, keep=1), durable.sha256_file
    monkeypatch.setattr(
        durable,
        "sha256_file",
        lambda path: "bad" if "optimizer-00001" in path.name and "2" in path.parent.name else real(path),
    )

    def work(team: Team) -> None:
        with Writer(team, say=mute) as writer:
            for step in (1, 2):
                begin(writer, saves, step, tensors(step))

    with pytest.raises(durable.CorruptError, match=r"optimizer-00001-of-00002\.safetensors is not what was written"):
        on_all(2, work)
    assert saves.steps() == [1, 2]


def test_without_memory_for_a_copy_training_waits_and_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "free_memory_bytes", lambda device: 100)
    said: list[str] = []
    saves = Checkpoints(tmp_path, keep=2)
    with Writer(say=said.append) as writer:
        for step in (1, 2):
            begin(writer, saves, step, tensors(step))
            assert saves.steps()[-1] == step
    assert len(said) == 1 and "training waits for each save" in said[0]


def test_ranks_of_one_machine_share_its_memory_and_all_wait_where_one_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's copy would fit alone; both would not."""
    saves, said = Checkpoints(tmp_path, keep=2), []
    n_bytes = 2 * sum(tensor.nbytes for tensor in tensors().values())  # weights and averages of all ranks
    monkeypatch.setattr(runtime, "free_memory_bytes", lambda device: n_bytes)  # of which 0.8 may be taken
    for n_local, background in ((1, True), (2, False)):
        monkeypatch.setattr(runtime, "local_world_size", lambda: n_local)  # noqa: B023 (called at once)

        def work(team: Team) -> bool:
            with Writer(team, say=said.append) as writer:
                begin(writer, saves, n_local, tensors())  # noqa: B023 (called at once)
                return writer._thread is not None

        assert on_all(2, work) == [background] * 2
    assert len(said) == 2 and all("training waits for each save" in line for line in said)


def test_a_copy_that_one_rank_cannot_make_is_every_rank_s_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, real = Checkpoints(tmp_path, keep=2), Writer._copies

    def copies(writer: Writer, *given: Any) -> Any:
        if writer.team.rank == 1:
            raise MemoryError("no memory to pin")
        return real(writer, *given)

    monkeypatch.setattr(Writer, "_copies", copies)

    def work(team: Team) -> None:
        with Writer(team, say=mute) as writer:
            begin(writer, saves, 1, tensors())

    with pytest.raises(MemoryError, match="no memory to pin"):
        on_all(2, work)
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_hear_of_a_failed_write_while_training_goes_on_and_pay_nothing_when_all_is_written(
    tmp_path: Path,
) -> None:
    saves = Checkpoints(tmp_path, keep=2)

    def failing(team: Team) -> None:
        def full() -> None:
            if team.rank == 1:
                raise OSError(errno.ENOSPC, "no space left")

        with Writer(team, say=mute) as writer:
            begin(writer, saves, 1, tensors(), before=full)
            for _ in range(600):  # steps
                writer.check()
                time.sleep(0.1)
            raise AssertionError("never said")

    with pytest.raises(OSError, match="no space left"):
        on_all(2, failing)

    def whole(team: Team) -> None:
        with Writer(team, say=mute) as writer:
            begin(writer, saves, 1, tensors())
            writer._thread.join()
            while writer._thread is not None:
                writer.check()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(team), "gather", None)
                writer.check()

    on_all(1, whole)


def test_a_watchdog_learns_how_long_a_save_takes_and_is_patient_with_who_waits_for_it(tmp_path: Path) -> None:
    saves, watch, slow = Checkpoints(tmp_path, keep=2), Watchdog(None, tmp_path / "stacks", mute), Held()
    patience: list[int] = []

    def let() -> None:
        until = time.monotonic() + 20
        while watch._patient == before and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        patience.append(watch._patient)
        slow.let.set()

    before = watch._patient
    with installed(slow), Writer(say=mute, watch=watch) as writer:
        begin(writer, saves, 1, tensors())
        threading.Thread(target=let).start()
        writer.wait()
    assert patience == [before + 1] and watch._patient == before
    assert watch._save_s > 0.25


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from gpt import durable, signals
from gpt.checkpoint import Checkpoints
from gpt.saving import Writer

class Slow(durable.FileSystem):
    def write(self, fd, data):
        print("writing", flush=True)
        time.sleep(60)

def main(argv):
    saves = Checkpoints(Path(sys.argv[1]), 2)
    with Writer(say=print) as writer:
        for step, fs in ((1, durable.fs), (2, Slow())):
            writer.wait()
            durable.fs = fs
            writer.begin(saves.path(step), weights={"x": torch.ones(9)}, optimizer={}, before=lambda: None, after=lambda: None,
                         model_files={}, run_yaml="", state={})
        {END}
signals.run(main)
"""


@pytest.mark.parametrize(
    ("end", "kills", "code"),
    [("time.sleep(60)", ["SIGKILL"], -9), ("writer.wait()", ["SIGTERM", "SIGTERM"], 75), ("os._exit(1)", [], 1)],
    ids=["killed", "told twice to stop", "ended at once"],
)
def test_a_process_that_ends_while_it_writes_leaves_the_checkpoint_before(
    tmp_path: Path, end: str, kills: list[str], code: int
) -> None:
    program = [sys.executable, "-c", KILLED.replace("{END}", end), str(tmp_path)]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if kills:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
        for nth, kill in enumerate(kills):
            if nth:  # when the one before was heard: two at once could come as one
                assert process.stderr is not None and any(
                    "stopping at the next safe point" in line for line in process.stderr
                )
            process.send_signal(getattr(signal, kill))
        assert process.wait(30) == code
    saves = Checkpoints(tmp_path, keep=2)
    assert saves.steps() == [1]
    verify(saves.path(1))
    saves.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
