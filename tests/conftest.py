"""Small shared beginnings: models with visible weights, random tokens, and data sets of any shape held in memory."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from rich.console import Console
from runs import prepared
from safetensors.torch import save_file
from tiny import SETTINGS, write_characters
from torch import Tensor

from gpt import chat, hf, prepare
from gpt import tokenizer as tokenizers
from gpt.conversations import Conversation
from gpt.model import GPT, ModelConfig, init_weights

settings.register_profile("house", deadline=None, derandomize=True)  # a failure repeats, on a busy machine too
settings.load_profile("house")

Build = Callable[..., GPT]
Tokens = Callable[..., Tensor]


@pytest.fixture
def build() -> Build:
    """build(**settings): a two-layer decoder with weights large enough for every path to show in its logits."""

    def make(*, seed: int = 1, **settings: object) -> GPT:
        small = {"vocab_size": 64, "max_seq_len": 32, "n_layer": 2, "d_model": 32, "n_head": 4, "init_std": 0.3}
        model = GPT(ModelConfig(**(small | settings)))
        init_weights(model, seed)
        return model.eval()

    return make


def write_model(path: Path, model: GPT, tokenizer: tokenizers.Tokenizer) -> None:
    """Fill the directory `path` with a model and its tokenizer, as a checkpoint has them."""
    for name, data in hf.model_files(model.config, tokenizer).items():
        (path / name).write_bytes(data)
    state = {name: tensor.detach().clone() for name, tensor in hf.to_disk(model.config, model.state_dict()).items()}
    save_file(state, path / "model.safetensors")


@pytest.fixture
def tokens() -> Tokens:
    """tokens(*shape, seed=0): random ids below 64."""
    return lambda *shape, seed=0: torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class MemorySplit:
    """shards.Tokens over documents of the given lengths: start token 0, and ids that never repeat."""

    lengths: Sequence[int]
    document_sources: Any = None  # the first source, unless given
    sources: Sequence[str] = ("memory", "another", "third")
    start_id: int = 0
    has_spans: bool = False
    conversations: bool = False
    pairs: bool = False
    path: Path = Path("memory")
    vocab_size: int = 1 << 31
    tokenizer_sha256: str = "0" * 64
    fingerprint: str = "1" * 64
    dtype: type = np.int64

    def __post_init__(self) -> None:
        given = self.document_sources
        object.__setattr__(self, "document_sources", np.array([0] * len(self.lengths) if given is None else given))

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def n_documents(self) -> int:
        return len(self.lengths)

    @property
    def n_bytes(self) -> int:
        return 10 * self.n_tokens

    @property
    def document_starts(self) -> np.ndarray:
        return np.cumsum([0, *self.lengths[:-1]])

    @property
    def document_bytes(self) -> np.ndarray:
        return 10 * np.array(self.lengths)

    @cached_property
    def ids(self) -> np.ndarray:
        ids = 1 + np.arange(self.n_tokens)
        ids[self.document_starts] = self.start_id
        return ids

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and count >= 0 and start + count <= self.n_tokens, (start, count, self.n_tokens)
        return self.ids[start : start + count]

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        for row, start in zip(out, starts.tolist(), strict=True):
            row[...] = self.read(start, len(row))

    def spans(self, start: int, count: int) -> list[Any]:
        return []

    def verify(self) -> None: ...


@pytest.fixture(scope="session")
def split() -> Callable[..., MemorySplit]:
    """split(3, 5): a split of a document of 3 tokens and one of 5, start tokens included; by=[0, 1]: their sources."""
    return lambda *lengths, by=None: MemorySplit(lengths, by)


CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Egypt": "Cairo", "Ghana": "Accra", "Cuba": "Havana"}


@pytest.fixture(scope="session")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small model that knows CAPITALS by heart, in these words and as a chat, and nothing else."""
    path = tmp_path_factory.mktemp("pupil")
    lines = [f"The capital of {land} is {city}.\n" for land, city in CAPITALS.items()]
    chats = [(f"Capital of {land}?", city) for land, city in CAPITALS.items()]
    tokenizer = tokenizers.train([*lines * 3, *(a + b for a, b in chats * 3)], "bpe", None)
    rows = [[tokenizer.start_id, *tokenizer.encode(line), tokenizer.start_id] for line in lines]
    for question, city in chats:
        asked, told = {"role": "user", "content": question}, {"role": "assistant", "content": city}
        rows.append(chat.encode(tokenizer, Conversation((asked, told))).ids)
    config = ModelConfig(vocab_size=tokenizer.padded_size, max_seq_len=64, n_layer=2, d_model=64, n_head=4)
    model = GPT(config)
    init_weights(model, seed=1)
    batch = torch.full((len(rows), max(map(len, rows))), -100)
    for row, ids in zip(batch, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(120):
        logits = model(batch[:, :-1].clamp(min=0))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    write_model(path, model, tokenizer)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a small set of characters and tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    write_characters(Path("data/cats"), 1)
    Path("tiny.yaml").write_text(SETTINGS)
    yield tmp_path
    torch.use_deterministic_algorithms(False)


GRAMMAR = """
name: tiny
data: {path: data/tiny, seq_len: 32}
model: {n_layer: 2, d_model: 32, n_head: 2, n_kv_head: 1, dropout: 0.1}
train: {steps: 12, batch_tokens: 256, micro_batch: 4, compile: false, threads: 1}
optim: {kind: muon, lr: 0.02}
eval: {every: 4, tokens: 2000}
checkpoint: {every: 4, keep: 2}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def grammar_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of 200 short documents of a small grammar."""
    root = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    words = ["the cat", "a dog", "my bird", "sees", "hears", "likes", "the sun", "a tree", "the rain", "today", "never"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=30)) + "."}) for _ in range(200)]
    (root / "text.jsonl").write_text("\n".join(lines))
    (root / "tiny.yaml").write_text("input: [text.jsonl]\nvocab_size: 300\n")
    recipe = prepare.load_recipe(root / "tiny.yaml", [f"input={root / 'text.jsonl'}"])
    prepare.prepare(recipe, root / "tiny", console=Console(quiet=True))
    return root / "tiny"


@pytest.fixture
def grammar(grammar_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory where data/tiny is the prepared set."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny").symlink_to(grammar_set)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(GRAMMAR)
    yield tmp_path
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a prepared set, data/small."""
    return prepared(tmp_path_factory.mktemp("train") / "home")
