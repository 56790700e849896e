"""Operations of torch as an update calls them: counted, with their arithmetic and the bytes they move, and made again alone."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# Which of an operation's tensors are multiplied.
FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
FLASH = "_scaled_dot_product"  # begins the names of fused attention
LARGEST = 1 << 28  # bytes of the operands that are made to repeat an operation


class Spec(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Of what is there: a dimension of stride 0 is one row, read again and again."""
        return self.dtype.itemsize * math.prod(n for n, s in zip(self.shape, self.stride, strict=True) if s or n == 0)


@dataclass(frozen=True)
class Op:
    """One operation on tensors of certain shapes. `moved`: bytes read and written; 0 of what only looks at a tensor otherwise."""

    key: Any = field(repr=False)  # equal where the same is called on the same shapes
    name: str = field(compare=False)
    flops: float = field(compare=False)
    moved: int = field(compare=False)
    call: tuple[Any, list[Any], Any] | None = field(
        default=None, compare=False, repr=False
    )  # with which leaves, in which tree


class Tally:
    """How often each operation was called."""

    def __init__(self) -> None:
        self._found: dict[Any, list[Any]] = {}

    def __iter__(self) -> Iterator[tuple[Op, int]]:
        return ((op, n) for op, n in self._found.values())

    @property
    def n_calls(self) -> int:
        return sum(n for _, n in self)

    def add(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Count a call and what it returned."""
        leaves, tree = tree_flatten((args, kwargs or {}))
        told = [_spec(leaf) for leaf in leaves]
        key = (func, tuple(map(_hashable, told)))
        if (known := self._found.get(key)) is not None:
            known[1] += 1
        else:
            self._found[key] = [_op(key, func, told, tree, leaves, made), 1]

    def attention(self, q: Tensor, k: Tensor) -> None:
        """Count the backward pass of a fused kernel of causal attention, which computes about half of all scores."""
        spec, keys = _spec(q), _spec(k)
        key, flops = (FLASH, spec, keys), _attention_flops(spec, keys, backward=True)
        self._found.setdefault(key, [Op(key, FLASH, flops, 4 * (spec.n_bytes + keys.n_bytes)), 0])[1] += 1


def _spec(leaf: Any) -> Any:
    return Spec(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _hashable(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return leaf


def _op(key: Any, func: Any, told: list[Any], tree: Any, leaves: Iterable[Any], made: Any) -> Op:
    tensors = [leaf for leaf in told if isinstance(leaf, Spec)]
    name = func._schema.name.partition("::")[2]
    held = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
    new = [each for each in tree_leaves(made) if isinstance(each, Tensor)]
    written = func._schema.is_mutable
    looks = not written and bool(new) and all(each.untyped_storage()._cdata in held for each in new)
    moved = 0
    if not looks and not name.startswith(("empty", "new_empty")):
        moved = sum(spec.n_bytes for spec in tensors)
        outputs = [_spec(each) for each in new] if new else tensors if written else []
        moved += sum(spec.n_bytes for spec in outputs)
    return Op(key, name, _flops(name, tensors), moved, (func, told, tree))


def _flops(name: str, tensors: list[Spec]) -> float:
    plain = name.rstrip("_")
    if plain in FACTORS:
        a, b = tensors[FACTORS[plain] : FACTORS[plain] + 2]
        return 2.0 * math.prod(a.shape) * b.shape[-1]
    if plain.startswith(FLASH):
        backward = plain.endswith("backward")
        q, k = tensors[int(backward) : int(backward) + 2]
        return _attention_flops(q, k, backward)
    return 0.0


def _attention_flops(q: Spec, k: Spec, backward: bool) -> float:
    """Of causal attention (Dao et al. 2022): two products, and five for their gradients, of half of all scores."""
    return (5 if backward else 2) * math.prod(q.shape) * k.shape[2]


def again(op: Op, device: str) -> Callable[[], object] | None:
    """The operation on tensors of its shapes, made for it; None where they would be too large, or it has no call of torch's own."""
    if op.call is None:
        return None
    func, told, tree = op.call
    if sum(leaf.n_bytes for leaf in told if isinstance(leaf, Spec)) > LARGEST:
        return None
    leaves = [_made(leaf, device) if isinstance(leaf, Spec) else leaf for leaf in told]
    args, kwargs = tree_unflatten(leaves, tree)
    return lambda: func(*args, **kwargs)


def _made(spec: Spec, device: str) -> Tensor:
    n = 1 + sum((length - 1) * step for length, step in zip(spec.shape, spec.stride, strict=True))
    value = 0.5 if spec.dtype.is_floating_point else 0
    flat = torch.full((0 if 0 in spec.shape else n,), value, dtype=spec.dtype, device=device)
    return flat.as_strided(spec.shape, spec.stride)
