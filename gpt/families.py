"""Families of transformers as rows of a table: what config.json says of a model, and what each class calls its tensors.

Pure, both ways: dicts and tensors, no files. A family computes a model if nothing of it is lost on the way to that
family's config.json and back.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt.model import ModelConfig
from gpt.positions import RopeScaling

OURS = "GptTrainerForCausalLM"  # what no class of transformers computes
REQUIRED = object()


class Key(NamedTuple):
    """A key of config.json: the ModelConfig field it is, its value where it is left out, and its words for ours."""

    field: str
    default: Any = REQUIRED
    words: Mapping[Any, Any] | None = None  # theirs -> ours; the first of several is written


class Rule(NamedTuple):
    """What one tensor on disk is in memory; names without .weight and .bias, {} is the layer."""

    disk: str
    memory: tuple[str, ...]  # several: their rows, one below the other
    transposed: bool = False  # the matrix is stored as (in, out)
    swapped: bool = False  # in each head the halves of the rows stand in the other order


@dataclass(frozen=True)
class Family:
    """A class of transformers: which of our models it computes, how its config.json says so, what it calls tensors."""

    architecture: str
    model_type: str
    ours: Mapping[str, Any]  # the ModelConfig fields that every model of this class shares
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]  # keys that have one value here; any other needs what this trainer lacks
    rope_theta: float | None = 10_000.0  # where config.json has none; None: the class has no rotary positions
    windows: str | None = None  # how layers get sliding windows: "all", or "by layer"
    no_rope: bool = False  # no_rope_layers says which layers turn
    whole_heads: bool = False  # the class insists that hidden_size is a multiple of the heads
    normed_after: bool = False  # queries and keys are normalized when they have turned: YaRN's factor of them is lost
    wide: bool = False  # the MLP is four times as wide as the stream, and no key says otherwise
    prefix: str = "model."  # of every name but the head's; published files may lack it
    rules: tuple[Rule, ...] = ()  # names that differ
    buffers: tuple[str, ...] = ("layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")  # of older writers


NULLABLE = ("n_kv_head", "head_dim", "d_ff", "logit_softcap")  # null says something else than a missing key
MAX_CONTEXT = 1 << 24  # positions; a table of more would fill the memory before the weights are looked at
BOOL = {False: False, True: True}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
PLAIN = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
    "gelu_python": "gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
SHAPE = {
    "vocab_size": Key("vocab_size"),
    "num_hidden_layers": Key("n_layer"),
    "hidden_size": Key("d_model"),
    "num_attention_heads": Key("n_head"),
    "num_key_value_heads": Key("n_kv_head", None),
    "head_dim": Key("head_dim", None),
    "intermediate_size": Key("d_ff"),
    "max_position_embeddings": Key("max_seq_len", 2048),
    "hidden_act": Key("mlp", "silu", GATED),
    "rms_norm_eps": Key("norm_eps", 1e-6),
    "initializer_range": Key("init_std", 0.02),
    "tie_word_embeddings": Key("tie_embeddings", False, BOOL),
}
BIAS = {"attention_bias": Key("attention_bias", False, BOOL)}
MLP_BIAS = {"mlp_bias": Key("mlp_bias", False, BOOL)}
LLAMA = {"norm": "rmsnorm", "qk_norm": False}
GPT_SHAPE = {
    "vocab_size": Key("vocab_size"),
    "n_positions": Key("max_seq_len"),
    "n_layer": Key("n_layer"),
    "n_embd": Key("d_model"),
    "n_head": Key("n_head"),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
    "initializer_range": Key("init_std", 0.02),
    "resid_pdrop": Key("dropout", 0.1),
    "tie_word_embeddings": Key("tie_embeddings", True, BOOL),
}
GPT = {
    "norm": "layernorm", "position": "learned", "attention_bias": True, "mlp_bias": True, "qk_norm": False,
}  # fmt: skip
BLOCK_RULES = (
    Rule(
        "h.{}.attn.c_attn",
        ("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj"),
        transposed=True,
    ),
    Rule("h.{}.attn.c_proj", ("layers.{}.self_attn.o_proj",), transposed=True),
    Rule("h.{}.mlp.c_fc", ("layers.{}.mlp.up_proj",), transposed=True),
    Rule("h.{}.mlp.c_proj", ("layers.{}.mlp.down_proj",), transposed=True),
)
CAUSAL_BUFFERS = ("h.{}.attn.bias", "h.{}.attn.masked_bias", "position_ids")

FAMILIES = (  # where several compute a model, the first is named
    Family(
        "LlamaForCausalLM",
        "llama",
        ours=LLAMA,
        keys=SHAPE | BIAS | MLP_BIAS,
        fixed={"attention_dropout": 0.0},
        whole_heads=True,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        ours=LLAMA,
        keys=SHAPE
        | {"num_key_value_heads": Key("n_kv_head", 8), "max_position_embeddings": Key("max_seq_len", 131072)},
        fixed={"attention_dropout": 0.0},
        windows="all",
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        ours=LLAMA | {"attention_bias": "qkv"},
        keys=SHAPE
        | {"num_key_value_heads": Key("n_kv_head", 32), "max_position_embeddings": Key("max_seq_len", 32768)},
        fixed={"attention_dropout": 0.0},
        windows="by layer",
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        ours={"norm": "rmsnorm", "qk_norm": True},
        keys=SHAPE
        | BIAS
        | {
            "num_key_value_heads": Key("n_kv_head", 32),
            "head_dim": Key("head_dim", 128),
            "max_position_embeddings": Key("max_seq_len", 32768),
        },
        fixed={"attention_dropout": 0.0},
        windows="by layer",
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        ours={"norm": "rmsnorm", "norm_at": "output", "qk_norm": "whole"},
        keys=SHAPE | BIAS | {"rms_norm_eps": Key("norm_eps", 1e-5)},
        fixed={"attention_dropout": 0.0},
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        ours=LLAMA,
        keys=SHAPE
        | BIAS
        | MLP_BIAS
        | {
            "num_key_value_heads": Key("n_kv_head", 4),
            "max_position_embeddings": Key("max_seq_len", 32768),
            "tie_word_embeddings": Key("tie_embeddings", True, BOOL),
        },
        fixed={"attention_dropout": 0.0},
        rope_theta=2_000_000.0,
        windows="by layer",
        no_rope=True,
    ),
    Family(
        "NanoChatForCausalLM",
        "nanochat",
        ours={"norm": "rmsnorm", "norm_gain": False, "embed_norm": True, "qk_norm": True},
        keys=SHAPE
        | BIAS
        | {
            "hidden_act": Key("mlp", "relu2", PLAIN),
            "final_logit_softcapping": Key("logit_softcap", 15.0),
        },
        fixed={"attention_dropout": 0.0},
        # Its rotary positions turn the other way, and it normalizes queries and keys after that, not before: the same
        # with the halves of a head exchanged, for norms without gains do not see the order or the angle.
        normed_after=True,
        rules=(
            Rule("layers.{}.self_attn.q_proj", ("layers.{}.self_attn.q_proj",), swapped=True),
            Rule("layers.{}.self_attn.k_proj", ("layers.{}.self_attn.k_proj",), swapped=True),
            Rule("layers.{}.mlp.fc1", ("layers.{}.mlp.up_proj",)),
            Rule("layers.{}.mlp.fc2", ("layers.{}.mlp.down_proj",)),
        ),
    ),
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        ours=GPT,
        keys=GPT_SHAPE | {"n_inner": Key("d_ff", None), "activation_function": Key("mlp", "gelu_new", PLAIN)},
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        rope_theta=None,
        whole_heads=True,
        prefix="transformer.",
        rules=(
            *BLOCK_RULES,
            Rule("wte", ("embed_tokens",)),
            Rule("wpe", ("position",)),
            Rule("h.{}.ln_1", ("layers.{}.input_layernorm",)),
            Rule("h.{}.ln_2", ("layers.{}.post_attention_layernorm",)),
            Rule("ln_f", ("norm",)),
        ),
        buffers=CAUSAL_BUFFERS,
    ),
    Family(
        "OpenAIGPTLMHeadModel",
        "openai-gpt",
        ours=GPT | {"norm_at": "post"},
        keys=GPT_SHAPE
        | {"afn": Key("mlp", "gelu", {"gelu": "gelu_tanh", "relu": "relu"})},  # its "gelu" is the tanh one
        fixed={},
        rope_theta=None,
        whole_heads=True,
        wide=True,
        prefix="transformer.",
        rules=(
            *BLOCK_RULES,
            Rule("tokens_embed", ("embed_tokens",)),
            Rule("positions_embed", ("position",)),
            Rule("h.{}.ln_1", ("layers.{}.post_attention_layernorm",)),
            Rule("h.{}.ln_2", ("layers.{}.post_feedforward_layernorm",)),
        ),
        buffers=CAUSAL_BUFFERS,
    ),
)

# Keys that change nothing of what is computed here: how a model was trained, is sampled from, stored or shown, and the heads
# of other classes. attn_pdrop is dropout of the attention's weights, which this trainer does not have: it acts in training.
HARMLESS_WORDS = (
    "_name_or_path _commit_hash architectures model_type transformers_version dtype torch_dtype use_cache pretraining_tp "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id is_llama_config rope_interleaved "
    "transformers.js_config task_specific_params unsloth_version unsloth_fixed n_ctx n_special "
    "predict_special_tokens summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
    "return_dict output_hidden_states output_attentions id2label label2id num_labels problem_type finetuning_task "
    "chunk_size_feed_forward tokenizer_class prefix max_window_layers layer_types is_decoder _num_labels output_past "
    "max_sequence_length _attn_implementation_autoset _attn_implementation "
    # settings of generation, which older writers put here
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
)
HARMLESS = frozenset(HARMLESS_WORDS.split())
OF_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
OF_DROPOUT = {"embd_pdrop", "attn_pdrop"}
OF_NO_ROPE = {"no_rope_layers", "no_rope_layer_interval"}
OF_WINDOWS = {None: (), "all": ("sliding_window",), "by layer": ("sliding_window", "use_sliding_window")}


# config.json


def find(raw: Mapping[str, Any]) -> Family | None:
    """The family that config.json names, None for our own; ValueError for one that is not known here."""
    architectures = _typed(raw, "architectures", list) or []
    name = architectures[0] if architectures else raw.get("model_type")
    if name == OURS:
        return None
    family = next((family for family in FAMILIES if name in (family.architecture, family.model_type)), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES)
        raise ValueError(f"architecture {name!r} is not known here; known: {known}, {OURS}")
    if raw.get("model_type", family.model_type) != family.model_type:
        raise ValueError(f"the architecture is {name}, and model_type is {raw['model_type']!r}: which of them is it?")
    return family


def family_of(config: ModelConfig) -> Family | None:
    """The first family that computes this model, None if no class of transformers does."""
    return next((family for family in FAMILIES if _fits(family, config)), None)


def _fits(family: Family, config: ModelConfig) -> bool:
    if family.whole_heads and config.d_model % config.n_head:
        return False
    try:
        return _essence(read(family, write(family, config))) == _essence(config)
    except ValueError:
        return False


def write(family: Family, config: ModelConfig) -> dict[str, Any]:
    """config.json of this model, without token ids; ValueError for a value that the family has no word for."""
    values = config.model_dump() | {"n_kv_head": config.n_group, "head_dim": config.d_head, "d_ff": config.d_hidden}
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for name, key in family.keys.items():
        raw[name] = values[key.field]
        if key.words is not None:
            theirs = [word for word, ours in key.words.items() if ours == raw[name] and type(ours) is type(raw[name])]
            if not theirs:
                raise ValueError(f"no {name} for {raw[name]!r}")
            raw[name] = theirs[0]
    if family.rope_theta is not None:
        raw |= _write_rope(config)
    else:
        raw |= {"embd_pdrop": config.dropout, "attn_pdrop": 0.0}
    raw |= _write_windows(family, config)
    if family.no_rope:
        turning = [int(layer not in config.nope_layers) for layer in range(config.n_layer)]
        raw |= {"no_rope_layers": turning, "no_rope_layer_interval": config.n_layer + 1}
    return raw | dict(family.fixed)


def read(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
    """The model that config.json describes; ValueError names what we lack, what is left out and what is not understood."""
    missing = [name for name, key in family.keys.items() if raw.get(name) is None and key.default is REQUIRED]
    if missing:
        raise ValueError(f"{family.architecture} needs {', '.join(missing)}, which the file leaves out")
    lacks = [
        f"{name}: {raw[name]!r}" for name, value in family.fixed.items() if raw.get(name, value) not in (value, None)
    ]
    values: dict[str, Any] = dict(family.ours)
    for name, key in family.keys.items():
        value = raw.get(name, key.default)
        if value is None and key.field not in NULLABLE:
            value = key.default
        if key.words is not None:
            if not isinstance(value, str | bool) or value not in key.words:
                lacks.append(f"{name}: {value!r}")
                continue
            value = key.words[value]
        values[key.field] = value
    lacks += _unknown(family, raw)
    if family.rope_theta is not None:
        values |= _read_rope(family.rope_theta, raw, values["max_seq_len"], lacks)
        if family.normed_after and (scaling := values.get("rope_scaling")) and scaling["kind"] == "yarn":
            values["rope_scaling"] = scaling | {"attention_factor": 1.0}
    elif raw.get("embd_pdrop", 0.1) != values["dropout"]:
        lacks.append(f"embd_pdrop: {raw.get('embd_pdrop', 0.1)!r} beside resid_pdrop: {values['dropout']!r}")
    if type(values["d_model"]) is not int:
        raise ValueError(f"does not describe a model: its width is {values['d_model']!r:.60}")
    if lacks:
        raise ValueError(f"this {family.architecture} needs what this trainer does not have: {'; '.join(lacks)}")
    if family.wide or values["d_ff"] is None:
        values["d_ff"] = 4 * values["d_model"]
    values |= _read_layers(family, raw, values["n_layer"])
    return _validated(values)


def _validated(values: Any) -> ModelConfig:
    try:
        config = ModelConfig.model_validate(values)
    except ValueError as error:
        raise ValueError(f"does not describe a model: {error}") from error
    if config.vocab_size is None or config.max_seq_len is None or config.max_seq_len > MAX_CONTEXT:
        raise ValueError(
            f"does not describe a model: it has a vocabulary of {config.vocab_size} and a context of {config.max_seq_len}"
        )
    return config


def read_ours(raw: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json that `write_ours` made."""
    return _validated(raw.get("model"))


def write_ours(config: ModelConfig) -> dict[str, Any]:
    """config.json for what no class of transformers computes; transformers refuses it by its model_type."""
    why = "transformers has no class for this model; load it with gpt.hf.load of GPT Trainer"
    return {"architectures": [OURS], "model_type": "gpt_trainer", "comment": why, "model": config.model_dump()}


def _unknown(family: Family, raw: Mapping[str, Any]) -> list[str]:
    """Keys that are not understood and say something, in words."""
    if raw.get("quantization_config"):
        return ["quantized weights"]
    known = HARMLESS | family.keys.keys() | family.fixed.keys() | set(OF_WINDOWS[family.windows])
    known |= OF_ROPE if family.rope_theta is not None else OF_DROPOUT
    known |= OF_NO_ROPE if family.no_rope else set()
    strange = [name for name, value in raw.items() if name not in known and value not in (None, False, 0, "", [], {})]
    return [f"{name}: {raw[name]!r:.60} (if it changes nothing, take it out of the file)" for name in strange]


def _typed(raw: Mapping[str, Any], key: str, kind: type) -> Any:
    """`raw`[`key`], None where it is absent or null; ValueError if it is of another kind."""
    value = raw.get(key)
    if not isinstance(value, kind | None):
        words = {list: "array", dict: "object", int: "whole number"}
        raise ValueError(f"{key} is {value!r:.60}; expected a JSON {words[kind]}")
    return value


def _essence(config: ModelConfig) -> dict[str, Any]:
    """What a model computes, without what has no effect: equal for configs that are the same model."""
    values = config.model_dump(exclude={"dropout", "init_output", "init_std"})
    values |= {"n_kv_head": config.n_group, "head_dim": config.d_head, "d_ff": config.d_hidden}
    rotary = config.position == "rotary"
    values["rotary_dim"] = config.d_rotary if rotary else None
    if not rotary and config.position != "sinusoidal":
        del values["rope_theta"]
    if config.position != "relative":
        del values["relative_buckets"], values["relative_max_distance"]
    windows = [config.window_of(layer) for layer in range(config.n_layer)]
    values["window"] = [
        None if window is None or window >= (config.max_seq_len or window) else window for window in windows
    ]
    del values["full_layers"]
    values["nope_layers"] = sorted(set(config.nope_layers))
    if config.rope_scaling is not None:
        values["rope_scaling"] = _scaling_keys(config.rope_scaling, config)
    return values


# Rotary positions: transformers before version 5 reads rope_theta and rope_scaling, from then on rope_parameters

SCALING = {  # rope_type -> key of config.json -> RopeScaling's field
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_seq_len",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}


def _scaling_keys(scaling: RopeScaling, config: ModelConfig) -> dict[str, Any]:
    """What rope_scaling says of it, every default written out."""
    assert config.max_seq_len is not None
    values = scaling.model_dump()
    if values["original_max_seq_len"] is None:
        stretched = config.max_seq_len / scaling.factor
        values["original_max_seq_len"] = int(stretched) if stretched.is_integer() else stretched
    if values["attention_factor"] is None:
        values["attention_factor"] = 0.1 * math.log(scaling.factor) + 1
    return {"rope_type": scaling.kind} | {key: values[ours] for key, ours in SCALING[scaling.kind].items()}


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    keys = None if scaling is None else _scaling_keys(scaling, config)
    raw = {
        "rope_theta": config.rope_theta,
        "rope_scaling": keys,
        "rope_parameters": {**(keys or {"rope_type": "default"}), "rope_theta": config.rope_theta},
    }
    if scaling is not None and scaling.kind == "dynamic":
        raw["max_position_embeddings"] = scaling.original_max_seq_len or config.max_seq_len
    return raw


def _read_rope(default_theta: float, raw: Mapping[str, Any], max_seq_len: Any, lacks: list[str]) -> dict[str, Any]:
    """The ModelConfig fields of the rotary positions; what we lack is added to `lacks`.

    ValueError where the two forms stand there and differ, or where a number is none. `max_seq_len` is the context that the
    file names; angles that grow with the length make sense beyond it, up to factor times as far.
    """
    kind, form, theta = _rope_form(raw)
    part = form.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        lacks.append(f"partial_rotary_factor: {part!r}")
    fields: dict[str, Any] = {"rope_theta": default_theta if theta is None else theta}
    if not isinstance(kind, str) or kind not in SCALING:
        lacks.append(f"rope scaling {kind!r}")
        return fields
    if kind == "yarn":
        form = _yarn(form, max_seq_len)
    names = SCALING[kind]
    if strange := [f"{key}: {value!r:.60} of rope scaling {kind!r}" for key, value in form.items() if key not in names]:
        lacks += strange
        return fields
    if kind == "default":
        return fields
    if wrong := [key for key in ("factor", *form) if not _is_number(form.get(key))]:
        raise ValueError(f"{wrong[0]} of rope scaling {kind!r} is {form.get(wrong[0])!r:.60}; expected a number")
    scaling = {"kind": kind} | {names[key]: value for key, value in form.items()}
    if kind == "dynamic" and type(max_seq_len) is int and max_seq_len <= MAX_CONTEXT:
        scaling["original_max_seq_len"] = max_seq_len
        fields["max_seq_len"] = math.floor(max_seq_len * form["factor"])
    elif kind in ("yarn", "llama3"):
        scaling.setdefault("original_max_seq_len", max_seq_len)
    return fields | {"rope_scaling": scaling}


def _rope_form(raw: Mapping[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """(kind, its keys, theta or None) from the two forms of them."""
    forms = []
    thetas = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        if given := _typed(raw, key, dict):
            form = {name: value for name, value in given.items() if value is not None}
            thetas += [form.pop("rope_theta")] if "rope_theta" in form else []
            kind = form.pop("type", "default")
            forms.append({"rope_type": kind} | form)
    if any(theta != thetas[0] for theta in thetas) or any(form != forms[0] for form in forms):
        raise ValueError("rope_parameters, rope_scaling and rope_theta contradict each other; keep one form")
    form = forms[0] if forms else {"rope_type": "default"}
    return form.pop("rope_type"), form, thetas[0] if thetas else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def _yarn(form: Mapping[str, Any], max_seq_len: Any) -> dict[str, Any]:
    """YaRN's keys in their plain form: mscale and a missing factor are only other ways to say the two factors."""
    form = {key: value for key, value in form.items() if not (key.startswith("beta_") and value == 0)}
    mscale, mscale_all = form.pop("mscale", None), form.pop("mscale_all_dim", None)
    original = form.get("original_max_position_embeddings")
    if "factor" not in form and original and _is_number(original) and _is_number(max_seq_len):
        form["factor"] = max_seq_len / original
    factors = (mscale, mscale_all, form.get("factor"))
    if "attention_factor" not in form and all(value and _is_number(value) for value in factors):
        growth = 0.1 * math.log(max(form["factor"], 1))
        if not (divisor := mscale_all * growth + 1):
            raise ValueError(f"mscale_all_dim is {mscale_all!r}, which makes the scale of YaRN's attention infinite")
        form["attention_factor"] = (mscale * growth + 1) / divisor
    if form.get("truncate", True) is True:
        form.pop("truncate", None)
    return form


# Layers that differ: sliding windows, and layers whose heads do not turn


def _write_windows(family: Family, config: ModelConfig) -> dict[str, Any]:
    windows = [config.window_of(layer) for layer in range(config.n_layer)]
    if family.windows == "all":
        return {"sliding_window": config.window}
    if family.windows == "by layer":
        first = next((layer for layer, window in enumerate(windows) if window is not None), config.n_layer)
        return {
            "use_sliding_window": config.window is not None,
            "sliding_window": config.window,
            "max_window_layers": first,
            "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        }
    return {}


def _read_layers(family: Family, raw: Mapping[str, Any], n_layer: Any) -> dict[str, Any]:
    """The ModelConfig fields window, full_layers and nope_layers."""
    if type(n_layer) is not int or not 1 <= n_layer <= 1 << 20:
        raise ValueError(f"does not describe a model: it has {n_layer!r} layers")
    values: dict[str, Any] = {}
    turning = [True] * n_layer
    if family.no_rope:
        every = _typed(raw, "no_rope_layer_interval", int) or 4
        turning = _typed(raw, "no_rope_layers", list) or [(layer + 1) % every != 0 for layer in range(n_layer)]
        if len(turning) < n_layer or any(turns not in (0, 1) for turns in turning):
            raise ValueError(f"no_rope_layers is {turning!r:.60}; expected 1 (turns) or 0 for each of {n_layer} layers")
        values["nope_layers"] = tuple(layer for layer in range(n_layer) if not turning[layer])
    window = _typed(raw, "sliding_window", int)
    if family.windows == "all" and "sliding_window" not in raw:
        window = 4096
    if family.windows == "by layer":
        use = raw.get("use_sliding_window") or False
        if use not in (True, False):
            raise ValueError(f"use_sliding_window is {use!r:.60}; expected true or false")
        window = 4096 if not family.no_rope and "sliding_window" not in raw else window
        window = window if use else None
    sliding = _sliding(family, raw, n_layer, window, turning)
    if any(sliding):
        values |= {"window": window, "full_layers": tuple(layer for layer in range(n_layer) if not sliding[layer])}
    return values


def _sliding(
    family: Family, raw: Mapping[str, Any], n_layer: int, window: int | None, turning: list[Any]
) -> list[bool]:
    """Whether each layer has the sliding window; ValueError where layer_types and the window contradict each other."""
    kinds = _typed(raw, "layer_types", list)
    if kinds is not None:
        if strange := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
            raise ValueError(
                f"this {family.architecture} needs what this trainer does not have: layer type {strange[0]!r:.60}"
            )
        if len(kinds) != n_layer:
            raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers is {n_layer}")
        sliding = [kind == "sliding_attention" for kind in kinds]
        if any(sliding) and window is None:
            raise ValueError("layer_types has sliding_attention, and there is no sliding window (use_sliding_window)")
        if family.windows == "all" and sliding != [window is not None] * n_layer:
            raise ValueError(
                f"layer_types and sliding_window differ: {family.architecture} has one window for all layers"
            )
        return sliding
    if window is None:
        return [False] * n_layer
    if family.no_rope:
        return [not turns for turns in turning[:n_layer]]
    first = 0
    if family.windows == "by layer":
        given = _typed(raw, "max_window_layers", int)
        first = 28 if given is None else given
    return [layer >= first for layer in range(n_layer)]


# Names of tensors


class Place(NamedTuple):
    """What a tensor on disk holds: tensors in memory by name, their rows one below the other."""

    memory: tuple[str, ...]
    transposed: bool = False
    heads: int | None = None  # in how many heads the halves of the rows stand in the other order


def places(family: Family | None, config: ModelConfig, names: Iterable[str]) -> dict[str, Place]:
    """Name on disk -> its place, for the parameters `names` of a model in memory. A tied head is stored as the embedding."""
    rules = {} if family is None else {stem: rule for rule in family.rules for stem in rule.memory}
    found = {}
    for name in names:
        if config.tie_embeddings and name == "lm_head.weight":
            continue
        stem, _, kind = name.removeprefix("model.").rpartition(".")
        layer = stem.split(".")[1] if stem.startswith("layers.") else ""
        rule = rules.get(stem.replace(f".{layer}.", ".{}.", 1) if layer else stem)
        if family is None or name == "lm_head.weight":
            found[name] = Place((name,))
        elif rule is None:
            found[f"{family.prefix}{stem}.{kind}"] = Place((name,))
        else:
            heads = (config.n_head if "q_proj" in stem else config.n_group) if rule.swapped else None
            memory = tuple(f"model.{each.format(layer)}.{kind}" for each in rule.memory)
            disk = f"{family.prefix}{rule.disk.format(layer)}.{kind}"
            found[disk] = Place(memory, rule.transposed and kind == "weight", heads)
    return found


def pack(place: Place, state: Mapping[str, Tensor]) -> Tensor:
    """The tensor on disk; what has the same name and form there is not copied."""
    parts = [state[name] for name in place.memory]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _exchanged(tensor.t() if place.transposed else tensor, place.heads)


def unpack(place: Place, tensor: Tensor) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    tensor = _exchanged(tensor.t() if place.transposed else tensor, place.heads)
    parts = (tensor,) if len(place.memory) == 1 else tensor.chunk(len(place.memory))
    return {name: part.contiguous() for name, part in zip(place.memory, parts, strict=True)}


def _exchanged(tensor: Tensor, heads: int | None) -> Tensor:
    """The two halves of the rows of each head, exchanged: its own inverse."""
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).flip(1).flatten(0, 2)


def canonical(family: Family | None, name: str) -> str | None:
    """A name on disk in its full form; None for a buffer of older writers, which is no weight."""
    if family is None:
        return name
    bare = name.removeprefix(family.prefix)
    stem = ".".join("{}" if part.isdecimal() else part for part in bare.split("."))
    if stem in family.buffers:
        return None
    return name if name.startswith((family.prefix, "lm_head.")) else family.prefix + name
