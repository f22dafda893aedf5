"""The registry of architectures: a new one is its own file and one line, and then works everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import as_overrides

from lowmem import recipe
from lowmem.errors import ConfigError
from lowmem.inference.evaluate import evaluate_run
from lowmem.inference.export import export_run
from lowmem.inference.generate import sample_run
from lowmem.job import plan_recipe, train
from lowmem.recipe import ARCHITECTURES, load_recipe
from lowmem.reporting.report import read_report


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The one line."""
    monkeypatch.setitem(ARCHITECTURES, "toy", "toy_architecture:ToyModel")
    return {"name": "toy", "num_layers": 4, "width": 32}


def settings(model: dict[str, Any], **changes: Any) -> list[str]:
    keys = ", ".join(f"{key}: {value}" for key, value in model.items())
    return [f"model={{{keys}}}", *as_overrides(blocks__num_blocks=2, train__num_steps=30, **changes)]


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_a_sixth_architecture_is_its_own_file_and_one_line(
    tmp_path: Path, toy: dict[str, Any], method: str
) -> None:
    name = "digits-vit" if method == "diffusion_blocks" else "digits-vit-end-to-end"
    folder = train(name, "cpu-4gib", tmp_path / "run", settings(toy, offload__tier="disk"))
    content = read_report(folder).content
    assert content["recipe"]["model"] == toy, "every key of its section is kept in the run folder"
    assert content["progress"]["visits_done"] == content["progress"]["visits_total"]
    assert content["metrics"]["metric"] == "accuracy" and content["metrics"]["value"] > 0.2
    assert evaluate_run(folder) == content["metrics"]
    assert (export_run(folder, tmp_path / "out") / "model.safetensors.index.json").exists()
    with pytest.raises(ConfigError, match="'toy' makes no samples"):
        sample_run(folder)


def test_its_keys_are_checked_like_those_of_the_others(toy: dict[str, Any]) -> None:
    refused = {
        "model.wdth=3": r"unknown key 'model.wdth'; did you mean 'width'\? known: name, num_layers, width",
        "model.width=0": r"model.width: found 0; allowed: greater than 0",
        "model.width=1": r"model.width: found 1; allowed: at least 2; raise it",
        "model.name=tyo": r"model.name: unknown name 'tyo'; did you mean 'toy'\?",
    }
    for change, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            load_recipe("digits-vit", [*settings(toy), change])
    assert plan_recipe("digits-vit", "cpu-4gib", settings(toy)).recipe.model.name == "toy"


def test_every_registered_section_says_its_own_name() -> None:
    for name in ARCHITECTURES:
        section = recipe._section_of(name)
        assert section.model_fields["name"].annotation is not None
        assert name in str(section.model_fields["name"].annotation), name


def test_only_the_architecture_that_a_recipe_names_is_loaded_and_only_when_it_is_built() -> None:
    lines = [
        "import sys",
        "from lowmem.recipe import load_recipe",
        "recipe = load_recipe('digits-vit')",
        "assert 'torch' not in sys.modules",
        "from lowmem.data.datasets import describe_data",
        "from lowmem.models import model_builder",
        "model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))",
        "loaded = {name for name in sys.modules if name.startswith('lowmem.models.')}",
        "assert 'lowmem.models.vit' in loaded and 'lowmem.models.causal_lm' not in loaded, loaded",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
