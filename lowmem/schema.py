"""Strict YAML: unknown keys, repeated keys and wrong types are refused in one line that names the cure.

Machine profiles and recipes both use it. It builds on PyYAML's safe loader and pydantic's strict mode, and
adds the message: the dotted key, what was found, what is allowed, the nearest known name.
"""

from __future__ import annotations

import math
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from lowmem.errors import LowmemError, nearest
from lowmem.units import shown

MOST_BYTES = 64 * 1024  # of a file of YAML: a recipe has 1 KiB, and PyYAML reads some 100 KiB a second
MOST_DEPTH = 16  # of sections in one another: a recipe has 3
MOST_FOUND = 80  # characters of a value in a message
OCTAL = re.compile(r"[-+]?0[0-7_]+")
# `3e-4` and `1e3`: numbers for everyone but YAML 1.1, which wants a dot and a signed exponent.
EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
TAGS = ("name", "kind")  # keys that choose one section of several
QUOTE = "'"
# pydantic's types of problems with a bound, and where that bound is
BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
PLAIN_DIGITS = 7  # of a bound that is written out


class Section(BaseModel):
    """A part of a YAML file: strict types, no unknown key, read-only once made."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @classmethod
    def variants(cls) -> list[type[Section]]:
        """The sections that a field of this class may hold.

        A base class whose subclasses are chosen by name overrides this, so that a message knows their keys.
        """
        return [cls]


SectionT = TypeVar("SectionT", bound=Section)


class _PlainLoader(yaml.SafeLoader):
    """Reads what people mean, and refuses what YAML 1.1 takes for something else.

    PyYAML keeps the last of two equal keys and says nothing. It follows aliases and merge keys, a few of
    which make a small file a huge one. It takes `010` for 8 and `1:30` for 90.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {line}: found the alias '*{event.anchor}'; write the value out")
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > MOST_DEPTH:
            raise yaml.YAMLError(f"line {line}: found more than {MOST_DEPTH} levels in one another")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"line {line}: found the merge key '<<'; write its keys out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or not key.isprintable():
                raise yaml.YAMLError(f"line {line}: a key must be a plain word, found {key!r}")
            if key in known:
                raise yaml.YAMLError(f"line {line}: key '{key}' stands twice; keep one")
            known.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        if OCTAL.fullmatch(text):
            value = self._number(node, super().construct_yaml_int)
            decimal = text.replace("_", "").lstrip("-+0") or "0"
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: found {text}, which YAML 1.1 reads as the octal number "
                f"{value}; write {decimal} or {value}, or '{text}' in quotes for a text"
            )
        return int(self._number(node, super().construct_yaml_int))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(self._number(node, super().construct_yaml_float))

    def _number(self, node: yaml.ScalarNode, read: Callable[[yaml.ScalarNode], Any]) -> Any:
        line, text = node.start_mark.line + 1, node.value
        try:
            value = read(node)
        except (ValueError, OverflowError):
            raise yaml.YAMLError(
                f"line {line}: found {text}; it is no number, or one of too many digits"
            ) from None
        if ":" in text:
            raise yaml.YAMLError(
                f"line {line}: found {text}, which YAML 1.1 reads as {value} (base 60); write {value}, or "
                f"'{text}' in quotes for a text"
            )
        return value


class _PlainDumper(yaml.SafeDumper):
    """Writes what `_PlainLoader` reads back as it was."""


for _class in (_PlainLoader, _PlainDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
for _kind in ("int", "float"):
    _PlainLoader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", getattr(_PlainLoader, f"construct_yaml_{_kind}")
    )


def profiles_dir(kind: str) -> Path:
    """The folder of the profiles that come with the package: `hardware` or `recipes`."""
    here = Path(__file__).resolve().parent
    installed, checkout = here / "profiles" / kind, here.parent / "profiles" / kind
    return installed if installed.is_dir() else checkout


def names_in(kind: str) -> list[str]:
    return sorted(path.stem for path in profiles_dir(kind).glob("*.yaml"))


def find_file(name: str | os.PathLike[str], kind: str, what: str, error: type[LowmemError]) -> Path:
    """The file of a name among the package's profiles, or of a path. Raises `error` when there is none."""
    path = Path(expanded(os.fspath(name), what, error))
    if path.suffix or os.sep in str(name):
        try:
            if path.is_file():
                return path
            why = "no file"
        except (OSError, ValueError) as problem:
            why = f"{getattr(problem, 'strerror', problem)}:"
        raise error(
            f"{what}: {why} '{shown(name, MOST_FOUND)}'; "
            f"give the path of a YAML file, or one of the names: {', '.join(names_in(kind))}"
        )
    if str(name) in names_in(kind):
        return profiles_dir(kind) / f"{name}.yaml"
    raise error(f"{what}: unknown name '{shown(name, MOST_FOUND)}'; {nearest(name, names_in(kind))}")


def yaml_value(text: str) -> Any:
    """The value that a text of YAML holds. Raises yaml.YAMLError or ValueError."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"found more than {MOST_BYTES} characters; a recipe or a profile has some 1000")
    return yaml.load(text, Loader=_PlainLoader)


def yaml_text(value: Any) -> str:
    """`value` as a text of YAML."""
    return yaml.dump(value, Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=150)


def expanded(path: str, where: str, error: type[LowmemError]) -> str:
    """A path of the user's with `~` and environment variables written out, as a shell does it.

    A shell leaves `key=~/x` as it is. A file of that very name is meant first. Raises `error` for what stands
    for nothing.
    """
    if ("~" not in path and "$" not in path) or _exists(path):
        return path
    for plain, braced in VARIABLE.findall(path):
        if plain + braced not in os.environ:
            raise error(
                f"{where}: found '{shown(path, MOST_FOUND)}'; the environment has no variable "
                f"'{plain + braced}'; set it, or write the path out"
            )
    filled = VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], path)
    home = os.path.expanduser(filled)
    if filled.startswith("~") and home == filled:
        raise error(
            f"{where}: found '{shown(path, MOST_FOUND)}'; no user has that home; write the path out, or "
            f"./{shown(path, MOST_FOUND)} for a file of that name"
        )
    return home


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def read_text(path: Path, error: type[LowmemError]) -> str:
    """The text of a file of YAML. Raises `error` when it cannot be read, or is far too long for one."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"found more than {MOST_BYTES} bytes; a recipe or a profile has some 1000")
        return data.decode("utf-8")
    except (OSError, ValueError) as problem:
        raise error(f"{path.name}: not readable as YAML: {problem}") from None


def read_yaml(path: Path, error: type[LowmemError]) -> dict[str, Any]:
    """The mapping that a file of YAML holds. Raises `error` when it holds none."""
    text = read_text(path, error)
    try:
        raw = yaml_value(text)
    except (ValueError, yaml.YAMLError) as problem:
        raise error(f"{path.name}: not readable as YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(raw, dict):
        raise error(
            f"{path.name}: found {type(raw).__name__} at the top; allowed: a mapping of keys to values"
        )
    return raw


def parse(cls: type[SectionT], raw: dict[str, Any], where: str, error: type[LowmemError]) -> SectionT:
    """`raw` as a `cls`. Raises `error` with one line about the first thing that is wrong."""
    try:
        return cls.model_validate(raw)
    except ValidationError as problem:
        raise error(f"{where}: {_one_line(cls, raw, problem)}") from None


def _one_line(cls: type[Section], raw: dict[str, Any], problem: ValidationError) -> str:
    """The first thing that is wrong: its dotted key, what was found, what is allowed."""
    problems = problem.errors()
    first, kind = problems[0], problems[0]["type"]
    path, found = _walk(raw, first["loc"])
    if kind == "missing":
        return f"key '{_dotted([*path, first['loc'][-1]])}' is missing; add it"
    key = _dotted(path)
    if kind == "extra_forbidden":
        known = nearest(path[-1], _known_keys(cls, raw, path[:-1]))
        return f"unknown key '{shown(key, MOST_FOUND)}'; {known}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _about_tag(key, first)
    if kind == "value_error":
        return (f"{key}: " if path else "") + str(first["ctx"]["error"])
    # A union of types reports one problem for each type that the value is not.
    return f"{key}: {_about_value(found, [p for p in problems if _walk(raw, p['loc'])[0] == path])}"


def _about_tag(key: str, problem: ErrorDetails) -> str:
    """The tag of a union of sections is missing, or no section has it."""
    context = problem["ctx"]
    tag_key = f"{key}.{context['discriminator'].strip(QUOTE)}"
    if problem["type"] == "union_tag_not_found":
        return f"key '{tag_key}' is missing; add it"
    expected = [tag.strip(" " + QUOTE) for tag in context["expected_tags"].split(",")]
    tag = shown(context["tag"], MOST_FOUND)
    return f"{tag_key}: unknown name '{tag}'; {nearest(context['tag'], expected)}"


def _about_value(found: Any, problems: list[ErrorDetails]) -> str:
    """A value of the wrong type, or one that is out of range. `problems` are all about this value."""
    literals, other = [], []
    for problem in problems:
        if problem["type"] == "literal_error":
            literals += problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
        else:
            other.append(_allowed(problem))
    if literals and not other and isinstance(found, str):
        known = nearest(found, [word.strip(QUOTE) for word in literals])
        return f"unknown name '{shown(found, MOST_FOUND)}'; {known}"
    if isinstance(found, str) and _is_number(found) and other:
        number = _as_yaml_number(found, any("integer" in allowed for allowed in other))
        return f"found the text '{found}'; write the number {number}, without quotes"
    if isinstance(found, float) and found.is_integer() and any("integer" in allowed for allowed in other):
        return f"found {found}; allowed: {' or '.join(dict.fromkeys(literals + other))}; write {int(found)}"
    return f"found {shown(repr(found), MOST_FOUND)}; allowed: {' or '.join(dict.fromkeys(literals + other))}"


def _allowed(problem: ErrorDetails) -> str:
    """What pydantic allows, with its bound as a person writes it: `1e-30`, and not with thirty digits."""
    said = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    bound = problem.get("ctx", {}).get(BOUNDS.get(problem["type"], ""))
    if not isinstance(bound, float):
        return said
    plain, short = repr(bound).removesuffix(".0"), f"{bound:.0e}"
    shorter = len(plain) > PLAIN_DIGITS and float(short) == bound
    number = re.sub(r"e\+?(-?)0*", r"e\1", short if shorter else plain)
    return f"{said.rpartition(' ')[0]} {number}"


def _dotted(path: list[Any]) -> str:
    return ".".join(map(str, path)) or "file"


def _walk(raw: Any, loc: tuple[int | str, ...]) -> tuple[list[Any], Any]:
    """The keys of pydantic's location, and the value found there.

    The location also names the branches of unions. They are no keys of the file and are left out.
    """
    path: list[Any] = []
    for step in loc:
        known = dict(enumerate(raw)) if isinstance(raw, list) else raw if isinstance(raw, dict) else {}
        if step in known:
            path.append(step)
            raw = known[step]
    return path, raw


def _known_keys(cls: type[BaseModel], raw: Any, path: list[Any]) -> list[str]:
    """The keys allowed at `path`, in the sections that the file's own tags choose on the way."""
    for step in path:
        raw = raw[step]
        field = next(f for n, f in cls.model_fields.items() if (f.alias or n) == step)
        known = list(sections(field.annotation))
        cls = next((s for s in known if len(known) == 1 or _has_tags_of(s, raw)), known[0])
    return [field.alias or name for name, field in cls.model_fields.items()]


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold: its class, its class's `variants`, or the members of its union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from annotation.variants()
    for part in typing.get_args(annotation):
        yield from sections(part)


def _has_tags_of(section: type[BaseModel], raw: dict[str, Any]) -> bool:
    return all(
        raw.get(tag) in typing.get_args(section.model_fields[tag].annotation)
        for tag in TAGS
        if tag in section.model_fields
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _as_yaml_number(text: str, integer: bool) -> str:
    number = float(text)
    if integer and number == int(number):
        return str(int(number))
    mantissa, _, exponent = text.lower().replace("_", "").partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent or 0):+d}"
