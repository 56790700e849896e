"""Evaluation against the slow way: window by window, token by token."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MemorySplit, write_model

from gpt import evaluate as evaluation
from gpt import hf, runtime, shards
from gpt import tokenizer as tokenizers
from gpt.data import Data, DataConfig, Part, open_data
from gpt.durable import Directory
from gpt.evaluate import EvalConfig, Evaluation, evaluate, evaluated, learned, limits, views
from gpt.loss import NextToken
from gpt.model import GPT, ModelConfig, init_weights
from gpt.shards import Span, TokenSet
from gpt.tokenizer import Tokenizer

Build = Callable[..., GPT]
Split = Callable[..., TokenSet]
LETTERS: Any = SimpleNamespace(byte_lengths=np.arange(64))  # a tokenizer: token n stands for n bytes
LENGTHS = (9, 1, 20, 14)  # 44 tokens: ids below the small models' vocabulary of 64


def scored(
    model: GPT,
    tokens: TokenSet,
    max_tokens: int | None = None,
    *,
    seq_len: int = 8,
    batch_rows: int = 3,
    dtype: str = "float32",
) -> Evaluation:
    config = EvalConfig(tokens=max_tokens)
    return evaluate(
        NextToken(model),
        {"text": tokens},
        config,
        LETTERS,
        seq_len=seq_len,
        batch_rows=batch_rows,
        device="cpu",
        dtype=dtype,
    )


@torch.inference_mode()
def slowly(model: GPT, ids: list[int], seq_len: int, n_bytes: int) -> Evaluation:
    """One forward pass per window, each target looked up alone; the target of the last token is the first."""
    nats = 0.0
    for start in range(0, len(ids), seq_len):
        window = ids[start : start + seq_len]
        log_p = model(torch.tensor([window]))[0].double().log_softmax(dim=-1)
        nats -= sum(log_p[i, ids[(start + i + 1) % len(ids)]].item() for i in range(len(window)))
    bpb = nats / math.log(2) / n_bytes
    return Evaluation(val_loss=nats / len(ids), val_bpb=bpb, sources={"text": bpb})


@pytest.mark.parametrize("seq_len", [1, 7, 8, 32])
def test_scores_are_those_of_the_slow_way(build: Build, split: Split, seq_len: int) -> None:
    model, tokens = build(), split(*LENGTHS)
    ours, slow = (
        scored(model, tokens, seq_len=seq_len),
        slowly(model, tokens.read(0, 44).tolist(), seq_len, n_bytes=440),
    )
    assert ours.val_loss == pytest.approx(slow.val_loss, rel=1e-6)
    assert ours.val_bpb == pytest.approx(slow.val_bpb, rel=1e-6)


@pytest.mark.parametrize(("max_tokens", "whole"), [(1, 9), (9, 9), (10, 10), (11, 30), (40, 44), (1000, 44)])
def test_a_partial_score_is_that_of_its_whole_documents(
    build: Build, split: Split, max_tokens: int, whole: int
) -> None:
    model, tokens = build(), split(*LENGTHS)
    slow = slowly(model, tokens.read(0, whole).tolist(), 8, n_bytes=10 * whole)
    ours = scored(model, tokens, max_tokens)
    assert (ours.val_loss, ours.val_bpb) == pytest.approx((slow.val_loss, slow.val_bpb), rel=1e-6)


def test_scores_do_not_depend_on_the_rows_of_a_batch(build: Build, split: Split) -> None:
    model, tokens = build(), split(*LENGTHS)
    scores = [scored(model, tokens, batch_rows=rows).val_loss for rows in (1, 2, 5, 100)]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-6)


def test_a_model_that_knows_nothing_scores_the_logarithm_of_its_vocabulary(build: Build, split: Split) -> None:
    model = build()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = scored(model, split(*LENGTHS))
    assert score.val_loss == pytest.approx(math.log(64), rel=1e-6)
    assert score.val_bpb == pytest.approx(44 * 6 / 440, rel=1e-6)  # 6 bits for each of 44 targets


def test_bf16_scores_are_close(build: Build, split: Split) -> None:
    model, tokens = build(init_std=0.1), split(*LENGTHS)
    assert scored(model, tokens, dtype="bfloat16").val_loss == pytest.approx(scored(model, tokens).val_loss, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_is_without_dropout_and_leaves_the_mode_as_found(
    build: Build, split: Split, training: bool
) -> None:
    model, tokens = build(dropout=0.5).train(training), split(*LENGTHS)
    objective = NextToken(model).train(training)
    score = evaluate(
        objective, {"text": tokens}, EvalConfig(), LETTERS, seq_len=8, batch_rows=2, device="cpu", dtype="float32"
    )
    assert score == scored(build(), tokens, batch_rows=2)
    assert all(module.training is training for module in objective.modules())


def test_an_evaluation_leaves_no_gradient_and_draws_nothing(build: Build, split: Split) -> None:
    model, before = build().train(), torch.get_rng_state()
    scored(model, split(*LENGTHS))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


# Several sources


def test_sources_add_up_to_the_whole(build: Build, split: Split) -> None:
    model, parts = build(), {"a": split(9, 1), "b": split(20), "c": split(14, 3, 8)}
    every = EvalConfig()
    at = {"seq_len": 8, "batch_rows": 3, "device": "cpu", "dtype": "float32"}
    whole = evaluate(NextToken(model), parts, every, LETTERS, **at)
    alone = {name: evaluate(NextToken(model), {name: tokens}, every, LETTERS, **at) for name, tokens in parts.items()}
    assert whole.sources == {name: score.val_bpb for name, score in alone.items()}
    n_bytes = {name: tokens.n_bytes for name, tokens in parts.items()}
    n_tokens = {name: tokens.n_tokens for name, tokens in parts.items()}
    bits, nats = (
        sum(n_bytes[name] * score.val_bpb for name, score in alone.items()),
        sum(n_tokens[name] * score.val_loss for name, score in alone.items()),
    )
    assert whole.val_bpb == pytest.approx(bits / sum(n_bytes.values()), rel=1e-9)
    assert whole.val_loss == pytest.approx(nats / sum(n_tokens.values()), rel=1e-9)


def test_a_limit_is_shared_in_proportion_and_every_source_is_read(split: Split) -> None:
    parts = {"large": split(*[10] * 80), "small": split(*[10] * 20), "one": split(5)}
    each = limits(parts, 100)
    assert each["large"] == pytest.approx(4 * each["small"], abs=3) and each["one"] >= 1
    assert evaluated(parts, 100) == 80 + 20 + 5
    assert evaluated(parts, 1) == 10 + 10 + 5, "a document of each"
    assert evaluated(parts, None) == evaluated(parts, 10**9) == 1005
    alone = {"text": split(*LENGTHS)}
    assert limits(alone, 10) == {"text": 10}


def test_sources_are_named_by_their_data_set_where_there_are_several(split: Split) -> None:
    def part(name: str, *by: int) -> Part:
        tokens = replace(split(*[5] * len(by), by=by), path=Path(name))
        return Part(name, tokens, tokens)

    def names(*parts: Part) -> list[str]:
        return list(views(Data(list(parts), None, "")))  # type: ignore[arg-type]

    assert names(part("data/a", 0, 1, 1)) == ["memory", "another"]
    assert names(part("data/a", 0)) == ["memory"]
    assert names(part("data/a", 0), part("data/b", 1, 2)) == ["data/a", "data/b/another", "data/b/third"]


def test_documents_are_scored_alone_where_the_mask_says_so(build: Build, split: Split) -> None:
    """In a window the second document does not see the first."""
    model, tokens = build(), split(5, 3)
    at = {"seq_len": 8, "batch_rows": 1, "device": "cpu", "dtype": "float32"}
    ours = evaluate(NextToken(model), {"text": tokens}, EvalConfig(), LETTERS, **at, document_mask=True)
    ids = tokens.read(0, 8).tolist()
    alone = [slowly(model, part, 8, 10 * len(part)) for part in (ids[:5], ids[5:])]
    assert ours.val_loss == pytest.approx(sum(s.val_loss * n for s, n in zip(alone, (5, 3), strict=True)) / 8, rel=1e-6)
    unmasked = evaluate(NextToken(model), {"text": tokens}, EvalConfig(), LETTERS, **at)
    assert abs(unmasked.val_loss - ours.val_loss) > 1e-3


@torch.inference_mode()
def test_where_only_a_part_is_learned_its_own_bytes_count(build: Build, split: Split) -> None:
    @dataclass(frozen=True)
    class Prompted(MemorySplit):
        """Tokens 3 .. 8 are learned."""

        has_spans: bool = True

        def spans(self, start: int, count: int) -> list[Span]:
            return [Span(3, 9, "train")] if start < 9 and start + count > 3 else []

    model, tokens = build(), Prompted((9, 5))
    score = evaluate(
        NextToken(model),
        {"text": tokens},
        EvalConfig(),
        LETTERS,
        seq_len=14,
        batch_rows=1,
        device="cpu",
        dtype="float32",
    )
    log_p = model(torch.tensor(tokens.ids[None]))[0].log_softmax(dim=-1)
    nats = -sum(float(log_p[at - 1, tokens.ids[at]]) for at in range(3, 9))
    assert learned({"text": tokens}, None) == 6 and learned({"text": split(9, 5)}, None) == 14
    assert score.val_loss == pytest.approx(nats / 6, rel=1e-5)
    assert score.val_bpb == pytest.approx(nats / math.log(2) / sum(range(4, 10)), rel=1e-5)


# The verb


TEXT = "The capital of Peru is Lima.\nThe capital of Cuba is Havana.\n"
QUESTION = {"question": "The capital of Peru is", "choices": ["Rome.", "Lima."], "answer": "B"}


@pytest.fixture
def run_dir(pupil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with the settings it was trained by, its data set, a text and a task; the directory they stand in."""
    monkeypatch.setattr(runtime, "setup", lambda device, threads: None)
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.load(pupil)
    made_with = {"vocab_size": tokenizer.size, "tokenizer_sha256": tokenizer.sha256}
    with Directory(tmp_path / "data") as directory:
        documents = [
            shards.Document([tokenizer.start_id, *tokenizer.encode(text)], len(text.encode()), i % 2)
            for i, text in enumerate([*TEXT.splitlines(), "is of the capital", "Lima"])
        ]
        splits = {
            name: [shards.write_shard(directory, f"{name}.tok", documents, **made_with)] for name in ("train", "val")
        }
        for name, content in tokenizer.files().items():
            directory.write(name, content)
        about = {"start_id": tokenizer.start_id, "sources": ["atlas", "noise"], "settings": {}}
        shards.write_manifest(directory, splits=splits, **about, **made_with)
    shutil.copytree(pupil, tmp_path / "model")
    (tmp_path / "model" / "run.yaml").write_text(
        "data: {path: data, seq_len: 8, document_mask: true}\neval: {tokens: 9}\n"
    )
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "task.jsonl").write_text(json.dumps(QUESTION) + "\n")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    """The JSON object that the command prints."""
    evaluation.main([*map(str, args), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)["sources"]


def test_a_run_is_scored_on_its_own_split_as_training_does(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = said(capsys, "model")
    (own,) = report["texts"]
    model, tokenizer = hf.load(run_dir / "model")
    data = open_data(DataConfig(path="data", seq_len=8, document_mask=True))
    trained = evaluate(
        NextToken(model),
        views(data),
        EvalConfig(tokens=9),
        tokenizer,
        seq_len=8,
        batch_rows=2,
        device="cpu",
        dtype="float32",
        document_mask=True,
    )
    assert own["bits_per_byte"] == pytest.approx(trained.val_bpb, rel=1e-6)
    assert own["sources"] == pytest.approx(trained.sources, rel=1e-6)
    assert math.log(own["token_perplexity"]) == pytest.approx(trained.val_loss, rel=1e-6)
    assert own["n_documents"] == 2
    n_words = len(TEXT.split())  # the first document of each source is read, of two that are alike
    assert math.log(own["word_perplexity"]) == pytest.approx(trained.val_loss * own["n_tokens"] / n_words, rel=1e-6)


def test_texts_are_scored_as_if_they_had_been_prepared(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "model" / "run.yaml").unlink()
    (report,) = said(capsys, "model", "--text", "text.txt", "--context", 8)
    (reading,) = report["texts"]
    model, tokenizer = hf.load(run_dir / "model")
    ids = [tokenizer.start_id, *tokenizer.encode(TEXT)]
    slow = slowly(model, ids, 8, len(TEXT.encode()))
    assert reading["bits_per_byte"] == pytest.approx(slow.val_bpb, rel=1e-5)
    assert math.log(reading["token_perplexity"]) == pytest.approx(slow.val_loss, rel=1e-5)
    assert math.log(reading["word_perplexity"]) == pytest.approx(slow.val_loss * len(ids) / 12, rel=1e-5)
    assert (reading["n_tokens"], reading["n_documents"], reading["context"]) == (len(ids), 1, 8)
    (whole,) = said(capsys, "model", "--text", "text.txt")
    assert whole["texts"][0]["context"] == 64
    assert whole["texts"][0]["bits_per_byte"] != reading["bits_per_byte"]


def test_several_sources_stand_side_by_side(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["model", "other", "--text", "text.txt", "--tasks", "task.jsonl"]
    shutil.copytree(run_dir / "model", run_dir / "other")
    one, two = said(capsys, *both)
    assert one | {"source": "", "path": ""} == two | {"source": "", "path": ""}
    assert one["tasks"] == [
        {
            "name": "task.jsonl",
            "kind": "multiple choice",
            "n": 1,
            "n_cut": 0,
            "acc": {"value": 1.0, "stderr": None},
            "acc_norm": {"value": 1.0, "stderr": None},
        }
    ]
    evaluation.main([*both, "--device", "cpu"])
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["on", "measure", "model", "other"]
    bits = f"{one['texts'][0]['bits_per_byte']:.4f}"
    assert ["text.txt", "bits", "per", "byte", bits, bits] in rows
    assert ["task.jsonl", "(1)", "acc", "1.0000", "1.0000"] in rows
    assert err == "model\nother\n"


def test_what_does_not_compare_is_said(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tokenizers.train([TEXT], "char", None)
    config = ModelConfig(vocab_size=other.padded_size, max_seq_len=16, n_layer=1, d_model=8, n_head=1)
    model = GPT(config)
    init_weights(model, 1)
    (run_dir / "small").mkdir()
    write_model(run_dir / "small", model, other)
    (run_dir / "task.jsonl").write_text(json.dumps(QUESTION | {"question": "of " * 40}) + "\n")
    evaluation.main(["model", "small", "--text", "text.txt", "--tasks", "task.jsonl", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "The tokenizers differ: perplexity per token does not compare, the other measures do." in out
    assert "The windows differ (tokens: model 64, small 16)" in out
    assert "small was shown only the end of 1 of 1 prompts of task.jsonl." in out


def test_documents_that_one_run_reads_apart_and_another_does_not_are_said_to_be(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir / "model", run_dir / "base")
    (run_dir / "base" / "run.yaml").unlink()
    (run_dir / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (run_dir / "texts" / name).write_text(TEXT)
    note = "Only model read each document without those before it, as in training (document_mask)."
    for sources, text, said in (
        (["base", "model"], "texts", True),
        (["base", "model"], "text.txt", False),
        (["base", "base"], "texts", False),
    ):
        evaluation.main([*sources, "--text", text, "--device", "cpu"])
        assert (note in " ".join(capsys.readouterr().out.split())) is said


def test_runs_that_read_other_shares_of_one_split_do_not_compare(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir / "model", run_dir / "whole")
    (run_dir / "whole" / "run.yaml").write_text("data: {path: data, seq_len: 8, document_mask: true}\n")
    for sources, said in ((["model", "whole"], True), (["model", "model"], False)):
        evaluation.main([*sources, "--device", "cpu"])
        out = " ".join(capsys.readouterr().out.split())
        assert ("Each run was scored on a validation split of its own: these numbers do not compare" in out) is said


def test_a_name_that_is_no_utf8_leaves_json_that_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (run_dir / name).write_text(TEXT)
    evaluation.main(["model", "--text", name, "--json", "--device", "cpu"])
    out = capsys.readouterr().out
    assert json.loads(out.encode())["sources"][0]["texts"][0]["name"] == name


def test_what_is_not_finite_is_null_in_json() -> None:
    reading = evaluation.Reading("x", 2.0, math.inf, math.inf, 1, 9, 8, False, {"a": 1.0})
    (told,) = evaluation.as_json([evaluation.Report("r", Path("r"), "0", [reading], {})])["sources"]
    (text,) = told["texts"]
    assert (text["word_perplexity"], text["token_perplexity"], text["sources"]) == (None, None, {"a": 1.0})


MISTAKES = {
    "no split": (["plain"], "plain has no validation split of its own; name --text or --tasks"),
    "no source": (["nowhere"], "'nowhere' does not exist"),
    "no text": (["model", "--text", "nowhere.txt"], "nowhere.txt: no such file"),
    "no task": (["model", "--tasks", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "line": (["model", "--tasks", "broken.jsonl"], "broken.jsonl:2: broken JSON"),
    "context": (["model", "--text", "text.txt", "--context", "65"], "--context 65 is more than the 64 tokens"),
}


@pytest.mark.parametrize(("args", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_answered_in_words(run_dir: Path, args: list[str], message: str) -> None:
    shutil.copytree(run_dir / "model", run_dir / "plain")
    (run_dir / "plain" / "run.yaml").unlink()
    (run_dir / "broken.jsonl").write_text(json.dumps(QUESTION) + "\n{\n")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        evaluation.main([*args, "--device", "cpu"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--chat"], "--chat and --stop are about questions"),
        (["--limit", "3"], "--limit is about --text and --tasks"),
        (["--context", "3"], "--context is about --text"),
        (["--context", "3", "--tasks", "a"], "--context is about --text"),
        (["--text", "a", "--limit", "0"], "expected a whole number from 1 on, got '0'"),
    ],
)
def test_flags_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        evaluation.arguments(["runs/x", *args])
    assert message in capsys.readouterr().err


def test_a_control_character_in_a_name_reaches_no_terminal(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "\x1b[31m.txt").write_text(TEXT)
    evaluation.main(["model", "--text", "\x1b[31m.txt", "--device", "cpu"])
    assert "\x1b" not in capsys.readouterr().out


def test_a_split_of_preferences_is_no_text_to_score(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(DataConfig(path="data", seq_len=8))
    monkeypatch.setattr(data.parts[0].val, "pairs", True)
    monkeypatch.setattr(evaluation, "open_data", lambda config: data)
    with pytest.raises(ValueError, match="model was tuned on preferences, which are no text to expect"):
        evaluation.main(["model", "--device", "cpu"])
