"""Strict YAML: unknown keys, repeated keys and wrong types are refused in one line that names the cure.

Machine profiles and recipes both use it. It builds on PyYAML's safe loader and pydantic's strict mode, and
adds the message: the dotted key, what was found, what is allowed, the nearest known name.
"""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from lowmem.errors import LowmemError, nearest

TAGS = ("name", "kind")  # keys that choose one section of several
QUOTE = "'"


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


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                line = node.value[position][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: key '{key}' stands twice; keep one")
            if not isinstance(key, str) or not key.isprintable():
                raise yaml.YAMLError(f"a key must be a plain word, found {key!r}")
        return super().construct_mapping(node, deep=deep)


def profiles_dir(kind: str) -> Path:
    """The folder of the profiles that come with the package: `hardware` or `recipes`."""
    here = Path(__file__).resolve().parent
    installed, checkout = here / "profiles" / kind, here.parent / "profiles" / kind
    return installed if installed.is_dir() else checkout


def names_in(kind: str) -> list[str]:
    return sorted(path.stem for path in profiles_dir(kind).glob("*.yaml"))


def find_file(name: str | os.PathLike[str], kind: str, what: str, error: type[LowmemError]) -> Path:
    """The file of a name among the package's profiles, or of a path. Raises `error` when there is none."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or os.sep in str(name):
        if path.is_file():
            return path
        raise error(
            f"{what}: no file '{name}'; "
            f"give the path of a YAML file, or one of the names: {', '.join(names_in(kind))}"
        )
    if str(name) in names_in(kind):
        return profiles_dir(kind) / f"{name}.yaml"
    raise error(f"{what}: unknown name '{name}'; {nearest(name, names_in(kind))}")


def yaml_value(text: str) -> Any:
    """The value that a text of YAML holds. Raises yaml.YAMLError or ValueError."""
    return yaml.load(text, Loader=_UniqueKeyLoader)


def read_yaml(path: Path, error: type[LowmemError]) -> dict[str, Any]:
    """The mapping that a file of YAML holds. Raises `error` when it holds none."""
    try:
        raw = yaml_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as problem:
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
        return f"unknown key '{key}'; {nearest(path[-1], _known_keys(cls, raw, path[:-1]))}"
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
    return f"{tag_key}: unknown name '{context['tag']}'; {nearest(context['tag'], expected)}"


def _about_value(found: Any, problems: list[ErrorDetails]) -> str:
    """A value of the wrong type, or one that is out of range. `problems` are all about this value."""
    literals, other = [], []
    for problem in problems:
        if problem["type"] == "literal_error":
            literals += problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
        else:
            other.append(problem["msg"].removeprefix("Input should be ").removeprefix("Value error, "))
    if literals and not other and isinstance(found, str):
        return f"unknown name '{found}'; {nearest(found, [word.strip(QUOTE) for word in literals])}"
    if isinstance(found, str) and _is_number(found) and other:
        number = _as_yaml_number(found, any("integer" in allowed for allowed in other))
        return (
            f"found the text '{found}' (YAML 1.1 reads a number only with a dot and a signed exponent); "
            f"write {number}"
        )
    return f"found {found!r}; allowed: {' or '.join(literals + other)}"


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
        sections = list(_sections(field.annotation))
        cls = next((s for s in sections if len(sections) == 1 or _has_tags_of(s, raw)), sections[0])
    return [field.alias or name for name, field in cls.model_fields.items()]


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold: its class, its class's `variants`, or the members of its union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield from annotation.variants()
    for part in typing.get_args(annotation):
        yield from _sections(part)


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
