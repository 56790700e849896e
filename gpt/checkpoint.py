"""Checkpoints: a directory that exists whole or not at all, a Hugging Face model with what resume needs beside it.

That of an adapter holds no base: what was trained, in PEFT's form, and the base's name. Tensors are safetensors, the
rest JSON and YAML. Every file's sha256 stands in manifest.json, written last, and is checked before anything is used.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt import durable
from gpt.config import Count, Settings
from gpt.durable import CorruptError
from gpt.run import MANIFEST, checkpoint_path, saved_steps

FORMAT = 1
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"  # one or the other
OPTIMIZER = "optimizer-00000-of-00001.safetensors"
STATE, SETTINGS = "state.json", "run.yaml"
PART = 64 << 20  # bytes of a tensor handed to the disk at once
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointConfig(Settings):
    """When to save and what to keep."""

    every: Count = Field(250, ge=1, description="steps between saves; the last step is always saved")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; the best is kept besides")


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The safetensors format (its README, "Format"), tensor by tensor: no second copy of the model in memory."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each begins aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: safetensors has no {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        for at in range(0, len(raw), PART):
            yield raw[at : at + PART].data


def save(
    path: Path,
    *,
    model_files: Mapping[str, bytes],
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    run_yaml: str,
    state: Mapping[str, Any],
    weights_file: str = WEIGHTS,
) -> None:
    """Write a checkpoint to `path`, whole or not at all; `weights_file` is ADAPTER where the weights are an adapter's.

    FloatingPointError, with nothing written, for a weight that is not finite.
    """
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise FloatingPointError(f"{path} was not written: {', '.join(broken[:3])} holds numbers that are not finite")
    # Each tensor names its global shape and where its slice begins, so that files of several ranks need no other format.
    slices = {
        key: json.dumps({"shape": list(value.shape), "offset": [0] * value.dim()}) for key, value in optimizer.items()
    }
    contents: dict[str, Any] = {
        **{name: [data] for name, data in model_files.items()},
        weights_file: serialize(weights, {"format": "pt"}),
        OPTIMIZER: serialize(optimizer, slices),
        SETTINGS: [run_yaml.encode()],
        STATE: [json.dumps(state, indent=1).encode()],
    }
    with durable.Directory(path) as directory:
        files = {name: directory.write(name, chunks) for name, chunks in contents.items()}
        directory.write(MANIFEST, json.dumps({"format": FORMAT, "sha256": files}, indent=1).encode())


def verify(path: Path) -> None:
    """CorruptError naming the first file of the checkpoint that is not what was written."""
    manifest = path / MANIFEST
    try:
        told = json.loads(manifest.read_bytes())
        version, files = told["format"], told["sha256"]
        needed = {ADAPTER if ADAPTER in files else WEIGHTS, OPTIMIZER, STATE, SETTINGS}
        forgotten = sorted(needed - files.keys())
    except FileNotFoundError:
        raise CorruptError(f"{manifest} is missing; {_advice(path)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptError(f"{manifest} is damaged; {_advice(path)}") from None
    if version != FORMAT:
        raise CorruptError(f"{manifest}: format {version!r}, this program reads {FORMAT}; {_advice(path)}")
    if forgotten:
        raise CorruptError(f"{manifest} does not name {forgotten[0]}; {_advice(path)}")
    for name, sha256 in files.items():
        file = path / name
        if not durable.is_plain(name) or file.is_symlink():
            raise CorruptError(f"{manifest} names {name!r}, which is not a plain file beside it; {_advice(path)}")
        if not file.is_file():
            raise CorruptError(f"{file} is missing; {_advice(path)}")
        if durable.sha256_file(file) != sha256:
            raise CorruptError(f"{file} is not what was written (its sha256 differs); {_advice(path)}")


def _advice(path: Path) -> str:
    return f"delete {path} to continue from the checkpoint before it"


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a verified checkpoint, by the names on disk."""
    return _load(path / WEIGHTS)


def load_optimizer(path: Path) -> dict[str, Tensor]:
    """The optimizer state of a verified checkpoint, by "parameter name:state name"."""
    return _load(path / OPTIMIZER)


def load_state(path: Path) -> dict[str, Any]:
    """Step, tokens and training time of a verified checkpoint."""
    return json.loads((path / STATE).read_bytes())


def _load(file: Path) -> dict[str, Tensor]:
    """Copies in memory: the package's own tensors stand on the file, and change with it."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, FileNotFoundError) as error:
        raise CorruptError(f"{file}: {error}; {_advice(file.parent)}") from None


class Checkpoints:
    """The checkpoints of one run: which are whole, which is newest, which may go."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def path(self, step: int) -> Path:
        return checkpoint_path(self.directory, step)

    def steps(self) -> list[int]:
        return saved_steps(self.directory)

    def latest(self) -> Path | None:
        """The newest checkpoint, verified; CorruptError if its bytes are not what was written."""
        steps = self.steps()
        if not steps:
            return None
        verify(self.path(steps[-1]))
        return self.path(steps[-1])

    def prune(self, best: int | None) -> None:
        """Delete all but the newest `keep` and `best`, once the newest is seen to be whole."""
        steps = self.steps()
        doomed = [step for step in steps[: -self.keep] if step != best]
        if doomed:
            verify(self.path(steps[-1]))
        for step in doomed:
            durable.remove_directory(self.path(step))

    def sweep(self) -> None:
        """Delete what writers that died left half done; only while holding the run's lock."""
        durable.sweep(self.directory)
