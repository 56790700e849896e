"""One GGUF file from a model and its tokenizer, as llama.cpp reads them. What llama.cpp cannot say is refused by name.

    header | what the model and the tokenizer are, key by key | name, shape and place of each tensor | tensors, aligned

The format is ggml-org/ggml's docs/gguf.md, version 3, little-endian. Nothing here reads such a file.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from gpt import durable, signals
from gpt.model import ModelConfig
from gpt.positions import rope_frequencies
from gpt.tokenizer import BYTE_NAME, DEEPSEEK_V3, Tokenizer
from gpt.vocabularies import BYTE_OF_LETTER, CL100K, GPT2, QWEN, parts_of

ALIGNMENT = 32
DTYPES = {"float32": (torch.float32, 0, 0), "bfloat16": (torch.bfloat16, 30, 32)}  # dtype, tensor type, file type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, numbered as SentencePiece's


def write(
    path: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: Literal["float32", "bfloat16"],
) -> list[str]:
    """Write `path`, whole or not at all; what its user should know, in words.

    `state` has the names of a `GPT` in memory. Matrices are stored as `dtype`; vectors and position tables, which
    llama.cpp wants in full, always as float32. ValueError in words for a model or a tokenizer that llama.cpp, as far as
    it is known here, would not compute or cut as this trainer does.
    """
    architecture = architecture_of(config)
    words, notes = _vocabulary(tokenizer, config)
    values = {"general.architecture": architecture.name, "general.file_type": DTYPES[dtype][2]}
    values |= _shape(architecture, config) | words
    tensors = list(_tensors(architecture, config, state, dtype))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory; make it first, or write elsewhere")
    durable.check_space(path.parent, sum(tensor.n_bytes for tensor in tensors))
    durable.write_file(path, _chunks(values, tensors))
    return notes


# What llama.cpp computes


@dataclass(frozen=True)
class Architecture:
    """A model of llama.cpp: what a decoder of ours must be so that it computes the same."""

    name: str
    takes: Mapping[str, Sequence[Any]]  # a trait -> the values that it computes, beside those of PLAIN
    pairs: bool = False  # rotary pairs stand side by side in a head, not half a head apart
    norms: Mapping[str, str] = field(default_factory=dict)  # our name of a norm in a block -> llama.cpp's
    fused: bool = False  # queries, keys and values are one matrix
    head: bool = False  # the output head stands in the file even where it is the embedding


PLAIN: Mapping[str, Sequence[Any]] = {
    "position": ("rotary",), "norm": ("rmsnorm",), "norm_at": ("pre",), "norm_gain": (True,), "embed_norm": (False,),
    "mlp": ("swiglu",), "mlp_bias": (False,), "attention_bias": (False,), "qk_norm": (False,), "rotary_dim": (None,),
    "rope_scaling": (None, "linear", "yarn"), "nope_layers": ((),), "window": (None,), "head_dim": (None,),
    "logit_softcap": (None,), "prefix_lm": (False,),
}  # fmt: skip
PRE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTPUT = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
GPT2_TAKES = {
    "position": ("learned",), "norm": ("layernorm",), "mlp": ("gelu_tanh",), "mlp_bias": (True,), "attention_bias": (True,),
}  # fmt: skip
LLAMA_TAKES = {
    "mlp_bias": (False, True), "attention_bias": (False, True, "qkv"), "rope_scaling": (None, "linear", "yarn", "llama3"),
}  # fmt: skip
ANY_HEAD: Mapping[str, Sequence[Any]] = {"head_dim": (None, "of its own")}
ARCHITECTURES = (  # where several compute a model, the first is it
    Architecture("qwen3", {"qk_norm": (True,), **ANY_HEAD}, norms=PRE),
    Architecture("olmo2", {"norm_at": ("output",), "qk_norm": ("whole",)}, norms=OUTPUT, head=True),
    Architecture("smollm3", {"nope_layers": ("every fourth",)}, pairs=True, norms=PRE),
    Architecture("gpt2", GPT2_TAKES, norms=PRE, fused=True),
    Architecture("qwen2", {"attention_bias": ("qkv",)}, norms=PRE),
    Architecture("llama", {**LLAMA_TAKES, **ANY_HEAD}, pairs=True, norms=PRE),
)


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of llama.cpp that computes this model; ValueError says what keeps it from the nearest one."""
    traits = _traits(config)
    nearest = min(ARCHITECTURES, key=lambda architecture: len(_against(architecture, traits)))
    if lacks := _against(nearest, traits):
        raise ValueError(
            f"llama.cpp has no architecture for this model; the nearest is {nearest.name}, without {'; '.join(lacks)}"
        )
    return nearest


def _traits(config: ModelConfig) -> dict[str, Any]:
    """What architectures differ in. What has no effect in this model is None."""
    assert config.max_seq_len is not None
    traits = {name: getattr(config, name) for name in PLAIN}
    if config.window is not None and config.window >= config.max_seq_len:
        traits["window"] = None
    if config.position == "rotary" and config.d_rotary == config.d_head:
        traits["rotary_dim"] = None
    if config.rope_scaling is not None:
        traits["rope_scaling"] = config.rope_scaling.kind
    if config.nope_layers and sorted(config.nope_layers) == list(range(3, config.n_layer, 4)):
        traits["nope_layers"] = "every fourth"
    traits["head_dim"] = None if config.n_head * config.d_head == config.d_model else "of its own"
    return traits


def _against(architecture: Architecture, traits: Mapping[str, Any]) -> list[str]:
    takes = {**PLAIN, **architecture.takes}
    return [f"{name}: {value}" for name, value in traits.items() if value not in takes[name]]


def _shape(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """The keys that say how large a model is and how it turns its heads."""
    layer_norm = "layer_norm_epsilon" if config.norm == "layernorm" else "layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "context_length": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "embedding_length": config.d_model,
        "block_count": config.n_layer,
        "feed_forward_length": config.d_hidden,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_group,
        "attention.key_length": config.d_head,
        "attention.value_length": config.d_head,
        f"attention.{layer_norm}": config.norm_eps,
    }
    if config.position == "rotary":
        values |= {"rope.dimension_count": config.d_head, "rope.freq_base": config.rope_theta}
    if (scaling := config.rope_scaling) is not None and scaling.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        if scaling.kind == "yarn":
            values |= _yarn(config)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def _yarn(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    assert scaling is not None and config.max_seq_len is not None
    original = scaling.original_max_seq_len or config.max_seq_len / scaling.factor
    if original != int(original):
        raise ValueError(f"yarn: max_seq_len / factor is {original}, and llama.cpp wants a whole number of positions")
    usual = 0.1 * math.log(scaling.factor) + 1  # llama.cpp's, by which it multiplies the one that is named
    return {
        "rope.scaling.attn_factor": (scaling.attention_factor or usual) / usual,
        "rope.scaling.original_context_length": int(original),
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }


# Tensors


class Stored(NamedTuple):
    """A tensor of the file: `load` makes it, contiguous, when its turn to be written comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        return DTYPES[self.dtype][0].itemsize * torch.Size(self.shape).numel()


LINEAR = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens": "token_embd", "model.position": "position_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
QUERIES, KEYS, VALUES = (f"self_attn.{part}_proj" for part in "qkv")


def _tensors(
    architecture: Architecture, config: ModelConfig, state: Mapping[str, Tensor], dtype: str
) -> Iterator[Stored]:
    """Every tensor of the file in its order: llama.cpp's names, its order of rows, and what follows from settings."""
    if architecture.pairs and (scaling := config.rope_scaling) is not None and scaling.kind == "llama3":
        plain, _ = rope_frequencies(config.d_head, config.rope_theta, None, config.max_seq_len or 0, 0)
        scaled, _ = rope_frequencies(config.d_head, config.rope_theta, scaling, config.max_seq_len or 0, 0)
        yield Stored("rope_freqs.weight", tuple(plain.shape), "float32", lambda: plain / scaled)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_embeddings and not architecture.head:
            continue
        module, _, kind = name.rpartition(".")
        *_, layer, part = ["", *module.removeprefix("model.layers.").split(".", 1)]
        if not name.startswith("model.layers."):
            as_is = name == "model.position.weight"  # looked up, never multiplied
            yield _stored(f"{OUTSIDE[module]}.{kind}", tensor, "float32" if as_is else dtype)
        elif not architecture.fused or part not in (QUERIES, KEYS, VALUES):
            new = {**LINEAR, **architecture.norms}[part]
            n_head = {QUERIES: config.n_head, KEYS: config.n_group}.get(part) if architecture.pairs else None
            yield _stored(f"blk.{layer}.{new}.{kind}", tensor, dtype, n_head)
        elif part == QUERIES:
            yield _fused(
                f"blk.{layer}.attn_qkv.{kind}",
                [state[name.replace(QUERIES, p)] for p in (QUERIES, KEYS, VALUES)],
                dtype,
            )


def _stored(name: str, tensor: Tensor, dtype: str, n_head: int | None = None) -> Stored:
    kind = dtype if tensor.dim() > 1 else "float32"

    def load() -> Tensor:
        rows = tensor if n_head is None else _paired(tensor, n_head)
        return rows.detach().to("cpu", DTYPES[kind][0]).contiguous()

    return Stored(name, tuple(tensor.shape), kind, load)


def _fused(name: str, parts: Sequence[Tensor], dtype: str) -> Stored:
    kind = dtype if parts[0].dim() > 1 else "float32"
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return Stored(name, shape, kind, lambda: torch.cat([part.detach().to("cpu", DTYPES[kind][0]) for part in parts]))


def _paired(rows: Tensor, n_head: int) -> Tensor:
    """The rows of a projection (or its bias) with the two that turn together, i and i + D/2 of a head, side by side."""
    return rows.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


# The tokenizer

Patterns = tuple[str, ...]
PRE_TOKENIZERS: tuple[tuple[Patterns, str, bool], ...] = (  # patterns, llama.cpp's name, whole words without merges
    (DEEPSEEK_V3, "deepseek-v3", False),
    ((GPT2,), "gpt-2", False),
    ((r"\p{N}", GPT2), "smollm", False),
    ((CL100K,), "llama-bpe", True),
    ((CL100K,), "dbrx", False),
    ((QWEN,), "qwen2", False),
)
KNOWN = "those of DeepSeek-V3 (what this trainer learns), GPT-2, SmolLM, cl100k and Llama 3, and Qwen"


def _vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The keys that say what the tokenizer is, and what its user should know."""
    # As its library would write it: what that reads may also lack a type, or be a list of values without names.
    tokenizer = Tokenizer(json.loads(Backend.from_str(json.dumps(tokenizer.raw)).to_str()), tokenizer.config)
    model = tokenizer.raw["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"llama.cpp has no vocabulary of kind {model.get('type')}; it has byte pair encoding")
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if named := [f"{name}: {model[name]!r}" for name in odd if model.get(name)]:
        raise ValueError(f"llama.cpp has no byte pair encoding with {', '.join(named)}")
    names, kinds = _entries(tokenizer, config)
    own, notes = _pieces(tokenizer, len(names)) if model.get("byte_fallback") else _byte_level(tokenizer)
    values = {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": tokenizer.start_id,
        "tokenizer.ggml.eos_token_id": tokenizer.end_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": True,  # as everywhere here: every text begins with it
        "tokenizer.ggml.add_eos_token": False,
    }
    if (template := tokenizer.chat_template) is not None:
        values["tokenizer.chat_template"] = template
    if UNKNOWN in kinds:
        values["tokenizer.ggml.unknown_token_id"] = kinds.index(UNKNOWN)
    return own | values, notes


def _entries(tokenizer: Tokenizer, config: ModelConfig) -> tuple[list[str], list[int]]:
    """The name and the kind of every id of the model; ids that no entry has are unused."""
    assert config.vocab_size is not None
    if tokenizer.size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model's vocab_size is {config.vocab_size}")
    names, kinds = [""] * config.vocab_size, [UNUSED] * config.vocab_size
    user_defined = {token["content"] for token in tokenizer.raw.get("added_tokens") or () if not token["special"]}
    pieces = bool(tokenizer.raw["model"].get("byte_fallback"))
    unknown = tokenizer.vocab.get(tokenizer.raw["model"].get("unk_token")) if pieces else None
    for name, token in tokenizer.vocab.items():
        is_byte = pieces and BYTE_NAME.fullmatch(name)
        names[token] = name
        kinds[token] = (
            UNKNOWN if token == unknown else CONTROL if token in tokenizer.control_ids
            else USER_DEFINED if name in user_defined else BYTE if is_byte else NORMAL
        )  # fmt: skip
    for token, kind in enumerate(kinds):
        if kind == UNUSED:
            names[token] = f"[UNUSED_{token}]"
            while names[token] in tokenizer.vocab:  # whatever it is called, it may not be called as another
                names[token] += "_"
    return names, kinds


def _byte_level(tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    raw = tokenizer.raw
    if lost := [letter for letter in BYTE_OF_LETTER if letter not in tokenizer.vocab]:
        raise ValueError(
            f"the vocabulary has no entry for byte 0x{BYTE_OF_LETTER[lost[0]]:02x}; llama.cpp needs all 256"
        )
    for token in raw.get("added_tokens") or ():
        if not token["special"] and (token.get("lstrip") or token.get("rstrip") or token.get("single_word")):
            raise ValueError(
                f"the added token {token['content']!r} takes space with it or stands alone; llama.cpp's do not"
            )
    normalizer = (raw.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"the tokenizer's normalizer, {normalizer}, has no name in llama.cpp; it leaves text as it is")
    notes = ["llama.cpp does not bring text to Unicode's form NFC, as this tokenizer does: give it such text"]
    name = _pre_tokenizer(tokenizer)
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(raw)],
    }
    return values, notes if normalizer == "NFC" else []


def _pre_tokenizer(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for how text is split; ValueError in words if it has none."""
    patterns = _patterns(tokenizer.raw.get("pre_tokenizer"))
    names = {whole: name for known, name, whole in PRE_TOKENIZERS if known == patterns}
    if not names:
        shown = json.dumps(tokenizer.raw.get("pre_tokenizer"), ensure_ascii=False)
        raise ValueError(
            f"the pre-tokenizer has no name that is known to llama.cpp, which would split text otherwise: {shown[:300]};"
            f" known: {KNOWN}"
        )
    whole = bool(tokenizer.raw["model"].get("ignore_merges"))
    if whole in names:
        return names[whole]
    if (token := _not_merged(tokenizer)) is not None:
        raise ValueError(
            f"the entry {token!r} is no result of merges, and the vocabulary"
            f" {'takes' if whole else 'does not take'} it where a word is just that, unlike llama.cpp's {names[not whole]}"
        )
    return names[not whole]


def _patterns(pre_tokenizer: Any) -> Patterns | None:
    """The patterns that split text one after another, if that, and bytes as letters, is all a pre-tokenizer does."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    patterns = []
    for part in parts:
        pattern = part.get("pattern")
        if part.get("type") == "Split" and isinstance(pattern, dict) and part.get("behavior") == "Isolated":
            text = pattern.get("Regex")
            if part.get("invert") or not isinstance(text, str):
                return None
            patterns.append(text)
        elif part.get("type") == "Digits" and part.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif part.get("type") == "ByteLevel" and part is parts[-1] and not part.get("add_prefix_space"):
            patterns += [GPT2] if part.get("use_regex", True) else []
            return next(
                (p for p, _, _ in PRE_TOKENIZERS if list(map(_escaped, p)) == list(map(_escaped, patterns))), ()
            )
        else:
            return None
    return None


def _escaped(pattern: str) -> str:
    """A pattern with line ends written out, as some files have them and others not."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _merges(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in raw["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _not_merged(tokenizer: Tokenizer) -> str | None:
    """An entry that its own text does not become by merges; None if there is none."""
    merges = _merges(tokenizer.raw)
    rank = {left + right: i for i, (left, right) in reversed(list(enumerate(merges)))}
    known = set(merges)
    added = {token["content"] for token in tokenizer.raw.get("added_tokens") or ()}
    names = (name for name in tokenizer.vocab if len(name) > 1 and name not in added)
    return next((name for name in names if parts_of(name, rank.get) not in known), None)


def _pieces(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """A vocabulary of SentencePiece's: scores instead of merges, spaces as marks, bytes for what it does not know."""
    raw = tokenizer.raw
    prefix = _space_prefix(raw)
    if other := [token["content"] for token in raw.get("added_tokens") or () if not token["special"]]:
        raise ValueError(f"{other[0]!r} is an added token that text becomes, which is not supported beside pieces")
    merges = _merges(raw)
    order = list(dict.fromkeys(left + right for left, right in merges))
    rank = {name: i for i, name in enumerate(order)}
    ranks = [rank[left + right] for left, right in merges]
    if ranks != sorted(ranks):
        raise ValueError("the merges of one entry do not follow each other, and llama.cpp knows only one score for it")
    known, scores = set(merges), [0.0] * vocab_size
    for name, token in tokenizer.vocab.items():
        if token in tokenizer.control_ids or len(name) == 1 or BYTE_NAME.fullmatch(name):
            continue
        if name not in rank or parts_of(name, rank.get) not in known:
            raise ValueError(f"the entry {name!r} is no result of merges; llama.cpp would take it wherever it fits")
        scores[token] = -float(rank[name])
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores}
    return values | {"tokenizer.ggml.add_space_prefix": prefix}, []


def _space_prefix(raw: Mapping[str, Any]) -> bool:
    """Whether a mark is put before every text; ValueError for any other treatment of text than llama.cpp's own."""
    normalizer, pre_tokenizer = raw.get("normalizer") or {}, raw.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if pre_tokenizer is None and steps == [{"type": "Prepend", "prepend": "▁"}, mark]:
        return True
    if pre_tokenizer is None and steps == [mark]:
        return False
    shown = json.dumps([normalizer, pre_tokenizer], ensure_ascii=False)
    raise ValueError(
        "llama.cpp treats spaces otherwise than this tokenizer of SentencePiece's kind, which has"
        f" {shown[:300]}; known: every space a mark, and one more before the text or none"
    )


# Bytes


def _chunks(values: Mapping[str, Any], tensors: Sequence[Stored]) -> Iterator[bytes | memoryview]:
    """The file, piece by piece; one tensor is in memory at a time."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    header += b"".join(_string(key) + _value(key, value) for key, value in values.items())
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]  # the innermost first
        place = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, DTYPES[tensor.dtype][1], offset)
        header += _string(tensor.name) + place
        offset += -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT
    yield header + bytes(-len(header) % ALIGNMENT)
    for tensor in tensors:
        signals.check()
        yield tensor.load().view(torch.uint8).numpy().data
        yield bytes(-tensor.n_bytes % ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


TYPES: Mapping[type, tuple[int, Callable[[Any], bytes]]] = {
    int: (4, lambda value: struct.pack("<I", value)),
    float: (6, lambda value: struct.pack("<f", value)),
    bool: (7, lambda value: struct.pack("<?", value)),
    str: (8, _string),
}


def _value(key: str, value: Any) -> bytes:
    """A value with its type; a list's elements are of one."""
    if isinstance(value, list):
        kind, pack = TYPES[type(value[0]) if value else str]
        kind = 5 if key.endswith("token_type") else kind  # signed, by the format's own list of keys
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(pack, value))
    kind, pack = TYPES[type(value)]
    return struct.pack("<I", kind) + pack(value)
