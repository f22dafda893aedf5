"""Recipes: what is refused, in which words, and what `--set` changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowmem.errors import ConfigError, ProfileError
from lowmem.machine.profile import load_profile
from lowmem.recipe import Recipe, list_recipes, load_recipe, recipe_from_dict, recipe_name
from lowmem.schema import profiles_dir, yaml_text, yaml_value

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
        ("train.precision=float6", ["train.precision", "'float6'", "did you mean 'float16'?"]),
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


@pytest.mark.parametrize("text", ["3e-4", "1E-3", "1.5e-3", "2.e-2", ".5e-1", "1e0", "1.0e-3"])
def test_numbers_with_an_exponent_are_numbers_as_everywhere_else(recipe_path: Path, text: str) -> None:
    recipe_path.write_text(RECIPE.replace("1.0e-3", text))
    assert load_recipe(recipe_path).train.lr == float(text)
    assert load_recipe("digits-vit", [f"train.lr={text}"]).train.lr == float(text)


@pytest.mark.parametrize(("key", "text", "cure"), [("lr", "'3e-4'", "3.0e-4"), ("seed", "1e3", "1000")])
def test_a_number_in_quotes_or_of_another_type_is_refused_with_a_cure_that_works(
    recipe_path: Path, key: str, text: str, cure: str
) -> None:
    said = message(recipe_path, f"train.{key}={text}")
    assert f"train.{key}" in said and f" {cure}" in said
    assert getattr(load_recipe(recipe_path, [f"train.{key}={cure}"]).train, key) == float(cure)


def test_what_is_written_as_yaml_is_read_as_it_was() -> None:
    value = {
        "text": "3e-4",
        "word": "name",
        "small": 1e-5,
        "whole": 3,
        "none": None,
        "flag": True,
        "no": "no",
    }
    assert yaml_value(yaml_text(value)) == value


def test_the_warm_up_keeps_its_share_of_a_run_that_is_shorter_than_it() -> None:
    def warmup(*overrides: str) -> int:
        return load_recipe("digits-vit", overrides).train.warmup_steps  # 50 of 1500

    assert warmup("train.num_steps=30") == 1 and warmup("train.num_steps=20") == 0
    assert warmup("train.num_steps=50") == warmup("train.num_steps=3000") == 50
    assert warmup("train.num_steps=60", "train.warmup_steps=40") == 40
    with pytest.raises(ConfigError, match="allowed: at most train.num_steps = 30"):
        warmup("train.num_steps=30", "train.warmup_steps=50")


def test_home_and_variables_in_paths_are_written_out(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", "pictures")
    wanted = str(tmp_path / "pictures")
    data = "{name: idx_images, path: ~/$PICTURES}"
    assert load_recipe(recipe_path, [f"data={data}"]).data.path == wanted  # type: ignore[union-attr]
    braced = "{name: idx_images, path: '~/${PICTURES}'}"
    recipe_path.write_text(RECIPE.replace("{name: digits}", braced))
    assert load_recipe(recipe_path).data.path == wanted  # type: ignore[union-attr]
    assert load_recipe(f"~/{recipe_path.relative_to(tmp_path)}").train.num_steps == 100
    assert "no variable 'NOWHERE'" in message(recipe_path, "data.path=$NOWHERE/x")
    assert "no user has that home" in message(recipe_path, "data.path=~nobody-of-that-name/x")


def test_a_file_that_is_named_as_a_variable_is_that_file(
    recipe_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$b").mkdir()
    recipe = load_recipe(recipe_path, ["data={name: idx_images, path: a$b}"])
    assert recipe.data.path == "a$b"  # type: ignore[union-attr]


def test_the_paths_of_a_stranger_s_run_are_not_written_out(recipe_path: Path) -> None:
    raw = {**load_recipe(recipe_path).to_dict(), "data": {"name": "idx_images", "path": "~/$HOME"}}
    assert recipe_from_dict(raw, "plan").data.path == "~/$HOME"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("recipe", "path", "name"),
    [
        ("digits-vit", "notes.txt", "text"),
        ("fashion-vit", "notes.txt", "text"),
        ("stdlib-causal", "chat.jsonl", "chat"),
        ("stdlib-causal", "pictures", "image_folder"),
    ],
)
def test_a_path_without_its_kind_of_data_says_to_set_the_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str, path: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ConfigError, match=f"set data.name too, as in --set data.name={name}; allowed"):
        load_recipe(recipe, [f"data.path={path}"])
    load_recipe("fashion-vit", ["data.path=pictures"])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rtx-4060", "rtx-4060-laptop-8gb"),
        ("rtx4060", "rtx-4060-laptop-8gb"),
        ("RTX 4060", "rtx-4060-laptop-8gb"),
        ("geforce-4090", "rtx-4090-24gb"),
        ("wsl", "wsl2-rtx-4060-laptop-8gb"),
        ("cpu-4gb", "cpu-4gib"),
    ],
)
def test_a_machine_is_meant_by_the_beginning_of_its_name_or_its_number(name: str, meant: str) -> None:
    with pytest.raises(ProfileError, match=f"did you mean '{meant}'"):
        load_profile(name)


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
    assert "no file 'notes.txt'" in message(Path("notes.txt"))  # no name has an ending


def test_a_recipe_is_called_by_its_stem() -> None:
    assert [recipe_name(name) for name in ("digits-vit", "a/my.v2.yaml", Path("b.yml"))] == [
        "digits-vit",
        "my.v2",
        "b",
    ]
