"""How far two models are apart: tensor by tensor, and in what they expect to come next."""

from collections.abc import Iterator

import torch

from gpt import page
from gpt.model import GPT
from gpt.tokenizer import Tokenizer

WORST = 8  # tensors shown
N_TOKENS = 64  # random ids read where no text is given

Loaded = tuple[GPT, Tokenizer]


def blocks(name_a: str, a: Loaded, name_b: str, b: Loaded, text: str | None) -> Iterator[page.Block]:
    """The largest differences of parameters, and of the logits (B, T, V) of a text or of random ids.

    ValueError in words where the two do not have the same tensors, so that there is nothing to subtract.
    """
    states = a[0].state_dict(), b[0].state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    if shapes[0] != shapes[1]:
        name = next(n for n in sorted(shapes[0] | shapes[1]) if shapes[0].get(n) != shapes[1].get(n))
        here, there = (str(each.get(name, "none")) for each in shapes)
        raise ValueError(f"the models have other tensors: {name} is {here} in {name_a} and {there} in {name_b}")
    differing = [
        field for field in type(a[0].config).model_fields if getattr(a[0].config, field) != getattr(b[0].config, field)
    ]
    yield page.Heading(f"{name_a} and {name_b}")
    for field in differing:
        yield page.Note(f"{field}: {getattr(a[0].config, field)} and {getattr(b[0].config, field)}")
    if a[1].sha256 != b[1].sha256:
        yield page.Note("the tokenizers differ; both models read the ids of the first")
    apart = {name: (tensor - states[1][name]).abs().max().item() for name, tensor in states[0].items()}
    largest = sorted(apart, key=lambda name: -apart[name])[:WORST]
    rows = [(name, f"{apart[name]:.3g}", f"{states[0][name].abs().max().item():.3g}") for name in largest]
    yield page.Table(("parameter", "largest difference", "largest value"), rows)
    equal = sum(difference == 0 for difference in apart.values())
    yield page.Note(f"{equal} of {len(apart)} parameters are equal")
    yield page.Note(_logits(a, b[0], text))


def _logits(a: Loaded, b: GPT, text: str | None) -> str:
    """One sentence about what both say of the same ids."""
    model, tokenizer = a
    longest = min(config.max_seq_len or 1 for config in (model.config, b.config))
    if text is None:
        drawn = torch.randint(tokenizer.size, (min(N_TOKENS, longest),), generator=torch.Generator().manual_seed(0))
        ids, what = drawn.tolist(), "random ids"
    else:
        ids, what = [tokenizer.start_id, *tokenizer.encode(text)][:longest], "tokens of the text"
    with torch.inference_mode():
        ours, theirs = (each(torch.tensor([ids]))[..., : tokenizer.size] for each in (model, b))
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    return (
        f"logits of {len(ids)} {what}: largest difference {(ours - theirs).abs().max().item():.3g}, of values up to "
        f"{ours.abs().max().item():.3g}; the same token is the likeliest at {same} of {len(ids)} positions"
    )
