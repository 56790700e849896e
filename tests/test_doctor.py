import math
import random
from pathlib import Path
from typing import Any

import pytest

from gpt import config
from gpt.doctor import LONG, Doctor, Finding, Look, of_bad
from gpt.judge import Bad, Spike
from gpt.settle import TrainConfig

STEPS, VOCAB = 2000, 1024
CALM = [(3.0 + 0.01 * (i % 5), 0.8) for i in range(60)]


def settings(*overrides: str) -> TrainConfig:
    basics = ["name=x", "data.path=data/x", f"train.steps={STEPS}", "schedule.warmup=100", "optim.lr=0.003"]
    return config.load(TrainConfig, None, [*basics, *overrides])


def diagnosed(bad: Bad, recent: list[tuple[float, float]] = CALM, *overrides: str, **others: Any) -> str:
    found = {"weights": [], "looks": [], "sources": {}} | others
    return of_bad(bad, settings(*overrides), STEPS, recent, **found).text


def looks(*losses: float) -> list[Look]:
    return [Look(4 * i, 4 * i + 3, loss, ("w",) if math.isnan(loss) else ()) for i, loss in enumerate(losses)]


def followed(losses: list[float], norm: float = 0.8, *overrides: str, every: int = 10) -> list[Finding]:
    doctor = Doctor(settings(*overrides), STEPS, VOCAB, [])
    return [each for i, loss in enumerate(losses, 1) for each in doctor.trained(every * i, loss, norm)]


NAN = Bad(800, math.nan, math.nan)


@pytest.mark.parametrize(
    ("text", "cause", "advice"),
    [
        (diagnosed(NAN, weights=["model.norm.weight"]), "weights themselves are not finite (model.norm", "on_bad=rollback"),
        (diagnosed(NAN, looks=looks(3.0, 3.1, 2.9)), "the machine: computed again", "on_bad=skip"),
        (
            diagnosed(NAN, looks=looks(3.0, math.nan, 2.9), sources={5: "web: document 7 (a.html)"}),
            "garbage: 1 of 3 micro-batches stand out, rows 4-7 (loss nan): web: document 7 (a.html)",
            "numbers.on_bad=skip, or mend",
        ),
        (
            diagnosed(Bad(800, 20.0, 90.0, "a spike"), looks=looks(3.0, 60.0, 2.9)),
            "a document of garbage",
            "numbers.on_bad=skip numbers.spikes=bad",
        ),
        (diagnosed(Bad(120, math.nan, math.nan), looks=looks(math.nan, math.nan)), "warm-up is too short", "warmup=200 "),
        (diagnosed(NAN, CALM, "optim.clip=null", looks=looks(math.nan, math.nan)), "not clipped", "optim.clip=1.0"),
        (
            diagnosed(NAN, [*CALM, *((3.0 + i, 9.0) for i in range(8))], looks=looks(math.nan, math.nan)),
            "learning rate is too high: loss or gradient norm climbed",
            "optim.lr=0.001 ",
        ),
    ],
    ids=["weights", "machine", "document", "spike", "warm-up", "clip", "rate"],
)  # fmt: skip
def test_a_bad_update_is_given_its_likely_cause_and_a_setting_with_a_value(text: str, cause: str, advice: str) -> None:
    _, *_, likely, setting = text.split("\n")
    assert likely.startswith("likely: ") and cause in likely
    assert setting.startswith("set: ") and advice in setting
    assert "lr " in text and "of its peak" in text


def test_gradients_that_are_not_finite_are_named() -> None:
    several = [Look(0, 3, math.nan, ("b", "a", "c", "d"))]
    assert "gradients that are not finite: a, b, c and 1 more" in diagnosed(NAN, looks=several)


def test_a_loss_that_stays_at_ln_v_is_told_once_with_a_rate_to_try() -> None:
    stays = [math.log(VOCAB) + 0.01 * (i % 3) for i in range(200)]
    (low,) = followed(stays, 0.01)
    assert low.about == "plateau" and "ln(V) = 6.93" in low.text and "far too low\nset: optim.lr=0.03 " in low.text
    (high,) = followed(stays, 5.0)
    assert "far too high" in high.text and "optim.lr=0.0003 " in high.text
    assert not followed(stays, 0.01, "init_from=runs/y"), "what was trained before begins elsewhere"


def test_dead_gradients_are_told() -> None:
    (dead,) = followed([3.0] * 100, 0.0)
    assert dead.about == "dead" and "optim.lr=0.001 " in dead.text and "init_std" not in dead.text
    (small,) = followed([3.0] * 100, 0.0, "model.init_std=1e-9")
    assert "model.init_std=0.02 (it is 1e-09)" in small.text
    (nothing,) = followed([0.0] * 100, 0.0)
    assert "no token is a target" in nothing.text


def test_a_loss_that_rises_from_the_start_or_later_diverges() -> None:
    (start,) = followed([7.0 + 0.1 * i for i in range(60)])
    assert start.about == "diverging" and "from the start on" in start.text and "optim.lr=0.001 " in start.text
    falling = [7.0 - 0.04 * i for i in range(100)]
    (later,) = followed([*falling, *(3.0 + 0.05 * i for i in range(40))])
    assert later.about == "diverging" and "at step 1000 to" in later.text


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_nothing_is_said_of_curves_that_fall(seed: int, noise: float) -> None:
    draw = random.Random(seed)
    curve = [2.2 + 4.7 * (1 + i / 4) ** -0.6 + draw.gauss(0, noise) for i in range(1, 400)]
    assert followed(curve) == []


def test_overfitting_names_the_best_step_and_what_to_set() -> None:
    doctor = Doctor(settings(), STEPS, VOCAB, [])
    for i in range(1, 81):
        doctor.trained(10 * i, 6.0 - 0.05 * i, 0.8)
    scores = {100: 1.9, 200: 1.6, 300: 1.5, 400: 1.55, 500: 1.6, 600: 1.7, 700: 1.8}
    said = {step: doctor.evaluated(step, scores, epochs=step / 100) for step in scores}
    assert [step for step, found in said.items() if found] == [600]
    (finding,) = said[600]
    assert finding.about == "overfitting" and "1.5000 at step 300" in finding.text
    assert (
        "read 6.0 times" in finding.text and "train.patience=3" in finding.text and "model.dropout=0.1" in finding.text
    )


def test_validation_that_wavers_is_no_overfitting() -> None:
    doctor = Doctor(settings(), STEPS, VOCAB, [])
    for i in range(1, 81):
        doctor.trained(10 * i, 6.0 - 0.05 * i, 0.8)
    scores = {100: 1.5, 200: 1.52, 300: 1.54, 400: 1.53, 500: 1.55, 600: 1.56, 700: 1.5}
    assert not any(doctor.evaluated(step, scores, 1.0) for step in scores)


def test_a_spike_is_told_once_in_a_while_and_again_with_another_cause() -> None:
    doctor = Doctor(settings(), 5000, VOCAB, [])
    spike = Spike("loss", 9.0, 3.0)
    (first,) = doctor.spiked(500, spike)
    assert "a spike: loss 9, usually 3" in first.text and "garbage" in first.text
    assert doctor.spiked(700, spike) == []
    (second,) = doctor.spiked(1600, spike)
    assert "learning rate is too high" in second.text and "optim.lr=0.0015 " in second.text
    (early,) = Doctor(settings(), 5000, VOCAB, []).spiked(150, spike)
    assert "warm-up is too short" in early.text and "schedule.warmup=250 " in early.text


def test_a_resumed_run_knows_what_was_said_and_says_the_rest_at_the_same_step(tmp_path: Path) -> None:
    falling = [7.0 - 0.04 * i for i in range(100)]
    losses = [*falling, *(3.0 + 0.05 * i for i in range(60))]
    whole, lines, said = Doctor(settings(), STEPS, VOCAB, []), [], []
    for i, loss in enumerate(losses, 1):
        resumed = Doctor(settings(), STEPS, VOCAB, lines)
        found = whole.trained(10 * i, loss, 0.8)
        assert resumed.trained(10 * i, loss, 0.8) == found
        lines.append({"kind": "train", "step": 10 * i, "loss": loss, "grad_norm": 0.8})
        lines += [{"kind": "doctor", "step": 10 * i, "about": each.about, "text": each.text} for each in found]
        said += found
    assert [each.about for each in said] == ["diverging"] and len(losses) > LONG
