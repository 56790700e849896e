"""Every recipe in data/ against a server on this machine that is shaped like its source."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_server import Repository, serving
from test_hub import parquet

from gpt import corpus
from gpt.prepare import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "data").glob("*.yaml"))
HUB = ("fineweb-edu", "openwebtext", "tinystories", "wikipedia", "wikitext-103")

# The layout of the real repositories: their cards' configurations, their file names, and their columns.
STORY = [{"text": f"Once upon a time there was a cat with {n} hats."} for n in range(40)]
PAGES = [{"text": f"Page {n} of the web.", "id": f"<urn:{n}>", "dump": "CC", "score": 3.5} for n in range(30)]
ARTICLES = [
    {"id": str(n), "url": f"https://de.wikipedia.org/{n}", "title": f"Titel {n}", "text": f"Artikel {n}."}
    for n in range(30)
]
LINES = [
    "", " = Robert = \n", "", " Robert is an actor . \n", " = = Career = = \n", "", " He had a role . \n", " = Du Fu = \n",
    " A poet . \n",
]  # fmt: skip


def card(**splits_of: dict[str, str]) -> dict[str, Any]:
    return {
        "configs": [
            {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
            for name, splits in splits_of.items()
        ]
    }


REPOSITORIES = {
    "roneneldan/TinyStories": Repository(
        {
            "README.md": b"", "TinyStories-train.txt": b"not this",
            "data/train-00000-of-00002-2d5a1467fff1081b.parquet": parquet(STORY[:20]),
            "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": parquet(STORY[20:]),
            "data/validation-00000-of-00001-869c898b519ad725.parquet": parquet([{"text": "The end."}]),
        },
    ),
    "Salesforce/wikitext": Repository(
        {
            f"{config}/{split}-00000-of-00001.parquet": parquet([{"text": line} for line in LINES])
            for config in ("wikitext-103-raw-v1", "wikitext-2-v1") for split in ("train", "validation", "test")
        },
        card(**{
            config: {split: f"{config}/{split}-*" for split in ("test", "train", "validation")}
            for config in ("wikitext-103-raw-v1", "wikitext-2-v1")
        }),
    ),
    "Skylion007/openwebtext": Repository(
        {"openwebtext.py": b"raise SystemExit", "data/train-00000-of-00080.parquet": parquet(PAGES)},
        card(default={"train": "data/train-*"}),
    ),
    "HuggingFaceFW/fineweb-edu": Repository(
        {"sample/10BT/000_00000.parquet": parquet(PAGES), "data/CC-MAIN-2013-20/train-0.parquet": b"not this"},
        {"configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
            {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
        ]},
    ),
    "wikimedia/wikipedia": Repository(
        {f"20231101.{code}/train-00000-of-00001.parquet": parquet(ARTICLES) for code in ("de", "en")},
        card(**{f"20231101.{code}": {"train": f"20231101.{code}/train-*"} for code in ("de", "en")}),
    ),
}  # fmt: skip

READ = """
import json, sys
from pathlib import Path
from gpt import corpus
from gpt.prepare import load_recipe
results = []
for path, overrides in json.loads(sys.stdin.read()):
    recipe = load_recipe(Path(path), overrides)
    results.append([
        [document.text for file in corpus.files(source, Path("downloads"), Path("spool"), [].append)
         for document in corpus.documents(file)] for source in (*recipe.input, *(recipe.validation or ()))
    ])
print(json.dumps(results))
"""
CASES = {
    "tinystories": ("tinystories", []),
    "wikitext-103": ("wikitext-103", []),
    "openwebtext": ("openwebtext", []),
    "openwebtext, streamed": ("openwebtext", ["input.streaming=true"]),
    "fineweb-edu": ("fineweb-edu", []),
    "fineweb-edu, streamed": ("fineweb-edu", ["input.streaming=true"]),
    "wikipedia": ("wikipedia", []),
    "wikipedia, German": ("wikipedia", ["input.config=20231101.de", "input.streaming=true"]),
}


def run(command: list[str], url: str, where: Path, text: str = "") -> str:
    env = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(where / "hf"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], input=text, capture_output=True, text=True, cwd=where, env=env, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[list[str]]]]:
    cases = [(str(ROOT / "data" / f"{recipe}.yaml"), overrides) for recipe, overrides in CASES.values()]
    with serving(REPOSITORIES) as (url, _):
        found = json.loads(run(["-c", READ], url, tmp_path_factory.mktemp("recipes"), json.dumps(cases)))
    yield dict(zip(CASES, found, strict=True))


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def test_tinystories_are_read_with_their_own_validation(read: Any) -> None:
    assert read["tinystories"] == [texts(STORY), ["The end."]]


def test_an_article_of_wikitext_is_a_document(read: Any) -> None:
    articles = [
        " = Robert = \n Robert is an actor . \n = = Career = = \n He had a role . \n",
        " = Du Fu = \n A poet . \n",
    ]
    assert read["wikitext-103"] == [articles, articles]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("openwebtext", "fineweb"))])
def test_a_page_of_the_web_is_a_document(read: Any, case: str) -> None:
    assert read[case] == [texts(PAGES)]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("wikipedia")])
def test_an_article_of_wikipedia_has_its_title(read: Any, case: str) -> None:
    assert read[case] == [[f"Titel {n}\n\nArtikel {n}." for n in range(30)]]


def test_a_recipe_of_the_hub_becomes_a_data_set(tmp_path: Path) -> None:
    with serving(REPOSITORIES) as (url, _):
        command = [
            str(ROOT / "data" / "prepare.py"),
            str(ROOT / "data" / "tinystories.yaml"),
            "--out",
            "set",
            "vocab_size=280",
        ]
        run([*command, "workers=1"], url, tmp_path)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_bytes())
    assert manifest["sources"] == ["tinystories"]


# Others


def test_tinyshakespeare_is_fetched_and_its_hash_checked(tmp_path: Path) -> None:
    (source,) = load_recipe(ROOT / "data" / "tinyshakespeare.yaml", []).input
    assert source.url is not None and source.url.endswith("/tinyshakespeare/input.txt")
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    (tmp_path / "input.txt").write_text(text)

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            place = {"url": f"http://127.0.0.1:{http.server_port}/input.txt"}
            with pytest.raises(ValueError, match=f"expected {source.sha256}"):
                corpus.files(source.model_copy(update=place), tmp_path / "d", tmp_path / "s", [].append)
            place["sha256"] = hashlib.sha256(text.encode()).hexdigest()
            (file,) = corpus.files(source.model_copy(update=place), tmp_path / "d", tmp_path / "s", [].append)
        finally:
            http.shutdown()
            thread.join()
    assert [document.text for document in corpus.documents(file)] == [text]


def test_tang_poems_are_read_and_their_absence_is_told_with_the_way_to_them(tmp_path: Path) -> None:
    (source,) = load_recipe(ROOT / "data" / "tang-poems.yaml", []).input
    poems = [{"title": "靜夜思", "author": "李白", "paragraphs": ["床前明月光,", "疑是地上霜。"]}]
    text = "靜夜思\n李白\n床前明月光,\n疑是地上霜。"
    (tmp_path / "poems.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "poet.tang.0.json").write_text(json.dumps(poems))
    asked = {"path": f"{tmp_path}/poems.jsonl"}, {
        "path": f"{tmp_path}/poet.tang.*.json", "field": None, "template": "{title}\n{author}\n{paragraphs}",
    }  # fmt: skip
    for place in asked:
        (file,) = corpus.files(source.model_copy(update=place), tmp_path, tmp_path, [].append)
        assert [document.text for document in corpus.documents(file)] == [text]
    with pytest.raises(FileNotFoundError, match=r"the head of data/tang-poems\.yaml says how"):
        corpus.files(source.model_copy(update={"path": f"{tmp_path}/none.jsonl"}), tmp_path, tmp_path, [].append)


def test_the_quickstart_reads_code_that_is_on_every_machine(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "data" / "quickstart.yaml", [])
    found = [file for source in recipe.input for file in corpus.files(source, tmp_path, tmp_path, [].append)]
    assert sum(file.size for file in found) > 1_000_000
    told: list[corpus.BadRecord] = []
    assert sum(1 for file in found[:50] for _ in corpus.documents(file, skip=told.append)) + len(told) >= 45


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_to_run_it_and_what_it_yields(name: str) -> None:
    text = (ROOT / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# python data/prepare.py data/{name}.yaml")
    load_recipe(ROOT / "data" / f"{name}.yaml", [])
    if name in HUB:
        assert "Licence: " in text
        assert "Published figures: " in text


def test_every_recipe_is_tested_here() -> None:
    assert set(RECIPES) == {*HUB, "quickstart", "tang-poems", "tinyshakespeare"}
