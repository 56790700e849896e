"""Hundreds of damaged files of each kind end as they should; and what does not would be seen, and named."""

import os
import signal
import time
from pathlib import Path

import fuzz
import pytest

from gpt.durable import CorruptError

N = 300


@pytest.fixture(scope="module")
def failures() -> dict[str, list[str]]:
    counts = {name: N if name in fuzz.PROMISED else N // 10 for name in fuzz.kinds()}
    return fuzz.attempt(counts)


@pytest.mark.parametrize("name", fuzz.kinds())
def test_a_damaged_file_ends_soon_in_an_error_in_words_or_the_right_load(
    failures: dict[str, list[str]], name: str
) -> None:
    assert failures[name] == []


def test_a_mutant_depends_on_its_number_alone_and_is_never_the_file_itself(tmp_path: Path) -> None:
    for name in fuzz.kinds():
        (tmp_path / name).mkdir()
        prepared = fuzz.Prepared(name, tmp_path / name)
        made = [[prepared.mutant(number) for number in range(60)] for _ in range(2)]
        assert made[0] == made[1] and len(set(made[0])) > 30
        assert [number for number, (file, data) in enumerate(made[0]) if data == prepared.whole[file]] == []


WAYS = {  # what mutant n of a loader gone wrong does, and how that is told
    "error": (lambda: {}["x"], "KeyError: 'x'"),
    "silent": (lambda: None, "damage was not found"),
    "wordless": (lambda: raised(""), "CorruptError without words"),
    "nameless": (lambda: raised("the set is wrong"), "an error that does not name its file"),
    "memory": (lambda: bytearray(1 << 33), "MemoryError"),
    "crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "the process ended (SIGSEGV"),
    "exit": (lambda: os._exit(3), "the process ended (exit 3"),
    "endless": (lambda: [None for _ in iter(time.thread_time, -1.0)], "the process ended (SIGPROF"),
}
PLANT = """
real = Prepared.fault
CPU_S = 2  # to end what is endless


def fault(self, number):
    from test_fuzz import WAYS

    act = list(WAYS.values())[number][0]
    self.kind, self.before = self.kind._replace(load=lambda path: act(), sealed=True), 1
    return real(self, number)


Prepared.fault = fault

"""


def raised(words: str) -> None:
    raise CorruptError(words)


def test_what_ends_badly_is_seen_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, mark, main = Path(fuzz.__file__).read_text().rpartition('if __name__ == "__main__":')
    paths = f"import sys\nsys.path.insert(0, {str(Path(fuzz.__file__).parent)!r})\n"
    planted = tmp_path / "fuzz.py"
    planted.write_text(paths + body + PLANT + mark + main)
    monkeypatch.setattr(fuzz, "__file__", str(planted))
    failures = fuzz.attempt({"manifest": len(WAYS)})["manifest"]
    assert len(failures) == len(WAYS)
    for number, (failure, (_, words)) in enumerate(zip(failures, WAYS.values(), strict=True)):
        assert words in failure and failure.endswith(f"repeat: python tests/fuzz.py manifest 1 --at {number}")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_of_each_end_as_they_should() -> None:
    said: list[str] = []
    rows = fuzz.prove(1, said.append)
    assert [row for row in rows if row.survived < row.tried] == [], said
