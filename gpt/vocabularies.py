"""Published vocabularies in their own formats, as the content of a tokenizer.json: the same ids for every text.

    vocab.json + merges.txt   GPT-2's pair (RoBERTa's and Qwen's have other rules: they come with a tokenizer.json)
    NAME.tiktoken             ranks of byte strings; the rules follow from the name, or from FILE#NAME or FILE#PATTERN
    tokenizer.model           SentencePiece BPE (Llama 2, Mistral), or the ranks of Llama 3

Reads JSON, text and the protocol buffer's wire format; nothing in them can run code.
"""

import base64
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, AnyStr

from gpt import durable, sieve

Raw = dict[str, Any]

END = "<|endoftext|>"  # opens every document, and so closes the one before
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits by
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
QWEN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@dataclass(frozen=True)
class Known:
    """A published vocabulary of ranks: how many there are, how text is split, which control tokens stand beside."""

    n_ranks: int
    pattern: str
    special: Mapping[str, int]
    start: str = END
    end: str = END
    nfc: bool = False


def _numbered(names: Sequence[str], first: int) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(names)}


_LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
_QWEN = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_FILL = _numbered(("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), 100258)
KNOWN = {
    "r50k_base": Known(50256, GPT2, {END: 50256}),
    "p50k_base": Known(50280, GPT2, {END: 50256}),
    "cl100k_base": Known(100256, CL100K, {END: 100257, **_FILL, "<|endofprompt|>": 100276}),
    "o200k_base": Known(199998, O200K, {END: 199999, "<|endofprompt|>": 200018}),
    "llama3": Known(128000, CL100K, _numbered(_LLAMA3, 128000), "<|begin_of_text|>", "<|end_of_text|>"),
    "qwen": Known(151643, QWEN, _numbered(_QWEN, 151643), nfc=True),
}


def files(directory: Path) -> list[Path]:
    """Where the formats that `read` knows would stand in a directory without a tokenizer.json."""
    return [directory / "vocab.json", directory / "tokenizer.model", *sorted(directory.glob("*.tiktoken"))]


def is_one(file: Path, rules: str | None) -> bool:
    """Whether `read` takes it: anything but a tokenizer.json."""
    return rules is not None or file.suffix in (".tiktoken", ".model") or file.name in ("vocab.json", "merges.txt")


def read(file: Path, rules: str | None = None) -> tuple[Raw, Raw]:
    """The contents of tokenizer.json and tokenizer_config.json; ValueError in words for any other or damaged file.

    `rules` names a vocabulary of `KNOWN`, or is the pattern that splits text, for ranks that do not bring theirs.
    """
    if file.name in ("vocab.json", "merges.txt"):
        return _gpt2(file.parent)
    data = sieve.content(file)
    if not data:
        raise ValueError(f"{file}: the file is empty")
    if _looks_like_ranks(data) or file.suffix == ".tiktoken" or rules is not None:
        return _tiktoken(file, data, rules)
    return _sentencepiece(file, data)


# The letters of bytes, and what all formats share


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary, as GPT-2 chose them: itself if printable."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
LETTERS = str.maketrans({chr(byte): letter for letter, byte in BYTE_OF_LETTER.items()})


def _spelled(data: bytes) -> str:
    return data.decode("latin-1").translate(LETTERS)


def _added(special: Mapping[str, int]) -> list[Raw]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": name, **plain} for name, i in sorted(special.items(), key=lambda item: item[1])]


def _bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], special: Mapping[str, int], **model: Any) -> Raw:
    """A tokenizer.json of byte pair encoding; control tokens stand in the vocabulary, so that their ids are theirs
    even where they do not follow it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(special),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
            "vocab": {**vocab, **special},
            "merges": [list(pair) for pair in merges],
        },
    }


def _byte_level(raw: Raw, pattern: str) -> Raw:
    """`raw` with the pre-tokenizer of `pattern` (GPT-2's is ByteLevel's own) and the decoder of bytes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pattern == GPT2:
        raw["pre_tokenizer"] = level | {"use_regex": True}
    else:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}
    raw["decoder"] = level | {"use_regex": True}
    return raw


def parts_of(name: AnyStr, rank: Callable[[AnyStr], float | None]) -> tuple[AnyStr, AnyStr] | None:
    """The two parts that byte pair encoding of `name` alone joins last; None if it never becomes one.

    Whatever surrounds it, a stretch of text that becomes one token does so by the merges that it goes through alone:
    no merge crosses its ends, and the lowest rank in the whole is the lowest in it. So this one pair is its merge.
    """
    parts = [name[i : i + 1] for i in range(len(name))]
    while len(parts) > 2:
        ranks = [rank(parts[i] + parts[i + 1]) for i in range(len(parts) - 1)]
        found = [(r, i) for i, r in enumerate(ranks) if r is not None]
        if not found:
            return None
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


# vocab.json and merges.txt


def _gpt2(directory: Path) -> tuple[Raw, Raw]:
    vocab_file, merges_file, config_file = (
        directory / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")
    )
    for file, other in ((vocab_file, merges_file), (merges_file, vocab_file)):
        if file.is_symlink():
            durable.plain(file)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there; {other.name} alone is half a vocabulary")
    vocab = _json(vocab_file)
    config = _json(config_file) if config_file.is_file() else {}
    name = config.get("tokenizer_class")
    if name not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise ValueError(f"{directory}: the rules of {name} are not GPT-2's; use its tokenizer.json instead")
    ids = list(vocab.values())
    if not all(type(i) is int and i >= 0 for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"{vocab_file}: the ids are not 0 to {len(ids) - 1}, once each")
    merges = list(_merges(merges_file))
    made = {left + right for left, right in merges}
    for left, right in merges:
        if lost := [part for part in (left, right, left + right) if part not in vocab]:
            raise ValueError(f"{merges_file}: the merge {left} {right} needs {lost[0]!r}, which vocab.json has not")
    if lost := [letter for letter in BYTE_OF_LETTER if letter not in vocab]:
        raise ValueError(
            f"{vocab_file}: no entry for byte 0x{BYTE_OF_LETTER[lost[0]]:02x}: not a byte-level vocabulary"
        )
    rest = {token: i for token, i in vocab.items() if token not in made and token not in BYTE_OF_LETTER}
    if strange := [token for token in rest if not (token[:1] in "<[" and token[-1:] in ">]" and len(token) > 2)]:
        raise ValueError(
            f"{merges_file}: {len(strange)} entries of vocab.json, as {strange[0]!r}, have no merge: cut off?"
        )
    return _byte_level(_bpe(vocab, merges, rest), GPT2), {"bos_token": END, "eos_token": END} if END in rest else {}


def _merges(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(sieve.text(file, "utf-8-sig").split("\n"), start=1):
        if line.startswith("#version") or not line.strip():
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{file}:{number}: expected two parts with a space between them, got {line[:60]!r}")
        yield parts[0], parts[1]


def _json(file: Path) -> Raw:
    try:
        value = json.loads(sieve.text(file, "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({error}); cut off?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


# Ranks (tiktoken)


def _looks_like_ranks(data: bytes) -> bool:
    """Whether the first line is base64 and a number, which no protocol buffer's is."""
    first = data[:4096].split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit() and all(33 <= byte < 127 for byte in first[0])


def _tiktoken(file: Path, data: bytes, rules: str | None) -> tuple[Raw, Raw]:
    ranks = _ranks(file, data)
    size = max(ranks.values()) + 1
    name = rules or (file.stem if file.suffix == ".tiktoken" else "llama3")
    known = KNOWN.get(name)
    if known is None and rules is None:
        raise ValueError(
            f"{file}: ranks do not say how text is split; known by name: {', '.join(KNOWN)}. Name one after a #,"
            f" {file.name}#cl100k_base, or the regular expression itself"
        )
    if known is None:
        known = Known(len(ranks), _checked(file, name), {END: size})
    elif len(ranks) != known.n_ranks:
        raise ValueError(f"{file}: {len(ranks)} ranks, but {name} has {known.n_ranks}: cut off, or another vocabulary")
    vocab = {_spelled(token): rank for token, rank in ranks.items()}
    if known.special.keys() & vocab.keys() or set(known.special.values()) & set(vocab.values()):
        raise ValueError(f"{file}: a rank has the name or the id of a control token of {name[:40]}: another vocabulary")
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and (pair := parts_of(token, ranks.get)):  # the others are only ever whole pieces of text
            merges.append((_spelled(pair[0]), _spelled(pair[1])))
    raw = _byte_level(_bpe(vocab, merges, known.special, ignore_merges=True), known.pattern)
    if known.nfc:
        raw["normalizer"] = {"type": "NFC"}
    return raw, {"bos_token": known.start, "eos_token": known.end}


def _ranks(file: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    n_lines = 0
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
            n_lines += 1
        except ValueError:
            got = line[:60].decode("utf-8", errors="replace")
            raise ValueError(
                f"{file}:{number}: expected base64 and a rank, as a tiktoken file has them, got {got!r}"
            ) from None
    if not ranks:
        raise ValueError(f"{file}: holds no ranks")
    if len(set(ranks.values())) != n_lines or len(ranks) != n_lines or min(ranks.values()) < 0 or b"" in ranks:
        raise ValueError(f"{file}: a rank or a token occurs twice, a rank is negative or a token is empty")
    if max(ranks.values()) > len(ranks) + 1000:
        raise ValueError(f"{file}: {len(ranks)} ranks up to {max(ranks.values())}: most are missing")
    if lost := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{file}: no rank for byte 0x{lost[0]:02x}: cut off, or not a byte-level vocabulary")
    return ranks


def _checked(file: Path, pattern: str) -> str:
    """A pattern of the user's, if Oniguruma, which splits here, reads it as tiktoken's engine does."""
    if re.search(r"\{[\d,]+\}\+", pattern) or "$" in pattern.replace(r"\$", ""):
        raise ValueError(
            rf"{file}: in the pattern write (?>x{{1,3}}) for x{{1,3}}+ and \z for $, which mean something else here"
        )
    return pattern


# SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODELS: Mapping[object, str] = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SPACE = "▁"
SPACES = (rf"\A +|[ {SPACE}]+\z", r" {2,}")  # at the ends, and in a row


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: an integer, or the bytes of a string, message or float."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(data) or shift > 63:
                raise ValueError("a number is cut off")
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size = varint()
        if size is None or position + size > len(data):
            raise ValueError("a field is cut off or of an unknown kind")
        position += size
        yield number, data[position - size : position]


def _message(data: int | bytes) -> dict[int, int | bytes]:
    """The last value of each field."""
    if isinstance(data, int):
        raise ValueError("a number where a message was expected")
    return dict(_fields(data))


def _name(value: int | bytes | None) -> str:
    if not isinstance(value, bytes):
        raise ValueError("no text where a piece was expected")
    return value.decode("utf-8")


@dataclass
class _Model:
    pieces: list[tuple[str, float, int]]  # text, score, type; the index is the id
    trainer: dict[int, int | bytes]
    normalizer: dict[int, int | bytes]


def _parse(file: Path, data: bytes) -> _Model:
    pieces, specs = [], {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = _message(value)
                score = piece.get(2, b"\0\0\0\0")
                kind = piece.get(3, NORMAL)
                if not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
                    raise ValueError("a piece without a score and a type")
                pieces.append((_name(piece.get(1)), struct.unpack("<f", score)[0], kind))
            elif number in (2, 3):
                specs[number] = _message(value)
    except ValueError as error:
        raise ValueError(f"{file}: not a whole SentencePiece model ({error}); copy or download it again") from None
    if not pieces or len(specs) < 2:
        raise ValueError(
            f"{file}: not a whole SentencePiece model: it lacks pieces, trainer_spec or normalizer_spec; copy or"
            " download it again"
        )
    return _Model(pieces, specs[2], specs[3])


def _sentencepiece(file: Path, data: bytes) -> tuple[Raw, Raw]:
    model = _parse(file, data)
    _check_supported(file, model)
    names = [name for name, _, _ in model.pieces]
    kinds = {name: kind for name, _, kind in model.pieces}
    special = {name: i for i, (name, _, kind) in enumerate(model.pieces) if kind in (CONTROL, UNKNOWN)}
    raw = _bpe(
        {name: i for i, name in enumerate(names)},
        _sentencepiece_merges(file, model),
        special,
        unk_token=next((name for name in names if kinds[name] == UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=bool(model.trainer.get(35, 0)),
    )
    steps: list[Raw] = []
    if model.normalizer.get(4, 1):  # remove_extra_whitespaces
        steps += [_replace({"Regex": pattern}, to) for pattern, to in zip(SPACES, ("", " "), strict=True)]
    dummy = bool(model.normalizer.get(3, 1))
    steps += [{"type": "Prepend", "prepend": SPACE}] if dummy else []
    raw["normalizer"] = {"type": "Sequence", "normalizers": [*steps, _replace({"String": " "}, SPACE)]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dummy else []
    decoders = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    raw["decoder"] = {"type": "Sequence", "decoders": decoders}
    wanted = {
        "bos_token": (46, b"<s>"),
        "eos_token": (47, b"</s>"),
        "pad_token": (48, b"<pad>"),
        "unk_token": (45, b"<unk>"),
    }
    config = {key: _name(model.trainer.get(number, default)) for key, (number, default) in wanted.items()}
    return raw, {key: name for key, name in config.items() if name in special}


def _replace(pattern: Raw, content: str) -> Raw:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _check_supported(file: Path, model: _Model) -> None:
    """ValueError naming everything in the model that would give other ids here."""
    lacks = []
    kind = model.trainer.get(3, 1)
    if kind != 2:
        lacks.append(f"model_type {MODELS.get(kind, kind)} (supported: bpe)")
    if model.normalizer.get(2):
        lacks.append(f"normalization {_name(model.normalizer.get(1, b'')) or 'of its own'} (supported: identity)")
    if not model.normalizer.get(5, 1):
        lacks.append("escape_whitespaces: false")
    if model.trainer.get(24, 0):
        lacks.append("treat_whitespace_as_suffix")
    kinds = {kind for _, _, kind in model.pieces}
    lacks += ["user-defined symbols"] * (USER_DEFINED in kinds) + ["unused pieces"] * (UNUSED in kinds)
    if lacks:
        raise ValueError(f"{file}: this SentencePiece model needs what is not supported: {'; '.join(lacks)}")
    names = [name for name, _, _ in model.pieces]
    if len(set(names)) != len(names) or not all(names):
        raise ValueError(f"{file}: a piece is empty or occurs twice")
    n_bytes = sum(kind == BYTE for _, _, kind in model.pieces)
    if bool(model.trainer.get(35, 0)) != (n_bytes == 256) or n_bytes not in (0, 256):
        raise ValueError(f"{file}: {n_bytes} byte pieces; expected all 256 with byte_fallback, else none")


def _sentencepiece_merges(file: Path, model: _Model) -> list[tuple[str, str]]:
    """Merges in the order of the pieces' scores, best first."""
    scores = {name: -score for name, score, kind in model.pieces if kind == NORMAL}
    found = [(scores[name], pair) for name in scores if len(name) > 1 and (pair := parts_of(name, scores.get))]
    found.sort(key=lambda item: item[0])
    for (score, left), (following, right) in pairwise(found):
        if score == following:
            raise ValueError(f"{file}: {''.join(left)!r} and {''.join(right)!r} have the same score; which is first?")
    for _, pair in found:
        if lost := [part for part in pair if part not in scores]:
            raise ValueError(f"{file}: {''.join(pair)!r} holds {lost[0]!r}, which is no piece")
    return [pair for _, pair in found]
