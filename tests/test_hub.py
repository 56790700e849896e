"""Data sets and models of the hub, from a server on this machine that answers as the hub does: what is chosen, read and refused."""

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Repository, serving
from safetensors.torch import load, save

from gpt import hf, hub
from gpt import tokenizer as tokenizers
from gpt.model import GPT, ModelConfig, init_weights

ROOT = Path(__file__).resolve().parent.parent

# One process reads every case, for importing takes longer than reading. HF_ENDPOINT is read when the library is imported.
READ = """
import json, sys, traceback
from pathlib import Path
from gpt import corpus
results = []
for settings in json.loads(sys.stdin.read()):
    said, result = [], {}
    try:
        files = corpus.files(corpus.Source(**settings), Path("downloads"), Path("spool"), said.append)
        result["texts"] = [document.text for file in files for document in corpus.documents(file)]
        result["labels"] = [file.label for file in files]
        result["direct"] = [file.direct for file in files]
    except (ValueError, OSError) as error:
        result["error"] = str(error)
    except Exception:
        result["bug"] = traceback.format_exc()
    results.append(result | {"said": said})
print(json.dumps(results))
"""


# The same for models; where a case says so, the model is loaded and its ids of a text are told.
RESOLVE = """
import json, sys, traceback
from gpt import run
results = []
for source, load in json.loads(sys.stdin.read()):
    result = {}
    try:
        path, what = run.resolve(source)
        result |= {"files": sorted(str(f.relative_to(path)) for f in path.rglob("*")), "path": str(path), "what": what}
        if load:
            from gpt import hf
            model, tokenizer = hf.load(path)
            result |= {"sum": model.lm_head.weight.sum().item(), "ids": tokenizer.encode("the sea")}
        assert load or "torch" not in sys.modules
    except (ValueError, OSError) as error:
        result["error"] = str(error)
    except Exception:
        result["bug"] = traceback.format_exc()
    results.append(result)
print(json.dumps(results))
"""


def read(url: str, where: Path, cases: list[Any], script: str = READ, **env: str) -> list[dict[str, Any]]:
    """What corpus makes of each source, or `run` of each model, in a process that takes `url` for the hub."""
    env = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(where / "hf"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0",
    } | env  # fmt: skip
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, cwd=where, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def configs(**splits_of: dict[str, Any]) -> dict[str, Any]:
    return {
        "configs": [
            {"config_name": name.replace("_", "-"), "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
            for name, splits in splits_of.items()
        ]
    }


CARD = configs(default={"train": "data/train-*", "validation": ["data/val*"]}, small={"train": "small/**"})
MAIN = {
    "README.md": b"card", "data/train-0.parquet": parquet([{"text": "a", "id": 1}, {"text": "b", "id": 2}]),
    "data/train-1.parquet": parquet([{"text": "c", "id": 3}]), "data/valid.jsonl": jsonl("v"),
    "small/deep/x.json": b'[{"text": "s"}]', "data/broken.parquet": b"PAR1", "extra.txt": b"one|two",
}  # fmt: skip
REPOSITORIES = {
    "org/main": Repository(MAIN, CARD),
    "org/many": Repository({"x/a.jsonl": jsonl("x"), "y/a.jsonl": jsonl("y")}, configs(x={"train": "x/*"}, y={"train": "y/*"})),
    "org/plain": Repository({"train.csv": b"text,id\nt,1\n", "dev.csv.gz": gzip.compress(b"text\nd\n"), "LICENSE.txt": b"no"}),
    "org/one": Repository({"books.jsonl": jsonl("o"), ".gitattributes": b"", "dataset_infos.json": b"{}"}),
    "org/script": Repository({"script.py": b"raise SystemExit"}),
    "org/nothing": Repository({"README.md": b"", "pictures/a.png": b"\0"}),
    "org/gated": Repository(MAIN, CARD, gated=True),
    "org/bad": Repository({"train.jsonl": b'{"text": "a"}\nno\n{"text": "\\ud800"}\n'}),
}  # fmt: skip

GOOD = [
    ({"hub": "org/main"}, ["a", "b", "c"]),
    ({"hub": "org/main", "split": "validation"}, ["v"]),
    ({"hub": "org/main", "config": "small"}, ["s"]),
    ({"hub": "org/main", "data_files": "data/train-1*"}, ["c"]),
    ({"hub": "org/main", "data_files": "*.txt", "separator": "|"}, ["one", "two"]),
    ({"hub": f"org/main@{REPOSITORIES['org/main'].sha}"}, ["a", "b", "c"]),
    ({"hub": "org/main", "streaming": True}, ["a", "b", "c"]),
    ({"hub": "org/main", "streaming": True, "template": "{id}:{text}"}, ["1:a", "2:b", "3:c"]),
    ({"hub": "org/main", "split": "validation", "streaming": True}, ["v"]),
    ({"hub": "org/main", "config": "small", "streaming": True}, ["s"]),
    ({"hub": "org/many", "config": "y"}, ["y"]),
    ({"hub": "org/plain"}, ["t"]),
    ({"hub": "org/plain", "split": "validation", "streaming": True}, ["d"]),
    ({"hub": "org/one"}, ["o"]),
]
REFUSED = [
    (
        {"hub": "org/main", "split": "test"},
        "org/main: no split 'test' in configuration 'default'; it has train, validation",
    ),
    ({"hub": "org/main", "config": "big"}, "org/main: no configuration 'big'; it has default, small"),
    ({"hub": "org/main", "field": "body"}, "org/main/data/train-0.parquet: no field 'body'; it has 'text', 'id'"),
    (
        {"hub": "org/main", "field": "body", "streaming": True},
        "org/main/data/train-0.parquet: record 1: no field 'body'; it has",
    ),
    (
        {"hub": "org/main", "data_files": "*.zst"},
        "no file matches data_files '*.zst'; it has README.md, data/broken.parquet",
    ),
    ({"hub": "org/main", "data_files": "data/broken*"}, "org/main/data/broken.parquet: not a whole parquet file"),
    ({"hub": "org/main", "data_files": "data/broken*", "streaming": True}, "broken.parquet: not a whole parquet file"),
    ({"hub": "org/main", "data_files": "*.txt", "streaming": True}, "a text file is not streamed"),
    ({"hub": "org/main@v9"}, "it has no such revision"),
    ({"hub": "org/many"}, "org/many: it has 2 configurations; set config to one: x, y"),
    ({"hub": "org/plain", "config": "x"}, "no configuration 'x': its card names none; its directories: none"),
    ({"hub": "org/script"}, "made by a script, and no code of a data set is run here"),
    ({"hub": "org/nothing"}, "no split 'train' in configuration 'default'; it has none"),
    ({"hub": "org/gated"}, "its owner asks for consent"),
    ({"hub": "org/none"}, "org/none: no such data set at http://127.0.0.1"),
    ({"hub": "org/bad"}, "org/bad/train.jsonl:2: broken JSON"),
    ({"hub": "org/bad", "streaming": True}, "org/bad/train.jsonl:2: broken JSON"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    cases = [case for case, _ in (*GOOD, *REFUSED)]
    with serving(REPOSITORIES) as (url, _):
        found = read(url, tmp_path_factory.mktemp("hub"), cases)
    yield {json.dumps(case): result for case, result in zip(cases, found, strict=True)}


@pytest.mark.parametrize(("source", "texts"), GOOD, ids=lambda value: json.dumps(value)[:80])
def test_a_split_of_a_configuration_is_read(results: Any, source: dict[str, Any], texts: list[str]) -> None:
    result = results[json.dumps(source)]
    assert result.get("texts") == texts, result
    assert all(result["direct"]) or not source.get("streaming")
    assert all(label.startswith(source["hub"].partition("@")[0] + "/") for label in result["labels"])


@pytest.mark.parametrize(("source", "words"), REFUSED, ids=lambda value: json.dumps(value)[:80])
def test_what_is_not_there_or_not_read_is_told_in_words(results: Any, source: dict[str, Any], words: str) -> None:
    result = results[json.dumps(source)]
    assert words in result.get("error", ""), result


def test_streaming_asks_for_the_columns_only_and_once(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "picture": os.urandom(4000)} for i in range(3000)]
    repository = Repository({"train.parquet": parquet(rows)})
    with serving({"org/wide": repository}) as (url, asked):
        case = {"hub": "org/wide", "streaming": True}
        first, second = read(url, tmp_path, [case, case])
        assert first["texts"] == second["texts"] == [row["text"] for row in rows]
        assert [words for words in second["said"] if "reading" in words] == []
        ranges = [line.rpartition("bytes=")[2].split("-") for line in asked if "bytes=" in line]
    n_bytes = sum(int(last) - int(first) + 1 for first, last in ranges)
    assert n_bytes < len(repository.files["train.parquet"]) * 0.7
    assert not list((tmp_path / "hf").rglob("*.parquet"))


def test_a_hub_that_does_not_answer_is_told_in_words(tmp_path: Path) -> None:
    (result,) = read("http://127.0.0.1:1", tmp_path, [{"hub": "org/main"}])
    assert "org/main: http://127.0.0.1:1 could not be reached" in result.get("error", ""), result
    (result,) = read("http://127.0.0.1:1", tmp_path, [{"hub": "org/main"}], HF_HUB_OFFLINE="1")
    assert "org/main: http://127.0.0.1:1 could not be reached" in result.get("error", ""), result


# Models


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, bytes], float, list[int]]:
    """The files of a model, the sum of its head and its tokenizer's ids of a text."""
    tokenizer = tokenizers.train(["the sea and the river, the sea"] * 9, "bpe", 275)
    config = ModelConfig(vocab_size=320, max_seq_len=16, n_layer=1, d_model=8, n_head=1, qk_norm=False)
    model = GPT(config)
    init_weights(model, 1)
    state = {name: tensor.detach().clone() for name, tensor in hf.to_disk(config, model.state_dict()).items()}
    files = hf.model_files(config, tokenizer) | {"model.safetensors": save(state)}
    return files, model.lm_head.weight.sum().item(), tokenizer.encode("the sea")


def sharded(files: dict[str, bytes], **weight_map: str) -> dict[str, bytes]:
    """The same model in two files and an index."""
    state = load(files["model.safetensors"])
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    parts = {file: save({n: state[n] for n in state if names[n] == file}) for file in set(names.values())}
    index = json.dumps({"weight_map": names | weight_map}).encode()
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    return rest | parts | {"model.safetensors.index.json": index}


def test_a_model_is_fetched_with_only_what_is_read(tmp_path: Path, small: Any) -> None:
    files, total, ids = small
    others = {
        "pytorch_model.bin": b"never", "original/x.safetensors": b"never", "consolidated.safetensors": b"never",
        "modeling.py": b"raise SystemExit", "README.md": b"card", "vocab.json": b"{}",
    }  # fmt: skip
    repositories = {
        "org/one": Repository(files | others), "org/two": Repository(sharded(files) | others),
        "org/gated": Repository(files, gated=True),
        "org/pickled": Repository({"config.json": b"{}", "pytorch_model.bin": b"never"}),
        "org/empty": Repository({"README.md": b""}),
        "org/outside": Repository(sharded(files, x="../../secret.safetensors")),
        "org/code": Repository(sharded(files, x="modeling.py") | others),
        "org/noindex": Repository(sharded(files) | {"model.safetensors.index.json": b"[]"}),
    }  # fmt: skip
    sha = repositories["org/one"].sha
    good = ["hub:org/one", f"hub:org/one@{sha}", "hub:org/two"]
    refused = {
        "hub:org/one@v9": "it has no such revision",
        "hub:org/none": "org/none: no such model at http://127.0.0.1",
        "hub:org/gated": "its owner asks for consent; give it at http://127.0.0.1",
        "hub:org/pickled": "it has no model.safetensors (or its index), and weights in other forms are not fetched: a pickle can",
        "hub:org/empty": "org/empty: it has no config.json",
        "hub:org/outside": "names '../../secret.safetensors', which is no safetensors file beside it",
        "hub:org/code": "names 'modeling.py', which is no safetensors file beside it",
        "hub:org/noindex": "model.safetensors.index.json is no index of weights",
        "hub:": "'' is no repository's name; expected ORG/NAME",
        "hub:a/b/c": "'a/b/c' is no repository's name",
        "hub:../x": "'../x' is no repository's name",
    }
    with serving(repositories) as (url, asked):
        results = read(url, tmp_path, [(s, False) for s in refused] + [(s, True) for s in good] * 2, RESOLVE)
        for words, result in zip(refused.values(), results, strict=False):
            assert words in result.get("error", ""), result
        for source, result in zip(good * 2, results[len(refused) :], strict=True):
            assert (result.get("sum"), result.get("ids")) == (total, ids), result
            assert result["what"] == f"{source} ({result['path']})"
            assert sha in result["path"] or source == "hub:org/two"
        fetched = [line.rpartition("/")[2] for line in asked if line.startswith("GET ") and "/resolve/" in line]
    assert not set(fetched) & {name.rpartition("/")[2] for name in others}
    assert fetched.count("model.safetensors") == 1, "what is there is not fetched again"


def test_a_model_that_was_fetched_is_there_without_a_network(tmp_path: Path, small: Any) -> None:
    with serving({"org/one": Repository(small[0])}) as (url, _):
        (first,) = read(url, tmp_path, [("hub:org/one", True)], RESOLVE)
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        again, unknown = read(
            "http://127.0.0.1:1", tmp_path, [("hub:org/one", True), ("hub:org/two", True)], RESOLVE, **env
        )
        assert again == first
        assert "org/two: http://127.0.0.1:1 could not be reached" in unknown.get("error", ""), unknown


def test_a_link_out_of_the_hubs_cache_is_not_followed(tmp_path: Path, small: Any) -> None:
    snapshot, blobs = tmp_path / "models--org--one" / "snapshots" / "x", tmp_path / "models--org--one" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, data in small[0].items():
        (blobs / f"b-{name}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/b-{name}")
    hf.load(snapshot)
    (blobs / "b-config.json").rename(tmp_path / "config.json")
    (blobs / "b-config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match="is a symbolic link, which is not followed"):
        hf.load(snapshot)
    (blobs / "b-config.json").unlink()
    (tmp_path / "config.json").rename(blobs / "b-config.json")
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a symbolic link, which is not followed"):
        hf.load(snapshot)


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("a/*", ["a/x.txt"]),
        ("a/**", ["a/b/y.txt", "a/x.txt"]),
        ("**/*.txt", ["a/b/y.txt", "a/x.txt", "z.txt"]),
        ("?.txt", ["z.txt"]),
        ("a/[!b].txt", ["a/x.txt"]),
        ("./z.txt", ["z.txt"]),
    ],
)
def test_a_star_stays_within_a_directory(pattern: str, matching: list[str]) -> None:
    assert hub._matching(["a/b/y.txt", "a/x.txt", "z.txt"], [pattern]) == matching


def test_files_are_parted_by_the_words_in_their_names_where_no_card_does() -> None:
    names = ["en/train-0.parquet", "en/validation.parquet", "trainers.parquet", "x_test.jsonl", "notes.md"]
    assert hub._splits_by_name(names) == {
        "train": ["en/train-0.parquet"], "validation": ["en/validation.parquet"], "test": ["x_test.jsonl"],
    }  # fmt: skip
    names = [
        "data/train-00000-of-00002-2d5a.parquet",
        "data/train-00001-of-00002.parquet",
        "data/dev-00000-of-00001.jsonl",
        "train.txt",
    ]
    assert hub._splits_by_name(names) == {"train": names[:2], "dev": names[2:3]}
    assert hub._splits_by_name(["b.parquet", "c.txt.gz"]) == {"train": ["b.parquet", "c.txt.gz"]}
