"""A page of numbers, bars and coloured tokens, drawn twice: on a terminal, and as one HTML file that needs nothing else.

What stands on it comes from documents and file names, which may hold anything: here, and nowhere else, it is made harmless.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

Role = Literal["text", "control", "padding"]
BAR = 40  # columns of the longest bar on a terminal
LONG = 24  # rows from which a table scrolls in a box of its own


class Token(NamedTuple):
    """A token as it is shown; `learned` unless nothing is learned from predicting it; `id` None for what is no token."""

    text: str
    id: int | None = None
    learned: bool = True
    role: Role = "text"


class Segment(NamedTuple):
    """Tokens of one document, under a label."""

    label: str
    tokens: Sequence[Token]


@dataclass(frozen=True)
class Heading:
    """Opens a section."""

    text: str


@dataclass(frozen=True)
class Note:
    """A sentence, or several lines."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; the columns after the first `words` and before the last `tail` hold numbers and stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    tail: int = 0

    @property
    def numbers(self) -> range:
        return range(self.words, len(self.columns) - self.tail)


@dataclass(frozen=True)
class Bars:
    """Counts drawn as lengths."""

    unit: str
    rows: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Row:
    """A row of a batch: its tokens document by document."""

    label: str
    segments: Sequence[Segment] = field(default=())


@dataclass(frozen=True)
class Stage:
    """Where a page's script draws; nothing on a terminal."""

    name: str


@dataclass(frozen=True)
class Script:
    """The one program of a page, and what it draws from; nothing on a terminal.

    `code` and `style` are ours, `data` may hold anything: it becomes JSON, of which the program makes text and pixels.
    """

    code: str
    style: str
    data: Mapping[str, Any]


Block = Heading | Note | Table | Bars | Row | Stage | Script


def printable(text: str, *, lines: bool = False) -> str:
    """`text` without anything that a terminal or a browser would obey; what was there is shown by its number.

    Controls, marks of direction, characters without a glyph. Line breaks are shown, and with `lines` also made.
    """
    shown = {"\n": "↵\n" if lines else "↵", "\t": "→", "\r": "←"}
    return "".join(char if char.isprintable() else shown.get(char) or _number(char) for char in text)


def _number(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def quoted(text: str) -> str:
    """A short text on one line, its spaces visible between quotes."""
    return f'"{printable(text)}"'


# On a terminal

CUTS = (
    ("black on cyan", "black on bright_cyan"),
    ("black on yellow", "black on bright_yellow"),
)  # by document, by token
UNLEARNED = ("dim", "dim underline")


def draw(block: Block, console: Console) -> None:
    """Print a block; without colours the cuts and marks are written as characters."""
    plain = console.no_color or console.color_system is None
    match block:
        case Heading(text):
            console.print(Text(printable(text), style="bold"))
        case Note(text):
            console.print(Text("\n".join(map(printable, text.split("\n")))), soft_wrap=True)
            console.print()
        case Table():
            console.print(_grid(block))
            console.print()
        case Bars():
            console.print(_bars(block))
            console.print()
        case Row(label, segments):
            console.print(Text(printable(label), style="bold"))
            for i, segment in enumerate(segments):
                console.print(Text(f"  {printable(segment.label)}", style="italic"), soft_wrap=True)
                tokens = Text(_marked(segment.tokens)) if plain else _coloured(segment.tokens, i)
                console.print(Padding(tokens, (0, 0, 0, 4), expand=False))
            console.print()


def _grid(table: Table) -> Grid:
    grid = Grid(box=None, header_style="bold")
    for i, name in enumerate(table.columns):
        grid.add_column(Text(printable(name)), justify="right" if i in table.numbers else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    return grid


def _bars(bars: Bars) -> Grid:
    grid = Grid(box=None, header_style="bold")
    grid.add_column(Text(printable(bars.unit)), justify="right", no_wrap=True)
    grid.add_column("", justify="right", no_wrap=True)
    grid.add_column("", no_wrap=True, overflow="crop")
    most = max((count for _, count in bars.rows), default=0)
    for label, count in bars.rows:
        # What is there at all is seen.
        length = -(-BAR * count // most) if most else 0
        grid.add_row(Text(printable(label)), f"{count:,}", "█" * length)
    return grid


def _coloured(tokens: Sequence[Token], document: int) -> Text:
    text = Text()
    for i, token in enumerate(tokens):
        style = CUTS[document % 2][i % 2] if token.learned else UNLEARNED[i % 2]
        if token.role == "control":
            style = "bold white on magenta" if token.learned else "dim bold magenta"
        elif token.role == "padding":
            style = "dim italic"
        text.append(printable(token.text, lines=True), style)
    return text


def _marked(tokens: Sequence[Token]) -> str:
    """In characters alone: cuts as |, control tokens in «», what is not learned in ⟨⟩."""

    def shown(token: Token) -> str:
        text = printable(token.text, lines=True)
        return f"«{text}»" if token.role == "control" else text

    parts = []
    for learned, run in groupby(tokens, key=lambda token: token.learned):
        joined = "|".join(map(shown, run))
        parts.append(joined if learned else f"⟨{joined}⟩")
    return "|".join(parts)


# As HTML

STYLE = """
:root { color-scheme: light dark; --fg: #1c1c1e; --bg: #fdfdfc; --line: #ccc; --soft: #63636b; --bar: #2f7ea8;
  --a0: #bfe3ec; --a1: #e3f4f8; --b0: #f2dc9b; --b1: #fbf1d2; --c: #7b2d8b; --cfg: #fff; }
@media (prefers-color-scheme: dark) { :root { --fg: #e8e8ea; --bg: #17171a; --line: #44444b; --soft: #a0a0aa;
  --bar: #5fb3dc; --a0: #1d5566; --a1: #123842; --b0: #65501a; --b1: #42350f; --c: #d58be4; --cfg: #17171a; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 76rem;
  margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto; }
th, td { padding: .1rem .9rem .1rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { border-bottom: 1px solid var(--line); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
.long { max-height: 20rem; overflow: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); }
td { white-space: pre-wrap; } .long th { position: sticky; top: 0; background: var(--bg); }
.b { width: 100%; min-width: 12rem; } .b div { background: var(--bar); height: .8rem; min-width: 1px; }
.b .none { min-width: 0; }
.seg { border-left: 3px solid var(--line); margin: .35rem 0; padding-left: .7rem; }
.seg small { color: var(--soft); display: block; overflow-wrap: anywhere; }
.ids { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; direction: ltr; }
.ids span { unicode-bidi: isolate; border-radius: 2px; }
.a .t0 { background: var(--a0); } .a .t1 { background: var(--a1); }
.b_ .t0 { background: var(--b0); } .b_ .t1 { background: var(--b1); }
.ids .control { background: var(--c); color: var(--cfg); font-weight: 600; padding: 0 .25em; }
.ids .padding { background: none; color: var(--soft); font-style: italic; }
.ids .off { background: none; color: var(--soft); opacity: .75; } .ids .off.t1 { text-decoration: underline dotted; }
.ids .control.off { color: var(--c); outline: 1px dashed var(--c); }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # even what slipped through could load and run nothing


def html(title: str, blocks: Iterable[Block]) -> Iterator[bytes]:
    """The page in pieces, UTF-8."""
    blocks = list(blocks)
    scripts = [block for block in blocks if isinstance(block, Script)]
    assert len(scripts) <= 1 and not any("</" in script.code + script.style for script in scripts)
    style = STYLE + "".join(script.style for script in scripts)
    yield (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_policy(scripts))}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{_safe(title)}</h1>\n"
    ).encode()
    for block in blocks:
        yield _element(block).encode()
    yield b"</body>\n</html>\n"


def _safe(text: str, *, lines: bool = False) -> str:
    return escape(printable(text, lines=lines))


def _element(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_safe(text)}</h2>\n"
        case Note(text):
            return "<p>" + "\n".join(map(_safe, text.split("\n"))) + "</p>\n"
        case Table():
            classes = [' class="n"' if i in block.numbers else "" for i in range(len(block.columns))]
            rows = [_cells("th", classes, block.columns), *(_cells("td", classes, row) for row in block.rows)]
            long = ' class="long"' if len(block.rows) > LONG else ""
            return f"<table{long}>\n{''.join(rows)}</table>\n"
        case Bars():
            most = max((count for _, count in block.rows), default=0) or 1
            rows = [f'<tr><th class="n">{_safe(block.unit)}</th><th></th><th></th></tr>\n']
            for label, count in block.rows:
                bar = f'<div{"" if count else " class=none"} style="width:{100 * count / most:.2f}%"></div>'
                number = f'<td class="n">{_safe(label)}</td><td class="n">{count:,}</td>'
                rows.append(f'<tr>{number}<td class="b">{bar}</td></tr>\n')
            return f"<table>\n{''.join(rows)}</table>\n"
        case Row(label, segments):
            return f'<section class="row">\n<h3>{_safe(label)}</h3>\n{"".join(_segments(segments))}</section>\n'
        case Stage(name):
            return f'<div class="stage" id="{_safe(name)}"></div>\n'
        case Script(code, _, data):
            return f'<script type="application/json" id="data">{_json(data)}</script>\n<script>{code}</script>\n'


def _json(data: Mapping[str, Any]) -> str:
    """JSON without a character that could end the element it stands in, or open another."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(scripts: Sequence[Script]) -> str:
    """What a browser may do: with a program, run that one, known by its hash."""
    hashes = [base64.b64encode(hashlib.sha256(script.code.encode()).digest()).decode() for script in scripts]
    return POLICY + "".join(f"; script-src 'sha256-{known}'; base-uri 'none'; form-action 'none'" for known in hashes)


def _cells(tag: str, classes: Sequence[str], cells: Sequence[str]) -> str:
    shown = (f"<{tag}{kind}>{_safe(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
    return f"<tr>{''.join(shown)}</tr>\n"


def _segments(segments: Sequence[Segment]) -> Iterator[str]:
    position = 0
    for number, (label, tokens) in enumerate(segments):
        spans = []
        for i, token in enumerate(tokens):
            kinds = [f"t{i % 2}", *([] if token.role == "text" else [token.role]), *([] if token.learned else ["off"])]
            about = "" if token.id is None else f' title="position {position}, id {token.id}"'
            spans.append(f'<span class="{" ".join(kinds)}"{about}>{_safe(token.text, lines=True)}</span>')
            position += token.id is not None
        colour = ("a", "b_")[number % 2]
        yield f'<div class="seg {colour}"><small>{_safe(label)}</small><div class="ids">{"".join(spans)}</div></div>\n'
