"""Strict YAML: unknown keys, repeated keys and wrong types are refused in one line that names the cure.

Used by machine profiles and recipes alike. Built on PyYAML's safe loader and pydantic's strict mode; what
this file adds is the message: the dotted key, what was found, what is allowed, the nearest known name.
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

from lowmem.errors import LowmemError, nearest

TAGS = ("name", "kind")  # keys that choose one section of a union


class Section(BaseModel):
    """A part of a YAML file: strict types, no unknown key, read-only once made."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False
    )


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
    """A name from the package's profiles, or a path. Raises `error` with the nearest known name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or os.sep in str(name):
        if path.is_file():
            return path
        raise error(
            f"{what}: no file '{name}'; give the path of a YAML file, or one of the names: {', '.join(names_in(kind))}"
        )
    if str(name) in names_in(kind):
        return profiles_dir(kind) / f"{name}.yaml"
    raise error(f"{what}: unknown name '{name}'; {nearest(name, names_in(kind))}")


def yaml_value(text: str) -> Any:
    """Raises yaml.YAMLError or ValueError."""
    return yaml.load(text, Loader=_UniqueKeyLoader)


def read_yaml(path: Path, error: type[LowmemError]) -> dict[str, Any]:
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
    problems = problem.errors()
    first = problems[0]
    path, found = _walk(raw, first["loc"])
    if first["type"] == "missing":
        path = [*path, first["loc"][-1]]
    key = ".".join(map(str, path)) or "file"
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {nearest(path[-1], _known_keys(cls, raw, path[:-1]))}"
    if first["type"] == "missing":
        return f"key '{key}' is missing; add it"
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        tag_key = f"{key}.{first['ctx']['discriminator'].strip(chr(39))}"
        if first["type"] == "union_tag_not_found":
            return f"key '{tag_key}' is missing; add it"
        expected = [tag.strip(" '") for tag in first["ctx"]["expected_tags"].split(",")]
        return f"{tag_key}: unknown name '{first['ctx']['tag']}'; {nearest(first['ctx']['tag'], expected)}"
    if first["type"] == "value_error":
        return (f"{key}: " if path else "") + str(first["ctx"]["error"])
    same = [p for p in problems if _walk(raw, p["loc"])[0] == path]
    literals = [
        word
        for p in same
        if p["type"] == "literal_error"
        for word in p["ctx"]["expected"].replace(" or ", ", ").split(", ")
    ]
    other = [
        p["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        for p in same
        if p["type"] != "literal_error"
    ]
    if literals and not other and isinstance(found, str):
        return f"{key}: unknown name '{found}'; {nearest(found, [word.strip(chr(39)) for word in literals])}"
    if isinstance(found, str) and _is_number(found) and other:
        number = _as_yaml_number(found, any("integer" in allowed for allowed in other))
        return f"{key}: found the text '{found}' (YAML 1.1 reads a number only with a dot and a signed exponent); write {number}"
    return f"{key}: found {found!r}; allowed: {' or '.join(literals + other)}"


def _walk(raw: Any, loc: tuple[int | str, ...]) -> tuple[list[Any], Any]:
    """The part of pydantic's location that exists as keys (it also names union branches), and the value found
    there.
    """
    path: list[Any] = []
    for step in loc:
        known = dict(enumerate(raw)) if isinstance(raw, list) else raw if isinstance(raw, dict) else {}
        if step in known:
            path.append(step)
            raw = known[step]
    return path, raw


def _known_keys(cls: type[BaseModel], raw: Any, path: list[Any]) -> list[str]:
    """Keys allowed at `path`: follows fields, and the tags of a union of sections."""
    for step in path:
        raw = raw[step]
        field = next(f for n, f in cls.model_fields.items() if (f.alias or n) == step)
        sections = list(_sections(field.annotation))
        cls = next((s for s in sections if len(sections) == 1 or _has_tags_of(s, raw)), sections[0])
    return [field.alias or name for name, field in cls.model_fields.items()]


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
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
