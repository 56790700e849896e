"""Any text to a data set: one pass over the corpus, a tokenizer, then shards, in parallel, in parts, resumable.

The bytes of a data set depend on the text, the tokenizer and the settings alone. The pass fixes all that looks at the
whole corpus; after it each chunk is encoded on its own, by any process of any machine, in any order, into one shard a
split. Finished chunks stand in a working directory beside the output until all are there; then it takes its name.
"""

import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from rich.console import Console

from gpt import config, corpus, durable, growth, scan, signals, workers
from gpt import tokenizer as tokenizers
from gpt.census import Report, census, say, show
from gpt.config import Count, Settings
from gpt.corpus import File, Source
from gpt.formats import Form
from gpt.scan import SPLITS, Chunk, Input, Scan, Split
from gpt.shards import ShardEntry, TokenSet, token_dtype, write_manifest
from gpt.tokenizer import Kind, Tokenizer
from gpt.workers import Job, Meter

VERSION = 2  # of what the settings mean for the bytes; raise it when that changes
MEASURED_BYTES = 1 << 18  # of the sample, for the sizes of what is to come
COUNTABLE_BYTES = 1 << 31  # of a sample: the trainer counts pairs in 32 bits


def _as_sources(value: object) -> object:
    """One input or a list of them; a bare string is a path, or a URL with an optional #sha256=..."""
    if not isinstance(value, (list, tuple)):
        value = (value,)
    if not value:
        raise ValueError("it names nothing to read")
    return tuple(as_source(each) if isinstance(each, str) else each for each in value)


def as_source(text: str) -> dict[str, str | None]:
    """The input that a bare string means: a URL, perhaps with #sha256=..., or a path."""
    if text.startswith(("http://", "https://")):
        url, _, sha256 = text.partition("#sha256=")
        return {"url": url, "sha256": sha256 or None}
    return {"path": text}


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class PrepareConfig(Settings):
    """A recipe: what to read, how to split it, which tokenizer."""

    input: Sources = Field(description="what to read: paths, globs, '-', URLs, or sections with path, url or python")
    validation: Sources | None = Field(
        None, description="inputs that are the validation split; null: it is cut from `input`"
    )
    split: Literal["auto", "hash", "tail"] = Field(
        "auto",
        description="hash: whole documents, by their content; tail: the end of each; auto: tail below 20 documents",
    )
    val_fraction: float = Field(0.1, gt=0, lt=1, description="part of the bytes that is held out for validation")
    val_tokens: Count = Field(
        10_000_000, ge=1, description="most tokens held out (as the tokenizer's sample predicts them)"
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="documents with the text of an earlier one; they are counted either way"
    )
    kind: Kind = Field(
        "bpe",
        description="vocabulary of byte pairs, of single characters, of words, or of the integers of `ids` inputs",
    )
    vocab_size: Count | None = Field(
        None,
        ge=1,
        description="entries, control tokens included; null: the square root of the corpus's bytes, rounded to a power of "
        "two, from 512 to 65536 (characters: all of them)",
    )
    tokenizer: str | None = Field(
        None, description="a tokenizer.json, or a data set, checkpoint or run whose tokenizer to use"
    )
    grow: Count | None = Field(
        None,
        ge=1,
        description="how many tokens to learn on this text beside those of `tokenizer`, which keep their ids",
    )
    add_tokens: str | None = Field(
        None, description="a file of tokens, one a line, to add to those of `tokenizer`, which keep their ids"
    )
    sample_bytes: Count = Field(100_000_000, ge=1, description="bytes of training text that the tokenizer learns from")
    seed: int = Field(1337, description="which text is drawn for that sample")
    on_bad_record: Literal["error", "skip"] = Field(
        "error", description="what to do with text that is not UTF-8 or broken JSON"
    )
    workers: int | None = Field(None, ge=1, description="processes; null: one a core")

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Self:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("vocab_size is the tokenizer's own when tokenizer names one; leave one of them out")
        if self.tokenizer is None and (self.grow is not None or self.add_tokens is not None):
            raise ValueError("grow and add_tokens add to an existing vocabulary: name it with tokenizer")
        if self.grow is not None and self.add_tokens is not None:
            raise ValueError(
                "grow and add_tokens are two ways to add to a vocabulary: use one, then the other on its data set"
            )
        if self.kind == "ids" and self.vocab_size is None and self.tokenizer is None:
            raise ValueError("kind ids needs vocab_size: how many ids there are, 0 to vocab_size - 1")
        if self.kind == "bpe" and self.vocab_size is not None and self.vocab_size < tokenizers.MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {self.vocab_size} is below {tokenizers.MIN_VOCAB_SIZE}: the 256 bytes and the control tokens"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str]) -> PrepareConfig:
    """Read a recipe; ConfigError or FileNotFoundError in words."""
    return config.load(PrepareConfig, path, overrides)


# The commands


def prepare(settings: PrepareConfig, out: Path, *, console: Console, overwrite: bool = False) -> Report:
    """Make the data set `out`, or leave it alone if it is up to date.

    Raises ValueError, FileNotFoundError and OSError in words, and signals.Stopped; what is finished by then is kept and
    used by the next call. Another data set there is an error unless `overwrite`, and stands until the new one is whole.
    """
    with _working_directory(out) as work:
        plan = _scan(settings, out, work, console, overwrite)
        if plan is None:
            say(console, f"{out} is up to date: the same text and settings")
            return census(out)
        _encode(plan, range(len(plan.job.chunks)), settings.workers, console)
        return _publish(plan, out, console)


def scan_only(settings: PrepareConfig, out: Path, *, console: Console, overwrite: bool = False) -> int:
    """Do all that looks at the whole corpus, so that `make_part` may run anywhere; return the number of chunks."""
    with _working_directory(out) as work:
        plan = _scan(settings, out, work, console, overwrite)
    if plan is None:
        say(console, f"{out} is up to date: the same text and settings")
        return 0
    n = len(plan.job.chunks)
    say(console, f"{n} chunks: encode them with --part 1/N .. --part N/N (N up to {n}), anywhere; then --merge")
    return n


def make_part(settings: PrepareConfig, out: Path, part: int, n_parts: int, *, console: Console) -> None:
    """Encode every `n_parts`-th chunk of a scanned corpus, from the `part`-th on, counted from 1."""
    if not 1 <= part <= n_parts:
        raise ValueError(f"--part {part}/{n_parts}: expected I/N with I from 1 to N")
    with (
        _working_directory(out, shared=True) as work,
        durable.Lock(work / f"part-{part}-of-{n_parts}.lock", f"part {part}"),
    ):
        plan = Plan.load(work, out)
        plan.check(settings, out)
        _encode(plan, range(part - 1, len(plan.job.chunks), n_parts), settings.workers, console)
    say(console, f"part {part} of {n_parts} is done; when all are: --merge")


def merge(settings: PrepareConfig, out: Path, *, console: Console) -> Report:
    """Publish the data set whose parts are all there: a manifest and a rename, nothing is copied."""
    with _working_directory(out) as work:
        plan = Plan.load(work, out)
        plan.check(settings, out)
        return _publish(plan, out, console)


@contextmanager
def _working_directory(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Where `out` is made, held by this command alone, or `shared` with others of its kind; it goes when `out` stands."""
    work = out.with_name(f".{out.name}.preparing")
    with durable.Lock(work / "lock", str(out), shared=shared):
        if not shared:
            durable.sweep(work)
        try:
            yield work
        finally:
            if not shared and not (work / "set" / "tokenizer.json").exists():  # published, or nothing to continue from
                _tidy(work, out)


def _tidy(work: Path, out: Path) -> None:
    """Delete the working directory and, if the new one stands, an old data set that a crash left hidden. Lock held."""
    hidden = out.parent.glob(f".{glob.escape(out.name)}.tmp-*") if out.exists() else ()
    for path in (work, *hidden):
        durable.fs.rmtree(path)


# The plan: what the pass over the corpus settles


@dataclass(frozen=True)
class Plan:
    """A corpus that was scanned: what encoding it needs, and what its data set will say of itself."""

    job: Job
    identity: dict[str, Any]  # what determines the data set's bytes: no path, no place, no worker count
    settings: dict[str, Any]  # as they were given, so that parts of something else are refused
    sources: list[str]
    n_documents: int  # kept
    n_bytes: int
    notes: list[str]
    skipped: list[str]

    def save(self) -> None:
        """Write the plan; the rest of the working directory stands."""
        values = asdict(self)
        del values["job"]["work"]  # where it stands may be called something else on another machine
        durable.write_file(self.job.work / "plan.json", json.dumps(values, default=_plain).encode())

    @classmethod
    def load(cls, work: Path, out: Path) -> Self:
        """The plan that --scan left."""
        try:
            values = json.loads((work / "plan.json").read_bytes())
        except FileNotFoundError:
            raise FileNotFoundError(f"{out}: nothing is scanned yet; run the same command with --scan first") from None
        job = values["job"]
        inputs = tuple(Input(_file(each["file"]), each["source"], each["given"]) for each in job["inputs"])
        chunks = tuple(Chunk(**each) for each in job["chunks"])
        return cls(**values | {"job": Job(work, inputs, Split(**job["split"]), job["skip_bad"], chunks)})

    def check(self, settings: PrepareConfig, out: Path) -> None:
        """ValueError unless the plan is that of these settings."""
        if self.settings != _given(settings):
            raise ValueError(f"{out} was scanned with other settings; run this command with --scan first")


def _plain(value: object) -> object:
    return value.model_dump(mode="json", exclude_none=True) if isinstance(value, Settings) else str(value)


def _file(values: dict[str, Any]) -> File:
    form, source = Form(*values["form"]), Source(**values["source"])
    return File(Path(values["path"]), values["label"], form, values["explicit"], source)


def _given(settings: PrepareConfig) -> dict[str, Any]:
    return json.loads(settings.model_dump_json(exclude={"workers"}))


def _scan(settings: PrepareConfig, out: Path, work: Path, console: Console, overwrite: bool) -> Plan | None:
    """The plan of the corpus, its tokenizer made; None if `out` is up to date."""
    inputs, names = _inputs(settings, out, work, console)
    imported = Tokenizer.load(Path(settings.tokenizer)) if settings.tokenizer is not None else None
    with Meter(console, "reading", sum(item.file.size for item in inputs)) as meter:
        found = scan.scan(
            inputs,
            work,
            sample_bytes=settings.sample_bytes if imported is None or settings.grow else MEASURED_BYTES,
            seed=settings.seed,
            skip_bad=settings.on_bad_record == "skip",
            drop_duplicates=settings.duplicates == "drop",
            check=_check_ids(settings) if settings.kind == "ids" else None,
            advance=meter.advance,
        )
    _check_scan(settings, found)
    identity = _identity(settings, found, names, imported)
    if out.exists() and _is_up_to_date(out, identity, overwrite):
        return None
    if _resume(work, identity):
        say(console, f"continuing with what is finished in {work}")
    split = _split_with_tokenizer(settings, found, imported, work / "set", console)
    job = Job(work, tuple(inputs), split, settings.on_bad_record == "skip", tuple(found.chunks))
    n_documents = found.n_documents - (found.n_duplicates if settings.duplicates == "drop" else 0)
    notes = _notes(settings, found)
    plan = Plan(job, identity, _given(settings), names, n_documents, found.n_bytes, notes, found.skipped)
    plan.save()
    return plan


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


def _check_scan(settings: PrepareConfig, found: Scan) -> None:
    """ValueError unless there is text on both sides of the split."""
    if not found.n_bytes or found.highest < 0:
        skipped = f"; {len(found.skipped)} bad records were skipped, first {found.skipped[0]}" if found.skipped else ""
        left_out = "".join(f"; {n} documents were {why}" for why, n in sorted(found.left_out.items()) if why != "empty")
        raise ValueError(f"the corpus is empty: the input has no text{skipped}{left_out}")
    if settings.validation is not None:
        if not found.has_validation:
            raise ValueError("the validation split has no document: the validation inputs have no text")
    elif _split(settings, found).mode == "hash" and found.lowest == found.highest:
        raise ValueError("split by hash leaves a split without a document: all documents are the same; set split=tail")


def _check_ids(settings: PrepareConfig) -> Callable[[str, str], None]:
    """A check of (text, where) for what is no id of the stated vocabulary."""
    n = settings.vocab_size or sys.maxsize

    def check(text: str, where: str) -> None:
        for word in text.split():
            if not word.isdecimal() or int(word) >= n:
                raise ValueError(f"{where}: {word[:40]!r} is no id of a vocabulary of {n}: expected 0 to {n - 1}")

    return check


def _split(settings: PrepareConfig, found: Scan, bytes_per_token: float | None = None) -> Split:
    """Where the held-out text lies. At most val_tokens of it, once `bytes_per_token` is known."""
    asked = settings.split if settings.validation is None else "given"
    most = None if bytes_per_token is None else settings.val_tokens * bytes_per_token
    return scan.choose_split(found, asked=asked, fraction=settings.val_fraction, most_bytes=most)


def _identity(settings: PrepareConfig, found: Scan, names: list[str], imported: Tokenizer | None) -> dict[str, Any]:
    """What determines the data set's bytes."""
    plain = settings.model_dump(exclude={"input", "validation", "tokenizer", "add_tokens", "on_bad_record", "workers"})
    added = None if settings.add_tokens is None else durable.sha256_file(Path(settings.add_tokens))
    return {
        **plain,
        "version": VERSION,
        "sources": names,
        "content": found.content,
        "chunk_bytes": scan.CHUNK_BYTES,
        "validation_given": settings.validation is not None,
        "tokenizer": None if imported is None else imported.sha256,
        "add_tokens": added,
    }


def _notes(settings: PrepareConfig, found: Scan) -> list[str]:
    """What the report says of documents that are not there, or are there twice."""
    notes = [f"{n:,} documents were {why} and left out" for why, n in sorted(found.left_out.items()) if n]
    if found.n_duplicates:
        done = "left out" if settings.duplicates == "drop" else "kept; duplicates=drop leaves them out"
        notes.append(f"{found.n_duplicates:,} documents have the text of an earlier one: {done}")
    return notes


def _is_up_to_date(out: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` is this data set; ValueError for another one unless it may be replaced, and for what is none."""
    if not (out / "manifest.json").is_file():
        raise ValueError(f"{out} exists and is not a data set; name another with --out")
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
    raise ValueError(f"{out} {problem}; add --overwrite to replace it, or name another with --out")


def _resume(work: Path, identity: dict[str, Any]) -> bool:
    """Make the working directory ready for this data set; whether finished parts of it were found there."""
    mark, text = work / "identity.json", json.dumps(identity, sort_keys=True).encode()
    finished = work / "set"
    if mark.exists() and mark.read_bytes() == text and finished.is_dir():
        durable.sweep(finished)
        return True
    for stale in (mark, work / "plan.json", *work.glob("chunk-*.json")):  # the mark first: without it nothing is used
        if stale.exists():
            durable.fs.unlink(stale)
    if finished.exists():
        durable.remove_directory(finished)
    durable.fs.mkdir(finished)
    durable.write_file(mark, text)
    return False


# The tokenizer


def _split_with_tokenizer(
    settings: PrepareConfig, found: Scan, imported: Tokenizer | None, finished: Path, console: Console
) -> Split:
    """The split, whose size in tokens the tokenizer tells, which is stored in the data set."""
    texts = found.sample.texts(_split(settings, found))
    if (finished / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(finished)
    else:
        tokenizer = _tokenizer(settings, found, imported, texts, console)
        files = tokenizer.files()
        if imported is not None and tokenizer is not imported:
            files = {"grown.tsv": "".join(f"{line}\n" for line in growth.table(imported, tokenizer)).encode(), **files}
        for name in sorted(files, key=lambda name: name == "tokenizer.json"):  # last: its presence says that all stand
            durable.write_file(finished / name, files[name])
    signals.check()
    bytes_per_token = _bytes_per_token(tokenizer, texts)
    durable.check_space(finished, int(found.n_bytes / bytes_per_token) * token_dtype(tokenizer.size).itemsize)
    return _split(settings, found, bytes_per_token)


def _tokenizer(
    settings: PrepareConfig, found: Scan, imported: Tokenizer | None, texts: list[str], console: Console
) -> Tokenizer:
    """The vocabulary that the settings ask for, learned from the sample `texts` where there is something to learn."""
    n_bytes = sum(len(text.encode()) for text in texts)
    if n_bytes >= COUNTABLE_BYTES and (imported is None or settings.grow):
        say(console, f"warning: {n_bytes / 1e9:.1f} GB of sample may overflow the counts of pairs; lower sample_bytes")
    if imported is None:
        if settings.kind != "ids":
            say(console, f"training the tokenizer on {n_bytes / 1e6:.1f} MB")
        return tokenizers.train(texts, settings.kind, settings.vocab_size, corpus_bytes=found.n_bytes)
    if settings.grow is not None:
        say(console, f"learning {settings.grow} more tokens on {n_bytes / 1e6:.1f} MB")
        return growth.learn(imported, texts, settings.grow)
    if settings.add_tokens is not None:
        return growth.add(imported, _entries(Path(settings.add_tokens)))
    return imported


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
    n_bytes, n_tokens = 1, 1
    for text in texts:
        if n_bytes > MEASURED_BYTES:
            break
        n_bytes += len(text.encode())
        n_tokens += len(tokenizer.encode(text))
    return n_bytes / n_tokens


# Shards


def _encode(plan: Plan, numbers: Sequence[int], n_workers: int | None, console: Console) -> None:
    tokenizer = Tokenizer.load(plan.job.finished)
    with Meter(console, "encoding", sum(plan.job.chunks[number].n_bytes for number in numbers)) as meter:
        workers.encode(plan.job, numbers, tokenizer, n_workers or _n_cores(), meter)


def _publish(plan: Plan, out: Path, console: Console) -> Report:
    """Write the manifest over the shards of all chunks, and give the data set its name; ValueError if some are missing."""
    job = plan.job
    if missing := job.left(range(len(job.chunks))):
        shown = ", ".join(str(number + 1) for number in missing[:10])
        raise ValueError(
            f"{out}: {len(missing)} of {len(job.chunks)} chunks are not encoded: {shown}; run their --part"
        )
    splits: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for number in range(len(job.chunks)):
        for split, entry in json.loads(job.record(number).read_bytes()).items():
            splits[split].append(ShardEntry(**entry))
    for split, entries in splits.items():
        if not entries:
            raise ValueError(f"split {split} has no document; change val_fraction or split, or add text")
    _check_totals(plan, [entry for entries in splits.values() for entry in entries])
    tokenizer = Tokenizer.load(job.finished)
    write_manifest(
        workers.Folder(job.finished),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.size,
        start_id=tokenizer.start_id,
        splits=splits,
        sources=plan.sources,
        settings=plan.identity,
    )
    durable.publish(job.finished, out)
    report = census(out, notes=plan.notes, skipped=plan.skipped)
    show(report, console)
    return report


def _check_totals(plan: Plan, entries: Sequence[ShardEntry]) -> None:
    """CorruptError unless every document and byte that was read is in a shard; a tail split makes two of a document."""
    n_documents, n_bytes = sum(e.n_documents for e in entries), sum(e.n_bytes for e in entries)
    exact = plan.job.split.mode != "tail"
    if n_bytes != plan.n_bytes or (exact and n_documents != plan.n_documents):
        raise durable.CorruptError(
            f"{plan.job.work}: {plan.n_documents} documents of {plan.n_bytes} bytes were read, "
            f"{n_documents} of {n_bytes} are in the shards; prepare the data set again"
        )


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
