"""Templates as programs: what transformers offers them, what they may not do, and when they are stopped."""

import resource
import sys
import time
from datetime import datetime
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from templates import QWEN3
from transformers.utils.chat_template_utils import render_jinja_template

from gpt.template import FIRST_MARK, Budget, Template

NOW = datetime(2025, 1, 1)
ROLES = ("system", "user", "assistant", "tool")
MESSAGES = [{"role": "user", "content": "hi <b> 床"}, {"role": "assistant", "content": "yo\n", "n": 3}]
TOOLS = [{"name": "f", "parameters": {"b": 1, "a": [True, None, 1.5]}}]
CONTROLS = {"<|a|>", "<|a|>b", "<|user|>", "<|assistant|>"}
A = chr(FIRST_MARK)


def render(source: str, controls: Any = (), *, reply: bool = False, **names: str) -> str:
    template = Template(source, controls, names, ROLES)
    return template.render(MESSAGES, TOOLS, reply=reply, now=NOW, n_characters=100)


def written_out(source: str, controls: Any = CONTROLS, **names: str) -> str:
    """A rendering with the control strings in place of their marks, in angle brackets of another kind."""
    template = Template(source, controls, names, ROLES)
    text = template.render(MESSAGES, TOOLS, reply=False, now=NOW, n_characters=100)
    for name, mark in template.marks.items():
        text = text.replace(mark, f"⟨{name}⟩")
    return text


# What transformers offers


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ tools | tojson(ensure_ascii=true, sort_keys=true) }}",
        "{{ messages[0].content | tojson(separators=(',', ':')) }} {{ tools[0] | string }} {{ tools }}",
        "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.previtem.role }}{% endfor %}",
        "{% for m in messages[::-1] %}{{ m['role'] ~ m.content.strip() ~ 1 ~ none }}{% endfor %}",
        "{% for key, value in tools[0] | items %}{{ key }}={{ value }};{% endfor %}"
        "{% for k, v in tools[0] | dictsort %}{{ k }}{% endfor %}",
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}",
        "{% macro say(m, pre='<') %}{{ pre }}{{ m.role }}{{ caller() if caller }}{% endmacro %}"
        "{{ say(messages[0]) }}{% call say(messages[1], pre='>') %}!{% endcall %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x is defined }}{% endfor %}",
        "{{ messages | map(attribute='role') | join(', ') }}"
        " {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ 'abc'.upper() + 'x'.join(['a', 'b']) + '%s-%d' % ('q', 3) + '{:>4}|{}'.format(1, 'b') + 'a' * 3 }}",
        "{{ messages[0].content.split(' ')[-1] }} {{ 'x' in messages[0].content }} {{ messages[0].nothing is defined }}"
        " {{ nothing }}",
        "{{ messages[0].content | replace('hi', 'ho') | trim | upper | default('x') }}"
        " {{ [3, 1, 2] | sort | first }} {{ 7 // 2 }} {{ 2 ** 5 }}",
        "{% set text %}{{ messages[0].content }}\n  {% if true %}a{% endif %}\n{% endset %}[{{ text | trim | indent(2) }}]\n\n",
        "  {% if true %}\n  x\n  {% endif %}  \n  {# gone #}\ny {{- ' z' -}}   w\n",
        "{{ dict(a=1, b=2) }} {{ range(3) | list }} {{ (1, 2) }} {{ {'a': [1]} }}"
        " {{ 1.5 | round }} {{ '5' | int + 1 }} {{ messages is iterable }}",
        "{{ documents is none }} {{ add_generation_prompt }} {{ bos_token is defined }} {{ raise_exception is defined }}",
        "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
        "{{ [1, 2] + [3] }} {{ messages[1:] + messages[:1] }} {{ 'a' if false }} {{ messages | length > 1 and not tools is none }}",
        "{% filter upper %}{{ messages[0].role }}{% endfilter %} {% with y = 3 %}{{ y }}{% endwith %}",
    ],
)
def test_what_transformers_offers_a_template_gives_the_same_text(source: str) -> None:
    (expected,), _ = render_jinja_template([MESSAGES], tools=TOOLS, chat_template=source, add_generation_prompt=True)
    assert render(source, reply=True) == expected


def test_the_date_is_the_one_given() -> None:
    assert render("{{ strftime_now('%d %B %Y') }}") == "01 January 2025"


# Control strings


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<|a|>{{ '<|a|>' + messages[0].role }}<|a|>b<|a", "⟨<|a|>⟩⟨<|a|>⟩user⟨<|a|>b⟩<|a"),
        ("{% set x = '<|a|>' %}{{ x }}{{ ['<|a|>'] | join }}{{ x | tojson }}", '⟨<|a|>⟩⟨<|a|>⟩"⟨<|a|>⟩"'),
        ("{{ '<|' + messages[0].role + '|>x' }}", "⟨<|user|>⟩x"),
        ("{{ 'y<|' ~ messages[1]['role'] ~ '|>' }}", "y⟨<|assistant|>⟩"),
        ("y<|{{ messages[0].role }}|>x", "y⟨<|user|>⟩x"),
        ("{% set role = messages[0].role %}<|{{ role }}{{ '|>' + 'x' }}", "⟨<|user|>⟩x"),
        ("{{ '<|' + 'user' + '|>' }}{{ '<|' ~ messages[0].content ~ '|>' }}", "<|user|><|hi <b> 床|>"),
        ("{{ '<|' + messages[0].role }}|>", "⟨<|user|>⟩"),
        ("{{ '<|' + messages[0].role + '>' }}{{ 1 + 2 + 3 }}", "<|user>6"),
        (
            "{{ '<|a|>' in '<|a|>' }} {{ messages[0].content.replace('<|a|>', '') }} {{ 'x' == '<|a|>' }}",
            "True hi <b> 床 False",
        ),
        ("{{ bos_token }}{{ eos_token }}", "⟨<|a|>⟩</s>"),
    ],
)
def test_control_strings_are_marks_where_the_template_writes_them(source: str, text: str) -> None:
    assert written_out(source, bos_token="<|a|>", eos_token="</s>") == text


def test_marks_avoid_what_the_template_itself_holds() -> None:
    template = Template(f"{A}<|a|>", {"<|a|>"}, {}, ROLES)
    assert template.render([], [], reply=False, now=NOW, n_characters=0) == A + template.marks["<|a|>"]
    assert template.marks["<|a|>"] != A


def test_what_is_looked_for_in_a_text_is_looked_for_as_text() -> None:
    source = "{% if '<|a|>' in messages[0].content %}in{% endif %}{{ messages[0].content.split('<|a|>') }}"
    template = Template(source, {"<|a|>"}, {}, ROLES)
    text = template.render([{"role": "user", "content": "p<|a|>q"}], [], reply=False, now=NOW, n_characters=9)
    assert text.endswith("in['p', 'q']")


# What is stopped


ENDLESS = "it loops, or its text grows, without end"
GROW = "{% set ns = namespace(x='aaaaaaaa', y=[1], z=7) %}{% for i in range(60) %}BODY{% endfor %}"
AGAIN = "{% for i in range(9000) %}BODY{% endfor %}"
MANY = "{% set many = range(50000) | list %}"
POWERS = "{% set a = 2 ** 400000 %}{% set b = 2 ** 200000 - 1 %}"
STOPPED = {
    "loops in loops": ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", ENDLESS),
    "a long text in a loop": ("{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}", ENDLESS),
    "a text times a number": ("{{ 'a' * 10 ** 12 }}", ENDLESS),
    "a list times a number": ("{{ 10 ** 12 * [1] }}", ENDLESS),
    "a power": ("{{ 2 ** (2 ** 40) }}", ENDLESS),
    "squares": (GROW.replace("BODY", "{% set ns.z = ns.z * ns.z %}"), ENDLESS),
    "a sum of texts": (GROW.replace("BODY", "{% set ns.x = ns.x + ns.x %}"), ENDLESS),
    "joined texts": (GROW.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"), ENDLESS),
    "a block of text": (GROW.replace("BODY", "{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}"), ENDLESS),
    "lists in lists": (GROW.replace("BODY", "{% set ns.y = [ns.y, ns.y] %}") + "{{ ns.y }}", ENDLESS),
    "namespaces in namespaces": (
        GROW.replace("BODY", "{% set ns.y = namespace(a=ns.y, b=ns.y) %}") + "{{ ns.y }}",
        ENDLESS,
    ),
    "a namespace again and again": (
        "{% set ns = namespace(x='a' * 300000) %}{% for i in range(9000) %}{{ ns }}{% endfor %}",
        ENDLESS,
    ),
    "what is in a dictionary": (
        GROW.replace("BODY", "{% set ns.y = {1: ns.y, 2: ns.y}.values() %}") + "{{ ns.y }}",
        ENDLESS,
    ),
    "dictionaries": (GROW.replace("BODY", "{% set ns.y = dict(a=ns.y, b=ns.y) %}"), ENDLESS),
    "sums of lists": (GROW.replace("BODY", "{% set ns.y = [ns.y] + [ns.y] %}") + "{{ ns.y == ns.y }}", ENDLESS),
    "replacing": ("{% set s = range(9999) | join %}{{ s.replace('1', s).replace('2', s) }}", ENDLESS),
    "replacing by a filter": ("{% set s = range(99999) | join %}{{ s | replace('', s) }}", ENDLESS),
    "joining": ("{% set s = range(9999) | join %}{{ s.join(range(99999) | map('string')) }}", ENDLESS),
    "lazy lists": (
        "{% for i in range(9999) %}{{ range(9999) | map('string') | select | list | length }}{% endfor %}",
        ENDLESS,
    ),
    "looking again and again": (
        "{% set s = range(99999) | join %}{% for i in range(99999) %}{{ 'zzz' in s }}{% endfor %}",
        ENDLESS,
    ),
    "a loop whose rounds are all left out": (
        "{% set r = range(99999) %}" + AGAIN.replace("BODY", "{% for x in r if false %}{% endfor %}"),
        ENDLESS,
    ),
    "a test of a long list": (MANY + AGAIN.replace("BODY", "{% if 1.5 is in(many) %}{% endif %}"), ENDLESS),
    "a test of letters": (MANY + AGAIN.replace("BODY", "{% if many is lower %}{% endif %}"), ENDLESS),
    "a test of every item": (MANY + "{{ range(99999) | map('float') | select('in', many) | list }}", ENDLESS),
    "equal lists": (MANY + AGAIN.replace("BODY", "{% if many == range(50000) | list %}{% endif %}"), ENDLESS),
    "a key that is long": (
        "{% macro f() %}" + AGAIN.replace("BODY", "{% set x = {}[varargs] %}") + "{% endmacro %}{{ f(*range(50000)) }}",
        ENDLESS,
    ),
    "many arguments": (
        MANY + "{% macro f() %}{{ varargs | length }}{% endmacro %}" + AGAIN.replace("BODY", "{{ f(*many) }}"),
        ENDLESS,
    ),
    "parts of a text that are kept": (
        "{% set ns = namespace(y=none) %}{% set long = 'a' * 300000 %}"
        + AGAIN.replace("BODY", "{% set ns.y = namespace(before=ns.y, x=long[1:]) %}"),
        ENDLESS,
    ),
    "the greatest by what it has": (
        "{% set n = namespace(x=range(20000) | list) %}{% set m = namespace(x=range(20000) | list) %}"
        "{{ ([n, m] * 20000) | max(attribute='x') }}",
        ENDLESS,
    ),
    "a division": (POWERS + AGAIN.replace("BODY", "{% set x = a // b %}"), ENDLESS),
    "a test of a division": (POWERS + AGAIN.replace("BODY", "{% if a is divisibleby(b) %}{% endif %}"), ENDLESS),
    "replacing by named arguments": ("{{ ('1' * 90000) | replace(new='a' * 100000, old='1') }}", ENDLESS),
    "replacing in a list": ("{{ ([1] * 90000) | replace('1', 'a' * 100000) }}", ENDLESS),
    "joining by named arguments": ("{{ ([1] * 90000) | join(attribute='a', d='a' * 100000) }}", ENDLESS),
    "JSON that is deep and indented": (
        "{% set ns = namespace(x=range(20000) | list) %}{% for i in range(40) %}{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ ns.x | tojson(indent=16) }}",
        ENDLESS,
    ),
    "JSON with long separators": ("{{ [1] | tojson(separators=('a' * 17, ':')) }}", "by more than sixteen characters"),
    "an indent that is written out": ("{{ 'a' | indent('b' * 2000) }}", "indents by more than a thousand"),
    "a number with many digits": ("{{ 1 | round(1000000000, 'ceil') }}", "rounds to more than a thousand"),
    "a number without digits": ("{{ 1 | round(-1000000000) }}", "rounds to more than a thousand"),
    "a sum of lists": ("{{ range(60000) | batch(1) | sum(start=[]) }}", "sums what is no number"),
    "an attribute of many parts": (
        "{{ range(9) | map(attribute='a.' * 1000 + 'a', default={}) | list }}",
        "an attribute of more than 16 parts",
    ),
    "a dictionary behind its view": ("{{ {}.items().mapping }}", "reaches for 'mapping' of a dict_items"),
    "macros that branch": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        ENDLESS,
    ),
    "a macro that calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "it calls itself, or is nested, without end",
    ),
    "a loop that calls itself": (
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "it calls itself, or is nested, without end",
    ),
    "a long date": ("{{ strftime_now('%Y' * 1000000) }}", ENDLESS),
    "a wide field": ("{{ '%1000000000d' % 1 }}", "fields wider than a thousand"),
    "a width that is given": ("{{ '%*d' % (1000000000, 1) }}", "fields wider than a thousand"),
    "a wide format": ("{{ '{:>1000000000}'.format(1) }}", "fields wider than a thousand"),
    "a format in a format": ("{{ '{:{w}}'.format(1, w=1000000000) }}", "fields wider than a thousand"),
    "a wide filter": ("{{ '%1000000000d' | format(1) }}", "fields wider than a thousand"),
    "a deep indent": ("{{ 'a\nb' | indent(1000000000) }}", "indents by more than a thousand"),
    "JSON far to the right": ("{{ [1] | tojson(indent=1000000000) }}", "indents JSON by 1000000000"),
    "many parts": ("{{ range(9) | slice(1000000000) | list }}", "more than ten thousand parts"),
    "a wide text": ("{{ 'a'.center(1000000000) }}", r"calls \.center\(\) of a value, which templates are not given"),
    "bytes of a number": ("{{ (1).to_bytes(1000000000, 'big') }}", r"calls \.to_bytes\(\)"),
    "a class": ("{{ ''.__class__.__mro__ }}", "reaches for '__class__' of a str, which templates are not given"),
    "a class alone": ("{{ messages.__class__ }}", "reaches for '__class__' of a list"),
    "a class in a format": ("{{ '{0.__class__}'.format(1) }}", "reaches for '__class__' of a int"),
    "globals": ("{{ raise_exception.__globals__ }}", "reaches for '__globals__' of a function"),
    "the template itself": ("{{ self.__init__ }}", "reaches for '__init__'"),
    "the clock": ("{{ strftime_now.__self__ }}", "reaches for '__self__'"),
    "changing a message": ("{{ messages.append(1) }}", "reaches for 'append' of a list"),
    "a name of Python's": ("{% set n = namespace(__class__=1) %}", "sets '__class__' in a namespace"),
    "a name of Python's later": (
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "sets '__class__' in a namespace",
    ),
}


@pytest.mark.parametrize("case", STOPPED)
def test_a_template_that_misbehaves_is_stopped_soon_and_in_words(case: str) -> None:
    source, words = STOPPED[case]
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"^the chat template (was stopped|fails on this conversation): .*{words}"):
        render(source)
    assert time.process_time() - start < 60
    if sys.platform == "linux":  # others count in bytes
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% include '/etc/passwd' %}", "line 1: it reaches for another template"),
        ("\n{% import 'os' as os %}", "line 2: it reaches for another template"),
        ("{% from 'os' import path %}", "it reaches for another template"),
        ("{% extends 'base' %}", "it reaches for another template"),
        ("{% for m in messages %}{{ m", "line 1: unexpected end of template"),
        ("{{ 1 | nosuch }}", "No filter named 'nosuch'"),
        ("{{ 'a' | center(1000000000) }}", "No filter named 'center'"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "nested, without end"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested, without end"),
        ("{{ " + "[" * 300 + "]" * 300 + " }}", "nested"),
        ("x" * (1 << 21), "2,097,152 characters"),
        ("{{ a }}" * 30_000, "210,000 characters"),
    ],
)
def test_what_is_no_template_is_refused_before_it_is_used(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^the chat template .*{words}"):
        Template(source, (), {}, ROLES)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('only users') }}", "refuses this conversation: only users"),
        ("{{ raise_exception(messages) }}", "refuses this conversation: "),
        ("{{ messages[9].content.x }}", "fails on this conversation: list object has no element 9"),
        ("{{ open('/etc/passwd') }}", "fails on this conversation: 'open' is undefined"),
        ("{{ lipsum(n=1000000) }}", "fails on this conversation: 'lipsum' is undefined"),
        ("{{ 'a' + 1 }}", "fails on this conversation: can only concatenate"),
        ("{{ 1 / 0 }}", "fails on this conversation: division by zero"),
        ("{{ raise_exception('\x1b[2Jx') }}", "refuses this conversation: \ufffd\\[2Jx"),
    ],
)
def test_what_a_template_cannot_render_is_said_in_words(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^the chat template {words}"):
        render(source)


def test_messages_are_what_they_were_after_a_template_was_stopped() -> None:
    before = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match="stopped"):
        render("{{ messages[0].update(role='x') }}")
    assert before == MESSAGES


def test_a_long_conversation_is_not_mistaken_for_a_loop_without_end() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 400
    source = (
        "{% for m in messages %}{{ m.content.strip().replace('a', 'b').split('x')[-1].lstrip() + '\n' }}{% endfor %}"
    )
    size = sum(len(message["content"]) for message in messages)
    text = Template(source, (), {}, ROLES).render(messages, [], reply=False, now=NOW, n_characters=size)
    assert len(text) == size


@pytest.mark.parametrize(
    "source",
    [
        QWEN3,
        "{% for m in messages %}{{ messages | length - loop.index0 }}{{ (messages | last).role }}{% endfor %}",
        "{% for m in messages %}{{ messages[: loop.index] | length }}{% set rest = messages + [m] %}{% endfor %}",
    ],
)
def test_a_template_may_look_at_the_list_of_messages_at_each_of_them(source: str) -> None:
    messages = [{"role": role, "content": "word " * 100} for role in ("user", "assistant")] * 300
    size = sum(len(message["content"]) for message in messages)
    assert Template(source, (), {}, ROLES).render(messages, [], reply=False, now=NOW, n_characters=size)


def test_a_budget_counts_everything_inside_a_value() -> None:
    budget = Budget(100)
    budget.measure({"a": ["bcd", 1]})
    assert budget.left < 95
    with pytest.raises(SecurityError, match="more than 100 steps"):
        budget.measure(["x" * 50, ["x" * 50]])
