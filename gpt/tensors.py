"""Safetensors files read straight into memory of our own: a header that is believed in nothing, then every byte once.

    8 bytes: length of the header | the header: JSON, name -> dtype, shape, place | the tensors, without a gap

The package that defines the format maps the file and copies from the map, so that a model stands in memory twice for a
moment; it is what writes the files that this is tested with.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from itertools import islice
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt.durable import CorruptError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {  # by the format's names; what is no weight (masks, positions) is measured too, and then left alone
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()}  # bytes of an element
MAX_HEADER = 100_000_000  # bytes: the format's own limit
MAX_DIMENSIONS = 8
PIECE = 1 << 19  # elements read, converted and checked at once, while they are in its cache
RUN = 8 << 20  # bytes read at once where nothing is converted
READERS = min(8, os.cpu_count() or 1)  # threads: memory that is new costs more than the copy into it


class Stored(NamedTuple):
    """A tensor in a file: `start` is its first byte there."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def stored(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name; CorruptError unless its header accounts for each of its bytes once."""
    return described(file)[0]


def described(file: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """`stored`, and the file's metadata: whatever its writer put there."""
    try:
        entries, metadata, start, size = _header(file)
        found, end = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end_of_this = entry["data_offsets"]
            if begin != end:
                raise ValueError(f"{name} begins at byte {begin} of the data, what is before it ends at {end}")
            if end_of_this - begin != (expected := math.prod(shape) * WIDTHS[dtype]):
                raise ValueError(f"{name} has {end_of_this - begin} bytes, {dtype} {list(shape)} needs {expected}")
            found[name], end = Stored(file, name, dtype, shape, start + begin), end_of_this
        if start + end != size:
            raise ValueError(f"the file has {size} bytes, its header describes {start + end}")
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise CorruptError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
    return found, metadata


def _header(file: Path) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """(entries by name, each with a dtype, a shape and two offsets; metadata; where the data begin; the file's size)."""
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"it has {size} bytes, and a header of {length} bytes does not fit")
        entries = json.loads(handle.read(length).decode(), object_pairs_hook=_once)
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in WIDTHS:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']!r:.40}")
        for key, least, most in (("shape", 0, MAX_DIMENSIONS), ("data_offsets", 2, 2)):
            numbers = entry[key]
            if not isinstance(numbers, list) or not least <= len(numbers) <= most:
                raise ValueError(f"{name} has no {key}")
            if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
                raise ValueError(f"the {key} of {name} are no sizes")
    return entries, metadata if isinstance(metadata, dict) else {}, 8 + length, size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys stand in it once."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return values


def read(entries: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as fp32, in memory that nothing else holds: (its key in `entries`, tensor).

    ValueError for one that is no floating-point tensor, or in which something is not finite; CorruptError where the file
    ends before the tensor does.
    """
    with ThreadPoolExecutor(READERS) as pool:
        for name, entry in entries.items():
            yield name, _read_one(entry, pool)


def _read_one(entry: Stored, pool: Executor) -> Tensor:
    where = f"{entry.file}: {entry.name}"
    if entry.dtype not in FLOATS:
        raise ValueError(f"{where} is stored as {entry.dtype}; expected F32, F16 or BF16")
    tensor = torch.empty(entry.shape)
    flat = tensor.view(-1)
    with entry.file.open("rb", buffering=0) as handle:
        pieces = [
            pool.submit(_read_piece, handle.fileno(), entry, start, flat[start : start + PIECE])
            for start in range(0, flat.numel(), PIECE)
        ]
        wait(pieces)  # before the file is closed
    for piece in pieces:
        piece.result()
    return tensor


def _read_piece(fd: int, entry: Stored, start: int, target: Tensor) -> None:
    """Fill `target`, fp32, with the tensor's elements from `start` on."""
    dtype = FLOATS[entry.dtype]
    raw = target if dtype == torch.float32 else torch.empty(len(target), dtype=dtype)
    _read_run(fd, entry, entry.start + start * dtype.itemsize, raw.view(torch.uint8).numpy())
    if raw is not target:
        target.copy_(raw)
    values = target.numpy()
    with np.errstate(all="ignore"):  # a sum may overflow where no number has
        if not np.isfinite(values.sum()) and not np.isfinite(values).all():
            raise ValueError(
                f"{entry.file}: {entry.name} holds a number that is not finite (NaN or infinity); these weights are"
                " damaged, copy or download them again"
            )


def _read_run(fd: int, entry: Stored, at: int, target: np.ndarray) -> None:
    """Fill `target`, bytes in one piece, from byte `at` of the file on."""
    room = memoryview(target.reshape(-1).data)
    while room:
        n_bytes = os.preadv(fd, [room], at)
        if n_bytes == 0:
            raise CorruptError(f"{entry.file}: {entry.name} is cut short: the file was changed while it was read")
        room, at = room[n_bytes:], at + n_bytes


def read_block(entry: Stored, offset: Sequence[int], target: Tensor) -> None:
    """Fill `target` with the block of the stored tensor that begins at `offset`, bit for bit; nothing else is read.

    `target` has the stored dtype, is on the CPU, and its last dimension stands in one piece.
    """
    assert target.dtype == DTYPES[entry.dtype] and target.dim() == len(entry.shape) == len(offset), (
        entry,
        target.shape,
    )
    if not target.numel():
        return
    if not target.dim():
        target, offset, entry = target.view(1), (0,), entry._replace(shape=(1,))
    room, width = target.detach().view(torch.uint8).numpy(), target.itemsize
    whole = (*entry.shape[:-1], entry.shape[-1] * width)
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    at = entry.start + sum(map(mul, (*offset[:-1], offset[-1] * width), strides))
    outer = room.ndim - 1  # dimensions before this one are gone through; from it on the block is one run
    while outer and room.shape[outer] == whole[outer] and room[(0,) * (outer - 1)].flags.c_contiguous:
        outer -= 1
    if outer:
        runs: Iterator[Any] = ((room[i], at + sum(map(mul, i, strides))) for i in np.ndindex(room.shape[:outer]))
    else:
        flat = room.reshape(-1)
        runs = ((flat[begin : begin + RUN], at + begin) for begin in range(0, len(flat), RUN))
    portion = max(1, RUN // room[(0,) * outer].nbytes)  # runs of one thread at once
    with entry.file.open("rb", buffering=0) as handle, ThreadPoolExecutor(READERS) as pool:

        def read_some(some: list[tuple[np.ndarray, int]]) -> None:
            for run, begin in some:
                _read_run(handle.fileno(), entry, begin, run)

        portions = iter(lambda: list(islice(runs, portion)), [])
        if room.nbytes <= RUN:  # threads would cost more than they save
            read_some(list(runs))
        for job in [pool.submit(read_some, some) for some in portions]:
            job.result()
