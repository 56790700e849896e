"""What a run is before step 1: the settings that must agree, the model it starts from, and what it says of its data."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gpt import config, division, growth, hf, memory, resume, runtime, settle, tokenizer, trainer
from gpt.data import Data, Loader, open_data
from gpt.durable import CorruptError
from gpt.loss import NextToken
from gpt.model import GPT, init_weights
from gpt.parts import Parts
from gpt.plan import Choices
from gpt.ranks import Ranks, Sizes
from gpt.run import RunDirectory
from gpt.settle import TrainConfig
from gpt.tokenizer import Tokenizer
from gpt.trainer import train

CONSOLE = Console(quiet=True)
SETTINGS = """
name: tiny
data: {path: data/cats, seq_len: 16}
model: {n_layer: 1, d_model: 16, n_head: 2}
train: {steps: 3, batch_tokens: 64, micro_batch: 4, compile: false, threads: 1, device: cpu}
optim: {kind: adamw, lr: 0.01}
eval: {every: 3, tokens: 100}
checkpoint: {every: 3, keep: 1}
log: {every: 1}
"""
WORDS = ["the cat", "a dog", "my bird", "sees", "hears", "likes", "the sun", "a tree", "the rain", "today", "never"]


def sentences(seed: int, n: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) + "." for _ in range(n)]


PLANTS = ["chrysanthemum", "willow", "bamboo", "orchid", "plum blossom", "pine", "lotus", "peony", "maple", "cassia"]


def plants(seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(PLANTS, k=20)) for _ in range(50)]


def write_set(path: Path, vocabulary: Tokenizer, seed: int, n: int = 60) -> None:
    """Token files as llm.c writes them, in `path`."""
    path.mkdir(parents=True)
    for split, texts in (("train", sentences(seed, n)), ("val", sentences(seed + 100, 10))):
        ids = [i for text in texts for i in [vocabulary.start_id, *vocabulary.encode(text)]]
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (path / f"x_{split}.bin").write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer.train(sentences(1, 60), "bpe", 300)


@pytest.fixture
def here(vocabulary: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two small data sets and their tokenizer in vocab/."""
    monkeypatch.chdir(tmp_path)
    Path("vocab").mkdir()
    for name, content in vocabulary.files().items():
        Path("vocab", name).write_bytes(content)
    write_set(Path("data/cats"), vocabulary, 1)
    write_set(Path("data/dogs"), vocabulary, 2, 200)
    Path("tiny.yaml").write_text(SETTINGS)
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def settings(*overrides: str) -> TrainConfig:
    return config.load(TrainConfig, Path("tiny.yaml"), ["data.tokenizer=vocab", *overrides])


MIXTURE = ("data.path=null", "data.mixture={data/cats: 0.75, data/dogs: 0.25}")


def opened(*overrides: str) -> tuple[TrainConfig, Data]:
    given = settings(*overrides)
    return given, open_data(given.data)


def agreed(given: TrainConfig, data: Data, source: GPT | None = None) -> TrainConfig:
    return settle.agree(given, RunDirectory(Path("runs"), given.name), data, source, resume.origin(given, None))


def chosen(data: Data, **others: object) -> Choices:
    facts = {"device": "cpu", "dtype": "float32", "compile": False, "micro_batch": 4, "threads": 1, "steps": 3}
    return Choices(**(facts | {"data": data.fingerprint, "torch": "", "cpu": ""} | others))


def test_what_is_left_open_of_the_model_follows_from_the_data(here: Path) -> None:
    given, data = opened()
    model = agreed(given, data).model
    assert (model.vocab_size, model.max_seq_len) == (data.tokenizer.padded_size, 16)
    given, data = opened("model.vocab_size=512", "model.max_seq_len=8")
    with pytest.raises(ValueError, match=r"data.seq_len \(16\) exceeds the model's context \(8\)"):
        agreed(given, data)


def test_a_batch_that_is_no_whole_number_of_rows_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_tokens \(65\) must be a multiple of data.seq_len \(16\)"):
        settle.check(settings("train.batch_tokens=65"))


def test_several_ranks_are_not_sent_to_one_apple_gpu(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "best_device", lambda: ("mps", "Apple GPU"))
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"2 ranks cannot compute on one Apple GPU: .*set train.device=cpu"):
        settle.check(settings("train.device=auto", "train.micro_batch=2"))


def test_other_shares_of_a_mixture_are_another_run(here: Path) -> None:
    given, data = opened(*MIXTURE)
    run = RunDirectory(Path("runs"), "tiny")
    first = agreed(given, data).model_copy(update={"choices": chosen(data)})
    run.config_path.write_text(config.dump(first))
    assert agreed(given, data) == first
    other = settings("data.path=null", "data.mixture={data/cats: 0.5, data/dogs: 0.5}")
    with pytest.raises(ValueError, match=r"(?s)data.mixture.data/cats: 0.75 -> 0.5.*name=NEW.*--fresh"):
        agreed(other, data)


def test_a_mixture_of_other_contents_is_refused_on_resume(here: Path, vocabulary: Tokenizer) -> None:
    given, data = opened(*MIXTURE)
    settled = given.model_copy(update={"choices": chosen(data)})
    agreed(settled, data)
    for file in Path("data/dogs").iterdir():
        file.unlink()
    Path("data/dogs").rmdir()
    write_set(Path("data/dogs"), vocabulary, 3)
    with pytest.raises(ValueError, match=r"data/cats, data/dogs is not the data set.*fingerprint"):
        agreed(settled, open_data(given.data))


def test_choices_made_for_other_ranks_are_dealt_to_these(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the settings that a new run begins with: 12 rows by fours would leave 2 ranks with one pass each, and 4 rows unread."""
    given, data = opened("train.batch_tokens=192", "train.micro_batch=auto")
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    for chosen_rows, dealt in ((4, 2), (12, 6), (3, 3)):
        config = agreed(given.model_copy(update={"choices": chosen(data, micro_batch=chosen_rows)}), data)
        assert config.choices.micro_batch == dealt and config.train.micro_batch == "auto"
    asked = given.model_copy(update={"train": given.train.model_copy(update={"micro_batch": 3})})
    with pytest.raises(ValueError, match=r"micro_batch asks for 3, the choices in the settings say 2"):
        agreed(asked.model_copy(update={"choices": chosen(data, micro_batch=4)}), data)


def test_a_micro_batch_that_nobody_asks_for_any_more_is_dealt_as_well(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, data = opened()  # 4 rows by fours
    run = RunDirectory(Path("runs"), "tiny")
    first = agreed(given, data).model_copy(update={"choices": chosen(data)})
    run.config_path.write_text(config.dump(first))
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    found = agreed(opened("train.micro_batch=auto")[0], data)
    assert (found.train.micro_batch, found.choices.micro_batch) == (2, 2)


def test_choices_that_contradict_the_settings_are_refused(here: Path) -> None:
    given, data = opened()
    with pytest.raises(ValueError, match=r"train.steps asks for 3, the choices in the settings say 5; choices=null"):
        agreed(given.model_copy(update={"choices": chosen(data, steps=5)}), data)


def test_choices_of_a_run_before_there_was_a_choice_of_kernels_are_read(here: Path) -> None:
    _, data = opened()
    old = {name: value for name, value in chosen(data).model_dump().items() if name != "attention"}
    assert Choices(**old).attention == "dense"


# Starting from other weights


def start(model_dir: Path, *overrides: str) -> tuple[GPT, TrainConfig, list[str]]:
    """(the model that init_from gives, the agreed settings, what was said)."""
    said: list[str] = []
    Path("tune.yaml").write_text(SETTINGS.replace("model: {n_layer: 1, d_model: 16, n_head: 2}", ""))
    given = config.load(TrainConfig, Path("tune.yaml"), ["name=tuned", f"init_from={model_dir}", *overrides])
    data = open_data(given.data)
    model = settle.source(given, data, settle.begun_from(given, None), said.append)
    assert model is not None
    return model, agreed(given, data, model), said


def test_where_a_run_begins_is_looked_up_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that it begins from goes on, and may find a better checkpoint."""
    given = settings("init_from=runs/tiny", "model={}")
    found = iter((Path(name), name) for name in ("runs/tiny/checkpoints/step_1", "runs/tiny/checkpoints/step_2"))
    monkeypatch.setattr(settle, "resolve", lambda source: next(found))
    begun = settle.begun_from(given, None)
    assert begun() == begun() == (Path("runs/tiny/checkpoints/step_1"), "runs/tiny/checkpoints/step_1")


@pytest.fixture
def trained(here: Path) -> Path:
    train(settings(), console=CONSOLE)
    return Path("runs/tiny")


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_grown_vocabulary_grows_the_model_and_leaves_what_it_knew(
    here: Path, vocabulary: Tokenizer, tied: str
) -> None:
    train(settings(f"model.tie_embeddings={tied}"), console=CONSOLE)
    before, _ = hf.load(Path("runs/tiny/checkpoints/step_00000003"))
    grown = growth.learn(vocabulary, plants(7), 30)
    Path("grown").mkdir()
    for name, content in grown.files().items():
        Path("grown", name).write_bytes(content)
    write_set(Path("data/new"), grown, 7)
    model, settled, said = start(Path("runs/tiny"), "data.path=data/new", "data.tokenizer=grown")
    assert settled.model.vocab_size == grown.padded_size > vocabulary.padded_size
    assert any("30 new tokens" in line for line in said)
    for name, old in before.state_dict().items():
        assert torch.equal(model.state_dict()[name][: len(old)][: vocabulary.size], old[: vocabulary.size]), name
    ids = torch.tensor([vocabulary.encode("the cat sees a dog")])
    assert torch.equal(model(ids)[..., : vocabulary.size], before(ids)[..., : vocabulary.size])
    embedding = model.model.embed_tokens.weight
    for token, pieces in growth.replaced(vocabulary, grown).items():
        torch.testing.assert_close(embedding[token], embedding[list(pieces)].mean(dim=0))
    tuned = config.load(
        TrainConfig,
        Path("tune.yaml"),
        ["init_from=runs/tiny", "name=tuned", "data.path=data/new", "data.tokenizer=grown"],
    )
    train(tuned, console=CONSOLE)
    model, kept = hf.load(Path("runs/tuned/checkpoints/step_00000003"))
    assert kept.sha256 == grown.sha256 and model.config.vocab_size == grown.padded_size
    train(tuned, console=CONSOLE)  # and it resumes without complaint


def test_a_tokenizer_that_is_no_growth_of_the_source_s_is_refused(trained: Path) -> None:
    other = tokenizer.train(plants(5), "bpe", 290)
    Path("other").mkdir()
    for name, content in other.files().items():
        Path("other", name).write_bytes(content)
    write_set(Path("data/other"), other, 5)
    with pytest.raises(
        ValueError, match=r"(?s)data/other was prepared with another tokenizer than runs/tiny.*--tokenizer runs/tiny"
    ):
        start(trained, "data.path=data/other", "data.tokenizer=other")


def test_another_shape_than_the_source_s_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"remove model.d_model"):
        start(trained, "data.tokenizer=vocab", "model.d_model=64")


def test_what_contradicts_the_model_is_refused_on_a_resume_too(trained: Path) -> None:
    train(settings("init_from=runs/tiny", "name=tuned", "model={}", "train.steps=2"), console=CONSOLE)
    given = settings("init_from=runs/tiny", "name=tuned", "model={n_layer: 3}", "train.steps=2")
    with pytest.raises(ValueError, match=r"model\.n_layer: 1 -> 3"):
        train(given, console=CONSOLE)


# What it says of its data


def said_of(*overrides: str) -> list[str]:
    given, data = opened(*overrides)
    loader = Loader(data, given.data, settle.rows(given), given.seed)
    lines: list[str] = []
    model = GPT(agreed(given, data).model)
    ready = given.model_copy(update={"choices": chosen(data, steps=given.train.steps)})

    def update(*_: object) -> None:
        raise AssertionError("nothing is measured where everything is chosen")

    fill, elapsed, parts = lambda: init_weights(model, 1), lambda: 0.0, Parts(Ranks(), model)
    rehearse = lambda config, optimizer: False  # noqa: E731
    settle.settle(ready, NextToken(model), None, fill, data, loader, update, elapsed, lines.append, parts, rehearse)
    return lines


def test_the_epochs_of_each_component_are_said_and_many_are_warned_of(here: Path) -> None:
    lines = said_of(*MIXTURE, "train.steps=1000", "train.batch_tokens=64")
    data = opened(*MIXTURE)[1]
    times = {part.name: part.weight * 4000 / (-(-part.n_tokens // 16) + 1) for part in data.parts}
    assert times["data/cats"] > 4
    shares = [line for line in lines if "of what is read" in line]
    assert [line.split(":")[0].strip() for line in shares] == ["data/cats", "data/dogs"]
    for line, (_, expected) in zip(shares, times.items(), strict=True):
        assert float(line.split(", ")[-1].split()[0]) == pytest.approx(expected, rel=0.02, abs=0.06)
    warned = [line for line in lines if line.startswith("warning")]
    assert [line.split()[1] for line in warned] == [name for name, n in times.items() if n > 4]
    assert not [line for line in said_of("train.steps=3") if "warning" in line]


def test_packing_says_what_it_wastes_and_what_it_cuts(here: Path) -> None:
    (line,) = [line for line in said_of("data.packing=documents") if line.startswith("packing")]
    data = opened()[1]
    lengths = np.diff(data.parts[0].train.document_starts, append=data.n_tokens)
    assert f"{(lengths > 16).sum()} of 60 documents are longer than a row" in line
    assert "% padding" in line


def test_damage_found_while_opening_is_said_as_such(here: Path) -> None:
    Path("data/cats/manifest.json").write_text(json.dumps({}))
    with pytest.raises(CorruptError):
        opened()


# The micro-batch


def test_what_surely_fits_is_not_gone_through_and_the_rest_is_held_against_what_is_free(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, data = opened()
    shape, of = agreed(given, data).model, settle.setting(given, "cpu", "float32")
    with monkeypatch.context() as patch:
        patch.setattr(memory, "need", lambda *_: pytest.fail("gone through"))
        assert settle.fits(shape, of, 1e12)(64)
    so_many = settle.fits(shape, of, memory.needs(shape, of)(8).total)
    assert so_many(2) and so_many(8) and not so_many(9)
    eight = memory.needs(shape, of)(8)
    assert not settle.fits(shape, of, eight.total - eight.weights)(8)
    assert settle.fits(shape, of, eight.total - eight.weights, beside=True)(8), "the weights are there already"
    shards = Sizes(1, 4, 1)
    held = division.held(eight, division.portions(shape), shards)
    room = held.total - eight.weights // 4
    fitted = settle.fits(shape, of, room, shards, beside=True), settle.fits(shape, of, room - 1, shards, beside=True)
    assert [so_many(8) for so_many in fitted] == [True, False], "what FSDP2 gathers is to come"
    dpo = replace(of, objective=of.objective.model_copy(update={"kind": "dpo"}))
    held = division.held(memory.needs(shape, dpo)(8), division.portions(shape), shards)
    room = held.total - eight.weights // 4 - eight.weights
    fitted = settle.fits(shape, dpo, room, shards, beside=True), settle.fits(shape, dpo, room - 1, shards, beside=True)
    assert [so_many(8) for so_many in fitted] == [True, False], "each rank's whole reference is there too"


def test_an_update_confirms_the_micro_batch_and_what_is_out_of_memory_is_halved(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = trainer.update, []

    def limited(
        forward: object, optimizer: object, batch: object, config: object, choices: Choices, *rest: object
    ) -> object:
        tried.append(choices.micro_batch)
        if choices.micro_batch > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(forward, optimizer, batch, config, choices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "update", limited)
    train(settings("train.micro_batch=auto", "train.steps=2"), console=CONSOLE)
    assert tried == [4, 2, 2, 2], "two tries, of which the second spares the preflight's, and two steps"
    chosen = config.load(TrainConfig, Path("runs/tiny/config.yaml"), []).choices
    assert chosen is not None and chosen.micro_batch == 2


def test_a_micro_batch_that_was_set_is_not_tried_smaller(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(trainer, "update", failing)
    with pytest.raises(torch.OutOfMemoryError, match="an update of 4 rows of 16 tokens"):
        train(settings(), console=CONSOLE)
    with pytest.raises(torch.OutOfMemoryError, match="an update of 1 rows of 16 tokens"):
        train(settings("name=other", "train.micro_batch=auto"), console=CONSOLE)
