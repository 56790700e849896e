"""The decoder written out from the papers, slowly: float64, one query, head and column pair at a time.

It shares no code with gpt/ but the settings; tests compare the two.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gpt.model import ModelConfig
from gpt.positions import RopeScaling

Rows = Mapping[str, Tensor]  # parameters by name


# Positions


def sinusoid(position: int, width: int, theta: float = 10_000.0) -> Tensor:
    """PE(pos, 2i) = sin(pos / theta^(2i/C)), PE(pos, 2i+1) = cos of the same (Vaswani et al. 2017, section 3.5)."""
    code = [0.0] * width
    for column in range(width):
        angle = position / theta ** (2 * (column // 2) / width)
        code[column] = math.sin(angle) if column % 2 == 0 else math.cos(angle)
    return torch.tensor(code, dtype=torch.float64)


def bucket(distance: int, n_bucket: int, max_distance: int) -> int:
    """T5's kind of a distance into the past (Raffel et al. 2020, section 2.1)."""
    exact = n_bucket // 2
    if distance < exact:
        return max(distance, 0)
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return min(n_bucket - 1, exact + int(share * (n_bucket - exact)))


def frequencies(width: int, theta: float, scaling: RopeScaling | None, longest: int, total: int) -> list[float]:
    """Radians per position of each pair of columns, in a sequence of `total` tokens; `longest` is max_seq_len."""
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if scaling is None:
        return plain
    s = scaling.factor
    if scaling.kind == "linear":  # Chen et al. 2023: positions are divided
        return [f / s for f in plain]
    if scaling.kind == "dynamic":  # bloc97 2023: theta' = theta (s l / L - (s - 1))^(D / (D - 2))
        original = scaling.original_max_seq_len or longest
        growth = s * max(total, original) / original - (s - 1)
        base = theta * growth ** (width / (width - 2))
        return [base ** (-2 * i / width) for i in range(width // 2)]
    if scaling.kind == "llama3":
        assert scaling.original_max_seq_len is not None
        return [_llama3(f, s, scaling) for f in plain]
    return _yarn(plain, width, theta, scaling, scaling.original_max_seq_len or longest / s)


def _llama3(f: float, s: float, scaling: RopeScaling) -> float:
    """By wavelength, against the original context: kept, divided, or blended."""
    assert scaling.original_max_seq_len is not None
    wavelength, original = 2 * math.pi / f, scaling.original_max_seq_len
    if wavelength < original / scaling.high_freq_factor:
        return f
    if wavelength > original / scaling.low_freq_factor:
        return f / s
    share = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - share) * f / s + share * f


def _yarn(plain: list[float], width: int, theta: float, scaling: RopeScaling, original: float) -> list[float]:
    """NTK by parts (Peng et al. 2023, section 3.2) with the ramp over pairs of the paper's own program.

    A pair i turns original theta^(-2i/D) / 2 pi times in the original context; solved for i that gives the ramp's ends.
    """

    def pair(turns: float) -> float:
        return width / 2 * math.log(original / (2 * math.pi * turns), theta)

    low = max(0, math.floor(pair(scaling.beta_fast)))
    high = min(width - 1, math.ceil(pair(scaling.beta_slow)))
    found = []
    for i, f in enumerate(plain):
        share = min(1.0, max(0.0, (i - low) / ((high - low) or 0.001)))  # 0: kept, 1: divided
        found.append(f * (1 - share) + f / scaling.factor * share)
    return found


def turned(x: Tensor, position: int, radians: list[float], factor: float = 1.0) -> Tensor:
    """A head (D,) with its pairs (i, i + n), n = len(radians), turned in the plane (Su et al. 2021)."""
    out, n = x.clone(), len(radians)
    for i, f in enumerate(radians):
        cos, sin = math.cos(position * f) * factor, math.sin(position * f) * factor
        out[i] = x[i] * cos - x[i + n] * sin
        out[i + n] = x[i + n] * cos + x[i] * sin
    return out


# Norms and activations


def normalized(x: Tensor, kind: str, eps: float, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """(C,) by RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016)."""
    if kind == "layernorm":
        x = x - sum(x) / len(x)
    x = x / math.sqrt(float(sum(x * x)) / len(x) + eps)
    x = x if gain is None else x * gain
    return x if bias is None else x + bias


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "geglu": _gelu,
    "gelu": _gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
}


# The decoder


def logits(config: ModelConfig, state: Rows, tokens: list[int], prefix: int = 0) -> Tensor:
    """(T, V) float64: the logits of one row, of which the first `prefix` tokens see each other."""
    p = {name: value.double() for name, value in state.items()}
    stream = []
    for position, token in enumerate(tokens):
        x = p["model.embed_tokens.weight"][token]
        if config.position == "learned":
            x = x + p["model.position.weight"][position]
        if config.position == "sinusoidal":
            x = x * math.sqrt(config.d_model) + sinusoid(position, config.d_model, config.rope_theta)
        stream.append(norm(config, p, "model.embed_norm", x) if config.embed_norm else x)
    for layer in range(config.n_layer):
        stream = block(config, p, layer, stream, prefix)
    if config.norm_at != "post":
        stream = [norm(config, p, "model.norm", x) for x in stream]
    out = torch.stack([p["lm_head.weight"] @ x for x in stream])
    cap = config.logit_softcap
    return out if cap is None else cap * torch.tanh(out / cap)


def block(config: ModelConfig, p: Rows, layer: int, stream: list[Tensor], prefix: int) -> list[Tensor]:
    """Both sub-layers of a block, normalized where the settings say."""
    at = f"model.layers.{layer}."
    first, second = at + "post_attention_layernorm", at + "post_feedforward_layernorm"
    if config.norm_at == "pre":
        read = [norm(config, p, at + "input_layernorm", x) for x in stream]
        stream = [x + y for x, y in zip(stream, attention(config, p, layer, read, prefix), strict=True)]
        return [x + mlp(config, p, at + "mlp.", norm(config, p, first, x)) for x in stream]
    answers = attention(config, p, layer, stream, prefix)
    if config.norm_at == "post":
        stream = [norm(config, p, first, x + y) for x, y in zip(stream, answers, strict=True)]
        return [norm(config, p, second, x + mlp(config, p, at + "mlp.", x)) for x in stream]
    stream = [x + norm(config, p, first, y) for x, y in zip(stream, answers, strict=True)]
    return [x + norm(config, p, second, mlp(config, p, at + "mlp.", x)) for x in stream]


def attention(config: ModelConfig, p: Rows, layer: int, read: list[Tensor], prefix: int) -> list[Tensor]:
    """softmax(q k / sqrt(d_k)) v over what each query may see, head by head, then all heads projected."""
    at, D, T = f"model.layers.{layer}.self_attn.", config.d_head, len(read)
    q = [heads(config, p, at, "q", layer, x, t, T) for t, x in enumerate(read)]
    k = [heads(config, p, at, "k", layer, x, t, T) for t, x in enumerate(read)]
    v = [linear(p, at + "v_proj", x).split(D) for x in read]
    window, shared = config.window_of(layer), config.n_head // config.n_group
    out = []
    for t in range(T):
        seen = [s for s in range(T) if (s <= t and (window is None or t - s < window)) or max(s, t) < prefix]
        answer = []
        for h in range(config.n_head):
            scores = [q[t][h] @ k[s][h // shared] / math.sqrt(D) for s in seen]
            if config.position == "relative":
                n, furthest = config.relative_buckets, config.relative_max_distance
                table = p["model.position.weight"]
                scores = [x + table[bucket(t - s, n, furthest), h] for x, s in zip(scores, seen, strict=True)]
            weights = torch.stack(scores).exp()
            values = torch.stack([v[s][h // shared] for s in seen])
            answer.append((weights / weights.sum()) @ values)
        out.append(linear(p, at + "o_proj", torch.cat(answer)))
    return out


def heads(
    config: ModelConfig, p: Rows, at: str, which: str, layer: int, x: Tensor, position: int, total: int
) -> list[Tensor]:
    """The queries (which "q") or keys ("k") of one token, one a head: projected, normalized, turned."""
    x = linear(p, f"{at}{which}_proj", x)
    if config.qk_norm == "whole":
        x = norm(config, p, f"{at}{which}_norm", x)
    each = list(x.split(config.d_head))
    if config.qk_norm is True:
        each = [norm(config, p, f"{at}{which}_norm", head) for head in each]
    if config.position != "rotary" or layer in config.nope_layers:
        return each
    assert config.max_seq_len is not None
    scaling, factor = config.rope_scaling, 1.0
    if scaling is not None and scaling.kind == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    radians = frequencies(config.d_rotary, config.rope_theta, scaling, config.max_seq_len, total)
    return [turned(head, position, radians, factor) for head in each]


def mlp(config: ModelConfig, p: Rows, at: str, x: Tensor) -> Tensor:
    activation = ACTIVATIONS[config.mlp]
    if config.mlp in ("swiglu", "geglu"):
        return linear(p, at + "down_proj", activation(linear(p, at + "gate_proj", x)) * linear(p, at + "up_proj", x))
    return linear(p, at + "down_proj", activation(linear(p, at + "up_proj", x)))


def linear(p: Rows, name: str, x: Tensor) -> Tensor:
    y = p[name + ".weight"] @ x
    return y + p[name + ".bias"] if name + ".bias" in p else y


def norm(config: ModelConfig, p: Rows, name: str, x: Tensor) -> Tensor:
    return normalized(x, config.norm, config.norm_eps, p.get(name + ".weight"), p.get(name + ".bias"))
