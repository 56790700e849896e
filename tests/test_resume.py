"""How a run goes on: what may change, by name or freely, what is said of it, and branches that leave their trunk alone."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny import settings, trained, weights

from gpt import config, host, plan, resume, runtime, settle, signals, trainer
from gpt.trainer import TrainConfig, train


def stopped(*overrides: str, at: int, **how: object) -> str:
    """What a run says that is stopped after so many updates."""
    console = Console(record=True, file=io.StringIO(), width=250)
    with pytest.raises(signals.Stopped):
        train(settings(*overrides), updates=at, console=console, **how)  # type: ignore[arg-type]
    return console.export_text()


def killed_before_a_save(monkeypatch: pytest.MonkeyPatch, *overrides: str, step: int, **how: object) -> None:
    """A run that dies in update `step`, without a save."""
    real = trainer.update

    def dying(*args: object) -> object:
        if args[5] == step:
            raise KeyError("a power cut")
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(trainer, "update", dying)
        train(settings(*overrides), console=Console(quiet=True), **how)  # type: ignore[arg-type]


def stored(name: str = "tiny") -> TrainConfig:
    return config.load(TrainConfig, Path("runs", name, "config.yaml"))


def curve(name: str) -> list[tuple[int, float, float]]:
    lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["lr"]) for line in lines if line["kind"] == "train"]


# The three kinds of settings


def test_every_setting_of_the_two_lists_exists_and_is_of_one_kind() -> None:
    known = [row[0] for row in config.describe(TrainConfig)]
    for name in (*resume.FREE, *resume.BY_NAME):
        assert [key for key in known if f"{key}.".startswith(f"{name}.")], name
    both = [k for k in known if any(f"{k}.".startswith(f"{n}.") for n in resume.FREE) and resume.kind(k) != "free"]
    assert not both


@pytest.mark.parametrize(
    "key",
    [
        *("seed", "init_from", "branch_from", "data.seq_len", "data.mixture", "data.tokenizer", "data.document_mask"),
        *("model.n_layer", "model.norm", "objective.kind", "optim.kind", "optim.state", "train.batch_tokens"),
        "adapter.rank",
    ],
)
def test_what_makes_a_run_what_it_is_is_never_allowed(here: Path, key: str) -> None:
    assert resume.kind(key) == "identity"
    with pytest.raises(ValueError, match=f"--allow {key}: another {key} makes another run.*name=NEW"):
        trained(allow=[key])


def test_a_key_of_allow_that_is_no_setting_is_refused_with_the_nearest(here: Path) -> None:
    with pytest.raises(ValueError, match=r"--allow optim.rl: there is no such setting; did you mean optim.lr\?"):
        trained(allow=["optim.rl"])
    assert not Path("runs").exists()


@pytest.mark.parametrize("change", ["seed=2", "data.seq_len=32", "train.batch_tokens=128", "model.n_layer=2"])
def test_another_identity_is_refused_even_where_everything_is_allowed(here: Path, change: str) -> None:
    stopped(at=4)
    before = Path("runs/tiny/config.yaml").read_bytes()
    with pytest.raises(ValueError, match=rf"(?s){change.partition('=')[0]}: .* -> .*name=NEW, or --fresh"):
        trained(change, allow=["optim", "schedule", "train.steps"])
    assert Path("runs/tiny/config.yaml").read_bytes() == before


def test_a_change_by_name_is_refused_with_the_flag_that_allows_it_and_then_made(here: Path) -> None:
    stopped(at=4)
    with pytest.raises(ValueError, match=r"(?s)optim.lr: 0.01 -> 0.002.*--allow optim.lr.*name=NEW"):
        trained("optim.lr=0.002")
    text = trained("optim.lr=0.002", allow=["optim.lr"])
    assert "lr: 2.0e-3 at step 5, a jump from 1.0e-2" in text
    assert "changed: optim.lr 0.01 -> 0.002 (allowed, from step 5 on)" in text
    assert [round(lr, 9) for _, _, lr in curve("tiny")[3:6]] == [0.01, 0.002, 0.002]
    (change,) = stored().history
    assert (change.step, change.key, change.was, change.now) == (4, "optim.lr", 0.01, 0.002)
    assert "changed before: optim.lr 0.01 -> 0.002 after step 4" in trained("optim.lr=0.002")  # without the flag
    with pytest.raises(
        ValueError, match=r"(?s)optim.lr: 0.002 -> 0.01.*the run changed optim.lr 0.01 -> 0.002 after step 4"
    ):
        trained()


def test_a_section_allows_what_stands_in_it_and_nothing_beside_it(here: Path) -> None:
    stopped(at=4)
    with pytest.raises(ValueError, match=r"(?s)model.dropout: 0.1 -> 0.*--allow model.dropout"):
        stopped("optim.lr=0.002", "optim.clip=0.5", "model.dropout=0.0", at=1, allow=["optim"])
    stopped("optim.lr=0.002", "optim.clip=0.5", at=1, allow=["optim"])
    assert [change.key for change in stored().history] == ["optim.lr", "optim.clip"]


def test_a_change_is_remembered_by_a_run_that_dies_before_its_next_save(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = ("optim.lr=0.002", "schedule.floor=0.5")
    stopped(at=4)
    shutil.copytree("runs/tiny", "runs/golden")
    trained(*change, "name=golden", allow=["optim.lr", "schedule"])
    killed_before_a_save(monkeypatch, *change, step=6, allow=["optim.lr", "schedule"])
    with pytest.raises(
        ValueError, match=r"optim.lr: 0.002 -> 0.01"
    ):  # also where the last checkpoint does not know it yet
        trained()
    trained(*change)
    assert curve("tiny") == curve("golden")
    assert weights("tiny", 12) == weights("golden", 12)
    assert [(change.step, change.key) for change in stored().history] == [(4, "optim.lr"), (4, "schedule.floor")]


def test_a_change_says_where_it_really_began_after_going_back_to_an_older_checkpoint(here: Path) -> None:
    stopped(at=8)
    stopped("optim.lr=0.002", at=1, allow=["optim.lr"])
    for step in (8, 9):
        shutil.rmtree(f"runs/tiny/checkpoints/step_{step:08d}")
    trained("optim.lr=0.002")
    assert [change.step for change in stored().history] == [4]
    assert [round(lr, 9) for _, _, lr in curve("tiny")[3:5]] == [0.01, 0.002]


def test_what_is_free_needs_no_flag_and_is_said(here: Path) -> None:
    stopped(at=4)
    text = trained("log.every=2", "checkpoint.every=6", "train.micro_batch=2")
    for line in ("log.every 1 -> 2 (free)", "checkpoint.every 4 -> 6 (free)", "train.micro_batch 4 -> 2 (free)"):
        assert f"changed: {line}" in text
    assert stored().choices.micro_batch == 2
    assert [change.key for change in stored().history] == ["train.micro_batch"]  # of them alone it changes bits
    with pytest.raises(ValueError, match=r"micro_batch \(3\) must divide the batch's 4 rows"):
        trained("train.micro_batch=3")


def test_a_reference_under_another_name_is_said_to_be_free(here: Path) -> None:
    stopped(at=4)
    was = stored()
    now = was.model_copy(update={"init_from": "runs/base@4"})
    found = resume.origin(was, Path("runs/tiny/checkpoints/step_00000004"))
    loader = SimpleNamespace(epochs=lambda step: [("data/cats", 0.1)])
    assert "  changed: init_from null -> runs/base@4 (free)" in resume.told(was, now, found, loader)


def test_a_choice_is_obeyed_and_another_one_asked_for_needs_its_name(here: Path) -> None:
    stopped(at=4)
    trained("train.threads=auto", "train.dtype=auto")
    assert (stored().choices.threads, stored().history) == (1, ())
    with pytest.raises(ValueError, match=r"(?s)train.dtype: float32 -> bfloat16.*--allow train.dtype"):
        trained("train.dtype=bfloat16")
    trained("train.dtype=bfloat16", allow=["train.dtype"])
    assert stored().choices.dtype == "bfloat16"


def test_a_run_of_a_gpu_that_goes_on_without_one_leaves_its_kernels_behind(here: Path) -> None:
    stopped(at=4)
    path = Path("runs/tiny/config.yaml")
    text = path.read_text()
    assert "attention: dense" in text and "fused: any" in text
    text = text.replace("device: cpu", "device: cuda").replace("attention: dense", "attention: flex")
    path.write_text(text.replace("fused: any", "fused: cudnn"))
    trained("train.device=cpu", allow=["train.device"])
    choices = stored().choices
    assert (choices.device, choices.attention, choices.fused) == ("cpu", "dense", "any")


def test_the_settings_of_a_run_that_changed_are_another_run_from_its_first_step(here: Path) -> None:
    stopped(at=4)
    trained("optim.lr=0.002", allow=["optim.lr"])
    train(config.load(TrainConfig, Path("runs/tiny/config.yaml"), ["name=again"]), console=Console(quiet=True))
    assert stored("again").history == ()
    train(settings("name=direct", "optim.lr=0.002"), console=Console(quiet=True))
    assert weights("again", 12) == weights("direct", 12)


# What is said


def test_a_resume_says_where_it_stands_and_what_comes(here: Path) -> None:
    stopped(at=5)
    text = trained()
    assert re.search(r"tiny goes on after step 5 of 12 \(320 tokens\), from runs/tiny/checkpoints/step_00000005", text)
    assert re.search(r"data read: data/cats 0\.\d\d epochs", text)
    assert "lr: 1.0e-2 at step 6, without a jump, and 2.5e-3 at the last step" in text
    assert "next: evaluation at step 6, checkpoint at step 8, end at step 12" in text
    assert "machine: as it was" in text
    assert "changed" not in text


def test_another_machine_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped("train.threads=2", at=4)
    was = runtime.torch_version()
    monkeypatch.setattr(runtime, "torch_version", lambda: "9.9")
    monkeypatch.setattr(runtime, "cpu_kind", lambda: "abacus")
    monkeypatch.setattr(host, "n_cores", lambda: 1)
    text = trained("train.threads=2")
    assert f"machine: {was} -> 9.9; " in text and "-> abacus; 2 threads as before, on 1 cores" in text
    assert "its bits may differ" in text


@pytest.mark.parametrize(("asked", "threads"), [("auto", 2), ("4", 4)])
def test_more_ranks_take_fewer_threads_each_unless_a_number_was_asked_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, asked: str, threads: int
) -> None:
    for room, name, number in ((host, "n_cores", 4), (runtime, "world_size", 2), (runtime, "local_world_size", 2)):
        monkeypatch.setattr(room, name, lambda number=number: number)
    choices = plan.Choices(
        device="cpu", dtype="float32", compile=False, micro_batch=4, threads=4, steps=12, data="", torch="", cpu=""
    )
    config = settings(f"train.threads={asked}").model_copy(update={"choices": choices})
    assert resume.threads(config) == threads
    (line,) = resume._machine(config)
    assert ("2 threads a rank instead of 4, of 4 cores" in line) is (asked == "auto")


def test_fewer_rows_a_pass_for_more_ranks_are_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped("train.micro_batch=auto", at=4)
    monkeypatch.setattr(
        settle,
        "_dealt",
        lambda config: config.model_copy(update={"choices": config.choices.model_copy(update={"micro_batch": 2})}),
    )
    assert "ranks: 2 rows a pass instead of 4, so that they share a batch equally" in trained("train.micro_batch=auto")


def test_a_finished_run_says_how_to_go_on(here: Path) -> None:
    trained()
    assert "all 12 steps are made; more: train.steps=N --allow train.steps" in trained()


# Longer runs


def test_a_run_at_a_constant_rate_is_made_longer_without_a_jump_and_is_the_longer_run(here: Path) -> None:
    constant = ("schedule={kind: constant, warmup: 2}",)
    trained(*constant, "train.steps=6")
    text = trained(*constant, "train.steps=12", allow=["train.steps"])
    assert "without a jump" in text
    trained(*constant, "name=longer")
    assert curve("tiny") == curve("longer")
    assert weights("tiny", 12) == weights("longer", 12)


@pytest.mark.parametrize("schedule", ["{kind: wsd, warmup: 2, decay: 4}", "{kind: cosine, warmup: 2}"])
def test_a_decayed_run_made_longer_jumps_and_says_so_with_the_way_around(here: Path, schedule: str) -> None:
    trained(f"schedule={schedule}")
    text = trained(f"schedule={schedule}", "train.tokens=1024", "train.steps=null", allow=["train.tokens"])
    assert "a jump from" in text and "without a jump: name=NEW branch_from=runs/tiny@" in text
    assert ("@8 " if "wsd" in schedule else "@STEP,") in text
    assert curve("tiny")[-1][0] == 16


def test_an_end_before_where_the_run_stands_is_refused(here: Path) -> None:
    stopped(at=5)
    with pytest.raises(ValueError, match=r"steps \(4\) ends at step 4, and the run has made 5 already"):
        trained("train.steps=4", allow=["train.steps"])
    trained("train.steps=5", allow=["train.steps"])
    assert json.loads(Path("runs/tiny/status.json").read_text())["state"] == "done"


def test_another_time_budget_is_fitted_by_the_speed_so_far(here: Path) -> None:
    stopped(at=4)
    path = Path("runs/tiny/checkpoints/step_00000004")
    state = {"step": 4, "tokens": 256, "elapsed_s": 8.0}
    origin = resume.Origin(path, state, 2.0)
    before = config.load(TrainConfig, path / "run.yaml")
    budget = settings("train.steps=null", "train.time=28").train
    longer = resume.continued(before, before.model_copy(update={"train": budget}), origin, ["train.time"], path, "x")
    assert longer.choices.steps == 4 + 10


# Branches


def test_a_branch_with_the_trunk_s_settings_is_the_trunk_going_on(here: Path) -> None:
    trained()
    before = {p: p.read_bytes() for p in Path("runs/tiny").rglob("*") if p.is_file()}
    text = trained("name=same", "branch_from=runs/tiny@4")
    assert "branch same begins after step 4 of 12 (256 tokens), from runs/tiny/checkpoints/step_00000004" in text
    assert "without a jump" in text
    assert curve("same") == curve("tiny")[4:]
    assert weights("same", 12) == weights("tiny", 12)
    assert {p: p.read_bytes() for p in Path("runs/tiny").rglob("*") if p.is_file()} == before


def test_a_branch_decays_a_trunk_from_its_rate_to_nothing(here: Path) -> None:
    trained("schedule={kind: constant, warmup: 2}", "train.steps=8")
    text = trained(
        "name=cool", "branch_from=runs/tiny@8", "schedule={kind: wsd, warmup: 2, decay: 5}", "train.steps=13"
    )
    assert "lr: 1.0e-2 at step 9, without a jump, and 2.0e-3 at the last step" in text
    lines = curve("cool")
    assert [step for step, _, _ in lines] == [9, 10, 11, 12, 13]
    assert [lr for _, _, lr in lines] == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])  # and then 0
    assert {change.key for change in stored("cool").history} >= {"schedule.kind", "train.steps"}


def test_a_branch_that_jumps_says_so(here: Path) -> None:
    trained()
    assert "a jump from" in trained("name=cool", "branch_from=runs/tiny@4", "schedule.decay=9", "train.steps=8")


def test_a_branch_needs_its_trunk_no_more_once_it_began(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    branch = ("name=side", "branch_from=runs/tiny@8", "train.steps=16", "schedule.decay=8")
    trained(*branch, "name=golden")
    killed_before_a_save(monkeypatch, *branch, step=10)
    shutil.rmtree("runs/tiny")
    trained(*branch)
    assert curve("side") == curve("golden") and weights("side", 16) == weights("golden", 16)


@pytest.mark.parametrize("source", ["runs/tiny", "runs/tiny@best", "runs/tiny@last"])
def test_a_branch_names_one_step(here: Path, source: str) -> None:
    trained()
    with pytest.raises(ValueError, match=r"does not name one step; write runs/tiny@STEP \(it has 4, 8, 12\)"):
        trained("name=side", f"branch_from={source}")
    assert not Path("runs/side").exists()


@pytest.mark.parametrize("change", ["seed=3", "data.seq_len=8", "optim.kind=muon"])
def test_a_branch_shares_what_its_trunk_is(here: Path, change: str) -> None:
    trained()
    with pytest.raises(ValueError, match=rf"(?s){change.partition('=')[0]}: .*init_from=runs/tiny@4"):
        trained("name=side", "branch_from=runs/tiny@4", change)


def test_a_branch_from_a_model_without_a_run_is_refused(here: Path) -> None:
    trained()
    shutil.copytree("runs/tiny/checkpoints/step_00000004", "model")
    for name in ("manifest.json", "optimizer-00000-of-00001.safetensors"):
        Path("model", name).unlink()
    with pytest.raises(
        ValueError, match=r"model is not a checkpoint of a run, with the optimizer's state.*init_from=model"
    ):
        trained("name=side", "branch_from=model")


def test_a_branch_that_would_make_no_step_is_refused(here: Path) -> None:
    trained()
    with pytest.raises(ValueError, match=r"begins after step 12 and is to end at step 12: .*counted from the trunk's"):
        trained("name=side", "branch_from=runs/tiny@12")
