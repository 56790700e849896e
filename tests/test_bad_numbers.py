"""What a run does when its numbers go wrong: batches that give NaN, spikes, killed and resumed."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import runs
import torch
from rich.console import Console
from teams import load_weights
from test_trainer import metrics, settings, weights

from gpt import settle, signals, trainer
from gpt.data import Loader, open_data
from gpt.run import RunDirectory
from gpt.trainer import TrainConfig, train

CONSOLE = Console(quiet=True)
SKIP = ("numbers.on_bad=skip",)
BACK = ("numbers.on_bad=rollback",)


@pytest.fixture
def poison(grammar: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """poison(5, 9, factor=nan): the batches with these numbers are garbage, whenever and wherever they are read."""
    given = settings()
    data = open_data(given.data)

    def make(*numbers: int, factor: float = math.nan) -> None:
        loader = Loader(data, given.data, settle.rows(given), given.seed)
        first = {tuple(loader.batch(number).tokens[0].tolist()) for number in numbers}
        real = trainer.parallel.applied

        def applied(objective, **how):
            forward = real(objective, **how)

            def call(tokens, targets):
                garbage = any(tuple(row) in first for row in tokens.tolist())
                return forward(tokens, targets) * (factor if garbage else 1.0)

            return call

        monkeypatch.setattr(trainer.parallel, "applied", applied)

    return make


def told(name: str) -> list[dict]:
    """Everything in metrics.jsonl that does not depend on the clock."""
    lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().replace(f"runs/{name}/", "").splitlines())
    return [{k: v for k, v in line.items() if k not in runs.CLOCKS} for line in lines]


def state(name: str, step: int) -> dict:
    found = json.loads(Path("runs", name, "checkpoints", f"step_{step:08d}", "state.json").read_text())
    return {k: v for k, v in found.items() if k != "elapsed_s"}


def stopped_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Request a stop as if a signal had come during the update that is made as number `calls` by this process."""
    real, made = trainer.update, []

    def counted(*args):
        made.append(args[5])
        return real(*args)

    monkeypatch.setattr(trainer, "update", counted)
    monkeypatch.setattr(signals, "stop_requested", lambda: "SIGTERM" if len(made) >= calls else None)


def until_done(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, calls: int) -> int:
    """Train in pieces of `calls` updates; how many there were."""
    for pieces in range(1, 100):
        with monkeypatch.context() as patch:
            stopped_after(patch, calls)
            try:
                train(config, console=CONSOLE)
                return pieces
            except signals.Stopped:
                pass
    raise AssertionError("it does not come to an end")


def test_the_default_stops_with_the_cause_and_keeps_the_batch_as_text(poison: Callable[..., None]) -> None:
    poison(6)
    with pytest.raises(
        FloatingPointError, match=r"(?s)step 6: loss nan.*\nlikely: .*\nset: numbers.on_bad=skip"
    ) as raised:
        train(settings(), console=CONSOLE)
    assert signals.exit_code(raised.value) == 4
    assert "the checkpoint of step 4 is whole" in str(raised.value)
    status = json.loads(Path("runs/tiny/status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 4, 4)
    text = Path("runs/tiny/bad_batch_6.txt").read_text()
    assert "loss of rows 0-3: nan" in text and text.count("=== row ") == 8
    assert "data/tiny: document " in text and any(word in text for word in ("the cat", "my bird"))


def test_a_first_batch_of_garbage_does_not_end_a_run_that_measures_its_speed(poison: Callable[..., None]) -> None:
    poison(1)
    train(settings(*SKIP, "train.compile=auto"), console=CONSOLE)
    assert state("tiny", 12)["bad"] == [1]


@pytest.mark.slow
def test_a_run_that_stopped_goes_past_the_batch_when_the_setting_says_so(poison: Callable[..., None]) -> None:
    poison(6)
    with pytest.raises(FloatingPointError):
        train(settings(), console=CONSOLE)
    train(settings(*SKIP), console=CONSOLE)  # numbers.* may change: they change no update that can be made
    train(settings("name=whole", *SKIP), console=CONSOLE)
    assert weights("tiny", 12) == weights("whole", 12)


def test_a_skipped_update_changes_no_weight_and_the_data_goes_on(poison: Callable[..., None]) -> None:
    poison(5)
    train(settings(*SKIP, "checkpoint.every=1", "checkpoint.keep=20"), console=CONSOLE)
    assert weights("tiny", 4) == weights("tiny", 5) != weights("tiny", 6)
    assert [line["step"] for line in metrics("tiny", "train")] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    (line,) = metrics("tiny", "doctor")
    assert line["step"] == 5 and line["about"] == "not finite" and "set: " in line["text"]
    assert state("tiny", 12)["bad"] == [5]


@pytest.mark.parametrize("calls", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_skips_ends_the_same_however_often_it_is_stopped(
    poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    poison(5, 9)
    train(settings("name=whole", *SKIP), console=CONSOLE)
    assert until_done(settings(*SKIP), monkeypatch, calls) > 1
    assert weights("tiny", 12) == weights("whole", 12) and state("tiny", 12) == state("whole", 12)
    assert told("tiny") == told("whole")


def test_a_rollback_restores_the_checkpoint_and_reads_past_the_window(poison: Callable[..., None]) -> None:
    poison(6)
    train(settings(*BACK), console=CONSOLE)
    (window,) = json.loads(Path("runs/tiny/skipped.json").read_text())[:1]
    assert window | {"why": ""} == {"first": 5, "last": 6, "why": ""}
    assert "tries again" not in window["why"], "it goes on"
    assert [line["step"] for line in metrics("tiny", "train")] == list(range(1, 13)), "each step once"
    assert state("tiny", 12)["skipped"] == [[5, 6]] and state("tiny", 12)["bad"] == [6]
    assert [line["step"] for line in metrics("tiny", "eval")] == [4, 8, 12]

    # The slow reference: a run that is told from the start which batches to leave out.
    RunDirectory(Path("runs"), "told").skip(5, 6, "told")
    train(settings("name=told"), console=CONSOLE)
    assert weights("told", 12) == weights("tiny", 12) and told("told") == told("tiny")


@pytest.mark.slow
def test_a_rollback_before_the_first_checkpoint_begins_anew(poison: Callable[..., None]) -> None:
    poison(2)
    train(settings(*BACK), console=CONSOLE)
    assert state("tiny", 12)["skipped"] == [[1, 2]]
    RunDirectory(Path("runs"), "told").skip(1, 2, "told")
    train(settings("name=told"), console=CONSOLE)
    assert weights("told", 12) == weights("tiny", 12)


@pytest.mark.parametrize("calls", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)])
def test_a_run_that_rolls_back_ends_the_same_when_it_is_killed_and_resumed(
    poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    poison(6, 11)
    train(settings("name=whole", *BACK), console=CONSOLE)
    real = trainer.update

    for _ in range(100):  # a kill saves nothing: from the last checkpoint on everything is made again
        made: list[int] = []

        def killed(*args, made=made):
            made.append(args[5])
            if len(made) > calls + 4:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "update", killed)
            try:
                train(settings(*BACK), console=CONSOLE)
                break
            except KeyboardInterrupt:
                pass
    assert weights("tiny", 12) == weights("whole", 12) and state("tiny", 12) == state("whole", 12)
    assert told("tiny") == told("whole")
    assert RunDirectory(Path("runs"), "tiny").skipped() == [(5, 6), (11, 11)]


def test_a_run_that_rolls_back_ends_the_same_however_often_it_is_stopped(
    poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(7, 11)
    train(settings("name=whole", *BACK), console=CONSOLE)
    until_done(settings(*BACK), monkeypatch, 1)  # each stop saves, and pushes out others
    assert weights("tiny", 12) == weights("whole", 12) and state("tiny", 12) == state("whole", 12)
    assert told("tiny") == told("whole")
    assert RunDirectory(Path("runs"), "tiny").skipped() == RunDirectory(Path("runs"), "whole").skipped()


def test_a_run_killed_between_the_record_and_the_restoring_goes_on_as_recorded(
    poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(6)
    train(settings("name=whole", *BACK), console=CONSOLE)
    real = RunDirectory.skip

    def then_killed(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "skip", then_killed)
        with pytest.raises(KeyboardInterrupt):
            train(settings(*BACK), console=CONSOLE)
    train(settings(*BACK), console=CONSOLE)
    assert weights("tiny", 12) == weights("whole", 12) and told("tiny") == told("whole")


@pytest.mark.parametrize("policy", [SKIP, BACK])
def test_too_many_bad_updates_end_the_run_and_so_does_its_resume(
    poison: Callable[..., None], policy: tuple[str]
) -> None:
    poison(*range(5, 13))
    for _ in range(2):
        with pytest.raises(
            FloatingPointError, match=r"numbers.at_most=2 bad updates in 1000 are reached; .*step 4 is whole"
        ):
            train(settings(*policy, "numbers.at_most=2"), console=CONSOLE)
    assert json.loads(Path("runs/tiny/status.json").read_text())["exit_code"] == 4


def test_weights_that_are_found_not_finite_at_a_save_are_rolled_back(
    grammar: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, broken = trainer.update, []

    def overflowing(forward, optimizer, batch, *others):
        numbers = real(forward, optimizer, batch, *others)
        if others[2] == 8 and not broken:
            broken.append(1)
            with torch.no_grad():
                next(iter(optimizer.names))[0, 0] = math.inf
        return numbers

    monkeypatch.setattr(trainer, "update", overflowing)
    train(settings(*BACK), console=CONSOLE)
    assert RunDirectory(Path("runs"), "tiny").skipped() == [(5, 8)]
    for step in (8, 12):
        values = load_weights(Path(f"runs/tiny/checkpoints/step_{step:08d}")).values()
        assert all(torch.isfinite(value).all() for value in values)


@pytest.mark.parametrize(
    "policy", ["stop", *(pytest.param(each, marks=pytest.mark.slow) for each in ("skip", "rollback"))]
)
def test_a_spike_counts_as_bad_where_the_settings_say_so(
    poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    poison(60, factor=30.0)
    given = ("train.steps=64", "checkpoint.every=16", "eval.every=32", "numbers.spikes=bad", f"numbers.on_bad={policy}")
    if policy == "stop":
        with pytest.raises(FloatingPointError, match=r"(?s)a spike: loss.*the update was not made"):
            train(settings(*given), console=CONSOLE)
        return
    train(settings("name=whole", *given), console=CONSOLE)
    assert state("whole", 64)["bad"] == [60]
    until_done(settings(*given), monkeypatch, 22)
    assert weights("tiny", 64) == weights("whole", 64) and state("tiny", 64) == state("whole", 64)
    assert told("tiny") == told("whole")


@pytest.mark.slow
def test_a_spike_is_warned_of_and_changes_nothing(poison: Callable[..., None]) -> None:
    poison(60, factor=30.0)
    for name, spikes in (("tiny", "warn"), ("deaf", "ignore")):
        train(settings(f"name={name}", "train.steps=64", "eval.every=64", f"numbers.spikes={spikes}"), console=CONSOLE)
    (line,) = metrics("tiny", "doctor")
    assert line["step"] == 60 and "a spike: loss" in line["text"] and "set: " in line["text"]
    assert weights("tiny", 64) == weights("deaf", 64) and not metrics("deaf", "doctor")


def test_a_damaged_record_of_windows_is_named(grammar: Path) -> None:
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/skipped.json").write_text('[{"first": "1"}]')
    with pytest.raises(ValueError, match=r"skipped\.json: not the record"):
        train(settings(), console=CONSOLE)


# Many ranks

RANKED = """
import errno, math, os
from pathlib import Path
from gpt import signals
FULL, BROKEN, *BAD = {faults}
def main(argv):
    from rich.console import Console
    from gpt import config, durable, saving, settle, trainer
    from gpt.data import Loader, open_data
    from gpt.loss import NextToken
    given = config.load(trainer.TrainConfig, Path("tiny.yaml"), argv)
    loader = Loader(open_data(given.data), given.data, settle.rows(given), given.seed)
    bad = [loader.batch(number).tokens[-1].tolist() for number in BAD]  # the last row is the last rank's
    forward, write, check = NextToken.forward, durable.fs.write, saving.check_finite
    def spoiled(self, tokens, *others):
        return forward(self, tokens, *others) * (math.nan if any(row in bad for row in tokens.tolist()) else 1.0)
    def limited(fd, data):
        if FULL and os.environ["RANK"] == "1" and f"step_{{FULL:08d}}" in os.readlink(f"/proc/self/fd/{{fd}}"):
            raise OSError(errno.ENOSPC, "No space left on device", "there")
        return write(fd, data)
    def overflown(path, weights):
        if BROKEN and os.environ["RANK"] == "1" and path.name == f"step_{{BROKEN:08d}}":
            raise FloatingPointError(f"{{path}} was not written")
        check(path, weights)
    NextToken.forward, durable.fs.write, saving.check_finite = spoiled, limited, overflown
    trainer.train(given, console=Console(quiet=True))
signals.run(main)
"""


def on_two(*overrides: str, bad: tuple[int, ...] = (), full: int = 0, broken: int = 0) -> list[str]:
    """What two ranks say on stderr; the last row of the batches `bad` is garbage, rank 1's disk is full at save `full`, and
    at save `broken` it finds a weight that is not finite."""
    program = RANKED.format(faults=(full, broken, *bad))
    ended = ranks.launched([sys.executable, "-W", "ignore", "-c", program, *overrides], 2, Path.cwd(), 100)
    assert not any("Traceback" in each.stderr for each in ended), ended[0].stderr + ended[1].stderr
    return [f"{each.returncode}: {each.stderr}" for each in ended]


def test_of_two_ranks_one_tells_of_a_batch_that_only_one_of_them_read(grammar: Path) -> None:
    said = sorted(on_two(bad=(6,)), key=len)
    assert all(each.startswith("4: ") for each in said)
    assert said[0].count("\n") == 1 and "ended by another one's error (step 6: loss nan" in said[0]
    assert "likely: a document of garbage: 1 of 2 micro-batches stand out, rows 4-7 (loss nan)" in said[1]
    assert "the checkpoint of step 4 is whole" in said[1]
    assert "loss of rows 0-3: 5." in (text := Path("runs/tiny/bad_batch_6.txt").read_text()) and "rows 4-7: nan" in text
    assert json.loads(Path("runs/tiny/status.json").read_text())["exit_code"] == 4


@pytest.mark.parametrize("shard", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_ranks_skip_the_same_update(grammar: Path, shard: int) -> None:
    how = (f"parallel.shard={shard}", "checkpoint.every=1", "checkpoint.keep=20", "log.sample_every=6")
    for each in on_two(*SKIP, *how, bad=(5,)):
        assert each.startswith("0: "), each
    assert [line["step"] for line in metrics("tiny", "sample")] == ([6, 12] if shard == 1 else []), (
        "of a model in parts"
    )
    assert weights("tiny", 4) == weights("tiny", 5) != weights("tiny", 6)
    assert [line["step"] for line in metrics("tiny", "train")] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert state("tiny", 12)["bad"] == [5]
    assert all(
        torch.isfinite(value).all() for value in load_weights(Path("runs/tiny/checkpoints/step_00000012")).values()
    )


@pytest.mark.parametrize("shard", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_roll_back_to_what_a_run_without_the_window_is(grammar: Path, shard: int) -> None:
    parts = f"parallel.shard={shard}"
    for each in on_two(*BACK, parts, bad=(6,)):
        assert each.startswith("0: "), each
    assert RunDirectory(Path("runs"), "tiny").skipped() == [(5, 6)]
    assert [line["step"] for line in metrics("tiny", "train")] == list(range(1, 13)), "each step once"
    RunDirectory(Path("runs"), "told").skip(5, 6, "told")
    for each in on_two("name=told", parts):
        assert each.startswith("0: "), each
    assert weights("told", 12) == weights("tiny", 12) and told("told") == told("tiny")


def test_a_weight_that_one_rank_finds_broken_at_a_save_ends_all_with_its_words(grammar: Path) -> None:
    first, second = on_two("checkpoint.every=2", broken=4)
    assert first.startswith("4: rank 0: ended by another one's error (rank 1: ") and first.count("\n") == 1
    assert second.startswith("4: error: runs/tiny/checkpoints/step_00000004 was not written")
    assert "set: numbers.on_bad=rollback" in second and "the checkpoint of step 2 is whole" in second


def test_a_disk_that_is_full_on_one_rank_is_what_the_run_ended_for(grammar: Path) -> None:
    first, second = on_two(full=8)
    assert first.startswith("5: rank 0: ended by another one's error (rank 1: ") and first.count("\n") == 1
    assert second.startswith("5: error: out of disk or memory: there: No space left on device")
    status = json.loads(Path("runs/tiny/status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 4, 5) and "No space" in status["reason"]


def test_an_evaluation_that_is_not_finite_after_a_resume_ends_the_run_in_words(
    grammar: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflows(*args, **kwargs):
        raise FloatingPointError("the validation loss is nan")

    monkeypatch.setattr("gpt.session.evaluate", overflows)
    for _ in range(2):  # its step is saved, so there is nothing to roll back to
        with pytest.raises(
            FloatingPointError, match=r"(?s)is nan\nset: name=NEW branch_from=runs/tiny@STEP.*step 4 is whole"
        ):
            train(settings(*BACK), console=CONSOLE)


def test_a_batch_that_cannot_be_kept_does_not_hide_why_the_update_was_bad(
    poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(6)
    real = trainer.durable.write_file

    def full(path, data):
        if path.name.startswith("bad_batch"):
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(trainer.durable, "write_file", full)
    with pytest.raises(FloatingPointError, match=r"(?s)step 6: loss nan.*batch: not kept \(No space left"):
        train(settings(), console=CONSOLE)


def test_a_first_evaluation_that_is_not_finite_ends_the_run_whatever_the_settings_say(
    grammar: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(settings("name=base", "train.steps=1"), console=CONSOLE)
    asked: list[int] = []

    def overflows(*args, **kwargs):
        asked.append(1)
        assert len(asked) < 3, "again and again"
        raise FloatingPointError("the validation loss is nan")

    monkeypatch.setattr("gpt.session.evaluate", overflows)
    with pytest.raises(FloatingPointError, match=r"(?s)is nan\nset: train.dtype=float32.*there is no checkpoint yet"):
        train(settings("init_from=runs/base", *BACK), console=CONSOLE)
    assert not Path("runs/tiny/skipped.json").exists()
