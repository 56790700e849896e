"""Blocks of tensors: whoever wrote which, any block is read bit for bit; files that do not hold each element once are refused."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from teams import blocks
from torch import Tensor

from gpt import slices, tensors
from gpt.durable import CorruptError
from gpt.slices import Slice

GRIDS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (4, 3)]


def made() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 6, generator=g),
        "half": torch.randn(4, 5, 3, generator=g).bfloat16(),
        "norm": torch.randn(5, generator=g),
        "codes": torch.randint(0, 256, (3, 9), dtype=torch.uint8, generator=g),
        "step": torch.tensor(3.0),
        "row": torch.randn(1, 6, generator=g),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False, True]),
    }


def write(directory: Path, held: list[dict[str, Slice]]) -> list[Path]:
    files = [directory / f"{i}.safetensors" for i in range(len(held))]
    for file, each in zip(files, held, strict=True):
        described = {name: block.described() for name, block in each.items()}
        save_file({name: block.tensor.contiguous() for name, block in each.items()}, file, metadata=described)
    return files


@pytest.mark.parametrize(("written", "read"), list(itertools.product(GRIDS, GRIDS)), ids=str)
def test_what_any_ranks_wrote_any_ranks_read(tmp_path: Path, written: tuple[int, int], read: tuple[int, int]) -> None:
    whole = made()
    files = write(tmp_path, blocks(whole, written))
    assert {name: each.shape for name, each in slices.found(files).items()} == {n: t.shape for n, t in whole.items()}
    for held in blocks(whole, read):
        boxes = {name: (block.offset, tuple(block.tensor.shape)) for name, block in held.items()}
        wanted = slices.Files(files, lambda name, shape: boxes.get(name))  # noqa: B023
        assert wanted.keys() == held.keys()
        for name, block in held.items():
            assert torch.equal(wanted[name], block.tensor) and wanted[name].dtype == block.tensor.dtype, name
            room = torch.zeros_like(whole[name])  # the target may be part of something larger, and of another dtype
            slices.read(wanted.parts[name], (block.offset, tuple(block.tensor.shape)), block.cut(room))
            assert torch.equal(block.cut(room), block.tensor) and room.count_nonzero() == block.tensor.count_nonzero()
            other = torch.zeros(block.tensor.shape, dtype=torch.float64)
            slices.read(wanted.parts[name], (block.offset, tuple(block.tensor.shape)), other)
            assert torch.equal(other, block.tensor.double())


def test_every_block_of_a_stored_tensor_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))
    (file,) = write(tmp_path, [{"x": Slice.whole(whole)}])
    entry = tensors.stored(file)["x"]
    monkeypatch.setattr(tensors, "RUN", 64)  # bytes: many runs, by several threads
    spans = [[(a, b) for a, b in itertools.combinations(range(n + 1), 2)] for n in whole.shape]
    for box in itertools.product(*spans):
        offset, shape = tuple(a for a, _ in box), tuple(b - a for a, b in box)
        room = torch.zeros(shape)
        tensors.read_block(entry, offset, room)
        assert torch.equal(room, slices.cut(whole, offset, shape))


def test_no_byte_outside_the_block_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(8, 8)
    (file,) = write(tmp_path, [{"x": Slice.whole(whole)}])
    entry, read = tensors.stored(file)["x"], []
    real = tensors._read_run
    monkeypatch.setattr(
        tensors, "_read_run", lambda fd, e, at, target: read.append((at, target.nbytes)) or real(fd, e, at, target)
    )
    tensors.read_block(entry, (2, 0), torch.empty(3, 8))
    assert read == [(entry.start + 2 * 32, 3 * 32)], "rows are one run"
    read.clear()
    tensors.read_block(entry, (2, 4), torch.empty(3, 4))
    assert read == [(entry.start + (2 + i) * 32 + 16, 16) for i in range(3)]


def test_a_file_that_shrinks_while_a_block_is_read_is_corrupt(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [{"x": Slice.whole(torch.ones(1000))}])
    parts = slices.found([file])["x"]
    with file.open("r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(CorruptError, match="the file was changed while it was read"):
        slices.read(parts)


def block(offset: tuple[int, ...], shape: tuple[int, ...], of: tuple[int, ...] = (4, 6)) -> dict[str, Slice]:
    return {"x": Slice(of, offset, torch.ones(shape))}


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([block((0, 0), (2, 6))], "of x [4, 6] only 12 of 24 elements stand in 0.safetensors"),
        ([block((0, 0), (2, 6)), block((3, 0), (1, 6))], "only 18 of 24 elements stand in 0.safetensors, 1.safetensors"),
        ([block((0, 0), (3, 6)), block((2, 0), (2, 6))], "x from [0, 0] and, in 1.safetensors, from [2, 0] hold the same"),
        ([block((2, 0), (2, 6)), block((0, 0), (3, 6))], "x from [0, 0] and, in 0.safetensors, from [2, 0] hold the same"),
        ([block((0, 0), (4, 4)), block((0, 3), (4, 3))], "hold the same elements"),
        ([block((0, 0), (4, 6)), block((0, 0), (4, 6))], "hold the same elements"),
        ([block((), (), ()), block((), (), ())], "hold the same elements"),
        ([block((0, 0), (4, 3)), block((0, 3), (4, 3), (4, 7))], "is a block of F32 [4, 7], in 0.safetensors of F32 [4, 6]"),
        ([block((0, 0), (2, 6)), {"x": Slice((4, 6), (2, 0), torch.ones(2, 6).half())}], "is a block of F16 [4, 6], in"),
    ],
    ids=range(9),
)  # fmt: skip
def test_files_that_do_not_hold_every_element_once_are_refused(
    tmp_path: Path, held: list[dict[str, Slice]], words: str
) -> None:
    with pytest.raises(CorruptError, match=re.escape(words)) as error:
        slices.found(write(tmp_path, held))
    assert str(tmp_path) in str(error.value) and "restore the checkpoint from a copy" in str(error.value)


@pytest.mark.parametrize(
    "told",
    [None, 7, "", "[]", "{}", "{", "[" * 9999, {"shape": [4], "offset": [0]}, {"shape": [4, 6], "offset": [0]},
     {"shape": [4, 6], "offset": [1, 0]}, {"shape": [4, 6], "offset": [-1, 0]}, {"shape": [4, 6.0], "offset": [0, 0]},
     {"shape": [4, True], "offset": [0, 0]}, {"shape": "46", "offset": "00"}, {"shape": [4, 5], "offset": [0, 0]}],
    ids=lambda told: str(told)[:40],
)  # fmt: skip
def test_a_block_that_does_not_lie_in_its_whole_is_refused(tmp_path: Path, told: Any) -> None:
    file = tmp_path / "x.safetensors"
    text = told if isinstance(told, str) else json.dumps(told)
    save_file({"x": torch.ones(4, 6)}, file, metadata=None if told is None else {"x": text})
    with pytest.raises(CorruptError, match="does not say which block of which shape x is"):
        slices.found([file])
