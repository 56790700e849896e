"""Damaged files by the thousand: each ends soon, in bounded memory, in an error of the expected kind or a right load.

python tests/fuzz.py tokenizer 300        the first 300 mutants of a kind
python tests/fuzz.py tokenizer 1 --at 17  mutant 17 alone, in this process, with its traceback

A mutant depends on its kind and number only. They are opened in a child process, so that one that ends the process
(a segmentation fault, SIGBUS, no memory) or never ends is seen and named, and the rest go on behind it.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import limits
import numpy as np
from proving import Row

ROOT = Path(__file__).resolve().parent.parent
CPU_S, WALL_S, MEMORY = 10, 60, 1 << 30  # for one mutant; of the wall clock more, for a machine that others use too
TEXT = "the river runs to the sea; 床前明月光 123 def f(x): return {'café': 🐙}\n"
Make = Callable[[random.Random, bytes], bytes]


class Kind(NamedTuple):
    """Files of one kind: `prepare` writes them below a directory and names those to damage, each with how; `load` opens
    them and says what was learned; `sealed`: a hash covers every byte, so that what loads is what was written."""

    prepare: Callable[[Path], dict[Path, Make]]
    load: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    sealed: bool


# Damage


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """Bits flipped, bytes cut off, removed, repeated, inserted, swapped, overwritten; numbers that lie."""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(min(len(data), rng.choice([256, len(data)])) + 1) if data else 0
        end = min(len(data), at + rng.choice([1, 1, 4, 8, 32, len(data)]))
        part = bytes(data[at:end])
        other = rng.randrange(len(data) + 1)
        match rng.randrange(9):
            case 0:
                for _ in range(rng.choice([1, 1, 3])):
                    if data:
                        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at:end]
            case 3:
                data[at:end] = part * rng.choice([2, 3, 50])
            case 4:
                data[at:at] = rng.randbytes(rng.choice([1, 3, 8]))
            case 5:
                data[at:end], data[other : other + len(part)] = data[other : other + len(part)], part
            case 6:
                data[at:end] = rng.choice([rng.randbytes(len(part)), bytes(len(part)), b"\xff" * len(part)])
            case 7:  # a length, a count or an offset
                size = rng.choice([1, 2, 4, 8])
                lie = rng.choice([0, 1, 255, len(data), 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
                data[at : at + size] = (lie % (1 << 8 * size)).to_bytes(size, rng.choice(["little", "little", "big"]))
            case 8:
                data[at:at] = data[other : other + rng.choice([1, 8, 64])]
    return bytes(data)


WILD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 255, 1 << 16, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 64, 10**30, -(1 << 40)),
    *(0.0, -0.5, 1.5, 1e308, -1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "a",
        "0",
        "..",
        "../x",
        "/etc/passwd",
        "\0",
        "\ud800",
        "ö",
        "🐙",
        "x" * 5000,
        "<|endoftext|>",
        "{{ 7 * 7 }}",
    ),
    *([], {}, [[]], [{}], {"a": 1}, {"": None}, [1, 2, 3], ["a", "b"]),
]


def _places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside, but only the first of long lists and tables."""
    found = [] if found is None else found
    keys = (
        list(value)[:40] if isinstance(value, dict) else range(min(len(value), 40)) if isinstance(value, list) else ()
    )
    for key in keys:
        found.append((value, key))
        _places(value[key], found)
    return found


def restructured(wild: list[Any]) -> Make:
    """A JSON text with values replaced, removed, moved, nested, repeated or given twice."""

    def make(rng: random.Random, whole: bytes) -> bytes:
        tree = json.loads(whole)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            places = _places(tree)
            if not places:
                break
            owner, key = rng.choice(places)
            match rng.randrange(8):
                case 0 | 1 | 2:
                    owner[key] = deepcopy(rng.choice(wild))
                case 3:
                    del owner[key]
                case 4:
                    other, place = rng.choice(places)
                    owner[key] = json.loads(json.dumps(other[place])) if _still(other, place) else None
                case 5:
                    for _ in range(rng.choice([1, 3, 150])):
                        owner[key] = rng.choice([{"a": owner[key]}, [owner[key]]])
                case 6:
                    owner[key] = [owner[key]] * rng.choice([0, 2, 100])
                case 7:
                    if isinstance(owner, dict):
                        owner[rng.choice([*owner, "type", "x", ""])] = deepcopy(rng.choice(wild))
        text = json.dumps(tree)
        if rng.random() < 0.1 and '": ' in text:  # a key that stands twice
            at = text.rfind('"', 0, text.find('": ', rng.randrange(len(text))))
            text = text[:at] + '"format": 7, "type": "x", ' + text[at:]
        return text.encode("utf-8", "surrogatepass")

    return make


def _still(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else key < len(owner)


def either(*makes: Make) -> Make:
    return lambda rng, whole: rng.choice(makes)(rng, whole)


YAML_WILD = [
    *(
        "*a",
        "&a",
        "!!python/object/apply:os.system [x]",
        "!!python/name:os.system",
        "<<: *a",
        "? [1]",
        "- x",
        "- - - - x",
    ),
    *(
        "3e4",
        "no",
        "012",
        "12:30",
        "~",
        "'",
        '"',
        "{a: {b: {c: 1}}}",
        "[1, 2",
        "{",
        "|",
        ">",
        "%YAML 1.1",
        "---",
        "...",
    ),
    *(
        ".inf",
        "-1",
        "1e999",
        "9" * 400,
        "\t",
        "\x00",
        "\u2028",
        "\ud800",
        "0x10",
        "1_000",
        "10B",
        "0.5M",
        "3m",
        "null",
        "x: y: z",
    ),
    *('"\\ud800"', '"\\x00"', "[" * 500, "{a: " * 200),
]


def rewritten(rng: random.Random, whole: bytes) -> bytes:
    """YAML with lines repeated, moved, indented, and values that mean something elsewhere."""
    lines = whole.decode().split("\n")
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(7):
            case 0:
                lines.insert(at, lines[other])
            case 1:
                lines[at], lines[other] = lines[other], lines[at]
            case 2:
                lines[at] = " " * rng.choice([1, 2, 7]) + lines[at]
            case 3:
                lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(YAML_WILD)
            case 4:
                lines.insert(at, rng.choice(YAML_WILD))
            case 5:
                spots = [i for i, mark in enumerate(lines[at]) if mark in ":{},[] "]
                if spots:
                    spot = rng.choice(spots)
                    lines[at] = lines[at][:spot] + rng.choice([*YAML_WILD, "", ":", ": "]) + lines[at][spot + 1 :]
            case 6:
                del lines[at]
                lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# Kinds


def _data_set(path: Path) -> Path:
    from gpt import durable, shards

    rng, seal = random.Random(1), {"vocab_size": 500, "tokenizer_sha256": "a" * 64}
    with durable.Directory(path / "set") as directory:
        made = []
        for _ in range(5):
            ids = [0, *(rng.randrange(1, 500) for _ in range(7))]
            marks = (shards.Span(0, 2, "train"), shards.Span(2, 3, "prefix"))
            made.append(shards.Document(ids, rng.randrange(200), rng.randrange(3), marks))
        entry = shards.write_shard(directory, "train-00000.tok", made, **seal)
        splits = {"train": [entry], "val": []}
        shards.write_manifest(directory, **seal, start_id=0, splits=splits, sources=["a", "b", "c"], settings={"x": 1})
    return path / "set"


def _index(rng: random.Random, whole: bytes) -> bytes:
    """A shard whose document index and spans alone are damaged."""
    from gpt.shards import DOCUMENT, HEADER, SPAN

    header = np.frombuffer(whole, HEADER, 1)[0]
    low = HEADER.itemsize + int(header["n_tokens"]) * int(header["token_bytes"])
    high = low + int(header["n_documents"]) * DOCUMENT.itemsize + int(header["n_spans"]) * SPAN.itemsize
    return whole[:low] + damaged(rng, whole[low:high]) + whole[high:]


def _sealed_again(rng: random.Random, whole: bytes) -> bytes:
    """A manifest with other values and a right checksum, as only someone who means it writes one."""
    from gpt.shards import _manifest_checksum

    made = restructured(WILD)(rng, whole)
    try:
        tree = json.loads(made)
        tree["checksum"] = _manifest_checksum(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return made
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _read_data_set(path: Path) -> Any:
    from gpt.shards import TokenSet

    found = TokenSet(path / "set", "train")
    arrays = (found.read(0, found.n_tokens), found.document_starts, found.document_bytes, found.document_sources)
    numbers = (found.n_tokens, found.n_documents, found.n_bytes, found.vocab_size, found.start_id)
    return [numbers, found.sources, found.spans(0, found.n_tokens), [array.tolist() for array in arrays]]


def _checkpoint(path: Path) -> Path:
    import torch

    from gpt import checkpoint

    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in {"embed": (7, 4), "norm": (4,)}.items()}
    checkpoint.save(
        path / "step",
        model_files={"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"},
        weights=weights,
        optimizer={f"{name}:exp_avg": tensor for name, tensor in weights.items()},
        run_yaml="name: x\n",
        state={"step": 1},
    )
    return path / "step"


def _read_checkpoint(path: Path) -> Any:
    from teams import load_weights

    from gpt import checkpoint

    step = path / "step"
    checkpoint.verify(step)
    loaded = (load_weights(step), checkpoint.load_optimizer(step))
    return [checkpoint.load_state(step), [{k: (str(v.dtype), v.tolist()) for k, v in each.items()} for each in loaded]]


def _read_tensors(path: Path) -> Any:
    """A file of tensors that no manifest covers: both readers of it."""
    from teams import load_weights

    from gpt import tensors

    file = path / "step" / "model.safetensors"
    failures: list[Exception] = []
    for read in (lambda: load_weights(path / "step"), lambda: dict(tensors.read(tensors.stored(file)))):
        try:
            read()
        except ValueError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return None


def _config(path: Path) -> Path:
    (path / "run.yaml").write_text(
        "name: x\nseed: 1337\ndata: {path: data/small, seq_len: 32}\nmodel:\n  n_layer: 2\n  d_model: 32\n  n_head: 2\n"
        "train: {steps: 10B, time: null, batch_tokens: 16_384}\noptim:\n  kind: adamw\n  lr: 3e-4\n  betas: [0.9, 0.95]\n"
        "schedule: {kind: wsd, warmup: 0.02, decay: 0.6}\neval: {every: 10}\ncheckpoint: {every: 100, keep: 2}\n"
        "log: {every: 10, sample_every: 200, wandb: null}\n"
    )
    return path / "run.yaml"


def _read_config(path: Path) -> Any:
    from gpt import config
    from gpt.trainer import TrainConfig

    found = config.load(TrainConfig, path / "run.yaml", defaults={"name": "run"})
    (path / "again.yaml").write_text(config.dump(found), encoding="utf-8")
    assert config.load(TrainConfig, path / "again.yaml") == found, "what is written out is not what was read"
    return None


TOKENIZER_WILD: list[Any] = [
    *WILD,
    *({"Regex": text} for text in ("(a+)+$", "(", "(?<n>x)\\k<n>", ".*.*.*x", "", "\\p{L}+", "a{99999}", "[", "(?~x)")),
    *({"String": text} for text in ("", " ", "x" * 9999)),
    *(
        {"type": name}
        for name in ("Replace", "Split", "Precompiled", "Metaspace", "ByteLevel", "Strip", "CTC", "BPE", "NFKC")
    ),
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16},
    {"type": "FixedLength", "length": 0},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
    {"type": "Strip", "content": "a", "start": 1 << 40, "stop": 0},
    {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": True},
    {"type": "Digits", "individual_digits": True},
    {
        "id": 3,
        "content": "the",
        "special": True,
        "lstrip": True,
        "rstrip": True,
        "normalized": True,
        "single_word": True,
    },
    {"id": 1 << 31, "content": "far", "special": False},
    *("a b", "Isolated", "Contiguous", "MergedWithNext", "always", "Left"),
]


def tokenizer_files() -> list[dict[str, Any]]:
    """The content of a tokenizer.json of every kind of model."""
    from gpt import tokenizer

    ours = [dict(tokenizer.train([TEXT * 3], kind, None).raw) for kind in ("bpe", "word")]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = ["[UNK]", "▁the", "▁", *"abcdefghijklmnopqrstuvwxyz", "##a", "##e", "th"]
    added = [{"id": len(words), "content": "<s>", **special}]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [[word, -float(i)] for i, word in enumerate(words)]}
    pieces = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {word: i for i, word in enumerate(words)},
    }
    common = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}
    steps = [
        {"type": "NFKC"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Lowercase"},
    ]
    lower = {"type": "Sequence", "normalizers": steps}
    bert = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    return [
        *ours,
        {
            **common,
            "normalizer": lower,
            "pre_tokenizer": space,
            "decoder": space,
            "model": unigram | {"byte_fallback": False},
        },
        {
            **common,
            "normalizer": bert,
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": pieces,
        },
    ]


def _tokenizer(path: Path) -> list[Path]:
    files = []
    for number, raw in enumerate(tokenizer_files()):
        (path / str(number)).mkdir()
        files.append(path / str(number) / "tokenizer.json")
        files[-1].write_text(json.dumps(raw))
        start = "<s>" if any(token["content"] == "<s>" for token in raw["added_tokens"]) else "<|endoftext|>"
        (path / str(number) / "tokenizer_config.json").write_text(json.dumps({"bos_token": start, "eos_token": start}))
    return files


def _read_tokenizers(path: Path) -> Any:
    """The one that is damaged, or all, where none is."""
    from gpt.tokenizer import Tokenizer

    texts = [TEXT, "", "a" * 3000, " " * 3000, "<s><|endoftext|>", "\0\n\n  \t x🐙\u0301" * 50]
    every = sorted(path.iterdir())
    for directory in [each for each in every if (each / ".changed").exists()] or every:
        loaded = Tokenizer.load(directory)
        for text in texts:
            ids = loaded.encode(text)
            assert all(0 <= token < loaded.size for token in ids), "an id outside the vocabulary"
            assert not set(ids) & loaded.control_ids - {loaded.unknown_id}, "a control token came from text"
            loaded.decode(ids)
            stream = loaded.stream()
            _ = [stream.push(token) for token in ids[:20]], stream.flush()
        assert len(loaded.byte_lengths) == loaded.size
    return None


def _ranks(path: Path) -> dict[Path, Make]:
    """Vocabularies in other forms: ranks of byte strings, a SentencePiece model, a pair of files."""
    import base64
    import struct

    letters = [bytes([i]) for i in range(256)]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate([*letters, b"th", b"the", b"in"])]
    (path / "a.tiktoken").write_bytes(b"\n".join(lines) + b"\n")

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return (
                bytes([number << 3, value]) if number < 16 else bytes([(number << 3 & 127) | 128, number >> 4, value])
            )
        return bytes([number << 3 | 2]) + (bytes([len(value)]) if len(value) < 128 else b"") + value

    names = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((letter, 1) for letter in "▁abth"), ("th", 1)]
    pieces = [
        field(1, field(1, name.encode()) + b"\x15" + struct.pack("<f", -float(i)) + field(3, kind))
        for i, (name, kind) in enumerate(names)
    ]
    (path / "tokenizer.model").write_bytes(b"".join(pieces) + field(2, field(3, 2)) + field(3, field(1, b"identity")))
    return {path / "a.tiktoken": damaged, path / "tokenizer.model": damaged}


def _read_ranks(path: Path) -> Any:
    from gpt.tokenizer import Tokenizer

    failures: list[Exception] = []
    for name in (f"a.tiktoken#{'[a-z]+| +|.'}", "tokenizer.model"):
        try:
            loaded = Tokenizer.load(path / name)
            loaded.decode(loaded.encode(TEXT))
        except ValueError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return None


def _metrics(path: Path) -> Path:
    lines = [
        {"kind": kind, "step": step, "val_bpb": 1.5, "loss": 2.5} for step in range(5) for kind in ("train", "eval")
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path / "metrics.jsonl"


def _read_metrics(path: Path) -> Any:
    from gpt import run

    scores = run.scores_of(run.read_metrics(path / "metrics.jsonl"))
    return run.best_of(scores, range(5)) and None


def _line(rng: random.Random, whole: bytes) -> bytes:
    lines = whole.split(b"\n")
    at = rng.randrange(len(lines) - 1)
    lines[at] = restructured(WILD)(rng, lines[at])
    return b"\n".join(lines)


def kinds() -> dict[str, Kind]:
    from gpt.durable import CorruptError

    def manifest(path: Path) -> dict[Path, Make]:
        return {_data_set(path) / "manifest.json": either(damaged, restructured(WILD))}

    def checkpoint(path: Path) -> dict[Path, Make]:
        return {
            file: either(damaged, restructured(WILD)) if file.suffix == ".json" else damaged
            for file in sorted(_checkpoint(path).iterdir())
        }

    json_too = either(restructured(TOKENIZER_WILD), restructured(TOKENIZER_WILD), damaged)
    return {
        "shard": Kind(
            lambda path: {_data_set(path) / "train-00000.tok": either(damaged, _index)},
            _read_data_set,
            (CorruptError,),
            True,
        ),
        "manifest": Kind(manifest, _read_data_set, (CorruptError,), True),
        "checkpoint": Kind(checkpoint, _read_checkpoint, (CorruptError,), True),
        "config": Kind(
            lambda path: {_config(path): either(damaged, rewritten, rewritten)}, _read_config, (ValueError,), False
        ),
        "tokenizer": Kind(
            lambda path: dict.fromkeys(_tokenizer(path), json_too), _read_tokenizers, (ValueError,), False
        ),
        "tensors": Kind(
            lambda path: {_checkpoint(path) / "model.safetensors": damaged}, _read_tensors, (ValueError,), False
        ),
        "resealed": Kind(
            lambda path: {_data_set(path) / "manifest.json": _sealed_again},
            _read_data_set,
            (ValueError, IndexError),
            False,
        ),
        "vocabulary": Kind(_ranks, _read_ranks, (ValueError,), False),
        "metrics": Kind(lambda path: {_metrics(path): either(damaged, _line)}, _read_metrics, (CorruptError,), False),
    }


PROMISED = ("shard", "manifest", "checkpoint", "config", "tokenizer")  # 10,000 of each; of the others a tenth


# Trying


class Prepared:
    """A kind's files on disk, and one mutant of them at a time."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory, self.kind = name, directory, kinds()[name]
        self.files = self.kind.prepare(directory)
        self.whole = {file: file.read_bytes() for file in self.files}
        self.before = self.kind.load(directory)

    def mutant(self, number: int) -> tuple[Path, bytes]:
        """The file that is damaged, and what it holds then: never what it held before."""
        rng = random.Random(f"{self.name} {number}")
        file = rng.choice(list(self.files))
        while (data := self.files[file](rng, self.whole[file])) == self.whole[file]:
            pass
        return file, data

    def fault(self, number: int) -> str | None:
        """What is wrong with how mutant `number` ends, None if it ends well."""
        file, data = self.mutant(number)
        mark = file.with_name(".changed")
        file.write_bytes(data)
        mark.touch()
        try:
            found = self.kind.load(self.directory)
            if self.kind.sealed and found != self.before:
                return "damage was not found: other content was loaded"
        except self.kind.errors as error:
            words = str(error)
            if not words or type(error).__name__ in words[:40] or "Traceback" in words:
                return f"{type(error).__name__} without words: {words[:200]!r}"
            if not any(name in words for name in (file.name, str(file.parent))):
                return f"an error that does not name its file: {words[:200]}"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
        finally:
            file.write_bytes(self.whole[file])
            mark.unlink()
        return None


def _child(jobs: list[tuple[str, int, int]], directory: Path) -> None:
    """Try mutants; `now` holds the one that is being tried, and a line of JSON goes out for each that ends badly."""
    now = os.open(directory / "now", os.O_WRONLY | os.O_CREAT, 0o600)
    size = limits.address_space()
    for number, (name, first, count) in enumerate(jobs):
        place = directory / f"{os.getpid()}-{number}"
        place.mkdir()
        prepared = Prepared(name, place)
        if number == 0:
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
            limits.limit_memory(size + 2 * MEMORY)
        for at in range(first, first + count):
            os.pwrite(now, f"{number} {at} ".ljust(40).encode(), 0)
            with limits.timed(CPU_S, WALL_S):
                found = prepared.fault(at)
            if found is not None:
                print(json.dumps([name, at, found]), flush=True)
    os.pwrite(now, b"done".ljust(40), 0)


def attempt(counts: dict[str, int], first: int = 0) -> dict[str, list[str]]:
    """Try mutants first .. first + count - 1 of each kind: kind -> what ended badly, each with how to repeat it."""
    failures: dict[str, list[str]] = {name: [] for name in counts}
    jobs = [(name, first, count) for name, count in counts.items()]
    with tempfile.TemporaryDirectory() as scratch:
        while jobs:
            (Path(scratch) / "now").unlink(missing_ok=True)
            command = [sys.executable, __file__, "--child", json.dumps(jobs), scratch]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment(), check=False)
            lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]
            for name, at, what in lines:
                failures[name].append(f"{what}; repeat: python tests/fuzz.py {name} 1 --at {at}")
            now = (Path(scratch) / "now").read_text().split() if (Path(scratch) / "now").exists() else []
            if now == ["done"]:
                break
            if not now:
                raise RuntimeError(f"the child did not begin: {ran.stderr[-2000:]}")
            number, at = map(int, now)
            name, begin, count = jobs[number]
            ended = signal.Signals(-ran.returncode).name if ran.returncode < 0 else f"exit {ran.returncode}"
            words = f": {ran.stderr.strip().splitlines()[-1][:200]}" if ran.stderr.strip() else ""
            failures[name].append(
                f"the process ended ({ended}{words}); repeat: python tests/fuzz.py {name} 1 --at {at}"
            )
            jobs = [(name, at + 1, begin + count - at - 1), *jobs[number + 1 :]]
            if sum(map(len, failures.values())) > 50:
                break
    return failures


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
    }


def rows(counts: dict[str, int], say: Callable[[str], None]) -> Iterator[Row]:
    for name, count in counts.items():
        began = time.monotonic()
        failures = attempt({name: count})[name]
        for failure in failures[:10]:
            say(f"{name}: {failure}")
        yield Row("G12", f"mutants of a {name} file", count, count - len(failures), time.monotonic() - began)


def prove(scale: float, say: Callable[[str], None]) -> list[Row]:
    """10,000 mutants of each promised kind and a tenth of the others, times `scale`."""
    counts = {name: max(1, round(scale * (10_000 if name in PROMISED else 1_000))) for name in kinds()}
    return list(rows(counts, say))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*kinds(), "all"])
    parser.add_argument("count", type=int)
    parser.add_argument("--at", type=int)
    args = parser.parse_args()
    if args.at is not None:
        with tempfile.TemporaryDirectory() as scratch:
            prepared = Prepared(args.kind, Path(scratch))
            print(prepared.fault(args.at) or "it ends as it should")
        return
    for row in rows(dict.fromkeys(kinds() if args.kind == "all" else [args.kind], args.count), print):
        print(f"{row.guarantee}  {row.what:32} {row.survived} of {row.tried}  {row.seconds:.1f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--child"]:
        _child([tuple(job) for job in json.loads(sys.argv[2])], Path(sys.argv[3]))
    else:
        main()
