"""What a tokenizer.json may hold: every published kind of part passes, what could grow, hang or panic is refused in words."""

import base64
import gc
import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import tokenizer_files

from gpt import sieve, tokenizer, vocabularies
from gpt.tokenizer import SPECIAL, TRUSTED, Tokenizer

PUBLISHED = [
    *TRUSTED,
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"\p{N}+",
    r"[\r\n]",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    "[一-龥ࠀ-一가-퟿]+",
    r"(?=(\d{3})+(?!\d))",
    r"\p{Nd}|\p{Nl}|\p{No}",
    r"[[:alpha:]]+|[a-z&&[^aeiou]]+",
    r"(?<!\n)\n(?!\n)",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
]
ENDLESS = {
    "(a+)+$": "several ways",
    "(a|a)*b": "several ways",
    "(a|aa)+$": "several ways",
    "(.*)*x": "several ways",
    r"(\w+\s?)*z": "several ways",
    "(?:(?:a+)?)*b": "several ways",
    "(?>a+)+": "several ways",
    "(?:a?){50}a{50}": "several ways",
    "a?" * 30 + "a" * 30: "too many parts",
    ".*.*.*=.*x": "too many parts",
    "x*y*z*w*": "too many parts",
    "a{1,3}+b": "repeats a repetition",
    "a**": "repeats",
    "*": "repeats nothing",
    r"(a)\1": "refers back",
    r"(?<n>a)\k<n>": "group that is not known",
    r"(?<r>a\g<r>?b)": "group that is not known",
    "(?{x})": "not known",
    "(?~abc)": "not known",
    "(*FAIL)": "not known",
    "(?x)a b": "not known",
    "(?<=a+)b": "looks back",
    "(?=a)*": "no width",
    "^*": "no width",
    "(" * 50 + ")" * 50: "nested too deeply",
    "[" * 50 + "]" * 50: "nested too deeply",
    "a{1000}": "counts beyond",
    "(a": "does not close",
    "a)": "not opened",
    "[a": "does not close",
    "a" * 5000: "at most 4,096",
    r"\X+": "refers back",
}


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Seconds here are an expression's: a collection of the whole suite's garbage takes one of its own."""
    gc.disable()
    yield
    gc.enable()


def test_a_trial_that_is_slow_once_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    sieve.check_expression.cache_clear()
    real, slow = sieve._spent, [True]
    monkeypatch.setattr(
        sieve, "_spent", lambda split, text: real(split, text) + 2 * sieve.PROBE_S * bool(slow and slow.pop())
    )
    sieve.check_expression(r"\p{N}x")


@pytest.mark.parametrize("text", sorted(PUBLISHED))
def test_expressions_of_published_tokenizers_pass(text: str) -> None:
    sieve.check_expression(text)


@pytest.mark.parametrize("text", ENDLESS)
def test_an_expression_that_could_try_for_ever_is_refused_at_once(text: str) -> None:
    began = time.thread_time()
    with pytest.raises(ValueError, match=rf"cannot be loaded: .*({ENDLESS[text]})"):
        sieve.check_expression(text)
    assert time.thread_time() - began < 1


def test_an_expression_that_is_slow_on_trial_is_refused() -> None:
    began = time.thread_time()
    with pytest.raises(ValueError, match=r"tries for \d+\.\d\d s on \d+ times|fails on \d+ times"):
        sieve.check_expression(r"[ab]*[bc]*[ad]*\d")
    assert time.thread_time() - began < 30


def of(**changes: Any) -> dict[str, Any]:
    return dict(tokenizer.train(["to be or not\n" * 9], "bpe", None).raw) | changes


def table(expansion: bytes) -> dict[str, Any]:
    data = struct.pack("<I", 4) + bytes(4) + expansion
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


REPLACE = {"type": "Replace", "pattern": {"String": "e"}, "content": "eeee"}
TOKEN = {"id": 0, "content": "x", "special": True}
DEEP: Any = {"type": "NFC"}
for _ in range(20):
    DEEP = {"type": "Sequence", "normalizers": [DEEP]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": {"type": "Custom"}}, "type of normalizer 'Custom' is not known here; known are BertNormalizer"),
        ({"pre_tokenizer": {"type": ["x"]}}, "type of pre_tokenizer"),
        ({"decoder": "Fuse"}, "type of decoder 'None' is not known"),
        ({"model": {"type": "Neural"}}, "type of model 'Neural' is not known"),
        ({"model": None}, "it has no model"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 3}}, "more than 16 times as long"),
        ({"decoder": {"type": "Sequence", "decoders": [REPLACE] * 3}}, "more than 16 times as long"),
        ({"normalizer": REPLACE | {"pattern": {"String": ""}}}, "looks for an empty text"),
        ({"normalizer": REPLACE | {"pattern": {"Regex": "(e+)+$"}}}, "several ways"),
        ({"normalizer": REPLACE | {"content": 5}}, "normalizer Replace puts in what is no text"),
        ({"decoder": REPLACE | {"content": True}}, "decoder Replace puts in what is no text"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
            "does not close a group",
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 65}}, "more than 64 parts"),
        ({"normalizer": {"type": "Sequence"}}, "holds no list"),
        ({"normalizer": DEEP}, "nested more than 8 deep"),
        ({"normalizer": table(b"x" * 200)}, "lengthens a character to over 128 bytes"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "has no table"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 9999}}, "holds a text of 9,999 characters"),
        ({"decoder": {"type": "Strip", "content": " ", "start": 1 << 40, "stop": 0}}, "holds the number 1099511627776"),
        ({"decoder": {"type": "CTC", "pad_token": [[[[[[[[[[0]]]]]]]]]]}}, "nested more than 8 deep"),
        ({"added_tokens": [TOKEN] * 140_000}, "no list of at most 131,072"),
        ({"added_tokens": [TOKEN | {"content": ""}]}, "no text of 1 to 4,096 characters"),
        ({"added_tokens": {"x": 1}}, "no list"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "by chance"),
        ({"model": {"type": "WordPiece", "max_input_chars_per_word": 10**6}}, "no number up to 256"),
    ],
)
def test_what_could_grow_hang_or_panic_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer.json: cannot be loaded: .*{re.escape(words)}"):
        Tokenizer(of(**changes), {})


def test_every_kind_of_model_passes() -> None:
    for raw in tokenizer_files():
        sieve.check(raw, TRUSTED)
    sieve.check(of(normalizer=table(b"fi\0")), TRUSTED)
    ranks = vocabularies._byte_level(of(), r"[a-z]+|.")
    sieve.check(ranks, TRUSTED)


def test_a_file_larger_than_any_tokenizer_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(of()))
    monkeypatch.setattr(sieve, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 0 MB; a tokenizer's file has at most 0"):
        Tokenizer.load(tmp_path)


def test_an_id_far_beyond_the_others_is_refused() -> None:
    raw = of()
    raw["model"] = raw["model"] | {"vocab": raw["model"]["vocab"] | {"zz": (1 << 32) - 1}}
    with pytest.raises(ValueError, match="entries with ids up to 4,294,967,295: most are missing"):
        Tokenizer(raw, {})


def test_a_part_that_would_follow_encoding_changes_nothing() -> None:
    twice = {
        "type": "TemplateProcessing",
        "special_tokens": {},
        "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    }
    assert Tokenizer(of(post_processor=twice), {}).encode("to be") == Tokenizer(of(), {}).encode("to be")


def test_two_names_of_one_control_token_are_refused() -> None:
    raw = dict(tokenizer.train(["to be or not\n" * 9], "word", None).raw)
    raw["model"] = raw["model"] | {"vocab": raw["model"]["vocab"] | {"be": 3}}
    with pytest.raises(ValueError, match="two entries of the vocabulary have the id of one control token"):
        Tokenizer(raw, {})


HIDE = {"type": "Replace", "pattern": {"String": "<|e|>"}, "content": "x"}


def test_a_normalizer_that_makes_a_control_token_of_a_text_is_found_when_it_does() -> None:
    hidden = [{"type": "Replace", "pattern": {"String": name}, "content": "x"} for name in SPECIAL]
    steps = [*hidden, {"type": "Replace", "pattern": {"String": "to"}, "content": "<|e|>"}]
    raw = dict(tokenizer.train(["to be or not\n" * 9], "word", None).raw)
    added = [token | {"content": "<|e|>"} if token["id"] == 3 else token for token in raw["added_tokens"]]
    vocab = {"<|e|>" if token == 3 else name: token for name, token in raw["model"]["vocab"].items()}
    raw |= {
        "model": raw["model"] | {"vocab": vocab},
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    raw["normalizer"] = {"type": "Sequence", "normalizers": [HIDE, *steps]}
    loaded = Tokenizer(raw, {})
    loaded.encode("be")
    for encode in (loaded.encode, loaded.encode_unit, loaded.words, lambda text: loaded.encode_batch([text])):
        with pytest.raises(ValueError, match="its normalizer makes a control token of a text"):
            encode("be to")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_in_a_tokenizers_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(of()))
    (tmp_path / name).write_text("{}")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: is a symbolic link, which is not followed"):
        Tokenizer.load(tmp_path / "model")
