"""Any text to a data set: one pass over the corpus, a tokenizer, then shards, in parallel and resumable.

The bytes of a data set depend on the text, the tokenizer and the settings alone. The pass fixes all that looks at the
whole corpus (split, sample, chunks); after it each chunk of the input is encoded on its own, by any process, in any
order, into one shard a split. Finished chunks stand in a working directory beside the output until all are there.
"""

import glob
import hashlib
import heapq
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gpt import config, corpus, durable, signals
from gpt import tokenizer as tokenizers
from gpt.census import SPLITS, Report, census, say, show
from gpt.config import Count, Settings
from gpt.corpus import File, Source
from gpt.shards import Document, ShardEntry, TokenSet, token_dtype, write_manifest, write_shard
from gpt.tokenizer import Kind, Tokenizer

VERSION = 1  # of what the settings mean for the bytes; raise it when that changes
CHUNK_BYTES = 64 << 20
BATCH_BYTES = 4 << 20  # text that is encoded at a time
SAMPLE_CHARACTERS = 1 << 16  # a longer document is drawn in pieces of this length
TAIL_DOCUMENTS = 20  # split: auto takes whole documents from so many on
BUCKETS = 1 << 16  # of document hashes, whose sizes are counted to cut the split at a fraction of the bytes
MEASURED_BYTES = 1 << 18  # of the sample, for the sizes of what is to come

Encode = Callable[[Sequence[str]], list[list[int]]]


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
    kind: Kind = Field("bpe", description="vocabulary of byte pairs, of single characters or of words")
    vocab_size: Count | None = Field(
        None,
        ge=1,
        description="entries, control tokens included; null: the square root of the corpus's bytes, rounded to a power of "
        "two, from 512 to 65536 (characters: all of them)",
    )
    tokenizer: str | None = Field(
        None, description="a tokenizer.json, or a data set, checkpoint or run whose tokenizer to use"
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
        if self.kind == "bpe" and self.vocab_size is not None and self.vocab_size < tokenizers.MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {self.vocab_size} is below {tokenizers.MIN_VOCAB_SIZE}: the 256 bytes and the control tokens"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str]) -> PrepareConfig:
    """Read a recipe; ConfigError or FileNotFoundError in words."""
    return config.load(PrepareConfig, path, overrides)


@dataclass(frozen=True)
class Input:
    """A file of the corpus, the number of its source, and the split that its whole text belongs to, if one is given."""

    file: File
    source: int
    given: str | None


@dataclass(frozen=True)
class Range:
    """Documents of one input: bytes start .. end - 1 of its text."""

    item: Input
    start: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """A part of the corpus that becomes one shard a split; `digest` is over its documents' hashes."""

    ranges: tuple[Range, ...]
    n_bytes: int
    digest: str


class Part(NamedTuple):
    """Text of a document in one split, its UTF-8 bytes, and the number of its source."""

    split: str
    text: str
    n_bytes: int
    source: int


@dataclass(frozen=True)
class Split:
    """Which text is held out. A pure function of the document, so that equal documents fall on the same side."""

    mode: Literal["hash", "tail", "given"]
    fraction: float  # tail: of each document's characters
    threshold: int  # hash: documents whose value is below are held out

    def parts(self, item: Input, document: corpus.Document, digest: bytes) -> Iterator[Part]:
        """The parts of a document that have any text."""
        text, n_bytes = document.text, len(document.utf8)
        if self.mode == "tail":
            cut = self.cut(len(text))
            n_held_out = len(text[cut:].encode())
            if cut:
                yield Part("train", text[:cut], n_bytes - n_held_out, item.source)
            if n_held_out:
                yield Part("val", text[cut:], n_held_out, item.source)
        elif self.mode == "given":
            yield Part(item.given or "train", text, n_bytes, item.source)
        else:
            yield Part("val" if _value(digest) < self.threshold else "train", text, n_bytes, item.source)

    def cut(self, n_characters: int) -> int:
        """Where the held-out tail of a document begins."""
        return int(n_characters * (1 - self.fraction))


def _value(digest: bytes) -> int:
    """A document's place in the hash split: 64 bits of the sha256 of its content."""
    return int.from_bytes(digest[:8], "big")


class Sample:
    """Text for the tokenizer: all of it, or the pieces with the lowest seeded hashes that fit into `n_bytes`."""

    def __init__(self, n_bytes: int, seed: int) -> None:
        self._room, self._key = n_bytes, seed.to_bytes(8, "little", signed=True)
        self._heap: list[tuple[int, int, bytes, int, int, str]] = []  # lowest first: the negated hash of the next to go

    def add(self, document: corpus.Document, digest: bytes, order: int) -> None:
        n = len(document.text)
        for start in range(0, n, SAMPLE_CHARACTERS):
            drawn = hashlib.blake2b(digest + start.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
            text = document.text[start : start + SAMPLE_CHARACTERS]
            heapq.heappush(self._heap, (-int.from_bytes(drawn, "big"), -order, digest, start, n, text))
            self._room -= len(document.utf8) if n == len(text) else len(text.encode())
            while self._room < 0 and len(self._heap) > 1:
                self._room += len(heapq.heappop(self._heap)[-1].encode())

    def texts(self, split: Split) -> list[str]:
        """The training part of what was drawn: a tokenizer that saw the validation text would flatter the model."""
        if split.mode == "hash":
            return [text for *_, digest, _, _, text in self._heap if _value(digest) >= split.threshold]
        if split.mode == "tail":
            return [text[: max(0, split.cut(n) - start)] for *_, start, n, text in self._heap]
        return [text for *_, text in self._heap]


@dataclass
class Scan:
    """What the pass over the corpus found."""

    sample: Sample
    chunks: list[Chunk] = field(default_factory=list)
    n_documents: int = 0
    n_bytes: int = 0
    skipped: list[str] = field(default_factory=list)
    bucket_bytes: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, dtype=np.int64))
    lowest: int = 1 << 64
    highest: int = -1
    content: str = ""  # sha256 over every document's hash, source and given split, in order


def scan(inputs: Sequence[Input], settings: PrepareConfig, meter: "Meter") -> Scan:
    """Read the corpus once: check it, count it, hash it, draw the sample, cut it into chunks."""
    found = Scan(Sample(settings.sample_bytes if settings.tokenizer is None else MEASURED_BYTES, settings.seed))
    content, chunk, n_bytes = hashlib.sha256(), hashlib.sha256(), 0
    ranges: list[Range] = []

    def close() -> None:
        nonlocal chunk, ranges, n_bytes
        found.chunks.append(Chunk(tuple(ranges), n_bytes, chunk.hexdigest()))
        chunk, ranges, n_bytes = hashlib.sha256(), [], 0

    skip = (lambda error: found.skipped.append(str(error))) if settings.on_bad_record == "skip" else None
    for item in inputs:
        for document in corpus.documents(item.file, skip=skip):
            digest = hashlib.sha256(document.utf8).digest()
            content.update(digest + f"{item.source} {item.given}\n".encode())
            chunk.update(digest)
            _count(found, item, document, digest)
            if ranges and ranges[-1].item is item:
                ranges[-1] = Range(item, ranges[-1].start, document.end)
            else:
                ranges.append(Range(item, document.start, document.end))
            n_bytes += len(document.utf8)
            meter.advance(len(document.utf8))
            if n_bytes >= CHUNK_BYTES:
                close()
    if ranges:
        close()
    found.content = content.hexdigest()
    return found


def _count(found: Scan, item: Input, document: corpus.Document, digest: bytes) -> None:
    n_bytes, value = len(document.utf8), _value(digest)
    found.n_documents += 1
    found.n_bytes += n_bytes
    if item.given == "val":
        return
    found.sample.add(document, digest, found.n_documents)
    found.bucket_bytes[value * BUCKETS >> 64] += n_bytes
    found.lowest, found.highest = min(found.lowest, value), max(found.highest, value)


def choose_split(settings: PrepareConfig, found: Scan, bytes_per_token: float | None = None) -> Split:
    """Where the held-out text lies. At most val_tokens of it, once `bytes_per_token` is known."""
    if settings.validation is not None:
        return Split("given", 0.0, 0)
    fraction = settings.val_fraction
    if bytes_per_token is not None:
        fraction = min(fraction, settings.val_tokens * bytes_per_token / found.n_bytes)
    if settings.split == "tail" or (settings.split == "auto" and found.n_documents < TAIL_DOCUMENTS):
        return Split("tail", fraction, 0)
    sums = np.cumsum(found.bucket_bytes)
    bucket = int(np.searchsorted(sums, fraction * found.n_bytes, side="right"))
    threshold = bucket * (1 << 64) // BUCKETS
    return Split("hash", fraction, max(threshold, found.lowest + 1))  # at least the document with the lowest hash


class Meter:
    """Progress of one phase: a bar with MB/s and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, what: str, n_bytes: int) -> None:
        self._console, self._what, self._total, self._done = console, what, n_bytes, 0
        self._is_terminal = console.is_terminal
        self._interval_s = 0.1 if self._is_terminal else 10.0
        self._begun = self._shown = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not self._is_terminal)
        self._task = self._bar.add_task(what, total=n_bytes)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, n_bytes: int) -> None:
        """Count bytes done; raises signals.Stopped if a stop was requested."""
        signals.check()
        self._done += n_bytes
        now = time.monotonic()
        if now - self._shown < self._interval_s:
            return
        self._shown = now
        if self._is_terminal:
            self._bar.update(self._task, completed=self._done)
        else:
            say(self._console, self._line(now))

    def _line(self, now: float) -> str:
        speed = max(1.0, self._done / (now - self._begun))
        left = time.strftime("%H:%M:%S", time.gmtime(max(0, self._total - self._done) / speed))
        done = f"{self._done / 1e6:.0f}/{max(self._total, self._done) / 1e6:.0f} MB"
        return f"{self._what}  {done}  {speed / 1e6:.1f} MB/s  eta {left}"


@dataclass(frozen=True)
class Task:
    """All that encoding one chunk needs; what a worker process is sent."""

    number: int
    chunk: Chunk
    split: Split
    skip_bad: bool
    work: Path

    @property
    def record(self) -> Path:
        """Where it is written that the chunk's shards stand."""
        return self.work / f"chunk-{self.number:05d}.json"

    @property
    def finished(self) -> Path:
        """The data set as far as it stands."""
        return self.work / "set"


@dataclass(frozen=True)
class Folder:
    """A directory that shards are written into one by one, each atomically."""

    path: Path

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> str:
        return durable.write_file(self.path / name, chunks)


def encode_chunk(task: Task, tokenizer: Tokenizer, encode: Encode, advance: Callable[[int], None]) -> None:
    """Write the shards of a chunk and, when they stand, its record. ValueError if the text is not what was scanned."""
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    dtype, start = token_dtype(tokenizer.size), tokenizer.start_id
    for batch in _batches(_parts(task)):
        for part, ids in zip(batch, encode([part.text for part in batch]), strict=True):
            splits[part.split].append(Document(np.array([start, *ids], dtype), part.n_bytes, part.source))
        advance(sum(part.n_bytes for part in batch))
    entries = {}
    for split, documents in splits.items():
        if documents:
            name = f"{split}-{task.number:05d}.tok"
            entries[split] = write_shard(
                Folder(task.finished), name, documents, vocab_size=tokenizer.size, tokenizer_sha256=tokenizer.sha256
            )
    durable.write_file(task.record, json.dumps({split: asdict(entry) for split, entry in entries.items()}).encode())


def _parts(task: Task) -> Iterator[Part]:
    """The text of a chunk, read again."""
    chunk, skip = hashlib.sha256(), (lambda error: None) if task.skip_bad else None
    for part in task.chunk.ranges:
        for document in corpus.documents(part.item.file, part.start, part.end, skip):
            digest = hashlib.sha256(document.utf8).digest()
            chunk.update(digest)
            yield from task.split.parts(part.item, document, digest)
    if chunk.hexdigest() != task.chunk.digest:
        raise ValueError("the input changed while it was prepared; run the same command again")


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Lists of at least BATCH_BYTES of text each, except the last."""
    batch: list[Part] = []
    n_bytes = 0
    for part in parts:
        batch.append(part)
        n_bytes += part.n_bytes
        if n_bytes >= BATCH_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


_stop: Any = None  # in a worker process: the parent's stop event and its count of bytes done
_done: Any = None


def _begin_worker(stop: Any, done: Any) -> None:
    """A worker leaves stopping to its parent, and does not outlive it."""
    global _stop, _done
    _stop, _done = stop, done
    signals.ignore()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(task: Task) -> None:
    def advance(n_bytes: int) -> None:
        if _stop.is_set():
            raise signals.Stopped("stopped by the parent process")
        with _done.get_lock():
            _done.value += n_bytes

    tokenizer = Tokenizer.load(task.finished)
    encode_chunk(task, tokenizer, tokenizer.encode_each, advance)


def _encode_all(tasks: Sequence[Task], tokenizer: Tokenizer, workers: int, meter: Meter) -> None:
    """Encode what is left to do: the chunks divided among processes, or the text of a single one among threads."""
    left = [task for task in tasks if not task.record.exists()]
    meter.advance(sum(task.chunk.n_bytes for task in tasks) - sum(task.chunk.n_bytes for task in left))
    if workers > 1 and len(left) > 1:
        _encode_in_processes(left, workers, meter)
        return
    for task in left:
        encode_chunk(task, tokenizer, tokenizer.encode_batch if workers > 1 else tokenizer.encode_each, meter.advance)


def _encode_in_processes(tasks: Sequence[Task], workers: int, meter: Meter) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, not the threads
    stop, done, seen = context.Event(), context.Value("q", 0), 0
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _begin_worker, (stop, done))
    try:
        # Children inherit the mask, so that no stop request ends one while it still imports.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
        try:
            running: set[Future[None]] = {pool.submit(_work, task) for task in tasks}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)
        while running:
            finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            so_far = done.value
            meter.advance(so_far - seen)
            seen = so_far
    except BrokenProcessPool:
        raise MemoryError("a worker process was killed, most likely for lack of memory; set fewer --workers") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def prepare(settings: PrepareConfig, out: Path, *, console: Console, overwrite: bool = False) -> Report:
    """Make the data set `out`, or leave it alone if it is up to date.

    Raises ValueError, FileNotFoundError and OSError in words, and signals.Stopped; what is finished by then is kept and
    used by the next call. Another data set there is an error unless `overwrite`, and stands until the new one is whole.
    """
    work = out.with_name(f".{out.name}.preparing")
    durable.make_directory(work)
    with durable.Lock(work / "lock", str(out)):
        durable.sweep(work)
        try:
            fresh, skipped = _prepare(settings, out, work, console, overwrite)
        finally:
            if not (work / "set" / "tokenizer.json").exists():  # published, or nothing to continue from
                _tidy(work, out)
    report = census(out, skipped)
    if fresh:
        show(report, console)
    else:
        say(console, f"{out} is up to date: the same text and settings")
    return report


def _prepare(
    settings: PrepareConfig, out: Path, work: Path, console: Console, overwrite: bool
) -> tuple[bool, list[str]]:
    """(whether `out` had to be made, what was skipped)."""
    inputs, names = _inputs(settings, out, work, console)
    imported = Tokenizer.load(Path(settings.tokenizer)) if settings.tokenizer is not None else None
    with Meter(console, "reading", sum(item.file.size for item in inputs)) as meter:
        found = scan(inputs, settings, meter)
    _check_scan(settings, found)
    identity = _identity(settings, found, names, imported)
    if out.exists() and _is_up_to_date(out, identity, overwrite):
        return False, found.skipped
    finished = work / "set"
    if _resume(work, identity):
        say(console, f"continuing with what is finished in {work}")
    tokenizer, split = _tokenizer_and_split(settings, found, imported, finished, console)
    tasks = [Task(i, c, split, settings.on_bad_record == "skip", work) for i, c in enumerate(found.chunks)]
    with Meter(console, "encoding", found.n_bytes) as meter:
        _encode_all(tasks, tokenizer, settings.workers or _n_cores(), meter)
    _write_manifest(finished, tasks, tokenizer, names, identity)
    durable.publish(finished, out)
    return True, found.skipped


def _tidy(work: Path, out: Path) -> None:
    """Delete the working directory and, if the new one stands, an old data set that a crash left hidden. Lock held."""
    hidden = out.parent.glob(f".{glob.escape(out.name)}.tmp-*") if out.exists() else ()
    for path in (work, *hidden):
        durable.fs.rmtree(path)


def _inputs(settings: PrepareConfig, out: Path, work: Path, console: Console) -> tuple[list[Input], list[str]]:
    """Every file of the recipe in order, and the names of its sources."""
    names: list[str] = []
    inputs: list[Input] = []
    given = [("train" if settings.validation else None, source) for source in settings.input]
    given += [("val", source) for source in settings.validation or ()]
    for split, source in given:
        if source.label not in names:
            names.append(source.label)
        spool = work / f"stdin-{len(inputs)}"
        files = corpus.files(source, out.parent / "downloads", spool, partial(say, console))
        inputs += [Input(file, names.index(source.label), split) for file in files]
    return inputs, names


def _check_scan(settings: PrepareConfig, found: Scan) -> None:
    """ValueError unless there is text on both sides of the split."""
    if found.highest < 0:
        skipped = f"; {len(found.skipped)} bad records were skipped, first {found.skipped[0]}" if found.skipped else ""
        raise ValueError(f"the corpus is empty: the input has no text{skipped}")
    if settings.validation is not None:
        if not any(part.item.given == "val" for chunk in found.chunks for part in chunk.ranges):
            raise ValueError("the validation split has no document: the validation inputs have no text")
    elif choose_split(settings, found).mode == "hash" and found.lowest == found.highest:
        raise ValueError("split by hash leaves a split without a document: all documents are the same; set split=tail")


def _identity(settings: PrepareConfig, found: Scan, names: list[str], imported: Tokenizer | None) -> dict[str, Any]:
    """What determines the data set's bytes: no path, no place, no worker count."""
    plain = settings.model_dump(exclude={"input", "validation", "tokenizer", "on_bad_record", "workers"})
    return {
        **plain,
        "version": VERSION,
        "sources": names,
        "content": found.content,
        "chunk_bytes": CHUNK_BYTES,
        "validation_given": settings.validation is not None,
        "tokenizer": None if imported is None else imported.sha256,
    }


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
    plan, text = work / "plan.json", json.dumps(identity, sort_keys=True).encode()
    finished = work / "set"
    if plan.exists() and plan.read_bytes() == text and finished.is_dir():
        durable.sweep(finished)
        return True
    for stale in (plan, *work.glob("chunk-*.json")):  # the plan first: what stands without one is not used
        if stale.exists():
            durable.fs.unlink(stale)
    if finished.exists():
        durable.remove_directory(finished)
    durable.fs.mkdir(finished)
    durable.write_file(plan, text)
    return False


def _tokenizer_and_split(
    settings: PrepareConfig, found: Scan, imported: Tokenizer | None, finished: Path, console: Console
) -> tuple[Tokenizer, Split]:
    """The tokenizer, stored in the data set, and the split, whose size in tokens it tells."""
    split = choose_split(settings, found)
    texts = found.sample.texts(split)
    if imported is not None:
        tokenizer = imported
    elif (finished / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(finished)
    else:
        say(console, f"training the tokenizer on {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB")
        tokenizer = tokenizers.train(texts, settings.kind, settings.vocab_size, corpus_bytes=found.n_bytes)
    for name, data in reversed(tokenizer.files().items()):  # tokenizer.json last: its presence says that both stand
        durable.write_file(finished / name, data)
    signals.check()
    bytes_per_token = _bytes_per_token(tokenizer, texts)
    durable.check_space(finished, int(found.n_bytes / bytes_per_token) * token_dtype(tokenizer.size).itemsize)
    return tokenizer, choose_split(settings, found, bytes_per_token)


def _bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Measured on a little of the sample."""
    n_bytes, n_tokens = 1, 1
    for text in texts:
        if n_bytes > MEASURED_BYTES:
            break
        n_bytes += len(text.encode())
        n_tokens += len(tokenizer.encode(text))
    return n_bytes / n_tokens


def _write_manifest(
    finished: Path, tasks: Sequence[Task], tokenizer: Tokenizer, names: list[str], identity: dict[str, Any]
) -> None:
    splits: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for task in tasks:
        for split, entry in json.loads(task.record.read_bytes()).items():
            splits[split].append(ShardEntry(**entry))
    for split, entries in splits.items():
        if not entries:
            raise ValueError(f"split {split} has no document; change val_fraction or split, or add text")
    write_manifest(
        Folder(finished),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.size,
        start_id=tokenizer.start_id,
        splits=splits,
        sources=names,
        settings=identity,
    )


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
