"""Sections chosen by name from a registry: a wrong key or name is refused as in a union of sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt, field_validator
from pydantic_core import PydanticKnownError

from lowmem.errors import ConfigError
from lowmem.schema import Section, parse


class Shape(Section):
    """A base class whose subclass a before-validator of the file's section chooses."""

    @classmethod
    def variants(cls) -> list[type[Section]]:
        return list(SHAPES.values())


class Disc(Shape):
    name: Literal["disc"]
    radius: PositiveInt


class Box(Shape):
    name: Literal["box"]
    width: PositiveInt
    height: PositiveInt = 1


SHAPES: dict[str, type[Section]] = {"disc": Disc, "box": Box}


class ByRegistry(Section):
    shape: Shape

    @field_validator("shape", mode="before")
    @classmethod
    def _chosen(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if "name" not in raw:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'name'"})
        if raw["name"] not in SHAPES:
            tags = ", ".join(f"'{name}'" for name in SHAPES)
            context = {"discriminator": "'name'", "tag": raw["name"], "expected_tags": tags}
            raise PydanticKnownError("union_tag_invalid", context)
        return SHAPES[raw["name"]].model_validate(raw)


class ByUnion(Section):
    shape: Annotated[Disc | Box, Field(discriminator="name")]


def refusal(cls: type[Section], shape: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, {"shape": shape}, "file", ConfigError)
    return str(caught.value)


@pytest.mark.parametrize("cls", [ByRegistry, ByUnion])
def test_a_name_chooses_the_section(cls: type[Section]) -> None:
    found = parse(cls, {"shape": {"name": "box", "width": 2}}, "file", ConfigError)
    assert found.shape == Box(name="box", width=2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", [ByRegistry, ByUnion])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"name": "box", "widht": 2}, "key 'shape.width' is missing; add it"),
        (
            {"name": "box", "width": 2, "hight": 2},
            "unknown key 'shape.hight'; did you mean 'height'? known: height, name, width",
        ),
        ({"name": "disc", "radius": 1, "width": 2}, "unknown key 'shape.width'; known: name, radius"),
        (
            {"name": "boxx", "width": 2},
            "shape.name: unknown name 'boxx'; did you mean 'box'? known: box, disc",
        ),
        ({"width": 2}, "key 'shape.name' is missing; add it"),
        ({"name": "disc", "radius": 0}, "shape.radius: found 0; allowed: greater than 0"),
        (
            {"name": "disc", "radius": "1e1"},
            "shape.radius: found the text '1e1' "
            "(YAML 1.1 reads a number only with a dot and a signed exponent); write 10",
        ),
    ],
)
def test_a_registry_and_a_union_refuse_in_the_same_words(cls: type[Section], shape: Any, words: str) -> None:
    assert refusal(cls, shape) == f"file: {words}"


def test_a_value_in_place_of_a_section_is_refused() -> None:
    assert refusal(ByRegistry, 7).startswith("file: shape: found 7; allowed: ")
