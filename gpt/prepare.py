"""Any text to a data set: one pass over the corpus, a tokenizer, then shards, in parallel, in parts, resumable.

The bytes of a data set depend on the text, the tokenizer and the settings alone. The pass fixes all that looks at the
whole corpus; after it each chunk is encoded on its own, by any process of any machine, in any order, into one shard a
split. Finished chunks stand in a working directory beside the output until all are there; then it takes its name.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt import chat, config, corpus, durable, growth, host, run, scan, signals, workers, workplace
from gpt import tokenizer as tokenizers
from gpt.census import Report, census, say, show
from gpt.encode import Encoder
from gpt.recipe import PrepareConfig
from gpt.scan import SPLITS, Sample, Split, Survey
from gpt.shards import TokenSet, token_dtype, write_manifest
from gpt.table import Changed, Input
from gpt.tokenizer import Tokenizer
from gpt.workers import Job, Meter
from gpt.workplace import Plan, given

VERSION = 2  # of what the settings mean for the bytes; raise it when that changes
MEASURED_BYTES = 1 << 18  # of the sample, for the sizes of what is to come
COUNTABLE_BYTES = 1 << 31  # of a sample: the trainer counts pairs in 32 bits


def load_recipe(path: Path, overrides: Sequence[str]) -> PrepareConfig:
    """Read a recipe; ConfigError or FileNotFoundError in words."""
    return config.load(PrepareConfig, path, overrides)


# The commands


def prepare(settings: PrepareConfig, out: Path, *, console: Console, overwrite: bool = False) -> Report:
    """Make the data set `out`, or leave it alone if it is up to date.

    Raises ValueError, FileNotFoundError and OSError in words, and signals.Stopped; what is finished by then is kept and
    used by the next call. Another data set there is an error unless `overwrite`, and stands until the new one is whole.
    """
    with workplace.held(out) as work:
        planned = _plan(settings, out, work, console, overwrite)
        if planned is None:
            say(console, f"{out} is up to date: the same text and settings")
            return census(out)
        plan, tokenizer = planned
        _encode(plan, range(len(plan.job.chunks)), tokenizer, settings.workers, console)
        return _publish(plan, out, tokenizer, console)


def scan_only(settings: PrepareConfig, out: Path, *, console: Console, overwrite: bool = False) -> int:
    """Do all that looks at the whole corpus, so that `make_part` may run anywhere; return the number of chunks."""
    with workplace.held(out) as work:
        planned = _plan(settings, out, work, console, overwrite)
    if planned is None:
        say(console, f"{out} is up to date: the same text and settings")
        return 0
    n = len(planned[0].job.chunks)
    say(console, f"{n} chunks: encode them with --part 1/N .. --part N/N (N up to {n}), anywhere; then --merge")
    return n


def make_part(settings: PrepareConfig, out: Path, part: int, n_parts: int, *, console: Console) -> None:
    """Encode every `n_parts`-th chunk of a scanned corpus, from the `part`-th on, counted from 1."""
    if not 1 <= part <= n_parts:
        raise ValueError(f"--part {part}/{n_parts}: expected I/N with I from 1 to N")
    work = workplace.name_of(out)
    Plan.load(work, out)  # before a lock file is made where nothing is
    with (
        durable.Lock(work / "lock", str(out), shared=True),
        durable.Lock(work / f"part-{part}-of-{n_parts}.lock", f"part {part} of {n_parts} of {out}"),
    ):
        plan = Plan.load(work, out)
        plan.check(settings, VERSION, out)
        numbers = range(part - 1, len(plan.job.chunks), n_parts)
        _encode(plan, numbers, Tokenizer.load(plan.job.finished), settings.workers, console)
    say(console, f"part {part} of {n_parts} is done; when all are: --merge")


def merge(settings: PrepareConfig, out: Path, *, console: Console) -> Report:
    """Publish the data set whose parts are all there: a manifest and a rename, nothing is copied."""
    Plan.load(workplace.name_of(out), out)
    with workplace.held(out) as work:
        plan = Plan.load(work, out)
        plan.check(settings, VERSION, out)
        return _publish(plan, out, Tokenizer.load(plan.job.finished), console)


# The plan: what the pass over the corpus settles


def _plan(
    settings: PrepareConfig, out: Path, work: Path, console: Console, overwrite: bool
) -> tuple[Plan, Tokenizer] | None:
    """The plan of the corpus, and its tokenizer, which is stored; None if `out` is up to date."""
    inputs, names = _inputs(settings, out, work, console)
    imported = Tokenizer.load(run.vocabulary(settings.tokenizer)) if settings.tokenizer is not None else None
    spoken = {item.kind for item in inputs} & {"chat", "pair"}
    if imported is not None and spoken:
        chat.reply_ends(imported)  # it says in words that there is no template, before the text is read
    identity = _identity(settings, names, imported)
    if spoken:
        template = None if imported is None else imported.chat_template
        identity["spoken"] = [sorted(spoken), template and hashlib.sha256(template.encode()).hexdigest()]
    stands = out.exists() and _stands(out, identity, overwrite)
    seen = _pass(settings, inputs, work, console)
    found = scan.survey(work, drop=settings.duplicates == "drop")
    _check_text(settings, found, seen)
    identity["content"] = found.content
    if stands and _is_up_to_date(out, identity, overwrite):
        return None
    if workplace.resume(work, identity):
        say(console, f"continuing with what is finished in {work}")
    split, tokenizer = _split_with_tokenizer(settings, found, imported, inputs, work, console)
    skip_bad = settings.on_bad_record == "skip"
    plan = Plan(
        Job(work, tuple(inputs), split, skip_bad, tuple(found.chunks)),
        identity,
        given(settings),
        names,
        found.n_documents,
        found.n_bytes,
        _notes(settings, found, seen),
        seen.skipped,
        seen.n_skipped,
    )
    plan.save()
    return plan, tokenizer


def _pass(settings: PrepareConfig, inputs: Sequence[Input], work: Path, console: Console) -> scan.Pass:
    """The pass over the corpus, whose table then stands in `work`; an earlier one, if the files are as they were."""
    mark = work / "pass.json"
    files = [[item.file.label, item.source, item.given, *_state(item.file.path)] for item in inputs]
    read = settings.model_dump(mode="json", include={"input", "validation", "on_bad_record", "kind", "vocab_size"})
    key = json.loads(json.dumps({"version": VERSION, "files": files, "settings": read}))
    if mark.exists():
        stored = json.loads(mark.read_bytes())
        if stored["key"] == key:
            return scan.Pass(**stored["pass"])
    for stale in (work / "plan.json", mark):
        if stale.exists():
            durable.fs.unlink(stale)
    with Meter(console, "reading", sum(item.file.size for item in inputs)) as meter:
        check = _check_ids(settings) if settings.kind == "ids" else None
        skip_bad = settings.on_bad_record == "skip"
        seen = scan.scan(inputs, work, skip_bad=skip_bad, check=check, advance=meter.advance)
    durable.write_file(mark, json.dumps({"key": key, "pass": asdict(seen)}).encode())
    return seen


def _state(path: Path) -> tuple[int, int]:
    """What is different once a file was written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _inputs(settings: PrepareConfig, out: Path, work: Path, console: Console) -> tuple[list[Input], list[str]]:
    """Every file of the recipe in order, and the names of its sources."""
    names: list[str] = []
    inputs: list[Input] = []
    given = [("train" if settings.validation else None, source) for source in settings.input]
    given += [("val", source) for source in settings.validation or ()]
    for number, (split, source) in enumerate(given):
        if source.label not in names:
            names.append(source.label)
        spool = work / f"input-{number}"
        files = corpus.files(source, out.parent / "downloads", spool, partial(say, console))
        inputs += [Input(file, names.index(source.label), split) for file in files]
    return inputs, names


def _check_text(settings: PrepareConfig, found: Survey, seen: scan.Pass) -> None:
    """ValueError unless there is text on both sides of the split."""
    if not found.n_bytes or found.highest < 0:
        skipped = f"; {seen.n_skipped} bad records were skipped, first {seen.skipped[0]}" if seen.n_skipped else ""
        left_out = "".join(f"; {n} documents were {why}" for why, n in sorted(seen.left_out.items()) if why != "empty")
        raise ValueError(f"the corpus is empty: the input has no text{skipped}{left_out}")
    if settings.validation is not None:
        if not found.has_validation:
            why = "all of their documents are in the training inputs too" if found.n_repeated else "they have no text"
            raise ValueError(f"the validation split has no document: the validation inputs are empty: {why}")
    elif _split(settings, found).mode == "hash" and found.lowest == found.highest:
        whole = any(source.whole for source in settings.input)
        instead = "name validation inputs" if whole else "set split=tail"
        raise ValueError(f"split by hash leaves a split without a document: all documents are the same; {instead}")


def _check_ids(settings: PrepareConfig) -> Callable[[str, str], None]:
    """A check of (text, where) for what is no id of the stated vocabulary."""
    n = settings.vocab_size or sys.maxsize

    def check(text: str, where: str) -> None:
        for word in text.split():
            if not word.isdecimal() or str(int(word)) != word or int(word) >= n:
                raise ValueError(f"{where}: {word[:40]!r} is no id of a vocabulary of {n}: expected 0 to {n - 1}")

    return check


def _split(settings: PrepareConfig, found: Survey, bytes_per_token: float | None = None) -> Split:
    """Where the held-out text lies. At most val_tokens of it, once `bytes_per_token` is known."""
    asked = settings.split if settings.validation is None else "given"
    if asked == "auto" and (settings.kind == "ids" or any(source.whole for source in settings.input)):
        asked = "hash"  # what is only partly learned must stay whole, and so must a number
    if asked == "tail" and settings.kind == "ids":
        raise ValueError("split=tail ends each document at a character, which may be amid a number: set split=hash")
    most = None if bytes_per_token is None else settings.val_tokens * bytes_per_token
    return scan.choose_split(found, asked=asked, fraction=settings.val_fraction, most_bytes=most)


def _identity(settings: PrepareConfig, names: list[str], imported: Tokenizer | None) -> dict[str, Any]:
    """What determines the data set's bytes, but for `content`, which the pass tells."""
    plain = settings.model_dump(exclude={"input", "validation", "tokenizer", "add_tokens", "on_bad_record", "workers"})
    entries = None if settings.add_tokens is None else "\n".join(_entries(Path(settings.add_tokens)))
    return {
        **plain,
        "version": VERSION,
        "sources": names,
        "content": None,
        "chunk_bytes": scan.CHUNK_BYTES,
        "validation_given": settings.validation is not None,
        "tokenizer": None if imported is None else imported.sha256,
        "add_tokens": None if entries is None else hashlib.sha256(entries.encode()).hexdigest(),
    }


def _notes(settings: PrepareConfig, found: Survey, seen: scan.Pass) -> list[str]:
    """What the report says of documents that are not there, or are there twice."""
    notes = [f"{n:,} documents were {why} and left out" for why, n in sorted(seen.left_out.items()) if n]
    if found.n_repeated:
        done = "left out" if settings.duplicates == "drop" else "kept; duplicates=drop leaves them out"
        size = f"({found.repeated_bytes:,} bytes)"
        notes.append(f"{found.n_repeated:,} documents have the text of an earlier one {size}: {done}")
    return notes


def _stands(out: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` may turn out to be this data set; ValueError if it is not and must stay, before the text is read."""
    if not (out / "manifest.json").is_file():
        raise ValueError(f"{out} exists and is not a data set; name another with --out")
    try:
        same = json.loads((out / "manifest.json").read_bytes())["settings"] | {"content": None} == identity
    except (ValueError, KeyError, TypeError):
        same = True  # it is damaged, which is told in detail later
    if same or overwrite:
        return True
    raise _other(out, "was made from other text or settings")


def _other(out: Path, problem: str) -> ValueError:
    return ValueError(f"{out} {problem}; add --overwrite to replace it, or name another with --out")


def _is_up_to_date(out: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` is this data set, whole; ValueError for another one unless it may be replaced."""
    try:
        for split in SPLITS:
            tokens = TokenSet(out, split)
            tokens.verify()
        if Tokenizer.load(out).sha256 != tokens.tokenizer_sha256:
            raise ValueError("its tokenizer.json is another one")
        if json.loads((out / "manifest.json").read_bytes())["settings"] == identity:
            return True
        problem = "was made from other text or settings"
    except (ValueError, OSError) as error:
        problem = f"is not whole ({error})"
    if overwrite:
        return False
    raise _other(out, problem)


# The tokenizer


def _split_with_tokenizer(
    settings: PrepareConfig,
    found: Survey,
    imported: Tokenizer | None,
    inputs: Sequence[Input],
    work: Path,
    console: Console,
) -> tuple[Split, Tokenizer]:
    """The split, and the tokenizer, which tells its size in tokens and is stored in the data set."""
    finished = work / "set"
    sample = partial(
        Sample, inputs, work, _split(settings, found), seed=settings.seed, skip_bad=settings.on_bad_record == "skip"
    )
    if (finished / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(finished)
    else:
        tokenizer = _tokenizer(settings, found, imported, sample, console)
        files = tokenizer.files()
        if imported is not None and tokenizer is not imported:
            files = {"grown.tsv": "".join(f"{line}\n" for line in growth.table(imported, tokenizer)).encode(), **files}
        for name in sorted(files, key=lambda name: name == "tokenizer.json"):  # last: its presence says that all stand
            durable.write_file(finished / name, files[name])
    signals.check()
    measured: Iterable[str] = sample(n_bytes=MEASURED_BYTES)
    if settings.kind == "ids":  # a piece of a long text may begin or end amid a number
        measured = (" ".join(piece.split()[1:-1]) for piece in measured)
    bytes_per_token = _bytes_per_token(tokenizer, measured)
    durable.check_space(finished, int(found.n_bytes / bytes_per_token) * token_dtype(tokenizer.size).itemsize)
    return _split(settings, found, bytes_per_token), tokenizer


def _tokenizer(
    settings: PrepareConfig,
    found: Survey,
    imported: Tokenizer | None,
    sample: Callable[..., Sample],
    console: Console,
) -> Tokenizer:
    """The vocabulary that the settings ask for, learned from a sample where there is something to learn."""
    if imported is not None and settings.add_tokens is not None:
        return growth.add(imported, _entries(Path(settings.add_tokens)))
    if imported is not None and settings.grow is None:
        return imported
    if settings.kind == "ids" and imported is None:
        return tokenizers.train((), "ids", settings.vocab_size)
    texts = sample(n_bytes=settings.sample_bytes)
    if texts.n_bytes >= COUNTABLE_BYTES:
        say(
            console,
            f"warning: {texts.n_bytes / 1e9:.1f} GB of sample may overflow the counts of pairs; lower sample_bytes",
        )
    if imported is not None and settings.grow is not None:
        say(console, f"learning {settings.grow} more tokens on {texts.n_bytes / 1e6:.1f} MB")
        return growth.learn(imported, texts, settings.grow)
    say(console, f"training the tokenizer on {texts.n_bytes / 1e6:.1f} MB")
    return tokenizers.train(texts, settings.kind, settings.vocab_size, corpus_bytes=found.n_bytes)


def _entries(path: Path) -> list[str]:
    """The lines of a file of tokens."""
    try:
        entries = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; expected a token a line") from None
    if not (entries := [line for line in entries if line]):
        raise ValueError(f"{path}: no tokens; expected one a line")
    return entries


def _bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Measured on a little of the sample."""
    encoder = Encoder(tokenizer, fast=False)
    n_bytes, n_tokens = 1, 1
    for text in texts:
        if n_bytes > MEASURED_BYTES:
            break
        n_bytes += len(text.encode())
        n_tokens += len(encoder.encode([text])[0])
    return n_bytes / n_tokens


# Shards


def _encode(plan: Plan, numbers: Sequence[int], tokenizer: Tokenizer, n_workers: int | None, console: Console) -> None:
    with Meter(console, "encoding", sum(plan.job.chunks[number].n_bytes for number in numbers)) as meter:
        try:
            workers.encode(plan.job, numbers, tokenizer, n_workers or host.n_cores(), meter)
        except Changed:
            (plan.job.work / "pass.json").unlink(missing_ok=True)  # so that the next command reads everything again
            raise


def _publish(plan: Plan, out: Path, tokenizer: Tokenizer, console: Console) -> Report:
    """Write the manifest over the shards of all chunks, and give the data set its name; ValueError if some are missing."""
    job = plan.job
    if missing := job.left(range(len(job.chunks))):
        shown = ", ".join(str(number + 1) for number in missing[:10]) + (", ..." if len(missing) > 10 else "")
        n_parts = {int(path.stem.rpartition("-")[2]) for path in job.work.glob("part-*.lock")}
        again = " or ".join(
            ", ".join(f"--part {part + 1}/{n}" for part in sorted({number % n for number in missing})) for n in n_parts
        )
        raise ValueError(
            f"{out}: {len(missing)} of {len(job.chunks)} chunks are not encoded: {shown}; run {again or '--part 1/1'}"
        )
    made = [workers.Made.load(job.record(number)) for number in range(len(job.chunks))]
    spoken = _together([one.spoken for one in made])
    splits = {split: [one.entries[split] for one in made if split in one.entries] for split in SPLITS}
    for split, entries in splits.items():
        if not entries:
            refused = f": {spoken.n_refused:,} were refused, first {spoken.refused[0]}" if spoken.n_refused else ""
            raise ValueError(f"split {split} has no document{refused}; change val_fraction or split, or add text")
    if not any(one.n_trained for one in made):
        raise ValueError(
            "every target is masked: nothing in the training split would be learned; its documents have prompts and no "
            "answers, or the tokenizer's chat template marks none"
        )
    totals = _check_totals(plan, made, spoken)
    durable.sweep(job.finished)  # what parts that were killed left
    write_manifest(
        workers.Folder(job.finished),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.size,
        start_id=tokenizer.start_id,
        splits=splits,
        sources=plan.sources,
        settings=plan.identity,
        conversations=spoken.n_conversations > 0,
        pairs=spoken.n_pairs > 0,
    )
    durable.publish(job.finished, out)
    how = ", ".join(sorted({one.how for one in made}))
    notes = [*plan.notes, *_told(spoken), totals, f"encoded by {how}"]
    skipped, n_skipped = [*plan.skipped, *spoken.refused], plan.n_skipped + spoken.n_refused
    report = census(out, tokenizer, notes=notes, skipped=skipped, n_skipped=n_skipped)
    show(report, console)
    return report


def _together(counts: Sequence[workers.Spoken]) -> workers.Spoken:
    """What is counted of conversations in all chunks."""
    total = workers.Spoken()
    for one in counts:
        for name, value in vars(one).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def _told(spoken: workers.Spoken) -> list[str]:
    """A line on the conversations, if there are any."""
    if not spoken.n_conversations:
        return []
    n, per = spoken.n_conversations, spoken.n_turns / spoken.n_conversations
    pairs = f" in {spoken.n_pairs:,} pairs" if spoken.n_pairs else ""
    return [f"conversations: {n:,}{pairs}, {spoken.n_turns:,} turns ({per:.1f} each)"]


def _check_totals(plan: Plan, made: Sequence[workers.Made], spoken: workers.Spoken) -> str:
    """A line that says so, or CorruptError, unless every document, byte and id that went in is in a shard, once. What a
    template refused did not go in, a pair is two documents, and a template has start tokens of its own."""
    entries = [entry for one in made for entry in one.entries.values()]
    n_parts, n_tokens = sum(entry.n_documents for entry in entries), sum(entry.n_tokens for entry in entries)
    n_documents, n_ids = sum(one.n_documents for one in made), sum(one.n_ids for one in made)
    n_starts = n_parts - spoken.n_conversations
    into = {
        "documents": plan.n_documents - spoken.n_refused,
        "bytes": plan.n_bytes - spoken.refused_bytes,
        "tokens": n_ids + n_starts,
    }
    out = {"documents": n_documents, "bytes": sum(entry.n_bytes for entry in entries), "tokens": n_tokens}
    cut = n_parts - spoken.n_pairs - n_documents  # documents of which both splits have a part
    if into != out or cut < 0 or (cut and plan.job.split.mode != "tail"):
        raise durable.CorruptError(
            f"{plan.job.work}: {into} went in and {out} in {n_parts} parts came out; delete it and prepare again"
        )
    same = ", ".join(f"{n:,} {what}" for what, n in into.items())
    if not n_starts:
        return f"in = out: {same}"
    return f"in = out: {same} (with a start token for each of {n_starts:,} documents{' and tails' if cut else ''})"
