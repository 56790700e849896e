"""How likely a model finds what follows a prompt: log-probabilities of continuations, each prompt read once.

It scores ids; what they stand for, and what a score is good for, others know.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt import signals
from gpt.cache import spread
from gpt.model import GPT
from gpt.positions import by_length

NOT_FINITE = "a log-probability is not a number: the weights give numbers that are not finite"
CHUNK_LOGITS = 1 << 24  # held at once, in fp32: 64 MiB

Pair = tuple[Sequence[int], Sequence[int]]  # a prompt, start token included where there is to be one; what follows it
Groups = list[tuple[tuple[int, ...], list[int]]]  # prompts, and the numbers of the pairs that begin with each


class Score(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding would write it."""

    logprob: float
    greedy: bool


@torch.inference_mode()
def log_likelihoods(model: GPT, pairs: Sequence[Pair], batch_tokens: int) -> list[Score]:
    """Score the second part of each pair after its first; of the model, which is in eval mode, the logits are fp32.

    Equal prompts of a batch are read once, and their keys and values shared. A pair longer than the context loses the
    beginning of its prompt. A batch holds at most about `batch_tokens` tokens, padding included, and no batch changes a
    score by more than rounding. ValueError for a part that is empty, or a continuation longer than the context;
    FloatingPointError for a score that is not a number.
    """
    assert not model.training, "scores are without dropout"
    context = model.config.max_seq_len
    assert context is not None
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, continuation) in enumerate(pairs):
        if not prompt or not continuation or len(continuation) > context:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and a continuation of {len(continuation)}: each needs at least one,"
                f" and a continuation fits the model's context of {context}"
            )
        groups.setdefault(tuple(prompt[-(context + 1 - len(continuation)) :]), []).append(i)
    scores: dict[int, Score] = {}
    for batch in _batches(groups, pairs, context, batch_tokens):
        signals.check()
        members = [i for _, group in batch for i in group]
        scores |= zip(members, _scored(model, batch, [pairs[i][1] for i in members]), strict=True)
    if any(math.isnan(score.logprob) for score in scores.values()):
        raise FloatingPointError(NOT_FINITE)
    return [scores[i] for i in range(len(pairs))]


def _batches(
    groups: dict[tuple[int, ...], list[int]], pairs: Sequence[Pair], context: int, batch_tokens: int
) -> Iterator[Groups]:
    """Prompts of like lengths together, the longest first; the padded rows of a batch fit the context."""
    batch: Groups = []
    n_rows = n_prompt = n_more = 0
    for prompt, group in _parts(groups, pairs, batch_tokens):
        rows, more = n_rows + len(group), max(n_more, *(len(pairs[i][1]) for i in group))
        wide = max(n_prompt, len(prompt)) + more
        if batch and (rows * wide > batch_tokens or wide > context + 1):
            yield batch
            batch, rows, n_prompt, more = [], len(group), 0, max(len(pairs[i][1]) for i in group)
        batch.append((prompt, group))
        n_rows, n_prompt, n_more = rows, max(n_prompt, len(prompt)), more
    if batch:
        yield batch


def _parts(
    groups: dict[tuple[int, ...], list[int]], pairs: Sequence[Pair], batch_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """The groups, those of the longest prompts first. What is too much for a batch comes in parts: every text of a corpus
    may follow the start token alone."""
    for prompt, group in sorted(groups.items(), key=lambda item: (-len(item[0]), item[0])):
        group.sort(key=lambda i: -len(pairs[i][1]))
        n = max(1, batch_tokens // (len(prompt) + len(pairs[group[0]][1])))
        yield from ((prompt, group[start : start + n]) for start in range(0, len(group), n))


def _shared(model: GPT, prompts: Sequence[Sequence[int]], owner: Tensor, targets: Tensor) -> Tensor:
    """Features (n, T, C) before each of `targets` (n, T), whose row i follows prompt owner[i]; each prompt is read once."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=owner.device)
    cache = model.new_cache(len(prompts), max(map(len, prompts)))
    tokens = _padded(prompts, 0).to(owner.device)
    prefix = torch.arange(tokens.shape[1], device=owner.device) < lengths[:, None] if model.config.prefix_lm else None
    read = model.features(tokens, cache=cache, prefix=prefix)  # (P, S, C)
    features = read[torch.arange(len(prompts), device=owner.device), lengths - 1][owner, None]  # (n, 1, C)
    if targets.shape[1] == 1:
        return features
    cache.rewind(lengths)
    rows = spread(cache, owner, cache.max_len + targets.shape[1] - 1)
    return torch.cat([features, model.features(targets[:, :-1].clamp(min=0), cache=rows)], dim=1)


def _whole(model: GPT, prompts: Sequence[Sequence[int]], owner: Tensor, targets: Tensor) -> Tensor:
    """The same where a row's length decides by what angles all of it turns: each row is read from its beginning."""
    given = [[id for id in row if id >= 0][:-1] for row in targets.tolist()]
    rows = [[*prompts[at], *ids] for at, ids in zip(owner.tolist(), given, strict=True)]
    tokens, lengths = _padded(rows, 0).to(owner.device), torch.tensor([len(row) for row in rows], device=owner.device)
    slots = torch.arange(tokens.shape[1], device=owner.device)
    first = torch.tensor([len(prompts[at]) for at in owner.tolist()], device=owner.device)[:, None]
    prefix = slots < first if model.config.prefix_lm else None
    features = model.features(tokens, slots.minimum(lengths[:, None] - 1), prefix=prefix)
    at = (first - 1 + torch.arange(targets.shape[1], device=owner.device)).clamp(max=tokens.shape[1] - 1)
    return features[torch.arange(len(rows), device=owner.device)[:, None], at]


def _scored(model: GPT, batch: Groups, continuations: Sequence[Sequence[int]]) -> list[Score]:
    """The scores of `continuations`, which follow the prompts of a batch in its order."""
    device = model.model.embed_tokens.weight.device
    prompts = [prompt for prompt, _ in batch]
    owner = torch.tensor([row for row, (_, group) in enumerate(batch) for _ in group], device=device)
    targets = _padded(continuations, -1).to(device)  # (n, T)
    read = _whole if by_length(model.config.rope_scaling) else _shared
    features = read(model, prompts, owner, targets)
    inside = targets >= 0
    logprobs, best = _looked_up(model, features[inside], targets[inside])
    inside = inside.cpu()
    total, greedy = torch.zeros(inside.shape, dtype=torch.float64), torch.ones_like(inside)  # not every device has fp64
    total[inside], greedy[inside] = logprobs.cpu().double(), best.cpu()
    return [Score(*pair) for pair in zip(total.sum(1).tolist(), greedy.all(1).tolist(), strict=True)]


def _looked_up(model: GPT, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, C), targets (N,) -> their log-probabilities fp32 and whether none is likelier, (N,) each."""
    logprobs, best = torch.empty(len(targets), device=targets.device), torch.empty_like(targets, dtype=torch.bool)
    n = max(1, CHUNK_LOGITS // model.model.embed_tokens.num_embeddings)
    for start in range(0, len(targets), n):
        part = slice(start, start + n)
        log_p = model.logits(features[part]).float().log_softmax(-1)
        logprobs[part] = log_p.gather(1, targets[part, None])[:, 0]
        best[part] = log_p.argmax(-1) == targets[part]
    return logprobs, best


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """(n, longest) int64 on the CPU."""
    padded = torch.full((len(rows), max(map(len, rows))), filler)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return padded
