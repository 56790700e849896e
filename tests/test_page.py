"""The page: what stands on it is shown and never obeyed, in HTML as on a terminal."""

import base64
import hashlib
import io
import json
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gpt.page import Bars, Heading, Note, Row, Script, Segment, Stage, Table, Token, draw, html, printable, quoted

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b]0;title\x07",
    "[bold red]markup[/] :smile:",
    "\u202egnirts\u2066",
    "שלום עולם",
    "a\x00b\x7f\x9bc\r\n\t",
    "\"' onmouseover='x",
    "&amp; &#60;",
    "\ufffe\ue000\U000e0041",
]
EVERYWHERE = [
    block
    for text in HOSTILE
    for block in (
        Heading(text),
        Note(text),
        Table((text, "n"), [(text, "1")]),
        Bars(text, [(text, 3)]),
        Row(text, [Segment(text, [Token(text, 7), Token(text, 8, learned=False), Token(text, 9, role="control")])]),
    )
]


class Reader(HTMLParser):
    """Elements with their attributes and text, in order; void elements hold none."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.open: list[int] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), ""))
        if tag not in ("meta", "img"):
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for at in self.open:
            tag, attributes, text = self.elements[at]
            self.elements[at] = tag, attributes, text + data

    def texts(self, tag: str, **attributes: str) -> list[str]:
        wanted = attributes.items()
        return [text for name, has, text in self.elements if name == tag and wanted <= has.items()]


def page(*blocks, title="a page") -> str:
    return b"".join(html(title, blocks)).decode()


def drawn(*blocks, **console) -> str:
    out = io.StringIO()
    screen = Console(file=out, width=100, **console)
    for block in blocks:
        draw(block, screen)
    return out.getvalue()


def obeyed(text: str) -> list[str]:
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn", "Cs") and c != "\n"]


def test_hostile_text_is_text_in_html():
    read = Reader(page(*EVERYWHERE, title=HOSTILE[0]))
    assert not read.open
    assert {tag for tag, _, _ in read.elements} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr", "th", "td", "div",
        "section", "small", "span",
    }  # fmt: skip
    assert {name for _, has, _ in read.elements for name in has} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "title", "style",
    }  # fmt: skip
    assert read.texts("h2") == [printable(text) for text in HOSTILE]
    assert [has["title"] for tag, has, _ in read.elements if tag == "span"][:3] == [
        f"position {i}, id {7 + i}" for i in range(3)
    ]
    assert not obeyed(page(*EVERYWHERE))


def test_a_page_needs_nothing_else():
    text = page(*EVERYWHERE)
    read = Reader(text)
    policy = [has["content"] for tag, has, _ in read.elements if has.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not [
        has for tag, has, _ in read.elements if tag in ("script", "link", "img") or {"src", "href"} & has.keys()
    ]
    style = read.texts("style")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


@pytest.mark.parametrize(
    "console", [{}, {"force_terminal": True, "color_system": "truecolor"}], ids=["plain", "colours"]
)
def test_hostile_text_is_text_on_a_terminal(console):
    text = drawn(*EVERYWHERE, **console)
    for _ in range(len(text)):  # the colours we asked for ourselves
        before, escape, rest = text.partition("\x1b[")
        if not escape:
            break
        codes, end, rest = rest.partition("m")
        assert end and set(codes) <= set("0123456789;")
        text = before + rest
    assert not obeyed(text)
    assert "[bold red]markup[/] :smile:" in text


@given(st.text())
def test_printable_text_is_left_alone_and_the_rest_shown(text):
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown
    assert text.isprintable() == (shown == text)


def test_characters_without_a_glyph_are_shown_by_their_numbers():
    assert printable("a\x1b\u202e\U000e0041\n\t\r") == r"a\x1b\u202e\U000e0041↵→←"
    assert printable("a\nb", lines=True) == "a↵\nb"
    assert quoted(" the\n") == '" the↵"'


def test_tables_and_bars_keep_their_numbers():
    blocks = (
        Table(("token", "count"), [('" the"', "1,234"), ('"a"', "5")]),
        Bars("tokens", [("1", 3), ("2-3", 1_000), ("4", 0)]),
    )
    read = Reader(page(*blocks))
    assert read.texts("td") == ['" the"', "1,234", '"a"', "5", "1", "3", "", "2-3", "1,000", "", "4", "0", ""]
    widths = [has["style"] for tag, has, _ in read.elements if tag == "div"]
    assert widths == ["width:0.30%", "width:100.00%", "width:0.00%"]
    lines = drawn(*blocks).splitlines()
    assert [line.split() for line in lines[1:3]] == [['"', 'the"', "1,234"], ['"a"', "5"]]
    assert [line.count("█") for line in lines[-4:-1]] == [1, 40, 0]
    assert all(number in lines[i] for i, number in ((-4, "3"), (-3, "1,000")))


def test_a_page_with_a_program_runs_that_one_and_what_it_draws_from_is_no_markup():
    code = "document.getElementById('data').textContent < '2'"
    data = {"texts": [*HOSTILE, "</script>", "<!--<script>", "\u2028"], "n": 1.5}
    text = page(Stage("heads"), Script(code, ".stage { color: red; }", data))
    read = Reader(text)
    policy = [has["content"] for _, has, _ in read.elements if has.get("http-equiv") == "Content-Security-Policy"]
    known = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{known}'; base-uri 'none'; form-action 'none'"
    ]
    stored, program = read.texts("script")
    assert json.loads(stored) == data and not set("<>&") & set(stored) and stored.isascii()
    assert program == code and read.texts("div", id="heads") == [""] and ".stage { color: red; }" in text
    assert not drawn(Stage("heads"), Script(code, "", data))


def test_long_tables_scroll_and_last_columns_may_hold_words():
    table = Table(("token", "count", "others"), [("a", "1", "b c")] * 30, words=1, tail=1)
    text = page(table, Table(("token", "count"), [("a", "1")]))
    assert text.count('<table class="long">') == text.count("<table>") == 1
    assert Reader(text).texts("td", **{"class": "n"}) == ["1"] * 31
    assert drawn(table).splitlines()[1].split() == ["a", "1", "b", "c"]


PADDING = Token("9 x padding", None, False, "padding")
ROW = Row(
    "row 0",
    [
        Segment("first", [Token("<end>", 0, learned=False, role="control"), Token("a\n", 1), Token("b", 2)]),
        Segment("second", [Token("c", 3, learned=False), Token("d", 4, learned=False), PADDING]),
    ],
)  # fmt: skip


def test_a_row_shows_its_cuts_and_marks_in_html():
    read = Reader(page(ROW))
    spans = [(has["class"], has.get("title"), text) for tag, has, text in read.elements if tag == "span"]
    assert spans == [
        ("t0 control off", "position 0, id 0", "<end>"),
        ("t1", "position 1, id 1", "a↵\n"),
        ("t0", "position 2, id 2", "b"),
        ("t0 off", "position 3, id 3", "c"),
        ("t1 off", "position 4, id 4", "d"),
        ("t0 padding off", None, "9 x padding"),
    ]
    assert read.texts("small") == ["first", "second"]


def test_a_row_shows_its_cuts_and_marks_in_colours_or_in_characters():
    plain = drawn(ROW)
    assert "⟨«<end>»⟩|a↵" in plain and "|b" in plain and "⟨c|d|9 x padding⟩" in plain
    assert "\x1b" not in plain
    terminal = {"force_terminal": True, "color_system": "standard"}
    assert "\x1b[30;46m" in drawn(ROW, **terminal)
    assert "⟨«<end>»⟩|a↵" in drawn(ROW, no_color=True, **terminal)


def test_a_page_of_long_rows_stays_small():
    row = Row("row", [Segment("document", [Token(f"word{i}", i) for i in range(1000)])])
    assert len(page(row)) < 100_000
