"""A model made ready to write: the same numbers, in less time; and a model in training that does not notice."""

import copy

import pytest
import torch
from conftest import Tokens
from torch import nn
from variants import VARIANTS

from gpt import inference, runtime
from gpt.adapters import AdapterConfig, LowRank
from gpt.generate import Sampling, generate
from gpt.inference import JoinedAttention, LeanNorm, PackedLinear, beside, ready
from gpt.model import GPT, GainFreeRMSNorm, ModelConfig, RMSNorm, init_weights

GREEDY = Sampling(temperature=0)


def build(**shape: object) -> GPT:
    settings = {"n_layer": 2, "d_model": 32, "n_head": 4, "n_kv_head": 2, "init_std": 0.2} | shape
    model = GPT(ModelConfig(vocab_size=64, max_seq_len=64, **settings))
    init_weights(model, seed=1)
    with torch.no_grad():  # gains and biases that do something
        for i, parameter in enumerate(p for p in model.parameters() if p.dim() == 1):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2
    return model.eval()


def written(model: GPT, prompts: list[list[int]], n: int = 12) -> list[list[int | None]]:
    return [c.ids for c in generate(model, prompts, GREEDY, n, seed=1, n_tokens_valid=64, stop_ids=())]


needs_packing = pytest.mark.skipif(bool(inference._unfit(torch.float32)), reason="no packed products in this torch")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_decoder_computes_what_it_did(name: str, tokens: Tokens) -> None:
    model = build(**VARIANTS[name])
    x = tokens(3, 20)
    expected, said = model(x).detach(), written(model, [[1, 5, 9], [1]])
    how = ready(model, "cpu", "float32")
    assert how == ("float32 (as asked), weights packed" if not inference._unfit(torch.float32) else how)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-4)
    assert written(model, [[1, 5, 9], [1]]) == said


@needs_packing
def test_no_matrix_stands_beside_its_packed_form() -> None:
    model = build(tie_embeddings=False)
    ready(model, "cpu", "float32")
    assert [name for name, p in model.named_parameters() if p.dim() > 1] == ["model.embed_tokens.weight"]
    assert not [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@needs_packing
def test_bfloat16_is_as_far_from_fp32_as_the_plain_model_in_bfloat16(tokens: Tokens) -> None:
    if runtime.best_dtype("cpu")[0] != "bfloat16":
        pytest.skip("products in bf16 take a slow way here")
    model, plain = build(), build().bfloat16()
    x = tokens(4, 30)
    exact = model(x).detach()
    ready(model, "cpu", "bfloat16")
    with torch.inference_mode():
        ours, theirs = ((m(x).float() - exact).square().mean().sqrt() for m in (model, plain))
    assert ours < 1.1 * theirs
    assert model.new_cache(1, 4).k_LBGSD.dtype == torch.bfloat16


@needs_packing
@pytest.mark.parametrize("n_rows", [1, 16, 17, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_is_the_plain_one(n_rows: int, bias: bool) -> None:
    linear, x = nn.Linear(48, 80, bias=bias), torch.randn(n_rows, 48, generator=torch.Generator().manual_seed(2))
    packed = PackedLinear(linear.weight.detach(), linear.bias.detach() if bias else None)
    torch.testing.assert_close(packed(x[None]), linear(x[None]).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_rows", [1, 16, 17])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_a_lean_norm_is_the_norm(n_rows: int, scale: float) -> None:
    x = torch.randn(n_rows, 24, generator=torch.Generator().manual_seed(3)) * scale
    before = x.clone()
    plain, free = RMSNorm(24, 1e-6), GainFreeRMSNorm(24, 1e-6)
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(4))
        for norm in (plain, free):
            torch.testing.assert_close(LeanNorm(norm, 24)(x), norm(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)


def test_a_model_in_training_stays_as_it_is() -> None:
    model = build(dropout=0.5).train()
    state, kept = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    writer = beside(model, "float32")
    assert writer is not model
    assert not writer.training
    assert written(writer, [[1, 2]]) == written(copy.deepcopy(model).eval(), [[1, 2]])
    assert model.training
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in kept.items()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_writer_says_what_training_has_learned_since() -> None:
    model = build()
    before = written(beside(model, "float32"), [[1, 2]])
    init_weights(model, seed=7)
    after = written(beside(model, "float32"), [[1, 2]])
    assert after == written(model, [[1, 2]]) != before


def test_a_model_with_other_modules_is_left_alone() -> None:
    model = build()
    model.model.layers[0].self_attn.q_proj = LowRank(model.model.layers[0].self_attn.q_proj, AdapterConfig(rank=2))
    model.model.layers[0].self_attn.q_proj.fill(torch.Generator().manual_seed(1))
    expected, modules = written(model, [[1, 2]]), [type(module) for module in model.modules()]
    assert ready(model, "cpu") == "as it is: it has LowRank"
    assert [type(module) for module in model.modules()] == modules
    assert written(model, [[1, 2]]) == expected


def test_where_memory_is_short_the_model_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(runtime, "free_memory_bytes", lambda device: 1000)
    assert beside(model) is model


class Wrong(PackedLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.1


class Absent(PackedLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn.no_such_operation(x)


@needs_packing
@pytest.mark.parametrize(("kind", "words"), [(Wrong, "are wrong here by"), (Absent, "this torch cannot")])
def test_products_that_fail_their_test_are_not_used(
    kind: type[PackedLinear], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    said = written(model, [[1, 2]])
    monkeypatch.setattr(inference, "PackedLinear", kind)
    inference._unfit.cache_clear()
    try:
        assert words in ready(model, "cpu", "float32")
    finally:
        inference._unfit.cache_clear()
    assert not any(isinstance(module, JoinedAttention) for module in model.modules())
    assert written(model, [[1, 2]]) == said


@needs_packing
def test_a_row_in_bfloat16_is_in_a_batch_what_it_is_alone() -> None:
    if runtime.best_dtype("cpu")[0] != "bfloat16":
        pytest.skip("products in bf16 take a slow way here")
    model = build(d_model=64, d_ff=160)
    ready(model, "cpu", "bfloat16")
    prompts = [[1, 2, 3], [4] * 9, [7], [5, 6, 7]]
    together = written(model, prompts, 30)
    for i, prompt in enumerate(prompts):
        assert [column[i] for column in together] == [column[0] for column in written(model, [prompt], 30)]
