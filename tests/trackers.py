"""The real command with a wandb that fails in each of its calls: it trains what it trains without one."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from proving import Row
from runs import command, differences, ended, prepared, settings, trained

STEPS = 20
CALLS = ("import", "Settings", "init", "log", "finish")
WANDB = """
from pathlib import Path
FAILING = {failing!r}
def fail(name):
    if FAILING == name:
        Path(__file__).with_name("REACHED").touch()
        raise SystemExit(name) if name == "finish" else RuntimeError(name)
fail("import")
class Run:
    id, url, offline, disabled = "1", "", True, False
    def log(self, *args, **kwargs): fail("log")
    def finish(self, *args, **kwargs): fail("finish")
    def define_metric(self, *args, **kwargs): pass
def Settings(*args, **kwargs): fail("Settings")
def init(*args, **kwargs):
    fail("init")
    return Run()
"""


def prove(scale: float, say: Callable[[str], None]) -> list[Row]:
    began, survived = time.monotonic(), 0
    calls = CALLS if scale >= 0.2 else CALLS[3:4]
    with tempfile.TemporaryDirectory() as scratch:
        home = prepared(Path(scratch) / "home")
        (home / "small.yaml").write_text(settings(steps=STEPS))
        golden = trained(home, "golden")
        for failing in calls:
            room = home / f"fails-in-{failing}"
            room.mkdir()
            (room / "wandb.py").write_text(WANDB.format(failing=failing))
            line = command("small.yaml", f"name={failing}", "log.wandb={project: x, mode: offline}")
            done = ended(home, line, PYTHONPATH=str(room))
            wrong = [done.said[-600:]] if done.code else differences(home / "runs" / failing, golden)
            wrong += [] if (room / "REACHED").exists() else ["it was not called"]
            survived += not wrong
            say(f"wandb fails in {failing}: {'; '.join(wrong) or 'no difference'}")
    return [Row("G16", "a wandb that raises in each of its calls", len(calls), survived, time.monotonic() - began)]
