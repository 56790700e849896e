"""Checkpoints: a directory that exists whole or not at all, a Hugging Face model with what resume needs beside it.

python -m gpt.checkpoint verify runs/quickstart

That of an adapter holds no base: what was trained, in PEFT's form, and the base's name. Tensors are safetensors, the
rest JSON and YAML. Every file's sha256 stands in manifest.json, written last, and is checked before anything is used.
All ranks write one: each weight stands whole in one file, the optimizer's state in the blocks that the ranks hold.
"""

import argparse
from pathlib import Path

from gpt import signals


def arguments(argv: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m gpt.checkpoint", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verify")
    check = verbs.add_parser("verify", help="read every byte of checkpoints: exit 0, or 3", allow_abbrev=False)
    check.add_argument("path", metavar="RUN|CHECKPOINT", type=Path, help="a run's directory, or one checkpoint's")
    check.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    with signals.loading():
        from rich.console import Console

        from gpt import checkpoint

    console = Console()
    for line in checkpoint.verified(args.path):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    signals.run(main)  # does not return: --help answers before the rest of this file, which loads torch, is read

import json  # noqa: E402
import re  # noqa: E402
import struct  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Mapping  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from pydantic import Field  # noqa: E402
from torch import Tensor  # noqa: E402

from gpt import durable, host, slices, tensors  # noqa: E402
from gpt.config import Count, Settings  # noqa: E402
from gpt.durable import CorruptError  # noqa: E402
from gpt.hub import INDEX, WEIGHTS  # noqa: E402
from gpt.run import MANIFEST, checkpoint_path, saved_steps  # noqa: E402
from gpt.slices import Slice  # noqa: E402
from gpt.team import Team  # noqa: E402

FORMAT = 1
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # instead of WEIGHTS
SPLIT = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
OPTIMIZER = re.compile(r"optimizer-([0-9]{5})-of-([0-9]{5})\.safetensors")
STATE, SETTINGS = "state.json", "run.yaml"
PART = 64 << 20  # bytes of a tensor handed to the disk at once
# Bytes of a file, at most: one of weights is what others' loaders take; those of averages are hashed by a core each.
WEIGHTS_FILE, OPTIMIZER_FILE = 2 << 30, 256 << 20
FINITE = (1 << 15) - 1  # elements that are looked at at once on a CPU: past that torch takes more threads
DTYPES = {dtype: name for name, dtype in tensors.DTYPES.items()}
ALONE = Team()


class CheckpointConfig(Settings):
    """When to save and what to keep."""

    every: Count = Field(250, ge=1, description="steps between saves; the last step is always saved")
    keep: int = Field(2, ge=1, description="newest checkpoints kept; the best is kept besides")
    background: bool = Field(True, description="training goes on while a copy, in memory, is written; false: it waits")


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


# Writing


def as_it_is(name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """The tensor on disk is the one in memory."""
    return weights[name]


def dealt(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names of tensors, in their order, as files of at most `most` bytes each; a larger tensor has one for itself."""
    files: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if files[-1] and size > room:
            files.append([])
            room = most
        files[-1].append(name)
        room -= size
    return files


def owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank writes which weight: a pure function of the bytes that each takes on disk."""
    return {name: i % ranks for i, names in enumerate(dealt(sizes, WEIGHTS_FILE)) for name in names}


def save(
    path: Path,
    team: Team = ALONE,
    *,
    model_files: Mapping[str, bytes],
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor | Slice],
    run_yaml: str,
    state: Mapping[str, Any],
    weights_file: str = WEIGHTS,
    sizes: Mapping[str, int] | None = None,
    pack: Callable[[str, Mapping[str, Tensor]], Tensor] = as_it_is,
) -> None:
    """Write a checkpoint to `path`, whole or not at all, and see that it is. Every rank makes this call; one's error is all's.

    `weights`: what this rank writes of them, by the names that `pack` makes a tensor on disk of; `sizes`: the bytes on
    disk of all ranks' (`owners`), None where the first rank has them all. `optimizer`: the blocks that this rank writes.
    `weights_file` is ADAPTER_WEIGHTS where the weights are an adapter's. FloatingPointError, with nothing written, for a weight
    that is not finite.
    """
    with team.together():
        check_finite(path, weights)
    first_has_all = sizes is None
    if sizes is None:
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}
    files = {weights_file: list(sizes)} if weights_file == ADAPTER_WEIGHTS else _weight_files(sizes)
    mine = {
        file: names
        for i, (file, names) in enumerate(files.items())
        if (0 if first_has_all else i % team.size) == team.rank
    }
    contents: dict[str, Iterable[bytes | memoryview]] = {
        **{file: _packed(names, weights, pack) for file, names in mine.items()},
        **_optimizer_contents(optimizer, team),
    }
    if team.first:
        contents |= {name: [data] for name, data in model_files.items()}
        contents |= {SETTINGS: [run_yaml.encode()], STATE: [json.dumps(state, indent=1).encode()]}
        if weights_file != ADAPTER_WEIGHTS:
            where = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            contents[INDEX] = [json.dumps(index, indent=1).encode()]
    files_of_all = _write(path, team, contents)
    with team.together():
        if team.first and _manifest(path) != files_of_all:
            raise CorruptError(f"{path / MANIFEST} is not what was written; {_advice(path)}")
        _check_files(path, {name: files_of_all[name] for name in contents})


def check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    """FloatingPointError naming weights that are not finite."""
    broken = [
        name
        for name, tensor in weights.items()
        for part in tensor.detach().reshape(-1).split(FINITE if tensor.device.type == "cpu" else max(1, tensor.numel()))
        if not part.sum().isfinite() and not part.isfinite().all()  # a sum may overflow where no number has
    ]
    if broken:
        names = ", ".join([*dict.fromkeys(broken)][:3])
        raise FloatingPointError(f"{path} was not written: {names} holds numbers that are not finite")


def _weight_files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Name of a file -> names of the weights in it."""
    files = dealt(sizes, WEIGHTS_FILE)
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, 1)}


def _packed(
    names: list[str], weights: Mapping[str, Tensor], pack: Callable[[str, Mapping[str, Tensor]], Tensor]
) -> Iterator[bytes | memoryview]:
    """A file of weights; what is stored in another form than it has in memory is copied when the file is written."""
    yield from serialize({name: pack(name, weights) for name in names}, {"format": "pt"})


def _optimizer_contents(optimizer: Mapping[str, Tensor | Slice], team: Team) -> dict[str, Iterator[bytes | memoryview]]:
    """This rank's files of the optimizer's state, which are numbered over all ranks; the first has one at least."""
    blocks = {key: value if isinstance(value, Slice) else Slice.whole(value) for key, value in optimizer.items()}
    sizes = {key: block.tensor.numel() * block.tensor.element_size() for key, block in blocks.items()}
    files = dealt(sizes, OPTIMIZER_FILE) if blocks or team.first else []
    counts = team.gather(len(files))
    return {
        f"optimizer-{i:05d}-of-{sum(counts):05d}.safetensors": serialize(
            {key: blocks[key].tensor for key in keys}, {key: blocks[key].described() for key in keys}
        )
        for i, keys in enumerate(files, sum(counts[: team.rank]))
    }


def _write(path: Path, team: Team, contents: Mapping[str, Iterable[bytes | memoryview]]) -> dict[str, str]:
    """Write every rank's files; the first makes the directory, and gives it its name when all have written. All hashes."""
    with ExitStack() as stack:
        with team.together():
            directory = stack.enter_context(durable.Directory(path)) if team.first else durable.Directory(path)
        name = team.told(directory.temporary)
        if not team.first:
            directory = durable.Directory(path, name)
        with team.together():
            if not path.with_name(name).is_dir():
                raise FileNotFoundError(
                    f"{path.parent} is another directory on the machine of rank {team.rank} than on that of rank 0: let it stand "
                    "on a disk that all machines share"
                )
            written = {file: directory.write(file, chunks) for file, chunks in contents.items()}
        files = {file: sha256 for each in team.gather(written) for file, sha256 in each.items()}
        with team.together():
            if team.first:
                directory.write(MANIFEST, json.dumps({"format": FORMAT, "sha256": files}, indent=1).encode())
            stack.close()  # the first rank's is renamed here
    return files


# Checking


def verify(path: Path, team: Team = ALONE) -> None:
    """CorruptError naming the first file of the checkpoint that is not what was written; ranks share the work."""
    with team.together():
        files = _manifest(path)
        sizes = {name: (path / name).stat().st_size for name in files}
        dealt_out = sorted(files, key=lambda name: -sizes[name])[team.rank :: team.size]
        _check_files(path, {name: files[name] for name in files if name in dealt_out})


def _manifest(path: Path) -> dict[str, str]:
    """The sha256 of every file of a checkpoint, all of which are there, as its manifest says; CorruptError otherwise."""
    manifest = path / MANIFEST
    if manifest.is_symlink():
        raise CorruptError(f"{manifest} is a symbolic link, which is not followed; {_advice(path)}")
    try:
        told = json.loads(manifest.read_bytes())
        version, files = told["format"], told["sha256"]
        split = _numbered(SPLIT, files, 1)
        whole = ADAPTER_WEIGHTS if ADAPTER_WEIGHTS in files else WEIGHTS
        needed = {STATE, SETTINGS} | ({INDEX, *split} if split else {whole})
        needed |= _numbered(OPTIMIZER, files, 0) or {"optimizer-00000-of-00001.safetensors"}
        forgotten = sorted(needed - files.keys())
    except FileNotFoundError:
        raise CorruptError(f"{manifest} is missing; {_advice(path)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptError(f"{manifest} is damaged; {_advice(path)}") from None
    if version != FORMAT:
        raise CorruptError(f"{manifest}: format {version!r}, this program reads {FORMAT}; {_advice(path)}")
    if forgotten:
        raise CorruptError(f"{manifest} does not name {forgotten[0]}; {_advice(path)}")
    for name in files:
        file = path / name
        if not durable.is_plain(name) or file.is_symlink():
            raise CorruptError(f"{manifest} names {name!r}, which is not a plain file beside it; {_advice(path)}")
        if not file.is_file():
            raise CorruptError(f"{file} is missing; {_advice(path)}")
    return files


def _numbered(pattern: re.Pattern[str], files: Iterable[str], first: int) -> set[str]:
    """All files of the series that some of `files` belong to, counted from `first`; of no more than could be there."""
    found = [match for match in map(pattern.fullmatch, files) if match]
    n = max((int(match[2]) for match in found), default=0)
    kind = pattern.pattern.partition("-")[0]
    return {f"{kind}-{i:05d}-of-{n:05d}.safetensors" for i in range(first, first + min(n, len(found) + 1))}


def _check_files(path: Path, files: Mapping[str, str]) -> None:
    """CorruptError naming the first of `files` whose sha256 is another; by all cores, the largest files first."""
    with ThreadPoolExecutor(host.n_cores()) as pool:
        largest = sorted(files, key=lambda name: -(path / name).stat().st_size)
        sums = dict(zip(largest, pool.map(durable.sha256_file, (path / name for name in largest)), strict=True))
    for name, sha256 in files.items():
        if sums[name] != sha256:
            raise CorruptError(f"{path / name} is not what was written (its sha256 differs); {_advice(path)}")


def _advice(path: Path) -> str:
    return f"delete {path} to continue from the checkpoint before it"


def verified(path: Path) -> Iterator[str]:
    """Read every byte of a checkpoint, or of all of a run: a line on each; then CorruptError with what is wrong, if anything."""
    run = (path / "checkpoints").is_dir()
    found = sorted(each for each in (path / "checkpoints").glob("step_*") if each.is_dir()) if run else [path]
    if (
        not path.is_dir()
        or not found
        or not (run or any((path / name).exists() for name in (MANIFEST, STATE, SETTINGS)))
    ):
        what = "has no checkpoint yet" if run else "is neither a run's directory nor a checkpoint"
        raise ValueError(f"{path} {what}; expected runs/NAME, or a directory in runs/NAME/checkpoints")
    wrong = []
    for each in found:
        began = time.perf_counter()
        try:
            verify(each)
            _check_contents(each)
            size = sum(file.stat().st_size for file in each.iterdir())
        except (CorruptError, FileNotFoundError) as error:
            if each.exists():
                wrong.append(str(error))
                yield f"{each}: damaged"
            else:
                yield f"{each}: its run has deleted it in the meantime"
        else:
            yield f"{each}: whole, {size / 1e6:,.1f} MB in {time.perf_counter() - began:.1f} s"
    if wrong:
        raise CorruptError("\n".join(wrong))


def _check_contents(path: Path) -> None:
    """CorruptError unless a verified checkpoint's files hold every tensor once."""
    for file in weight_files(path):
        tensors.stored(file)
    slices.found(optimizer_files(path))


# Reading


def weight_files(path: Path) -> list[Path]:
    """Where the weights of a verified checkpoint stand."""
    return [
        path / name for name in sorted(_manifest(path)) if name in (WEIGHTS, ADAPTER_WEIGHTS) or SPLIT.fullmatch(name)
    ]


def optimizer_files(path: Path) -> list[Path]:
    """Where the optimizer's state of a verified checkpoint stands."""
    return [path / name for name in sorted(_manifest(path)) if OPTIMIZER.fullmatch(name)]


def load_optimizer(path: Path, wanted: slices.Wanted = slices.whole) -> Mapping[str, Tensor]:
    """The optimizer state of a verified checkpoint, by "parameter name:state name": each is read when it is asked for.

    Of each tensor the block that is `wanted`, whoever wrote which blocks of it.
    """
    return slices.Files(optimizer_files(path), wanted)


def load_state(path: Path) -> dict[str, Any]:
    """Step, tokens and training time of a verified checkpoint."""
    file = path / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{file} is not JSON ({error}); {_advice(path)}") from None
    return state


class Checkpoints:
    """The checkpoints of one run: which are whole, which is newest, which may go."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def path(self, step: int) -> Path:
        return checkpoint_path(self.directory, step)

    def steps(self) -> list[int]:
        return saved_steps(self.directory)

    def latest(self, team: Team = ALONE) -> Path | None:
        """The newest checkpoint, verified; CorruptError if its bytes are not what was written. The same on every rank."""
        step = team.told(max(self.steps(), default=None))
        if step is None:
            return None
        verify(self.path(step), team)
        return self.path(step)

    def prune(self, best: int | None, *besides: int | None, whole: int | None = None) -> None:
        """Delete all but the newest `keep`, `best` and those `besides`, once the newest is seen to be whole.

        `whole` was seen to be just now.
        """
        steps = self.steps()
        doomed = [step for step in steps[: -self.keep] if step not in (best, *besides)]
        if doomed and steps[-1] != whole:
            verify(self.path(steps[-1]))
        for step in doomed:
            durable.remove_directory(self.path(step))

    def sweep(self) -> None:
        """Delete what writers that died left half done; only while holding the run's lock. ValueError for what stands where a
        checkpoint will be written and is none."""
        durable.sweep(self.directory)
        for place in sorted(self.directory.glob("step_*")):
            if not (place / MANIFEST).exists():
                raise ValueError(
                    f"{place} is no whole checkpoint (it has no {MANIFEST}), and may stand in the way of one: delete it"
                )
