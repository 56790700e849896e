"""Preferences: pairs in rows, the loss of DPO and SimPO and its gradient, trl's own numbers, and a model that learns to prefer."""

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from gpt import hf, loss, parallel, settle, signals, trainer
from gpt.data import IGNORED, Batch, Data, DataConfig, Loader, Part, open_data, validation_batches
from gpt.durable import Directory
from gpt.evaluate import EvalConfig, prefer
from gpt.loss import NextToken, ObjectiveConfig, Preferences, n_terms
from gpt.model import GPT
from gpt.optim import OptimConfig, Optimizer
from gpt.plan import Choices
from gpt.settle import TrainConfig
from gpt.shards import Document, Span, TokenSet, write_manifest, write_shard
from gpt.tokenizer import Tokenizer
from gpt.trainer import train, update

Build = Callable[..., GPT]
CONSOLE = Console(quiet=True)
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen and rejected reply


def drawn(seed: int, n: int, longest: int = 14, vocab: int = 64) -> list[Pair]:
    """Pairs of random ids; prompts begin with 0, the start token."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(1, vocab) for _ in range(draw.randint(low, high))]

    return [([0, *ids(1, longest - 7)], ids(1, 6), ids(1, 6)) for _ in range(n)]


def write(
    path: Path,
    splits: dict[str, list[Pair]],
    *,
    tokenizer_sha256: str = "0" * 64,
    vocab_size: int = 64,
    pairs: bool = True,
) -> Path:
    """A data set of these pairs; without `pairs`, of the chosen ones as conversations."""
    path.mkdir(parents=True)
    with Directory(path / "set") as directory:
        entries = {}
        for split, some in splits.items():
            documents = [
                Document(prompt + reply, 1, 0, (Span(len(prompt), len(prompt + reply), "train"),))
                for prompt, *replies in some
                for reply in replies[: 2 if pairs else 1]
            ]
            kind = {"vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256}
            entries[split] = [write_shard(directory, f"{split}.shard", documents, **kind)]
        write_manifest(
            directory, **kind, start_id=0, splits=entries, sources=["pairs"], settings={}, pairs=pairs, conversations=True
        )
    return path / "set"


def opened(path: Path) -> Data:
    return Data([Part("pairs", TokenSet(path, "train"), TokenSet(path, "val"))], None, "f" * 64)  # type: ignore[arg-type]


def data_config(**settings: Any) -> DataConfig:
    return DataConfig(path="pairs", seq_len=32, document_mask=True, **settings)


def read(batch: Batch) -> list[tuple[Pair, Pair]]:
    """What stands in a batch: ((all ids, learned ids) of a chosen document, of the rejected one beside it)."""
    found = []
    T = batch.tokens.shape[1] // 2
    for tokens, targets, ids in zip(batch.tokens, batch.targets, batch.doc_ids, strict=True):
        halves = []
        for half in (slice(0, T), slice(T, None)):
            documents = [half_ids == ids[half] for half_ids in ids[half].unique()]
            here = [(tokens[half][at].tolist(), [t for t in targets[half][at].tolist() if t != IGNORED]) for at in documents]
            halves.append([document for document in here if document[1]])
        found += zip(*halves, strict=True)
    return found


# Rows


def test_every_pair_stands_whole_in_one_row_and_beside_itself(tmp_path: Path) -> None:
    pairs = drawn(1, 50)
    path = write(tmp_path / "a", {"train": pairs, "val": pairs[:7]})
    loader = Loader(opened(path), data_config(), 3, seed=7)
    n_steps = -(-loader.orders[0].n_rows // 3) + 1
    expected = sorted(((p + a, a), (p + b, b)) for p, a, b in pairs)
    rows = [torch.cat(column) for column in zip(*(loader.batch(i).given for i in range(1, n_steps + 1)), strict=True)]
    epoch = Batch(*(column[: loader.orders[0].n_rows] for column in rows))
    assert epoch.tokens.shape == (loader.orders[0].n_rows, 64)
    assert sorted(read(epoch)) == expected
    assert n_terms(ObjectiveConfig(kind="dpo"), epoch) == 50
    assert loader.orders[0].n_rows < 40  # several share a row
    for batch in validation_batches(TokenSet(path, "val"), 32, 100, None, document_mask=True):
        assert sorted(read(batch)) == sorted(((p + a, a), (p + b, b)) for p, a, b in pairs[:7])


def test_a_batch_of_pairs_follows_from_its_step_alone_and_epochs_differ(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "a", {"train": drawn(2, 40), "val": drawn(3, 2)}))
    one, other = (Loader(data, data_config(), 4, seed=7) for _ in range(2))
    late = one.batch(11)
    for step in (3, 11):
        for a, b in zip(one.batch(step).given, other.batch(step).given, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(late.tokens, one.batch(11).tokens)
    epoch = -(-one.orders[0].n_rows // 4)
    assert not torch.equal(one.batch(1).tokens, one.batch(1 + epoch).tokens)


def test_an_evaluation_of_some_tokens_reads_whole_pairs(tmp_path: Path) -> None:
    pairs = drawn(4, 20)
    path = write(tmp_path / "a", {"train": pairs, "val": pairs})
    val = TokenSet(path, "val")
    for limit in (1, 30, 200):
        found = [pair for batch in validation_batches(val, 32, 2, limit, document_mask=True) for pair in read(batch)]
        sizes = np.cumsum([len(p + a + p + b) for p, a, b in pairs])
        n = int(np.searchsorted(sizes, limit)) + 1
        assert sorted(found) == sorted(((p + a, a), (p + b, b)) for p, a, b in pairs[:n])


def test_pairs_with_a_document_longer_than_a_half_are_left_out_and_counted(tmp_path: Path) -> None:
    short, long = drawn(5, 6), [([0] + [1] * 20, [2] * 3, [3] * 15)]
    data = opened(write(tmp_path / "a", {"train": short + long, "val": short}))
    loader = Loader(data, data_config(), 1, seed=7)
    assert "6 of 7 pairs" in loader.orders[0].told and "1 with a document longer" in loader.orders[0].told
    found = [pair for step in range(1, loader.orders[0].n_rows + 1) for pair in read(loader.batch(step))]
    assert sorted(found) == sorted(((p + a, a), (p + b, b)) for p, a, b in short)
    with pytest.raises(ValueError, match="long_documents=drop"):
        Loader(data, data_config(long_documents="begin"), 1, seed=7)
    only = opened(write(tmp_path / "b", {"train": long, "val": short}))
    with pytest.raises(ValueError, match=r"each has a document longer than data\.seq_len \(32\): raise it"):
        Loader(only, data_config(), 1, seed=7)


def test_pairs_and_other_data_do_not_mix(tmp_path: Path) -> None:
    sets = [write(tmp_path / name, {"train": drawn(1, 9), "val": drawn(2, 3)}, pairs=name == "a") for name in "ab"]
    parts = [opened(path).parts[0] for path in sets]
    with pytest.raises(ValueError, match="do not mix"):
        Loader(Data(parts, None, "f" * 64), data_config(), 1, seed=7)  # type: ignore[arg-type]


# The loss


def plain(
    model: GPT, reference: GPT | None, pairs: Sequence[Pair], config: ObjectiveConfig, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The sum over pairs as the papers write it, each reply alone and all logits at once."""

    def log_p(of: GPT, prompt: list[int], reply: list[int]) -> Tensor:
        ids = torch.tensor([prompt + reply])
        each = of(ids)[0, :-1].to(dtype).log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        return each.mean() if config.averages else each.sum()

    total = torch.zeros((), dtype=dtype)
    for prompt, chosen, rejected in pairs:
        lead = log_p(model, prompt, chosen) - log_p(model, prompt, rejected)
        if reference is not None:
            lead = lead - (log_p(reference, prompt, chosen) - log_p(reference, prompt, rejected)).detach()
        lead = config.sharpness * lead - config.lead
        total = total - (1 - config.label_smoothing) * F.logsigmoid(lead) - config.label_smoothing * F.logsigmoid(-lead)
    return total


def against(reference: GPT) -> Callable[[], Any]:
    """`reference` as Preferences asks for it."""

    @contextmanager
    def frozen() -> Iterator[GPT]:
        yield reference

    return frozen


FORMS = {
    "dpo": ObjectiveConfig(kind="dpo"),
    "sharper": ObjectiveConfig(kind="dpo", beta=0.7),
    "averages": ObjectiveConfig(kind="dpo", length_normalized=True),
    "conservative": ObjectiveConfig(kind="dpo", label_smoothing=0.2),
    "simpo": ObjectiveConfig(kind="simpo"),
    "simpo, conservative": ObjectiveConfig(kind="simpo", beta=3.0, gamma=0.4, label_smoothing=0.1),
}


def rows_of(tmp_path: Path, pairs: Sequence[Pair], **kind: Any) -> Batch:
    """All of these pairs in rows, as one batch."""
    path = write(tmp_path / f"{random.random()}", {"train": list(pairs), "val": list(pairs)}, **kind)
    data = opened(path)
    n_rows = Loader(data, data_config(), 1, seed=3).orders[0].n_rows
    return Loader(data, data_config(), n_rows, seed=3).batch(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tie", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_formula_in_float64(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, tie: bool
) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 64 * 7})
    config, pairs = FORMS[form], drawn(6, 9)
    model, other = (build(seed=seed, tie_embeddings=tie, logit_softcap=20.0).double() for seed in (1, 2))
    reference = None if config.kind == "simpo" else other
    expected = plain(model, reference, pairs, config)
    names = dict(model.named_parameters())
    slopes = torch.autograd.grad(expected, list(names.values()))
    ours = Preferences(model, config, reference and against(reference))(*rows_of(tmp_path, pairs).given)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(names, torch.autograd.grad(ours, list(names.values())), slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_before_the_first_update_no_reply_is_preferred(build: Build, tmp_path: Path) -> None:
    model, batch = build(seed=1), rows_of(tmp_path, drawn(6, 9))
    objective = Preferences(model, FORMS["dpo"], against(build(seed=1)))
    rewards, there = objective.rewards(*batch.given)
    assert not rewards.any() and there.sum() == 9
    assert objective(*batch.given).item() == pytest.approx(9 * np.log(2), rel=1e-6)


def test_micro_batches_do_not_change_the_gradient_of_a_batch_of_pairs(build: Build, tmp_path: Path) -> None:
    batch, model = rows_of(tmp_path, drawn(6, 30)), build(seed=1).double()
    objective = Preferences(model, FORMS["averages"], against(build(seed=2).double()))
    parameters = list(model.parameters())
    whole = torch.autograd.grad(objective(*batch.given) / 30, parameters)
    for rows in (1, 2, 5):
        for part in zip(*(x.split(rows) for x in batch.given), strict=True):
            (objective(*part) / 30).backward()
        for parameter, expected in zip(parameters, whole, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
            parameter.grad = None


def test_a_frozen_head_costs_and_gets_no_gradient(build: Build, tmp_path: Path) -> None:
    model, batch = build(seed=1, tie_embeddings=False), rows_of(tmp_path, drawn(6, 5))
    model.lm_head.weight.requires_grad_(False)
    Preferences(model, FORMS["simpo"], None)(*batch.given).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is not None


def test_bf16_stays_close(build: Build, tmp_path: Path) -> None:
    model, batch = build(seed=1, init_std=0.1), rows_of(tmp_path, drawn(6, 9))
    objective = Preferences(model, FORMS["simpo"], None)
    exact = objective(*batch.given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(*batch.given)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)


def test_an_evaluation_counts_right_pairs_and_their_margin(build: Build, tmp_path: Path) -> None:
    pairs, config = drawn(8, 23), ObjectiveConfig(kind="dpo", beta=0.5)
    path = write(tmp_path / "a", {"train": pairs, "val": pairs})
    model, reference = build(seed=1), build(seed=2)
    objective = Preferences(model, config, against(reference)).train()
    found = prefer(
        objective, {"pairs": TokenSet(path, "val")}, EvalConfig(), seq_len=32, batch_rows=3, device="cpu", dtype="float32"
    )
    assert objective.training
    each = torch.stack([plain(model, reference, [pair], config) for pair in pairs])
    margins = -torch.log(torch.expm1(each))  # the inverse of -log sigmoid
    assert found.val_loss == pytest.approx(each.mean().item(), rel=1e-5)
    assert found.val_accuracy == pytest.approx((margins > 0).double().mean().item())
    assert found.val_margin == pytest.approx(margins.mean().item(), rel=1e-4)


@pytest.mark.slow
def test_compiled_it_is_the_same_loss(build: Build, tmp_path: Path) -> None:
    model, batch = build(seed=1), rows_of(tmp_path, drawn(6, 9))
    objective = Preferences(model, FORMS["dpo"], against(build(seed=2)))
    eager = objective(*batch.given)
    slopes = torch.autograd.grad(eager, list(model.parameters()))
    compiled = parallel.applied(objective, compile=True)(*batch.given)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(compiled, list(model.parameters())), slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    parallel.applied(objective, compile=False)
    assert torch.equal(objective(*batch.given), eager)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "dpo", "beta": 0.0}, "greater than 0"),
        ({"kind": "dpo", "beta": -1.0}, "greater than 0"),
        ({"beta": 0.1}, r"beta \(0.1\) is for kind 'dpo' or 'simpo'; the kind is 'next_token'"),
        ({"kind": "dpo", "gamma": 1.0}, "is for kind 'simpo'"),
        ({"kind": "simpo", "length_normalized": True}, "simpo averages always"),
        ({"kind": "dpo", "label_smoothing": 0.5}, "less than 0.5"),
    ],
)
def test_settings_that_no_kind_has_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveConfig(**settings)
