"""Writes a trained adapter: as a folder of peft's, or merged into the weights that it was trained beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem.blocks.arena import parameter_views
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.huggingface.model import ADAPTER, HuggingfaceLm

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_weights(frozen: FrozenRun) -> dict[str, Tensor]:
    """The adapter's matrices, by the names of here."""
    return parameter_views(frozen.shared_layout, frozen.stream.load_shared_result())


def peft_names(model: HuggingfaceLm, names: list[str]) -> dict[str, str]:
    """The names of peft's files, by the names of here."""
    family = model.family
    start = f"base_model.model.{family.body}.{family.layers}."
    return {name: start + name.removeprefix("layers.").replace(f".{ADAPTER}.", ".") for name in names}


def peft_config(frozen: FrozenRun, model: HuggingfaceLm) -> dict[str, Any]:
    """The content of adapter_config.json."""
    found = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config.to_dict().items()
    }
    path = getattr(frozen.plan.recipe.model, "path", "")
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return {**plain, "base_model_name_or_path": str(Path(path)), "inference_mode": True}


def merged(model: HuggingfaceLm, weights: dict[str, Tensor], adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with what their adapter adds to them, in fp32 and then as they are kept.

    What has no adapter stays as it is.
    """
    out = {}
    for name, weight in weights.items():
        owner = name.removesuffix(".base_layer.weight")
        first, second = (adapter.get(f"{owner}.lora_{matrix}.{ADAPTER}.weight") for matrix in "AB")
        if first is not None and second is not None:
            scale = model.peft_config.lora_alpha / model.peft_config.r
            added = scale * (second.float() @ first.float())
            weight = (weight.float() + (added.T if model.family.transposed else added)).to(weight.dtype)
        out[name] = weight
    return out
