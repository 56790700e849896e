"""How fast does text become ids, and shards? Ours against `tokenizers`, and tiktoken and gigatoken where installed.

    python benchmarks/tokenization.py [--quick] [--tokenizer PATH] [TEXT ...]     speed, in MB per CPU second
    python benchmarks/tokenization.py --gigabytes N [--dir DIRECTORY]             memory of data/prepare.py on N GB

TEXT is files: .jsonl (their field "text"), .txt and others (a document each). Without any: the Python standard library,
as code, and sentences that are made up here. Every side has the same vocabulary, starts with nothing learned, and is
timed in CPU seconds of all its threads; the sides take turns. Ours and gigatoken encode the whole text, the slower peers
its first part; all must give the same ids. End to end is `data/prepare.py` as a process of its own, its start included,
from a file to shards on disk with one worker, while `tokenizers` only encodes. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that share a core would count its time twice

from gpt import tokenizer as tokenizers  # noqa: E402
from gpt.encode import Encoder  # noqa: E402
from gpt.tokenizer import Tokenizer  # noqa: E402

VOCAB_SIZE = 32_768
LEARNED_BYTES = 8_000_000  # of the text, by the vocabulary
DOCUMENT_WORDS = 500
WITHOUT_GIGATOKEN = "--without-gigatoken"  # what a process of this script is told to become data/prepare.py

Row = dict[str, Any]
Texts = list[str]
Way = Callable[[Texts], list[Any]]


# What is encoded


def sentences(n_bytes: int, seed: int = 0) -> Iterator[str]:
    """Documents of made-up words, no two alike, with as many different words as English has.

    The r-th word comes as often as 1/r up to the ten thousandth, then as r^-1.8, without end (the two regimes of
    Ferrer i Cancho and Sole 2001): 45 thousand words in 3 MB, 1.4 million in 1 GB. Commas, full stops and capitals too.
    """
    rng = np.random.default_rng(seed)
    onsets, ends = ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "th", "st"], ("", "n", "r", "s")
    syllables = [onset + vowel + end for onset in onsets for vowel in "aeiou" for end in ends]
    parts, few = np.array(syllables, dtype=object), 10_000
    before_few = np.log(few) / (np.log(few) + 1 / 0.8)
    made = 0
    while made < n_bytes:
        drawn, further = rng.random(DOCUMENT_WORDS), rng.random(DOCUMENT_WORDS)
        rank = np.where(drawn < before_few, np.exp(further * np.log(few)), few * further ** (-1 / 0.8)).astype(np.int64)
        words = parts[rank % 300]
        for power in range(1, 7):
            higher = rank // 300**power
            words = words + np.where(higher > 0, parts[higher % 300], "") if higher.any() else words
        mark = rng.random(DOCUMENT_WORDS)
        after = np.where(mark < 0.05, ". ", np.where(mark < 0.11, ", ", np.where(mark < 0.12, ".\n\n", " "))).tolist()
        joined = "".join(word + mark for word, mark in zip(words.tolist(), after, strict=True))
        text = ". ".join(map(str.capitalize, joined.strip().split(". "))) + ".\n"
        made += len(text)
        yield text


def standard_library(n_bytes: int) -> Texts:
    found: Texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if n_bytes <= 0:
            break
        if "site-packages" not in path.parts:
            found.append(path.read_bytes().decode("utf-8", errors="ignore"))
            n_bytes -= len(found[-1])
    return found


def documents(path: Path) -> Texts:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [text]
    return [json.loads(line)["text"] for line in text.splitlines() if line]


def size(texts: Sequence[str]) -> float:
    """Megabytes of UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


# The sides


def ours(tokenizer: Tokenizer, fast: bool) -> Way:
    encoder = Encoder(tokenizer, fast=fast)
    batch = 1000

    def encode(texts: Texts) -> list[Any]:
        return [ids for i in range(0, len(texts), batch) for ids in encoder.encode(texts[i : i + batch])]

    return encode


def encode_batch(tokenizer: Tokenizer, fast: bool = False) -> Way:
    backend = tokenizers.Backend.from_str(tokenizer.files()["tokenizer.json"].decode())
    backend.encode_special_tokens = True
    method = backend.encode_batch_fast if fast else backend.encode_batch
    return lambda texts: [encoding.ids for encoding in method(texts, add_special_tokens=False)]


def gigatoken(tokenizer: Tokenizer) -> Way:
    from gigatoken import Tokenizer as Gigatoken

    raw = json.loads(tokenizer.files()["tokenizer.json"]) | {"added_tokens": []}
    backend = Gigatoken.from_json(json.dumps(raw))
    return lambda texts: list(backend.encode_batch(texts, parallel=False))


def tiktoken(tokenizer: Tokenizer) -> Way:
    """The vocabulary's merges are ranks; its three splits in one pattern cut as they do but for white space before
    digits and Han, so ids may differ there: it is here for its speed."""
    from tiktoken import Encoding

    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.size) if i not in tokenizer.control_ids}
    encoding = Encoding("ours", pat_str="|".join(tokenizers.DEEPSEEK_V3), mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def cpu_seconds(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


class Side(NamedTuple):
    """What is timed, in CPU seconds, and the megabytes that it encodes."""

    run: Callable[[], float]
    mb: float


def compare(case: str, mine: Side, peer_name: str, peer: Side, repeats: int) -> Row:
    """Medians of MB per CPU second, the sides taking turns."""
    taken = [(mine.mb / mine.run(), peer.mb / peer.run()) for _ in range(repeats)]
    ours, theirs = (statistics.median(column) for column in zip(*taken, strict=True))
    row = {"case": case, "ours": ours, "peer": theirs, "peer_name": peer_name, "unit": "MB/cpu-s"}
    return row | {"ratio": ours / theirs, "limit_share": None}


def head(texts: Texts, n_bytes: int) -> Texts:
    """The first texts, so many bytes of them at least."""
    found: Texts = []
    for text in texts:
        if n_bytes <= 0:
            break
        found.append(text)
        n_bytes -= len(text.encode())
    return found


def check(texts: Texts, tokenizer: Tokenizer, ways: Sequence[Way]) -> None:
    few = texts[:200]
    want = tokenizer.encode_each(few)
    for way in ways:
        if [list(map(int, ids)) for ids in way(few)] != want:
            raise SystemExit("ids differ")


# Shards


def prepare_command(text: Path, tokenizer: Path, out: Path, fast: bool, workers: int | None) -> list[str]:
    program = [str(ROOT / "data" / "prepare.py")] if fast else [__file__, WITHOUT_GIGATOKEN]
    return [
        *(sys.executable, *program, str(text), "--out", str(out), "--tokenizer", str(tokenizer)),
        *([] if workers is None else ["--workers", str(workers)]),
    ]


def prepare(command: list[str]) -> float:
    """CPU seconds of a preparation, its workers' included."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return used.ru_utime + used.ru_stime


def write(texts: Iterator[str] | Texts, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def speed(name: str, texts: Texts, tokenizer: Tokenizer, n_peer: int, repeats: int, directory: Path) -> list[Row]:
    few = head(texts, n_peer)
    rows: list[Row] = []
    peers: list[tuple[str, Callable[[], Way]]] = [
        ("tokenizers encode_batch", lambda: encode_batch(tokenizer)),
        ("tokenizers encode_batch_fast", lambda: encode_batch(tokenizer, fast=True)),
    ]
    peers += [("tiktoken encode_ordinary", lambda: tiktoken(tokenizer))] * installed("tiktoken")
    has_gigatoken = installed("gigatoken")
    check(texts, tokenizer, [ours(tokenizer, False), ours(tokenizer, True), encode_batch(tokenizer)])

    def timed(make: Callable[[], Way], texts: Texts) -> Side:
        def run() -> float:
            way = make()
            return cpu_seconds(lambda: way(texts))

        return Side(run, size(texts))

    for peer_name, make in peers:
        mine = timed(lambda: ours(tokenizer, False), texts)
        rows.append(compare(f"{name}, ids, word cache", mine, peer_name, timed(make, few), repeats))
    if has_gigatoken:
        mine = timed(lambda: ours(tokenizer, True), texts)
        rows.append(compare(f"{name}, ids, gigatoken", mine, peers[0][0], timed(peers[0][1], few), repeats))
        raw = timed(lambda: gigatoken(tokenizer), texts)
        row = compare(f"{name}, ids, gigatoken", mine, "gigatoken encode_batch", raw, repeats)
        rows.append(row | {"limit_share": row["ratio"]})
    file, made = directory / f"{name}.jsonl", directory / "tokenizer"
    write(texts, file)
    made.mkdir(exist_ok=True)
    for part, data in tokenizer.files().items():
        (made / part).write_bytes(data)
    for fast in (False, True)[: 1 + has_gigatoken]:

        def end_to_end(fast: bool = fast) -> float:
            with tempfile.TemporaryDirectory(dir=directory) as out:
                return prepare(prepare_command(file, made, Path(out) / "set", fast, 1))

        case = f"{name}, text to shards, {'gigatoken' if fast else 'word cache'}"
        mine = Side(end_to_end, size(texts))
        rows.append(compare(case, mine, peers[0][0], timed(peers[0][1], few), repeats))
    return rows


# Memory


def tree(pid: int) -> Iterator[int]:
    """A process and all that it began."""
    yield pid
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from tree(int(child))
    except OSError:
        return


def held(pid: int) -> float:
    """MB that it holds, pages it shares divided among those that share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3
    except (OSError, ValueError):
        return 0.0


def memory(gigabytes: float, directory: Path, workers: int | None, fast: bool) -> list[Row]:
    """The most memory that the preparation of so much distinct text takes, of all processes together and of one."""
    file, made = directory / "sentences.jsonl", directory / "tokenizer"
    write(sentences(int(gigabytes * 1e9)), file)
    made.mkdir(exist_ok=True)
    learned = list(sentences(LEARNED_BYTES, seed=1))
    for name, data in tokenizers.train(learned, "bpe", VOCAB_SIZE).files().items():
        (made / name).write_bytes(data)
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB", flush=True)
    begun, most = time.monotonic(), 0.0
    command = prepare_command(file, made, directory / "set", fast, workers)
    process = subprocess.Popen(command)
    while not (ended := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
        most = max(most, sum(held(pid) for pid in set(tree(process.pid))))
        time.sleep(0.5)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode} ({ended})")
    cpu, wall, mb = used.ru_utime + used.ru_stime, time.monotonic() - begun, file.stat().st_size / 1e6
    largest = used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(f"{cpu:.0f} CPU seconds, {mb / cpu:.1f} MB/cpu-s, {wall:.0f} s; the largest process held {largest:.0f} MB")
    case = f"peak memory of all processes, {gigabytes:g} GB, {'gigatoken if installed' if fast else 'word cache'}"
    row: Row = {"case": case, "ours": most, "peer": 1500.0, "peer_name": "the bound set", "unit": "MB"}
    return [row | {"ratio": 1500.0 / most if most else None, "limit_share": most / 1500.0}]


def become_prepare(argv: list[str]) -> None:
    """data/prepare.py as it is in an installation without the extra [fast]."""
    sys.modules["gigatoken"] = None  # type: ignore[assignment]
    sys.argv = [str(ROOT / "data" / "prepare.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", type=Path, metavar="TEXT")
    parser.add_argument("--quick", action="store_true", help="less text, once")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; one is learned from the text otherwise")
    parser.add_argument("--gigabytes", type=float, metavar="N", help="measure memory on N GB of distinct text")
    parser.add_argument("--dir", type=Path, help="where to write; a temporary directory by default")
    parser.add_argument("--workers", type=int, help="with --gigabytes; as data/prepare.py chooses by default")
    parser.add_argument("--word-cache", action="store_true", help="with --gigabytes; as without gigatoken")
    args = parser.parse_args()
    n_bytes, n_peer, repeats = (20_000_000, 2_000_000, 1) if args.quick else (200_000_000, 20_000_000, 3)
    rows: list[Row] = []
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        if args.gigabytes:
            rows = memory(args.gigabytes, Path(temporary), args.workers, not args.word_cache)
        else:
            corpora = {path.stem: documents(path) for path in args.text}
            corpora = corpora or {"code": standard_library(n_bytes), "sentences": list(sentences(n_bytes))}
            for name, texts in corpora.items():
                learned = [text[:LEARNED_BYTES] for text in head(texts, LEARNED_BYTES)]
                n_entries = 4096 if args.quick else VOCAB_SIZE  # or as many as the text supports
                tokenizer = (
                    Tokenizer.load(args.tokenizer)
                    if args.tokenizer
                    else tokenizers.train(learned, "bpe", None, corpus_bytes=n_entries**2)
                )
                print(f"{name}: {size(texts):.1f} MB in {len(texts)} documents", flush=True)
                rows += speed(name, texts, tokenizer, n_peer, repeats, Path(temporary))
    if hasattr(os, "getloadavg"):
        print("load", *(f"{load:.1f}" for load in os.getloadavg()))
    for row in rows:
        print(
            f"{row['case']:44} {row['ours']:8.1f} {row['unit']}   {row['peer_name']:30} {row['peer']:8.1f}   {row['ratio']:6.1f} x"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == [WITHOUT_GIGATOKEN]:
        become_prepare(sys.argv[2:])
    else:
        main()
