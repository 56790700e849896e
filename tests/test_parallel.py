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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_changes_no_bit_of_the_loss_or_a_gradient(
    build: Build, tokens: Tokens, dtype: torch.dtype, packed: bool
) -> None:
    """With dropout: what was hidden is hidden again, and draws that come after it are the same."""
    ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    given = (
        tokens(2, 12),
        tokens(2, 12, seed=1),
        *([torch.tensor([*range(5), *range(7)]).expand(2, -1), ids] * packed),
    )
    results = []
    for checkpointing in ("none", "full"):
        objective = NextToken(build(n_kv_head=2, dropout=0.3).train())
        forward = applied(objective, compile=False, checkpointing=checkpointing)
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(*given)
        loss.backward()
        results.append([loss, torch.rand(3), *(parameter.grad for parameter in objective.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_keeps_what_a_block_reads_and_little_else(build: Build, tokens: Tokens) -> None:
    """Bytes that autograd keeps between the passes, each storage once, without the parameters."""
    objective, x = NextToken(build(n_layer=8).train()), tokens(2, 32)
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[str, dict[int, int]] = {"none": {}, "full": {}}
    for checkpointing, storages in kept.items():

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = applied(objective, compile=False, checkpointing=checkpointing)(x, x)
        assert loss.requires_grad  # and held until here, so that no storage's place was taken by another
    stream = 2 * 32 * 32 * 4
    assert sum(kept["full"].values()) < sum(kept["none"].values()) / 8
    assert sum(kept["full"].values()) >= 8 * stream


def test_checkpointing_is_applied_once_and_taken_off_again(build: Build, tokens: Tokens) -> None:
    objective = NextToken(build())
    plain = objective.model.model.through
    for _ in range(2):
        assert applied(objective, compile=False, checkpointing="full") is objective
    through = objective.model.model.through
    assert through is not plain
    with torch.no_grad():
        torch.testing.assert_close(objective.model(tokens(1, 8)), build()(tokens(1, 8)), rtol=0, atol=0)
    applied(objective, compile=False)
    assert objective.model.model.through is plain


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


def agrees(
    build: Build,
    tokens: Tokens,
    dtype: torch.dtype,
    tolerance: float,
    packed: tuple[Tensor, ...] = (),
    checkpointing: str = "none",
) -> None:
    """A step of the compiled objective equals the eager one's, also after the weights moved."""
    eager, compiled = NextToken(build(n_kv_head=2).train()), NextToken(build(n_kv_head=2).train())
    forward = applied(compiled, compile=True, checkpointing=checkpointing)
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
    agrees(build, tokens, torch.float32, 1e-5, checkpointing="full")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_compiled_code_trains_as_before(build: Build, tokens: Tokens, dtype: torch.dtype, tolerance: float) -> None:
    agrees(build, tokens, dtype, tolerance)
