"""The decoder: what a position may see, every part against its formula written out, its names and its first weights."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model import GPT, GatedMLP, ModelConfig, PlainMLP, RMSNorm

Build = Callable[..., GPT]
Tokens = Callable[..., Tensor]

VARIANTS = {
    "default": {},
    "llama, grouped": {"qk_norm": False, "n_kv_head": 2, "tie_embeddings": False},
    "multi-query, odd width": {"n_kv_head": 1, "head_dim": 6, "mlp": "relu2"},
    "gpt2-like": {"norm": "layernorm", "mlp": "gelu", "attention_bias": True, "mlp_bias": True, "qk_norm": False},
    "layernorm on heads": {"norm": "layernorm", "mlp": "relu", "qk_norm": True},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest, build: Build) -> GPT:
    return build(**request.param)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# What a position may see


@torch.inference_mode()
def test_future_tokens_do_not_change_past_logits(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 12)
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 64
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=-1).min() > 1e-3


@torch.inference_mode()
def test_every_past_token_changes_the_last_logits(model: GPT, tokens: Tokens) -> None:
    x = tokens(1, 8)
    changed = x.repeat(8, 1)
    changed[range(8), range(8)] = (changed[range(8), range(8)] + 1) % 64
    moved = (model(changed)[:, -1] - model(x)[:, -1]).abs().amax(dim=-1)
    assert moved.min() > 1e-3


@torch.inference_mode()
def test_rows_of_a_batch_do_not_see_each_other(model: GPT, tokens: Tokens) -> None:
    x = tokens(3, 10)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_packed_document_has_the_logits_it_has_alone(model: GPT, tokens: Tokens) -> None:
    lengths = [5, 1, 6]
    x = tokens(1, 12)
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(x, positions, doc_ids)
    alone = torch.cat([model(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_shifting_all_positions_changes_nothing(build: Build, tokens: Tokens) -> None:
    model, x = build(), tokens(2, 10)
    torch.testing.assert_close(model(x, torch.arange(17, 27).expand(2, -1)), model(x), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_order_of_tokens_matters(build: Build, tokens: Tokens) -> None:
    model, x = build(n_layer=1), tokens(1, 8)
    swapped = x[:, [1, 0, *range(2, 8)]]
    assert (model(x)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3


def test_more_tokens_than_the_context_are_refused_with_both_numbers(build: Build, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match=r"33 tokens .*max_seq_len 32"):
        build()(tokens(1, 33))


# Attention


@torch.inference_mode()
def test_shared_heads_written_out_in_full_give_the_same_logits(build: Build, tokens: Tokens) -> None:
    grouped, full = build(n_kv_head=2), build(n_kv_head=4)
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = tokens(2, 9)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-5, rtol=1e-5)


def test_as_many_groups_as_heads_is_multi_head_attention(build: Build, tokens: Tokens) -> None:
    x = tokens(2, 9)
    assert torch.equal(build(n_kv_head=4)(x), build(n_kv_head=None)(x))


# Norms and MLPs


def test_rmsnorm_is_its_formula() -> None:
    norm, x = RMSNorm(16, eps=1e-2), normal(3, 5, 16, dtype=torch.float32)
    nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rmsnorm_of_bf16_is_computed_in_fp32() -> None:
    norm, x = RMSNorm(512, eps=1e-6), normal(4, 512, dtype=torch.bfloat16)
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    assert torch.equal(norm.bfloat16()(x), norm(x.float()).bfloat16())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_plain_mlp_is_its_formula(kind: str) -> None:
    mlp, x = PlainMLP(ModelConfig(d_model=8, n_head=1, mlp=kind, mlp_bias=True)), normal(3, 8, dtype=torch.float32)
    hidden = ACTIVATIONS[kind](x @ mlp.up_proj.weight.T + mlp.up_proj.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias)


def test_swiglu_is_its_formula() -> None:
    mlp, x = GatedMLP(ModelConfig(d_model=8, n_head=1)), normal(3, 8, dtype=torch.float32)
    gate = x @ mlp.gate_proj.weight.T
    torch.testing.assert_close(
        mlp(x), (gate / (1 + torch.exp(-gate)) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    )


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_every_norm_has_the_epsilon_of_the_settings(build: Build, kind: str) -> None:
    norms = [module.eps for module in build(norm=kind, norm_eps=0.5).modules() if hasattr(module, "eps")]
    assert norms == [0.5] * (2 * 4 + 1)


@torch.inference_mode()
def test_features_are_what_the_head_turns_into_logits(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 6)
    torch.testing.assert_close(model.features(x) @ model.lm_head.weight.T, model(x), atol=1e-5, rtol=1e-5)


# Dropout


def test_dropout_works_in_training_alone(build: Build, tokens: Tokens) -> None:
    model, plain, x = build(dropout=0.5), build(), tokens(2, 8)
    assert torch.equal(model(x), plain(x))
    model.train()
    torch.manual_seed(0)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(x), first)


def test_the_embeddings_and_every_branch_are_dropped(build: Build, tokens: Tokens) -> None:
    model, dropped = build(dropout=0.5).train(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, args, out: dropped.append((out == 0).float().mean().item()))
    model(tokens(4, 32))
    assert len(dropped) == 1 + 2 * 2
    assert dropped == pytest.approx([0.5] * 5, abs=0.05)


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_model": 30, "n_head": 4}, r"d_model \(30\) must be a multiple of n_head \(4\)"),
        ({"d_model": 12, "n_head": 4}, r"head_dim \(3\) must be even"),
        ({"head_dim": 5}, r"head_dim \(5\) must be even"),
        ({"n_head": 4, "n_kv_head": 3}, r"n_head \(4\) must be a multiple of n_kv_head \(3\)"),
        ({"n_head": 4, "n_kv_head": 8}, r"n_head \(4\) must be a multiple of n_kv_head \(8\)"),
    ],
)
def test_contradictory_shapes_are_refused_with_their_values(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**settings)


@pytest.mark.parametrize("name", ["vocab_size", "max_seq_len", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff"])
def test_no_size_may_be_zero(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        ModelConfig(**{name: 0})


def test_sizes_left_open_follow_from_the_width() -> None:
    config = ModelConfig(d_model=768, n_head=12)
    assert (config.d_head, config.n_group, config.d_hidden) == (64, 12, 2048)
    assert ModelConfig(d_model=768, n_head=12, mlp="gelu").d_hidden == 3072
    assert ModelConfig(d_model=100, n_head=2).d_hidden == 320  # 8/3 of 100 is 266.7: up to a multiple of 64
    assert ModelConfig(d_model=768, n_head=12, d_ff=5).d_hidden == 5


# Names and first weights


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_carry_the_names_and_shapes_of_llama(build: Build, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    ours = build(n_kv_head=2, qk_norm=False, d_ff=128, tie_embeddings=tied)
    assert shapes(ours) == shapes(theirs)


def test_parameters_with_normalized_heads_carry_the_names_and_shapes_of_qwen3(build: Build) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
        )
    )
    assert shapes(build(n_kv_head=2, head_dim=16, d_ff=128, tie_embeddings=False)) == shapes(theirs)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_tied_embeddings_are_one_tensor_and_untied_are_two(build: Build) -> None:
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()


def test_first_weights_are_a_function_of_the_seed_alone(build: Build) -> None:
    torch.manual_seed(1)
    a = build(seed=3).state_dict()
    torch.manual_seed(2)
    b, other = build(seed=3).state_dict(), build(seed=4).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], other[name]) for name in a if a[name].dim() == 2)


def test_first_weights_have_the_spread_that_the_settings_name(build: Build) -> None:
    model = build(n_layer=8, d_model=64, attention_bias=True, mlp_bias=True, init_std=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            into_the_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(0.05 / 4 if into_the_stream else 0.05, rel=0.1), name


@torch.inference_mode()
def test_zero_output_projections_make_every_block_the_identity(build: Build, tokens: Tokens) -> None:
    model, x = build(init_output="zero"), tokens(2, 5)
    assert torch.equal(model.features(x), model.model.norm(model.model.embed_tokens(x)))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_model_on_the_meta_device_has_the_parameters_of_the_formula(settings: dict[str, object]) -> None:
    config = ModelConfig(
        **{"vocab_size": 50_304, "max_seq_len": 1024, "n_layer": 12, "d_model": 768, "n_head": 12} | settings
    )
    with torch.device("meta"):
        model = GPT(config)
    C, D, H, G, F_, V = config.d_model, config.d_head, config.n_head, config.n_group, config.d_hidden, 50_304
    gain = 2 if config.norm == "layernorm" else 1  # a bias beside each gain
    attention = (
        2 * C * H * D + 2 * C * G * D + config.attention_bias * (H * D + 2 * G * D + C) + config.qk_norm * gain * 2 * D
    )
    mlp = (3 if config.mlp == "swiglu" else 2) * C * F_ + config.mlp_bias * (F_ + C)
    expected = 12 * (attention + mlp + gain * 2 * C) + gain * C + V * C * (1 if config.tie_embeddings else 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert all(parameter.is_meta for parameter in model.parameters())


# In training


def test_a_model_moves_to_another_device_with_its_rotary_tables_and_trains_there_after_an_evaluation() -> None:
    model = GPT(ModelConfig(vocab_size=64, max_seq_len=8, n_layer=1, d_model=8, n_head=2)).to("meta")
    x = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any("rotary" in name for name in model.state_dict()), "tables follow from the settings; none are stored"


def test_every_parameter_has_a_gradient_under_bf16_autocast(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 8)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert (logits - exact).abs().mean() < 0.05 * exact.abs().mean()
    logits.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.dim() == 2)


def test_a_few_steps_learn_a_batch_by_heart(build: Build, tokens: Tokens) -> None:
    model = build(init_std=0.05).train()
    x = tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
