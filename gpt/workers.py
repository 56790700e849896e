"""Chunks to shards, by this process or by several, each resumable on its own; and how far they are.

What a chunk becomes depends on its rows of the table, the tokenizer and the split alone, so any process on any machine
that sees the working directory may make it.
"""

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gpt import chat, conversations, durable, signals
from gpt.census import say
from gpt.conversations import Conversation, Pair
from gpt.corpus import SKIPPING
from gpt.encode import Encoder
from gpt.fields import segments
from gpt.formats import BadRecord
from gpt.scan import SPLITS, Chunk, Part, Split, parts
from gpt.shards import DOCUMENT, SPAN, SPAN_KINDS, ShardEntry, Span, token_dtype, write_arrays
from gpt.table import Input
from gpt.tokenizer import Tokenizer

BATCH_BYTES = 4 << 20  # text that is encoded at a time
BATCH_DOCUMENTS = 1 << 15  # of it at most
SHOWN_RECORDS = 10  # conversations that a template refused, of a chunk, whose errors are kept


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
class Job:
    """All that encoding the chunks of a corpus needs; what a worker process is sent once."""

    work: Path
    inputs: tuple[Input, ...]
    split: Split
    skip_bad: bool
    chunks: tuple[Chunk, ...]

    def record(self, number: int) -> Path:
        """Where it is written that the shards of a chunk stand."""
        return self.work / f"chunk-{number:05d}.json"

    @property
    def finished(self) -> Path:
        """The data set as far as it stands."""
        return self.work / "set"

    def left(self, numbers: Iterable[int]) -> list[int]:
        """Those of the chunks that are still to be made."""
        return [number for number in numbers if not self.record(number).exists()]


@dataclass(frozen=True)
class Folder:
    """A directory that shards are written into one by one, each atomically."""

    path: Path

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> str:
        return durable.write_file(self.path / name, chunks)


@dataclass(frozen=True)
class Made:
    """What is written of a finished chunk: what went in, counted on the way, and the shards that came out."""

    n_documents: int
    n_ids: int  # of their text, without start tokens
    how: str  # it was encoded
    entries: dict[str, ShardEntry]
    n_trained: int  # tokens of the training split that are learned
    spoken: "Spoken"

    @classmethod
    def load(cls, path: Path) -> Self:
        values = json.loads(path.read_bytes())
        entries = {split: ShardEntry(**entry) for split, entry in values["entries"].items()}
        return cls(**values | {"entries": entries, "spoken": Spoken(**values["spoken"])})


@dataclass
class Spoken:
    """What is counted of conversations: those in the shards, of pairs both, and those that a template refused."""

    n_conversations: int = 0
    n_pairs: int = 0
    n_turns: int = 0
    n_refused: int = 0
    refused_bytes: int = 0
    refused: list[str] = field(default_factory=list)  # errors of the first of them


class _Document(NamedTuple):
    """A document as it goes into a shard. `spans` are of the start token, if it has one, and the ids."""

    split: str
    ids: np.ndarray
    opened: bool  # by a start token, which is not among the ids
    n_bytes: int
    source: int
    spans: Sequence[Span] = ()


class _Shard:
    """Documents of one split as they come, as arrays."""

    def __init__(self, start_id: int, dtype: np.dtype) -> None:
        self._fronts = np.empty(0, dtype), np.array([start_id], dtype)
        self._ids: list[np.ndarray] = []
        self._index: list[np.ndarray] = []
        self._spans: list[tuple[int, int, int]] = []
        self.n_tokens = self.n_bytes = 0

    def add(self, documents: Sequence[_Document]) -> None:
        """Append documents, and the start tokens in front of them."""
        lengths = np.array([len(document.ids) + document.opened for document in documents])
        index = np.empty(len(documents), DOCUMENT)
        index["start"] = self.n_tokens + np.cumsum(lengths) - lengths
        index["n_bytes"] = [document.n_bytes for document in documents]
        index["source"] = [document.source for document in documents]
        self._index.append(index)
        for start, document in zip(index["start"].tolist(), documents, strict=True):
            self._spans += [(start + s.start, start + s.end, SPAN_KINDS.index(s.kind)) for s in document.spans]
        fronts = self._fronts
        self._ids.append(np.concatenate([part for d in documents for part in (fronts[d.opened], d.ids)]))
        self.n_tokens += int(lengths.sum())
        self.n_bytes += int(index["n_bytes"].sum())

    @property
    def n_trained(self) -> int:
        """How many of the tokens are marked as learned."""
        return sum(end - start for start, end, kind in self._spans if SPAN_KINDS[kind] == "train")

    def write(self, job: Job, name: str, tokenizer: Tokenizer) -> ShardEntry:
        """Write the shard into the data set."""
        arrays = self._ids, np.concatenate(self._index), np.array(self._spans, SPAN), self.n_bytes
        folder = Folder(job.finished)
        return write_arrays(folder, name, *arrays, vocab_size=tokenizer.size, tokenizer_sha256=tokenizer.sha256)


def encode_chunk(job: Job, number: int, tokenizer: Tokenizer, encoder: Encoder, advance: Callable[[int], None]) -> None:
    """Write the shards of a chunk and, when they stand, its record. table.Changed if the text is not what was scanned."""
    shards = {split: _Shard(tokenizer.start_id, token_dtype(tokenizer.size)) for split in SPLITS}
    marked = any(item.kind != "text" for item in job.inputs)
    n_documents = n_ids = 0
    spoken = Spoken()
    for batch in _batches(parts(job.inputs, job.work, job.chunks[number], job.split, skip_bad=job.skip_bad)):
        documents = list(_marked(job, batch, tokenizer, encoder, spoken) if marked else _plain(batch, encoder))
        for split, shard in shards.items():
            if own := [document for document in documents if document.split == split]:
                shard.add(own)
        n_documents += sum(part.begins for part in batch)
        n_ids += sum(len(document.ids) for document in documents)
        advance(sum(part.n_bytes for part in batch))
    filled = {split: shard for split, shard in shards.items() if shard.n_tokens}
    entries = {split: shard.write(job, f"{split}-{number:05d}.tok", tokenizer) for split, shard in filled.items()}
    n_trained = shards["train"].n_trained if marked else shards["train"].n_tokens
    made = Made(n_documents - spoken.n_refused, n_ids, encoder.how, entries, n_trained, spoken)
    durable.write_file(job.record(number), json.dumps(asdict(made)).encode())


def _plain(batch: Sequence[Part], encoder: Encoder) -> Iterator[_Document]:
    """Texts that are learned whole."""
    for part, ids in zip(batch, encoder.encode([part.text for part in batch]), strict=True):
        yield _Document(part.split, ids, True, part.n_bytes, part.source)


def _marked(
    job: Job, batch: Sequence[Part], tokenizer: Tokenizer, encoder: Encoder, spoken: Spoken
) -> Iterator[_Document]:
    """Texts of any kind with what of them is learned, start tokens included; a pair is two documents. Counts in `spoken`.

    BadRecord where a template refuses a conversation, unless such text is skipped.
    """
    pieces = [
        [] if part.kind in ("chat", "pair") else segments(part.text) if part.kind == "prompted" else [(part.text, True)]
        for part in batch
    ]
    each = iter(encoder.encode([text for some in pieces for text, _ in some]))
    for part, some in zip(batch, pieces, strict=True):
        if some:
            ids, spans = _joined([(next(each), learned) for _, learned in some])
            yield _Document(part.split, ids, True, part.n_bytes, part.source, spans)
            continue
        try:
            found = _rendered(conversations.load(part.text), tokenizer)
        except ValueError as error:
            told = f"{_place(job, part)}: {error}"
            if not job.skip_bad:
                raise BadRecord(f"{told}; {SKIPPING}") from None
            spoken.n_refused += 1
            spoken.refused_bytes += part.n_bytes
            spoken.refused += [told][: SHOWN_RECORDS - len(spoken.refused)]
            continue
        spoken.n_conversations += len(found)
        spoken.n_pairs += part.kind == "pair"
        for conversation, encoded, learned_from in found:
            spoken.n_turns += len(conversation.messages)
            ids = np.array(encoded.ids, token_dtype(tokenizer.size))
            n_bytes = conversations.n_bytes(conversation)
            yield _Document(part.split, ids, False, n_bytes, part.source, _spans(encoded.mask, learned_from))


def _joined(parts: Sequence[tuple[np.ndarray, bool]]) -> tuple[np.ndarray, list[Span]]:
    """The ids of prompts and answers, encoded apart, and what of them and a start token before them is learned."""
    spans, end = [Span(0, 1, "train")], 1  # the start token, which says that the document before it is over
    for ids, learned in parts:
        if not learned:
            spans.append(Span(end if end > 1 else 0, end + len(ids), "prefix"))
        elif len(ids):
            spans.append(Span(end, end + len(ids), "train"))
        end += len(ids)
    return np.concatenate([ids for ids, _ in parts]), sorted(spans)


def _rendered(what: Conversation | Pair, tokenizer: Tokenizer) -> list[tuple[Conversation, chat.Encoded, int]]:
    """(conversation, its tokens, where what is learned of them may begin) of a conversation, or of both in a pair.

    Of a pair the last answer alone is learned. ValueError in words for what the tokenizer's template refuses.
    """
    if isinstance(what, Conversation):
        return [(what, chat.encode(tokenizer, what), 0)]
    prompt = chat.encode(tokenizer, what.prompt, reply=True).ids
    both = [(each, chat.encode(tokenizer, each)) for each in (what.chosen, what.rejected)]
    if any(encoded.ids[: len(prompt)] != prompt for _, encoded in both):
        raise ValueError("the chat template writes the prompt of this pair otherwise once an answer follows")
    return [(each, encoded, len(prompt)) for each, encoded in both]


def _spans(mask: Sequence[bool], first: int) -> list[Span]:
    """The runs of a mask from token `first` on, and what stands before them, which a prefix-LM reads both ways."""
    learned = np.array(mask, dtype=bool)
    learned[:first] = False
    edges = np.flatnonzero(np.diff(learned, prepend=False, append=False)).reshape(-1, 2).tolist()
    prompt = [Span(0, edges[0][0], "prefix")] if edges and edges[0][0] else []
    return [*prompt, *(Span(start, end, "train") for start, end in edges)]


def _place(job: Job, part: Part) -> str:
    """Where a document stands, as people look for it."""
    file = job.inputs[part.file].file
    if not file.direct:
        return f"{file.label}: the conversation {part.text[:60]}..."
    with file.path.open("rb") as lines:
        left, line = part.start, 1
        while block := lines.read(min(left, durable.BLOCK)):
            left, line = left - len(block), line + block.count(b"\n")
    return f"{file.label}:{line}"


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Lists of at least BATCH_BYTES of text, or of BATCH_DOCUMENTS, each, except the last."""
    batch: list[Part] = []
    n_bytes = 0
    for part in parts:
        batch.append(part)
        n_bytes += part.n_bytes
        if n_bytes >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


@dataclass
class _Worker:
    """What a worker process keeps: the parent's stop event and its count of bytes done, the job, a warm encoder."""

    stop: Any
    done: Any
    job: Job
    tokenizer: Tokenizer
    encoder: Encoder

    def advance(self, n_bytes: int) -> None:
        if self.stop.is_set():
            raise signals.Stopped("stopped by the parent process")
        with self.done.get_lock():
            self.done.value += n_bytes


_worker: _Worker | None = None


def _begin_worker(stop: Any, done: Any, job: Job) -> None:
    """A worker leaves stopping to its parent, and does not outlive it."""
    global _worker
    signals.ignore()
    signals.end_with(multiprocessing.parent_process())
    tokenizer = Tokenizer.load(job.finished)
    _worker = _Worker(stop, done, job, tokenizer, Encoder(tokenizer))


def _work(number: int) -> None:
    assert _worker is not None
    encode_chunk(_worker.job, number, _worker.tokenizer, _worker.encoder, _worker.advance)


def encode(job: Job, numbers: Sequence[int], tokenizer: Tokenizer, workers: int, meter: Meter) -> None:
    """Make what is left of the chunks `numbers`, divided among `workers` processes."""
    left = job.left(numbers)
    sizes = {number: job.chunks[number].n_bytes for number in numbers}
    meter.advance(sum(sizes.values()) - sum(sizes[number] for number in left))
    if workers > 1 and len(left) > 1:
        _encode_in_processes(job, left, workers, meter)
        return
    encoder = Encoder(tokenizer)
    for number in left:
        encode_chunk(job, number, tokenizer, encoder, meter.advance)


def _encode_in_processes(job: Job, numbers: Sequence[int], workers: int, meter: Meter) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks, not the threads
    stop, done, seen = context.Event(), context.Value("q", 0), 0
    pool = ProcessPoolExecutor(min(workers, len(numbers)), context, _begin_worker, (stop, done, job))
    try:
        # Children inherit the mask, so that no stop request ends one while it still imports.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
        try:
            running: set[Future[None]] = {pool.submit(_work, number) for number in numbers}
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
