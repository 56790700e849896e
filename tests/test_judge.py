import json
import math
import random

import pytest
import torch

from gpt.judge import ENOUGH, RECENT, Bad, Judge, LossScale, NumbersConfig, finite, stands_out


def judged(judge: Judge, step: int, loss: float, grad_norm: float) -> None:
    judge(step, torch.tensor(loss), torch.tensor(grad_norm))


def curve(seed: int, n: int = 3000, *, batch_noise: float, tail: float, warmup: int = 50) -> list[tuple[float, float]]:
    """A loss that falls from ln(V) by a power law and a gradient norm with a heavy tail, as real ones have."""
    draw = random.Random(seed)
    numbers = []
    for step in range(1, n + 1):
        loss = 2.2 + 6.2 * (1 + step / 40) ** -0.6 + draw.gauss(0, batch_noise)
        norm = (0.4 + 3 * math.exp(-step / 80)) * min(1.0, 0.3 + step / warmup) * draw.lognormvariate(0, tail)
        numbers.append((loss, norm))
    return numbers


def spikes(numbers: list[tuple[float, float]], **settings: object) -> list[int]:
    judge, found = Judge(NumbersConfig(**settings)), []
    for step, (loss, norm) in enumerate(numbers, 1):
        judged(judge, step, loss, norm)
        if judge.spike is not None:
            found.append(step)
    return found


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("norm", [math.nan, math.inf, 1.0])
def test_an_update_passes_only_if_both_numbers_are_finite(loss: float, norm: float) -> None:
    if loss == norm == 1.0:
        assert finite(3, torch.tensor(loss), torch.tensor(norm)) == (1.0, 1.0)
        return
    judge = Judge(NumbersConfig())
    with pytest.raises(Bad, match=r"step 3: .*not finite.*not made"):
        judged(judge, 3, loss, norm)
    assert not judge.recent


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("noise", "tail"), [(0.02, 0.1), (0.1, 0.3), (0.25, 0.5)])
def test_no_false_alarm_on_curves_that_fall_with_noise(seed: int, noise: float, tail: float) -> None:
    assert spikes(curve(seed, batch_noise=noise, tail=tail)) == []


def test_a_spike_of_either_number_is_found_at_its_step_and_named() -> None:
    numbers = curve(1, batch_noise=0.05, tail=0.2)
    numbers[1499] = numbers[1499][0] + 1.5, numbers[1499][1]
    numbers[2099] = numbers[2099][0], numbers[2099][1] * 40
    assert spikes(numbers) == [1500, 2100]
    judge = Judge(NumbersConfig(), numbers[1400:1499])
    judged(judge, 1500, *numbers[1499])
    assert judge.spike is not None and judge.spike.what == "loss" and "usually 2." in str(judge.spike)


def test_a_loss_that_stays_higher_is_told_at_first_and_is_usual_in_the_end() -> None:
    numbers = [(3.0 + 0.01 * (i % 7), 1.0) for i in range(200)] + [(6.0 + 0.01 * (i % 7), 1.0) for i in range(400)]
    found = spikes(numbers)
    assert found[0] == 201 and found[-1] <= 200 + RECENT


def test_nothing_stands_out_before_there_is_enough_to_compare_with() -> None:
    assert not stands_out([1.0] * (ENOUGH - 1), 100.0, 1.15, float)
    assert stands_out([1.0] * ENOUGH, 100.0, 1.15, float)
    assert spikes([(3.0, 1.0)] * 100 + [(90.0, 1.0)], spikes="ignore") == []


def test_a_spike_that_counts_as_bad_is_not_remembered() -> None:
    judge = Judge(NumbersConfig(spikes="bad"))
    for step in range(1, 101):
        judged(judge, step, 3.0 + 0.01 * (step % 5), 1.0)
    before = list(judge.recent)
    with pytest.raises(Bad, match="a spike: loss 9, usually 3"):
        judged(judge, 101, 9.0, 1.0)
    assert list(judge.recent) == before


def test_what_is_remembered_survives_a_checkpoint_to_the_bit() -> None:
    numbers = curve(3, 700, batch_noise=0.3, tail=0.4)
    numbers = [(loss, norm * (50 if step % 61 == 0 else 1)) for step, (loss, norm) in enumerate(numbers, 1)]
    whole, stopped = Judge(NumbersConfig()), Judge(NumbersConfig())
    for step, (loss, norm) in enumerate(numbers, 1):
        if step % 97 == 0:
            stopped = Judge(NumbersConfig(), json.loads(json.dumps([list(pair) for pair in stopped.recent])))
        judged(whole, step, loss, norm)
        judged(stopped, step, loss, norm)
        assert whole.spike == stopped.spike and whole.recent == stopped.recent
    assert spikes(numbers), "without any the comparison would mean little"


def test_bad_updates_are_borne_up_to_the_limit_within_the_window() -> None:
    judge = Judge(NumbersConfig(at_most=2, within=100))
    assert judge.may_go_on(10)
    judge.bad += [10, 50]
    assert not judge.may_go_on(60) and not judge.may_go_on(109)
    assert judge.may_go_on(110)


def test_the_loss_scale_moves_as_torch_s_does_but_for_the_update_that_is_made_again() -> None:
    """torch.amp's arithmetic: halved where a gradient was not finite, doubled after so many that were."""
    draw = random.Random(4)
    ours, theirs = LossScale(), torch.full((1,), LossScale.START)
    counted = torch.zeros(1, dtype=torch.int32)
    for _ in range(3 * LossScale.PATIENCE):
        overflows = draw.random() < 0.0004
        norm = torch.tensor(math.inf if overflows else 1.0)
        assert ours.too_large(torch.tensor(2.0), norm) == overflows
        torch._amp_update_scale_(theirs, counted, torch.tensor([float(overflows)]), 2.0, 0.5, LossScale.PATIENCE)
        assert ours.state == [theirs.item(), counted.item()]
        ours = LossScale(json.loads(json.dumps(ours.state)))  # as a checkpoint keeps it


@pytest.mark.parametrize(("loss", "norm", "scale"), [(math.nan, math.inf, 8.0), (1.0, math.nan, 1.0), (1.0, 2.0, 8.0)])
def test_what_no_smaller_scale_mends_is_left_to_the_judge(loss: float, norm: float, scale: float) -> None:
    given = LossScale([scale, 5])
    assert not given.too_large(torch.tensor(loss), torch.tensor(norm))
    assert given.state == [scale, 6]
