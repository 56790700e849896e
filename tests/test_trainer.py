import contextlib
import errno
import gc
import io
import json
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import numpy as np
import pytest
import torch
from rich.console import Console
from teams import load_weights
from tiny import weights

from gpt import config, host, judge, prepare, saving, settle, signals, trainer
from gpt.model import GPT
from gpt.ranks import Sizes
from gpt.run import RunDirectory
from gpt.shards import TokenSet
from gpt.trainer import TrainConfig, train, update

CONSOLE = Console(quiet=True)


def settings(*overrides: str) -> TrainConfig:
    return config.load(TrainConfig, Path("tiny.yaml"), overrides)


def metrics(name: str, kind: str) -> list[dict]:
    lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def curve(name: str) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(name, "train")]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Request a stop as if a signal had come during update `step`."""
    real, made = trainer.update, []

    def counted(*args, **kwargs):
        made.append(args[5])
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "update", counted)
    monkeypatch.setattr(signals, "stop_requested", lambda: "SIGTERM" if made and made[-1] == step else None)


def test_training_lowers_the_validation_loss(grammar: Path) -> None:
    train(settings("train.steps=40", "eval.every=20"), console=CONSOLE)
    first, last = metrics("tiny", "eval")
    assert last["val_bpb"] < first["val_bpb"] < 8
    assert json.loads(Path("runs/tiny/status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_stopped_run_continues_as_if_it_had_not_been_stopped(
    grammar: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    train(settings("name=whole", f"optim.kind={kind}"), console=CONSOLE)
    for step in (1, 6, 11):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(signals.Stopped, match=f"step {step}"):
                train(settings(f"optim.kind={kind}"), console=CONSOLE)
        assert json.loads(Path("runs/tiny/status.json").read_text())["state"] == "preempted"
    train(settings(f"optim.kind={kind}"), console=CONSOLE)
    assert curve("tiny") == curve("whole")
    assert weights("tiny", 12) == weights("whole", 12)
    assert [(e["step"], e["val_bpb"]) for e in metrics("tiny", "eval")] == [
        (e["step"], e["val_bpb"]) for e in metrics("whole", "eval")
    ]


@pytest.mark.parametrize(("first", "last"), [(3, 4), pytest.param(1, 20, marks=pytest.mark.slow)])
def test_a_run_interrupted_after_any_of_its_steps_and_again_five_times_has_the_bits_of_one_that_was_not(
    grammar: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    steps = "train.steps=26"
    train(settings("name=whole", steps), console=CONSOLE)
    for begin in range(first, last + 1):
        name = f"name=from-{begin}"
        for step in range(begin, begin + 6):  # the first interruption, and then one after each of five resumes
            with monkeypatch.context() as patch:
                stop_at(patch, step)
                with pytest.raises(signals.Stopped, match=f"step {step}"):
                    train(settings(name, steps), console=CONSOLE)
            faults.count()
        train(settings(name, steps), console=CONSOLE)
        assert curve(f"from-{begin}") == curve("whole")
        assert weights(f"from-{begin}", 26) == weights("whole", 26)


FP16 = ("train.dtype=float16", "train.device=cpu", "numbers.on_bad=stop")


@pytest.fixture
def too_steep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of update 7 is so steep that float16 bears a scale of 2^12 and no larger one, as if by its batch."""
    real = judge.LossScale.too_large

    def limited(self: Any, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        steep = made and made[-1] == 7 and self.value > 2**12
        return real(self, loss, grad_norm * torch.inf if steep else grad_norm)

    made: list[int] = []
    update_ = trainer.update

    def counted(*args: Any) -> Any:
        made.append(args[5])
        return update_(*args)

    monkeypatch.setattr(trainer, "update", counted)
    monkeypatch.setattr(judge.LossScale, "too_large", limited)


def test_bfloat16_ends_within_half_a_percent_of_float32(grammar: Path) -> None:
    """As on longer texts (docs/experiments.md): the weights that bf16 products move are fp32."""
    steps = "train.steps=80"
    losses = {}
    for dtype in ("float32", "bfloat16"):
        train(settings(f"name={dtype}", f"train.dtype={dtype}", "train.device=cpu", steps), console=CONSOLE)
        losses[dtype] = metrics(dtype, "eval")[-1]["val_loss"]
        first = metrics(dtype, "eval")[0]["val_loss"]
        assert losses[dtype] < 0.9 * first, "it has learned"
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.005)


def test_float16_trains_like_float32_halves_its_scale_and_resumes_bit_for_bit(
    grammar: Path, too_steep: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings("name=whole", *FP16), console=CONSOLE)
    train(settings("name=exact", "train.dtype=float32", "train.device=cpu"), console=CONSOLE)
    for (step, loss, norm), (_, exact, exact_norm) in zip(curve("whole"), curve("exact"), strict=True):
        assert loss == pytest.approx(exact, rel=0.01) and norm == pytest.approx(exact_norm, rel=0.1), step
    assert [step for step, *_ in curve("whole")] == list(range(1, 13)), "no update is left out"
    state = json.loads(Path("runs/whole/checkpoints/step_00000012/state.json").read_text())
    assert state["scale"] == [2**12, 6] and state["bad"] == []
    for step in (6, 9):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(signals.Stopped):
                train(settings(*FP16), console=CONSOLE)
    train(settings(*FP16), console=CONSOLE)
    assert curve("tiny") == curve("whole")
    assert weights("tiny", 12) == weights("whole", 12)


def test_the_loss_scale_changes_no_gradient_that_float16_can_hold(grammar: Path) -> None:
    """Of float32 arithmetic nothing changes at all: a power of two does not round."""
    from trained import CHOICES, batch, config_of

    from gpt.loss import NextToken
    from gpt.model import init_weights
    from gpt.optim import Optimizer

    given, found = config_of({}), []
    for scale in (None, judge.LossScale([2.0**12, 0])):
        model = GPT(given.model)
        init_weights(model, 3)
        optimizer = Optimizer(model, given.optim)
        numbers = update(NextToken(model), optimizer, batch(1), given, CHOICES, 1, scale=scale)
        found.append([*numbers, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_batch_that_no_scale_mends_leaves_the_scale_to_the_next(
    grammar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made, update_ = judge.LossScale.too_large, [], trainer.update

    def counted(*args: Any) -> Any:
        made.append(args[5])
        return update_(*args)

    def ruined(self: Any, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        if made[-1] == 7:
            grad_norm.fill_(torch.inf)
        return real(self, loss, grad_norm)

    monkeypatch.setattr(trainer, "update", counted)
    monkeypatch.setattr(judge.LossScale, "too_large", ruined)
    train(settings("name=skipped", *FP16[:2], "numbers.on_bad=skip"), console=CONSOLE)
    state = json.loads(Path("runs/skipped/checkpoints/step_00000012/state.json").read_text())
    assert state["bad"] and state["scale"] == [judge.LossScale.START, 11]


def test_saving_beside_the_training_changes_no_byte(grammar: Path) -> None:
    for name, background in (("beside", "true"), ("waiting", "false")):
        train(settings(f"name={name}", f"checkpoint.background={background}", "eval.every=100"), console=CONSOLE)
    for step in (8, 12):
        assert weights("beside", step) == weights("waiting", step)
    assert curve("beside") == curve("waiting")


def test_a_background_save_that_fails_ends_the_run_before_more_is_made(
    grammar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = saving.save

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "step_00000008":
            raise OSError(errno.ENOSPC, "no space left")
        real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save", full)
        with pytest.raises(OSError, match="no space left"):
            train(settings("train.steps=100", "eval.every=100"), console=CONSOLE)
    saved = sorted(path.name for path in Path("runs/tiny/checkpoints").iterdir())
    assert saved == ["step_00000004"]
    assert json.loads(Path("runs/tiny/status.json").read_text())["state"] == "failed"
    assert curve("tiny")[-1][0] < 13, "it is noticed at the latest at the next save"
    train(settings("train.steps=100", "eval.every=100"), console=CONSOLE)
    assert [step for step, _, _ in curve("tiny")] == list(range(1, 101))


def test_the_resolved_settings_train_the_same_run_again(grammar: Path) -> None:
    train(settings(), console=CONSOLE)
    again = config.load(TrainConfig, Path("runs/tiny/config.yaml"), ["name=again"])
    train(again, console=CONSOLE)
    assert weights("again", 12) == weights("tiny", 12)


def test_other_settings_under_the_same_name_are_refused_with_the_difference(grammar: Path) -> None:
    train(settings("train.steps=4"), console=CONSOLE)
    with pytest.raises(ValueError, match=r"(?s)optim.lr: 0.02 -> 0.01.*name=NEW.*--fresh"):
        train(settings("train.steps=4", "optim.lr=0.01"), console=CONSOLE)
    train(settings("train.steps=4", "log.every=2"), console=CONSOLE)  # what changes no update is free


def test_fresh_starts_beside_the_old_run(grammar: Path) -> None:
    train(settings("train.steps=4"), console=CONSOLE)
    before = weights("tiny", 4)
    train(settings("train.steps=4", "seed=7"), fresh=True, console=CONSOLE)
    assert weights("tiny", 4) == before != weights("tiny-2", 4)


def test_a_run_in_use_is_refused(grammar: Path) -> None:

    with RunDirectory(Path("runs"), "tiny").lock(), pytest.raises(ValueError, match="in use"):
        train(settings(), console=CONSOLE)


def test_micro_batches_do_not_change_the_objective(grammar: Path) -> None:
    for rows in (1, 2, 8):
        train(
            settings(
                f"name=rows{rows}",
                f"train.micro_batch={rows}",
                "model.dropout=0",
                "train.steps=3",
                "train.dtype=float32",
            ),
            console=CONSOLE,
        )
    reference = curve("rows8")
    for rows in (1, 2):
        for (_, loss, norm), (_, loss8, norm8) in zip(curve(f"rows{rows}"), reference, strict=True):
            assert loss == pytest.approx(loss8, rel=1e-4) and norm == pytest.approx(norm8, rel=1e-3)


def test_a_loss_that_is_not_finite_changes_no_weight_and_writes_no_checkpoint(
    grammar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.parallel.applied

    def poisoned(objective, **how):
        forward, calls = real(objective, **how), []

        def call(tokens, targets):
            calls.append(1)
            return forward(tokens, targets) * (float("nan") if len(calls) > 10 else 1.0)

        return call

    monkeypatch.setattr(trainer.parallel, "applied", poisoned)
    with pytest.raises(FloatingPointError, match="step 6"):  # two micro-batches a step
        train(settings(), console=CONSOLE)
    saved = sorted(path.name for path in Path("runs/tiny/checkpoints").iterdir() if not path.name.startswith("."))
    assert saved == ["step_00000004"]
    assert all(
        torch.isfinite(value).all() for value in load_weights(Path("runs/tiny/checkpoints/step_00000004")).values()
    )


def test_update_leaves_the_weights_alone_when_the_gradient_is_not_finite(grammar: Path) -> None:
    settled = settings()
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = trainer.Optimizer(model, config.load(TrainConfig, Path("tiny.yaml"), ["optim.kind=adamw"]).optim)
    batch = trainer.Batch(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    choices = trainer.Choices(
        device="cpu", dtype="float32", compile=False, micro_batch=1, threads=1, steps=1, data="", torch="", cpu=""
    )

    def infinite_gradient(tokens, targets):
        return (model.weight.sum() - before.sum()).abs().sqrt()  # zero, with slope infinity or NaN

    with pytest.raises(FloatingPointError):
        update(infinite_gradient, optimizer, batch, settled, choices, 1)
    assert torch.equal(model.weight, before)


def test_fine_tuning_starts_from_the_source_and_leaves_it_untouched(grammar: Path) -> None:
    train(settings("train.steps=40", "eval.every=40", "checkpoint.every=40"), console=CONSOLE)
    before = weights("tiny", 40)
    Path("tune.yaml").write_text(
        Path("tiny.yaml")
        .read_text()
        .replace("model: {n_layer: 2, d_model: 32, n_head: 2, n_kv_head: 1, dropout: 0.1}", "init_from: runs/tiny")
    )
    tune = config.load(TrainConfig, Path("tune.yaml"), ["name=tuned"])
    train(tune, console=CONSOLE)
    evals = metrics("tuned", "eval")
    assert evals[0]["step"] == 0
    assert evals[0]["val_bpb"] == pytest.approx(metrics("tiny", "eval")[-1]["val_bpb"], rel=1e-6)
    assert weights("tiny", 40) == before
    assert weights("tuned", 12) != before
    train(tune, console=CONSOLE)  # and it resumes without complaint


def test_the_resolved_settings_of_a_fine_tuned_run_train_it_again(grammar: Path) -> None:
    train(settings("train.steps=4"), console=CONSOLE)
    train(settings("name=tuned", "init_from=runs/tiny", "train.steps=4"), console=CONSOLE)
    train(config.load(TrainConfig, Path("runs/tuned/config.yaml"), ["name=again"]), console=CONSOLE)
    assert weights("again", 4) == weights("tuned", 4) != weights("tiny", 4)


def test_the_name_of_the_record_is_on_the_disk_before_its_first_line(
    grammar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = trainer.durable.write_file, []
    monkeypatch.setattr(
        trainer.durable, "write_file", lambda path, data: (written.append(path.name), real(path, data))[1]
    )
    train(settings("train.steps=1"), console=CONSOLE)
    assert "metrics.jsonl" in written and len(metrics("tiny", "train")) == 1


def test_a_fresh_run_is_continued_under_its_own_name(grammar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings("train.steps=4"), console=CONSOLE)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(signals.Stopped):
            train(settings("train.steps=4"), fresh=True, console=CONSOLE)
    train(settings("train.steps=4", "name=tiny-2"), console=CONSOLE)
    assert weights("tiny-2", 4) == weights("tiny", 4)
    assert not Path("runs/tiny-3").exists()


def test_settings_that_contradict_the_choices_beside_them_are_refused(grammar: Path) -> None:
    train(settings("train.steps=4"), console=CONSOLE)
    path = Path("runs/tiny/config.yaml")
    with pytest.raises(ValueError, match=r"train.steps asks for 8, the choices in the settings say 4; choices=null"):
        train(config.load(TrainConfig, path, ["name=longer", "train.steps=8"]), console=CONSOLE)
    train(config.load(TrainConfig, path, ["name=longer", "train.steps=8", "choices=null"]), console=CONSOLE)
    assert metrics("longer", "train")[-1]["step"] == 8


def test_what_could_not_be_had_as_asked_is_not_tried_again(grammar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = settle.parallel.applied, []

    def applied(objective, *, compile, **how):
        if compile:
            tried.append(True)
            raise RuntimeError("g++: exit 1")
        return real(objective, compile=compile, **how)

    def interrupted(step):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(signals.Stopped):
                train(settings("train.steps=6", "train.compile=true"), console=CONSOLE)

    for module in (settle.parallel, trainer.parallel):
        monkeypatch.setattr(module, "applied", applied)
    interrupted(3)
    assert tried == [True]
    with pytest.raises(ValueError, match=r"train\.compile asks for True"):
        train(
            config.load(
                TrainConfig, Path("runs/tiny/config.yaml"), ["name=b", "train.compile=true", "choices.fallbacks={}"]
            ),
            console=CONSOLE,
        )
    interrupted(5)
    assert tried == [True]
    with pytest.raises(RuntimeError, match=r"g\+\+: exit 1"):
        train(settings("train.steps=6", "train.compile=true"), console=CONSOLE, allow=["train.compile"])
    assert tried == [True, True]
    train(settings("train.steps=6", "train.compile=true"), console=CONSOLE)
    assert tried == [True, True] and metrics("tiny", "train")[-1]["step"] == 6
    train(config.load(TrainConfig, Path("runs/tiny/config.yaml"), ["name=again"]), console=CONSOLE)
    assert tried == [True, True] and metrics("again", "train")[-1]["step"] == 6


def test_a_time_budget_fits_the_steps_and_is_kept_on_resume(grammar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = config.load(TrainConfig, Path("tiny.yaml"), ["train.steps=null", "train.time=30s", "eval.every=1000"])
    stop_at(monkeypatch, 5)
    real = settle.trial
    monkeypatch.setattr(settle, "trial", lambda *given: (1.0, real(*given)[1]))  # a second an update
    monkeypatch.setattr(settle, "PROBE_SHARE", 0.0)
    with pytest.raises(signals.Stopped):
        train(timed, console=CONSOLE)
    steps = config.load(TrainConfig, Path("runs/tiny/config.yaml")).choices.steps
    assert 5 < steps <= 30
    monkeypatch.undo()
    monkeypatch.chdir(grammar)
    train(timed, console=CONSOLE)
    assert metrics("tiny", "train")[-1]["step"] == steps


def test_another_data_set_under_the_same_path_is_refused_on_resume(grammar: Path, grammar_set: Path) -> None:
    train(settings("train.steps=4"), console=CONSOLE)
    (grammar / "data" / "tiny").unlink()
    recipe = prepare.load_recipe(
        grammar_set.parent / "tiny.yaml", [f"input={grammar_set.parent / 'text.jsonl'}", "vocab_size=290"]
    )
    prepare.prepare(recipe, grammar / "data" / "tiny", console=CONSOLE)
    with pytest.raises(ValueError, match="fingerprint"):
        train(settings("train.steps=4"), console=CONSOLE)


# More than one data set, packing, token files


def write_characters(path: Path, words: list[str], seed: int) -> None:
    """A set as nanoGPT prepares characters: bare uint16 ids and, once converted, a meta.json."""
    path.mkdir(parents=True)
    chars = sorted(set(" .\nabcdefghijklmnopqrstuvwxyz"))
    stoi = {c: i for i, c in enumerate(chars)}
    (path / "meta.json").write_text(json.dumps({"vocab_size": len(chars), "stoi": stoi}))
    draw = random.Random(seed)
    for split, n in (("train", 1500), ("val", 150)):
        text = " ".join(draw.choices(words, k=n)) + ".\n"
        (path / f"{split}.bin").write_bytes(np.array([stoi[c] for c in text], "<u2").tobytes())


MIXED = ("data.path=null", "data.mixture={data/cats: 0.7, data/plants: 0.3}")


@pytest.fixture
def two_sets(grammar: Path) -> Path:
    write_characters(grammar / "data" / "cats", ["the cat", "a dog", "my bird", "sees", "hears"], 1)
    write_characters(grammar / "data" / "plants", ["willow", "bamboo", "orchid", "pine"], 2)
    return grammar


def test_a_stopped_run_on_a_mixture_continues_as_if_it_had_not_been_stopped(
    two_sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings("name=whole", *MIXED), console=CONSOLE)
    for step in (3, 7):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(signals.Stopped, match=f"step {step}"):
                train(settings(*MIXED), console=CONSOLE)
    train(settings(*MIXED), console=CONSOLE)
    assert curve("tiny") == curve("whole")
    assert weights("tiny", 12) == weights("whole", 12)
    train(settings("name=other", "data.path=null", "data.mixture={data/cats: 0.3, data/plants: 0.7}"), console=CONSOLE)
    assert curve("other") != curve("whole")


def test_every_source_of_a_mixture_is_learned_and_scored(two_sets: Path) -> None:
    train(settings(*MIXED, "train.steps=60", "eval.every=30", "eval.tokens=null"), console=CONSOLE)
    first, last = metrics("tiny", "eval")
    n_bytes = {name: (two_sets / name / "val.bin").stat().st_size / 2 for name in ("data/cats", "data/plants")}
    for line in (first, last):
        assert line["sources"].keys() == n_bytes.keys()
        total = sum(line["sources"][name] * n for name, n in n_bytes.items())
        assert line["val_bpb"] == pytest.approx(total / sum(n_bytes.values()), rel=1e-9)
    assert all(last["sources"][name] < first["sources"][name] for name in n_bytes)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_masked_documents_are_learned_and_continue_after_a_stop(
    grammar: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    masked = (f"data.packing={packing}", "data.document_mask=true", "train.steps=24", "eval.every=12")
    train(settings("name=whole", *masked), console=CONSOLE)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(signals.Stopped):
            train(settings(*masked), console=CONSOLE)
    train(settings(*masked), console=CONSOLE)
    assert weights("tiny", 24) == weights("whole", 24)
    first, last = metrics("tiny", "eval")
    assert last["val_bpb"] < first["val_bpb"]
    train(settings("name=unmasked", f"data.packing={packing}", "train.steps=24", "eval.every=12"), console=CONSOLE)
    assert weights("unmasked", 24) != weights("whole", 24)


def test_llm_c_s_token_files_train_as_they_stand(grammar: Path, grammar_set: Path) -> None:
    prepared = TokenSet(grammar_set, "train")
    (grammar / "data" / "bins").mkdir()
    for split in ("train", "val"):
        tokens = TokenSet(grammar_set, split)
        ids = tokens.read(0, tokens.n_tokens).astype("<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (grammar / "data" / "bins" / f"tiny_{split}_000001.bin").write_bytes(header.tobytes() + ids.tobytes())
    train(settings("name=prepared"), console=CONSOLE)
    train(settings("name=bins", "data.path=data/bins", f"data.tokenizer={prepared.path}"), console=CONSOLE)
    assert weights("bins", 12) == weights("prepared", 12)
    assert [e["val_bpb"] for e in metrics("bins", "eval")] == [e["val_bpb"] for e in metrics("prepared", "eval")]


def test_nano_gpt_s_token_files_train_as_they_stand(two_sets: Path) -> None:
    train(settings("data.path=data/cats", "train.steps=60", "eval.every=30"), console=CONSOLE)
    first, last = metrics("tiny", "eval")
    assert last["val_bpb"] < first["val_bpb"] < 6
    assert "sources" not in last, "there is one"


def test_what_is_read_and_how_often_is_said_before_the_first_update(two_sets: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=200)
    given = settings(*MIXED, "train.steps=150", "train.batch_tokens=1024", "log.every=1", "eval.every=150")
    with pytest.raises(signals.Stopped):
        train(given, updates=1, console=console)
    text = console.export_text()
    assert "data/cats: 70.0% of what is read" in text
    assert -1 < text.index("warning: data/plants is read") < text.index("step 1/150")


def test_a_source_is_not_kept_in_memory_beside_the_model_that_began_as_it(
    grammar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings("train.steps=4"), console=CONSOLE)
    alive, original = [], trainer.update

    def counted(*args: Any) -> Any:
        gc.collect()
        alive.append(sum(type(each) is GPT and each not in earlier for each in gc.get_objects()))
        return original(*args)

    monkeypatch.setattr(trainer, "update", counted)
    earlier = weakref.WeakSet(each for each in gc.get_objects() if type(each) is GPT)
    train(settings("name=tuned", "init_from=runs/tiny", "train.steps=4"), console=CONSOLE)
    assert alive == [1] * 5  # one of them the preflight's


@pytest.mark.parametrize(
    ("n", "sampling", "said"), [(Sizes(shard=2), True, 2), (Sizes(shard=2), False, 1), (Sizes(2), True, 1)]
)
def test_ranks_say_how_they_share_the_work_and_that_none_can_sample(n: Sizes, sampling: bool, said: int) -> None:
    lines: list[str] = []
    trainer._say_ranks(SimpleNamespace(n=n, team=SimpleNamespace(size=2), canonical=False), sampling, lines.append)
    assert lines[0].startswith("ranks: 2 (") and len(lines) == said
    assert all("samples: left out" in line for line in lines[1:])


def test_a_small_model_s_run_goes_on_with_the_one_thread_that_it_chose(
    grammar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "n_cores", lambda: 2)
    before, console = torch.get_num_threads(), Console(record=True, file=io.StringIO())
    try:
        for updates in (2, None):
            with contextlib.suppress(signals.Stopped):
                train(settings("train.threads=auto", "train.device=cpu"), updates=updates, console=console)
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert "threads: 1 (" in console.export_text()
    kept = config.load(TrainConfig, Path("runs/tiny/config.yaml"), []).choices
    assert kept is not None and kept.threads == 1
