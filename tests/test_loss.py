"""The objective: the plain cross-entropy and its gradients, however it is cut into chunks and micro-batches."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gpt import loss
from gpt.loss import IGNORED, ChunkedCrossEntropy, NextToken
from gpt.model import GPT

Build = Callable[..., GPT]
Tokens = Callable[..., Tensor]
N, C, V = 37, 16, 64


@pytest.fixture(
    params=[(10**9, 10**9), (5 * V, 2 * V), (V, V), (10**9, 3 * V), (1, 10**9)],
    ids=["one chunk", "chunks of 5 in pieces of 2", "chunks of 1", "pieces of 3", "pieces larger than chunks"],
)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, piece = request.param
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": chunk})
    monkeypatch.setattr(loss, "PIECE_LOGITS", {"cpu": piece})


def sample(dtype: torch.dtype, ignored: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, C), head (V, C) and targets (N,) of which the first `ignored` are not trained on."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[:ignored] = IGNORED
    return features, head, targets[torch.randperm(N, generator=generator)]


@pytest.mark.parametrize("ignored", [0, 11, N - 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("chunks")
def test_sum_and_gradients_equal_torchs_cross_entropy(dtype: torch.dtype, ignored: int) -> None:
    features, head, targets = sample(dtype, ignored)
    ours = ChunkedCrossEntropy.apply(features, head, targets, None, dtype, True)
    torchs = F.cross_entropy(features @ head.T, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(ours, torchs.to(ours.dtype), rtol=1e-6, atol=1e-5)
    scale = torch.tensor(0.37, dtype=dtype)  # the caller's division by the number of targets
    for our_grad, torchs_grad in zip(
        torch.autograd.grad(ours * scale, (features, head)),
        torch.autograd.grad(torchs * scale, (features, head)),
        strict=True,
    ):
        torch.testing.assert_close(our_grad, torchs_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [1.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("chunks")
def test_with_a_softcap_it_is_torchs_cross_entropy_of_the_capped_logits(dtype: torch.dtype, softcap: float) -> None:
    features, head, targets = sample(dtype, 11)
    ours = ChunkedCrossEntropy.apply(features, head, targets, softcap, dtype, True)
    capped = softcap * torch.tanh(features @ head.T / softcap)
    torchs = F.cross_entropy(capped, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(ours, torchs.to(ours.dtype), rtol=1e-6, atol=1e-5)
    for our_grad, torchs_grad in zip(
        torch.autograd.grad(ours, (features, head)), torch.autograd.grad(torchs, (features, head)), strict=True
    ):
        torch.testing.assert_close(our_grad, torchs_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_nothing_to_learn_costs_nothing_and_moves_nothing() -> None:
    features, head, targets = sample(torch.float32, N)
    total = ChunkedCrossEntropy.apply(features, head, targets, None, torch.float32, True)
    total.backward()
    assert total.item() == 0
    assert features.grad is not None and not features.grad.any()
    assert head.grad is not None and not head.grad.any()


def test_an_overconfident_head_gives_finite_loss_and_gradients() -> None:
    features, head, targets = sample(torch.float32, 0)
    total = ChunkedCrossEntropy.apply(features * 1e4, head * 1e4, targets, None, torch.float32, True)
    total.backward()
    assert total.isfinite()
    assert features.grad is not None and features.grad.isfinite().all()


def test_the_objective_is_the_models_cross_entropy(build: Build, tokens: Tokens) -> None:
    for settings in ({"tie_embeddings": True}, {"tie_embeddings": False}, {"logit_softcap": 3.0}):
        model, x, y = build(**settings), tokens(3, 9), tokens(3, 9, seed=1)
        y[0, 4:] = IGNORED
        names = dict(model.named_parameters())
        torchs = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")
        expected = torch.autograd.grad(torchs, names.values())
        ours = NextToken(model)(x, y)
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=0)
        for name, a, b in zip(names, torch.autograd.grad(ours, names.values()), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("chunks")
def test_bf16_autocast_stays_close_and_keeps_fp32_gradients(build: Build, tokens: Tokens) -> None:
    objective, x, y = NextToken(build(init_std=0.1)), tokens(3, 9), tokens(3, 9, seed=1)
    exact = objective(x, y)
    exact.backward()
    weight = objective.model.lm_head.weight
    expected, weight.grad = weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(x, y)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)
    assert expected is not None and weight.grad is not None and weight.grad.dtype == torch.float32
    assert (weight.grad - expected).norm() < 0.05 * expected.norm()


def test_micro_batches_accumulate_to_the_gradient_of_the_batch(build: Build, tokens: Tokens) -> None:
    objective, x, y = NextToken(build()), tokens(6, 8), tokens(6, 8, seed=1)
    y[:2, 1:] = IGNORED  # micro-batches of unequal weight
    y[5] = IGNORED
    n_targets = (y != IGNORED).sum()
    parameters = list(objective.parameters())
    whole = torch.autograd.grad(objective(x, y) / n_targets, parameters)
    for rows in (1, 2, 3):
        for part_x, part_y in zip(x.split(rows), y.split(rows), strict=True):
            (objective(part_x, part_y) / n_targets).backward()
        for parameter, expected in zip(parameters, whole, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
            parameter.grad = None


def test_a_uniform_model_pays_the_logarithm_of_the_vocabulary(build: Build, tokens: Tokens) -> None:
    model = build()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert NextToken(model)(tokens(2, 5), tokens(2, 5)).item() == pytest.approx(10 * math.log(64), rel=1e-6)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_does_not_pay_for_gradients(build: Build, tokens: Tokens, guard: Callable[[], object]) -> None:
    objective, x = NextToken(build()), tokens(2, 8)

    def head_flops() -> int:
        features = objective.model.features(x).flatten(0, 1)
        objective.model.features = lambda *_, **__: features.view(2, 8, -1)  # type: ignore[method-assign, assignment]
        with FlopCounterMode(display=False) as counter:
            objective(x, x)
        del objective.model.features
        return counter.get_total_flops()

    product = 2 * 16 * 32 * 64
    assert head_flops() == 3 * product
    with guard():  # type: ignore[attr-defined]
        assert head_flops() == product
