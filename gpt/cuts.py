"""How a tokenizer cuts text, as blocks of a page: by script and source, alone or beside another on the same text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt import growth, run, signals
from gpt.census import script_of
from gpt.page import Block, Heading, Note, Row, Segment, Table, Token, quoted
from gpt.shards import TokenSet
from gpt.tokenizer import Tokenizer

CHUNK = 1 << 20
FILE_BYTES = 1 << 26  # of each --text that is read
SAMPLE_BYTES = 1 << 20  # of a data set on which two tokenizers are compared
LONGEST, GROWN = 20, 20
DIFFERENCES, PER_TEXT = 10, 3
CONTEXT, WIDEST = 4, 60  # places where both cut shown around a difference; tokens of it at most


class Part(NamedTuple):
    """Text under a name: a source of a data set, or a file. Tokens without control tokens."""

    name: str
    documents: int
    n_bytes: int
    n_tokens: int


@dataclass(frozen=True)
class Measure:
    """What a tokenizer makes of a text, from how often each entry occurs in it."""

    n_tokens: int  # without control tokens
    n_characters: int
    n_whole: int  # occurrences of characters that lie within one token
    n_unknown: int
    used: int  # entries that occur
    scripts: dict[str, tuple[int, int]]  # script -> tokens, bytes; most bytes first
    parts: list[Part] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts)


def of_tokenizer(source: str, files: Sequence[str], other: str | None) -> tuple[str, Iterator[Block]]:
    """(title, blocks): the tokenizer that `source` names, measured on `files`, or else on the data set it is of.

    Raises FileNotFoundError or ValueError in words, CorruptError for a damaged data set.
    """
    first = Tokenizer.load(run.vocabulary(source))
    second = None if other is None else Tokenizer.load(run.vocabulary(other))
    is_data = not files and (Path(source) / "manifest.json").is_file()
    if second is not None and not files and not is_data:
        raise ValueError(f"{source} is no data set: name text to compare the tokenizers on: --text FILE")
    if other is None or second is None:
        return f"the tokenizer of {source}", _alone(source, first, files, is_data)
    return f"{source} beside {other}", _beside((source, first), (other, second), files)


def _alone(source: str, tokenizer: Tokenizer, files: Sequence[str], is_data: bool) -> Iterator[Block]:
    yield Note(f"{tokenizer.size:,} entries, {len(tokenizer.control_ids)} of them control tokens")
    if is_data:
        yield from _shown(of_shards(Path(source), tokenizer), tokenizer)
    elif files:
        yield from _shown(of_texts(tokenizer, texts := _read(files)), tokenizer)
        yield from _first_text(tokenizer, texts[0])
    else:
        yield Note("name text to see how it is cut: --text FILE")
    yield Heading("longest tokens")
    yield _longest(tokenizer)


def _shown(found: Measure, tokenizer: Tokenizer) -> Iterator[Block]:
    yield Heading("on this text")
    yield Table(
        ("", ""),
        [
            ("bytes per token", _ratio(found.n_bytes, found.n_tokens)),
            ("tokens per character", _ratio(found.n_tokens, found.n_characters, 3)),
            ("characters never split", _share(found.n_whole, found.n_characters)),
            ("vocabulary that occurs", f"{found.used:,} of {tokenizer.size:,} ({_share(found.used, tokenizer.size)})"),
            *([("unknown tokens", f"{found.n_unknown:,}")] if tokenizer.unknown_id is not None else []),
        ],
    )
    yield Heading("by script")
    rows = [(name, f"{b:,}", f"{n:,}", _ratio(b, n)) for name, (n, b) in found.scripts.items()]
    yield Table(("script", "bytes", "tokens", "bytes/token"), rows)
    yield Heading("by source")
    sources = [
        (name, f"{documents:,}", f"{n_bytes:,}", f"{n_tokens:,}", _ratio(n_bytes, n_tokens))
        for name, documents, n_bytes, n_tokens in found.parts
    ]
    yield Table(("source", "documents", "bytes", "tokens", "bytes/token"), sources)


def _first_text(tokenizer: Tokenizer, text: tuple[str, str]) -> Iterator[Block]:
    yield Heading("how it cuts")
    tokens = [Token(tokenizer.piece(i), i) for i in tokenizer.encode(text[1][:2000])[:200]]
    yield Row(text[0], [Segment("its beginning", tokens)])


def _longest(tokenizer: Tokenizer) -> Table:
    """The entries with the most characters; parts of characters count as bytes only."""
    sizes = [(_n_whole(data := tokenizer.token_bytes(i)), len(data), i) for i in range(tokenizer.size)]
    first = sorted(sizes, key=lambda entry: (-entry[0], -entry[1], entry[2]))[:LONGEST]
    rows = [(quoted(tokenizer.piece(i)), f"{i}", f"{chars}", f"{n_bytes}") for chars, n_bytes, i in first]
    return Table(("token", "id", "characters", "bytes"), rows)


def _n_whole(data: bytes) -> int:
    """How many characters lie within these bytes from end to end."""
    return len(data.decode("utf-8", errors="ignore"))


# Measuring


def measured(tokenizer: Tokenizer, counts: np.ndarray, parts: list[Part], n_characters: int | None = None) -> Measure:
    """What follows from how often each id occurs: (tokenizer.size,) int64. Control tokens are left out.

    Characters are counted where they begin, so the bytes of one that is cut over two tokens count as one.
    """
    scripts: dict[str, list[int]] = {}
    n_tokens = starts = whole = 0
    for token in np.flatnonzero(counts).tolist():
        count, data = int(counts[token]), tokenizer.token_bytes(token)
        if not data:
            continue
        n_tokens += count
        starts += count * sum(byte & 0xC0 != 0x80 for byte in data)
        whole += count * _n_whole(data)
        totals = scripts.setdefault(script_of(data), [0, 0])
        totals[0] += count
        totals[1] += count * len(data)
    unknown = 0 if tokenizer.unknown_id is None else int(counts[tokenizer.unknown_id])
    return Measure(
        n_tokens=n_tokens + unknown,
        n_characters=starts if n_characters is None else n_characters,
        n_whole=whole,
        n_unknown=unknown,
        used=int(np.count_nonzero(counts)),
        scripts={name: (n, b) for name, (n, b) in sorted(scripts.items(), key=lambda item: -item[1][1])},
        parts=parts,
    )


def of_shards(path: Path, tokenizer: Tokenizer) -> Measure:
    """Measure every token of a data set, both splits; reading it checks every block."""
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    documents: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    n_tokens: Counter[str] = Counter()
    for split in ("train", "val"):
        tokens = TokenSet(path, split)
        if tokens.tokenizer_sha256 != tokenizer.sha256:
            raise ValueError(
                f"{path}: tokenizer.json is not the one the data set was made with; prepare it again, or give --text FILE"
            )
        counts += occurrences(tokens, tokenizer.size)
        lengths = np.diff(np.append(tokens.document_starts, tokens.n_tokens)) - 1  # without the start token
        for tally, weights in (
            (documents, np.ones_like(lengths)),
            (n_bytes, tokens.document_bytes),
            (n_tokens, lengths),
        ):
            sums = np.bincount(tokens.document_sources, weights, len(tokens.sources))
            tally.update(dict(zip(tokens.sources, map(int, sums), strict=True)))
    parts = [Part(name, documents[name], n_bytes[name], n_tokens[name]) for name in documents]
    return measured(tokenizer, counts, parts)


def occurrences(tokens: TokenSet, size: int) -> np.ndarray:
    """(size,) int64: how often each id stands in a split."""
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, tokens.n_tokens, CHUNK):
        signals.check()
        counts += np.bincount(tokens.read(start, min(CHUNK, tokens.n_tokens - start)), minlength=size)
    return counts


def of_texts(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> Measure:
    """Measure (name, text) pairs; texts of the same name are documents of one part."""
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    parts: dict[str, Part] = {}
    for name, text in texts:
        signals.check()
        ids = tokenizer.encode_batch([text])[0]
        counts += np.bincount(np.array(ids, dtype=np.int64), minlength=tokenizer.size)
        _, documents, n_bytes, n_tokens = parts.get(name, Part(name, 0, 0, 0))
        parts[name] = Part(name, documents + 1, n_bytes + len(text.encode()), n_tokens + len(ids))
    return measured(tokenizer, counts, list(parts.values()), sum(len(text) for _, text in texts))


def _read(files: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of each file's first FILE_BYTES; ValueError unless it is UTF-8."""
    texts = []
    for name in files:
        with Path(name).open("rb") as file:
            data = file.read(FILE_BYTES)
            more = bool(file.read(1))
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if not more or error.start < len(data) - 3:
                raise ValueError(
                    f"{name}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8) first"
                ) from None
            text = data[: error.start].decode("utf-8-sig")
        if not text:
            raise ValueError(f"{name} is empty; name a file with text in it")
        texts.append((f"{name} (its first {FILE_BYTES >> 20} MiB)" if more else name, text))
    return texts


def _sample(path: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(source, text) of the first documents held out for validation, or else of the training split."""
    tokens = TokenSet(path, "val")
    if not tokens.n_documents:
        tokens = TokenSet(path, "train")
    texts, n_bytes = [], 0
    ends = np.append(tokens.document_starts[1:], tokens.n_tokens).tolist()
    for start, end, source in zip(tokens.document_starts.tolist(), ends, tokens.document_sources.tolist(), strict=True):
        ids = tokens.read(start, min(end - start, SAMPLE_BYTES)).tolist()
        text = tokenizer.decode(ids)
        texts.append((tokens.sources[source], text))
        n_bytes += len(text.encode())
        if n_bytes >= SAMPLE_BYTES:
            break
    return texts


# Two tokenizers on one text


def _beside(first: tuple[str, Tokenizer], second: tuple[str, Tokenizer], files: Sequence[str]) -> Iterator[Block]:
    (a_name, a), (b_name, b) = first, second
    texts = _read(files) if files else _sample(Path(a_name), a)
    ours, theirs = of_texts(a, texts), of_texts(b, texts)
    what = "" if files else f" of {a_name}, decoded from its shards"
    yield Note(f"both on the same text: {len(texts):,} documents, {ours.n_bytes:,} bytes{what}")
    pairs = [(tokenizer, found) for tokenizer, found in ((a, ours), (b, theirs))]
    lines = {
        "entries": [f"{tokenizer.size:,}" for tokenizer, _ in pairs],
        "tokens": [f"{found.n_tokens:,}" for _, found in pairs],
        "bytes per token": [_ratio(found.n_bytes, found.n_tokens) for _, found in pairs],
        "tokens per character": [_ratio(found.n_tokens, found.n_characters, 3) for _, found in pairs],
        "characters never split": [_share(found.n_whole, found.n_characters) for _, found in pairs],
        "vocabulary that occurs": [f"{found.used:,} ({_share(found.used, t.size)})" for t, found in pairs],
        "unknown tokens": [f"{found.n_unknown:,}" for _, found in pairs],
    }
    yield Table(("", a_name, b_name), [(name, *values) for name, values in lines.items()])
    yield Heading("bytes per token")
    names = dict.fromkeys([*ours.scripts, *theirs.scripts])
    rows = [(name, *(_ratio(*reversed(m.scripts.get(name, (0, 0)))) for m in (ours, theirs))) for name in names]
    yield Table(("script", a_name, b_name), rows)
    both = zip(ours.parts, theirs.parts, strict=True)
    rows = [(mine.name, *(_ratio(p.n_bytes, p.n_tokens) for p in (mine, yours))) for mine, yours in both]
    yield Table(("source", a_name, b_name), rows)
    yield from _grown(a, b)
    yield Heading("where they cut differently")
    yield from _differences(first, second, texts)


def _grown(old: Tokenizer, new: Tokenizer) -> Iterator[Block]:
    """What new tokens take the place of, if `new` is a growth of `old`."""
    try:
        replaced = growth.replaced(old, new)
    except ValueError:
        return
    if not replaced:
        return
    yield Heading("what the new tokens replace")
    rows = [
        (quoted(new.piece(token)), " ".join(quoted(old.piece(i)) for i in ids), f"{token}")
        for token, ids in list(replaced.items())[:GROWN]
    ]
    yield Table(("new token", "before", "id"), rows, words=2)
    if len(replaced) > GROWN:
        yield Note(f"and {len(replaced) - GROWN:,} more")


def _differences(
    first: tuple[str, Tokenizer], second: tuple[str, Tokenizer], texts: Sequence[tuple[str, str]]
) -> Iterator[Block]:
    """The first places where the two cut differently: there in colours, dim where they agree."""
    total, left = 0, DIFFERENCES
    for number, (name, text) in enumerate(texts):
        signals.check()
        sides = [(label, *_cut(tokenizer, text)) for label, tokenizer in (first, second)]
        if lossy := [label for label, _, _, data in sides if data != text.encode()]:
            yield Note(
                f"{' and '.join(lossy)} does not give this text back as it is, "
                "so the cuts cannot be laid beside one another"
            )
            return
        places, differ = agreement(sides[0][2], sides[1][2])
        total += int(differ.sum())
        seen, room = 0, DIFFERENCES if len(texts) == 1 else PER_TEXT  # places before `seen` are in the row before
        for i in np.flatnonzero(differ).tolist():
            if min(left, room) == 0:
                break
            if i < seen:
                continue
            low, seen, room, left = max(seen, i - CONTEXT), i + CONTEXT + 1, room - 1, left - 1
            start = int(places[low - 1]) if low else 0
            segments = [
                _window(label, tokens, ends, start, places[low:seen], differ[low:seen])
                for label, tokens, ends, _ in sides
            ]
            yield Row(f"{name}, text {number}, byte {int(places[i - 1]) if i else 0:,}", segments)
    yield Note(f"{total:,} places in all" if total else "nowhere: every token is the same")


def _cut(tokenizer: Tokenizer, text: str) -> tuple[list[Token], np.ndarray, bytes]:
    """The tokens of a text, after how many bytes each ends, (n,) int64, and all those bytes."""
    ids = tokenizer.encode_batch([text])[0]
    data = [tokenizer.token_bytes(i) for i in ids]
    return [Token(tokenizer.piece(i), i) for i in ids], np.cumsum([*map(len, data)], dtype=np.int64), b"".join(data)


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places, differ) of two ways to cut the same text, given where their tokens end.

    `places` (n,) are the ends that both have; differ[i] says whether they cut differently between places i - 1 and i.
    """
    places = np.intersect1d(first, second)
    n_tokens = [np.diff(np.searchsorted(ends, places, side="right"), prepend=0) for ends in (first, second)]
    return places, (n_tokens[0] != 1) | (n_tokens[1] != 1)


def _window(
    label: str, tokens: list[Token], ends: np.ndarray, start: int, places: np.ndarray, differ: np.ndarray
) -> Segment:
    """The tokens from byte `start` to the last of `places`, dim in the stretches between places that do not differ."""
    low, high = np.searchsorted(ends, (start, places[-1]), side="right").tolist()
    stretches = np.searchsorted(places, ends[low:high]).tolist()
    shown = [token._replace(learned=bool(differ[at])) for token, at in zip(tokens[low:high], stretches, strict=True)]
    if len(shown) > WIDEST:
        shown = [*shown[:WIDEST], Token(f" and {len(shown) - WIDEST:,} more", learned=False, role="padding")]
    return Segment(f"{label}: {high - low} tokens", shown)


def _ratio(n: int, d: int, digits: int = 2) -> str:
    return f"{n / d:.{digits}f}" if d else "-"


def _share(n: int, d: int) -> str:
    return f"{n / d:.2%}" if d else "-"
