"""A frozen base in fewer bits: what is stored, how far it is from what it was, and what passes through it."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt.loss import NextToken
from gpt.model import GPT
from gpt.parallel import applied
from gpt.quantize import GROUP, FrozenLinear, blank, quantized, spread_int4, stored

Build = Callable[..., GPT]
Tokens = Callable[..., Tensor]
SHAPE = {"d_model": 64, "d_ff": 96, "attention_bias": True, "mlp_bias": True}
# the largest error of a stored number, in steps of its scale
ERRORS = {"bf16": 2**-8, "int8": 0.6 / 127, "int4": 0.6 / 7}


@pytest.fixture(params=ERRORS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param != "bf16":
        pytest.importorskip("torchao")
    return request.param


def frozen(model: GPT) -> dict[str, FrozenLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def spread_out(model: GPT, of: GPT) -> GPT:
    """`model` with the plain matrices that the frozen ones of `of` stand for."""
    with torch.no_grad():
        for name, linear in frozen(of).items():
            model.get_submodule(name).weight.copy_(linear.weight)
    return model


def test_every_matrix_of_the_blocks_is_stored_and_nothing_else_changes(build: Build, kind: str) -> None:
    model, plain = quantized(build(**SHAPE), kind), build(**SHAPE).state_dict()
    assert frozen(model).keys() == {
        name.removesuffix(".weight") for name, p in plain.items() if ".layers." in name and p.dim() == 2
    }
    kept = {name: p for name, p in model.state_dict().items() if "stored_" not in name}
    assert "lm_head.weight" in kept and "model.layers.0.mlp.up_proj.bias" in kept
    assert all(torch.equal(p, plain[name]) for name, p in kept.items())


def test_a_stored_matrix_is_near_what_it_was(build: Build, kind: str) -> None:
    model, plain = quantized(build(**SHAPE), kind), build(**SHAPE)
    for name, linear in frozen(model).items():
        weight = plain.get_submodule(name).weight
        assert (linear.weight - weight).abs().max() <= ERRORS[kind] * weight.abs().max(), name


def test_the_same_weights_are_stored_the_same(build: Build, kind: str) -> None:
    a, b = (frozen(quantized(build(**SHAPE), kind)) for _ in range(2))
    assert all(torch.equal(x, y) for name in a for x, y in zip(a[name].stored, b[name].stored, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_is_what_the_spread_out_matrices_compute(
    build: Build, tokens: Tokens, kind: str, dtype: torch.dtype
) -> None:
    """The loss and every gradient that is left, bit for bit, with and without autocast."""
    model = quantized(build(**SHAPE), kind)
    plain = spread_out(build(**SHAPE), model)
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    losses = []
    for each in (model, plain):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses.append(NextToken(each)(x, y))
        losses[-1].backward()
    assert losses[0].item() == losses[1].item()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_no_spread_out_matrix_waits_for_the_backward_pass(build: Build, tokens: Tokens, kind: str) -> None:
    model = quantized(build(**SHAPE, vocab_size=100), kind)
    shapes = {tuple(linear.weight.shape) for linear in frozen(model).values()}
    seen: set[tuple[int, ...]] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32:
            seen.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        NextToken(model)(tokens(2, 12), tokens(2, 12)).backward()
    assert not seen & shapes


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch"
)  # torch's compiler warns of torch's own deprecated parts
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_it_is_captured_whole(build: Build, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiler(f, backend="aot_eager", fullgraph=True, **given))
    objective = NextToken(quantized(build(**SHAPE), "int4"))
    x = tokens(2, 12)
    eager = objective(x, x).item()
    for checkpointing in ("none", "full"):
        forward = applied(objective, compile=True, checkpointing=checkpointing)
        assert forward(x, x).item() == pytest.approx(eager, rel=1e-5)


def test_two_numbers_of_int4_stand_in_a_byte_and_come_back_in_order() -> None:
    codes = torch.arange(16).repeat(4).view(1, 64).to(torch.uint8)
    packed, scale = codes[:, ::2] | codes[:, 1::2] << 4, torch.tensor([[1.0, 2.0]])
    spread = spread_int4(packed, scale)
    assert spread[0, :16].tolist() == list(range(-8, 8))
    assert spread[0, GROUP : GROUP + 16].tolist() == [2.0 * n for n in range(-8, 8)]


def test_blank_tensors_have_the_shapes_and_dtypes_of_stored_ones(kind: str) -> None:
    weight = torch.randn(6, 64)
    assert [(t.shape, t.dtype) for t in blank(weight, kind)] == [(t.shape, t.dtype) for t in stored(weight, kind)]


def test_bits_a_weight_are_what_the_kind_says(kind: str) -> None:
    weight = torch.randn(64, 1024)
    bits = 8 * sum(t.numel() * t.element_size() for t in stored(weight, kind)) / weight.numel()
    assert bits == pytest.approx({"bf16": 16, "int8": 8 + 32 / 1024, "int4": 4 + 16 / GROUP}[kind])


def test_without_torchao_it_is_refused_in_words_and_bf16_needs_none(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"q_proj: a base in int8 needs torchao.* pip install .*or use bf16"):
        quantized(build(), "int8")
    assert frozen(quantized(build(), "bf16"))


def test_a_width_that_cannot_be_grouped_is_refused_by_name(build: Build) -> None:
    for store in (stored, blank):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: int4 groups columns by 32, and it has 40"):
            quantized(build(d_model=40), "int4", store)
