"""Families of transformers: each computes there what it computes here, in both directions, and what we lack is refused.

A row of the matrix is a model of odd shape that transformers initialised; a column is something that must be equal.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from gpt import families, hf
from gpt import tokenizer as tokenizers
from gpt.generate import Sampling, generate
from gpt.model import GPT, ModelConfig
from gpt.tokenizer import Tokenizer

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCAB = 131  # the letters' tokenizer is smaller
LENGTH = 23
LLAMA_SHAPE = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 48,
}  # fmt: skip
GPT_SHAPE = {"n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 48}
NO_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def rope(kind: str = "default", theta: float = 5000.0, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}}


@dataclass(frozen=True)
class Case:
    config: Any
    shape: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""  # that our export names, where it is another one that computes the same


LLAMA, MISTRAL, QWEN2 = transformers.LlamaConfig, transformers.MistralConfig, transformers.Qwen2Config
QWEN3, OLMO2, SMOLLM3 = transformers.Qwen3Config, transformers.Olmo2Config, transformers.SmolLM3Config
NANOCHAT, GPT2, GPT1 = transformers.NanoChatConfig, transformers.GPT2Config, transformers.OpenAIGPTConfig
SOME_WINDOWS = ["full_attention", "sliding_attention", "full_attention"]
MATRIX = {
    "GPT-1": Case(GPT1, GPT_SHAPE),
    "GPT-1, untied, relu": Case(GPT1, GPT_SHAPE | {"tie_word_embeddings": False, "afn": "relu"}),
    "GPT-2": Case(GPT2, GPT_SHAPE),
    "GPT-2, untied, wide, exact gelu": Case(
        GPT2, GPT_SHAPE | {"tie_word_embeddings": False, "n_inner": 51, "activation_function": "gelu"}
    ),
    "Llama 2": Case(LLAMA, LLAMA_SHAPE | rope()),
    "Llama, biases, tied, GeGLU": Case(
        LLAMA,
        LLAMA_SHAPE
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}
        | rope(),
    ),
    "Llama 3": Case(
        LLAMA,
        LLAMA_SHAPE
        | rope(
            "llama3",
            5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=13,
        ),
    ),
    "Llama, linear": Case(LLAMA, LLAMA_SHAPE | rope("linear", factor=2.5)),
    "Llama, dynamic": Case(LLAMA, LLAMA_SHAPE | {"max_position_embeddings": 16} | rope("dynamic", factor=3.0)),
    "Llama, YaRN": Case(
        LLAMA, LLAMA_SHAPE | rope("yarn", factor=3.0, original_max_position_embeddings=16, beta_fast=6.0)
    ),
    "Mistral": Case(MISTRAL, LLAMA_SHAPE | {"sliding_window": 7} | rope()),
    "Mistral, no window": Case(MISTRAL, LLAMA_SHAPE | {"sliding_window": None} | rope(), "LlamaForCausalLM"),
    "Qwen2": Case(QWEN2, LLAMA_SHAPE | rope()),
    "Qwen2, windows, tied": Case(
        QWEN2,
        LLAMA_SHAPE
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True}
        | rope(),
    ),
    "Qwen3": Case(QWEN3, LLAMA_SHAPE | rope()),
    "Qwen3, windows, YaRN, biases": Case(
        QWEN3,
        LLAMA_SHAPE
        | {"use_sliding_window": True, "sliding_window": 5, "layer_types": SOME_WINDOWS, "attention_bias": True}
        | rope("yarn", factor=4.0, original_max_position_embeddings=12, mscale=0.9, mscale_all_dim=0.5),
    ),
    "OLMo 2": Case(OLMO2, LLAMA_SHAPE | rope()),
    "OLMo 2, tied, biases": Case(
        OLMO2, LLAMA_SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 6} | rope()
    ),
    "SmolLM3": Case(SMOLLM3, LLAMA_SHAPE | {"num_hidden_layers": 5, "no_rope_layer_interval": 2} | rope()),
    "SmolLM3, windows": Case(
        SMOLLM3,
        LLAMA_SHAPE
        | {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6, "tie_word_embeddings": False}
        | rope(),
    ),
    "NanoChat": Case(NANOCHAT, LLAMA_SHAPE | rope()),
    "NanoChat, biases, no cap": Case(
        NANOCHAT,
        LLAMA_SHAPE | {"attention_bias": True, "final_logit_softcapping": None, "tie_word_embeddings": True} | rope(),
    ),
    "NanoChat, YaRN": Case(NANOCHAT, LLAMA_SHAPE | rope("yarn", factor=4.0, original_max_position_embeddings=12)),
}
every = pytest.mark.parametrize("name", MATRIX)


@dataclass(frozen=True)
class Pair:
    """A model of transformers, the directory it wrote, ours that was read from there, and the directory ours wrote."""

    theirs: Any
    imported: Path
    ours: GPT
    tokenizer: Tokenizer
    exported: Path


def write(path: Path, config: ModelConfig, state: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    path.mkdir(exist_ok=True)
    for file, data in hf.model_files(config, tokenizer).items():
        (path / file).write_bytes(data)
    stored = {name: tensor.detach().clone() for name, tensor in hf.to_disk(config, state).items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train(["the river runs to the sea"], "char", None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Any:
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            case, path = MATRIX[name], tmp_path_factory.mktemp("family")
            torch.manual_seed(5)
            config = case.config(vocab_size=VOCAB, initializer_range=0.3, **NO_IDS, **case.shape)
            theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in theirs.parameters():  # gains and biases too
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            theirs.save_pretrained(path / "theirs")
            for file, data in tokenizer.files().items():
                (path / "theirs" / file).write_bytes(data)
            ours, _ = hf.load(path / "theirs")
            write(path / "ours", ours.config, ours.state_dict(), tokenizer)
            made[name] = Pair(theirs, path / "theirs", ours, tokenizer, path / "ours")
        return made[name]

    return pair


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def again(model: Any, dtype: torch.dtype) -> Any:
    """A fresh copy: transformers' dynamic angles remember the longest text that they have seen."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype)


def with_exact_norms(theirs: Any) -> Any:
    """transformers' RMSNorms compute in fp32 whatever the model's dtype: here the same formula in the dtype of x."""
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            weight = getattr(module, "weight", None)
            module.forward = lambda x, e=eps, w=weight: (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + e) * (1 if w is None else w)
            )
    return theirs


def with_exact_turns(ours: GPT, theirs: Any) -> None:
    """Cosines and sines in float64 on both sides, of the same fp32 angles.

    NanoChat normalizes queries and keys after they have turned, ours before. That is the same where cos^2 + sin^2 is 1,
    and of numbers rounded to fp32 it is 1 only to 1e-7.
    """
    positions = torch.arange(ours.config.max_seq_len)
    angles = torch.outer(positions.float(), theirs.model.rotary_emb.inv_freq.float()).double().repeat(1, 2)
    theirs.model.rotary_emb.forward = lambda x, position_ids: (angles[position_ids].cos(), angles[position_ids].sin())
    ours.model.position.cos, ours.model.position.sin = angles.cos(), angles.sin()


# The matrix


@every
def test_logits_are_those_of_transformers_in_fp32(pairs: Any, name: str) -> None:
    pair = pairs(name)
    with torch.inference_mode():
        expected = again(pair.theirs, torch.float32)(tokens()).logits
        torch.testing.assert_close(pair.ours(tokens()), expected, atol=1e-4, rtol=0)


@every
def test_logits_are_those_of_transformers_in_float64(pairs: Any, name: str) -> None:
    pair = pairs(name)
    ours, theirs = again(pair.ours, torch.float64), with_exact_norms(again(pair.theirs, torch.float64))
    if MATRIX[name].config is NANOCHAT:
        with_exact_turns(ours, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-9, rtol=0)


@every
def test_gradients_of_one_step_are_those_of_transformers(pairs: Any, name: str) -> None:
    pair = pairs(name)
    x, targets = tokens()[:, :-1], tokens()[:, 1:]
    theirs = again(pair.theirs, torch.float32)
    F.cross_entropy(theirs(x).logits.flatten(0, 1), targets.flatten()).backward()
    ours = again(pair.ours, torch.float32)
    F.cross_entropy(ours(x).flatten(0, 1), targets.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradients.setdefault("lm_head.weight", gradients["model.embed_tokens.weight"])
    family = families.find({"model_type": theirs.config.model_type})
    found = {
        disk: families.pack(place, gradients) for disk, place in families.places(family, ours.config, gradients).items()
    }
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    for disk, gradient in expected.items():
        torch.testing.assert_close(found[disk], gradient, atol=1e-4, rtol=0, msg=lambda m, disk=disk: f"{disk}: {m}")


@every
def test_greedy_text_on_our_export_is_what_transformers_generates(pairs: Any, name: str) -> None:
    pair = pairs(name)
    prompt, n_new = tokens()[:1, :9], 12
    theirs = transformers.AutoModelForCausalLM.from_pretrained(pair.exported).eval()
    said = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n_new,
        do_sample=False,
        eos_token_id=None,
        use_cache=MATRIX[name].config is not GPT1,  # that class has none
        pad_token_id=0,
    )
    columns = generate(
        pair.ours, prompt.tolist(), Sampling(temperature=0), n_new, seed=0, n_tokens_valid=VOCAB, stop_ids=()
    )
    assert [column.ids[0] for column in columns] == said[0, prompt.shape[1] :].tolist()


@every
def test_import_and_export_give_back_every_bit(pairs: Any, name: str) -> None:
    pair = pairs(name)
    theirs, ours = (load_file(path / "model.safetensors") for path in (pair.imported, pair.exported))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    state = hf.load(pair.exported)[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in pair.ours.state_dict().items())


@every
def test_our_export_loads_in_transformers_with_nothing_missing_or_unexpected(pairs: Any, name: str) -> None:
    pair = pairs(name)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(pair.exported, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == (MATRIX[name].architecture or type(pair.theirs).__name__)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(tokens()).logits, pair.ours(tokens()), atol=1e-4, rtol=0)


def test_a_class_that_normalizes_after_turning_does_not_stand_for_yarns_factor() -> None:
    shape = {"norm_gain": False, "embed_norm": True, "mlp": "relu2", "vocab_size": VOCAB, "max_seq_len": 48}
    yarn = {"kind": "yarn", "factor": 4.0}
    assert families.family_of(ModelConfig(**shape, rope_scaling=yarn)) is None
    found = families.family_of(ModelConfig(**shape, rope_scaling=yarn | {"attention_factor": 1.0}))
    assert found is not None and found.architecture == "NanoChatForCausalLM"


@pytest.mark.parametrize("max_seq_len", [48, 4096])  # the second is what a file that leaves it out would mean
def test_dynamic_angles_that_begin_to_grow_past_the_context_come_back_so(max_seq_len: int) -> None:
    config = ModelConfig(
        vocab_size=VOCAB, max_seq_len=max_seq_len, qk_norm=False, rope_scaling={"kind": "dynamic", "factor": 2.0}
    )
    family = families.family_of(config)
    back = (
        families.read_ours(families.write_ours(config))
        if family is None
        else families.read(family, families.write(family, config))
    )
    assert (back.rope_scaling.original_max_seq_len or back.max_seq_len) == max_seq_len


def test_every_family_stands_in_the_matrix() -> None:
    assert {case.config.model_type for case in MATRIX.values()} == {family.model_type for family in families.FAMILIES}


# config.json


NEEDED = {
    "vocab_size": 131, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 52,
    "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 48,
}  # fmt: skip


def smallest(config: Any) -> dict[str, Any]:
    """Only the keys that have no default here."""
    family = families.find({"model_type": config.model_type})
    assert family is not None
    needed = [name for name, key in family.keys.items() if key.default is families.REQUIRED]
    return {"model_type": config.model_type, **{name: NEEDED[name] for name in needed}}


@pytest.mark.parametrize(
    "config", dict.fromkeys(case.config for case in MATRIX.values()), ids=lambda config: config.model_type
)
def test_every_key_left_out_has_the_value_it_has_there(config: Any) -> None:
    raw = smallest(config)
    family = families.find(raw)
    assert family is not None
    ours, theirs = (
        families.read(family, raw | {"num_key_value_heads": 6} if "hidden_size" in raw else raw),
        config(**raw),
    )
    for name, key in family.keys.items():
        value = getattr(ours, key.field)
        there = getattr(theirs, name, None)
        there = there if key.words is None else key.words[there]
        if key.field not in ("n_kv_head", "head_dim", "d_ff"):
            assert value == there, name
    assert {name: getattr(theirs, name) for name in family.fixed} == dict(family.fixed)
    if family.rope_theta is not None:
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    windows = (
        getattr(theirs, "layer_types", None)
        or ["sliding_attention" if getattr(theirs, "sliding_window", None) else "full_attention"] * ours.n_layer
    )
    assert [ours.window_of(layer) is not None for layer in range(ours.n_layer)] == [
        kind == "sliding_attention" for kind in windows
    ]
    turning = getattr(theirs, "no_rope_layers", [1] * ours.n_layer)
    assert ours.nope_layers == tuple(layer for layer, turns in enumerate(turning) if not turns)


def refusal(model_type: str, **changes: Any) -> str:
    """What is said of the smallest config.json of a family with these keys."""
    config = next(case.config for case in MATRIX.values() if case.config.model_type == model_type)
    raw = smallest(config) | ({"num_key_value_heads": 6} if "hidden_size" in smallest(config) else {}) | changes
    family = families.find(raw)
    assert family is not None
    with pytest.raises(ValueError) as error:
        families.read(family, raw)
    return str(error.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True"),
        ("gpt2", {"activation_function": "silu"}, "activation_function: 'silu'"),
        ("gpt2", {"embd_pdrop": 0.0}, "embd_pdrop: 0.0 beside resid_pdrop: 0.1"),
        ("gpt2", {"sliding_window": 8}, "sliding_window: 8"),
        ("gpt2", {"rope_theta": 500.0}, "rope_theta: 500.0"),
        ("openai-gpt", {"afn": "silu"}, "afn: 'silu'"),
        ("openai-gpt", {"n_inner": 70}, "n_inner: 70"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act: 'gelu_pytorch_tanh'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ("llama", {"attention_bias": "qkv"}, "attention_bias: 'qkv'"),
        ("llama", {"sliding_window": 8}, "sliding_window: 8"),
        ("llama", {"alibi": True}, "alibi: True (if it changes nothing, take it out of the file)"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantized weights"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope scaling 'longrope'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor of rope scaling 'linear' is None; expected a number"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "is '2'; expected a number"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "does not describe a model"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 9}}, "alpha: 9 of rope scaling 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate: False"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": -10 / math.log(2)}},
            "scale of YaRN's attention infinite",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "full_attention"),
        ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "contradict each other"),
        ("llama", {"rope_theta": [5.0]}, "does not describe a model"),
        ("llama", {"max_position_embeddings": 10**9}, "a context of 1000000000"),
        ("llama", {"num_hidden_layers": 10**9}, "it has 1000000000 layers"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "one window for all"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window is 'wide'; expected a JSON whole number"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "there is no sliding window (use_sliding_window)"),
        ("qwen2", {"use_sliding_window": 3}, "use_sliding_window is 3; expected true or false"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer type 'chunked_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 3"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ("nanochat", {"hidden_act": "silu"}, "hidden_act: 'silu'"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv: 8.0"),
    ],
)  # fmt: skip
def test_what_a_family_asks_for_and_we_lack_is_refused_by_name(
    model_type: str, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(model_type, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "pretraining_tp": 4},
        {"_name_or_path": "x", "pad_token_id": -1, "eos_token_id": [1, 2], "task_specific_params": {"a": 1}},
        {"is_llama_config": True, "rope_interleaved": False, "use_mrope": False, "auto_map": None},
        {"_num_labels": 1, "output_past": True, "max_sequence_length": 2048, "_attn_implementation_autoset": True},
        {"rope_scaling": {"type": "default"}, "layer_types": ["full_attention"] * 3},
    ],
    ids=str,
)
def test_what_changes_nothing_is_no_reason_to_refuse(changes: dict[str, Any]) -> None:
    raw = smallest(LLAMA)
    family = families.find(raw)
    assert family is not None
    assert families.read(family, raw | changes) == families.read(family, raw)


def test_the_activations_words_mean_what_they_mean_there() -> None:
    x = torch.linspace(-6, 6, 101)
    from_words = {**families.PLAIN, **families.GATED}
    ours = {
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu,
        "relu2": lambda x: F.relu(x) ** 2, "swiglu": F.silu, "geglu": F.gelu,
    }  # fmt: skip
    for word, name in from_words.items():
        torch.testing.assert_close(ours[name](x), transformers.activations.get_activation(word)(x), atol=1e-5, rtol=0)


ODD = {"vocab_size": 131, "max_seq_len": 48, "n_layer": 2, "d_model": 36, "n_head": 6, "qk_norm": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix_lm": True},
        {"position": "sinusoidal"},
        {"position": "relative"},
        {"position": "none"},
        {"norm_gain": False},
        {"norm_at": "post"},
        {"attention_bias": "qkv", "mlp_bias": True},
        {"rotary_dim": 4},
        {"logit_softcap": 30.0},
        {"embed_norm": True},
        {"norm": "layernorm"},
        {"rope_scaling": {"kind": "yarn", "factor": 5.0}},  # the context of pretraining would be no whole number
        {"rope_scaling": {"kind": "dynamic", "factor": 2.0}},  # it never grows
        {"position": "learned", "norm": "layernorm", "attention_bias": True, "mlp_bias": True, "mlp": "swiglu"},
        {"nope_layers": (1,), "qk_norm": True},
    ],
    ids=str,
)
def test_what_no_class_computes_is_ours(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(ODD | changes)
    assert families.family_of(config) is None
    assert families.read_ours(json.loads(json.dumps(families.write_ours(config)))) == config


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"window": 48}, "LlamaForCausalLM"),  # as long as the context: it hides nothing
        ({"window": 8}, "MistralForCausalLM"),
        ({"attention_bias": "qkv", "window": 8, "full_layers": (0,)}, "Qwen2ForCausalLM"),
        ({"qk_norm": True, "rope_scaling": {"kind": "yarn", "factor": 4.0}}, "Qwen3ForCausalLM"),
        ({"nope_layers": (0,), "window": 8, "full_layers": (1,)}, "SmolLM3ForCausalLM"),
        ({"d_model": 35, "head_dim": 4}, "MistralForCausalLM"),  # Llama's insists on whole heads
        ({"dropout": 0.2, "init_output": "zero"}, "LlamaForCausalLM"),
    ],
    ids=str,
)
def test_the_first_class_that_computes_a_model_is_named(changes: dict[str, Any], architecture: str) -> None:
    family = families.family_of(ModelConfig.model_validate(ODD | changes))
    assert family is not None
    assert family.architecture == architecture


def test_older_transformers_find_the_same_rotary_positions_in_their_keys() -> None:
    scaling = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 16}
    config = ModelConfig.model_validate(ODD | {"rope_scaling": scaling, "rope_theta": 500.0})
    family = families.family_of(config)
    assert family is not None
    raw = families.write(family, config)
    for form in ({"rope_parameters"}, {"rope_scaling", "rope_theta"}):
        assert families.read(family, {key: value for key, value in raw.items() if key not in form}) is not None
        kept = {
            key: value
            for key, value in raw.items()
            if key not in {"rope_parameters", "rope_scaling", "rope_theta"} - form
        }
        assert families.read(family, kept).rope_scaling == config.rope_scaling


# Names


def test_published_names_without_a_prefix_and_with_buffers_are_understood(tmp_path: Path, pairs: Any) -> None:
    for name in ("GPT-1", "GPT-2"):
        pair, path = pairs(name), tmp_path / name
        path.mkdir()
        for file in pair.imported.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        stored = load_file(path / "model.safetensors")
        bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        bare |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.1.attn.masked_bias": torch.tensor(-1e4)}
        save_file(bare, path / "model.safetensors")
        loaded = hf.load(path)[0].state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in pair.ours.state_dict().items())


def test_a_place_is_undone_by_its_inverse() -> None:
    state = {name: torch.randn(8, 3) for name in "qkv"}
    for place in (
        families.Place(("q",)),
        families.Place(("q",), transposed=True),
        families.Place(("q",), heads=2),
        families.Place(("q", "k", "v"), transposed=True),
    ):
        again = families.unpack(place, families.pack(place, state))
        assert all(torch.equal(again[name], state[name]) and again[name].is_contiguous() for name in place.memory)
