"""Looking inside: what is shown is what the model computed, for every kind of mask, position and head."""

import base64
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import write_model
from torch import Tensor

from gpt import gaze, tokenizer
from gpt.gaze import Gaze, by_distance, observe, of_text
from gpt.model import GPT, Attention, ModelConfig, init_weights
from gpt.page import Note, Script, Stage, Table, html, quoted

PROSE = "the river runs to the sea, the sea to the sky, 床前明月光，疑是地上霜。\n" * 8
KINDS = {
    "rotary, grouped queries": {"n_kv_head": 2},
    "one key head for all": {"n_kv_head": 1, "qk_norm": "whole"},
    "part of a head turns, biases": {"rotary_dim": 4, "attention_bias": True},
    "layers that do not turn": {"nope_layers": (1,), "qk_norm": False},
    "a stretched context": {"rope_scaling": {"kind": "yarn", "factor": 2.0}},
    "a window, and a layer without": {"window": 5, "full_layers": (1,), "n_kv_head": 2},
    "learned, post-norm": {"position": "learned", "norm_at": "post", "norm": "layernorm"},
    "sinusoidal, output norm": {"position": "sinusoidal", "norm_at": "output"},
    "a bias of distances": {"position": "relative", "relative_max_distance": 20, "relative_buckets": 8, "n_kv_head": 2},
    "no positions": {"position": "none"},
    "a prefix": {"prefix_lm": True, "n_kv_head": 2},
    "a prefix, a window and a bias": {"prefix_lm": True, "window": 4, "position": "relative"},
}
kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@kinds
def test_weights_times_values_are_each_attentions_own_output(settings, build, tokens):
    model = build(**settings)
    ids = tokens(20).tolist()
    outputs: list[Tensor] = []
    parts = [part for part in model.modules() if isinstance(part, Attention)]
    hooks = [part.register_forward_hook(lambda module, given, output: outputs.append(output[0])) for part in parts]
    seen = observe(model, ids, n_prefix=7 if model.config.prefix_lm else 0)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(seen.layers) == 2
    for part, layer, output in zip(parts, seen.layers, outputs, strict=True):
        shared = layer.q.shape[0] // layer.v.shape[0]
        heads = [layer.weights(head) @ layer.v[head // shared] for head in range(layer.q.shape[0])]
        with torch.no_grad():
            torch.testing.assert_close(part.o_proj(torch.cat(heads, dim=-1)), output, rtol=1e-4, atol=1e-5)
    assert not [part for part in parts if part._forward_hooks], "the model is left as it was"


def test_weights_times_values_are_the_output_of_a_fused_kernel_too(build, tokens):
    model = build(max_seq_len=600, n_kv_head=2, window=300)
    outputs = []
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda *given: outputs.append(given[2][0]))
    seen = observe(model, tokens(600).tolist())
    hook.remove()
    layer = seen.layers[1]
    heads = torch.cat([layer.weights(head) @ layer.v[head // 2] for head in range(4)], dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[1].self_attn.o_proj(heads), outputs[0], rtol=1e-4, atol=1e-5)


@kinds
def test_a_softmax_row_is_one_over_what_its_query_sees(settings, build, tokens):
    model = build(**settings)
    T, P = 20, 7 if settings.get("prefix_lm") else 0
    seen = observe(model, tokens(T).tolist(), n_prefix=P)
    for number, layer in enumerate(seen.layers):
        window = model.config.window_of(number) or T
        for q in range(T):
            for k in range(T):
                assert bool(layer.visible[q, k]) == (0 <= q - k < window or (q < P and k < P))
        weights = torch.stack([layer.weights(head) for head in range(4)])
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, T))
        assert not weights[:, ~layer.visible].any() and bool((weights[:, layer.visible] > 0).all())


def test_scores_are_the_written_formula(build, tokens):
    seen = observe(build(position="relative", n_kv_head=1), tokens(9).tolist())
    layer = seen.layers[0]
    for head, q, k in [(0, 0, 0), (1, 5, 2), (3, 8, 8), (2, 1, 7)]:
        dot = sum(a * b for a, b in zip(layer.q[head, q].tolist(), layer.k[0, k].tolist(), strict=True))
        expected = dot / math.sqrt(8) + layer.bias[head, q, k].item()
        assert layer.scores(head)[q, k].item() == pytest.approx(expected, abs=1e-5)


def test_the_probability_rank_and_rivals_of_every_true_token(build, tokens):
    model = build(logit_softcap=5.0)
    ids = tokens(12).tolist()
    after = observe(model, ids).next
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    logprobs = logits.log_softmax(-1)
    for i, true in enumerate(ids[1:]):
        assert after.logits[i] == logits[i, true] and after.logprobs[i].item() == pytest.approx(
            logprobs[i, true].item()
        )
        order = logits[i].argsort(descending=True).tolist()
        assert order[int(after.ranks[i]) - 1] == true
        assert after.rivals[i].tolist() == [token for token in order if token != true][:10]
        torch.testing.assert_close(after.rival_logprobs[i], logprobs[i, after.rivals[i]])
    assert after.rivals[-1].tolist() == logits[-1].argsort(descending=True)[:10].tolist(), (
        "nothing is true after the last"
    )
    assert len(after.logprobs) == len(ids) - 1 and len(after.rivals) == len(ids)


def test_codes_of_position_are_what_the_model_adds_or_turns_by(build, tokens):
    ids = tokens(10).tolist()
    learned, waves = build(position="learned"), build(position="sinusoidal")
    assert torch.equal(observe(learned, ids).codes, learned.model.position.weight[:10].detach())
    assert torch.equal(observe(waves, ids).codes, waves.model.position.codes[:10])
    turned = observe(build(rotary_dim=4), ids)
    assert turned.angles[0].shape == (10, 4) and not turned.codes.any()
    torch.testing.assert_close(turned.angles[0][:, 0], torch.arange(10.0).cos())
    assert turned.angles[1][3, 1].item() == pytest.approx(math.sin(3 * 10_000**-0.5))
    nothing = observe(build(position="none"), ids)
    assert nothing.angles is None and not nothing.codes.any() and nothing.layers[0].bias is None


def test_a_bias_is_kept_by_distance(build, tokens):
    bias = observe(build(position="relative"), tokens(12).tolist()).layers[0].bias
    line = by_distance(bias)
    for head, q, k in [(0, 11, 0), (1, 3, 3), (3, 0, 11)]:
        assert line[head, 11 + q - k] == bias[head, q, k]
    with pytest.raises(ValueError, match="not one of distances"):
        by_distance(bias + torch.rand(12, 12))


def test_numbers_that_are_not_finite_are_refused(build, tokens):
    model = build()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        observe(model, tokens(5).tolist())


# The page's data


@pytest.fixture(scope="module")
def words() -> tokenizer.Tokenizer:
    return tokenizer.train([PROSE], "bpe", 290)


def gazing(build, words, text=PROSE[:60], layer=1, head=3, n_prefix=0, **settings) -> Gaze:
    model = build(**{"vocab_size": words.padded_size, "max_seq_len": 128} | settings)
    ids = [words.start_id, *words.encode(text)]
    return Gaze("a model", model, words, observe(model, ids, n_prefix), layer, head, [])


def floats(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


@pytest.mark.parametrize(
    "name", ["a window, and a layer without", "a bias of distances", "a prefix, a window and a bias"]
)
def test_the_page_holds_what_gives_every_number_of_every_head(name, build, words):
    shown = gazing(build, words, n_prefix=5 if "prefix" in name else 0, **KINDS[name])
    data = json.loads(json.dumps(shown.data()))
    T, H, G, D = (data[key] for key in "THGD")
    bias = torch.zeros(H, 2 * T - 1) if data["bias"] is None else floats(data["bias"]).view(H, -1)
    at = torch.arange(T)
    for number, layer in enumerate(shown.seen.layers):
        about = data["layers"][number]
        q, k = floats(about["q"]).view(H, T, D), floats(about["k"]).view(G, T, D)
        packed = np.frombuffer(base64.b64decode(data["masks"][about["mask"]]), dtype=np.uint8)
        seen = torch.from_numpy(np.unpackbits(packed, bitorder="little")[: T * T].astype(bool)).view(T, T)
        assert torch.equal(seen, layer.visible)
        for head in range(H):
            scores = q[head] @ k[head * G // H].T / math.sqrt(D) + bias[head, at[:, None] - at + T - 1]
            torch.testing.assert_close(scores, layer.scores(head), rtol=1e-5, atol=1e-5)


def test_small_pictures_are_the_weights_and_of_long_texts_the_largest_around(build, words, monkeypatch):
    shown = gazing(build, words)
    T = shown.seen.n_tokens
    assert T < gaze.THUMB
    pixels = np.frombuffer(base64.b64decode(shown.data()["thumbs"]), dtype=np.uint8).reshape(2, 4, T, T)
    weights = shown.seen.layers[1].weights(2)
    assert np.array_equal(pixels[1, 2], (weights.sqrt() * 255).round().numpy().astype(np.uint8))
    monkeypatch.setattr(gaze, "THUMB", 4)
    pixels = np.frombuffer(base64.b64decode(shown.data()["thumbs"]), dtype=np.uint8).reshape(2, 4, 4, 4)
    assert pixels[1, 2, -1, -1] == round(weights[-(T // 4) :, -(T // 4) :].max().sqrt().item() * 255)


def test_a_page_that_would_be_too_large_has_the_chosen_layer_alone(build, words, monkeypatch):
    shown = gazing(build, words, layer=1)
    monkeypatch.setattr(gaze, "BUDGET", 1000)
    assert [sorted(layer) for layer in shown.data()["layers"]] == [["mask"], ["k", "mask", "q"]]


def test_the_page_stands_in_the_models_order_and_the_user_can_write_no_markup(build, words):
    hostile = "</script><script>alert(1)</script><!-- ]]> & \u2028 \x1b[2J"
    shown = gazing(build, words, text=hostile)
    blocks = list(shown.as_page())
    assert [b.name for b in blocks if isinstance(b, Stage)] == ["choice", "positions", "heads", "matrices", "next"]
    assert isinstance(blocks[-1], Script)
    page = b"".join(html("<b>a model</b>", blocks)).decode()
    assert page.count("<script") == page.count("</script") == 2 and "alert" not in page.split("<script>")[-1]
    assert "<!--" not in page and "<b>" not in page
    tables = [block for block in blocks if isinstance(block, Table)]
    assert len(tables[0].rows) == len(tables[1].rows) == shown.seen.n_tokens


def test_the_shift_table_begins_with_the_start_token_and_each_target_is_the_next_input(build, words):
    shown = gazing(build, words)
    rows = shown.shift(shown.seen.n_tokens).rows
    assert rows[0][1] == quoted(words.piece(words.start_id)) and rows[0][3] == str(words.start_id)
    for before, after in pairwise(rows):
        assert (before[2], before[4]) == (after[1], after[3])
    assert rows[-1][2] == rows[-1][4] == ""


def test_the_terminal_shows_softmax_rows_as_shades_and_the_likeliest_tokens(build, words):
    shown = gazing(build, words, window=6)
    blocks = list(shown.on_terminal())
    shift, rows, likely = (block for block in blocks if isinstance(block, Table))
    weights = shown.seen.layers[1].weights(3)
    n = gaze.TERMINAL_TOKENS
    assert len(shift.rows) == len(rows.rows) == len(likely.rows) == min(n, shown.seen.n_tokens)
    for i, row in enumerate(rows.rows):
        for j in range(len(rows.rows)):
            mark, weight = row[2][2 * j], weights[i, j].item()
            assert (mark == " ") == (j > i or i - j >= 6)
            assert mark == " " or {m: least for least, m in gaze.SHADES}[mark] <= weight
    for i, row in enumerate(likely.rows[:-1]):
        p = shown.seen.next.logprobs[i].exp().item()
        assert float(row[2]) == pytest.approx(p, rel=0.06, abs=6e-5) and int(row[4]) == shown.seen.next.ranks[i]
    assert any("the first 28 of" in block.text for block in blocks if isinstance(block, Note)) == (
        shown.seen.n_tokens > n
    )


@kinds
def test_every_kind_of_position_is_said_in_words_and_drawn(settings, build, words):
    shown = gazing(build, words, n_prefix=4 if settings.get("prefix_lm") else 0, **settings)
    text, codes = shown.positions(), shown.codes()
    kind = settings.get("position", "rotary")
    assert text.startswith(f"positions are {kind}") and ("sliding window" in text) == ("window" in settings)
    assert ("layers 1 do not turn" in text) == ("nope_layers" in settings) and ("both ways" in text) == (
        "prefix_lm" in settings
    )
    drawn = {"rotary": "angles", "learned": "codes", "sinusoidal": "codes", "relative": "bias", "none": "none"}
    assert codes["kind"] == drawn[kind]


# From a source


@pytest.fixture(scope="module")
def source(tmp_path_factory, words):
    """source(**settings): a model directory."""

    def make(**settings):
        path = tmp_path_factory.mktemp("model")
        small = {"max_seq_len": 24, "n_layer": 2, "d_model": 16, "n_head": 2, "init_std": 0.3}
        config = ModelConfig(**{"vocab_size": words.padded_size, **small, **settings})
        model = GPT(config)
        init_weights(model, seed=1)
        write_model(path, model, words)
        return str(path)

    return make


def test_a_text_too_long_is_cut_and_what_gives_more_is_said(source, words):
    path = source()
    whole = len(words.encode(PROSE)) + 1
    shown = of_text(path, PROSE)
    assert shown.seen.ids == [words.start_id, *words.encode(PROSE)][:24]
    assert f"after 24 of {whole} tokens" in shown.notes[0] and "larger max_seq_len" in shown.notes[0]
    assert "--max-tokens" in of_text(path, PROSE, max_tokens=10).notes[0]
    short = of_text(path, "the sea", max_tokens=10)
    assert short.notes == [] and short.seen.ids == [words.start_id, *words.encode("the sea")]


def test_a_prefix_lm_sees_its_prompt_both_ways(source, words):
    path = source(prefix_lm=True, norm="layernorm")
    n = 1 + len(words.encode("the river"))
    asked = of_text(path, " runs", prompt="the river")
    visible = asked.seen.layers[0].visible
    assert asked.seen.n_prefix == n and bool(visible[:n, :n].all()) and not visible[:n, n:].any()
    assert asked.notes == []
    alone = of_text(path, "the river")
    assert alone.seen.n_prefix == n and bool(alone.seen.layers[0].visible.all())
    assert "has seen the token" in alone.notes[0] and "--prompt" in alone.notes[0]
    assert of_text(source(), " runs", prompt="the river").seen.n_prefix == 0


@pytest.mark.parametrize(
    ("given", "words_"),
    [
        ({"text": ""}, "the text is empty"),
        ({"layer": 2}, "has layers 0 to 1"),
        ({"head": 7}, "has heads 0 to 1"),
        ({"prompt": PROSE}, "the prompt are .* tokens, and 24 are read"),
    ],
)
def test_mistakes_are_answered_in_words(given, words_, source):
    with pytest.raises(ValueError, match=words_):
        of_text(source(), **{"text": "the sea"} | given)


def test_a_source_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        of_text("nowhere", "a text")
