"""A plugin of pytest: writes a line of JSON for each test, with the faults it tried and whether it survived them all.

    python -m pytest -p counted --counted FILE ...

A test that counts none is itself one fault that was tried.
"""

import json
from pathlib import Path

import faults
import pytest

_before = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--counted", metavar="FILE", type=Path, required=True)


def pytest_runtest_logstart(nodeid: str) -> None:
    global _before
    _before = faults.tried


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    skipped = call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception)
    if (call.when == "call" or call.excinfo is not None) and not skipped:
        line = {"test": item.nodeid, "tried": max(1, faults.tried - _before), "passed": call.excinfo is None}
        with item.config.getoption("--counted").open("a") as file:
            file.write(json.dumps(line) + "\n")
