"""A chat template run harmlessly: Jinja in a sandbox that counts its work, with control tokens that no text can imitate.

In the compiled template every control string that it writes is one character of its own, a mark, which none of the
texts contains. So what is a control token in the rendering comes from the template, whatever the texts hold and however
the template cuts and joins them. It knows neither tokenizers nor ids.
"""

import json
import re
from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2 import Template as Compiled
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

FIRST_MARK, LAST_MARK = 0xF0000, 0xFFFFD  # Unicode's private use: of no meaning to anyone
BUDGET = "the budget"  # the name of a variable that no template can write
BASE_WORK, WORK_PER_CHARACTER = 1_000_000, 100  # steps and characters handled
MAX_SOURCE = 1 << 17  # characters; published ones have some 20,000, and compiling takes 1.5 kB of memory for each

VIEWS = (KeysView, ValuesView, ItemsView)  # which are written with all that their dictionary holds
SIZED = (str, bytes, list, tuple, dict, set, range)
PLAIN = (*SIZED, int, float)
_METHODS = """
    capitalize casefold count endswith find format get index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values
"""
# Methods and filters that look for their arguments in a text: a control string there is a text to be found.
_SEARCHES = """
    count endswith find index lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip
    split startswith strip
"""
_FILTERS = """
    abs batch capitalize count d default dictsort e escape first float format groupby indent int items join last length
    list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string sum title trim
    unique upper
"""
# Tests that look at all of what they are given.
_READS = "!= < <= == > >= divisibleby eq equalto even ge greaterthan gt in le lessthan lower lt ne odd upper"
# Filters that look through all of a list, and those that hand on what is inside of what they are given.
_WHOLE = "join list max min sort sum unique reverse batch slice groupby"
_HANDED = "batch count d default first items last length list map reject rejectattr reverse select selectattr slice"
METHODS, SEARCHES, OFFERED = (frozenset(names.split()) for names in (_METHODS, _SEARCHES, _FILTERS))
READS, WHOLE, HANDED = (frozenset(names.split()) for names in (_READS, _WHOLE, _HANDED))
# Where among the arguments of a filter the name of an attribute stands.
BY_ATTRIBUTE = {"groupby": 0, "join": 1, "map": 9, "max": 1, "min": 1, "rejectattr": 0, "selectattr": 0}
BY_ATTRIBUTE |= {"sort": 2, "sum": 0, "unique": 1}
MAX_PARTS = 16  # of an attribute's name: it is followed for every item
WIDTH = re.compile(r"\d{4,}|\*|\{[^{}]*\{")  # a field of formatted text that is wider than any text needs


class Budget:
    """How much work a rendering may still do."""

    def __init__(self, work: int) -> None:
        self.work = self.left = work

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise SecurityError(
                f"it loops, or its text grows, without end: more than {self.work:,} steps and characters"
            )

    def weigh(self, value: Any) -> int:
        """Spend what it takes to copy `value`, whatever is inside it; how much that was."""
        size = 1
        if isinstance(value, int):
            size += value.bit_length() // 32
        elif isinstance(value, SIZED + VIEWS):
            size += len(value)
        self.spend(size)
        return size

    def measure(self, value: Any) -> int:
        """Spend what it takes to write `value` out, everything inside it included; how much that was."""
        if isinstance(value, Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        size = self.weigh(value)
        if isinstance(value, dict):
            return size + sum(self.measure(part) for pair in value.items() for part in pair)
        if isinstance(value, (list, tuple, set, *VIEWS)):
            return size + sum(map(self.measure, value))
        return size


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]
    return budget


class _Generation(Extension):
    """The tag that says what an assistant wrote: what is in it is rendered, and where it stands is not needed here."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """A namespace without names that Python keeps for itself."""

    def __init__(*args: Any, **names: Any) -> None:
        self, *given = args
        values = dict(*given, **names)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it sets {name!r} in a namespace, and names with a low line first are Python's own")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """A dictionary, made by a function: of the type itself a template could reach the methods that change one."""
    return dict(*args, **kwargs)


def _refuse(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _depth(value: Any) -> int:
    if isinstance(value, list | tuple | dict):
        return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter of this name: JSON as it is, nothing in it escaped for HTML."""
    width = len(indent) if isinstance(indent, str) else indent or 0
    if width > 16:
        raise SecurityError(f"it indents JSON by {str(indent)[:40]}")
    if width:
        budget = _budget(context)
        budget.spend(budget.measure(value) * width * _depth(value))
    if sum(map(len, separators or ())) > 16:
        raise SecurityError("it separates JSON by more than sixteen characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that spends the size of what it is given before, and of what it makes after."""
    passed = getattr(function, "jinja_pass_arg", None)

    @pass_context
    @wraps(function, updated=())
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name in WHOLE and not isinstance(value, str):
            value = list(value)  # so that what is inside is counted
        spend = budget.weigh if name in HANDED else budget.measure
        given = [spend(part) for part in (value, *args, *kwargs.values())]
        named = [kwargs[key] for key in sorted(kwargs, reverse=True)]  # of `replace`: old, new
        _check_growth(budget, name, value, [*args, *named], given)
        _check_reach(name, args, kwargs)
        first = {
            None: (),
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }[passed.name if passed is not None else None]
        made = function(*first, value, *args, **kwargs)
        budget.weigh(made)
        return made

    return counted


def _counted_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test that spends the size of what it looks at."""

    @pass_context
    @wraps(function, updated=())
    def counted(context: Context, value: Any, *args: Any) -> Any:
        for part in (value, *args):
            _budget(context).measure(part)
        return function(value, *args)

    return counted


def _check_reach(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """SecurityError for an argument of a filter that stands for more work than its size."""
    given = [*args, *kwargs.values()]
    widths = [len(width) if isinstance(width, str) else width for width in given if isinstance(width, int | str)]
    if name == "indent" and any(width > 1000 for width in widths):
        raise SecurityError("it indents by more than a thousand spaces")
    if name == "sum" and any(isinstance(start, list | tuple) for start in given):
        raise SecurityError("it sums what is no number")
    if name == "round" and any(isinstance(n, int) and abs(n) > 1000 for n in given):
        raise SecurityError("it rounds to more than a thousand digits")
    attribute = kwargs.get("attribute", next(iter(args[BY_ATTRIBUTE.get(name, 9) :]), None))
    if name in BY_ATTRIBUTE and isinstance(attribute, str) and len(re.split("[.,]", attribute)) > MAX_PARTS:
        raise SecurityError(f"it reaches for an attribute of more than {MAX_PARTS} parts")


def _check_growth(budget: Budget, name: str, value: Any, args: Sequence[Any], sizes: Sequence[int]) -> None:
    """Spend beforehand what a method or filter can write that is longer than all that it is given."""
    if name == "replace" and len(args) > 1:
        budget.spend(str(value).count(str(args[0])) * len(str(args[1])))
    elif name == "join":
        budget.spend(len(value) * max([*sizes[1:], 0]))
    elif name == "format":
        if WIDTH.search(str(value)):
            raise SecurityError("it formats text in fields wider than a thousand characters, or of a width not written")
        budget.spend((str(value).count("%") + str(value).count("{")) * max([*sizes[1:], 1]))
    elif name in ("batch", "slice") and any(isinstance(n, int) and n > 10_000 for n in args):
        raise SecurityError("it deals a list into more than ten thousand parts")
    elif name == "indent":
        budget.spend(1000 * str(value).count("\n") if args else 4 * str(value).count("\n"))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, and every loop, call, operator and output counted."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, roles: Collection[str]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before there is a budget
            finalize=_written,
            extensions=[_Generation, loopcontrols],
            cache_size=0,
        )
        self.filters = {name: _counted(name, FILTERS[name]) for name in OFFERED} | {
            "tojson": _counted("tojson", _tojson)
        }
        tests: Any = TESTS  # which Jinja leaves untyped
        self.tests = {name: _counted_test(test) if name in READS else test for name, test in tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _refuse,
        }
        self.roles = frozenset(roles)
        self.marks: dict[str, str] = {}  # control string -> its character

    # What the compiled template calls

    @pass_context
    def tick(self, context: Context, work: int) -> str:
        """A round of a loop, or a call of a macro, that writes `work` characters of the template's own."""
        _budget(context).spend(work)
        return ""

    @pass_context
    def joined(self, context: Context, *parts: Any) -> str:
        """Jinja's operator `~`."""
        for part in parts:
            _budget(context).measure(part)
        return "".join(map(str, parts))

    @pass_context
    def made(self, context: Context, value: Any) -> Any:
        """A list, tuple or dictionary that the template has written, or a part of one or of a text that it has cut out."""
        _budget(context).weigh(value)
        return value

    @pass_context
    def read(self, context: Context, value: Any) -> Any:
        """What the template compares or looks for, all of it."""
        _budget(context).measure(value)
        return value

    @pass_context
    def with_role(self, context: Context, role: Any, before: str, after: str) -> str:
        """A role between the two halves of what may be a control string."""
        text = f"{before}{role}{after}"
        _budget(context).measure(text)
        return self.marks.get(text, text) if role in self.roles else text

    # What a template can do

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not isinstance(obj, VIEWS) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which templates are not given")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        spend = budget.measure if operator == "%" else budget.weigh
        n_left, n_right = spend(left), spend(right)
        if operator == "*":
            counts = [n for n in (left, right) if isinstance(n, int)]
            if len(counts) == 1 and not isinstance(left, float) and not isinstance(right, float):
                budget.spend(max(counts[0], 0) * max(n_left, n_right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            budget.spend(n_left * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            _check_growth(budget, "format", left, [right], [n_left, n_right])
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        method = getattr(obj, "__wrapped__", obj)  # str.format comes wrapped
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if owner is self:
            return super().call(context, obj, *args, **kwargs)  # one of those above, which count by themselves
        budget.spend(1 + len(args) + len(kwargs))
        if isinstance(owner, PLAIN) and not isinstance(obj, type):
            if name not in METHODS:
                raise SecurityError(f"it calls .{name}() of a value, which templates are not given")
            if name == "join" and args and isinstance(owner, str):
                args = (list(args[0]), *args[1:])
                budget.spend(len(owner) * len(args[0]))
            sizes = [budget.weigh(owner) if isinstance(owner, dict) else budget.measure(owner)]
            sizes += [budget.measure(part) for part in (*args, *kwargs.values())]
            if name != "join":
                _check_growth(budget, name, owner, [*args, *kwargs.values()], sizes)
        elif not isinstance(obj, Macro):  # which counts by itself what it does with them
            for part in (*args, *kwargs.values()):
                budget.measure(part)
        made = super().call(context, obj, *args, **kwargs)
        budget.weigh(made)
        return made


@pass_context
def _written(context: Context, value: Any) -> Any:
    _budget(context).measure(value)
    return value


class _Rewriter(NodeTransformer):
    """Puts marks where the template writes control strings, and counts where it repeats itself."""

    def __init__(self, sandbox: _Sandbox, controls: Collection[str], mark: Callable[[str], str]) -> None:
        self.mark = mark
        longest = sorted(controls, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        # Halves between which a role makes a control string, as in '<|' + message.role + '|>'.
        self.halves: dict[tuple[str, str], list[str]] = {}
        for name in sorted(controls):
            for role in sandbox.roles:
                before, found, after = name.partition(role)
                if found and before and after:
                    self.halves.setdefault((before, after), []).append(name)

    # Control strings

    def _marked(self, text: str) -> str:
        return self.control.sub(lambda found: self.mark(found[0]), text)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return nodes.Const(self._marked(node.value), lineno=node.lineno) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self._marked(node.data), lineno=node.lineno)

    def _compared(self, node: nodes.Node | None) -> Any:
        """What a text is compared with, or looked for in it, stays as it is written."""
        literal = isinstance(node, nodes.Const) or (
            isinstance(node, nodes.List | nodes.Tuple) and all(isinstance(item, nodes.Const) for item in node.items)
        )
        return node if literal or node is None else self.visit(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        short = isinstance(node.expr, nodes.Const)
        node.expr = self._compared(node.expr)
        for operand in node.ops:
            left_is_short, short = short, isinstance(operand.expr, nodes.Const)
            operand.expr = self._compared(operand.expr)
            if operand.op in ("in", "notin"):  # which hashes the one and reads all of the other
                node.expr, operand.expr = self._read(node.expr), _call("read", operand.expr)
            elif not (left_is_short or short):  # else no more is read than the literal has
                operand.expr = _call("read", operand.expr)
        return node

    def _read(self, node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else _call("read", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node, node.arg = self.visit(node.node), self._compared(node.arg)
        if isinstance(node.arg, nodes.Slice):
            return _call("made", node)
        node.arg = self._read(node.arg)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if isinstance(node.node, nodes.Getattr) and node.node.attr in SEARCHES:
            node.node = self.visit(node.node)
            node.args = [self._compared(arg) for arg in node.args]
            return node
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name in SEARCHES and node.node is not None:
            node.node = self.visit(node.node)
            node.args = [self._compared(arg) for arg in node.args]
            return node
        return self.generic_visit(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        node.node, node.args = self._compared(node.node), [self._compared(arg) for arg in node.args]
        return node

    def _join_roles(self, node: nodes.Node) -> None:
        """Make one value of a role and the halves of a control string around it."""
        places = list(_places(node))
        for i in range(1, len(places) - 1):
            (left, right), (owner, key) = (_literal(*places[i - 1]), _literal(*places[i + 1])), places[i]
            value = _at(owner, key)
            if left is None or right is None or isinstance(value, nodes.Const | nodes.TemplateData):
                continue
            for (before, after), names in self.halves.items():
                if left.endswith(before) and right.startswith(after):
                    _write(*places[i - 1], left[: -len(before)])
                    _write(*places[i + 1], right[len(after) :])
                    for name in names:
                        self.mark(name)
                    _put(owner, key, _call("with_role", value, nodes.Const(before), nodes.Const(after)))
                    break

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self._join_roles(node)
        return self.generic_visit(node)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        self._join_roles(node)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self._join_roles(node)
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    # Work

    def _ticking(self, node: Any) -> Any:
        written = sum(len(data.data) for part in node.body for data in _inside(part, nodes.TemplateData))
        self.generic_visit(node)
        tick = nodes.ExprStmt(_call("tick", nodes.Const(1 + written)), lineno=node.lineno)
        node.body.insert(0, tick)
        return node

    visit_Macro = visit_CallBlock = _ticking

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:  # asked of what then is no round
            node.test = nodes.Or(_call("tick", nodes.Const(1)), node.test)
        return self._ticking(node)

    def _measured(self, node: Any) -> Any:
        self.generic_visit(node)
        return _call("made", node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = _measured

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        made = self._measured(node)
        for pair in node.items:
            pair.key = self._read(pair.key)
        return made

    # Files

    def _elsewhere(self, node: nodes.Node) -> NoReturn:
        raise TemplateSyntaxError("it reaches for another template; a chat template is a single text", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_Block = _elsewhere


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _inside(node: nodes.Node, kind: type) -> Iterator[Any]:
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


Key = str | int
Owner = nodes.Node | list[Any]


def _at(owner: Owner, key: Key) -> Any:
    return owner[key] if isinstance(owner, list) and isinstance(key, int) else getattr(owner, str(key))


def _put(owner: Owner, key: Key, value: nodes.Node) -> None:
    if isinstance(owner, list) and isinstance(key, int):
        owner[key] = value
    else:
        setattr(owner, str(key), value)


def _places(node: nodes.Node) -> Iterator[tuple[Owner, Key]]:
    """Where the parts stand that are written one after another: of an output, or of texts that are added."""
    inner: list[tuple[Owner, Key]] = []
    if isinstance(node, nodes.Output | nodes.Concat):
        inner = [(node.nodes, i) for i in range(len(node.nodes))]
    elif isinstance(node, nodes.Add):
        inner = [(node, "left"), (node, "right")]
    for owner, key in inner:
        part = _at(owner, key)
        if isinstance(part, nodes.Add | nodes.Concat):
            yield from _places(part)
        else:
            yield owner, key


def _literal(owner: Owner, key: Key) -> str | None:
    node = _at(owner, key)
    text = node.data if isinstance(node, nodes.TemplateData) else node.value if isinstance(node, nodes.Const) else None
    return text if isinstance(text, str) else None


def _write(owner: Owner, key: Key, text: str) -> None:
    node = _at(owner, key)
    made = nodes.TemplateData(text) if isinstance(node, nodes.TemplateData) else nodes.Const(text)
    _put(owner, key, made.set_lineno(node.lineno))


class Template:
    """A chat template, compiled once.

    `controls` are the control strings that it may write; `names` what it calls some of them by (bos_token, ...). `marks`
    has the character of every control string that it can write, from `first_mark` on. ValueError in words for a source that
    is no template, or reaches for what a template must not have.
    """

    def __init__(
        self,
        source: str,
        controls: Collection[str],
        names: Mapping[str, str],
        roles: Collection[str],
        first_mark: int = FIRST_MARK,
    ) -> None:
        if len(source) > MAX_SOURCE:
            raise ValueError(
                f"the chat template has {len(source):,} characters; the longest read here has {MAX_SOURCE:,}"
            )
        self._sandbox = _Sandbox(roles)
        self.marks = self._sandbox.marks
        free = (chr(code) for code in range(first_mark, LAST_MARK) if chr(code) not in source)

        def mark(name: str) -> str:
            if name not in self.marks:
                self.marks[name] = next(free)
            return self.marks[name]

        self._names = {key: mark(name) if name in controls else name for key, name in names.items()}
        try:
            tree = self._sandbox.parse(source)
            _Rewriter(self._sandbox, controls, mark).visit(tree)
            tree.set_environment(self._sandbox)
            self._compiled = Compiled.from_code(self._sandbox, self._sandbox.compile(tree), self._sandbox.globals)
        except (TemplateError, SyntaxError, RecursionError, ValueError, MemoryError, StopIteration) as error:
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise ValueError(f"the chat template cannot be used{line}: {_said(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        reply: bool,
        now: datetime,
        n_characters: int,
    ) -> str:
        """The text of a conversation whose values have `n_characters` in all, with marks for control tokens; `reply`
        opens the assistant's next message. ValueError in words where the template fails or refuses."""
        variables = {
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": reply,
            "strftime_now": now.strftime,
            BUDGET: Budget(BASE_WORK + WORK_PER_CHARACTER * n_characters),
            **self._names,
        }
        try:
            return self._compiled.render(variables)
        except SecurityError as error:
            raise ValueError(f"the chat template was stopped: {_said(error)}") from None
        except Exception as error:  # a template is a program: it can fail in any way that its functions can
            does = "refuses" if type(error) is TemplateError else "fails on"  # the one is what raise_exception raises
            raise ValueError(f"the chat template {does} this conversation: {_said(error)}") from None


def _said(error: BaseException) -> str:
    """What an error says, at most a line of it."""
    if isinstance(error, RecursionError):
        return "it calls itself, or is nested, without end"
    text = str(error.message if isinstance(error, TemplateError) and error.message else error) or type(error).__name__
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split())[:300])
