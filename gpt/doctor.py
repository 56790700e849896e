"""What is wrong with a training, and what to set: a likely cause from the evidence, in words; and the batch as text.

It decides nothing (`judge` does). Each finding names one setting with a value, and stands in metrics.jsonl.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from gpt import parallel, signals
from gpt.data import IGNORED, Batch, Loader
from gpt.judge import Bad, Spike
from gpt.loss import n_terms
from gpt.optim import Optimizer
from gpt.places import of_batch, openings
from gpt.plan import Choices
from gpt.ranks import Forward, Ranks, apart
from gpt.schedule import factor, updates
from gpt.settle import REPEATS, TrainConfig
from gpt.tokenizer import Tokenizer

SHORT, LONG = 8, 20  # numbers that make a tendency; training lines that make a habit
NO_BETTER = 0.03  # of ln(V): a loss this near to it knows nothing of the text
TEACHING_STEPS = 200  # after which a loss that never moved is remarkable
RISEN = 1.15  # times the best: a loss that high diverges
WORSE_EVALS = 3  # rising evaluations that make overfitting
AGAIN = 1000  # updates after which a spike is told of again
DEAD = 1e-7  # a gradient norm that teaches nothing


@dataclass(frozen=True)
class Finding:
    """What was found (`about`, one word), and the text: evidence, likely cause, what to set."""

    about: str
    text: str


@dataclass(frozen=True)
class Look:
    """A second look at a micro-batch of a bad batch: its rows, its loss by target, whose gradients are not finite."""

    first: int
    last: int
    loss: float
    tensors: tuple[str, ...]

    @property
    def bad(self) -> bool:
        return bool(self.tensors) or not math.isfinite(self.loss)


def second_look(
    forward: Forward,
    optimizer: Optimizer,
    batch: Batch,
    config: TrainConfig,
    choices: Choices,
    step: int,
    ranks: Ranks,
    times: float,
) -> list[Look]:
    """Compute a batch again, each micro-batch by itself; weights stay, gradients are gone when this returns.

    `times` is the loss scale. Of several ranks each computes its share, as in the update, and all are told of all of it.
    """
    parts = list(zip(*(x.split(choices.micro_batch) for x in batch.given), strict=True))
    n = max(1, n_terms(config.objective, batch))

    def look(i: int) -> tuple[int, float, tuple[str, ...]]:
        """(i, loss by target of micro-batch i, what has gradients that are not finite)."""
        signals.beat()
        optimizer.drop()
        with parallel.preferring(choices.fused), apart(forward):
            nats = ranks.nats(forward, parts[i], choices, config.seed, step, i)
            (nats / n * times).backward()
        optimizer.here.take()
        rows = len(parts[i][0])
        pairs = n_terms(config.objective, batch) * rows / len(batch.tokens)
        terms = pairs if config.objective.of_pairs else int((parts[i][1] != IGNORED).sum())
        wrong = broken({name: p.grad for p, name in optimizer.names.items() if p.grad is not None})
        return i, float(nats.detach()) / max(1, terms), wrong

    looks: dict[int, Look] = {}
    for start in range(0, len(parts), ranks.n.n_data):
        told = ranks.team.gather(look(min(start + ranks.place, len(parts) - 1)))
        # Where a model is in parts its gradients are sums over ranks: they are laid to the rows whose loss is bad, if any.
        summed = sorted({name for _, _, wrong in told for name in wrong})
        guilty = {i for i, loss, _ in told if not math.isfinite(loss)} or {i for i, _, _ in told}
        for i, loss, wrong in told:
            names = wrong if not ranks.n.in_parts else summed if i in guilty else []
            first = i * choices.micro_batch
            looks[i] = Look(first, first + len(parts[i][0]) - 1, loss, tuple(names))
    optimizer.drop()
    return [looks[i] for i in sorted(looks)]


def broken(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of those that hold a number that is not finite."""
    return tuple(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all()))


def climbing(recent: Sequence[tuple[float, float]]) -> bool:
    """Whether loss or gradient norm rose over the last updates."""
    if len(recent) < 2 * SHORT:
        return False
    losses, norms = (list(column) for column in zip(*recent, strict=True))
    low, high = statistics.median(losses[:-SHORT]), statistics.median(losses[-SHORT:])
    return high > 1.05 * low or statistics.median(norms[-SHORT:]) > 3 * statistics.median(norms[:-SHORT])


def of_bad(
    bad: Bad,
    config: TrainConfig,
    steps: int,
    recent: Sequence[tuple[float, float]],
    weights: Sequence[str],
    looks: Sequence[Look],
    sources: Mapping[int, str],
) -> Finding:
    """Why an update could not be made: `recent` are (loss, gradient norm) before it, `weights` those that are not finite,
    `sources` what stands in each row."""
    now = factor(config.schedule, bad.step, steps)
    usual = [f"loss {recent[-1][0]:.4g}, gradient norm {recent[-1][1]:.4g} the update before"] if recent else []
    evidence = [f"lr {config.optim.lr * now:.2g} ({now:.0%} of its peak)", *usual]
    typical = statistics.median(look.loss for look in looks) if looks else 0.0
    odd = [look for look in looks if look.bad or look.loss > 2 * max(typical, 1e-9)]
    gone = sorted({name for look in looks for name in look.tensors})
    if gone:
        evidence.append(f"gradients that are not finite: {_some(gone)}")
    warming = bad.step <= 2 * updates(config.schedule.warmup, steps)
    if weights:
        cause, advice = f"the weights themselves are not finite ({_some(weights)})", "numbers.on_bad=rollback"
    elif looks and not odd and not math.isfinite(bad.loss + bad.grad_norm):
        cause = (
            "the machine: computed again, the same batch gives finite numbers (memory, heat, or sums in another order)"
        )
        advice = "numbers.on_bad=skip"
    elif odd and 2 * len(odd) <= len(looks) and not climbing(recent):
        rows = "; ".join(
            f"rows {look.first}-{look.last} (loss {look.loss:.4g}): {_of(look, sources)}" for look in odd[:3]
        )
        cause = f"a document of garbage: {len(odd)} of {len(looks)} micro-batches stand out, {rows}"
        advice = (
            "numbers.on_bad=skip" + (" numbers.spikes=bad" if math.isfinite(bad.loss) else "") + ", or mend the text"
        )
    elif warming:
        longer = max(2 * updates(config.schedule.warmup, steps), 0.05 * steps, 2.0)
        cause = "the warm-up is too short"
        advice = f"schedule.warmup={math.ceil(min(longer, steps))} (steps; {_by('schedule.warmup')})"
    elif config.optim.clip is None:
        cause, advice = "gradients are not clipped", f"optim.clip=1.0 ({_by('optim.clip')})"
    else:
        told = "loss or gradient norm climbed before" if climbing(recent) else "the rate is what is left to suspect"
        cause = f"the learning rate is too high: {told}"
        advice = f"optim.lr={config.optim.lr / 3:.2g} ({_by('optim.lr')}), or past it with numbers.on_bad=rollback"
    text = f"{bad}\n{', '.join(evidence)}\nlikely: {cause}\nset: {advice}"
    return Finding("spike" if math.isfinite(bad.loss + bad.grad_norm) else "not finite", text)


def _by(key: str) -> str:
    """How a setting that may change on the way is changed."""
    return f"--allow {key}, or another run: --fresh"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of(look: Look, sources: Mapping[int, str]) -> str:
    return " | ".join(dict.fromkeys(sources[row] for row in range(look.first, look.last + 1) if row in sources))[:300]


class Doctor:
    """Follows a run by its lines in metrics.jsonl, of which `lines` are those that stand there; tells each finding once."""

    def __init__(self, config: TrainConfig, steps: int, vocab_size: int, lines: Iterable[Mapping[str, Any]]) -> None:
        self.config, self.steps, self.ignorance = config, steps, math.log(vocab_size)
        self.curve: list[tuple[int, float, float]] = []  # step, loss, gradient norm
        self.best = math.inf, 0  # the lowest median of LONG losses, and the step of the last of them
        self.said: dict[str, int] = {}  # what was found, and when last
        for line in lines:
            if line["kind"] == "train" and line["loss"] is not None and line["grad_norm"] is not None:
                self._extend(line["step"], line["loss"], line["grad_norm"])
            elif line["kind"] == "doctor":
                self.said[line["about"]] = line["step"]

    def _extend(self, step: int, loss: float, grad_norm: float) -> None:
        self.curve.append((step, loss, grad_norm))
        if len(self.curve) % LONG == 0:
            self.best = min(self.best, (statistics.median(loss for _, loss, _ in self.curve[-LONG:]), step))

    def spiked(self, step: int, spike: Spike) -> list[Finding]:
        """An update that was made although a number stood out."""
        if step - self.said.get("spike", -AGAIN) < AGAIN:
            return []
        now = factor(self.config.schedule, step, self.steps)
        early = step <= 2 * updates(self.config.schedule.warmup, self.steps)
        longer = math.ceil(max(2 * updates(self.config.schedule.warmup, self.steps), 0.05 * self.steps))
        lower = f"optim.lr={self.config.optim.lr / 2:.2g} ({_by('optim.lr')})"
        if "spike" in self.said:
            cause, advice = "the learning rate is too high: it is not the first", lower
        elif early:
            cause, advice = "the warm-up is too short", f"schedule.warmup={longer} (steps; {_by('schedule.warmup')})"
        else:
            cause, advice = (
                "a document of garbage",
                f"numbers.spikes=bad numbers.on_bad=skip; if it comes again {lower}",
            )
        text = f"{spike}, lr {self.config.optim.lr * now:.2g} ({now:.0%} of its peak)\nlikely: {cause}\nset: {advice}"
        return self._told(step, "spike", text)

    def trained(self, step: int, loss: float, grad_norm: float) -> list[Finding]:
        """What the training lines up to this one say."""
        self._extend(step, loss, grad_norm)
        if len(self.curve) < LONG or step <= updates(self.config.schedule.warmup, self.steps):
            return []
        losses, norms = ([line[i] for line in self.curve[-LONG:]] for i in (1, 2))
        lr, now = self.config.optim.lr, statistics.median(losses)
        if max(norms) < DEAD:
            std = (
                ""
                if self.config.model.init_std == 0.02
                else f"model.init_std=0.02 (it is {self.config.model.init_std}), "
            )
            text = f"the gradient norm is {max(norms):.2g}\nlikely: " + (
                "nothing is learned: the loss is 0, since no token is a target\n"
                "set: look at what is learned (python -m gpt.look data), and mend `chat` or `prompt` in the recipe"
                if now == 0
                else f"dead gradients: the weights began too small or have grown too large\n"
                f"set: {std}optim.lr={lr / 3:.2g} (another run: --fresh)"
            )
            return self._told(step, "dead", text)
        began = self.curve[0][0]
        stuck = abs(now - self.ignorance) < NO_BETTER * self.ignorance
        if (
            stuck
            and step - began >= TEACHING_STEPS
            and self.config.init_from is None
            and not self.config.objective.of_pairs
        ):
            text = (
                f"the loss stays at ln(V) = {self.ignorance:.2f}: nothing is learned (gradient norm "
                f"{statistics.median(norms):.2g})\nlikely: the learning rate is far too "
            )
            high = statistics.median(norms) > 1
            text += (
                f"high: weights were thrown where nothing can be learned\nset: optim.lr={lr / 10:.2g} ({_by('optim.lr')})"
                if high
                else f"low\nset: optim.lr={lr * 10:.2g} ({_by('optim.lr')})"
            )
            return self._told(step, "plateau", text)
        return self._diverging(step, now)

    def _diverging(self, step: int, now: float) -> list[Finding]:
        """Whether the loss has risen far above its best, both as medians of some lines."""
        (best, at), first = self.best, self.curve[0][1]
        from_start = len(self.curve) == LONG and now > first + 0.5
        if not from_start and now <= RISEN * best:
            return []
        what = (
            f"the loss rose from {first:.4g} to {now:.4g}, from the start on"
            if from_start
            else f"the loss rose from {best:.4g} at step {at} to {now:.4g}"
        )
        text = f"{what}: the run diverges\nlikely: the learning rate is too high\n"
        text += f"set: optim.lr={self.config.optim.lr / 3:.2g} ({_by('optim.lr')})"
        return self._told(step, "diverging", text)

    def evaluated(self, step: int, scores: Mapping[int, float], epochs: float) -> list[Finding]:
        """What the evaluations up to this step say, after `epochs` of the data."""
        steps = sorted(each for each in scores if each <= step)
        last = steps[-WORSE_EVALS - 1 :]
        if len(last) <= WORSE_EVALS or any(scores[b] <= scores[a] for a, b in pairwise(last)):
            return []
        best = min(steps, key=scores.__getitem__)
        spans = [(last[0] - (last[1] - last[0]), last[0]), (last[-2], last[-1])]
        earlier, lately = ([loss for at, loss, _ in self.curve if low < at <= high] for low, high in spans)
        if not earlier or not lately or statistics.median(lately) >= statistics.median(earlier):
            return []
        repeated = epochs > REPEATS
        dropout = min(0.5, self.config.model.dropout + 0.1)
        why = f"the data was read {epochs:.1f} times, past {REPEATS} it teaches little" if repeated else "overfitting"
        text = (
            f"validation rose {WORSE_EVALS} times in a row, to {scores[last[-1]]:.4f} from {scores[best]:.4f} at step {best}, "
            f"while the training loss fell\nlikely: {why}; the checkpoint of step {best} is kept if there is one\n"
            f"set: train.patience={WORSE_EVALS} (it stops by itself; --allow train.patience), model.dropout={dropout:.1f} "
            f"({_by('model.dropout')}){', or add text' if repeated else ''}"
        )
        return self._told(step, "overfitting", text)

    def _told(self, step: int, about: str, text: str) -> list[Finding]:
        """Once a run; of spikes it was asked before."""
        if about in self.said and about != "spike":
            return []
        self.said[about] = step
        return [Finding(about, text)]


# The batch, for people


def sources(loader: Loader, step: int) -> dict[int, str]:
    """What stands in each row of the batch of `step`: data set, documents, their sources."""
    found: dict[int, list[str]] = {}
    places = of_batch(loader, step)
    for row in sorted({place.row for place in places}):
        here = [place for place in places if place.row == row]
        found[row] = [f"{here[0].name}: {', '.join(label for _, label in openings(here))}"]
    return {row: " ".join(labels) for row, labels in found.items()}


def as_text(
    finding: Finding, loader: Loader, step: int, tokenizer: Tokenizer, looks: Sequence[Look], labels: Mapping[int, str]
) -> str:
    """A batch as a text file: what was found, then each row with its loss as far as known, its sources and its text."""
    lines = [finding.text, ""]
    for row, ids in enumerate(loader.batch(step).tokens.tolist()):
        look = next((each for each in looks if each.first <= row <= each.last), None)
        loss = "" if look is None else f", loss of rows {look.first}-{look.last}: {look.loss:.6g}"
        lines += [f"=== row {row}{loss}; {labels.get(row, 'padding alone')}", tokenizer.decode(ids), ""]
    return "\n".join(lines)
