"""Decoders of every kind, as settings: what holds for all of them is tested over these."""

from typing import Any

PLAIN = {"norm": "layernorm", "mlp_bias": True, "qk_norm": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "llama, grouped": {"qk_norm": False, "n_kv_head": 2, "tie_embeddings": False},
    "multi-query, odd width": {"n_kv_head": 1, "head_dim": 6, "mlp": "relu2"},
    "layernorm on heads": {"norm": "layernorm", "mlp": "gelu", "qk_norm": True},
    "the original": PLAIN | {"position": "sinusoidal", "norm_at": "post", "mlp": "relu"},
    "gpt-1": PLAIN | {"position": "learned", "norm_at": "post", "mlp": "gelu_tanh", "attention_bias": True},
    "gpt-2": PLAIN | {"position": "learned", "mlp": "gelu_tanh", "attention_bias": True},
    "relative bias": {"position": "relative", "relative_buckets": 8, "relative_max_distance": 10, "n_kv_head": 2},
    "no positions": {"position": "none"},
    "partial rotary": {"rotary_dim": 4},
    "linear scaling": {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    "dynamic scaling": {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_seq_len": 16}},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 8}, "rope_theta": 100.0},
    "llama3 scaling": {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 16}},
    "windows": {"window": 4, "n_kv_head": 2},
    "windows and a full layer": {"window": 3, "full_layers": (1,), "n_layer": 3},
    "windows and relative bias": {"window": 4, "full_layers": (0,), "position": "relative"},
    "layers that do not turn": {"nope_layers": (1,), "attention_bias": "qkv"},
    "norms of outputs, whole heads": {"norm_at": "output", "qk_norm": "whole", "n_kv_head": 2},
    "no gains, capped": {"norm_gain": False, "embed_norm": True, "logit_softcap": 15.0, "mlp": "relu2"},
    "layernorm without gains": {"norm": "layernorm", "norm_gain": False, "embed_norm": True, "norm_at": "post"},
    "geglu": {"mlp": "geglu", "mlp_bias": True},
    "prefix-lm": {"prefix_lm": True},
}
