"""The house stands as docs/design.md draws it: floors, what each room may know, and what no file may be able to do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path for path in (ROOT / "gpt").glob("*.py") if path.stem != "__init__")
VERBS = [path for path in (ROOT / "train.py", ROOT / "sample.py", ROOT / "data" / "prepare.py") if path.exists()]
# Rooms and verbs: their main imports late.
ROOM_VERBS = [ROOT / "gpt" / f"{name}.py" for name in ("look", "hf", "lora", "evaluate", "harness")]
COMMANDS = [*VERBS, *ROOM_VERBS]
FIRST = {  # what a room's verb is told before a path and flags
    "look": ["data"],
    "hf": ["compare", "y"],
    "lora": ["merge", "y"],
    "evaluate": [],
    "harness": ["--tasks", "y"],
}
SOURCES = sorted({*ROOMS, *ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")})
DRAWING = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
Function = ast.FunctionDef | ast.AsyncFunctionDef
# What may be absent is imported where it is used.
OPTIONAL = {
    "log": {"wandb"},
    "formats": {"pyarrow"},
    "encode": {"gigatoken"},
    "optim": {"torchao"},
    "quantize": {"torchao"},
    "harness": {"lm_eval"},
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name)


def imported(node: ast.AST) -> list[str]:
    """Modules that an import statement names; `from gpt import x` is gpt.x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        if node.module == "gpt":
            return [f"gpt.{alias.name}" for alias in node.names]
        return [node.module or ""]
    return []


def rooms_of(node: ast.AST) -> list[str]:
    """Rooms that anything in `node` imports."""
    modules = [module for inner in ast.walk(node) for module in imported(inner)]
    return [module.split(".")[1] for module in modules if module.startswith("gpt.")]


def functions(node: ast.AST) -> Iterator[Function]:
    return (inner for inner in ast.walk(node) if isinstance(inner, Function))


def dotted(node: ast.AST) -> str:
    """`torch.nn.Linear` of a chain of attributes; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def drawn() -> dict[str, tuple[int, set[str]]]:
    """Room -> (floor, the rooms its arrow points at), as docs/design.md draws them."""
    rooms, floor = {}, -1
    for line in DRAWING.splitlines():
        if match := re.match(r" {6}floor (\d)", line):
            floor = int(match[1])
        elif floor >= 0 and (match := re.match(r" {8}(\w+)\.py .*?(?:<- ([\w, ]+))?$", line)):
            rooms[match[1]] = floor, set(re.findall(r"\w+", match[2] or ""))
    return rooms


def test_the_drawing_has_every_room():
    missing = {path.stem for path in ROOMS} - drawn().keys()
    assert not missing, "put it on its floor in docs/design.md"


@each(ROOMS)
def test_a_room_imports_from_floors_below_or_along_its_arrow_only(path):
    rooms = drawn()
    floor, arrow = rooms[path.stem]
    allowed = {room for room, (below, _) in rooms.items() if below < floor} | arrow | {"config"}
    allowed |= {path.stem} if path in COMMANDS else set()  # a verb runs before the rest of its own room is loaded
    assert set(rooms_of(tree(path))) <= allowed


def test_no_arrow_points_up_or_in_a_circle():
    order = list(drawn())
    for room, (floor, arrow) in drawn().items():
        assert all(drawn()[to][0] < floor or order.index(to) < order.index(room) for to in arrow), room


def test_config_is_below_every_room():
    assert rooms_of(tree(ROOT / "gpt" / "config.py")) == []


@each(ROOMS)
def test_imports_stand_at_the_top(path):
    for function in functions(tree(path)):
        if path in COMMANDS and function.name == "main":
            continue
        local = [module for node in ast.walk(function) for module in imported(node)]
        packages = {module.split(".")[0] for module in local}
        assert packages <= OPTIONAL.get(path.stem, set()), f"{function.name} imports {local}"


@pytest.mark.parametrize("room", ["signals", "durable"])
def test_what_must_work_first_and_last_stands_on_the_standard_library_alone(room):
    path = ROOT / "gpt" / f"{room}.py"
    modules = {module.split(".")[0] for node in ast.walk(tree(path)) for module in imported(node)}
    assert modules <= sys.stdlib_module_names


def test_the_model_knows_tensors_and_its_config():
    model = tree(ROOT / "gpt" / "model.py")
    assert set(rooms_of(model)) <= {"attention", "cache", "config", "positions"}
    modules = {module for node in ast.walk(model) for module in imported(node)}
    assert not modules & {"os", "pathlib", "torch.distributed", "rich", "safetensors"}


@each(ROOMS)
def test_only_parallel_knows_that_there_are_others(path):
    known = {dotted(node) for node in ast.walk(tree(path))} | {m for n in ast.walk(tree(path)) for m in imported(n)}
    distribution = ("torch.compile", "torch.distributed", "torch.nn.parallel", "torch.utils.checkpoint")
    if path.stem not in ("parallel", "runtime"):
        assert not [what for what in known if what.startswith(distribution)]


@each(ROOMS)
def test_rooms_do_not_print(path):
    """The log and the console passed in do; the one exception is the last word of signals.run on stderr."""
    speakers = [function for function in functions(tree(path)) if (path.stem, function.name) == ("signals", "run")]
    allowed = {id(node) for function in speakers for node in ast.walk(function)}
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and dotted(node.func) == "print"]
    assert [call.lineno for call in calls if id(call) not in allowed] == []


@each(SOURCES)
def test_only_runtime_reads_the_environment(path):
    if path.stem in ("runtime", "signals"):  # signals sets one variable, before any library can read it
        return
    named = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    named |= {alias.name for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not named & {"environ", "environb", "getenv", "getenvb"}


@each(SOURCES)
def test_functions_fit_on_two_screens(path):
    long = {f.name: n for f in functions(tree(path)) if (n := (f.end_lineno or 0) - f.lineno + 1) > 80}
    assert not long


@each(SOURCES)
def test_a_module_opens_with_what_it_is_for(path):
    assert ast.get_docstring(tree(path))


@each(ROOMS)
def test_a_room_has_its_tests(path):
    assert (ROOT / "tests" / f"test_{path.stem}.py").exists()


# Settings


def settings_classes() -> dict[str, ast.ClassDef]:
    """Every class under Settings by name."""
    classes = {node.name: node for path in SOURCES for node in tree(path).body if isinstance(node, ast.ClassDef)}
    found = {"Settings": classes["Settings"]}
    while new := {n: c for n, c in classes.items() if n not in found and {dotted(b) for b in c.bases} & found.keys()}:
        found |= new
    return found


def fields(node: ast.ClassDef) -> list[str]:
    return [
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]


def checks(function: Function) -> bool:
    """Whether it is a validator of settings, which reads them for nobody."""
    return any("validator" in ast.unparse(decorator) for decorator in function.decorator_list)


def reads(node: ast.AST) -> set[str]:
    """Attributes read in `node`, validators aside; text names them too, as in getattr(choices, name)."""
    if isinstance(node, Function) and checks(node):
        return set()
    found = {node.attr} if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else set()
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found = {node.value}
    return found.union(*(reads(child) for child in ast.iter_child_nodes(node)))


def test_every_setting_is_read_somewhere():
    read = set().union(*(reads(tree(path)) for path in SOURCES))
    unread = {
        f"{owner}.{field}" for owner, node in settings_classes().items() for field in fields(node) if field not in read
    }
    assert not unread


def test_every_setting_says_what_it_means():
    silent = []
    for owner, node in settings_classes().items():
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and "description=" not in ast.unparse(item):
                silent.append(f"{owner}.{ast.unparse(item.target)}")
    assert not silent


# No file from outside can run code


FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "imp",
    "runpy",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile()", "__import__", "torch.load", "torch.save", "os.popen"} | {
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "torch.hub.load", "os.system",
    "importlib.import_module", "numpy.load", "np.load",
}  # fmt: skip


def dangers(module: ast.Module) -> list[str]:
    """What could run code from a file, with its line."""
    found = []
    for node in ast.walk(module):
        names = [modules.split(".")[0] for modules in imported(node)]
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.append(dotted(node))
        if isinstance(node, ast.Call):  # a variable may be called compile, the builtin may not be called
            names.append(f"{dotted(node.func)}()")
        if isinstance(node, ast.keyword):
            names.append(f"{node.arg}={ast.unparse(node.value)}")
            names.append(f"{node.arg}=")
        hits = [n for n in names if n in FORBIDDEN_MODULES | FORBIDDEN_CALLS]
        hits += [
            n for n in names if n in ("shell=True", "allow_pickle=True", "weights_only=False", "trust_remote_code=")
        ]
        found += [f"line {getattr(node, 'lineno', 0)}: {hit}" for hit in hits]
    return found


@each(SOURCES)
def test_no_file_from_outside_can_run_code(path):
    assert dangers(tree(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "import shelve", "from dill import load",
        "eval('1')", "exec(text)", "compile(text, 'x', 'exec')", "f = eval", "torch.load(path)", "torch.save(x, path)",
        "from torch import load", "subprocess.run(c, shell=True)", "os.system('ls')", "from os import system", "os.popen('ls')",
        "AutoModel.from_pretrained(p, trust_remote_code=flag)", "yaml.load(text, L)", "from yaml import load",
        "np.load(p, allow_pickle=True)", "__import__('os')",
    ],
)  # fmt: skip
def test_the_gate_sees_what_it_must_refuse(source):
    assert dangers(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('x')",
        "torch.compile(f)",
        "f(compile=compile)",
        "config.load(S, p)",
        "yaml.compose(t)",
    ],
)
def test_the_gate_lets_ordinary_code_pass(source):
    assert not dangers(ast.parse(source))


# Commands


@each(COMMANDS)
def test_a_command_imports_nothing_heavy_at_its_top(path):
    before = takewhile(lambda node: not isinstance(node, ast.If), tree(path).body)  # `if __name__ == "__main__"`
    modules = [m for node in before if isinstance(node, ast.Import | ast.ImportFrom) for m in imported(node)]
    assert {m for m in modules if m.split(".")[0] not in sys.stdlib_module_names} == {"gpt.signals"}


@each(COMMANDS)
@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["x", "--no-such-flag"], 2)])
def test_help_and_bad_flags_answer_before_torch_is_imported(path, flags, code):
    command = [str(path)] if path in VERBS else ["-m", f"gpt.{path.stem}", *FIRST[path.stem]]
    run = [sys.executable, "-X", "importtime", *command, *flags]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert result.returncode == code
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "gpt.signals" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "tokenizers", "wandb", "rich"}
    assert ("usage:" in result.stdout) == (code == 0)
    assert code == 0 or "--no-such-flag" in result.stderr.rsplit("error:")[-1]
