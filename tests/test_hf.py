"""Model directories: what transformers writes loads here and back; what we lack is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from teams import blocks, on_all

from gpt import chat, checkpoint, families, hf
from gpt import tokenizer as tokenizers
from gpt.durable import CorruptError
from gpt.model import GPT, ModelConfig, init_weights
from gpt.slices import Slice
from gpt.team import Team
from gpt.tokenizer import Tokenizer

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the river runs to the sea, 床前明月光，疑是地上霜。 naïve café 🐙 12345\n\tdef f(x): return x\n" * 4
AWKWARD = [
    "",
    " ",
    "\n\n  \t x",
    "<|endoftext|>",
    "a<|im_start|>user<|im_end|>",
    "床前明月光abc123456 7890",
    "🐙👩‍👩‍👧 é e\u0301 \u200b\ufeff\ufffd",
    "naïve ΑΒΓ абв العربية हिन्दी 한국어 ひらがな",
    "'s 're don't I'LL",
    "\x00\x01\x7f\r\n\r",
    "</s> <s> [INST] ▁x Ġy",
]
ODD = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "rope_theta": 5000.0,
}
LLAMA, QWEN3 = transformers.LlamaConfig, transformers.Qwen3Config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([TEXT], "bpe", 320)


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 23), generator=torch.Generator().manual_seed(3))


def write_theirs(path: Path, kind: Any, tokenizer: Tokenizer, *, shard: str = "5GB", **changes: Any) -> Any:
    """A random model as transformers saves it, with our tokenizer beside it."""
    torch.manual_seed(5)
    settings = {k: v for k, v in (ODD | changes).items() if k != "rope_theta"}
    theta = {"rope_type": "default", "rope_theta": (ODD | changes)["rope_theta"]}
    theirs = transformers.AutoModelForCausalLM.from_config(kind(**settings, rope_parameters=theta)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # gains and biases too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(path, max_shard_size=shard)
    for name, data in tokenizer.files().items():
        (path / name).write_bytes(data)
    return theirs


def write_ours(path: Path, tokenizer: Tokenizer, **shape: Any) -> GPT:
    defaults = {"max_seq_len": 40, "n_layer": 3, "d_model": 48, "n_head": 6, "n_kv_head": 2, "init_std": 0.3}
    config = ModelConfig(vocab_size=tokenizer.padded_size, **(defaults | shape))
    model = GPT(config)
    init_weights(model, seed=6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    path.mkdir(exist_ok=True)
    for name, data in hf.model_files(config, tokenizer).items():
        (path / name).write_bytes(data)
    save_file(
        {
            n: t.detach().clone(memory_format=torch.contiguous_format)
            for n, t in hf.to_disk(config, model.state_dict()).items()
        },
        path / "model.safetensors",
    )
    return model.eval()


def edit(path: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def assert_same_logits(ours: GPT, theirs: Any) -> None:
    x = tokens(ours.lm_head.weight.shape[0])
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


# From transformers


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LLAMA, {}),
        (LLAMA, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        (LLAMA, {"mlp_bias": True, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5}),
        (QWEN3, {}),
        (QWEN3, {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 6}),
        (QWEN3, {"hidden_size": 50, "rope_theta": 1e6}),
    ],
)
def test_a_model_of_transformers_gives_its_logits_here(
    tmp_path: Path, tokenizer: Tokenizer, kind: Any, changes: dict[str, Any]
) -> None:
    theirs = write_theirs(tmp_path, kind, tokenizer, **changes)
    ours, loaded = hf.load(tmp_path)
    assert_same_logits(ours, theirs)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == changes.get("tie_word_embeddings", False)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())


def test_weights_in_several_files_load_through_their_index(tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = write_theirs(tmp_path, LLAMA, tokenizer, shard="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(hf.load(tmp_path)[0], theirs)


def test_half_precision_weights_become_fp32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_theirs(tmp_path, LLAMA, tokenizer).bfloat16().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(hf.load(tmp_path)[0], theirs)


def test_the_old_form_of_rope_theta_and_absent_keys_mean_what_they_mean_there(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    theirs = write_theirs(tmp_path, LLAMA, tokenizer, head_dim=8, num_key_value_heads=6, rms_norm_eps=1e-6)
    edit(
        tmp_path,
        rope_parameters=None,
        rope_theta=5000,
        head_dim=None,
        num_key_value_heads=None,
        rms_norm_eps=None,
        mlp_bias=None,
    )
    assert_same_logits(hf.load(tmp_path)[0], theirs)


def test_leftovers_of_older_writers_are_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = write_theirs(tmp_path, LLAMA, tokenizer, tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10)
    save_file(stored, tmp_path / "model.safetensors")
    assert_same_logits(hf.load(tmp_path)[0], theirs)


# To transformers


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("LlamaForCausalLM", {"qk_norm": False, "tie_embeddings": True}),
        (
            "LlamaForCausalLM",
            {"qk_norm": False, "tie_embeddings": False, "attention_bias": True, "mlp_bias": True, "rope_theta": 777.0},
        ),
        ("Qwen3ForCausalLM", {"head_dim": 14, "tie_embeddings": True, "norm_eps": 1e-5}),
        ("Qwen3ForCausalLM", {"tie_embeddings": False, "attention_bias": True, "d_ff": 70}),
    ],
)
def test_our_model_gives_its_logits_and_ids_in_transformers(
    tmp_path: Path, tokenizer: Tokenizer, architecture: str, shape: dict[str, Any]
) -> None:
    ours = write_ours(tmp_path, tokenizer, **shape)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert type(theirs).__name__ == architecture
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert_same_logits(ours, theirs.eval())
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)  # text is text
    assert [auto.encode(text) for text in AWKWARD] == [tokenizer.encode(text) for text in AWKWARD]
    ends = [tokenizer.end_id, *sorted(chat.reply_ends(tokenizer) - {tokenizer.end_id})]
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (tokenizer.start_id, tokenizer.end_id)
    assert theirs.generation_config.eos_token_id == ends and len(ends) > 1, "a reply's end ends it there too"


def test_our_greedy_text_is_what_transformers_generates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours = write_ours(tmp_path, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = tokens(tokenizer.size)[:1, :7]
    with torch.inference_mode():
        said = x
        for _ in range(15):
            said = torch.cat([said, ours(said)[:, -1:].argmax(-1)], dim=1)
    generated = theirs.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(generated, said)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"qk_norm": False, "tie_embeddings": False},
        {"norm": "layernorm", "mlp": "gelu", "attention_bias": True, "mlp_bias": True},
        {"mlp": "relu2"},
        {"qk_norm": True, "mlp_bias": True},
        {"qk_norm": False, "d_model": 50, "head_dim": 8},
    ],
    ids=str,
)
def test_every_kind_of_model_comes_back_bit_for_bit(
    tmp_path: Path, tokenizer: Tokenizer, shape: dict[str, Any]
) -> None:
    ours = write_ours(tmp_path, tokenizer, **shape)
    again, loaded = hf.load(tmp_path)
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in ours.state_dict().items()
    }
    assert loaded.files() == tokenizer.files()
    assert not again.training
    with torch.inference_mode():
        assert torch.equal(again(tokens(64)), ours(tokens(64)))


def test_a_model_that_transformers_has_no_class_for_says_so_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer, norm="layernorm", mlp="gelu")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["GptTrainerForCausalLM"]
    assert "transformers has no class for this model" in raw["comment"]
    with pytest.raises(ValueError, match="gpt_trainer"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("shape", "architecture"),
    [
        ({"qk_norm": False}, "LlamaForCausalLM"),
        (
            {"qk_norm": False, "d_model": 50},
            "MistralForCausalLM",
        ),  # LlamaConfig refuses widths that heads do not divide
        ({"qk_norm": True, "d_model": 50}, "Qwen3ForCausalLM"),
        ({"qk_norm": True, "mlp_bias": True}, "GptTrainerForCausalLM"),
        ({"norm": "layernorm"}, "GptTrainerForCausalLM"),
        ({"mlp": "relu2"}, "GptTrainerForCausalLM"),
    ],
    ids=str,
)
def test_a_class_is_named_only_if_it_computes_the_model(
    tokenizer: Tokenizer, shape: dict[str, Any], architecture: str
) -> None:
    config = ModelConfig(**({"vocab_size": 320, "max_seq_len": 8, "d_model": 48, "n_head": 6, "head_dim": 8} | shape))
    raw = json.loads(hf.model_files(config, tokenizer)["config.json"])
    assert raw["architectures"] == [architecture]


def test_a_tied_head_is_stored_once_and_comes_back(tmp_path: Path) -> None:
    tied, apart = (
        ModelConfig(vocab_size=64, max_seq_len=8, n_layer=1, d_model=8, n_head=1, tie_embeddings=tie)
        for tie in (True, False)
    )
    names = [set(hf.to_disk(config, GPT(config).state_dict())) for config in (tied, apart)]
    assert names[1] - names[0] == {"lm_head.weight"}
    for config in (tied, apart):
        model, path = GPT(config), tmp_path / str(config.tie_embeddings)
        init_weights(model, seed=1)
        state = model.state_dict()
        stored = hf.to_disk(config, state)
        assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in stored.items())
        checkpoint.save(path, model_files={}, weights=stored, optimizer={}, run_yaml="{}", state={})
        again = GPT(config)
        hf.fill(config, path, {name: Slice.whole(tensor) for name, tensor in again.state_dict().items()})
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer type 'linear_attention'"),
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architecture 'MixtralForCausalLM' is not known here; known: LlamaForCausalLM, Mistral",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM, and model_type is 'qwen3': which of them is it?"),
        ({"architectures": None, "model_type": None}, "architecture None is not known"),
        ({"hidden_size": None}, "needs hidden_size, which the file leaves out"),
        ({"num_hidden_layers": "three"}, "config.json: does not describe a model"),
        ({"num_hidden_layers": 10**9}, "it has 1000000000 layers"),
        ({"num_hidden_layers": 10**4, "layer_types": None}, "config.json says 10000 layers, and there are"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; expected a JSON array"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; expected a JSON object"),
        ({"layer_types": 3}, "layer_types is 3; expected a JSON array"),
        ({"layer_types": [{}]}, "layer type {}"),
        ({"num_key_value_heads": 4}, "must be a multiple of n_kv_head"),
        ({"vocab_size": 256}, "the tokenizer has 320 ids, the model's vocab_size is 256"),
    ],
)
def test_what_this_trainer_lacks_is_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any], words: str
) -> None:
    write_ours(tmp_path, tokenizer)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        hf.load(tmp_path)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    stored["model.layers.9.mlp.up_proj.weight"] = torch.ones(2)
    stored["model.layers.0.input_layernorm.weight"] = torch.ones(47)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        hf.load(tmp_path)
    assert "missing: model.norm.weight\n" in str(error.value)
    assert "unexpected: model.layers.9.mlp.up_proj.weight\n" in str(error.value)
    assert "mis-shaped: model.layers.0.input_layernorm.weight (47,), expected (48,)" in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 1 << 31},  # a table of positions of 600 GB
        {"head_dim": 10**60},
        {"hidden_size": 10**60},
        {"num_attention_heads": 10**60},
        {"intermediate_size": 1 << 62},
        {"vocab_size": 1 << 62},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None, "rope_theta": None}
        | {"max_position_embeddings": 10**400},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": {}, "n_layer": 1, "n_head": 1}
        | {"n_positions": 8},
    ],
    ids=str,
)
def test_wild_sizes_are_refused_before_anything_is_made_for_them(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    write_ours(tmp_path, tokenizer, qk_norm=False)
    raw = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=r"no tensor is longer|does not describe a model"):
        hf.load(tmp_path)


def test_a_number_too_long_to_read_names_its_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    (tmp_path / "config.json").write_text('{"a": 1' + "0" * 5000 + "}")
    with pytest.raises(CorruptError, match=r"config\.json: not JSON"):
        hf.load(tmp_path)


def test_a_tied_head_of_another_shape_is_refused_before_room_is_made_for_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_ours(tmp_path, tokenizer)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    end = len(data) - 8 - n
    header["lm_head.weight"] = {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
    with pytest.raises(ValueError, match=r"mis-shaped: lm_head\.weight \(0, "):
        hf.load(tmp_path)


def test_a_head_that_is_not_the_tied_embedding_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer, tie_embeddings=False)
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding"):
        hf.load(tmp_path)


def test_weights_that_are_not_floating_point_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8"):
        hf.load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    write_ours(tmp_path, tokenizer)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*safe_serialization=True"):
        hf.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    write_ours(tmp_path, tokenizer)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_link_is_not_followed(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    write_ours(tmp_path / "model", tokenizer)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "model" / name).rename(tmp_path / name)
    (tmp_path / "model" / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match="symbolic link"):
        hf.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_no_name_in_an_index_leaves_the_directory(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    write_ours(tmp_path / "model", tokenizer)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    with pytest.raises(ValueError, match="is not a plain file name"):
        hf.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[" * 100_000),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0" + b"{}" * 8),
    ],
)
def test_bytes_that_are_not_what_they_should_be_are_corrupt(
    tmp_path: Path, tokenizer: Tokenizer, name: str, data: bytes
) -> None:
    write_ours(tmp_path, tokenizer)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
        hf.load(tmp_path)


def test_a_truncated_weights_file_is_corrupt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptError, match="not a whole safetensors file"):
        hf.load(tmp_path)


def test_a_checkpoint_is_a_model_directory_and_its_manifest_is_checked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours = write_ours(tmp_path / "model", tokenizer)
    weights = hf.to_disk(ours.config, ours.state_dict())
    files = hf.model_files(ours.config, tokenizer)
    path = tmp_path / "step_00000001"
    checkpoint.save(path, model_files=files, weights=weights, optimizer={}, run_yaml="{}", state={})
    assert torch.equal(hf.load(path)[0](tokens(64)), ours(tokens(64)))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_logits(ours, theirs.eval())

    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        hf.load(path)


# Several files, and files that contradict each other


def shard(path: Path) -> dict[str, str]:
    """Deal the tensors of model.safetensors to two files; the index's map."""
    stored = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(stored)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, its in parts.items():
        save_file({name: stored[name] for name in its}, path / file)
    index = {name: file for file, its in parts.items() for name in its}
    write_index(path, index)
    return index


def write_index(path: Path, index: dict[str, str]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_several_files_are_one_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours = write_ours(tmp_path, tokenizer)
    shard(tmp_path)
    assert torch.equal(hf.load(tmp_path)[0](tokens(64)), ours(tokens(64)))


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    shard(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors: no such file"):
        hf.load(tmp_path)


def test_a_tensor_in_another_file_than_the_index_says_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    index = shard(tmp_path)
    assert index["model.norm.weight"] == "a.safetensors"
    write_index(tmp_path, index | {"model.norm.weight": "b.safetensors"})
    with pytest.raises(ValueError, match=r"it does not name model\.norm\.weight in a\.safetensors, which holds it"):
        hf.load(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    index = shard(tmp_path)
    del index["model.norm.weight"]
    write_index(tmp_path, index)
    with pytest.raises(ValueError, match=r"does not name model\.norm\.weight in a\.safetensors, which holds it"):
        hf.load(tmp_path)


def test_a_tensor_that_stands_twice_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"norm.weight": stored["model.norm.weight"].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight stands twice"):
        hf.load(tmp_path)


def test_two_sets_of_weights_in_one_directory_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    whole = (tmp_path / "model.safetensors").read_bytes()
    shard(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"two sets of weights: model\.safetensors, and .* with a\.safetensors"):
        hf.load(tmp_path)


def test_the_names_of_another_family_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path / "llama", tokenizer, qk_norm=False)
    shape = {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "attention_bias": True, "mlp_bias": True}
    write_ours(tmp_path / "gpt2", tokenizer, **shape, qk_norm=False, n_kv_head=6)
    (tmp_path / "llama" / "model.safetensors").write_bytes((tmp_path / "gpt2" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError) as error:
        hf.load(tmp_path / "llama")
    assert "missing: model.embed_tokens.weight, " in str(error.value)
    assert "unexpected: model.transformer.h.0.attn.c_attn.bias, " in str(error.value)
    assert "more" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, value: float, dtype: torch.dtype
) -> None:
    write_ours(tmp_path, tokenizer)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds a number that is not finite"):
        hf.load(tmp_path)


def test_a_checkpoint_in_the_form_of_another_class_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shape = {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "attention_bias": True, "mlp_bias": True}
    config = ModelConfig(vocab_size=320, max_seq_len=40, n_layer=2, d_model=24, n_head=2, qk_norm=False, **shape)
    model = GPT(config)
    init_weights(model, seed=1)
    path = tmp_path / "step_00000001"
    files, weights = hf.model_files(config, tokenizer), hf.to_disk(config, model.state_dict())
    assert "transformer.h.0.attn.c_attn.weight" in weights
    checkpoint.save(path, model_files=files, weights=weights, optimizer={}, run_yaml="{}", state={})
    filled = GPT(config)
    hf.fill(config, path, {name: Slice.whole(tensor) for name, tensor in filled.state_dict().items()})
    for state in (hf.load(path)[0].state_dict(), filled.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


# The verb


def run_verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpt.hf", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_compare_prints_how_far_two_models_are_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path / "a", tokenizer)
    write_ours(tmp_path / "b", tokenizer)
    stored = load_file(tmp_path / "b" / "model.safetensors")
    stored["model.norm.weight"][0] += 0.5
    save_file(stored, tmp_path / "b" / "model.safetensors")
    done = run_verb("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--text", "the river")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert next(line.split()[:2] for line in lines if "model.norm" in line) == ["model.norm.weight", "0.5"]
    assert "logits of" in done.stdout


def test_compare_of_different_models_is_an_error_in_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path / "a", tokenizer)
    write_ours(tmp_path / "b", tokenizer, n_layer=2)
    done = run_verb("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.returncode == 2
    assert "the models have other tensors" in done.stderr


def test_gguf_writes_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path / "a", tokenizer, qk_norm=False)
    done = run_verb("gguf", str(tmp_path / "a"), str(tmp_path / "a.gguf"), "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("name", ["a/model.safetensors", "pipe.gguf", "directory.gguf", "a", "."])
def test_gguf_overwrites_nothing_but_a_file_of_its_kind(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    write_ours(tmp_path / "a", tokenizer, qk_norm=False)
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "directory.gguf").mkdir()
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    done = run_verb("gguf", str(tmp_path / "a"), str(tmp_path / name))
    assert done.returncode == 2 and "nothing else is overwritten" in done.stderr
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before and (tmp_path / "pipe.gguf").is_fifo()


def test_loaded_weights_do_not_stand_on_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_ours(tmp_path, tokenizer)
    model, _ = hf.load(tmp_path)
    before = model(tokens(64))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert torch.equal(model(tokens(64)), before)


# Checkpoints in several files, and loading in blocks

FORMS = {
    "llama": {},
    "gpt2": {"position": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_several_ranks_in_several_files_is_a_model_directory(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, form: str, tied: bool
) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS_FILE", 20_000)
    shape = FORMS[form] | {"qk_norm": False, "tie_embeddings": tied or form == "gpt2"}
    config = ModelConfig(vocab_size=320, max_seq_len=40, n_layer=2, d_model=24, n_head=2, **shape)
    model = GPT(config)
    init_weights(model, seed=1)
    state, path = model.state_dict(), tmp_path / "step_00000001"
    places = hf.places(config, state)
    sizes = {disk: sum(state[name].nbytes for name in place.memory) for disk, place in places.items()}
    owner = checkpoint.owners(sizes, 3)

    def work(team: Team) -> None:
        mine = [name for disk, place in places.items() if owner[disk] == team.rank for name in place.memory]
        checkpoint.save(
            path,
            team,
            model_files=hf.model_files(config, tokenizer),
            weights={name: state[name] for name in mine},
            sizes=sizes,
            pack=lambda disk, weights: families.pack(places[disk], weights),
            optimizer={},
            run_yaml="{}",
            state={},
        )

    on_all(3, work)
    assert len(list(path.glob("model-*.safetensors"))) > 3 and not (path / "model.safetensors").exists()
    assert all(torch.equal(hf.load(path)[0].state_dict()[name], tensor) for name, tensor in state.items())
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same_logits(model, theirs.eval())
    for grid in ((1, 1), (2, 1), (2, 2)):
        for held in blocks(state, grid):
            rooms = {name: b._replace(tensor=torch.zeros(b.tensor.shape)) for name, b in held.items()}
            hf.fill(config, path, rooms)
            rooms.pop("lm_head.weight", None) if config.tie_embeddings else None
            assert all(torch.equal(room.tensor, held[name].tensor) for name, room in rooms.items())
