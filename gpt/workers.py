"""Chunks to shards, by this process or by several, each resumable on its own; and how far they are.

What a chunk becomes depends on its rows of the table, the tokenizer and the split alone, so any process on any machine
that sees the working directory may make it.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gpt import durable, signals
from gpt.census import say
from gpt.encode import Encoder
from gpt.fields import segments
from gpt.scan import SPLITS, Chunk, Part, Split, parts
from gpt.shards import DOCUMENT, SPAN, SPAN_KINDS, ShardEntry, Span, token_dtype, write_arrays
from gpt.table import Input
from gpt.tokenizer import Tokenizer

BATCH_BYTES = 4 << 20  # text that is encoded at a time
BATCH_DOCUMENTS = 1 << 15  # of it at most


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

    @classmethod
    def load(cls, path: Path) -> Self:
        values = json.loads(path.read_bytes())
        return cls(**values | {"entries": {split: ShardEntry(**entry) for split, entry in values["entries"].items()}})


class _Shard:
    """Documents of one split as they come, as arrays."""

    def __init__(self, start_id: int, dtype: np.dtype) -> None:
        self._start = np.array([start_id], dtype)
        self._ids: list[np.ndarray] = []
        self._index: list[np.ndarray] = []
        self._spans: list[tuple[int, int, int]] = []
        self.n_tokens = self.n_bytes = 0

    def add(
        self,
        encoded: Sequence[np.ndarray],
        n_bytes: Sequence[int],
        sources: Sequence[int],
        spans: Sequence[Sequence[Span]] | None = None,
    ) -> None:
        """Append texts, each with a start token in front of its ids; `spans` are of start token and ids, if any."""
        lengths = np.array([1 + len(ids) for ids in encoded])
        index = np.empty(len(encoded), DOCUMENT)
        index["start"] = self.n_tokens + np.cumsum(lengths) - lengths
        index["n_bytes"], index["source"] = n_bytes, sources
        self._index.append(index)
        for start, some in zip(index["start"].tolist(), spans or (), strict=False):
            self._spans += [(start + span.start, start + span.end, SPAN_KINDS.index(span.kind)) for span in some]
        self._ids.append(np.concatenate([array for ids in encoded for array in (self._start, ids)]))
        self.n_tokens += int(lengths.sum())
        self.n_bytes += sum(n_bytes)

    def write(self, job: Job, name: str, tokenizer: Tokenizer) -> ShardEntry:
        """Write the shard into the data set."""
        arrays = self._ids, np.concatenate(self._index), np.array(self._spans, SPAN), self.n_bytes
        folder = Folder(job.finished)
        return write_arrays(folder, name, *arrays, vocab_size=tokenizer.size, tokenizer_sha256=tokenizer.sha256)


def encode_chunk(job: Job, number: int, tokenizer: Tokenizer, encoder: Encoder, advance: Callable[[int], None]) -> None:
    """Write the shards of a chunk and, when they stand, its record. table.Changed if the text is not what was scanned."""
    shards = {split: _Shard(tokenizer.start_id, token_dtype(tokenizer.size)) for split in SPLITS}
    marked = any(item.prompted for item in job.inputs)
    n_documents = n_ids = 0
    for batch in _batches(parts(job.inputs, job.work, job.chunks[number], job.split, skip_bad=job.skip_bad)):
        splits, texts, n_bytes, sources, begins, prompted = zip(*batch, strict=True)
        encoded, spans = _marked(encoder, texts, prompted) if marked else (encoder.encode(texts), None)
        for split, shard in shards.items():
            if own := [i for i, each in enumerate(splits) if each == split]:
                own_spans = None if spans is None else [spans[i] for i in own]
                shard.add([encoded[i] for i in own], [n_bytes[i] for i in own], [sources[i] for i in own], own_spans)
        n_documents += sum(begins)
        n_ids += sum(map(len, encoded))
        advance(sum(n_bytes))
    filled = {split: shard for split, shard in shards.items() if shard.n_tokens}
    entries = {split: shard.write(job, f"{split}-{number:05d}.tok", tokenizer) for split, shard in filled.items()}
    made = Made(n_documents, n_ids, encoder.how, entries)
    durable.write_file(job.record(number), json.dumps(asdict(made)).encode())


def _marked(
    encoder: Encoder, texts: Sequence[str], prompted: Sequence[bool]
) -> tuple[list[np.ndarray], list[list[Span]]]:
    """The ids of each text, prompts and answers encoded apart, and what of them is learned, start tokens included."""
    parts = [segments(text) if has_prompt else [(text, True)] for text, has_prompt in zip(texts, prompted, strict=True)]
    each = iter(encoder.encode([text for some in parts for text, _ in some]))
    encoded, spans = [], []
    for some in parts:
        ids = [next(each) for _ in some]
        own, end = [Span(0, 1, "train")], 1  # the start token, which says that the document before it is over
        for (_, learned), piece in zip(some, ids, strict=True):
            if not learned:
                own.append(Span(end if end > 1 else 0, end + len(piece), "prefix"))
            elif len(piece):
                own.append(Span(end, end + len(piece), "train"))
            end += len(piece)
        encoded.append(np.concatenate(ids))
        spans.append(sorted(own))
    return encoded, spans


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
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
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
