"""Weights leave a run as files that plain safetensors and torch read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem.data.datasets import describe_data
from lowmem.errors import ConfigError, ResumeError
from lowmem.inference.export import export_run
from lowmem.inference.generate import open_run
from lowmem.models import model_builder
from lowmem.recipe import recipe_from_dict


def test_exported_weights_load_into_the_model_and_are_those_of_the_last_commit(
    trained: Path, tmp_path: Path
) -> None:
    folder = export_run(trained, tmp_path / "weights")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {
        name: tensor
        for file in sorted(set(index["weight_map"].values()))
        for name, tensor in load_file(folder / file).items()
    }
    assert tensors.keys() == index["weight_map"].keys()
    recipe = recipe_from_dict(json.loads((folder / "recipe.json").read_text()), "exported")
    model = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))()
    model.load_state_dict(tensors)
    with open_run(trained) as frozen:
        for _, layers in frozen.walk([1]):
            ours = {
                name: parameter.clone() for layer in layers for name, parameter in layer.named_parameters()
            }
    assert all(
        torch.equal(value, dict(model.layers[3].named_parameters())[name]) for name, value in ours.items()
    )
    assert len(list(folder.glob("*.safetensors"))) == 4


def test_a_folder_that_is_there_and_one_that_is_no_run_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File exists; it is left as it is"):
        export_run(trained, tmp_path)
    with pytest.raises(ResumeError):
        export_run(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
