"""One command at a time in the working directory, whatever the others do; what is needed to continue stays."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpt import durable, signals, workplace

ROOT = Path(__file__).resolve().parent.parent


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def test_the_directory_goes_when_there_is_nothing_to_continue_from(tmp_path: Path) -> None:
    out = tmp_path / "set"
    for error in (ValueError("a mistake"), signals.Stopped("stopped"), OSError(28, "no space")):
        with pytest.raises(type(error)), workplace.held(out) as work:
            (work / "documents").touch()
            raise error
        assert names(tmp_path) == []


@pytest.mark.parametrize(("file", "stays"), [("set/tokenizer.json", (0, 1, 2)), ("pass.json", (1, 2))])
def test_finished_work_stays_unless_it_was_for_a_mistake(tmp_path: Path, file: str, stays: tuple[int, ...]) -> None:
    errors = (ValueError("a mistake"), signals.Stopped("stopped"), OSError(28, "no space"))
    for i, error in enumerate(errors):
        out = tmp_path / f"{i}"
        with pytest.raises(type(error)), workplace.held(out) as work:
            (work / file).parent.mkdir(exist_ok=True)
            (work / file).touch()
            raise error
        assert workplace.name_of(out).exists() == (i in stays)


def test_what_crashes_left_beside_a_data_set_goes_with_the_directory(tmp_path: Path) -> None:
    out = tmp_path / "set"
    for name in (".set.tmp-12-0123abcd", "..set.preparing.tmp-12-0123abcd", ".other.tmp-12-0123abcd"):
        (tmp_path / name).mkdir()
    with workplace.held(out):
        pass
    assert names(tmp_path) == [".other.tmp-12-0123abcd", ".set.tmp-12-0123abcd"]  # it may be the only one there is
    out.mkdir()
    with workplace.held(out):
        pass
    assert names(tmp_path) == [".other.tmp-12-0123abcd", "set"]


def test_a_directory_that_is_being_deleted_lets_nobody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command gets a directory of its own while the last one's is being deleted, and keeps it."""
    out, inside = tmp_path / "set", []

    class Slow(durable.FileSystem):
        def rmtree(self, path: Path) -> None:
            monkeypatch.undo()
            with pytest.raises(signals.Stopped), workplace.held(out) as work:
                inside.append(work)
                (work / "pass.json").touch()
                super().rmtree(path)
                assert names(work) == ["lock", "pass.json"]
                with pytest.raises(ValueError, match="set is in use by pid"), workplace.held(out):
                    pass
                raise signals.Stopped("stopped")

    monkeypatch.setattr(durable, "fs", Slow())
    with workplace.held(out):
        pass
    assert inside == [workplace.name_of(out)]
    assert names(tmp_path) == [".set.preparing"]


@pytest.mark.parametrize("error", [signals.Stopped("stopped"), ValueError("no such column")])
def test_what_was_streamed_is_there_for_the_same_command_again(tmp_path: Path, error: Exception) -> None:
    out = tmp_path / "set"
    with pytest.raises(type(error)), workplace.held(out) as work:
        (work / "input-0").mkdir()
        (work / "input-0" / "hub-0123.jsonl").touch()
        raise error
    with workplace.held(out) as work:
        assert (work / "input-0" / "hub-0123.jsonl").exists()


HOLD = """
import sys, time
from pathlib import Path
from gpt import workplace
out, log = Path(sys.argv[1]), Path(sys.argv[2])
n = 0
while n < 40:
    try:
        with workplace.held(out) as work:
            mark = work / "alone"
            mark.touch(exist_ok=False)  # FileExistsError if another is in here
            time.sleep(0.001)
            mark.unlink()
            n += 1
    except ValueError:
        time.sleep(0.001)
"""


def test_commands_that_come_and_go_never_meet_in_the_directory(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD, str(tmp_path / "set"), str(tmp_path / "log")]
    running = [subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert names(tmp_path) == []


def test_work_of_another_identity_is_not_continued(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    assert not workplace.resume(work, {"a": 1})
    (work / "set" / "train-00000.tok").touch()
    (work / "chunk-00000.json").touch()
    assert workplace.resume(work, {"a": 1})
    assert (work / "chunk-00000.json").exists()
    assert not workplace.resume(work, {"a": 2})
    assert names(work) == ["identity.json", "set"] and names(work / "set") == []
