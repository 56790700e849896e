"""README.md says what is so: its files exist, its commands parse, its links lead somewhere."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import prove
import pytest

from gpt import checkpoint, config, evaluate, harness, hf, look
from gpt.trainer import TrainConfig

ROOT = Path(__file__).parent.parent
VERBS = ("train.py", "sample.py", "data/prepare.py")
ROOM_VERBS = {
    "gpt.look": look,
    "gpt.hf": hf,
    "gpt.evaluate": evaluate,
    "gpt.harness": harness,
    "gpt.checkpoint": checkpoint,
}
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)]
LINES = [line for block in BLOCKS for part in block.splitlines() for line in re.split(r"&&|;(?= )", part)]
SHELL = [words for line in LINES if (words := shlex.split(line, comments=True))]
COMMANDS = [words[1:] for words in SHELL if words[0] == "python"]
TABLED = re.findall(r"^\| *`([^`]+)` *\|", TEXT.partition("## Every file")[2], re.M)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)


@pytest.fixture(scope="module")
def verbs() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, by their paths."""
    path = list(sys.path)
    modules = {}
    for script in VERBS:
        spec = importlib.util.spec_from_file_location(f"readme_{Path(script).stem}", ROOT / script)
        assert spec is not None
        assert spec.loader is not None
        modules[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[script])
    yield modules
    sys.path[:] = path


def parser(verb: ModuleType) -> Callable[[list[str]], object]:
    return verb.parse_args if hasattr(verb, "parse_args") else verb.arguments


def test_the_readme_has_commands_and_a_table_of_files() -> None:
    assert {words[0] for words in COMMANDS} >= set(VERBS)
    assert len(TABLED) > 20


@pytest.mark.parametrize("path", TABLED)
def test_a_file_in_the_table_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_every_room_settings_file_and_recipe_is_in_the_table_once() -> None:
    patterns = ("*.py", "gpt/*.py", "data/*.py", "configs/**/*.yaml", "data/*.yaml", "docs/*.md")
    files = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    assert files - {"gpt/__init__.py"} - set(TABLED) == set()
    assert sorted(set(TABLED)) == sorted(TABLED)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_names_what_exists_and_parses(
    words: list[str], verbs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *arguments = words
    if script == "-m":
        module, *arguments = arguments
        ROOM_VERBS[module].arguments(arguments)
        return
    assert script in verbs, "commands are those of the three verbs"
    parser(verbs[script])(arguments)  # SystemExit for a flag it does not know
    for word in arguments:
        if re.fullmatch(r"(configs|data)/[^=]*\.yaml", word):
            assert (ROOT / word).is_file(), word
    if script == "train.py" and arguments[0].endswith(".yaml"):
        overrides = [word for word in arguments[1:] if "=" in word]
        config.load(TrainConfig, ROOT / arguments[0], overrides, {"name": Path(arguments[0]).stem})
    if script == "train.py" and arguments[0] == "--keys":
        assert config.describe(TrainConfig, "".join(arguments[1:]))


def test_what_make_and_pip_are_told_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    named = {word for words in SHELL if words[0] == "make" for word in words[1:]}
    assert named <= targets
    for words in SHELL:
        for flag, file in pairwise(words):
            assert flag != "-r" or (ROOT / file).is_file(), file


def test_flags_and_settings_files_named_in_the_text_exist(
    verbs: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in verbs.values():
        with pytest.raises(SystemExit):
            parser(verb)(["--help"])
    for shown in ("data", "tokenizer", "attention"):
        with pytest.raises(SystemExit):
            look.arguments([shown, "--help"])
    with pytest.raises(SystemExit):
        prove.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    quoted = re.findall(r"`([^`\n]+)`", PROSE)
    assert {flag for code in quoted for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", code)} - known == set()
    files = {
        word for code in quoted for word in code.split() if re.fullmatch(r"(configs|data)/[\w-]+\.(yaml|py)", word)
    }
    assert {file for file in files if not (ROOT / file).is_file()} == set()


def test_links_to_this_project_lead_somewhere() -> None:
    targets = [target.partition("#") for target in re.findall(r"\]\(([^)\s]+)\)", PROSE)]
    titles = re.findall(r"^#+ (.+)$", PROSE, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for path, _, anchor in targets:
        if re.match(r"[a-z]+:", path):
            continue
        assert path == "" or (ROOT / path).exists(), path
        assert path != "" or anchor in anchors, anchor
