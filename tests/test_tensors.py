"""Reading safetensors: what the package wrote comes back bit for bit, and a header that does not add up is refused."""

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpt import tensors
from gpt.durable import CorruptError

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_point_tensor_comes_back_as_fp32(file: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    held = {
        "large": torch.randn(3, 700_001).to(dtype),  # several pieces, the last one short
        "empty": torch.zeros(0, 5, dtype=dtype),
        "number": torch.tensor(2.5, dtype=dtype),
        "row": torch.randn(7).to(dtype),
    }
    save_file(held, file, metadata={"format": "pt"})
    read = dict(tensors.read(tensors.stored(file)))
    assert read.keys() == held.keys()
    for name, tensor in held.items():
        assert read[name].dtype == torch.float32
        assert read[name].is_contiguous()
        assert torch.equal(read[name], tensor.float())


def test_what_is_no_weight_is_measured_and_refused_only_when_read(file: Path) -> None:
    save_file({"mask": torch.ones(3, dtype=torch.bool), "x": torch.ones(2)}, file)
    held = tensors.stored(file)
    assert torch.equal(dict(tensors.read({"x": held["x"]}))["x"], torch.ones(2))
    with pytest.raises(ValueError, match="mask is stored as BOOL; expected F32, F16 or BF16"):
        dict(tensors.read(held))


def test_large_finite_numbers_are_finite(file: Path) -> None:
    save_file({"x": torch.full((1000,), 3e38)}, file)  # their sum is not
    assert dict(tensors.read(tensors.stored(file)))["x"].max() == torch.tensor(3e38)


def test_a_file_that_shrinks_while_it_is_read_is_corrupt(file: Path) -> None:
    save_file({"x": torch.ones(1000)}, file)
    held = tensors.stored(file)
    with file.open("r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(CorruptError, match="the file was changed while it was read"):
        dict(tensors.read(held))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"x": ENTRY | {"data_offsets": [0, 20]}}, "x has 20 bytes, F32 [2, 3] needs 24"),
        ({"x": ENTRY | {"shape": [2, 4]}}, "x has 24 bytes, F32 [2, 4] needs 32"),
        ({"x": ENTRY | {"shape": [1 << 40, 1 << 40]}}, "needs"),
        ({"x": ENTRY, "y": ENTRY}, "y begins at byte 0 of the data, what is before it ends at 24"),
        ({"x": ENTRY | {"data_offsets": [4, 28]}}, "x begins at byte 4"),
        ({"x": ENTRY | {"data_offsets": [24, 0]}}, "x begins at byte 24"),
        ({"x": ENTRY | {"data_offsets": [0, 1 << 62]}}, "needs 24"),
        ({"x": ENTRY | {"data_offsets": [0, 1 << 80]}}, "are no sizes"),
        ({"x": ENTRY | {"data_offsets": [0, -24]}}, "are no sizes"),
        ({"x": ENTRY | {"data_offsets": [0, 24.0]}}, "are no sizes"),
        ({"x": ENTRY | {"data_offsets": [0]}}, "x has no data_offsets"),
        ({"x": ENTRY | {"shape": [True, 6]}}, "are no sizes"),
        ({"x": ENTRY | {"shape": [1] * 99 + [6]}}, "x has no shape"),
        ({"x": ENTRY | {"shape": 6}}, "x has no shape"),
        ({"x": ENTRY | {"dtype": "F3"}}, "x has the unknown dtype 'F3'"),
        ({"x": ENTRY | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"x": ENTRY | {"more": 1}}, "x is not described by"),
        ({"x": 3}, "x is not described by"),
        ({}, "its header describes"),
        ([ENTRY], "its header is no JSON object"),
        (b'{"x": 1, "x": 2}', "stands in its header twice"),
        (b'{"x": ', "not a whole safetensors file"),
        (b"\xff\xfe", "not a whole safetensors file"),
        (b"[" * 100_000, "not a whole safetensors file"),
        (b"9" * 10_000, "not a whole safetensors file"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_header_that_does_not_account_for_each_byte_once_is_refused(file: Path, header: Any, words: str) -> None:
    with pytest.raises(CorruptError) as error:
        tensors.stored(write(file, header))
    assert words in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(23), bytes(25)])
def test_a_file_of_another_size_than_its_header_says_is_refused(file: Path, data: bytes) -> None:
    with pytest.raises(CorruptError, match="its header describes"):
        tensors.stored(write(file, {"x": ENTRY}, data))


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 4096])
def test_an_absurd_length_of_the_header_costs_no_memory(file: Path, length: int) -> None:
    write(file, {"x": ENTRY}, length=length)
    tracemalloc.start()
    with pytest.raises(CorruptError, match="does not fit"):
        tensors.stored(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_file_too_short_to_say_anything_is_refused(file: Path) -> None:
    for data in (b"", b"\x01", bytes(7)):
        file.write_bytes(data)
        with pytest.raises(CorruptError, match="not a whole safetensors file"):
            tensors.stored(file)
