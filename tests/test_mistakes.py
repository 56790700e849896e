"""Mistakes a newcomer makes: each is answered with an exit code and words, and costs nothing that was there before."""

import errno
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from gpt import config, durable, prepare, runtime, signals
from gpt.trainer import TrainConfig, train

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": "train.py", "sample": "sample.py", "prepare": "data/prepare.py"}
SETTINGS = """\
data: {path: data/small, seq_len: 32}
model: {n_layer: 1, d_model: 32, n_head: 2}
train: {steps: 4, batch_tokens: 256, compile: false, threads: 1}
eval: {every: 2, tokens: 500}
checkpoint: {every: 2}
"""
LAST = "runs/small/checkpoints/step_00000004"
Edit = Callable[[Path], object]


# What a newcomer has: texts, a settings file, a data set, a finished run.


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, draw, quiet = tmp_path_factory.mktemp("first_day"), random.Random(1), Console(quiet=True)
    words = ["rose", "river", "green", "moon", "waits", "softly"]
    poems = [" ".join(draw.choices(words, k=40)) for _ in range(60)]
    (home / "texts").mkdir()
    (home / "texts/poems.txt").write_text("\n\n".join(poems))
    (home / "empty.txt").write_bytes(b"")
    (home / "latin.txt").write_bytes("café".encode("latin-1"))
    (home / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    (home / "poems.jsonl").write_text('{"text": "a rose"}\n{"poem": "a river"}\n')
    (home / "small.yaml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(runtime, "setup", lambda device, threads: None)
        for name, size in (("small", 280), ("other", 270)):
            values = ["input=texts/poems.txt", f"vocab_size={size}", "workers=1"]
            prepare.prepare(config.load(prepare.PrepareConfig, None, values), Path("data", name), console=quiet)
        train(config.load(TrainConfig, Path("small.yaml"), defaults={"name": "small"}), console=quiet)
    return home


@pytest.fixture
def home(first_day: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to err in, which is the working directory of a machine without a GPU."""
    monkeypatch.chdir(shutil.copytree(first_day, tmp_path / "home"))
    monkeypatch.setattr(runtime, "setup", lambda device, threads: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(signals, "install", lambda: None)
    return Path.cwd()


@pytest.fixture(scope="module")
def verbs() -> Iterator[dict[str, ModuleType]]:
    """train, sample and prepare as modules."""
    path = list(sys.path)
    modules = {}
    for name, script in SCRIPTS.items():
        spec = importlib.util.spec_from_file_location(f"verb_{name}", ROOT / script)
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    yield modules
    sys.path[:] = path


Outcome = tuple[int, str, str]  # exit code, stdout, stderr
Shell = Callable[[str], Outcome]


@pytest.fixture
def shell(
    home: Path, verbs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """shell("train small.yaml"): what the command says and how it ends, in this process, where torch is loaded."""

    def run(command: str) -> Outcome:
        verb, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [SCRIPTS[verb], *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            signals.run(verbs[verb].main)
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return run


def process(command: str, **options: object) -> Outcome:
    """The same as a process of its own."""
    verb, *arguments = shlex.split(command)
    whole = [sys.executable, str(ROOT / SCRIPTS[verb]), *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, **options)
    return done.returncode, done.stdout, done.stderr


def contents(home: Path) -> dict[str, str]:
    """Every file but locks, by the hash of its bytes."""
    files = (path for path in home.rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The mistakes


def settings(extra: str) -> Edit:
    """bad.yaml with lines that should not stand there."""
    return lambda home: (home / "bad.yaml").write_text(SETTINGS + extra)


def cut(name: str) -> Edit:
    """A file loses its last byte."""
    return lambda home: os.truncate(home / name, (home / name).stat().st_size - 1)


def flip(name: str) -> Edit:
    """One bit in the middle of a file turns."""

    def edit(home: Path) -> None:
        data = bytearray((home / name).read_bytes())
        data[len(data) // 2] ^= 4
        (home / name).write_bytes(data)

    return edit


def swap_tokenizer(home: Path) -> None:
    shutil.copy(home / "data/other/tokenizer.json", home / "data/small/tokenizer.json")


def old_model(home: Path) -> None:
    (home / "old").mkdir()
    (home / "old/config.json").write_text('{"model_type": "llama"}')
    (home / "old/pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")


def blank(home: Path) -> None:
    (home / "blank").mkdir()
    (home / "blank/nothing.txt").write_bytes(b"")


@dataclass(frozen=True)
class Mistake:
    """A command, the exit code it ends with, what the answer must hold, and what went wrong before."""

    command: str
    code: int
    says: tuple[str, ...]
    before: Edit | None = None


MISTAKES = {
    # text
    "a missing input file": Mistake("prepare absent.txt --out data/x", 2, ("absent.txt: no such file or directory",)),
    "an empty input file": Mistake("prepare empty.txt --out data/x", 2, ("empty.txt: the file is empty",)),
    "a binary input file": Mistake("prepare photo.jpg --out data/x", 2, ("photo.jpg: a binary file", "text in UTF-8")),
    "a word processor's file": Mistake(
        "prepare thesis.docx --out data/x",
        2,
        ("thesis.docx: .docx is not plain text", "extract its text"),
        lambda home: (home / "thesis.docx").write_bytes(b"PK\x03\x04\x00"),
    ),
    "text in another encoding": Mistake(
        "prepare latin.txt --out data/x", 2, ("latin.txt: not UTF-8 at byte 3 (0xe9)", "--on-bad-record skip")
    ),
    "a corpus without text": Mistake("prepare blank --out data/x", 2, ("the corpus is empty",), blank),
    "a JSON line without the field": Mistake(
        "prepare poems.jsonl --out data/x", 2, ("poems.jsonl:2: no field 'text'; it has 'poem'", "name one with field")
    ),
    # vocabulary
    "a directory of texts as the data set to overwrite": Mistake(
        "prepare texts/poems.txt --out texts --overwrite --workers 1", 2, ("texts", "not a data set", "--out")
    ),
    "a vocabulary smaller than the bytes": Mistake(
        "prepare texts/poems.txt --out data/x --vocab-size 100", 2, ("vocab_size 100 is below 264",)
    ),
    "a vocabulary larger than the text supports": Mistake(
        "prepare texts/poems.txt --out data/x --vocab-size 50k", 2, ("50000 is more than the text supports", "or less")
    ),
    "a vocabulary that is no number": Mistake(
        "prepare texts/poems.txt --out data/x --vocab-size big", 2, ("vocab_size: expected int, got 'big'",)
    ),
    "two vocabularies": Mistake(
        "prepare texts/poems.txt --out data/x --vocab-size 300 --tokenizer runs/small", 2, ("not allowed with",)
    ),
    "a recipe with two vocabularies": Mistake(
        "prepare data/two.yaml",
        2,
        ("data/two.yaml: vocab_size is the tokenizer's own", "leave one of them out"),
        lambda home: (home / "data/two.yaml").write_text("input: poems.txt\nvocab_size: 300\ntokenizer: runs/small\n"),
    ),
    # where data sets go
    "no place for the data set": Mistake(
        "prepare texts/poems.txt", 2, ("name the data set to make", "prepare.py texts/poems.txt --out data/NAME")
    ),
    "a data set of other text in its place": Mistake(
        "prepare poems.jsonl --out data/small --on-bad-record skip", 2, ("data/small was made from other", "--out")
    ),
    "the texts' own directory in its place": Mistake("prepare texts/poems.txt --out texts", 2, ("texts exists",)),
    "a recipe that does not exist": Mistake("prepare data/absent.yaml", 2, ("data/absent.yaml: no such file",)),
    "a data set that was never made": Mistake(
        "train small.yaml name=x data.path=data/absent",
        2,
        ("data/absent is not a prepared data set", "python data/prepare.py FILES --out data/absent"),
    ),
    # settings
    "no settings file": Mistake("train", 2, ("name a settings file", "configs/quickstart.yaml")),
    "a settings file that does not exist": Mistake(
        "train smal.yaml", 2, ("smal.yaml: no such file; did you mean 'small.yaml'?",)
    ),
    "an unknown key": Mistake(
        "train bad.yaml", 2, ("bad.yaml:6: unknown key 'optim.lrate'",), settings("optim: {lrate: 0.1}\n")
    ),
    "a key given twice": Mistake(
        "train bad.yaml", 2, ("bad.yaml:7: 'seed' is set twice",), settings("seed: 1\nseed: 2")
    ),
    "a value of the wrong type": Mistake(
        "train bad.yaml", 2, ("bad.yaml:6: log.every: expected int, got 'often'",), settings("log: {every: often}")
    ),
    "a section given twice": Mistake("train bad.yaml", 2, ("'eval' is set twice",), settings("eval: {every: 9}")),
    "two budgets": Mistake(
        "train small.yaml train.time=4m", 2, ("set exactly one of steps, tokens and time", "steps (4)", "time (240")
    ),
    "a batch that holds no whole rows": Mistake(
        "train small.yaml data.seq_len=48", 2, ("batch_tokens (256) must be a multiple of data.seq_len (48)",)
    ),
    "a setting without its section": Mistake(
        "train small.yaml steps=9", 2, ("override 'steps=9': unknown key 'steps'", "did you mean 'train.steps'?")
    ),
    "a setting written as a flag": Mistake(
        "train small.yaml --steps 9", 2, ("unknown flag --steps", "section.key=value")
    ),
    "a run's name that leaves runs/": Mistake("train small.yaml name=../x", 2, ("'../x' cannot be a run's name",)),
    "a GPU on a machine without one": Mistake(
        "train small.yaml name=x train.device=cuda", 2, ("device 'cuda' is not available here", "there is: cpu")
    ),
    # data and settings that do not fit together
    "a validation split shorter than one sequence": Mistake(
        "train small.yaml name=x data.seq_len=4k train.batch_tokens=4k",
        2,
        ("data/small: the validation split has", "fewer than data.seq_len (4000)", "larger val_fraction or lower"),
    ),
    "a tokenizer that is not the data set's": Mistake(
        "train small.yaml name=x", 2, ("data/small: tokenizer.json is not the one", "prepare it again"), swap_tokenizer
    ),
    "tuning on text of another tokenizer": Mistake(
        "train small.yaml name=x init_from=runs/small data.path=data/other model={}",
        2,
        ("data/other was prepared with another tokenizer", "--tokenizer runs/small"),
    ),
    "other settings under a run's name": Mistake(
        "train small.yaml optim.lr=0.5",
        2,
        ("runs/small was started with other settings", "optim.lr", "-> 0.5", "--fresh"),
    ),
    "another data set under a run's name": Mistake(
        "train small.yaml",
        2,
        ("data/small is not the data set this run was started with", "--fresh"),
        lambda home: (shutil.rmtree(home / "data/small"), shutil.copytree(home / "data/other", home / "data/small")),
    ),
    "other settings for a run whose own were deleted": Mistake(
        "train small.yaml optim.lr=0.5",
        2,
        ("runs/small was started with other settings", "-> 0.5"),
        lambda home: (home / "runs/small/config.yaml").unlink(),
    ),
    # damage
    "a truncated shard": Mistake(
        "train small.yaml name=x",
        3,
        ("data/small/train-00000.tok", "prepare the data"),
        cut("data/small/train-00000.tok"),
    ),
    "an altered shard": Mistake(
        "train small.yaml name=x",
        3,
        ("data/small/train-00000.tok", "not what was written", "prepare the data set again"),
        flip("data/small/train-00000.tok"),
    ),
    "a truncated checkpoint": Mistake(
        "train small.yaml", 3, (f"{LAST}/model.safetensors", f"delete {LAST}"), cut(f"{LAST}/model.safetensors")
    ),
    "an altered checkpoint": Mistake(
        "train small.yaml", 3, (f"{LAST}/state.json", f"delete {LAST}"), flip(f"{LAST}/state.json")
    ),
    "sampling from a truncated checkpoint": Mistake(
        "sample runs/small@4 --prompt a", 3, (f"{LAST}/model.safetensors",), cut(f"{LAST}/model.safetensors")
    ),
    # sampling
    "a model that does not exist": Mistake("sample runs/absent --prompt a", 2, ("'runs/absent' does not exist",)),
    "a run's name without runs/": Mistake("sample small --prompt a", 2, ("did you mean runs/small?",)),
    "a source of none of the three kinds": Mistake(
        "sample data/small --prompt a", 2, ("data/small is not a model; expected a run", "Hugging Face")
    ),
    "a step that was not saved": Mistake(
        "sample runs/small@7 --prompt a", 2, ("runs/small has no checkpoint '7'", "2, 4, best and last")
    ),
    "a pickle for weights": Mistake(
        "sample model.pt --prompt a",
        2,
        ("model.pt is a pickle", "can run code", "expected a run"),
        lambda home: (home / "model.pt").write_bytes(b"\x80\x02cposix\nsystem\n"),
    ),
    "a directory with pickled weights": Mistake(
        "sample old --prompt a", 2, ("old/pytorch_model.bin is a pickle", "can run code"), old_model
    ),
    "a prompt longer than the context": Mistake(
        f"sample runs/small --prompt '{'rose ' * 40}'", 2, ("the prompt has", "context is 32", "shorten the prompt")
    ),
    "a prompt without quotes": Mistake("sample runs/small --prompt a rose", 2, ("put quotes around",)),
    "a prompt file that does not exist": Mistake(
        "sample runs/small --prompt-file no.txt", 2, ("no.txt: No such file",)
    ),
    "a prompt file in another encoding": Mistake(
        "sample runs/small --prompt-file latin.txt", 2, ("latin.txt: not UTF-8 at byte 3", "iconv -t utf-8")
    ),
    "a temperature below zero": Mistake(
        "sample runs/small --prompt a --temperature -1", 2, ("--temperature: expected a number at least 0, got '-1'",)
    ),
    "sampling on a GPU without one": Mistake(
        "sample runs/small --prompt a --device cuda", 2, ("device 'cuda' is not available here",)
    ),
    "a flag that sample.py lacks": Mistake("sample runs/small --promt a", 2, ("--promt",)),
    "a flag that prepare.py lacks": Mistake("prepare texts --output data/x", 2, ("--output",)),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_in_words_and_nothing_is_lost(mistake: Mistake, home: Path, shell: Shell) -> None:
    if mistake.before is not None:
        mistake.before(home)
    before = contents(home)
    code, _, error = shell(mistake.command)
    assert code == mistake.code, error
    assert "Traceback" not in error
    assert [words for words in mistake.says if words not in error] == [], error
    after = contents(home)
    assert {name: after.get(name) for name in before} == before


def test_bad_records_are_counted_and_listed_when_they_are_skipped(home: Path, shell: Shell) -> None:
    for name in ("latin.txt", "photo.jpg"):
        shutil.copy(home / name, home / "texts" / name)
    code, said, error = shell("prepare texts --out data/x --on-bad-record skip --workers 1")
    assert code == 0, error
    assert "2 bad records were skipped" in said
    assert "texts/latin.txt: not UTF-8 at byte 3 (0xe9)" in said
    assert "texts/photo.jpg: a binary file" in said


def test_a_run_in_use_names_who_holds_it(home: Path, shell: Shell) -> None:
    before = contents(home)
    with durable.Lock(home / "runs/small/.lock", "runs/small"):
        code, _, error = shell("train small.yaml")
    assert code == 2
    assert f"runs/small is in use by pid {os.getpid()}" in error
    assert contents(home) == before


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("parallel.shard=3", "parallel.shard may be 1 or 2 of 2 ranks"),
        ("parallel.replicate=4", "set parallel.replicate=2, or start 4 with torchrun"),
        ("parallel.replicate=1", "set parallel.replicate=2"),
        ("parallel.shard=auto", "one size may be auto"),
        ("parallel.shard=2 parallel.canonical=true", "canonical sums are those of whole copies"),
        ("train.batch_tokens=96", "3 rows.*ranks .* cannot share equally"),
        ("data.path=data/later", "python data/prepare.py data/later.yaml"),
    ],
)
def test_ranks_that_cannot_work_together_are_told_what_can(
    mistake: str, told: str, home: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (home / "data" / "later.yaml").write_text("input: [nothing.txt]\n")
    before = contents(home)
    code, _, error = shell(f"train small.yaml name=x {mistake}")
    assert code == 2
    assert re.search(told, error.replace("\n", " ")), error
    assert contents(home) == before


def test_settings_may_follow_flags(home: Path, shell: Shell) -> None:
    code, said, error = shell("train small.yaml --print seed=7")
    assert code == 0, error
    assert "seed: 7" in said


@pytest.mark.parametrize("mistake", ["data.path=data/absent", "data.seq_len=48", "train.device=cuda"])
def test_a_mistake_in_the_settings_leaves_no_run_behind(mistake: str, home: Path, shell: Shell) -> None:
    code, _, error = shell(f"train small.yaml name=x {mistake}")
    assert code == 2, error
    assert not (home / "runs/x").exists()


@pytest.mark.parametrize("command", ["prepare texts/poems.txt --out data/x --workers 1", "train small.yaml name=x"])
def test_after_a_full_disk_the_same_command_makes_what_it_would_have_made(
    command: str, home: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(durable.FileSystem):
        room = 8_000

        def write(self, fd: int, data: bytes | memoryview) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(fd, data)

    before = contents(home)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "fs", Full())
        code, _, error = shell(command)
    assert code == 5
    assert "out of disk" in error
    assert "run the same command again" in error
    after = contents(home)
    assert {name: after.get(name) for name in before} == before
    code, _, error = shell(command)
    assert code == 0, error


# The same by real processes: what is tested above is not the test's own doing


def test_a_file_that_may_not_grow_stops_training_and_what_was_saved_stays(home: Path) -> None:
    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    before = contents(home)
    code, _, error = process("train small.yaml name=x", preexec_fn=full_disk)
    assert code == 5, error
    assert "out of disk" in error
    assert "Traceback" not in error
    assert json.loads((home / "runs/x/status.json").read_text())["state"] == "failed"
    assert list((home / "runs/x/checkpoints").iterdir()) == []
    assert before.items() <= contents(home).items()


@pytest.mark.parametrize("name", ["text in another encoding", "a pickle for weights", "an altered checkpoint"])
def test_processes_end_as_told(name: str, home: Path) -> None:
    mistake = MISTAKES[name]
    if mistake.before is not None:
        mistake.before(home)
    code, said, error = process(mistake.command)
    assert code == mistake.code, error
    assert error.startswith("error: ")
    assert "Traceback" not in said + error
    assert [words for words in mistake.says if words not in error] == []
