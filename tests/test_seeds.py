"""What the documents that this project began with say of the Transformer: each of their rows S1-S13, as a test or a few.

Other files go into each part; here the essence of each row stands beside the others, through public functions alone.
"""

import json
import math
import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import written
from conftest import Build, Tokens
from rich.console import Console
from torch import Tensor, nn

from gpt import census, config, growth, hf, prepare
from gpt import tokenizer as tokenizers
from gpt.attention import Mask, attend, masked
from gpt.data import IGNORED, DataConfig, Loader, open_data
from gpt.gaze import observe
from gpt.generate import Sampling, generate
from gpt.loss import NextToken
from gpt.model import GPT, GatedMLP, ModelConfig, PlainMLP
from gpt.optim import OptimConfig, Optimizer
from gpt.plan import flops_per_token, n_parameters
from gpt.positions import At, RopeScaling, Rotary, rotate
from gpt.tokenizer import Tokenizer
from gpt.trainer import TrainConfig

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
QUIET = Console(quiet=True)
ENGLISH = "the river runs to the sea, and the sea is full of rivers; I like to eat a hamburger.\n" * 4
CHINESE = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。我愛你，你愛我，我愛吃漢堡。\n" * 4
KINDS = ["rotary", "sinusoidal", "learned", "relative"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(path: Path, *settings: str) -> Path:
    """A data set of the given recipe in `path`."""
    prepare.prepare(config.load(prepare.PrepareConfig, None, [*settings, "workers=1"]), path, console=QUIET)
    return path


def loader(path: Path, seq_len: int, rows: int, *, prefix: bool = False, **settings: Any) -> Loader:
    data = DataConfig(path=str(path), seq_len=seq_len, **settings)
    return Loader(open_data(data), data, rows, seed=1, prefix=prefix)


# S1, S2: tokenizers


@pytest.mark.parametrize(("kind", "size"), [("bpe", 280), ("bpe", 300), ("char", None), ("word", 29)])
def test_s01_text_becomes_ids_of_a_vocabulary_that_tokenizer_json_holds(
    tmp_path: Path, kind: Any, size: int | None
) -> None:
    tokenizer = tokenizers.train([ENGLISH], kind, size)
    assert size is None or tokenizer.size <= size
    ids = tokenizer.encode("the sea is full of rivers")
    assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.decode(ids) == "the sea is full of rivers"
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    assert Tokenizer.load(tmp_path).encode("the sea") == tokenizer.encode("the sea")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("the sea")["input_ids"] == tokenizer.encode("the sea")


def test_s02_chinese_costs_bytes_until_the_vocabulary_learns_it_and_ids_and_embeddings_grow_along(
    tmp_path: Path, build: Build
) -> None:
    old = tokenizers.train([ENGLISH], "bpe", 300)
    learned, given = growth.learn(old, [CHINESE], 40), growth.add(old, ["明月", "漢堡"])
    assert len(old.encode("明月光")) == 9, "three bytes a character"
    assert len(learned.encode("明月光")) <= 3
    assert len(given.encode("漢堡")) == 1
    assert learned.encode("the sea") == given.encode("the sea") == old.encode("the sea"), "old ids stay"
    ours = tokenizers.train([CHINESE], "bpe", 330)
    assert len(ours.encode(CHINESE)) < len(CHINESE), "good at it from the start: less than a token a character"

    before = build(vocab_size=old.padded_size).state_dict()
    after = growth.extend(before, old, learned)["model.embed_tokens.weight"]
    assert len(after) >= learned.size
    assert torch.equal(after[: old.size], before["model.embed_tokens.weight"][: old.size])

    (tmp_path / "both.txt").write_text(ENGLISH + CHINESE)
    report = census.census(prepared(tmp_path / "set", f"input={tmp_path / 'both.txt'}", "vocab_size=320"))
    assert {"Latin", "Han"} <= {script for script, _, _ in report.scripts}


# S3, S4, S5: embeddings and positions


def test_s03_ids_become_vectors_of_any_width_at_a_known_cost(build: Build, tokens: Tokens) -> None:
    model = build(d_model=24, head_dim=6)
    assert model.model.embed_tokens(tokens(3, 7)).shape == (3, 7, 24)
    with torch.device("meta"):  # GPT-3's shape (Brown et al. 2020, table 2.1); the paper rounds to 175.0B
        gpt3 = GPT(
            ModelConfig(
                vocab_size=50_257, max_seq_len=2048, n_layer=96, d_model=12_288, n_head=96, position="learned",
                norm="layernorm", mlp="gelu_tanh", attention_bias=True, mlp_bias=True, qk_norm=False,
            )
        )  # fmt: skip
    assert n_parameters(gpt3) == pytest.approx(175e9, rel=0.003)
    assert flops_per_token(gpt3, 2048) * 300e9 == pytest.approx(3.14e23, rel=0.05)  # its table D.1, of 300B tokens


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_s04_each_kind_of_position_tells_the_order(build: Build, kind: str) -> None:
    """In one layer, so that it is not the causal mask that tells."""
    model = build(position=kind, n_layer=1)
    answers = model(torch.tensor([[*order, 5] for order in permutations([7, 8, 9])]))[:, -1]
    for i, one in enumerate(answers):
        assert all((one - other).abs().max() > 1e-3 for other in answers[:i])


@pytest.mark.parametrize("n_layer", [1, 2, 5])
@torch.inference_mode()
def test_s04_without_positions_attention_that_sees_all_knows_no_order(
    build: Build, tokens: Tokens, n_layer: int
) -> None:
    model, x = build(position="none", n_layer=n_layer).double(), tokens(2, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    everybody = torch.ones_like(x, dtype=torch.bool)
    permuted = model(x[:, order], prefix=everybody)
    torch.testing.assert_close(permuted, model(x, prefix=everybody)[:, order], atol=1e-10, rtol=0)


@torch.inference_mode()
def test_s04_without_positions_one_causal_layer_knows_no_order_of_the_past_and_two_recover_it(
    build: Build, tokens: Tokens
) -> None:
    x = tokens(2, 9)
    shuffled = x[:, [3, 0, 7, 1, 6, 2, 5, 4, 8]]
    one, two = (build(position="none", n_layer=n).double() for n in (1, 2))
    torch.testing.assert_close(one(shuffled)[:, -1], one(x)[:, -1], atol=1e-10, rtol=0)
    assert (two(shuffled)[:, -1] - two(x)[:, -1]).abs().max() > 1e-2


def test_s05_rope_turns_pairs_by_position_times_theta_and_scores_know_distances_alone() -> None:
    rope, q, k = Rotary(8, 64, 10_000.0), normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def at(x: Tensor, position: int) -> Tensor:
        return rotate(x, rope.angles(At(torch.tensor([[position]]), 1, 64)))[0, 0, 0]

    radians = written.frequencies(8, 10_000.0, None, 64, 64)
    torch.testing.assert_close(at(q, 13), written.turned(q[0, 0, 0], 13, radians), atol=1e-5, rtol=0)
    scores = [float(at(q, m + 5) @ at(k, m)) for m in (0, 9, 58)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)
    assert abs(float(at(q, 6) @ at(k, 0)) - scores[0]) > 1e-3


def test_s05_adjacent_pairs_are_rotate_half_with_the_columns_permuted() -> None:
    rope, x = Rotary(8, 64, 10_000.0), normal(1, 1, 12, 8)
    half = rotate(x, rope.angles(At(None, 12, 12)))[0, 0]
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    pairs = torch.view_as_complex(x[0, 0][:, order].reshape(12, 4, 2).contiguous())
    angle = torch.arange(12)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    adjacent = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)
    torch.testing.assert_close(half[:, order], adjacent, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_s05_scalings_stretch_the_slow_pairs_of_a_longer_context(kind: Any) -> None:
    scaling = RopeScaling(kind=kind, factor=8.0, original_max_seq_len=128)
    plain, stretched = Rotary(16, 1024, 10_000.0), Rotary(16, 1024, 10_000.0, scaling)
    (_, before), (_, after) = (rope.angles(At(None, 1024, 1024)) for rope in (plain, stretched))
    slowest = slice(7, 8)
    assert after[1023, slowest] < 0.3 * before[1023, slowest]


# S6, S7: attention


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"])
def test_s06_attention_is_softmax_of_q_k_over_the_root_of_d_times_v(H: int, G: int) -> None:
    q, k, v = normal(1, H, 6, 8), normal(1, G, 6, 8, seed=1), normal(1, G, 6, 8, seed=2)
    ours = attend(q, k, v, Mask(causal=False))
    for h in range(H):
        scores = q[0, h] @ k[0, h * G // H].T / math.sqrt(8)
        torch.testing.assert_close(ours[0, h], torch.softmax(scores, dim=-1) @ v[0, h * G // H], atol=1e-12, rtol=0)


def test_s06_heads_are_concatenated_and_projected(build: Build, tokens: Tokens) -> None:
    model, x = build(n_kv_head=2).double(), tokens(1, 7)
    slow = written.logits(model.config, model.state_dict(), x[0].tolist())
    torch.testing.assert_close(model(x)[0], slow, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_s07_nothing_leaks_from_the_future_in_training_all_positions_at_once(build: Build, tokens: Tokens) -> None:
    model, x = build(), tokens(2, 12)
    changed = x.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 64
    assert torch.equal(model(changed)[:, :8], model(x)[:, :8])
    alone = torch.stack([model(x[:, : t + 1])[:, -1] for t in range(12)], dim=1)
    torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_s07_decoding_one_token_at_a_time_is_the_full_forward(build: Build, tokens: Tokens) -> None:
    model, x = build(), tokens(2, 12)
    cache = model.new_cache(2, 12)
    steps = torch.cat([model(column, cache=cache) for column in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, model(x), atol=1e-5, rtol=0)


# S8: shifted right


def test_s08_a_start_token_and_then_every_position_predicts_the_next(tmp_path: Path) -> None:
    (tmp_path / "poems.jsonl").write_text("\n".join(json.dumps({"text": f"poem {i}: {ENGLISH}"}) for i in range(40)))
    path = prepared(tmp_path / "set", f"input={tmp_path / 'poems.jsonl'}", "vocab_size=300")
    batches, tokenizer = loader(path, 60, 4), Tokenizer.load(path)
    batch = batches.batch(1)
    assert (batch.targets != IGNORED).all()
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert tokenizer.start_id in batch.tokens, "in between: where a document begins"
    document = batches.parts[0].train.read(0, 8).tolist()
    assert document[0] == tokenizer.start_id
    assert tokenizer.decode(document[1:]).startswith("poem ")


# S9, S10: sub-layers


FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt-1": (transformers.OpenAIGPTConfig, {"n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 40}),
    "gpt-2": (transformers.GPT2Config, {"n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 40}),
    "llama": (
        transformers.LlamaConfig,
        {
            "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
            "intermediate_size": 50, "max_position_embeddings": 40,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_s09_gpt1_gpt2_and_llama_compute_what_their_transformers_classes_compute(tmp_path: Path, name: str) -> None:
    kind, shape = FAMILIES[name]
    tokenizer = tokenizers.train([ENGLISH], "bpe", 300)
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(kind(vocab_size=320, initializer_range=0.3, **shape)).eval()
    for parameter in theirs.parameters():  # gains and biases too
        parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_bytes(content)
    ours, _ = hf.load(tmp_path)
    x = torch.randint(320, (2, 23), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)
    tight = 1e-4 if name == "llama" else 1e-9  # transformers' RMSNorm computes in fp32 whatever it is given
    torch.testing.assert_close(ours.double()(x), theirs.double()(x).logits, atol=tight, rtol=0)


@torch.inference_mode()
def test_s09_post_norm_normalizes_the_stream_and_pre_norm_what_is_read_of_it(build: Build, tokens: Tokens) -> None:
    spread = {}
    for norm_at in ("pre", "post"):
        block = (model := build(norm="layernorm", norm_at=norm_at)).model.layers[0]
        block.register_forward_hook(lambda module, given, out, at=norm_at: spread.update({at: (given[0], out)}))
        model(tokens(2, 9))
    (before, after), (_, out) = ([x.var(dim=-1, correction=0) for x in spread[at]] for at in ("pre", "post"))
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-3, rtol=0)
    assert (after > 1.5 * before).all(), "the stream of pre-norm grows"


def test_s10_the_feed_forward_is_max_0_of_x_w1_plus_b1_times_w2_plus_b2() -> None:
    mlp, x = PlainMLP(ModelConfig(d_model=8, n_head=1, mlp="relu", mlp_bias=True)).double(), normal(5, 8)
    hidden = torch.clamp(x @ mlp.up_proj.weight.T + mlp.up_proj.bias, min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu2", "swiglu", "geglu"])
def test_s10_the_other_activations_are_their_formulas(kind: str) -> None:
    gated = kind in ("swiglu", "geglu")
    mlp: nn.Module = (GatedMLP if gated else PlainMLP)(ModelConfig(d_model=8, n_head=1, mlp=kind)).double()
    x, w = normal(5, 8), dict(mlp.named_parameters())
    hidden = written.ACTIVATIONS[kind](x @ w["gate_proj.weight" if gated else "up_proj.weight"].T)
    hidden = hidden * (x @ w["up_proj.weight"].T) if gated else hidden
    torch.testing.assert_close(mlp(x), hidden @ w["down_proj.weight"].T, atol=1e-12, rtol=0)


# S11: the answer


@torch.inference_mode()
def test_s11_six_layers_and_a_probability_for_every_word(build: Build, tokens: Tokens) -> None:
    model, x = build(n_layer=ModelConfig().n_layer), tokens(1, 9)
    assert len(model.model.layers) == 6
    logits = model(x)
    torch.testing.assert_close(model.features(x) @ model.lm_head.weight.T, logits, atol=1e-5, rtol=0)
    probabilities = logits.softmax(dim=-1)
    assert probabilities.shape == (1, 9, 64) and (probabilities > 0).all()
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(1, 9))
    (column,) = generate(model, x.tolist(), Sampling(temperature=0), 1, seed=1, n_tokens_valid=64, stop_ids=())
    assert column.ids == [int(probabilities[0, -1].argmax())]
    assert column.logprobs == pytest.approx([math.log(float(probabilities[0, -1].max()))], abs=1e-5)


# S12: from a source to a target


def test_s12_source_and_target_are_one_sequence_and_the_loss_is_on_the_target_alone(
    tmp_path: Path, build: Build
) -> None:
    pairs = [{"zh": f"我愛吃{i} ", "en": f"I like to eat {i}"} for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = f"input={{path: {tmp_path / 'pairs.jsonl'}, prompt: zh, field: en}}"
    path = prepared(tmp_path / "set", source, "vocab_size=320")
    tokenizer = Tokenizer.load(path)
    batch = loader(path, 64, 2, prefix=True, packing="documents", document_mask=True).batch(1)
    assert batch.prefix is not None and batch.doc_ids is not None
    first = batch.doc_ids[0] == 0
    ids, learned, prompt = batch.tokens[0][first], batch.targets[0][first] != IGNORED, batch.prefix[0][first]
    assert re.fullmatch(r"我愛吃\d+ ", tokenizer.decode(ids[prompt].tolist()[1:]))
    assert re.fullmatch(r"I like to eat \d+", tokenizer.decode(ids[~prompt].tolist()))
    assert learned[: int(prompt.sum()) - 1].sum() == 0 and learned[int(prompt.sum()) - 1 : -1].all()

    both, causal = build(vocab_size=320, max_seq_len=64, prefix_lm=True), build(vocab_size=320, max_seq_len=64)
    seen = both(ids[None], prefix=prompt[None])[0]
    changed = ids.clone()
    changed[2] = (changed[2] + 1) % 300
    assert not torch.equal(both(changed[None], prefix=prompt[None])[0, 0], seen[0]), "the source is read both ways"
    assert torch.equal(causal(changed[None])[0, 0], causal(ids[None])[0, 0])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_s12_held_out_sentences_are_translated_exactly_read_both_ways_or_not() -> None:
    """`-s` prints the table."""
    command = [sys.executable, str(ROOT / "benchmarks" / "translation.py")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shares = {row["case"]: row["ours"] for row in json.loads(out.splitlines()[-1])}
    print(shares)
    assert set(shares) == {"both ways", "causal"} and min(shares.values()) >= 0.99


# S13: the pictures, as tensors


def test_s13_scores_mask_softmax_rows_and_the_answer_are_the_models_own(build: Build, tokens: Tokens) -> None:
    model, ids = build(n_kv_head=2), tokens(9).tolist()
    seen = observe(model, ids)
    attentions: list[Tensor] = []
    for layer in model.model.layers:  # what goes into the last projection: softmax rows times values
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, given: attentions.append(given[0][0].detach()))
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0]
    for layer, out in zip(seen.layers, attentions, strict=True):
        assert torch.equal(layer.visible, torch.ones(9, 9, dtype=torch.bool).tril())
        for head in range(4):
            rows = layer.weights(head)
            torch.testing.assert_close(rows.sum(dim=-1), torch.ones(9))
            assert not rows.triu(1).any()
            expected = layer.scores(head).masked_fill(~layer.visible, -math.inf).softmax(dim=-1)
            torch.testing.assert_close(rows, expected)
            torch.testing.assert_close(rows @ layer.v[head // 2], out[:, 8 * head : 8 * head + 8], atol=1e-5, rtol=0)
    true = logits.log_softmax(dim=-1)[range(8), ids[1:]]
    torch.testing.assert_close(seen.next.logprobs, true, atol=1e-5, rtol=0)


# What stands below the table


def test_sequences_of_integers_train_as_they_are(tmp_path: Path, build: Build) -> None:
    clicks = [{"ids": [(i + j) % 20 for j in range(30)]} for i in range(200)]
    (tmp_path / "clicks.jsonl").write_text("\n".join(map(json.dumps, clicks)))
    path = prepared(
        tmp_path / "set", f"input={{path: {tmp_path / 'clicks.jsonl'}, ids: ids}}", "kind=ids", "vocab_size=20"
    )
    batches, vocabulary = loader(path, 31, 8), Tokenizer.load(path)
    model = build(vocab_size=vocabulary.padded_size, init_std=0.05).train()
    objective, optimizer = NextToken(model), Optimizer(model, OptimConfig(lr=5e-3))
    for step in range(1, 61):
        batch = batches.batch(step)
        loss = objective(batch.tokens, batch.targets) / batch.n_targets
        loss.backward()
        optimizer.step(1.0)
    assert loss < 0.3 < math.log(20), "the next click follows from the last"


def test_a_mask_is_minus_infinity_before_the_softmax_and_would_leak_as_a_product() -> None:
    q, k, v = normal(1, 1, 4, 8), normal(1, 1, 4, 8, seed=1), normal(1, 1, 4, 8, seed=2)
    scores, mask = q[0, 0] @ k[0, 0].T / math.sqrt(8), torch.ones(4, 4).tril()
    ours = attend(q, k, v, masked(4))[0, 0]
    hidden = scores.masked_fill(mask == 0, -math.inf).softmax(dim=-1)
    torch.testing.assert_close(ours, hidden @ v[0, 0], atol=1e-12, rtol=0)
    leaking = (scores * mask).softmax(dim=-1)
    assert leaking[0, 1:].sum() > 0.1 and not hidden[0, 1:].any()


def test_scores_are_divided_by_the_root_of_d_and_so_keep_their_spread() -> None:
    for D in (16, 1024):
        q, k = normal(1, 1, 400, D), normal(1, 1, 400, D, seed=1)
        scores = (q @ k.mT)[0, 0]
        assert (scores / math.sqrt(D)).std().item() == pytest.approx(1, abs=0.05)
        by_root, by_d = ((scores / by).softmax(dim=-1) for by in (math.sqrt(D), D))
        v = normal(1, 1, 400, D, seed=2)
        torch.testing.assert_close(attend(q, k, v, Mask(causal=False))[0, 0], by_root @ v[0, 0], atol=1e-12, rtol=0)
    assert by_root.max() > 0.03 > 0.003 > by_d.max(), "divided by D, 1,024 columns tell nothing apart"


def test_the_sinusoids_base_is_a_setting_of_10000(build: Build) -> None:
    assert ModelConfig().rope_theta == 10_000
    codes = [build(position="sinusoidal", rope_theta=base).model.position.codes for base in (10_000.0, 12_000.0)]
    for code, base in zip(codes, (10_000.0, 12_000.0), strict=True):
        torch.testing.assert_close(code[31].double(), written.sinusoid(31, 32, base), atol=1e-5, rtol=0)


# The systems as settings: configs/papers


SYSTEMS = {  # what each must reach on Tiny Shakespeare in two minutes of two CPU cores, bits per byte
    "original": 2.6,
    "gpt1": 2.5,
    "gpt2": 2.4,
    "llama": 2.4,
    "default": 2.35,
}
CLAIM = re.compile(r"([\d,]+) parameters at a vocabulary of 1,024")


def settings_of(name: str, *overrides: str) -> TrainConfig:
    return config.load(TrainConfig, ROOT / "configs" / "papers" / f"{name}.yaml", overrides, {"name": name})


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_says_its_command_its_hardware_its_result_and_its_size(name: str) -> None:
    lines = (ROOT / "configs" / "papers" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    assert header[0].startswith(f"python train.py configs/papers/{name}.yaml - 2 CPU cores")
    claim, result = CLAIM.search(" ".join(header)), re.search(r"([\d.]+) bits/byte", " ".join(header))
    assert claim and result and float(result[1]) < SYSTEMS[name]
    settings = settings_of(name, "model.vocab_size=1024")
    with torch.device("meta"):
        model = GPT(settings.model.model_copy(update={"max_seq_len": settings.data.seq_len}))
    assert n_parameters(model) == int(claim[1].replace(",", ""))


def test_the_systems_differ_in_nothing_but_the_model_and_how_it_is_optimized() -> None:
    rest = [settings_of(name).model_dump(exclude={"name", "model", "optim", "schedule"}) for name in SYSTEMS]
    assert all(each == rest[0] for each in rest)
    assert rest[0]["train"]["time"] == 120
    shapes = {(c.n_layer, c.d_model, c.n_head, c.n_group) for c in (settings_of(name).model for name in SYSTEMS)}
    assert shapes == {(6, 128, 4, 4)}


def test_the_systems_are_those_of_their_papers() -> None:
    original, gpt1, gpt2, llama, default = (settings_of(name).model for name in SYSTEMS)
    assert (original.position, original.norm, original.norm_at, original.mlp) == (
        "sinusoidal",
        "layernorm",
        "post",
        "relu",
    )
    assert (gpt1.position, gpt1.norm, gpt1.norm_at, gpt1.mlp) == ("learned", "layernorm", "post", "gelu_tanh")
    assert (gpt2.position, gpt2.norm, gpt2.norm_at, gpt2.mlp) == ("learned", "layernorm", "pre", "gelu_tanh")
    assert (llama.position, llama.norm, llama.norm_at, llama.mlp) == ("rotary", "rmsnorm", "pre", "swiglu")
    assert not any(model.qk_norm for model in (original, gpt1, gpt2, llama))
    assert default == ModelConfig(n_layer=6, d_model=128, n_head=4)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_each_system_learns_in_two_minutes(tmp_path: Path) -> None:
    """`-s` prints the table. The corpus is that of data/tinyshakespeare.yaml, which has to be in data/downloads."""
    corpus = ROOT / "data" / "downloads" / "tinyshakespeare.txt"
    if not corpus.exists():
        pytest.skip("no tinyshakespeare.txt in data/downloads")
    recipe, out = ROOT / "data" / "tinyshakespeare.yaml", tmp_path / "data" / "tinyshakespeare"
    prepare.prepare(config.load(prepare.PrepareConfig, recipe, [f"input={corpus}"]), out, console=QUIET)
    reached = {}
    for name in SYSTEMS:
        command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "papers" / f"{name}.yaml")]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        lines = list(map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()))
        best = min((line for line in lines if line["kind"] == "eval"), key=lambda line: line["val_bpb"])
        reached[name] = best["val_bpb"]
        print(f"{name:10} {best['val_bpb']:.3f} bits/byte, {lines[-1]['step']} steps in {best['elapsed_s']:.0f} s")
    assert {name: bpb for name, bpb in reached.items() if bpb >= SYSTEMS[name]} == {}
