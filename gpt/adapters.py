"""Adapters: a few trained numbers beside the frozen matrices of a base, and their names in PEFT's files.

LoRA adds a product of two thin matrices to a frozen one (Hu et al. 2021), DoRA also trains the length of each of its rows
(Liu et al. 2024). It wraps modules that have `in_features`, `out_features`, `weight` and `bias`, and only calls them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gpt import families
from gpt.config import Settings
from gpt.families import Place
from gpt.model import GPT, ModelConfig

PEFT = "base_model.model."  # PEFT wraps a model twice, and names begin with that
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}  # ours -> PEFT's
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class AdapterConfig(Settings):
    """What is trained beside a frozen base."""

    kind: Literal["lora", "dora"] = Field("lora", description="dora: the rows' lengths are trained apart")
    rank: int = Field(8, ge=1, le=1 << 16, description="columns of the two thin matrices")
    alpha: float = Field(16.0, gt=0, description="what they add is multiplied by alpha / rank")
    rslora: bool = Field(False, description="by alpha / sqrt(rank) instead, so that a large rank learns as fast")
    targets: Literal["all"] | Annotated[tuple[str, ...], Field(strict=False)] = Field(
        "all", description="names of linears, such as [q_proj, v_proj]; all: every one in the blocks"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what the thin matrices read")
    embeddings: bool = Field(False, description="the embeddings and the output head are trained too, whole")
    base_dtype: Literal["fp32", "bf16", "int8", "int4"] = Field(
        "fp32", description="how the blocks' frozen matrices are kept while it trains; int8 and int4: by torchao"
    )

    @field_validator("targets")
    @classmethod
    def _check(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError("an adapter without targets trains nothing; name linears, or write all")
        return targets

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(nn.Module):
    """base(x) + scale * B(A(dropout(x))): A (rank, K), B (N, rank), which begins as zero (Hu et al. 2021, section 4.1)."""

    def __init__(self, base: Any, config: AdapterConfig) -> None:
        super().__init__()
        self.base, self.scale, self.on = base, config.scale, True
        self.in_features, self.out_features = base.in_features, base.out_features
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.rank, device=device))
        self.dropout = nn.Dropout(config.dropout)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def weight(self) -> Tensor:
        """(N, K): what a plain linear would need to give the same answers."""
        return self.merged() if self.on else self.base.weight

    def merged(self) -> Tensor:
        return self.base.weight + self.scale * (self.lora_B @ self.lora_A)

    def added(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.dropout(x), self.lora_A) * self.scale, self.lora_B)

    def changed(self, answer: Tensor, x: Tensor) -> Tensor:
        """`answer` is the base's."""
        return answer + self.added(x)

    def forward(self, x: Tensor) -> Tensor:
        answer = self.base(x)
        return self.changed(answer, x) if self.on else answer

    @torch.no_grad()
    def fill(self, generator: torch.Generator) -> None:
        """A as nn.Linear begins (uniform within 1 / sqrt(K)), B zero: together they add nothing yet."""
        drawn = torch.rand(self.lora_A.shape, generator=generator) * 2 - 1
        self.lora_A.copy_(drawn / math.sqrt(self.in_features))
        self.lora_B.zero_()


class Decomposed(LowRank):
    """DoRA: each row of base + scale * B A is brought to a length that is trained (Liu et al. 2024, equation 5).

    The length that it has of itself counts as a constant in the gradient (section 4.3).
    """

    def __init__(self, base: Any, config: AdapterConfig) -> None:
        super().__init__(base, config)
        self.magnitude = nn.Parameter(torch.empty(self.out_features, device=self.lora_A.device))

    def lengths(self) -> Tensor:
        """(N,): of the rows of base + scale * B A; above zero, so that one can divide by them."""
        with torch.no_grad(), torch.autocast(self.lora_A.device.type, enabled=False):
            return lengths(super().merged())

    def gain(self) -> Tensor:
        return self.magnitude / self.lengths()

    def merged(self) -> Tensor:
        return super().merged() * self.gain()[:, None]

    def changed(self, answer: Tensor, x: Tensor) -> Tensor:
        # As a difference to the base's answer, which is zero, bit for bit, where nothing was learned yet.
        gain = self.gain()
        product = answer if self.bias is None else answer - self.bias.to(answer.dtype)
        return answer + (gain - 1).to(answer.dtype) * product + gain.to(answer.dtype) * self.added(x)

    @torch.no_grad()
    def fill(self, generator: torch.Generator) -> None:
        super().fill(generator)
        self.magnitude.copy_(self.lengths())


def lengths(weight: Tensor) -> Tensor:
    """(N, K) -> (N,): the length of each row, at least the smallest number that can be divided by."""
    return weight.norm(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)


KINDS: dict[str, type[LowRank]] = {"lora": LowRank, "dora": Decomposed}


def put_on(model: GPT, config: AdapterConfig) -> None:
    """Freeze `model` and wrap its targets in place; then `fill` it, or `load` what was trained.

    The base's weights must be in it already. ValueError for a target that names no linear, with what there is.
    """
    names = targeted(model, config)
    model.requires_grad_(False)
    for name in names:
        parent, _, own = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), own, KINDS[config.kind](linear, config).train(linear.training))
    if config.embeddings:
        for module in _whole(model):
            module.weight.requires_grad_(True)
            # for `off`; where the head is the embedding, both are one
            module.register_buffer("base_weight", module.weight.detach().clone(), persistent=False)


def linears(model: GPT) -> list[str]:
    """Names of what can be a target: the linears of the blocks, and a head of its own."""
    found = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and ".layers." in name and not name.endswith(".base")
    ]
    return found if model.config.tie_embeddings else [*found, HEAD]


def targeted(model: GPT, config: AdapterConfig) -> list[str]:
    """The linears that `config.targets` names, by their names or the ends of them."""
    there = linears(model)
    if config.targets == "all":
        return [name for name in there if name != HEAD]
    chosen = {
        target: [name for name in there if name == target or name.endswith(f".{target}")] for target in config.targets
    }
    if HEAD in chosen and model.config.tie_embeddings:
        raise ValueError(
            "adapter.targets: lm_head is the embedding in this model (tie_embeddings), and a change of one would part them; "
            "leave it out, or set adapter.embeddings=true"
        )
    if HEAD in chosen and config.embeddings:
        raise ValueError("adapter.targets names lm_head, which adapter.embeddings trains whole; keep one of the two")
    if absent := [target for target, names in chosen.items() if not names]:
        last = dict.fromkeys(name.rpartition(".")[2] for name in there)
        raise ValueError(
            f"adapter.targets: the model has no linear {absent[0]!r}; it has {', '.join(last)}, and their full names, such as "
            f"{there[0]}"
        )
    wanted = set(chain.from_iterable(chosen.values()))
    return [name for name in there if name in wanted]


def _whole(model: GPT) -> list[Any]:
    """The modules whose weight `embeddings` trains: one where the head is the embedding."""
    return [model.model.embed_tokens] if model.config.tie_embeddings else [model.model.embed_tokens, model.lm_head]


def _pairs(model: nn.Module) -> dict[str, LowRank]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


@torch.no_grad()
def fill(model: GPT, seed: int) -> None:
    """Make the adapter new: with it the model is its base, bit for bit. A pure function of the base and the seed."""
    generator = torch.Generator().manual_seed(seed)
    for pair in _pairs(model).values():
        pair.fill(generator)
    for module in _whole(model):
        if module.weight.requires_grad:
            module.weight.copy_(module.base_weight)


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Within it the model is its base: the reference of what the adapter learns, without a second copy.

    For use without gradients; what is trained is as it was when this ends.
    """
    pairs = [*_pairs(model).values()]
    whole = [module for module in model.modules() if hasattr(module, "base_weight")]

    def exchange() -> None:
        for module in whole:
            module.weight.data, module.base_weight.data = module.base_weight.data, module.weight.data

    with ExitStack() as stack:
        for pair in pairs:
            pair.on = False
            stack.callback(setattr, pair, "on", True)
        exchange()
        stack.callback(exchange)
        yield


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """`model` with every linear that is wrapped, or kept in fewer bits, replaced in place by a plain one that gives its answers.

    All of it can be trained then.
    """
    for name in linears(model):
        given: Any = model.get_submodule(name)
        if isinstance(given, nn.Linear):
            continue
        with torch.device("meta"):
            plain = nn.Linear(given.in_features, given.out_features, bias=given.bias is not None)
        plain.weight = nn.Parameter(given.weight)
        if given.bias is not None:
            plain.bias = nn.Parameter(given.bias.detach())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    for module in _whole(model):
        if hasattr(module, "base_weight"):
            del module.base_weight
    return model.requires_grad_(True)


# PEFT's names and settings


def _places(model: GPT) -> dict[str, tuple[Place, list[Any]]]:
    """Name of a module of the class on disk -> its place, and the modules that it holds: a pair, where it was a target."""
    names = [f"{name}.weight" for name in _pairs(model)]
    found = families.places(families.family_of(model.config), model.config, names)
    return {
        disk.removesuffix(".weight"): (
            place,
            [model.get_submodule(name.removesuffix(".weight")) for name in place.memory],
        )
        for disk, place in found.items()
    }


def _embeddings(model: GPT) -> dict[str, Tensor]:
    """Name of a module of the class on disk -> its weight, for those that are trained whole.

    A tied head stands twice: PEFT trains copies, and would leave the head as it was.
    """
    if not model.model.embed_tokens.weight.requires_grad:
        return {}
    names = families.places(families.family_of(model.config), model.config, [f"{EMBEDDING}.weight"])
    disk = next(iter(names)).removesuffix(".weight")
    return {disk: model.model.embed_tokens.weight, HEAD: model.lm_head.weight}


def _rows(place: Place, rows: Tensor) -> Tensor:
    """Rows of a module in memory in their order on disk, and back: it is its own inverse."""
    return families.pack(Place(("rows",), heads=place.heads), {"rows": rows})


@torch.no_grad()
def to_peft(model: GPT) -> dict[str, Tensor]:
    """What is trained by its names in adapter_model.safetensors.

    A module on disk that is several here (c_attn: queries, keys and values) gets one pair of all their columns: A's stand one
    below the other, B's on the diagonal.
    """
    found: dict[str, Tensor] = {}
    for disk, (place, modules) in _places(model).items():
        pairs = [module for module in modules if isinstance(module, LowRank)]
        blocks = [m.lora_B if isinstance(m, LowRank) else pairs[0].lora_B.new_empty(m.out_features, 0) for m in modules]
        parts = {
            "lora_A": torch.cat([pair.lora_A for pair in pairs]),
            "lora_B": _rows(place, torch.block_diag(*blocks)),
        }
        if isinstance(pairs[0], Decomposed):
            parts["magnitude"] = _rows(place, torch.cat([_magnitude(module) for module in modules]))
        found |= {f"{PEFT}{disk}.{PARTS[part]}": tensor for part, tensor in parts.items()}
    return found | {f"{PEFT}{disk}.weight": weight for disk, weight in _embeddings(model).items()}


def _magnitude(module: Any) -> Tensor:
    """The lengths of a module's rows; where it is no target they stay what they are."""
    return module.magnitude if isinstance(module, Decomposed) else lengths(module.weight)


@torch.no_grad()
def load(model: GPT, stored: Mapping[str, Tensor]) -> None:
    """Take over what `to_peft` returned; names and shapes must be this model's."""
    for disk, (place, modules) in _places(model).items():
        a, b = stored[f"{PEFT}{disk}.{PARTS['lora_A']}"], _rows(place, stored[f"{PEFT}{disk}.{PARTS['lora_B']}"])
        row = column = 0
        for module in modules:
            rows = slice(row, row := row + module.out_features)
            if isinstance(module, LowRank):
                columns = slice(column, column := column + len(module.lora_A))
                module.lora_A.copy_(a[columns])
                module.lora_B.copy_(b[rows, columns])
            if isinstance(module, Decomposed):
                module.magnitude.copy_(_rows(place, stored[f"{PEFT}{disk}.{PARTS['magnitude']}"])[rows])
    for disk, weight in _embeddings(model).items():
        weight.copy_(stored[f"{PEFT}{disk}.weight"])


def peft_config(model: GPT, config: AdapterConfig, base: str, revision: str | None) -> dict[str, Any]:
    """adapter_config.json: what PEFT needs to put the same adapter on the same model in transformers."""
    places = _places(model)
    counts = {disk: sum(isinstance(m, LowRank) for m in modules) for disk, (_, modules) in places.items()}
    there, whole = _modules_on_disk(model), _embeddings(model)
    ranks, alphas = {}, {}
    for n in sorted({*counts.values()} - {1}):
        for name in _short([disk for disk in counts if counts[disk] == n], there):
            ranks[name] = n * config.rank
            alphas[name] = config.alpha * (math.sqrt(n) if config.rslora else n)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.kind == "dora",
        "target_modules": _short(list(places), there),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": [disk.rpartition(".")[2] for disk in whole] or None,
        "fan_in_fan_out": any(place.transposed for place, _ in places.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    } | ({"ensure_weight_tying": True} if whole and model.config.tie_embeddings else {})


def _modules_on_disk(model: GPT) -> list[str]:
    names = [f"{name}.weight" for name in linears(model)]
    found = families.places(families.family_of(model.config), model.config, names)
    return [disk.removesuffix(".weight") for disk in found]


def _short(chosen: Sequence[str], there: Iterable[str]) -> list[str]:
    """The ends of names by which the `chosen` among `there` are known, and no other: q_proj, or attn.c_proj."""
    others = [f".{name}" for name in there if name not in set(chosen)]
    short: set[str] = set()
    for name in chosen:
        parts = name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        short.add(next(end for end in ends if not any(other.endswith(f".{end}") for other in others)))
    return sorted(short)


def grown(config: ModelConfig, state: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The state of a base with `rows` rows of embeddings and head, the new ones zero: an adapter brings them, whole."""
    out = dict(state)
    for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
        if name == f"{HEAD}.weight" and config.tie_embeddings:
            out[name] = out[f"{EMBEDDING}.weight"]
        else:
            out[name] = F.pad(state[name], (0, 0, 0, rows - len(state[name])))
    return out
