"""The decoder: what a position may see, every part against its formula written out, its names and its first weights."""

import ast
import math
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import written
from conftest import Build, Tokens
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from variants import VARIANTS

from gpt.model import GPT, GainFreeRMSNorm, GatedMLP, ModelConfig, PlainMLP, RMSNorm, Softcap
from gpt.positions import Angles, At, Position

ROOM = Path(__file__).parent.parent / "gpt"


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


def reach(config: ModelConfig, T: int, prefix: int = 0) -> Tensor:
    """(T, T) bool: the positions (columns) from which something comes to each (rows) through all the layers."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = torch.eye(T)
    for layer in range(config.n_layer):
        near = (distance >= 0) & (distance < (config.window_of(layer) or T))
        near[:prefix, :prefix] = True
        seen = near.float() @ seen
    return seen > 0


def changed(model: GPT, x: Tensor, prefix: Tensor | None = None) -> Tensor:
    """(T, T): how much the logits at each position (rows) move when the token at another (columns) does."""
    T = x.shape[1]
    others = x.repeat(T, 1)
    others[range(T), range(T)] = (others[range(T), range(T)] + 1) % 64
    before = model(x, prefix=prefix).expand(T, -1, -1)
    after = model(others, prefix=None if prefix is None else prefix.expand(T, -1))
    return (after - before).abs().amax(dim=-1).T


@torch.inference_mode()
def test_logits_depend_on_the_tokens_within_reach_and_on_no_other(model: GPT, tokens: Tokens) -> None:
    """Causality, and every past token matters: within the window of each layer, added up."""
    moved, within = changed(deepcopy(model).double(), tokens(1, 12)), reach(model.config, 12)
    assert within.tril().equal(within)
    assert moved[within].min() > 1e-3
    assert moved[~within].max() < 1e-6  # a batch of another size is rounded otherwise


@pytest.mark.parametrize("kind", ["rotary", "learned", "sinusoidal", "relative", "none"])
@pytest.mark.parametrize("window", [None, 3])
@torch.inference_mode()
def test_tokens_of_a_prefix_see_each_other_both_ways(
    build: Build, tokens: Tokens, kind: str, window: int | None
) -> None:
    model = build(prefix_lm=True, position=kind, window=window)
    prefix = (torch.arange(12) < 5)[None]
    moved, within = changed(deepcopy(model).double(), tokens(1, 12), prefix), reach(model.config, 12, prefix=5)
    assert within[:5, :5].all() and within.sum() > reach(model.config, 12).sum()
    assert moved[within].min() > 1e-3
    assert moved[~within].max() < 1e-6


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
def test_packed_documents_with_prompts_have_the_logits_they_have_alone(build: Build, tokens: Tokens) -> None:
    model, lengths, prompts = build(prefix_lm=True), [5, 1, 6], [3, 1, 2]
    x = tokens(1, 12)
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    prefix = torch.cat([torch.arange(n) < k for n, k in zip(lengths, prompts, strict=True)])[None]
    packed = model(x, positions, doc_ids, prefix=prefix)
    alone = [model(part, prefix=mark) for part, mark in zip(x.split(lengths, 1), prefix.split(lengths, 1), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


RELATIVE = [name for name, settings in VARIANTS.items() if settings.get("position") not in ("learned", "sinusoidal")]


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_shifting_all_positions_changes_nothing_but_where_they_are_absolute(
    build: Build, tokens: Tokens, name: str
) -> None:
    model, x = build(**VARIANTS[name]), tokens(2, 10)
    moved = (model(x, torch.arange(17, 27).expand(2, -1)) - model(x)).abs().max()
    assert moved < 1e-4 if name in RELATIVE else moved > 1e-1


def test_more_tokens_than_the_context_are_refused_with_both_numbers(build: Build, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match=r"33 tokens .*max_seq_len 32"):
        build()(tokens(1, 33))


# The formula


@torch.inference_mode()
def test_the_decoder_is_its_formula_written_out_in_float64(model: GPT, tokens: Tokens) -> None:
    """Positions, attention, norms, MLPs, blocks and head, part for part as the papers write them (tests/written.py)."""
    for parameter in model.parameters():
        if parameter.dim() == 1:  # gains that are one and biases that are zero would hide
            parameter.normal_(1.0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    model.double()
    x = tokens(1, 12)[0]
    n_prefix = 5 if model.config.prefix_lm else 0
    ours = model(x[None], prefix=(torch.arange(12) < n_prefix)[None] if n_prefix else None)[0]
    slow = written.logits(model.config, model.state_dict(), x.tolist(), n_prefix)
    # Rotary and sinusoidal tables are kept in fp32, as everybody's are.
    exact = model.config.position in ("learned", "relative", "none")
    torch.testing.assert_close(ours, slow, atol=1e-12 if exact else 1e-5, rtol=0)


def test_a_part_put_in_from_outside_is_used_whatever_the_settings_said(build: Build, tokens: Tokens) -> None:
    class Half(Position):
        """Every head is multiplied by 1/2: any two columns that turn would do."""

        def angles(self, at: At) -> Angles:
            return torch.full((at.n_tokens, 8), 0.5), torch.zeros(at.n_tokens, 8)

    model, x = build(position="none", qk_norm=False), tokens(1, 6)
    halved = build(position="none", qk_norm=False)
    for layer in halved.model.layers:
        layer.self_attn.q_proj.weight.data /= 4
    model.model.position = Half()
    torch.testing.assert_close(model(x), halved(x), atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_a_norm_without_gains_is_its_formula_and_has_no_parameters(build: Build, kind: str) -> None:
    norm, x = build(norm=kind, norm_gain=False, norm_eps=1e-2).model.norm, normal(3, 32)
    slow = torch.stack([written.normalized(row, kind, 1e-2, None, None) for row in x])
    torch.testing.assert_close(norm.double()(x), slow, atol=1e-12, rtol=0)
    assert list(norm.parameters()) == []


@pytest.mark.parametrize("norm", [RMSNorm(512, eps=1e-6), GainFreeRMSNorm(512, eps=1e-6)], ids=["gain", "none"])
def test_rmsnorm_of_bf16_is_computed_in_fp32(norm: nn.Module) -> None:
    x = normal(4, 512, dtype=torch.bfloat16)
    assert torch.equal(norm(x), norm(x.float()).bfloat16())
    assert torch.equal(norm.bfloat16()(x), norm(x.float()).bfloat16())


def test_capped_logits_stay_below_the_cap_in_their_order() -> None:
    x = torch.tensor([-1e4, -30.0, -1e-3, 0.0, 1e-3, 5.0, 30.0, 1e4], dtype=torch.float64)
    capped = Softcap(15.0)(x)
    torch.testing.assert_close(capped, 15 * torch.tanh(x / 15))
    assert capped.abs().max() <= 15 and torch.equal(capped.argsort(stable=True), torch.arange(8))
    torch.testing.assert_close(capped[2:5], x[2:5], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu", "relu2"])
def test_a_plain_mlp_is_its_formula(kind: str) -> None:
    mlp, x = PlainMLP(ModelConfig(d_model=8, n_head=1, mlp=kind, mlp_bias=True)).double(), normal(3, 8)
    hidden = written.ACTIVATIONS[kind](x @ mlp.up_proj.weight.T + mlp.up_proj.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_a_gated_mlp_is_its_formula(kind: str) -> None:
    mlp, x = GatedMLP(ModelConfig(d_model=8, n_head=1, mlp=kind, mlp_bias=True)).double(), normal(3, 8)
    gate, up = (x @ part.weight.T + part.bias for part in (mlp.gate_proj, mlp.up_proj))
    expected = (written.ACTIVATIONS[kind](gate) * up) @ mlp.down_proj.weight.T + mlp.down_proj.bias
    torch.testing.assert_close(mlp(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_every_norm_has_the_epsilon_of_the_settings(build: Build, kind: str) -> None:
    norms = [module.eps for module in build(norm=kind, norm_eps=0.5).modules() if hasattr(module, "eps")]
    assert norms == [0.5] * (2 * 4 + 1)


@torch.inference_mode()
def test_features_are_what_the_head_turns_into_logits(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 6)
    torch.testing.assert_close(model.logits(model.features(x)), model(x), atol=1e-5, rtol=1e-5)
    logits, cap = model.features(x) @ model.lm_head.weight.T, model.config.logit_softcap
    torch.testing.assert_close(cap * torch.tanh(logits / cap) if cap else logits, model(x), atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("norm_at", ["pre", "post", "output"])
def test_the_embeddings_and_every_branch_are_dropped(build: Build, tokens: Tokens, norm_at: str) -> None:
    model, dropped = build(dropout=0.5, norm_at=norm_at).train(), []
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
        ({"rotary_dim": 7}, r"rotary_dim \(7\) must be even"),
        ({"rotary_dim": 66}, r"rotary_dim \(66\) must be at most head_dim \(64\)"),
        (
            {"rotary_dim": 2, "rope_scaling": {"kind": "dynamic", "factor": 2.0}},
            r"2 columns are one pair: use 'linear'",
        ),
        ({"position": "learned", "rotary_dim": 8}, r"are for position 'rotary', not 'learned'"),
        ({"position": "none", "nope_layers": (1,)}, r"are for position 'rotary', not 'none'"),
        ({"position": "sinusoidal", "rope_scaling": {"kind": "linear", "factor": 2.0}}, r"not 'sinusoidal'"),
        (
            {"position": "relative", "relative_max_distance": 16},
            r"\(16\) must be above half of relative_buckets \(32\)",
        ),
        ({"nope_layers": (6,)}, r"nope_layers names layer 6; the layers are 0 to 5"),
        ({"window": 3, "full_layers": (-1,)}, r"full_layers names layer -1; the layers are 0 to 5"),
        ({"full_layers": (1,)}, r"set window, or leave them out"),
        ({"rope_scaling": {"kind": "llama3", "factor": 8.0}}, r"llama3 scaling needs original_max_seq_len"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 8.0, "low_freq_factor": 4.0}},
            r"low_freq_factor \(4.0\) must be below high_freq_factor \(4.0\)",
        ),
        ({"rope_scaling": {"kind": "linear", "factor": 0.5}}, r"greater than or equal to 1"),
    ],
)
def test_contradictory_shapes_are_refused_with_their_values(settings: dict[str, object], words: str) -> None:
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
    assert ModelConfig(d_model=768, n_head=12, rotary_dim=16).d_rotary == 16
    mixed = ModelConfig(n_layer=3, window=7, full_layers=(1,))
    assert [mixed.window_of(layer) for layer in range(3)] == [7, None, 7]


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


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_first_weights_have_the_spread_that_the_settings_name(build: Build, settings: dict[str, object]) -> None:
    model = build(**(settings | {"n_layer": 8, "d_model": 64, "init_std": 0.05}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            into_the_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            rough = 4 / math.sqrt(2 * parameter.numel())  # four standard errors
            assert parameter.std().item() == pytest.approx(0.05 / 4 if into_the_stream else 0.05, rel=rough), name


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
    gain = 0 if not config.norm_gain else 2 if config.norm == "layernorm" else 1  # a bias beside each gain
    biases = {False: 0, "qkv": H * D + 2 * G * D, True: H * D + 2 * G * D + C}[config.attention_bias]
    attention = 2 * C * H * D + 2 * C * G * D + biases + gain * {False: 0, True: 2, "whole": H + G}[config.qk_norm] * D
    wide = 2 if config.mlp in ("swiglu", "geglu") else 1  # matrices into the hidden width
    mlp = (wide + 1) * C * F_ + config.mlp_bias * (wide * F_ + C)
    norms = (config.norm_at != "post") + config.embed_norm  # after the last block, and of the embeddings
    position = {"learned": 1024 * C, "relative": config.relative_buckets * H}.get(config.position, 0)
    embeddings = V * C * (1 if config.tie_embeddings else 2) + position
    expected = config.n_layer * (attention + mlp + gain * 2 * C) + gain * norms * C + embeddings
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
    assert not any("position" in name for name in model.state_dict()), (
        "tables follow from the settings; none are stored"
    )


def test_every_parameter_has_a_gradient_under_bf16_autocast(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 8)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert (logits - exact).abs().mean() < 0.05 * exact.abs().mean()
    logits.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.dim() == 2)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_few_steps_learn_a_batch_by_heart(build: Build, tokens: Tokens, settings: dict[str, object]) -> None:
    model = build(**(settings | {"init_std": 0.05})).train()
    x = tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


# ALiBi, from outside


class ALiBi(Position):
    """The further a key, the lower its score, by a slope of each head's own (Press et al. 2022): a part that gpt/ lacks."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, n_head + 1) / n_head), persistent=False)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        distance = queries[:, None, :, None] - keys[:, None, None]  # (B or 1, 1, T, S)
        return -self.slopes[:, None, None] * distance


@pytest.fixture
def alibi(build: Build) -> GPT:
    model = build(position="none", n_kv_head=2)
    model.model.position = ALiBi(4)
    return model


@torch.inference_mode()
def test_alibi_is_its_formula(alibi: GPT, tokens: Tokens) -> None:
    queries = torch.arange(6)[None]
    bias = alibi.model.position.bias(queries, queries)
    assert bias[0, :, 5].tolist() == [
        [-slope * (5 - s) for s in range(6)] for slope in (1 / 4, 1 / 16, 1 / 64, 1 / 256)
    ]
    x = tokens(1, 8)
    swapped = x[:, [1, 0, *range(2, 8)]]
    assert (alibi(x)[:, -1] - alibi(swapped)[:, -1]).abs().max() > 1e-3, "it tells the order"


def test_alibi_passes_every_invariant(alibi: GPT, build: Build, tokens: Tokens) -> None:
    with torch.inference_mode():
        test_future_tokens_do_not_change_past_logits(alibi, tokens)
        test_logits_depend_on_the_tokens_within_reach_and_on_no_other(alibi, tokens)
        test_rows_of_a_batch_do_not_see_each_other(alibi, tokens)
        test_a_packed_document_has_the_logits_it_has_alone(alibi, tokens)
        test_features_are_what_the_head_turns_into_logits(alibi, tokens)
    test_every_parameter_has_a_gradient_under_bf16_autocast(alibi, tokens)


@torch.inference_mode()
def test_alibi_decodes_with_the_cache_as_in_the_full_forward(alibi: GPT, tokens: Tokens) -> None:
    x, lengths = tokens(3, 12), torch.tensor([2, 7, 5])
    cache = alibi.new_cache(3, 12)
    pieces = torch.cat([alibi(part, cache=cache) for part in x.split([5, 1, 1, 5], dim=1)], dim=1)
    torch.testing.assert_close(pieces, alibi(x), atol=1e-5, rtol=0)
    cache = alibi.new_cache(3, 12)
    alibi(x[:, :7], cache=cache)
    cache.rewind(lengths)  # rows of unequal length
    steps = [alibi(x[torch.arange(3), lengths + i][:, None], cache=cache)[:, -1] for i in range(4)]
    for row, length in enumerate(lengths.tolist()):
        alone = alibi(x[row : row + 1, : length + 4])[0, length:]
        torch.testing.assert_close(torch.stack([step[row] for step in steps]), alone, atol=1e-5, rtol=0)


def test_alibi_learns_a_batch_by_heart(build: Build, tokens: Tokens) -> None:
    def make(**settings: object) -> GPT:
        model = build(position="none", **settings)
        model.model.position = ALiBi(4)
        return model

    test_a_few_steps_learn_a_batch_by_heart(make, tokens, {})


# It reads like a paper


def classes(room: str) -> list[ast.ClassDef]:
    tree = ast.parse((ROOM / f"{room}.py").read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def methods(room: str, *names: str) -> list[ast.FunctionDef]:
    return [f for c in classes(room) for f in c.body if isinstance(f, ast.FunctionDef) and f.name in names]


ROOMS = ["model", "attention", "positions", "cache", "loss"]


@pytest.mark.parametrize("room", ROOMS)
def test_no_class_is_longer_than_a_screen(room: str) -> None:
    lengths = {c.name: (c.end_lineno or 0) - c.lineno + 1 for c in classes(room)}
    assert not {name: n for name, n in lengths.items() if n >= 80}


@pytest.mark.parametrize("room", ["model", "attention", "positions"])
def test_no_forward_names_a_family(room: str) -> None:
    families = re.compile("gpt-?[12]|openai|llama|mistral|qwen|olmo|smol|nanochat|t5")
    for forward in methods(room, "forward", "embed", "angles", "bias", "project", "mask"):
        named = {node.id for node in ast.walk(forward) if isinstance(node, ast.Name)}
        named |= {node.attr for node in ast.walk(forward) if isinstance(node, ast.Attribute)}
        named |= {str(node.value) for node in ast.walk(forward) if isinstance(node, ast.Constant)}
        assert not [name for name in named if families.search(name.lower())]


def test_no_forward_asks_which_variant_it_is() -> None:
    """Its conditions are about its arguments; of the module itself they know the context's length alone."""
    forwards = methods("model", "forward", "project")
    assert len(forwards) > 8
    for forward in forwards:
        for node in ast.walk(forward):
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                asked = {ast.unparse(n) for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                assert {name for name in asked if name.startswith("self")} <= {"self.max_seq_len"}
                assert "config" not in ast.unparse(node.test)
                assert not [n for n in ast.walk(node.test) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert not isinstance(node, ast.Match)
