"""Batches shown are the batches of training, and figures about a data set are those of slow counting."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt import shards, tokenizer
from gpt.batches import cells, contents, of_data, order, powers, repeats, segments
from gpt.config import ConfigError
from gpt.data import IGNORED, DataConfig, Loader, open_data, validation_batches
from gpt.durable import Directory
from gpt.page import Block, Note, Row, Table, Token
from gpt.shards import Span, TokenSet
from gpt.tokenizer import Tokenizer
from gpt.views import by_source

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "another",
    "slept",
    "and",
    "dreamt",
    "of",
    "mice",
    "in",
    "the",
    "garden",
]


@pytest.fixture(scope="module")
def cutter() -> Tokenizer:
    return tokenizer.train([" ".join(WORDS) * 3], "bpe", 290)


def make(path: Path, cutter: Tokenizer, splits: dict[str, Sequence[tuple[str, int, tuple[Span, ...]]]]) -> Path:
    """A data set of (text, source, spans) documents."""
    made_with = {"vocab_size": cutter.size, "tokenizer_sha256": cutter.sha256}
    with Directory(path) as directory:
        entries = {}
        for split, documents in splits.items():
            written = [
                shards.Document([cutter.start_id, *cutter.encode(text)], len(text.encode()), source, spans)
                for text, source, spans in documents
            ]
            half = len(written) // 2
            entries[split] = [
                shards.write_shard(directory, f"{split}-{i}.shard", part, **made_with)
                for i, part in enumerate((written[:half], written[half:]))
            ]
        for name, content in cutter.files().items():
            directory.write(name, content)
        about = {"start_id": cutter.start_id, "sources": ["tales", "\x1b[2Jlists"], "settings": {}}
        shards.write_manifest(directory, splits=entries, **about, **made_with)
    return path


def texts(n: int, seed: int) -> list[tuple[str, int, tuple[Span, ...]]]:
    """Documents of 0 to 29 words, every fifth a copy of the one before it."""
    random = np.random.default_rng(seed)
    made: list[tuple[str, int, tuple[Span, ...]]] = []
    for i in range(n):
        text = " ".join(random.choice(WORDS, random.integers(30))) if i % 5 or not made else made[-1][0]
        made.append((text, i % 2, ()))
    return made


@pytest.fixture(scope="module")
def data_set(cutter, tmp_path_factory) -> Path:
    splits = {"train": texts(60, 1), "val": texts(30, 2)}
    return make(tmp_path_factory.mktemp("data") / "set", cutter, splits)


def shown(*args: object, **settings: object) -> list[Block]:
    defaults = {"step": 1, "rows": 4, "seq_len": None, "split": "train"}
    return list(of_data(*args, **(defaults | settings))[1])


def tables(blocks: list[Block]) -> dict[str, list[str]]:
    """First column -> the others, over all tables."""
    return {str(row[0]): list(row[1:]) for block in blocks if isinstance(block, Table) for row in block.rows}


# What a split holds


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_contents_are_those_of_slow_counting(data_set, cutter, monkeypatch, chunk):
    monkeypatch.setattr("gpt.batches.CHUNK", chunk)
    tokens = TokenSet(data_set, "train")
    ids = tokens.read(0, tokens.n_tokens)
    documents = np.split(ids, tokens.document_starts[1:])
    found = contents(tokens)
    assert found.counts.tolist() == [ids.tolist().count(i) for i in range(cutter.size)]
    assert found.lengths.tolist() == [len(document) for document in documents]
    hashes = [int.from_bytes(hashlib.sha256(d.tobytes()).digest()[:8], "little") for d in documents]
    assert found.digests.tolist() == hashes


def test_a_document_repeats_one_before_it_here_or_in_an_earlier_set(data_set):
    found = [contents(TokenSet(data_set, split)) for split in ("train", "val")]
    seen: set[bytes] = set()
    expected = []
    for split in ("train", "val"):
        tokens = TokenSet(data_set, split)
        documents = np.split(tokens.read(0, tokens.n_tokens), tokens.document_starts[1:])
        again = [d for d in documents if d.tobytes() in seen or seen.add(d.tobytes())]
        expected.append((len(again), sum(map(len, again))))
    assert repeats(found) == expected
    assert expected[0][0] >= 11


@given(st.lists(st.integers(0, 1 << 40), min_size=1))
def test_ranges_of_powers_hold_every_value_once(values):
    rows = powers(np.array(values, dtype=np.int64))
    assert sum(count for _, count in rows) == len(values)
    edges = [[int(n.replace(",", "")) for n in label.split("-")] for label, _ in rows]
    for (label, count), edge in zip(rows, edges, strict=True):
        assert count == sum(edge[0] <= value <= edge[-1] for value in values), label
    assert all(edge[-1] + 1 == after[0] for edge, after in itertools.pairwise(edges))
    assert rows[0][1] and rows[-1][1]


# Rows


def spelled(pairs: list[tuple[int, Token]]) -> list[tuple[int | None, bool]]:
    return [(token.id, token.learned) for _, token in pairs]


def test_a_token_is_bright_exactly_if_it_is_a_target(cutter):
    tokens, targets = [10, 11, 12, 13], [11, IGNORED, 13, 14]
    row, padding = cells(tokens, targets, cutter, cutter.start_id)
    assert spelled(row) == [(10, False), (11, True), (12, False), (13, True), (14, True)]
    assert [at for at, _ in row] == [0, 1, 2, 3, 3]
    assert padding == 0


def test_a_target_that_is_not_the_next_input_is_shown_before_it(cutter):
    start = cutter.start_id
    row, padding = cells([start, 10, 20, 21], [10, start, 21, 22], cutter, start)
    assert spelled(row) == [(start, False), (10, True), (start, True), (20, False), (21, True), (22, True)]
    row, padding = cells([start, 10, start, start], [10, start, IGNORED, IGNORED], cutter, start)
    assert (spelled(row), padding) == ([(start, False), (10, True), (start, True)], 2)
    assert cells([start] * 3, [IGNORED] * 3, cutter, start) == ([], 3)


def test_the_tokens_of_a_row_are_its_inputs_and_targets(data_set, cutter):
    data = open_data(DataConfig(path=str(data_set), seq_len=16))
    batch = Loader(data, DataConfig(path=str(data_set), seq_len=16), 8, 5).batch(3)
    for inputs, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        row, padding = cells(inputs, targets, cutter, cutter.start_id)
        learned = [token.id for _, token in row if token.learned]
        assert learned == [target for target in targets if target != IGNORED]
        assert [i for i, _ in spelled(row)][: 16 - padding] == inputs[: 16 - padding]


def test_documents_part_where_each_opens(cutter):
    start = cutter.start_id
    row, _ = cells([10, start, 11, 12], [start, 11, 12, 13], cutter, start)
    parts = segments(row, 0, [(0, "one"), (1, "two")])
    assert [(s.label, [t.id for t in s.tokens]) for s in parts] == [("one", [10]), ("two", [start, 11, 12, 13])]
    row, _ = cells([10, 20, 21, 30], [11, 21, 22, 31], cutter, start)
    parts = segments(row, 3, [(0, "a"), (1, "b"), (3, "c")])
    assert [[t.id for t in s.tokens] for s in parts] == [[10, 11], [20, 21, 22], [30, 31], [None]]


# The whole


def label_of(tokens: TokenSet, document: int) -> str:
    return f"document {document:,} ({tokens.sources[int(tokens.document_sources[document])]})"


def reference(blocks: list[Block], sets: dict[str, TokenSet]) -> int:
    """Check each segment shown against the document that its label names; how many there were."""
    n = 0
    for row in blocks:
        if not isinstance(row, Row) or row.label == "how to read the rows":
            continue
        if row.label.endswith(": padding alone"):  # what a shifted epoch may open or close with
            assert [segment.label for segment in row.segments] == [""]
            continue
        tokens = next(sets[name] for name in sets if row.label.endswith(name))
        for segment in row.segments:
            if not segment.label:
                continue
            number = int(segment.label.split()[1].replace(",", ""))
            assert segment.label.startswith(label_of(tokens, number))
            _, comma, inside = segment.label.partition(", from its token ")
            first = int(inside.split()[0].replace(",", "")) if comma else 0
            ends = [*tokens.document_starts[1:].tolist(), tokens.n_tokens]
            start = int(tokens.document_starts[number])
            document = [*tokens.read(start, ends[number] - start).tolist(), tokens.start_id]
            ids = [token.id for token in segment.tokens]
            assert ids == document[first : first + len(ids)]
            n += 1
    return n


@pytest.mark.parametrize(
    "settings", [[], ["data.packing=documents"], ["data.packing=documents", "data.document_mask=true"]]
)
def test_each_segment_is_of_the_document_that_is_named(data_set, tmp_path, settings):
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{path: '{data_set}', seq_len: 32}}\ntrain: {{steps: 5, batch_tokens: 256}}\n")
    sets = {str(data_set): TokenSet(data_set, "train")}
    for step in (1, 4):
        assert reference(shown(None, [str(config), *settings], step=step, rows=8), sets) >= 8
    evaluated = shown(str(data_set), None, seq_len=32, rows=100, split="val")
    assert reference(evaluated, {str(data_set): TokenSet(data_set, "val")}) >= 8


def test_a_mixture_shows_its_shares_and_epochs(data_set, cutter, tmp_path):
    other = make(tmp_path / "other", cutter, {"train": texts(40, 3), "val": texts(20, 4)})
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{mixture: {{'{data_set}': 0.75, '{other}': 0.25}}, seq_len: 32}}\ntrain: {{steps: 200, batch_tokens: 512}}\n"
    )
    blocks = shown(None, [str(config)], rows=16)
    assert reference(blocks, {str(path): TokenSet(path, "train") for path in (data_set, other)}) >= 8
    first = next(block for block in blocks if isinstance(block, Table))
    loader = Loader(
        open_data(data := DataConfig(mixture={str(data_set): 0.75, str(other): 0.25}, seq_len=32)), data, 16, 1337
    )
    drawn = Counter(name for step in range(1, 201) for name in loader.sources_of(step))
    epochs = dict(loader.epochs(200))
    for row, share in zip(first.rows, ("75.00%", "25.00%"), strict=True):
        name = row[0]
        assert row[2:5] == (share, f"{drawn[name] / 3200:.2%}", f"{epochs[name]:.2f}")
    assert [row[:2] for block in blocks if isinstance(block, Table) and "of tokens" in block.columns for row in block.rows] == [
        (name, f"{n}")
        for name, (n, _) in zip(drawn, repeats([contents(TokenSet(p, "train")) for p in (data_set, other)]), strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_shares_of_sources_show_documents_of_each(data_set, tmp_path, packing):
    config = tmp_path / "run.yaml"
    shares = 'sources: {tales: 0.5, "\\e[2Jlists": 0.5}'
    config.write_text(f"data: {{path: '{data_set}', seq_len: 32, {shares}}}\ntrain: {{steps: 5, batch_tokens: 256}}\n")
    blocks = shown(None, [str(config), f"data.packing={packing}"], rows=8)
    assert reference(blocks, by_source(TokenSet(data_set, "train"))) >= 8
    assert [row[:1] for row in next(b for b in blocks if isinstance(b, Table)).rows] == [("tales",), ("\x1b[2Jlists",)]


def test_an_evaluation_of_a_mixture_goes_through_its_parts(data_set, cutter, tmp_path):
    other = make(tmp_path / "other", cutter, {"train": texts(40, 3), "val": texts(20, 4)})
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{mixture: {{'{data_set}': 0.5, '{other}': 0.5}}, seq_len: 32}}\ntrain: {{steps: 9, batch_tokens: 128}}\n"
    )
    expected = [
        batch.targets.tolist()
        for path in (data_set, other)
        for batch in validation_batches(TokenSet(path, "val"), 32, 4, None)
    ]
    for step, targets in enumerate(expected, 1):
        blocks = shown(None, [str(config)], step=step, split="val")
        rows = [block for block in blocks if isinstance(block, Row)][1:]
        learned = [t.id for row in rows for s in row.segments for t in s.tokens if t.learned]
        assert learned == [i for row in targets for i in row if i != IGNORED]
    with pytest.raises(
        ValueError, match=rf"has {len(expected)} batches of 4 rows of 32 tokens, not {len(expected) + 1}"
    ):
        shown(None, [str(config)], step=len(expected) + 1, split="val")


def test_padding_and_masks_are_counted_and_dim(cutter, tmp_path):
    text = "the cat sat on a mat"
    n = len(cutter.encode(text))
    documents = [(text, 0, (Span(n // 2, n + 1, "train"),))] * 7
    path = make(tmp_path / "set", cutter, {"train": documents, "val": documents})
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{path: '{path}', seq_len: {2 * n}, packing: documents}}\ntrain: {{steps: 5, batch_tokens: {8 * n}}}\n"
    )
    blocks = shown(None, [str(config)], rows=4)
    data = DataConfig(path=str(path), seq_len=2 * n, packing="documents")
    batch = Loader(open_data(data), data, 4, 1337).batch(1)
    rows = [block for block in blocks if isinstance(block, Row)][1:]
    learned = [[t.id for s in row.segments for t in s.tokens if t.learned] for row in rows]
    assert learned == [[i for i in row if i != IGNORED] for row in batch.targets.tolist()]
    padding = [int(t.text.split()[0]) for row in rows for s in row.segments for t in s.tokens if t.role == "padding"]
    note = next(block for block in blocks if isinstance(block, Note)).text
    assert f"{batch.n_targets / batch.tokens.numel():.2%} of the targets are learned" in note
    assert f"{sum(padding) / batch.tokens.numel():.2%} are padding" in note


def test_settings_come_from_the_file_or_are_those_of_a_run_without_any(data_set, tmp_path):
    alone = order(str(data_set), None, None)
    assert (alone.data.seq_len, alone.batch_rows, alone.seed) == (256, 64, 1337)
    assert order(str(data_set), None, 128).batch_rows == 128
    config = tmp_path / "run.yaml"
    config.write_text("seed: 3\ndata: {path: elsewhere, seq_len: 32}\ntrain: {tokens: 1000, batch_tokens: 256}\n")
    given = order(None, [str(config), "train.batch_tokens=512"], None)
    assert (given.data.path, given.batch_rows, given.seed, given.steps) == ("elsewhere", 16, 3, 2)
    assert order("a: 'b\"", [str(config)], 64).data == DataConfig(path="a: 'b\"", seq_len=64)
    with pytest.raises(ConfigError, match="seq_lan"):
        order(None, [str(config), "data.seq_lan=3"], None)


TURNS = ["the cat", "sat on a mat", "while another cat", "slept"]


def talking(path: Path, cutter: Tokenizer, n: int, *, pairs: bool = False) -> Path:
    """A data set of conversations, of which every second turn is learned."""

    def talk(i: int) -> shards.Document:
        ids, spans = [cutter.start_id], [Span(0, 1, "prefix")]
        for k in range(2 if i % 3 else 4):
            words = cutter.encode(f"{TURNS[(i + k) % 4]} {i}")
            spans += [Span(len(ids), len(ids) + len(words), "train")] if k % 2 else []
            ids += words
        return shards.Document(ids, 3 * len(ids), 0, tuple(spans))

    made_with = {"vocab_size": cutter.size, "tokenizer_sha256": cutter.sha256}
    with Directory(path) as directory:
        entries = {
            split: [shards.write_shard(directory, f"{split}.tok", map(talk, range(n)), **made_with)]
            for split in ("train", "val")
        }
        for name, content in cutter.files().items():
            directory.write(name, content)
        about = {"start_id": cutter.start_id, "sources": ["talks"], "settings": {}}
        shards.write_manifest(directory, splits=entries, **about, **made_with, conversations=True, pairs=pairs)
    return path


@pytest.mark.parametrize("split", ["train", "val"])
def test_conversations_are_shown_whole_with_what_is_learned(cutter, tmp_path, split):
    path = talking(tmp_path / "set", cutter, 30)
    blocks = shown(str(path), None, seq_len=64, split=split, rows=99)
    tokens = TokenSet(path, split)
    seen = {}
    for row in [block for block in blocks if isinstance(block, Row)][1:]:
        for segment in row.segments:
            if not segment.label:
                continue
            number = int(segment.label.split()[1])
            start = int(tokens.document_starts[number])
            ids = [t.id for t in segment.tokens]
            assert ids == tokens.read(start, len(ids)).tolist() and "from its token" not in segment.label
            marks = {i for s in tokens.spans(start, len(ids)) if s.kind == "train" for i in range(s.start, s.end)}
            assert [t.learned for t in segment.tokens] == [start + i in marks for i in range(len(ids))]
            seen[number] = len(ids)
    lengths = np.diff(np.append(tokens.document_starts, tokens.n_tokens)).tolist()
    assert seen == dict(enumerate(lengths))
    note = next(block.text for block in blocks if isinstance(block, Note))
    assert "of the targets are learned" in note


def test_a_conversation_longer_than_a_row_is_told(cutter, tmp_path):
    path = talking(tmp_path / "set", cutter, 30)
    lengths = np.diff(np.append((tokens := TokenSet(path, "train")).document_starts, tokens.n_tokens))
    seq_len = int(np.median(lengths)) + 8
    assert lengths.max() > seq_len
    told = [block.text for block in shown(str(path), None, seq_len=seq_len) if isinstance(block, Note)]
    n = int((lengths > seq_len).sum())
    assert any(
        f"{n} of 30 conversations are longer than a row: {n} end with the last answer that fits" in t for t in told
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_of_a_pair_both_answers_are_shown_one_below_the_other(cutter, tmp_path, split):
    path = talking(tmp_path / "set", cutter, 20, pairs=True)
    rows = [b for b in shown(str(path), None, seq_len=64, split=split, rows=8) if isinstance(b, Row)][1:]
    labels = [[segment.label for segment in row.segments if segment.label] for row in rows]
    for chosen, rejected in zip(labels[::2], labels[1::2], strict=True):
        assert chosen and all(", chosen (talks)" in label for label in chosen)
        assert rejected == [label.replace("chosen", "rejected") for label in chosen]
