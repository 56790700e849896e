"""What would stop a run later is found before its first step, in words, and leaves the run as it was."""

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MemorySplit
from faults import installed
from tiny import trained

from gpt import checkpoint, durable, preflight, settle, signals, trainer
from gpt.durable import CorruptError


def steps_made() -> list[int]:
    path = Path("runs/tiny/metrics.jsonl")
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [line["step"] for line in lines if line["kind"] == "train"]


def test_one_line_says_what_was_checked_and_nothing_of_it_is_left(here: Path) -> None:
    text = trained("train.steps=1")
    (line,) = [line for line in text.splitlines() if line.startswith("preflight")]
    assert re.fullmatch(
        r"preflight: the disk, [\d.k]+B of data, the tokenizer, an update of 4 x 16 tokens a pass, a save; "
        r"[\d.]+ GB of memory at most; (\d+\.\d) s",
        line,
    )
    left = [path.name for path in Path("runs/tiny").rglob("*") if path.name.startswith(".")]
    assert left == [".lock"]
    assert "preflight" not in trained("train.steps=1"), "a finished run has no first step"


def test_it_changes_no_bit_of_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    with monkeypatch.context() as patch:
        patch.setattr(preflight.Preflight, "rehearse", lambda *a: False)
        trained("name=without")
    last = "checkpoints/step_00000012/model.safetensors"
    assert Path("runs/tiny", last).read_bytes() == Path("runs/without", last).read_bytes()


def test_a_probe_of_speed_spares_the_update(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = settle.trial

    def counted(*args: object) -> object:
        made.append(args[5])
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(settle, "trial", counted)
    trained("train.compile=auto", "train.steps=1")
    assert made == [settle.PROBE_UPDATES]
    trained("name=other", "train.steps=1")
    assert made[1:] == [1]


@pytest.mark.parametrize(("slow_s", "expected"), [(1e9, settle.PROBE_UPDATES), (0.0, 2)])
def test_of_slow_updates_two_tell_the_speed(
    here: Path, monkeypatch: pytest.MonkeyPatch, slow_s: float, expected: int
) -> None:
    made: list[int] = []
    real = settle.trial

    def counted(
        config: object, choices: object, objective: object, loader: object, update: Any, *rest: object
    ) -> object:
        def tried(*args: object) -> object:
            made.append(1)
            return update(*args)

        return real(config, choices, objective, loader, tried, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(settle, "PROBE_S", slow_s)
    monkeypatch.setattr(settle, "trial", counted)
    trained("train.compile=auto", "train.steps=1")
    assert len(made) == expected


def test_a_resume_is_checked_too(here: Path) -> None:
    with pytest.raises(signals.Stopped):
        trained(updates=2)
    assert "preflight" in trained()


@pytest.mark.parametrize("room", [0, 20_000])
def test_a_full_disk_is_found_before_the_first_step(here: Path, room: int) -> None:
    class Full(durable.FileSystem):
        left = room

        def write(self, fd: int, data: bytes | memoryview) -> int:
            name = Path(f"/proc/self/fd/{fd}").readlink()
            if "trial" in str(name):
                self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(fd, data)

    with installed(Full()), pytest.raises(OSError, match="No space") as failed:
        trained()
    assert signals.exit_code(failed.value) == signals.NO_SPACE
    assert steps_made() == []
    assert [path.name for path in Path("runs/tiny/checkpoints").iterdir()] == []


def test_too_little_space_for_the_checkpoints_is_found_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"GB are needed, 0.00 GB are free"):
        trained()
    assert steps_made() == []


def test_a_directory_that_cannot_be_written_is_found_before_the_first_step(here: Path) -> None:
    class ReadOnly(durable.FileSystem):
        def open(self, path: Path) -> int:
            if "trial" in path.name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return super().open(path)

    with installed(ReadOnly()), pytest.raises(PermissionError) as failed:
        trained()
    assert signals.exit_code(failed.value) == signals.USER_ERROR
    assert "runs/tiny" in signals.explain(failed.value, signals.USER_ERROR)
    assert steps_made() == []


def test_a_disk_that_gives_back_other_bytes_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "write_file", lambda path, content: path.write_bytes(b"else"))
    with pytest.raises(OSError, match="reads otherwise; check the disk"):
        preflight.check_writing(here)


def test_a_save_that_is_not_what_was_written_is_found_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint._write

    def bent(path: Path, *given: Any) -> dict[str, str]:
        written = real(path, *given)
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "model.safetensors").write_bytes(data)
        return written

    monkeypatch.setattr(checkpoint, "_write", bent)
    with pytest.raises(CorruptError, match="not what was written"):
        trained()
    assert steps_made() == []
    assert list(Path("runs/tiny/checkpoints").iterdir()) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_is_too_large_is_found_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def too_large(*args: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "update", too_large)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"4 rows of 16 tokens .* does not fit.*train.micro_batch.*--plan"
    ) as failed:
        trained()
    assert signals.exit_code(failed.value) == signals.NO_SPACE
    assert json.loads(Path("runs/tiny/status.json").read_text())["state"] == "failed"


def test_a_block_of_data_that_changed_is_found_wherever_it_stands() -> None:
    class Bent(MemorySplit):
        def read(self, start: int, count: int) -> object:
            if start <= 900 < start + count:
                raise CorruptError("not what was written")
            return super().read(start, count) % 50

    class Known:
        padded_size, size = 64, 50

    with pytest.raises(CorruptError):
        preflight.check_split(Bent([1000]), Known())  # type: ignore[arg-type]
    assert preflight.check_split(Bent([800]), Known()) > 0  # type: ignore[arg-type]
    assert preflight.check_split(Bent([]), Known()) == 0  # type: ignore[arg-type]


def test_ids_that_the_tokenizer_does_not_know_are_found() -> None:
    class Small:
        padded_size, size = 64, 50

    with pytest.raises(CorruptError, match="id 100 near token 0, and the tokenizer has 50 entries"):
        preflight.check_split(MemorySplit([100]), Small())  # type: ignore[arg-type]


def test_a_tokenizer_that_loses_text_is_told_of() -> None:
    class Lossy:
        def decode(self, ids: list[int]) -> str:
            return "a b" if ids != [1] else "a_b"

        def encode(self, text: str) -> list[int]:
            return [1]

    assert preflight.lost_by(Lossy(), MemorySplit([10])) == "'a b' becomes 'a_b'"  # type: ignore[arg-type]


def test_a_trial_save_of_a_large_model_writes_a_part_of_it() -> None:
    tensors = {"a": torch.zeros(4), "b": torch.zeros(100), "c": torch.zeros(2)}
    assert list(preflight.portion(tensors, 24)) == ["a", "c"]
    assert list(preflight.portion(tensors, None)) == ["a", "b", "c"]
