"""Data sets of the hub, from a server on this machine that answers as the hub does: what is chosen, read and refused."""

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

from gpt import hub

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


def read(url: str, where: Path, cases: list[dict[str, Any]], **env: str) -> list[dict[str, Any]]:
    """What corpus makes of each source, in a process that takes `url` for the hub."""
    env = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(where / "hf"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0",
    } | env  # fmt: skip
    command = [sys.executable, "-W", "error", "-c", READ]
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
