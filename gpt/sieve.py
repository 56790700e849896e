"""What a tokenizer.json from elsewhere may hold: known parts of bounded size, and expressions that end.

The native library that runs a tokenizer believes its file: a number may ask for all memory, a part may multiply a text
by itself, and a regular expression may try for ever. So the file is looked through before that library sees it. It
knows no vocabulary and runs nothing but the expressions that it doubts.
"""

import base64
import re
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tokenizers import Regex, pre_tokenizers

MAX_BYTES = 256 << 20  # of a tokenizer's file: the largest published ones have 40 MB
MAX_ADDED = 1 << 17  # tokens beside the model's own
MAX_TEXT = 4096  # characters of any text that is no entry of the vocabulary
MAX_STEPS, MAX_DEPTH = 64, 8  # parts, one after another and inside one another
MAX_GROWTH = 16  # times that a chain of replacements may lengthen a text
MAX_NUMBER = 100_000
MAX_WORD = 256  # characters of a word that WordPiece looks through: its work grows with their cube
MAX_EXPANSION = 128  # bytes that a compiled normalization makes of one character; Unicode's longest is 33
PROBE, PROBE_S = (
    1 << 12,
    0.5,
)  # an expression must be done with so many characters of a kind in this time: quadratic may pass

TYPES: Mapping[str, Collection[str]] = {
    "normalizer": {
        *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend"),
        *("Replace", "Sequence", "Strip", "StripAccents"),
    },
    "pre_tokenizer": {
        *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence"),
        *("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    },
    "decoder": {
        *("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"),
        "WordPiece",
    },
    "model": {"BPE", "Unigram", "WordLevel", "WordPiece"},
}
INSIDE = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def content(file: Path) -> bytes:
    """The bytes of a tokenizer's file; ValueError for one that is larger than any."""
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{file} has {size / 1e6:,.0f} MB; a tokenizer's file has at most {MAX_BYTES / 1e6:,.0f}")
    return file.read_bytes()


def text(file: Path, encoding: str = "utf-8") -> str:
    """`content` as text; with the encoding utf-8-sig without the mark that some editors begin a file with."""
    try:
        return content(file).decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None


def check(raw: Mapping[str, Any], trusted: Collection[str]) -> None:
    """ValueError in words unless the content of a tokenizer.json is made of known parts within the limits above.

    `trusted` are expressions that need no trial.
    """
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        _refuse(f"added_tokens is no list of at most {MAX_ADDED:,}")
    for token in added:
        name = token.get("content") if isinstance(token, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TEXT:
            _refuse(f"an added token has no text of 1 to {MAX_TEXT:,} characters")
        _check_values({key: value for key, value in token.items() if key != "id"}, "an added token")
    for kind in INSIDE:
        if (part := raw.get(kind)) is not None:
            _check_chain(kind, part, trusted)
    model = raw.get("model")
    if not isinstance(model, dict):
        _refuse("it has no model")
    if "type" in model:  # the oldest files have none
        _check_type("model", model)
    if model.get("dropout"):
        _refuse("its model leaves out merges by chance (dropout): the same text would have other ids each time")
    if "max_input_chars_per_word" in model and model["max_input_chars_per_word"] not in range(MAX_WORD + 1):
        _refuse(f"max_input_chars_per_word is no number up to {MAX_WORD}")
    _check_values({key: value for key, value in model.items() if key not in ("vocab", "merges")}, "the model")


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"cannot be loaded: {what}")


def _check_type(kind: str, part: Any) -> str:
    name = part.get("type") if isinstance(part, dict) else None
    if not isinstance(name, str) or name not in TYPES[kind]:
        _refuse(f"the type of {kind} {str(name)[:40]!r} is not known here; known are {', '.join(sorted(TYPES[kind]))}")
    return name


def _check_chain(kind: str, part: Any, trusted: Collection[str]) -> None:
    """Every part of a normalizer, pre-tokenizer or decoder, and what they do together."""
    steps, growth = 0, 1
    for name, step in _steps(kind, part, 0):
        steps += 1
        if steps > MAX_STEPS:
            _refuse(f"its {kind} has more than {MAX_STEPS} parts")
        _check_values({key: value for key, value in step.items() if key != "precompiled_charsmap"}, f"{kind} {name}")
        if name == "Precompiled":
            _check_precompiled(step.get("precompiled_charsmap"))
        if name == "Replace":
            if not isinstance(content := step.get("content"), str):
                _refuse(f"{kind} Replace puts in what is no text")
            growth *= max(1, len(content))
        if growth > MAX_GROWTH:
            _refuse(f"its {kind} makes a text more than {MAX_GROWTH} times as long")
        pattern = step.get("pattern")
        if not isinstance(pattern, dict):
            continue
        if pattern.get("String") == "":
            _refuse(f"{kind} {name} looks for an empty text")
        if isinstance(expression := pattern.get("Regex"), str) and expression not in trusted:
            check_expression(expression)


def _steps(kind: str, part: Any, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    name = _check_type(kind, part)
    if name != "Sequence":
        yield name, part
        return
    inner = part.get(INSIDE[kind])
    if depth == MAX_DEPTH or not isinstance(inner, list):
        _refuse(f"a Sequence in its {kind} holds no list, or is nested more than {MAX_DEPTH} deep")
    for each in inner:
        yield from _steps(kind, each, depth + 1)


def _check_values(value: Any, what: str, depth: int = 0) -> None:
    """Texts, numbers and lists of ordinary size, all the way down."""
    if depth > MAX_DEPTH:
        _refuse(f"{what} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        _refuse(f"{what} holds a text of {len(value):,} characters; at most {MAX_TEXT:,} are read")
    if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        _refuse(f"{what} holds the number {value!r:.40}; at most {MAX_NUMBER:,} is read")
    if isinstance(value, list | dict):
        if len(value) > MAX_STEPS:
            _refuse(f"{what} holds {len(value):,} values; at most {MAX_STEPS} are read")
        for part in value.values() if isinstance(value, dict) else value:
            _check_values(part, what, depth + 1)


def _check_precompiled(text: Any) -> None:
    """SentencePiece's table: 4 bytes with the size of a trie, the trie, texts that end with a zero byte."""
    try:
        table = base64.b64decode(text, validate=True)
        (size,) = struct.unpack("<I", table[:4])
    except (ValueError, TypeError, struct.error):
        _refuse("a Precompiled normalizer has no table")
    if size % 4 or 4 + size > len(table) or max(map(len, table[4 + size :].split(b"\0"))) > MAX_EXPANSION:
        _refuse(
            f"the table of a Precompiled normalizer is damaged, or lengthens a character to over {MAX_EXPANSION} bytes"
        )


# Regular expressions


class _Cost(NamedTuple):
    """How a part of an expression may match: `width` characters, or None where that may vary; in how many places it
    chooses among few ways, and in how many among as many as the text is long."""

    width: int | None
    few: int = 0
    many: int = 0


MAX_FEW, MAX_MANY, MAX_COUNT = 8, 3, 100
_OPENINGS = re.compile(r"\((\?(:|>|=|!|<=|<!|[ims]*(?:-[ims]+)?:|[ims]+\)))?")
_ESCAPE = re.compile(
    r"\\([pP]\{\^?\w{1,40}\}|x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[^kgKXyYN1-9xucCMpP])", re.S
)
_COUNT = re.compile(r"\{(\d{0,5})(?:(,)(\d{0,5}))?\}")


class _Reader:
    """Reads an expression of Oniguruma's as far as it must to tell in how many ways it could try to match."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def refuse(self, what: str) -> NoReturn:
        _refuse(f"the regular expression {self.text[:60]!r} {what} (at character {self.at}): it is not used here")

    def ways(self, depth: int = 0) -> _Cost:
        """The alternatives from here to the end, or to a closing parenthesis."""
        if depth > 2 * MAX_DEPTH:
            self.refuse("is nested too deeply")
        found = [self._sequence(depth)]
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            found.append(self._sequence(depth))
        if len(found) == 1:
            return found[0]
        choice = 1 if depth else 0  # at the top what is behind an alternative cannot fail
        return _Cost(None, max(cost.few for cost in found) + choice, max(cost.many for cost in found))

    def _sequence(self, depth: int) -> _Cost:
        width: int | None = 0
        few = many = 0
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            cost = self._repeated(*self._atom(depth))
            width = None if width is None or cost.width is None else width + cost.width
            few, many = few + cost.few, many + cost.many
            if few > MAX_FEW or many > MAX_MANY:
                self.refuse("has too many parts that may be long or short")
        return _Cost(width, few, many)

    def _atom(self, depth: int) -> tuple[_Cost, bool]:
        """(how the next part matches, whether it is a single character)."""
        mark = self.text[self.at]
        if mark == "(":
            return self._group(depth), False
        if mark == "[":
            self._set()
            return _Cost(1), True
        if mark == "\\":
            match = self._escape()
            return (_Cost(0), False) if match[1] in "bBAZzG" else (_Cost(1), match[1] != "R")
        self.at += 1
        if mark in "*+?":
            self.refuse("repeats nothing, or a repetition")
        return (_Cost(0), False) if mark in "^$" else (_Cost(1), True)

    def _escape(self) -> re.Match[str]:
        match = _ESCAPE.match(self.text, self.at)
        if match is None:
            self.refuse("refers back, or has an escape that is not known")
        self.at = match.end()
        return match

    def _group(self, depth: int) -> _Cost:
        match = _OPENINGS.match(self.text, self.at)
        if match is None or (match[1] is None and self.text[self.at + 1 : self.at + 2] in ("?", "*")):
            self.refuse("has a group that is not known")
        self.at = match.end()
        if match[0].endswith(")"):  # (?i): for what follows
            return _Cost(0)
        cost = self.ways(depth + 1)
        if self.text[self.at : self.at + 1] != ")":
            self.refuse("does not close a group")
        self.at += 1
        looks = match[2] in ("=", "!", "<=", "<!")
        if match[2] in ("<=", "<!") and cost != _Cost(1):
            self.refuse("looks back by more than one character")
        return cost._replace(width=0) if looks else cost

    def _set(self) -> None:
        """A bracketed set of characters, and sets inside it."""
        level = 0
        while self.at < len(self.text):
            mark = self.text[self.at]
            if mark == "\\":
                self._escape()
                continue
            self.at += 1
            if mark == "[":
                level += 1
                if level > MAX_DEPTH:
                    self.refuse("is nested too deeply")
                self.at += self.text[self.at : self.at + 1] == "^"
                self.at += level == 1 and self.text[self.at : self.at + 1] == "]"
            elif mark == "]":
                level -= 1
                if level == 0:
                    return
        self.refuse("does not close a set of characters")

    def _repeated(self, cost: _Cost, single: bool) -> _Cost:
        mark = self.text[self.at : self.at + 1]
        if mark in ("*", "+", "?"):
            low, high = (1 if mark == "+" else 0), (1 if mark == "?" else None)
            self.at += 1
            self.at += self.text[self.at : self.at + 1] in ("?", "+")
        elif (match := _COUNT.match(self.text, self.at)) and match[0] not in ("{}", "{,}"):
            self.at = match.end()
            low = int(match[1] or 0)
            high = low if match[2] is None else int(match[3]) if match[3] else None
            self.at += self.text[self.at : self.at + 1] == "?"
        else:
            return cost
        if self.text[self.at : self.at + 1] in ("*", "+", "?") or _COUNT.match(self.text, self.at):
            self.refuse("repeats a repetition")
        if max(low, high or 0) > MAX_COUNT:
            self.refuse(f"counts beyond {MAX_COUNT}")
        if cost.width == 0:
            self.refuse("repeats what has no width")
        if high in (0, 1) and low <= high:
            return _Cost(None, cost.few + 1, cost.many)
        if not single and (cost.width is None or cost.few or cost.many):
            self.refuse("repeats a group that may match in several ways")
        if low == high:
            return _Cost((cost.width or 0) * low)
        long = high is None or high - low > MAX_FEW
        return _Cost(None, 0 if long else 1, 1 if long else 0)


@lru_cache(maxsize=256)
def check_expression(text: str) -> None:
    """ValueError unless an expression of Oniguruma's is of a kind that ends soon on any text, and does so on trial."""
    if len(text) > MAX_TEXT:
        _refuse(f"a regular expression has {len(text):,} characters; at most {MAX_TEXT:,} are read")
    reader = _Reader(text)
    reader.ways()
    if reader.at < len(text):
        reader.refuse("closes a group that was not opened")
    try:
        split = pre_tokenizers.Split(Regex(text), "isolated")
    except Exception as error:
        _refuse(f"the regular expression {text[:60]!r} is none ({error})")
    for letter in dict.fromkeys(f"aA1 \n-好\u0301{''.join(filter(str.isprintable, text))}"[:64]):
        _try(text, split, letter)


def _try(text: str, split: Any, letter: str) -> None:
    """Give an expression more and more of one character, as long as it is quick: what is cubic shows in time."""
    size = 16
    while size <= PROBE:
        try:
            spent = _spent(split, letter * size + "\0")
            if PROBE_S < spent < 4 * PROBE_S:  # a collection of garbage may have fallen into it
                spent = min(spent, _spent(split, letter * size + "\0"))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the native library's panic is no Exception
            _refuse(f"the regular expression {text[:60]!r} fails on {size} times {letter!r} ({error})")
        if spent > PROBE_S:
            _refuse(f"the regular expression {text[:60]!r} tries for {spent:.2f} s on {size} times {letter!r}")
        size *= 2


def _spent(split: Any, text: str) -> float:
    began = time.thread_time()
    split.pre_tokenize_str(text)
    return time.thread_time() - began
