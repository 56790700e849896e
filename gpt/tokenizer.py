"""Text to ids and back: train, import, encode, decode, fingerprint. No control token is read from text or added to it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from math import log2
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from gpt import durable, sieve, vocabularies
from gpt.vocabularies import BYTE_OF_LETTER, END

Kind = Literal["bpe", "char", "word", "ids"]  # ids: decimal numbers with a space between them

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL = (END, IM_START, IM_END, *(f"<|reserved_{i}|>" for i in range(5)))
CHATML = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8")
UNKNOWN = "<|unk|>"  # only in vocabularies of characters or words: bytes know everything

# The pre-tokenizer of DeepSeek-V3, which llama.cpp knows as "deepseek-v3": digits by at most three, Han and kana apart
# from other letters, then words with what stands before them, punctuation and space.
HAN_AND_KANA = "[一-龥぀-ゟ゠-ヿ]"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    HAN_AND_KANA + "+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
CHARACTERS = (r"(?m:.)",)
WORDS = (HAN_AND_KANA, r"[\p{L}\p{M}\p{N}_]+|(?m:.)")
PATTERNS: Mapping[str, tuple[str, ...]] = {"bpe": DEEPSEEK_V3, "char": CHARACTERS, "word": WORDS}

# Expressions that need no trial: our own, and those of published vocabularies.
TRUSTED = frozenset(
    {pattern for patterns in PATTERNS.values() for pattern in patterns}
    | {known.pattern for known in vocabularies.KNOWN.values()}
    | set(vocabularies.SPACES)
)

NO_UNKNOWN = "<|none|>"  # names no entry: what is not in the vocabulary is an error
BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")

MIN_VOCAB_SIZE = 256 + len(SPECIAL)
MIN_FREQUENCY = 2  # a merge or word that was seen once is no pattern
MAX_GAP = 1 << 16  # ids without an entry, beside three for each that has one
PIECE_CHARACTERS = 1 << 17  # longer texts of our own tokenizers are encoded in pieces: in parallel, in bounded memory


def default_vocab_size(n_bytes: int) -> int:
    """The square root of the corpus's bytes, rounded to a power of two, from 512 to 65536."""
    return min(max(2 ** round(log2(max(n_bytes, 1)) / 2), 512), 1 << 16)


class Tokenizer:
    """A vocabulary and its rules. Make one by `train` or `Tokenizer.load`.

    `raw` is the content of tokenizer.json, `config` what tokenizer_config.json says of control tokens. ValueError in
    words if they do not fit together. `vocab` has every entry's id, `size` is one more than the largest.
    """

    def __init__(self, raw: dict[str, Any], config: Mapping[str, Any], where: str = "tokenizer.json") -> None:
        self._raw, self._where = raw, where
        try:
            sieve.check(raw, TRUSTED)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # Never used: the ids of a text are those of its pieces, all of them and nothing else.
        unused = {"post_processor": None, "truncation": None, "padding": None}
        with self._guard("cannot be loaded: "):
            self._backend = Backend.from_str(json.dumps({**raw, **unused}))
            self._backend.encode_special_tokens = True  # text is text; this is not stored in the file
        self.vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        if not self.vocab:
            raise ValueError(f"{where}: the vocabulary is empty")
        added = self._backend.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in added.items() if token.special)
        self.size = max(self.vocab.values()) + 1
        if self.size > 4 * len(self.vocab) + MAX_GAP:  # tables of all ids are made
            raise ValueError(f"{where}: {len(self.vocab):,} entries with ids up to {self.size - 1:,}: most are missing")
        self.padded_size = -(-self.size // 64) * 64
        self._config = self._completed(config)
        self._check_text_is_text()
        self.start_id, self.end_id = self.vocab[self._config["bos_token"]], self.vocab[self._config["eos_token"]]
        self.pad_id = self.vocab[self._config["pad_token"]]
        self.chat_template: str | None = self._config.get("chat_template")  # run by gpt.chat alone, in a sandbox

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a tokenizer.json, or the one in a data set, checkpoint, model directory or run (its newest checkpoint),
        or one of the files that `vocabularies` imports.

        Raises FileNotFoundError or ValueError in words; nothing in the file can run code.
        """
        file, rules = _find(path)
        beside = file.with_name("tokenizer_config.json")
        for each in (beside, file.with_name("chat_template.jinja")):
            if each.is_symlink():
                durable.plain(each)
        config = _read_json(beside) if beside.is_file() else {}
        if (template := file.with_name("chat_template.jinja")).is_file():  # where newer directories keep it
            config["chat_template"] = sieve.text(template)  # as transformers has it, whatever stands beside
        if not vocabularies.is_one(file, rules):
            return cls(_read_json(file), config, str(file))
        raw, own = vocabularies.read(file, rules)
        return cls(raw, own | {key: value for key, value in config.items() if value is not None}, str(file))

    def _completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """tokenizer_config.json as we write it: transformers' class that changes nothing, and the control tokens."""
        names = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(key)
            name = value.get("content") if isinstance(value, dict) else value
            if name is not None and not (isinstance(name, str) and name in self.vocab):
                raise ValueError(f"{self._where}: {key} {name!r} of tokenizer_config.json is not in the vocabulary")
            names[key] = name
        fallback = END if END in self.vocab else None
        start = names["bos_token"] or fallback or names["eos_token"]
        if start is None:
            raise ValueError(
                f"{self._where}: no start or end token: it needs a tokenizer_config.json beside it that names bos_token"
                f" or eos_token, or {END} in the vocabulary"
            )
        end = names["eos_token"] or fallback or start
        names |= {"bos_token": start, "eos_token": end, "pad_token": names["pad_token"] or end}
        template = config.get("chat_template")
        if isinstance(template, list):  # several, each under a name
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
            template = named.get("default")
        kept = {"chat_template": template} if isinstance(template, str) else {}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Others write a conversation out as text and read its control tokens from it; without chats, text is text.
            "split_special_tokens": not kept,
            "clean_up_tokenization_spaces": False,
            **({} if self._marks_texts() else {"add_bos_token": False, "add_eos_token": False}),
            **{key: name for key, name in names.items() if name is not None},
            **kept,
        }

    def _marks_texts(self) -> bool:
        """Whether a text gets control tokens by a rule of the file, which transformers would drop if it were told of none."""
        return '"TemplateProcessing"' in json.dumps(self._raw.get("post_processor"))

    def _check_text_is_text(self) -> None:
        """No control token may come from text that reads like it, which some vocabularies would look up as a word."""
        names = [(name, token) for name, token in self.vocab.items() if token in self._never_text]
        if len(names) > len(self._never_text):
            raise ValueError(f"{self._where}: two entries of the vocabulary have the id of one control token")
        for name, token in names:
            got = list[int]()
            with suppress(ValueError), self._guard(""):  # what cannot be encoded is no control token either
                got = self._backend.encode(name, add_special_tokens=False).ids
            if token in got:
                raise ValueError(
                    f"{self._where}: the text {name!r} would become the control token of that name; the pre-tokenizer"
                    " has to split it, or the model's vocabulary must leave it to added_tokens"
                )

    @cached_property
    def _never_text(self) -> frozenset[int]:
        return self.control_ids - {self.unknown_id}

    def _as_text(self, ids: list[int]) -> list[int]:
        """`ids`, which are of a text; where rules rewrite it first, another text may become what control tokens read like."""
        if self._raw.get("normalizer") is not None and not self._never_text.isdisjoint(ids):
            raise ValueError(
                f"{self._where}: its normalizer makes a control token of a text; such a vocabulary is not used"
            )
        return ids

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Turn what the native library throws into a ValueError: its panics are no `Exception`."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise ValueError(f"{self._where}: {what}{error}") from None

    @contextmanager
    def _guard_text(self, texts: Sequence[str]) -> Iterator[None]:
        """`_guard` for encoding `texts`; what a vocabulary of ids does not hold is named."""
        try:
            with self._guard("encoding failed: "):
                yield
        except ValueError:
            if self._raw["model"].get("unk_token") != NO_UNKNOWN:
                raise
            numbers = self._raw["model"]["vocab"]
            word = next((word for text in texts for word in text.split() if word not in numbers), "")[:40]
            raise ValueError(f"{word!r} is no id of this vocabulary: expected 0 to {len(numbers) - 1}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; what looks like a control token in it is text."""
        return self.encode_each([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        pieces = [self._pieces(text) for text in texts]
        with self._guard_text(texts):
            flat = self._backend.encode_batch_fast([p for some in pieces for p in some], add_special_tokens=False)
        encoded = (self._as_text(each.ids) for each in flat)
        return [[i for _ in some for i in next(encoded)] if len(some) > 1 else next(encoded) for some in pieces]

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on one core: for worker processes, which have the others."""
        encode = self._backend.encode
        with self._guard_text(texts):
            return [
                [i for piece in self._pieces(text) for i in self._as_text(encode(piece, add_special_tokens=False).ids)]
                for text in texts
            ]

    def encode_unit(self, text: str) -> list[int]:
        """`encode` of a short text, with less around it."""
        try:
            return self._as_text(self._backend.encode(text, add_special_tokens=False).ids)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:
            return self.encode(text)  # which says in words what is wrong

    def words(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and the number of the pre-token that each id lies in: two int64 arrays. No merge crosses those."""
        ids, words, before = [], [], 0
        with self._guard_text([text]):
            for piece in self._pieces(text):
                encoding = self._backend.encode(piece, add_special_tokens=False)
                ids.append(np.array(self._as_text(encoding.ids), dtype=np.int64))
                words.append(np.array(encoding.word_ids, dtype=np.int64) + before)
                before = words[-1][-1] + 1 if len(words[-1]) else before
        return np.concatenate(ids), np.concatenate(words)

    def _pieces(self, text: str) -> list[str]:
        """Parts of a long text whose ids joined are the ids of the whole.

        All our patterns, whatever surrounds it, split between a line feed and an ASCII letter, and no match looks
        across. An imported tokenizer may do otherwise, so its texts stay whole.
        """
        if len(text) <= PIECE_CHARACTERS or not self._is_ours:
            return [text]
        pieces, start = [], 0
        while len(text) - start > PIECE_CHARACTERS:
            cut = _line_start(text, start + PIECE_CHARACTERS)
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]] if start < len(text) else pieces

    @cached_property
    def _is_ours(self) -> bool:
        ours = [json.loads(_bare(kind).to_str())["pre_tokenizer"] for kind in PATTERNS]
        return self._raw.get("normalizer") is None and self._raw.get("pre_tokenizer") in ours

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; control tokens are left out, bytes that form no character become U+FFFD."""
        with self._guard("decoding failed: "):
            return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, after: Sequence[int] = ()) -> "Stream":
        """A decoder to push ids into one by one; `after` are the ids before them, which it does not repeat."""
        return Stream(self._backend, after)

    def piece(self, token: int) -> str:
        """How a token is shown: its text, or its bytes as `\\xe4` where they are no whole character."""
        if token in self.control_ids:
            return self._names.get(token, "")
        return self.token_bytes(token).decode("utf-8", errors="backslashreplace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for a control token or an id without one."""
        name = self._names.get(token)
        if name is None or token in self.control_ids:
            return b""
        if self._spelling == "letters":
            with suppress(KeyError):
                return bytes([BYTE_OF_LETTER[letter] for letter in name])
        if self._spelling == "marks":  # SentencePiece's: a byte by its number, a space as a low line of its own
            return bytes([int(name[3:5], 16)]) if BYTE_NAME.fullmatch(name) else name.replace("▁", " ").encode()
        return self.decode([token]).encode()

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(size,) int64: `len(token_bytes(i))` of every id."""
        return np.array([len(self.token_bytes(token)) for token in range(self.size)], dtype=np.int64)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self.vocab.items()}

    @cached_property
    def _spelling(self) -> Literal["letters", "marks", "text"]:
        """How the vocabulary writes bytes: as GPT-2's letters, with SentencePiece's marks, or as text."""
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            return "letters"
        return "marks" if self._raw["model"].get("byte_fallback") or "▁" in str(self._raw.get("decoder")) else "text"

    def split_characters(self, text: str) -> list[str]:
        """The characters of `text`, once each, that the vocabulary cuts into bytes or does not know."""
        unknown = self.unknown_id
        found = zip(dict.fromkeys(text), self.encode_batch(list(dict.fromkeys(text))), strict=True)
        return [char for char, ids in found if len(ids) > 1 or ids == [unknown]]

    @property
    def unknown_id(self) -> int | None:
        """The id of what the vocabulary does not hold; None for a vocabulary of bytes, which holds everything."""
        if self._spelling == "letters" or self._raw["model"].get("byte_fallback"):
            return None
        return self.vocab.get(self._raw["model"].get("unk_token") or UNKNOWN)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the vocabulary and its rules, whatever the layout of the file."""
        text = json.dumps(self._raw, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def raw(self) -> Mapping[str, Any]:
        """The content of tokenizer.json."""
        return self._raw

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of tokenizer_config.json, as it is written."""
        return self._config

    def files(self) -> dict[str, bytes]:
        """What a data set or checkpoint stores: tokenizer.json, and tokenizer_config.json, without which transformers
        would swap in the pre-tokenizer of a model type."""
        return {
            "tokenizer.json": (json.dumps(self._raw) + "\n").encode(),  # indented it takes Python's slow encoder
            "tokenizer_config.json": (json.dumps(self._config, indent=1) + "\n").encode(),
        }


class Stream:
    """Text of ids as they come: never a broken character. `flush` gives the rest at the end."""

    def __init__(self, backend: Backend, after: Sequence[int] = ()) -> None:
        self._backend = backend
        last = list(after[-4:])  # enough to know whether a space stands between them and what comes
        if backend.decode(last, skip_special_tokens=True)[-1:] in ("", "\ufffd"):
            last = []
        self._decoder = DecodeStream(last, skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str | None:
        """The text that has become certain, or None while a character is incomplete."""
        self._held.append(token)
        try:
            text = self._decoder.step(self._backend, token)
        except Exception:  # after bytes that form no character the library has lost its place
            held, text = self._held, self.flush()
            self._decoder = DecodeStream(held[-4:], skip_special_tokens=True)
            return text
        if text is not None:
            self._held.clear()
        return text

    def flush(self) -> str:
        """The text of what was pushed and not given yet; U+FFFD stands for what never became a character."""
        held, self._held = self._held, []
        self._decoder = DecodeStream(skip_special_tokens=True)
        return self._backend.decode(held, skip_special_tokens=True)


def train(texts: Iterable[str], kind: Kind, vocab_size: int | None, *, corpus_bytes: int = 0) -> Tokenizer:
    """Learn a vocabulary of byte-level BPE, of single characters or of words, control tokens included in its size.
    Of ids, `vocab_size` says how many there are, 0 .. vocab_size - 1; the start token comes after them, and the texts
    are not read.

    Without `vocab_size` it follows `corpus_bytes` by `default_vocab_size` (characters: all of them), or is smaller if
    the texts have no more. ValueError if a stated size is less than the bytes need or more than the texts support.
    """
    if kind == "ids":
        return _of_ids(vocab_size)
    smallest = MIN_VOCAB_SIZE if kind == "bpe" else len(SPECIAL) + 2
    if vocab_size is not None and vocab_size < smallest:
        parts = f"256 bytes and {len(SPECIAL)} control tokens" if kind == "bpe" else "the control tokens and one entry"
        raise ValueError(f"vocab_size: {vocab_size} is too small: {parts} need {smallest}")
    backend = _bare(kind)
    size = vocab_size or (default_vocab_size(corpus_bytes) if kind != "char" else 1 << 16)
    _TRAIN[kind](backend, texts, size)
    got = backend.get_vocab_size(with_added_tokens=True)
    if vocab_size is not None and got < vocab_size:
        raise ValueError(
            f"vocab_size: {vocab_size} is more than the text supports: it has {got} entries, everything that occurs "
            f"{'once' if kind == 'char' else 'twice'} included; set vocab_size={got} or less, or leave it out"
        )
    unknown = {} if kind == "bpe" else {"unk_token": UNKNOWN}
    names = {"bos_token": END, "eos_token": END, **unknown}
    return Tokenizer(json.loads(backend.to_str()), names | {"chat_template": CHATML})


def _bare(kind: str) -> Backend:
    """The rules of a kind, without a vocabulary."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[kind]]
    if kind != "bpe":
        backend = Backend(models.WordLevel(unk_token=UNKNOWN))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(splits), decoders.Fuse()
        return backend
    backend = Backend(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*splits, to_bytes]), decoders.ByteLevel()
    return backend


def _of_ids(size: int | None) -> Tokenizer:
    """A vocabulary whose entries are the decimal numbers below `size`, each its own id."""
    if size is None or size < 1:
        raise ValueError(f"vocab_size: {size} for kind ids; say how many ids there are: one more than the largest")
    backend = Backend(models.WordLevel({str(i): i for i in range(size)}, unk_token=NO_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END])  # outside the model's vocabulary, where no word of a text can find it
    return Tokenizer(json.loads(backend.to_str()), {"bos_token": END, "eos_token": END})


def _train_bpe(backend: Backend, texts: Iterable[str], size: int) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)


def _train_words(backend: Backend, texts: Iterable[str], size: int) -> None:
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, min_frequency=MIN_FREQUENCY, special_tokens=[*SPECIAL, UNKNOWN], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)


def _train_characters(backend: Backend, texts: Iterable[str], size: int) -> None:
    """Count in Python: one pass of a Counter is faster than splitting every character off as a word."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    first = sorted(counts, key=lambda char: (-counts[char], char))[: size - len(SPECIAL) - 1]
    vocab = {token: i for i, token in enumerate([*SPECIAL, UNKNOWN, *first])}
    backend.model = models.WordLevel(vocab, unk_token=UNKNOWN)
    backend.add_special_tokens([*SPECIAL, UNKNOWN])


_TRAIN: Mapping[str, Callable[[Backend, Iterable[str], int], None]] = {
    "bpe": _train_bpe,
    "char": _train_characters,
    "word": _train_words,
}


def _line_start(text: str, position: int) -> int:
    """The first place from `position` on where an ASCII letter follows a line feed; the end if there is none."""
    while (position := text.find("\n", position) + 1) and position < len(text):
        if text[position].isascii() and text[position].isalpha():
            return position
    return len(text)


def _find(path: Path) -> tuple[Path, str | None]:
    """The file that `path` means, and what follows a # in it: the rules of a vocabulary that does not bring its own.

    A file that is found in a directory, or stands beside one that is named, is no link: ValueError.
    """
    text, mark, rules = str(path).partition("#")
    if mark and not path.exists():
        path = Path(text)
    if path.is_file():
        return path, rules or None
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; name a tokenizer.json or a directory that holds one")
    checkpoints = sorted((path / "checkpoints").glob("step_*/tokenizer.json"))
    for file in (path / "tokenizer.json", *reversed(checkpoints), *vocabularies.files(path)):
        if file.is_symlink() or file.is_file():
            return durable.plain(file), rules or None
    raise FileNotFoundError(
        f"{path} holds no tokenizer.json, nor a checkpoint with one, vocab.json and merges.txt, tokenizer.model or a"
        " .tiktoken file"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(sieve.text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); a tokenizer comes as a tokenizer.json") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
