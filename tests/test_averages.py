"""The average of weights: a slow reference, the bits that come back, and that what is saved is what was evaluated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from teams import load_weights
from test_trainer import CONSOLE, curve, metrics, settings, stop_at, weights
from torch import Tensor

from gpt import evaluate, hf, schedule, session, signals, trainer
from gpt.averages import Average
from gpt.checkpoint import load_optimizer
from gpt.data import open_data
from gpt.loss import NextToken
from gpt.model import GPT
from gpt.optim import PLAIN
from gpt.parts import Parts
from gpt.ranks import Ranks
from gpt.trainer import train

Build = Callable[..., GPT]
EMA = "optim.ema=3"


def average(model: GPT, half_life: float | None = 3, steps: int = 10) -> Average:
    return Average(Parts(Ranks(), model), half_life, steps, lambda: None)


def walk(model: GPT, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=draw)


def copied(model: GPT) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


# What it is


def test_it_is_the_average_that_its_decay_says_and_frozen_weights_have_none(build: Build) -> None:
    model = build()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    followed = average(model, half_life=2)
    followed.begin()
    slow = {name: value.double() for name, value in copied(model).items()}
    for step in range(1, 40):
        walk(model, step)
        followed.follow(step)
        keep = min(0.5**0.5, step / (step + 9))
        slow = {name: keep * slow[name] + (1 - keep) * value.double() for name, value in copied(model).items()}
    last = copied(model)
    with followed.shown():
        for name, value in copied(model).items():
            if name == "model.norm.weight":
                assert torch.equal(value, last[name])
            else:
                torch.testing.assert_close(value.double(), slow[name], rtol=1e-5, atol=1e-5)
        assert "model.norm.weight:plain" not in followed.state()


def test_after_it_was_shown_the_weights_have_the_bits_that_they_had_even_if_what_looked_failed(build: Build) -> None:
    model = build()
    followed = average(model)
    followed.begin()
    walk(model, 1)
    followed.follow(1)
    before = copied(model)
    with pytest.raises(signals.Stopped), followed.shown():
        shown = copied(model)
        assert not same(shown, before)
        assert same({name: followed.state()[f"{name}:plain"] for name in before}, before)
        raise signals.Stopped("asked to")
    assert same(copied(model), before)
    with followed.shown():
        assert same(copied(model), shown)


def test_without_a_half_life_there_is_no_average_and_nothing_is_written(build: Build) -> None:
    model = build()
    followed = average(model, None)
    followed.begin()
    walk(model, 1)
    before = copied(model)
    followed.follow(1)
    with followed.shown():
        assert same(copied(model), before) and followed.state() == {}


@pytest.mark.parametrize("half_life", [3, None])
def test_it_goes_on_from_what_was_written_and_without_one_the_plain_weights_do(
    build: Build, half_life: float | None
) -> None:
    straight = build()
    first = average(straight)
    first.begin()
    for step in range(1, 4):
        walk(straight, step)
        first.follow(step)
    with first.shown():
        written, beside = copied(straight), {key: value.clone() for key, value in first.state().items()}
    resumed = build(seed=9)
    resumed.load_state_dict(written, strict=False)
    second = average(resumed, half_life)
    second.begin({**beside, "model.norm.weight:exp_avg": torch.zeros(32)})
    assert same(copied(resumed), copied(straight))
    for model, each in ((straight, first), (resumed, second)):
        walk(model, 4)
        each.follow(4)
    with first.shown(), second.shown():
        assert same(copied(resumed), copied(straight)) == (half_life is not None)


def test_plain_weights_that_are_not_all_there_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match=r"has no .*:plain, and 1 others"):
        average(build()).begin({"model.norm.weight:plain": torch.zeros(32)})


def test_an_average_keeps_half_of_itself_in_its_half_life_and_forgets_what_weights_began_as() -> None:
    assert schedule.kept(50, 10_000, 20_000) ** 50 == pytest.approx(0.5)
    assert schedule.kept(0.01, 10_000, 20_000) == schedule.kept(200, 10_000, 20_000)
    began = 1.0
    for step in range(1, 101):
        began *= schedule.kept(1000, step, 20_000)
    assert began < 1e-9


# In a run


def stop(monkeypatch: pytest.MonkeyPatch, step: int, *overrides: str) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(signals.Stopped, match=f"step {step}"):
            train(settings(*overrides), console=CONSOLE)


def state(name: str, step: int) -> dict[str, Tensor]:
    return dict(load_optimizer(Path("runs", name, "checkpoints", f"step_{step:08d}")))


@pytest.fixture
def whole(grammar: Path) -> Path:
    """A run with an average from its beginning to its end."""
    train(settings("name=whole", EMA), console=CONSOLE)
    return grammar / "runs" / "whole"


def test_updates_are_those_of_a_run_without_one_whose_weights_stand_beside_the_optimizers_state(whole: Path) -> None:
    train(settings("name=plain"), console=CONSOLE)
    assert curve("plain") == curve("whole")
    mine, theirs = load_weights(whole / "checkpoints/step_00000012"), state("whole", 12)
    for name, value in load_weights(Path("runs/plain/checkpoints/step_00000012")).items():
        assert torch.equal(theirs[f"{name}:plain"], value) and not torch.equal(mine[name], value)
    assert [line["val_bpb"] for line in metrics("whole", "eval")] != [
        line["val_bpb"] for line in metrics("plain", "eval")
    ]


def test_what_is_saved_is_what_was_evaluated(whole: Path) -> None:
    settled = settings("name=whole", EMA)
    data = open_data(settled.data)
    for line in metrics("whole", "eval")[1:]:
        model, tokenizer = hf.load(whole / "checkpoints" / f"step_{line['step']:08d}")
        how: dict[str, Any] = {"seq_len": 32, "batch_rows": 128, "device": "cpu", "dtype": "bfloat16"}
        how["dtype"] = trainer.settings.load(trainer.TrainConfig, whole / "config.yaml").choices.dtype
        found = evaluate.evaluate(NextToken(model), evaluate.views(data), settled.eval, tokenizer, **how)
        assert found.val_bpb == pytest.approx(line["val_bpb"], rel=1e-6)


def test_stopped_runs_and_one_that_died_between_saves_continue_with_the_bits_of_one_that_was_not(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 6):
        stop(monkeypatch, step, EMA)

    def power_cut(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:  # after the save of step 8, amid its evaluation
        patch.setattr(session, "evaluate", power_cut)
        with pytest.raises(MemoryError):
            train(settings(EMA), console=CONSOLE)
    train(settings(EMA, "checkpoint.background=false"), console=CONSOLE)
    assert curve("tiny") == curve("whole")
    assert weights("tiny", 12) == weights("whole", 12)
    assert same(state("tiny", 12), state("whole", 12))
    scores = [[(line["step"], line["val_bpb"]) for line in metrics(name, "eval")] for name in ("tiny", "whole")]
    assert scores[0] == scores[1]


def test_a_rollback_takes_the_average_back_too(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, bad = trainer.update, []

    def once(*args: Any, **kwargs: Any) -> Any:
        if args[5] == 11 and not bad:
            bad.append(11)
            raise FloatingPointError("step 11: not finite")
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "update", once)
    train(settings(EMA, "numbers.on_bad=rollback"), console=CONSOLE)
    monkeypatch.undo()
    monkeypatch.chdir(whole.parent.parent)
    assert bad and weights("tiny", 8) == weights("whole", 8) and weights("tiny", 12) != weights("whole", 12)
    train(settings("name=again", EMA, "branch_from=runs/tiny@8", "train.steps=12"), console=CONSOLE)
    assert weights("again", 12) == weights("whole", 12)


def test_a_branch_goes_on_with_an_average_begins_one_or_leaves_it(whole: Path) -> None:
    train(settings("name=on", EMA, "branch_from=runs/whole@8"), console=CONSOLE)
    assert weights("on", 12) == weights("whole", 12) and same(state("on", 12), state("whole", 12))
    train(settings("name=off", "branch_from=runs/whole@8"), console=CONSOLE)
    train(settings("name=plain"), console=CONSOLE)
    assert curve("off")[-4:] == curve("plain")[-4:] and weights("off", 12) == weights("plain", 12)
    train(settings("name=late", EMA, "branch_from=runs/plain@8"), console=CONSOLE)
    assert curve("late")[-4:] == curve("plain")[-4:] and weights("late", 12) != weights("plain", 12)


def test_fine_tuning_and_adapters_start_from_the_average_and_have_one_of_their_own(whole: Path) -> None:
    begun = ("init_from=runs/whole@12", "train.steps=4", "optim.kind=adamw", "optim.lr=0.001", EMA)
    lora = ("adapter={kind: lora, rank: 2, alpha: 4}", "model.dropout=0.1")
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace("model: {", "#"))
    for name, how in (("tuned", ()), ("lora", lora)):
        train(settings(f"name={name}", *begun, *how), console=CONSOLE)
        first, last = metrics(name, "eval")[0], metrics(name, "eval")[-1]
        assert first["step"] == 0
        assert first["val_bpb"] == pytest.approx(metrics("whole", "eval")[-1]["val_bpb"], rel=1e-4)
        path = Path("runs", name, "checkpoints/step_00000004")
        average = list(load_weights(path).values())
        plain = [value for key, value in state(name, 4).items() if key.endswith(f":{PLAIN}")]
        assert plain and not any(torch.equal(value, each) for value in plain for each in average)
        model, tokenizer = hf.load(path)
        data, settled = open_data(settings().data), settings().eval
        how_evaluated: dict[str, Any] = {"seq_len": 32, "batch_rows": 128, "device": "cpu", "dtype": "float32"}
        found = evaluate.evaluate(NextToken(model), evaluate.views(data), settled, tokenizer, **how_evaluated)
        assert found.val_bpb == pytest.approx(last["val_bpb"], rel=2e-3)  # the run's is in bf16, where there is such
