"""What a model computes on a text: attention of every layer and head, codes of position, and what it expects next; as a page.

Nothing is computed a second way: hooks keep what each attention was given, and its own `project` makes queries and keys of it.
"""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt import hf, run
from gpt.attention import Mask
from gpt.model import GPT, Attention
from gpt.page import Block, Heading, Note, Row, Script, Segment, Stage, Table, Token, printable, quoted
from gpt.positions import Angles, At
from gpt.tokenizer import Tokenizer

RIVALS = 10
TERMINAL_TOKENS, TERMINAL_RIVALS = 28, 2  # what a terminal shows of a long text, and beside the true token
TERMINAL_PIECE = 14  # characters of a token beside its softmax row
BUDGET = 24 << 20  # bytes of queries and keys in a page; above it those of one layer
THUMB = 80  # cells a side of a small picture of a head
CODES = 256  # columns of vectors added to the embeddings that a page shows
SHADES = ((0.6, "█"), (0.3, "▓"), (0.1, "▒"), (0.02, "░"), (0.0, "·"))  # weights from here on


# What is computed


@dataclass(frozen=True)
class Layer:
    """What one attention computed with, fp32: q (H, T, D), k and v (G, T, D), turned to their positions; who sees whom
    (T, T) bool, queries first; the bias of the scores (H, T, T)."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    bias: Tensor | None

    def scores(self, head: int) -> Tensor:
        """(T, T): q k^T / sqrt(D) + bias of a query head, with nothing hidden yet."""
        shared = self.q.shape[0] // self.k.shape[0]
        scores = (self.q[head] * self.q.shape[-1] ** -0.5) @ self.k[head // shared].T
        return scores if self.bias is None else scores + self.bias[head]

    def weights(self, head: int) -> Tensor:
        """(T, T): the softmax of each query's scores over what it sees, 0 elsewhere."""
        return self.scores(head).masked_fill(~self.visible, -math.inf).softmax(dim=-1)


class Next(NamedTuple):
    """What is expected after each of T tokens: of the true next token its logit, log-probability (natural) and rank from 1,
    (T - 1,); the likeliest others (T, n) and their log-probabilities. After the last token nothing is known to be true."""

    logits: Tensor
    logprobs: Tensor
    ranks: Tensor
    rivals: Tensor
    rival_logprobs: Tensor


@dataclass(frozen=True)
class Seen:
    """A model reading T tokens: its layers, by what queries and keys turn (T, rotary_dim) twice, what positions add to the
    embeddings (T, C), and what comes next."""

    ids: list[int]
    n_prefix: int  # of them see each other both ways
    layers: list[Layer]
    angles: Angles | None
    codes: Tensor
    next: Next

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


@torch.inference_mode()
def observe(model: GPT, ids: Sequence[int], n_prefix: int = 0) -> Seen:
    """Let `model`, in eval mode, read `ids`, of which the first `n_prefix` see each other both ways.

    ValueError if it computes a number that is not finite, or a bias that is not one of distances.
    """
    T, device = len(ids), model.lm_head.weight.device
    layers: list[Layer] = []
    turned: list[Angles | None] = []

    def keep(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, Attention)
        x, angles, mask = given[:3]
        q, k, v = (part[0].float().cpu() for part in module.project(x, angles))
        layers.append(Layer(q, k, v, visible(mask, T), None if mask.bias is None else mask.bias[0].float().cpu()))
        turned.append(angles)

    hooks = [part.register_forward_hook(keep) for part in model.model.modules() if isinstance(part, Attention)]
    try:
        prefix = (torch.arange(T, device=device) < n_prefix)[None] if n_prefix else None
        features = model.features(torch.tensor([ids], device=device), prefix=prefix)[0]
    finally:
        for hook in hooks:
            hook.remove()
    codes = model.model.position.embed(torch.zeros(1, T, features.shape[-1], device=device), At(None, T, T))[0]
    angles = None if turned[0] is None else (turned[0][0].float().cpu(), turned[0][1].float().cpu())
    return Seen(list(ids), n_prefix, layers, angles, codes.float().cpu(), expected(model, features, ids))


def visible(mask: Mask, n_tokens: int) -> Tensor:
    """(T, T) bool: which key each query of a whole sequence may see."""
    assert mask.blocks is None, "a kernel of blocks is applied in training alone"
    if mask.allowed is not None:
        return mask.allowed[0, 0].cpu()
    everything = torch.ones(n_tokens, n_tokens, dtype=torch.bool)
    return everything.tril() if mask.causal else everything


def expected(model: GPT, features: Tensor, ids: Sequence[int]) -> Next:
    """What follows from features (T, C), a few positions at a time: a row of logits may be long."""
    parts = []
    targets = torch.tensor([*ids[1:], -1], device=features.device)
    for some, true in zip(features.split(64), targets.split(64), strict=True):
        logits = model.logits(some).float()
        if not bool(logits.isfinite().all()):
            raise ValueError("the model computes numbers that are not finite on this text; its weights are damaged")
        logprobs = logits.log_softmax(dim=-1)
        at = true.clamp(min=0)[:, None]  # of the last token any, which is left out below
        logit = logits.gather(1, at)
        others = logprobs.scatter(1, at, torch.where(true[:, None] < 0, logprobs.gather(1, at), -math.inf))
        best = others.topk(min(RIVALS, logits.shape[-1] - 1), dim=-1)
        rank = 1 + (logits > logit).sum(dim=-1)
        parts.append((logit[:, 0], logprobs.gather(1, at)[:, 0], rank, best.indices, best.values))
    logit, logprob, rank, rivals, rival_logprobs = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Next(logit[:-1], logprob[:-1], rank[:-1], rivals, rival_logprobs)


def by_distance(bias: Tensor) -> Tensor:
    """A bias (H, T, T) as (H, 2T - 1): at T - 1 + d that of a key d before its query. ValueError if it is not so."""
    T = bias.shape[-1]
    line = torch.cat([bias[:, :, -1], bias[:, -1].flip(-1)[:, 1:]], dim=-1)
    at = torch.arange(T)
    if not torch.equal(line[:, at[:, None] - at + T - 1], bias):
        raise ValueError("the scores' bias is not one of distances alone; this page cannot draw it")
    return line


# What is shown


@dataclass(frozen=True)
class Gaze:
    """A model's reading of a text, for a terminal and as a page, with one layer and head chosen."""

    title: str
    model: GPT
    tokenizer: Tokenizer
    seen: Seen
    layer: int
    head: int
    notes: list[str]

    def piece(self, token: int) -> str:
        return quoted(self.tokenizer.piece(token)) if token < self.tokenizer.size else "(no token)"

    def on_terminal(self) -> Iterator[Block]:
        """A compact form: a table of tokens, one head's softmax rows, and the likeliest next tokens."""
        seen, n = self.seen, min(self.seen.n_tokens, TERMINAL_TOKENS)
        yield from map(Note, self.notes)
        yield Heading("tokens: each position reads its input and is to predict its target")
        yield self.shift(n)
        yield Note(self.positions())
        yield Heading(f"layer {self.layer}, head {self.head}: softmax rows")
        yield self.rows(n)
        scale = ", ".join(f"{mark} from {least:g}" for least, mark in reversed(SHADES))
        yield Note(f"a row for each query, a column for each key; {scale}; nothing: hidden by the mask")
        yield Heading("what is expected next")
        yield self.likely(n)
        if n < seen.n_tokens:
            yield Note(f"the first {n} of {seen.n_tokens:,} tokens; --html shows them all")

    def as_page(self) -> Iterator[Block]:
        """Everything, in the order in which the model computes it."""
        seen, c = self.seen, self.model.config
        shape = f"{c.n_layer} layers of {c.n_head} heads" + (
            f" (keys and values of {c.n_group})" if c.n_group != c.n_head else ""
        )
        yield Note(
            "\n".join([f"{shape}, width {c.d_model}, heads of {c.d_head}; {seen.n_tokens:,} tokens", *self.notes])
        )
        yield Stage("choice")
        yield Heading("1. The text as tokens")
        start = Token(self.tokenizer.piece(seen.ids[0]), seen.ids[0], role="control")
        words = [Token(self.tokenizer.piece(i), i) for i in seen.ids[1:]]
        yield Row("", [Segment("point at a token for its position and id", [start, *words])])
        yield Heading("2. Shifted right: what each position reads and what it is to predict")
        yield self.shift(seen.n_tokens)
        yield Heading("3. Codes of position")
        yield Note(self.positions())
        yield Stage("positions")
        yield Heading("4. Attention")
        yield Note(
            "softmax(q kᵀ / √D"
            + (" + bias" if seen.layers[0].bias is not None else "")
            + ") of every layer (down) and head"
            " (across); a row of a picture is a query, a column a key. Choose one."
        )
        yield Stage("heads")
        yield Stage("matrices")
        yield Heading("5. What is expected next")
        yield Note("Each token is shaded by the probability that it had. Choose one to see its rivals.")
        yield Stage("next")
        yield self.predictions(seen.n_tokens, RIVALS)
        yield Script(asset("gaze.js"), asset("gaze.css"), self.data())

    def shift(self, n: int) -> Table:
        ids = self.seen.ids
        rows = []
        for i in range(n):
            target = (self.piece(ids[i + 1]), f"{ids[i + 1]}") if i + 1 < len(ids) else ("", "")
            rows.append((f"{i}", self.piece(ids[i]), target[0], f"{ids[i]}", target[1]))
        return Table(("position", "input", "target", "input id", "target id"), rows, words=3)

    def rows(self, n: int) -> Table:
        layer = self.seen.layers[self.layer]
        weights = layer.weights(self.head)[:n, :n].tolist()
        shown = []
        for i, row in enumerate(weights):
            marks = (shade(w) if see else " " for w, see in zip(row, layer.visible[i, :n].tolist(), strict=True))
            piece = self.piece(self.seen.ids[i])
            piece = piece if len(piece) <= TERMINAL_PIECE else piece[: TERMINAL_PIECE - 1] + "…"
            shown.append((f"{i}", piece, "".join(mark * 2 for mark in marks)))
        columns = "".join(f"{i:<10}" for i in range(0, n, 5))[: 2 * n].rstrip()
        return Table(("", "query", columns), shown, words=3)

    def predictions(self, n: int, n_rivals: int) -> Table:
        """Of each position: the true next token, its probability, log-probability, logit and rank, and its rivals."""
        seen, after = self.seen, self.seen.next
        rows = []
        for i, (ids, logprobs) in enumerate(
            zip(after.rivals[:n].tolist(), after.rival_logprobs[:n].tolist(), strict=True)
        ):
            rivals = [f"{self.piece(t)} {probability(p)}" for t, p in zip(ids[:n_rivals], logprobs, strict=False)]
            true = ["", "", "", "", ""]
            if i + 1 < seen.n_tokens:
                logprob = after.logprobs[i].item()
                true = [
                    self.piece(seen.ids[i + 1]),
                    probability(logprob),
                    f"{logprob:.3f}",
                    f"{after.logits[i].item():.3f}",
                ]
                true.append(f"{int(after.ranks[i]):,}")
            rows.append((f"{i}", self.piece(seen.ids[i]), *true, "  ".join(rivals)))
        names = ("position", "after", "true next", "probability", "log-prob.", "logit", "rank", "rivals")
        return Table(names, rows, words=3, tail=1)

    def likely(self, n: int) -> Table:
        """`predictions`, as much as a terminal is wide."""
        full = self.predictions(n, TERMINAL_RIVALS)
        names = ("", "true next", "prob.", "log-prob.", "rank", "rivals")
        return Table(names, [(row[0], *row[2:5], *row[6:]) for row in full.rows], words=2, tail=1)

    def positions(self) -> str:
        """How order is known, in words."""
        c, nope = self.model.config, self.model.config.nope_layers
        scaled = f", stretched ({c.rope_scaling.kind})" if c.rope_scaling else ""
        part = f" of the first {c.d_rotary} of {c.d_head} columns" if c.d_rotary != c.d_head else ""
        without = f"; layers {', '.join(map(str, nope))} do not turn" if nope else ""
        kinds = {
            "rotary": f"rotary: each pair of columns of a query or key turns with its position{part}, base"
            f" {c.rope_theta:g}{scaled}{without}",
            "learned": "learned: a trained vector for each position is added to the embedding",
            "sinusoidal": f"sinusoidal: sines and cosines of the position are added to the embedding, base {c.rope_theta:g}",
            "relative": "relative: the scores get a trained bias for each head and distance from query to key",
            "none": "none: nothing tells a position; order is known through the causal mask alone",
        }
        windows = sorted({w for w in self.model.model.windows if w is not None})
        seen = f"\nsliding window: {c.window:,} keys, itself included" if windows else ""
        if seen and c.full_layers:
            seen += f"; layers {', '.join(map(str, c.full_layers))} see everything before"
        both = (
            f"\nprefix: the first {self.seen.n_prefix:,} tokens see each other both ways" if self.seen.n_prefix else ""
        )
        return "positions are " + kinds[c.position] + seen + both

    def data(self) -> dict[str, Any]:
        """What the page's script draws from: JSON, arrays as base64 of little-endian numbers."""
        seen, c = self.seen, self.model.config
        known = sorted({*seen.ids, *seen.next.rivals.flatten().tolist()})
        per_layer = 4 * seen.n_tokens * c.d_head * (c.n_head + c.n_group)
        whole = per_layer * c.n_layer <= BUDGET
        masks: list[Tensor] = []
        layers = []
        for number, layer in enumerate(seen.layers):
            place = next((i for i, mask in enumerate(masks) if torch.equal(mask, layer.visible)), len(masks))
            masks += [layer.visible] if place == len(masks) else []
            kept = {"q": packed(layer.q), "k": packed(layer.k)} if whole or number == self.layer else {}
            layers.append({"mask": place, **kept})
        biases = [layer.bias for layer in seen.layers if layer.bias is not None]
        assert all(torch.equal(bias, biases[0]) for bias in biases[1:]), "one bias for all layers"
        return {
            "T": seen.n_tokens, "L": c.n_layer, "H": c.n_head, "G": c.n_group, "D": c.d_head,
            "layer": self.layer, "head": self.head, "megabytes": round(per_layer * c.n_layer / 1e6),
            "ids": seen.ids, "pieces": {token: printable(self.piece(token)[1:-1]) for token in known},
            "layers": layers, "masks": [bits(mask) for mask in masks],
            "bias": packed(by_distance(biases[0])) if biases else None,
            "thumbs": thumbs(seen.layers), "side": min(THUMB, seen.n_tokens),
            "position": self.codes(),
            "next": {
                "logprobs": packed(seen.next.logprobs), "logits": packed(seen.next.logits), "ranks": seen.next.ranks.tolist(),
                "rivals": seen.next.rivals.tolist(), "rival_logprobs": packed(seen.next.rival_logprobs),
            },
        }  # fmt: skip

    def codes(self) -> dict[str, Any]:
        kind = self.model.config.position
        if self.seen.angles is not None:
            cos, sin = (table[:, : table.shape[1] // 2] for table in self.seen.angles)  # both halves are the same
            return {"kind": "angles", "rows": cos.shape[1], "cos": packed(cos.T), "sin": packed(sin.T)}
        if kind == "relative":
            return {"kind": "bias"}
        if bool(self.seen.codes.any()):
            codes = self.seen.codes[:, :CODES]
            return {"kind": "codes", "rows": codes.shape[1], "of": self.seen.codes.shape[1], "values": packed(codes.T)}
        return {"kind": "none"}


def of_text(source: str, text: str, *, prompt: str = "", layer: int = 0, head: int = 0, max_tokens: int = 1000) -> Gaze:
    """The model that `source` names, reading the start token, `prompt` and `text`: at most `max_tokens` of them.

    In a prefix-LM the start token and the prompt see each other both ways; without a prompt the text is the prompt, as in
    sampling. FileNotFoundError or ValueError in words, CorruptError for a damaged checkpoint.
    """
    if not text:
        raise ValueError("the text is empty; give --text at least one character")
    path, described = run.resolve(source)
    model, tokenizer = hf.load(path)
    c = model.config
    assert c.max_seq_len is not None, "a model that exists has a context length"
    for name, value, count in (("layer", layer, c.n_layer), ("head", head, c.n_head)):
        if value >= count:
            raise ValueError(f"--{name} {value}: {path} has {name}s 0 to {count - 1}")
    asked = [tokenizer.start_id, *tokenizer.encode(prompt)]
    ids = [*asked, *tokenizer.encode(text)]
    if len(ids) == len(asked):
        raise ValueError(f"the tokenizer of {path} makes no token of this text; give --text something else")
    room = min(max_tokens, c.max_seq_len)
    if room == c.max_seq_len:
        more = f"the model's context is {room:,} tokens; a longer text needs a model with a larger max_seq_len"
    else:
        more = f"--max-tokens says how many are read, up to the model's context of {c.max_seq_len:,}"
    if len(asked) >= room:
        raise ValueError(f"the start token and the prompt are {len(asked):,} tokens, and {room:,} are read; {more}")
    notes = []
    if len(ids) > room:
        notes.append(f"cut: the text ends after {room:,} of {len(ids):,} tokens, start token included; {more}")
    n_prefix = 0
    if c.prefix_lm:
        n_prefix = len(asked) if prompt else min(len(ids), room)
    if c.prefix_lm and not prompt:
        notes.append(
            "a prefix-LM reads a prompt both ways, and all of this text as one: each position has seen the token that it is"
            " asked for; --prompt TEXT says which part is the prompt, --text what follows it"
        )
    ids = ids[:room]
    return Gaze(f"attention of {described}", model, tokenizer, observe(model, ids, n_prefix), layer, head, notes)


def shade(weight: float) -> str:
    """A weight as a character."""
    return next(mark for least, mark in SHADES if weight >= least)


def probability(logprob: float) -> str:
    p = math.exp(logprob)
    return f"{p:.4f}" if p >= 0.0001 else f"{p:.1e}"


def packed(values: Tensor) -> str:
    """float32, little-endian, base64."""
    return base64.b64encode(values.contiguous().numpy().astype("<f4").tobytes()).decode()


def bits(mask: Tensor) -> str:
    """A bit a cell, row by row, the lowest of a byte first; base64."""
    return base64.b64encode(np.packbits(mask.numpy(), bitorder="little").tobytes()).decode()


def thumbs(layers: Sequence[Layer]) -> str:
    """Every layer's heads' softmax rows as bytes, the square root of a weight in 255ths; of a long text the largest around."""
    pictures = []
    for layer in layers:
        for head in range(layer.q.shape[0]):
            weights = layer.weights(head)[None]
            small = F.adaptive_max_pool2d(weights, THUMB) if weights.shape[-1] > THUMB else weights
            pictures.append((small.sqrt() * 255).round().to(torch.uint8).numpy().tobytes())
    return base64.b64encode(b"".join(pictures)).decode()


def asset(name: str) -> str:
    """A file of this package that becomes part of the page."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
