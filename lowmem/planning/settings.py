"""What the plan settles of a recipe, and what a model's blocks then look like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from lowmem.blocks.arena import ArenaLayout
from lowmem.models.base import BlockModel, named_layer_parameters, named_shared_parameters
from lowmem.recipe import OptimizerName, Precision, Tier
from lowmem.schema import Section

COMPUTE_DTYPE: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Settings(Section):
    """Everything that a recipe may leave `auto`, settled."""

    num_blocks: int
    micro_batch_size: int
    precision: Precision
    weights: Precision = "float32"  # as they are kept
    recompute: bool
    optimizer: OptimizerName
    during_backward: bool = (
        False  # each parameter is updated, and its gradient freed, as soon as that is whole
    )
    ema: bool = False  # an average of the weights is kept
    tier: Tier
    borders: Tier = (
        "device"  # where activations at block borders rest, while a model trained end to end streams
    )
    write_back: Literal["beside", "wait"]


def layouts_of(model: BlockModel, settings: Settings) -> tuple[list[ArenaLayout], ArenaLayout]:
    """The arenas of the blocks, and of the shared part."""

    def layout(parameters: Iterable[tuple[str, nn.Parameter]]) -> ArenaLayout:
        return ArenaLayout(
            [(n, tuple(p.shape)) for n, p in parameters],
            settings.optimizer,
            settings.ema,
            COMPUTE_DTYPE[settings.weights],
        )

    blocks = [
        layout(named_layer_parameters(model, layers)) for layers in model.block_slices(settings.num_blocks)
    ]
    return blocks, layout(named_shared_parameters(model))


def is_resident(settings: Settings, unified: bool) -> bool:
    return settings.tier == "device" or (settings.tier == "host" and unified)
