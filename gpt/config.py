"""Settings from YAML: strict, typed, frozen, every mistake named with its line. Knows nothing of what the settings mean."""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.scanner import ScannerError


class ConfigError(ValueError):
    """Every independent mistake in the settings, one a line."""


class Settings(BaseModel):
    """Base of all settings: frozen, strict, no unknown keys. A setting's meaning and unit are its Field's description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)
COUNT_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
TIME_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _count(value: object) -> object:
    """A whole number, perhaps written 10B, 0.5M or 16_384."""
    if isinstance(value, float) and value.is_integer():  # 1e9 is how many write it
        return int(value)
    match = re.fullmatch(r"([0-9][0-9_]{0,30}(?:\.[0-9]{1,30})?) ?([kMBT]?)", value) if isinstance(value, str) else None
    if match is None:
        return value
    number = Decimal(match[1].replace("_", "")) * COUNT_UNITS[match[2]]
    if number != int(number):
        raise ValueError(f"'{value}' is not a whole number")
    return int(number)


def _duration(value: object) -> object:
    """Seconds, perhaps written 90s, 3m, 2h or 1d."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?([smhd]?)", value)
    if match is None:
        raise ValueError(f"expected seconds, or a duration such as 90s, 3m, 2h or 1d, got '{value}'")
    return float(match[1]) * TIME_UNITS[match[2]]


Count = Annotated[int, BeforeValidator(_count)]
Duration = Annotated[float, BeforeValidator(_duration)]
Key = tuple[str | int, ...]  # where a value stands: ("model", "n_layer")


def load(
    schema: type[S], path: Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> S:
    """Read settings: `defaults` (dotted keys), replaced by the file's, replaced by `overrides` ("section.key=value").

    Raises ConfigError naming every independent mistake with its file and line.
    """
    source = Source()
    for dotted, value in (defaults or {}).items():
        source.put(tuple(dotted.split(".")), value, f"default '{dotted}'")
    if path is not None:
        source.read_file(path)
    for override in overrides:
        source.read_override(override)
    try:
        # As JSON, where a list may become a tuple: strict means that nothing else is converted.
        settings = schema.model_validate_json(json.dumps(source.values))
    except ValidationError as error:
        source.mistakes += _explained(source, schema, error)
    if source.mistakes:
        raise ConfigError("\n".join(source.mistakes))
    return settings


@dataclass
class Source:
    """Values read so far, where each was written in words, and the mistakes found."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def put(self, key: Key, value: Any, place: str) -> None:
        """Set the value at `key`, opening the sections on the way."""
        section = self.values
        for depth, name in enumerate(key[:-1], 1):
            if section.get(str(name)) is None:
                section[str(name)] = {}
                self.places[key[:depth]] = place
            section = section[str(name)]
            if not isinstance(section, dict):
                self.mistakes.append(f"{place}: '{_dotted(key[:depth])}' is not a section")
                return
        section[str(key[-1])] = value
        self.places[key] = place

    def place(self, key: Key) -> str:
        """Where `key`, or else the nearest section around it, was written."""
        while key and key not in self.places:
            key = key[:-1]
        return f"{self.places[key]}: " if key in self.places else ""

    def read_file(self, path: Path) -> None:
        """Add a settings file's values; a file that cannot be parsed ends the reading at once."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
            raise ConfigError(f"{path}: no such file{_did_you_mean(str(path.with_name(n)) for n in near)}") from None
        except IsADirectoryError:
            raise ConfigError(f"{path} is a directory; name a settings file in it") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
        node = _parse(text, str(path), lambda line: f"{path}:{line + 1}")
        if node is None:
            raise ConfigError(f"{path}: the file is empty; expected `key: value` settings")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected `key: value` settings")
        values = self.build(node, (), lambda line: f"{path}:{line + 1}")
        self.places[()] = str(path)
        self.values = _merged(self.values, values)

    def read_override(self, override: str) -> None:
        """Add one "section.key=value"; a section given whole replaces the section."""
        place = f"override '{override}'"
        dotted, equals, text = override.partition("=")
        if not equals or not all(names := dotted.split(".")):
            self.mistakes.append(f"{place}: expected section.key=value")
            return
        key = tuple(names)
        try:
            node = _parse(text, place, lambda line: place)
        except ConfigError as error:
            self.mistakes.append(str(error))
            return
        self.places = {k: v for k, v in self.places.items() if k[: len(key)] != key}
        self.put(key, None if node is None else self.build(node, key, lambda line: place), place)

    def build(self, node: yaml.Node, key: Key, place: Callable[[int], str]) -> Any:
        """The plain value of a node, noting where it and all below it stand."""
        self.places[key] = place(node.start_mark.line)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*key, i), place) for i, child in enumerate(node.value)]
        values: dict[str, Any] = {}
        for name_node, child in node.value:
            here = place(name_node.start_mark.line)
            if not isinstance(name_node, yaml.ScalarNode):
                self.mistakes.append(f"{here}: expected a plain key")
                continue
            name = name_node.value
            if name in values:
                self.mistakes.append(f"{here}: '{_dotted((*key, name))}' is set twice")
            values[name] = self.build(child, (*key, name), place)
            self.places[(*key, name)] = here
        return values


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | both


class _Loader(yaml.SafeLoader):
    """YAML without aliases, anchors and tags: what is written is what is meant."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise ScannerError(None, None, "an escape that is half a character (a surrogate)", node.start_mark)
        return node

    def refuse(self) -> NoReturn:
        problem = (
            "'*', '&' and '!' have a meaning in YAML that settings do not use; put quotes around text that starts so"
        )
        raise ScannerError(None, None, problem, self.get_mark())

    fetch_alias = fetch_anchor = fetch_tag = refuse


def _parse(text: str, name: str, place: Callable[[int], str]) -> yaml.Node | None:
    """The one YAML document in `text`, None if it is empty; ConfigError with the line if it is not YAML."""
    try:
        text.encode()  # the bytes of an argument need not be UTF-8
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        problem = str(error.problem).replace("character '\\t' that cannot start any token", "a tab; indent with spaces")
        problem = f"{error.context}, {problem}" if problem.startswith("but ") else problem
        raise ConfigError(f"{place(error.problem_mark.line if error.problem_mark else 0)}: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n")
        raise ConfigError(
            f"{place(line)}: a control character (U+{ord(text[error.position]):04X}) in the text"
        ) from None
    except UnicodeEncodeError:
        raise ConfigError(f"{name}: not UTF-8 text") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None


def _scalar(node: yaml.ScalarNode) -> Any:
    """YAML 1.2's core scalars. YAML 1.1 would read `no` as false, 012 as 10, 12:30 as 750 and 3e-4 as text."""
    text = node.value
    if node.style is not None:  # quoted, or a block
        return text
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[-+]?(0|[1-9](_?[0-9]){0,40})", text):
        return int(text)
    if re.fullmatch(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text


def _explained(source: Source, schema: type[Settings], error: ValidationError) -> list[str]:
    """pydantic's findings as one sentence for each value that is wrong."""
    found: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_key(source.values, detail), []).append(detail)
    # A mistake inside a value says more than one about the value.
    inner = {key[:depth] for key in found for depth in range(len(key))}
    return [_sentence(source, schema, key, details) for key, details in found.items() if key not in inner]


def _key(values: dict[str, Any], detail: ErrorDetails) -> Key:
    """pydantic's location without the names of union members that it puts between."""
    key: Key = ()
    name: Any
    value: Any = values
    for name in detail["loc"]:
        if (isinstance(value, dict) and name in value) or (isinstance(value, list) and name in range(len(value))):
            key, value = (*key, name), value[name]
    missing = detail["loc"][-1] if detail["loc"] else None
    return (*key, missing) if detail["type"] == "missing" and isinstance(missing, str) else key


def _sentence(source: Source, schema: type[Settings], key: Key, details: list[ErrorDetails]) -> str:
    """Where, what was got, what was expected."""
    where, name, got = source.place(key), _dotted(key), details[0]["input"]
    kinds = {detail["type"] for detail in details}
    if "extra_forbidden" in kinds:
        dotted = "; in a file a section's keys stand below its name" if "." in str(key[-1]) else ""
        return f"{where}unknown key '{name}'{dotted or _did_you_mean(_nearest_key(schema, key))}"
    if "missing" in kinds and isinstance(got, dict):
        return f"{where}'{name}' is missing"
    name = f"{name}: " if name else ""
    for detail in details:
        if detail["type"] == "value_error":  # a validator's own words
            return f"{where}{name}{detail['ctx']['error']}"
    choices = [
        c for d in details if d["type"] == "literal_error" for c in re.findall("'([^']*)'", d["ctx"]["expected"])
    ]
    hint = _did_you_mean(difflib.get_close_matches(got, choices, 1)) if isinstance(got, str) else ""
    if kinds == {"literal_error"} and isinstance(got, str):
        return f"{where}{name}{_shown(got)} is not one of {', '.join(choices)}{hint}"
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    return f"{where}{name}expected {expected}, got {_shown(got)}{hint}"


EXPECTED = {  # pydantic's kinds of error, in the user's words
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "none_required": "null",
    "missing": "more values",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _expected(detail: ErrorDetails) -> str:
    words = EXPECTED.get(detail["type"], detail["msg"].removeprefix("Input should be "))
    return words.format(**detail.get("ctx", {}))


def _shown(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, (dict, list)):
        return "a section" if isinstance(value, dict) else f"a list of {len(value)}"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _did_you_mean(names: Any) -> str:
    return next((f"; did you mean '{name}'?" for name in names), "")


def _nearest_key(schema: type[Settings], key: Key) -> list[str]:
    """The likeliest name for an unknown key: one alike in its section, or the same one in another section."""
    section = schema
    for part in key[:-1]:
        if part in section.model_fields:
            section = _section(section.model_fields[str(part)].annotation) or section
    name = str(key[-1])
    elsewhere = [dotted for dotted, *_ in describe(schema) if dotted.endswith(f".{name}")]
    return difflib.get_close_matches(name, section.model_fields, 1) or elsewhere


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _section(annotation: Any) -> type[Settings] | None:
    """The settings class in an annotation: itself, or a member of a union or list."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def dump(settings: Settings) -> str:
    """YAML that `load` reads back equal."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_scalar` would read as something else, groups digits, keeps a list on its line."""

    def text(self, value: str) -> yaml.Node:
        reads_back = _scalar(yaml.ScalarNode("", value)) == value and value.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if reads_back else '"')

    def whole(self, value: int) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:int", f"{value:_}" if abs(value) > 9999 else str(value))

    def sequence(self, value: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_representer(int, _Dumper.whole)
_Dumper.add_representer(list, _Dumper.sequence)


def flatten(settings: Settings) -> dict[str, Any]:
    """Dotted key -> plain value."""

    def walk(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= walk(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return flat

    return walk(settings.model_dump(mode="json"), "")


def differences(a: Settings, b: Settings) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in a, value in b) where they differ; a setting that only one has is None in the other."""
    flat_a, flat_b = flatten(a), flatten(b)
    keys = dict.fromkeys([*flat_a, *flat_b])
    return [(key, flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)]


def describe(schema: type[Settings], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, meaning) of every setting whose key starts with `prefix`."""

    def walk(section: type[Settings], path: str) -> list[tuple[str, str, str, str]]:
        rows = []
        for name, info in section.model_fields.items():
            annotation = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            inner = _section(annotation)
            if inner is None or type(None) in get_args(annotation):
                rows.append((f"{path}{name}", _type_name(annotation), _default(info), info.description or ""))
            rows += walk(inner, f"{path}{name}.") if inner else []
        return rows

    return [row for row in walk(schema, "") if row[0].startswith(prefix)]


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    return default if isinstance(default, str) else json.dumps(default)


NAMES: dict[Any, str] = {int: "int", float: "number", bool: "true or false", str: "text", type(None): "null"}


def _type_name(annotation: Any) -> str:
    """A type in the user's words: "auto or int"."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        validators = [getattr(part, "func", None) for part in parts]
        special = "count" if _count in validators else "duration" if _duration in validators else None
        return special or _type_name(parts[0])
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (list, tuple, dict):
        return "list" if origin is not dict else "section"
    if parts:
        return " or ".join(dict.fromkeys(map(_type_name, parts)))
    return NAMES.get(
        annotation, "section" if _section(annotation) else str(getattr(annotation, "__name__", annotation))
    )
