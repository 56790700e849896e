"""NextToken: the training objective around a model - cross-entropy of every target, the output head applied in chunks.

Materializing all logits costs B * T * V * 10 bytes; a chunk costs a few MiB and is still in cache when its gradient is
taken. So the loss is its own autograd function: the forward pass computes the gradients too (Liger-Kernel, Hsu et al.
2024).
"""

from typing import Any

import torch
from torch import Tensor, nn

from gpt.data import IGNORED
from gpt.model import GPT

# Logits held at once: on the CPU 8 MB in fp32, which stay in its cache; on a GPU enough to keep it busy.
CHUNK_LOGITS = {"cpu": 2_000_000, "cuda": 1 << 27}


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
    ) -> Tensor:
        x, w = features.to(dtype), weight.to(dtype)
        need_grad = train and (features.requires_grad or weight.requires_grad)
        grad_x = torch.empty_like(x) if need_grad else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        rows = max(1, CHUNK_LOGITS.get(x.device.type, 1 << 24) // len(weight))
        for start in range(0, len(x), rows):
            part, target = x[start : start + rows], targets[start : start + rows]
            trained = target != IGNORED
            index = torch.where(trained, target, 0)[:, None]
            logits = (part @ w.T).float()
            slope = trained[:, None]
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits, slope = softcap * bent, slope * (1 - bent.square())
            log_p = logits.log_softmax(dim=-1)
            total -= torch.where(trained, log_p.gather(1, index)[:, 0], 0).sum()
            if grad_x is not None and grad_w is not None:
                grad = log_p.exp().scatter_add(1, index, torch.full_like(log_p[:, :1], -1.0))
                grad = (grad * slope).to(dtype)
                grad_x[start : start + rows] = grad @ w
                grad_w += grad.T @ part
        if grad_x is not None and grad_w is not None:
            ctx.save_for_backward(grad_x, grad_w)
            ctx.dtypes = features.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        return (grad_x * grad_total).to(x_dtype), (grad_w * grad_total).to(w_dtype), None, None, None, None


class NextToken(nn.Module):
    """tokens, targets (B, T) int64 -> the sum of nats over the targets that are not IGNORED.

    `positions` and `doc_ids` (B, T) int64 say where documents packed into a row begin and end, `prefix` (B, T) bool what
    is seen both ways (`GPT.features`). A sum, so that the caller divides once by the number of targets of the whole
    batch: micro-batches cannot change the objective.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        features = self.model.features(tokens, positions, doc_ids, prefix=prefix).flatten(0, 1)
        device = features.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
        with torch.autocast(device, enabled=False):
            return ChunkedCrossEntropy.apply(
                features,
                self.model.lm_head.weight,
                targets.flatten(),
                self.model.config.logit_softcap,
                dtype,
                torch.is_grad_enabled(),
            )
