"""What is applied to an objective leaves its loss, its gradients and its parameters what they were."""

import functools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import ROOT, found, run
from torch import Tensor
from torch.compiler import config as compiler
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from trained import apart, trained

from gpt import parallel
from gpt.loss import NextToken
from gpt.model import GPT, Block, ModelConfig, gelu_by_sigmoid, gelu_tanh
from gpt.parallel import ORDERS, applied, equipped, fused_kernel, hiding_kernel, in_parts, preferring
from gpt.team import Team

Build = Callable[..., GPT]
Tokens = Callable[..., Tensor]

# torch's own compiler warns of torch's own deprecated parts, and asks what a block reads for a gradient
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def test_without_compilation_it_is_the_objective_itself(build: Build) -> None:
    objective = NextToken(build())
    assert applied(objective, compile=False) is objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_changes_no_bit_of_the_loss_or_a_gradient(
    build: Build, tokens: Tokens, dtype: torch.dtype, packed: bool
) -> None:
    """With dropout: what was hidden is hidden again, and draws that come after it are the same."""
    ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    given = (
        tokens(2, 12),
        tokens(2, 12, seed=1),
        *([torch.tensor([*range(5), *range(7)]).expand(2, -1), ids] * packed),
    )
    results = []
    for checkpointing in ("none", "selective", "full"):
        objective = NextToken(build(n_kv_head=2, dropout=0.3).train())
        forward = applied(objective, compile=False, checkpointing=checkpointing)
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(*given)
        loss.backward()
        results.append([loss, torch.rand(3), *(parameter.grad for parameter in objective.parameters())])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_checkpointing_keeps_what_a_block_reads_and_little_else(build: Build, tokens: Tokens) -> None:
    """Bytes that autograd keeps between the passes, each storage once, without the parameters."""
    objective, x = NextToken(build(n_layer=8).train()), tokens(2, 32)
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[str, dict[int, int]] = {"none": {}, "selective": {}, "full": {}}
    for checkpointing, storages in kept.items():

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = applied(objective, compile=False, checkpointing=checkpointing)(x, x)
        assert loss.requires_grad  # and held until here, so that no storage's place was taken by another
    none, full, stream = sum(kept["none"].values()), sum(kept["full"].values()), 2 * 32 * 32 * 4
    assert 8 * stream <= full < none / 8
    assert sum(kept["selective"].values()) < none / 8  # what it keeps it does not keep by autograd's hooks


@pytest.mark.parametrize(("kind", "again"), [("none", 0), ("selective", 0), ("full", 1)])
def test_what_is_computed_again_for_a_gradient(build: Build, tokens: Tokens, kind: str, again: int) -> None:
    """Under full each product with a weight but a block's last, of which nothing is kept; under selective none."""
    objective, x = NextToken(build(n_layer=3).train()), tokens(2, 32)
    counted: Counter[Any] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted[func] += 1
            return func(*args, **(kwargs or {}))

    forward = applied(objective, compile=False, checkpointing=kind)
    loss = forward(x, x)
    with Counting():
        loss.backward()
    assert counted[torch.ops.aten.mm.default] == 3 * (2 * 7 + 6 * again)
    assert counted[torch.ops.aten.silu.default] == (3 if kind != "none" else 0)


def test_checkpointing_is_applied_once_and_taken_off_again(build: Build, tokens: Tokens) -> None:
    objective = NextToken(build())
    blocks = [*objective.model.model.layers]
    for kind in ("full", "selective", "full"):
        assert applied(objective, compile=False, checkpointing=kind) is objective
        assert all(block.forward.args[0] == kind for block in blocks)
        assert all(block.forward.args[1].__func__ is Block.forward for block in blocks)
    with torch.no_grad():
        torch.testing.assert_close(objective.model(tokens(1, 8)), build()(tokens(1, 8)), rtol=0, atol=0)
    applied(objective, compile=False)
    assert all(block.forward.__func__ is Block.forward for block in blocks)


def test_a_reference_computes_with_the_kernels_of_what_it_is_compared_with(build: Build) -> None:
    policy, reference = build(mlp="gelu_tanh"), build(mlp="gelu_tanh")

    def blocks() -> list[tuple[bool, object]]:
        return [(block._compiled_call_impl is not None, block.mlp.activation) for block in reference.model.layers]

    plain = blocks()
    policy.model.flex = flex_attention
    applied(NextToken(policy), compile=True)
    equipped(reference, policy)
    assert reference.model.flex is flex_attention
    assert blocks() == [(True, gelu_by_sigmoid)] * len(plain)
    applied(NextToken(policy), compile=False)
    equipped(reference, policy)
    assert blocks() == plain == [(False, gelu_tanh)] * len(plain)


def test_without_a_gpu_documents_are_masked_pair_by_pair(build: Build) -> None:
    model = build()
    kernel, why = hiding_kernel(model)
    assert kernel == "dense" and "cpu" in why
    assert model.model.flex is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [True, False])
@torch.no_grad()
def test_blocks_are_compiled_once_whatever_the_mask_of_a_batch(
    build: Build, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, documents: bool
) -> None:
    """A mask is another object in each step, and so are the ids that it looks at."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sizes = {"n_kv_head": 2, "max_seq_len": 200, "d_model": 64, "n_layer": 6, "window": 60, "full_layers": (3,)}
    objective, plain = NextToken(build(**sizes)), NextToken(build(**sizes))
    objective.model.model.flex = flex_attention
    forward = applied(objective, compile=True)
    frames = []
    for step in range(3):
        x = tokens(2, 200, seed=step)
        ids = torch.arange(200).div(50 + 10 * step, rounding_mode="floor").expand(2, -1)
        given = (x, x, None, ids) if documents else (x, x)
        assert forward(*given).item() == pytest.approx(plain(*given).item(), rel=1e-5)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[0] == frames[1] == frames[2] <= 4, frames  # layers with and without the window, and the head: not 7
    applied(objective, compile=False)
    assert forward(x, x).item() == pytest.approx(plain(x, x).item(), rel=1e-5)
    assert all(block._compiled_call_impl is None for block in objective.model.model.layers)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.filterwarnings("ignore:.*context_fn")
def test_blocks_that_are_compiled_train_as_before(
    build: Build, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    agrees(build, tokens, torch.float32, 1e-5, checkpointing=checkpointing)


def test_the_order_of_torch_s_kernels_holds_within_and_is_put_back() -> None:
    before = torch._C._get_sdp_priority_order()
    state = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(), compiler.cache_key_tag)
    for kernel, order in ORDERS.items():
        with preferring(kernel):
            first = torch._C._get_sdp_priority_order()[: len(order)]
            assert first == [int(backend) for backend in order]
            assert torch.backends.cuda.cudnn_sdp_enabled() == (kernel == "cudnn")
            assert kernel in compiler.cache_key_tag, "compiled code that was kept under another order is not taken"
            with preferring("any"):
                assert torch._C._get_sdp_priority_order()[: len(order)] == first
    assert torch._C._get_sdp_priority_order() == before
    assert state == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        compiler.cache_key_tag,
    )


def test_without_a_gpu_torch_orders_its_kernels_itself(build: Build) -> None:
    assert fused_kernel(build().config, "cpu", torch.bfloat16, 32)[0] == "any"


@pytest.mark.parametrize(
    ("capability", "times", "expected"),
    [
        ((9, 0), {"flash": 2.0, "cudnn": 1.0}, "cudnn"),
        ((9, 0), {"flash": 1.0, "cudnn": 0.99}, "flash"),
        ((9, 0), {"flash": 1.0}, "flash"),
        ((9, 0), {"cudnn": 1.0}, "cudnn"),
        ((9, 0), {}, "any"),
        ((8, 0), {"cudnn": 1.0}, "flash"),
        ((12, 0), {"cudnn": 1.0}, "flash"),
    ],
)
def test_cudnn_is_taken_on_hopper_where_it_works_and_is_faster(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    times: dict[str, float],
    expected: str,
) -> None:
    def timed(kernel: str, *others: Any) -> float:
        if kernel not in times:
            raise RuntimeError("no kernel\nand a trace")
        return times[kernel]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(parallel, "_timed_attention", timed)
    chosen, why = fused_kernel(build().config, "cuda", torch.bfloat16, 1024)
    assert chosen == expected and "trace" not in why
    if capability == (9, 0) and "cudnn" not in times:
        assert "cudnn failed: no kernel" in why
    assert fused_kernel(build().config, "cuda", torch.float32, 1024)[0] == "any"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_each_of_torch_s_kernels_is_right_here(build: Build) -> None:
    for kernel in ORDERS:
        assert 0 < parallel._timed_attention(kernel, (2, 4, 2, 300, 64), "cuda", torch.bfloat16) < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_s_kernel_computes_the_mask_of_every_pair(build: Build) -> None:
    """The loss and the gradients of packed documents, through FlexAttention compiled and pair by pair."""
    x, y = (torch.randint(64, (3, 300), generator=torch.Generator().manual_seed(i)).cuda() for i in (0, 1))
    ids = torch.arange(300).div(70, rounding_mode="floor").expand(3, -1).cuda()
    positions = (torch.arange(300) % 70).expand(3, -1).cuda()
    sizes = {"d_model": 64, "n_head": 4, "n_kv_head": 2, "max_seq_len": 300, "init_std": 0.1}
    dense, flex = NextToken(build(**sizes).cuda()), NextToken(build(**sizes).cuda())
    assert hiding_kernel(flex.model)[0] == "flex"
    for forward in (flex, applied(flex, compile=True)):
        for objective, call in ((dense, dense), (flex, forward)):
            objective.zero_grad()
            call(x, y, positions, ids).backward()
        torch.testing.assert_close(flex(x, y, positions, ids), dense(x, y, positions, ids), rtol=1e-3, atol=0)
        for (name, a), b in zip(dense.named_parameters(), flex.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 2e-2 * a.grad.norm(), name


def agrees(
    build: Build,
    tokens: Tokens,
    dtype: torch.dtype,
    tolerance: float,
    packed: tuple[Tensor, ...] = (),
    checkpointing: str = "none",
) -> None:
    """A step of the compiled objective equals the eager one's, also after the weights moved."""
    eager, compiled = NextToken(build(n_kv_head=2).train()), NextToken(build(n_kv_head=2).train())
    forward = applied(compiled, compile=True, checkpointing=checkpointing)
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    for _ in range(2):
        losses = []
        for call, objective in ((eager, eager), (forward, compiled)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses.append(call(x, y, *packed))
            losses[-1].backward()
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter -= 1e-3 * parameter.grad
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 10 * tolerance * a.grad.norm(), name


def test_every_block_is_captured_whole_and_trains_as_before(
    build: Build, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    agrees(build, tokens, torch.float32, 1e-5)
    ids = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    agrees(build, tokens, torch.float32, 1e-5, (torch.tensor([*range(5), *range(7)]).expand(2, -1), ids))
    agrees(build, tokens, torch.float32, 1e-5, checkpointing="full")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_compiled_code_trains_as_before(build: Build, tokens: Tokens, dtype: torch.dtype, tolerance: float) -> None:
    agrees(build, tokens, dtype, tolerance)


# Many ranks


UNTIED, MUON = {"tie_embeddings": False}, {"kind": "muon", "lr": 0.02, "adamw_lr": 0.01}
CAUTIOUS = MUON | {"cautious": True, "scheduled_decay": True, "momentum_warmup": 5}
SHARD, TENSOR = {"shard": 2}, {"tensor": 2}
TWO: dict[str, dict[str, Any]] = {
    "copies": {"evaluate": True, "ema": 2},
    "copies, documents, untied": {"packed": True, "model": UNTIED},
    "copies, preferences": {"objective": {"kind": "dpo"}},
    "copies, in order": {"parallel": {"canonical": True}, "model": {"dropout": 0.2}},
    "sharded, tied": {"parallel": SHARD, "evaluate": True, "ema": 2},
    "sharded, untied, documents": {"parallel": SHARD, "model": UNTIED, "packed": True},
    "sharded, rows that do not divide": {"parallel": SHARD, "model": {"d_ff": 37}, "checkpointing": "full"},
    "sharded, Muon": {"parallel": SHARD, "optim": CAUTIOUS},
    "sharded, restored after an evaluation": {"parallel": SHARD, "restored": True},
    "tensor, tied": {"parallel": TENSOR, "evaluate": True, "ema": 2},
    "tensor, untied, documents": {"parallel": TENSOR, "model": UNTIED | {"norm_at": "output"}, "packed": True},
    "tensor, GPT-2": {
        "parallel": TENSOR,
        "model": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "mlp_bias": True, "qk_norm": False},
    },
}
MORE: dict[str, dict[str, Any]] = {
    "sharded, preferences": {"parallel": SHARD, "objective": {"kind": "dpo"}},
    "sharded, preferences without reference": {"parallel": SHARD, "objective": {"kind": "simpo"}},
    "copies, Muon": {"optim": MUON},
    "copies, compiled": {"compile": True},
    "sharded, compiled": {"parallel": SHARD, "compile": True, "checkpointing": "full"},
    "tensor, compiled": {"parallel": TENSOR, "compile": True},
    "tensor, Muon": {"parallel": TENSOR, "optim": MUON},
    "tensor, post-norm": {
        "parallel": TENSOR,
        "model": {
            "norm_at": "post",
            "norm_gain": False,
            "position": "sinusoidal",
            "embed_norm": True,
            "logit_softcap": 5.0,
        },
    },
    "tensor, documents, bfloat16": {"parallel": TENSOR, "packed": True, "dtype": "bfloat16", "checkpointing": "full"},
}
FOUR: dict[str, dict[str, Any]] = {
    "sharded": {"parallel": {"shard": 4}, "evaluate": True},
    "sharded copies, accumulated": {"parallel": SHARD, "packed": True, "micro_batch": 1},
    "sharded copies, preferences": {"parallel": SHARD, "objective": {"kind": "dpo"}, "micro_batch": 1},
    "sharded and tensor, tied": {"parallel": SHARD | TENSOR, "evaluate": True, "ema": 2},
    "sharded and tensor, untied": {"parallel": SHARD | TENSOR, "model": UNTIED, "packed": True},
    "sharded and tensor, biases": {
        "parallel": SHARD | TENSOR,  # without a bias of all keys, whose gradient is nothing but rounding
        "model": {"position": "learned", "norm": "layernorm", "mlp_bias": True, "embed_norm": True, "qk_norm": False},
    },
    "sharded and tensor, Muon": {"parallel": SHARD | TENSOR, "optim": MUON},
    "copies and tensor": {"parallel": TENSOR},
    "in order": {"parallel": {"canonical": True}, "model": {"dropout": 0.2}},
}


def on_ranks(cases: dict[str, dict[str, Any]], size: int) -> dict[str, list[Any]]:
    """What each rank has of each case; all in one start, which is what takes time."""
    given = f"json.loads({json.dumps(cases)!r})"
    code = f"from trained import trained\nreturn {{name: trained(team, how) for name, how in {given}.items()}}"
    each = found(code, size, timeout_s=280)
    return {name: [rank[name] for rank in each] for name in cases}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def is_one_process(how: dict[str, Any], ranks: list[Any]) -> None:
    """Losses, gradient norms, evaluations, weights and averages are those of one process but for rounding, and on every rank
    the same.

    AdamW's first steps are as large for a gradient of nothing but rounding as for any other, which the weights show; Muon's
    go through bfloat16, which makes of a last bit a thousandth.
    """
    canonical = how.get("parallel", {}).get("canonical", False)
    alone = trained(Team(), how | {"restored": False, "parallel": {"canonical": canonical}})
    coarse = {"muon": (1e-3, 2e-2), "bfloat16": (3e-2, 3e-1)}
    kind = how.get("optim", {}).get("kind") or how.get("dtype")
    curve, weights = (0.0, 0.0) if canonical else coarse.get(kind, (1e-5, 1e-3))
    assert apart(alone["curve"], ranks[0]["curve"]) <= curve
    assert apart(alone["weights"], ranks[0]["weights"]) <= weights
    assert all(rank["curve"] == ranks[0]["curve"] for rank in ranks)


@pytest.fixture(scope="module")
def two() -> dict[str, list[Any]]:
    return on_ranks(TWO, 2)


@pytest.mark.parametrize("case", TWO)
def test_two_ranks_train_as_one_process(case: str, two: dict[str, list[Any]], one_thread: None) -> None:
    is_one_process(TWO[case], two[case])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "cases"), [(2, MORE), (4, FOUR)], ids=["2", "4"])
def test_many_ranks_train_as_one_process(size: int, cases: dict[str, dict[str, Any]], one_thread: None) -> None:
    for case, ranks in on_ranks(cases, size).items():
        try:
            is_one_process(cases[case], ranks)
        except AssertionError as error:
            raise AssertionError(case) from error


@pytest.mark.slow
def test_copies_round_alike_whether_or_not_a_process_was_started_again_on_the_way() -> None:
    """Four of them: the sum of two numbers is the same in either order."""
    cases = {name: {"micro_batch": 1, "steps": 4, "resumed": name == "resumed"} for name in ("straight", "resumed")}
    straight, resumed = (ranks[0] for ranks in on_ranks(cases, 4).values())
    assert straight == resumed


def test_ranks_that_would_meet_elsewhere_than_where_the_run_computes_are_told(build: Build) -> None:
    """A run that a machine without a GPU began, on one that has some."""
    ranks: Any = SimpleNamespace(mesh=SimpleNamespace(device_type="cuda"))
    with pytest.raises(ValueError, match=r"computes on cpu, and its ranks would meet on cuda: set train.device=cpu"):
        in_parts(NextToken(build()), ranks, "cpu")


def test_groups_of_ranks_wait_no_longer_than_all_of_them() -> None:
    code = """\
import torch
from gpt.ranks import PATIENCE_S, Ranks, Sizes
ranks = Ranks(team, Sizes(shard=2))
groups = [*ranks.mesh.get_all_groups(), ranks.holders]
return [int(g._get_backend(torch.device("cpu")).options._timeout.total_seconds()) - PATIENCE_S for g in groups]"""
    assert found(code, 2) == [[0, 0, 0, 0]] * 2


def test_a_stop_asked_of_one_rank_is_heard_by_all_at_the_same_step() -> None:
    code = """\
from gpt import signals
from gpt.ranks import Ranks, Sizes
import torch
ranks = Ranks(team, Sizes(replicate=2))
class Empty:
    names, here = {}, None
def optimizer():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    from gpt.optim import HERE
    made = Empty()
    made.names, made.here = {p: "p"}, HERE
    return made
heard = []
for step in range(3):
    if step == 1 and team.rank == 1:
        signals.stop_requested = lambda: "SIGTERM"
    ranks.agreed(optimizer(), torch.ones(()))
    heard.append(ranks.stopping)
try:
    list(ranks.dealt(range(5), lambda i: [i]))
except signals.Stopped as stop:
    heard.append(str(stop))
return heard"""
    for heard in found(code, 2):
        assert heard[:3] == [False, True, True] and "stopped by SIGTERM" in heard[3]


TINY = """
name: tiny
data: {path: data/tiny, seq_len: 32, tokenizer: data/tiny}
model: {n_layer: 2, d_model: 32, n_head: 4, n_kv_head: 2, dropout: 0.1}
train: {steps: 12, batch_tokens: 256, micro_batch: 1, compile: false, device: cpu}
optim: {kind: muon, lr: 0.02}
eval: {every: 4, tokens: 2000}
checkpoint: {every: 4, keep: 3}
log: {every: 1}
"""


def train(here: Path, size: int, *overrides: str) -> None:
    """The real command, in as many processes."""
    for rank, ended in enumerate(
        run([sys.executable, str(ROOT / "train.py"), "tiny.yaml", *overrides], size, here, 280)
    ):
        assert ended.returncode == 0, f"rank {rank}: {ended.stderr[-2000:]}"
        assert rank == 0 or not ended.stdout, ended.stdout


@pytest.fixture
def home(split: Any, tmp_path: Path) -> Path:
    """A directory with a small data set, as .bin files, and its tokenizer."""
    import numpy as np

    from gpt import tokenizer

    lines = [" ".join(f"{chr(97 + (i * k) % 26)}{chr(97 + k % 26)}" for k in range(40)) for i in range(120)]
    vocabulary = tokenizer.train(lines, "bpe", 320)
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    for name, content in vocabulary.files().items():
        (tmp_path / "data" / "tiny" / name).write_bytes(content)
    for part, some in (("train", lines[:100]), ("val", lines[100:])):
        ids = [i for line in some for i in [vocabulary.start_id, *vocabulary.encode(line)]]
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / "data" / "tiny" / f"x_{part}.bin").write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def bytes_of(here: Path, name: str, step: int) -> tuple[bytes, bytes]:
    """The log, and the weights of a step."""
    run_path = here / "runs" / name
    weights = run_path / "checkpoints" / f"step_{step:08d}" / "model.safetensors"
    return (run_path / "metrics.jsonl").read_bytes(), weights.read_bytes()


@pytest.mark.slow
def test_in_order_any_number_of_ranks_logs_the_same_bytes_also_when_it_changes_on_the_way(home: Path) -> None:
    for size in (1, 2, 4):
        train(home, size, f"name=on{size}", "parallel.canonical=true")
    log, weights = bytes_of(home, "on1", 12)
    assert b"val_bpb" in log and b"elapsed_s" not in log
    assert bytes_of(home, "on2", 12) == bytes_of(home, "on4", 12) == (log, weights)
    train(home, 1, "name=chain", "parallel.canonical=true")
    for step in (4, 8):  # 1 -> 4 -> 2, each from an older checkpoint on
        for made in (home / "runs" / "chain" / "checkpoints").glob("step_*"):
            if int(made.name[-8:]) > step:
                for file in made.iterdir():
                    file.unlink()
                made.rmdir()
        train(home, {4: 4, 8: 2}[step], "name=chain", "parallel.canonical=true")
    assert bytes_of(home, "chain", 12) == (log, weights)


@pytest.mark.slow
def test_a_profile_is_the_first_rank_s_and_changes_no_byte_of_any(home: Path) -> None:
    train(home, 2, "name=plain", "parallel.canonical=true")
    train(home, 2, "name=seen", "parallel.canonical=true", "train.profile=2")
    assert bytes_of(home, "seen", 12) == bytes_of(home, "plain", 12)
    assert [file.name for file in (home / "runs" / "seen").glob("*trace*")] == ["trace.json.gz"]


@pytest.mark.slow
def test_ranks_that_divide_everything_resume_bit_for_bit_averages_and_files_included(home: Path) -> None:
    how = ["parallel.shard=2", "parallel.tensor=2", "train.steps=8"]
    saved = home / "runs" / "tiny" / "checkpoints" / "step_00000008"
    train(home, 4, *how)
    straight = {file.name: file.read_bytes() for file in saved.glob("*.safetensors")}
    shutil.rmtree(saved)
    train(home, 4, *how)
    assert len(straight) > 4
    assert {file.name: file.read_bytes() for file in saved.glob("*.safetensors")} == straight


def test_every_source_that_is_evaluated_may_bring_a_shape_of_its_own() -> None:
    """Past torch's own limit FlexAttention would write all scores out."""
    limit = torch._dynamo.config
    for before, after in ((8, parallel.SHAPES), (1000, 1000)):
        with limit.patch(recompile_limit=before):
            parallel.flexible(GPT(ModelConfig(vocab_size=64, max_seq_len=32, n_layer=1, d_model=32, n_head=2)))
            assert limit.recompile_limit == after
