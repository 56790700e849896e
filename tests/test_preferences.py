"""Preferences: pairs in rows, the loss of DPO and SimPO and its gradient, trl's own numbers, and a model that learns to prefer."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from gpt import hf, loss, parallel, signals, tokenizer, trainer
from gpt.data import IGNORED, Batch, Data, DataConfig, Loader, Part, validation_batches
from gpt.durable import Directory
from gpt.evaluate import EvalConfig, prefer
from gpt.loss import Objective, ObjectiveConfig, Preferences, n_terms
from gpt.model import GPT, init_weights
from gpt.optim import OptimConfig, Optimizer
from gpt.plan import Choices
from gpt.run import resolve
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


def documents_of(pairs: Sequence[Pair]) -> list[Document]:
    """Chosen and rejected documents in turn, of which the replies are learned."""
    return [
        Document(prompt + reply, 1, 0, (Span(len(prompt), len(prompt + reply), "train"),))
        for prompt, *replies in pairs
        for reply in replies
    ]


def write(
    path: Path,
    splits: dict[str, list[Document]],
    *,
    tokenizer_sha256: str = "0" * 64,
    vocab_size: int = 64,
    start_id: int = 0,
    pairs: bool = True,
) -> Path:
    """A data set of these documents, which are pairs or conversations."""
    path.mkdir(parents=True)
    kind = {"vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256}
    with Directory(path / "set") as directory:
        entries = {split: [write_shard(directory, f"{split}.shard", some, **kind)] for split, some in splits.items()}
        what = {"splits": entries, "sources": ["pairs"], "settings": {}}
        write_manifest(directory, **kind, **what, start_id=start_id, pairs=pairs, conversations=True)
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
            here = [
                (tokens[half][at].tolist(), [t for t in targets[half][at].tolist() if t != IGNORED]) for at in documents
            ]
            halves.append([document for document in here if document[1]])
        found += zip(*halves, strict=True)
    return found


# Rows


def test_every_pair_stands_whole_in_one_row_and_beside_itself(tmp_path: Path) -> None:
    pairs = drawn(1, 50)
    path = write(tmp_path / "a", {"train": documents_of(pairs), "val": documents_of(pairs[:7])})
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
    data = opened(write(tmp_path / "a", {"train": documents_of(drawn(2, 40)), "val": documents_of(drawn(3, 2))}))
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
    path = write(tmp_path / "a", {"train": documents_of(pairs), "val": documents_of(pairs)})
    val = TokenSet(path, "val")
    for limit in (1, 30, 200):
        found = [pair for batch in validation_batches(val, 32, 2, limit, document_mask=True) for pair in read(batch)]
        sizes = np.cumsum([len(p + a + p + b) for p, a, b in pairs])
        n = int(np.searchsorted(sizes, limit)) + 1
        assert sorted(found) == sorted(((p + a, a), (p + b, b)) for p, a, b in pairs[:n])


def test_pairs_with_a_document_longer_than_a_half_are_left_out_and_counted(tmp_path: Path) -> None:
    short, long = drawn(5, 6), [([0] + [1] * 20, [2] * 3, [3] * 15)]
    data = opened(write(tmp_path / "a", {"train": documents_of(short + long), "val": documents_of(short)}))
    loader = Loader(data, data_config(), 1, seed=7)
    assert "6 of 7 pairs" in loader.orders[0].told and "1 with a document longer" in loader.orders[0].told
    found = [pair for step in range(1, loader.orders[0].n_rows + 1) for pair in read(loader.batch(step))]
    assert sorted(found) == sorted(((p + a, a), (p + b, b)) for p, a, b in short)
    with pytest.raises(ValueError, match="long_documents=drop"):
        Loader(data, data_config(long_documents="begin"), 1, seed=7)
    only = opened(write(tmp_path / "b", {"train": documents_of(long), "val": documents_of(short)}))
    with pytest.raises(ValueError, match=r"each has a document longer than data\.seq_len \(32\): raise it"):
        Loader(only, data_config(), 1, seed=7)


def test_pairs_and_other_data_do_not_mix(tmp_path: Path) -> None:
    documents = documents_of(drawn(1, 9))
    sets = [write(tmp_path / name, {"train": documents, "val": documents}, pairs=name == "a") for name in "ab"]
    parts = [opened(path).parts[0] for path in sets]
    with pytest.raises(ValueError, match="do not mix"):
        Loader(Data(parts, None, "f" * 64), data_config(), 1, seed=7)  # type: ignore[arg-type]


# The loss


def plain(
    model: GPT,
    reference: GPT | None,
    pairs: Sequence[Pair],
    config: ObjectiveConfig,
    dtype: torch.dtype = torch.float64,
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
    path = write(tmp_path / f"{random.random()}", {"train": documents_of(pairs), "val": documents_of(pairs)}, **kind)
    data = opened(path)
    n_rows = Loader(data, data_config(), 1, seed=3).orders[0].n_rows
    return Loader(data, data_config(), n_rows, seed=3).batch(1)


def updated(objective: Objective, batch: Batch, micro_batch: int, config: ObjectiveConfig) -> list[float]:
    """[loss, gradient norm] that `trainer.update` reports; the weights are as before."""
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    train = {"steps": 1, "batch_tokens": batch.tokens.numel()}
    settings = {"name": "x", "data": {"path": "pairs"}, "train": train, "objective": config.model_dump()}
    facts = {"data": "", "torch": "", "cpu": "", "device": "cpu", "dtype": "float32"}
    choices = Choices(**facts, compile=False, micro_batch=micro_batch, threads=1, steps=1)
    optimizer = Optimizer(objective.model, OptimConfig(clip=None))
    found = update(objective, optimizer, batch, TrainConfig.model_validate(settings), choices, 1)
    objective.model.load_state_dict(before)
    return [float(each) for each in found]


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


def test_a_source_whose_held_out_pairs_are_all_too_long_does_not_end_an_evaluation(
    build: Build, tmp_path: Path
) -> None:
    sources = {"short": drawn(5, 6), "long": [([0] + [1] * 20, [2] * 3, [3] * 15)]}
    paths = {
        name: write(tmp_path / name, {"train": documents_of(pairs), "val": documents_of(pairs)})
        for name, pairs in sources.items()
    }
    parts = {name: TokenSet(path, "val") for name, path in paths.items()}
    objective = Preferences(build(seed=1), ObjectiveConfig(kind="dpo"), against(build(seed=2)))
    how: dict[str, Any] = {"seq_len": 32, "batch_rows": 3, "device": "cpu", "dtype": "float32"}
    alone = prefer(objective, {"short": parts["short"]}, EvalConfig(), **how)
    assert prefer(objective, parts, EvalConfig(), **how) == alone
    with pytest.raises(ValueError, match="each held-out pair has a document longer"):
        prefer(objective, {"long": parts["long"]}, EvalConfig(), **how)


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
    path = write(tmp_path / "a", {"train": documents_of(pairs), "val": documents_of(pairs)})
    model, reference = build(seed=1), build(seed=2)
    objective = Preferences(model, config, against(reference)).train()
    found = prefer(
        objective,
        {"pairs": TokenSet(path, "val")},
        EvalConfig(),
        seq_len=32,
        batch_rows=3,
        device="cpu",
        dtype="float32",
    )
    assert objective.training
    each = torch.stack([plain(model, reference, [pair], config) for pair in pairs])
    margins = -torch.log(torch.expm1(each))  # the inverse of -log sigmoid
    assert found.val_loss == pytest.approx(each.mean().item(), rel=1e-5)
    assert found.val_accuracy == pytest.approx((margins > 0).double().mean().item())
    assert found.val_margin == pytest.approx(margins.mean().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # which the compiler hides itself
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


# Runs


SETTINGS = {
    "name": "liked",
    "init_from": "base",
    "data": {"path": "data/pairs", "seq_len": 32, "document_mask": True},
    "objective": {"kind": "dpo"},
    "train": {"steps": 12, "batch_tokens": 256, "micro_batch": 2, "compile": False, "threads": 1},
    "optim": {"lr": 3e-3},
    "schedule": {"kind": "constant", "warmup": 0},
    "eval": {"every": 6},
    "checkpoint": {"every": 4, "keep": 3},
    "log": {"every": 1},
}


@pytest.fixture
def here(pupil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a model, `base`, and data/pairs, whose chosen replies are of even ids and the rejected of odd ones."""
    vocabulary = Tokenizer.load(pupil)
    (tmp_path / "base").symlink_to(pupil)
    kind = {"tokenizer_sha256": vocabulary.sha256, "vocab_size": vocabulary.size, "start_id": vocabulary.start_id}

    def like(pair: Pair) -> Pair:
        prompt, a, b = pair
        return [vocabulary.start_id, *prompt[1:]], [2 * i for i in a], [2 * i + 1 for i in b]

    splits = {name: [*map(like, drawn(seed, n, vocab=100))] for name, seed, n in (("train", 1, 200), ("val", 2, 40))}
    documents = {name: documents_of(pairs) for name, pairs in splits.items()}
    for name in ("pairs", "chats"):
        made = write(tmp_path / "sets" / name, documents, **kind, pairs=name == "pairs")
        for file, data in vocabulary.files().items():
            (made / file).write_bytes(data)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def settings(**changes: Any) -> TrainConfig:
    """SETTINGS with `changes` of whole sections' fields, a section's by a dict."""
    merged = {name: value.copy() if isinstance(value, dict) else value for name, value in SETTINGS.items()}
    for name, value in changes.items():
        merged[name] = merged[name] | value if isinstance(merged.get(name), dict) else value
    return TrainConfig.model_validate(merged)


def metrics(name: str, kind: str) -> list[dict[str, Any]]:
    lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def run(name: str, console: Console = CONSOLE, **changes: Any) -> list[dict[str, Any]]:
    """The evaluations of the run."""
    train(settings(name=name, **changes), console=console)
    return metrics(name, "eval")


WAYS = {
    "all": {},
    "averages": {"objective": {"kind": "dpo", "length_normalized": True}},
    "adapter": {"adapter": {"rank": 4, "alpha": 8, "targets": "all", "embeddings": True}, "train": {"steps": 40}},
    "simpo": {"objective": {"kind": "simpo"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_learns_to_prefer(here: Path, way: str) -> None:
    first, *_, last = run("liked", **({"train": {"steps": 24}} | WAYS[way]), eval={"every": 60})
    assert first["step"] == 0 and last["val_accuracy"] > 0.9 > first["val_accuracy"]
    assert last["val_loss"] < 0.6 * first["val_loss"] and last["val_margin"] > max(1, first["val_margin"])
    if way != "simpo":
        assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert first["val_margin"] == pytest.approx(0, abs=1e-5)


def test_loss_accuracy_and_margin_are_shown_and_the_best_is_of_the_lowest_loss(here: Path) -> None:
    with Path("shown").open("w") as file:
        evaluations = run("liked", Console(file=file, width=200))
    shown = Path("shown").read_text()
    last = evaluations[-1]
    assert {"step", "tokens", "val_loss", "val_accuracy", "val_margin", "elapsed_s", "kind"} == last.keys()
    for name in ("val_loss", "val_accuracy", "val_margin"):
        assert f"{name} {last[name]:.4f}" in shown
    assert f"best: {last['val_loss']:.4f} nats/pair at step 12" in shown
    assert "200 of 200 pairs" in shown
    assert "nats/pair" in resolve("runs/liked")[1]


@pytest.mark.parametrize("way", ["all", "adapter"])
def test_a_stopped_run_continues_as_if_it_had_not_been_stopped(
    here: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    model: dict[str, Any] = {} if way == "adapter" else {"model": {"dropout": 0.1}}
    model |= {name: value for name, value in WAYS[way].items() if name != "train"}
    whole = run("whole", **model)
    real, made = trainer.update, []

    def counted(*args: Any) -> Any:
        made.append(args[5])
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", counted)
        patch.setattr(signals, "stop_requested", lambda: "SIGTERM" if made and made[-1] == 7 else None)
        with pytest.raises(signals.Stopped, match="step 7"):
            run("halves", **model)
    halves = run("halves", **model)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in metrics("halves", "train")] == [line[name] for line in metrics("whole", "train")]
    assert [line["val_margin"] for line in halves] == [line["val_margin"] for line in whole]


def test_a_reference_that_has_changed_is_refused_on_resume(here: Path, pupil: Path) -> None:
    Path("base").unlink()
    shutil.copytree(pupil, "base")
    run("liked", train={"steps": 4})
    state = load_file("base/model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in state.items()}, "base/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="base is not the model that this run compares its answers with"):
        run("liked", train={"steps": 4})


def test_a_run_goes_on_though_its_source_has_a_better_checkpoint_where_the_one_of_then_is_named(here: Path) -> None:
    run("source")
    run("liked", init_from="runs/source", train={"steps": 4})
    began = resolve("runs/source")[0]
    with Path("runs/source/metrics.jsonl").open("a") as file:
        better = next(step for step in (4, 8) if not began.name.endswith(f"{step:08d}"))
        file.write(json.dumps({"kind": "eval", "step": better, "val_loss": 1e-9}) + "\n")
    assert resolve("runs/source")[0] != began
    with pytest.raises(ValueError, match=r"another checkpoint of it is the best now; name .* init_from=RUN@STEP"):
        run("liked", init_from="runs/source", train={"steps": 4})
    run("liked", init_from=f"runs/source@{int(began.name.removeprefix('step_'))}", train={"steps": 4})
    with pytest.raises(ValueError, match="started with other settings"):
        run("liked", init_from=str(began), train={"steps": 5})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": None}, "name it, init_from: runs/NAME"),
        ({"data": {"path": "data/chats"}}, r"data/chats has none: prepare it .*\(preference: true in its recipe\)"),
        ({"objective": {"kind": "next_token"}}, "set objective.kind=dpo, or prepare the chosen ones"),
        ({"data": {"document_mask": False}}, r"set data\.document_mask=true"),
        ({"train": {"batch_tokens": 96}}, r"a multiple of twice data\.seq_len, .* \(64\)"),
        ({"data": {"seq_len": 2}, "train": {"batch_tokens": 64}}, r"longer than data\.seq_len \(2\): raise it"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(here: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run("liked", **changes)


def test_a_reference_of_another_vocabulary_is_refused(here: Path) -> None:
    other = tokenizer.train(["entirely other words, and many of them"] * 5, "bpe", None)
    config = hf.load(Path("base"))[0].config.model_copy(update={"vocab_size": other.padded_size})
    model = GPT(config)
    init_weights(model, 1)
    Path("other").mkdir()
    for name, data in hf.model_files(config, other).items():
        Path("other", name).write_bytes(data)
    save_file(
        {n: t.detach().clone() for n, t in hf.to_disk(config, model.state_dict()).items()}, "other/model.safetensors"
    )
    with pytest.raises(ValueError, match="prepared with another tokenizer than other"):
        run("liked", init_from="other")
