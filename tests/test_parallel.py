"""What is applied to an objective leaves its loss, its gradients and its parameters what they were."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt.loss import NextToken
from gpt.model import GPT
from gpt.parallel import applied

Build = Callable[..., GPT]
Tokens = Callable[..., Tensor]

# torch's own compiler warns of torch's own deprecated parts
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def test_without_compilation_it_is_the_objective_itself(build: Build) -> None:
    objective = NextToken(build())
    assert applied(objective, compile=False) is objective


def agrees(build: Build, tokens: Tokens, dtype: torch.dtype, tolerance: float) -> None:
    """A step of the compiled objective equals the eager one's, also after the weights moved."""
    eager, compiled = NextToken(build(n_kv_head=2).train()), NextToken(build(n_kv_head=2).train())
    forward = applied(compiled, compile=True)
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    for _ in range(2):
        losses = []
        for call, objective in ((eager, eager), (forward, compiled)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses.append(call(x, y))
            losses[-1].backward()
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter -= 1e-3 * parameter.grad
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 10 * tolerance * a.grad.norm(), name


def test_the_objective_is_captured_whole_and_trains_as_before(
    build: Build, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    agrees(build, tokens, torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_compiled_code_trains_as_before(build: Build, tokens: Tokens, dtype: torch.dtype, tolerance: float) -> None:
    agrees(build, tokens, dtype, tolerance)
