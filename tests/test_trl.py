"""trl computes the same losses and gradients: of chats (assistant turns only) and of pairs, however a batch is accumulated."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_preferences import against, drawn, opened, rows_of, updated, write

from gpt import hf, tokenizer
from gpt.data import DataConfig, Loader
from gpt.loss import NextToken, ObjectiveConfig, Preferences
from gpt.model import GPT, ModelConfig, init_weights
from gpt.shards import Document, Span
from gpt.tokenizer import Tokenizer

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what trl warns of is its own
BATCHES, N = 5, 8  # batches, and pairs or conversations of each
TOLERANCE = {"rel": 0, "abs": 1e-5}


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return tokenizer.train(["some text to learn merges from"] * 3, "bpe", None)


def made(seed: int, vocabulary: Tokenizer) -> GPT:
    """A model with weights large enough for its losses to be far from those of chance."""
    shape = {"max_seq_len": 64, "n_layer": 2, "d_model": 32, "n_head": 4, "init_std": 0.15}
    model = GPT(ModelConfig(vocab_size=vocabulary.padded_size, **shape))
    init_weights(model, seed)
    return model


def theirs(model: GPT, vocabulary: Tokenizer, path: Path) -> tuple[Any, Any]:
    """(model, tokenizer) as transformers reads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path.mkdir()
    for name, data in hf.model_files(model.config, vocabulary).items():
        (path / name).write_bytes(data)
    state = {name: tensor.detach().clone() for name, tensor in hf.to_disk(model.config, model.state_dict()).items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    words = AutoTokenizer.from_pretrained(path)
    words.pad_token = words.eos_token
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"), words


def seen(kind: type, examples: Sequence[dict[str, Any]], **given: Any) -> list[list[float]]:
    """[loss, gradient norm] of each update of a trl trainer that reads the examples in order and moves nothing."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    class Watched(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.seen: list[list[float]] = []
            super().__init__(*args, **kwargs)

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset if "prompt_ids" in dataset.column_names else super()._prepare_dataset(dataset, *args)

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == len(self.seen):
                self.seen.append([0.0, 0.0])
            part = super().training_step(*args, **kwargs)
            grads = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
            self.seen[-1] = [self.seen[-1][0] + float(part), float(torch.stack(grads).norm())]
            return part

    trainer = Watched(train_dataset=Dataset.from_list(list(examples)), **given)
    trainer.train()
    return trainer.seen


def arguments(accumulation: int, path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "per_device_train_batch_size": N // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": BATCHES,
        "learning_rate": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ObjectiveConfig(kind="dpo", beta=0.3), {"loss_type": "sigmoid", "beta": 0.3}),
        (ObjectiveConfig(kind="dpo", length_normalized=True), {"loss_type": "sigmoid_norm", "beta": 5.0}),
    ],
    ids=["dpo", "averages"],
)
def test_dpo_is_trls(
    vocabulary: Tokenizer, tmp_path: Path, config: ObjectiveConfig, words: dict[str, Any], accumulation: int
) -> None:
    from trl import DPOConfig, DPOTrainer

    model, reference = made(1, vocabulary), made(2, vocabulary)
    batches = [drawn(seed, N, vocab=256) for seed in range(BATCHES)]
    examples = [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b} for pairs in batches for p, a, b in pairs]
    (policy, words_of), (frozen, _) = (
        theirs(each, vocabulary, tmp_path / name) for each, name in ((model, "policy"), (reference, "reference"))
    )
    how = DPOConfig(**arguments(accumulation, tmp_path / "out"), **words)
    expected = seen(DPOTrainer, examples, model=policy, ref_model=frozen, args=how, processing_class=words_of)
    assert len(expected) == BATCHES and all(abs(loss - 0.693) > 1e-2 for loss, _ in expected)
    objective = Preferences(model, config, against(reference.eval()))
    for pairs, (loss, norm) in zip(batches, expected, strict=True):
        batch = rows_of(tmp_path, pairs, vocab_size=vocabulary.padded_size)
        our_loss, our_norm = updated(objective, batch, -(-len(batch.tokens) // accumulation), config)
        assert our_loss == pytest.approx(loss, **TOLERANCE)
        assert our_norm == pytest.approx(norm, rel=1e-4)


def conversations(seed: int) -> list[tuple[list[int], list[int]]]:
    """(ids, whether each is an answer's) of conversations with one to three answers, of unequal lengths."""
    draw, found = random.Random(seed), []
    for _ in range(N):
        ids, mask = [0], [0]
        for _ in range(draw.randint(1, 3)):
            for learned in (0, 1):
                n = draw.randint(1, 5)
                ids += [draw.randrange(1, 256) for _ in range(n)]
                mask += [learned] * n
        found.append((ids, mask))
    return found


def spans(mask: Sequence[int]) -> tuple[Span, ...]:
    edges = [i for i in range(1, len(mask) + 1) if (mask[i] if i < len(mask) else 0) != mask[i - 1]]
    return tuple(Span(a, b, "train") for a, b in zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_loss_of_chats_is_trls(vocabulary: Tokenizer, tmp_path: Path, accumulation: int) -> None:
    from trl import SFTConfig, SFTTrainer

    model = made(1, vocabulary)
    batches = [conversations(seed) for seed in range(BATCHES)]
    examples = [{"input_ids": ids, "assistant_masks": mask} for chats in batches for ids, mask in chats]
    policy, words_of = theirs(model, vocabulary, tmp_path / "policy")
    how = SFTConfig(**arguments(accumulation, tmp_path / "out"), max_length=None, packing=False)
    expected = seen(SFTTrainer, examples, model=policy, args=how, processing_class=words_of)
    assert len(expected) == BATCHES
    for number, (chats, (loss, norm)) in enumerate(zip(batches, expected, strict=True)):
        documents = [Document(ids, 1, 0, spans(mask)) for ids, mask in chats]
        kind = {"vocab_size": vocabulary.padded_size, "pairs": False}
        data = opened(write(tmp_path / str(number), {"train": documents, "val": documents}, **kind))
        how_read = DataConfig(path="chats", seq_len=64, document_mask=True, packing="documents")
        n_rows = Loader(data, how_read, 1, seed=3).orders[0].n_rows
        assert n_rows < N  # several share a row
        batch = Loader(data, how_read, n_rows, seed=3).batch(1)
        assert batch.n_targets == sum(sum(mask) for _, mask in chats)
        our_loss, our_norm = updated(NextToken(model), batch, -(-n_rows // accumulation), ObjectiveConfig())
        assert our_loss == pytest.approx(loss, **TOLERANCE)
        assert our_norm == pytest.approx(norm, rel=1e-4)
