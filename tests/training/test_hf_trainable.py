"""Some of a decoder's weights are trained, as a plain loop does; others are read and never written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import make_folder
from hf_training import plain_loop, setting, trained, uncounted

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError
from lowmem.finetuning import finetune_recipe
from lowmem.models.huggingface.model import HuggingfaceLm
from lowmem.training.streamed_step import StreamedStep

uncounted_activations = pytest.fixture(autouse=True)(uncounted)


def changes(folder: Path, what: int | str) -> dict[str, Any]:
    return {
        "model": {"name": "huggingface", "path": str(folder), "trainable": what},
        "blocks": {"num_blocks": 2, "visit_steps": 5},
    }


@pytest.mark.parametrize(("kind", "what"), [("llama", 1), ("llama", "head"), ("qwen2", 2)])
def test_trained_parts_end_with_the_bits_of_a_plain_loop_and_frozen_ones_stay(
    kind: str, what: int | str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", kind)
    change = changes(folder, what) if what != 2 else {**changes(folder, what), "blocks": {"num_blocks": 1}}
    _, resident = trained(tmp_path / "resident", folder, "device", **change)
    same = dict[str, torch.Tensor]()
    recipe, build = setting(folder, "disk", **change)
    with torch.device("meta"):
        model = build()
    assert isinstance(model, HuggingfaceLm)
    names = model.file_names()
    chosen = {names[name] for name in names if model.is_adapter(name)}
    last = {"head": 0}.get(str(what), what)
    assert isinstance(last, int)
    ends = tuple(f"model.layers.{index}." for index in range(3 - last, 3))
    head = "model.embed_tokens.weight" if kind == "qwen2" else "lm_head.weight"
    assert chosen == {n for n in names.values() if n.startswith(ends) or n in (head, "model.norm.weight")}
    theirs = plain_loop(folder, recipe, kind, chosen.__contains__)
    for name, value in resident.items():
        ours, _, field = name.rpartition(" ")
        same[f"{names[ours]} {field}"] = value
    assert same.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in same.items())
    if what != 2:  # a single block cannot stream
        _, streamed = trained(tmp_path / "streamed", folder, "disk", **change)
        assert all(torch.equal(value, streamed[name]) for name, value in resident.items())
        state = RunDir(tmp_path / "streamed").read_state()
        assert state is not None
        assert {key: record.name.split(".")[1] for key, record in state.files.items()} == {
            "block-0": "000000",
            "block-1": "000000",
            "base": "000000",
            "shared": "000002",
        }


def test_no_backward_pass_is_made_below_the_first_trained_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, units = make_folder(tmp_path / "model", "llama"), list[int]()
    backward = StreamedStep._backward

    def seen(self: StreamedStep, unit: int, *rest: Any) -> None:
        units.append(unit)
        backward(self, unit, *rest)

    monkeypatch.setattr(StreamedStep, "_backward", seen)
    trained(tmp_path / "run", folder, "disk", **changes(folder, 1))
    assert set(units) == {2}


@pytest.mark.parametrize(("what", "adapter"), [(3, None), ("head", {"name": "lora"})])
def test_parts_that_cannot_be_chosen_are_refused(
    what: int | str, adapter: dict[str, str] | None, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    given = {} if adapter is None else {"adapter": adapter}
    with pytest.raises(ConfigError, match=rf"model.trainable: found {what}; allowed"):
        setting(folder, "disk", **changes(folder, what), **given)[1]()


def test_a_folders_recipe_has_a_block_for_each_frozen_layer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    assert finetune_recipe(folder, overrides=["model.trainable=2"]).blocks.num_blocks == 1
    assert finetune_recipe(folder, overrides=["model.trainable=head"]).blocks.num_blocks == 3
