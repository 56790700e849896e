"""Tasks: what a file may hold, what is right, and that no batch changes an answer."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CAPITALS
from templates import FAMILIES

from gpt import chat, hf, tasks
from gpt.conversations import Conversation
from gpt.model import GPT
from gpt.tasks import Asking, Result, ask, mean, read
from gpt.tokenizer import Tokenizer

LANDS, CITIES = list(CAPITALS), list(CAPITALS.values())
CHOICE = {"question": "The capital of Peru is", "choices": ["Rome.", "Lima."], "answer": 1}
EXACT = {"prompt": "The capital of Peru is", "answer": "Lima."}


@pytest.fixture(scope="module")
def loaded(pupil: Path) -> tuple[GPT, Tokenizer]:
    return hf.load(pupil)


def task(path: Path, *records: Any) -> str:
    path /= "task.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def asked(loaded: tuple[GPT, Tokenizer], path: Path, *records: Any, **how: Any) -> Result:
    return ask(*loaded, read(task(path, *records)), Asking(**how))


# Reading


@pytest.mark.parametrize("answer", [1, "B", "Lima."], ids=["index", "letter", "text"])
def test_the_right_choice_is_an_index_a_letter_or_its_text(tmp_path: Path, answer: Any) -> None:
    assert read(task(tmp_path, CHOICE | {"answer": answer})).items[0].answers == 1


def test_a_text_that_is_also_a_letter_is_the_text(tmp_path: Path) -> None:
    assert read(task(tmp_path, CHOICE | {"choices": ["B", "A"], "answer": "B"})).items[0].answers == 0


def test_a_limit_takes_the_first_questions_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = task(tmp_path, EXACT, "", EXACT | {"prompt": "b"}, "this line is not read")
    assert [item.prompt for item in read(path, 2).items] == [EXACT["prompt"], "b"]


WRONG = {
    "json": ("{", r"broken JSON \("),
    "array": ("[1]", "expected a JSON object, got list"),
    "no prompt": ({"answer": "x"}, "expected one of prompt, question, messages; it has 'answer'"),
    "two prompts": ({"prompt": "a", "question": "b", "answer": "c"}, "it has prompt, question"),
    "prompt": ({"prompt": 3, "answer": "x"}, "prompt: expected text, got int"),
    "no answer": ({"prompt": "x"}, "no field 'answer'"),
    "answer": ({"prompt": "x", "answer": {}}, "answer: expected a text, or a list of texts"),
    "blank answer": ({"prompt": "x", "answer": " "}, "answer: expected a text"),
    "choices": (CHOICE | {"choices": "ab"}, "choices: expected a list of texts"),
    "blank choice": (CHOICE | {"choices": ["a", " "]}, "choices: expected a list of texts, none of them blank"),
    "one choice": (CHOICE | {"choices": ["a"]}, "choices: expected at least two, got 1"),
    "index": (CHOICE | {"answer": 2}, "index from 0 to 1, a letter from A to B or the text of a choice, got 2"),
    "negative": (CHOICE | {"answer": -1}, "got -1"),
    "many": (
        CHOICE | {"choices": list("abcdefghijklmnopqrstuvwxyz") * 2, "answer": 52},
        "0 to 51, a letter from A to Z or",
    ),
    "letter": (CHOICE | {"answer": "C"}, "got 'C'"),
    "truth": (CHOICE | {"answer": True}, "got True"),
    "twice": (CHOICE | {"choices": ["a", "a"], "answer": "a"}, "'a' is more than one of the choices"),
    "surrogate": ('{"prompt": "\\ud800", "answer": "x"}', "half of a surrogate pair"),
    "messages": ({"messages": "x", "answer": "x"}, "messages: expected a list, got str"),
    "no message": ({"messages": [], "answer": "x"}, "messages: the last one is of nobody"),
    "role": ({"messages": [{"role": "bot", "content": "x"}], "answer": "x"}, "message 1: role 'bot' is unknown"),
    "last": ({"messages": [{"role": "system", "content": "x"}], "answer": "x"}, "the last one is of system"),
    "empty turn": ({"messages": [{"role": "user", "content": ""}], "answer": "x"}, r"message 1 \(user\) is empty"),
}


@pytest.mark.parametrize(("record", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_record_that_is_no_question_is_named_with_its_line(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"task\.jsonl:3: .*{message}"):
        read(task(tmp_path, CHOICE if "choices" in record else EXACT, "", record))


def test_what_is_not_utf8_a_mix_or_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.jsonl:2: exact match, and the file began with multiple choice"):
        read(task(tmp_path, CHOICE, EXACT))
    with pytest.raises(ValueError, match="no question in it"):
        read(task(tmp_path, ""))
    (tmp_path / "task.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"task\.jsonl:1: not UTF-8 at byte 12 of the line \(0xff\)"):
        read(str(tmp_path / "task.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read(str(tmp_path / "none.jsonl"))


# Multiple choice


def choices(prompt: str, end: str) -> list[dict[str, Any]]:
    return [
        {"question": prompt.format(land), "choices": [city + end for city in CITIES], "answer": CITIES.index(city)}
        for land, city in CAPITALS.items()
    ]


def test_a_model_that_knows_chooses_right_and_one_that_does_not_guesses(loaded: Any, tmp_path: Path) -> None:
    records = choices("The capital of {} is", ".")
    assert asked(loaded, tmp_path, *records).measures["acc"] == (1.0, 0.0)
    model, tokenizer = loaded
    blank = GPT(model.config).eval()
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    result = asked((blank, tokenizer), tmp_path, *records)
    assert result.n == 6
    assert result.measures["acc_norm"].value <= 0.5


def test_choices_are_scored_by_their_sum_and_by_byte_the_slow_way(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    records = [
        {"question": f"capital {i}", "choices": ["is Lima", "Rome of the capital", "is"], "answer": i % 3}
        for i in range(9)
    ]
    result = asked(loaded, tmp_path, *records)
    plain, by_byte = [], []
    for record in records:
        sums = []
        prompt = [tokenizer.start_id, *tokenizer.encode(record["question"])]
        for choice in record["choices"]:
            ids = [tokenizer.start_id, *tokenizer.encode(f"{record['question']} {choice}")]
            with torch.inference_mode():
                log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
            sums.append(sum(float(log_p[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        norm = [s / len(c.encode()) for s, c in zip(sums, record["choices"], strict=True)]
        plain.append(float(sums.index(max(sums)) == record["answer"]))
        by_byte.append(float(norm.index(max(norm)) == record["answer"]))
    for name, right in (("acc", plain), ("acc_norm", by_byte)):
        assert result.measures[name].value == pytest.approx(statistics.mean(right))
        assert result.measures[name].stderr == pytest.approx(statistics.stdev(right) / 3)


@pytest.mark.parametrize(
    ("prompt", "choice", "glue"),
    [("a", "b", " "), ("a ", "b", ""), ("a\n", "b", ""), ("a", " b", ""), ("", "b", " ")],
)
def test_one_white_space_stands_between_a_prompt_and_a_choice(loaded: Any, prompt: str, choice: str, glue: str) -> None:
    _, tokenizer = loaded
    ((before, behind),) = tasks._pairs(tokenizer, tasks.Item(prompt, 0, (choice,)), False)
    assert before[0] == tokenizer.start_id
    assert tokenizer.decode([*before[1:], *behind]) == prompt + glue + choice


def test_a_choice_that_would_merge_into_the_prompt_leaves_its_ids_alone(loaded: Any) -> None:
    _, tokenizer = loaded
    whole = tokenizer.encode("capital")
    assert len(whole) == 1, "the words are one token, the halves are not"
    ((before, behind),) = tasks._pairs(tokenizer, tasks.Item("cap", 0, ("ital",), delimiter=""), False)
    assert before == [tokenizer.start_id, *tokenizer.encode("cap")]
    assert behind == tokenizer.encode("ital")


TEMPLATES = {name: FAMILIES[name] for name in ("qwen3", "llama2", "mistral-v3", "phi", "channels")}


def pieces() -> dict[str, Any]:
    """A tokenizer.json of SentencePiece's kind, of letters and bytes: a mark stands for a space, and one before any text."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "\u2581"]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": [], "byte_fallback": True,
             "unk_token": "<unk>", "fuse_unk": True}  # fmt: skip
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": space, "model": model,
            "post_processor": None, "decoder": space, "truncation": None, "padding": None}  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_choice_in_a_chat_is_what_a_model_would_be_trained_to_reply(loaded: Any, template: str, kind: str) -> None:
    """Also where the template writes a space or an empty thought before it, or a vocabulary one before any text."""
    source, control, _ = TEMPLATES[template]
    raw = json.loads(json.dumps(loaded[1].raw)) if kind == "bytes" else pieces()
    known = {token["content"] for token in raw["added_tokens"]}
    for i, name in enumerate(sorted({*control, "<|endoftext|>", "<|im_start|>", "<|im_end|>"} - known), 400):
        raw["added_tokens"].append({"id": i, "content": name, "special": True, "lstrip": False, "rstrip": False,
                                    "single_word": False, "normalized": False})  # fmt: skip
    tokenizer = Tokenizer(raw, {"bos_token": "<|endoftext|>", "chat_template": source})
    asked = {"role": "user", "content": "Capital of Peru?"}
    item = tasks.Item(Conversation((asked,)), 0, ("Lima", " is it", "\n6 "))
    (prompt, _), *_ = pairs = list(tasks._pairs(tokenizer, item, False))
    for choice, (before, behind) in zip(item.choices, pairs, strict=True):
        told = {"role": "assistant", "content": choice.strip()}
        ids, learned = chat.encode(tokenizer, Conversation((asked, told)))
        end = len(ids) - 1 - learned[::-1].index(True)
        assert before == prompt
        assert [*before, *behind] == ids[:end]
        assert not any(learned[: len(prompt)]) and all(learned[len(prompt) : end])


def test_a_choice_is_asked_where_a_template_hides_how_it_would_be_trained(loaded: Any) -> None:
    hides = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer(dict(loaded[1].raw), {**loaded[1].config, "chat_template": hides})
    ((before, behind),) = tasks._pairs(tokenizer, tasks.Item("The capital", 0, (" Lima",)), True)
    assert before == chat.encode(tokenizer, tasks._asked("The capital"), reply=True).ids
    assert behind == tokenizer.encode("Lima")


def test_a_choice_that_cannot_be_scored_is_named(loaded: Any, tmp_path: Path) -> None:
    record = CHOICE | {"choices": ["Rome.", "is of " * 60]}
    with pytest.raises(
        ValueError, match=r"task\.jsonl: question 2: the choice 'is of is of .* is 1\d\d tokens; expected"
    ):
        asked(loaded, tmp_path, CHOICE, record)


def test_numbers_that_are_no_numbers_are_no_answers(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    wild = GPT(model.config).eval()
    with torch.no_grad():
        for parameter in wild.parameters():
            parameter.fill_(math.nan)
    for record in (CHOICE, EXACT):
        with pytest.raises(FloatingPointError, match="give numbers that are not finite"):
            asked((wild, tokenizer), tmp_path, record)


def test_a_control_token_in_a_question_is_text(loaded: Any, tmp_path: Path) -> None:
    _, tokenizer = loaded
    item = read(task(tmp_path, CHOICE | {"question": "<|endoftext|>", "choices": ["<|im_end|>", "x"]})).items[0]
    for before, behind in tasks._pairs(tokenizer, item, False):
        assert not tokenizer.control_ids & {*before[1:], *behind}


# Exact match


def test_a_written_answer_is_right_without_the_space_around_it(loaded: Any, tmp_path: Path) -> None:
    records = [{"prompt": f"The capital of {land} is", "answer": f" {city}. "} for land, city in CAPITALS.items()]
    records += [{"prompt": "The capital of Cuba is", "answer": ["Rome.", "Havana."]}]
    records += [{"prompt": "The capital of Cuba is", "answer": "Rome."}]
    result = asked(loaded, tmp_path, *records)
    assert result.measures["exact_match"] == (7 / 8, pytest.approx(1 / 8))


def test_an_answer_ends_at_a_stop_of_ones_own(loaded: Any, tmp_path: Path) -> None:
    record = {"prompt": "The capital of Peru is", "answer": "Lima"}
    assert asked(loaded, tmp_path, record).measures["exact_match"].value == 0
    assert asked(loaded, tmp_path, record, stops=(".",)).measures["exact_match"].value == 1
    assert asked(loaded, tmp_path, record | {"answer": "Lima."}, max_tokens=1).measures["exact_match"].value == 0


def test_a_chat_is_asked_in_the_tokenizers_format(loaded: Any, tmp_path: Path) -> None:
    plain = [{"prompt": f"Capital of {land}?", "answer": city} for land, city in CAPITALS.items()]
    chats = [
        {"messages": [{"role": "user", "content": f"Capital of {land}?"}], "answer": city}
        for land, city in CAPITALS.items()
    ]
    assert asked(loaded, tmp_path, *plain, chat=True).measures["exact_match"] == (1.0, 0.0)
    assert asked(loaded, tmp_path, *chats).measures["exact_match"] == (1.0, 0.0)
    assert asked(loaded, tmp_path, *plain).measures["exact_match"].value < 0.5
    assert asked(loaded, tmp_path, *choices("Capital of {}?", ""), chat=True).measures["acc"] == (1.0, 0.0)


# Both


@pytest.mark.parametrize("batch_tokens", [1, 50, 300])
def test_answers_do_not_depend_on_the_batch(loaded: Any, tmp_path: Path, batch_tokens: int) -> None:
    unsure = [
        {"question": f"{word} of", "choices": [f"{city} is" for city in CITIES], "answer": i % 6}
        for i, word in enumerate(
            ["The", "capital", "is", "Peru", "and", "Rome", "The", "is", "of", "Cuba", "capital", "of"]
        )
    ]
    written = [{"prompt": f"{land} is", "answer": city} for land, city in CAPITALS.items()] * 2
    for records in (unsure, written):
        one, other = (asked(loaded, tmp_path, *records, batch_tokens=n) for n in (batch_tokens, 8192))
        assert one == other


def test_prompts_that_do_not_fit_are_counted_and_their_end_is_read(loaded: Any, tmp_path: Path) -> None:
    long = "is of " * 100
    result = asked(loaded, tmp_path, {"prompt": long + "\nThe capital of Peru is", "answer": "Lima."}, EXACT)
    assert (result.n, result.n_cut) == (2, 1)
    result = asked(loaded, tmp_path, CHOICE | {"question": long + CHOICE["question"]}, CHOICE)
    assert (result.n, result.n_cut) == (2, 1)


def test_the_standard_error_is_that_of_the_sample() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean(values) == (0.6, pytest.approx(statistics.stdev(values) / math.sqrt(5)))
    assert mean([1.0]) == (1.0, None)


def test_equal_choices_are_decided_for_the_first(loaded: Any, tmp_path: Path) -> None:
    same = {"question": "The capital", "choices": ["of", "of"], "answer": 0}
    assert asked(loaded, tmp_path, same, same | {"answer": 1}).measures["acc"].value == 0.5
