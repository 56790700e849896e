"""Published formats give the ids of the libraries they come from, on any text; damaged and other files are named."""

import base64
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from gpt import vocabularies
from gpt.tokenizer import Tokenizer
from gpt.vocabularies import BYTE_OF_LETTER, CL100K, END, GPT2, KNOWN, O200K, QWEN, parts_of

TEXT = (
    "the river runs to the sea, and the sea is full; 床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。\n"
    "def f(x):\n    return {'naïve': x + 12345, 'café': 🐙}\r\n\tかな カナ Привет, мир! It's they'LL WE'RE\n"
)
LINES = [line * 3 for line in TEXT.splitlines()] * 4
AWKWARD = [
    "",
    " ",
    "\n\n  \t x",
    END,
    f"a<|im_start|>user\n<s></s><unk><0x41><|fim_prefix|>{END}{END} b",
    "e\u0301 \u200b\ufeff\u202e",
    "\0\x01\x7f\x85\xa0\u2028\u3000 \u180e",
    "👩‍👩‍👧‍👦🇨🇭 \U0010ffff\ue000",
    "1234567890 ①②③ ٣٤٥",
    "don't  DON'T 'll 'ſ 'K \r\n\r\n   ",
    "  two  spaces  and ▁▁ low lines ▁ ",
    "𠀀龥龦㐀々〆ー",
    "a" * 1000,
]
PIECES = [
    *"abcXYZ 床明月かПр0123456789.,!?'\"\n\r\t_-/▁",
    "  ",
    "\r\n",
    END,
    "<s>",
    "'s",
    "'LL",
    " the",
    "🐙",
    "\u0301",
]


def random_texts(n: int, seed: int = 7, known: float = 0.8) -> list[str]:
    """Strings of what vocabularies treat differently, and of any Unicode scalar value."""
    rng = random.Random(seed)

    def piece() -> str:
        if rng.random() < known:
            return rng.choice(PIECES)
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000), rng.randrange(0x3000)]))

    return ["".join(piece() for _ in range(rng.randrange(40))) for _ in range(n)]


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def agree_with_transformers(directory: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """What we store gives our ids in transformers too."""
    theirs = AutoTokenizer.from_pretrained(write(directory / "stored", tokenizer.files()), split_special_tokens=True)
    assert theirs(texts)["input_ids"] == tokenizer.encode_batch(texts)
    assert Tokenizer.load(directory / "stored").sha256 == tokenizer.sha256


def holds_no_control_token(tokenizer: Tokenizer, texts: list[str]) -> bool:
    ids = {i for row in tokenizer.encode_batch(texts) for i in row}
    return not ids & (tokenizer.control_ids - {tokenizer.unknown_id})


# GPT-2's pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt2")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES, vocab_size=600, show_progress=False)
    trained.save_model(str(directory))
    vocab = json.loads((directory / "vocab.json").read_text())
    (directory / "vocab.json").write_text(json.dumps(vocab | {END: len(vocab)}))
    return directory


def ranks_of(directory: Path) -> dict[bytes, int]:
    vocab = json.loads((directory / "vocab.json").read_text())
    return {bytes(BYTE_OF_LETTER[c] for c in name): i for name, i in vocab.items() if name != END}


def compare_with_tiktoken_and_transformers(directory: Path, texts: list[str]) -> tuple[int, int]:
    """How many of the texts have other ids in tiktoken and in transformers than here, for a vocab.json + merges.txt.

    With GPT-2's published files and `random_texts(100_000)` it gave (0, 0).
    """
    ours, ranks = Tokenizer.load(directory), ranks_of(directory)
    tik = tiktoken.Encoding("it", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    files = {"vocab": str(directory / "vocab.json"), "merges": str(directory / "merges.txt")}
    hugging = GPT2Tokenizer(**files, split_special_tokens=True)(texts)["input_ids"]
    rows = zip(ours.encode_batch(texts), tik.encode_ordinary_batch(texts), hugging, strict=True)
    differ = [(a != b, a != c) for a, b, c in rows]
    return sum(d[0] for d in differ), sum(d[1] for d in differ)


def test_gpt2s_files_give_the_ids_of_tiktoken_and_of_transformers(tmp_path: Path, pair: Path) -> None:
    texts = AWKWARD + random_texts(5000) + random_texts(5000, known=0)
    assert compare_with_tiktoken_and_transformers(pair, texts) == (0, 0)
    tokenizer = Tokenizer.load(pair)
    assert holds_no_control_token(tokenizer, texts)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    agree_with_transformers(tmp_path, tokenizer, texts[:1000])


@pytest.mark.slow
def test_a_hundred_thousand_strings_have_the_ids_of_tiktoken_and_of_transformers(pair: Path) -> None:
    assert compare_with_tiktoken_and_transformers(pair, random_texts(100_000)) == (0, 0)


def test_any_name_of_gpt2s_files_loads_the_pair(pair: Path) -> None:
    loaded = [Tokenizer.load(path) for path in (pair, pair / "vocab.json", pair / "merges.txt")]
    assert len({tokenizer.sha256 for tokenizer in loaded}) == 1
    assert loaded[0].start_id == loaded[0].end_id == loaded[0].size - 1


def damage_pair(directory: Path, pair: Path, name: str, change: Callable[[str], str]) -> Path:
    files = {file: (pair / file).read_text(encoding="utf-8") for file in ("vocab.json", "merges.txt")}
    files[name] = change(files[name])
    return write(directory, {file: text.encode() for file, text in files.items()})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("vocab.json", lambda text: text[:500], r"vocab\.json: is not JSON .* cut off\?"),
        ("vocab.json", lambda text: "[]", "expected a JSON object, got list"),
        ("vocab.json", lambda text: text.replace('"!": 0', '"!": 1'), "the ids are not 0 to"),
        ("vocab.json", lambda text: text.replace('"!"', '"!?"'), "(no entry for byte 0x21|which vocab.json has not)"),
        ("merges.txt", lambda text: "\n".join(text.split("\n")[:100]), "have no merge: cut off"),
        ("merges.txt", lambda text: text + "Q Q\n", "which vocab.json has not"),
        ("merges.txt", lambda text: text + "alone\n", r"merges\.txt:\d+: expected two parts .*'alone'"),
    ],
)
def test_damaged_gpt2_files_are_named(
    tmp_path: Path, pair: Path, name: str, change: Callable[[str], str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(damage_pair(tmp_path, pair, name, change))


def test_half_a_pair_and_a_pair_with_other_rules_are_refused(tmp_path: Path, pair: Path) -> None:
    half = write(tmp_path / "half", {"vocab.json": (pair / "vocab.json").read_bytes()})
    with pytest.raises(FileNotFoundError, match=r"merges\.txt is not there; vocab\.json alone"):
        Tokenizer.load(half)
    files = {name: (pair / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    other = write(tmp_path / "other", files | {"tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}'})
    with pytest.raises(ValueError, match="the rules of Qwen2Tokenizer are not GPT-2's"):
        Tokenizer.load(other)


# Ranks


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


@pytest.fixture(scope="module")
def ranks(pair: Path) -> dict[bytes, int]:
    """A trained vocabulary, and entries that no merges reach: tiktoken finds them as whole pieces of text only."""
    found = ranks_of(pair)
    unreachable = [b" qzjxq", "鄉鄉鄉".encode(), b"\n\t\n\t", b"xqzx", b"987"]
    return found | {token: len(found) + i for i, token in enumerate(unreachable) if token not in found}


@pytest.mark.parametrize("pattern", [GPT2, CL100K, O200K, QWEN, r"\s+|\w{1,2}|[^\s\w]"])
def test_ranks_give_the_ids_of_tiktoken(tmp_path: Path, ranks: dict[bytes, int], pattern: str) -> None:
    file = write(tmp_path, {"mine.tiktoken": tiktoken_file(ranks)}) / "mine.tiktoken"
    tokenizer = Tokenizer(*vocabularies.read(file, pattern))
    theirs = tiktoken.Encoding("it", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
    texts = [*AWKWARD, " qzjxq 鄉鄉鄉 xqzx 987 \n\t\n\t", "鄉鄉鄉鄉 qzjxqa 9876", *random_texts(3000)]
    assert tokenizer.encode_batch(texts) == theirs.encode_ordinary_batch(texts)
    assert [tokenizer.decode(theirs.encode_ordinary(text)) for text in texts] == texts
    assert (tokenizer.start_id, tokenizer.size) == (len(ranks), len(ranks) + 1)
    assert holds_no_control_token(tokenizer, texts)
    agree_with_transformers(tmp_path, tokenizer, texts[:300])


def test_ranks_that_are_no_training_gave_have_the_ids_of_tiktoken(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = {bytes(rng.choice(b"abc") for _ in range(rng.randrange(2, 6))) for _ in range(120)}
    order = [bytes([byte]) for byte in range(256)] + rng.sample(sorted(words), len(words))
    ranks = {token: i for i, token in enumerate(order)}
    file = write(tmp_path, {"x.tiktoken": tiktoken_file(ranks)}) / "x.tiktoken"
    theirs = tiktoken.Encoding("it", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer(*vocabularies.read(file, CL100K))
    texts = ["".join(rng.choice("abc") for _ in range(rng.randrange(30))) for _ in range(5000)]
    assert tokenizer.encode_batch(texts) == theirs.encode_ordinary_batch(texts)


def full(known: vocabularies.Known) -> dict[bytes, int]:
    """Ranks in the number of a published vocabulary: bytes, pairs of them, and then some of three."""
    tokens = [bytes([a]) for a in range(256)]
    tokens += [bytes([a, b]) for a in range(256) for b in range(256)]
    tokens += [bytes([a, b, c]) for a in b"abcdefghi " for b in range(128) for c in range(128)]
    free = [i for i in range(known.n_ranks + len(known.special) + 1) if i not in known.special.values()]
    return dict(zip(tokens, free[: known.n_ranks], strict=False))


@pytest.mark.parametrize(
    ("file_name", "name", "start", "size"),
    [
        ("r50k_base.tiktoken", "r50k_base", 50256, 50257),
        ("mine.tiktoken#p50k_base", "p50k_base", 50256, 50281),
        ("tokenizer.model", "llama3", 128000, 128256),
        ("qwen.tiktoken", "qwen", 151643, 151851),
    ],
)
def test_a_known_name_brings_its_pattern_and_control_tokens(
    tmp_path: Path, file_name: str, name: str, start: int, size: int
) -> None:
    known = KNOWN[name]
    ranks = full(known)
    write(tmp_path, {file_name.partition("#")[0]: tiktoken_file(ranks)})
    tokenizer = Tokenizer.load(tmp_path / file_name)
    theirs = tiktoken.Encoding("it", pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=dict(known.special))
    texts = [text for text in AWKWARD if not known.nfc or "\u0301" not in text]
    assert tokenizer.encode_batch(texts) == theirs.encode_ordinary_batch(texts)
    assert tokenizer.control_ids == frozenset(known.special.values())
    assert (tokenizer.start_id, tokenizer.size) == (start, size)
    assert known.nfc == (tokenizer.encode("e\u0301") == tokenizer.encode("é"))


@pytest.mark.parametrize(("name", "n", "last"), [("cl100k_base", 100256, 100276), ("o200k_base", 199998, 200018)])
def test_the_larger_known_vocabularies_have_the_sizes_of_tiktoken(name: str, n: int, last: int) -> None:
    assert (KNOWN[name].n_ranks, max(KNOWN[name].special.values())) == (n, last)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("x.tiktoken", lambda data: data, r"ranks do not say how text is split; known by name: r50k_base, .*#cl100k"),
        ("x.tiktoken", lambda data: b"", "the file is empty"),
        ("x.tiktoken#cl100k_base", lambda data: data, "ranks, but cl100k_base has 100256: cut off"),
        ("tokenizer.model", lambda data: data, "ranks, but llama3 has 128000"),
        ("x.tiktoken#\\w+", lambda data: data[: data.index(b"\n", 900) + 1], "no rank for byte"),
        (
            "x.tiktoken#\\w+",
            lambda data: data[:-3] + b"\n",
            "(a rank or a token occurs twice|expected base64 and a rank)",
        ),
        ("x.tiktoken#\\w+", lambda data: data + data, "a rank or a token occurs twice"),
        ("x.tiktoken#\\w+", lambda data: data + b"PHxlbmRvZnRleHR8Pg== 900\n", "name or the id"),
        ("x.tiktoken#", lambda data: data, "ranks do not say how text is split"),
        ("x.tiktoken#\\w+", lambda data: b"\n\n", "holds no ranks"),
        ("x.tiktoken#\\w+", lambda data: b"<html>not found</html>", r"x\.tiktoken:1: expected base64 .*<html>"),
        ("x.tiktoken#\\w+", lambda data: data + b"eHF6 999999999\n", "most are missing"),
        ("x.tiktoken#\\w+$", lambda data: data, "mean something else here"),
        ("x.tiktoken#\\d{1,3}+|\\s", lambda data: data, "mean something else here"),
        ("x.tiktoken#(", lambda data: data, "cannot be loaded"),
    ],
)
def test_ranks_without_rules_or_damaged_are_named(
    tmp_path: Path, ranks: dict[bytes, int], name: str, change: Callable[[bytes], bytes], words: str
) -> None:
    write(tmp_path, {name.partition("#")[0]: change(tiktoken_file(ranks))})
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(tmp_path / name)


def test_the_merge_of_an_entry_is_the_last_step_of_its_own_encoding() -> None:
    rank = {"ab": 0, "bc": 1, "abc": 2, "abcd": 3}.get
    assert parts_of("abcd", rank) == ("abc", "d")
    assert parts_of("abc", rank) == ("ab", "c")
    assert parts_of("dcba", rank) is None


# SentencePiece


def model(**changes: Any) -> bytes:
    """A model as Llama 2's was trained, but for `changes`."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, **(settings | changes)
    )
    return written.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"split_by_whitespace": False},
        {"control_symbols": ["[INST]", "[/INST]"]},
        {"byte_fallback": False, "vocab_size": 200},
        {"bos_id": -1, "pad_id": 3},
    ],
    ids=str,
)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(tmp_path: Path, changes: dict[str, Any]) -> None:
    data = model(**changes)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": data}))
    texts = [*AWKWARD, "[INST] x [/INST]", TEXT, *random_texts(3000)]
    expected = theirs.encode(texts)
    assert tokenizer.encode_batch(texts) == expected
    assert holds_no_control_token(tokenizer, texts)
    assert (tokenizer.size, tokenizer.end_id) == (theirs.vocab_size(), theirs.eos_id())
    assert tokenizer.start_id == (theirs.bos_id() if theirs.bos_id() >= 0 else theirs.eos_id())
    if changes.get("byte_fallback", True):
        assert tokenizer.unknown_id is None
        if "remove_extra_whitespaces" not in changes:
            assert [tokenizer.decode(ids) for ids in expected] == theirs.decode(expected)
    else:
        assert tokenizer.unknown_id == theirs.unk_id()
    agree_with_transformers(tmp_path, tokenizer, texts[:1000])


def test_pieces_of_a_sentencepiece_model_stand_for_their_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": model()}))
    ids = tokenizer.encode("the sea 龘")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == " the sea 龘".encode()
    assert tokenizer.byte_lengths[ids].sum() == len(" the sea 龘".encode())


def test_a_chat_format_beside_an_imported_file_is_kept(tmp_path: Path) -> None:
    config = {"chat_template": "{{ messages }}", "eos_token": "<s>", "pad_token": None}
    files = {"tokenizer.model": model(pad_id=3), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    stored = json.loads(tokenizer.files()["tokenizer_config.json"])
    assert (stored["chat_template"], stored["pad_token"], tokenizer.end_id) == ("{{ messages }}", "<pad>", 1)


def test_a_stream_after_a_prompt_keeps_the_space_between(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.model": model()}))
    ids = tokenizer.encode("the river runs 龘 to the sea")
    for cut in range(1, len(ids)):
        before, stream = tokenizer.decode(ids[:cut]), tokenizer.stream(ids[:cut])
        text = "".join(stream.push(token) or "" for token in ids[cut:]) + stream.flush()
        if not before.endswith("\ufffd"):
            assert before + text == "the river runs 龘 to the sea"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "unigram", "vocab_size": 330}, r"model_type unigram \(supported: bpe\)"),
        ({"model_type": "char", "vocab_size": 380}, "model_type char"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalization nmt_nfkc \(supported: identity\)"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined symbols"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ],
)
def test_a_sentencepiece_model_that_would_give_other_ids_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(write(tmp_path, {"tokenizer.model": model(**changes)}))


def test_a_damaged_sentencepiece_model_is_an_error_in_words_wherever_it_is_cut_or_changed(tmp_path: Path) -> None:
    data, rng = model(), random.Random(4)
    file = tmp_path / "x.model"
    for cut in range(1, len(data) - 1, 101):
        file.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"x\.model: not a whole SentencePiece model"):
            Tokenizer.load(file)
    for _ in range(100):
        changed = bytearray(data)
        for _ in range(20):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.write_bytes(changed)
        try:
            Tokenizer.load(file).encode(TEXT)
        except ValueError as error:
            assert "x.model" in str(error)


def test_two_pieces_with_one_score_are_refused(tmp_path: Path) -> None:
    data = model()
    second, third = (b"\x15" + struct.pack("<f", -float(i)) for i in (1, 2))
    assert data.count(second) == 1
    file = write(tmp_path, {"x.model": data.replace(second, third)}) / "x.model"
    with pytest.raises(ValueError, match="have the same score"):
        Tokenizer.load(file)
