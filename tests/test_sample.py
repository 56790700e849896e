"""sample.py as a user meets it: only text on stdout, batches, JSON, chat, and mistakes answered in words."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import write_model

from gpt import chat, generate, runtime
from gpt import tokenizer as tokenizers
from gpt.conversations import Conversation
from gpt.model import GPT, ModelConfig, init_weights
from gpt.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PROSE = "user assistant system\n the river runs to the sea, 床前明月光，疑是地上霜。" * 6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.train([PROSE], "bpe", 310)
    config = ModelConfig(
        vocab_size=tokenizer.padded_size, max_seq_len=64, n_layer=1, d_model=32, n_head=2, init_std=0.3
    )
    model = GPT(config)
    init_weights(model, seed=1)
    write_model(path, model, tokenizer)
    return path


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """sample.py as a module; stdin is a closed pipe and the process keeps its settings."""
    spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(runtime, "setup", lambda device, threads: None)
    monkeypatch.setattr(runtime, "best_device", lambda: ("cpu", "a test"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    return module


def run(*args: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "sample.py", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def talk(sample: ModuleType, monkeypatch: pytest.MonkeyPatch, source: Path, lines: str, *args: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert sample.main([str(source), "--chat", "--seed", "1", "--max-tokens", "8", *args]) == 0


# The command


def test_stdout_is_the_prompt_and_its_continuation_and_nothing_else(model_dir: Path) -> None:
    done = run(model_dir, "--prompt", "the 床", "--max-tokens", 20, "--seed", 3)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode("utf-8")
    assert text.startswith("the 床")
    assert text.endswith("\n")
    assert str(model_dir) in done.stderr.decode()
    as_json = json.loads(run(model_dir, "--prompt", "the 床", "--max-tokens", 20, "--seed", 3, "--json").stdout)
    assert text == as_json["prompt"] + as_json["text"] + "\n"


def test_a_reader_that_leaves_early_is_no_error(model_dir: Path) -> None:
    command = [
        sys.executable,
        "sample.py",
        str(model_dir),
        "--prompt",
        "a",
        "--max-tokens",
        "3000",
        "--temperature",
        "2",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, said
    assert "rror" not in said


def test_help_and_bad_flags_answer_without_torch() -> None:
    program = (
        "import runpy, sys\n"
        "for argv in (['--help'], ['x', '--top-p', '2']):\n"
        "    sys.argv = ['sample.py', *argv]\n"
        "    try: runpy.run_path('sample.py', run_name='__main__')\n"
        "    except SystemExit as end: print('exit', end.code)\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: sample.py")
    assert done.stdout.endswith("exit 0\nexit 2\nFalse\n"), done.stdout + done.stderr
    assert "argument --top-p: expected a number above 0 and at most 1, got '2'" in done.stderr


def test_mistakes_end_with_code_2_and_no_traceback(model_dir: Path) -> None:
    done = run(model_dir, "--prompt", "sea " * 100)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"the prompt has " in done.stderr
    assert b"Traceback" not in done.stderr


# Inside


def test_samples_are_separated_by_a_line_of_dashes(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.main(
        [
            str(model_dir),
            "--prompt",
            "the",
            "--prompt",
            "a river",
            "--num-samples",
            "2",
            "--max-tokens",
            "5",
            "--seed",
            "1",
        ]
    )
    parts = capsys.readouterr().out.removesuffix("\n").split("\n---\n")
    assert [part[:3] for part in parts] == ["the", "the", "a r", "a r"]


def test_json_has_a_line_a_sample_with_everything_about_it(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--json", "--max-tokens", "6", "--temperature", "1.5"]
    sample.main([str(model_dir), "--prompt", "the", "--num-samples", "3", "--seed", "40", *flags])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["seed"] for record in records] == [40, 41, 42]
    assert len({record["text"] for record in records}) == 3
    for record in records:
        assert set(record) == {"prompt", "text", "ids", "tokens", "logprobs", "finish_reason", "seed"}
        assert len(record["ids"]) == len(record["tokens"]) == len(record["logprobs"]) <= 6
        assert all(logprob <= 0 for logprob in record["logprobs"])
    sample.main([str(model_dir), "--prompt", "the", "--seed", "42", *flags])
    alone = json.loads(capsys.readouterr().out)
    assert alone | {"logprobs": None} == records[2] | {"logprobs": None}


def test_stop_strings_end_the_text(sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(model_dir), "--prompt", "the", "--max-tokens", "40", "--seed", "5", "--json"]
    sample.main(flags)
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[3:5]
    sample.main([*flags, "--stop", "never this", "--stop", stop])
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == text[: text.index(stop)]
    assert record["finish_reason"] == "stop"


def test_the_prompt_comes_from_a_file_or_from_stdin(
    sample: ModuleType,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "start.txt").write_text("the 床\n", encoding="utf-8")
    flags = [str(model_dir), "--json", "--max-tokens", "1"]
    sample.main([*flags, "--prompt-file", str(tmp_path / "start.txt")])
    for more in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the 床\n".encode())))
        sample.main([*flags, *more])
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["the 床\n"] * 3


def test_nothing_on_stdin_starts_from_the_start_token_alone(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.main([str(model_dir), "--json", "--max-tokens", "3"])
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == ""
    assert len(record["ids"]) >= 1


def test_characters_that_become_bytes_are_named(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.main([str(model_dir), "--prompt", "the 鬱", "--max-tokens", "1"])
    assert "'鬱'" in capsys.readouterr().err
    sample.main([str(model_dir), "--prompt", "the river", "--max-tokens", "1"])
    assert "bytes" not in capsys.readouterr().err


def test_a_seed_is_drawn_and_told(sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main([str(model_dir), "--json", "--max-tokens", "1"])
    said = capsys.readouterr()
    assert f"seed: {json.loads(said.out)['seed']}\n" in said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "argument --temperature: expected a number at least 0, got '-1'"),
        (["--temperature", "hot"], "expected a number at least 0, got 'hot'"),
        (["--temperature", "inf"], "got 'inf'"),
        (["--top-p", "0"], "expected a number above 0 and at most 1, got '0'"),
        (["--top-k", "0"], "expected a whole number at least 1, got '0'"),
        (["--min-p", "1.5"], "at least 0 and at most 1, got '1.5'"),
        (["--repetition-penalty", "0"], "above 0, got '0'"),
        (["--max-tokens", "1.5"], "expected a whole number at least 1, got '1.5'"),
        (["--num-samples", "0"], "at least 1, got '0'"),
        (["--seed", "-1"], "argument --seed: expected a whole number at least 0"),
        (["--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--prompt-file", "b"], "give one"),
        (["--chat", "--json"], "--chat reads its messages from stdin"),
        (["--system", "x"], "--system is part of a chat; add --chat"),
    ],
)
def test_bad_flags_are_refused_in_words(
    sample: ModuleType, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        sample.main(["runs/x", *flags])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_text_that_is_not_utf8_is_refused_with_its_place(sample: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 at byte 3"):
        sample.main(["runs/x", "--prompt-file", str(tmp_path / "latin.txt")])


def test_a_line_of_a_chat_that_is_not_utf8_is_left_out_and_the_chat_goes_on(
    sample: ModuleType, model_dir: Path
) -> None:
    chatting = [model_dir, "--chat", "--max-tokens", "2", "--seed", "1"]
    done = run(*chatting, stdin=b"a\n\xffb\n")
    assert done.returncode == 0 and b"error: this line is not UTF-8 and was left out" in done.stderr
    assert done.stdout == run(*chatting, stdin=b"a\n").stdout
    with pytest.raises(ValueError, match="--system: not UTF-8 at byte 0"):
        sample.main([*map(str, chatting), "--system", "\udcff"])


def test_a_source_that_is_not_there_is_refused(sample: ModuleType, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        sample.main([str(tmp_path / "nowhere")])


def test_a_device_that_is_not_there_is_refused(sample: ModuleType, model_dir: Path) -> None:
    with pytest.raises(ValueError, match="device 'tpu' is not available"):
        sample.main([str(model_dir), "--device", "tpu"])


# Chat


def test_a_chat_answers_each_line_and_ends_with_its_input(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []
    encode = chat.encode

    def record(tokenizer: Tokenizer, conversation: Conversation, **options: Any) -> chat.Encoded:
        said.append([message["role"] for message in conversation.messages])
        return encode(tokenizer, conversation, **options)

    monkeypatch.setattr(chat, "encode", record)
    talk(sample, monkeypatch, model_dir, "hi\n\nthe sea\n", "--system", "s")
    assert said[-1] == ["system", "user", "assistant", "user"]
    assert capsys.readouterr().out.count("\n") >= 2


def test_a_message_that_is_interrupted_before_its_answer_is_not_part_of_the_chat(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Conversation:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "drop_oldest", interrupted)
    talk(sample, monkeypatch, model_dir, "hi\n/undo\n")
    assert "nothing to undo" in capsys.readouterr().err


def with_template(model_dir: Path, path: Path, template: str | None) -> Path:
    """A copy of the model whose tokenizer has another template, or none."""
    other = shutil.copytree(model_dir, path)
    config = json.loads((other / "tokenizer_config.json").read_bytes()) | {"chat_template": template}
    (other / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return other


def test_a_chat_says_whose_template_it_has_and_one_without_ends_is_refused_before_anything_is_typed(
    sample: ModuleType,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk(sample, monkeypatch, model_dir, "/quit\n")
    assert "chat template: the one of its tokenizer\n" in capsys.readouterr().err
    talk(sample, monkeypatch, with_template(model_dir, tmp_path / "old", None), "/quit\n")
    assert "chat template: ChatML\n" in capsys.readouterr().err
    other = with_template(model_dir, tmp_path / "other", "{{ '<|start_of_turn|>user' }}")
    with pytest.raises(ValueError, match=r"ends a reply with no control token .* names <\|start_of_turn\|>"):
        talk(sample, monkeypatch, other, "hi\n")


def test_a_model_speaks_the_template_that_it_brings_and_is_told_the_day(
    sample: ModuleType,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ strftime_now('%Y') + m.role + ': ' + m.content + '<|reserved_0|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    other = with_template(model_dir, tmp_path / "other", template)
    texts: list[str] = []
    monkeypatch.setattr(generate, "complete", recording(texts, Tokenizer.load(other)))
    talk(sample, monkeypatch, other, "the sea\n")
    assert texts == [f"{datetime.now():%Y}user: the seaassistant: "]
    talk(sample, monkeypatch, other, "the sea\n", "--system", "be brief")
    assert "error: the chat template refuses this conversation: no system here" in capsys.readouterr().err


def recording(texts: list[str], tokenizer: Tokenizer) -> Callable[..., object]:
    """`complete`, which writes down what it is asked."""
    complete = generate.complete

    def record(model: GPT, speaker: Tokenizer, prompts: list[list[int]], *args: Any, **options: Any) -> object:
        texts.extend(tokenizer.decode(prompt) for prompt in prompts)
        return complete(model, speaker, prompts, *args, **options)

    return record


@pytest.mark.parametrize("temperature", ["0", "1.5"])
def test_each_turn_reads_only_what_is_new_and_says_what_it_would_have_said(
    sample: ModuleType,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    temperature: str,
) -> None:
    read: list[int] = []
    prompts: list[int] = []
    features, encode = GPT.features, chat.encode

    def count(self: GPT, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        read.append(tokens.shape[1])
        return features(self, tokens, *args, **options)

    def record(*args: Any, **options: Any) -> chat.Encoded:
        encoded = encode(*args, **options)
        prompts.append(len(encoded.ids))
        return encoded

    monkeypatch.setattr(GPT, "features", count)
    monkeypatch.setattr(chat, "encode", record)
    flags = ("--temperature", temperature, "--max-tokens", "4", "--system", "s")
    talk(sample, monkeypatch, model_dir, "hi\na\n", *flags)
    with_cache = capsys.readouterr().out
    first, second = [n for n in read if n > 1]
    assert first == prompts[0]
    # The message, what ends the reply and opens the next, and of the reply at most what is cut otherwise when it is read.
    assert second <= prompts[-1] - prompts[0] and sum(read) <= prompts[-1] + 2 * 4

    class Forgetful(generate.Past):
        def begin(self, *args: Any) -> Any:
            self.ids = []
            return super().begin(*args)

    read.clear()
    monkeypatch.setattr(generate, "Past", Forgetful)
    talk(sample, monkeypatch, model_dir, "hi\na\n", *flags)
    assert capsys.readouterr().out == with_cache
    assert [n for n in read if n > 1] == [prompts[0], prompts[-1]]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("/help\n", "/system TEXT"),
        ("/nonsense\n", "/system TEXT"),
        ("/system be brief\n", "system message set"),
        ("/undo\n", "nothing to undo"),
        ("hi\n/undo\n/undo\n", "the last exchange is forgotten\nnothing to undo"),
        ("hi\n/reset\n/undo\n", "the conversation is forgotten\nnothing to undo"),
        ("/system s\nhi\n/reset\n", "the system message stays"),
        ("/set temperature=0\n", "temperature = 0.0"),
        ("/set max-tokens = 3\n", "max_tokens = 3"),
        ("/set temperature=-1\n", "temperature: expected a number at least 0, got '-1'"),
        ("/set colour=red\n", "/set NAME=VALUE knows max_tokens, temperature"),
    ],
)
def test_chat_commands_do_what_they_say(
    sample: ModuleType,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    words: str,
) -> None:
    talk(sample, monkeypatch, model_dir, lines + "/quit\nnever read\n")
    assert words in capsys.readouterr().err


def test_undo_and_the_same_words_again_give_the_same_reply(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(sample, monkeypatch, model_dir, "hi\n")
    once = capsys.readouterr().out
    talk(sample, monkeypatch, model_dir, "hi\n/undo\nhi\n")
    assert capsys.readouterr().out == once * 2


def test_a_long_chat_drops_its_oldest_exchanges_and_says_so(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(sample, monkeypatch, model_dir, "the river runs to the sea\n" * 6)
    said = capsys.readouterr()
    assert "no longer fit the context of 64 tokens: dropped" in said.err
    assert "error" not in said.err


def test_a_message_that_cannot_fit_is_refused_and_the_chat_goes_on(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(sample, monkeypatch, model_dir, "sea " * 90 + "\nhi\n/undo\n/undo\n")
    said = capsys.readouterr()
    assert "error: the prompt has" in said.err
    assert said.err.endswith("the last exchange is forgotten\nnothing to undo\n")


def test_a_reply_never_shows_control_tokens(
    sample: ModuleType, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(sample, monkeypatch, model_dir, "hi\nyes\nno\n", "--temperature", "3")
    assert "<|" not in capsys.readouterr().out.replace("\n", "")
