import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_trainer import CONSOLE, curve, metrics, settings, stop_at

from gpt import config, prepare, session, signals, trainer
from gpt.evaluate import Evaluation
from gpt.log import Log
from gpt.team import Elsewhere, Team
from gpt.trainer import train


def test_every_step_stands_in_metrics_once_after_a_resume_from_an_older_checkpoint(
    grammar: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = trainer.update

    def crashing(*args, **kwargs):
        if args[5] == 7:
            raise RuntimeError("power cut")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", crashing)
        with pytest.raises(RuntimeError):
            train(settings(), console=CONSOLE)
    assert json.loads(Path("runs/tiny/status.json").read_text())["state"] == "failed"
    train(settings(), console=CONSOLE)
    assert [step for step, _, _ in curve("tiny")] == list(range(1, 13))


def test_an_error_that_is_no_bad_number_ends_the_run_without_a_word_to_other_ranks() -> None:
    """One rank's full disk is Elsewhere to the others: who waits here for the one that failed waits for ever."""
    at_work = SimpleNamespace()  # neither writer nor team may be asked
    for error in (Elsewhere("rank 1: no space left", signals.NO_SPACE), Elsewhere("rank 1: gone", signals.STUCK)):
        with pytest.raises(Elsewhere, match="rank 1"):
            session.Session.rolled_back(at_work, error)


def test_a_run_that_stops_says_so_before_any_rank_goes(grammar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends the others when the first has left, and wandb may take a minute."""
    said: list[str] = []

    def state() -> str:
        path = Path("runs/tiny/status.json")
        return json.loads(path.read_text())["state"] if path.exists() else "none"

    real, close = Team.gather, Log.close
    monkeypatch.setattr(Team, "gather", lambda team, value: (said.append(f"word: {state()}"), real(team, value))[1])
    monkeypatch.setattr(Log, "close", lambda log, **how: (said.append(f"end: {state()}"), close(log, **how)))
    stop_at(monkeypatch, 2)
    with pytest.raises(signals.Stopped, match="stopped by SIGTERM at step 2"):
        train(settings(), console=CONSOLE)
    assert said[-2:] == ["word: preempted", "end: preempted"]
    assert json.loads(Path("runs/tiny/status.json").read_text())["step"] == 2


def test_an_evaluation_that_was_due_after_the_last_save_is_made_up_on_resume(
    grammar: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(session, "evaluate", crash)
        with pytest.raises(MemoryError):
            train(settings(), console=CONSOLE)
    assert (grammar / "runs/tiny/checkpoints/step_00000004").is_dir()
    train(settings(), console=CONSOLE)
    assert [line["step"] for line in metrics("tiny", "eval")] == [4, 8, 12]


def test_patience_ends_a_run_that_stopped_improving(grammar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.5, 1.0])
    monkeypatch.setattr(session, "evaluate", lambda *a, **k: Evaluation(1.0, next(scores)))
    train(settings("train.steps=100", "train.patience=2"), console=CONSOLE)
    assert [line["val_bpb"] for line in metrics("tiny", "eval")] == [3.0, 2.0, 2.5, 2.5]
    status = json.loads(Path("runs/tiny/status.json").read_text())
    assert status["state"] == "done" and status["step"] == 16
    assert (grammar / "runs/tiny/checkpoints/step_00000008").is_dir(), "the best checkpoint is kept"
    train(settings("train.steps=100", "train.patience=2"), console=CONSOLE)
    assert len(metrics("tiny", "eval")) == 4, "a finished run stays finished"


def test_the_sample_of_a_run_on_chats_answers_the_first_held_out_question(grammar: Path) -> None:
    turns = [
        {"messages": [{"role": "user", "content": f"Is {i} odd?"}, {"role": "assistant", "content": "no"}]}
        for i in range(90)
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, turns)))
    recipe = config.load(
        prepare.PrepareConfig, None, ["input={path: chats.jsonl, chat: true}", "kind=char", "workers=1"]
    )
    prepare.prepare(recipe, Path("data/chats"), console=CONSOLE)
    train(
        settings("data.path=data/chats", "data.document_mask=true", "train.steps=4", "log.sample_every=4"),
        console=CONSOLE,
    )
    (line,) = metrics("tiny", "sample")
    assert re.match(r"user\nIs \d+ odd\?\nassistant\n", line["text"])


def test_a_sample_of_numbers_that_are_not_finite_is_told_and_the_run_goes_on(
    grammar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object, **how: object) -> Iterator[object]:
        raise FloatingPointError("a logit is not a number")
        yield

    monkeypatch.setattr(session, "complete", broken)
    console = Console(file=io.StringIO())
    train(settings("log.sample_every=6"), console=console)
    assert "the sample of step 6: a logit is not a number" in console.file.getvalue()  # type: ignore[attr-defined]
    assert metrics("tiny", "train")[-1]["step"] == 12
