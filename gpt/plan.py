"""What a run settles before step 1: every choice left to `auto`, in one frozen record, and what the run costs.

The record is written to config.yaml before the first update and obeyed on resume, so a resumed run repeats it.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from gpt import host, machines, runtime, signals
from gpt.config import Count, Duration, Settings
from gpt.model import GPT

COMPILE_PAYS_AFTER_S = 150.0  # compiling costs 6-28 s on two cores, saves about 10 % of a step (docs/experiments.md)
# FLOPs of a pass through one layer and back below which a second thread costs more than it saves: for threads that wait
# awake for a moment, and for such as sleep (docs/experiments.md).
WORTH_WAKING = {False: 5e8, True: 5e9}
CPU_MICRO_BATCH_TOKENS = 4096  # larger micro-batches leave the CPU's caches and gain nothing


class TrainingConfig(Settings):
    """How long and in what portions; exactly one of steps, tokens and time."""

    steps: Count | None = Field(None, ge=1, description="updates")
    tokens: Count | None = Field(None, ge=1, description="training tokens, rounded up to whole steps")
    time: Duration | None = Field(
        None, gt=0, description="seconds from start to end, evaluations and saves included; fits the steps"
    )
    batch_tokens: Count = Field(16384, ge=1, description="tokens of one update, a multiple of data.seq_len")
    micro_batch: Literal["auto"] | int = Field(
        "auto", description="rows of one forward pass, a divisor of the batch's rows"
    )
    device: str = Field("auto", description="cpu, cuda, mps or auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of matrix products; weights stay fp32; float16, with a loss scale, is for GPUs without bfloat16",
    )
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile; auto: where it repays its own time")
    checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what is computed again for a block's gradient; full: all but what it reads; selective: what is cheap, so that "
        "products of matrices and attention are kept",
    )
    threads: Literal["auto"] | int = Field("auto", description="CPU threads; auto: every core, or one for small models")
    hang: Duration | None = Field(
        1800.0,
        gt=0,
        description="seconds without a sign of life after which a run is taken to hang and ends (exit code 6); start, first update "
        "and saves may take 4 times as long; null: never",
    )
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without a better val_bpb")
    profile: int | None = Field(
        None,
        ge=1,
        description="updates to trace into trace.json.gz, once they are steady; the largest costs are printed",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        budgets = {name: value for name in ("steps", "tokens", "time") if (value := getattr(self, name)) is not None}
        if len(budgets) != 1:
            got = ", ".join(f"{name} ({value})" for name, value in budgets.items()) or "none"
            raise ValueError(f"set exactly one of steps, tokens and time (got {got})")
        for name in ("micro_batch", "threads"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        return self


class Choices(Settings):
    """What settled itself: everything that changes bits, and the facts it was settled on."""

    device: str = Field(description="where the run computes")
    dtype: str = Field(description="dtype of matrix products")
    compile: bool = Field(description="whether the training step is compiled")
    micro_batch: int = Field(description="rows of one forward pass")
    threads: int = Field(description="CPU threads")
    steps: int = Field(description="updates of the whole run")
    data: str = Field(description="fingerprint of the data set, or of all of a mixture")
    attention: str = Field("dense", description="kernel of attention inside documents and windows: flex or dense")
    fused: Literal["any", "flash", "cudnn"] = Field(
        "any", description="torch's fused attention kernel that is tried first; any: in torch's own order"
    )
    reference: str | None = Field(None, description="fingerprint of the weights that answers are compared with")
    fallbacks: dict[str, bool | int] = Field(
        default_factory=dict, description="settings of train that could not be had, as they were asked for"
    )
    torch: str = Field(description="version of torch")
    cpu: str = Field(description="kind of CPU")


Measure = Callable[[int, bool], float]  # seconds of one update, by (micro_batch, compiled)


def machine(config: TrainingConfig) -> tuple[str, str, int, str]:
    """(device, dtype, threads, one line that says why)."""
    best, name = runtime.best_device()
    device = best if config.device == "auto" else config.device
    runtime.check_device(device)
    dtype, why = runtime.best_dtype(device) if config.dtype == "auto" else (config.dtype, "as set")
    threads = share_of_cores() if config.threads == "auto" else config.threads
    shown = name if device == best else "as set"
    return device, dtype, threads, f"{device} ({shown}), {dtype} ({why}), {threads} threads"


def share_of_cores() -> int:
    """Cores of this machine for each of the run's processes on it."""
    return max(1, host.n_cores() // runtime.local_world_size())


def threads_for(model: GPT, tokens: int, seq_len: int, threads: int) -> int:
    """So many, or one, where the operations of `tokens` tokens are over before another thread is awake."""
    of_a_layer = tokens * flops_per_token(model, seq_len) / max(1, model.config.n_layer)
    return threads if of_a_layer >= WORTH_WAKING[runtime.threads_sleep()] else 1


def fixed_steps(config: TrainingConfig) -> int | None:
    """Updates that steps or tokens ask for; None with a time budget."""
    return config.steps if config.tokens is None else -(-config.tokens // config.batch_tokens)


def micro_batch(
    config: TrainingConfig,
    n_rows: int,
    row_tokens: int,
    device: str,
    fits: Callable[[int], bool],
    note: Callable[[str], None] = lambda line: None,
) -> int:
    """Rows of one forward pass: as set, or the largest divisor of `n_rows` that fits and that a CPU's caches can use; noted
    where those divisors are few.
    """
    if config.micro_batch != "auto":
        if n_rows % config.micro_batch:
            raise ValueError(f"train.micro_batch ({config.micro_batch}) must divide the batch's {n_rows} rows")
        return config.micro_batch
    most = CPU_MICRO_BATCH_TOKENS // row_tokens if device == "cpu" else n_rows
    divisors = (rows for rows in range(min(n_rows, most), 1, -1) if n_rows % rows == 0)
    found = next((rows for rows in divisors if fits(rows)), 1)
    if 2 * found <= min(n_rows, most) and fits(2 * found):
        note(
            f"micro_batch: {found}, though {2 * found} rows would do: it divides the {n_rows} rows that a rank reads in an update "
            "(train.batch_tokens)"
        )
    return found


def choose(
    config: TrainingConfig,
    first: Choices,
    *,
    once: Callable[[float], float],
    extra: Callable[[float], float],
    elapsed: Callable[[], float],
    measure: Measure,
    note: Callable[[str], None],
    missing: str | None,
) -> Choices:
    """`first` with micro-batch (its own at most), compilation and steps settled; an update is measured only where one of
    them depends on it.

    `extra(seconds per update)` are the seconds a step costs on average beside its update, `once(seconds per update)` those
    of the run's beginning and end; `elapsed()` is what a time budget has lost already. `missing` is why nothing can be
    compiled here for a CPU, or None.
    """
    timed = config.time is not None
    compiled = config.compile if isinstance(config.compile, bool) else first.device.startswith("cuda")
    rows, seconds, eager_s = first.micro_batch, 0.0, 0.0
    if config.compile == "auto" and first.device == "cpu":
        if not timed:
            rows, eager_s = fitting(measure, rows, False, note)
        fitted = rows
        expected = config.time or eager_s * (fixed_steps(config) or 0)
        compiled = expected > COMPILE_PAYS_AFTER_S and missing is None
        why = missing or f"about {expected:.0f} s of training {'repay' if compiled else 'do not repay'} compiling"
        note(f"compile: {'yes' if compiled else 'no'} ({why})")
    if compiled:
        try:
            rows, seconds = fitting(measure, rows, True, note)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError) as error:
            if signals.lost(error):  # no fault of the compiler's
                raise
            note(f"compile: no, running eagerly (it failed: {signals.reason(error)})")
            compiled, seconds = False, 0.0
        if 0 < eager_s < seconds:
            note(f"compile: no, running eagerly (an update takes {seconds:.3g} s compiled, {eager_s:.3g} s as it is)")
            compiled, rows = False, fitted
    if not compiled and (timed or seconds):  # what was made for a compiled update is not kept for the others
        rows, seconds = fitting(measure, rows, False, note)
    steps = fixed_steps(config) or 1
    if config.time is not None:
        left = config.time - elapsed() - once(seconds)
        steps = max(1, int(left / (seconds + extra(seconds))))
        note(f"budget: {config.time:.0f} s are {steps} steps at {1000 * seconds:.0f} ms")
    settled = {"compile": compiled, "micro_batch": rows}
    missed = {name: asked for name, value in settled.items() if (asked := getattr(config, name)) not in ("auto", value)}
    return first.model_copy(update={**settled, "steps": steps, "fallbacks": missed})


def fitting(measure: Measure, rows: int, compiled: bool, note: Callable[[str], None]) -> tuple[int, float]:
    """Halve the micro-batch until one update fits in memory; (rows, seconds of an update)."""
    while True:
        try:
            return rows, measure(rows, compiled)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows = max(divisor for divisor in range(1, rows // 2 + 1) if rows % divisor == 0)
            note(f"micro_batch: out of memory, trying {rows} rows")


def n_parameters(model: nn.Module) -> int:
    """Parameters, a tied matrix counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def saved_bytes(n_trained: int, ema: float | None = None) -> int:
    """Bytes of a checkpoint, at most: of each trained parameter itself, AdamW's two averages and, with `ema`, its own."""
    return (12 if ema is None else 16) * n_trained


def save_s(n_trained: int, ema: float | None = None) -> float:
    """Seconds of a save, about: at 300 MB/s."""
    return saved_bytes(n_trained, ema) / 3e8


def n_trained(model: GPT) -> int:
    """Parameters that an update moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def flops_per_token(model: GPT, seq_len: int, *, reference: bool = False) -> float:
    """Training FLOPs of a token: 6 a matrix parameter, 12 H D T a layer for attention (PaLM, appendix B: not causal).

    T is at most the layer's sliding window. A frozen matrix takes 4: it gets no gradient of its own. A reference, which
    is only asked, takes a third of what would train it: 2 and 4.
    """
    c = model.config
    looked_up = ("model.embed_tokens", "model.position")
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith(looked_up)]
    products = [*matrices, model.lm_head.weight] if c.tie_embeddings else matrices
    seen = sum(min(c.window_of(layer) or seq_len, seq_len) for layer in range(c.n_layer))
    flops = sum((6 if p.requires_grad else 4) * p.numel() for p in products)
    modules: list[Any] = [*model.modules()]
    base = sum(m.in_features * m.out_features for m in modules if hasattr(m, "stored"))  # in few bits: no parameter
    attention = 12 * c.n_head * c.d_head * seen
    asked = 0
    if reference:  # without an adapter's thin matrices
        thin = {id(p) for name, p in model.named_parameters() if ".lora_" in name}
        asked = 2 * (base + sum(p.numel() for p in products if id(p) not in thin)) + attention // 3
    return flops + 4 * base + attention + asked


def peak_flops(device: str) -> float | None:
    """The data sheet's bf16 peak of this GPU, None where we know none."""
    if not device.startswith("cuda"):
        return None
    machine = machines.of_card(torch.cuda.get_device_name(device))
    return None if machine is None else machine.peak
