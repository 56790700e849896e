"""Settings of a data set: what is named, and what does not go together."""

import pytest

from gpt import config
from gpt.recipe import PrepareConfig, as_source


def load(*changes: str) -> PrepareConfig:
    return config.load(PrepareConfig, None, list(changes))


def test_a_bare_string_is_a_path_or_a_url_with_its_hash() -> None:
    assert as_source("a/*.txt") == {"path": "a/*.txt"}
    assert as_source("http://x/y#sha256=ab") == {"url": "http://x/y", "sha256": "ab"}
    assert as_source("https://x/y") == {"url": "https://x/y", "sha256": None}
    assert [source.label for source in load("input=[a.txt, {path: b, name: c}]").input] == ["a", "c"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("grow=10", "name it with tokenizer"),
        ("add_tokens=a", "name it with tokenizer"),
        ("tokenizer=a grow=10 add_tokens=b", "use one, then the other"),
        ("tokenizer=a vocab_size=500", "leave one of them out"),
        ("kind=ids", "kind ids needs vocab_size"),
        ("vocab_size=200", "below 264"),
        ("duplicates=some", "duplicates"),
        ("val_fraction=1", "val_fraction"),
        ("workers=0", "workers"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load("input=a", *changes.split())


def test_settings_that_go_together_are_taken() -> None:
    assert load("input=a", "kind=ids", "vocab_size=50").vocab_size == 50  # a small vocabulary of ids is fine
    assert load("input=a", "tokenizer=b", "grow=5k").grow == 5000
    assert load("input=a", "tokenizer=b", "kind=ids").kind == "ids"


def test_a_bare_string_is_a_hub_data_set_a_url_or_a_path() -> None:
    assert as_source("hub:org/name@v1") == {"hub": "org/name@v1"}
    assert as_source("http://x/y#sha256=ab") == {"url": "http://x/y", "sha256": "ab"}
    assert as_source("hub/file.txt") == {"path": "hub/file.txt"}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("{path: a, chat: true, field: b}", "with chat a record is a conversation as a whole; leave field out"),
        ("{path: a, preference: true, begins: b}", "with preference .* leave begins out"),
        ("{path: a, chat: true, preference: true}", "conversations .* or pairs .* not both"),
        ("[{path: a, chat: true}, {path: b, preference: true}]", "a data set of pairs"),
    ],
)
def test_conversations_are_records_as_a_whole(inputs: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(f"input={inputs}")
    for more, why in (("split=tail", "split=hash"), ("kind=ids vocab_size=9", "kind ids has no words")):
        with pytest.raises(ValueError, match=why):
            load("input={path: a, chat: true}", *more.split())
