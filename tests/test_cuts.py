"""How a tokenizer cuts: figures against slow counting, places that differ against sets of boundaries."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import growth, shards, tokenizer
from gpt.cuts import agreement, of_shards, of_texts, of_tokenizer
from gpt.durable import Directory, write_file
from gpt.page import Block, Note, Row, Table
from gpt.tokenizer import Tokenizer

POEM = "春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。\n"
PROSE = "The cat sat on the mat, and the other cat sat on 1234 hats.\n"
TEXTS = [("poems", POEM * 3), ("prose", PROSE * 3), ("prose", "naïve café 😀 naïve café\n" * 2)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer.train([text for _, text in TEXTS], "bpe", 300)


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """Knows no Han at all, and so cuts it into bytes."""
    return tokenizer.train([PROSE * 3], "bpe", 280)


@pytest.fixture(scope="module")
def data_set(bpe, tmp_path_factory) -> Path:
    """The first two texts to train on, the last for validation."""
    path = tmp_path_factory.mktemp("data") / "set"
    made_with = {"vocab_size": bpe.size, "tokenizer_sha256": bpe.sha256}
    with Directory(path) as directory:
        splits = {}
        for split, part in (("train", TEXTS[:2]), ("val", TEXTS[2:])):
            documents = [
                shards.Document([bpe.start_id, *bpe.encode(text)], len(text.encode()), ["poems", "prose"].index(name))
                for name, text in part
            ]
            splits[split] = [shards.write_shard(directory, f"{split}.shard", documents, **made_with)]
        for name, content in bpe.files().items():
            directory.write(name, content)
        about = {"start_id": bpe.start_id, "sources": ["poems", "prose"], "settings": {}}
        shards.write_manifest(directory, splits=splits, **about, **made_with)
    return path


def save(tokenizer: Tokenizer, path: Path) -> str:
    path.mkdir()
    for name, content in tokenizer.files().items():
        write_file(path / name, content)
    return str(path)


def found(source: str, files: list[str] | None = None, other: str | None = None) -> list[Block]:
    return list(of_tokenizer(source, files or [], other)[1])


def tables(blocks: list[Block]) -> dict[str, list[str]]:
    """First column -> the others, over all tables."""
    return {str(row[0]): list(row[1:]) for block in blocks if isinstance(block, Table) for row in block.rows}


def ends(tokenizer: Tokenizer, text: str) -> set[int]:
    return set(np.cumsum([len(tokenizer.token_bytes(i)) for i in tokenizer.encode(text)]).tolist())


@pytest.mark.parametrize("which", ["bpe", "bytewise"])
def test_characters_never_split_are_those_without_a_cut_inside(which, request):
    tokenizer = request.getfixturevalue(which)
    whole = characters = 0
    for _, text in TEXTS:
        cuts, at = ends(tokenizer, text), 0
        for char in text:
            inside = range(at + 1, at + len(char.encode()))
            whole += not cuts & set(inside)
            characters += 1
            at += len(char.encode())
    measure = of_texts(tokenizer, TEXTS)
    assert (measure.n_whole, measure.n_characters) == (whole, characters)


def test_figures_add_up(bpe):
    measure = of_texts(bpe, TEXTS)
    ids = [i for _, text in TEXTS for i in bpe.encode(text)]
    assert measure.n_tokens == len(ids) == sum(n for n, _ in measure.scripts.values())
    assert (
        measure.n_bytes == sum(len(text.encode()) for _, text in TEXTS) == sum(b for _, b in measure.scripts.values())
    )
    assert measure.used == len(set(ids))
    assert [(p.name, p.documents) for p in measure.parts] == [("poems", 1), ("prose", 2)]
    han = [i for i in ids if any("\u4e00" <= c <= "\u9fff" for c in bpe.piece(i))]
    assert measure.scripts["Han"][0] >= len(han) > 0
    assert list(measure.scripts.values()) == sorted(measure.scripts.values(), key=lambda s: -s[1])


def test_shards_measure_as_their_texts_do(bpe, data_set):
    of_data, of_text = of_shards(data_set, bpe), of_texts(bpe, TEXTS)
    assert of_data.used == of_text.used + 1  # the start token
    for name in ("n_tokens", "n_bytes", "n_characters", "n_whole", "scripts", "parts"):
        assert getattr(of_data, name) == getattr(of_text, name), name


def test_a_tokenizer_alone_says_what_it_can(bpe, data_set, tmp_path):
    for blocks in (found(str(data_set)), found(save(bpe, tmp_path / "alone"))):
        longest = max(range(bpe.size), key=lambda i: (len(bpe.token_bytes(i).decode(errors="ignore")), -i))
        assert f'"{bpe.piece(longest)}"' in tables(blocks)
    file = tmp_path / "text.txt"
    file.write_text(POEM)
    shown = tables(found(str(tmp_path / "alone"), [str(file)]))
    ids = bpe.encode(POEM)
    assert shown["bytes per token"] == [f"{len(POEM.encode()) / len(ids):.2f}"]
    assert shown["tokens per character"] == [f"{len(ids) / len(POEM):.3f}"]
    assert shown[str(file)] == ["1", str(len(POEM.encode())), str(len(ids)), f"{len(POEM.encode()) / len(ids):.2f}"]


cuts = st.lists(st.integers(1, 30), max_size=20).map(lambda inner: np.array(sorted({*inner, 31}), dtype=np.int64))


@given(cuts, cuts)
def test_between_the_places_both_cut_or_one_does(first, second):
    places, differ = agreement(first, second)
    assert places.tolist() == sorted(set(first.tolist()) & set(second.tolist()))
    before = 0
    for place, differs in zip(places.tolist(), differ.tolist(), strict=True):
        inside = [n for n in (*first.tolist(), *second.tolist()) if before < n < place]
        assert differs == bool(inside)
        before = place


def test_places_that_differ_are_bright_and_the_others_dim(bpe, bytewise, data_set, tmp_path):
    other = save(bytewise, tmp_path / "other")
    blocks = found(str(data_set), other=other)
    rows = [block for block in blocks if isinstance(block, Row)]
    text = TEXTS[2][1]  # what is held out
    ours, theirs = ends(bpe, text), ends(bytewise, text)
    assert rows and ours != theirs
    for row in rows:
        left, right = ([(t.text, t.learned) for t in segment.tokens] for segment in row.segments)
        assert [t for t in left if not t[1]] == [t for t in right if not t[1]]
        assert [t for t in left if t[1]] != [t for t in right if t[1]]
    _, differ = agreement(np.array(sorted(ours)), np.array(sorted(theirs)))
    assert blocks[-1] == Note(f"{differ.sum()} places in all")
    shown = tables(blocks)
    assert shown["tokens"] == [str(len(bpe.encode(text))), str(len(bytewise.encode(text)))]
    assert shown["entries"] == [str(bpe.size), str(bytewise.size)]


def test_every_difference_of_a_short_text_is_shown_once(bpe, bytewise, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXTS[2][1][:25])
    blocks = found(save(bpe, tmp_path / "a"), [str(file)], save(bytewise, tmp_path / "b"))
    rows = [block for block in blocks if isinstance(block, Row)]
    for side, cutter in enumerate((bpe, bytewise)):
        pieces = [t.text for row in rows for t in row.segments[side].tokens if t.learned]
        assert pieces
        text = [cutter.piece(i) for i in cutter.encode(file.read_text())]
        remaining = iter(text)
        assert all(piece in remaining for piece in pieces), "in order, none twice"


def test_the_same_tokenizer_cuts_nowhere_differently(bpe, data_set, tmp_path):
    blocks = found(str(data_set), other=save(bpe, tmp_path / "same"))
    assert blocks[-1] == Note("nowhere: every token is the same")


def test_a_tokenizer_that_loses_text_is_not_laid_beside_another(bpe, tmp_path):
    words = save(tokenizer.train([PROSE], "char", None), tmp_path / "characters")
    file = tmp_path / "text.txt"
    file.write_text(POEM)
    blocks = found(save(bpe, tmp_path / "bpe"), [str(file)], words)
    assert isinstance(blocks[-1], Note) and blocks[-1].text.startswith(f"{words} does not give this text back")
    assert tables(blocks)["unknown tokens"] == ["0", str(len(POEM.replace("\n", "")))]


def test_growth_shows_what_new_tokens_take_the_place_of(bytewise, tmp_path):
    grown = growth.add(bytewise, ["春眠", "處"])
    file = tmp_path / "text.txt"
    file.write_text(POEM)
    blocks = found(save(bytewise, tmp_path / "old"), [str(file)], save(grown, tmp_path / "new"))
    shown = tables(blocks)
    for entry in ("春眠", "處"):
        before, token = shown[f'"{entry}"']
        assert grown.encode(entry) == [int(token)]
        assert before == " ".join(f'"{bytewise.piece(i)}"' for i in bytewise.encode(entry))
    assert not any(
        isinstance(b, Table) and "new token" in b.columns
        for b in found(str(tmp_path / "new"), [str(file)], str(tmp_path / "old"))
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"abc\xff", "not UTF-8 at byte 3"), (b"", "is empty"), (b"abc\xe6\x98", "not UTF-8 at byte 3")],
)
def test_text_that_cannot_be_read_is_named(bpe, tmp_path, content, words):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        found(save(bpe, tmp_path / "a"), [str(file)])


def test_a_tokenizer_that_did_not_make_the_data_set_is_refused(bytewise, data_set, tmp_path):
    shutil.copytree(data_set, tmp_path / "set")
    (tmp_path / "set" / "tokenizer.json").write_bytes(bytewise.files()["tokenizer.json"])
    with pytest.raises(ValueError, match="not the one the data set was made with"):
        found(str(tmp_path / "set"))


def test_what_is_missing_is_said_before_anything_is_measured(bpe, tmp_path):
    alone = save(bpe, tmp_path / "alone")
    with pytest.raises(ValueError, match="--text FILE"):
        of_tokenizer(alone, [], alone)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        of_tokenizer(str(tmp_path / "nowhere"), [], None)
    with pytest.raises(FileNotFoundError):
        found(alone, [str(tmp_path / "nowhere")])


def test_a_long_file_is_read_to_a_character_near_its_limit(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.cuts.FILE_BYTES", 10)
    file = tmp_path / "text.txt"
    file.write_text("春" * 5)
    row = next(block for block in found(save(bpe, tmp_path / "a"), [str(file)]) if isinstance(block, Row))
    assert "".join(token.text for token in row.segments[0].tokens).encode().decode() in ("春" * 3, r"\xe6\x98\xa5" * 3)
