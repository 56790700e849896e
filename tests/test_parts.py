import math
from collections.abc import Callable

import torch

from gpt.model import GPT
from gpt.parts import Parts
from gpt.ranks import Ranks

Build = Callable[..., GPT]


def test_one_process_holds_and_writes_everything(build: Build) -> None:
    model = build()
    parts = Parts(Ranks(), model)
    assert list(parts.handles(model)) == list(model.parameters())
    slices = parts.slices(dict(model.named_parameters()))
    assert slices.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        shape, offset, tensor = slices[name]
        assert shape == tuple(parameter.shape) and set(offset) == {0} and torch.equal(tensor, parameter)
        assert parts.copies(name) == 1 and math.prod(shape) == tensor.numel()
