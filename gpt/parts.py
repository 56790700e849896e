"""What a rank holds of a model: blocks of its parameters, how others' are had, and an optimizer's way to them."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from gpt.optim import Here
from gpt.ranks import Ranks, is_divided
from gpt.slices import Slice


class Layout(NamedTuple):
    """A parameter's shape, and which of its dimensions are divided along `tensor` and, within that, along `shard`."""

    shape: torch.Size
    tensor: int | None = None
    shard: int | None = None


Block = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


class Parts(Here):
    """The blocks of a model's parameters that ranks hold, and an optimizer's way to them."""

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self.ranks = ranks
        self.parameters = dict(model.named_parameters())
        self.layouts = {name: _layout(p) for name, p in self.parameters.items()}
        # Of matrices of one shape each rank of a copy gets every n-th to update where that takes the whole of it (Muon).
        self.owners: dict[str, int] = {}
        counts: dict[torch.Size, int] = {}
        for name, layout in self.layouts.items():
            if len(layout.shape) == 2 and ".layers." in name:
                i = counts[layout.shape] = counts.get(layout.shape, -1) + 1
                self.owners[name] = i % (ranks.n.shard * ranks.n.tensor)
        self._handles: dict[Tensor, str] = {
            nn.Parameter(_local(p), p.requires_grad) if ranks.n.in_parts else p: name
            for name, p in self.parameters.items()
        }

    # Where blocks stand

    def block(self, key: str, holder: int | None = None) -> Block | None:
        """(offset, shape) of what this rank, or that holder of its copy, has of a parameter NAME or of a state NAME:KIND of it.

        None: nothing. A momentum of Muon's is whole where its owner is.
        """
        name, _, kind = key.partition(":")
        layout, n = self.layouts[name], self.ranks.n
        holder = self.ranks.holder if holder is None else holder
        if kind == "step":
            return (), ()
        if kind == "momentum_buffer":
            return ((0,) * len(layout.shape), tuple(layout.shape)) if self.owners.get(name, 0) == holder else None
        offset, shape = [0] * len(layout.shape), list(layout.shape)
        for dim, size, at in (
            (layout.tensor, n.tensor, holder % n.tensor),
            (layout.shard, n.shard, holder // n.tensor),
        ):
            if dim is not None:
                each = -(-shape[dim] // size)  # torch.chunk's: the last ones may be short or empty
                start = min(at * each, shape[dim])
                offset[dim], shape[dim] = offset[dim] + start, min(each, shape[dim] - start)
        return tuple(offset), tuple(shape)

    def copies(self, name: str) -> int:
        """How many ranks hold each block of a parameter."""
        layout, n = self.layouts[name], self.ranks.n
        return (
            n.replicate * (1 if layout.shard is not None else n.shard) * (1 if layout.tensor is not None else n.tensor)
        )

    def local(self, name: str) -> Tensor:
        """This rank's block of a parameter, the memory itself."""
        return _local(self.parameters[name])

    @torch.no_grad()
    def put(self, name: str, whole: Tensor) -> None:
        """Take this rank's block of a parameter out of `whole`."""
        layout = self.layouts[name]
        if whole.shape != layout.shape:
            raise ValueError(f"{name} has shape {tuple(whole.shape)}, the model's is {tuple(layout.shape)}")
        block = self.block(name)
        assert block is not None
        self.local(name).copy_(whole[_index(block)])

    def held(self) -> dict[str, Slice]:
        """This rank's block of each parameter, the memory itself."""
        blocks = {name: self.block(name) for name in self.parameters}
        return {
            name: Slice(tuple(self.layouts[name].shape), block[0], self.local(name))
            for name, block in blocks.items()
            if block is not None
        }

    def n_bytes(self, name: str) -> int:
        """Of all of a parameter."""
        return math.prod(self.layouts[name].shape) * self.parameters[name].element_size()

    def wanted(self, key: str, shape: tuple[int, ...]) -> Block | None:
        """(offset, shape) of what this rank has of an optimizer's tensor NAME:KIND of that shape; None: nothing."""
        if not self.ranks.n.in_parts or key.partition(":")[0] not in self.layouts:
            return (0,) * len(shape), shape
        return self.block(key)

    def slices(self, named: Mapping[str, Tensor]) -> dict[str, Slice]:
        """Of the tensors that this rank holds, by NAME or NAME:KIND, those blocks that it is the one to write.

        Of the ranks that hold the same block one writes it; which, is spread over them by name.
        """
        if not self.ranks.n.in_parts:
            each, at = self.ranks.team.size, self.ranks.team.rank
            return {key: Slice.whole(t) for key, t in named.items() if zlib.crc32(key.encode()) % each == at}
        found = {}
        for key, tensor in named.items():
            name, _, kind = key.partition(":")
            layout, block = self.layouts[name], self.block(key)
            assert block is not None and tuple(tensor.shape) == (layout.shape if is_divided(tensor) else block[1]), key
            free = [(self.ranks.at.replicate, self.ranks.n.replicate)]
            if kind != "momentum_buffer":
                free += [(at, n) for at, n, dim in (
                    (self.ranks.at.shard, self.ranks.n.shard, None if kind == "step" else layout.shard),
                    (self.ranks.at.tensor, self.ranks.n.tensor, None if kind == "step" else layout.tensor),
                ) if dim is None]  # fmt: skip
            copy, copies = 0, 1
            for at, n in free:
                copy, copies = copy * n + at, copies * n
            if zlib.crc32(key.encode()) % copies == copy and tensor.numel():
                shape = () if kind == "step" else tuple(layout.shape)
                found[key] = Slice(shape, block[0], _local(tensor).detach())
        return found

    @torch.no_grad()
    def whole(
        self, names: Iterable[str], tensors: Mapping[str, Tensor], owner_of: Callable[[str], int] = lambda name: 0
    ) -> dict[str, Tensor]:
        """Those parameters that this rank is the owner of, whole; what is in parts is gathered, one at a time, onto the CPU.

        `tensors` are by name this rank's blocks; every rank gives the same `names`.
        """
        found: dict[str, Tensor] = {}
        for name in names:
            mine, tensor = owner_of(name) == self.ranks.team.rank, tensors[name]
            if self.ranks.n.in_parts:
                tensor = self._joined(name, tensor)
                tensor = tensor.cpu() if mine else tensor
            if mine:
                found[name] = tensor.detach()
        return found

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter put together from what each of those that hold one copy has of it; on each of them."""
        n = self.ranks.n
        indices = [_index(self.block(name, holder)) for holder in range(n.shard * n.tensor)]
        whole = torch.empty(self.layouts[name].shape, device=tensor.device)
        longest = max(whole[index].numel() for index in indices)
        sent = torch.zeros(longest, device=tensor.device)
        sent[: tensor.numel()] = tensor.reshape(-1)
        each = [torch.empty_like(sent) for _ in indices]
        distributed.all_gather(each, sent, group=self.ranks.holders)
        for index, flat in zip(indices, each, strict=True):
            block = whole[index]
            block.copy_(flat[: block.numel()].view(block.shape))
        return whole

    # An optimizer's way to them

    def handles(self, model: nn.Module) -> dict[Tensor, str]:
        return self._handles

    @torch.no_grad()
    def take(self) -> None:
        if not self.ranks.n.in_parts:
            return
        for handle, name in self._handles.items():
            parameter = self.parameters[name]
            handle.data, gradient = _local(parameter), parameter.grad
            if gradient is not None and is_divided(gradient) and is_divided(parameter):
                gradient = gradient.redistribute(placements=parameter.placements)  # parts of a sum are added up
            handle.grad = None if gradient is None else _local(gradient)
            parameter.grad = None

    def shape(self, handle: Tensor) -> torch.Size:
        return self.layouts[self._handles[handle]].shape

    def collect(self, handles: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        if not self.ranks.n.in_parts:
            return super().collect(handles)
        names = [self._handles[handle] for handle in handles]
        n = self.ranks.n.shard * self.ranks.n.tensor
        grads = [torch.zeros_like(h) if h.grad is None else h.grad for h in handles]
        sent = [[g for g, name in zip(grads, names, strict=True) if self.owners[name] == to] for to in range(n)]
        mine = [handle for handle, name in zip(handles, names, strict=True) if self.owners[name] == self.ranks.holder]
        blocks = [[self.block(self._handles[h], source) for h in mine] for source in range(n)]
        got = self._exchanged(sent, blocks)
        wholes = [torch.empty(self.shape(handle), device=handle.device) for handle in mine]
        for source in range(n):
            for whole, block, piece in zip(wholes, blocks[source], got[source], strict=True):
                whole[_index(block)] = piece
        return list(zip(mine, wholes, strict=True))

    def deal(self, handles: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        if not self.ranks.n.in_parts:
            return updates
        names, n = [self._handles[handle] for handle in handles], self.ranks.n.shard * self.ranks.n.tensor
        mine = [name for name in names if self.owners[name] == self.ranks.holder]
        sent = [[u[_index(self.block(name, to))] for u, name in zip(updates, mine, strict=True)] for to in range(n)]
        blocks = [[self.block(name) for name in names if self.owners[name] == source] for source in range(n)]
        got = [iter(pieces) for pieces in self._exchanged(sent, blocks)]
        return [next(got[self.owners[name]]) for name in names]

    def _exchanged(self, sent: list[list[Tensor]], blocks: list[list[Block | None]]) -> list[list[Tensor]]:
        """`sent` to each holder; what came from each, in the shapes of `blocks`."""
        device = next(iter(self._handles)).device
        flat = torch.cat([torch.empty(0, device=device), *(piece.reshape(-1) for to in sent for piece in to)])
        counts = [[math.prod(block[1]) for block in source if block is not None] for source in blocks]
        into = torch.empty(sum(map(sum, counts)), device=device)
        distributed.all_to_all_single(
            into, flat, list(map(sum, counts)), [sum(p.numel() for p in to) for to in sent], group=self.ranks.holders
        )
        pieces = iter(into.split([count for source in counts for count in source]))
        return [[next(pieces).view(block[1]) for block in source if block is not None] for source in blocks]


def _layout(parameter: Tensor) -> Layout:
    if not is_divided(parameter):
        return Layout(parameter.shape)
    found: dict[str, int] = {}
    for axis, placement in zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True):
        if placement.is_shard() or hasattr(
            placement, "split_factor"
        ):  # FSDP2's within tensor parallelism is a kind of its own
            found[axis] = placement.dim  # type: ignore[attr-defined]
    return Layout(parameter.shape, found.get("tensor"), found.get("shard"))


def _local(tensor: Tensor) -> Tensor:
    """This rank's block of a tensor, or all of one that is not in parts."""
    return tensor.to_local().detach() if is_divided(tensor) else tensor.detach()


def _index(block: Block | None) -> tuple[slice, ...]:
    assert block is not None
    return tuple(slice(start, start + count) for start, count in zip(*block, strict=True))
