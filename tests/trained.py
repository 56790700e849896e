"""A few updates of a small model on random tokens, on any number of ranks: what the tests of parallelism compare."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpt import parallel, resume, runtime, settle, trainer
from gpt.averages import Average
from gpt.data import IGNORED, Batch
from gpt.loss import NextToken, Preferences
from gpt.model import GPT, init_weights
from gpt.optim import Optimizer
from gpt.parts import Parts
from gpt.plan import Choices
from gpt.ranks import Ranks, sizes
from gpt.slices import cut
from gpt.team import Team
from gpt.trainer import update

ROWS, T, V = 8, 16, 128
SHAPE = {"vocab_size": V, "max_seq_len": T, "n_layer": 2, "d_model": 32, "n_head": 4, "n_kv_head": 2, "init_std": 0.1}
CHOICES = Choices(
    device="cpu", dtype="float32", compile=False, micro_batch=2, threads=1, steps=10, data="", torch="", cpu=""
)


def batch(step: int, *, packed: bool = False, pairs: bool = False) -> Batch:
    """Random tokens, some of them not learned, more in some rows than in others; `packed`: documents in each row."""
    draw = torch.Generator().manual_seed(step)
    width = 2 * T if pairs else T
    tokens = torch.randint(V, (ROWS, width + 1), generator=draw)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=draw) < torch.linspace(0, 0.8, ROWS)[:, None]] = IGNORED
    if not (packed or pairs):
        return Batch(inputs, targets)
    lengths = [5, T - 5]
    ids = torch.tensor([0] * lengths[0] + [1] * lengths[1])
    places = torch.cat([torch.arange(n) for n in lengths])
    if pairs:
        ids, places = torch.cat([ids, ids + 2]), places.repeat(2)
    return Batch(inputs, targets, places.expand(ROWS, -1), ids.expand(ROWS, -1))


def config_of(how: dict[str, Any]) -> settle.TrainConfig:
    train = {"steps": 10, "batch_tokens": ROWS * T, "micro_batch": how.get("micro_batch", 2), "compile": False}
    return settle.TrainConfig.model_validate(
        {
            "name": "x",
            "data": {"path": "x", "seq_len": T},
            "model": SHAPE | how.get("model", {}),
            "train": train | {"checkpointing": how.get("checkpointing", "none")},
            "optim": {"lr": 1e-2, "clip": 0.5} | how.get("optim", {}),
            "schedule": {"kind": "constant", "warmup": 0},
            "parallel": how.get("parallel", {}),
            "objective": how.get("objective", {}),
        }
    )


def trained(team: Team, how: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of a few updates; on rank 0 also the weights and the optimizer's state, as `projected`.

    `how` holds sections of settings, what `batch` takes, and what else is to be done: `evaluate` between updates, begin each
    one as if it were the first of a process (`resumed`).
    """
    runtime.setup("cpu", 1)  # as a run does, whatever stood before
    config = config_of(how)
    ranks = Ranks(team, sizes(config.parallel, team.size), canonical=config.parallel.canonical)
    objective, reference = _objective(config, ranks)
    parts = Parts(ranks, objective.model)
    fresh = GPT(config.model)
    init_weights(fresh, 3)
    for name, value in fresh.named_parameters():
        parts.put(name, value.detach())
    if reference is not None:
        init_weights(reference, 4)
    optimizer = Optimizer(objective.model, config.optim, parts)
    if how.get("restored"):
        _gone_back(config, objective, parts, fresh)
    if how.get("compile") and not ranks.alone:
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    compiled = {"compile": how.get("compile", False) and not ranks.alone, "checkpointing": config.train.checkpointing}
    average = Average(parts, how.get("ema"), config.train.steps, functools.partial(parallel.resharded, objective))
    average.begin()
    forward = parallel.applied(objective, **compiled, ranks=ranks)
    objective.train()
    made = {"dtype": how.get("dtype", "float32"), "micro_batch": how.get("micro_batch", 2)}
    choices = CHOICES.model_copy(update=made)
    curve = []
    for step in range(1, how.get("steps", 3) + 1):
        if how.get("resumed"):  # as a process that was started again finds it
            forward = parallel.applied(objective, **compiled, ranks=ranks)
        given = batch(step, packed=how.get("packed", False), pairs=config.objective.of_pairs)
        loss, norm = update(forward, optimizer, given, config, choices, step, ranks)
        curve.append([float(loss), float(norm)])
        average.follow(step)
        if how.get("evaluate"):  # between updates, as in a run
            objective.eval()
            with average.shown(), torch.inference_mode():
                scores = list(ranks.dealt([batch(99 + i) for i in range(3)], lambda b: [float(objective(*b.given))]))
            curve.append([score for (score,) in scores])
            objective.train()
    with average.shown():
        return {"curve": curve, **written(parts, optimizer.state() | average.state(), team)}


def _objective(config: settle.TrainConfig, ranks: Ranks) -> tuple[NextToken | Preferences, GPT | None]:
    with torch.device("meta" if ranks.n.in_parts else "cpu"):
        model = GPT(config.model)
    reference = GPT(config.model) if config.objective.kind == "dpo" else None
    objective = NextToken(model) if not config.objective.of_pairs else settle.objective(config, model, reference)
    if ranks.n.in_parts:
        parallel.in_parts(objective, ranks, "cpu")
    return objective, reference


def _gone_back(config: settle.TrainConfig, objective: NextToken, parts: Parts, weights: GPT) -> None:
    """What a run does that goes back to its beginning, an update and an evaluation later."""

    def fill(latest: Path | None) -> None:
        settle.fill(objective.model, parts, config, latest, lambda: weights)

    config = config.model_copy(update={"choices": CHOICES})
    saves: Any = SimpleNamespace(latest=lambda team: None)
    optimizer, _, restore = trainer._restored(config, objective, parts, resume.Origin(), saves, fill)
    forward = parallel.applied(objective, compile=False, ranks=parts.ranks)
    update(forward, optimizer, batch(98), config, CHOICES, 1, parts.ranks)
    with torch.inference_mode():
        objective(*batch(99).given)
    restore()


def written(parts: Parts, state: dict[str, Tensor], team: Team) -> dict[str, Any]:
    """The weights and what stands beside them, put together on rank 0 from every rank's slices; gathered weights are the same."""
    own = {name: parts.local(name) for name in parts.parameters}
    keys = {*own}.union(*team.gather(list(state)))
    gathered = parts.whole(list(own), own)
    told = {
        key: [list(s.shape), list(s.offset), list(s.tensor.shape), s.tensor.flatten().tolist()]
        for key, s in (parts.slices(own) | parts.slices(state)).items()
    }
    joined, covered = {}, {}
    for slices in team.gather(told):
        for key, (shape, offset, size, numbers) in slices.items():
            whole = joined.setdefault(key, torch.full(shape, torch.nan))
            here = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
            whole[here] = torch.tensor(numbers).view(size)
            covered[key] = covered.get(key, 0) + len(numbers)
    if not team.first:
        return {}
    assert joined.keys() == keys
    for key, whole in joined.items():
        assert covered[key] == whole.numel(), key  # each number is written once
    for key in own:
        assert torch.equal(gathered[key], joined[key]), key
    for key, held in state.items():
        box = parts.wanted(key, tuple(joined[key].shape))
        assert box is not None and torch.equal(cut(joined[key], *box), held), key
    return {"weights": {key: projected(value) for key, value in joined.items()}}


def projected(value: Tensor) -> list[float]:
    """Its norm, and three numbers that see where in it a change is."""
    flat = value.flatten().double()
    draw = torch.randn(3, len(flat), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [float(flat.norm()), *(draw @ flat).tolist()]


def apart(a: Any, b: Any) -> float:
    """The largest difference of what stands in the same place of both, relative where it is above 1."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        return max(apart(a[key], b[key]) for key in a)
    if isinstance(a, list):
        assert len(a) == len(b)
        return max(map(apart, a, b), default=0.0)
    return abs(a - b) / max(1.0, abs(a))
