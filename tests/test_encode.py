"""Every way of encoding has the ids of Tokenizer.encode: units and words end where pre-tokens do, and gigatoken is believed
only as far as it is checked."""

import json
import sys
import sysconfig
import types
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import encode, vocabularies
from gpt import tokenizer as tokenizers
from gpt.encode import AWKWARD, Encoder
from gpt.shards import token_dtype
from gpt.tokenizer import Tokenizer

TEXT = "\n".join(AWKWARD) + (
    "\nThe quick brown fox doesn't jump over the lazy dog; she'll see 1234 foxes (and 56 dogs) tomorrow.\n\n"
    "def jump(self, fox: str) -> bool:\n    return fox.lower() not in self.dogs  # café naïve\n\n"
    "春江潮水連海平，海上明月共潮生。灩灩隨波千萬里，何處春江無月明！\n江流宛轉遶芳甸，月照花林皆似霰。\n"
)
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
IMPORTED = {"cl100k": vocabularies.CL100K, "qwen": vocabularies.QWEN, "o200k": vocabularies.O200K}
FAMILIES = ["bpe", "gpt2", *IMPORTED, "qwen+nfc"]


def level(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, LEVEL | {"use_regex": False}]}


@cache
def tokenizer(kind: str) -> Tokenizer:
    """A small vocabulary under the rules of `kind`, with merges of everything in TEXT."""
    if kind in ("char", "word"):
        return tokenizers.train([TEXT, TEXT], kind, None)
    if kind == "ids":
        return tokenizers.train([], "ids", 70_000)
    ours = tokenizers.train([TEXT, TEXT], "bpe", 1000)
    if kind == "bpe":
        return ours
    raw = json.loads(ours.files()["tokenizer.json"])
    pattern = IMPORTED.get(kind.removesuffix("+nfc"))
    raw["pre_tokenizer"] = level(pattern) if pattern else LEVEL | {"use_regex": True}
    raw["normalizer"] = {"type": "NFC"} if kind.endswith("+nfc") else None
    return Tokenizer(raw, {"bos_token": tokenizers.END, "eos_token": tokenizers.END})


@cache
def encoder(kind: str, fast: bool = False) -> Encoder:
    return Encoder(tokenizer(kind), fast=fast)


def same(kind: str, texts: list[str], fast: bool = False) -> None:
    got, dtype = encoder(kind, fast).encode(texts), token_dtype(tokenizer(kind).size)
    assert len(got) == len(texts)
    for text, ids in zip(texts, got, strict=True):
        assert ids.dtype == dtype
        assert ids.tolist() == tokenizer(kind).encode(text), repr(text)


SPACES = " \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b"
ATOMS = [
    *("a b A Z it s t re ll ſ x" + " 1 2 12 123 ½ ٣ Ⅷ" + " . , ' ( ) \" _ $ / // # <" + " é ñ \u0301 \u20dd ß Я ж ك").split(),
    *"“”·—…，。「」！～々〇㐀𠀀春江月の カー・゠゙ﾊ가😀\0\1\x02\x7f\ufeff",
    *SPACES, *(" " * 4), "  ", "    ", "\n\n", "\n  ", " \n", "\r\n", "\n\t", "春江", "月明", "’s", "'s", "'LL",
]  # fmt: skip
mixed = st.lists(st.sampled_from(ATOMS), max_size=24).map("".join)
texts = st.lists(
    st.one_of(mixed, st.text(max_size=20), st.text(st.characters(max_codepoint=127), max_size=30)), max_size=5
)


# Where text is cut


@cache
def pre_tokenizer(kind: str):
    return tokenizers.Backend.from_str(tokenizer(kind).files()["tokenizer.json"].decode()).pre_tokenizer


def split(kind: str, parts: list[str]) -> list[str]:
    return [token for part in parts for token, _ in pre_tokenizer(kind).pre_tokenize_str(part)]


def units(kind: str, text: str) -> list[str]:
    """What is encoded on its own."""
    way = encoder(kind)._way
    data = text.encode()
    starts = way._rules.starts(data, None)
    return [data[start:end].decode() for start, end in pairwise([*starts.tolist(), len(data)])]


def cut_rightly(kind: str, text: str) -> bool:
    """Whether the pre-tokens of the parts are those of the whole, for units and for pieces."""
    place = encoder(kind)._way._rules._place
    pieces = [0, *(found.start() for found in place.finditer(text)), len(text)]
    whole = split(kind, [text])
    return split(kind, units(kind, text)) == split(kind, [text[a:b] for a, b in pairwise(pieces)]) == whole


SPLIT = ["bpe", "gpt2", "cl100k", "qwen", "o200k", "word", "ids"]


@pytest.mark.parametrize("kind", SPLIT)
@settings(max_examples=600)
@given(text=st.one_of(mixed, st.text(max_size=30)))
def test_units_end_where_pre_tokens_do(kind, text):
    text = text.replace("\0", "").replace("\1", "")
    assert not text or cut_rightly(kind, text)


@pytest.mark.parametrize("kind", SPLIT)
def test_units_end_where_pre_tokens_do_in_all_short_strings_of_awkward_characters(kind):
    """Every string of three between plain ones: what no sample would miss."""
    few = [" ", "\n", "\t", "\r", "\x1c", "\xa0", "a", "é", "\u0301", ".", "'", "“", "1", "½", "春", "/"]
    around = [("x", "y"), (")", " 春"), ("\n", "\n")]
    for text in (f"{left}{a}{b}{c}{right}" for a in few for b in few for c in few for left, right in around):
        assert cut_rightly(kind, text), repr(text)


@pytest.mark.parametrize("kind", SPLIT)
def test_texts_that_are_cut_together_do_not_touch(kind):
    """No unit crosses END, and none beside it is cut for what stands behind it."""
    for text, after in [
        ("a  ", "b"),
        ("a", " b"),
        ("\n", "a"),
        ("\n ", "\na"),
        ("春", "江"),
        ("x'", "s"),
        ("1", "2"),
        (" ", " "),
    ]:
        got = units(kind, text + "\1" + after + "\1")
        assert "".join(got) == text + "\1" + after + "\1" and got.count("\1") == 2
        assert split(kind, got[: got.index("\1")]) == split(kind, [text])


def test_ordinary_text_is_cut_into_small_units():
    """What repeats is what is short."""
    for kind in FAMILIES[:-1]:
        found = units(kind, "The fox (who doesn't care) sees 1234 dogs.\n\n    return self.dogs\n" * 9)
        assert max(map(len, found)) <= 12 and len(set(found)) <= 25


def test_characters_that_composition_leaves_alone_are_just_that():
    inside = [c for c in map(chr, range(0x110000)) if not 0xD800 <= ord(c) < 0xE000 and encode._UNTOUCHED.match(c)]
    assert len(inside) > 30_000
    text = "".join(inside)
    assert unicodedata.is_normalized("NFC", text)
    for before in "eか가\u1100":  # as with a mark behind them, or a vowel
        assert unicodedata.normalize("NFC", "".join(before + c for c in inside)) == "".join(before + c for c in inside)


# Ids


@pytest.mark.parametrize("kind", ["char", "word", *FAMILIES])
def test_awkward_texts_have_the_ids_of_the_tokenizer(kind):
    same(kind, [*AWKWARD, "", TEXT, TEXT * 3, "".join(AWKWARD)])


@pytest.mark.parametrize("kind", ["char", "word", *FAMILIES])
@settings(max_examples=150)
@given(texts=texts)
def test_any_texts_have_the_ids_of_the_tokenizer(kind, texts):
    same(kind, texts)


@settings(max_examples=150)
@given(texts=st.lists(st.text(" \n\t\x0b0123456789\u3000", max_size=20), max_size=4))
def test_ids_as_text_have_the_ids_of_the_tokenizer(texts):
    allowed = [text for text in texts if all(word in tokenizer("ids").vocab for word in text.split())]
    same("ids", allowed)


def test_what_is_no_id_is_named():
    with pytest.raises(ValueError, match="'70000' is no id of this vocabulary"):
        encoder("ids").encode(["1 2 3", "4 70000"])
    same("ids", ["1 2 3", "4 5"])


@settings(max_examples=100)
@given(text=st.text("春江潮水連海平明月共生灩隨波千萬里何處無，。\nのカー・゠ a", max_size=80))
def test_runs_of_han_are_cut_only_where_no_entry_holds_them_together(text):
    for kind in FAMILIES:
        same(kind, [text * 2])


def test_long_texts_are_cut_into_pieces(monkeypatch):
    monkeypatch.setattr(encode, "PIECE", 50)
    for kind in ["char", "word", *FAMILIES]:
        same(kind, [TEXT, "", TEXT[::-1], TEXT[7:]])


def test_a_table_that_is_full_begins_again(monkeypatch):
    monkeypatch.setattr(encode, "SLOTS", 64)
    monkeypatch.setattr(encode, "POOL", 100)
    monkeypatch.setattr(encode, "PIECE", 60)
    fresh = Encoder(tokenizer("bpe"), fast=False)
    for _ in range(2):
        assert [ids.tolist() for ids in fresh.encode([TEXT, *AWKWARD])] == tokenizer("bpe").encode_each(
            [TEXT, *AWKWARD]
        )


def test_no_more_long_units_are_kept_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(encode, "KEPT", 5)
    fresh = Encoder(tokenizer("bpe"), fast=False)
    long = [" " + "a" * n for n in (20, 30, 40, 50, 60, 70, 80, 90, 1000)]
    for _ in range(3):
        assert [ids.tolist() for ids in fresh.encode(long)] == tokenizer("bpe").encode_each(long)
    assert 0 < len(fresh._way._long) <= 5 and max(map(len, fresh._way._long)) <= encode.LONGEST


def test_units_that_differ_in_one_byte_are_told_apart():
    """Of any length around the table's: at its beginning, middle and end."""
    for n in range(1, 20):
        words = [bytes([97 + (i == k) * j for i in range(n)]).decode() for k in {0, n // 2, n - 1} for j in range(20)]
        same("bpe", words)
        same("bpe", [" ".join(words)])


def test_vocabularies_that_fill_two_bytes_have_room_for_what_separates_texts():
    ids = tokenizers.train([], "ids", 65_535)
    assert ids.size == 1 << 16
    got = Encoder(ids).encode(["65534 0", "1"])
    assert [part.tolist() for part in got] == [[65_534, 0], [1]] and got[0].dtype == np.uint16


# Rules that are not known


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"pre_tokenizer": level(r"\w+")}, "pre-tokenizer is not known"),
        ({"pre_tokenizer": None}, "pre-tokenizer is not known"),
        ({"pre_tokenizer": LEVEL | {"add_prefix_space": True, "use_regex": True}}, "pre-tokenizer is not known"),
    ],
)
def test_texts_of_other_rules_stay_whole(change, why):
    raw = json.loads(tokenizer("bpe").files()["tokenizer.json"]) | change
    other = Tokenizer(raw, {"bos_token": tokenizers.END})
    fresh = Encoder(other)
    assert fresh.how.startswith("tokenizers") and why in fresh.how
    assert [ids.tolist() for ids in fresh.encode([TEXT, "A b"])] == other.encode_each([TEXT, "A b"])


def test_added_tokens_that_are_found_in_text_are():
    raw = json.loads(tokenizer("bpe").files()["tokenizer.json"])
    raw["added_tokens"].append(raw["added_tokens"][-1] | {"id": 1000, "content": "fox (", "special": False})
    other = Tokenizer(raw, {"bos_token": tokenizers.END})
    fresh = Encoder(other)
    assert 1000 in fresh.encode(["a fox (b"])[0] and "added tokens" in fresh.how


# gigatoken


@pytest.mark.parametrize("kind", ["bpe", "gpt2", *IMPORTED])
def test_gigatoken_has_the_same_ids(kind):
    pytest.importorskip("gigatoken")
    assert encoder(kind, fast=True).how.startswith(("gigatoken ", "word cache (not gigatoken: "))
    assert kind != "bpe" or encoder(kind, fast=True).how.startswith("gigatoken ")
    same(kind, ["", *AWKWARD, TEXT * 3], fast=True)
    same(kind, [TEXT[i : i + 30] for i in range(0, len(TEXT), 30)], fast=True)


class Imitation:
    """What gigatoken offers, with the ids of the tokenizer, changed by `wrong`."""

    def __init__(self, wrong):
        self.wrong, self.n_loaded = wrong, 0

    def from_json(self, text):
        self.n_loaded += 1
        return self

    def encode(self, text):
        return np.array(self.wrong(text, tokenizer("bpe").encode(text)), dtype=np.uint32)


@pytest.fixture
def imitate(monkeypatch):
    def make(wrong=lambda text, ids: ids):
        imitation = Imitation(wrong)
        monkeypatch.setitem(sys.modules, "gigatoken", types.SimpleNamespace(Tokenizer=imitation))
        monkeypatch.setattr(encode.importlib.metadata, "version", lambda name: "9.9")
        return imitation

    return make


def test_without_gigatoken_words_are_cached(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert Encoder(tokenizer("bpe")).how == "word cache"


def test_gigatoken_is_not_used_when_awkward_texts_differ(imitate):
    imitate(lambda text, ids: ids[::-1])
    fresh = Encoder(tokenizer("bpe"))
    assert fresh.how.startswith("word cache (not gigatoken: it has other ids for '<|endoftext|>")
    assert fresh.encode([TEXT])[0].tolist() == tokenizer("bpe").encode(TEXT)


def test_gigatoken_is_not_used_when_it_breaks(imitate):
    def broken(text, ids):
        raise RuntimeError("unsupported")

    imitate(broken)
    assert Encoder(tokenizer("bpe")).how == "word cache (not gigatoken: unsupported)"


def test_gigatoken_is_left_at_the_first_text_that_differs(imitate):
    imitate(lambda text, ids: ids[:-2] + ids[-1:] + ids[-2:-1] if "unheard" in text else ids)
    fresh = Encoder(tokenizer("bpe"))
    assert fresh.how == "gigatoken 9.9 (ids checked)"
    assert fresh.encode(["an unheard of text"])[0].tolist() == tokenizer("bpe").encode("an unheard of text")
    assert fresh.how.startswith("word cache (not gigatoken: it has other ids for a text that begins 'an unheard")


@pytest.mark.parametrize("wrong", [lambda ids: [*ids[1:], ids[0]], lambda ids: ids[:-1], lambda ids: [*ids, 7]])
def test_a_difference_found_later_stops_everything(imitate, wrong):
    imitate(lambda text, ids: wrong(ids) if "unheard" in text else ids)
    fresh = Encoder(tokenizer("bpe"))
    fresh.encode(["fine", "too"])
    with pytest.raises(ValueError, match=r"gigatoken 9\.9 failed: .* delete the unfinished data set"):
        fresh.encode(["an unheard of text"])


def test_every_text_counts_its_bytes_and_some_are_compared(imitate):
    """Of many texts a lost byte is found wherever it is, and in turn each is compared."""
    imitate(lambda text, ids: ids[:-1] if "unheard" in text else ids)
    many = ["fine"] * 5000
    fresh = Encoder(tokenizer("bpe"))
    fresh.encode(many)
    with pytest.raises(ValueError, match="stand for"):
        fresh.encode([*many, "unheard of", *many])


def test_gigatoken_is_loaded_anew_when_its_cache_has_grown(imitate, monkeypatch):
    imitation = imitate()
    monkeypatch.setattr(encode.host, "resident_bytes", lambda: 0)
    monkeypatch.setattr(encode, "FULL_TEXT", 100)
    fresh = Encoder(tokenizer("bpe"))
    for _ in range(6):
        assert fresh.encode(["x" * 40])[0].tolist() == tokenizer("bpe").encode("x" * 40)
    assert imitation.n_loaded == 3


def test_control_tokens_of_a_text_are_text_to_gigatoken_too():
    pytest.importorskip("gigatoken")
    fresh = Encoder(tokenizer("bpe"))
    ids = fresh.encode(["<|endoftext|>" * 3])[0]
    assert tokenizer("bpe").start_id not in ids and ids.tolist() == tokenizer("bpe").encode("<|endoftext|>" * 3)


# The real thing


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "word", "char", "gpt2"])
def test_the_standard_library_has_the_ids_of_the_tokenizer(kind):
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    same(kind, sources)
    if kind in FAMILIES:
        same(kind, sources, fast=True)
