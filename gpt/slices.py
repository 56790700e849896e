"""Tensors in blocks: several ranks hold and write parts of one, and others, however many, read the parts that they need.

A file says of each block, in its metadata, the shape of the whole and where the block begins there. Nothing here knows ranks.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gpt import tensors
from gpt.durable import CorruptError

Shape = tuple[int, ...]


class Slice(NamedTuple):
    """A block of a tensor: the shape of the whole, where the block begins in it, and what stands there."""

    shape: Shape
    offset: Shape
    tensor: Tensor

    @classmethod
    def whole(cls, tensor: Tensor) -> Self:
        """The one block of a tensor that is not divided."""
        return cls(tuple(tensor.shape), (0,) * tensor.dim(), tensor)

    def described(self) -> str:
        """What a file says of the block."""
        return json.dumps({"shape": list(self.shape), "offset": list(self.offset)})

    def cut(self, whole: Tensor) -> Tensor:
        """The same block of another tensor of that shape."""
        return cut(whole, self.offset, tuple(self.tensor.shape))


class Piece(NamedTuple):
    """A block in a file."""

    stored: tensors.Stored
    offset: Shape


class Parts(NamedTuple):
    """A whole tensor, in pieces that hold each of its elements once."""

    shape: Shape
    pieces: list[Piece]


# Name and shape of a whole -> offset and shape of a block of it, None where none of it is wanted.
Wanted = Callable[[str, Shape], tuple[Shape, Shape] | None]


def whole(name: str, shape: Shape) -> tuple[Shape, Shape] | None:
    """All of it is wanted."""
    return (0,) * len(shape), shape


def cut(tensor: Tensor, offset: Shape, shape: Shape) -> Tensor:
    """The block of `tensor` that begins at `offset`; a view."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def overlap(a: Shape, a_shape: Shape, b: Shape, b_shape: Shape) -> tuple[Shape, Shape] | None:
    """(offset, shape) of what two blocks of one tensor have in common; None for nothing."""
    begin = tuple(map(max, a, b))
    end = (min(x + n, y + m) for x, n, y, m in zip(a, a_shape, b, b_shape, strict=True))
    shape = tuple(last - first for first, last in zip(begin, end, strict=True))
    return (begin, shape) if all(n > 0 for n in shape) else None


def found(files: Iterable[Path]) -> dict[str, Parts]:
    """What the files hold together, by name; CorruptError unless they hold every element of each tensor once."""
    parts: dict[str, Parts] = {}
    for file in files:
        held, metadata = tensors.described(file)
        for name, entry in held.items():
            shape, offset = _told(entry, metadata.get(name))
            first = parts.setdefault(name, Parts(shape, []))
            if first.shape != shape or (first.pieces and first.pieces[0].stored.dtype != entry.dtype):
                other = first.pieces[0].stored
                raise CorruptError(
                    f"{file}: {name} is a block of {entry.dtype} {list(shape)}, in {other.file.name} of {other.dtype} "
                    f"{list(first.shape)}; restore the checkpoint from a copy, or delete it"
                )
            first.pieces.append(Piece(entry, offset))
    for name, each in parts.items():
        _check(name, each)
    return parts


def _told(entry: tensors.Stored, metadata: object) -> tuple[Shape, Shape]:
    """(shape of the whole, offset) that a file says of a block; CorruptError unless the block lies in the whole."""
    try:
        told = json.loads(metadata if isinstance(metadata, str) else "")
        shape, offset = told["shape"], told["offset"]
        sizes = zip(shape, offset, entry.shape, strict=True)
        if all(type(n) is type(o) is int and 0 <= o <= n - length for n, o, length in sizes):
            return tuple(shape), tuple(offset)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CorruptError(
        f"{entry.file}: it does not say which block of which shape {entry.name} is; restore it from a copy, or delete it"
    )


def _check(name: str, parts: Parts) -> None:
    """CorruptError unless each element of the tensor stands in one piece."""
    pieces = sorted(parts.pieces, key=lambda piece: piece.offset)
    for i, piece in enumerate(pieces):
        shape = piece.stored.shape
        end = piece.offset[0] + shape[0] if shape else 1
        for other in takewhile(lambda other: not other.offset or other.offset[0] < end, pieces[i + 1 :]):  # noqa: B023
            if overlap(piece.offset, shape, other.offset, other.stored.shape) is not None:
                raise CorruptError(
                    f"{piece.stored.file}: {name} from {list(piece.offset)} and, in {other.stored.file.name}, from "
                    f"{list(other.offset)} hold the same elements; restore the checkpoint from a copy, or delete it"
                )
    there, needed = sum(math.prod(piece.stored.shape) for piece in pieces), math.prod(parts.shape)
    if there != needed:
        raise CorruptError(
            f"{pieces[0].stored.file}: of {name} {list(parts.shape)} only {there:,} of {needed:,} elements stand in "
            f"{', '.join(sorted({piece.stored.file.name for piece in pieces}))}; restore the checkpoint from a copy, or delete it"
        )


def undivided(entry: tensors.Stored) -> Parts:
    """A tensor that stands whole in a file."""
    return Parts(entry.shape, [Piece(entry, (0,) * len(entry.shape))])


def read(parts: Parts, box: tuple[Shape, Shape] | None = None, target: Tensor | None = None) -> Tensor:
    """The block `box` (offset, shape) of a stored tensor, or all of it; in `target` if that is given. No other byte is read."""
    offset, shape = box or ((0,) * len(parts.shape), parts.shape)
    dtype = tensors.DTYPES[parts.pieces[0].stored.dtype]
    straight = target is not None and (target.dtype, target.device.type) == (dtype, "cpu") and target.is_contiguous()
    room = target if target is not None and straight else torch.empty(shape, dtype=dtype)
    for stored, begin in parts.pieces:
        common = overlap(begin, stored.shape, offset, shape)
        if common is not None:
            inside = tuple(at - start for at, start in zip(common[0], begin, strict=True))
            place = tuple(at - start for at, start in zip(common[0], offset, strict=True))
            tensors.read_block(stored, inside, cut(room.detach(), place, common[1]))
    if target is None or straight:
        return room
    with torch.no_grad():
        return target.copy_(room)


class Files(Mapping[str, Tensor]):
    """The tensors of several files by name, of each the block that is `wanted`: read anew whenever one is asked for."""

    def __init__(self, files: Iterable[Path], wanted: Wanted = whole) -> None:
        self.parts = found(files)
        boxes = {name: wanted(name, parts.shape) for name, parts in self.parts.items()}
        self._boxes = {name: box for name, box in boxes.items() if box is not None}

    def __getitem__(self, name: str) -> Tensor:
        return read(self.parts[name], self._boxes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)
