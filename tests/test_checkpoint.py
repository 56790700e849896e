import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from faults import FAULTS, Killed, Unsynced, every_sync_watched, failed, installed, n_operations
from safetensors import safe_open
from safetensors.torch import load_file
from teams import blocks, load_weights, on_all
from torch import Tensor

from gpt import checkpoint, durable, host, hub
from gpt.checkpoint import DTYPES, Checkpoints, load_optimizer, load_state, save, serialize, verify
from gpt.durable import CorruptError
from gpt.slices import Slice
from gpt.team import Team

ROOT = Path(__file__).resolve().parent.parent
FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with installed(Unsynced()):
        yield


def weights(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"embed": (7, 4), "norm": (4,)}.items()}


def moments(step: int) -> dict[str, Tensor]:
    return {f"{name}:exp_avg": tensor * 0.5 for name, tensor in weights(step).items()}


def write(path: Path, step: int = 1, **changes: Any) -> Path:
    """A small checkpoint that `step` determines."""
    arguments: dict[str, Any] = {
        "model_files": FILES,
        "weights": weights(step),
        "optimizer": moments(step),
        "run_yaml": "name: x\n",
        "state": {"step": step},
    }
    save(path, **(arguments | changes))
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def awkward() -> dict[str, Tensor]:
    """Tensors of every dtype, odd sizes first, and shapes that are easily got wrong."""
    raw = torch.randint(0, 256, (48,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = {f"of.{dtype}": raw.view(dtype)[:3].clone() for dtype in reversed(DTYPES) if dtype != torch.bool}
    grid = torch.arange(24.0).reshape(2, 3, 4)
    return {
        "odd": torch.tensor([True, False, True]),
        **made,
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "transposed": grid.transpose(0, 2),
        "strided": grid[:, ::2],
        "expanded": torch.tensor([1.0]).expand(5),
        "learned": torch.nn.Parameter(torch.ones(2)),
        '名前 "quoted"': torch.tensor([1, -1]),
    }


def test_the_safetensors_package_reads_the_same_tensors(tmp_path: Path) -> None:
    tensors = awkward()
    file = tmp_path / "model.safetensors"
    durable.write_file(file, serialize(tensors, {"format": "pt"}))
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_header_and_tensors_begin_where_they_can_be_read_in_place(tmp_path: Path) -> None:
    for length in range(1, 9):
        data = b"".join(serialize({"x" * length: torch.ones(2), **awkward()}, {}))
        (n_header,) = struct.unpack("<Q", data[:8])
        assert n_header % 8 == 0
        for name, entry in json.loads(data[8 : 8 + n_header]).items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % ({**awkward(), "x" * length: torch.ones(2)}[name].element_size()) == 0


def test_tensors_are_written_from_where_they_stand() -> None:
    tensors = {"a": torch.ones(1000, 100), "b": torch.zeros(1000)}
    chunks = serialize(tensors, {})
    next(chunks)
    for tensor, chunk in zip(tensors.values(), chunks, strict=True):
        assert np.frombuffer(chunk, np.uint8).ctypes.data == tensor.data_ptr(), "no copy was made"


def test_large_tensors_are_written_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "PART", 16)
    durable.write_file(tmp_path / "f", serialize(weights(1), {}))
    assert same(load_file(tmp_path / "f"), weights(1))


def test_a_dtype_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x: safetensors has no torch\.complex128"):
        list(serialize({"x": torch.ones(1, dtype=torch.complex128)}, {}))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    with every_sync_watched():
        path = write(tmp_path / "step", 3)
    verify(path)
    assert same(load_weights(path), weights(3)) and same(load_optimizer(path), moments(3))
    assert load_state(path) == {"step": 3}
    assert {name: (path / name).read_bytes() for name in FILES} == FILES
    assert (path / "run.yaml").read_text() == "name: x\n"
    told = json.loads((path / "manifest.json").read_bytes())["sha256"]
    assert told == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    with safe_open(path / "optimizer-00000-of-00001.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["embed:exp_avg"]) == {"shape": [7, 4], "offset": [0, 0]}


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 3), write(tmp_path / "b", 3)
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}


def test_loaded_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "step")
    loaded = load_weights(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.write(bytes((path / "model.safetensors").stat().st_size))
    assert same(loaded, weights(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path, bad: float) -> None:
    broken = weights(1)
    broken["norm"][2] = bad
    with pytest.raises(FloatingPointError, match="norm holds numbers that are not finite"):
        write(tmp_path / "step", weights=broken)
    assert list(tmp_path.iterdir()) == []


def test_an_index_keeps_others_from_taking_averages_for_weights(tmp_path: Path) -> None:
    """Loaders such as vLLM's take every file of tensors in a directory, unless an index names those that are meant."""
    path = write(tmp_path / "step")
    index = json.loads((path / hub.INDEX).read_bytes())
    assert index["weight_map"] == dict.fromkeys(weights(1), checkpoint.WEIGHTS)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(1).values())
    write(tmp_path / "adapter", weights_file=checkpoint.ADAPTER_WEIGHTS)
    assert not (tmp_path / "adapter" / hub.INDEX).exists()


def test_a_manifest_that_the_disk_changed_is_found_by_the_save_itself(tmp_path: Path) -> None:
    class Forgetful(Unsynced):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            changed = bytes(data).replace(b"optimizer-00000", b"optimizer-00009")
            super().write(fd, changed if b'"sha256"' in bytes(data) else data)
            return len(data)

    with installed(Forgetful()), pytest.raises(CorruptError, match=r"manifest\.json"):
        write(tmp_path / "step")


def test_every_changed_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "step")
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for at in range(0, len(whole), 5):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            if file.name == "manifest.json" and whole[at : at + 1].isspace():
                continue
            with pytest.raises(
                CorruptError, match=f"; delete {path} to continue from the checkpoint before it$"
            ) as error:
                verify(path)
            assert file.name in str(error.value) or file.name == "manifest.json"
        file.write_bytes(whole[:-1])
        with pytest.raises(CorruptError, match=file.name):
            verify(path)
        file.unlink()
        with pytest.raises(CorruptError, match=f"{file.name} is missing"):
            verify(path)
        file.write_bytes(whole)
    verify(path)
    (path / "notes.txt").write_text("what someone else puts there is theirs")
    verify(path)


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        [],
        1,
        {},
        {"format": 1},
        {"format": 1, "sha256": {}},
        {"format": 1, "sha256": []},
        {"format": 2, "sha256": {}},
    ],
    ids=str,
)
def test_a_manifest_that_vouches_for_less_than_a_checkpoint_is_refused(tmp_path: Path, manifest: Any) -> None:
    path = write(tmp_path / "step")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        verify(path)


def test_another_format_of_checkpoint_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "step")
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CorruptError, match=r"manifest\.json: format 2, this program reads 1"):
        verify(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "", ".", "..", ".hidden", "link"])
def test_no_name_in_a_manifest_leaves_its_directory(tmp_path: Path, name: str) -> None:
    path, outside = write(tmp_path / "step"), tmp_path / "outside"
    outside.write_bytes(b"x")
    (path / "link").symlink_to(outside)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["sha256"][name] = hashlib.sha256(b"x").hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="which is not a plain file beside it"):
        verify(path)


def test_a_manifest_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "step")

    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError):
        verify(path)


def test_a_damaged_file_of_tensors_is_corrupt(tmp_path: Path) -> None:
    path = write(tmp_path / "step")  # thousands more ways to damage one: tests/fuzz.py
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        load_weights(path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer-00000-of-00001.safetensors", "state.json", "run.yaml"]
)
def test_every_file_that_resume_needs_is_vouched_for(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step")
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=rf"manifest\.json does not name {name}"):
        verify(path)


def test_a_manifest_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "step")
    (path / "manifest.json").rename(tmp_path / "elsewhere.json")
    (path / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CorruptError, match=r"manifest\.json is a symbolic link"):
        verify(path)


def test_a_checkpoint_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path / "checkpoints", keep=1)
    write(tmp_path / "elsewhere")
    saves.directory.mkdir()
    saves.path(7).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="step_00000007: is a symbolic link, which is not followed"):
        saves.latest()


def test_the_latest_checkpoint_is_the_highest_whole_step(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, keep=2)
    assert saves.latest() is None and saves.steps() == []
    for step in (30, 4, 200):
        write(saves.path(step), step)
    (tmp_path / "step_00000300").mkdir()  # no manifest: never whole
    failed(5, Killed(), lambda: write(saves.path(400), 400))
    os.utime(saves.path(4))
    assert saves.steps() == [4, 30, 200]
    assert saves.latest() == saves.path(200)
    with pytest.raises(
        ValueError, match=r"step_00000300 is no whole checkpoint \(it has no manifest.json\).*delete it"
    ):
        saves.sweep()
    (tmp_path / "step_00000300").rmdir()
    saves.sweep()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_corrupt_latest_checkpoint_is_an_error_and_never_skipped(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        write(saves.path(step), step)
    with saves.path(2).joinpath("model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(CorruptError, match=r"step_00000002/model\.safetensors.*; delete .*step_00000002 to continue"):
        saves.latest()
    durable.remove_directory(saves.path(2))
    assert saves.latest() == saves.path(1)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4, 5):
        write(saves.path(step), step)
    saves.prune(best=2)
    assert saves.steps() == [2, 4, 5]
    saves.prune(best=4)
    assert saves.steps() == [4, 5]
    saves.prune(best=None)
    assert saves.steps() == [4, 5] and len(list(tmp_path.iterdir())) == 2


def test_nothing_is_deleted_while_the_newest_is_not_whole(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        write(saves.path(step), step)
    (saves.path(3) / "state.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"state\.json"):
        saves.prune(best=None)
    assert saves.steps() == [1, 2, 3]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_pruned_checkpoint_is_whole_or_gone_whatever_fails(tmp_path: Path, fault: BaseException) -> None:
    for k in (1, 2, 3):  # rename, sync, delete
        saves = Checkpoints(tmp_path / str(k), keep=1)
        saves.directory.mkdir()
        for step in (1, 2):
            write(saves.path(step), step)
        told = failed(k, fault, lambda: saves.prune(best=None))  # noqa: B023 (called at once)
        assert told or k == 3, "what has lost its name is swept later"
        for path in saves.directory.glob("step_*"):
            verify(path)
        assert saves.steps() == ([1, 2] if k == 1 else [2])


LAST = 4


def train(directory: Path) -> None:
    """A run in small: continues from the newest checkpoint to step LAST; each state depends on the one before."""
    directory.mkdir(parents=True, exist_ok=True)
    saves = Checkpoints(directory, keep=1)
    saves.sweep()
    latest = saves.latest()
    saves.prune(best=1)  # it may have been stopped between a save and this
    state = load_state(latest) if latest else {"step": 0}
    tensors, averages = (load_weights(latest), load_optimizer(latest)) if latest else (weights(0), moments(0))
    for step in range(state["step"] + 1, LAST + 1):
        averages = {name: 0.9 * value + step for name, value in averages.items()}
        tensors = {name: value - 0.1 * averages[f"{name}:exp_avg"] for name, value in tensors.items()}
        write(saves.path(step), step, weights=tensors, optimizer=averages)
        saves.prune(best=1)


def result(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, bytes]]:
    """(operations, every file) of a run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("golden")
    with every_sync_watched():
        train(directory)
    n = n_operations(lambda: train(directory / "again"))
    files = {name: data for name, data in result(directory).items() if not name.startswith("again")}
    assert {name.split("/")[0] for name in files} == {"step_00000001", f"step_{LAST:08d}"}
    return n, files


def check_whole(directory: Path, reached: int) -> None:
    """Every checkpoint that is there is whole, and step `reached` or a later one is there."""
    saves = Checkpoints(directory, keep=1)
    for step in saves.steps():
        verify(saves.path(step))
    assert max(saves.steps(), default=0) >= reached


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_run_that_fails_at_any_operation_ends_with_the_same_bytes(
    tmp_path: Path, golden: tuple[int, dict[str, bytes]], fault: BaseException
) -> None:
    n, expected = golden
    for k in range(1, n + 1):
        directory = tmp_path / str(k)
        failed(k, fault, lambda: train(directory))  # noqa: B023 (called at once)
        check_whole(directory, reached=(k - 1) * LAST // n - 1)
        train(directory)
        assert result(directory) == expected


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_while_it_recovers_ends_with_the_same_bytes(
    tmp_path: Path, golden: tuple[int, dict[str, bytes]], stride: int
) -> None:
    n, expected = golden
    for pair in range(0, n * 12, stride):
        first, second = pair // 12 + 1, pair % 12 + 1  # in what a recovery does first
        directory = tmp_path / str(pair)
        failed(first, Killed(), lambda: train(directory))  # noqa: B023 (called at once)
        failed(second, Killed(), lambda: train(directory))  # noqa: B023
        check_whole(directory, reached=(first - 1) * LAST // n - 1)
        train(directory)
        assert result(directory) == expected


def test_where_a_rollback_would_go_is_kept_besides(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        write(saves.path(step), step)
    saves.prune(2, 3)
    assert saves.steps() == [2, 3, 5, 6]


def test_files_are_hashed_by_all_cores_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = FILES | {"vocab.json": b"{}", "merges.txt": b""}
    path, real = write(tmp_path / "step", model_files=more), durable.sha256_file
    together = threading.Barrier(3, timeout=30)

    def met(file: Path) -> str:
        together.wait()  # broken unless three files are being hashed
        return real(file)

    monkeypatch.setattr(host, "n_cores", lambda: 3)
    monkeypatch.setattr(durable, "sha256_file", met)
    assert len(list(path.iterdir())) == 10, "nine and the manifest"
    verify(path)


# Several ranks


def mixed() -> dict[str, Tensor]:
    """An optimizer's state: averages in the shape of weights, of which some are 8-bit pieces, and step counts."""
    generator = torch.Generator().manual_seed(7)
    state = {f"w{i}:exp_avg": torch.randn(shape, generator=generator) for i, shape in enumerate([(9, 6), (4, 4), (5,)])}
    codes = torch.randint(0, 256, (3, 8), dtype=torch.uint8, generator=generator)
    return state | {"w3:exp_avg.codes": codes, "w3:exp_avg.scale": torch.ones(2), "w0:step": torch.tensor(3.0)}


def share(grid: tuple[int, int], rank: int) -> dict[str, Slice]:
    """What a rank of the grid writes of `mixed`; the pieces of an 8-bit average stay whole, with one owner."""
    state = mixed()
    divided = blocks({name: tensor for name, tensor in state.items() if "exp_avg." not in name}, grid)[rank]
    pieces = {name: Slice.whole(tensor) for name, tensor in state.items() if "exp_avg." in name}
    return divided | (pieces if rank == 1 % (grid[0] * grid[1]) else {})


def save_on(grid: tuple[int, int], path: Path) -> None:
    given = weights(1) | {"head": torch.arange(40.0).reshape(8, 5)}
    sizes = {name: tensor.nbytes for name, tensor in given.items()}

    def work(team: Team) -> None:
        owner = checkpoint.owners(sizes, team.size)
        save(
            path,
            team,
            model_files=FILES,
            weights={name: tensor for name, tensor in given.items() if owner[name] == team.rank},
            sizes=sizes,
            optimizer=share(grid, team.rank),
            run_yaml="name: x\n",
            state={"step": 1},
        )

    on_all(grid[0] * grid[1], work)


GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_any_ranks_save_any_ranks_load(tmp_path: Path, grid: tuple[int, int]) -> None:
    path = tmp_path / "step"
    with every_sync_watched():
        save_on(grid, path)
    verify(path)
    on_all(3, lambda team: verify(path, team))
    assert same(dict(load_optimizer(path)), mixed())
    for other in GRIDS:
        for rank in range(other[0] * other[1]):
            held = {name: (b.offset, tuple(b.tensor.shape)) for name, b in share(other, rank).items()}
            found = load_optimizer(path, lambda name, shape: held.get(name))  # noqa: B023 (called at once)
            assert same(dict(found), {name: block.tensor for name, block in share(other, rank).items()})


def test_weights_of_any_ranks_are_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS_FILE", 150)
    for grid in GRIDS:
        save_on(grid, tmp_path / str(grid))
    first, *others = [
        {f.name: f.read_bytes() for f in (tmp_path / str(grid)).iterdir() if f.name.startswith("model")}
        for grid in GRIDS
    ]
    assert sorted(first) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", hub.INDEX]
    assert all(other == first for other in others)
    found = checkpoint.weight_files(tmp_path / "(2, 1)")
    assert [file.name for file in found] == sorted(first)[:2], "what is no weight is left out"
    index = json.loads(first[hub.INDEX])
    assert index["weight_map"] == {
        name: f"model-0000{i}-of-00002.safetensors" for name, i in (("embed", 1), ("norm", 1), ("head", 2))
    }
    assert index["metadata"]["total_size"] == 4 * (28 + 4 + 40)
    assert same(load_weights(tmp_path / "(2, 1)"), weights(1) | {"head": torch.arange(40.0).reshape(8, 5)})


def test_tensors_are_dealt_to_files_of_a_limited_size() -> None:
    assert checkpoint.dealt({}, 10) == [[]]
    assert checkpoint.dealt({"a": 4, "b": 6, "c": 1, "d": 99, "e": 2, "f": 8}, 10) == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e", "f"],
    ]


def test_averages_are_written_in_files_of_a_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "OPTIMIZER_FILE", 100)
    save_on((2, 1), tmp_path / "step")
    names = [file.name for file in checkpoint.optimizer_files(tmp_path / "step")]
    assert names == [f"optimizer-{i:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))] and len(names) > 3
    assert same(dict(load_optimizer(tmp_path / "step")), mixed())


@pytest.mark.parametrize(
    "gone",
    [
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00000-of-00002.safetensors",
        "state.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        hub.INDEX,
    ],
)
def test_a_manifest_that_forgets_a_file_is_refused(tmp_path: Path, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS_FILE", 150)
    path = tmp_path / "step"
    save_on((2, 1), path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"][gone]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=f"does not name {gone}"):
        verify(path)


def test_ranks_verify_together_and_all_hear_what_one_finds(tmp_path: Path) -> None:
    path = tmp_path / "step"
    save_on((2, 2), path)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CorruptError, match=file.name):
            on_all(3, lambda team: verify(path, team))
        file.write_bytes(whole)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_whatever_fails_on_one_of_several_ranks_the_checkpoint_is_whole_or_absent(
    tmp_path: Path, fault: BaseException
) -> None:
    n = n_operations(lambda: save_on((2, 1), tmp_path / "count"))
    for k in range(1, n + 1):
        directory = tmp_path / str(k)
        directory.mkdir()
        assert failed(k, fault, lambda: save_on((2, 1), directory / "step"))  # noqa: B023 (called at once)
        if (directory / "step").exists():
            verify(directory / "step")
        if not isinstance(fault, Killed):
            assert [path.name for path in directory.iterdir()] in ([], ["step"]), "nothing is left behind"


def test_machines_that_do_not_share_a_disk_are_told_so(tmp_path: Path) -> None:
    def work(team: Team) -> None:
        own = tmp_path / str(team.rank)
        own.mkdir()
        save(own / "step", team, model_files=FILES, weights={}, sizes={}, optimizer={}, run_yaml="", state={})

    with pytest.raises(FileNotFoundError, match=r"another directory on the machine of rank 1 .* all machines share"):
        on_all(2, work)
    assert list((tmp_path / "0").iterdir()) == []


# Processes


WORK = """
import errno, json, os, signal, sys
from pathlib import Path
import torch
from gpt import durable
from gpt.checkpoint import Checkpoints, load_optimizer, owners
from gpt.saving import Writer
from gpt.team import Elsewhere, Team
from teams import blocks, load_weights

saves = Checkpoints(Path(sys.argv[1]), 2)
shapes = {"a": (7, 6), "b": (5,), "c": (8, 3)}

def state(step):
    g = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return weights, {f"{name}:exp_avg": 2 * tensor for name, tensor in weights.items()}

def begin(writer, step, grid, before=lambda: None):
    weights, averages = state(step)
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    owner = owners(sizes, writer.team.size)
    writer.begin(saves.path(step), weights={n: t for n, t in weights.items() if owner[n] == writer.team.rank}, sizes=sizes,
                 optimizer=blocks(averages, grid)[writer.team.rank], before=before, after=lambda: None,
                 model_files={}, run_yaml="", state={"step": step})

def check(team, step, grid):
    assert saves.latest(team) == saves.path(step)
    weights, averages = state(step)
    mine = blocks(averages, grid)[team.rank]
    boxes = {name: (block.offset, tuple(block.tensor.shape)) for name, block in mine.items()}
    found = load_optimizer(saves.path(step), lambda name, shape: boxes.get(name))
    assert found.keys() == mine.keys() and all(torch.equal(found[name], block.tensor) for name, block in mine.items())
    found = load_weights(saves.path(step))
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())

with Team.joined(60) as team:
    {END}
"""


def processes(end: str, size: int, path: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run WORK in `size` processes as torchrun would start them."""
    work = WORK.replace("{END}", textwrap.indent(end, "    ").strip())
    return ranks.run([sys.executable, "-c", work + ranks.ENDED, str(path)], size)


def test_processes_save_in_the_background_and_others_continue(tmp_path: Path) -> None:
    saving = """
with Writer(team, say=print) as writer:
    for step, grid in ((1, (4, 1)), (2, (2, 2))):
        begin(writer, step, grid)
        team.gather(step)  # the loop's own words, while the threads talk
check(team, 2, (1, 4))
"""
    ended = processes(saving, 4, tmp_path)
    assert [each.returncode for each in ended] == [0] * 4, ended[0].stderr
    continuing = """
check(team, 2, (2, 1))
def full():
    if team.rank == 1:
        raise OSError(errno.ENOSPC, "no space left")
try:
    with Writer(team, say=print) as writer:
        begin(writer, 3, (1, 2), full)
    raised = None
except (OSError, Elsewhere) as error:
    raised = str(error)
assert "no space left" in raised, raised
check(team, 2, (1, 2))
with Writer(team, say=print) as writer:
    begin(writer, 3, (1, 2))
"""
    ended = processes(continuing, 2, tmp_path)
    assert [each.returncode for each in ended] == [0] * 2, [each.stderr for each in ended]
    assert Checkpoints(tmp_path, keep=2).latest() == tmp_path / "step_00000003"
    assert same(
        dict(load_optimizer(tmp_path / "step_00000003")),
        {f"{n}:exp_avg": 2 * t for n, t in load_weights(tmp_path / "step_00000003").items()},
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path, victim: int) -> None:
    killing = f"""
class Killing(durable.FileSystem):
    def write(self, fd, data):
        os.write(fd, data[:7])
        os.kill(os.getpid(), signal.SIGKILL)

with Writer(team, say=print) as writer:
    begin(writer, 1, (2, 1))
    writer.wait()
    if team.rank == {victim}:
        durable.fs = Killing()
    begin(writer, 2, (2, 1))
"""
    ended = processes(killing, 2, tmp_path)
    assert ended[victim].returncode == -9
    assert ended[1 - victim].returncode in (1, -signal.SIGABRT)  # by torch's threads, at the interpreter's end
    saves = Checkpoints(tmp_path, keep=2)
    assert saves.latest() == saves.path(1)
    saves.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


# The verb


def verified(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpt.checkpoint", "verify", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_the_verb_prints_a_line_a_checkpoint_and_what_is_wrong(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path / "checkpoints", keep=9)
    saves.directory.mkdir()
    for step in (1, 2, 3):
        write(saves.path(step), step)
    (saves.directory / "step_notes.txt").write_text("the second is the good one")
    done = verified(str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [str(saves.path(step)) for step in (1, 2, 3)]
    assert all(": whole, " in line for line in done.stdout.splitlines())
    (saves.path(2) / "state.json").write_text("{}")
    done = verified(str(tmp_path))
    assert done.returncode == 3
    assert [line.split(": ")[1].split(",")[0] for line in done.stdout.splitlines()] == ["whole", "damaged", "whole"]
    assert "step_00000002/state.json is not what was written" in done.stderr and "Traceback" not in done.stderr


def test_verifying_reads_what_the_files_say(tmp_path: Path) -> None:
    path = tmp_path / "step"
    save_on((2, 1), path)
    list(checkpoint.verified(path))
    file = path / "optimizer-00001-of-00002.safetensors"
    durable.write_file(
        file, serialize({"w0:exp_avg": torch.ones(9, 6)}, {"w0:exp_avg": Slice.whole(torch.ones(9, 6)).described()})
    )
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["sha256"][file.name] = durable.sha256_file(file)
    (path / "manifest.json").write_text(json.dumps(manifest))
    verify(path)
    with pytest.raises(CorruptError, match="w0:exp_avg from"):
        list(checkpoint.verified(path))


def test_what_is_no_run_and_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, words in (
        (tmp_path, "neither a run"),
        (tmp_path / "absent", "neither a run"),
        (tmp_path / "run", "has no checkpoint yet"),
    ):
        with pytest.raises(ValueError, match=words):
            list(checkpoint.verified(path))
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir()
    with pytest.raises(CorruptError, match=r"manifest\.json is missing"):
        list(checkpoint.verified(tmp_path / "run"))
