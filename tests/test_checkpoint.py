import hashlib
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import FAULTS, Killed, Unsynced, every_sync_watched, failed, installed, n_operations
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gpt import checkpoint, durable
from gpt.checkpoint import DTYPES, Checkpoints, load_optimizer, load_state, load_weights, save, serialize, verify
from gpt.durable import CorruptError

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


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_damaged_tensor_file_is_an_error_or_tensors(tmp_path: Path, n: int) -> None:
    path, rng = write(tmp_path / "step"), random.Random(5)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for _ in range(n):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 6])):
            at = rng.randrange(min(len(data), 200))
            data[at : at + rng.choice([0, 1, 1, 4])] = rng.randbytes(rng.choice([0, 1, 1, 4]))
        file.write_bytes(data)
        try:
            assert all(isinstance(tensor, Tensor) for tensor in load_weights(path).values())
        except CorruptError as error:
            assert "model.safetensors" in str(error)


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
    saves.sweep()
    assert len(list(tmp_path.iterdir())) == 4


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
        assert failed(k, fault, lambda: saves.prune(best=None))  # noqa: B023 (called at once)
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
