"""What a prepared data set holds: documents, bytes and tokens by split, source and script, and how a text is cut.

It reads a data set, which also checks every block of it, and prints; it changes nothing.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt.durable import CorruptError
from gpt.shards import SPAN_KINDS, TokenSet
from gpt.tokenizer import Tokenizer

SPLITS = ("train", "val")
SHOWN_SOURCES, SHOWN_RECORDS = 20, 10
SCRIPTS = {"LATIN": "Latin", "CJK": "Han", "HIRAGANA": "kana", "KATAKANA": "kana", "CYRILLIC": "Cyrillic"}
CATEGORIES = {"N": "digits", "P": "punctuation", "S": "punctuation", "Z": "space", "C": "space"}


@dataclass(frozen=True)
class Report:
    """What a prepared data set holds. `scripts`: (script, tokens, bytes), most bytes first."""

    path: Path
    documents: dict[str, int]
    bytes: dict[str, int]
    tokens: dict[str, int]
    vocab_size: int
    vocab_used: int
    unknown_tokens: int
    unknown_bytes: int
    scripts: list[tuple[str, int, int]]
    sources: list[tuple[str, int, int, int]]  # name, documents, bytes, tokens
    learned: dict[str, int]  # tokens of each split that are targets: all of them, unless some are marked
    example: list[str]
    notes: list[str] = field(compare=False)  # on how it was made: what was left out, what went in and came out
    skipped: list[str] = field(compare=False)  # errors of bad records, the first of n_skipped
    n_skipped: int = field(compare=False)


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def census(
    out: Path,
    tokenizer: Tokenizer | None = None,
    *,
    notes: Sequence[str] = (),
    skipped: Sequence[str] = (),
    n_skipped: int = 0,
) -> Report:
    """Read the data set back, which also checks every block of it. `tokenizer` is its own, for who has loaded it."""
    tokenizer = tokenizer or Tokenizer.load(out)
    sets = {split: TokenSet(out, split) for split in SPLITS}
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    for tokens in sets.values():
        for start in range(0, tokens.n_tokens, 1 << 20):
            counts += np.bincount(tokens.read(start, min(1 << 20, tokens.n_tokens - start)), minlength=tokenizer.size)
    scripts: Counter[str] = Counter()
    script_tokens: Counter[str] = Counter()
    for token in np.flatnonzero(counts).tolist():
        data = tokenizer.token_bytes(token)
        if data:
            scripts[script := script_of(data)] += int(counts[token]) * len(data)
            script_tokens[script] += int(counts[token])
    n_bytes = sum(tokens.n_bytes for tokens in sets.values())
    unknown = tokenizer.unknown_id
    first = sets["train"].read(0, min(120, sets["train"].n_tokens)).tolist()
    return Report(
        path=out,
        documents={split: tokens.n_documents for split, tokens in sets.items()},
        bytes={split: tokens.n_bytes for split, tokens in sets.items()},
        tokens={split: tokens.n_tokens for split, tokens in sets.items()},
        vocab_size=tokenizer.size,
        vocab_used=int(np.count_nonzero(counts)),
        unknown_tokens=0 if unknown is None else int(counts[unknown]),
        unknown_bytes=0 if unknown is None else n_bytes - scripts.total(),
        scripts=[(script, script_tokens[script], n) for script, n in scripts.most_common()],
        sources=_by_source(list(sets.values())),
        learned={split: _learned(tokens) for split, tokens in sets.items()},
        example=[tokenizer.piece(token) for token in first if token not in tokenizer.control_ids],
        notes=list(notes),
        skipped=list(skipped),
        n_skipped=n_skipped,
    )


def _by_source(sets: Sequence[TokenSet]) -> list[tuple[str, int, int, int]]:
    """(name, documents, bytes, tokens) of each source. Holds the index of one shard at a time."""
    names = sets[0].sources
    totals = np.zeros((len(names), 3), dtype=np.int64)
    for tokens in sets:
        for shard, entry in zip(tokens.shards, tokens.entries, strict=True):
            index = shard.documents()
            if np.any(index["source"] >= len(names)) or index["n_bytes"].sum() != entry.n_bytes:
                raise CorruptError(f"{shard.path}: its document index and the manifest disagree; prepare again")
            lengths = np.diff(np.append(index["start"].astype(np.int64), entry.n_tokens))
            for column, weights in enumerate((np.ones_like(lengths), index["n_bytes"], lengths)):
                totals[:, column] += np.bincount(index["source"], weights, len(names)).astype(np.int64)
    documents, n_bytes, n_tokens = totals.T.tolist()
    return list(zip(names, documents, n_bytes, n_tokens, strict=True))


def _learned(tokens: TokenSet) -> int:
    """How many tokens are learned. Holds the spans of one shard at a time."""
    if not tokens.has_spans:
        return tokens.n_tokens
    train = SPAN_KINDS.index("train")
    spans = (part[part["kind"] == train] for part in (shard.spans() for shard in tokens.shards))
    return sum(int((part["end"] - part["start"]).sum()) for part in spans)


def script_of(data: bytes) -> str:
    """The script of most of a token's characters, spaces around them not counted."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "parts of characters"
    found = [_script_of_character(char) for char in text.strip() or text]
    return max(dict.fromkeys(found), key=found.count)


@cache
def _script_of_character(char: str) -> str:
    category = unicodedata.category(char)[0]
    if category in CATEGORIES:
        return CATEGORIES[category]
    return SCRIPTS.get(unicodedata.name(char, "").partition(" ")[0], "other")


def show(report: Report, console: Console) -> None:
    """Print the closing report."""
    table = Table("split", "documents", "bytes", "tokens", "bytes/token", box=None, header_style="bold")
    for split in SPLITS:
        _add(table, split, report.documents[split], report.bytes[split], report.tokens[split])
    console.print(table)
    if 1 < len(report.sources) <= SHOWN_SOURCES:
        table = Table("source", "documents", "bytes", "tokens", "bytes/token", box=None, header_style="bold")
        for row in report.sources:
            _add(table, *row)
        console.print(table)
    table = Table("script", "bytes", "tokens", "bytes/token", box=None, header_style="bold")
    for script, n_tokens, n_bytes in report.scripts:
        table.add_row(script, f"{n_bytes:,}", f"{n_tokens:,}", f"{n_bytes / n_tokens:.2f}")
    console.print(table)
    say(console, f"vocabulary: {report.vocab_used:,} of {report.vocab_size:,} entries occur")
    if report.unknown_tokens:
        share = report.unknown_bytes / sum(report.bytes.values())
        say(
            console,
            f"unknown: {report.unknown_tokens:,} tokens, {report.unknown_bytes:,} bytes of the text ({share:.2%})",
        )
    if report.learned != report.tokens:
        shares = (f"{report.learned[split] / report.tokens[split]:.1%} of {split}" for split in SPLITS)
        say(console, f"trained: {' and '.join(shares)}; the other tokens are only read")
    for note in report.notes:
        say(console, note)
    if report.n_skipped:
        say(console, f"{report.n_skipped:,} bad records were skipped:")
        for line in report.skipped[:SHOWN_RECORDS]:
            say(console, f"  {line}")
    styles = cycle(("black on cyan", "black on yellow"))
    console.print(Text.assemble(*((_printable(piece), next(styles)) for piece in report.example)))
    say(console, f"{report.path} is ready: python train.py CONFIG.yaml data.path={report.path}")


def _printable(piece: str) -> str:
    """Without what a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in piece)


def _add(table: Table, name: str, documents: int, n_bytes: int, n_tokens: int) -> None:
    table.add_row(name, f"{documents:,}", f"{n_bytes:,}", f"{n_tokens:,}", f"{n_bytes / max(1, n_tokens):.2f}")
