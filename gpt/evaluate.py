"""How good a model is on the validation split: nats per target token and bits per raw byte, overall and by source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import Field

from gpt import runtime, signals
from gpt.config import Count, Settings
from gpt.data import IGNORED, Data, evaluated_bytes, evaluated_tokens, validation_batches
from gpt.loss import NextToken
from gpt.shards import Tokens
from gpt.tokenizer import Tokenizer
from gpt.views import by_source


class EvalConfig(Settings):
    """When and on how much the model is evaluated."""

    every: Count = Field(250, ge=1, description="steps between evaluations; the last step is always evaluated")
    tokens: Count | None = Field(
        None,
        ge=1,
        description="validation tokens read, in whole documents, of each source in proportion; null: the whole split",
    )


@dataclass(frozen=True)
class Evaluation:
    """`val_loss`: nats per target token. `val_bpb`: bits per raw UTF-8 byte, comparable across tokenizers.

    `sources`: val_bpb of each source. The overall values are of the sums over all, not means of means.
    """

    val_loss: float
    val_bpb: float
    sources: dict[str, float] = field(default_factory=dict)


def views(data: Data) -> dict[str, Tokens]:
    """The validation split of every source by its name: SOURCE in a single data set, else DATA SET/SOURCE.

    A data set of one source has its own name alone. Sources without validation text are left out.
    """
    found: dict[str, Tokens] = {}
    several = len({str(part.val.path) for part in data.parts}) > 1
    for part in data.parts:
        if not part.val.n_tokens:
            continue
        sources = by_source(part.val)
        for source, tokens in sources.items():
            name = source if not several else part.name if len(sources) == 1 else f"{part.name}/{source}"
            found[name] = tokens
    return found


def limits(parts: Mapping[str, Tokens], max_tokens: int | None) -> dict[str, int | None]:
    """Tokens of each part in an evaluation of about `max_tokens` in all, in proportion, at least one: its document."""
    total = sum(tokens.n_tokens for tokens in parts.values())
    if max_tokens is None or max_tokens >= total:
        return dict.fromkeys(parts)
    return {name: max(1, round(max_tokens * tokens.n_tokens / total)) for name, tokens in parts.items()}


def evaluated(parts: Mapping[str, Tokens], max_tokens: int | None) -> int:
    """Tokens that such an evaluation reads."""
    each = limits(parts, max_tokens)
    return sum(evaluated_tokens(tokens, each[name]) for name, tokens in parts.items())


@torch.inference_mode()
def evaluate(
    objective: NextToken,
    parts: Mapping[str, Tokens],
    config: EvalConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_rows: int,
    device: str,
    dtype: str,
    document_mask: bool = False,
    prefix: bool = False,
) -> Evaluation:
    """Score every target of each part (or of its first documents) once, delimiters included; the mode stays.

    Where only some tokens are learned (`shards.Span`), the bytes are those that the learned ones stand for.
    Raises signals.Stopped between batches when asked to stop.
    """
    was_training = objective.training
    objective.eval()
    each = limits(parts, config.tokens)
    nats, n_targets, n_bytes = dict.fromkeys(parts, 0.0), 0, dict.fromkeys(parts, 0)
    for name, tokens in parts.items():
        total = torch.zeros((), dtype=torch.float64)
        for batch in validation_batches(tokens, seq_len, batch_rows, each[name], document_mask, prefix):
            signals.check()
            n_targets += batch.n_targets
            if tokens.has_spans:
                learned = batch.targets[batch.targets != IGNORED].numpy()
                n_bytes[name] += int(tokenizer.byte_lengths[learned].sum())
            with runtime.autocast(device, dtype):
                total += objective(*(x.to(device) for x in batch.given)).cpu().double()
        nats[name] = float(total)
        if not tokens.has_spans:
            n_bytes[name] = evaluated_bytes(tokens, each[name])
    objective.train(was_training)
    overall = sum(nats.values())
    if not math.isfinite(overall):
        raise FloatingPointError(f"the validation loss is {overall}: the weights give numbers that are not finite")
    return Evaluation(
        val_loss=overall / max(1, n_targets),
        val_bpb=_bits(overall, sum(n_bytes.values())),
        sources={name: _bits(nats[name], n_bytes[name]) for name in parts},
    )


def _bits(nats: float, n_bytes: int) -> float:
    """Bits per byte; documents without a byte count as one."""
    return nats / math.log(2) / max(1, n_bytes)
