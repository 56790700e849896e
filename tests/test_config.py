"""Settings files: what is read, what is refused, and in which words."""

import random
import time
from pathlib import Path
from typing import Literal, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from gpt.config import ConfigError, Count, Duration, Settings, describe, differences, dump, flatten, load


class Tracker(Settings):
    project: str
    tags: tuple[str, ...] = ()


class Model(Settings):
    n_layer: int = Field(6, ge=1, description="blocks")
    n_head: int = Field(4, ge=1, le=64)
    n_kv_head: int | None = Field(None, ge=1)
    mlp: Literal["gelu", "relu", "swiglu"] = "gelu"
    bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        return self


class Train(Settings):
    steps: Count | None = Field(None, ge=1, description="updates")
    time: Duration | None = Field(None, gt=0, description="seconds")
    lr: float = Field(1e-3, gt=0)
    micro_batch: Literal["auto"] | int = "auto"
    compile: Literal["auto"] | bool = "auto"
    betas: tuple[float, float] = (0.9, 0.95)


class Run(Settings):
    name: str = Field("run", description="what it is called")
    seed: int = 1337
    mixture: dict[str, float] | None = None
    inputs: str | tuple[str, ...] | None = None
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)
    tracker: Tracker | None = None


@pytest.fixture
def file(tmp_path, monkeypatch):
    """file(text): a settings file x.yaml in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        path = Path("x.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def mistakes(path: Path | None, *overrides: str, schema: type[Settings] = Run) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(schema, path, overrides)
    return str(caught.value).split("\n")


def test_a_file_sets_what_it_names_and_the_rest_keeps_its_default(file):
    run = load(Run, file("name: small\nmodel: {n_layer: 2}\ntrain:\n  lr: 3e-4\n  betas: [0.8, 0.9]\n"))
    assert run == Run(name="small", model=Model(n_layer=2), train=Train(lr=3e-4, betas=(0.8, 0.9)))


def test_overrides_win_over_the_file_and_the_file_over_defaults(file):
    path = file("name: file\nmodel: {n_layer: 2, n_head: 8}\n")
    defaults = {"name": "default", "seed": 7, "model.n_head": 16, "model.bias": True}
    run = load(Run, path, ["model.n_layer=3", "train.lr=0.1"], defaults)
    assert (run.name, run.seed, run.train.lr) == ("file", 7, 0.1)
    assert run.model == Model(n_layer=3, n_head=8, bias=True)


def test_an_override_can_open_and_close_an_optional_section(file):
    path = file("tracker: {project: a, tags: [b]}\n")
    assert load(Run, path, ["tracker=null"]).tracker is None
    assert load(Run, None, ["tracker.project=a", "tracker.tags=[b, c]"]).tracker == Tracker(
        project="a", tags=("b", "c")
    )
    assert load(Run, path, ["tracker={project: z}"]).tracker == Tracker(project="z"), (
        "given whole, it replaces the whole"
    )


def test_settings_cannot_be_changed_after_loading():
    with pytest.raises(ValidationError, match="frozen"):
        load(Run, None).model.n_layer = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("012", "012"), ("12:30", "12:30"), ("0x10", "0x10"), ("1_000_", "1_000_"), ("2026-01-02", "2026-01-02"),
        ("3e-4", 3e-4), ("1.", 1.0), (".5", 0.5), ("-1E+3", -1000.0), ("3", 3), ("-0", 0), ("16_384", 16384), ("+7", 7),
        ("true", True), ("false", False), ("null", None), ("~", None), ("", None), ("'3'", "3"), ('"null"', "null"),
    ],
)  # fmt: skip
def test_plain_values_are_yaml_1_2s_and_nothing_turns_silently_into_something_else(file, text, value):
    class Any(Settings):
        key: str | int | float | bool | None

    read = load(Any, file(f"key: {text}\n")).key
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "count"),
    [("10B", 10**10), ("0.5M", 500_000), ("16_384", 16_384), ("16k", 16_000), ("1.5T", 15 * 10**11), ("1e9", 10**9),
     ("'7'", 7), ("1000000000000.001k", 1000000000000001), ("3", 3)],
)  # fmt: skip
def test_counts_may_be_written_short(file, text, count):
    assert load(Run, file(f"train: {{steps: {text}}}")).train.steps == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("3m", 180), ("2h", 7200), ("1.5d", 129600), ("45", 45), ("0.5", 0.5)]
)
def test_durations_may_be_written_with_their_unit(file, text, seconds):
    assert load(Run, file(f"train: {{time: {text}}}")).train.time == seconds


def test_every_independent_mistake_is_named_in_one_go_with_its_line(file):
    path = file(
        "name: a\nmodel:\n  n_heads: 3\n  mlp: swigloo\n  n_layer: 0\ntrain: {steps: many, lr: fast,\n  lr: 1}\nmodle: {}\n"
    )
    assert mistakes(path, "train.compile=maybe", "nonsense", "seed=null") == [
        "x.yaml:7: 'train.lr' is set twice",
        "override 'nonsense': expected section.key=value",
        "override 'seed=null': seed: expected int, got null",
        "x.yaml:5: model.n_layer: expected at least 1, got 0",
        "x.yaml:4: model.mlp: 'swigloo' is not one of gelu, relu, swiglu; did you mean 'swiglu'?",
        "x.yaml:3: unknown key 'model.n_heads'; did you mean 'n_head'?",
        "x.yaml:6: train.steps: expected int, got 'many'",
        "override 'train.compile=maybe': train.compile: expected 'auto' or true or false, got 'maybe'",
        "x.yaml:8: unknown key 'modle'; did you mean 'model'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "x.yaml:2: 'seed' is set twice"),
        ("n_layer: 3", "x.yaml:1: unknown key 'n_layer'; did you mean 'model.n_layer'?"),
        ("model.n_layer: 3", "x.yaml:1: unknown key 'model.n_layer'; in a file a section's keys stand below its name"),
        ("banana: 3", "x.yaml:1: unknown key 'banana'"),
        ("model:\n  bias: no", "x.yaml:2: model.bias: expected true or false, got 'no'"),
        ("model: {bias: 1}", "x.yaml:1: model.bias: expected true or false, got 1"),
        ("seed: true", "x.yaml:1: seed: expected int, got true"),
        ("seed: 1.5", "x.yaml:1: seed: expected int, got 1.5"),
        ("seed: 012", "x.yaml:1: seed: expected int, got '012'"),
        ("name: 3", "x.yaml:1: name: expected text, got 3"),
        ("train: {lr: 1e999}", "x.yaml:1: train.lr: expected a finite number, got Infinity"),
        ("train: {lr: true}", "x.yaml:1: train.lr: expected number, got true"),
        ("train: {lr: 0}", "x.yaml:1: train.lr: expected more than 0.0, got 0"),
        ("model: {n_head: 65}", "x.yaml:1: model.n_head: expected at most 64, got 65"),
        ("train: {steps: 0.3k5}", "x.yaml:1: train.steps: expected int, got '0.3k5'"),
        ("train: {steps: 0.0001k}", "x.yaml:1: train.steps: '0.0001k' is not a whole number"),
        ("train: {time: 4 min}", "x.yaml:1: train.time: expected seconds, or a duration such as 90s, 3m, 2h or 1d, got '4 min'"),
        ("train: {micro_batch: many}", "x.yaml:1: train.micro_batch: expected 'auto' or int, got 'many'"),
        ("train: {micro_batch: autos}", "x.yaml:1: train.micro_batch: expected 'auto' or int, got 'autos'; did you mean 'auto'?"),
        ("train: {betas: [0.9]}", "x.yaml:1: train.betas: expected more values, got a list of 1"),
        ("train: {betas: [1, 2, 3]}", "x.yaml:1: train.betas: expected at most 2 values, got a list of 3"),
        ("train: {betas: 0.9}", "x.yaml:1: train.betas: expected a list, got 0.9"),
        ("train:\n  betas:\n  - 0.9\n  - x", "x.yaml:4: train.betas.1: expected number, got 'x'"),
        ("mixture: {data/a: 0.7, data/b: x}", "x.yaml:1: mixture.data/b: expected number, got 'x'"),
        ("mixture: [a]", "x.yaml:1: mixture: expected a section, got a list of 1"),
        ("inputs: [a, 3]", "x.yaml:1: inputs.1: expected text, got 3"),
        ("inputs: {a: 3}", "x.yaml:1: inputs: expected text or a list, got a section"),
        ("model:\n", "x.yaml:1: model: expected a section, got null"),
        ("tracker: {}", "x.yaml:1: 'tracker.project' is missing"),
        ("seed: 1\nmodel:\n  n_head: 12\n  n_kv_head: 5", "x.yaml:2: model: n_head (12) must be a multiple of n_kv_head (5)"),
    ],
)  # fmt: skip
def test_a_mistake_says_where_what_was_got_and_what_was_expected(file, text, message):
    assert mistakes(file(text)) == [message]


def test_a_required_setting_that_nobody_gave_is_named(file):
    class Needs(Settings):
        data: Tracker

    assert mistakes(file("# nothing\ndata: {tags: []}"), schema=Needs) == ["x.yaml:2: 'data.project' is missing"]
    assert mistakes(None, schema=Needs) == ["'data' is missing"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml: the file is empty; expected `key: value` settings"),
        ("# only a comment\n", "x.yaml: the file is empty; expected `key: value` settings"),
        ("- a\n- b\n", "x.yaml:1: expected `key: value` settings"),
        ("\n\njust text\n", "x.yaml:3: expected `key: value` settings"),
        ("model:\n\tn_layer: 3\n", "x.yaml:2: found a tab; indent with spaces"),
        ("model: {n_layer: 3\nseed: 1\n", "x.yaml:2: expected ',' or '}', but got ':'"),
        ("name: a: b\n", "x.yaml:1: mapping values are not allowed here"),
        ("seed: 1\n---\nseed: 2\n", "x.yaml:2: expected a single document in the stream, but found another document"),
        (b"name: \xff\xfe\n", "x.yaml: not UTF-8 text (byte 6)"),
        ("seed: 1\nname: a\x07\n", "x.yaml:2: a control character (U+0007) in the text"),
        ('name: "\\ud800"\n', "x.yaml:1: an escape that is half a character (a surrogate)"),
        ("[" * 3000, "x.yaml: nested too deeply"),
        ("? [a]\n: 3\n", "x.yaml:1: expected a plain key"),
    ],
)
def test_a_file_that_is_no_settings_file_is_refused_in_words(file, text, message):
    assert mistakes(file(text)) == [message]


@pytest.mark.parametrize(
    "text", ["inputs: *.txt", "a: &x 3", "name: *x", "seed: !!int 3", "seed: !!python/object:os.system 3"]
)
def test_aliases_anchors_and_tags_are_refused_in_words(file, text):
    (message,) = mistakes(file(f"# comment\n{text}\n"))
    assert message.startswith("x.yaml:2: '*', '&' and '!' have a meaning") and "quotes" in message


def test_a_merge_key_merges_nothing(file):
    assert mistakes(file("<<: {seed: 3}\n")) == ["x.yaml:1: unknown key '<<'"]


def test_a_missing_file_is_named_with_the_one_that_was_probably_meant(file):
    file("seed: 1\n").rename("quickstart.yaml")
    assert mistakes(Path("quikstart.yaml")) == ["quikstart.yaml: no such file; did you mean 'quickstart.yaml'?"]
    assert mistakes(Path("else/where.yaml")) == ["else/where.yaml: no such file"]
    assert mistakes(Path()) == [". is a directory; name a settings file in it"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'lr'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'train.lr'?"),
        ("train.lr=fast", "train.lr: expected number, got 'fast'"),
        ("train.lr", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("train.=3", "expected section.key=value"),
        ("seed.x=3", "'seed' is not a section"),
        ("train.betas=[1", "expected ',' or ']', but got '<stream end>'"),
        ("name=\udcff", "not UTF-8 text"),
        ("model.n_kv_head=3", None),
    ],
)
def test_a_mistake_in_an_override_names_the_override(file, override, message):
    (said,) = mistakes(file("seed: 1\n"), override)
    expected = f"override '{override}': {message}"
    assert said == expected if message else "n_head (4) must be a multiple of n_kv_head (3)" in said


def test_windows_files_and_byte_order_marks_are_read(file):
    assert load(Run, file(b"\xef\xbb\xbfseed: 2\r\nname: a\r\n")) == Run(seed=2, name="a")


AWKWARD = [
    "",
    "no",
    "3e-4",
    "012",
    "1_000",
    "null",
    "~",
    "a: b",
    "#x",
    "- x",
    " a ",
    "*x",
    "'",
    '"',
    "\\",
    "\n",
    "\t",
    "é🙂\u2028\x85\x00",
]
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(AWKWARD)
numbers = st.floats(allow_nan=False, allow_infinity=False)
runs = st.builds(
    Run,
    name=texts,
    seed=st.integers(-(10**20), 10**20),
    mixture=st.none() | st.dictionaries(texts, numbers, min_size=1),
    inputs=st.none() | texts | st.lists(texts).map(tuple),
    model=st.builds(
        Model, n_layer=st.integers(1, 10**12), bias=st.booleans(), mlp=st.sampled_from(["gelu", "relu", "swiglu"])
    ),
    train=st.builds(
        Train,
        steps=st.none() | st.integers(1, 10**13),
        time=st.none() | st.floats(0, 1e30, exclude_min=True),
        micro_batch=st.just("auto") | st.integers(),
        compile=st.just("auto") | st.booleans(),
        betas=st.tuples(numbers, numbers),
    ),
    tracker=st.none() | st.builds(Tracker, project=texts, tags=st.lists(texts).map(tuple)),
)


@given(run=runs)
def test_what_is_dumped_is_read_back_equal(run, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(run), encoding="utf-8", newline="")
    assert load(Run, path) == run


def test_a_dump_is_complete_and_pleasant_to_read():
    run = Run(train=Train(steps=10**10, time=240.0), inputs=("a", "no"))
    assert dump(run) == (
        "name: run\nseed: 1337\nmixture: null\ninputs: [a, 'no']\n"
        "model:\n  n_layer: 6\n  n_head: 4\n  n_kv_head: null\n  mlp: gelu\n  bias: false\n"
        "train:\n  steps: 10_000_000_000\n  time: 240.0\n  lr: 0.001\n  micro_batch: auto\n  compile: auto\n  betas: [0.9, 0.95]\n"
        "tracker: null\n"
    )  # fmt: skip


def test_flatten_and_differences_speak_in_dotted_keys():
    a, b = Run(), Run(seed=2, model=Model(n_layer=3), tracker=Tracker(project="p"))
    assert flatten(a)["train.betas"] == [0.9, 0.95] and flatten(b)["tracker.project"] == "p"
    assert differences(a, b) == [
        ("seed", 1337, 2),
        ("model.n_layer", 6, 3),
        ("tracker.project", None, "p"),
        ("tracker.tags", None, []),
    ]
    assert differences(b, b) == []


def test_every_setting_is_described_with_type_default_and_meaning():
    assert describe(Run, "train.")[:4] == [
        ("train.steps", "count or null", "null", "updates"),
        ("train.time", "duration or null", "null", "seconds"),
        ("train.lr", "number", "0.001", ""),
        ("train.micro_batch", "auto or int", "auto", ""),
    ]
    rows = {key: (kind, default, meaning) for key, kind, default, meaning in describe(Run)}
    assert rows["model.n_layer"] == ("int", "6", "blocks")
    assert rows["model.mlp"][0] == "gelu or relu or swiglu"
    assert rows["tracker"] == ("section or null", "null", "")
    assert rows["tracker.project"] == ("text", "required", "")
    assert "model" not in rows, "a section that is always there is its settings"


def test_mutilated_files_end_in_one_clear_error_or_load_quickly(file):
    """2000 mutants of a good file: ConfigError or settings, never anything else, never slowly."""
    good = dump(Run(inputs=("a", "b"), tracker=Tracker(project="p"))).encode() + b'# 16_384 10B 3m *x !y &z "q" |\n'
    draw = random.Random(0)
    for _ in range(2000):
        mutant = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            where, alphabet = draw.randrange(len(mutant)), b"\t\n :,-[]{}#&*!|>'\"%@`0_e.\xff\x00\xc3"
            mutant[where : where + draw.randint(0, 3)] = bytes(draw.choices(alphabet, k=draw.randint(0, 3)))
        path, began = file(bytes(mutant)), time.thread_time()
        try:
            load(Run, path)
        except ConfigError as error:
            assert "x.yaml" in str(error) and "\x00" not in str(error)
        assert time.thread_time() - began < 10


@pytest.mark.parametrize(
    "text", ["1" * 100_000, "1_" * 50_000, "0." + "3" * 100_000, "9" * 5000 + "k", "1e" + "9" * 5000]
)
def test_numbers_of_any_length_are_refused_or_read_quickly(file, text):
    began = time.thread_time()
    (message,) = mistakes(file(f"train: {{steps: {text}}}"))
    assert message.startswith("x.yaml:1: train.steps: expected int, got") and len(message) < 200
    assert time.thread_time() - began < 10
