"""A grown vocabulary: old ids, old segmentations and old logits stay; new tokens are where they were asked for."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_vocabularies import (
    AWKWARD,
    LINES,
    agree_with_transformers,
    holds_no_control_token,
    random_texts,
    tiktoken_file,
)
from tokenizers.implementations import ByteLevelBPETokenizer

from gpt import growth
from gpt.model import GPT, ModelConfig, init_weights
from gpt.tokenizer import END, Tokenizer, train
from gpt.vocabularies import CL100K, read

POEM = "床前明月光疑是地上霜舉頭望明月低頭思故鄉\n春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少\n"
POEMS = [POEM * 2, "明月光 春眠不覺曉\n" * 3, POEM]
LATIN = ["the river runs to the sea, and the sea is full. " * 8, "def f(x):\n    return x + 12345\n" * 5]


def gpt2_like() -> Tokenizer:
    """Control token at the end, ByteLevel's own pattern, merges as strings: as GPT-2's tokenizer.json is."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LATIN, vocab_size=400, show_progress=False)
    trained.add_special_tokens([END])
    raw = json.loads(trained.to_str()) | {"post_processor": None}
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    return Tokenizer(raw, {})


def with_tokens_beside() -> Tokenizer:
    """As Llama 3's and Qwen's: control tokens outside the model's vocabulary, one token that is read from text."""
    raw = json.loads(gpt2_like().files()["tokenizer.json"])
    end = raw["model"]["vocab"].pop(END, raw["added_tokens"][0]["id"])
    raw["added_tokens"] = [
        {**raw["added_tokens"][0], "id": end + i, "content": name, "special": special}
        for i, (name, special) in enumerate([(END, True), ("<|other|>", True), ("<tool>", False)])
    ]
    return Tokenizer(raw, {})


def of_ranks(path: Path) -> Tokenizer:
    """Ranks with a token that merges never reach."""
    vocab = gpt2_like().vocab
    ranks = {gpt2_like().token_bytes(i): i for i in range(len(vocab) - 1)}
    file = path / "x.tiktoken"
    file.write_bytes(tiktoken_file(ranks | {"月光".encode(): len(ranks)}))
    return Tokenizer(*read(file, CL100K))


@pytest.fixture(params=["ours", "gpt2", "beside", "ranks"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "ranks":
        return of_ranks(tmp_path)
    return {"ours": lambda: train(LATIN, "bpe", 300), "gpt2": gpt2_like, "beside": with_tokens_beside}[request.param]()


def expanded(new: Tokenizer, places: dict[int, tuple[int, ...]], text: str) -> list[int]:
    return [piece for token in new.encode(text) for piece in places.get(token, (token,))]


def is_text(data: bytes) -> bool:
    return "\ufffd" not in data.decode(errors="replace")


def check(tmp_path: Path, old: Tokenizer, new: Tokenizer) -> None:
    """What must hold of any growth."""
    texts = [*AWKWARD, *LATIN, *POEMS, *random_texts(300)]
    places = growth.replaced(old, new)
    assert sorted(places) == list(range(old.size, new.size))
    assert {name: new.vocab[name] for name in old.vocab} == old.vocab
    assert (new.control_ids, new.start_id, new.end_id) == (old.control_ids, old.start_id, old.end_id)
    for text in texts:
        assert expanded(new, places, text) == old.encode(text), repr(text)
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    for token, pieces in places.items():
        assert new.token_bytes(token) == b"".join(map(old.token_bytes, pieces))
        assert len(pieces) > 1
    assert holds_no_control_token(new, texts)
    agree_with_transformers(tmp_path, new, texts)


def test_a_learned_growth_is_a_refinement_that_needs_fewer_tokens(tmp_path: Path, old: Tokenizer) -> None:
    new = growth.learn(old, POEMS, 60)
    check(tmp_path, old, new)
    assert new.size == old.size + 60
    n_old, n_new = (sum(map(len, t.encode_batch(POEMS))) for t in (old, new))
    assert n_old > 2 * n_new
    assert [new.encode(text) for text in LATIN] == [old.encode(text) for text in LATIN]


def test_listed_entries_become_one_token_each(tmp_path: Path, old: Tokenizer) -> None:
    characters = sorted(set(POEM.strip()) - {"\n"})
    entries = [*characters, "明月", " river runs"[:6], "zzz", "zz", "ababab", "床", "the"]
    new = growth.add(old, entries)
    check(tmp_path, old, new)
    assert [len(ids) for ids in new.encode_batch(entries)] == [1] * len(entries)
    assert new.size - old.size >= len(set(entries)) - 2
    assert new.split_characters(POEM) == []


@given(st.lists(st.text("abcé明", min_size=1, max_size=6), min_size=1, max_size=12))
def test_any_words_can_be_added(entries: list[str]) -> None:
    old = train(["ab ba abc cab" * 5], "bpe", 268)
    words = [entry for entry in entries if len(set(old.words(entry)[1])) == 1]
    new = growth.add(old, words)
    assert all(len(ids) == 1 for ids in new.encode_batch(words))
    places = growth.replaced(old, new)
    assert all(expanded(new, places, text) == old.encode(text) for text in ["".join(entries), *entries])


def test_a_grown_vocabulary_grows_again(tmp_path: Path) -> None:
    first = train(LATIN, "bpe", 300)
    second = growth.learn(first, POEMS, 30)
    third = growth.add(second, ["鷓", "鴣"])
    fourth = growth.learn(third, ["鷓鴣 " * 9], 1)
    check(tmp_path, first, fourth)
    check(tmp_path, third, fourth)
    assert fourth.encode("鷓鴣") == [third.size]


def test_learning_is_the_same_every_time_and_in_any_order() -> None:
    old = train(LATIN, "bpe", 300)
    texts = [*POEMS, *LINES]
    assert growth.learn(old, texts, 40).sha256 == growth.learn(old, texts[::-1], 40).sha256


def test_a_learned_merge_is_the_most_frequent_pair_of_old_tokens() -> None:
    old = train(LATIN, "bpe", 300)
    new = growth.learn(old, ["qxqxqx qx zk zk qx"], 1)
    assert [new.piece(token) for token in growth.replaced(old, new)] == ["qx"]


def test_no_new_token_crosses_what_text_is_cut_into_first() -> None:
    new = growth.learn(train(LATIN, "bpe", 300), ["ab12cd明月34. " * 20], 9)
    whole = [data.decode() for token in range(300, new.size) if is_text(data := new.token_bytes(token))]
    assert len(whole) > 4
    assert all(len(set(new.words(text)[1])) == 1 for text in whole)


def test_texts_that_do_not_support_the_growth_say_how_much_they_do() -> None:
    old = train(LATIN, "bpe", 300)
    with pytest.raises(ValueError, match=r"grow: 5000 new tokens are more than the text supports") as caught:
        growth.learn(old, POEMS, 5000)
    possible = int(str(caught.value).partition("set grow=")[2].split()[0])
    assert growth.learn(old, POEMS, possible).size == old.size + possible
    with pytest.raises(ValueError, match="grow: 0 new tokens; expected 1 to"):
        growth.learn(old, POEMS, 0)


@pytest.mark.parametrize("entry", ["", "two words", "a1", "a\nb"])
def test_entries_that_the_rules_cut_are_named(entry: str) -> None:
    with pytest.raises(ValueError, match="1 entries cannot become one token each") as caught:
        growth.add(train(LATIN, "bpe", 300), ["fine", entry])
    assert repr(entry) in str(caught.value)


def test_an_entry_that_merges_never_reach_stays_so(tmp_path: Path) -> None:
    old = of_ranks(tmp_path)
    (token,) = old.encode("月光")
    assert len(old.encode("明月光")) > 3
    new = growth.learn(old, ["明月光 " * 9], 7)
    assert new.encode("月光") == [token]
    assert expanded(new, growth.replaced(old, new), "明月光") == old.encode("明月光")


@pytest.mark.parametrize("kind", ["char", "word", "ids"])
def test_a_vocabulary_without_merges_cannot_grow(kind: Any) -> None:
    old = train(LATIN, kind, 60 if kind == "ids" else None)
    for grow in (lambda: growth.learn(old, LATIN, 5), lambda: growth.add(old, ["x"])):
        with pytest.raises(ValueError, match="cannot grow: it is a vocabulary of kind WordLevel"):
            grow()
    assert growth.replaced(old, old) == {}


# What is no growth


def changed(tokenizer: Tokenizer, change: Any) -> Tokenizer:
    raw = json.loads(tokenizer.files()["tokenizer.json"])
    change(raw)
    return Tokenizer(raw, {})


def test_what_is_no_growth_of_the_old_one_is_refused_with_the_reason() -> None:
    old = train(LATIN, "bpe", 300)
    new = growth.learn(old, POEMS, 10)
    last = max(new.vocab, key=new.vocab.__getitem__)

    def swapped(raw: dict[str, Any]) -> None:
        merges = raw["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    def unmerged(raw: dict[str, Any]) -> None:
        raw["model"]["merges"].pop()

    def renumbered(raw: dict[str, Any]) -> None:
        vocab = raw["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    for other, words in [
        (changed(new, swapped), "its first merges are not the old ones"),
        (changed(new, unmerged), f"no merge makes {last!r}"),
        (changed(new, renumbered), "'a' has another id|'b' has another id"),
        (changed(new, lambda raw: raw.update(normalizer={"type": "NFC"})), "its rules or control tokens differ"),
        (train(POEMS, "bpe", 300), "has another id"),
        (train(LATIN, "char", None), "its rules or control tokens differ"),
    ]:
        with pytest.raises(ValueError, match=words):
            growth.replaced(old, other)
    with pytest.raises(ValueError, match="has another id"):
        growth.replaced(new, old)


def test_files_of_other_origins_are_known_as_the_same_vocabulary() -> None:
    old = gpt2_like()

    def rewritten(raw: dict[str, Any]) -> None:
        raw["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
        raw["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False}
        raw["model"].pop("ignore_merges", None)
        raw["model"]["merges"] = [merge.split(" ") for merge in raw["model"]["merges"]]

    new = growth.add(changed(old, rewritten), ["床"])
    assert len(growth.replaced(old, new)) == new.size - old.size == 2
    assert growth.replaced(old, changed(old, rewritten)) == {}


def test_the_table_names_each_new_token_and_what_it_takes_the_place_of() -> None:
    old = train(LATIN, "bpe", 300)
    new = growth.add(old, ["thé"])
    lines = [line.split("\t") for line in growth.table(old, new)]
    assert [line[0] for line in lines] == ["id", *map(str, range(old.size, new.size))]
    assert json.loads(lines[-1][1]) == "thé"
    assert [json.loads(piece) for piece in lines[-1][2].split(" ")] == [old.piece(i) for i in old.encode("thé")]


# The model


def small(tokenizer: Tokenizer, **changes: Any) -> GPT:
    shape = {"vocab_size": tokenizer.padded_size, "max_seq_len": 64, "n_layer": 2, "d_model": 32, "n_head": 2}
    model = GPT(ModelConfig.model_validate(shape | changes))
    init_weights(model, seed=3)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_models_logits_of_old_ids_are_those_of_the_old_model(tied: bool) -> None:
    old = train(LATIN, "bpe", 300)
    new = growth.learn(old, POEMS, 50)
    before, after = small(old, tie_embeddings=tied), small(new, tie_embeddings=tied)
    after.load_state_dict(growth.extend(before.state_dict(), old, new))
    tokens = torch.tensor([old.encode(LATIN[0])[:40]])
    with torch.no_grad():
        torch.testing.assert_close(after(tokens)[..., : old.size], before(tokens)[..., : old.size])
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_tokens_rows_are_the_means_of_the_rows_it_replaces(tied: bool) -> None:
    old = train(LATIN, "bpe", 300)
    new = growth.add(old, ["床前明月", "the"])
    state = small(old, tie_embeddings=tied).state_dict()
    grown = growth.extend(state, old, new)
    for name in (growth.EMBEDDING, growth.HEAD):
        assert len(grown[name]) == new.padded_size
        assert torch.equal(grown[name][: old.size], state[name][: old.size])
        for token, pieces in growth.replaced(old, new).items():
            torch.testing.assert_close(grown[name][token], state[name][list(pieces)].mean(dim=0))
    assert (grown[growth.HEAD] is grown[growth.EMBEDDING]) == tied
    others = state.keys() - {growth.EMBEDDING, growth.HEAD}
    assert all(grown[name] is state[name] for name in others)


def test_rows_that_pad_the_end_are_used_first_and_others_have_the_mean() -> None:
    old = train(LATIN, "bpe", 300)
    weight = torch.randn(320, 4)
    new = growth.add(old, ["zq"])
    assert torch.equal(growth.extend({growth.HEAD: weight}, old, new)[growth.HEAD][301:], weight[301:])
    grown = growth.extend({growth.HEAD: weight}, old, new, rows=400)[growth.HEAD]
    torch.testing.assert_close(grown[320:], weight[:300].mean(dim=0).expand(80, -1))
    with pytest.raises(ValueError, match="310 rows for 301 ids and 320 rows before"):
        growth.extend({growth.HEAD: weight}, old, new, rows=310)


def test_reduced_precision_is_averaged_in_full() -> None:
    old = train(LATIN, "bpe", 300)
    new = growth.add(old, ["床前明月光"])
    weight = torch.randn(320, 8).to(torch.bfloat16)
    (token, pieces) = list(growth.replaced(old, new).items())[-1]
    grown = growth.extend({growth.EMBEDDING: weight}, old, new)[growth.EMBEDDING]
    assert grown.dtype == torch.bfloat16
    assert torch.equal(grown[token], weight[list(pieces)].float().mean(dim=0).to(torch.bfloat16))


def test_random_texts_are_refined_too() -> None:
    rng = random.Random(6)
    texts = ["".join(rng.choice("abc明月 ") for _ in range(200)) for _ in range(50)]
    old = train(texts[:5], "bpe", 290)
    new = growth.learn(old, texts, 100)
    places = growth.replaced(old, new)
    assert all(expanded(new, places, text) == old.encode(text) for text in texts)
