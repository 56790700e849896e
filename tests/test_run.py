import json
import math
from pathlib import Path

import pytest
from faults import FAULTS, every_sync_watched, failed, n_operations

from gpt import durable, hub
from gpt.durable import CorruptError
from gpt.run import MANIFEST, RunDirectory, best_of, checkpoint_path, resolve, saved_steps, scores_of, vocabulary


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """runs/x in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return RunDirectory(Path("runs"), "x")


def add(run: RunDirectory, *steps: int, **scores: float | None) -> None:
    """Whole checkpoints at `steps`, as far as names go, and eval lines s10=1.5 (val_bpb 1.5 at step 10)."""
    for step in steps:
        path = checkpoint_path(run.checkpoints, step)
        path.mkdir()
        (path / MANIFEST).write_text("{}")
        (path / "config.json").write_text("{}")
    with run.metrics_path.open("a") as file:
        for name, score in scores.items():
            file.write(json.dumps({"kind": "eval", "step": int(name[1:]), "val_bpb": score}) + "\n")


def test_a_run_directory_is_made_durably_and_found_again(tmp_path: Path) -> None:
    with every_sync_watched():
        run = RunDirectory(tmp_path / "runs", "x")
    assert run.checkpoints.is_dir() and run.path == tmp_path / "runs" / "x"
    run.config_path.write_text("seed: 1")
    assert RunDirectory(tmp_path / "runs", "x").config_path.read_text() == "seed: 1"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/x", ".hidden"])
def test_a_name_that_would_leave_the_runs_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a run's name"):
        RunDirectory(tmp_path, name)


def test_a_run_in_use_is_refused_by_its_name_and_swept_once_it_is_free(run: RunDirectory) -> None:
    left = run.path / ".status.json.tmp-1-0badcafe"
    with run.lock():
        left.write_text("")
        with pytest.raises(ValueError, match=r"^runs/x is in use by pid \d+ on host .* since .*\(kill \d+\)$"):
            run.lock()
        assert left.exists(), "it may be what the holder is just writing"
    with run.lock():
        assert not left.exists()


@pytest.mark.parametrize("state", ["running", "preempted", "done", "failed"])
def test_status_tells_state_step_and_reason(run: RunDirectory, state: str) -> None:
    with every_sync_watched():
        run.status(state, 7, "because 床前")
    assert json.loads((run.path / "status.json").read_bytes()) == {"state": state, "step": 7, "reason": "because 床前"}


def test_metrics_are_the_finished_lines(run: RunDirectory) -> None:
    assert run.metrics() == []
    run.metrics_path.write_text('{"kind": "train", "step": 1, "loss": 2.5}\n{"kind": "train", "ste')
    assert run.metrics() == [{"kind": "train", "step": 1, "loss": 2.5}]


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "1", "{}", '{"step": 1}', '{"kind": "x"}', '{"kind": 1, "step": 1}', '{"kind": "x", "step": "1"}'],
)
def test_a_damaged_line_of_metrics_is_named(run: RunDirectory, line: str) -> None:
    run.metrics_path.write_text('{"kind": "train", "step": 1}\n' + line + '\n{"kind": "train", "step": 2}\n')
    with pytest.raises(CorruptError, match=r"metrics\.jsonl:2: not a line of metrics; delete that line"):
        run.metrics()


LINES = [
    b'{"kind": "train", "step": 1,  "loss": 2.50}\n',
    b'{"step":2,"kind":"eval"}\n',
    b'{"kind":"train","step":3}\n',
]


def test_metrics_past_a_step_are_dropped_and_the_others_keep_their_bytes(run: RunDirectory) -> None:
    run.truncate_metrics(5)
    assert not run.metrics_path.exists()
    for step in (4, 3, 2, 2, 1, 0):
        run.metrics_path.write_bytes(b"".join(LINES) + b'{"kind": "tr')
        with every_sync_watched():
            run.truncate_metrics(step)
        assert run.metrics_path.read_bytes() == b"".join(LINES[:step])


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_dropping_metrics_loses_nothing_else_whatever_fails(run: RunDirectory, fault: BaseException) -> None:
    before = b"".join(LINES)
    run.metrics_path.write_bytes(before)
    for k in range(1, n_operations(lambda: run.truncate_metrics(2)) + 1):
        run.metrics_path.write_bytes(before)
        assert failed(k, fault, lambda: run.truncate_metrics(2))
        assert run.metrics_path.read_bytes() in (before, b"".join(LINES[:2]))
        run.truncate_metrics(2)
        assert run.metrics_path.read_bytes() == b"".join(LINES[:2])


def test_the_best_step_is_the_lowest_score_among_the_steps_there_are(run: RunDirectory) -> None:
    add(run, s10=2.0, s20=1.0, s30=1.5, s40=math.nan, s50=None, s60=1.5)
    with run.metrics_path.open("a") as file:
        file.write('{"kind": "train", "step": 10, "val_bpb": 0.1}\n')
    scores = scores_of(run.metrics())
    assert best_of(scores, [10, 20, 30]) == 20
    assert best_of(scores, [10, 30, 40, 50, 60]) == 30, "of equals the first, and no score that is not a number"
    assert best_of(scores, [40, 50]) is None and best_of(scores, []) is None


def test_saved_steps_are_the_whole_checkpoints_by_number(run: RunDirectory) -> None:
    add(run, 5, 20, 100, 123_456_789)
    (run.checkpoints / "step_00000030").mkdir()  # no manifest: not whole
    for name in (
        "step_00000100 copy",
        "step_40",
        "step_0000000050",
        "step_old",
        ".step_00000060.tmp-1-00000000",
        "step_²",
    ):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / MANIFEST).write_text("{}")
    assert saved_steps(run.checkpoints) == [5, 20, 100, 123_456_789]


def test_a_run_is_its_best_checkpoint_and_others_are_named_with_an_at_sign(run: RunDirectory) -> None:
    add(run, 10, 20, 30, s10=2.0, s20=1.25, s5=0.5)
    at = {step: checkpoint_path(run.checkpoints, step) for step in (10, 20, 30)}
    assert resolve("runs/x") == (at[20], f"{at[20]} (step 20, the best, 1.2500 bits/byte)") == resolve("runs/x@best")
    assert resolve("runs/x/")[0] == at[20]
    assert resolve("runs/x@last") == (at[30], f"{at[30]} (step 30)") == resolve("runs/x@30")
    assert resolve("runs/x@10") == (at[10], f"{at[10]} (step 10, 2.0000 bits/byte)") == resolve("runs/x@00000010")
    assert resolve(str(at[30])) == (at[30], str(at[30]))


def test_a_run_without_evaluations_is_its_last_checkpoint(run: RunDirectory) -> None:
    add(run, 10, 20)
    assert resolve("runs/x") == (checkpoint_path(run.checkpoints, 20), "runs/x/checkpoints/step_00000020 (step 20)")


def test_a_path_with_an_at_sign_is_a_path(run: RunDirectory) -> None:
    odd = RunDirectory(Path("runs"), "x@10")
    add(odd, 7)
    assert resolve("runs/x@10")[0] == resolve("runs/x@10@7")[0] == checkpoint_path(odd.checkpoints, 7)


def test_a_hugging_face_directory_is_itself(run: RunDirectory) -> None:
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        Path("model", name).write_text("{}")
    assert resolve("model") == (Path("model"), "model")


def test_a_source_of_the_hub_is_asked_for_there_unless_a_path_has_its_name(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hub, "model", lambda name: asked.append(name) or Path("cache"))
    assert resolve("hub:org/name@main") == (Path("cache"), "hub:org/name@main (cache)")
    Path("hub:org/name").mkdir(parents=True)
    Path("hub:org/name/config.json").write_text("{}")
    assert resolve("hub:org/name")[0] == Path("hub:org/name")
    assert asked == ["org/name@main"]


def test_a_tokenizer_is_that_of_a_path_or_of_the_model_that_is_named(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "vocabulary", lambda name: Path("cache", name))
    add(run, 10, 20)
    at = checkpoint_path(run.checkpoints, 10)
    assert vocabulary("runs/x@10") == at
    assert vocabulary("hub:org/name@main") == Path("cache/org/name@main")
    for path in ("runs/x", "data/none", "ranks.tiktoken#cl100k_base"):
        assert vocabulary(path) == Path(path)
    Path("a@b").mkdir()
    assert vocabulary("a@b") == Path("a@b")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("runs/y", FileNotFoundError, r"'runs/y' does not exist; expected a run \(runs/NAME\), a checkpoint in it, or"),
        ("x", FileNotFoundError, r"'x' does not exist; did you mean runs/x\?$"),
        ("x@last", FileNotFoundError, r"'x' does not exist; did you mean runs/x@last\?$"),
        ("", FileNotFoundError, "'' does not exist; expected a run"),
        ("@last", FileNotFoundError, "'' does not exist; expected a run"),
        ("a\0b", FileNotFoundError, "does not exist; expected a run"),
        ("a" * 5000, ValueError, "File name too long; expected a run"),
        ("runs/x@40", ValueError, "runs/x has no checkpoint '40'; it has 10, 20, best and last$"),
        ("runs/x@", ValueError, "runs/x has no checkpoint ''; it has 10, 20, best and last$"),
        ("runs/x@²", ValueError, "has no checkpoint '²'"),
        ("runs/empty", ValueError, "runs/empty has no checkpoint yet; let it train until its first save"),
        ("runs", ValueError, "runs is not a model; expected a run"),
        ("runs/x/checkpoints", ValueError, "is not a model; expected a run"),
        ("notes.txt", ValueError, r"notes\.txt is not a model; expected a run"),
        ("old.pt", ValueError, r"old\.pt is a pickle, which can run code when it is read, so it is not read; expected"),
        ("pickled", ValueError, r"pickled/pytorch_model\.bin is a pickle"),
        ("good@10", ValueError, "good is not a run, so '@10' names nothing in it"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_source_that_is_no_model_is_refused_in_words(
    run: RunDirectory, source: str, error: type[Exception], words: str
) -> None:
    add(run, 10, 20)
    RunDirectory(Path("runs"), "empty")
    for name in ("notes.txt", "old.pt", "pickled/config.json", "pickled/pytorch_model.bin", "good/config.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    with pytest.raises(error, match=words):
        resolve(source)


def test_the_lock_file_is_never_a_temporary() -> None:
    assert not durable.TEMPORARY.fullmatch(".lock")


def test_how_a_run_ended_is_told_with_its_exit_code(run: RunDirectory) -> None:
    run.status("failed", 7, "hung", 6)
    assert json.loads((run.path / "status.json").read_bytes())["exit_code"] == 6


def test_windows_that_are_left_out_are_recorded_durably_one_after_another(run: RunDirectory) -> None:
    assert run.skipped() == []
    with every_sync_watched():
        run.skip(5, 6, "loss nan")
        run.skip(11, 12, "床前")
    assert run.skipped() == [(5, 6), (11, 12)]
    assert json.loads((run.path / "skipped.json").read_text())[1]["why"] == "床前"
