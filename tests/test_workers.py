"""Chunks become shards alike in any process and any order, and what stands is not made again."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from gpt import corpus, scan, signals, tokenizer, workers
from gpt.scan import Split
from gpt.table import Input
from gpt.tokenizer import Tokenizer
from gpt.workers import Job, Made

TEXTS = [f"document {i} of many, {'word ' * (i % 7)}" for i in range(80)]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A scanned corpus in several chunks, its tokenizer beside them."""
    monkeypatch.setattr(scan, "CHUNK_BYTES", 500)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    files = corpus.files(corpus.Source(path=str(tmp_path / "a.jsonl")), tmp_path, tmp_path, print)
    inputs, work = tuple(Input(file, 0, None) for file in files), tmp_path / "work"
    (work / "set").mkdir(parents=True)
    scan.scan(inputs, work, skip_bad=False, check=None, advance=lambda n: None)
    found = scan.survey(work, drop=False)
    for name, data in tokenizer.train(TEXTS, "bpe", 280).files().items():
        (work / "set" / name).write_bytes(data)
    return Job(work, inputs, Split("hash", 0.1, 1 << 61), False, tuple(found.chunks))


def encode(job: Job, numbers: list[int], n_workers: int = 1) -> int:
    """Bytes that the meter was told of."""
    with workers.Meter(Console(file=io.StringIO()), "encoding", 1) as meter:
        workers.encode(job, numbers, Tokenizer.load(job.finished), n_workers, meter)
        return meter._done


def made(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*job.work.glob("chunk-*"), *job.finished.glob("*.tok")]}


def test_processes_in_any_order_write_the_bytes_of_one(job: Job) -> None:
    n = len(job.chunks)
    assert n > 4
    assert encode(job, list(range(n))) == sum(len(text) for text in TEXTS)
    alone = made(job)
    for name in alone:
        (job.work / name if name.startswith("chunk") else job.finished / name).unlink()
    assert encode(job, list(reversed(range(n))), n_workers=2) == sum(len(text) for text in TEXTS)
    assert made(job) == alone
    records = [Made.load(job.record(i)) for i in range(n)]
    entries = [entry for made in records for entry in made.entries.values()]
    assert sum(made.n_documents for made in records) == sum(entry.n_documents for entry in entries) == len(TEXTS)
    n_ids = sum(len(Tokenizer.load(job.finished).encode(text)) for text in TEXTS)
    assert sum(made.n_ids for made in records) == sum(entry.n_tokens for entry in entries) - len(TEXTS) == n_ids
    assert len({made.how for made in records}) == 1


def test_what_stands_is_not_made_again(job: Job) -> None:
    encode(job, [1, 3])
    before = {path: path.stat().st_mtime_ns for path in job.finished.glob("*-0000[13].tok")}
    assert job.left(range(5)) == [0, 2, 4]
    encode(job, list(range(len(job.chunks))))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert job.left(range(len(job.chunks))) == []


def test_what_one_process_cannot_read_is_told_by_all(job: Job) -> None:
    path = job.inputs[0].file.path
    path.write_bytes(path.read_bytes().replace(b"document 70", b"changed! 70"))
    for n_workers in (1, 2):
        with pytest.raises(ValueError, match=r"a\.jsonl: the text changed while it was prepared"):
            encode(job, list(range(len(job.chunks))), n_workers)


def test_a_stop_request_ends_the_processes_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_requested", "SIGTERM")
    with pytest.raises(signals.Stopped):
        encode(job, list(range(len(job.chunks))), n_workers=2)


def test_progress_is_a_bar_on_a_terminal_and_lines_with_speed_and_time_left_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(workers.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=80)
    with workers.Meter(console, "reading", 200_000_000) as meter:
        for _ in range(3):
            meter.advance(55_000_000)
    assert console.file.getvalue() == "reading  110/200 MB  10.0 MB/s  eta 00:00:09\n"  # type: ignore[attr-defined]
    monkeypatch.undo()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with workers.Meter(console, "reading", 10) as meter:
        meter.advance(5)
    assert "reading" in console.file.getvalue() and "━" in console.file.getvalue()  # type: ignore[attr-defined]
