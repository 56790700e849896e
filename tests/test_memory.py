"""What an update is said to need is what it takes: gone through without storage, against the allocator's own count."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from gpt import adapters, memory, parallel, quantize, runtime
from gpt.adapters import AdapterConfig
from gpt.loss import NextToken, Objective, ObjectiveConfig, Preferences
from gpt.memory import Need, Setting, at_most, need, needs, parameters, size
from gpt.model import GPT, ModelConfig, init_weights
from gpt.optim import OptimConfig, Optimizer
from gpt.parallel import applied

SHAPE = {"vocab_size": 512, "max_seq_len": 640, "n_layer": 4, "d_model": 64, "n_head": 4}
VARIANTS = {
    "llama": {"n_kv_head": 2},
    "gpt2": {
        "norm": "layernorm",
        "mlp": "gelu",
        "position": "learned",
        "dropout": 0.1,
        "qk_norm": False,
        "mlp_bias": True,
    },
    "untied": {"vocab_size": 4096, "tie_embeddings": False, "logit_softcap": 30.0, "n_layer": 3},
}
WAYS = {
    "everything": {},
    "checkpointed": {"checkpointing": "full"},
    "selectively": {"checkpointing": "selective"},
    "adapter": {"adapter": AdapterConfig()},
    "adapter, bf16, checkpointed": {"adapter": AdapterConfig(base_dtype="bf16"), "checkpointing": "full"},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(**(SHAPE | request.param))


def setting(**given: object) -> Setting:
    plain = {"rows": 2, "seq_len": 320, "device": "cpu", "dtype": "float32", "optim": OptimConfig()}
    return Setting(**(plain | given))


def real(config: ModelConfig, given: Setting) -> GPT:
    model = GPT(config).train()
    init_weights(model, 1)
    if given.adapter is not None:
        if given.adapter.base_dtype != "fp32":
            quantize.quantized(model, given.adapter.base_dtype)
        adapters.put_on(model, given.adapter)
        adapters.fill(model, 1)
    return model


def give_gradients(model: GPT) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    return trained


def pass_through(model: GPT, given: Setting) -> Tensor:
    forward = applied(NextToken(model), compile=False, checkpointing=given.checkpointing)
    row = torch.zeros(given.rows, given.seq_len, dtype=torch.int64)
    with runtime.autocast("cpu", given.dtype):
        return forward(*[row] * (4 if given.documents else 2))


def most_allocated(work: Callable[[], object]) -> int:
    """The largest sum of what torch's allocator gave and took back during `work`, by its own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def saved_bytes(model: GPT, given: Setting) -> int:
    """Bytes that autograd keeps, each storage once, the model's own aside: by its hook."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nats = pass_through(model, given)
    assert nats.requires_grad
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore:.*profiler:UserWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_pass_needs_is_what_the_allocator_gives(config: ModelConfig, way: dict[str, object], dtype: str) -> None:
    """Four blocks told from two; the loss, the last block's gradient and recomputation included."""
    given = setting(**way, dtype=dtype)
    told, model = need(config, given), real(config, given)
    give_gradients(model)
    taken = most_allocated(lambda: pass_through(model, given).backward())
    assert told.activations + told.work == pytest.approx(taken, rel=0.05)


HOOKED = {name: way for name, way in WAYS.items() if name != "selectively"}  # which keeps besides what no hook sees


@pytest.mark.parametrize("way", HOOKED.values(), ids=HOOKED)
def test_activations_are_what_autograd_keeps(config: ModelConfig, way: dict[str, object]) -> None:
    given = setting(**way)
    assert need(config, given).activations == pytest.approx(saved_bytes(real(config, given), given), rel=0.05)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "optim", [{}, {"kind": "muon"}, {"state": "8bit"}, {"ema": 9}], ids=["adamw", "muon", "8bit", "average"]
)
def test_weights_gradients_and_the_optimizer_s_state_are_counted_to_the_byte(
    config: ModelConfig, way: dict[str, object], optim: dict[str, object]
) -> None:
    if "state" in optim:
        pytest.importorskip("torchao")
    given = setting(**way, optim=OptimConfig(**optim))
    told, model = need(config, given), real(config, given)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    trained = give_gradients(model)
    optimizer = Optimizer(model, given.optim)
    optimizer.step(1.0)
    assert told.weights == sum(held.values())
    assert told.gradients == sum(4 * parameter.numel() for parameter in trained)
    average = [parameter for parameter in trained if "ema" in optim]
    state = [*optimizer.state().values(), *average]
    assert told.optimizer == sum(t.numel() * t.element_size() for t in state)


@pytest.mark.filterwarnings("ignore:.*profiler:UserWarning")
@pytest.mark.parametrize(
    ("optim", "tolerance"), [({"kind": "muon"}, 0.05), ({"state": "8bit"}, 0.15)], ids=["muon", "8bit"]
)
def test_what_a_step_takes_on_top_is_what_the_allocator_gives(optim: dict[str, str], tolerance: float) -> None:
    if "state" in optim:
        pytest.importorskip("torchao")
    config, given = ModelConfig(**SHAPE | {"d_model": 128}), setting(optim=OptimConfig(**optim))
    model = real(config, given)
    optimizer = Optimizer(model, given.optim)
    give_gradients(model)
    optimizer.step(1.0)
    give_gradients(model)
    assert need(config, given).step == pytest.approx(most_allocated(lambda: optimizer.step(1.0)), rel=tolerance)


def preferring(model: GPT, given: Setting) -> Objective:
    other = GPT(model.config).eval().requires_grad_(False)

    @contextmanager
    def reference() -> Iterator[GPT]:
        if given.adapter is None:
            yield other
        else:
            with adapters.off(model):
                yield model

    return Preferences(model, given.objective, None if given.objective.kind == "simpo" else reference)


@pytest.mark.filterwarnings("ignore:.*profiler:UserWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_what_pairs_need_is_what_the_allocator_gives(config: ModelConfig, way: dict[str, object], kind: str) -> None:
    given = setting(**way, seq_len=160, objective=ObjectiveConfig(kind=kind))
    told, model = need(config, given), real(config, given)
    forward = applied(preferring(model, given), compile=False, checkpointing=given.checkpointing)
    give_gradients(model)
    row = torch.zeros(given.rows, 2 * given.seq_len, dtype=torch.int64)
    taken = most_allocated(lambda: forward(row, row, row, row).backward())
    assert told.activations + told.work == pytest.approx(taken, rel=0.05)


def test_a_reference_of_its_own_is_counted_with_the_weights() -> None:
    config = ModelConfig(**SHAPE)
    plain, dpo, simpo = (
        need(config, setting(objective=ObjectiveConfig(kind=k))) for k in ("next_token", "dpo", "simpo")
    )
    assert dpo.weights == dpo.reference == plain.weights and plain.reference == simpo.reference == 0
    assert simpo.weights == plain.weights
    switched = (
        need(config, setting(adapter=AdapterConfig(), objective=ObjectiveConfig(kind=k))) for k in ("dpo", "simpo")
    )
    assert len({each.weights for each in switched}) == 1


def test_targets_of_one_layer_are_counted_in_that_layer() -> None:
    config, named = ModelConfig(**SHAPE), AdapterConfig(rank=4, targets=("layers.3.mlp.up_proj", "q_proj"))
    trained = [p for p in real(config, setting(adapter=named)).parameters() if p.requires_grad]
    told = need(config, setting(adapter=named))
    assert told.gradients == 4 * sum(p.numel() for p in trained)
    assert parameters(config, named)["adapter"] == sum(p.numel() for p in trained)


def test_checkpointing_keeps_little_of_a_block() -> None:
    config = ModelConfig(**SHAPE | {"n_layer": 16})
    none, full = (need(config, setting(checkpointing=kept)) for kept in ("none", "full"))
    assert full.activations < none.activations / 10
    assert full.total < none.total
    assert (full.weights, full.gradients, full.optimizer) == (none.weights, none.gradients, none.optimizer)


@pytest.mark.parametrize("base", ["bf16", "int8", "int4"])
def test_a_smaller_base_takes_fewer_bytes_of_weights_and_no_more_of_the_rest(base: str) -> None:
    config = ModelConfig(**SHAPE)
    before, after = (need(config, setting(adapter=AdapterConfig(base_dtype=kind))) for kind in ("fp32", base))
    assert after.weights < 0.8 * before.weights
    assert after.gradients == before.gradients
    assert after.activations <= before.activations


def test_a_fused_kernel_on_a_gpu_keeps_no_scores() -> None:
    config = ModelConfig(**SHAPE)
    gpu, cpu = (need(config, setting(device=device)) for device in ("cuda", "cpu"))
    assert gpu.activations < cpu.activations
    scores = config.n_layer * 2 * config.n_head * 320 * 320 * 4
    assert cpu.activations - gpu.activations == pytest.approx(scores, rel=0.5)


def test_what_is_kept_selectively_on_a_gpu_has_the_answers_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    config, given = ModelConfig(**SHAPE), setting(device="cuda", checkpointing="selective")
    kept = need(config, given)
    stands_in = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    dear = [op for op in parallel.DEAR if op is not stands_in]
    monkeypatch.setitem(
        parallel.KEEPING, "selective", {"context_fn": partial(create_selective_checkpoint_contexts, dear)}
    )
    memory._passed.cache_clear()
    dropped = need(config, given)
    memory._passed.cache_clear()
    of_heads = given.rows * given.seq_len * config.n_head * (config.d_head + 1) * 4
    assert kept.activations - dropped.activations == config.n_layer * of_heads


def test_a_prefix_lm_keeps_its_scores_on_a_gpu_too() -> None:
    causal, prefix = (need(ModelConfig(**SHAPE, prefix_lm=both), setting(device="cuda")) for both in (False, True))
    assert prefix.activations > causal.activations


def test_documents_in_a_row_and_windows_are_gone_through() -> None:
    windowed = ModelConfig(**SHAPE, window=16, full_layers=(3,), nope_layers=(2,))
    assert need(windowed, setting(documents=True)).total > need(windowed, setting()).total


def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    counts = parameters(config, AdapterConfig(rank=8))
    assert counts == parameters(config, AdapterConfig(rank=8, base_dtype="int8")), "kept otherwise, and as many"
    model = GPT(config)
    assert sum(counts.values()) - counts["adapter"] == sum(p.numel() for p in model.parameters())
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]
    assert counts["adapter"] == sum(8 * (m.in_features + m.out_features) for m in linears)
    assert counts["head"] == (0 if config.tie_embeddings else model.lm_head.weight.numel())


def test_a_model_too_large_for_this_machine_is_gone_through_all_the_same() -> None:
    huge = ModelConfig(
        vocab_size=128256, max_seq_len=8192, n_layer=80, d_model=8192, n_head=64, n_kv_head=8, d_ff=28672
    )
    told = need(huge, setting(rows=1, seq_len=2048, device="cuda", dtype="bfloat16"))
    assert told.gradients == 4 * sum(parameters(huge).values())
    assert told.weights > 260e9


def test_gradients_of_a_single_micro_batch_come_as_activations_go() -> None:
    config = ModelConfig(**SHAPE | {"n_layer": 2, "vocab_size": 4096})
    several, one = (need(config, setting(summed=summed)) for summed in (True, False))
    model = real(config, setting())
    taken = most_allocated(lambda: pass_through(model, setting()).backward())
    assert replace(one, holes=0.0).total - one.weights - one.optimizer == pytest.approx(taken, rel=0.05)
    assert several.total == pytest.approx(one.total + several.gradients, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_rows_are_told_from_few(config: ModelConfig, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many logits are made at once."""
    monkeypatch.setitem(memory.loss.CHUNK_LOGITS, "cuda", 3_000_000)
    told = needs(config, setting(device=device, seq_len=160))
    for rows in (1, 30):
        real = need(config, setting(device=device, seq_len=160, rows=rows)).total
        assert told(rows).total == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("more", [{}, {"documents": True}, {"objective": ObjectiveConfig(kind="dpo")}], ids=str)
@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_a_count_of_more_than_it_takes_is_more(config: ModelConfig, position: str, more: dict[str, object]) -> None:
    shape = config.model_copy(update={"position": position})
    for optim in ({}, {"kind": "muon"}):
        given = setting(**more, optim=OptimConfig(**optim), seq_len=160)
        assert need(shape, given).total < at_most(shape, given, 2)


def test_the_total_is_the_larger_of_the_pass_and_the_step() -> None:
    assert Need(weights=1, gradients=2, optimizer=3, activations=4, work=5, step=6).total == 15
    assert Need(weights=1, gradients=2, optimizer=3, activations=4, work=5, step=60).total == 66
    assert Need(weights=1, gradients=2, optimizer=3, activations=4, work=5, step=6, summed=False).total == 13
    assert Need(weights=1, gradients=2, optimizer=3, activations=40, work=50, step=60, holes=0.4).total == 6 + 126


def test_nothing_is_left_changed() -> None:
    before = dict(memory.loss.CHUNK_LOGITS), dict(memory.loss.PIECE_LOGITS)
    need(ModelConfig(**SHAPE), setting(device="cuda"))
    assert before == (memory.loss.CHUNK_LOGITS, memory.loss.PIECE_LOGITS)
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "n"), [("12GB", 12 * 10**9), ("11.5 GiB", 11.5 * 2**30), ("800mb", 8e8), ("4096", 4096)]
)
def test_sizes_are_read(text: str, n: float) -> None:
    assert size(text) == n


@pytest.mark.parametrize("text", ["", "GB", "much", "12XB", "1.2.3GB", "-4GB", "9" * 400 + "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size of a memory; write it like 12GB"):
        size(text)
