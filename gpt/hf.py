"""Model directories in Hugging Face's form: config.json for each family, names of tensors, and strict loading.

A checkpoint is such a directory as it stands, so there is no export. Nothing here downloads, and no file that could run
code (a pickle) is read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt import checkpoint
from gpt.durable import CorruptError
from gpt.model import GPT, ModelConfig
from gpt.run import PICKLES
from gpt.tokenizer import Tokenizer

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OURS = "GptTrainerForCausalLM"  # what no class of transformers computes


@dataclass(frozen=True)
class Family:
    """A class of transformers: which of our models it computes, and how its config.json says so."""

    architecture: str
    model_type: str
    ours: Mapping[str, Any]  # the ModelConfig fields that every model of this class shares
    fields: Mapping[str, str]  # config.json key -> ModelConfig field
    defaults: Mapping[str, Any]  # what the class takes for a key that config.json leaves out
    fixed: Mapping[str, Any]  # keys that have one value here; any other needs what this trainer lacks
    whole_heads: bool = False  # the class insists that hidden_size is a multiple of num_attention_heads

    def fits(self, config: ModelConfig) -> bool:
        same = all(getattr(config, field) == value for field, value in self.ours.items())
        return same and not (self.whole_heads and config.d_model % config.n_head)


SHARED_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "num_hidden_layers": "n_layer",
    "hidden_size": "d_model",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
SHARED_DEFAULTS = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
SHARED_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}

FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        ours={"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False},
        fields=SHARED_FIELDS | {"mlp_bias": "mlp_bias"},
        defaults=SHARED_DEFAULTS | {"mlp_bias": False, "head_dim": None, "max_position_embeddings": 2048},
        fixed=SHARED_FIXED,
        whole_heads=True,
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        ours={"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "mlp_bias": False},
        fields=SHARED_FIELDS,
        defaults=SHARED_DEFAULTS | {"head_dim": 128, "max_position_embeddings": 32768},
        fixed=SHARED_FIXED | {"use_sliding_window": False},
    ),
)


def model_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Everything a model directory holds besides its weights: file name -> bytes."""
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}
    return {
        "config.json": _json(_write_config(config) | ids),
        "generation_config.json": _json(ids),
        **tokenizer.files(),
    }


def to_disk(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename parameters from memory to what the class in config.json calls them; tensors are not copied.

    Llama and Qwen3 have our names; a tied head is stored once, as the embedding.
    """
    return {name: tensor for name, tensor in state.items() if not (config.tie_embeddings and name == "lm_head.weight")}


def from_disk(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_disk`: a whole state dict. RoPE tables, which older writers add, are dropped."""
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings and (embedding := state.get("model.embed_tokens.weight")) is not None:
        head = state.get("lm_head.weight", embedding)
        state["lm_head.weight"] = embedding if torch.equal(head, embedding) else head
    return state


def load(path: Path) -> tuple[GPT, Tokenizer]:
    """Load a checkpoint or a Hugging Face model directory: an fp32 model on the CPU in eval mode, and its tokenizer.

    Strict: FileNotFoundError or ValueError names what is missing, unexpected, mis-shaped or not supported; CorruptError
    names a file that is not what its manifest or header says.
    """
    if (path / checkpoint.MANIFEST).exists():
        checkpoint.verify(path)
    config = load_config(path)
    tokenizer = Tokenizer.load(path)
    if config.vocab_size is None or tokenizer.size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.size} ids, the model's vocab_size is {config.vocab_size}"
        )
    state = from_disk(config, dict(_read_tensors(path)))
    if config.n_layer > len(state):  # a wild number would keep us building blocks for ever
        raise ValueError(f"{path}: config.json says {config.n_layer} layers, and there are {len(state)} tensors in all")
    with torch.device("meta"):  # shapes only
        model = GPT(config)
    _check_tensors(path, {name: tensor.shape for name, tensor in model.state_dict().items()}, state)
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        if state["lm_head.weight"] is not state["model.embed_tokens.weight"]:
            raise ValueError(
                f"{path}: lm_head.weight is not the embedding, though config.json says tie_word_embeddings"
            )
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval(), tokenizer


def load_config(path: Path) -> ModelConfig:
    """Read the ModelConfig that config.json in `path` describes; ValueError names what we lack."""
    file = path / "config.json"
    raw = _read_json(file)
    name = (_get(file, raw, "architectures", list) or [raw.get("model_type")])[0]
    if name == OURS:
        return _model_config(file, raw.get("model"))
    family = next((f for f in FAMILIES if name in (f.architecture, f.model_type)), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES)
        raise ValueError(f"{file}: architecture {name!r} is not known here; known: {known}, {OURS}")
    return _read_config(family, raw, file)


def _write_config(config: ModelConfig) -> dict[str, Any]:
    """config.json without the token ids."""
    family = next((f for f in FAMILIES if f.fits(config)), None)
    shared = {"dtype": "float32", "torch_dtype": "float32"}  # the key's new and old name
    if family is None:
        why = "transformers has no class for this model; load it with gpt.hf.load of GPT Trainer"
        ours = {"architectures": [OURS], "model_type": "gpt_trainer", "comment": why, "model": config.model_dump()}
        return ours | shared
    values = config.model_dump() | {"n_kv_head": config.n_group, "head_dim": config.d_head, "d_ff": config.d_hidden}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: values[field] for key, field in family.fields.items()},
        "rope_theta": config.rope_theta,  # read by transformers before version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **family.fixed,
        **shared,
    }


def _read_config(family: Family, raw: Mapping[str, Any], file: Path) -> ModelConfig:
    given = {key: value for key, value in raw.items() if value is not None}
    missing = [key for key in family.fields if key not in given and key not in family.defaults]
    lacks = [f"{key}: {given[key]!r}" for key, value in family.fixed.items() if given.get(key, value) != value]
    lacks += [f"layer type {kind!r}" for kind in _get(file, raw, "layer_types", list) if kind != "full_attention"][:1]
    lacks += ["quantized weights"] if "quantization_config" in given else []
    rope = _get(file, raw, "rope_parameters", dict) or _get(file, raw, "rope_scaling", dict)
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        lacks.append(f"rope scaling {kind!r}")
    if (part := rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))) != 1.0:
        lacks.append(f"partial_rotary_factor: {part!r}")
    if missing:
        raise ValueError(f"{file}: {family.architecture} needs {', '.join(missing)}, which the file leaves out")
    if lacks:
        raise ValueError(
            f"{file}: this {family.architecture} needs what this trainer does not have: {'; '.join(lacks)}"
        )
    values = {field: given.get(key, family.defaults.get(key)) for key, field in family.fields.items()}
    theta = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    return _model_config(file, {**values, **family.ours, "rope_theta": theta})


def _model_config(file: Path, values: Any) -> ModelConfig:
    try:
        return ModelConfig.model_validate(values)
    except ValueError as error:
        raise ValueError(f"{file}: does not describe a model: {error}") from error


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, one or those that its index names."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [_plain(single)]
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CorruptError(f"{index}: no 'weight_map' of tensor names to file names")
        if outside := sorted({name for name in names.values() if Path(name).name != name}):
            raise ValueError(f"{index}: {outside[0]!r} is not a plain file name; weights must stand beside their index")
        return [_plain(path / name) for name in sorted(set(names.values()))]
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{path}: {pickles[0]} is a pickle, which can run code when it is read, so it is not read; if you trust "
            "it: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{path}: neither model.safetensors nor model.safetensors.index.json is here")


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor as an fp32 copy: what stays is never backed by the file, which may change under us."""
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (the handle is no mapping)
                    tensor = tensors.get_tensor(name)
                    if tensor.dtype not in FLOATS:
                        raise ValueError(
                            f"{file}: {name} is stored as {tensor.dtype}; expected float32, float16 or bfloat16"
                        )
                    yield name, tensor.to(torch.float32, copy=True)
        except SafetensorError as error:
            raise CorruptError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from error


def _check_tensors(path: Path, expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming every tensor that is missing, unexpected or of another shape than config.json says."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} {tuple(found[name].shape)}, expected {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
    }
    lines = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(f"{path}: the weights are not those of the model in config.json\n" + "\n".join(lines))


def _plain(file: Path) -> Path:
    """`file`, if it is a file of its own."""
    if file.is_symlink():
        raise ValueError(f"{file}: is a symbolic link, which is not followed; copy the file itself here (cp -L)")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_plain(file).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _get(file: Path, raw: Mapping[str, Any], key: str, kind: type) -> Any:
    """`raw`[`key`], empty where it is absent or null; ValueError if it is of another kind."""
    value = raw.get(key)
    if not isinstance(value, kind | None):
        raise ValueError(f"{file}: {key} is {value!r}; expected a JSON {'array' if kind is list else 'object'}")
    return kind() if value is None else value


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
