"""What the plan settles of a recipe, and what a model's blocks then look like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from lowmem.arena import ArenaLayout
from lowmem.config import OptimizerName, Precision, Tier
from lowmem.errors import ConfigError, ProfileError
from lowmem.hardware import Profile
from lowmem.models.base import BlockModel, named_layer_parameters, named_shared_parameters
from lowmem.strict import Section

COMPUTE_DTYPE: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Settings(Section):
    """Everything that a recipe may leave `auto`, settled."""

    num_blocks: int
    micro_batch_size: int
    precision: Precision
    weights: Precision = "float32"  # as they are kept
    recompute: bool
    optimizer: OptimizerName
    during_backward: bool = False  # each parameter is updated, and its gradient freed, as soon as that is whole
    ema: bool = False  # an average of the weights is kept
    tier: Tier
    borders: Tier = "device"  # where activations at block borders rest, while a model trained end to end streams
    write_back: Literal["beside", "wait"]


def check_model(model: BlockModel) -> None:
    """Raises ConfigError for a model that cannot be given weights block by block."""
    if not len(model.layers):
        raise ConfigError("build_model: the model has no layers; put its residual layers in `layers`, an nn.ModuleList")
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not hasattr(module, "reset_parameters"):
            raise ConfigError(f"build_model: module '{name}' ({type(module).__name__}) owns parameters but has no reset_parameters(); add one")
    for name, buffer in model.named_buffers():
        raise ConfigError(f"build_model: buffer '{name}' {tuple(buffer.shape)} would not stream with its block; compute it, or make it a parameter")


def layouts_of(model: BlockModel, settings: Settings) -> tuple[list[ArenaLayout], ArenaLayout]:
    """The arenas of the blocks, and of the shared part."""

    def layout(parameters: Iterable[tuple[str, nn.Parameter]]) -> ArenaLayout:
        return ArenaLayout([(n, tuple(p.shape)) for n, p in parameters], settings.optimizer, settings.ema, COMPUTE_DTYPE[settings.weights])

    blocks = [layout(named_layer_parameters(model, layers)) for layers in model.block_slices(settings.num_blocks)]
    return blocks, layout(named_shared_parameters(model))


def training_device(profile: Profile) -> torch.device:
    """The device to train on. Raises ProfileError if this machine has none of the profile's type."""
    kind = profile.device.type
    if kind == "mps":
        raise ProfileError(f"profile {profile.name}: training on device type 'mps' is not supported; use a cpu profile on this machine")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ProfileError(
            f"profile {profile.name}: needs a CUDA device and none is found here; use --dry-run, or a cpu profile (`lowmem profiles` lists them)"
        )
    return torch.device(kind)


def is_resident(settings: Settings, unified: bool) -> bool:
    return settings.tier == "device" or (settings.tier == "host" and unified)
