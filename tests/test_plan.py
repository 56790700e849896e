"""Choices before step 1: one budget, measured speeds turned into steps, and every automatic choice with its reason."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from conftest import Build
from pydantic import ValidationError

from gpt import adapters, host, plan, quantize, runtime
from gpt.adapters import AdapterConfig
from gpt.model import GPT, ModelConfig
from gpt.plan import Choices, TrainingConfig, choose

MINUTE = 60.0


@dataclass
class Machine:
    """A machine of known speed: what `choose` is told of it, and a record of what it asked and said."""

    eager_s: float = 1.0
    compiled_s: float = 0.5
    most_rows: int = 10**9
    compile_error: Exception | None = None
    missing: str | None = None
    calls: list[tuple[int, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure(self, rows: int, compiled: bool) -> float:
        self.calls.append((rows, compiled))
        if compiled and self.compile_error is not None:
            raise self.compile_error
        if rows > self.most_rows:
            raise torch.OutOfMemoryError("out of memory")
        return self.compiled_s if compiled else self.eager_s

    def choose(
        self,
        *,
        rows: int = 8,
        device: str = "cpu",
        once: Callable[[float], float] = lambda seconds: 0.0,
        extra: Callable[[float], float] = lambda seconds: 0.0,
        elapsed: float = 0.0,
        **settings: object,
    ) -> Choices:
        return choose(
            TrainingConfig(**settings),  # type: ignore[arg-type]
            Choices(
                device=device,
                dtype="float32",
                threads=2,
                micro_batch=rows,
                compile=False,
                steps=1,
                data="fingerprint",
                torch=runtime.torch_version(),
                cpu=runtime.cpu_kind(),
            ),
            once=once,
            extra=extra,
            elapsed=lambda: elapsed,
            measure=self.measure,
            note=self.notes.append,
            missing=self.missing,
        )

    def said(self, words: str) -> list[str]:
        return [note for note in self.notes if words in note]


# Settings


@pytest.mark.parametrize(
    ("budget", "got"),
    [
        ({}, "got none"),
        ({"steps": 10, "tokens": 100}, r"got steps \(10\), tokens \(100\)"),
        ({"steps": 10, "time": 60.0}, r"got steps \(10\), time \(60.0\)"),
        ({"steps": 1, "tokens": 2, "time": 3.0}, r"got steps \(1\), tokens \(2\), time \(3.0\)"),
    ],
)
def test_a_budget_is_exactly_one_of_three(budget: dict[str, float], got: str) -> None:
    with pytest.raises(ValidationError, match=f"exactly one of steps, tokens and time .*{got}"):
        TrainingConfig(**budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["micro_batch", "threads"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"{name} \(0\) must be at least 1"):
        TrainingConfig(steps=1, **{name: 0})  # type: ignore[arg-type]


# Steps


def test_steps_are_as_set_and_tokens_are_rounded_up_to_whole_steps() -> None:
    machine = Machine()
    assert machine.choose(steps=7, compile=False).steps == 7
    assert machine.choose(tokens=1000, batch_tokens=100, compile=False).steps == 10
    assert machine.choose(tokens=1001, batch_tokens=100, compile=False).steps == 11
    assert machine.calls == []  # nothing that was asked depends on speed


@pytest.mark.parametrize("compiled", [True, False])
def test_a_time_budget_is_filled_with_steps_of_the_measured_speed(compiled: bool) -> None:
    machine = Machine(eager_s=0.25, compiled_s=0.125)
    aside = {"once": lambda seconds: 40 * seconds, "extra": lambda seconds: seconds / 2}
    choices = machine.choose(time=100.0, compile=compiled, elapsed=10.0, **aside)
    assert choices.steps == int(85 / 0.1875 if compiled else 80 / 0.375)
    assert machine.calls == [(8, compiled)]
    assert machine.notes == [f"budget: 100 s are {choices.steps} steps at {125 if compiled else 250} ms"]


def test_a_time_budget_already_spent_still_makes_a_step() -> None:
    assert Machine().choose(time=5.0, compile=False, elapsed=9.0).steps == 1


def test_the_record_holds_what_was_given_and_what_repeats_a_run() -> None:
    choices = Machine().choose(steps=3, compile=False)
    assert (choices.device, choices.dtype, choices.threads, choices.data) == ("cpu", "float32", 2, "fingerprint")
    assert (choices.torch, choices.cpu) == (runtime.torch_version(), runtime.cpu_kind())


def test_what_could_not_be_had_as_asked_is_recorded() -> None:
    assert Machine().choose(rows=4, steps=3, compile=True, micro_batch=4).fallbacks == {}
    small = Machine(compile_error=RuntimeError("g++"), most_rows=2)
    asked = {"steps": 3, "compile": True, "micro_batch": 4}
    assert small.choose(rows=4, **asked).fallbacks == {"compile": True}, "nothing eager was measured"
    assert Machine(most_rows=2).choose(rows=4, **asked).fallbacks == {"micro_batch": 4}
    assert Machine(most_rows=2).choose(rows=4, steps=3, compile=True).fallbacks == {}, "what was left open"


# Compilation


@pytest.mark.parametrize(
    ("settings", "compiled"),
    [
        ({"time": 2 * MINUTE}, False),
        ({"time": 3 * MINUTE}, True),
        ({"steps": 100}, False),
        ({"steps": 1000}, True),
        ({"tokens": 100 * 16384}, False),
        ({"tokens": 1000 * 16384}, True),
    ],
)
def test_a_cpu_compiles_where_training_is_long_enough_and_says_so(settings: dict[str, float], compiled: bool) -> None:
    machine = Machine()
    assert machine.choose(**settings).compile is compiled
    (note,) = machine.said("compile:")
    assert note.startswith("compile: yes (about" if compiled else "compile: no (about")
    assert ("do not repay" in note) is not compiled


def test_a_cpu_where_a_compiled_update_is_slower_runs_eagerly_and_says_so() -> None:
    machine = Machine(eager_s=1.0, compiled_s=1.02)
    assert machine.choose(steps=1000).compile is False
    assert machine.notes[-1] == "compile: no, running eagerly (an update takes 1.02 s compiled, 1 s as it is)"
    assert [compiled for _, compiled in machine.calls] == [False, True, False]


def test_rows_that_fit_eagerly_and_not_compiled_are_kept_where_it_runs_eagerly() -> None:
    class Narrow(Machine):
        def measure(self, rows: int, compiled: bool) -> float:
            if compiled and rows > 2:
                self.calls.append((rows, compiled))
                raise torch.OutOfMemoryError("out of memory")
            return super().measure(rows, compiled)

    machine = Narrow(eager_s=1.0, compiled_s=1.5)
    choices = machine.choose(rows=4, steps=1000, micro_batch=4)
    assert (choices.micro_batch, choices.compile, choices.fallbacks) == (4, False, {})
    assert machine.calls == [(4, False), (4, True), (2, True), (4, False)]


def test_a_cpu_without_a_compiler_does_not_try_and_says_why() -> None:
    machine = Machine(missing="no C++ compiler (g++) found")
    assert not machine.choose(steps=10**6).compile
    assert machine.notes == ["compile: no (no C++ compiler (g++) found)"]
    assert (8, True) not in machine.calls


def test_a_gpu_compiles_without_being_asked() -> None:
    machine = Machine()
    assert machine.choose(steps=1, device="cuda").compile
    assert machine.calls == [(8, True)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compilation_as_set_is_obeyed(device: str) -> None:
    assert Machine().choose(steps=1, device=device, compile=True).compile
    assert not Machine().choose(steps=10**6, device=device, compile=False).compile


@pytest.mark.parametrize("error", [RuntimeError("\n g++: exit 1\nat line 3"), ImportError("g++: exit 1")])
def test_compilation_that_fails_falls_back_to_eager_with_one_reason(error: Exception) -> None:
    machine = Machine(compile_error=error)
    choices = machine.choose(time=10 * MINUTE)
    assert not choices.compile
    assert choices.steps == 600  # of eager speed
    assert machine.said("it failed") == ["compile: no, running eagerly (it failed: g++: exit 1)"]


def test_a_rank_that_is_lost_while_another_compiles_is_no_failure_of_the_compiler() -> None:
    machine = Machine(compile_error=RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4321"))
    with pytest.raises(RuntimeError, match="closed by peer"):
        machine.choose(steps=10**6)


def test_a_failed_compilation_as_set_is_budgeted_at_eager_speed() -> None:
    machine = Machine(compile_error=RuntimeError("g++: exit 1"), eager_s=0.25)
    assert machine.choose(time=MINUTE, compile=True).steps == 240
    assert machine.calls == [(8, True), (8, False)]


def test_an_error_without_words_is_named_by_its_kind() -> None:
    machine = Machine(compile_error=RuntimeError())
    assert not machine.choose(steps=1, compile=True).compile
    assert machine.said("it failed") == ["compile: no, running eagerly (it failed: RuntimeError)"]


# Micro-batches


def test_out_of_memory_goes_down_the_divisors_by_halves_and_says_so() -> None:
    machine = Machine(most_rows=4)
    assert machine.choose(rows=18, time=MINUTE, compile=False).micro_batch == 3
    assert [rows for rows, _ in machine.calls] == [18, 9, 3]
    assert machine.said("out of memory") == [f"micro_batch: out of memory, trying {rows} rows" for rows in (9, 3)]


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Machine(most_rows=0).choose(rows=4, time=MINUTE, compile=False)


def rows(config: TrainingConfig, n_rows: int, most: int, device: str = "cuda") -> int:
    return plan.micro_batch(config, n_rows, 64, device, lambda rows: rows <= most)


def test_a_micro_batch_as_set_must_divide_the_batch() -> None:
    assert rows(TrainingConfig(steps=1, micro_batch=6), 12, 0) == 6
    with pytest.raises(ValueError, match=r"train\.micro_batch \(5\) must divide the batch's 12 rows"):
        rows(TrainingConfig(steps=1, micro_batch=5), 12, 0)


def test_an_automatic_micro_batch_is_the_largest_divisor_that_fits() -> None:
    config = TrainingConfig(steps=1)
    assert [rows(config, 12, most) for most in (100, 11, 5, 1, 0)] == [12, 6, 4, 1, 1]
    assert rows(config, 1000, 10**9, "cpu") * 64 <= plan.CPU_MICRO_BATCH_TOKENS
    assert rows(config, 128, 10**9, "cpu") == 64
    assert rows(config, 128, 10, "cpu") == 8


@pytest.mark.parametrize(
    ("n_rows", "most", "found", "told"),
    [
        (127, 10, 1, True),
        (122, 10, 2, True),
        (136, 16, 8, True),
        (128, 10, 8, False),
        (12, 7, 6, False),
        (7, 7, 7, False),
    ],
)
def test_rows_with_few_divisors_are_told_of(n_rows: int, most: int, found: int, told: bool) -> None:
    notes: list[str] = []
    assert (
        plan.micro_batch(TrainingConfig(steps=1), n_rows, 64, "cuda", lambda rows: rows <= most, notes.append) == found
    )
    words = f"micro_batch: {found}, though {2 * found} rows would do: it divides the {n_rows} rows that a rank reads in an update"
    assert notes == ([f"{words} (train.batch_tokens)"] if told else [])


# The machine


def test_the_machine_is_chosen_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "best_device", lambda: ("cpu", "2 cores"))
    monkeypatch.setattr(host, "n_cores", lambda: 2)
    monkeypatch.setattr(runtime, "cpu_flags", lambda: {"avx512_bf16"})
    assert plan.machine(TrainingConfig(steps=1)) == (
        "cpu",
        "bfloat16",
        2,
        "cpu (2 cores), bfloat16 (the CPU has avx512_bf16), 2 threads",
    )
    settings = TrainingConfig(steps=1, device="cpu", dtype="float32", threads=1)
    assert plan.machine(settings)[:3] == ("cpu", "float32", 1)
    with pytest.raises(ValueError, match="device 'abacus' is not available"):
        plan.machine(TrainingConfig(steps=1, device="abacus"))


# Costs


PUBLISHED = {
    "gpt-1": (116_534_784, {"vocab_size": 40_478, "max_seq_len": 512, "norm_at": "post"}),
    "gpt-2": (124_439_808, {"vocab_size": 50_257, "max_seq_len": 1024}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models_are_counted_exactly(name: str) -> None:
    count, shape = PUBLISHED[name]
    config = ModelConfig(
        n_layer=12, d_model=768, n_head=12, mlp="gelu_tanh", norm="layernorm", qk_norm=False, position="learned",
        attention_bias=True, mlp_bias=True, **shape,
    )  # fmt: skip
    with torch.device("meta"):
        assert plan.n_parameters(GPT(config)) == count


def test_positions_are_looked_up_and_cost_no_products(build: Build) -> None:
    costs = {kind: plan.flops_per_token(build(position=kind), 10) for kind in ("none", "learned", "relative", "rotary")}
    assert len(set(costs.values())) == 1


def test_a_layer_pays_for_the_keys_that_its_window_lets_it_see(build: Build) -> None:
    whole = plan.flops_per_token(build(n_layer=3), 20)
    assert whole - plan.flops_per_token(build(n_layer=3, window=5, full_layers=(1,)), 20) == 2 * 12 * 32 * (20 - 5)
    assert whole == plan.flops_per_token(build(n_layer=3, window=100), 20)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_a_token_are_those_counted_by_hand(build: Build, tied: bool) -> None:
    model = build(n_kv_head=2, d_ff=48, tie_embeddings=tied)  # C 32, H 4, G 2, D 8, F 48, V 64, L 2
    attention, mlp, head = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 32 * 64
    assert plan.flops_per_token(model, seq_len=10) == 6 * (2 * (attention + mlp) + head) + 2 * 12 * 32 * 10


def test_frozen_matrices_cost_no_gradient_of_their_own(build: Build) -> None:
    model = build()
    whole, attention = plan.flops_per_token(model, 10), 2 * 12 * 32 * 10
    assert plan.n_trained(model) == plan.n_parameters(model)
    model.requires_grad_(False)
    assert plan.flops_per_token(model, 10) - attention == (whole - attention) * 4 / 6
    assert plan.n_trained(model) == 0


def test_a_base_in_few_bits_costs_what_it_costs_in_fp32(build: Build) -> None:
    costs = []
    for kind in ("fp32", "bf16"):
        model = build()
        if kind != "fp32":
            quantize.quantized(model, "bf16")
        adapters.put_on(model, AdapterConfig(rank=2))
        costs.append(plan.flops_per_token(model, 10))
    assert costs[0] == costs[1]


def test_a_reference_costs_a_third_of_what_would_train_it(build: Build) -> None:
    model = build()
    whole = plan.flops_per_token(model, 10)
    assert plan.flops_per_token(model, 10, reference=True) == whole * 4 / 3
    adapters.put_on(model, AdapterConfig(rank=2))
    worn = plan.flops_per_token(model, 10)
    assert plan.flops_per_token(model, 10, reference=True) - worn == whole / 3, "the adapter is off in it"


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA L4", 121e12), ("Abacus", None)])
def test_peaks_are_those_of_the_card(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert plan.peak_flops("cuda") == peak
    assert plan.peak_flops("cpu") is None


def test_a_save_takes_as_long_as_its_bytes_need() -> None:
    assert plan.save_s(10**9) == 10 * plan.save_s(10**8) == 12e9 / 3e8
    assert plan.saved_bytes(10**9, ema=0.1) == 16 * 10**9 and plan.save_s(10**9, ema=0.1) == 16e9 / 3e8


@pytest.mark.parametrize(
    ("policy", "spins", "asleep"),
    [(None, None, False), ("PASSIVE", None, True), ("passive", "1000", False), (None, "0", True)],
)
def test_a_small_model_has_one_thread_sooner_where_threads_sleep(
    monkeypatch: pytest.MonkeyPatch, build: Build, policy: str | None, spins: str | None, asleep: bool
) -> None:
    for name, value in (("OMP_WAIT_POLICY", policy), ("GOMP_SPINCOUNT", spins)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert runtime.threads_sleep() == asleep
    model = build(n_layer=2, d_model=128)
    per_layer = plan.flops_per_token(model, 64) / 2
    for tokens in (64, 1024, 65_536, 1 << 20):
        worth = tokens * per_layer >= (5e9 if asleep else 5e8)
        assert plan.threads_for(model, tokens, 64, 8) == (8 if worth else 1), tokens
    assert plan.threads_for(model, 64, 64, 8) == 1 and plan.threads_for(model, 1 << 20, 64, 8) == 8
