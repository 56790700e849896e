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
ROOM_VERBS = [ROOT / "gpt" / f"{name}.py" for name in ("look", "hf", "lora", "evaluate", "harness", "checkpoint")]
COMMANDS = [*VERBS, *ROOM_VERBS]
FIRST = {  # what a room's verb is told before a path and flags
    "look": ["data"],
    "hf": ["compare", "y"],
    "lora": ["merge", "y"],
    "evaluate": [],
    "harness": ["--tasks", "y"],
    "checkpoint": ["verify"],
}
SOURCES = sorted({*ROOMS, *ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")})
DRAWING = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
Function = ast.FunctionDef | ast.AsyncFunctionDef
# What may be absent, and what takes longer to import than a run that does not need it should wait, is imported where it is used.
OPTIONAL = {
    "parallel": {"torch"},
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
def test_only_rooms_of_ranks_know_that_there_are_others(path):
    known = {dotted(node) for node in ast.walk(tree(path))} | {m for n in ast.walk(tree(path)) for m in imported(n)}
    distribution = ("torch.compile", "torch.distributed", "torch.nn.parallel", "torch.utils.checkpoint")
    if path.stem not in ("parallel", "parts", "ranks", "runtime", "team"):
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
    # formats that hold code
    *("pickle", "cPickle", "_pickle", "pickletools", "copyreg", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm"),
    # ways to run or load it
    *("imp", "runpy", "code", "codeop", "ctypes", "_ctypes", "cffi", "pty", "pdb", "subprocess", "webbrowser", "xmlrpc"),
    *("pkgutil", "zipimport", "importlib.util", "importlib.machinery", "importlib.abc", "multiprocessing.connection"),
    *("torch.package", "torch.hub", "torch.jit", "torch.serialization", "torch.utils.cpp_extension", "torch.storage"),
    *("torch.distributed.checkpoint", "torch.distributed.rpc", "torch.utils.model_zoo", "numpy.ctypeslib", "jinja2.nativetypes"),
    # a file that becomes shorter ends the process
    *("mmap",),
}  # fmt: skip
FORBIDDEN = {
    *("eval", "exec", "compile()", "execfile", "__import__", "globals()", "breakpoint()", "__builtins__"),
    *("torch.load", "torch.save", "torch.compiler.load_cache_artifacts", "importlib.import_module", "importlib.reload"),
    *("numpy.load", "np.load", "numpy.memmap", "np.memmap", "numpy.save", "np.save", "numpy.savez", "np.savez", "numpy.DataSource"),
    *("os.system", "os.popen", "os.fork", "os.forkpty", "os.startfile", "os.posix_spawn", "os.posix_spawnp", "sys.settrace"),
    *(f"os.{kind}{how}" for kind in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")),
    *(f"yaml.{name}" for name in ("Loader", "CLoader", "FullLoader", "UnsafeLoader", "YAMLObject", "add_constructor")),
    *("jinja2.Environment()", "Environment()", "jinja2.Template()", "NativeEnvironment", "SandboxedEnvironment()"),
    *("tempfile.mktemp", "shutil.unpack_archive", "datasets.load_dataset", "pyarrow.deserialize", "pandas.read_pickle"),
}  # fmt: skip
# By whatever name their owner goes.
FORBIDDEN_ANYWHERE = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"),
    *("recv_object_list", "rpc_sync", "rpc_async", "remote_device", "extractall", "read_pickle", "to_pickle", "unpack_archive"),
    *("load_module", "exec_module", "spec_from_file_location", "find_class", "Unpickler", "Pickler", "register_extension_type"),
    *("__globals__", "__subclasses__", "__reduce__", "__reduce_ex__", "__setstate__", "__builtins__", "allow_extension_types"),
    *("get_class_from_dynamic_module", "load_cache_artifacts", "add_safe_globals", "memory_map", "import_module"),
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle", "weights_only", "pickle_module", "unsafe_load"}
REFUSED_VALUES = {"shell=True", "mmap=True", "use_pickle=True", "local_dir_use_symlinks=True"}


def dangers(module: ast.Module) -> list[str]:
    """What could run code from a file, with its line; a name under which something is imported counts as what it is."""
    found = []
    real: dict[str, str] = {}  # `from os import system as s`, `import numpy as n`
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            real |= {alias.asname or alias.name: prefix + alias.name for alias in node.names if alias.asname or prefix}
    for node in ast.walk(module):
        whole: list[str] = []  # by full names
        parts: list[str] = []  # by what stands behind the last dot
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = imported(node)
            if isinstance(node, ast.ImportFrom):
                modules = [*modules, *(f"{node.module}.{alias.name}" for alias in node.names)]
            split = [name.split(".") for name in modules]
            whole = [".".join(names[:end]) for names in split for end in range(1, len(names) + 1)]
            parts = [names[-1] for names in split]
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, dot, rest = dotted(node).partition(".")
            name = real.get(first, first) + dot + rest
            whole = [name] if name not in FORBIDDEN_MODULES or dot else []  # a variable may be called code
            parts = [node.attr if isinstance(node, ast.Attribute) else node.id]
        elif isinstance(node, ast.Call):  # a variable may be called compile, the builtin may not be called
            whole = [f"{dotted(node.func)}()"]
            text = node.args[1] if len(node.args) > 1 else None
            if whole == ["getattr()"] and isinstance(text, ast.Constant) and isinstance(text.value, str):
                whole, parts = [f"{dotted(node.args[0])}.{text.value}"], [text.value]
        elif isinstance(node, ast.keyword):
            whole = [f"{node.arg}={ast.unparse(node.value)}"]
            parts = [f"{node.arg}="]
        hits = [name for name in whole if name in FORBIDDEN_MODULES | FORBIDDEN | REFUSED_VALUES]
        hits += [name for name in parts if name in FORBIDDEN_ANYWHERE or name.removesuffix("=") in FORBIDDEN_ARGUMENTS]
        found += [f"line {getattr(node, 'lineno', 0)}: {hit}" for hit in dict.fromkeys(hits)]
    return found


def unsafe_yaml(module: ast.Module) -> list[str]:
    """Loaders of YAML that are no SafeLoader: those named, and those that a class here is made of."""
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    loaders = {
        node.name
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef) and any(dotted(base) in safe for base in node.bases)
    }
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call) and dotted(node.func).startswith("yaml.")]
    given = [(call, word.value) for call in calls for word in call.keywords if word.arg == "Loader"]
    readers = ("compose", "compose_all", "parse", "scan")
    bare = [c for c in calls if dotted(c.func)[5:] in readers and not any(w.arg == "Loader" for w in c.keywords)]
    return [f"line {call.lineno}: {dotted(value)}" for call, value in given if dotted(value) not in safe | loaders] + [
        f"line {call.lineno}: {dotted(call.func)} without a loader" for call in bare
    ]


@each(SOURCES)
def test_no_file_from_outside_can_run_code(path):
    found = dangers(tree(path))
    if path == ROOT / "gpt" / "runtime.py":  # tells the process's own allocator what to keep; None is no file
        native = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Name) and node.id == "ctypes"]
        assert len(native) == 1 and ast.unparse(tree(path)).count("ctypes.CDLL(None)") == 1
        found = [each for each in found if not each.endswith(": ctypes")]
    assert found == [] and unsafe_yaml(tree(path)) == []


REFUSED = [
    "import pickle",
    "from pickle import loads",
    "import marshal as m",
    "import shelve",
    "from dill import load",
    "import ctypes",
    "eval('1')",
    "exec(text)",
    "compile(text, 'x', 'exec')",
    "f = eval",
    "torch.load(path)",
    "torch.save(x, path)",
    "from torch import load",
    "subprocess.run(c, shell=True)",
    "os.system('ls')",
    "from os import system",
    "os.popen('ls')",
    "AutoModel.from_pretrained(p, trust_remote_code=flag)",
    "yaml.load(text, L)",
    "from yaml import load",
    "np.load(p, allow_pickle=True)",
    "__import__('os')",
    "import subprocess",
    "from subprocess import run",
    "import runpy",
    "import numpy as n; n.load(p)",
    "from numpy import load",
    "from numpy import load as read; read(p)",
    "import torch as t; t.load(p)",
    "from os import system as s; s('ls')",
    "import os as o; o.popen('ls')",
    "os.execvp('ls', [])",
    "os.spawnl(0, 'ls')",
    "os.fork()",
    "dist.all_gather_object(a, b)",
    "torch.distributed.broadcast_object_list(x)",
    "from torch.distributed import gather_object",
    "import torch.distributed.checkpoint as dcp",
    "from torch.distributed import checkpoint",
    "dist.scatter_object_list(a, b)",
    "from torch.distributed.checkpoint import load",
    "import torch.package",
    "from torch import hub",
    "torch.jit.load(p)",
    "from torch import jit",
    "from torch.utils import cpp_extension",
    "importlib.import_module(name)",
    "import importlib.util",
    "from importlib import import_module",
    "module.import_module(x)",
    "importlib.reload(m)",
    "x.exec_module(m)",
    "import pkgutil",
    "yaml.unsafe_load(t)",
    "yaml.full_load(t)",
    "yaml.load_all(t)",
    "L = yaml.UnsafeLoader",
    "class L(yaml.FullLoader): pass",
    "yaml.add_constructor('!x', f)",
    "np.memmap(p)",
    "import mmap",
    "np.save(p, x)",
    "f(allow_pickle=False)",
    "f(weights_only=False)",
    "torch.load(p, weights_only=True)",
    "getattr(os, 'system')",
    "getattr(x, '__globals__')",
    "x.__globals__",
    "x.__subclasses__()",
    "class X:\n    y = object.__reduce__",
    "tar.extractall(p)",
    "shutil.unpack_archive(a)",
    "pd.read_pickle(p)",
    "tempfile.mktemp()",
    "jinja2.Environment()",
    "Environment()",
    "jinja2.Template(t)",
    "from jinja2.nativetypes import NativeEnvironment",
    "globals()['x']",
    "import code",
    "from code import interact",
    "import pty",
    "breakpoint()",
    "__builtins__['eval']",
    "import zipimport",
    "import joblib",
    "torch.serialization.add_safe_globals([X])",
    "pickle.Unpickler(f)",
    "import cloudpickle as c",
    "pa.register_extension_type(x)",
]


@pytest.mark.parametrize("source", REFUSED)
def test_the_gate_sees_what_it_must_refuse(source):
    assert dangers(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["yaml.compose(t)", "yaml.compose(t, Loader=L)", "yaml.parse(t, Loader=yaml.Loader)", "yaml.scan(t)"]
)
def test_the_gate_sees_yaml_that_is_read_without_a_safe_loader(source):
    assert unsafe_yaml(ast.parse(source))


def test_the_gate_lets_a_safe_loader_pass():
    assert not unsafe_yaml(ast.parse("class L(yaml.SafeLoader): pass\nyaml.compose(t, Loader=L)"))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('x')",
        "torch.compile(f)",
        "f(compile=compile)",
        "config.load(S, p)",
        "yaml.compose(t, Loader=L)",
        "import importlib.metadata",
        "archive.extractfile(member)",
        "re.compile(p).sub(a, b)",
        "from torch import distributed",
        "getattr(config, name)",
        "input = 3",
        "code = 1",
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
    assert not loaded & {
        "torch",
        "numpy",
        "pydantic",
        "tokenizers",
        "wandb",
        "rich",
        "yaml",
        "multiprocessing",
        "asyncio",
    }
    assert ("usage:" in result.stdout) == (code == 0)
    assert code == 0 or "--no-such-flag" in result.stderr.rsplit("error:")[-1]
