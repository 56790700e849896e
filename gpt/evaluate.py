"""How good a model is on the validation split: nats per target token and bits per raw byte."""

import math
from dataclasses import dataclass

import torch
from pydantic import Field

from gpt import runtime, signals
from gpt.config import Count, Settings
from gpt.data import evaluated_bytes, validation_batches
from gpt.loss import NextToken
from gpt.shards import TokenSet


class EvalConfig(Settings):
    """When and on how much the model is evaluated."""

    every: Count = Field(250, ge=1, description="steps between evaluations; the last step is always evaluated")
    tokens: Count | None = Field(
        None, ge=1, description="validation tokens read, in whole documents; null: the whole split"
    )


@dataclass(frozen=True)
class Evaluation:
    """`val_loss`: nats per target token. `val_bpb`: bits per raw UTF-8 byte, comparable across tokenizers."""

    val_loss: float
    val_bpb: float


@torch.inference_mode()
def evaluate(
    objective: NextToken,
    tokens: TokenSet,
    config: EvalConfig,
    *,
    seq_len: int,
    batch_rows: int,
    device: str,
    dtype: str,
) -> Evaluation:
    """Score every target of the split (or of its first documents) once, delimiters included; the mode stays.

    Raises signals.Stopped between batches when asked to stop.
    """
    was_training = objective.training
    objective.eval()
    nats, n_targets = torch.zeros((), dtype=torch.float64), 0
    for batch in validation_batches(tokens, seq_len, batch_rows, config.tokens):
        signals.check()
        n_targets += batch.n_targets
        with runtime.autocast(device, dtype):
            nats += objective(batch.tokens.to(device), batch.targets.to(device)).cpu().double()
    objective.train(was_training)
    total = float(nats)
    if not math.isfinite(total):
        raise FloatingPointError(f"the validation loss is {total}: the weights give numbers that are not finite")
    return Evaluation(
        val_loss=total / max(1, n_targets),
        val_bpb=total / math.log(2) / evaluated_bytes(tokens, config.tokens),
    )
