"""Sections chosen by name from a registry: a wrong key or name is refused as in a union of sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt, field_validator
from pydantic_core import PydanticKnownError

from lowmem.data.identity import DataIdentity
from lowmem.errors import ConfigError
from lowmem.machine.profile import Profile
from lowmem.recipe import ModelConfig, Recipe, load_recipe
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
            "shape.radius: found the text '1e1'; write the number 10, without quotes",
        ),
    ],
)
def test_a_registry_and_a_union_refuse_in_the_same_words(cls: type[Section], shape: Any, words: str) -> None:
    assert refusal(cls, shape) == f"file: {words}"


def test_a_value_in_place_of_a_section_is_refused() -> None:
    assert refusal(ByRegistry, 7).startswith("file: shape: found 7; allowed: ")


# ------------------------------------------------------------------------------------------------------------
# Bounds


def without_upper_bound(node: Any, path: str) -> Iterator[str]:
    """The numbers of a JSON schema that may be as large as they like, however deep they are."""
    if isinstance(node, dict):
        kinds = {node["type"]} if isinstance(node.get("type"), str) else set()
        if (
            kinds & {"integer", "number"}
            and not {"maximum", "exclusiveMaximum", "const", "enum"} & node.keys()
        ):
            yield path
        for key, value in node.items():
            yield from without_upper_bound(value, f"{path}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from without_upper_bound(value, f"{path}.{number}")


@pytest.mark.parametrize("cls", [Recipe, Profile, DataIdentity, *ModelConfig.variants()])
def test_every_number_of_a_recipe_a_profile_and_an_identity_has_an_upper_bound(cls: type[Section]) -> None:
    """A new key without one would let a typing error, or a forged plan, ask for any size."""
    assert list(without_upper_bound(cls.model_json_schema(), cls.__name__)) == []


def test_a_number_without_bound_would_be_seen_wherever_it_stands() -> None:
    class Inner(Section):
        sizes: list[int] | None = None
        rates: dict[str, float] = {}
        bounded: Annotated[int, Field(lt=5)] | None = None
        version: Literal[1] = 1
        flag: bool = True

    class Outer(Section):
        inner: Inner
        choice: Literal["auto"] | PositiveInt = 1

    found = list(without_upper_bound(Outer.model_json_schema(), "Outer"))
    assert len(found) == 3 and sum("sizes" in path for path in found) == 1
    assert sum("rates" in path for path in found) == sum("choice" in path for path in found) == 1


class Bounded(Section):
    tiny: Annotated[float, Field(ge=1e-30)] = 1.0
    huge: Annotated[float, Field(le=1e12)] = 1.0
    small: Annotated[float, Field(gt=1e-6)] = 1.0
    share: Annotated[float, Field(le=0.999999)] = 0.5
    mebi: Annotated[float, Field(gt=2**-10, lt=2**20)] = 1.0
    count: Annotated[int, Field(le=2**63 - 1)] = 1


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tiny", 0.0, "found 0.0; allowed: greater than or equal to 1e-30"),
        ("huge", 1e13, "allowed: less than or equal to 1e12"),
        ("small", 0.0, "allowed: greater than 1e-6"),
        ("share", 1.0, "allowed: less than or equal to 0.999999"),
        ("mebi", 1e9, "allowed: less than 1048576"),
        ("mebi", 0.0, "allowed: greater than 0.0009765625"),
        ("count", 2**63, "allowed: less than or equal to 9223372036854775807"),
    ],
)
def test_a_bound_is_said_as_a_person_writes_it_and_exactly(key: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Bounded, {key: value}, "file", ConfigError)
    assert str(caught.value).startswith(f"file: {key}: ") and str(caught.value).endswith(words)


def test_the_bound_of_a_recipes_key_is_said_shortly() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.eps: found 0.0; allowed: .* 1e-30$"):
        load_recipe("digits-vit", ["optimizer.eps=0.0"])
