"""What is applied to an objective leaves its loss, its gradients and its parameters what they were."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from gpt.loss import NextToken
from gpt.model import GPT
from gpt.parallel import applied, document_kernel

Build = Callable[..., GPT]
Tokens = Callable[..., Tensor]

# torch's own compiler warns of torch's own deprecated parts
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


def test_without_compilation_it_is_the_objective_itself(build: Build) -> None:
    objective = NextToken(build())
    assert applied(objective, compile=False) is objective


def test_without_a_gpu_documents_are_masked_pair_by_pair(build: Build) -> None:
    model = build()
    kernel, why = document_kernel(model)
    assert kernel == "dense" and "cpu" in why
    assert model.model.flex is None


@torch.no_grad()  # FlexAttention takes gradients on a GPU alone
def test_a_mask_in_blocks_is_captured_whole_and_changes_nothing(build: Build, tokens: Tokens) -> None:
    objective = NextToken(build(n_kv_head=2, max_seq_len=200, d_model=64))
    x, ids = tokens(2, 200), torch.arange(200).div(70, rounding_mode="floor").expand(2, -1)
    positions = (torch.arange(200) % 70).expand(2, -1)
    pairs = objective(x, x, positions, ids)
    objective.model.model.flex = flex_attention
    captured = torch.compile(objective, backend="eager", fullgraph=True, dynamic=False)
    assert captured(x, x, positions, ids).item() == pytest.approx(pairs.item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_s_kernel_computes_the_mask_of_every_pair(build: Build) -> None:
    """The loss and the gradients of packed documents, through FlexAttention compiled and pair by pair."""
    x, y = (torch.randint(64, (3, 300), generator=torch.Generator().manual_seed(i)).cuda() for i in (0, 1))
    ids = torch.arange(300).div(70, rounding_mode="floor").expand(3, -1).cuda()
    positions = (torch.arange(300) % 70).expand(3, -1).cuda()
    sizes = {"d_model": 64, "n_head": 4, "n_kv_head": 2, "max_seq_len": 300, "init_std": 0.1}
    dense, flex = NextToken(build(**sizes).cuda()), NextToken(build(**sizes).cuda())
    assert document_kernel(flex.model)[0] == "flex"
    for forward in (flex, applied(flex, compile=True)):
        for objective, call in ((dense, dense), (flex, forward)):
            objective.zero_grad()
            call(x, y, positions, ids).backward()
        torch.testing.assert_close(flex(x, y, positions, ids), dense(x, y, positions, ids), rtol=1e-3, atol=0)
        for (name, a), b in zip(dense.named_parameters(), flex.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 2e-2 * a.grad.norm(), name


def agrees(build: Build, tokens: Tokens, dtype: torch.dtype, tolerance: float, packed: tuple[Tensor, ...] = ()) -> None:
    """A step of the compiled objective equals the eager one's, also after the weights moved."""
    eager, compiled = NextToken(build(n_kv_head=2).train()), NextToken(build(n_kv_head=2).train())
    forward = applied(compiled, compile=True)
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    for _ in range(2):
        losses = []
        for call, objective in ((eager, eager), (forward, compiled)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses.append(call(x, y, *packed))
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
    ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    agrees(build, tokens, torch.float32, 1e-5, (torch.tensor([*range(5), *range(7)]).expand(2, -1), ids))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_compiled_code_trains_as_before(build: Build, tokens: Tokens, dtype: torch.dtype, tolerance: float) -> None:
    agrees(build, tokens, dtype, tolerance)
