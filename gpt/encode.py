"""Text to ids for whole corpora, fast: text is cut where no pre-token can cross, and each distinct part is encoded once.

A pre-token's ids depend on nothing but its characters. So text may be cut into units wherever two pre-tokens meet and
no rule looks across, and a table from unit to ids does the rest. Where that is follows from the pattern that splits text;
`_Rules` says it, for each family of patterns known here, by the two bytes on either side of a cut. Other rules go
through `Tokenizer` whole. All of it is numpy over some ten thousand units at a time. gigatoken, where it is installed, is
faster still; what it says is checked against the table's ids.
"""

import importlib.metadata
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from gpt import host
from gpt.shards import token_dtype
from gpt.tokenizer import CHARACTERS, DEEPSEEK_V3, HAN_AND_KANA, WORDS, Tokenizer
from gpt.vocabularies import CL100K, O200K, QWEN

PIECE = 1 << 16  # bytes or characters that are cut at a time
END = "\1"  # stands after each text of several that are cut together; texts that hold it are not
SLOTS = 1 << 20  # units that the table has room for: 24 MB
POOL = 1 << 22  # ids that they have, together; when it is full the table begins again
KEPT, LONGEST = 1 << 15, 256  # longer units: how many are kept twice, and how long they may be, in bytes

CHECKED = 1 << 16  # characters of the first text that gigatoken encodes, whose ids are checked
CHECKED_LATER = 1 << 11  # of each later batch
_NOT_ITS_FAULT = (KeyboardInterrupt, SystemExit, MemoryError)
FULL_BYTES = 256 << 20  # by how much the process may grow before gigatoken's own cache, which has no end, is dropped
FULL_TEXT = 256 << 20  # characters after which it is where memory cannot be measured

# Kinds of bytes: letters, digits, marks, the apostrophe, space and tab, the line ends, beyond ASCII, and what is left:
# control characters and white space of other kinds, to one of the two engines at least. And END.
_L, _D, _P, _A, _S, _N, _R, _H, _O, _X = range(10)


def _kind(byte: int) -> int:
    char = chr(byte)
    if byte >= 0x80:
        return _H
    if char.isalnum():
        return _L if char.isalpha() else _D
    special = {"'": _A, " ": _S, "\t": _S, "\n": _N, "\r": _R, END: _X}
    return special.get(char, _P if char.isprintable() else _O)


_KINDS = np.array([_kind(byte) for byte in range(256)], dtype=np.uint8)
_SPACES_OF_WORDS = np.where((_KINDS == _L) | (_KINDS == _D) | (_KINDS == _H) | (_KINDS == _X), _KINDS, _S)
_SPACES_OF_WORDS[ord("_")] = _L
_ALWAYS, _BEFORE_WORD, _AFTER_ONE = 1, 2, 3
_WORD_FOLLOWS = np.isin(np.arange(16), (_L, _P, _A))
_NOT_SPACE = np.isin(np.arange(16), (_L, _D, _P, _A, _H))

_STRANGE = re.compile(
    rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"  # white space beyond ASCII
)
_BLANK = rb"[ \t\x0b\x0c\x1c-\x1f]++"
_LINE_BEFORE_BLANK = re.compile(rb"\n(?=" + _BLANK + rb"[\r\n])")
_LINE_BEFORE_STRANGE_BLANK = re.compile(rb"\n(?=(?:" + _BLANK + rb"|" + _STRANGE.pattern + rb")++[\r\n])")


class _Rules:
    r"""Where the text of a pre-tokenizer may be cut: between which kinds of bytes, and around which Han and kana.

    In every family (DeepSeek-V3's, cl100k's and Qwen's, o200k's, GPT-2's):

    - After a letter, before ASCII that is none: each match ends with its letters. (Not o200k's before an apostrophe.)
    - After a digit, before ASCII that is none; before a digit, after a mark: digits are matched alone or after a space.
    - Before a space or tab, after what is no white space: matches have white space in front or among itself.
    - Before the last of spaces and tabs, if a letter or mark follows: `\s+(?!\S)` leaves it to them.
    - After a line feed, if no white space follows, or spaces and tabs and then none: `\s*[\r\n]+` and `[\r\n]*` end
      there. (o200k's `[\r\n/]*` does not before a mark.) GPT-2 has neither, but cuts before a line end that follows
      what is no white space, and after a line feed between two such.
    - Between two letters of Han or kana that no entry of a byte-level vocabulary holds together ("letters"): byte pair
      encoding joins nothing there, and either part is matched as letters again. Around all their runs in DeepSeek-V3's,
      where those stand apart ("runs"). In a vocabulary of words, around each one ("each").
    """

    def __init__(
        self,
        *cuts: tuple[tuple[int, ...], tuple[int, ...], int],
        han: Literal["letters", "runs", "each", "none"] = "letters",
        kinds: np.ndarray = _KINDS,
    ) -> None:
        self.han, self.kinds = han, kinds
        self._verdicts = np.zeros((16, 16), dtype=np.uint8)
        for left, right, verdict in (*cuts, ((_X,), tuple(range(10)), _ALWAYS), (tuple(range(10)), (_X,), _ALWAYS)):
            self._verdicts[np.ix_(left, right)] = verdict
        letters = HAN_AND_KANA[1:-1] if han == "runs" else "一-龥ぁ-ゖァ-ヺー-ヾ"
        around = rf"(?<=[{letters}])(?![{letters}])" if han == "runs" else rf"(?<=[{letters}])(?=[\n，。、])"
        self._place = re.compile(r"(?<=\S)(?= \S)" + (f"|{around}" if han != "none" else ""))
        self._ranges = [(ord(part[0]), ord(part[-1])) for part in re.findall(".-.", letters)]

    def near(self, text: str, position: int) -> int:
        """The next place from `position` on where the text may be cut; its end if there is none."""
        found = self._place.search(text, position)
        return found.start() if found else len(text)

    def starts(self, data: bytes, pairs: "_Pairs | None") -> np.ndarray:
        """Where the units begin. `data` has no NUL; END in it is a unit, and so a cut."""
        codes, is_ascii = np.frombuffer(data, np.uint8), data.isascii()
        kinds = self.kinds[codes]
        if not is_ascii:
            for found in _STRANGE.finditer(data):
                kinds[found.start() : found.end()] = _O
        cuts = self._verdicts.ravel()[kinds[:-1] << 4 | kinds[1:]]
        blank = _LINE_BEFORE_BLANK if is_ascii else _LINE_BEFORE_STRANGE_BLANK
        for found in blank.finditer(data):
            cuts[found.start()] = 0
        at = np.flatnonzero(cuts)
        verdicts, last = cuts[at], len(kinds) - 1
        kept = verdicts == _ALWAYS
        kept |= (verdicts == _BEFORE_WORD) & _WORD_FOLLOWS[kinds[np.minimum(at + 2, last)]]
        kept |= (verdicts == _AFTER_ONE) & (at > 0) & _NOT_SPACE[kinds[at - 1]]
        at = at[kept] + 1
        if is_ascii or self.han == "none":
            return np.append(0, at)
        begins = np.zeros(len(data), dtype=bool)
        begins[0] = begins[at] = begins[self._among_han(codes, pairs)] = True
        return np.flatnonzero(begins)

    def _among_han(self, data: np.ndarray, pairs: "_Pairs | None") -> np.ndarray:
        """The cuts inside and around Han and kana: in UTF-8 three bytes each, the first of them 0xe3 to 0xe9."""
        first = np.flatnonzero((data >= 0xE3) & (data <= 0xE9))
        code = (
            (data[first] & np.uint32(15)) << 12
            | (data[first + 1] & np.uint32(63)) << 6
            | data[first + 2] & np.uint32(63)
        )
        among = np.zeros(len(first), dtype=bool)
        for low, high in self._ranges:
            among |= (code >= low) & (code <= high)
        first, code = first[among], code[among]
        if not len(first):
            return first
        follows = first[1:] == first[:-1] + 3
        if self.han == "each":
            inside = first[1:][follows]
        else:
            inside = first[1:][follows & ~pairs.held(code[:-1], code[1:])] if pairs is not None else first[:0]
        if self.han == "letters":
            return inside
        before, after = first[np.append(True, ~follows)], first[np.append(~follows, True)] + 3
        return np.concatenate([inside, before[before > 0], after[after < len(data)]])


_WHITE, _MARKS = (_S, _N, _R), (_P, _A)
_WORD_ENDS = (
    ((_L,), (_D, *_MARKS, *_WHITE, _O), _ALWAYS),
    ((_D,), (_L, *_MARKS, *_WHITE, _O), _ALWAYS),
    (_MARKS, (_D, _S), _ALWAYS),
    ((_H,), (_S,), _ALWAYS),
    ((_S,), (_S,), _BEFORE_WORD),
)
_LINE_ENDS = ((_N,), (_L, _D, _A, _H, _S), _ALWAYS)
_LINES = (_LINE_ENDS, ((_N,), (_P,), _ALWAYS))
_OURS = _Rules(*_WORD_ENDS, *_LINES, han="runs")
_CL100K = _Rules(*_WORD_ENDS, *_LINES)
_O200K = _Rules(*_WORD_ENDS, _LINE_ENDS, ((_L,), (_A,), 0))
_GPT2 = _Rules(
    *_WORD_ENDS, ((*_MARKS, _H), (_N, _R), _ALWAYS), ((_N,), (_L, _D, _P, _A, _H), _AFTER_ONE)
)  # fmt: skip
_ALL = (_L, _D, _S, _H)
_WORDS = _Rules((_ALL, (_S,), _ALWAYS), ((_S,), _ALL, _ALWAYS), han="each", kinds=_SPACES_OF_WORDS)
_IDS = _Rules(((_D, _P, _L), (_S, _N, _R), _ALWAYS), han="none")  # white space is no token


def _splits(*patterns: str) -> list[Mapping[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]


def _level(use_regex: bool) -> Mapping[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


_KNOWN: list[tuple[list[Mapping[str, Any]], _Rules]] = [
    ([*_splits(*DEEPSEEK_V3), _level(False)], _OURS),
    ([*_splits(CL100K), _level(False)], _CL100K),
    ([*_splits(QWEN), _level(False)], _CL100K),
    ([*_splits(O200K), _level(False)], _O200K),
    ([_level(True)], _GPT2),
    (_splits(*WORDS), _WORDS),
    ([{"type": "WhitespaceSplit"}], _IDS),
]

# Characters that no canonical composition or decomposition touches, whatever stands beside them.
_UNTOUCHED = re.compile(r"[\0-\u02ff\u0400-\u0482\u048a-\u052f\u2010-\u2027\u3001-\u3029ぁ-ゖァ-ヾ一-龥가-힣！-～]*+\Z")


def _steps(pre_tokenizer: Any) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, without what changes no ids."""
    if not isinstance(pre_tokenizer, dict):
        return []
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _is_plain(model: Mapping[str, Any]) -> bool:
    """Whether it is byte pair encoding that does not know where a word begins and ends."""
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return model["type"] == "BPE" and not marked


class _Generations(dict[bytes, bytes]):
    """A cache from units to the bytes of their ids. In two generations, so that what is used again outlives what is not:
    when one is full it becomes the older one. What is in neither is made, and kept unless it is long."""

    def __init__(self, make: Callable[[bytes], bytes]) -> None:
        self._make, self._older = make, dict[bytes, bytes]()

    def __missing__(self, unit: bytes) -> bytes:
        ids = self._older.get(unit)
        if ids is None:
            ids = self._make(unit)
        if len(unit) <= LONGEST:
            if len(self) >= KEPT:
                self._older = dict(self)
                self.clear()
            self[unit] = ids
        return ids


class _Pairs:
    """Which neighbours of Han or kana some entry of a byte-level vocabulary may hold together.

    Byte pair encoding joins nothing across a border that no entry crosses, so the parts of a run of letters on either
    side of it may be encoded alone. What is not sure counts as held together.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._whole = np.zeros(1 << 22, dtype=bool)  # by a hash of both characters
        self._parts = np.zeros((64, 64, 16, 64), dtype=bool)  # by the last two bytes of one, the first two of the next
        for data in map(tokenizer.token_bytes, range(tokenizer.size)):
            for i in range(1, len(data)):
                if data[i] & 0xF0 == 0xE0:  # a character of three bytes begins
                    self._add(data[max(0, i - 3) : i], data[i : i + 3])

    def _add(self, left: bytes, right: bytes) -> None:
        if left[-1] & 0xC0 != 0x80:
            return  # the end of a character of one byte
        if len(left) == len(right) == 3 and left[0] & 0xF0 == 0xE0:
            codes = np.frombuffer((left + right).decode("utf-8", "replace").encode("utf-32-le"), "<u4")
            self._whole[_pair(codes[:1], codes[1:2])] = True
            return
        before = left[-2] & 63 if len(left) > 1 and left[-2] & 0xC0 == 0x80 else slice(None)
        second = right[1] & 63 if len(right) > 1 else slice(None)
        self._parts[before, left[-1] & 63, right[0] & 15, second] = True

    def held(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(n,) bool for (n,) code points and those that follow them, all of three bytes."""
        parts = self._parts[left >> 6 & 63, left & 63, right >> 12 & 15, right >> 6 & 63]
        return parts | self._whole[_pair(left, right)]


def _pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * np.uint32(2654435761) ^ right * np.uint32(40503)) >> np.uint32(10)


_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)  # of a word of eight, little-endian


class _Table:
    """Units of up to 16 bytes and where their ids lie in `pool`: open addressing, two slots to an address. The key is the
    unit itself, padded with zeros, so nothing can be mistaken for another."""

    def __init__(self, dtype: np.dtype) -> None:
        self._low, self._high = np.zeros(SLOTS, np.uint64), np.zeros(SLOTS, np.uint64)
        self._first, self._count = np.zeros(SLOTS, np.uint32), np.zeros(SLOTS, np.uint8)
        self._shift = np.uint64(64 - (SLOTS.bit_length() - 2))
        self.pool, self._used = np.zeros(POOL, dtype), 0

    def make_room(self, n_ids: int) -> None:
        """Room for so many ids; what stands in the table may go."""
        if self._used + n_ids > len(self.pool):
            self._low[:] = 0
            self._used = 0
        if n_ids > len(self.pool):
            self.pool = np.zeros(2 * n_ids, self.pool.dtype)

    def add(self, ids: bytes) -> tuple[int, int]:
        """(where they lie in `pool`, how many)."""
        first, new = self._used, np.frombuffer(ids, self.pool.dtype)
        self._used += len(new)
        self.pool[first : self._used] = new
        return first, len(new)

    def keys(self, data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The units' first eight bytes and the next eight. 16 bytes of anything follow the last unit in `data`."""
        words = np.ndarray((len(data) - 7,), np.uint64, data, 0, (1,))  # one begins at each byte
        low = words[starts] & _FIRST_BYTES[np.minimum(lengths, 8)]
        high = words[starts + 8] & _FIRST_BYTES[np.clip(lengths - 8, 0, 8)]
        return low, high

    def _address(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = (low ^ high * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xD6E8FEB86659FD93)
        return (mixed >> self._shift).astype(np.int64) << 1

    def find(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(where each unit's ids lie, how many they are, which units are not there)."""
        at = self._address(low, high)
        other = np.flatnonzero((self._low[at] != low) | (self._high[at] != high))
        at[other] += 1
        there = at[other]
        absent = other[(self._low[there] != low[other]) | (self._high[there] != high[other])]
        return self._first[at].astype(np.int64), self._count[at].astype(np.int64), absent

    def store(self, low: np.ndarray, high: np.ndarray, first: np.ndarray, count: np.ndarray) -> None:
        """Remember units; of several at one address the last ones stay."""
        at = self._address(low, high)
        at += self._low[at] != 0
        self._low[at], self._high[at], self._first[at], self._count[at] = low, high, first, count


class _Cached:
    """Encoding by the table of units."""

    def __init__(self, tokenizer: Tokenizer, rules: _Rules, is_bytes: bool) -> None:
        self._tokenizer, self._rules, self._is_bytes = tokenizer, rules, is_bytes
        self._dtype = token_dtype(tokenizer.size + 1)
        self._end = np.array(-1).astype(self._dtype)  # in place of END: no id
        self._table = _Table(self._dtype)
        self._long = _Generations(self._encode_unit)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; none of them holds NUL or END."""
        parts: list[np.ndarray] = []
        counts: list[int] = []  # of the parts of each text
        group, size = list[str](), 0
        for text in texts:
            pieces = self._pieces(text)
            counts.append(len(pieces))
            for piece in pieces:
                group.append(piece)
                size += len(piece) + 1
                if size > PIECE:
                    parts += self._encode(group)
                    group, size = [], 0
        parts += self._encode(group)
        each = iter(parts)
        return [next(each) if n == 1 else np.concatenate([next(each) for _ in range(n)]) for n in counts]

    def _pieces(self, text: str) -> list[str]:
        """The text in pieces of about PIECE, cut where units may be."""
        if len(text) <= PIECE:
            return [text]
        bounds = [0]
        while bounds[-1] < len(text):
            bounds.append(self._rules.near(text, bounds[-1] + PIECE))
        return [text[start:end] for start, end in pairwise(bounds)]

    def beginning(self, text: str, n_characters: int) -> str:
        """About so many characters of the text or all of it, cut where units may be."""
        return text if len(text) <= n_characters else text[: self._rules.near(text, n_characters)]

    def _encode(self, pieces: Sequence[str]) -> Iterator[np.ndarray]:
        """The ids of each piece."""
        if not pieces:
            return
        data = END.join([*pieces, ""]).encode()
        starts = self._rules.starts(data, None if data.isascii() else self._pairs)
        ids, start = self._of_units(data, starts), 0
        for end in np.flatnonzero(ids == self._end).tolist():
            yield ids[start:end]
            start = end + 1

    def _of_units(self, data: bytes, starts: np.ndarray) -> np.ndarray:
        """The ids of the units one after another."""
        table = self._table
        table.make_room(len(data))
        lengths = np.diff(starts, append=len(data))
        low, high = table.keys(data + bytes(16), starts, lengths)
        first, count, absent = table.find(low, high)
        unknown = lengths > 16
        unknown[absent] = True
        absent = np.flatnonzero(unknown)
        if len(absent):
            added: dict[bytes, tuple[int, int]] = {}
            for i, start, end in zip(
                absent.tolist(), starts[absent].tolist(), (starts + lengths)[absent].tolist(), strict=True
            ):
                unit = data[start:end]
                if unit not in added:
                    added[unit] = table.add(self._long[unit] if len(unit) > 16 else self._encode_unit(unit))
                first[i], count[i] = added[unit]
            short = absent[(lengths[absent] <= 16) & (count[absent] < 256)]
            table.store(low[short], high[short], first[short], count[short])
        ends = np.cumsum(count)
        return table.pool[np.repeat(first - ends + count, count) + np.arange(ends[-1])]

    def _encode_unit(self, unit: bytes) -> bytes:
        if unit == END.encode():
            return self._end.tobytes()
        return array("H" if self._dtype.itemsize == 2 else "I", self._tokenizer.encode_unit(unit.decode())).tobytes()

    @cached_property
    def _pairs(self) -> _Pairs | None:
        return _Pairs(self._tokenizer) if self._is_bytes else None


class _Characters:
    """Encoding of a vocabulary of single characters: a table over all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._table = np.full(0x110000, tokenizer.unknown_id, dtype=token_dtype(tokenizer.size))
        for name, token in tokenizer.vocab.items():
            if len(name) == 1:
                self._table[ord(name)] = token

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._table[np.frombuffer(text.encode("utf-32-le"), "<u4")] for text in texts]


# What tokenizers disagree on: control tokens as text, white space and digits of every kind, marks that combine,
# contractions, scripts without spaces, what no vocabulary knows.
AWKWARD = (
    "<|endoftext|><|im_start|>user\n<|im_end|> <|reserved_0|><s>[INST]",
    "don't DON'T we'll we'LL he'd 'sa 's ''s 'ſ I'M x'y' '' 'Ll",
    "a  b   c    d\te\t\tf \tg\n\nh\n \n  i\r\nj\r\n\r\n  k \n l\x0bm\x0c\nn\x1c\x1d o\x85p\xa0q\xa0 r\u2003s\u3000t  ",
    "\n", " ", "  ", "\t", "\r\n ", " \n x", "x \n", "x  ", "\n\n\n", "  5", " 5", "x\n5", "x \t5",
    "1 12 123 1234 12345 1234567 1,234,567.89 0x1F 3.14e-10 a1b22c333d4444 ½ ²³ ٣٤٥٦ ५६७८ 1٣2५ Ⅷ 五 12五34",
    "e\u0301te\u0301 \u0301a a\u0300\u0301b .\u0301 5\u0301 \n\u0301 é ñ Å Å ﬁ ǅ ŉ ß ẞ İ ı",
    "def f(self, *args):\n    return {'a': [1, 2], \"b\": -x**2}  # ...\n\n\n\tif x!=y: pass;;\\n //\n/* */\n/x",
    "...Hello ..Hello .Hello (Hello ((Hello “Hello” «Bonjour» ‘a’ —b– …c ¿Qué? ¡Ah! 1.a 2)b $x €5 £6 a_b __c__ @d #e",
    "春眠不覺曉，處處聞啼鳥。夜來風雨聲，\n　　花落知多少！「你好」Hello世界123ひらがなカタカナー々〇㐀𠀀",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก 안녕하세요 세계 ありがとう",
    "😀 👨\u200d👩\u200d👧 🇫🇷 ❤\ufe0f ✓ → ∑∫√ ≤ © ™ \ufeff \u200b\u200d",
    "\ufffd \ue000 \U0010ffff \x00 \x01\x02 \x7f \x00\x00a \x1b[0m",
    "HTTPServer camelCase snake_case SCREAMING_CASE iPhone XMLHttpRequest aB Ab AB ab A1b ÀÉÎ Straße ÐŽ",
    "a" * 300 + " " * 300 + "ab" * 200 + "!" * 100 + "\n" * 50 + "中" * 80 + "7" * 50,
)  # fmt: skip


class _Gigatoken:
    """Encoding by gigatoken. ValueError if it does not know the rules or other ids come out than `reference` has."""

    def __init__(self, tokenizer: Tokenizer, raw: Mapping[str, Any], reference: _Cached) -> None:
        import gigatoken  # ImportError without the extra

        self._json = json.dumps({**raw, "added_tokens": [], "normalizer": None, "post_processor": None})
        self._load: Callable[[str], Any] = gigatoken.Tokenizer.from_json
        self._reference, self._dtype = reference, token_dtype(tokenizer.size)
        self._lengths = tokenizer.byte_lengths.astype(np.int32)
        self._lengths[list(tokenizer.control_ids)] = -1 << 30  # whose presence shows in any sum
        self.version = importlib.metadata.version("gigatoken")
        self._backend: Any = self._load(self._json)
        self._n_encoded, self._grown = 0, host.resident_bytes()
        for text, ids in zip(AWKWARD, self._encode(AWKWARD)[0], strict=True):
            if not np.array_equal(ids, tokenizer.encode(text)):
                raise ValueError(f"it has other ids for {text[:40]!r}")

    def encode(self, texts: Sequence[str], n_checked: int) -> list[np.ndarray]:
        """The ids of each text. Of `n_checked` characters of them the ids are compared, of all the bytes counted."""
        self._renew(sum(map(len, texts)))
        encoded, n_bytes = self._encode(texts)
        expected = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
        if len(wrong := np.flatnonzero(n_bytes != expected)):
            i = wrong[0]
            raise ValueError(f"its ids of {expected[i]} bytes of text, {texts[i][:40]!r}, stand for {n_bytes[i]}")
        first = self._n_encoded % len(texts)  # another one each time
        for i in (*range(first, len(texts)), *range(first)):
            piece = self._reference.beginning(texts[i], n_checked)
            want = self._reference.encode([piece])[0]
            got = encoded[i] if len(piece) == len(texts[i]) else encoded[i][: len(want)]
            if not np.array_equal(got, want):
                raise ValueError(f"it has other ids for a text that begins {texts[i][:40]!r}")
            n_checked -= len(piece) + 1
            if n_checked <= 0:
                break
        return encoded

    def _encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """The ids of each text, and how many bytes they stand for."""
        encode = self._backend.encode  # text by text: what encode_batch returns takes 0.2 s to import
        each = [encode(text) for text in texts]
        ids, bounds = np.concatenate(each), np.cumsum([0, *map(len, each)])
        n_bytes, filled = np.zeros(len(texts), dtype=np.int64), np.flatnonzero(np.diff(bounds))
        if len(filled):
            n_bytes[filled] = np.add.reduceat(self._lengths.take(ids), bounds[filled], dtype=np.int64)
        ids = ids.astype(self._dtype)
        return [ids[start:end] for start, end in pairwise(bounds.tolist())], n_bytes

    def _renew(self, n_characters: int) -> None:
        """Begin with an empty cache once it has grown large."""
        self._n_encoded += n_characters
        memory = host.resident_bytes()
        grown = memory - self._grown > FULL_BYTES and self._n_encoded > FULL_TEXT // 16
        if grown or (not memory and self._n_encoded > FULL_TEXT):
            del self._backend  # before there is another
            self._backend, self._n_encoded, self._grown = self._load(self._json), 0, host.resident_bytes()


class Encoder:
    """`Tokenizer.encode` of many texts, on one core. `how` says by what means, in a line.

    With `fast`, gigatoken does it if it is installed, knows the tokenizer's rules and has its ids for texts on which
    tokenizers differ and for the first of the corpus; `how` says if not. Afterwards the bytes that the ids of each text
    stand for are counted, and the ids of some text in each call compared.
    """

    def __init__(self, tokenizer: Tokenizer, *, fast: bool = True) -> None:
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer.size)
        raw = tokenizer.raw
        self._composes = raw.get("normalizer") == {"type": "NFC"}
        self._way, self.how = self._choose(raw)
        self._gigatoken: _Gigatoken | None = None
        self._is_tried = False  # on text of the corpus
        if fast and isinstance(self._way, _Cached) and _is_plain(raw["model"]):
            try:
                self._gigatoken = _Gigatoken(tokenizer, raw, self._way)
                self.how = f"gigatoken {self._gigatoken.version} (ids checked)"
            except ImportError:
                pass
            except _NOT_ITS_FAULT:
                raise
            except BaseException as error:  # a panic in it is no Exception
                self.how = f"word cache (not gigatoken: {error})"

    def _choose(self, raw: Mapping[str, Any]) -> tuple[_Cached | _Characters | None, str]:
        steps = _steps(raw.get("pre_tokenizer"))
        if raw.get("normalizer") is not None and not self._composes:
            return None, "tokenizers (its normalizer may look at the whole text)"
        if not all(token["special"] for token in raw.get("added_tokens") or ()):
            return None, "tokenizers (it has added tokens that are found in text)"
        if raw["model"].get("dropout"):
            return None, "tokenizers (its merges are dropped at random)"
        if steps == _splits(*CHARACTERS) and self._tokenizer.unknown_id is not None:
            return _Characters(self._tokenizer), "character table"
        for known, rules in _KNOWN:
            if steps == known:
                return _Cached(self._tokenizer, rules, _is_plain(raw["model"])), "word cache"
        return None, "tokenizers (its pre-tokenizer is not known here)"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without a start token, in `token_dtype` of the vocabulary: equal to `Tokenizer.encode`.

        ValueError in words where that raises it, and if gigatoken is found wrong. The arrays may be read-only.
        """
        if self._way is None:
            return [np.array(ids, self._dtype) for ids in self._tokenizer.encode_each(texts)]
        whole = {
            i
            for i, text in enumerate(texts)
            if "\0" in text or END in text or (self._composes and not _UNTOUCHED.match(text))
        }
        if not whole:
            return self._encode(texts)
        encoded = iter(self._encode([text for i, text in enumerate(texts) if i not in whole]))
        return [
            np.array(self._tokenizer.encode(text), self._dtype) if i in whole else next(encoded)
            for i, text in enumerate(texts)
        ]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._gigatoken is None or not texts:
            return self._by_table(texts)
        try:
            encoded = self._gigatoken.encode(texts, CHECKED_LATER if self._is_tried else CHECKED)
        except _NOT_ITS_FAULT:
            raise
        except BaseException as error:
            if self._is_tried:
                version = self._gigatoken.version
                raise ValueError(
                    f"gigatoken {version} failed: {error}. What it encoded before may be wrong: delete the unfinished"
                    " data set, uninstall gigatoken or install another version, and prepare again"
                ) from None
            self._gigatoken, self.how = None, f"word cache (not gigatoken: {error})"
            return self._by_table(texts)
        self._is_tried = True
        return encoded

    def _by_table(self, texts: Sequence[str]) -> list[np.ndarray]:
        assert self._way is not None
        return [ids.astype(self._dtype, copy=False) for ids in self._way.encode(texts)]
