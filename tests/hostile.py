"""Files that would run code, leave their directory or never end: each is opened as the product opens it, under an audit.

python tests/hostile.py              all of them, a table by kind
python tests/hostile.py pickle torch those with these words in their name

A child process opens them, watched by an audit hook. What it sees is recorded, and stopped: commands, sockets, foreign
libraries, pickled names, imports of what is no installed package, code compiled in or for the product, writing outside
the file's own directory, reading of a secret beside it. A file passes if nothing was recorded and it ends in a clear
error or loads; every payload that runs after all leaves a mark, too.
"""

import base64
import csv
import gzip
import io
import json
import marshal
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import limits
from proving import Row

ROOT = Path(__file__).resolve().parent.parent
CPU_S, WALL_S, MEMORY = 10, 60, 3 << 30
MODULE = "canary_module"  # stands as a file in the directory of every canary, which is the working directory
SECRET = "secret-7c1e"  # a directory beside them, whose content nothing may read


class Canary(NamedTuple):
    """`build` makes the directory hostile, `open` opens it as the product does."""

    kind: str
    name: str
    build: Callable[[Path], object]
    open: Callable[[Path], object]


# What a payload does


def command() -> str:
    return "touch RAN"


def python() -> str:
    return "open('RAN', 'w')"


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, how: str = "system") -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "system":
            return os.system, (command(),)
        if self.how == "popen":
            return subprocess.Popen, (["touch", "RAN"],)
        return eval, (python(),)


# The watch


class Stopped(BaseException):
    """What was tried is not done; a BaseException, so that no handler of the product takes it for an error of the file."""


class Watch:
    """An audit hook: while `at` names a directory, what code of a file would do is recorded in `seen`, and stopped."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.at, self.seen = str(scratch), "", list[str]()
        self.port: int | None = None
        self.libraries = (
            *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
            "<frozen ",
        )
        self.packages = {*sys.stdlib_module_names, *(path.name.partition(".")[0] for path in self._installed()), "gpt"}

    def _installed(self) -> Iterator[Path]:
        for name in ("purelib", "platlib"):
            yield from Path(sysconfig.get_path(name)).iterdir()

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.at:
            return
        at, self.at = self.at, ""  # what is done here is not looked at
        try:
            what = self._wrong(event, args, at)
            if what is not None:
                self.seen.append(what)
                raise Stopped(what)
        finally:
            self.at = at

    def _wrong(self, event: str, args: tuple[Any, ...], at: str) -> str | None:
        family = event.partition(".")[0]
        if event == "socket.getaddrinfo" and self.port is not None and args[:2] == ("127.0.0.1", self.port):
            return None
        if event in NEVER or family in NEVER:
            return None if family in ("ctypes", "code") and self._in_libraries() else f"{event}{args!r:.100}"
        if event == "marshal.loads" and not self._importing():
            return event
        if event == "import":
            name = str(args[0]).partition(".")[0]
            return None if name in self.packages or name.startswith("_") else f"import {args[0]}"
        if event == "compile":
            return None if self._in_libraries() else f"compile {args[1]!r:.60}"
        if event == "exec":
            return None if self._in_libraries(args[0]) else f"exec {args[0]!r:.80}"
        if event in ("socket.connect", "socket.sendto"):
            host, port, *_ = args[1] if isinstance(args[1], tuple) else (args[1], None)
            return (
                None if self.port is not None and (host, port) == ("127.0.0.1", self.port) else f"{event} {args[1]!r}"
            )
        if event in (
            "os.remove",
            "os.rmdir",
            "os.mkdir",
            "os.chmod",
            "os.chown",
            "os.truncate",
            "os.utime",
            "shutil.rmtree",
        ):
            return self._outside(event, args[0], at)
        if event in ("os.rename", "os.link", "os.symlink"):
            return self._outside(event, args[1], at)
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes | os.PathLike):
                real = os.path.realpath(os.fsdecode(path))
                if SECRET in real:
                    return f"open {real}"
                writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
                return self._outside("open to write", path, at) if writes else None
        return None

    def _outside(self, event: str, path: Any, at: str) -> str | None:
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        real = os.path.realpath(os.fsdecode(path))
        places = (at, os.path.join(self.scratch, "tmp"), "/dev/null")  # noqa: PTH118
        return None if any(real == place or real.startswith(place + "/") for place in places) else f"{event} {real}"

    def _frames(self) -> Iterator[str]:
        frame = sys._getframe(1)
        while frame is not None:
            if not frame.f_code.co_qualname.startswith("Watch."):
                yield frame.f_code.co_filename
            frame = frame.f_back  # type: ignore[assignment]

    def _in_libraries(self, code: Any = None) -> bool:
        """Whether an installed package does it for itself (a dataclass, a compiled template) or is being imported."""
        if isinstance(code, CodeType) and code.co_filename.startswith((self.scratch, os.path.realpath(self.scratch))):
            return False
        first = next((name for name in self._frames() if "/ctypes/" not in name), "")
        return first.startswith(self.libraries) or self._importing()

    def _importing(self) -> bool:
        return any(name.startswith("<frozen importlib") for name in self._frames())


NEVER = {
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.fork",
        "os.forkpty",
        "os.startfile",
        "os.kill",
        "os.putenv",
    ),
    *(
        "subprocess",
        "pty",
        "ctypes",
        "pickle",
        "marshal.load",
        "webbrowser",
        "ftplib",
        "smtplib",
        "telnetlib",
        "sqlite3",
    ),
    *("sys.addaudithook", "sys.setprofile", "sys.settrace", "cpython", "code", "builtins.input"),
    *("socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "syslog", "winreg", "nntplib", "poplib", "imaplib"),
}


# Ways to open


def _settings(schema: str) -> Callable[[Path], object]:
    def opened(path: Path) -> object:
        from gpt import config, recipe, trainer

        kind: Any = {"train": trainer.TrainConfig, "recipe": recipe.PrepareConfig}[schema]
        return config.load(kind, path / "file.yaml", defaults={"name": "x"} if schema == "train" else None)

    return opened


def _override(text: str) -> Callable[[Path], object]:
    def opened(path: Path) -> object:
        from gpt import config, trainer

        return config.load(trainer.TrainConfig, None, [text], {"name": "x"})

    return opened


def _tokenizer(path: Path) -> object:
    from gpt.tokenizer import Tokenizer

    loaded = Tokenizer.load(path / "model")
    return loaded.decode(loaded.encode("to be\n or not <|endoftext|>"))


def _chat(path: Path) -> object:
    from gpt import chat
    from gpt.conversations import Conversation
    from gpt.tokenizer import Tokenizer

    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    return chat.encode(Tokenizer.load(path / "model"), Conversation(tuple(said)), reply=True)


def _model(path: Path) -> object:
    from gpt import hf, run

    return hf.load(run.resolve(str(path / "model"))[0])


def _file(name: str) -> Callable[[Path], object]:
    """The source that a user names."""

    def opened(path: Path) -> object:
        from gpt import run

        return run.resolve(str(path / name))

    return opened


def _run(path: Path) -> object:
    """What sampling and resuming read of a run."""
    from gpt import checkpoint, hf, run

    saved = run.RunDirectory(path, "run")
    with saved.lock():
        latest = checkpoint.Checkpoints(saved.checkpoints, keep=2).latest()
        assert latest is not None
        saved.metrics()
        saved.truncate_metrics(1)
        state = checkpoint.load_state(latest)
        checkpoint.load_optimizer(latest)
    found, _ = run.resolve(str(path / "run"))
    return hf.load(found), state


def _data(path: Path) -> object:
    from gpt.shards import TokenSet
    from gpt.tokenizer import Tokenizer

    found = TokenSet(path / "set", "train")
    found.verify()
    Tokenizer.load(path / "set")
    return found.read(0, found.n_tokens), found.document_starts, found.spans(0, 5)


def _bins(path: Path) -> object:
    from gpt import bins

    vocabulary = bins.load_tokenizer(path / "bins", None)
    return [bins.open_bins(path / "bins", split, vocabulary).read(0, 3) for split in ("train", "val")]


def _texts(name: str, **source: Any) -> Callable[[Path], object]:
    def opened(path: Path) -> object:
        from gpt import corpus

        spool = path / "spool"
        spool.mkdir()
        given = corpus.Source(path=str(path / name), **source)

        def refuse(error: Exception) -> None:
            raise error

        files = corpus.files(given, spool, spool, lambda line: None)
        return [document.text[:9] for file in files for document in corpus.documents(file, skip=refuse)]

    return opened


def _tasks(path: Path) -> object:
    from gpt import tasks

    return tasks.read(str(path / "tasks.jsonl"))


def _hub(repositories: Callable[[], dict[str, Any]], name: str, *, model: bool = False) -> Callable[[Path], object]:
    """From a server of this machine, into a cache inside the canary's directory."""

    def opened(path: Path) -> object:
        import huggingface_hub
        from hub_server import serving

        from gpt import hub

        at, WATCH.at = WATCH.at, ""
        with serving(repositories()) as (url, _):
            WATCH.at, WATCH.port = at, int(url.rpartition(":")[2])
            constants: Any = huggingface_hub.constants
            constants.ENDPOINT, constants.HF_HUB_CACHE, constants.HF_HOME = url, str(path / "hub"), str(path / "hub")
            constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
            try:
                if model:
                    return hub.model(name)
                chosen = hub.choose(name, None, "train", None)
                return [file.read_bytes() for file, _ in hub.download(chosen, lambda line: None)]
            finally:
                at, WATCH.at, WATCH.port = WATCH.at, "", None

    return opened


# What there is to spoil


def _bases(path: Path) -> None:
    """A model, a run, a data set, token files: whole, to be copied and spoiled."""
    import numpy as np
    import torch

    from gpt import checkpoint, durable, hf, shards, tokenizer
    from gpt.checkpoint import serialize
    from gpt.model import GPT, ModelConfig, init_weights

    vocabulary = tokenizer.train(["to be or not to be\n" * 9], "bpe", None)
    config = ModelConfig(vocab_size=vocabulary.padded_size, max_seq_len=16, n_layer=1, d_model=16, n_head=2)
    model = GPT(config)
    init_weights(model, seed=1)
    weights = {name: tensor.detach() for name, tensor in hf.to_disk(config, model.state_dict()).items()}
    files = hf.model_files(config, vocabulary)
    (path / "model").mkdir()
    for name, data in files.items():
        (path / "model" / name).write_bytes(data)
    durable.write_file(path / "model" / "model.safetensors", serialize(weights, {"format": "pt"}))
    (path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.save(
        path / "run" / "checkpoints" / "step_00000001",
        model_files=files,
        weights=weights,
        optimizer={"x:exp_avg": torch.ones(2)},
        run_yaml="name: run\n",
        state={"step": 1, "tokens": 1, "train_s": 1.0},
    )
    (path / "run" / "metrics.jsonl").write_text('{"kind": "eval", "step": 1, "val_bpb": 1.0}\n')
    (path / "run" / "config.yaml").write_text("name: run\n")
    seal: dict[str, Any] = {"vocab_size": vocabulary.size, "tokenizer_sha256": vocabulary.sha256}
    with durable.Directory(path / "set") as directory:
        entry = shards.write_shard(directory, "train-00000.tok", [shards.Document([0, 9, 10], 2, 0)], **seal)
        splits = {"train": [entry], "val": []}
        shards.write_manifest(directory, **seal, start_id=0, splits=splits, sources=["a"], settings={})
        for name, data in vocabulary.files().items():
            directory.write(name, data)
    (path / "bins").mkdir()
    for split in ("train", "val"):
        (path / "bins" / f"{split}.bin").write_bytes(np.array([0, 1, 2, 1], "<u2").tobytes())
    (path / "bins" / "meta.json").write_text(json.dumps({"vocab_size": 3, "stoi": {"a": 0, "b": 1, "c": 2}}))


def _seal(path: Path, name: str) -> None:
    """Make the manifest of a checkpoint right again whose file `name` was spoiled, unless that is the manifest itself."""
    import hashlib

    if not name.startswith(STEP + "/") or name.endswith("/manifest.json"):
        return
    step = path / STEP
    files = {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in step.iterdir()
        if f.is_file() and f.name != "manifest.json"
    }
    (step / "manifest.json").write_text(json.dumps({"format": 1, "sha256": files}))


STEP = "run/checkpoints/step_00000001"


def _write(name: str, data: bytes | str) -> Callable[[Path], object]:
    def build(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        _seal(path, name)

    return build


def _json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """A JSON file with something changed; a new one of an empty object."""

    def build(path: Path) -> None:
        before = json.loads((path / name).read_bytes()) if (path / name).exists() else {}
        _write(name, json.dumps(change(before)))(path)

    return build


def _merged(**values: Any) -> Callable[[Any], Any]:
    return lambda before: before | values


def _link(name: str, target: str) -> Callable[[Path], object]:
    def build(path: Path) -> None:
        place = path / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        secret = path.parent / SECRET / target
        assert secret.exists(), f"{SECRET} holds no {target}: a link that leads nowhere tries nothing"
        place.symlink_to(secret)
        _seal(path, name)

    return build


def _then(*builds: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: [build(path) for build in builds]


def _removed(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


# The canaries


def settings_files() -> Iterator[Canary]:
    run = command()
    tagged = [
        f"!!python/object/apply:os.system ['{run}']",
        "!!python/object/apply:subprocess.Popen [['touch', 'RAN']]",
        f'!!python/object/apply:builtins.eval ["{python()}"]',
        f'!!python/object/apply:builtins.exec ["{python()}"]',
        f"!!python/object/new:os.system ['{run}']",
        "!!python/name:os.system ''",
        f"!!python/module:{MODULE} ''",
        f"!!python/object:{MODULE}.Canary {{}}",
        f"!!python/object/apply:{MODULE}.run []",
        f"!<tag:yaml.org,2002:python/object/apply:os.system> ['{run}']",
        "!!python/tuple [1, 2]",
        "!!python/bytes 'x'",
        f"!!python/object/apply:importlib.import_module ['{MODULE}']",
        "!!python/object/apply:os.execvp ['touch', ['touch', 'RAN']]",
        f"!!python/object/new:type {{args: ['z', !!python/tuple [], {{extend: !!python/name:exec }}], listitems: \"{python()}\"}}",
        f"!!python/object/apply:ctypes.CDLL ['./{MODULE}.so']",
        "!!python/object/apply:pickle.loads [!!binary 'Y29zCnN5c3RlbQo=']",
        "!!js/function 'function(){}'",
        "!ruby/object:Gem::Installer {}",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!timestamp 2001-12-14",
        "!!binary R0lGODlhDAAMAIQAAP",
        "&a [*a]",
        "*undefined",
        "&x {y: 1}",
    ]
    for schema in ("train", "recipe"):
        key = "name" if schema == "train" else "input"
        for value in tagged:
            yield Canary(f"{schema} settings", value, _write("file.yaml", f"{key}: {value}\n"), _settings(schema))
    for value in tagged[:12]:
        yield Canary("train settings", f"override {value}", lambda path: None, _override(f"name={value}"))
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    whole = {
        "alias bomb": bomb,
        "merge keys": "base: &b {x: 1}\nmodel:\n  <<: *b\n",
        "merge without alias": "model: {<<: {n_layer: 2}}\n",
        "a tag directive": f"%TAG ! tag:yaml.org,2002:python/\n---\nname: !object/apply:os.system ['{run}']\n",
        "a key that runs": f"? !!python/object/apply:os.system ['{run}']\n: 1\n",
        "two documents": "name: x\n---\nname: y\n",
        "the whole runs": f"!!python/object/apply:os.system ['{run}']\n",
        "a thousand levels": "a: " + "[" * 3000 + "]" * 3000 + "\n",
        "keys twice": "name: x\nname: !!python/name:os.system ''\n",
        "a huge number": f"seed: {'9' * 6000}\n",
        "name with a path": "name: ../../x\n",
        "nul": "name: \0\n",
        "an include": "name: !include /etc/passwd\n",
        "jinja": "name: '{{ 7 * 7 }}'\n",
        "environment": "name: ${HOME}\n",
        "a long key": f"{'k' * 100_000}: 1\n",
    }
    for name, text in whole.items():
        yield Canary("train settings", name, _write("file.yaml", text), _settings("train"))


def _pickles() -> dict[str, bytes]:
    """The same intention in the forms that loaders of other programs would run."""
    as_zip = io.BytesIO()
    with zipfile.ZipFile(as_zip, "w") as archive:  # as torch.save writes
        archive.writestr("archive/data.pkl", pickle.dumps(Runs(), protocol=2))
        archive.writestr("archive/version", "3\n")
    header = repr({"descr": "|O", "fortran_order": False, "shape": (1,)}).ljust(118) + "\n"
    return {
        "protocol 0": b"cos\nsystem\n(S'" + command().encode() + b"'\ntR.",
        "protocol 4": pickle.dumps(Runs("popen"), protocol=4),
        "eval": pickle.dumps(Runs("eval"), protocol=2),
        "torch zip": as_zip.getvalue(),
        "numpy objects": b"\x93NUMPY\x01\x00"
        + struct.pack("<H", len(header))
        + header.encode()
        + pickle.dumps([Runs()]),
        "marshal": marshal.dumps(compile(python(), "x", "exec")),
    }


def pickles() -> Iterator[Canary]:
    forms = _pickles()
    alone = [
        "model.pt",
        "model.pth",
        "model.ckpt",
        "model.pkl",
        "weights.bin",
        "optimizer.pt",
        "x.pickle",
        "x.npy",
        "x.joblib",
    ]
    places: list[tuple[str, Callable[[Path], object]]] = [
        ("model/model.safetensors", _model),
        ("model/config.json", _model),
        ("model/tokenizer.json", _tokenizer),
        ("model/tokenizer_config.json", _tokenizer),
        ("model/chat_template.jinja", _chat),
        ("model/model.safetensors.index.json", _model),
        ("model/adapter_config.json", _model),
        (f"{STEP}/optimizer-00000-of-00001.safetensors", _run),
        (f"{STEP}/state.json", _run),
        (f"{STEP}/model.safetensors", _run),
        (f"{STEP}/config.json", _run),
        ("run/metrics.jsonl", _run),
        ("set/train-00000.tok", _data),
        ("set/manifest.json", _data),
        ("set/tokenizer.json", _data),
        ("bins/train.bin", _bins),
        ("bins/meta.json", _bins),
        ("file.yaml", _settings("train")),
        ("./file.yaml", _settings("recipe")),
        ("tasks.jsonl", _tasks),
        ("texts/a.jsonl", _texts("texts/a.jsonl")),
        ("texts/a.json", _texts("texts/a.json", field="text")),
        ("texts/a.csv", _texts("texts/a.csv", field="text")),
        ("texts/a.parquet", _texts("texts/a.parquet", field="text")),
        ("texts/a.tar", _texts("texts/a.tar")),
        ("texts/a.txt.gz", _texts("texts/a.txt.gz")),
        ("texts/a.txt", _texts("texts/a.txt")),
        ("texts/a.pkl", _texts("texts/a.pkl")),
        *((f"alone/{name}", _file(f"alone/{name}")) for name in alone),
    ]
    for number, (place, opened) in enumerate(places):
        chosen = list(forms.items())
        for form, data in (chosen[number % 6], chosen[(number + 1) % 6], chosen[(number + 3) % 6]):
            yield Canary("pickle", f"{form} as {place}", _write(place, data), opened)
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack"):
        build = _then(_removed("model/model.safetensors"), _write(f"model/{name}", forms["torch zip"]))
        yield Canary("pickle", f"a model with {name} alone", build, _model)
    beside = _write("model/pytorch_model.bin", forms["torch zip"])
    yield Canary("pickle", "beside safetensors", beside, _model)
    meta = _then(_removed("bins/meta.json"), _write("bins/meta.pkl", forms["protocol 4"]))
    yield Canary("pickle", "nanoGPT's meta.pkl", meta, _bins)
    yield Canary("pickle", "torch.distributed's .metadata", _write(f"{STEP}/.metadata", forms["protocol 4"]), _run)


def templates() -> Iterator[Canary]:
    run = command()
    system = f".system('{run}')"
    expressions = [
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']",
        "''|attr('__class__')",
        "messages|attr('__init__')",
        "''.__class__.__base__.__subclasses__()|map(attribute='__init__')|list",
        "messages|map(attribute='__class__')|list",
        "messages|groupby('__class__')",
        "messages|sum(attribute='__class__')",
        "messages|sort(attribute='__class__')|list",
        "messages|selectattr('__class__')|list",
        "messages|unique(attribute='__class__')|list",
        f"self.__init__.__globals__.__builtins__.__import__('os'){system}",
        f"self._TemplateReference__context.cycler.__init__.__globals__.os{system}",
        f"cycler.__init__.__globals__.os{system}",
        f"joiner.__init__.__globals__.os{system}",
        f"namespace.__init__.__globals__.os{system}",
        f"lipsum.__globals__['os']{system}",
        f"lipsum.__globals__.os{system}",
        f"url_for.__globals__.os{system}",
        f"get_flashed_messages.__globals__.os{system}",
        f"config.__class__.__init__.__globals__['os']{system}",
        f"raise_exception.__globals__['__builtins__']['eval'](\"{python()}\")",
        "strftime_now.__self__.__class__.__module__",
        "range.__class__.__base__",
        "dict.__base__.__subclasses__()",
        "namespace.__class__.__mro__",
        "messages.__reduce__()",
        "'{0.__class__.__mro__}'.format('')",
        "'{x.__class__}'.format_map({'x': 1})",
        "('{0.__class__}' ~ '')|format('')",
        "''.format.__self__.__class__",
        "'%s'.__mod__",
        "(1).__class__",
        "none.__class__",
        "messages.pop()",
        "messages.clear()",
        "messages[0].update({'role': 'x'})",
        "messages[0].setdefault('__x__', 1)",
        "messages.sort()",
        "tools.__class__",
        "'a'.encode().decode.__self__",
        "loop.__class__",
        "caller.__globals__",
        "varargs",
        "kwargs",
        "(messages|map('attr', '__class__'))|list",
        "messages|map('tojson')|map('attr', 'format')|list",
        "''|xmlattr",
        "x.gi_frame",
        "(messages|map('upper')).gi_frame.f_back",
        "strftime_now('%Y').__class__",
        "joiner",
        "cycler",
        "messages|tojson|attr('__class__')",
        "[].__class__.__base__.__subclasses__()[104].load_module('os')",
        "request.application.__globals__",
        "environment.globals",
        "context.environment",
        "self.blocks",
        "self.__dict__",
        "('_' * 2 ~ 'class' ~ '_' * 2)",
        "''[('_' * 2 ~ 'class' ~ '_' * 2)]",
        "''|attr('_' * 2 ~ 'class' ~ '_' * 2)",
        "'\\x5f\\x5fclass\\x5f\\x5f'",
        "''|attr('\\x5f\\x5fclass\\x5f\\x5f')",
        "dict(__class__=1)",
        "namespace(__init__=1)",
        "2 ** 99999999",
        "'a' * 99999999999",
        "range(999999999)|list",
        "'%999999999d' % 1",
    ]
    statements = [
        "{% import 'os' as os %}",
        "{% from 'os' import system %}",
        "{% include '/etc/passwd' %}",
        "{% extends '/etc/passwd' %}",
        f"{{% include '../{SECRET}/secret.txt' %}}",
        "{% set x = ''.__class__ %}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
        "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% do messages.append(1) %}",
        "{% debug %}",
        "{% autoescape false %}{{ ''.__class__ }}{% endautoescape %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% trans %}x{% endtrans %}",
        "{% block x %}{{ self.x() }}{% endblock %}",
        "{% with x = ''.__class__ %}{{ x.__mro__ }}{% endwith %}",
        "{% filter attr('__class__') %}x{% endfilter %}",
        "{% if ''.__class__ is callable %}{% endif %}",
        "{% raw %}",
        "{{",
        "{% if %}",
    ]
    for number, source in enumerate([f"{{{{ {text} }}}}" for text in expressions] + statements):
        if number % 3:
            build = _json("model/tokenizer_config.json", _merged(chat_template=source))
        else:
            drop = _json(
                "model/tokenizer_config.json", lambda before: {k: v for k, v in before.items() if k != "chat_template"}
            )
            build = _then(drop, _write("model/chat_template.jinja", source))
        yield Canary("chat template", source, build, _chat)


def models() -> Iterator[Canary]:
    evil = f"{MODULE}.Canary"
    configs: dict[str, dict[str, Any]] = {
        "auto_map": {"auto_map": {"AutoConfig": evil, "AutoModelForCausalLM": evil}},
        "auto_map of a repository": {"auto_map": {"AutoModel": f"org/x--{evil}"}},
        "trust_remote_code": {"trust_remote_code": True, "auto_map": {"AutoModelForCausalLM": evil}},
        "another class": {"architectures": [evil]},
        "custom_pipelines": {"custom_pipelines": {"x": {"impl": evil}}},
        "model_type with a path": {"model_type": "../../canary_module"},
        "model_type": {"model_type": MODULE},
        "an activation": {"hidden_act": f"__import__('os').system('{command()}')"},
        "an activation of a module": {"hidden_act": evil},
        "a dtype": {"dtype": f"__import__('os').system('{command()}')", "torch_dtype": "os.system"},
        "rope": {"rope_scaling": {"rope_type": evil}},
        "quantization": {"quantization_config": {"quant_method": MODULE, "_load": evil}},
        "wild sizes": {"hidden_size": 1 << 40, "num_hidden_layers": 1 << 40},
        "a transformers version": {"transformers_version": f"!!python/object/apply:os.system ['{command()}']"},
        "attention": {"_attn_implementation": f"org/kernel:{MODULE}"},
        "experts": {"experts_implementation": evil},
    }
    for name, change in configs.items():
        code = _write(f"model/{MODULE}.py", "open('RAN', 'w')\n")
        yield Canary("config.json", name, _then(code, _json("model/config.json", _merged(**change))), _model)
    names = [
        f"../../{SECRET}/model.safetensors",
        "/etc/passwd",
        "..",
        "a/b.safetensors",
        "pytorch_model.bin",
        "model.pt",
        "hub:org/x",
        "https://example.org/x.safetensors",
        "file:///etc/passwd",
        "x\0y",
        "",
        ".hidden.safetensors",
        "|touch RAN",
        "$(touch RAN)",
    ]
    for name in names:
        index = json.dumps({"weight_map": {"model.norm.weight": name}})
        build = _then(_removed("model/model.safetensors"), _write("model/model.safetensors.index.json", index))
        yield Canary("index of weights", repr(name), build, _model)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        yield Canary("link", f"model/{name}", _link(f"model/{name}", name), _model)
    alone = _then(
        _removed("model/tokenizer.json"), _write("model/merges.txt", ""), _link("model/vocab.json", "vocab.json")
    )
    yield Canary("link", "model/vocab.json", alone, _model)
    header: dict[str, dict[str, Any]] = {
        "metadata that runs": {"__metadata__": {"format": "pickle", "x": f"__import__('os').system('{command()}')"}},
        "a tensor called by a path": {"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        "a dtype of its own": {"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}},
        "wild shape": {"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}},
        "offsets before the data": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}},
        "overlaps": {
            "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
    }
    for name, entries in header.items():
        text = json.dumps(entries).encode()
        yield Canary(
            "safetensors",
            name,
            _write("model/model.safetensors", struct.pack("<Q", len(text)) + text + bytes(4)),
            _model,
        )
    for name, length in (
        ("a header without end", (1 << 64) - 1),
        ("a long header", 1 << 40),
        ("a header of 90 MB", 90_000_000),
    ):
        yield Canary("safetensors", name, _write("model/model.safetensors", struct.pack("<Q", length) + b"{}"), _model)
    told = {"base": "", "sha256": "0" * 64, "vocab_size": 320, "adapter": {"rank": 1}}
    for name in ("../nothing", "/etc", "hub:../../x", "hub:org/x;touch RAN", "|touch RAN", "", "\0"):
        build = _then(
            _write(
                "model/adapter_config.json", json.dumps({"peft_type": evil, "auto_mapping": {"base_model_class": evil}})
            ),
            _write("model/base.json", json.dumps(told | {"base": name})),
        )
        yield Canary("adapter", f"base {name!r}", build, _model)
    lone = _write(
        "model/adapter_config.json", json.dumps({"auto_mapping": {"parent_library": MODULE}, "peft_type": evil})
    )
    yield Canary("adapter", "of another program", lone, _model)


def vocabularies() -> Iterator[Canary]:
    def part(kind: str, value: Any) -> Callable[[Path], object]:
        return _json("model/tokenizer.json", _merged(**{kind: value}))

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    replace = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 16}
    for kind in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "model"):
        for name in ("Custom", f"{MODULE}.Canary", "PyPreTokenizer"):
            yield Canary("tokenizer.json", f"{kind} {name}", part(kind, {"type": name, "module": MODULE}), _tokenizer)
    for pattern in (
        "(a+)+$",
        "(a|a)*b",
        "(x+x+)+y",
        r"(.*)*\1",
        ".*.*.*.*=",
        "(?<n>a)\\g<n>",
        "(?{system('touch RAN')})",
        "(*FAIL)",
        "(" * 900 + ")" * 900,
        "a{90000}",
        "(?~a)",
    ):
        yield Canary("tokenizer.json", f"expression {pattern[:30]}", part("pre_tokenizer", split(pattern)), _tokenizer)
    deep: Any = {"type": "NFC"}
    for _ in range(100):
        deep = {"type": "Sequence", "normalizers": [deep]}
    token = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    others: dict[str, Callable[[Path], object]] = {
        "a text that grows": part("normalizer", {"type": "Sequence", "normalizers": [replace] * 60}),
        "a table that grows": part(
            "normalizer",
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(struct.pack("<I", 4) + bytes(4) + b"x" * 9999).decode(),
            },
        ),
        "deep": part("normalizer", deep),
        "empty replacement": part("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}),
        "a million added": part("added_tokens", [token | {"content": str(i), "id": i} for i in range(200_000)]),
        "a long added": part("added_tokens", [token | {"content": "x" * 10**6}]),
        "a far id": _json(
            "model/tokenizer.json",
            lambda raw: raw | {"model": raw["model"] | {"vocab": raw["model"]["vocab"] | {"zz": (1 << 32) - 1}}},
        ),
        "a panic": _json(
            "model/tokenizer.json",
            lambda raw: raw | {"model": raw["model"] | {"continuing_subword_prefix": "much too long for it"}},
        ),
        "dropout": _json("model/tokenizer.json", lambda raw: raw | {"model": raw["model"] | {"dropout": 0.5}}),
        "a control token of text": _json(
            "model/tokenizer.json",
            lambda raw: (
                raw | {"normalizer": {"type": "Replace", "pattern": {"String": "to"}, "content": "<|endoftext|>"}}
            ),
        ),
        "a template that repeats": part(
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 9,
                "pair": [],
                "special_tokens": {},
            },
        ),
        "a deep JSON": _write("model/tokenizer.json", "[" * 200_000),
        "a long number": _write("model/tokenizer.json", "9" * 100_000),
    }
    for name, build in others.items():
        yield Canary("tokenizer.json", name, build, _tokenizer)
    said: dict[str, Any] = {
        "auto_map": {"auto_map": {"AutoTokenizer": [f"{MODULE}.Canary", None]}},
        "a class": {"tokenizer_class": f"{MODULE}.Canary"},
        "a file elsewhere": {"tokenizer_file": f"../../{SECRET}/tokenizer.json", "vocab_file": "/etc/passwd"},
        "a start that runs": {"bos_token": f"!!python/object/apply:os.system ['{command()}']"},
        "a start that is a list": {"bos_token": [["x"]]},
        "templates": {"chat_template": [{"name": "default", "template": "{{ ''.__class__ }}"}]},
        "a template of numbers": {"chat_template": [1, 2]},
    }
    for name, values in said.items():
        yield Canary("tokenizer_config.json", name, _json("model/tokenizer_config.json", _merged(**values)), _chat)
    alone = _removed("model/tokenizer.json")
    forms = _pickles()
    for name, data in {
        "a pickle as tokenizer.model": forms["protocol 4"],
        "wild lengths": b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        "ranks that run": base64.b64encode(b"__import__('os')") + b" 0\n",
        "ranks beyond all": b"YQ== 99999999999999999999\n",
    }.items():
        yield Canary("vocabulary", name, _then(alone, _write("model/tokenizer.model", data)), _tokenizer)
        yield Canary(
            "vocabulary", f"{name}, .tiktoken", _then(alone, _write("model/cl100k_base.tiktoken", data)), _tokenizer
        )
    pair = _then(alone, _write("model/vocab.json", json.dumps({"a": 0})), _link("model/merges.txt", "merges.txt"))
    yield Canary("vocabulary", "merges.txt that is a link", pair, _tokenizer)


def runs() -> Iterator[Canary]:
    names = [f"../../../{SECRET}/secret.txt", "/etc/passwd", "a/b", "..", "", ".lock", "x\0"]
    for name in names:
        change = _json(
            f"{STEP}/manifest.json", lambda before, name=name: before | {"sha256": before["sha256"] | {name: "0" * 64}}
        )
        yield Canary("checkpoint", f"manifest names {name!r}", change, _run)
    for name in ("manifest.json", "state.json", "model.safetensors", "tokenizer.json"):
        yield Canary("link", f"checkpoint {name}", _link(f"{STEP}/{name}", name), _run)
    for name, target in (
        ("run/metrics.jsonl", "secret.txt"),
        ("run/checkpoints", "."),
        ("run/config.yaml", "secret.txt"),
        (STEP, "."),
        ("run/status.json", "secret.txt"),
    ):
        yield Canary("link", name, _link(name, target), _run)
    lines = [
        '{"kind": "eval", "step": 1, "val_bpb": 1e999}',
        '{"kind": "eval", "step": true}',
        '{"kind": "x", "step": 99999999999999999999999}',
        '{"step": 1}',
        "!!python/object/apply:os.system [x]",
        "[" * 50_000,
        '{"kind": "eval", "step": 1, "__class__": "os.system"}',
        "9" * 99_999,
    ]
    for line in lines:
        yield Canary("metrics.jsonl", line[:50], _write("run/metrics.jsonl", line + "\n"), _run)
    for name, text in (
        ("a deep state", "[" * 50_000),
        ("a state that runs", f"!!python/object/apply:os.system ['{command()}']"),
        ("a long number", "9" * 50_000),
    ):
        yield Canary("state.json", name, _write(f"{STEP}/state.json", text), _run)
    for text in ('{"id": "../../x", "sent": {}}', '{"id": {"a": 1}, "sent": 1}', "[" * 50_000, "[]"):
        yield Canary("wandb.json", text[:40], _write("run/wandb.json", text), _wandb)
    entry = {"file": "x", "sha256": "0" * 64, "n_tokens": 1, "n_documents": 1, "n_bytes": 1}
    for name in (f"../{SECRET}/x.tok", "/etc/passwd", "..", "a/b.tok", "", "x\0"):
        yield Canary(
            "data set",
            f"manifest names {name!r}",
            _resealed({"splits": {"train": [entry | {"file": name}], "val": []}}),
            _data,
        )
    for values in (
        {"vocab_size": 1 << 70},
        {"sources": ["x"] * 10},
        {"splits": {"train": [entry] * 9999}},
        {"start_id": f"__import__('os').system('{command()}')"},
        {"settings": {"__reduce__": ["os.system", command()]}},
    ):
        yield Canary("data set", f"manifest {str(values)[:80]}", _resealed(values), _data)
    for name in ("manifest.json", "train-00000.tok", "tokenizer.json"):
        yield Canary("link", f"data set {name}", _link(f"set/{name}", name), _data)
    for name in ("train.bin", "val.bin", "meta.json"):
        yield Canary("link", f"bins {name}", _link(f"bins/{name}", name), _bins)
    for name in ("train-00000.tok", "manifest.json"):
        yield Canary("pipe", f"data set {name}", _pipe(f"set/{name}"), _data)
    yield Canary("pipe", "train.bin", _pipe("bins/train.bin"), _bins)
    yield Canary("pipe", "model.safetensors", _pipe("model/model.safetensors"), _model)
    yield Canary("pipe", "tokenizer.json", _pipe("model/tokenizer.json"), _model)


def _wandb(path: Path) -> object:
    """What the sink reads of its file; wandb itself is not loaded."""
    from types import ModuleType

    from gpt import log

    said: list[str] = []
    fake = ModuleType("wandb")
    fake.login = lambda **_: True  # type: ignore[attr-defined]
    fake.Settings = dict  # type: ignore[attr-defined]

    class Run:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    def init(**given: Any) -> Run:
        if set(str(given["id"])) & set("/\\. {}"):
            WATCH.seen.append(f"the id {given['id']!r}, which could leave the directory, is handed on")
        return Run()

    fake.init = init  # type: ignore[attr-defined]
    sys.modules["wandb"] = fake
    try:
        log.Wandb(path / "run", log.WandbConfig(project="x"), {}, said.append).finish(False)
    finally:
        del sys.modules["wandb"]
    return said


def _resealed(values: dict[str, Any]) -> Callable[[Path], object]:
    def build(path: Path) -> None:
        from gpt.shards import _manifest_checksum

        told = json.loads((path / "set/manifest.json").read_bytes()) | values
        told["checksum"] = _manifest_checksum(told)
        (path / "set/manifest.json").write_text(json.dumps(told))

    return build


def _pipe(name: str) -> Callable[[Path], object]:
    def build(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return build


def texts() -> Iterator[Canary]:
    def tar(*members: tuple[str, bytes | str]) -> bytes:
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                if isinstance(data, str):
                    info.type, info.linkname = tarfile.SYMTYPE, data
                    archive.addfile(info)
                else:
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return raw.getvalue()

    archives = {
        "names above": tar(("../../RAN", b"x"), (f"../{SECRET}/RAN", b"x")),
        "absolute names": tar(("/tmp/RAN", b"x")),
        "links": tar(("x", f"../{SECRET}/secret.txt"), ("x/y", b"z")),
        "a link and a file through it": tar(("d", "/tmp"), ("d/RAN", b"x")),
        "names with commands": tar(("|touch RAN", b"x"), ("$(touch RAN)", b"x")),
    }
    for name, data in archives.items():
        yield Canary("tar", name, _write("texts/a.tar", data), _texts("texts/a.tar"))
    slip = io.BytesIO()
    with zipfile.ZipFile(slip, "w") as archive:
        archive.writestr("../../RAN", "x")
    yield Canary("zip", "names above", _write("texts/a.zip", slip.getvalue()), _texts("texts/a.zip"))
    yield Canary("zip", "names above, as text", _write("texts/a.txt", slip.getvalue()), _texts("texts/a.txt"))
    bomb = gzip.compress(bytes(300 << 20), 9)
    yield Canary("bomb", "gzip, one record", _write("texts/a.jsonl.gz", bomb), _texts("texts/a.jsonl.gz", field="text"))
    yield Canary("bomb", "gzip in gzip", _write("texts/a.txt.gz", gzip.compress(bomb)), _texts("texts/a.txt.gz"))
    records = [
        '{"text": {"__class__": "os.system"}}',
        '{"__reduce__": ["os.system", "touch RAN"]}',
        '{"text": "x", "text": 1}',
        "[" * 99_999,
        '{"text": ' + "9" * 99_999 + "}",
        '{"text": "\\ud800"}',
        '{"py/object": "os.system", "text": ["x"]}',
        '{"$ref": "file:///etc/passwd"}',
    ]
    for record in records:
        yield Canary(
            "jsonl", record[:60], _write("texts/a.jsonl", record + "\n"), _texts("texts/a.jsonl", field="text")
        )
        yield Canary("json", record[:40], _write("texts/a.json", f"[{record}]"), _texts("texts/a.json", field="text"))
    for template in (
        "{text.__class__}",
        "{0.__class__}",
        "{text!r}",
        "{text:>99999999}",
        "{text[0].__class__}",
        "{text.__init__.__globals__}",
    ):
        record = json.dumps({"text": "x"}) + "\n"
        yield Canary(
            "template of fields", template, _write("texts/a.jsonl", record), _texts("texts/a.jsonl", template=template)
        )
    table = io.StringIO()
    csv.writer(table).writerows([["text"], ["=cmd|' /C touch RAN'!A0"], ["=HYPERLINK(1)"], ["@SUM(1)"]])
    yield Canary("csv", "formulas", _write("texts/a.csv", table.getvalue()), _texts("texts/a.csv", field="text"))
    for form in ("class", "metadata"):
        yield Canary("parquet", f"a pickle in its {form}", _parquet(form), _texts("texts/a.parquet", field="text"))
    yield Canary(
        "link",
        "a text elsewhere",
        _then(_write("texts/b.txt", "b"), _link("texts/a.txt", "secret.txt")),
        _texts("texts"),
    )
    yield Canary(
        "link", "a directory elsewhere", _then(_write("texts/b.txt", "b"), _link("texts/sub", ".")), _texts("texts")
    )
    asked = [
        {"prompt": "x", "answer": {"__class__": 1}},
        {"messages": [{"role": "__class__", "content": "x"}], "answer": "x"},
        {"prompt": "{0.__class__}", "answer": "y"},
        {"question": "x", "choices": ["a"] * 99_999, "answer": 1 << 70},
        {"prompt": f"$(touch RAN)`{command()}`", "answer": "x"},
    ]
    for line in asked:
        yield Canary("tasks", str(line)[:50], _write("tasks.jsonl", json.dumps(line) + "\n"), _tasks)


def _parquet(form: str) -> Callable[[Path], object]:
    """pyarrow before 14 ran the pickle of an extension type when it read a schema (CVE-2023-47248)."""

    def build(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        evil = pickle.dumps(Runs(), protocol=2)
        extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
        field = pyarrow.field("text", pyarrow.string(), metadata=extension if form == "class" else None)
        schema = pyarrow.schema([field], metadata={b"pandas": b'{"index_columns": ["__import__"]}', b"pickle": evil})
        (path / "texts").mkdir()
        pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(["x"])], schema), path / "texts/a.parquet")

    return build


def hubs() -> Iterator[Canary]:
    def of(**files: bytes) -> Callable[[], dict[str, Any]]:
        def made() -> dict[str, Any]:
            from hub_server import Repository

            return {"org/x": Repository(files)}

        return made

    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": f"../../{SECRET}/*"}]}]}

    def carded() -> dict[str, Any]:
        from hub_server import Repository

        return {"org/x": Repository({f"../../{SECRET}/secret.jsonl": b"{}", "a.jsonl": b'{"text": "x"}\n'}, card)}

    code = b"open('RAN', 'w')\n"
    listings = {
        "a script": of(**{"x.py": code, "README.md": b""}),
        "a script and data": of(**{"x.py": code, "data/train-00000-of-00001.jsonl": b"{}\n"}),
        "a name above": of(**{f"../../{SECRET}/train.jsonl": b"{}\n"}),
        "an absolute name": of(**{"/etc/train.jsonl": b"{}\n"}),
        "a name with a command": of(**{"train;touch RAN.jsonl": b"{}\n"}),
        "a card that leads above": carded,
        "a pickle": of(**{"train.pkl": pickle.dumps(Runs())}),
        "deep names": of(**{"a/" * 200 + "train.jsonl": b"{}\n"}),
    }
    for name, made in listings.items():
        yield Canary("hub", f"data set: {name}", lambda path: None, _hub(made, "org/x"))
    weights = {"config.json": b"{}", "modeling.py": code}
    listed = {
        "pickled weights": of(**weights, **{"pytorch_model.bin": pickle.dumps(Runs())}),
        "an index that leads above": of(
            **weights,
            **{
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"x": f"../../{SECRET}/m.safetensors"}}
                ).encode()
            },
        ),
        "an index of pickles": of(
            **weights,
            **{
                "model.safetensors.index.json": b'{"weight_map": {"x": "pytorch_model.bin"}}',
                "pytorch_model.bin": b"x",
            },
        ),
        "code beside": of(**weights, **{"model.safetensors": b"x", f"{MODULE}.py": code}),
    }
    for name, made in listed.items():
        yield Canary("hub", f"model: {name}", lambda path: None, _hub(made, "org/x", model=True))
    for name in ("../../x", "org/../x", "org/x@../../y", "org/x;touch RAN", "http://example.org/x", "a/b/c", "\0"):
        yield Canary("hub", f"the name {name!r}", lambda path: None, _hub(dict, name, model=True))


def environments() -> Iterator[Canary]:
    """What another process left in the environment, each as what reads it does."""
    from rich.console import Console

    from gpt import runtime

    run = f"__import__('os').system('{command()}')"
    readers: dict[str, tuple[str, Callable[[], object]]] = {
        "RANK": (run, runtime.rank),
        "WORLD_SIZE": ("1; touch RAN", runtime.world_size),
        "LOCAL_RANK": ("$(touch RAN)", runtime.local_rank),
        "SLURM_JOB_END_TIME": (run, runtime.job_ends_at),
        "NO_COLOR": ("{{ 7 * 7 }}", lambda: Console().no_color),
        "COLUMNS": (f"__import__('{MODULE}')", lambda: Console().width),
    }

    def opened(name: str, value: str, read: Callable[[], object]) -> Callable[[Path], object]:
        def start(path: Path) -> object:
            before = os.environ.get(name)
            at, WATCH.at = WATCH.at, ""
            os.environ[name] = value
            WATCH.at = at
            try:
                return read()
            finally:
                at, WATCH.at = WATCH.at, ""
                os.environ.pop(name)
                if before is not None:
                    os.environ[name] = before
                WATCH.at = at

        return start

    for name, (value, read) in readers.items():
        yield Canary("environment", name, lambda path: None, opened(name, value, read))


def canaries() -> list[Canary]:
    parts = (settings_files, pickles, templates, models, vocabularies, runs, texts, hubs, environments)
    return [canary for part in parts for canary in part()]


def planted() -> list[Canary]:
    """What a careless loader would do: the watch must see each of these, or it proves nothing."""
    import importlib
    import threading

    import jinja2
    import yaml

    forms = _pickles()

    def unpickled(path: Path) -> object:
        return pickle.loads(forms["protocol 4"])

    def imported(path: Path) -> object:
        sys.path.insert(0, str(path))
        try:
            return importlib.import_module(MODULE)
        finally:
            sys.path.remove(str(path))

    def in_a_thread(path: Path) -> object:
        thread = threading.Thread(target=os.system, args=(command(),))
        thread.start()
        return thread.join()

    ways: dict[str, Callable[[Path], object]] = {
        "pickle": unpickled,
        "import": imported,
        "thread": in_a_thread,
        "system": lambda path: os.system(command()),
        "yaml": lambda path: yaml.unsafe_load(f"!!python/object/apply:os.system ['{command()}']"),
        "eval": lambda path: eval(python()),
        "exec": lambda path: exec(python()),
        "marshal": lambda path: exec(marshal.loads(forms["marshal"])),
        "jinja": lambda path: jinja2.Template(
            f"{{{{ cycler.__init__.__globals__.os.system('{command()}') }}}}"
        ).render(),
        "popen": lambda path: subprocess.Popen(["touch", "RAN"]),
        "socket": lambda path: socket.create_connection(("127.0.0.1", 9)),
        "write": lambda path: (path.parent / "outside").write_text("x"),
        "rename": lambda path: (path / "file").rename(path.parent / "y"),
        "read": lambda path: (path.parent / SECRET / "secret.txt").read_text(),
        "library": lambda path: __import__("ctypes").CDLL("libc.so.6"),
        "fork": lambda path: os.fork() or os._exit(0),
        "mark": lambda path: (path / "RAN").touch(),
    }
    return [Canary("planted", name, lambda path: (path / "file").touch(), way) for name, way in ways.items()]


# Opening them all

WATCH: Watch


def _tried(canary: Canary, path: Path) -> tuple[list[str], str]:
    """(what was seen that may not be, how it ended) of one canary in its own directory."""
    WATCH.seen.clear()
    (path / f"{MODULE}.py").write_text("open('RAN', 'w')\nclass Canary: ...\ndef run(): ...\n")
    canary.build(path)
    os.chdir(path)
    ended = "loaded"
    try:
        with limits.timed(CPU_S, WALL_S):
            WATCH.at = str(path)
            try:
                canary.open(path)
            finally:
                WATCH.at = ""
    except (ValueError, OSError, EOFError) as error:
        ended = f"{type(error).__name__}: {error}"
        expected = isinstance(error, ValueError | FileNotFoundError) or error.errno is not None
        if not expected or not str(error).strip() or "Traceback" in str(error):
            WATCH.seen.append(f"no clear error: {ended[:200]}")
    except Stopped:
        pass
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"
        WATCH.seen.append(f"no error in words: {ended[:300]}")
    left = [
        str(each.relative_to(path.parent))
        for place in (path, path.parent)
        for each in place.rglob("RAN*")
        if place == path or each.parent == place
    ]
    return [*WATCH.seen, *(f"a payload ran: {each}" for each in left)], ended[:200]


def _child(scratch: Path, names: list[str], first: int) -> None:
    """Try canaries from `first` on; one line of JSON each."""
    global WATCH
    for name in ("hub", "tmp", SECRET):
        (scratch / name).mkdir(exist_ok=True)
    for name in (
        *("secret.txt", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
        *("merges.txt", "chat_template.jinja", "manifest.json", "state.json", "meta.json", "train.bin", "val.bin"),
        *("train-00000.tok", "x.tok"),
    ):
        (scratch / SECRET / name).write_text("{}")
    os.environ |= {
        "TMPDIR": str(scratch / "tmp"),
        "HF_HOME": str(scratch / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    tempfile.tempdir = None
    import hub_server  # noqa: F401
    import huggingface_hub
    import pyarrow.parquet  # noqa: F401
    import torch

    from gpt import bins, chat, corpus, hf, hub, log, recipe, tasks, trainer  # noqa: F401

    huggingface_hub.HfApi(), huggingface_hub.hf_hub_download, huggingface_hub.errors, huggingface_hub.snapshot_download
    torch.set_num_threads(1)
    base = scratch / f"base-{first}"
    base.mkdir()
    _bases(base)
    WATCH = Watch(scratch)
    sys.addaudithook(WATCH)
    limits.limit_memory(limits.address_space() + MEMORY)
    for number, canary in enumerate(_chosen(names)):
        if number < first:
            continue
        print(json.dumps([number]), flush=True)
        path = scratch / f"{number}"
        shutil.copytree(base, path, symlinks=True)
        began = time.monotonic()
        seen, ended = _tried(canary, path)
        print(json.dumps([number, seen, ended, time.monotonic() - began]), flush=True)
        os.chdir(scratch)
        shutil.rmtree(path)


def _chosen(names: list[str]) -> list[Canary]:
    every = planted() if names == ["planted"] else canaries()
    return [c for c in every if names == ["planted"] or all(name in f"{c.kind}: {c.name}" for name in names)]


class Result(NamedTuple):
    canary: Canary
    wrong: list[str]
    ended: str
    seconds: float


def attempts(names: list[str]) -> list[Result]:
    """Open every canary whose kind and name hold all of `names`; a child that ends is replaced, behind what ended it."""
    chosen, results, first = _chosen(names), dict[int, Result](), 0
    with tempfile.TemporaryDirectory() as scratch:
        while first < len(chosen):
            place = Path(scratch) / f"from-{first}"
            place.mkdir()
            command_line = [sys.executable, __file__, "--child", str(place.resolve()), str(first), *names]
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            ran = subprocess.run(
                command_line, capture_output=True, text=True, env=environment, check=False, stdin=subprocess.DEVNULL
            )
            begun = -1
            for line in ran.stdout.splitlines():
                if line.startswith("["):
                    number, *rest = json.loads(line)
                    begun = max(begun, number)
                    if rest:
                        results[number] = Result(chosen[number], *rest)
            if begun < 0:
                raise RuntimeError(f"the child did not begin: {ran.stderr[-3000:]}")
            if begun not in results:
                last = (ran.stderr.strip().splitlines() or [""])[-1]
                results[begun] = Result(chosen[begun], [f"the process ended: {ran.returncode} {last[:300]}"], "", 0.0)
            first = begun + 1
    return [results[number] for number in sorted(results)]


def prove(scale: float, say: Callable[[str], None]) -> list[Row]:
    """Every canary, whatever the scale: they take seconds. The watch itself is tried first."""
    began = time.monotonic()
    blind = [result.canary.name for result in attempts(["planted"]) if not result.wrong]
    for name in blind:
        say(f"the watch does not see: {name}")
    results = attempts([])
    for result in results:
        for what in result.wrong:
            say(f"{result.canary.kind}: {result.canary.name}: {what}")
    n_good = 0 if blind else sum(not result.wrong for result in results)
    return [Row("G11 G12 G14", "code-execution canaries opened", len(results), n_good, time.monotonic() - began)]


def main(names: list[str]) -> None:
    results = attempts(names)
    for kind in dict.fromkeys(result.canary.kind for result in results):
        some = [result for result in results if result.canary.kind == kind]
        loaded = sum(result.ended == "loaded" for result in some)
        print(
            f"{kind:24} {len(some):4} opened  {loaded:3} loaded  {sum(bool(r.wrong) for r in some):3} wrong"
            f"  {max(r.seconds for r in some):5.2f} s at most"
        )
    for result in results:
        if result.wrong or names:
            print(f"{result.canary.kind}: {result.canary.name}: {result.wrong or result.ended}")
    print(f"{len(results)} canaries, {sum(bool(result.wrong) for result in results)} wrong")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--child"]:
        _child(Path(sys.argv[2]), sys.argv[4:], int(sys.argv[3]))
    else:
        main(sys.argv[1:])
