"""Model directories in Hugging Face's form: strict loading, and the verb that compares two models or writes one as GGUF.

python -m gpt.hf compare runs/quickstart hub:ORG/NAME --text 'def add(a, b):'
python -m gpt.hf gguf runs/quickstart model.gguf --dtype bfloat16

A checkpoint is such a directory as it stands, so there is no export; that of an adapter names its base, by path and
fingerprint, and loads as the two merged. Only what `hub:` names is fetched, and no file
that could run code (a pickle) is read.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gpt import signals


def arguments(argv: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m gpt.hf", description=__doc__, formatter_class=kind, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="compare | gguf")
    source = "a run, RUN@STEP|best|last, a checkpoint, a Hugging Face model directory, or hub:ORG/NAME[@REVISION]"
    compare = verbs.add_parser("compare", help="how far two models are apart", allow_abbrev=False)
    compare.add_argument("a", metavar="A", help=source)
    compare.add_argument("b", metavar="B", help="another one; exit 0 where both load and can be compared")
    compare.add_argument("--text", metavar="T", help="what both read; without it, ids drawn from a fixed seed")
    gguf = verbs.add_parser("gguf", help="a model and its tokenizer as one file for llama.cpp", allow_abbrev=False)
    gguf.add_argument("source", metavar="SOURCE", help=source)
    gguf.add_argument("out", metavar="OUT.gguf", type=Path, help="the file, whole or not at all")
    gguf.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrices (float32)")
    for verb in (compare, gguf):
        verb.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    with signals.loading():
        from rich.console import Console

        from gpt import compare, gguf, hf, page, run

    console = Console()
    if args.verb == "gguf":
        if args.out.suffix != ".gguf" or (args.out.exists() and not args.out.is_file()):
            raise ValueError(f"{str(args.out)!r} is no file whose name ends in .gguf; nothing else is overwritten")
        path, described = run.resolve(args.source)
        model, tokenizer = hf.load(path)
        notes = gguf.write(args.out, model.config, model.state_dict(), tokenizer, args.dtype)
        blocks: Iterable[page.Block] = [page.Note(f"{described} written to {args.out}"), *map(page.Note, notes)]
    else:
        (path_a, a), (path_b, b) = run.resolve(args.a), run.resolve(args.b)
        text = None if args.text is None else os.fsencode(args.text).decode("utf-8", "replace")
        blocks = compare.blocks(a, hf.load(path_a), b, hf.load(path_b), text)
    for block in blocks:
        signals.check()
        page.draw(block, console)


if __name__ == "__main__":
    signals.run(main)  # does not return: --help answers before the rest of this file, which loads torch, is read

import torch  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from gpt import adapters, chat, checkpoint, durable, families, quantize, run, slices, tensors  # noqa: E402
from gpt.adapters import AdapterConfig  # noqa: E402
from gpt.durable import CorruptError, plain  # noqa: E402
from gpt.hub import INDEX, WEIGHTS  # noqa: E402
from gpt.model import GPT, ModelConfig  # noqa: E402
from gpt.run import PICKLES  # noqa: E402
from gpt.slices import Slice  # noqa: E402
from gpt.tokenizer import Tokenizer  # noqa: E402

BASE = "base.json"  # of an adapter: its settings, and which base they are for
TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # what a tokenizer is read from
ENOUGH = 8  # names in an error
MAX_ROWS = 1 << 40  # of embeddings: shapes past it have no size in bytes


def model_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Everything a model directory holds besides its weights: file name -> bytes."""
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}
    family = families.family_of(config)
    raw = families.write_ours(config) if family is None else families.write(family, config)
    # pad_token_id: some classes have one of their own, past our vocabulary; dtype: the key's new and old name
    raw |= ids | {"pad_token_id": None, "dtype": "float32", "torch_dtype": "float32"}
    return {"config.json": _json(raw), "generation_config.json": _json(ids | _ends(tokenizer)), **tokenizer.files()}


def _ends(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """What else ends a reply, of a tokenizer that knows chats: those who generate stop where a turn does."""
    ends: set[int] = set()
    if tokenizer.config.get("chat_template") is not None:
        with suppress(ValueError):  # a template of others that ends no reply by a control token
            ends = chat.reply_ends(tokenizer) - {tokenizer.end_id}
    return {"eos_token_id": [tokenizer.end_id, *sorted(ends)]} if ends else {}


def places(config: ModelConfig, names: Iterable[str]) -> dict[str, families.Place]:
    """Where a parameter stands in memory, by what the class in config.json calls it. A tied head is stored once, the embedding."""
    return families.places(families.family_of(config), config, names)


def to_disk(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by what the class in config.json calls them; copied only where it also stores them in another form."""
    return {name: families.pack(place, state) for name, place in places(config, state).items()}


def fill(config: ModelConfig, path: Path, blocks: Mapping[str, Slice]) -> None:
    """Fill `blocks` of parameters, named as in memory, from the weights in `path`, a verified checkpoint of this shape.

    No more of a file is read than they hold, but for the rare tensors whose rows stand in another order on disk.
    """
    shapes = _shapes(config).state_dict()
    found = _stored(path, families.family_of(config))
    _check_tensors(path, {disk: tensor.shape for disk, tensor in to_disk(config, shapes).items()}, found)
    for disk, place in places(config, shapes).items():
        stored, row = slices.undivided(found[disk]), 0
        for name in place.memory:
            if (block := blocks.get(name)) is not None:
                _fill_block(block, stored, place, name, row)
            row += len(shapes[name])


def _fill_block(block: Slice, stored: slices.Parts, place: families.Place, name: str, row: int) -> None:
    """Fill `block` of the parameter `name`, whose first row is `row` of what is stored."""
    (first, *others), shape = block.offset, tuple(block.tensor.shape)
    offset = (row + first, *others)
    if place.heads is not None:
        whole = families.unpack(place, slices.read(stored))[name]
        block.tensor.detach().copy_(block.cut(whole))
    elif place.transposed:
        block.tensor.detach().copy_(slices.read(stored, (offset[::-1], shape[::-1])).t())
    else:
        slices.read(stored, (offset, shape), block.tensor)


def load(path: Path) -> tuple[GPT, Tokenizer]:
    """Load a checkpoint or a Hugging Face model directory: an fp32 model on the CPU in eval mode, and its tokenizer.

    Strict: FileNotFoundError or ValueError names what is missing, unexpected, mis-shaped, not finite or not supported;
    CorruptError names a file that is not what its manifest or header says. No weight is read before all of that fits.
    An adapter is loaded onto its base, in the bits that it was kept in, and merged with it.
    """
    if (path / run.ADAPTER).exists():
        return _load_merged(path)
    if (path / checkpoint.MANIFEST).exists():
        checkpoint.verify(path)
    family, config = _read_config(path)
    tokenizer = _tokenizer(path, config)
    assert config.vocab_size is not None
    found = _stored(path, family)
    if config.n_layer > len(found):  # a wild number would keep us building blocks for ever
        raise ValueError(f"{path}: config.json says {config.n_layer} layers, and there are {len(found)} tensors in all")
    # The same of sizes, each of which some tensor has: tables of positions are made before the shapes are compared.
    longest = max((size for entry in found.values() for size in entry.shape), default=0)
    heads, buckets = config.n_head * config.d_head, config.relative_buckets if config.position == "relative" else 0
    sizes = {"vocab_size": config.vocab_size, "d_model": config.d_model, "d_ff": config.d_hidden, "heads": heads}
    sizes["relative_buckets"] = buckets
    if wild := [f"{name} {size}" for name, size in sizes.items() if size > longest]:
        raise ValueError(f"{path}: config.json asks for {', '.join(wild)}, and no tensor is longer than {longest}")
    model = _shapes(config)
    names = model.state_dict()
    places = families.places(family, config, names)
    expected = {disk: families.pack(place, names).shape for disk, place in places.items()}
    if config.tie_embeddings and "lm_head.weight" in found:  # the embedding once more
        expected["lm_head.weight"] = names["lm_head.weight"].shape
    _check_tensors(path, expected, found)
    head = found.pop("lm_head.weight", None) if config.tie_embeddings else None
    state: dict[str, Tensor] = {}
    for disk, tensor in tensors.read(found):
        state |= families.unpack(places[disk], tensor)
    if config.tie_embeddings:
        embedding = state["lm_head.weight"] = state["model.embed_tokens.weight"]
        if head is not None and not torch.equal(embedding, next(tensors.read({"lm_head.weight": head}))[1]):
            raise ValueError(
                f"{path}: lm_head.weight is not the embedding, though config.json says tie_word_embeddings"
            )
    return adopt(config, state).eval(), tokenizer


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in `path`; ValueError if a link stands among its files, or if it has more ids than the model."""
    for file in path.iterdir():
        if file.is_symlink() and file.suffix in TEXTS:  # a chat template would carry it into what is written next
            plain(file)
    tokenizer = Tokenizer.load(path)
    if config.vocab_size is None or tokenizer.size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.size} ids, the model's vocab_size is {config.vocab_size}"
        )
    return tokenizer


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters as they are: to draw numbers for tensors without storage torch loads its compiler, a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.uniform_, Tensor.normal_):
            return given.get("tensor", args[0] if args else None)
        return func(*args, **given)


def _shapes(config: ModelConfig) -> GPT:
    """A model whose parameters have shapes and no storage."""
    with torch.device("meta"), _Unfilled():
        return GPT(config)


def load_config(path: Path) -> ModelConfig:
    """Read the ModelConfig that config.json in `path` describes, or its base's there; ValueError names what we lack."""
    if (path / run.ADAPTER).exists():
        told = _told(path)
        return load_config(_found(path, told)).model_copy(update={"vocab_size": told.vocab_size})
    return _read_config(path)[1]


def _read_config(path: Path) -> tuple[families.Family | None, ModelConfig]:
    file = path / "config.json"
    raw = _read_json(file)
    try:
        family = families.find(raw)
        return family, families.read_ours(raw) if family is None else families.read(family, raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


# Adapters


class Base(NamedTuple):
    """What an adapter stands on: where it is here, how the adapter names it, and `fingerprint` of its weights."""

    path: Path
    name: str
    sha256: str


class Told(NamedTuple):
    """What base.json says; `vocab_size`: rows of the embeddings with the adapter on, which may bring some."""

    base: str
    sha256: str
    vocab_size: int
    adapter: AdapterConfig


def fingerprint(path: Path) -> str:
    """The sha256 of a model directory's weights as they are stored; of several files, of their sums in order of names."""
    sums = [durable.sha256_file(file) for file in sorted(_weight_files(path))]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def base(source: str) -> Base:
    """The model that a SOURCE names, to put an adapter on; ValueError for one that is an adapter itself."""
    path, _ = run.resolve(source)
    if (path / run.ADAPTER).exists():
        raise ValueError(
            f"{path} is an adapter, and an adapter stands on a whole model; merge it first: "
            f"python -m gpt.lora merge {source} OUT, then init_from: OUT"
        )
    # a run's best checkpoint may be another one tomorrow, and a branch of the hub another commit
    hub = (
        f"{source.partition('@')[0]}@{path.name}" if source.startswith(run.HUB) and not Path(source).exists() else None
    )
    return Base(path, hub or str(path), fingerprint(path))


def base_of(path: Path) -> Base:
    """The base of the adapter in `path`; FileNotFoundError if it is not where it was, ValueError if it is another one."""
    told = _told(path)
    found = _found(path, told)
    sha256 = fingerprint(found)
    if sha256 != told.sha256:
        raise ValueError(
            f"{found} is not the base that the adapter {path} was trained on: the sha256 of its weights is "
            f"{sha256[:12]}, the adapter's base has {told.sha256[:12]}; put the one with {told.sha256[:12]} there again"
        )
    return Base(found, told.base, sha256)


def _found(path: Path, told: Told) -> Path:
    """Where the base of the adapter in `path` stands: as it is named, seen from above the adapter or from here.

    Not from here first, where another project may have a model of the same name.
    """
    if told.base.startswith(run.HUB):
        found = run.resolve(told.base)[0]
    else:
        places = (place / told.base for place in (*path.absolute().parents, Path()))
        there = next((place for place in places if _is_directory(place)), None)
        if there is None:
            raise FileNotFoundError(
                f"{path} is an adapter, and its base {told.base:.300} is not there; put the model back, or a link to where "
                f"it stands now (its weights have the sha256 {told.sha256[:12]})"
            )
        found = there
    if (found / run.ADAPTER).exists():  # or it would be looked for without end
        raise ValueError(
            f"{found}, which the adapter {path} names as its base, is an adapter itself; put the whole model with the "
            f"sha256 {told.sha256[:12]} there again"
        )
    return found


def _is_directory(place: Path) -> bool:
    """False too for what can be no path."""
    try:
        return place.is_dir()
    except OSError:
        return False


def _told(path: Path) -> Told:
    file = path / BASE
    if not file.exists():
        raise ValueError(
            f"{path} is an adapter that another program wrote; merge it there, for example with PEFT: "
            "model.merge_and_unload().save_pretrained(OUT), and load OUT"
        )
    raw = _read_json(file)
    try:
        told = Told(raw["base"], raw["sha256"], raw["vocab_size"], AdapterConfig.model_validate(raw["adapter"]))
        if [*map(type, told[:3])] != [str, str, int] or not 1 <= told.vocab_size <= MAX_ROWS:
            raise TypeError
    except (KeyError, TypeError, ValidationError):
        raise CorruptError(f"{file}: not what this trainer writes there; restore the adapter from a copy") from None
    return told


def adapter_files(model: GPT, tokenizer: Tokenizer, config: AdapterConfig, base: Base) -> dict[str, bytes]:
    """Everything an adapter's directory holds besides its weights, `adapters.to_peft(model)`: file name -> bytes."""
    name, revision = base.name, None
    if name.startswith(run.HUB):
        name, _, revision = name.removeprefix(run.HUB).partition("@")
    peft = adapters.peft_config(model, config, name, revision)
    told = {"base": base.name, "sha256": base.sha256, "vocab_size": model.config.vocab_size}
    ours = told | {"adapter": config.model_dump(mode="json")}
    return {run.ADAPTER: _json(peft), BASE: _json(ours), **tokenizer.files()}


def load_adapter(model: GPT, path: Path) -> None:
    """Fill the adapter that was put on `model` with what `path` holds; strict, like `load`."""
    adapters.load(model, dict(tensors.read(_adapter_tensors(path, model.config, _told(path).adapter))))


def _adapter_tensors(path: Path, config: ModelConfig, adapter: AdapterConfig) -> dict[str, tensors.Stored]:
    """The tensors of the adapter in `path`; ValueError unless they are what `adapter` has on a model of this shape."""
    shapes = _shapes(config)
    adapters.put_on(shapes, adapter)
    found = tensors.stored(plain(path / checkpoint.ADAPTER_WEIGHTS))
    _check_tensors(path, {name: tensor.shape for name, tensor in adapters.to_peft(shapes).items()}, found)
    return found


def _load_merged(path: Path) -> tuple[GPT, Tokenizer]:
    if (path / checkpoint.MANIFEST).exists():
        checkpoint.verify(path)
    told = _told(path)
    model, _ = load(base_of(path).path)
    config = model.config.model_copy(update={"vocab_size": told.vocab_size})
    tokenizer = _tokenizer(path, config)
    n_base = len(model.lm_head.weight)
    if told.vocab_size < n_base or (told.vocab_size > n_base and not told.adapter.embeddings):
        raise CorruptError(
            f"{path / BASE}: it says vocab_size {told.vocab_size}, and the base has {n_base}: only trained embeddings "
            "could bring more; restore the adapter from a copy"
        )
    found = _adapter_tensors(path, config, told.adapter)  # before room is made for anything
    if config != model.config:
        model = adopt(config, adapters.grown(config, model.state_dict(), told.vocab_size))
    if told.adapter.base_dtype != "fp32":  # what was trained stands on the numbers that were computed with
        quantize.quantized(model, told.adapter.base_dtype)
    adapters.put_on(model, told.adapter)
    adapters.load(model, dict(tensors.read(found)))
    merged = adapters.merge(model)
    if broken := [name for name, tensor in merged.state_dict().items() if not torch.isfinite(tensor).all()]:
        raise ValueError(
            f"{path}: merged with its base, {broken[0]} holds numbers that are not finite; what was trained, or "
            f"adapter.alpha ({told.adapter.alpha:g}), is too large: restore the adapter from a copy"
        )
    return merged.eval(), tokenizer


def adopt(config: ModelConfig, state: Mapping[str, Tensor]) -> GPT:
    """A model of the tensors in `state` themselves: nothing is copied."""
    model = _shapes(config)
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _stored(path: Path, family: families.Family | None) -> dict[str, tensors.Stored]:
    """The weights of a model directory by their full names on disk; each stands once, where the index says."""
    found: dict[str, tensors.Stored] = {}
    for file, promised in _weight_files(path).items():
        held = tensors.stored(file)
        if promised is not None and (wrong := sorted(promised ^ held.keys())):
            has = "names" if wrong[0] in promised else "does not name"
            raise ValueError(f"{path / INDEX}: it {has} {wrong[0]} in {file.name}, which {_holds(wrong[0] in held)} it")
        for name, entry in held.items():
            full = families.canonical(family, name)
            if full is None:
                continue
            if full in found:
                other = found[full]
                raise ValueError(f"{path}: {full} stands twice, in {other.file.name} and in {file.name} (as {name})")
            found[full] = entry
    return found


def _holds(held: bool) -> str:
    return "holds" if held else "does not hold"


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a model directory, and which names its index promises in each (None: it has no index)."""
    single, index = path / WEIGHTS, path / INDEX
    beside = {file.name for file in path.iterdir() if file.suffix == ".safetensors"}
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CorruptError(f"{index}: no 'weight_map' of tensor names to file names")
        files = sorted(set(names.values()))
        if outside := [name for name in files if not durable.is_plain(name)]:
            raise ValueError(f"{index}: {outside[0]!r} is not a plain file name; weights must stand beside their index")
        if WEIGHTS in beside and WEIGHTS not in files:
            raise ValueError(
                f"{path}: two sets of weights: {WEIGHTS}, and {INDEX} with {files[0]}; take away the one that is not meant"
            )
        return {plain(path / file): {name for name, its in names.items() if its == file} for file in files}
    if single.exists():
        return {plain(single): None}
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{path}: {pickles[0]} is a pickle, which can run code when it is read, so it is not read; if you trust "
            "it: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{path}: neither {WEIGHTS} nor {INDEX} is here")


def _check_tensors(path: Path, expected: Mapping[str, torch.Size], found: Mapping[str, tensors.Stored]) -> None:
    """Raise ValueError naming what is missing, unexpected or of another shape than config.json says."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} {found[name].shape}, expected {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != tuple(shape)
        ],
    }
    lines = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ValueError(f"{path}: the weights are not those of the model in config.json\n" + "\n".join(lines))


def _some(names: list[str]) -> str:
    """`names`, of many only the first."""
    return ", ".join(names[:ENOUGH]) + (f" and {len(names) - ENOUGH} more" if len(names) > ENOUGH else "")


def _read_json(file: Path) -> dict[str, Any]:
    data = plain(file).read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors, that of long numbers too
        raise CorruptError(f"{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
