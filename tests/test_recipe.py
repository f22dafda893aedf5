"""Recipes: what is refused, in which words, and what `--set` changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowmem.errors import ConfigError
from lowmem.recipe import Recipe, list_recipes, load_recipe, recipe_from_dict, recipe_name
from lowmem.schema import profiles_dir

RECIPE = """
schema: 1
method: diffusion_blocks
model: {name: vit, num_layers: 6, dim: 64, num_heads: 4, patch_size: 2}
blocks: {num_blocks: 3}
data: {name: digits}
train: {num_steps: 100, batch_size: 64, lr: 1.0e-3}
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def message(path: Path, *overrides: str) -> str:
    """The one line with which the recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert isinstance(caught.value, ValueError) and caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text
    return text


def test_every_packaged_recipe_loads_by_name_and_by_path() -> None:
    assert {"digits-vit", "digits-vit-end-to-end"} <= set(list_recipes())
    for name in list_recipes():
        assert load_recipe(name) == load_recipe(profiles_dir("recipes") / f"{name}.yaml")


def test_a_recipe_survives_its_own_dictionary(recipe_path: Path) -> None:
    recipe = load_recipe(recipe_path)
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())), "plan.json") == recipe
    assert (recipe.train.num_steps, recipe.train.micro_batch_size, recipe.blocks.visit_steps) == (
        100,
        "auto",
        50,
    )


def test_a_recipe_is_read_only(recipe_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_path).train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.num_step=5", ["unknown key 'train.num_step'", "did you mean 'num_steps'?"]),
        ("optimiser.name=adamw", ["unknown key 'optimiser'", "did you mean 'optimizer'?"]),
        ("model.num_layer=5", ["unknown key 'model.num_layer'", "did you mean 'num_layers'?"]),
        ("schemas=1", ["unknown key 'schemas'", "did you mean 'schema'?"]),
        ("model.name=vitt", ["model.name", "'vitt'", "did you mean 'vit'?"]),
        ("data.name=digit", ["data.name", "'digit'", "did you mean 'digits'?"]),
        ("optimizer.name=adam8bit", ["optimizer.name", "'adam8bit'", "did you mean 'adamw8bit'?"]),
        ("method=end2end", ["method", "'end2end'", "did you mean 'end_to_end'?"]),
        ("train.precision=float16", ["train.precision", "'float16'", "did you mean 'bfloat16'?"]),
        ("offload.tier=disc", ["offload.tier", "'disc'", "did you mean 'disk'?"]),
    ],
)
def test_an_unknown_key_or_name_is_refused_with_the_nearest_known_one(
    recipe_path: Path, override: str, words: list[str]
) -> None:
    text = message(recipe_path, override)
    assert all(word in text for word in ["recipe mine", *words]), text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.num_steps=1.5", ["train.num_steps", "1.5"]),
        ("train.num_steps=0", ["train.num_steps", "0"]),
        ("train.num_steps=true", ["train.num_steps", "True"]),
        ("train.lr=-0.1", ["train.lr", "-0.1"]),
        ("train.lr=.nan", ["train.lr", "nan"]),
        ("train.lr=", ["train.lr", "None"]),
        ("blocks.num_blocks=many", ["blocks.num_blocks", "'many'"]),
        ("blocks.overlap_gamma=1.0", ["blocks.overlap_gamma", "1.0"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "[0.9]"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas.1", "1.5"]),
        ("offload.prefetch=maybe", ["offload.prefetch", "'maybe'"]),
        ("train=7", ["train", "7"]),
        ("schema=2", ["schema", "2"]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_what_was_found_and_what_is_allowed(
    recipe_path: Path, override: str, words: list[str]
) -> None:
    text = message(recipe_path, override)
    assert all(word in text for word in [*words, "allowed: "]), text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.weights=bfloat16", "train.precision=float32"],
            ["train.weights: found bfloat16", "set train.precision: bfloat16"],
        ),
        (
            ["optimizer.during_backward=true"],
            ["optimizer.during_backward: found true", "grad_clip 1.0", "set optimizer.grad_clip: null"],
        ),
        (
            [
                "optimizer.during_backward=true",
                "optimizer.grad_clip=null",
                "train.batch_size=64",
                "train.micro_batch_size=16",
            ],
            [
                "optimizer.during_backward: found true",
                "micro_batch_size 16",
                "set train.micro_batch_size: 64",
            ],
        ),
    ],
)
def test_choices_that_exclude_each_other_are_refused_with_a_cure(
    recipe_path: Path, overrides: list[str], words: list[str]
) -> None:
    text = message(recipe_path, *overrides)
    assert all(word in text for word in [*words, "allowed with "]), text


def test_a_missing_key_is_named(recipe_path: Path) -> None:
    recipe_path.write_text(RECIPE.replace("num_steps: 100, ", "").replace("\nmethod: diffusion_blocks", ""))
    assert "key 'method' is missing" in message(recipe_path)
    assert "key 'train.num_steps' is missing" in message(recipe_path, "method=end_to_end")
    assert "key 'model.name' is missing" in message(
        recipe_path, "method=end_to_end", "train.num_steps=1", "model={num_layers: 6}"
    )


@pytest.mark.parametrize(
    ("text", "cure"), [("3e-4", "3.0e-4"), ("1e3", "1.0e+3"), ("1.5e3", "1.5e+3"), ("-2e-5", "-2.0e-5")]
)
def test_a_number_that_yaml_reads_as_text_is_refused_with_a_cure_that_works(
    recipe_path: Path, text: str, cure: str
) -> None:
    recipe_path.write_text(RECIPE.replace("1.0e-3", text))
    assert message(recipe_path) == message(recipe_path, f"train.lr={text}")
    assert f"'{text}'" in message(recipe_path) and message(recipe_path).endswith(f"write {cure}")
    assert yaml.safe_load(cure) == float(text)


def test_a_key_that_stands_twice_is_refused_with_its_line(recipe_path: Path) -> None:
    recipe_path.write_text(RECIPE + "blocks: {num_blocks: 2}\n")
    assert "key 'blocks' stands twice" in message(recipe_path) and "line 8" in message(recipe_path)
    recipe_path.write_text(RECIPE.replace("num_blocks: 3", "num_blocks: 3, num_blocks: 2"))
    assert "key 'num_blocks' stands twice" in message(recipe_path)


@pytest.mark.parametrize("content", ["", "- 1\n- 2\n", "a: [1\nb: 2\n", "\x00", "text"])
def test_a_file_that_is_not_a_mapping_is_refused_in_one_line(recipe_path: Path, content: str) -> None:
    recipe_path.write_text(content)
    assert "mine.yaml" in message(recipe_path)


def test_set_overrides_nested_keys_and_makes_sections(recipe_path: Path) -> None:
    recipe = load_recipe(
        recipe_path,
        [
            "blocks.num_blocks=6",
            "optimizer.betas=[0.8, 0.9]",
            "offload.tier=disk",
            "train.recompute=false",
            "train.lr=0.5",
        ],
    )
    assert (recipe.blocks.num_blocks, recipe.optimizer.betas, recipe.offload.tier) == (6, [0.8, 0.9], "disk")
    assert (recipe.train.recompute, recipe.train.lr, recipe.train.num_steps) == (False, 0.5, 100)
    assert load_recipe(recipe_path, ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("blocks.num_blocks", "allowed: key=value"),
        ("=6", "allowed: key=value"),
        ("", "allowed: key=value"),
        ("method.name=6", "'method' is a value, not a section"),
        ("train.lr=[1", "not a YAML value"),
        ("train.=1", "unknown key 'train.'"),
        (".lr=1", "unknown key"),
    ],
)
def test_a_bad_set_is_refused_in_one_line(recipe_path: Path, override: str, words: str) -> None:
    assert words in message(recipe_path, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["blocks.num_blocks=7"], ["blocks.num_blocks", "7", "model.num_layers = 6"]),
        (["train.micro_batch_size=24"], ["train.micro_batch_size", "24", "train.batch_size = 64"]),
        (["train.micro_batch_size=128"], ["train.micro_batch_size", "128", "train.batch_size = 64"]),
        (["train.warmup_steps=101"], ["train.warmup_steps", "101", "train.num_steps = 100"]),
        (["noise.sigma_min=80.0"], ["noise", "sigma_min 80.0", "sigma_max 80.0"]),
        (["noise.sigma_min=5.0", "noise.sigma_max=4.0"], ["noise", "sigma_min 5.0", "sigma_max 4.0"]),
        (["model.dim=68"], ["model", "dim 68", "num_heads 4"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_both_values(
    recipe_path: Path, overrides: list[str], words: list[str]
) -> None:
    text = message(recipe_path, *overrides)
    assert all(word in text for word in words), text


def test_the_borders_of_those_rules_are_allowed(recipe_path: Path) -> None:
    recipe = load_recipe(
        recipe_path, ["blocks.num_blocks=6", "train.micro_batch_size=64", "train.warmup_steps=100"]
    )
    assert isinstance(recipe, Recipe)


def test_an_unknown_recipe_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert "did you mean 'digits-vit'?" in message(Path("digits-vitt"))
    assert "no file" in message(tmp_path / "none.yaml")


def test_a_recipe_is_called_by_its_stem() -> None:
    assert [recipe_name(name) for name in ("digits-vit", "a/my.v2.yaml", Path("b.yml"))] == [
        "digits-vit",
        "my.v2",
        "b",
    ]
