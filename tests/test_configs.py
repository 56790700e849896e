"""The settings files and recipes that come with the project: they load, they say how to run them, and they count right."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from gpt import config, prepare
from gpt.model import GPT
from gpt.plan import n_parameters
from gpt.trainer import TrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
RECIPES = sorted(ROOT.glob("data/*.yaml"))
CLAIM = re.compile(r"([\d,]+) parameters at a vocabulary of ([\d,]+)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def header(path: Path) -> list[str]:
    """The comment lines that a file opens with, without their marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def load(path: Path, *overrides: str) -> TrainConfig:
    return config.load(TrainConfig, path, overrides, {"name": path.stem})


def test_there_are_settings_and_recipes() -> None:
    assert CONFIGS
    assert RECIPES


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_settings_file_loads_strictly_and_is_what_it_prints(path: Path, tmp_path: Path) -> None:
    settings = load(path)
    assert settings.name == path.stem
    (tmp_path / "printed.yaml").write_text(config.dump(settings))
    assert config.load(TrainConfig, tmp_path / "printed.yaml") == settings


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_settings_file_opens_with_a_command_that_its_settings_allow(path: Path) -> None:
    opening = "\n".join(header(path)[:1])
    assert opening.startswith(f"python train.py {name(path)}")
    command, dash, where = opening.partition(" - ")
    assert dash and where, "on what hardware"
    load(path, *shlex.split(command)[3:])


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_settings_file_trains_on_whole_rows(path: Path) -> None:
    settings = load(path)
    assert settings.train.batch_tokens % settings.data.seq_len == 0


@pytest.mark.parametrize("path", [path for path in CONFIGS if load(path).init_from is None], ids=name)
def test_the_model_has_exactly_the_parameters_that_the_header_claims(path: Path) -> None:
    claim = CLAIM.search(" ".join(header(path)))
    assert claim, "the header says: N parameters at a vocabulary of V"
    n_claimed, vocab_size = (int(number.replace(",", "")) for number in claim.groups())
    assert vocab_size % 64 == 0, "a tokenizer's size is rounded up to 64"
    settings = load(path, f"model.vocab_size={vocab_size}")
    with torch.device("meta"):
        model = GPT(settings.model.model_copy(update={"max_seq_len": settings.data.seq_len}))
    assert n_parameters(model) == n_claimed


def test_a_settings_file_that_continues_from_a_model_leaves_its_shape_to_it() -> None:
    for path in CONFIGS:
        settings = load(path)
        if settings.init_from is not None:
            assert settings.model.model_fields_set <= {"dropout"}, name(path)
            assert CLAIM.search(" ".join(header(path))) is None, name(path)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_loads_and_opens_with_its_command(path: Path) -> None:
    assert prepare.load_recipe(path, []).input
    assert "\n".join(header(path)[:1]).startswith(f"python data/prepare.py {name(path)}")


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_pins_what_it_fetches(path: Path) -> None:
    for source in prepare.load_recipe(path, []).input:
        assert source.url is None or re.fullmatch("[0-9a-f]{64}", source.sha256 or "")
