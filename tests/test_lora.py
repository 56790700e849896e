"""Runs that train an adapter: what they write, what they refuse, and the verb that merges them with their base."""

import hashlib
import json
import os
import random
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
import torch
from faults import Unsynced, installed
from rich.console import Console

from gpt import adapters, checkpoint, config, growth, hf, lora, run, settle, signals, tokenizer, trainer
from gpt.data import open_data
from gpt.durable import CorruptError
from gpt.settle import TrainConfig
from gpt.tokenizer import Tokenizer
from gpt.trainer import train

ROOT = Path(__file__).resolve().parent.parent
CONSOLE = Console(quiet=True)
BASE = """
name: base
data: {path: data/cats, tokenizer: vocab, seq_len: 16}
model: {n_layer: 2, d_model: 32, n_head: 2, dropout: 0.1}
train: {steps: 4, batch_tokens: 64, micro_batch: 2, compile: false, threads: 1, device: cpu}
optim: {lr: 0.01}
eval: {every: 2, tokens: 100}
checkpoint: {every: 2, keep: 2}
log: {every: 1}
"""
TUNE = BASE.replace("name: base", "name: tuned").replace("model: {n_layer: 2, d_model: 32, n_head: 2, ", "model: {")
TUNE = TUNE.replace("steps: 4", "steps: 6") + "init_from: runs/base\nadapter: {rank: 2, dropout: 0.1}\n"
WORDS = ["the cat", "a dog", "my bird", "sees", "hears", "likes", "the sun", "a tree", "the rain", "today", "never"]


def sentences(seed: int, n: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) + "." for _ in range(n)]


def write_set(path: Path, vocabulary: Tokenizer) -> None:
    path.mkdir(parents=True)
    for split, texts in (("train", sentences(1, 60)), ("val", sentences(2, 10))):
        ids = [i for text in texts for i in [vocabulary.start_id, *vocabulary.encode(text)]]
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (path / f"x_{split}.bin").write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def write_tokenizer(path: Path, vocabulary: Tokenizer) -> None:
    path.mkdir()
    for name, content in vocabulary.files().items():
        (path / name).write_bytes(content)


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer.train(sentences(1, 60), "bpe", 300)


@pytest.fixture(scope="module")
def trained_base(vocabulary: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    before = Path.cwd()
    os.chdir(root)
    try:
        write_tokenizer(Path("vocab"), vocabulary)
        write_set(Path("data/cats"), vocabulary)
        Path("base.yaml").write_text(BASE)
        with installed(Unsynced()):
            train(config.load(TrainConfig, Path("base.yaml"), []), console=CONSOLE)
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(trained_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own with a data set, its tokenizer and a base in runs/base."""
    shutil.copytree(trained_base, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    Path("tuned.yaml").write_text(TUNE)
    with installed(Unsynced()):
        yield tmp_path / "here"
    torch.use_deterministic_algorithms(False)


def settings(*overrides: str) -> TrainConfig:
    return config.load(TrainConfig, Path("tuned.yaml"), overrides)


def at(step: int, name: str = "tuned") -> Path:
    return Path("runs", name, "checkpoints", f"step_{step:08d}")


def curve(name: str) -> list[Any]:
    lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("val_bpb")) for line in lines]


def sums(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return hf.load(path)[0](torch.arange(32).view(2, 16))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_learns_and_its_base_keeps_its_bytes(here: Path, kind: str) -> None:
    before = sums(Path("runs/base"))
    train(settings(f"adapter.kind={kind}", "train.steps=40", "eval.every=40"), console=CONSOLE)
    scores = [score for *_, score in curve("tuned") if score is not None]
    assert scores[-1] < scores[0]
    base_score = next(line[3] for line in reversed(curve("base")) if line[3] is not None)
    assert scores[0] == pytest.approx(base_score, rel=1e-6), "a new adapter is its base"
    assert sums(Path("runs/base")) == before
    files = {file.name for file in at(40).iterdir()}
    assert files == {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "tokenizer.json", "tokenizer_config.json",
        "run.yaml", "state.json", "optimizer-00000-of-00001.safetensors", "manifest.json",
    }  # fmt: skip
    owners = {key.rpartition(":")[0].rpartition(".")[2] for key in checkpoint.load_optimizer(at(40))}
    assert owners == {"lora_A", "lora_B"} | ({"magnitude"} if kind == "dora" else set())


LITTLE_MEMORY = ("adapter.base_dtype=int8", "adapter.rank=64", "optim.state=8bit", "train.checkpointing=full")


@pytest.mark.parametrize(
    "asked", [(), ("adapter.kind=dora", "adapter.embeddings=true", "adapter.targets=[q_proj]"), LITTLE_MEMORY]
)
def test_a_stopped_adapter_continues_as_if_it_had_not_been_stopped(
    here: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...]
) -> None:
    if asked is LITTLE_MEMORY:
        pytest.importorskip("torchao")
    train(settings("name=whole", *asked), console=CONSOLE)
    real, made = trainer.update, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args[5])
        return real(*args, **kwargs)

    for step in (1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "update", counted)
            patch.setattr(signals, "stop_requested", lambda step=step: "SIGTERM" if made and made[-1] == step else None)
            with pytest.raises(signals.Stopped, match=f"step {step}"):
                train(settings(*asked), console=CONSOLE)
    train(settings(*asked), console=CONSOLE)
    assert curve("tuned") == curve("whole")
    for name in (checkpoint.ADAPTER_WEIGHTS, "base.json"):
        assert (at(6) / name).read_bytes() == (at(6, "whole") / name).read_bytes(), name
    ours, theirs = (checkpoint.load_optimizer(at(6, name)) for name in ("tuned", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    checkpoint.verify(at(6))


def test_a_killed_adapter_ends_with_the_same_bytes(here: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "tuned.yaml", "train.steps=20"]
    subprocess.run([*command, "name=whole"], check=True, capture_output=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        awaited = 7
        while awaited and (line := process.stdout.readline()):
            awaited -= " loss " in line
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, check=True, capture_output=True)
    assert curve("tuned") == curve("whole")
    assert (at(20) / checkpoint.ADAPTER_WEIGHTS).read_bytes() == (
        at(20, "whole") / checkpoint.ADAPTER_WEIGHTS
    ).read_bytes()


def test_the_run_continues_on_the_base_it_began_with_though_the_source_has_a_better_one(here: Path) -> None:
    train(settings("train.steps=2"), console=CONSOLE)
    named = json.loads((at(2) / "base.json").read_text())["base"]
    other = next(path for path in Path("runs/base/checkpoints").iterdir() if path != Path(named))
    step = int(other.name.removeprefix("step_"))
    with Path("runs/base/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "eval", "step": step, "val_bpb": 0.001}) + "\n")
    assert run.resolve("runs/base")[0] == other
    train(settings("train.steps=2"), console=CONSOLE)
    assert json.loads((at(2) / "base.json").read_text())["base"] == named


def test_every_source_loads_the_adapter_on_its_base(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(), console=CONSOLE)
    path, described = run.resolve("runs/tuned@last")
    assert path == at(6) and "step 6" in described
    assert run.resolve(str(at(6)))[0] == at(6)
    model, _ = hf.load(path)
    assert not any("lora" in name for name in model.state_dict()) and model.training is False
    assert hf.load_config(path) == model.config
    base, _ = hf.load(run.resolve("runs/base")[0])
    assert not torch.equal(logits(path), logits(run.resolve("runs/base")[0]))
    adapters.put_on(base, settings().adapter)
    hf.load_adapter(base, path)
    with torch.no_grad():
        worn = base(torch.arange(32).view(2, 16))
    assert (worn - logits(path)).abs().max() < 1e-5
    monkeypatch.chdir(here / "data")
    assert torch.equal(logits(here / path), logits(here / path)), "the base is found from another directory too"


@pytest.mark.parametrize("kept", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_on_a_base_in_fewer_bits_loads_as_it_was_trained(here: Path, kept: str, kind: str) -> None:
    if kept == "int8":
        pytest.importorskip("torchao")
    exact = "train.dtype=float32"
    asked = (f"adapter.base_dtype={kept}", f"adapter.kind={kind}", "adapter.targets=[q_proj]", exact)
    train(settings(*asked), console=CONSOLE)
    model, _ = hf.load(at(6))
    plain, _ = hf.load(run.resolve("runs/base")[0])
    assert model.state_dict().keys() == plain.state_dict().keys()
    up = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[up], plain.state_dict()[up]), "in its few bits, where it is no target too"
    train(settings("name=again", "adapter=null", "init_from=runs/tuned@last", exact), console=CONSOLE)
    scores = [[line[3] for line in curve(name) if line[3] is not None] for name in ("tuned", "again")]
    assert scores[1][0] == pytest.approx(scores[0][-1], rel=1e-5)


def test_an_adapter_s_score_is_the_merged_model_s(here: Path) -> None:
    exact = "train.dtype=float32"
    train(settings(exact), console=CONSOLE)
    command = [sys.executable, "-m", "gpt.lora", "merge", "runs/tuned@last", "models/deep/merged"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "next: python sample.py models/deep/merged" in done.stdout
    assert torch.equal(logits(Path("models/deep/merged")), logits(at(6)))
    assert {file.name for file in Path("models/deep/merged").iterdir()} >= {"config.json", "model.safetensors"}
    train(settings("name=again", "adapter=null", "init_from=models/deep/merged", exact), console=CONSOLE)
    scores = [line[3] for line in curve("tuned") if line[3] is not None]
    first = next(line[3] for line in curve("again") if line[3] is not None)
    assert first == pytest.approx(scores[-1], rel=1e-5)
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
    with pytest.raises(ValueError, match="nothing to merge"):
        lora.merge(Path("models/deep/merged"), Path("x"))


def test_full_tuning_starts_from_an_adapter_and_another_adapter_does_not(here: Path) -> None:
    train(settings(), console=CONSOLE)
    train(settings("name=full", "adapter=null", "init_from=runs/tuned"), console=CONSOLE)
    assert (at(6, "full") / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"merge it first: python -m gpt.lora merge runs/tuned OUT"):
        train(settings("name=more", "init_from=runs/tuned"), console=CONSOLE)


def test_another_base_is_refused(here: Path) -> None:
    train(settings(), console=CONSOLE)
    base, _ = run.resolve("runs/base")
    other = next(path for path in base.parent.iterdir() if path != base)
    shutil.copy(other / "model.safetensors", base / "model.safetensors")
    for attempt in (lambda: hf.load(at(6)), lambda: train(settings(), console=CONSOLE)):
        with pytest.raises(ValueError, match=r"is not the base.*sha256.*there again"):
            attempt()


def test_a_missing_base_is_named_with_what_to_do_and_a_link_to_it_serves(here: Path) -> None:
    train(settings(), console=CONSOLE)
    before = logits(at(6))
    Path("runs/base").rename("elsewhere")
    for attempt in (lambda: hf.load(at(6)), lambda: hf.load_config(at(6)), lambda: train(settings(), console=CONSOLE)):
        with pytest.raises(FileNotFoundError, match=r"its base runs/base/checkpoints/step_\d+ is not there; put"):
            attempt()
    Path("runs/base").symlink_to(here / "elsewhere")
    assert torch.equal(logits(at(6)), before)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("init_from=null",), "trained on a model that is there"),
        (("adapter.targets=[c_attn]",), "no linear 'c_attn'; it has q_proj, k_proj"),
        (("adapter.targets=[lm_head]",), "lm_head is the embedding"),
    ],
)
def test_an_adapter_that_fits_nothing_is_refused(here: Path, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(settings(*overrides), console=CONSOLE)


def test_another_adapter_under_the_same_name_is_refused(here: Path) -> None:
    train(settings(), console=CONSOLE)
    with pytest.raises(ValueError, match=r"adapter.rank: 2 -> 4"):
        train(settings("adapter.rank=4"), console=CONSOLE)
    with pytest.raises(ValueError, match=r"adapter.rank: 2 -> null"):
        train(settings("adapter=null"), console=CONSOLE)
    train(settings("name=full", "adapter=null"), console=CONSOLE)
    with pytest.raises(ValueError, match=r"adapter.rank: null -> 2"):
        train(settings("name=full"), console=CONSOLE)


def damaged(path: Path, file: str, change: Any) -> None:
    """`file` of the adapter, changed; nothing vouches for the rest any more."""
    (path / "manifest.json").unlink(missing_ok=True)
    raw = json.loads((path / file).read_text())
    change(raw)
    (path / file).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda raw: raw.pop("sha256"), CorruptError, "not what this trainer writes"),
        (lambda raw: raw.update(adapter={"rank": "many"}), CorruptError, "not what this trainer writes"),
        (lambda raw: raw.update(vocab_size=1 << 40), CorruptError, "only trained embeddings"),
        (lambda raw: (raw.update(vocab_size=1 << 40), raw["adapter"].update(embeddings=True)), ValueError, "missing"),
        (lambda raw: raw["adapter"].update(rank=50_000), ValueError, "mis-shaped"),
        (lambda raw: raw["adapter"].update(targets=["q_proj"]), ValueError, "unexpected"),
        (lambda raw: raw.update(base="/nowhere/at/all"), FileNotFoundError, "is not there"),
        (lambda raw: raw.update(base="a" * 5000), FileNotFoundError, "is not there"),
        (lambda raw: raw.update(base=str(at(6))), ValueError, "is an adapter itself"),
        (lambda raw: raw.update(vocab_size=-1), CorruptError, "not what this trainer writes"),
        (
            lambda raw: (raw.update(vocab_size=1 << 62), raw["adapter"].update(embeddings=True)),
            CorruptError,
            "not what",
        ),
        (lambda raw: (raw.update(vocab_size=310), raw["adapter"].update(embeddings=True)), CorruptError, "bring more"),
        (lambda raw: raw["adapter"].update(alpha=1e300), ValueError, r"not finite.*adapter\.alpha \(1e\+300\)"),
    ],
)
def test_what_base_json_says_is_believed_in_nothing(
    here: Path, change: Any, error: type[Exception], words: str
) -> None:
    train(settings(), console=CONSOLE)
    damaged(at(6), "base.json", change)
    with pytest.raises(error, match=words):
        hf.load(at(6))


def test_settings_alone_do_not_follow_an_adapter_in_a_circle(here: Path) -> None:
    train(settings(), console=CONSOLE)
    damaged(at(6), "base.json", lambda raw: raw.update(base=str(at(6))))
    with pytest.raises(ValueError, match="is an adapter itself"):
        hf.load_config(at(6))


def test_an_adapter_s_tokenizer_has_no_more_ids_than_its_model(here: Path, vocabulary: Tokenizer) -> None:
    train(settings(), console=CONSOLE)
    (at(6) / "manifest.json").unlink()
    for name, content in growth.add(vocabulary, [(a + b) * 6 for a in "bcdfgjkl" for b in "mpqvwxyz"]).files().items():
        (at(6) / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, the model's vocab_size is"):
        hf.load(at(6))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_link_among_an_adapter_s_files_is_not_followed(here: Path, name: str) -> None:
    train(settings(), console=CONSOLE)
    (at(6) / "manifest.json").unlink()
    (here / "secret").write_text("{}")
    (at(6) / name).unlink(missing_ok=True)
    (at(6) / name).symlink_to(here / "secret")
    with pytest.raises(ValueError, match="symbolic link, which is not followed"):
        hf.load(at(6))


def test_a_base_of_the_same_name_in_another_project_is_not_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(), console=CONSOLE)
    before, (base, _) = logits(at(6)), run.resolve("runs/base")
    other = next(path for path in base.parent.iterdir() if path != base)
    shutil.copytree(other, here / "elsewhere" / base)
    monkeypatch.chdir(here / "elsewhere")
    assert torch.equal(logits(here / at(6)), before)


def test_an_adapter_of_another_program_is_refused_with_the_way_to_merge_it(here: Path) -> None:
    train(settings(), console=CONSOLE)
    (at(6) / "manifest.json").unlink()
    (at(6) / "base.json").unlink()
    with pytest.raises(ValueError, match="merge_and_unload"):
        hf.load(at(6))


@pytest.mark.parametrize("file", [checkpoint.ADAPTER_WEIGHTS, "adapter_config.json", "base.json"])
def test_a_changed_file_of_an_adapter_is_corrupt(here: Path, file: str) -> None:
    train(settings(), console=CONSOLE)
    content = bytearray((at(6) / file).read_bytes())
    content[-1] ^= 1
    (at(6) / file).write_bytes(content)
    with pytest.raises(CorruptError, match=file):
        hf.load(at(6))


def test_an_adapter_without_its_weights_in_the_manifest_is_corrupt(here: Path) -> None:
    train(settings(), console=CONSOLE)
    manifest = json.loads((at(6) / "manifest.json").read_text())
    del manifest["sha256"][checkpoint.ADAPTER_WEIGHTS]
    (at(6) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="does not name"):
        checkpoint.verify(at(6))


def test_new_tokens_need_trained_embeddings_and_are_kept_with_them(here: Path, vocabulary: Tokenizer) -> None:
    grown = growth.add(vocabulary, [letter * 12 for letter in "bcdfgjklmpqvwxyz"])
    write_tokenizer(Path("grown"), grown)
    write_set(Path("data/grown"), grown)
    asked = ("data.path=data/grown", "data.tokenizer=grown")
    with pytest.raises(ValueError, match=r"tokens that .* does not know.*adapter.embeddings=true"):
        train(settings(*asked), console=CONSOLE)
    train(settings(*asked, "adapter.embeddings=true", "train.steps=4"), console=CONSOLE)
    model, words = hf.load(at(4))
    assert words.sha256 == grown.sha256 and model.config.vocab_size == grown.padded_size > vocabulary.padded_size
    train(settings(*asked, "adapter.embeddings=true", "train.steps=4"), console=CONSOLE)  # and it resumes


def test_adapters_alone_take_under_two_percent_of_the_base(tmp_path: Path, vocabulary: Tokenizer, build: Any) -> None:
    model = build(vocab_size=8192, d_model=256, n_layer=6)
    whole = sum(p.numel() for p in model.parameters())
    adapters.put_on(model, adapters.AdapterConfig(rank=4, targets=("q_proj", "v_proj")))
    adapters.fill(model, 1)
    held = sum(tensor.numel() for tensor in adapters.to_peft(model).values())
    assert held < 0.02 * whole


def test_a_source_of_the_hub_is_named_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / ("c0" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(run.hub, "model", lambda name: snapshot)
    base = hf.base("hub:ORG/NAME@main")
    assert base == (snapshot, f"hub:ORG/NAME@{snapshot.name}", hashlib.sha256(b"weights").hexdigest())


def test_the_weights_of_several_files_have_one_fingerprint(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    first = hf.fingerprint(tmp_path)
    assert first == hf.fingerprint(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"other")
    assert hf.fingerprint(tmp_path) != first


def test_the_frozen_base_is_the_source_s_own_memory(here: Path) -> None:
    given = settings()
    data = open_data(given.data)
    base = settle.base(given, None)
    source = settle.source(given, data, settle.begun_from(given, base), lambda line: None)
    assert base is not None and source is not None
    asked = given.model_copy(update={"model": source.config.model_copy(update={"dropout": 0.1})})
    model = settle.build(asked, source, lambda line: None)
    assert model.model.embed_tokens.weight.data_ptr() == source.model.embed_tokens.weight.data_ptr()
    assert model.training and model.model.dropout.p == 0.1
