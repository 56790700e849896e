"""The command: what it prints and writes, and that every mistake is answered in words."""

import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_model

from gpt import hf, look, shards, tokenizer
from gpt.data import DataConfig, Loader, open_data
from gpt.durable import Directory
from gpt.model import GPT, ModelConfig, init_weights
from gpt.page import printable, quoted
from gpt.shards import TokenSet
from gpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<script>alert('x')</script>\x1b]0;title\x07\x1b[2J\u202e[bold]שלום[/] &amp; \x00 </span></div>\r\n"
SOURCES = ["<b>tales</b>", "\x1b[31mlists"]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    """Hostile documents of different lengths, and an empty one."""
    path = tmp_path_factory.mktemp("data") / "set"
    texts = [HOSTILE * n + f"number {n} " * 9 for n in (1, 2, 3, 1)] + [""]
    cutter = tokenizer.train(texts, "bpe", 300)
    made_with = {"vocab_size": cutter.size, "tokenizer_sha256": cutter.sha256}
    documents = [
        shards.Document([cutter.start_id, *cutter.encode(text)], len(text.encode()), i % 2)
        for i, text in enumerate(texts)
    ]
    with Directory(path) as directory:
        splits = {
            name: [shards.write_shard(directory, f"{name}.shard", documents, **made_with)] for name in ("train", "val")
        }
        for name, content in cutter.files().items():
            directory.write(name, content)
        about = {"start_id": cutter.start_id, "sources": SOURCES, "settings": {}}
        shards.write_manifest(directory, splits=splits, **about, **made_with)
    return path


class Reader(HTMLParser):
    """The rows of the tables, the tokens of the rows, and every tag of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.tokens: list[tuple[str, str]] = []  # class, text
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        self.inside = tag
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "span":
            self.tokens.append((dict(attrs)["class"], ""))

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.inside == "span":
            kind, text = self.tokens[-1]
            self.tokens[-1] = kind, text + data

    def handle_endtag(self, tag):
        self.inside = ""

    def row(self, first: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == first)


def run(*args: object) -> None:
    look.main([str(arg) for arg in args])


def test_a_page_of_hostile_documents_holds_their_figures_and_obeys_nothing(data_set, tmp_path, capsys):
    out = tmp_path / "look.html"
    run("data", data_set, "--seq-len", 32, "--rows", 3, "--html", out)
    page = Reader(out)
    assert not page.tags & {"script", "b", "img", "a", "link"}
    tokens, cutter = TokenSet(data_set, "train"), Tokenizer.load(data_set)
    lengths = np.diff(np.append(tokens.document_starts, tokens.n_tokens))
    assert [str(data_set), "5", f"{lengths.sum():,}", "1"] in [row[:4] for row in page.rows]
    assert page.row(str(data_set))[0] == f"{tokens.n_tokens:,}"
    assert [str(data_set), "1", "20.00%"] in [row[:3] for row in page.rows], "one repeats another"
    ids = tokens.read(0, tokens.n_tokens).tolist()
    first, count = Counter(ids).most_common(1)[0]
    shown = [str(first), str(count), f"{count / len(ids):.2%}"]
    assert [quoted(cutter.piece(first)), *shown] in page.rows
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "\u202e" not in printed and "\x00" not in printed
    assert f"written to {out}" in printed.replace("\n", "")


def test_the_rows_shown_are_those_of_training(data_set, tmp_path):
    out = tmp_path / "look.html"
    config = tmp_path / "run.yaml"
    config.write_text(f"seed: 7\ndata: {{path: '{data_set}', seq_len: 16}}\ntrain: {{steps: 5, batch_tokens: 64}}\n")
    run("data", "--config", config, "seed=8", "--step", 3, "--html", out)
    data = DataConfig(path=str(data_set), seq_len=16)
    batch = Loader(open_data(data), data, 4, 8).batch(3)
    cutter = Tokenizer.load(data_set)
    learned = [text for kind, text in Reader(out).tokens if "off" not in kind.split()]
    n_legend = 7
    expected = [printable(cutter.piece(i), lines=True) for i in batch.targets[batch.targets >= 0].tolist()]
    assert learned[n_legend:] == expected


def test_a_named_data_set_stands_in_for_the_one_of_the_settings(data_set, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("data: {path: nowhere, seq_len: 16}\ntrain: {steps: 5, batch_tokens: 64}\n")
    run("data", data_set, "--config", config, "--rows", 0, "--seq-len", 32)
    printed = capsys.readouterr().out
    assert "2 rows of 32 tokens, seed 1337" in printed and "the first 5 updates" in printed


def test_settings_may_follow_flags():
    flags = ["data", "--config", "a.yaml", "seed=1", "--rows", "2", "seed=2", "--step", "3", "data.seq_len=8"]
    for argv, dataset in ((flags, None), (["data", "set", *flags[1:]], "set")):
        args = look.arguments(argv)
        assert (args.dataset, args.rows, args.step) == (dataset, 2, 3)
        assert args.config == ["a.yaml", "seed=1", "seed=2", "data.seq_len=8"]


def test_a_batch_of_the_evaluation(data_set, capsys):
    run("data", data_set, "--split", "val", "--seq-len", 64, "--rows", 1)
    printed = capsys.readouterr().out
    assert "batch 1 of an evaluation" in printed and "the first 1,000 updates" not in printed
    with pytest.raises(ValueError, match="lower --step"):
        run("data", data_set, "--split", "val", "--step", 10**6)


def test_the_tokenizer_of_a_data_set(data_set, tmp_path, capsys):
    out = tmp_path / "look.html"
    run("tokenizer", data_set, "--html", out)
    page = Reader(out)
    sets = [TokenSet(data_set, split) for split in ("train", "val")]
    n_bytes, n_tokens = sum(t.n_bytes for t in sets), sum(t.n_tokens - t.n_documents for t in sets)
    assert page.row("bytes per token") == [f"{n_bytes / n_tokens:.2f}"]
    assert page.row("<b>tales</b>")[:2] == ["6", f"{sum(int(t.document_bytes[::2].sum()) for t in sets):,}"]
    assert r"\x1b[31mlists" in [row[0] for row in page.rows]
    text = tmp_path / "text.txt"
    text.write_text(HOSTILE)
    run("tokenizer", data_set, "--compare", data_set, "--text", text, "--html", out)
    assert not Reader(out).tags & {"script", "b"}
    assert "\x1b" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    cutter = tokenizer.train([HOSTILE * 3], "bpe", 290)
    config = ModelConfig(vocab_size=cutter.padded_size, max_seq_len=64, n_layer=2, d_model=16, n_head=2, init_std=0.3)
    model = GPT(config)
    init_weights(model, seed=1)
    write_model(path, model, cutter)
    return path


def test_attention_is_printed_and_written_with_the_numbers_of_the_model(model_directory, tmp_path, capsys):
    out, text = tmp_path / "look.html", tmp_path / "text.txt"
    text.write_bytes(HOSTILE.encode())
    out.write_text("what was there before")
    run("attention", model_directory, "--text-file", text, "--layer", 1, "--head", 1, "--max-tokens", 20, "--html", out)
    page, printed = Reader(out), capsys.readouterr().out
    model, cutter = hf.load(model_directory)
    ids = [cutter.start_id, *cutter.encode(HOSTILE)][:20]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    assert not page.tags & {"b", "img", "a", "link"}
    for i, (token, target) in enumerate(pairwise(ids)):
        shown = [str(i), quoted(cutter.piece(token)), quoted(cutter.piece(target))]
        assert [*shown, str(token), str(target)] in page.rows
        row = next(row for row in page.rows if row[:3] == shown and len(row) == 8)
        assert row[4] == f"{logprobs[i, target]:.3f}" and len(re.findall(r" \d\.\d{4}(?:  |$)", row[7])) == 10
    assert "layer 1, head 1: softmax rows" in printed and "cut: the text ends after 20 of" in printed
    assert "\x1b" not in printed and "\u202e" not in printed and "\x00" not in printed


def test_what_cannot_be_looked_at_is_said_in_words(model_directory, tmp_path):
    with pytest.raises(ValueError, match="the text is empty"):
        run("attention", model_directory, "--text", "")
    with pytest.raises(ValueError, match="has heads 0 to 1"):
        run("attention", model_directory, "--text", "a", "--head", 2)
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        run("attention", "nowhere", "--text", "a")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        run("attention", model_directory, "--text-file", tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["data"], "name a data set"),
        (["data", "x", "--step", "0"], "expected a whole number from 1 on, got '0'"),
        (["data", "x", "--html", "out.json"], "does not end in .html"),
        (["data", "x", "--html", "nowhere/out.html"], "the directory 'nowhere' does not exist"),
        (["data", "x", "--step", "many"], "got 'many'"),
        (["tokenizer"], "source"),
        (["paint"], "paint"),
        (["attention", "x"], "one of the arguments --text --text-file is required"),
        (["attention", "x", "--text", "a", "--text-file", "b"], "not allowed with"),
        (["attention", "x", "--text", "a", "--layer", "-1"], "expected a whole number from 0 on, got '-1'"),
        (["attention", "x", "--text", "a", "--max-tokens", "1"], "expected a whole number from 2 on"),
        (["attention", "x", "--text", "a", "--html", "nowhere/out.html"], "the directory 'nowhere' does not exist"),
        (["data", "x", "seed=1"], "unrecognized arguments: seed=1"),
        (["data", "x", "y", "--config", "z"], "unrecognized arguments: y"),
        (["data", "--config", "z", "--seed=1"], "unrecognized arguments: --seed=1"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_mistake_is_answered_in_words(data_set, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{path: '{data_set}', seq_len: 16}}\ntrain: {{steps: 5, batch_tokens: 40}}\n")
    with pytest.raises(ValueError, match=r"batch_tokens \(40\) must be a multiple of data.seq_len \(16\)"):
        run("data", "--config", config)
    with pytest.raises(ValueError, match="seq_lne"):
        run("data", "--config", config, "data.seq_lne=3")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("data", tmp_path / "nowhere")


def call(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "gpt.look", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_help_and_bad_flags_answer_before_torch_is_imported():
    for flags, code in ((["--help"], 0), (["data", "--no-such-flag"], 2)):
        result = call(*flags)
        assert result.returncode == code
        loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
        assert "gpt.signals" in loaded
        assert not loaded & {"torch", "numpy", "pydantic", "tokenizers", "rich"}


def test_the_shell_hears_of_a_mistake_without_a_traceback(tmp_path):
    result = call("data", tmp_path / "nowhere")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr and "is not a prepared data set" in result.stderr
