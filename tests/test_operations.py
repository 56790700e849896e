"""Operations as they are called: counted, with their arithmetic and traffic, and made again alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gpt import operations
from gpt.operations import Op, Tally


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        self.tally.add(func, args, kwargs, made)
        return made


def recorded(work: Callable[[], object]) -> dict[str, tuple[Op, int]]:
    with Recorded() as record:
        work()
    return {op.name: (op, n) for op, n in record.tally}


PRODUCTS: dict[str, Callable[[], Tensor]] = {
    "mm": lambda: torch.ones(3, 5) @ torch.ones(5, 7),
    "bmm": lambda: torch.ones(2, 3, 5) @ torch.ones(2, 5, 7),
    "addmm": lambda: F.linear(torch.ones(3, 5), torch.ones(7, 5), torch.ones(7)),
    "baddbmm": lambda: torch.baddbmm(torch.ones(2, 3, 7), torch.ones(2, 3, 5), torch.ones(2, 5, 7)),
    "addmm_": lambda: torch.ones(3, 7).addmm_(torch.ones(3, 5), torch.ones(5, 7)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_arithmetic_is_what_torch_counts(name: str) -> None:
    with FlopCounterMode(display=False) as counter:
        PRODUCTS[name]()
    op, n = recorded(PRODUCTS[name])[name]
    batch = 2 if name in ("bmm", "baddbmm") else 1
    assert (op.flops, n) == (batch * 2 * 3 * 5 * 7, 1)
    assert name == "addmm_" or counter.get_total_flops() == op.flops


def test_fused_attention_is_counted_as_half_of_all_scores_and_its_gradient_as_five_products() -> None:
    B, H, T, D = 2, 3, 32, 8

    def work() -> None:
        q, k, v = (torch.ones(B, H, T, D, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    forward, backward = sorted(
        (op for op, _ in recorded(work).values() if op.name.startswith(operations.FLASH)), key=lambda op: op.flops
    )
    scores = B * H * T * T * D * 2
    assert (forward.flops, backward.flops) == (2 * scores / 2, 5 * scores / 2)
    told, q = Tally(), torch.ones(B, H, T, D)
    for _ in range(2):
        told.attention(q, q)
    assert [(op.flops, n) for op, n in told] == [(backward.flops, 2)]


def test_traffic_is_what_is_read_and_written_and_a_look_moves_nothing() -> None:
    x, row = torch.ones(4, 8), torch.ones(8)
    found = recorded(lambda: (x + row, x.view(8, 4), x.T, x.mul_(2.0), torch.empty(9), x.bfloat16()))
    assert found["add"][0].moved == 4 * (32 + 8 + 32)
    assert found["mul_"][0].moved == 4 * (32 + 32)
    assert found["_to_copy"][0].moved == 4 * 32 + 2 * 32
    assert {found[name][0].moved for name in ("view", "transpose", "empty") if name in found} == {0}
    spread = recorded(lambda: torch.ones(8, 1).expand(8, 100).neg())["neg"][0]
    assert spread.moved == 4 * (8 + 800), "a row that is read again and again is one"


def test_the_same_call_on_the_same_shapes_is_one_operation() -> None:
    tally = Recorded()
    with tally:
        for n in (3, 3, 4):
            torch.ones(n).neg()
    counts = {op.call[1][0].shape: n for op, n in tally.tally if op.name == "neg" and op.call}
    assert counts == {(3,): 2, (4,): 1}
    assert tally.tally.n_calls == 6


def test_an_operation_is_made_again_on_tensors_of_its_own() -> None:
    x, ids = torch.ones(4, 6)[:, ::2], torch.tensor([1, 2])
    for op, _ in recorded(lambda: (x.softmax(-1), F.embedding(ids, torch.ones(9, 3)), torch.cat([x, x]))).values():
        call = operations.again(op, "cpu")
        assert call is not None
        made = call()
        assert isinstance(made, Tensor) and made.isfinite().all()
        if op.name == "_softmax":
            assert made.shape == (4, 3)


def test_what_would_take_much_memory_is_not_made_again() -> None:
    op, _ = recorded(lambda: torch.ones(operations.LARGEST // 4 + 1, device="meta").neg())["neg"]
    assert operations.again(op, "cpu") is None
    told, q = Tally(), torch.ones(1, 1, 2, 2)
    told.attention(q, q)
    assert [operations.again(op, "cpu") for op, _ in told] == [None]
