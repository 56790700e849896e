"""Decoding: the rules against transformers' own, the loop against the full forward pass, text against whole decodes."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from variants import VARIANTS

from gpt import generate as generator
from gpt import tokenizer as tokenizers
from gpt.generate import PASS, PORTION, Column, Event, Past, Sampling, StopText, alike, complete, generate
from gpt.model import GPT, ModelConfig, init_weights
from gpt.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
PROSE = "the river runs to the sea, and the sea is full of rivers; 床前明月光，疑是地上霜。 naïve café 🐙🦑 " * 4


def build(max_seq_len: int = 64, vocab_size: int = 64, **shape: object) -> GPT:
    settings = {
        "n_layer": 2,
        "d_model": 32,
        "n_head": 4,
        "n_kv_head": 2,
        "init_std": 0.3,
        "tie_embeddings": False,
    } | shape
    model = GPT(ModelConfig(vocab_size=vocab_size, max_seq_len=max_seq_len, **settings))
    init_weights(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return build()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train([PROSE], "bpe", 300)


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer) -> GPT:
    return build(128, tokenizer.padded_size)


def run(
    model: GPT, prompts: list[list[int]], sampling: Sampling = GREEDY, max_tokens: int = 12, **options: object
) -> list[Column]:
    return list(
        generate(model, prompts, sampling, max_tokens, **({"seed": 3, "n_tokens_valid": 64, "stop_ids": ()} | options))
    )


def row(columns: list[Column], index: int = 0) -> list[int]:
    return [column.ids[index] for column in columns if column.ids[index] is not None]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def slow_greedy(model: GPT, ids: list[int], n_tokens: int, n_prefix: int = 0) -> tuple[list[int], list[float]]:
    """The obvious way: the whole row again for every token; its first `n_prefix` see each other."""
    ids, logprobs = list(ids), []
    for _ in range(n_tokens):
        prefix = (torch.arange(len(ids)) < n_prefix)[None] if n_prefix else None
        with torch.inference_mode():
            scores = model(torch.tensor([ids]), prefix=prefix)[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores[ids[-1]]))
    return ids[-n_tokens:], logprobs


# Sampling rules


def kept(scores: Tensor) -> Tensor:
    return torch.isfinite(scores)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=1.0),
        Sampling(top_k=7, top_p=1.0),
        Sampling(top_p=0.6),
        Sampling(temperature=1.3, top_p=0.999),
        Sampling(top_p=1e-6),
        Sampling(top_p=1.0, min_p=0.1),
        Sampling(temperature=1.5, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
        Sampling(temperature=0.5, top_k=3, top_p=0.95, repetition_penalty=0.8),
    ],
    ids=str,
)
@pytest.mark.parametrize("flat", [0.01, 1.0, 5.0])
def test_kept_tokens_and_their_probabilities_are_those_of_transformers(sampling: Sampling, flat: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(8, 2500, generator=generator) * flat
    history = torch.randint(2500, (8, 40), generator=generator)
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))])
    theirs.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        theirs.append(TopKLogitsWarper(sampling.top_k))
    theirs.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        theirs.append(MinPLogitsWarper(sampling.min_p))
    expected = theirs(history, logits)

    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, history, True)
    ours = sampling.keep(sampling.penalize(logits, seen))
    # at the border of a nucleus two orders of summation may differ by one token
    assert int((kept(ours) != kept(expected)).sum(-1).max()) <= (1 if 0.9 < sampling.top_p < 1 and flat < 1 else 0)
    both = kept(ours) & kept(expected)
    torch.testing.assert_close(ours[both], expected[both])


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf]])
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(5))
    drawn = Sampling(temperature=1.0, top_p=1.0).draw(logits.expand(20_000, -1), uniform)[:, 0]
    frequencies = drawn.bincount(minlength=5) / 20_000
    torch.testing.assert_close(frequencies, logits[0].softmax(-1), atol=0.01, rtol=0)
    assert frequencies[4] == 0


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_a_possible_token(uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    assert int(Sampling(top_p=1.0).draw(logits, torch.tensor([[uniform]]))) in (1, 2)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 2.0}, "min_p is 2.0; it must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
    ],
)
def test_impossible_rules_are_refused_in_words(rules: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**rules)


# The loop


def test_logits_that_are_not_finite_are_told_of(model: GPT) -> None:
    broken = GPT(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        with pytest.raises(FloatingPointError, match="a logit is not a number"):
            run(broken, [[1, 2, 3]], sampling)


def test_cached_greedy_decoding_is_the_full_forward_token_for_token(model: GPT) -> None:
    prompt = [1, 5, 9, 2]
    columns = run(model, [prompt], max_tokens=30)
    ids, logprobs = slow_greedy(model, prompt, 30)
    assert row(columns) == ids
    assert [column.logprobs[0] for column in columns] == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5), Sampling(repetition_penalty=1.4)], ids=str)
def test_a_batch_of_unequal_prompts_equals_each_alone(model: GPT, sampling: Sampling) -> None:
    prompts = [[1], [1, 7, 7, 30, 2, 9], [1, 40, 3]]
    together = run(model, prompts, sampling, 20, seed=100)
    for index, prompt in enumerate(prompts):
        alone = run(model, [prompt], sampling, 20, seed=100 + index)
        assert row(together, index) == row(alone)
        assert [c.logprobs[index] for c in together] == pytest.approx([c.logprobs[0] for c in alone], abs=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_unequal_prompts_are_each_as_alone_in_every_kind_of_decoder(name: str) -> None:
    model = build(**(VARIANTS[name] | {"init_std": 0.2}))
    prompts = [[1], [1, *range(2, 22)], [1, 40, 3]]
    together = run(model, prompts, max_tokens=20)
    for index, prompt in enumerate(prompts):
        alone = run(model, [prompt], max_tokens=20)
        assert row(together, index) == row(alone)
        assert [c.logprobs[index] for c in together] == pytest.approx([c.logprobs[0] for c in alone], abs=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_decoder_decodes_as_in_the_full_forward(name: str) -> None:
    model = build(**(VARIANTS[name] | {"init_std": 0.2}))
    n_prefix = 4 if model.config.prefix_lm else 0
    prompts = [[1, 5, 9, 2], [1, 7, 7, 30]]
    if "dynamic" in name:  # beyond the original context a cached key keeps the angle of when it was read
        prompts = [prompt[:2] for prompt in prompts]
    n_tokens = 14 if "dynamic" in name else 24
    columns = run(model, prompts, max_tokens=n_tokens)
    for index, prompt in enumerate(prompts):
        ids, logprobs = slow_greedy(model, prompt, n_tokens, n_prefix)
        assert row(columns, index) == ids
        assert [column.logprobs[index] for column in columns] == pytest.approx(logprobs, abs=1e-4)


def test_a_prefix_lm_reads_prompts_of_unequal_length_both_ways_each_as_alone() -> None:
    model = build(prefix_lm=True)
    prompts = [[1], [1, 7, 7, 30, 2, 9], [1, 40, 3]]
    together = run(model, prompts, max_tokens=10)
    for index, prompt in enumerate(prompts):
        assert row(together, index) == slow_greedy(model, prompt, 10, len(prompt))[0]
    causal = build()
    assert row(together, 1) != slow_greedy(causal, prompts[1], 10)[0]


def test_a_prefix_lm_keeps_what_is_left_of_the_prompt_when_the_context_is_full() -> None:
    model = build(max_seq_len=8, prefix_lm=True)
    window, n_prefix, expected = [1, 5, 9, 4, 3, 2], 6, []
    for _ in range(15):
        if len(window) > 8:
            n_prefix = 1 + max(0, n_prefix - (len(window) - 4))  # the first token, and what stood among the last four
            window = window[:1] + window[-4:]
        expected += slow_greedy(model, window, 1, n_prefix)[0]
        window.append(expected[-1])
    assert row(run(model, [[1, 5, 9, 4, 3, 2]], max_tokens=15)) == expected


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-40), Sampling(repetition_penalty=1e-40)], ids=str)
def test_extreme_rules_still_draw_a_token(model: GPT, sampling: Sampling) -> None:
    assert all(0 <= token < 64 for token in row(run(model, [[1, 5]], sampling)))


def test_a_limit_that_is_none_takes_no_memory(model: GPT) -> None:
    columns = generate(model, [[1, 5]], Sampling(), 10**15, seed=0, n_tokens_valid=64, stop_ids=())
    assert [next(columns).ids[0] for _ in range(20)] == row(run(model, [[1, 5]], Sampling(), 20, seed=0))
    columns.close()


def test_what_is_colder_than_a_number_can_say_is_greedy(model: GPT) -> None:
    cold = [column.ids for column in run(model, [[1, 5, 9]], Sampling(temperature=1e-50), 5)]
    assert cold == [column.ids for column in run(model, [[1, 5, 9]], GREEDY, 5)]


def test_top_k_one_is_greedy(model: GPT) -> None:
    assert row(run(model, [[1, 2]], Sampling(temperature=2.0, top_k=1))) == row(run(model, [[1, 2]], GREEDY))


def test_top_k_one_takes_the_first_of_equals_as_greedy_does() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0]])
    drawn = [Sampling(top_k=1).draw(logits, torch.tensor([[uniform]])) for uniform in (0.0, 0.5, 0.99)]
    assert drawn == [GREEDY.draw(logits, torch.zeros(1, 1))] * 3


def test_a_heavy_repetition_penalty_never_repeats_a_token(model: GPT) -> None:
    ids = row(run(model, [[1, 2, 3]], Sampling(temperature=0, repetition_penalty=1e6), 20))
    assert len({1, 2, 3, *ids}) == 23


def test_a_seed_repeats_itself_and_rows_and_seeds_differ(model: GPT) -> None:
    sampling = Sampling(temperature=1.5, top_p=1.0)
    first, again, other = (run(model, [[1], [1]], sampling, seed=seed) for seed in (7, 7, 70))
    assert first == again
    assert row(first, 0) != row(first, 1)
    assert row(first) != row(other)


def test_a_longer_run_begins_as_a_shorter_one(model: GPT) -> None:
    sampling = Sampling(temperature=1.5)
    assert row(run(model, [[1]], sampling, 40))[:9] == row(run(model, [[1]], sampling, 9))


def test_log_probabilities_are_the_models_own_whatever_the_sampling(model: GPT) -> None:
    prompt = [1, 5]
    columns = run(model, [prompt], Sampling(temperature=3.0, top_k=20, repetition_penalty=1.5))
    ids = row(columns)
    with torch.inference_mode():
        scores = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)
    expected = [float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
    assert [column.logprobs[0] for column in columns] == pytest.approx(expected, abs=1e-5)


def test_padded_and_banned_ids_are_never_drawn() -> None:
    model = build()
    columns = run(model, [[1]] * 8, Sampling(temperature=50.0, top_p=1.0), 40, n_tokens_valid=20, banned_ids={3, 4})
    drawn = {token for column in columns for token in column.ids}
    assert drawn == set(range(20)) - {3, 4}


def test_a_row_ends_with_its_stop_id_and_the_others_go_on(model: GPT) -> None:
    free = [row(run(model, [prompt], max_tokens=20)) for prompt in ([1, 2], [1, 3, 4])]
    stop = next(token for token in free[0] if token not in free[1])
    columns = run(model, [[1, 2], [1, 3, 4]], max_tokens=20, stop_ids={stop})
    assert row(columns, 0) == free[0][: free[0].index(stop) + 1]
    assert row(columns, 1) == free[1]
    assert [(token is None) == (logprob is None) for c in columns for token, logprob in zip(*c, strict=True)]


def test_decoding_ends_when_every_row_has(model: GPT) -> None:
    stop = row(run(model, [[1, 2]]))[3]
    columns = run(model, [[1, 2], [1, 2]], stop_ids={stop})
    assert len(columns) == row(columns).index(stop) + 1 < 12


def test_a_full_context_loses_its_oldest_half_and_keeps_its_first_token() -> None:
    model = build(max_seq_len=8)
    prompt, window, expected = [1, 5, 9], [1, 5, 9], []
    for _ in range(30):
        if len(window) > 8:
            window = window[:1] + window[-4:]
        expected += slow_greedy(model, window, 1)[0]
        window.append(expected[-1])
    assert row(run(model, [prompt], max_tokens=30)) == expected


def test_rows_that_overflow_at_different_times_equal_each_alone() -> None:
    model = build(max_seq_len=10)
    prompts = [[1, 2], [1, 3, 4, 5, 6, 7, 8], [1, 9, 9, 9]]
    together = run(model, prompts, Sampling(temperature=1.2), 40, seed=20)
    assert [row(together, i) for i in range(3)] == [
        row(run(model, [prompt], Sampling(temperature=1.2), 40, seed=20 + i)) for i, prompt in enumerate(prompts)
    ]


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers() -> None:
    model = build(max_seq_len=8)
    assert len(run(model, [[1] * 7])) == 12
    with pytest.raises(ValueError, match=r"prompt has 8 tokens .* context is 8: .* shorten the prompt to 7 tokens"):
        run(model, [[1], [1] * 8])


@pytest.mark.parametrize(("prompts", "max_tokens"), [([], 5), ([[]], 5), ([[1]], 0)])
def test_nothing_to_do_is_refused(model: GPT, prompts: list[list[int]], max_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"at least one prompt|must be 1 or more"):
        run(model, prompts, max_tokens=max_tokens)


def test_a_live_model_gets_its_training_mode_back_and_can_be_trained(tokenizer: Tokenizer) -> None:
    model = build(vocab_size=tokenizer.padded_size, dropout=0.5).train()
    first = list(complete(model, tokenizer, ["the"], GREEDY, 5, seed=1))
    assert model.training
    assert first == list(complete(model, tokenizer, ["the"], GREEDY, 5, seed=1)), "dropout was on"
    for _ in complete(model, tokenizer, ["the"], GREEDY, 5, seed=1):
        assert torch.is_inference_mode_enabled() is False, "the reader of events is not in inference mode"
        break
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.lm_head.weight.grad is not None
    assert model.training


def test_a_bfloat16_model_decodes_in_its_own_dtype(model: GPT) -> None:
    low = build().bfloat16()
    columns = run(low, [[1, 5, 9], [1]], max_tokens=8)
    assert len(columns) == 8
    assert all(math.isfinite(logprob) for column in columns for logprob in column.logprobs)


# Text


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_is_the_whole_decode_without_broken_characters(
    speaker: GPT, tokenizer: Tokenizer, seed: int
) -> None:
    events = list(complete(speaker, tokenizer, ["sea 床"], Sampling(temperature=1.2), 60, seed=seed))
    ids = [event.id for event in events if event.id != tokenizer.end_id]
    whole = tokenizer.decode(ids)
    shown = text_of(events)
    assert shown.replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason in ("eos", "length")


class Script(GPT):
    """A model that says the given ids after its prompt of one token, then the last again."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        super().__init__(
            ModelConfig(vocab_size=vocab_size, max_seq_len=256, n_layer=1, d_model=32, n_head=1, tie_embeddings=False)
        )
        init_weights(self, seed=1)
        self.ids = ids
        self.lm_head = ScriptHead(self)


class ScriptHead(torch.nn.Module):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self.weight = script.lm_head.weight
        self.ids, self.said = script.ids, 0

    def forward(self, features: Tensor) -> Tensor:
        logits = torch.zeros(*features.shape[:-1], self.weight.shape[0])
        logits[..., self.ids[min(self.said, len(self.ids) - 1)]] = 9.0
        self.said += 1
        return logits


def say(
    tokenizer: Tokenizer, ids: list[int], stop: list[str] | None = None, max_tokens: int | None = None
) -> list[Event]:
    model = Script(ids, tokenizer.padded_size)
    return list(complete(model, tokenizer, [""], GREEDY, max_tokens or len(ids), seed=0, stop=stop or []))


def test_characters_cut_across_tokens_appear_whole(tokenizer: Tokenizer) -> None:
    text = "霜🐙é 鬱 x"  # 鬱 is not in the training text: one token a byte
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    events = say(tokenizer, ids)
    assert text_of(events) == text
    assert not any("\ufffd" in event.text for event in events)
    assert any(event.text == "" for event in events)


def test_a_token_between_bytes_that_form_no_character_is_not_lost(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("鬱")[0]
    ids = [*tokenizer.encode("sea"), broken, *tokenizer.encode(" river"), broken]
    assert text_of(say(tokenizer, ids)) == "sea\ufffd river"


def test_text_that_ends_inside_a_character_shows_nothing_broken(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x鬱")
    events = say(tokenizer, ids[:-1])
    assert text_of(events) == "x"
    assert events[-1].finish_reason == "length"


def test_what_stands_before_an_unfinished_character_is_shown() -> None:
    accents = tokenizers.train(["x é è ê ë à á â ã ä " * 9], "bpe", 265)  # its one merge: a space and the first byte
    ids = accents.encode("x ñ")
    assert len(ids) == 3
    events = say(accents, ids[:2])
    assert [event.text for event in events] == ["x", " "]


@pytest.mark.parametrize("stop", ["e se", "sea", "rs", "; full", "a, and the"])
def test_a_stop_string_across_token_borders_ends_the_text_before_it(tokenizer: Tokenizer, stop: str) -> None:
    text = "the river runs to the sea, and the sea is; full of rivers"
    ids = tokenizer.encode(text)
    events = say(tokenizer, ids, [stop])
    assert text_of(events) == text[: text.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert len(events) <= len(ids)


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    events = say(tokenizer, tokenizer.encode("to the se"), ["sea", "se a"])
    assert text_of(events) == "to the se"
    assert events[-1].finish_reason == "length"


def test_the_end_token_ends_the_text_and_is_not_shown(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the sea"), tokenizer.end_id, *tokenizer.encode(" is")]
    events = say(tokenizer, ids)
    assert text_of(events) == "the sea"
    assert events[-1].finish_reason == "eos"
    assert events[-1].id == tokenizer.end_id


def test_other_control_tokens_are_never_drawn(tokenizer: Tokenizer) -> None:
    others = tokenizer.control_ids - {tokenizer.end_id}
    assert others
    for control in others:
        assert not {event.id for event in say(tokenizer, [control] * 5)} & others


def test_control_words_in_a_prompt_are_text(speaker: GPT, tokenizer: Tokenizer) -> None:
    as_text = [tokenizer.start_id, *tokenizer.encode("<|endoftext|>")]
    assert len(as_text) > 2
    from_text, from_ids = (
        list(complete(speaker, tokenizer, [p], GREEDY, 5, seed=0)) for p in ("<|endoftext|>", as_text)
    )
    assert from_text == from_ids


@pytest.mark.parametrize("stops", [["abc"], ["abcd", "bc"], ["aab"], ["aa", "b"], ["dd", "cab"]])
@pytest.mark.parametrize("text", ["xxabcdxx", "aaab", "ababcabcab", "cabab", "dcdcd", "no such thing"])
def test_stops_do_not_depend_on_how_the_text_is_cut(stops: list[str], text: str) -> None:
    def shown(pieces: list[str]) -> str:
        cutter, out = StopText(stops), ""
        for piece in pieces:
            certain, stopped = cutter.push(piece)
            out += certain
            if stopped:
                return out
        return out + cutter.held

    whole = shown(list(text))
    ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
    assert whole == (text[: min(ends)[1]] if ends else text)
    for first in range(len(text)):
        for second in range(first, len(text)):
            cuts = [0, first, second, len(text)]
            assert shown([text[a:b] for a, b in pairwise(cuts)]) == whole


def test_an_empty_stop_string_is_refused(speaker: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        list(complete(speaker, tokenizer, [""], GREEDY, 5, seed=0, stop=["x", ""]))


# From one call to the next


def counted(model: GPT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of the model reads, from now on."""
    read: list[int] = []
    features = GPT.features

    def count(self: GPT, tokens: Tensor, *args: object, **options: object) -> Tensor:
        read.append(tokens.shape[1])
        return features(self, tokens, *args, **options)

    monkeypatch.setattr(GPT, "features", count)
    return read


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.5, repetition_penalty=1.3)], ids=["greedy", "drawn"]
)
def test_a_past_is_read_once_and_changes_no_token(
    model: GPT, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    past, row = Past(), [1, 5, 9]
    for new in ([7, 8], [3], [4, 4, 4]):
        row = [*row, *new]
        expected = run(model, [row], sampling, 6)
        with monkeypatch.context() as patch:
            read = counted(model, patch)
            known = past.cache.host.longest if past.cache is not None else 0
            assert [column.ids for column in run(model, [row], sampling, 6, past=past)] == [
                column.ids for column in expected
            ]
            assert read == [len(row) - known, 1, 1, 1, 1, 1]
        row = [*row, *[column.ids[0] for column in expected if column.ids[0] is not None]]


def test_another_row_is_read_from_where_it_parts_from_the_past(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    past = Past()
    run(model, [[1, 2, 3, 4, 5, 6]], max_tokens=3, past=past)
    read = counted(model, monkeypatch)
    for row, n_new in (([1, 2, 3, 9, 5, 6], 3), ([1, 2], 1), ([7, 2, 3], 3)):
        first = len(read)
        got = run(model, [row], max_tokens=2, past=past)
        assert read[first] == n_new
        assert [column.ids for column in got] == [column.ids for column in run(model, [row], max_tokens=2)]


def test_a_past_outlives_a_row_that_fills_the_context_and_one_that_is_left_early(model: GPT) -> None:
    past = Past()
    for row, max_tokens in (([1, *range(2, 60)], 20), ([1, 2, 3], 4), ([1, 2, 3, 4, 5, 6, 7], 60), ([1, 2, 3, 4], 5)):
        expected = [column.ids for column in run(model, [row], max_tokens=max_tokens)]
        assert [column.ids for column in run(model, [row], max_tokens=max_tokens, past=past)] == expected
    leaving = generate(model, [[1, 2, 3]], GREEDY, 9, seed=1, n_tokens_valid=64, stop_ids=(), past=past)
    next(leaving), next(leaving)
    leaving.close()
    expected = [column.ids for column in run(model, [[1, 2, 3, 9]])]
    assert [column.ids for column in run(model, [[1, 2, 3, 9]], past=past)] == expected


def test_a_prefix_lm_reads_each_prompt_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, past = build(prefix_lm=True), Past()
    run(model, [[1, 2, 3]], max_tokens=2, past=past)
    expected = [column.ids for column in run(model, [[1, 2, 3, 4]])]
    read = counted(model, monkeypatch)
    assert [column.ids for column in run(model, [[1, 2, 3, 4]], past=past)] == expected
    assert read[0] == 4


def test_a_row_that_turns_by_its_length_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, past, row = build(**VARIANTS["dynamic scaling"]), Past(), [1, *range(2, 14)]
    written = [column.ids[0] for column in run(model, [row], max_tokens=8, past=past)]
    row = [*row, *(id for id in written if id is not None), 5, 6]
    expected = run(model, [row], max_tokens=4)
    read = counted(model, monkeypatch)
    got = run(model, [row], max_tokens=4, past=past)
    assert read[0] == len(row) and [c.ids for c in got] == [c.ids for c in expected]
    assert [c.logprobs[0] for c in got] == pytest.approx([c.logprobs[0] for c in expected], abs=1e-5)


# No more than what there is to read


def test_prompts_of_like_length_are_read_together_and_none_with_much_padding() -> None:
    assert alike([5]) == [(0, 1)]
    assert alike([9, 9, 9]) == [(0, 3)]
    assert alike([600, 600, 400]) == [(0, 1), (1, 2), (2, 3)]  # two are more than a portion
    assert alike([5000, 20, 19, 5, 4]) == [(0, 1), (1, 4), (4, 5)]
    for seed in range(20):
        drawn = torch.randint(1, 1500, (40,), generator=torch.Generator().manual_seed(seed))
        lengths = sorted((drawn.float() ** (0.5 + seed / 40)).long().clamp(min=1).tolist(), reverse=True)
        groups = alike(lengths)
        assert [stop for _, stop in groups[:-1]] == [start for start, _ in groups[1:]]
        assert (groups[0][0], groups[-1][1]) == (0, len(lengths))
        for start, stop in groups:
            size = (stop - start) * lengths[start]
            assert stop - start == 1 or size <= PORTION
            assert size - sum(lengths[start:stop]) <= max(PASS, size // 8)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_long_prompt_is_read_in_portions_as_it_is_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = build(**VARIANTS[name])
    prompts = [[1, *range(2, 50)], [1, *range(9, 20)], [3, 4]]
    whole = run(model, prompts)
    for portion in (7, 16, 48):
        monkeypatch.setattr(generator, "PORTION", portion)
        with monkeypatch.context() as patch:
            read = counted(model, patch)
            pieces = run(model, prompts)
        at_once = model.config.prefix_lm or "dynamic" in name  # what is read decides what each token of it is
        assert max(read) == (49 if at_once else portion)
        assert [c.ids for c in pieces] == [c.ids for c in whole]
        for ours, theirs in zip(pieces, whole, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_rows_that_have_ended_are_computed_no_more(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2], [1, 3, 4], [5, 6], [7]]
    free = [row(run(model, [prompt], max_tokens=20)) for prompt in prompts]
    stops = {free[0][3], free[2][6]}
    sizes: list[int] = []
    features = GPT.features

    def count(self: GPT, tokens: Tensor, *args: object, **options: object) -> Tensor:
        sizes.append(len(tokens))
        return features(self, tokens, *args, **options)

    monkeypatch.setattr(GPT, "features", count)
    columns = run(model, prompts, max_tokens=20, stop_ids=stops)
    going = [sum(token is not None and token not in stops for token in column.ids) for column in columns]
    assert sizes[-len(columns) + 1 :] == going[: len(columns) - 1]
    assert min(going) < 4
    for i, ids in enumerate(free):
        end = next((n for n, token in enumerate(ids) if token in stops), 19)
        assert row(columns, i) == ids[: end + 1]


def test_log_probabilities_that_nobody_asks_for_are_not_given(model: GPT) -> None:
    asked, unasked = run(model, [[1, 5]]), run(model, [[1, 5]], logprobs=False)
    assert [column.ids for column in unasked] == [column.ids for column in asked]
    assert {logprob for column in unasked for logprob in column.logprobs} == {None}
