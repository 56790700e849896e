"""How good a model is: bits per byte and perplexity on any text, multiple choice, exact match; several models side by side.

python -m gpt.evaluate runs/quickstart
python -m gpt.evaluate runs/quickstart runs/tuned --text notes/ --tasks questions.jsonl --json

Bits per byte compare models with any tokenizers. What training evaluates as it goes stands here too. The table or the JSON
goes to stdout, everything else to stderr.
"""

import argparse
import json
import sys

from gpt import signals
from gpt.signals import at_least

SOURCE_HELP = "a run, RUN@STEP|best|last, a checkpoint, a Hugging Face model directory, or hub:ORG/NAME[@REVISION]"


def arguments(argv: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m gpt.evaluate", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    add, count = parser.add_argument, at_least(1)
    add("source", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    text = "text to score, of any kind that can be prepared: files, directories, globs; without it and --tasks a run is"
    add("--text", nargs="+", default=[], metavar="FILE", help=f"{text} scored on its own validation split")
    add("--tasks", nargs="+", default=[], metavar="FILE.jsonl", help="questions: prompt, answer, perhaps choices")
    add("--chat", action="store_true", help="ask each question as a message of the user's")
    stop = (
        "a written answer ends before this text, or one of several; '' for its own end only (a line feed; in a chat '')"
    )
    add("--stop", action="append", metavar="TEXT", help=stop)
    add("--max-tokens", type=count, default=128, metavar="N", help="most tokens of a written answer (128)")
    add("--limit", type=count, metavar="N", help="read the first N documents or questions of each file")
    add("--context", type=count, metavar="N", help="tokens of a window of text (what each model was made for)")
    add("--batch-tokens", type=count, default=8192, metavar="N", help="tokens computed at once (8192)")
    add("--json", action="store_true", help="one JSON object instead of tables")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the fastest here)")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if not args.tasks and (args.chat or args.stop is not None):
        parser.error("--chat and --stop are about questions; name some with --tasks")
    if args.context and not args.text:
        parser.error("--context is about --text; a run's own split is read as in training, and a question as it fits")
    if args.limit and not args.tasks and not args.text:
        parser.error("--limit is about --text and --tasks; a run's own split is read as in training")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    with signals.loading():
        from rich.console import Console

        from gpt import evaluate, host, page, run, runtime, tasks, texts

    notes = Console(stderr=True)

    def say(line: str) -> None:
        notes.print(page.printable(line), markup=False, highlight=False, soft_wrap=True)

    models = [(source, *run.resolve(source)) for source in args.source]
    read = [texts.read(place, args.limit, say) for place in args.text]
    asked = [tasks.read(file, args.limit) for file in args.tasks]
    stops = None if args.stop is None else tuple(filter(None, args.stop))
    how = tasks.Asking(args.batch_tokens, args.chat, stops, args.max_tokens)
    device = args.device or runtime.best_device()[0]
    runtime.check_device(device)
    runtime.setup(device, host.n_cores())
    reports: list[evaluate.Report] = []
    cut: dict[str, list[texts.TextSet]] = {}
    for source, path, described in models:
        say(described)
        reports.append(evaluate.report(source, path, read, asked, how, device=device, context=args.context, cut=cut))
    if args.json:
        sys.stdout.write(json.dumps(evaluate.as_json(reports), allow_nan=False) + "\n")
        return
    console = Console()
    for block in evaluate.blocks(reports):
        page.draw(block, console)


if __name__ == "__main__":
    signals.run(main)  # does not return: --help answers before the rest of this file, which loads torch, is read

import math  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pydantic import Field  # noqa: E402

from gpt import checkpoint, config, hf, page, runtime, tasks, texts  # noqa: E402
from gpt.config import Count, Settings  # noqa: E402
from gpt.data import IGNORED, Batch, Data, DataConfig, evaluated_bytes, evaluated_tokens, open_data, validation_batches  # noqa: E402
from gpt.loss import NextToken, Preferences  # noqa: E402
from gpt.shards import Tokens  # noqa: E402
from gpt.tokenizer import Tokenizer  # noqa: E402
from gpt.views import by_source  # noqa: E402

Work = Callable[[Batch], list[float]]


def one_by_one(batches: Iterable[Batch], work: Work) -> Iterator[list[float]]:
    """What `work` finds of each batch, in order; signals.Stopped between batches when asked to stop."""
    for batch in batches:
        signals.check()
        yield work(batch)


class EvalConfig(Settings):
    """When and on how much the model is evaluated."""

    every: Count = Field(250, ge=1, description="steps between evaluations; the last step is always evaluated")
    tokens: Count | None = Field(
        None,
        ge=1,
        description="validation tokens read, in whole documents, of each source in proportion; null: the whole split",
    )


@dataclass(frozen=True)
class Evaluation:
    """`val_loss`: nats per target token. `val_bpb`: bits per raw UTF-8 byte, comparable across tokenizers.

    `sources`: val_bpb of each source. The overall values are of the sums over all, not means of means.
    """

    val_loss: float
    val_bpb: float
    sources: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What is better the lower it is."""
        return self.val_bpb


def views(data: Data) -> dict[str, Tokens]:
    """The validation split of every source by its name: SOURCE in a single data set, else DATA SET/SOURCE.

    A data set of one source has its own name alone. Sources without validation text are left out.
    """
    found: dict[str, Tokens] = {}
    several = len({str(part.val.path) for part in data.parts}) > 1
    for part in data.parts:
        if not part.val.n_tokens:
            continue
        sources = by_source(part.val)
        for source, tokens in sources.items():
            name = source if not several else part.name if len(sources) == 1 else f"{part.name}/{source}"
            found[name] = tokens
    return found


def limits(parts: Mapping[str, Tokens], max_tokens: int | None) -> dict[str, int | None]:
    """Tokens of each part in an evaluation of about `max_tokens` in all, in proportion, at least one: its document."""
    total = sum(tokens.n_tokens for tokens in parts.values())
    if max_tokens is None or max_tokens >= total:
        return dict.fromkeys(parts)
    return {name: max(1, round(max_tokens * tokens.n_tokens / total)) for name, tokens in parts.items()}


def evaluated(parts: Mapping[str, Tokens], max_tokens: int | None) -> int:
    """Tokens that such an evaluation reads."""
    each = limits(parts, max_tokens)
    return sum(evaluated_tokens(tokens, each[name]) for name, tokens in parts.items())


def learned(parts: Mapping[str, Tokens], max_tokens: int | None) -> int:
    """Tokens that its loss is a mean over: those that a model learns to write."""
    each, n = limits(parts, max_tokens), 0
    for name, tokens in parts.items():
        end = evaluated_tokens(tokens, each[name])
        if not tokens.has_spans:
            n += end
        else:
            n += sum(min(span.end, end) - span.start for span in tokens.spans(0, end) if span.kind == "train")
    return n


@torch.inference_mode()
def evaluate(
    objective: NextToken,
    parts: Mapping[str, Tokens],
    config: EvalConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_rows: int,
    device: str,
    dtype: str,
    document_mask: bool = False,
    prefix: bool = False,
    dealt: Callable[[Iterable[Batch], Work], Iterator[list[float]]] = one_by_one,
) -> Evaluation:
    """Score every target of each part (or of its first documents) once, delimiters included; the mode stays.

    Where only some tokens are learned (`shards.Span`), the bytes are those that the learned ones stand for.
    Raises signals.Stopped between batches when asked to stop. `dealt`: by whom batches are computed.
    """
    each = limits(parts, config.tokens)
    nats, n_targets, n_bytes = dict.fromkeys(parts, 0.0), 0, dict.fromkeys(parts, 0)

    def score(batch: Batch) -> list[float]:
        learned = batch.targets[batch.targets != IGNORED].numpy()
        with runtime.autocast(device, dtype):
            total = float(objective(*(x.to(device) for x in batch.given)))
        return [total, len(learned), int(tokenizer.byte_lengths[learned].sum()) if tokens.has_spans else 0]

    with runtime.evaluating(objective):
        for name, tokens in parts.items():
            batches = validation_batches(tokens, seq_len, batch_rows, each[name], document_mask, prefix)
            for total, n_learned, n_learned_bytes in dealt(batches, score):
                nats[name] += total
                n_targets += int(n_learned)
                n_bytes[name] += int(n_learned_bytes)
            if not tokens.has_spans:
                n_bytes[name] = evaluated_bytes(tokens, each[name])
    overall = sum(nats.values())
    if not math.isfinite(overall):
        raise FloatingPointError(f"the validation loss is {overall}: the weights give numbers that are not finite")
    return Evaluation(
        val_loss=overall / max(1, n_targets),
        val_bpb=_bits(overall, sum(n_bytes.values())),
        sources={name: _bits(nats[name], n_bytes[name]) for name in parts},
    )


@dataclass(frozen=True)
class Preferred:
    """Of pairs: `val_loss` nats a pair, `val_accuracy` the share whose chosen reply has the greater reward, `val_margin` by
    how much on average (`loss.Preferences`)."""

    val_loss: float
    val_accuracy: float
    val_margin: float

    @property
    def score(self) -> float:
        """What is better the lower it is."""
        return self.val_loss


@torch.inference_mode()
def prefer(
    objective: Preferences,
    parts: Mapping[str, Tokens],
    config: EvalConfig,
    *,
    seq_len: int,
    batch_rows: int,
    device: str,
    dtype: str,
    document_mask: bool = True,
    prefix: bool = False,
    dealt: Callable[[Iterable[Batch], Work], Iterator[list[float]]] = one_by_one,
) -> Preferred:
    """Score each pair of the parts (or of their first ones) once; the mode stays.

    Raises signals.Stopped between batches when asked to stop. `dealt`: by whom batches are computed.
    """
    each = limits(parts, config.tokens)
    sums = torch.zeros(4, dtype=torch.float64)  # loss, right ones, margins, pairs

    def score(batch: Batch) -> list[float]:
        with runtime.autocast(device, dtype):
            rewards, there = objective.rewards(*(x.to(device) for x in batch.given))
        margins = (rewards[:, 0] - rewards[:, 1])[there]
        found = (objective.losses(rewards)[there], margins > 0, margins, there)
        return [float(x.cpu().double().sum()) for x in found]  # not every device has fp64

    with runtime.evaluating(objective):
        for name, tokens in parts.items():
            batches = validation_batches(tokens, seq_len, batch_rows, each[name], document_mask, prefix)
            for found in dealt(batches, score):
                sums += torch.tensor(found, dtype=torch.float64)
    if not sums.isfinite().all():
        raise FloatingPointError(f"the validation loss is {sums[0]}: the weights give numbers that are not finite")
    loss, right, margin, n_pairs = sums.tolist()
    if not n_pairs:
        raise ValueError(
            f"each held-out pair has a document longer than data.seq_len ({seq_len}): raise it, or eval.tokens"
        )
    return Preferred(loss / n_pairs, right / n_pairs, margin / n_pairs)


def _bits(nats: float, n_bytes: int) -> float:
    """Bits per byte; documents without a byte count as one."""
    return nats / math.log(2) / max(1, n_bytes)


# What the verb reports


@dataclass(frozen=True)
class Reading:
    """How well a model expects a text: all sums are over every token once, each document's start token included.

    Per byte of UTF-8, per word between white space and per token; the last compares models of one tokenizer only.
    """

    name: str
    bits_per_byte: float
    word_perplexity: float | None  # None where only parts of the text are learned, as in chats
    token_perplexity: float
    n_documents: int
    n_tokens: int
    context: int
    document_mask: bool  # whether a document is read without those before it
    sources: dict[str, float] = field(default_factory=dict)  # bits per byte, where there are several


@dataclass(frozen=True)
class Report:
    """What a source is worth, with the sha256 of its tokenizer."""

    source: str
    path: Path
    tokenizer: str
    texts: list[Reading]
    tasks: dict[str, tasks.Result]


def report(
    source: str,
    path: Path,
    read: Sequence[texts.Text],
    asked: Sequence[tasks.Task],
    how: tasks.Asking,
    *,
    device: str,
    context: int | None,
    cut: dict[str, list[texts.TextSet]],
) -> Report:
    """Load a model and put everything to it; without texts and tasks, its own validation split.

    `cut` keeps the texts as each tokenizer cuts them, for the next model that has it.
    """
    model, tokenizer = hf.load(path)
    objective = NextToken(model.to(device)).eval()
    longest = model.config.max_seq_len
    assert longest is not None
    if context is not None and context > longest:
        raise ValueError(f"--context {context} is more than the {longest} tokens that {source} can read")
    own = _own_settings(path)

    def score(name: str, parts: Mapping[str, Tokens], max_tokens: int | None, words: int | None, n: int) -> Reading:
        mask, rows = own is not None and own[0].document_mask, max(1, how.batch_tokens // n)
        return _reading(
            name, objective, tokenizer, parts, max_tokens, words, n, batch_rows=rows, device=device, document_mask=mask
        )

    readings = []
    if read:
        if tokenizer.sha256 not in cut:
            cut[tokenizer.sha256] = [texts.TextSet(text, tokenizer) for text in read]
        for text, tokens in zip(read, cut[tokenizer.sha256], strict=True):
            readings.append(score(text.name, {text.name: tokens}, None, text.n_words, context or longest))
    elif not asked:
        if own is None:
            raise ValueError(f"{source} has no validation split of its own; name --text or --tasks")
        data, max_tokens = open_data(own[0]), own[1].tokens
        if data.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"{source} was trained with another tokenizer than its data set now has; name --text")
        if any(part.val.pairs for part in data.parts):
            raise ValueError(f"{source} was tuned on preferences, which are no text to expect; name --text or --tasks")
        parts, name = views(data), f"validation split of {', '.join(part.name for part in data.parts)}"
        readings.append(score(name, parts, max_tokens, _words(parts, max_tokens, tokenizer), own[0].seq_len))
    results = {task.name: tasks.ask(model, tokenizer, task, how) for task in asked}
    return Report(source, path, tokenizer.sha256, readings, results)


def _own_settings(path: Path) -> tuple[DataConfig, EvalConfig] | None:
    """What a checkpoint was trained and evaluated on; None for a model that no run here has made."""
    file = path / checkpoint.SETTINGS
    if not file.is_file():
        return None
    source = config.Source()
    source.read_file(file)
    data, eval_ = (json.dumps(source.values.get(section, {})) for section in ("data", "eval"))
    return DataConfig.model_validate_json(data), EvalConfig.model_validate_json(eval_)


def _reading(
    name: str,
    objective: NextToken,
    tokenizer: Tokenizer,
    parts: Mapping[str, Tokens],
    max_tokens: int | None,
    n_words: int | None,
    seq_len: int,
    *,
    batch_rows: int,
    device: str,
    document_mask: bool,
) -> Reading:
    """Score a text, or about `max_tokens` of it, as training scores its validation split, in fp32."""
    result = evaluate(
        objective,
        parts,
        EvalConfig(tokens=max_tokens),
        tokenizer,
        seq_len=seq_len,
        batch_rows=batch_rows,
        device=device,
        dtype="float32",
        document_mask=document_mask,
        prefix=objective.model.config.prefix_lm,
    )
    n_tokens = evaluated(parts, max_tokens)
    each = limits(parts, max_tokens)
    return Reading(
        name=name,
        bits_per_byte=result.val_bpb,
        word_perplexity=_exp(result.val_loss * n_tokens / n_words) if n_words else None,
        token_perplexity=_exp(result.val_loss),
        n_documents=sum(len(_starts(tokens, each[part])) for part, tokens in parts.items()),
        n_tokens=n_tokens,
        context=seq_len,
        document_mask=document_mask,
        sources=result.sources if len(result.sources) > 1 else {},
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _starts(tokens: Tokens, max_tokens: int | None) -> np.ndarray:
    """Where the documents begin that an evaluation of about `max_tokens` reads."""
    return tokens.document_starts[: np.searchsorted(tokens.document_starts, evaluated_tokens(tokens, max_tokens))]


def _words(parts: Mapping[str, Tokens], max_tokens: int | None, tokenizer: Tokenizer) -> int | None:
    """Words of the documents that are read; None where only parts of them are learned."""
    if any(tokens.has_spans for tokens in parts.values()):
        return None
    n_words, each = 0, limits(parts, max_tokens)
    for name, tokens in parts.items():
        starts = _starts(tokens, each[name])
        ends = np.append(starts[1:], evaluated_tokens(tokens, each[name]))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            n_words += len(tokenizer.decode(tokens.read(start, end - start).tolist()).split())
    return n_words


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """What `blocks` shows and the numbers behind it, as plain JSON values; what is not finite is null."""

    def finite(reading: Reading) -> Any:
        return json.loads(json.dumps(asdict(reading)), parse_constant=lambda name: None)

    return {
        "sources": [
            {
                "source": report.source,
                "path": str(report.path),
                "tokenizer": report.tokenizer,
                "texts": [finite(reading) for reading in report.texts],
                "tasks": [
                    {"name": name, "kind": result.kind, "n": result.n, "n_cut": result.n_cut}
                    | {name: {"value": m.value, "stderr": m.stderr} for name, m in result.measures.items()}
                    for name, result in report.tasks.items()
                ],
            }
            for report in reports
        ]
    }


def blocks(reports: Sequence[Report]) -> Iterator[page.Block]:
    """A table with a column for each source, and what keeps its numbers from being compared."""
    names = [report.source for report in reports]
    rows = []
    for each in zip(*(report.texts for report in reports), strict=True):
        cells = {
            "bits per byte": [f"{reading.bits_per_byte:.4f}" for reading in each],
            "perplexity per word": [_cell(reading.word_perplexity) for reading in each],
            "perplexity per token": [_cell(reading.token_perplexity) for reading in each],
        }
        own = len({reading.name for reading in each}) > 1
        rows += [("own validation split" if own else each[0].name, *row) for row in _rows(cells)]
        if len(reports) == 1:
            rows += [(name, "bits per byte", f"{value:.4f}") for name, value in each[0].sources.items()]
    for task in reports[0].tasks:
        results = [report.tasks[task] for report in reports]
        cells = {name: [_measured(result.measures[name]) for result in results] for name in results[0].measures}
        rows += [(f"{task} ({results[0].n})", *row) for row in _rows(cells)]
    yield page.Table(("on", "measure", *names), rows, words=2)
    yield from map(page.Note, _caveats(reports))


def _rows(cells: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, ...]]:
    return ((name, *values) for name, values in cells.items())


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def _measured(measure: tasks.Measure) -> str:
    return f"{measure.value:.4f}" + ("" if measure.stderr is None else f" ± {measure.stderr:.4f}")


def _caveats(reports: Sequence[Report]) -> Iterator[str]:
    """Sentences about what does not compare, and what was not read whole."""
    if any(report.texts for report in reports):
        if len({report.tokenizer for report in reports}) > 1:
            yield "The tokenizers differ: perplexity per token does not compare, the other measures do."
        windows = {report.source: report.texts[0].context for report in reports}
        if len(set(windows.values())) > 1:
            shown = ", ".join(f"{source} {n:,}" for source, n in windows.items())
            yield f"The windows differ (tokens: {shown}): a longer one knows more; --text with --context makes them equal."
        apart = [report.source for report in reports if report.texts[0].document_mask]
        if 0 < len(apart) < len(reports) and any(reading.n_documents > 1 for reading in reports[0].texts):
            yield f"Only {', '.join(apart)} read each document without those before it, as in training (document_mask)."
        if len({(reading.name, reading.n_documents) for report in reports for reading in report.texts[:1]}) > 1:
            yield "Each run was scored on a validation split of its own: these numbers do not compare; --text makes them."
    for report in reports:
        for name, result in report.tasks.items():
            if result.n_cut:
                yield f"{report.source} was shown only the end of {result.n_cut} of {result.n} prompts of {name}."
