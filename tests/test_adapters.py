"""Adapters: the formulas of their papers, the base until something is learned, and the names that PEFT reads."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gpt import adapters, checkpoint, config, families, hf, tokenizer
from gpt.adapters import AdapterConfig
from gpt.checkpoint import serialize
from gpt.loss import NextToken
from gpt.model import GPT
from gpt.optim import OptimConfig, Optimizer

KINDS = [AdapterConfig(kind=kind, rank=4, rslora=rslora) for kind in ("lora", "dora") for rslora in (False, True)]
SHAPES: dict[str, dict[str, Any]] = {
    "ours": {},
    "llama": {"qk_norm": False, "n_kv_head": 2, "tie_embeddings": False},
    "qwen2": {"qk_norm": False, "attention_bias": "qkv"},
    "gpt2": {
        "norm": "layernorm", "position": "learned", "mlp": "gelu_tanh", "attention_bias": True, "mlp_bias": True,
        "qk_norm": False, "d_ff": 128,
    },
    "nanochat": {
        "norm_gain": False, "embed_norm": True, "mlp": "relu2", "d_ff": 128, "logit_softcap": 15.0, "tie_embeddings": False,
    },
}  # fmt: skip


def put_on(model: GPT, config: AdapterConfig) -> GPT:
    adapters.put_on(model, config)
    adapters.fill(model, 7)
    return model


def learn(model: GPT) -> GPT:
    """As if something had been learned: every trained number moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model


def trained(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_new_adapter_is_the_base_bit_for_bit(build, tokens, shape: dict[str, Any], config: AdapterConfig) -> None:
    model = build(**shape)
    before = model(tokens(2, 9))
    assert torch.equal(put_on(model, config)(tokens(2, 9)), before)
    assert not torch.equal(learn(model)(tokens(2, 9)), before)
    assert torch.equal(adapters.merge(put_on(build(**shape), AdapterConfig(rank=2)))(tokens(2, 9)), before)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_wrapped_linear_computes_the_papers_formula(config: AdapterConfig) -> None:
    torch.manual_seed(1)
    base, x = nn.Linear(12, 20), torch.randn(5, 12)
    pair = adapters.KINDS[config.kind](base, config)
    pair.fill(torch.Generator().manual_seed(1))
    with torch.no_grad():
        pair.lora_B.normal_()
        scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        weight = base.weight + scale * pair.lora_B @ pair.lora_A
        if config.kind == "dora":
            pair.magnitude.uniform_(0.5, 2)
            weight = pair.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        assert torch.allclose(pair(x), x @ weight.T + base.bias, atol=1e-5)
        assert torch.allclose(pair.weight, weight, atol=1e-6)


def test_dora_takes_the_length_for_a_constant_in_the_gradient(build) -> None:
    torch.manual_seed(1)
    base, x = nn.Linear(6, 8, bias=False), torch.randn(5, 6)
    pair = adapters.Decomposed(base, AdapterConfig(kind="dora", rank=2))
    pair.fill(torch.Generator().manual_seed(1))
    with torch.no_grad():
        pair.lora_B.normal_()
    given = torch.randn(5, 8)
    (pair(x) * given).sum().backward()
    assert pair.lora_B.grad is not None
    held = (pair.magnitude / (base.weight + pair.scale * pair.lora_B @ pair.lora_A).norm(dim=1)).detach()
    expected = (given * held).T @ (x @ pair.lora_A.T * pair.scale)
    assert torch.allclose(pair.lora_B.grad, expected, rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_trained_and_only_it_has_states(build, tokens) -> None:
    model = put_on(build(), AdapterConfig(rank=2, targets=("q_proj", "v_proj")))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained(model)} == {"lora_A", "lora_B"}
    optimizer = Optimizer(model, OptimConfig(lr=0.1))
    NextToken(model)(tokens(2, 9), tokens(2, 9, seed=1)).backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer.step(1.0)
    assert {key.rpartition(":")[0] for key in optimizer.state()} == trained(model).keys()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_muon_leaves_an_adapter_on_the_head_alone_to_adamw(build, tokens) -> None:
    model = put_on(build(tie_embeddings=False), AdapterConfig(rank=2, targets=("lm_head",)))
    optimizer = Optimizer(model, OptimConfig(kind="muon"))
    NextToken(model)(tokens(2, 9), tokens(2, 9, seed=1)).backward()
    optimizer.step(1.0)
    assert {key.rpartition(":")[0] for key in optimizer.state()} == trained(model).keys()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_head_of_its_own_can_be_a_target(build, tokens, kind: str) -> None:
    model = learn(put_on(build(tie_embeddings=False), AdapterConfig(kind=kind, rank=2, targets=("lm_head",))))
    assert trained(model).keys() <= {f"lm_head.{part}" for part in ("lora_A", "lora_B", "magnitude")}
    given, targets = tokens(2, 9), tokens(2, 9, seed=1)
    loss = NextToken(model)(given, targets)
    written = nn.functional.cross_entropy(model(given).flatten(0, 1), targets.flatten(), reduction="sum")
    assert torch.allclose(loss, written, rtol=1e-5)
    loss.backward()
    got = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    written.backward()
    for name, parameter in trained(model).items():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_off_is_the_base_and_what_was_learned_comes_back(
    build, tokens, tied: bool, embeddings: bool, kind: str
) -> None:
    model = build(tie_embeddings=tied)
    before = model(tokens(2, 9))
    learn(put_on(model, AdapterConfig(kind=kind, rank=2, embeddings=embeddings)))
    after = model(tokens(2, 9))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapters.off(model), torch.no_grad():
        assert torch.equal(model(tokens(2, 9)), before)
    with pytest.raises(KeyError), adapters.off(model):
        raise KeyError
    assert torch.equal(model(tokens(2, 9)), after)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("config", KINDS, ids=str)
def test_merged_gives_the_adapters_logits_and_is_a_plain_model(
    build, tokens, shape: dict[str, Any], config: AdapterConfig
) -> None:
    config = config.model_copy(update={"embeddings": True})
    model = learn(put_on(build(**shape), config))
    before = model(tokens(2, 9))
    exact = copy.deepcopy(model).double()
    learned = exact(tokens(2, 9))
    assert (adapters.merge(exact)(tokens(2, 9)) - learned).abs().max() < 1e-11 * learned.abs().max()
    plain = adapters.merge(copy.deepcopy(model))
    assert plain.state_dict().keys() == build(**shape).state_dict().keys()
    assert all(p.requires_grad for p in plain.parameters())
    assert (plain(tokens(2, 9)) - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "targets", ["all", ("q_proj", "v_proj"), ("o_proj",), ("layers.1.self_attn.k_proj", "down_proj")]
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_is_stored_comes_back_bit_for_bit(build, shape: dict[str, Any], targets: Any, kind: str) -> None:
    config = AdapterConfig(kind=kind, rank=3, targets=targets, embeddings=True)
    model = learn(put_on(build(**shape), config))
    again = put_on(build(**shape), config)
    adapters.load(again, adapters.to_peft(model))
    assert all(torch.equal(tensor, trained(again)[name]) for name, tensor in trained(model).items())


def test_a_base_that_is_no_plain_linear_is_only_called(tokens) -> None:
    class Doubled(nn.Module):
        """Keeps its numbers as integers."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bias = 4, 6, None
            self.register_buffer("codes", torch.arange(24, dtype=torch.int8).view(6, 4))

        @property
        def weight(self) -> torch.Tensor:
            return self.codes * 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    for kind in adapters.KINDS.values():
        pair = kind(Doubled(), AdapterConfig(rank=2))
        pair.fill(torch.Generator().manual_seed(1))
        x = torch.randn(3, 4)
        assert torch.equal(pair(x), pair.base(x))


def test_dropout_of_the_adapter_leaves_the_base_alone(build, tokens) -> None:
    model = put_on(build(), AdapterConfig(rank=2, dropout=0.5)).train()
    assert torch.equal(model(tokens(2, 9)), model(tokens(2, 9))), "what it hides adds nothing yet"
    learn(model)
    assert not torch.equal(model(tokens(2, 9)), model(tokens(2, 9)))
    assert torch.equal(model.eval()(tokens(2, 9)), model(tokens(2, 9)))


def test_rows_of_zeros_do_not_break_dora(build, tokens) -> None:
    model = build(init_output="zero")
    before = model(tokens(2, 9))
    model = put_on(model, AdapterConfig(kind="dora", rank=2)).train()
    assert torch.equal(model(tokens(2, 9)), before)
    NextToken(model)(tokens(2, 9), tokens(2, 9)).backward()
    assert all(torch.isfinite(p.grad).all() for p in trained(model).values())


def test_targets_are_found_by_the_ends_of_their_names(build) -> None:
    model = build(tie_embeddings=False)
    assert adapters.targeted(model, AdapterConfig(targets=("q_proj", "layers.1.mlp.up_proj", "lm_head"))) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head",
    ]  # fmt: skip
    assert len(adapters.targeted(model, AdapterConfig())) == 2 * 7
    with pytest.raises(ValueError, match=r"no linear 'c_attn'; it has q_proj, k_proj, v_proj, o_proj.*lm_head"):
        adapters.put_on(model, AdapterConfig(targets=("q_proj", "c_attn")))
    with pytest.raises(ValueError, match="keep one of the two"):
        adapters.put_on(model, AdapterConfig(targets=("lm_head",), embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head is the embedding.*adapter.embeddings=true"):
        adapters.put_on(build(), AdapterConfig(targets=("lm_head",)))
    assert all(p.requires_grad for p in model.parameters()), "a refused adapter changes nothing"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("targets: []", "trains nothing"),
        ("rank: 0", "at least 1"),
        ("kind: ia3", "is not one of lora, dora"),
        ("targets: some", "adapter|targets"),
        ("dropout: 1", "less than 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, asked: str, words: str) -> None:
    (tmp_path / "x.yaml").write_text(asked)
    with pytest.raises(ValueError, match=words):
        config.load(AdapterConfig, tmp_path / "x.yaml", [])


def test_settings_come_back_from_their_yaml(tmp_path: Path) -> None:
    for given in (AdapterConfig(), AdapterConfig(targets=("q_proj", "v_proj"), kind="dora")):
        (tmp_path / "x.yaml").write_text(config.dump(given))
        assert config.load(AdapterConfig, tmp_path / "x.yaml", []) == given


# PEFT

OTHERS: dict[str, dict[str, Any]] = {  # of the other families
    "qwen3": {"qk_norm": True, "n_kv_head": 2},
    "mistral": {"qk_norm": False, "window": 8},
    "olmo2": {"norm_at": "output", "qk_norm": "whole"},
    "smollm3": {"qk_norm": False, "nope_layers": (1,)},
    "openai": SHAPES["gpt2"] | {"norm_at": "post"},
}


@pytest.fixture(scope="module")
def vocabulary() -> tokenizer.Tokenizer:
    return tokenizer.train(["the river runs to the sea " * 20], "bpe", 270)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("shape", [*(name for name in SHAPES if name != "ours"), *OTHERS])
@pytest.mark.parametrize(
    "given",
    [
        {"targets": "all"},
        {"targets": "all", "kind": "dora"},
        {"targets": ("q_proj", "v_proj"), "rslora": True},
        {"targets": ("k_proj", "o_proj"), "kind": "dora", "rslora": True},
        {"targets": ("q_proj",), "embeddings": True},
    ],
    ids=str,
)
def test_peft_gives_the_same_logits(
    build, tmp_path: Path, vocabulary: tokenizer.Tokenizer, shape: str, given: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    given_shape = (SHAPES | OTHERS)[shape] | {"vocab_size": vocabulary.padded_size}
    model = build(init_std=0.1, **given_shape)
    (tmp_path / "base").mkdir()
    for name, data in hf.model_files(model.config, vocabulary).items():
        (tmp_path / "base" / name).write_bytes(data)
    blocks = serialize(hf.to_disk(model.config, model.state_dict()), {"format": "pt"})
    (tmp_path / "base" / "model.safetensors").write_bytes(b"".join(map(bytes, blocks)))
    asked = AdapterConfig(rank=3, **given)
    learn(put_on(model, asked))
    base = hf.base(str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    for name, data in hf.adapter_files(model, vocabulary, asked, base).items():
        (tmp_path / "adapter" / name).write_bytes(data)
    blocks = serialize(adapters.to_peft(model), {"format": "pt"})
    (tmp_path / "adapter" / checkpoint.ADAPTER_WEIGHTS).write_bytes(b"".join(map(bytes, blocks)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = torch.randint(270, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(tokens)
        assert (loaded(tokens).logits - ours).abs().max() < 1e-5 * max(1, float(ours.abs().max()))
    held = set(load_file(tmp_path / "adapter" / checkpoint.ADAPTER_WEIGHTS))
    read = peft.get_peft_model_state_dict(loaded)
    assert set(read) == held, "PEFT would write the same names"
    assert all(read[name].shape == tensor.shape for name, tensor in adapters.to_peft(model).items())
    assert theirs.config.architectures != [families.OURS]
    merged, _ = hf.load(tmp_path / "adapter")
    with torch.no_grad():
        assert (merged(tokens) - ours).abs().max() < 1e-5 * max(1, float(ours.abs().max()))
