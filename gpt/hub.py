"""The Hugging Face hub: which files a data set's configuration and split mean, or a model, and those files on this disk.

The hub's own library finds, authorizes and downloads (HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are its settings);
the files are read like any others. Nothing that comes from there is run: a data set that is only a script is refused, and of
a model only what is read here is fetched.
"""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from gpt import durable, formats, signals

Say = Callable[[str], None]
SPLITS = {  # words in file names that mean a split, where the data set's card names none
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORD = r"\w(?:[\w.-]*\w)?"
REPOSITORY = re.compile(
    rf"(?!.{{97}}|.*(?:--|\.\.|\.git$)){WORD}(?:/{WORD})?", re.ASCII
)  # what the hub takes for a name
SHARDED = re.compile(r"(?:.*/)?data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")
CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")  # packages whose errors are of the network
SHOWN = 12  # names in an error
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # which file holds which weight: others read all files that it does not leave out
BESIDE = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")  # of a model
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")


@dataclass(frozen=True)
class Chosen:
    """Files of one fixed version of a data set, by their names in the repository."""

    name: str
    revision: str
    files: tuple[str, ...]


def parse(name: str) -> tuple[str, str | None]:
    """(ORG/NAME, revision) of ORG/NAME[@REVISION]; ValueError for anything else."""
    repository, _, revision = name.partition("@")
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"hub: {name!r} is no repository's name; expected ORG/NAME, as in roneneldan/TinyStories")
    return repository, revision or None


def choose(name: str, config: str | None, split: str, data_files: str | None) -> Chosen:
    """The files that a configuration and a split (or a glob) mean. ValueError says what there is to choose from."""
    repository, revision = parse(name)
    with _in_words(name):
        info = huggingface_hub.HfApi().dataset_info(repository, revision=revision)
    names = sorted(sibling.rfilename for sibling in info.siblings or ())
    if data_files is not None:
        files = _matching(names, [data_files])
        if not files:
            raise ValueError(f"{name}: no file matches data_files {data_files!r}; it has {_shown(names)}")
    else:
        files = _of_split(name, names, info.card_data, config, split)
    readable = [file for file in files if data_files is not None or _is_data(file)]
    if not readable:
        raise ValueError(f"{name}: none of its files is read here ({_shown(files)}); choose others with data_files")
    return Chosen(repository, info.sha or revision or "main", tuple(readable))


Configs = dict[str, dict[str, list[str]]]  # configuration -> split -> globs


def _configs(card: Any) -> tuple[Configs, str | None]:
    """What the card's metadata names, and which configuration is the default one."""
    found: Configs = {}
    default = None
    entries = (card.to_dict() if card is not None else {}).get("configs")
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or "data_files" not in entry:
            continue
        splits: dict[str, list[str]] = {}
        for part in _listed(entry["data_files"]):
            split, paths = (part.get("split", "train"), part.get("path")) if isinstance(part, dict) else ("train", part)
            splits.setdefault(str(split), []).extend(str(path) for path in _listed(paths))
        if isinstance(directory := entry.get("data_dir"), str):
            splits = {split: [f"{directory.strip('/')}/{path}" for path in paths] for split, paths in splits.items()}
        name = str(entry.get("config_name", "default"))
        found[name] = splits
        if entry.get("default") is True or (name == "default" and default is None):
            default = name
    return found, next(iter(found)) if len(found) == 1 else default


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _of_split(name: str, names: list[str], card: Any, config: str | None, split: str) -> list[str]:
    """The files of a split: as the card says, else as their names say."""
    configs, default = _configs(card)
    if configs:
        if config is None and default is None:
            raise ValueError(f"{name}: it has {len(configs)} configurations; set config to one: {_shown(configs)}")
        chosen = config or default or ""
        if chosen not in configs:
            raise ValueError(f"{name}: no configuration {chosen!r}; it has {_shown(configs)}")
        splits = {each: _matching(names, globs) for each, globs in configs[chosen].items()}
    else:
        chosen = config or "default"
        splits = _splits_by_name(_within(name, names, config))
    if not splits and any(file.endswith(".py") for file in names):
        raise ValueError(
            f"{name}: it is made by a script, and no code of a data set is run here; the hub may have converted it: "
            f"hub: {name.partition('@')[0]}@refs/convert/parquet"
        )
    if split not in splits:
        raise ValueError(f"{name}: no split {split!r} in configuration {chosen!r}; it has {_shown(splits)}")
    if not splits[split]:
        raise ValueError(f"{name}: split {split!r} of configuration {chosen!r} names no file; it has {_shown(names)}")
    return splits[split]


def _within(name: str, names: list[str], config: str | None) -> list[str]:
    """The files of a configuration that is a directory, as where the hub has converted a data set."""
    if config is None:
        return names
    found = [file for file in names if config in PurePosixPath(file).parts[:-1]]
    if not found:
        directories = sorted({file.partition("/")[0] for file in names if "/" in file})
        raise ValueError(
            f"{name}: no configuration {config!r}: its card names none; its directories: {_shown(directories)}"
        )
    return found


def _splits_by_name(names: list[str]) -> dict[str, list[str]]:
    """Files as their names say: data/SPLIT-00000-of-00009..., the hub's own pattern, and then nothing else; or a split that
    a word in their path means; or all are `train` if none says anything."""
    data = [file for file in names if _is_data(file)]
    found: dict[str, list[str]] = {}
    for file in data:
        if match := SHARDED.fullmatch(file):
            found.setdefault(match[1], []).append(file)
    for file in data if not found else ():
        words = re.split(r"[^a-z]+", file.lower())
        for split, meaning in SPLITS.items():
            if any(word in words for word in meaning):
                found.setdefault(split, []).append(file)
                break
    return found or ({"train": data} if data else {})


def _is_data(file: str) -> bool:
    """Whether a file of a repository is read as data: not its card, its scripts or its licence."""
    path = PurePosixPath(file)
    if any(part.startswith(".") for part in path.parts) or path.name.lower() in ("dataset_infos.json", "config.json"):
        return False
    form = formats.form_of(file)
    return form.kind != "text" or path.name.lower().endswith(
        (".txt", *(f".txt{packing}" for packing in formats.PACKINGS))
    )


def _matching(names: list[str], globs: list[str]) -> list[str]:
    """The names that any of the globs matches: * within a directory, ** across."""
    patterns = [re.compile(_pattern(each)) for each in globs]
    return [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]


def _pattern(text: str) -> str:
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]+\])", text.removeprefix("./"))
    means = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(means.get(p, re.escape(p) if not (i % 2) else p.replace("[!", "[^")) for i, p in enumerate(parts))


def _shown(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return (", ".join(shown[:SHOWN]) or "none") + more


def download(chosen: Chosen, say: Say) -> list[tuple[Path, str]]:
    """(path, label) of each file in the hub's cache, fetched if it is not there."""
    found = []
    for number, file in enumerate(chosen.files, 1):
        signals.check()
        say(f"{chosen.name}: file {number} of {len(chosen.files)}, {file}")
        with _in_words(chosen.name):
            path = huggingface_hub.hf_hub_download(chosen.name, file, repo_type="dataset", revision=chosen.revision)
        found.append((Path(path), f"{chosen.name}/{file}"))
    return found


def model(name: str) -> Path:
    """The directory of a model of the hub in the hub's own cache, with the files that are read here and no others.

    What is there already is not fetched again; without a network it is enough. ValueError in words.
    """
    return _snapshot(name, weights=True)


def vocabulary(name: str) -> Path:
    """The same, without the weights, which need not be there: what a tokenizer is made of."""
    return _snapshot(name, weights=False)


def _snapshot(name: str, *, weights: bool) -> Path:
    repository, revision = parse(name)
    with _in_words(name, "model"):
        try:
            info = huggingface_hub.HfApi().model_info(repository, revision=revision)
        except Exception as error:
            if not _unreachable(error):
                raise
            with suppress(huggingface_hub.errors.LocalEntryNotFoundError):
                return Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
            raise
        names = {sibling.rfilename for sibling in info.siblings or ()}
        ranks = sorted(file for file in names if "/" not in file and file.endswith(".tiktoken"))
        if not weights and not ranks and not names & {*VOCABULARIES}:
            raise ValueError(f"{name}: it has no tokenizer ({', '.join(VOCABULARIES)}); it has {_shown(sorted(names))}")
        if weights and ("config.json" not in names or not names & {WEIGHTS, INDEX}):
            lacks = f"{WEIGHTS} (or its index)" if "config.json" in names else "config.json"
            raise ValueError(
                f"{name}: it has no {lacks}, and weights in other forms are not fetched: a pickle can run code when it is"
                f" read; it has {_shown(sorted(names))}"
            )

        def fetch(file: str, revision: str | None) -> Path:
            signals.check()
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))

        of_words = VOCABULARIES[:1] if VOCABULARIES[0] in names else VOCABULARIES
        files = [file for file in ("config.json", *BESIDE, *of_words, *ranks) if file in names]
        directory = fetch(files[0], revision).parent  # by the name that was given, so that it is known offline, too
        fixed = directory.name
        for file in files[1:]:
            fetch(file, fixed)
        if not weights:
            return directory
        for file in [WEIGHTS] if WEIGHTS in names else _indexed(name, fetch(INDEX, fixed), names):
            fetch(file, fixed)
        return directory


def _indexed(name: str, index: Path, names: Container[str]) -> list[str]:
    """The files that an index of weights names, all of them safetensors of this repository."""
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{name}: {INDEX} is no index of weights") from None
    if strange := [file for file in files if file not in names or "/" in file or not file.endswith(".safetensors")]:
        raise ValueError(f"{name}: {INDEX} names {strange[0]!r}, which is no safetensors file beside it")
    return files


def stream(chosen: Chosen, columns: frozenset[str], spool: Path, say: Say) -> list[tuple[Path, str]]:
    """(path, label) of a JSON lines file in `spool` for each file, which holds only the columns; made if it is not there.

    The files themselves are never on this disk: of parquet only the columns are asked for.
    """
    durable.make_directory(spool)
    found = []
    for number, file in enumerate(chosen.files, 1):
        key = json.dumps([chosen.name, chosen.revision, file, sorted(columns)])
        path = spool / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
        if not path.exists():
            say(f"{chosen.name}: reading file {number} of {len(chosen.files)}, {file}")
            with _in_words(chosen.name):
                durable.write_file(path, _lines(chosen, file, columns))
        found.append((path, f"{chosen.name}/{file}"))
    return found


def _lines(chosen: Chosen, file: str, columns: frozenset[str]) -> Iterator[bytes]:
    """A remote file as JSON lines, about a megabyte at a time."""
    label, form = f"{chosen.name}/{file}", formats.form_of(file)
    if form.kind in ("text", "tar"):
        raise ValueError(
            f"{label}: a {form.kind} file is not streamed, for it has no fields to choose; leave out streaming"
        )
    place = f"datasets/{chosen.name}@{chosen.revision}/{file}"
    lines: list[bytes] = []
    size = 0
    with (
        huggingface_hub.HfFileSystem().open(place, "rb", block_size=4 * formats.BLOCK) as raw,
        formats.faults(label, form),
    ):
        for number, record in enumerate(_records(raw, form, columns), 1):
            if isinstance(record, formats.BadRecord):
                raise ValueError(f"{label}: record {number}: {record}; without streaming, bad records can be skipped")
            # In ASCII, where every text can be written, even one that is none: the reader of the copy will say so.
            lines.append(record if isinstance(record, bytes) else json.dumps(record, default=str).encode())
            size += len(lines[-1])
            if size > formats.BLOCK:
                yield b"\n".join((*lines, b""))
                lines, size = [], 0
                signals.check()
        yield b"\n".join((*lines, b""))


def _records(raw: Any, form: formats.Form, columns: frozenset[str]) -> Iterator[Any]:
    if form.kind == "parquet":
        rows = formats.parquet_rows(raw, columns)
    else:
        stream = formats.unpacked(raw, form.packing)
        if form.kind == "jsonl":
            rows = formats.spans(stream, b"\n")
        elif form.kind == "json":
            rows = formats.array_values(stream)
        else:
            rows = formats.table_rows(stream, formats.DELIMITERS[form.kind], columns)
    try:
        for _, _, value in rows:
            yield dict.fromkeys(columns, value) if isinstance(value, str) else value
    except formats.BadRecord as error:  # what ends the file
        yield error


@contextmanager
def _in_words(name: str, kind: str = "data set") -> Iterator[None]:
    """Turns what the hub's library, and the client under it, raise into ValueErrors in words."""
    api = huggingface_hub.HfApi()  # which also loads what the next lines name: the library loads its parts when asked
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library, about its own affairs
            yield
    except Exception as error:
        words = _words(error, kind, parse(name)[0], api.endpoint)
        if words is None:
            raise
        raise ValueError(f"{name}: {words}") from None


def _words(error: Exception, kind: str, repository: str, where: str) -> str | None:
    """What an error of the hub's means; None for any other."""
    errors = huggingface_hub.errors
    if isinstance(error, errors.GatedRepoError):
        page = f"{where}/datasets/{repository}" if kind == "data set" else f"{where}/{repository}"
        return f"its owner asks for consent; give it at {page}, then hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such {kind} at {where}, or a private one (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision; leave out what follows the @"
    first = signals.reason(error)
    if isinstance(error, errors.HfHubHTTPError):
        return f"{where} did not answer as it should ({first}); run the same command again"
    return f"{where} could not be reached ({first}); run the same command again" if _unreachable(error) else None


def _unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer, or may not be asked (HF_HUB_OFFLINE)."""
    if isinstance(error, huggingface_hub.errors.HfHubHTTPError):
        return False
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or package.startswith(CLIENTS)
