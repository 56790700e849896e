"""The working directory of a data set that is being made, hidden beside it: who holds it, what stands in it, when it goes.

lock            held by one command, or by parts together
documents spool duplicates    what the pass found; pass.json says of which files, and is written last
identity.json   what `set` and the chunk records are of
set/            the data set as far as it stands
plan.json       the chunks and what encoding them needs; with it, parts may run
chunk-*.json    which chunks are made
"""

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from gpt import durable, signals
from gpt.config import Settings
from gpt.corpus import File, Source
from gpt.formats import Form
from gpt.scan import Chunk, Split
from gpt.table import Input
from gpt.workers import Job


def name_of(out: Path) -> Path:
    """The working directory of the data set `out`."""
    return out.with_name(f".{out.name}.preparing")


@contextmanager
def held(out: Path) -> Iterator[Path]:
    """Where `out` is made, held by this command alone; it goes when `out` stands, or there is nothing to continue from."""
    work, keep = name_of(out), False
    with durable.Lock(work / "lock", str(out)):
        durable.sweep(work)
        try:
            yield work
        except (signals.Stopped, OSError, MemoryError, ValueError) as error:
            scanned = (work / "pass.json").exists() and not isinstance(error, ValueError)
            keep = scanned or any(work.glob("input-*/hub-*.jsonl"))  # what was streamed need not be asked for again
            raise
        finally:
            if not keep and not (work / "set" / "tokenizer.json").exists():
                _tidy(work, out)


def _tidy(work: Path, out: Path) -> None:
    """Delete the working directory and, if the new one stands, an old data set that a crash left hidden. Lock held.

    The directory is moved away first: one that is half deleted would let another command lock a new file in it.
    """
    doomed = [f".{glob.escape(work.name)}.tmp-*", *([f".{glob.escape(out.name)}.tmp-*"] if out.exists() else [])]
    for path in (path for pattern in doomed for path in out.parent.glob(pattern)):
        with suppress(FileNotFoundError):  # another command, which has just moved it away, is deleting it too
            durable.fs.rmtree(path)
    with suppress(FileNotFoundError):
        durable.remove_directory(work)


@dataclass(frozen=True)
class Plan:
    """A corpus that was scanned: what encoding it needs, and what its data set will say of itself."""

    job: Job
    identity: dict[str, Any]  # what determines the data set's bytes: no path, no place, no worker count
    settings: dict[str, Any]  # as they were given, so that parts of something else are refused
    sources: list[str]
    n_documents: int  # that are not left out
    n_bytes: int
    notes: list[str]
    skipped: list[str]
    n_skipped: int

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

    def check(self, settings: Settings, version: int, out: Path) -> None:
        """ValueError unless the plan is that of these settings and of this version of what they mean."""
        if self.settings != given(settings) or self.identity["version"] != version:
            raise ValueError(
                f"{out} was scanned with other settings or another version; run this command with --scan first"
            )


def _plain(value: object) -> object:
    return value.model_dump(mode="json", exclude_none=True) if isinstance(value, Settings) else str(value)


def _file(values: dict[str, Any]) -> File:
    form, source = Form(*values["form"]), Source(**values["source"])
    return File(Path(values["path"]), values["label"], form, values["explicit"], source)


def given(settings: Settings) -> dict[str, Any]:
    """Settings as a plan stores them: what changes no byte of a part is left out."""
    return json.loads(settings.model_dump_json(exclude={"workers"}))


def resume(work: Path, identity: dict[str, Any]) -> bool:
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
