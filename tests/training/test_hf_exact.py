"""Full fine-tuning of every family: streamed from disk, resident and a plain loop end with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import FAMILIES, make_folder
from hf_training import plain_loop, setting, trained, uncounted

from lowmem.errors import ConfigError
from lowmem.models.huggingface.model import HuggingfaceLm

uncounted_activations = pytest.fixture(autouse=True)(uncounted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_streamed_resident_and_a_plain_loop_of_the_library_end_with_the_same_bits(
    kind: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", kind)
    plan, resident = trained(tmp_path / "resident", folder, "device")
    _, streamed = trained(tmp_path / "streamed", folder, "disk")
    recipe, build = setting(folder, "disk")
    with torch.device("meta"):
        model = build()
    assert isinstance(model, HuggingfaceLm)
    theirs = plain_loop(folder, recipe, kind)
    names = model.file_names()
    assert {
        f"{theirs} {field}" for theirs in names.values() for field in ("weight", "exp_avg", "exp_avg_sq")
    } == set(theirs)
    for name, value in resident.items():
        ours, _, field = name.rpartition(" ")
        assert torch.equal(value, streamed[name]), name
        assert torch.equal(value, theirs[f"{names[ours]} {field}"]), name
    assert plan.settings.tier == "device"


def test_micro_batches_a_norm_over_the_model_and_chunks_of_logits_change_no_more_than_rounding(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path / "model", "qwen2")
    changes: dict[str, Any] = {"optimizer__grad_clip": 1.0, "optimizer__clip": "global"}
    _, whole = trained(tmp_path / "whole", folder, "device", **changes)
    changes["train__micro_batch_size"] = 1
    changes["model"] = {"name": "huggingface", "path": str(folder), "head_chunk": 7}
    _, parts = trained(tmp_path / "parts", folder, "disk", **changes)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=2e-3, atol=2e-4)


def test_with_chunks_of_logits_micro_batches_and_state_beside_the_layers_the_bits_are_the_resident_ones(
    tmp_path: Path,
) -> None:
    """bf16 weights and 8-bit moments of two tables."""
    folder = make_folder(tmp_path / "model", "llama", tie_word_embeddings=False, hidden_size=128)
    changes: dict[str, Any] = {
        "model": {"name": "huggingface", "path": str(folder), "head_chunk": 9},
        "train__micro_batch_size": 2,
        "train__precision": "bfloat16",
        "train__weights": "bfloat16",
        "optimizer__name": "adamw8bit",
        "optimizer__grad_clip": 0.5,
    }
    near, far = (
        trained(tmp_path / tier, folder, tier, **changes, **more)[1]
        for tier, more in (("device", {}), ("disk", {"offload__shared": "tier"}))
    )
    assert near.keys() == far.keys() and all(torch.equal(near[name], far[name]) for name in near)


def test_nothing_is_written_where_the_weights_do_not_fit(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ConfigError, match="missing; allowed: all"):
        trained(tmp_path / "run", folder, "disk")
    assert not (tmp_path / "run" / "plan.json").exists()
