"""Text to ids and back, the same in transformers; nothing in text is a control token; bad files end in words."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer

from gpt import tokenizer as tokenizers
from gpt.tokenizer import CHATML, END, IM_END, IM_START, MIN_VOCAB_SIZE, Kind, Tokenizer, default_vocab_size, train

TEXT = (
    "the river runs to the sea, and the sea is full; 床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。\n"
    "def f(x):\n    return {'naïve': x + 12345, 'café': 🐙}\r\n\tかな カナ Привет, мир!\n" * 4
)
AWKWARD = [
    "",
    " ",
    "\n\n  \t x",
    END,
    f"a{IM_START}user\n<|reserved_0|>{END}{END} b",
    "e\u0301 \u200b\ufeff\u202e",
    "\0\x01\x7f\x85\xa0\u2028",
    "👩‍👩‍👧‍👦🇨🇭 \U0010ffff\ue000",
    "1234567890 ①②③ ٣٤٥",
    "don't  DON'T 'll \r\n\r\n   ",
    "𠀀龥龦㐀々〆ー",
    "a" * 1000,
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train([TEXT], "bpe", 400)


def random_texts(n: int) -> list[str]:
    """Strings of mixed scripts, spaces and control words, any Unicode scalar value among them."""
    rng = random.Random(7)
    pieces = [
        *"abcXYZ 床明月かカПр0123456789.,!?'\"\n\r\t_-",
        "  ",
        "\r\n",
        END,
        IM_START,
        IM_END,
        "the ",
        "🐙",
        "\u0301",
    ]

    def piece() -> str:
        if rng.random() < 0.8:
            return rng.choice(pieces)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    return ["".join(piece() for _ in range(rng.randrange(40))) for _ in range(n)]


# Encoding and decoding


@given(st.text())
def test_any_text_comes_back(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_awkward_text_comes_back_and_holds_no_control_token(kind: Kind) -> None:
    tokenizer = train(AWKWARD * 2, kind, None)
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not tokenizer.control_ids & set(ids)
    assert tokenizer.encode_batch(AWKWARD) == tokenizer.encode_each(AWKWARD) == [tokenizer.encode(t) for t in AWKWARD]


def test_control_tokens_are_where_they_are_expected_and_are_not_decoded(bpe: Tokenizer) -> None:
    assert (bpe.start_id, bpe.end_id, bpe.pad_id) == (0, 0, 0)
    assert bpe.control_ids == frozenset(range(8))
    assert bpe.decode([0, *bpe.encode("hi"), 2, 1]) == "hi"
    assert [bpe.piece(i) for i in (0, 1, 2)] == [END, IM_START, IM_END]


def test_a_template_changes_neither_the_fingerprint_nor_what_is_encoded(bpe: Tokenizer) -> None:
    bare = Tokenizer(dict(bpe.raw), {key: value for key, value in bpe.config.items() if key != "chat_template"})
    assert (bare.chat_template, bpe.chat_template) == (None, CHATML)
    assert bare.sha256 == bpe.sha256 and bare.files()["tokenizer.json"] == bpe.files()["tokenizer.json"]
    # Where chats are written out as text, their control tokens are read back from it; elsewhere nothing is.
    assert (bare.config["split_special_tokens"], bpe.config["split_special_tokens"]) == (True, False)
    for text in AWKWARD:
        assert bare.encode(text) == bpe.encode(text)


def test_digits_go_by_three_and_han_apart_from_latin() -> None:
    tokenizer = train(["1234567 床前abc明月 " * 50], "bpe", None)
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("1234567床前abc")]
    assert pieces == ["123", "456", "7", "床前", "abc"]


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_a_long_text_encoded_in_pieces_has_the_ids_of_the_whole(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train([TEXT, *AWKWARD], kind, None)
    rng = random.Random(3)
    alphabet = [*"aZ \t.,'(=é床1_", "\n", "\r\n", "\n", "\n\n  ", "ab ", "\u2028", "🐙"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(60))
        whole = tokenizer.encode(text)
        monkeypatch.setattr(tokenizers, "PIECE_CHARACTERS", 4)
        assert "".join(tokenizer._pieces(text)) == text
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == whole
        monkeypatch.undo()


def test_a_stream_gives_the_whole_decode_and_never_a_part_of_a_character(bpe: Tokenizer) -> None:
    for text in random_texts(100):
        ids, stream = bpe.encode(text), bpe.stream()
        shown = [piece for i in ids if (piece := stream.push(i)) is not None]
        assert "\ufffd" not in "".join(shown).replace("\ufffd" if "\ufffd" in text else "", "")
        assert "".join(shown) + stream.flush() == text


def test_a_stream_that_ends_inside_a_character_says_so_at_the_end(bpe: Tokenizer) -> None:
    first = bpe.encode("🦑")[0]
    stream = bpe.stream()
    assert [stream.push(i) for i in [*bpe.encode("a"), first]] == ["a", None]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_characters_that_the_vocabulary_cuts_or_does_not_know_are_named(bpe: Tokenizer) -> None:
    assert bpe.split_characters("the 龘the 龘🦑") == ["龘", "🦑"]
    assert train(["abc" * 9], "char", None).split_characters("abz") == ["z"]


def test_unknown_characters_become_one_token_and_nothing_else_is_lost() -> None:
    tokenizer = train(["abc " * 9], "char", None)
    ids = tokenizer.encode("ab?c")
    assert ids.count(tokenizer.unknown_id) == 1  # type: ignore[arg-type]
    assert tokenizer.decode(ids) == "abc"
    assert tokenizer.unknown_id in tokenizer.control_ids


def test_pieces_show_text_or_bytes_and_stand_for_every_byte(bpe: Tokenizer) -> None:
    assert {bpe.piece(i) for i in bpe.encode("the 床")} & {"the", "床", "the "}
    assert b"".join(bpe.token_bytes(i) for i in bpe.encode(TEXT)) == TEXT.encode()
    assert "\\xf0" in "".join(bpe.piece(i) for i in bpe.encode("🦑"))


# transformers


def agree(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for text in texts:
        assert theirs.encode(text) == tokenizer.encode(text), repr(text)
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == tokenizer.decode(tokenizer.encode(text))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.start_id, tokenizer.end_id)


@pytest.mark.parametrize(("kind", "n"), [("bpe", 10_000), ("char", 300), ("word", 300)])
def test_transformers_gives_our_ids_and_our_text(tmp_path: Path, kind: Kind, n: int) -> None:
    agree(tmp_path, train([TEXT], kind, None), AWKWARD + random_texts(n))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_transformers_gives_our_ids_beside_a_model_of_any_type(tmp_path: Path, bpe: Tokenizer, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    agree(tmp_path, bpe, AWKWARD + random_texts(100))


# Training


def test_training_is_the_same_in_any_process(bpe: Tokenizer) -> None:
    code = f"from gpt.tokenizer import train; print(train([{TEXT!r}], 'bpe', 400).sha256)"
    seen = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    }
    assert seen == {bpe.sha256}


def test_the_order_of_the_texts_does_not_matter(bpe: Tokenizer) -> None:
    lines = TEXT.splitlines(keepends=True)
    for kind in ("bpe", "char", "word"):
        assert train(lines, kind, None).sha256 == train(lines[::-1], kind, None).sha256


@pytest.mark.parametrize(
    ("n_bytes", "size"),
    [(0, 512), (1, 512), (1_115_394, 1024), (10_000_000, 4096), (1_000_000_000, 32768), (10**13, 65536)],
)
def test_the_default_size_follows_the_square_root_of_the_corpus(n_bytes: int, size: int) -> None:
    assert default_vocab_size(n_bytes) == size


def test_a_default_size_that_the_text_does_not_fill_becomes_smaller() -> None:
    assert MIN_VOCAB_SIZE < train(["abcabc" * 9], "bpe", None).size < 512


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=f"263 is too small: 256 bytes and 8 control tokens need {MIN_VOCAB_SIZE}"):
        train([TEXT], "bpe", 263)
    assert train([TEXT], "bpe", MIN_VOCAB_SIZE).size == MIN_VOCAB_SIZE


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_a_vocabulary_larger_than_the_text_supports_is_refused_with_the_size_that_is(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"vocab_size: 5000 is more than the text supports") as caught:
        train([TEXT], kind, 5000)
    possible = int(str(caught.value).partition("set vocab_size=")[2].split()[0])
    assert train([TEXT], kind, possible).size == possible


def test_a_size_bounds_characters_to_the_most_frequent() -> None:
    tokenizer = train(["aaabbc"], "char", 11)
    assert [tokenizer.piece(i) for i in range(9, 11)] == ["a", "b"]
    assert tokenizer.padded_size == 64


# Import


def write(directory: Path, raw: Any, config: Any = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def raw_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.files()["tokenizer.json"])


def test_a_tokenizer_written_and_loaded_is_the_same(tmp_path: Path, bpe: Tokenizer) -> None:
    for name, data in bpe.files().items():
        (tmp_path / name).write_bytes(data)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.files(), loaded.sha256) == (bpe.files(), bpe.sha256)
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(END) == bpe.encode(END) != [0]


def test_a_run_gives_the_tokenizer_of_its_newest_checkpoint(tmp_path: Path, bpe: Tokenizer) -> None:
    write(tmp_path / "checkpoints" / "step_00000010", raw_of(train([TEXT], "bpe", 300)))
    write(tmp_path / "checkpoints" / "step_00000200", raw_of(bpe))
    assert Tokenizer.load(tmp_path).sha256 == bpe.sha256


@pytest.mark.parametrize("beside", ["{{ older }}", None])
def test_a_template_in_a_file_of_its_own_goes_before_that_of_the_config(
    tmp_path: Path, bpe: Tokenizer, beside: str | None
) -> None:
    config = {"bos_token": IM_START, "eos_token": IM_END, "chat_template": beside}
    path = write(tmp_path, raw_of(bpe), config)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer.load(path).chat_template == "{{ messages }}"


def test_a_rule_that_puts_a_start_before_texts_is_left_to_transformers(tmp_path: Path, bpe: Tokenizer) -> None:
    names = {"bos_token": IM_START, "eos_token": IM_END}
    rule = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": IM_START, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {IM_START: {"id": IM_START, "ids": [bpe.vocab[IM_START]], "tokens": [IM_START]}},
    }
    for post_processor, told in ((rule, {}), (None, {"add_bos_token": False, "add_eos_token": False})):
        stored = Tokenizer(raw_of(bpe) | {"post_processor": post_processor}, names).files()["tokenizer_config.json"]
        assert {name: value for name, value in json.loads(stored).items() if name.startswith("add_")} == told


def test_an_import_brings_its_own_start_end_pad_and_chat_format(tmp_path: Path, bpe: Tokenizer) -> None:
    config = {
        "bos_token": {"content": IM_START, "__type": "AddedToken"},
        "eos_token": IM_END,
        "pad_token": "<|reserved_1|>",
        "chat_template": "{{ messages }}",
        "tokenizer_class": "LlamaTokenizer",
        "auto_map": {"AutoTokenizer": ["evil.Code", None]},
    }
    loaded = Tokenizer.load(write(tmp_path, raw_of(bpe), config))
    stored = json.loads(loaded.files()["tokenizer_config.json"])
    assert (loaded.start_id, loaded.end_id) == (1, 2)
    assert (stored["pad_token"], stored["chat_template"]) == ("<|reserved_1|>", "{{ messages }}")
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in stored


def test_a_stored_truncation_or_post_processor_changes_no_ids(tmp_path: Path, bpe: Tokenizer) -> None:
    changes = {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
        },
    }
    loaded = Tokenizer.load(write(tmp_path, raw_of(bpe) | changes))
    assert loaded.encode("the river runs") == bpe.encode("the river runs")


def test_a_layout_changes_no_fingerprint_but_a_merge_does(tmp_path: Path, bpe: Tokenizer) -> None:
    raw = raw_of(bpe)
    assert Tokenizer.load(write(tmp_path / "a", json.dumps(raw, indent=4, sort_keys=True))).sha256 == bpe.sha256
    raw["model"]["merges"].pop()
    assert Tokenizer.load(write(tmp_path / "b", raw)).sha256 != bpe.sha256


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("", "is not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "cannot be loaded"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "cannot be loaded"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "no start or end token"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}, "the vocabulary is empty"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_words(tmp_path: Path, raw: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(write(tmp_path, raw))


@pytest.mark.parametrize("change", [{"continuing_subword_prefix": "much too long for it"}, {"merges": [["a", "b"]]}])
def test_a_panic_of_the_native_library_is_an_error_in_words(tmp_path: Path, bpe: Tokenizer, change: Any) -> None:
    raw = raw_of(bpe)
    raw["model"] |= change
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be loaded"):
        Tokenizer.load(write(tmp_path, raw)).encode(TEXT)


def test_a_control_token_that_is_not_there_is_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"bos_token '<s>' of tokenizer_config.json is not in the vocabulary"):
        Tokenizer.load(write(tmp_path, raw_of(bpe), {"bos_token": "<s>"}))


@pytest.mark.parametrize("name", [[], {"content": ["a"]}, 0], ids=str)
def test_a_control_token_that_is_no_text_is_refused(tmp_path: Path, bpe: Tokenizer, name: Any) -> None:
    with pytest.raises(ValueError, match=r"bos_token .* of tokenizer_config.json is not in the vocabulary"):
        Tokenizer.load(write(tmp_path, raw_of(bpe), {"bos_token": name}))


def test_a_place_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Tokenizer.load(tmp_path / "no")


# Vocabularies of ids


@pytest.fixture(scope="module")
def ids() -> Tokenizer:
    return train([], "ids", 60)


def test_ids_are_decimal_numbers_with_spaces_between(tmp_path: Path, ids: Tokenizer) -> None:
    assert ids.encode("12 57\n3\t0  12") == [12, 57, 3, 0, 12]
    assert ids.decode([12, 57, 3]) == "12 57 3"
    assert (ids.start_id, ids.end_id, ids.size, ids.unknown_id) == (60, 60, 61, None)
    assert [ids.piece(i) for i in (7, 60)] == ["7", END]
    agree(tmp_path, ids, ["", "1", "0 59 3"])


@given(st.lists(st.integers(0, 59)))
def test_any_ids_come_back(ids: Tokenizer, some: list[int]) -> None:
    text = " ".join(map(str, some))
    assert ids.encode(text) == some
    assert ids.decode(some) == text


def test_a_stream_survives_bytes_that_form_no_character() -> None:
    """The library's own stream raises there, once letters follow; a model may write such bytes at any time."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "C"]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    draw = random.Random(0)
    for _ in range(300):
        ids = draw.choices([*range(128, 256), *[256] * 100, *b"abc" * 30], k=12)
        stream = tokenizers.Stream(backend)
        text = "".join(stream.push(token) or "" for token in ids) + stream.flush()
        assert text.count("C") == ids.count(256)


def test_a_stream_of_ids_goes_on_after_its_prompt(ids: Tokenizer) -> None:
    for prompt in ([60], [60, 12], [60, 12, 57]):
        stream = ids.stream(prompt)
        text = "".join(stream.push(token) or "" for token in (3, 4)) + stream.flush()
        assert ids.decode(prompt) + text == ids.decode([*prompt, 3, 4])


@pytest.mark.parametrize("word", ["60", "-1", "007", "x", END, "1.5", "٣", "9" * 100])
def test_what_is_no_id_of_the_vocabulary_is_named(ids: Tokenizer, word: str) -> None:
    message = re.escape(f"{word[:40]!r} is no id of this vocabulary: expected 0 to 59")
    for encode in (ids.encode, lambda text: ids.encode_batch(["1", text]), lambda text: ids.encode_each([text])):
        with pytest.raises(ValueError, match=message):
            encode(f"3 {word} 4")


@pytest.mark.parametrize("size", [None, 0])
def test_a_vocabulary_of_ids_needs_a_size(size: int | None) -> None:
    with pytest.raises(ValueError, match="say how many ids there are"):
        train(["1 2 3"], "ids", size)


# Bytes, words and control tokens


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_byte_lengths_are_those_of_every_token(kind: Kind) -> None:
    tokenizer = train([TEXT], kind, None)
    assert tokenizer.byte_lengths.tolist() == [len(tokenizer.token_bytes(i)) for i in range(tokenizer.size)]
    assert tokenizer.byte_lengths[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
    assert not tokenizer.byte_lengths[list(tokenizer.control_ids)].any()


@pytest.mark.parametrize("limit", [4, 1 << 17])
def test_words_are_the_ids_and_where_pre_tokens_begin(
    bpe: Tokenizer, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "PIECE_CHARACTERS", limit)
    for text in [TEXT, *AWKWARD]:
        ids, words = bpe.words(text)
        assert ids.tolist() == bpe.encode(text)
        assert [*dict.fromkeys(words.tolist())] == [*range(words[-1] + 1 if len(words) else 0)]
        pieces = [b"" for _ in dict.fromkeys(words.tolist())]
        for token, word in zip(ids.tolist(), words.tolist(), strict=True):
            pieces[word] += bpe.token_bytes(token)
        assert all(bpe.encode(piece.decode()) for piece in pieces)


def test_a_vocabulary_that_finds_control_tokens_in_text_is_refused(tmp_path: Path) -> None:
    raw = raw_of(train([], "ids", 3))
    raw["model"]["vocab"][END] = 3
    with pytest.raises(ValueError, match=r"the text '<\|endoftext\|>' would become the control token of that name"):
        Tokenizer.load(write(tmp_path, raw))
