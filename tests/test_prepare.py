"""A data set is a pure function of text, tokenizer and settings, whatever happens while it is made; bad input is told."""

import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Unsynced, count
from rich.console import Console

from gpt import config, corpus, durable, prepare, scan, signals, workers
from gpt.corpus import Source
from gpt.encode import Encoder
from gpt.prepare import PrepareConfig, Report
from gpt.shards import TokenSet
from gpt.tokenizer import END, Tokenizer, train

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "the",
    "river",
    "runs",
    "to",
    "sea",
    "and",
    "full",
    "stars",
    "床前",
    "明月",
    "光",
    "地上",
    "霜",
    "12",
    "345",
    "x()",
]


def poem(seed: int) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=rng.randrange(2, 9))) for _ in range(rng.randrange(1, 9)))


def write_corpus(path: Path, n: int = 120) -> Path:
    """Poems as JSON lines, and a directory of text beside them."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": poem(i)}) for i in range(n)]
    (path / "poems.jsonl").write_text("\n".join(lines[: n // 2]) + "\n")
    (path / "more.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[n // 2 :]).encode(), mtime=0))
    for i in range(10):
        (path / f"{i}.txt").write_text(poem(1000 + i))
    return path


def settings(*inputs: Path | str, **changes: Any) -> PrepareConfig:
    return PrepareConfig(input=[str(path) for path in inputs], **({"workers": 1, "vocab_size": 300} | changes))  # type: ignore[arg-type]


def run(config: PrepareConfig, out: Path, **options: Any) -> Report:
    return prepare.prepare(config, out, console=Console(file=io.StringIO()), **options)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def documents(path: Path, split: str) -> list[str]:
    tokens, tokenizer = TokenSet(path, split), Tokenizer.load(path)
    ends = [*tokens.document_starts[1:].tolist(), tokens.n_tokens]
    starts = tokens.document_starts.tolist()
    return [tokenizer.decode(tokens.read(a, b - a).tolist()) for a, b in zip(starts, ends, strict=True)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(workers, "BATCH_BYTES", 1000)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text"))


# What comes out


def test_every_document_is_there_once_in_order_with_its_bytes(text: Path, tmp_path: Path, small_chunks: None) -> None:
    run(settings(text), tmp_path / "set")
    given = [doc.text for file in files_of(text) for doc in corpus.documents(file)]
    got = {split: documents(tmp_path / "set", split) for split in ("train", "val")}
    assert sorted(got["train"] + got["val"]) == sorted(given)
    for split, texts in got.items():
        assert texts == [document for document in given if document in set(texts)]
        tokens = TokenSet(tmp_path / "set", split)
        assert tokens.document_bytes.tolist() == [len(document.encode()) for document in texts]
        assert (tokens.read(0, tokens.n_tokens)[tokens.document_starts] == tokens.start_id).all()
    assert len(list((tmp_path / "set").glob("train-*.tok"))) > 3


def files_of(path: Path) -> list[corpus.File]:
    return corpus.files(corpus.Source(path=str(path)), path, path, print)


def test_a_control_word_in_a_document_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one {END} two " * 50)
    run(settings(tmp_path / "a.txt", vocab_size=None), tmp_path / "set")
    assert "".join(documents(tmp_path / "set", "train") + documents(tmp_path / "set", "val")) == f"one {END} two " * 50
    assert TokenSet(tmp_path / "set", "train").n_documents == 1


def test_few_documents_are_split_at_their_tails_and_many_by_their_content(text: Path, tmp_path: Path) -> None:
    whole = "line of text é床 here\n" * 200
    (tmp_path / "a.txt").write_text(whole)
    run(settings(tmp_path / "a.txt", vocab_size=None), tmp_path / "one")
    cut = int(0.9 * len(whole))
    assert documents(tmp_path / "one", "train") == [whole[:cut]]
    assert documents(tmp_path / "one", "val") == [whole[cut:]]
    held_out = run(settings(text), tmp_path / "many").bytes
    assert 0.07 < held_out["val"] / sum(held_out.values()) <= 0.1


def test_equal_documents_fall_on_the_same_side(tmp_path: Path) -> None:
    lines = [json.dumps({"text": poem(i % 30)}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run(settings(tmp_path / "a.jsonl", val_fraction=0.3), tmp_path / "set")
    sides = [set(documents(tmp_path / "set", split)) for split in ("train", "val")]
    assert all(sides) and not sides[0] & sides[1]


def test_a_hash_split_that_would_be_empty_takes_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": poem(i) * 9}) for i in range(30)))
    report = run(settings(tmp_path / "a.jsonl", val_fraction=1e-9), tmp_path / "set")
    assert report.documents == {"train": 29, "val": 1}


def test_validation_inputs_are_the_validation_split(text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("held out text\n")
    report = run(settings(text, validation=[str(tmp_path / "mine.txt")]), tmp_path / "set")
    assert documents(tmp_path / "set", "val") == ["held out text\n"]
    assert report.documents == {"train": 130, "val": 1}
    assert TokenSet(tmp_path / "set", "val").sources == [text.name, "mine"]
    assert TokenSet(tmp_path / "set", "val").document_sources.tolist() == [1]


def test_no_more_than_val_tokens_are_held_out(text: Path, tmp_path: Path) -> None:
    report = run(settings(text, val_fraction=0.5, val_tokens=300), tmp_path / "set")
    assert 100 < report.tokens["val"] <= 330  # the size in tokens is predicted from the tokenizer's sample


def test_the_tokenizer_sees_no_validation_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 900 + "XYZ" * 133)
    run(settings(tmp_path / "a.txt", kind="char", vocab_size=None), tmp_path / "tail")
    assert Tokenizer.load(tmp_path / "tail").split_characters("aXYZ") == ["X", "Y", "Z"]


@pytest.mark.parametrize("kind", ["char", "word"])
def test_the_simplest_vocabularies_tell_what_they_do_not_know(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "a.txt").write_text("ab cd " * 299 + "zz")
    report = run(settings(tmp_path / "a.txt", kind=kind, vocab_size=None), tmp_path / "set")
    assert (report.unknown_tokens, report.unknown_bytes) == {"char": (2, 2), "word": (1, 2)}[kind]


def test_the_report_counts_what_is_on_disk(text: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    report = prepare.prepare(settings(text), tmp_path / "set", console=console)
    sets = [TokenSet(tmp_path / "set", split) for split in ("train", "val")]
    used = np.unique(np.concatenate([tokens.read(0, tokens.n_tokens) for tokens in sets]))
    assert report.vocab_used == len(used)
    assert sum(report.bytes.values()) == sum(n for _, _, n in report.scripts)
    assert sum(n for _, n, _ in report.scripts) == sum(report.tokens.values()) - sum(report.documents.values())
    assert {script for script, _, _ in report.scripts} >= {"Latin", "Han", "digits", "punctuation", "space"}
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "bytes/token" in printed and "Han" in printed and f"{used.size} of 300" in printed


def test_the_example_cannot_command_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\x1b[2J\x1b]0;title\x07 text " * 50)
    console = Console(file=io.StringIO(), force_terminal=True)
    prepare.prepare(settings(tmp_path / "a.txt", vocab_size=None), tmp_path / "set", console=console)
    assert "\x1b[2J" not in console.file.getvalue()  # type: ignore[attr-defined]


# The same bytes


@pytest.fixture(scope="module")
def golden(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """The data set of `text` in small chunks, made undisturbed."""
    out = tmp_path_factory.mktemp("golden") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK_BYTES", 3000)
        patch.setattr(workers, "BATCH_BYTES", 1000)
        run(settings(text), out)
        yield content(out)


def test_threads_and_the_place_change_no_byte(
    text: Path, tmp_path: Path, golden: dict[str, bytes], small_chunks: None
) -> None:
    elsewhere = write_corpus(tmp_path / "elsewhere" / text.name)
    run(settings(elsewhere), tmp_path / "a" / "set")
    assert content(tmp_path / "a" / "set") == golden
    manifest = golden["manifest.json"].decode()
    assert str(text) not in manifest and str(text.parent) not in manifest


def test_processes_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    """Real chunks, so that worker processes, which do not see this one's patches, cut them alike."""
    (tmp_path / "a.txt").write_text("".join(poem(i) + "|" for i in range(400)))
    for n in (1, 2):
        code = (
            "import io; from pathlib import Path; from rich.console import Console; from gpt import prepare, scan\n"
            "if __name__ == '__main__':\n"
            "    scan.CHUNK_BYTES = 9000\n"
            f"    settings = prepare.PrepareConfig(input=[{{'path': 'a.txt', 'separator': '|'}}], workers={n})\n"
            f"    prepare.prepare(settings, Path('set{n}'), console=Console(file=io.StringIO()))\n"
        )
        (tmp_path / "make.py").write_text(code)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "make.py"], cwd=tmp_path, env=environment, check=True)
    assert content(tmp_path / "set1") == content(tmp_path / "set2")
    assert len(content(tmp_path / "set1")) > 8


class Broken(Unsynced):
    """A disk whose k-th changing operation raises."""

    def __init__(self, k: int, error: BaseException) -> None:
        self.left, self.error = k, error

    def __getattribute__(self, name: str) -> Any:
        if name in ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmtree"):
            self.left -= 1
            if self.left <= 0:
                raise self.error
        return super().__getattribute__(name)


class Crash(BaseException):
    """The process ends here: nothing that follows happens."""


BREAKS = {"crash": Crash(), "full": OSError(28, "No space left on device"), "faulty": OSError(5, "I/O error")}


def broken(text: Path, out: Path, golden: dict[str, bytes], k: int, error: BaseException) -> bool:
    """Prepare on a disk whose k-th operation, and every one after it, raises; whether it came so far."""
    disk = Broken(k, error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "fs", disk)
        try:
            run(settings(text), out)
        except (Crash, OSError):
            assert not out.exists() or content(out) == golden
    count(disk.left <= 0)
    return disk.left <= 0  # or an error after the data set stood, while tidying


def finished(text: Path, out: Path, golden: dict[str, bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "fs", Unsynced())
        run(settings(text), out)
    assert content(out) == golden
    assert [path.name for path in out.parent.iterdir()] == ["set"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["crash", "full", "faulty"])
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_preparation_broken_at_any_write_ends_with_the_same_bytes(
    text: Path, tmp_path: Path, golden: dict[str, bytes], small_chunks: None, kind: str, stride: int
) -> None:
    for k in itertools.count(stride, stride):  # by default every eleventh of some hundred; each kind begins elsewhere
        out = tmp_path / f"{k}" / "set"
        out.parent.mkdir()
        came = broken(text, out, golden, k - {"crash": 0, "full": 4, "faulty": 8}[kind] * (stride > 8), BREAKS[kind])
        finished(text, out, golden)
        if not came:
            break
    assert k > 50


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stride", [97, pytest.param(7, marks=pytest.mark.slow)])
def test_a_preparation_broken_again_while_it_recovers_ends_with_the_same_bytes(
    text: Path, tmp_path: Path, golden: dict[str, bytes], small_chunks: None, stride: int
) -> None:
    came, k = True, 0
    while came:
        k += stride
        out = tmp_path / f"{k}" / "set"
        out.parent.mkdir()
        came = broken(text, out, golden, k, BREAKS["crash"])
        for second in (3, 8):  # in what a recovery does first, twice
            broken(text, out, golden, second + k % 5, BREAKS["crash"])
        finished(text, out, golden)


def test_a_data_set_that_a_crash_left_hidden_goes_when_the_new_one_stands(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(settings(text, vocab_size=280), out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "fs", NoSecondRename(out))
        with pytest.raises(Crash):
            run(settings(text), out, overwrite=True)
    assert not out.exists()
    run(settings(text), out, overwrite=True)
    assert TokenSet(out, "train").vocab_size == 300
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


class NoSecondRename(durable.FileSystem):
    """Crashes when something is about to appear at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rename(self, source: Path, target: Path) -> None:
        if target == self.path:
            raise Crash
        super().rename(source, target)


def test_finished_chunks_are_used_again(
    text: Path, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = workers.encode_chunk, []

    def encode(job: workers.Job, number: int, *rest: Any) -> None:
        if len(done) == 2:
            raise signals.Stopped("stopped")
        done.append(number)
        real(job, number, *rest)

    monkeypatch.setattr(workers, "encode_chunk", encode)
    with pytest.raises(signals.Stopped):
        run(settings(text), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(workers, "encode_chunk", lambda job, n, *rest: (done.append(n), real(job, n, *rest)))
    run(settings(text), tmp_path / "set")
    assert sorted(done) == list(range(max(done) + 1))


def test_other_settings_start_anew(
    text: Path, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "write_manifest", lambda *_, **__: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        run(settings(text, vocab_size=280), tmp_path / "set")
    monkeypatch.undo()
    monkeypatch.setattr(scan, "CHUNK_BYTES", 3000)
    run(settings(text), tmp_path / "set")
    run(settings(text), tmp_path / "other")
    assert content(tmp_path / "set") == content(tmp_path / "other")


def test_a_stop_request_is_obeyed_and_the_work_continued(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_requested", "SIGTERM")
    with pytest.raises(signals.Stopped):
        run(settings(text), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_an_up_to_date_data_set_is_left_alone_and_another_is_not_replaced_unasked(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = run(settings(text), out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(settings(text, workers=2), out) == first
    with pytest.raises(ValueError, match=r"made from other text or settings; add --overwrite"):
        run(settings(text, vocab_size=280), out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run(settings(text, vocab_size=280), out, overwrite=True)
    assert TokenSet(out, "train").vocab_size == 280
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_damaged_data_set_is_not_called_up_to_date(text: Path, tmp_path: Path) -> None:
    run(settings(text), tmp_path / "set")
    (tmp_path / "set" / "train-00000.tok").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"is not whole .*--overwrite"):
        run(settings(text), tmp_path / "set")


def test_two_preparations_of_one_data_set_are_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / ".set.preparing").mkdir()
    with (
        durable.Lock(tmp_path / ".set.preparing" / "lock", "set"),
        pytest.raises(ValueError, match="set is in use by pid"),
    ):
        run(settings(text), tmp_path / "set")


def test_text_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one text " * 99)
    real = prepare._split_with_tokenizer

    def change(*args: Any) -> Any:
        (tmp_path / "a.txt").write_text("two text " * 99)
        return real(*args)

    monkeypatch.setattr(prepare, "_split_with_tokenizer", change)
    with pytest.raises(ValueError, match="changed while it was prepared"):
        run(settings(tmp_path / "a.txt", vocab_size=None), tmp_path / "set")


def test_an_imported_tokenizer_is_used_as_it_is(text: Path, tmp_path: Path) -> None:
    run(settings(text), tmp_path / "a")
    (tmp_path / "b.txt").write_text("other text entirely " * 99)
    imported = settings(tmp_path / "b.txt", tokenizer=str(tmp_path / "a"), vocab_size=None)
    run(imported, tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert TokenSet(tmp_path / "b", "val").tokenizer_sha256 == TokenSet(tmp_path / "a", "val").tokenizer_sha256


# Recipes and the command


def test_every_recipe_loads_and_its_input_can_be_replaced() -> None:
    for path in sorted((ROOT / "data").glob("*.yaml")):
        assert prepare.load_recipe(path, ["input=mine.txt"]).input == (corpus.Source(path="mine.txt"),)
        assert all(source.name for source in prepare.load_recipe(path, []).input), path
    assert prepare.load_recipe(ROOT / "data" / "tang-poems.yaml", []).vocab_size == 8192
    assert prepare.load_recipe(ROOT / "data" / "quickstart.yaml", []).input[0].python == "stdlib"


def test_an_input_list_may_mix_strings_and_sections(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "input:\n- a.txt\n- {path: b, exclude: ['*.log'], name: logs}\n- http://x/y#sha256=ab\n"
    )
    a, b, c = prepare.load_recipe(tmp_path / "r.yaml", []).input
    assert (a.path, b.exclude, b.label, c.url, c.sha256) == ("a.txt", ("*.log",), "logs", "http://x/y", "ab")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["input={pth: a}"], "pth"),
        (["input={}"], "exactly one of path, url"),
        (["input=a", "vocab_size=500", "tokenizer=b"], "leave one of them out"),
        (["input=a", "val_fraction=1.5"], "val_fraction"),
        (["input=a", "kind=bbpe"], "did you mean 'bpe'"),
        (["input=[]"], "names nothing to read"),
        ([], "'input' is missing"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config.load(PrepareConfig, None, changes)


def test_a_corpus_or_split_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"text": "same"}\n' * 30)
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(ValueError, match="the corpus is empty"):
        run(settings(tmp_path / "a.jsonl"), tmp_path / "set")
    with pytest.raises(ValueError, match="all documents are the same; set split=tail"):
        run(settings(tmp_path / "b.jsonl"), tmp_path / "set")
    with pytest.raises(ValueError, match="validation split has no document"):
        run(settings(tmp_path / "b.jsonl", validation=[str(tmp_path / "a.jsonl")]), tmp_path / "set")
    with pytest.raises(ValueError, match="split train has no document"):
        run(settings(tmp_path / "c.txt", kind="char", vocab_size=None), tmp_path / "set")
    with pytest.raises(ValueError, match=r"the corpus is empty.*1 bad records were skipped, first .*not UTF-8"):
        (tmp_path / "c.txt").write_bytes(b"\xff")
        run(settings(tmp_path / "c.txt", on_bad_record="skip"), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_skipped_records_are_counted_and_listed(text: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n{"text": 1}\n\xff\n')
    console = Console(file=io.StringIO(), width=80)
    report = prepare.prepare(
        settings(text, tmp_path / "bad.jsonl", on_bad_record="skip"), tmp_path / "set", console=console
    )
    assert len(report.skipped) == 2
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 bad records were skipped" in printed and "bad.jsonl:2: field 'text' is int" in printed


def command(*arguments: str | Path, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "data" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, input=stdin, timeout=600)


def test_repetitions_that_were_left_out_are_there_when_they_are_kept_again(tmp_path: Path) -> None:
    lines = [json.dumps({"text": poem(i % 40)}) for i in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare.scan_only(settings(tmp_path / "a.jsonl", duplicates="drop"), tmp_path / "set", console=Console(quiet=True))
    run(settings(tmp_path / "a.jsonl"), tmp_path / "set")
    assert sum(len(documents(tmp_path / "set", split)) for split in ("train", "val")) == 80


def test_numbers_stay_whole_where_the_text_is_of_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(str(i % 300) for i in range(60_000)))
    (tmp_path / "b.txt").write_text("105 5")
    config = settings(tmp_path / "a.txt", tmp_path / "b.txt", kind="ids", val_fraction=0.5)
    run(config, tmp_path / "set")
    found = sorted(text for split in ("train", "val") for text in documents(tmp_path / "set", split))
    assert found == sorted([(tmp_path / "a.txt").read_text(), "105 5"])
    with pytest.raises(ValueError, match="split=tail ends each document at a character"):
        run(config.model_copy(update={"split": "tail"}), tmp_path / "other")
    (tmp_path / "b.txt").write_text("007 5")
    with pytest.raises(ValueError, match="'007' is no id of a vocabulary of 300"):
        run(config, tmp_path / "set")


def test_what_a_command_says_of_texts_is_as_it_is_meant(tmp_path: Path) -> None:
    (tmp_path / "📚.jsonl").write_text("\n".join(json.dumps({"a": poem(i), "b": "𠮷"}) for i in range(40)))
    how = ("--template", "{a}\\n{b}", "--out", "set", "--vocab-size", "300")
    done = command("📚.jsonl", *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(text.endswith("\n𠮷") for text in documents(tmp_path / "set", "train"))
    (tmp_path / "a.yaml").write_text("input: [{path: 📚.jsonl, field: a}]\n")
    done = command("a.yaml", "--chat", cwd=tmp_path)
    assert done.returncode == 2 and "--chat belongs into the recipe" in done.stderr


def test_the_command_prepares_standard_input_and_says_what_to_do_next(tmp_path: Path) -> None:
    done = command(
        "-", "--out", "data/mine", "--vocab-size", "300", cwd=tmp_path, stdin="\n".join(map(poem, range(50)))
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "data/mine is ready: python train.py" in done.stdout
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["mine"]


def test_a_recipe_prepares_beside_itself(text: Path, tmp_path: Path) -> None:
    (tmp_path / "poems.yaml").write_text(f"input: {text}\nvocab_size: 300\n")
    done = command("poems.yaml", "val_fraction=0.2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "poems" / "manifest.json").read_text())["settings"]["val_fraction"] == 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name what to read"),
        (("a.txt",), "--out data/NAME"),
        (("no.txt", "--out", "set"), "no.txt: no such file or directory"),
        (("empty.txt", "--out", "set"), "empty.txt: the file is empty"),
        (("a.txt", "--out", "set", "--vocab-size", "100"), "vocab_size 100 is below 264"),
        (("a.txt", "--out", "set", "--vocab-size", "9999"), "more than the text supports"),
        (("a.txt", "--out", "set", "--vocab-size", "many"), "vocab_size: expected int, got 'many'"),
        (("a.txt", "--out", "set", "--tokenizer", "no"), "no does not exist"),
        (("a.txt", "--out", "set", "--val-fraction", "2"), "val_fraction"),
        (("a.txt", "--out", "set", "--workers", "x"), "--workers"),
        (("a.txt", "--out", "set", "--frobnicate"), "--frobnicate"),
        (("no.yaml",), "no.yaml"),
    ],
)
def test_a_mistake_ends_with_code_2_and_words(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "a.txt").write_text(poem(1) * 9)
    (tmp_path / "empty.txt").touch()
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt"]


def test_help_and_bad_flags_import_nothing_heavy() -> None:
    for flag, code in (("--help", 0), ("--frobnicate", 2)):
        line = [sys.executable, "-X", "importtime", str(ROOT / "data" / "prepare.py"), flag]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == code
        imported = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines() if "import time" in entry}
        assert "argparse" in imported
        assert not imported & {"torch", "numpy", "tokenizers", "pydantic", "rich", "yaml"}


def test_preparing_never_imports_torch() -> None:
    code = "import sys; import gpt.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_run_again_ends_with_the_same_bytes(tmp_path: Path, number: signal.Signals) -> None:
    rng = random.Random(int(number))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": poem(i) * 8}) + "\n" for i in range(700)))
    assert command("a.jsonl", "--out", "golden", cwd=tmp_path).returncode == 0
    for _ in range(3):
        line = [sys.executable, str(ROOT / "data" / "prepare.py"), "a.jsonl", "--out", "set"]
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(rng.uniform(0.1, 1.2))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode in ({0, -9} if number == signal.SIGKILL else {0, 75, -15}), said
        assert "Traceback" not in said
    assert command("a.jsonl", "--out", "set", cwd=tmp_path).returncode == 0
    assert content(tmp_path / "set") == content(tmp_path / "golden")


# Parts


def mixed(path: Path) -> Path:
    """A recipe over JSON lines, gzip, a directory of text and parquet, in a directory of its own."""
    import pyarrow
    import pyarrow.parquet

    write_corpus(path / "texts")
    rows = {"title": [f"title {i}" for i in range(60)], "lines": [poem(500 + i).split("\n") for i in range(60)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path / "poems.parquet", row_group_size=16)
    recipe = path / "mixed.yaml"
    recipe.write_text(
        "input:\n"
        "- {path: texts/poems.jsonl, name: lines}\n"
        "- {path: texts/more.jsonl.gz, name: packed}\n"
        "- {path: 'texts/*.txt', name: files}\n"
        "- {path: poems.parquet, template: '{title}\\n{lines}', name: columns}\n"
        "vocab_size: 300\nduplicates: drop\n"
    )
    return recipe


def test_parts_made_apart_and_merged_are_the_set_of_one_command(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = mixed(tmp_path)
    monkeypatch.chdir(tmp_path)
    config, quiet = prepare.load_recipe(recipe, ["workers=1"]), Console(quiet=True)
    run(config, tmp_path / "whole")
    out = tmp_path / "parts"
    n = prepare.scan_only(config, out, console=quiet)
    assert n > 4
    prepare.make_part(config, out, 3, 4, console=quiet)
    with pytest.raises(
        ValueError, match=rf"\d+ of {n} chunks are not encoded: 1, 2, 4, .*run --part 1/4, --part 2/4, --part 4/4$"
    ):
        prepare.merge(config, out, console=quiet)
    for part in (4, 1, 3, 2):
        prepare.make_part(config, out, part, 4, console=quiet)
    finished = tmp_path / ".parts.preparing" / "set"
    before = {path.name: path.stat().st_ino for path in finished.glob("*.tok")}
    (finished / ".train-00003.tok.tmp-12-0123abcd").touch()  # as a part that is killed leaves
    prepare.merge(config, out, console=quiet)
    assert content(out) == content(tmp_path / "whole")
    assert {path.name: path.stat().st_ino for path in out.glob("*.tok")} == before  # nothing was copied
    assert not (tmp_path / ".parts.preparing").exists()


def merge(text: Path, out: Path) -> Report:
    return prepare.merge(settings(text), out, console=Console(quiet=True))


def test_a_part_needs_the_scan_of_its_own_settings(text: Path, tmp_path: Path) -> None:
    quiet, out = Console(quiet=True), tmp_path / "set"
    for command in (lambda: prepare.make_part(settings(text), out, 1, 2, console=quiet), lambda: merge(text, out)):
        with pytest.raises(FileNotFoundError, match=r"nothing is scanned yet.*--scan"):
            command()
    assert list(tmp_path.iterdir()) == []
    prepare.scan_only(settings(text), out, console=quiet)
    with pytest.raises(ValueError, match=r"scanned with other settings.*--scan"):
        prepare.make_part(settings(text, vocab_size=280), out, 1, 2, console=quiet)
    with pytest.raises(ValueError, match="from 1 to N"):
        prepare.make_part(settings(text), out, 3, 2, console=quiet)
    prepare.make_part(settings(text, workers=2), out, 1, 1, console=quiet)  # workers change no byte
    prepare.merge(settings(text), out, console=quiet)
    assert TokenSet(out, "train").n_documents > 0


def test_parts_run_beside_one_another_and_nothing_else_beside_them(text: Path, tmp_path: Path) -> None:
    quiet, out = Console(quiet=True), tmp_path / "set"
    prepare.scan_only(settings(text), out, console=quiet)
    work = tmp_path / ".set.preparing"
    with durable.Lock(work / "lock", "a part elsewhere", shared=True):
        prepare.make_part(settings(text), out, 1, 1, console=quiet)
        for command in (prepare.merge, prepare.scan_only, prepare.prepare):
            with pytest.raises(ValueError, match="in use"):
                command(settings(text), out, console=quiet)
    with (
        durable.Lock(work / "part-1-of-1.lock", "part 1"),
        pytest.raises(ValueError, match=r"part 1 of 1 of .* is in use by pid"),
    ):
        prepare.make_part(settings(text), out, 1, 1, console=quiet)


def settings_of(overrides: list[str]) -> PrepareConfig:
    return config.load(PrepareConfig, None, overrides)


def test_a_vocabulary_grows_on_new_text_and_keeps_its_ids(text: Path, tmp_path: Path) -> None:
    run(settings(text), tmp_path / "old")
    (tmp_path / "new.txt").write_text("zyzzyva quixotic " * 200 + "jabberwock " * 99)
    old = Tokenizer.load(tmp_path / "old")
    imported = {"tokenizer": str(tmp_path / "old"), "vocab_size": None}
    run(settings(tmp_path / "new.txt", grow=5, **imported), tmp_path / "learned")
    (tmp_path / "list.txt").write_text("quixotic\nzyzzyva\n")
    run(settings(tmp_path / "new.txt", add_tokens=str(tmp_path / "list.txt"), **imported), tmp_path / "listed")
    for name in ("learned", "listed"):
        new = Tokenizer.load(tmp_path / name)
        assert new.size >= old.size + 2
        assert new.encode(poem(3)) == old.encode(poem(3))
        lines = (tmp_path / name / "grown.tsv").read_text().splitlines()
        assert len([line for line in lines if line.split("\t")[0].isdigit()]) == new.size - old.size
    assert len(new.encode("zyzzyva")) == 1
    rerun = settings(tmp_path / "new.txt", add_tokens=str(tmp_path / "list.txt"), **imported)
    run(rerun, tmp_path / "listed")  # up to date
    (tmp_path / "list.txt").write_text("quixotic\n")
    with pytest.raises(ValueError, match="other text or settings"):
        run(rerun, tmp_path / "listed")


def test_sequences_of_integers_become_those_ids(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [[rng.randrange(50) for _ in range(rng.randrange(1, 30))] for _ in range(40)]
    (tmp_path / "clicks.jsonl").write_text("\n".join(json.dumps({"ids": row}) for row in rows))
    values = [f"input={{path: {tmp_path / 'clicks.jsonl'}, ids: ids}}", "kind=ids", "vocab_size=50", "workers=1"]
    run(settings_of(values), tmp_path / "set")
    got = []
    for split in ("train", "val"):
        tokens = TokenSet(tmp_path / "set", split)
        ends = [*tokens.document_starts[1:].tolist(), tokens.n_tokens]
        for start, end in zip(tokens.document_starts.tolist(), ends, strict=True):
            ids = tokens.read(start, end - start).tolist()
            assert ids[0] == 50
            got.append(ids[1:])
    assert sorted(got) == sorted(rows)
    (tmp_path / "clicks.jsonl").write_text(json.dumps({"ids": [3, 50]}))
    with pytest.raises(ValueError, match=r"clicks\.jsonl: document 1: '50' is no id of a vocabulary of 50"):
        run(settings_of(values), tmp_path / "bad")


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    lines = [json.dumps({"text": t}) for t in [*(poem(i % 40) for i in range(60)), "", "x"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    console = Console(file=io.StringIO(), width=200)
    source = f"input={{path: {tmp_path / 'a.jsonl'}, min_chars: 2}}"
    report = prepare.prepare(
        settings_of([source, "duplicates=drop", "vocab_size=300", "workers=1"]), tmp_path / "set", console=console
    )
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert sum(report.documents.values()) == len({poem(i) for i in range(40)})
    assert re.search(r"20 documents have the text of an earlier one \([\d,]+ bytes\): left out", said)
    n_tokens, n_documents, n_bytes = (sum(each.values()) for each in (report.tokens, report.documents, report.bytes))
    assert f"in = out: {n_documents:,} documents, {n_bytes:,} bytes, {n_tokens:,} tokens (with a start token" in said
    assert f"encoded by {Encoder(Tokenizer.load(tmp_path / 'set')).how}" in said
    assert "1 documents were empty and left out" in said and "1 documents were too short and left out" in said


def test_a_pass_that_was_finished_is_not_done_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: dict[str, bytes], small_chunks: None
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise signals.Stopped("stopped")

    monkeypatch.setattr(prepare.tokenizers, "train", stop)
    with pytest.raises(signals.Stopped):
        run(settings(text), tmp_path / "set")
    monkeypatch.undo()
    monkeypatch.setattr(scan, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(scan, "scan", stop)
    run(settings(text), tmp_path / "set")
    assert content(tmp_path / "set") == golden


def test_text_that_changed_behind_the_back_of_its_date_is_read_again(tmp_path: Path) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "set"
    config = settings(path, vocab_size=None)
    path.write_text("one text " * 99)
    before = path.stat()
    prepare.scan_only(config, out, console=Console(quiet=True))
    path.write_text("two text " * 99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"a\.txt: the text changed while it was prepared"):
        prepare.make_part(config, out, 1, 1, console=Console(quiet=True))
    run(config, out)
    assert documents(out, "train")[0].startswith("two text")


def test_another_data_set_is_refused_before_its_text_is_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings(text), tmp_path / "set")
    monkeypatch.setattr(scan, "scan", None)
    with pytest.raises(ValueError, match=r"other text or settings; add --overwrite"):
        run(settings(text, vocab_size=280), tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_composed_text_counts_its_raw_bytes_on_both_sides_of_a_cut(tmp_path: Path) -> None:
    texts = ["e\u0301", "e\u0301" * 50, "plain text " * 20, "a\u030a"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    values = [f"input={{path: {tmp_path / 'a.jsonl'}, normalize: nfc}}", "kind=char", "workers=1"]
    report = run(settings_of(values), tmp_path / "set")
    assert sum(report.bytes.values()) == sum(len(text.encode()) for text in texts)
    assert "".join(documents(tmp_path / "set", "train")).count("é") == int(50 * 0.9)


def test_what_does_not_come_out_as_it_went_in_is_an_error(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_chunks: None
) -> None:
    real = workers.parts
    monkeypatch.setattr(workers, "parts", lambda *args, **kwargs: list(real(*args, **kwargs))[1:])
    with pytest.raises(durable.CorruptError, match=r"went in and .* came out"):
        run(settings(text), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_full_disk_is_told_and_what_stood_before_stays(text: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x y z " * 100_000)
    line = [sys.executable, str(ROOT / "data" / "prepare.py"), str(tmp_path / "a.txt"), "--out", str(tmp_path / "set")]
    run(settings(text), tmp_path / "set")
    before = content(tmp_path / "set")
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (99_000, 99_000));"
    limit += " sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", limit, *line[1:], "--overwrite"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 5 and "out of disk" in done.stderr and "Traceback" not in done.stderr
    assert content(tmp_path / "set") == before
    assert subprocess.run([*line, "--overwrite"], capture_output=True, timeout=120).returncode == 0
    assert TokenSet(tmp_path / "set", "train").n_documents == 1


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}, "3/16"),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1", "PARTS": "16"}, "3/16"),
        ({}, None),
    ],
)
def test_the_slurm_example_names_its_part(tmp_path: Path, environment: dict[str, str], part: str | None) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    line = ["bash", str(ROOT / "configs" / "launch" / "prepare.slurm.sh"), "data/x.yaml"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(line, env=path | environment, capture_output=True, text=True)
    if part is None:
        assert done.returncode != 0 and "submit it with --array=1-N" in done.stderr
    else:
        assert done.stdout == f"data/prepare.py data/x.yaml --part {part} --workers 1\n"


def one_set_whatever_happens(recipe: Path, kills: int) -> dict[str, bytes]:
    """The data set of a recipe, which 1, 2 and 3 workers, four parts and a command killed at random moments all make."""
    here, name, rng = recipe.parent, recipe.name, random.Random(5)
    sets: list[dict[str, bytes]] = []
    seconds: list[float] = []

    def done(*arguments: str) -> str:
        process = command(name, *arguments, cwd=here)
        assert process.returncode == 0, process.stderr
        return process.stdout

    for n in (1, 2, 3):
        begun = time.monotonic()
        said = done("--out", f"w{n}", "--workers", str(n))
        seconds.append(time.monotonic() - begun)
        sets.append(content(here / f"w{n}"))
    done("--out", "parts", "--scan")
    for part in (2, 4, 1, 3):
        done("--out", "parts", "--part", f"{part}/4")
    done("--out", "parts", "--merge")
    sets.append(content(here / "parts"))
    for i in range(kills):
        line = [sys.executable, str(ROOT / "data" / "prepare.py"), name, "--out", "killed", "--workers", str(1 + i % 3)]
        process = subprocess.Popen(line, cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, max(seconds)))
        process.kill()
        count(process.wait(timeout=60) == -signal.SIGKILL)  # it had not ended before
        if (here / "killed").exists():
            sets.append(content(here / "killed"))
            shutil.rmtree(here / "killed")
    done("--out", "killed")
    sets.append(content(here / "killed"))
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []
    assert all(each == sets[0] for each in sets)
    (line,) = (line for line in said.splitlines() if line.startswith("in = out"))
    print(f"\n{len(sets)} data sets, sha256 of manifest {hashlib.sha256(sets[0]['manifest.json']).hexdigest()}\n{line}")
    return sets[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_mixed_recipe_has_one_manifest_whatever_happens_to_it(tmp_path: Path) -> None:
    names = one_set_whatever_happens(mixed(tmp_path), kills=20)
    assert "manifest.json" in names


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_real_corpora_have_one_manifest_whatever_happens_to_them(tmp_path: Path) -> None:
    """`-s` prints it. The corpora are those of the recipes in data/, which have to be in data/downloads."""
    import pyarrow
    import pyarrow.parquet

    poems, plays = (ROOT / "data" / "downloads" / name for name in ("tang-poems.jsonl", "tinyshakespeare.txt"))
    if not (poems.exists() and plays.exists()):
        pytest.skip("no tang-poems.jsonl and tinyshakespeare.txt in data/downloads")
    rows = [json.loads(line)["text"].split("\n", 2) for line in poems.read_text().splitlines()]
    columns = {"title": [row[0] for row in rows], "lines": [row[-1].split("\n") for row in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "poems.parquet")
    (tmp_path / "mixed.yaml").write_text(
        f"input:\n- {{path: {poems}, name: poems}}\n- {{python: stdlib, exclude: [site-packages]}}\n"
        f"- {{path: {plays}, name: plays}}\n"
        "- {path: poems.parquet, template: '{title}\\n{lines}', name: columns}\nduplicates: drop\non_bad_record: skip\n"
    )
    files = one_set_whatever_happens(tmp_path / "mixed.yaml", kills=20)
    assert len([name for name in files if name.startswith("train")]) > 4


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_prompts_are_marked_and_only_what_follows_them_is_learned(text: Path, tmp_path: Path, packing: str) -> None:
    """Beside text without prompts, which is learned whole; read from its place and from the spool."""
    opened = gzip.open if packing else open
    rows = [(f"Q{i}: é? ", f"answer {i}") for i in range(60)] + [("nothing follows", "")]
    with opened(path := tmp_path / f"pairs.jsonl{packing}", "wt") as file:
        file.writelines(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows)
    pairs = Source(path=str(path), prompt="question", field="answer")
    report = run(
        settings(text, vocab_size=300).model_copy(update={"input": (pairs, Source(path=str(text)))}), tmp_path / "set"
    )
    assert "1 documents were empty and left out" in report.notes
    found, tokenizer = dict[str, str](), Tokenizer.load(tmp_path / "set")
    n_plain = 0
    for split in ("train", "val"):
        tokens = TokenSet(tmp_path / "set", split)
        bounds = [*tokens.document_starts.tolist(), tokens.n_tokens]
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            spans = [(s.start - start, s.end - start, s.kind) for s in tokens.spans(start, end - start)]
            if tokens.sources[tokens.document_sources[i]] != pairs.label:
                assert spans == [(0, 1, "train"), (1, end - start, "train")]
                n_plain += 1
                continue
            _, prefix, learned = sorted(spans, key=lambda span: span[1])
            assert prefix == (0, learned[0], "prefix") and learned[1:] == (end - start, "train")
            ids = tokens.read(start, end - start).tolist()
            question, answer = ids[1 : learned[0]], ids[learned[0] :]
            assert (question, answer) == (
                tokenizer.encode(tokenizer.decode(question)),
                tokenizer.encode(tokenizer.decode(answer)),
            )
            found[tokenizer.decode(question)] = tokenizer.decode(answer)
            assert tokens.document_bytes[i] == len(tokenizer.decode(ids).encode())
    assert found == dict(rows[:60]) and n_plain == 130
    with pytest.raises(ValueError, match="split=hash"):
        settings_of([f"input=[{{path: {path}, prompt: question, field: answer}}]", "split=tail"])


# Conversations


TOOL_TALK = [
    {"role": "user", "content": "Add 2 and 3."},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 3}}]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


def talk(i: int) -> dict[str, Any]:
    """A conversation in one of the shapes that people have them in."""
    asked, told = f"Question {i}? <|im_end|>", f"Answer {i}. <|im_start|>"
    shapes: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]},
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]},
        {"prompt": asked, "completion": told},
        {"instruction": asked, "input": "", "output": told},
    ]
    return shapes[i % 4]


def chat_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def of_talks(path: Path | str, kind: str = "chat", **changes: Any) -> PrepareConfig:
    return settings("x", **changes).model_copy(
        update={"input": (Source.model_validate({"path": str(path), kind: True}),)}
    )


def learned_of(path: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """(ids, those of them that are learned) of each document."""
    tokens, found = TokenSet(path, split), []
    for start, end in itertools.pairwise([*tokens.document_starts.tolist(), tokens.n_tokens]):
        ids = tokens.read(start, end - start).tolist()
        spans = [span for span in tokens.spans(start, end - start) if span.kind == "train"]
        found.append((ids, [i for span in spans for i in ids[span.start - start : span.end - start]]))
    return found


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.jsonl.gz"])
def test_conversations_of_any_shape_become_documents_of_which_the_assistant_is_learned(
    tmp_path: Path, name: str, small_chunks: None
) -> None:
    path = chat_file(tmp_path / name, [*map(talk, range(120)), {"messages": TOOL_TALK}])
    out = tmp_path / "set"
    report = run(of_talks(path), out)
    tokenizer = Tokenizer.load(out)
    end = tokenizer.vocab["<|im_end|>"]
    said = set()
    for split in ("train", "val"):
        tokens = TokenSet(out, split)
        assert tokens.conversations and not tokens.pairs
        assert tokens.document_bytes.sum() == report.bytes[split]
        for ids, learned in learned_of(out, split):
            assert learned[-1] == end and "\nuser" not in tokenizer.decode(learned)
            said.add(tokenizer.decode([i for i in learned if i != end]))
            roles = [line for line in tokenizer.decode(ids).split("\n") if line in ("user", "assistant", "tool")]
            assert ids.count(end) == len(roles), "one for each turn: text never becomes a control token"
    told = {f"Answer {i}. <|im_start|>" for i in range(120)}
    assert told <= said and len(said - told) == 1
    assert '"add"' in (call := (said - told).pop()) and call.endswith("It is 5.") and "Add 2" not in call
    assert "conversations: 121, 244 turns (2.0 each)" in report.notes
    assert 0 < report.learned["train"] < report.tokens["train"]
    assert all(not re.search(r'"role"|"content"', tokenizer.piece(i)) for i in range(tokenizer.size)), (
        "no JSON is learned"
    )


def test_conversations_in_parts_and_by_processes_have_the_same_bytes(tmp_path: Path, small_chunks: None) -> None:
    config, console = (
        of_talks(chat_file(tmp_path / "talks.jsonl", list(map(talk, range(200))))),
        Console(file=io.StringIO()),
    )
    run(config, tmp_path / "a")
    run(config.model_copy(update={"workers": 2}), tmp_path / "b")
    prepare.scan_only(config, tmp_path / "c", console=console)
    for part in (2, 1):
        prepare.make_part(config, tmp_path / "c", part, 2, console=console)
    prepare.merge(config, tmp_path / "c", console=console)
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")
    prepare.prepare(config, tmp_path / "a", console=(told := Console(file=io.StringIO())))
    assert "up to date" in told.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")])
def test_conversations_broken_off_at_any_write_end_with_the_same_bytes(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    config = of_talks(chat_file(tmp_path / "talks.jsonl", list(map(talk, range(150)))))
    run(config, tmp_path / "golden")
    n_broken, k = 0, 0
    while n_broken * 11 >= k:
        k += 11
        out = tmp_path / str(k) / "set"
        out.parent.mkdir()
        monkeypatch.setattr(durable, "fs", Broken(k, error))
        try:
            run(config, out)
        except (Crash, OSError):
            n_broken += 1
        monkeypatch.setattr(durable, "fs", Unsynced())
        run(config, out)
        assert content(out) == content(tmp_path / "golden")
        assert [path.name for path in out.parent.iterdir()] == ["set"]
    assert n_broken > 5


def test_a_pair_is_two_documents_of_which_the_last_answer_is_learned(tmp_path: Path, small_chunks: None) -> None:
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [
        {"prompt": [*first, {"role": "user", "content": f"Say {i}"}], "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(90)
    ]
    report = run(of_talks(chat_file(tmp_path / "pairs.jsonl", rows), "preference"), tmp_path / "set")
    assert "conversations: 180 in 90 pairs, 720 turns (4.0 each)" in report.notes
    tokenizer, seen = Tokenizer.load(tmp_path / "set"), set()
    for split in ("train", "val"):
        tokens = TokenSet(tmp_path / "set", split)
        assert tokens.pairs and tokens.n_documents % 2 == 0
        texts = [tokenizer.decode(learned[:-1]) for _, learned in learned_of(tmp_path / "set", split)]
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            assert chosen.removeprefix("good") == rejected.removeprefix("bad")
            seen.add(chosen)
        assert all("Ho" in tokenizer.decode(ids) for ids, _ in learned_of(tmp_path / "set", split))
    assert len(seen) == 90


def test_conversations_stand_beside_text_that_is_learned_whole(text: Path, tmp_path: Path) -> None:
    talks = Source(path=str(chat_file(tmp_path / "talks.jsonl", list(map(talk, range(40))))), chat=True, name="talks")
    config = settings(text).model_copy(update={"input": (talks, Source(path=str(text), name="text"))})
    run(config, tmp_path / "set")
    tokens = TokenSet(tmp_path / "set", "train")
    whole = [len(ids) == len(learned) for ids, learned in learned_of(tmp_path / "set", "train")]
    assert whole == (tokens.document_sources == 1).tolist() and tokens.conversations


BAD_TALKS = [
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}',
        "role 'bot' is unknown; expected",
    ),
    (
        '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}',
        "message 1 (user) is empty",
    ),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of an assistant"),
    ('{"messages": [{"role": ', "broken JSON"),
    (
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
        "half of a surrogate",
    ),
]


@pytest.mark.parametrize(("line", "words"), BAD_TALKS)
def test_a_bad_conversation_is_told_with_its_file_and_line_or_skipped(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join([*(json.dumps(talk(i)) for i in range(30)), line, json.dumps(talk(30))]))
    with pytest.raises(ValueError, match=r"talks\.jsonl:31: .*" + re.escape(words)):
        run(of_talks(path), tmp_path / "set")
    report = run(of_talks(path, on_bad_record="skip"), tmp_path / "set")
    assert sum(report.documents.values()) == 31 and report.n_skipped == 1 and words in report.skipped[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({"chosen": talk(0)["messages"], "rejected": talk(4)["messages"]}, "prompts must be equal"),
    ],
)
def test_a_bad_pair_is_told_with_its_file_and_line(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2: .*{words}"):
        run(of_talks(chat_file(tmp_path / "pairs.jsonl", [good, row]), "preference"), tmp_path / "set")


def with_template(path: Path, template: str) -> Path:
    """The tokenizer of a data set, with another chat template."""
    path.mkdir()
    tokenizer = train(["Question Answer 0123456789 " * 9], "bpe", None)
    for name, data in tokenizer.files().items():
        (path / name).write_bytes(data)
    about = json.loads((path / "tokenizer_config.json").read_bytes()) | {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path


NO_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.jsonl.gz"])
def test_what_the_template_refuses_is_told_with_its_place_or_skipped(tmp_path: Path, name: str) -> None:
    path = chat_file(tmp_path / name, [*map(talk, range(40)), {"messages": TOOL_TALK}, talk(41)])
    tokenizer = str(with_template(tmp_path / "with", NO_TOOLS))
    config = of_talks(path, tokenizer=tokenizer, vocab_size=None)
    place = ":41: " if name.endswith("jsonl") else ": the conversation "
    with pytest.raises(ValueError, match=rf"{name}{place}.*no tools here.*skip leaves"):
        run(config, tmp_path / "set")
    report = run(config.model_copy(update={"on_bad_record": "skip"}), tmp_path / "other")
    assert sum(report.documents.values()) == 41 and report.n_skipped == 1 and "no tools here" in report.skipped[0]
    assert any(note.startswith("in = out: 41 documents") for note in report.notes)


def test_a_tokenizer_without_a_template_or_its_tokens_is_refused_before_the_text_is_read(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path / "with", "x")
    about = json.loads((tokenizer / "tokenizer_config.json").read_bytes())
    del about["chat_template"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(about))
    raw = json.loads((tokenizer / "tokenizer.json").read_bytes())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if "im_" not in token["content"]]
    raw["model"]["vocab"] = {k.replace("<|im_", "<|in_"): v for k, v in raw["model"]["vocab"].items()}
    (tokenizer / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "talks.jsonl").write_text("no JSON at all")
    with pytest.raises(ValueError, match="template"):
        run(of_talks(tmp_path / "talks.jsonl", tokenizer=str(tokenizer), vocab_size=None), tmp_path / "set")


def test_another_template_makes_another_data_set(tmp_path: Path) -> None:
    path = chat_file(tmp_path / "talks.jsonl", list(map(talk, range(30))))
    one = of_talks(path, tokenizer=str(with_template(tmp_path / "one", NO_TOOLS)), vocab_size=None)
    two = of_talks(path, tokenizer=str(with_template(tmp_path / "two", NO_TOOLS.replace("\n", " "))), vocab_size=None)
    run(one, tmp_path / "set")
    with pytest.raises(ValueError, match="made from other text or settings"):
        run(two, tmp_path / "set")


def test_a_data_set_in_which_nothing_is_learned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chat_file(tmp_path / "talks.jsonl", list(map(talk, range(30))))
    encode = workers.chat.encode
    monkeypatch.setattr(
        workers.chat, "encode", lambda *args, **how: (e := encode(*args, **how))._replace(mask=[False] * len(e.ids))
    )
    with pytest.raises(ValueError, match="every target is masked"):
        run(of_talks(path), tmp_path / "set")


def test_one_conversation_alone_cannot_be_split(tmp_path: Path) -> None:
    path = chat_file(tmp_path / "talks.jsonl", [talk(0)])
    with pytest.raises(ValueError, match="name validation inputs"):
        run(of_talks(path), tmp_path / "set")


@pytest.mark.parametrize("flag", ["--chat", "--preference"])
def test_the_command_prepares_conversations_and_pairs_and_reports_them(tmp_path: Path, flag: str) -> None:
    rows = [talk(i) if flag == "--chat" else {"prompt": f"Say {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    chat_file(tmp_path / "a.jsonl", rows)
    done = command("a.jsonl", flag, "--out", "set", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = "conversations: 40, 80 turns" if flag == "--chat" else "conversations: 80 in 40 pairs, 160 turns"
    assert expected in done.stdout and "trained: " in done.stdout
    assert command("a.jsonl", "--chat", "--preference", "--out", "b", cwd=tmp_path).returncode == 2
