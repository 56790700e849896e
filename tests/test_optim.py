"""Optimizers: Muon against torch's, what decays, and state that survives being written down."""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt import hf, runtime
from gpt.checkpoint import serialize
from gpt.model import GPT
from gpt.optim import AdamW, Muon, OptimConfig, Optimizer, orthogonalize

Build = Callable[..., GPT]
KINDS = {
    "adamw": OptimConfig(kind="adamw", lr=1e-2),
    "muon": OptimConfig(kind="muon", lr=2e-2, adamw_lr=3e-3, weight_decay=0.05),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def config(request: pytest.FixtureRequest) -> OptimConfig:
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(model: GPT, optimizer: Optimizer, steps: range) -> None:
    """Updates with gradients that depend on the step alone."""
    for step in steps:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = normal(*parameter.shape, seed=1000 * step + i)
        optimizer.step(1.0 / step)


# Muon


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (1, 8)])
def test_orthogonalizing_brings_every_singular_value_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, _, vh = torch.linalg.svd(normal(3, *shape), full_matrices=False)
    spread = torch.linspace(0.1, 1.0, min(shape))
    near = orthogonalize((u * spread @ vh).to(dtype)).float()
    values = torch.linalg.svdvals(near)
    assert values.min() > 0.6 and values.max() < 1.3
    turned = u.mT @ near @ vh.mT  # diagonal: the singular vectors are those of the input
    assert (turned - turned.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 0.05


def test_orthogonalizing_forgets_the_scale_and_survives_zero() -> None:
    g = normal(1, 16, 32).bfloat16()
    torch.testing.assert_close(orthogonalize(1e3 * g), orthogonalize(g), atol=0.05, rtol=0)
    assert not orthogonalize(torch.zeros(2, 8, 8)).any()


def test_adamw_makes_torchs_updates_bit_for_bit_and_keeps_the_same_state() -> None:
    ours = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate([(48, 16), (16,), (8, 8)])]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    how = [{"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": decay} for decay in (0.1, 0.0)]
    mine = AdamW([{"params": some, **given} for some, given in zip((ours[:2], ours[2:]), how, strict=True)])
    torchs = torch.optim.AdamW(
        [{"params": some, **given} for some, given in zip((theirs[:2], theirs[2:]), how, strict=True)], fused=True
    )
    for step in range(1, 6):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if (step, i) != (2, 1):  # one that takes no part has no gradient
                a.grad = normal(*a.shape, seed=100 * step + i)
                b.grad = a.grad.clone()
        mine.step()
        torchs.step()
        mine.zero_grad()
        torchs.zero_grad()
        assert all(parameter.grad is None for parameter in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert mine.state[a].keys() == torchs.state[b].keys()
        assert all(torch.equal(value, torchs.state[b][kind]) for kind, value in mine.state[a].items())


@pytest.mark.parametrize("native", [True, False])
def test_muon_makes_torchs_updates(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a momentum that changes too; where bfloat16 is slow ours computes in fp32, within the rounding of theirs."""
    dtype = "bfloat16" if native else "float32"
    monkeypatch.setattr(runtime, "best_dtype", lambda device: (dtype, ""))
    shapes = [(48, 16), (16, 48), (32, 32), (48, 16)]
    ours = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    mine = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original")
    for step in range(1, 6):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = normal(*a.shape, seed=100 * step + i)
            b.grad = a.grad.clone()
        mine.param_groups[0]["momentum"] = torchs.param_groups[0]["momentum"] = 0.8 + 0.02 * step
        mine.step()
        torchs.step()
        for a, b, first in zip(ours, theirs, start, strict=True):
            bound = 0.01 if native else 0.02  # products in another order; against those of fewer bits
            assert (a - b).norm() < bound * (b - first).norm()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(mine.state[a]["momentum_buffer"], torchs.state[b]["momentum_buffer"])


def test_cautious_decay_takes_only_from_weights_that_the_update_makes_smaller() -> None:
    begun, gradient = normal(24, 8), normal(24, 8, seed=1)
    ends = {}
    for decay, cautious in ((0.0, False), (0.5, False), (0.5, True)):
        weight = nn.Parameter(begun.clone())
        weight.grad = gradient.clone()
        Muon([weight], lr=0.1, momentum=0.9, weight_decay=decay, cautious=cautious).step()
        ends[decay, cautious] = weight.detach()
    update = begun - ends[0.0, False]
    agrees = update * begun > 0
    assert 0.2 < agrees.float().mean() < 0.8
    torch.testing.assert_close(ends[0.5, True], torch.where(agrees, ends[0.5, False], ends[0.0, False]))


def test_compiled_products_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    for shape in ((3, 48, 16), (2, 16, 48)):
        g = normal(*shape)
        torch.testing.assert_close(runtime.compiled(orthogonalize)(g), orthogonalize(g))


def test_queries_keys_and_values_that_a_file_holds_as_one_are_matrices_of_their_own(build: Build) -> None:
    model = build(position="learned", norm="layernorm", mlp="gelu", attention_bias=True, mlp_bias=True, qk_norm=False)
    on_disk = hf.to_disk(model.config, model.state_dict())
    assert on_disk["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    found = decays(Optimizer(model, KINDS["muon"]))
    for which in "qkv":
        assert found[f"model.layers.0.self_attn.{which}_proj.weight"][0] == "Muon"


# Who is updated by what


def decays(optimizer: Optimizer) -> dict[str, tuple[str, float]]:
    """Parameter name -> (its optimizer, its weight decay)."""
    return {
        optimizer.names[parameter]: (type(part).__name__, group["weight_decay"])
        for part in optimizer.parts
        for group in part.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_norms_biases_and_embeddings_do_not(build: Build, config: OptimConfig, tied: bool) -> None:
    model = build(tie_embeddings=tied, attention_bias=True, mlp_bias=True)
    found = decays(Optimizer(model, config))
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (_, decay) in found.items():
        matrix = name.endswith("_proj.weight") or name == "lm_head.weight"
        assert decay == (config.weight_decay if matrix else 0), name


def test_muon_moves_the_matrices_of_the_blocks_alone(build: Build) -> None:
    found = decays(Optimizer(build(tie_embeddings=False), KINDS["muon"]))
    assert {name for name, (part, _) in found.items() if part == "Muon"} == {
        name for name in found if name.endswith("_proj.weight")
    }


def test_every_parameter_is_updated_once(build: Build, config: OptimConfig) -> None:
    model = build(tie_embeddings=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, config)
    walk(model, optimizer, range(1, 2))
    assert sum(len(group["params"]) for part in optimizer.parts for group in part.param_groups) == len(before)
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adamw_makes_the_updates_of_the_paper(build: Build) -> None:
    config = OptimConfig(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    model = build()
    name, weight = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr]
    index = [n for n, _ in model.named_parameters()].index(name)
    w, m, v = weight.detach().double(), torch.zeros(()), torch.zeros(())
    walk(model, Optimizer(model, config), range(1, 4))
    for step in range(1, 4):
        g, lr = normal(*w.shape, seed=1000 * step + index).double(), 1e-2 / step
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w * (1 - lr * 0.1) - lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_gradients_are_clipped_by_the_norm_that_a_step_is_told(build: Build, config: OptimConfig, limit: float) -> None:
    """As torch.nn.utils.clip_grad_norm_ does it before a step; those that are short enough keep their bits."""
    models = [build(), build()]
    for clip, model in zip((limit, None), models, strict=True):
        optimizer = Optimizer(model, config.model_copy(update={"clip": clip}))
        for step in range(1, 4):
            for i, parameter in enumerate(model.parameters()):
                # Of sizes far apart: one that is not clipped outweighs in the averages those that are.
                parameter.grad = normal(*parameter.shape, seed=1000 * step + i) * 10.0 ** (-2 * (step % 2))
            most = limit if clip is None else math.inf
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
            optimizer.step(1.0, step, norm)
            assert all(parameter.grad is None for parameter in model.parameters())
    coarse = {"rtol": 0.0, "atol": 2e-3 if config.kind == "muon" else 1e-5} if limit < 1 else {"rtol": 0.0, "atol": 0.0}
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, **coarse)


@pytest.mark.parametrize(
    ("best", "expected"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float32")]
)
def test_muon_multiplies_in_a_dtype_that_holds_small_gradients(
    build: Build, monkeypatch: pytest.MonkeyPatch, best: str, expected: str
) -> None:
    monkeypatch.setattr(runtime, "best_dtype", lambda device: (best, "as asked"))
    optimizer = Optimizer(build(), OptimConfig(kind="muon", lr=0.02))
    (muon,) = (part for part in optimizer.parts if isinstance(part, Muon))
    assert muon.dtype == runtime.DTYPES[expected]


def test_what_changes_with_the_step_is_a_function_of_it(build: Build) -> None:
    how = {"kind": "muon", "lr": 0.02, "weight_decay": 0.4, "momentum_warmup": 4, "momentum": 0.95}
    for scheduled in (False, True):
        model = build()
        optimizer = Optimizer(model, OptimConfig(**how, scheduled_decay=scheduled))
        (muon,) = (part for part in optimizer.parts if isinstance(part, Muon))
        for update, momentum, factor in (
            (1, 0.85, 0.25),
            (3, 0.9, 0.75),
            (5, 0.95, 1.0),
            (1, 0.85, 0.25),
            (None, 0.95, 1.0),
        ):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step(factor, update)
            (group,) = muon.param_groups
            assert group["momentum"] == pytest.approx(momentum)
            assert group["weight_decay"] == pytest.approx(0.4 * (factor if scheduled else 1))


def test_a_factor_of_zero_moves_nothing_and_is_not_remembered(build: Build, config: OptimConfig) -> None:
    model = build()
    optimizer = Optimizer(model, config)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    walk(model, optimizer, range(2, 3))
    rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
    assert sorted(set(rates)) == sorted({config.lr / 2, (config.adamw_lr or config.lr) / 2})


# State


def test_updates_go_on_bit_for_bit_from_written_state(build: Build, config: OptimConfig) -> None:
    straight = build()
    walk(straight, first := Optimizer(straight, config), range(1, 4))
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    state = {name: value.clone() for name, value in first.state().items()}
    walk(straight, first, range(4, 7))

    resumed = build(seed=9)
    resumed.load_state_dict(weights)
    second = Optimizer(resumed, config)
    second.load_state(state)
    walk(resumed, second, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert first.state().keys() == second.state().keys()
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


def test_a_state_is_written_as_the_same_bytes_however_it_came_to_be(build: Build, config: OptimConfig) -> None:
    """By updates alone, or read from files that hold it in any order and then by updates."""
    straight, resumed = build(), build()
    walk(straight, first := Optimizer(straight, config), range(1, 3))
    walk(resumed, Optimizer(resumed, config), range(1, 3))
    second = Optimizer(resumed, config)
    second.load_state(dict(reversed([(name, value.clone()) for name, value in first.state().items()])))
    for model, optimizer in ((straight, first), (resumed, second)):
        walk(model, optimizer, range(3, 5))
    written = [b"".join(serialize(optimizer.state(), {})) for optimizer in (first, second)]
    assert written[0] == written[1]


def test_loaded_state_is_a_copy(build: Build, config: OptimConfig) -> None:
    model = build()
    walk(model, optimizer := Optimizer(model, config), range(1, 2))
    state = {name: value.clone() for name, value in optimizer.state().items()}
    kept = {name: value.clone() for name, value in state.items()}
    again = Optimizer(model, config)
    again.load_state(state)
    walk(model, again, range(2, 4))
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_state_is_named_by_parameter(build: Build) -> None:
    model = build()
    assert Optimizer(model, KINDS["muon"]).state() == {}
    walk(model, optimizer := Optimizer(model, KINDS["muon"]), range(1, 2))
    state, norm = optimizer.state(), "model.norm.weight"
    assert {f"{norm}:step", f"{norm}:exp_avg", f"{norm}:exp_avg_sq"} < state.keys()
    assert "model.layers.1.mlp.down_proj.weight:momentum_buffer" in state
    assert state[f"{norm}:step"].item() == 1


def test_state_of_another_model_is_refused_by_name(build: Build) -> None:
    optimizer = Optimizer(build(), KINDS["adamw"])
    with pytest.raises(ValueError, match=r"'model\.layers\.7\.up\.weight:exp_avg' belongs to no parameter"):
        optimizer.load_state({"model.layers.7.up.weight:exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight:exp_avg' has shape \(3,\), the parameter \(32,\)"):
        optimizer.load_state({"model.norm.weight:exp_avg": torch.zeros(3)})


# 8-bit averages


EIGHT = OptimConfig(kind="adamw", lr=1e-2, state="8bit")


def test_8_bit_averages_make_nearly_the_same_updates(build: Build) -> None:
    pytest.importorskip("torchao")
    ours, theirs, began = build(d_model=64), build(d_model=64), build(d_model=64)
    walk(ours, Optimizer(ours, EIGHT), range(1, 6))
    walk(theirs, Optimizer(theirs, OptimConfig(kind="adamw", lr=1e-2)), range(1, 6))
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), began.parameters(), strict=True):
        assert (a - b).norm() <= 0.05 * (b - c).norm(), name


def test_8_bit_averages_are_a_byte_a_number_in_the_blocks_and_fp32_elsewhere(build: Build) -> None:
    pytest.importorskip("torchao")
    model = build(d_model=64)
    walk(model, optimizer := Optimizer(model, EIGHT), range(1, 2))
    state, matrix = optimizer.state(), "model.layers.0.mlp.up_proj.weight"
    assert state[f"{matrix}:exp_avg.codes"].dtype == torch.uint8
    assert state[f"{matrix}:exp_avg.codes"].shape == model.get_parameter(matrix).shape
    assert state[f"{matrix}:exp_avg_sq.scale"].numel() == model.get_parameter(matrix).numel() // 256
    assert state["model.embed_tokens.weight:exp_avg"].dtype == torch.float32


def test_updates_go_on_bit_for_bit_from_8_bit_averages_in_a_safetensors_file(build: Build, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    straight = build(d_model=64)
    walk(straight, first := Optimizer(straight, EIGHT), range(1, 4))
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    (tmp_path / "x.safetensors").write_bytes(b"".join(serialize(first.state(), {})))
    walk(straight, first, range(4, 7))
    resumed = build(d_model=64, seed=9)
    resumed.load_state_dict(weights)
    second = Optimizer(resumed, EIGHT)
    second.load_state(load_file(tmp_path / "x.safetensors"))
    walk(resumed, second, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert first.state().keys() == second.state().keys()
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


def test_8_bit_averages_are_refused_without_torchao_and_beside_muon(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"optim.state=8bit needs torchao.*pip install.*or set optim.state=fp32"):
        Optimizer(build(), EIGHT)
    with pytest.raises(ValidationError, match=r"state \(8bit\) is for kind 'adamw': Muon's momentum stays fp32"):
        OptimConfig(kind="muon", state="8bit")


def test_frozen_parameters_have_no_state_and_stay(build: Build) -> None:
    model = build().requires_grad_(False)
    trained = model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    walk(model, optimizer := Optimizer(model, OptimConfig(lr=1e-2)), range(1, 3))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"model.layers.0.mlp.up_proj.weight"}
    assert len(optimizer.state()) == 3 and optimizer.names[trained] in moved


def test_where_muon_has_all_that_is_trained_no_other_rule_has_nothing(build: Build) -> None:
    """Apple's GPUs refuse an operation on no tensors at all."""
    model = build().requires_grad_(False)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(True)
    walk(model, optimizer := Optimizer(model, OptimConfig(kind="muon")), range(1, 3))
    assert all(group["params"] for part in optimizer.parts for group in part.param_groups)


# Settings


def test_contradictory_settings_are_refused_with_their_values() -> None:
    with pytest.raises(ValidationError, match=r"adamw_lr \(0.1\) is for kind 'muon'"):
        OptimConfig(kind="adamw", adamw_lr=0.1)
    with pytest.raises(ValidationError, match=r"momentum_warmup \(300\) is for kind 'muon'"):
        OptimConfig(kind="adamw", momentum_warmup=300)
    with pytest.raises(ValidationError, match=r"cautious is for kind 'muon'"):
        OptimConfig(kind="adamw", cautious=True)
    with pytest.raises(ValidationError, match=r"ema \(0.999\) is a half-life.*set ema: 693"):
        OptimConfig(ema=0.999)
    with pytest.raises(ValidationError, match=r"betas \(0.9, 1.0\) must lie in \[0, 1\)"):
        OptimConfig(betas=(0.9, 1.0))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_reset_optimizer_steps_as_a_new_one_and_dropped_gradients_are_gone(build: Build, kind: str) -> None:
    model, other = build(), build()
    mine, new = (Optimizer(each, OptimConfig(kind=kind)) for each in (model, other))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mine.drop()
    assert all(parameter.grad is None for parameter in model.parameters())
    for turn in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 + turn)
        mine.step(1.0)
    mine.reset()
    assert mine.state() == {}
    model.load_state_dict(other.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        a.grad, b.grad = torch.full_like(a, 0.3), torch.full_like(b, 0.3)
    mine.step(1.0)
    new.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
