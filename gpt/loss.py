"""The training objectives around a model: cross-entropy of every target, and preference between replies; the head in chunks.

Materializing all logits costs B * T * V * 10 bytes; a chunk costs the same whatever the batch, and the piece of it that is in
fp32 at once is still in the CPU's cache when its gradient is taken. So the loss is its own autograd function: the forward pass
computes the gradients too (Liger-Kernel, Hsu et al. 2024), unless what is made of the numbers decides how much each of them
weighs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import Settings
from gpt.data import IGNORED, Batch
from gpt.model import GPT, product_dtype

# Logits held at once: many rows, since each chunk reads the head's weight and adds to its gradient. Of those, in fp32 at once:
# on the CPU 8 MB, which stay in its cache.
CHUNK_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 28, "mps": 1 << 24}
PIECE_LOGITS = {"cpu": 2_000_000, "cuda": 1 << 26, "mps": 1 << 24}
# Rows of a chunk in float16: the head's gradient is their sum, before any scale, and has to stay below 65,504.
HALF_ROWS = 4096
BETA = {"dpo": 0.1, "simpo": 2.0}  # of the papers; an average over tokens is smaller than a sum by the replies' length
BETA_OF_AVERAGES = 5.0  # Lambert et al. 2024 (Tulu 3), table 20
GAMMA = 1.0  # half of beta, in the middle of what Meng et al. 2024 search (section 4.2)


class ObjectiveConfig(Settings):
    """What is minimized."""

    kind: Literal["next_token", "dpo", "simpo"] = Field(
        "next_token",
        description="next_token: cross-entropy; of pairs dpo: prefer the chosen reply more than init_from does, or simpo: "
        "without reference",
    )
    beta: float | None = Field(
        None, gt=0, description="how sharply differences count; null: 0.1 (dpo), 5 (dpo of averages), 2 (simpo)"
    )
    length_normalized: bool = Field(
        False, description="dpo of log-probabilities averaged over a reply's tokens instead of summed"
    )
    gamma: float | None = Field(
        None, ge=0, description="simpo: by how much the reward of the chosen reply should lead; null: 1"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way round (conservative DPO)"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        named = self.model_dump(exclude={"kind"}, exclude_defaults=True)
        allowed = {"next_token": set(), "dpo": named.keys() - {"gamma"}, "simpo": named.keys() - {"length_normalized"}}
        for name in sorted(named.keys() - allowed[self.kind]):
            kinds = {"gamma": "'simpo'", "length_normalized": "'dpo' (simpo averages always)"}.get(
                name, "'dpo' or 'simpo'"
            )
            raise ValueError(f"{name} ({named[name]}) is for kind {kinds}; the kind is '{self.kind}'")
        return self

    @property
    def of_pairs(self) -> bool:
        return self.kind != "next_token"

    @property
    def compares(self) -> bool:
        """Whether the model is compared with what it began as."""
        return self.kind == "dpo"

    @property
    def averages(self) -> bool:
        """Whether a reply's log-probability is divided by its number of tokens."""
        return self.length_normalized or self.kind == "simpo"

    @property
    def sharpness(self) -> float:
        """Beta, as set or of the paper."""
        if self.beta is not None:
            return self.beta
        return BETA_OF_AVERAGES if self.length_normalized else BETA[self.kind]

    @property
    def lead(self) -> float:
        """Gamma, as set or of the paper."""
        return (GAMMA if self.gamma is None else self.gamma) if self.kind == "simpo" else 0.0


def n_terms(config: ObjectiveConfig, batch: Batch) -> int:
    """What the summed loss of a batch is divided by, once: its targets, or its pairs."""
    if not config.of_pairs:
        return batch.n_targets
    assert batch.doc_ids is not None, "pairs are documents"
    row = torch.arange(len(batch.tokens))[:, None] * batch.tokens.shape[1]
    # Both replies of a pair are learned: the rejected ones, in the second halves of the rows, are not counted again.
    chosen = slice(None, batch.tokens.shape[1] // 2)
    return len((row + batch.doc_ids)[:, chosen][batch.targets[:, chosen] != IGNORED].unique())


def _bent(logits: Tensor, targets: Tensor, softcap: float | None, slope: Tensor | None, vocabulary: "Whole") -> Tensor:
    """(N,) nats of these targets under `logits` (N, V), which become their gradient times `slope` (N,) where that is given."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = torch.where(targets != IGNORED, targets, 0)[:, None]
    if softcap is not None:
        bent = torch.tanh(wide / softcap)
        wide = softcap * bent
    log_p = vocabulary.log_softmax(wide)
    index, here = vocabulary.find(index, log_p)
    nats = -vocabulary.sum(log_p.gather(1, index) * here)[:, 0]
    if slope is not None:  # in place: each pass over new memory costs as much as its arithmetic
        grad = log_p.exp_().scatter_add_(1, index, -here).mul_(slope[:, None])
        logits.copy_(grad if softcap is None else grad.mul_(1 - bent.square()))
    return nats


class Whole:
    """The head's rows are all here; `parallel.Split` is the other kind."""

    bent = staticmethod(_bent)  # what is made of a chunk of logits

    def rows(self, weight: Tensor) -> Tensor:
        """Those of the head's rows that are here."""
        return weight

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Of (N, rows here), over the whole vocabulary."""
        return logits.log_softmax(dim=-1)

    def find(self, targets: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(row here of each of these ids (N, 1), 1 where it is here and 0 where the row stands for another)."""
        return targets, torch.ones_like(like[:, :1])

    def sum(self, x: Tensor) -> Tensor:
        """Of what those found who hold the rows."""
        return x


WHOLE = Whole()


def _sweep(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    softcap: float | None,
    weights: Tensor | None,
    grad_x: Tensor | None,
    grad_w: Tensor | None,
    vocabulary: Whole = WHOLE,
) -> Tensor:
    """(N,) nats of each target, 0 where IGNORED; the gradient of their sum, or that by `weights` (N,), into grad_x, grad_w.

    In fp32, or in float64 where the features are. Where some rows of the head are elsewhere grad_x is this part's share.
    """
    nats = torch.empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    rows, few = (max(1, held[x.device.type] // len(w)) for held in (CHUNK_LOGITS, PIECE_LOGITS))
    if x.dtype == torch.float16:
        rows = min(rows, HALF_ROWS)
    for start in range(0, len(x), rows):
        chunk = slice(start, start + rows)
        logits = x[chunk] @ w.T
        for at in range(start, start + len(logits), few):
            here, piece = slice(at, min(at + few, chunk.stop)), logits[at - start : at - start + few]
            trained = targets[here] != IGNORED
            slope = (
                None if grad_x is None and grad_w is None else trained if weights is None else trained * weights[here]
            )
            found = vocabulary.bent(piece, targets[here], softcap, slope, vocabulary)
            nats[here] = torch.where(trained, found, 0)
        if grad_x is not None:
            grad_x[chunk] = logits @ w
        if grad_w is not None:  # the frozen head of an adapter's base has none
            (grad_w.add_ if start else grad_w.copy_)(logits.T @ x[chunk])
    return nats


def _gradients(x: Tensor, weight: Tensor, for_x: bool, for_w: bool) -> tuple[Tensor | None, Tensor | None]:
    """Where `_sweep` puts what is asked for."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty_like(x) if for_x else None, torch.empty_like(weight, dtype=exact) if for_w else None


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of nats over targets that are not IGNORED: features (N, C), head weight (V, C), targets (N,) -> fp32 scalar.

    Logits are bent to `softcap` * tanh(logits / softcap) where that is given.
    `train` says whether gradients will be asked for: inside `forward` torch always reports that they are not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
        train: bool,
        vocabulary: Whole = WHOLE,
    ) -> Tensor:
        x, w = features.to(dtype), weight.to(dtype)
        grads = _gradients(x, weight, train and features.requires_grad, train and weight.requires_grad)
        nats = _sweep(x, w, targets, softcap, None, *grads, vocabulary)
        ctx.save_for_backward(*grads)
        ctx.dtypes = features.dtype, weight.dtype
        return nats.sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        for_x = None if grad_x is None else grad_x.mul_(grad_total).to(x_dtype)  # in place: nobody else has them
        for_w = None if grad_w is None else grad_w.mul_(grad_total).to(w_dtype)
        return for_x, for_w, None, None, None, None, None


class ChunkedNats(torch.autograd.Function):
    """Nats of each target, (N,), 0 where IGNORED; otherwise as ChunkedCrossEntropy.

    What is made of them decides how much each weighs, so the gradient goes through the head's logits a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
        train: bool,
        vocabulary: Whole = WHOLE,
    ) -> Tensor:
        if train:
            ctx.save_for_backward(features, weight, targets)
            ctx.how = softcap, dtype, vocabulary
        return _sweep(features.to(dtype), weight.to(dtype), targets, softcap, None, None, None, vocabulary)

    @staticmethod
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        features, weight, targets = ctx.saved_tensors
        softcap, dtype, vocabulary = ctx.how
        x, w = features.to(dtype), weight.to(dtype)
        grad_x, grad_w = _gradients(x, weight, *ctx.needs_input_grad[:2])
        _sweep(x, w, targets, softcap, grad_nats, grad_x, grad_w, vocabulary)
        for_x = None if grad_x is None else grad_x.to(features.dtype)
        for_w = None if grad_w is None else grad_w.to(weight.dtype)
        return for_x, for_w, None, None, None, None, None


def _headed(
    head: type[torch.autograd.Function],
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    positions: Tensor | None,
    doc_ids: Tensor | None,
    prefix: Tensor | None,
    vocabulary: Whole = WHOLE,
) -> Tensor:
    """What `head` makes of the model's features of these rows and the targets, in autocast's dtype."""
    features = model.features(tokens, positions, doc_ids, prefix=prefix).flatten(0, 1)
    device, dtype = features.device.type, product_dtype(features)
    weight, softcap = vocabulary.rows(model.lm_head.weight), model.config.logit_softcap
    with torch.autocast(device, enabled=False):
        return head.apply(features, weight, targets.flatten(), softcap, dtype, torch.is_grad_enabled(), vocabulary)


class NextToken(nn.Module):
    """tokens, targets (B, T) int64 -> the sum of nats over the targets that are not IGNORED.

    `positions` and `doc_ids` (B, T) int64 say where documents packed into a row begin and end, `prefix` (B, T) bool what
    is seen both ways (`GPT.features`). A sum, so that the caller divides once by the number of targets of the whole
    batch: micro-batches cannot change the objective.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = WHOLE  # who holds the head's rows

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        given = tokens, targets, positions, doc_ids, prefix
        return _headed(ChunkedCrossEntropy, self.model, *given, self.vocabulary)


def nats(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    doc_ids: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """(B, T) nats of each target, 0 where IGNORED; without all logits at once."""
    return _headed(ChunkedNats, model, tokens, targets, positions, doc_ids, prefix).view_as(tokens)


Reference = Callable[[], AbstractContextManager[GPT]]  # gives the frozen model, for as long as it is asked


class Preferences(nn.Module):
    """Rows of pairs -> the sum over pairs of -log sigmoid(lead of the chosen reply's reward over the rejected one's).

    The reward of a reply is beta times its log-probability under the model, less that under the reference (DPO: Rafailov
    et al. 2023), or without one averaged over its tokens, and the lead is lessened by gamma (SimPO: Meng et al. 2024).
    The first half of a row (B, 2 T) holds chosen documents, the second the rejected ones in the same order
    (`data.Pairs`); the targets that are not IGNORED are the replies. A sum, as NextToken is one: the caller divides once
    by the number of pairs of the whole batch. Label smoothing is Mitchell's (2023) conservative DPO.
    """

    def __init__(self, model: GPT, config: ObjectiveConfig, reference: Reference | None) -> None:
        super().__init__()
        assert (reference is None) == (config.kind == "simpo"), config.kind
        self.model, self.config, self.reference = model, config, reference

    def rewards(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor,
        doc_ids: Tensor,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(rewards (B, 2, P) of the chosen and the rejected replies of a row's pairs, whether there is such a pair (B, P))."""
        B, T = len(tokens), tokens.shape[1] // 2
        both_ways = None if prefix is None else prefix.reshape(2 * B, T)
        ids, learned, places, documents = (x.reshape(2 * B, T) for x in (tokens, targets, positions, doc_ids))
        given = ids, learned, places, documents, both_ways
        log_p = -nats(self.model, *given)
        if self.reference is not None:
            with torch.no_grad(), self.reference() as frozen:
                of_reference = nats(frozen, *given)
            log_p = log_p + of_reference  # token by token, since sums are large and their difference small
        halves = doc_ids.view(B, 2, T)
        pair = halves - halves[..., :1]  # documents are counted through both halves
        size = torch.zeros(B, 2, T, dtype=log_p.dtype, device=log_p.device)
        total = size.scatter_add(2, pair, log_p.view(B, 2, T))
        size = size.scatter_add(2, pair, (targets != IGNORED).view(B, 2, T).to(log_p.dtype))
        if self.config.averages:
            total = total / size.clamp(min=1)
        return self.config.sharpness * total, size[:, 0] > 0

    def losses(self, rewards: Tensor) -> Tensor:
        """(B, P) losses of pairs with these rewards (B, 2, P)."""
        smoothing, lead = self.config.label_smoothing, rewards[:, 0] - rewards[:, 1] - self.config.lead
        return -(1 - smoothing) * F.logsigmoid(lead) - smoothing * F.logsigmoid(-lead)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor,
        doc_ids: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        rewards, there = self.rewards(tokens, targets, positions, doc_ids, prefix)
        return torch.where(there, self.losses(rewards), 0).sum()


Objective = NextToken | Preferences


def around(model: GPT, config: ObjectiveConfig, reference: Reference) -> Objective:
    """What is minimized, around the model; `reference` gives what it is compared with, where it is."""
    if not config.of_pairs:
        return NextToken(model)
    return Preferences(model, config, reference if config.compares else None)
