"""The key/value cache: decoding with it is the full forward pass, whatever the lengths and however often rewound."""

import pytest
import torch
from conftest import Build, Tokens
from variants import VARIANTS

from gpt.cache import leave, spread
from gpt.model import GPT


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request: pytest.FixtureRequest, build: Build) -> GPT:
    return build(**request.param)


@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 1, 5], [11, 1]], ids=["one by one", "in pieces", "prefill and one"])
@torch.inference_mode()
def test_decoding_with_cache_equals_the_full_forward(model: GPT, tokens: Tokens, cuts: list[int]) -> None:
    x = tokens(3, 12)
    cache = model.new_cache(3, 12)
    pieces = torch.cat([model(part, cache=cache) for part in x.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(x), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_rows_of_unequal_length_decode_as_each_alone(model: GPT, tokens: Tokens) -> None:
    x, lengths = tokens(3, 12), torch.tensor([2, 7, 5])
    cache = model.new_cache(3, 12)
    model(x[:, :7], cache=cache)  # shorter rows are padded with tokens that are not theirs
    cache.rewind(lengths)
    steps = [model(x[torch.arange(3), lengths + i][:, None], cache=cache)[:, -1] for i in range(4)]
    for row, length in enumerate(lengths.tolist()):
        alone = model(x[row : row + 1, : length + 4])[0, length:]
        torch.testing.assert_close(torch.stack([step[row] for step in steps]), alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_rows_of_unequal_length_take_several_tokens_at_once(model: GPT, tokens: Tokens) -> None:
    x, lengths = tokens(2, 12), torch.tensor([3, 6])
    cache = model.new_cache(2, 12)
    model(x[:, :6], cache=cache)
    cache.rewind(lengths)
    more = torch.stack([x[row, length : length + 4] for row, length in enumerate(lengths.tolist())])
    out = model(more, cache=cache)
    for row, length in enumerate(lengths.tolist()):
        alone = model(x[row : row + 1, : length + 4])[0, length:]
        torch.testing.assert_close(out[row], alone, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_rewound_cache_has_forgotten_what_came_after(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 10)
    cache = model.new_cache(2, 16)
    model(x[:, :4], cache=cache)
    model(tokens(2, 12, seed=9), cache=cache)
    cache.rewind(torch.tensor([4, 4]))
    torch.testing.assert_close(model(x[:, 4:], cache=cache), model(x)[:, 4:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_cache_rewound_to_nothing_is_as_new(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 6)
    cache = model.new_cache(2, 8)
    model(tokens(2, 8, seed=9), cache=cache)
    cache.rewind(torch.tensor([5, 2]))
    cache.rewind(torch.tensor([0, 0]))
    torch.testing.assert_close(model(x, cache=cache), model(x), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_what_stands_past_a_rows_length_is_never_attended(model: GPT, tokens: Tokens) -> None:
    x = tokens(2, 8)
    cache = model.new_cache(2, 16)
    model(x, cache=cache)
    cache.rewind(torch.tensor([3, 8]))
    cache.k_LBGSD[:, 0, :, 3:] = 1e4
    cache.v_LBGSD[:, 0, :, 3:] = 1e4
    out = model(x[:, 3:4], cache=cache)
    torch.testing.assert_close(out[0, 0], model(x[:1, :4])[0, 3], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_more_than_the_cache_holds_is_refused_with_the_numbers(build: Build, tokens: Tokens) -> None:
    model = build()
    cache = model.new_cache(1, 4)
    model(tokens(1, 3), cache=cache)
    with pytest.raises(ValueError, match="5 positions do not fit max_len 4"):
        model(tokens(1, 2), cache=cache)


@torch.inference_mode()
def test_rows_spread_over_several_go_on_as_each_would(model: GPT, tokens: Tokens) -> None:
    x, rows = tokens(2, 5), torch.tensor([1, 0, 1])
    cache = model.new_cache(2, 5)
    model(x, cache=cache)
    cache.rewind(torch.tensor([3, 5]))
    more = tokens(3, 2, seed=4)
    ours = model(more, cache=spread(cache, rows, 9))
    for i, (row, length) in enumerate(zip(rows.tolist(), [5, 3, 5], strict=True)):
        whole = model(torch.cat([x[row : row + 1, :length], more[i : i + 1]], dim=1))
        torch.testing.assert_close(ours[i], whole[0, length:], atol=1e-5, rtol=0)


@torch.inference_mode()
def leaving(model: GPT, x: torch.Tensor, lengths: list[int], *going: list[int]) -> None:
    """Rows of these lengths take a token each, some leave, and so on: each is what the whole row alone gives."""
    cache, lengths = model.new_cache(len(lengths), max(lengths) + len(going)), list(lengths)
    model(x[:, : max(lengths)], cache=cache)
    cache.rewind(torch.tensor(lengths))
    rows = list(range(len(lengths)))
    for gone in going:
        order = leave(cache, gone) if gone else list(range(len(rows)))
        assert sorted(order) == [i for i in range(len(rows)) if i not in gone]
        rows = [rows[place] for place in order]
        assert cache.host.known == cache.lengths.tolist() == [lengths[row] for row in rows]
        out = model(torch.stack([x[row, lengths[row]][None] for row in rows]), cache=cache)[:, -1]
        for place, row in enumerate(rows):
            lengths[row] += 1
            torch.testing.assert_close(out[place], model(x[row : row + 1, : lengths[row]])[0, -1], atol=1e-5, rtol=0)


def test_rows_leave_and_the_others_go_on(model: GPT, tokens: Tokens) -> None:
    leaving(model, tokens(4, 14), [10, 9, 3, 2], [], [0, 3], [1])


@pytest.mark.parametrize("name", ["default", "relative bias", "windows and a full layer"])
def test_rows_of_several_spans_leave_and_the_others_go_on(name: str, build: Build, tokens: Tokens) -> None:
    model = build(**VARIANTS[name], max_seq_len=180)
    leaving(model, tokens(7, 160), [150, 140, 75, 70, 66, 3, 2], [], [0, 3], [1], [0, 2])


def test_one_token_a_row_reads_no_more_than_rows_of_like_length_have_in_use(build: Build) -> None:
    cache = build(max_seq_len=2048).new_cache(6, 2048)
    cache.rewind(torch.tensor([1500, 1300, 400, 380, 20, 10]))
    assert cache.spans(1) == [(slice(0, 2), 1501), (slice(2, 4), 401), (slice(4, 6), 21)]
    assert cache.spans(3) == [(slice(0, 6), 1503)]
    assert leave(cache, [0]) == [1, 3, 2, 5, 4]
    assert cache.host.known == [1300, 380, 400, 10, 20]
    assert cache.spans(1) == [(slice(0, 1), 1301), (slice(1, 3), 401), (slice(3, 5), 21)]
    assert leave(cache, [0, 2, 1]) == [4, 3]
    assert cache.spans(1) == [(slice(0, 2), 21)]
