"""lm-eval on our models: the numbers are those of its own Hugging Face backend, and mistakes are answered in words.

The proofs need lm-eval and accelerate (pip install lm_eval accelerate), which no other test needs: without them they are skipped.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt import chat, harness, hf, runtime
from gpt import tokenizer as tokenizers

ROOT = Path(__file__).resolve().parent.parent
TASKS = ["local_capitals", "local_lines", "local_answers"]
theirs_warn = pytest.mark.filterwarnings("ignore")  # what other libraries warn of as they are loaded is theirs to mend


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval, with data sets cached in a place of the test's own."""
    module = pytest.importorskip("lm_eval.tasks") and sys.modules["lm_eval"]
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    return module


def adapter(path: Path, start_token: bool = False, batch_tokens: int = 300) -> Any:
    model, tokenizer = hf.load(path)
    return harness.language_model(model, tokenizer, harness.conventions(path, tokenizer, start_token), batch_tokens)


@theirs_warn
@pytest.mark.parametrize("start_token", [False, True])
def test_local_tasks_agree_with_its_own_backend_to_the_last_digit(lm_eval: Any, pupil: Path, start_token: bool) -> None:
    pytest.importorskip("accelerate")
    told = {"pretrained": str(pupil), "dtype": "float32"} | ({"add_bos_token": True} if start_token else {})
    manager = lm_eval.tasks.TaskManager(include_path="tests/harness", include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        "hf", model_args=told, tasks=TASKS, device="cpu", batch_size=1, task_manager=manager
    )
    ours = harness.evaluate(adapter(pupil, start_token), TASKS, ["tests/harness"])
    assert harness.table(ours) == harness.table(theirs)
    assert 0.3 < ours["results"]["local_capitals"]["acc,none"] < 1
    assert 0.3 < ours["results"]["local_answers"]["exact_match,stripped"] < 1


@theirs_warn
def test_every_answer_is_its_own_backends(lm_eval: Any, pupil: Path) -> None:
    """Requests of each kind one by one: an empty context, space at a border, a text longer than the context, stops."""
    pytest.importorskip("accelerate")
    # Its cache of logits mistakes two pairs for one that are the same text parted elsewhere, as the second and third are.
    told = {"pretrained": str(pupil), "dtype": "float32", "device": "cpu", "logits_cache": False}
    theirs = lm_eval.api.registry.get_model("hf")(**told)
    ours = adapter(pupil)

    def both(kind: str, *requests: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        asked = [SimpleNamespace(args=request, task_name=None) for request in requests]
        return list(zip(getattr(ours, kind)(asked), getattr(theirs, kind)(asked), strict=True))

    long = "The capital of Peru is Lima. " * 30
    pairs = [("", "The capital"), ("The capital of ", "Peru"), ("The capital", " of Peru"), (long, "The")]
    for mine, its in both("loglikelihood", *pairs):
        assert mine == (pytest.approx(its[0], rel=1e-5), its[1])
    for mine, its in both("loglikelihood_rolling", (long,), ("of",), ("The capital",)):
        assert mine == pytest.approx(its, rel=1e-5)
    blank, merged = SimpleNamespace(args=("\n", "is")), SimpleNamespace(args=("cap", "ital"))
    assert all(logprob < 0 for logprob, _ in ours.loglikelihood([blank, merged])), "which its own refuses"
    rules = {"until": [" is", "."], "do_sample": False, "max_gen_toks": 9}
    prompts = ["The", long + "The capital", "The capital of Peru", "Capital of"]
    written = both("generate_until", *((p, dict(rules)) for p in prompts), ("The capital", {"max_gen_toks": 3}))
    assert len({mine for mine, _ in written}) > 1
    for mine, its in written:
        assert mine == its


@theirs_warn
def test_the_command_prints_its_table_or_json(
    lm_eval: Any, pupil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "setup", lambda device, threads: None)
    command = [
        str(pupil),
        "--tasks",
        "local_cap*",
        "--include-path",
        "tests/harness",
        "--device",
        "cpu",
        "--limit",
        "4",
    ]
    harness.main(command)
    said = capsys.readouterr()
    assert said.out.startswith("|    Tasks     |Version|Filter|n-shot| Metric |")
    assert str(pupil) in said.err
    harness.main([*command, "--json"])
    results = json.loads(capsys.readouterr().out)["results"]["local_capitals"]
    assert results["acc,none"] == 1


@theirs_warn
def test_mistakes_are_answered_in_words(lm_eval: Any, pupil: Path, tmp_path: Path) -> None:
    ours = adapter(pupil)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory; --include-path holds"):
        harness.evaluate(ours, TASKS, ["nowhere"])
    asked = [SimpleNamespace(args=("The", {"max_gen_toks": 64}), task_name=None)]
    with pytest.raises(ValueError, match="write 64 tokens, and its context is 64: no room for a prompt"):
        ours.generate_until(asked)
    asked = [SimpleNamespace(args=("The", {"do_sample": True, "max_gen_toks": 4}), task_name=None)]
    with pytest.raises(ValueError, match="asks for sampling or beams"):
        ours.generate_until(asked)
    asked = [SimpleNamespace(args=("The", {"repetition_penalty": 2.0, "max_gen_toks": 4}), task_name=None)]
    with pytest.raises(ValueError, match=r"generation_kwargs have repetition_penalty: 2\.0, which is not offered here"):
        ours.generate_until(asked)


@theirs_warn
def test_a_task_that_lm_eval_cannot_do_is_no_bug_of_ours(
    lm_eval: Any, pupil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        (ROOT / "tests/harness/lines.yaml").read_text().replace("local_lines", "lost").replace("{{text}}", "{{gone}}")
    )
    (tmp_path / "lost.yaml").write_text(text)
    with pytest.raises(ValueError, match="lm-eval cannot do this task: UndefinedError: 'gone' is undefined"):
        harness.evaluate(adapter(pupil), ["lost"], [str(tmp_path)])
    ours = adapter(pupil)
    monkeypatch.setattr(harness, "log_likelihoods", lambda *args: {}[0])
    with pytest.raises(KeyError):
        harness.evaluate(ours, ["local_lines"], ["tests/harness"])


@theirs_warn
@pytest.mark.slow
def test_a_task_that_nobody_knows_is_named(lm_eval: Any, pupil: Path) -> None:
    """Slow: lm-eval looks through its own tasks."""
    with pytest.raises(ValueError, match="--tasks local_none: neither a task nor a group nor a tag of lm-eval's own"):
        harness.evaluate(adapter(pupil), ["local_lines", "local_none"], ["tests/harness"])


def test_without_lm_eval_the_error_says_what_to_install(pupil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm-eval is not installed \(lm_eval\): pip install -e '\.\[eval\]'"):
        adapter(pupil)


def test_what_is_not_finite_is_null_in_json(
    pupil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtime, "setup", lambda device, threads: None)
    monkeypatch.setattr(harness, "language_model", lambda *args: None)
    found = {"results": {"x": {"perplexity,none": float("inf"), "stderr": float("nan"), "n": 3}}, "config": {}}
    monkeypatch.setattr(harness, "evaluate", lambda *args, **kwargs: found)
    harness.main([str(pupil), "--tasks", "x", "--device", "cpu", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said == {"results": {"x": {"perplexity,none": None, "stderr": None, "n": 3}}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"generation_config\.json: not JSON"),
        ("[1]", r"generation_config\.json: expected a JSON object, got list"),
        ('{"eos_token_id": [[1]]}', r"generation_config\.json: eos_token_id: expected an id or a list of ids"),
    ],
)
def test_a_file_beside_the_model_that_is_broken_is_named(pupil: Path, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        harness.conventions(tmp_path, tokenizers.Tokenizer.load(pupil))


def test_texts_begin_as_the_model_directory_says(pupil: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.load(pupil)
    start = tokenizer.start_id
    assert harness.conventions(pupil, tokenizer) == ([], chat.reply_ends(tokenizer))
    assert harness.conventions(pupil, tokenizer, start_token=True).front == [start]
    raw = dict(tokenizer.raw)
    name = next(name for name, token in tokenizer.vocab.items() if token == start)
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [start], "tokens": [name]}},
    }
    with_template = tokenizers.Tokenizer(raw, {"bos_token": name, "eos_token": name})
    assert harness.conventions(tmp_path, with_template).front == [start]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert harness.conventions(tmp_path, with_template) == ([], {tokenizer.end_id, 5, 6})
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert harness.conventions(tmp_path, tokenizer).front == [start]
