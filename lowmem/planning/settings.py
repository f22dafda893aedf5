"""Defines the settled settings of a run, and what a model's blocks look like under them.

A recipe may leave settings `auto`; `Settings` holds what they became. `Setup` joins them with the recipe, the
machine and the arenas of the blocks: every prediction starts from a `Setup`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from lowmem.blocks.arena import FROZEN, ArenaLayout
from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import SHARED_KEY, block_key
from lowmem.blocks.stream import staging_bytes
from lowmem.blocks.unit import Unit
from lowmem.blocks.unit_stream import (
    UnitBytes,
    spread,
    spread_over,
    unit_bytes,
    updates_in_place,
)
from lowmem.machine.device import KINDS
from lowmem.machine.profile import Profile
from lowmem.models.base import (
    BlockModel,
    named_base_parameters,
    named_layer_parameters,
    named_shared_parameters,
    num_weights,
)
from lowmem.recipe import Frozen, Kept, OptimizerName, Precision, Recipe, Tier
from lowmem.schema import Section

# of the shared part in a round whose visits begin from the same one: what they begin from, what ranks send
# and receive, and the sum
ROUND_COPIES = 4
COMPUTE_DTYPE: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Settings(Section):
    """Everything that a recipe may leave `auto`, settled."""

    num_blocks: int
    # layers (units, see `BlockModel.units`) that stay on the device whole while the others stream; in sweeps
    # blocks
    resident_layers: int = 0
    resident_weights: int = 0  # more layers, whose weights alone stay
    micro_batch_size: int
    precision: Precision  # of compute and gradients
    weights: Kept = "float32"  # of the weights as they are kept
    frozen: Frozen | None = None  # how frozen weights are kept, where an adapter is trained
    recompute: bool
    optimizer: OptimizerName
    # each parameter is updated, and its gradient freed, as soon as the gradient is whole
    during_backward: bool = False
    ema: bool = False  # an average of the weights is kept
    # The visits of a round begin from the same shared part (blocks.order: together). It then keeps AdamW's
    # moments in fp32, because a round ends with their mean.
    in_rounds: bool = False
    tier: Tier  # where blocks rest that are not visited
    # where activations at block borders rest, while a model trained end to end streams
    borders: Tier = "device"
    # where the shared part's masters and moments rest in that case: on the device, or with the blocks
    shared: Literal["device", "tier"] = "device"
    update_chunk: int | None = None  # weights that the update of a unit moves at once; None: as usual
    write_back: Literal["beside", "wait"]


def layouts_of(model: BlockModel, settings: Settings) -> tuple[list[ArenaLayout], ArenaLayout]:
    """The arenas of the blocks, and the arena of the shared part."""

    frozen = settings.frozen is not None
    blocks = [
        _layout(model, named_layer_parameters(model, layers), settings, frozen)
        for layers in model.block_slices(settings.num_blocks)
    ]
    return blocks, _layout(model, named_shared_parameters(model), settings, shared=True)


def base_layout_of(model: BlockModel, settings: Settings) -> ArenaLayout | None:
    """The arena of the base (see `BlockModel.adapted`), where there is one."""
    parameters = list(named_base_parameters(model))
    return _layout(model, parameters, settings, frozen=True) if parameters else None


def _layout(
    model: BlockModel,
    parameters: Iterable[tuple[str, nn.Parameter]],
    settings: Settings,
    frozen: bool = False,
    shared: bool = False,
) -> ArenaLayout:
    shapes = [(name, tuple(parameter.shape)) for name, parameter in parameters]
    if not frozen:
        # Tables and read-outs are matrices too, but Muon is not for them.
        plain = shared and (settings.optimizer == "muon" or settings.in_rounds)
        optimizer = "adamw" if plain else settings.optimizer
        return ArenaLayout(shapes, optimizer, settings.ema, COMPUTE_DTYPE[settings.weights])
    return frozen_layout(model, shapes, frozen_dtype(settings))


def frozen_dtype(settings: Settings) -> torch.dtype:
    """The dtype of frozen weights that are not quantised."""
    assert settings.frozen is not None
    if settings.frozen == "int8" or settings.frozen == "nf4":
        return COMPUTE_DTYPE[settings.precision]
    return COMPUTE_DTYPE[settings.frozen]


def frozen_layout(
    model: BlockModel, shapes: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> ArenaLayout:
    """Of parameters that are only read, in `dtype`, except for those that the model packs."""
    packed = {name: found for name, _ in shapes if (found := model.packed(name)) is not None}
    if not packed:
        return ArenaLayout(shapes, FROZEN, False, dtype)
    dtypes = {name: packed[name].dtype if name in packed else dtype for name, _ in shapes}
    return ArenaLayout(shapes, FROZEN, False, torch.uint8, dtypes)


def units_of(
    model: BlockModel,
    settings: Settings,
    layouts: Sequence[ArenaLayout],
    device_kind: str,
    frozen: bool = False,
) -> list[Unit]:
    """The model's units, in order. `layouts`: of the blocks. `frozen`: to evaluate what is trained."""
    averaged = frozen and settings.ema and settings.frozen is None
    computes, units = "ema" if averaged else "weights", []
    for block, layers in enumerate(model.block_slices(settings.num_blocks)):
        for run in model.units():
            if run.start in layers:
                names = {name for name, _ in named_layer_parameters(model, run)}
                chunk = settings.update_chunk
                units.append(Unit(block_key(block), layouts[block], names, device_kind, computes, chunk))
    return units


def shared_unit(layout: ArenaLayout, settings: Settings, device_kind: str) -> Unit:
    """The shared part as a unit that comes in chunks to be updated."""
    names = {slot.name for slot in layout.slots}
    return Unit(SHARED_KEY, layout, names, device_kind, chunk_numel=settings.update_chunk)


def is_resident(settings: Settings, unified: bool) -> bool:
    """Whether all blocks stay on the device. `unified`: device and host are one memory."""
    return settings.tier == "device" or (settings.tier == "host" and unified)


def file_bytes(layouts: Sequence[ArenaLayout]) -> int:
    """Bytes of the files that hold these arenas."""
    return sum(layout.total_bytes + layout.header_bytes for layout in layouts)


@dataclass(frozen=True)
class Setup:
    """A recipe's model under given settings on a given machine."""

    recipe: Recipe
    profile: Profile
    settings: Settings
    layouts: list[ArenaLayout]  # one for each block
    shared: ArenaLayout
    units: list[Unit]  # what moves where the model streams
    base: ArenaLayout | None = None  # frozen, and on the device all along
    layer_weights: int = 0  # of all layers, in number
    alone: bool = False  # the first block is the whole model, before it grows (blocks.grow_at)
    lowest: int = 0  # the first unit that a backward pass comes to

    @property
    def frozen(self) -> bool:
        """Whether blocks are only read."""
        return self.settings.frozen is not None

    @property
    def updated(self) -> list[ArenaLayout]:
        """The arenas that a step of all blocks updates, and a commit writes."""
        return [self.shared] if self.frozen else [*self.layouts, self.shared]

    @property
    def stay(self) -> frozenset[int]:
        """The units, or blocks in sweeps, that stay on the device while others stream."""
        count = self.num_pieces if self.swept and self.resident else self.settings.resident_layers
        return spread(self.num_pieces, count)

    @property
    def held(self) -> frozenset[int]:
        """The units whose weights alone stay."""
        return spread_over(self.num_pieces, self.stay, self.settings.resident_weights)

    @functools.cached_property
    def resting(self) -> Unit | None:
        """The shared part, where its masters and moments rest with the blocks."""
        rests = self.settings.shared == "tier"
        return shared_unit(self.shared, self.settings, self.profile.device.type) if rests else None

    @property
    def before_growth(self) -> Setup:
        """The same with the first block alone."""
        return replace(self, layouts=self.layouts[:1], units=[], alone=True)

    @property
    def in_place(self) -> bool:
        """Whether weights of units are updated where the backward pass has left them."""
        updated = self.by_unit and not self.frozen
        return updated and updates_in_place(self.units, self.recipe.optimizer.grad_clip)

    @functools.cached_property
    def unit_bytes(self) -> UnitBytes:
        """What the stream of units takes on the device."""
        prefetch = self.recipe.offload.prefetch
        updates = not self.frozen
        return unit_bytes(self.units, self.stay, prefetch, updates, self.in_place, self.resting, self.held)

    @property
    def swept(self) -> bool:
        """Whether blocks make several steps each time they come, of a model that is trained end to end."""
        return self.recipe.blocks.sweep_steps > 1 and not self.alone

    @property
    def num_pieces(self) -> int:
        """How many pieces a model that streams moves in: units, or blocks in sweeps."""
        return len(self.layouts) if self.swept else len(self.units)

    @property
    def end_to_end(self) -> bool:
        return self.recipe.method == "end_to_end"

    @property
    def coordinate(self) -> bool:
        """Whether blocks are trained in turn by the loss of the whole model."""
        return self.recipe.method == "block_coordinate"

    @property
    def whole(self) -> bool:
        """Whether the loss is that of the whole model."""
        return self.recipe.whole

    @property
    def queue(self) -> BlockQueue:
        return BlockQueue.of(self.recipe.to_dict(), self.settings.num_blocks)

    @property
    def resident(self) -> bool:
        return self.alone or is_resident(self.settings, self.profile.unified)

    @property
    def together(self) -> bool:
        """Whether all blocks are on the device and are trained at once."""
        return self.end_to_end and self.resident and not self.swept

    @property
    def streams(self) -> bool:
        """Whether blocks come and go within each step, because its loss is that of all of them."""
        return self.whole and not self.resident

    @property
    def by_unit(self) -> bool:
        """Whether it streams unit by unit, in every step, and each unit is updated."""
        return self.streams and not self.swept and not self.coordinate

    @property
    def two_passes(self) -> bool:
        """Whether a streamed step runs backward twice, first for the norm of the whole gradient."""
        return self.recipe.optimizer.clips_whole

    @property
    def snapshot_bytes(self) -> int:
        """Of the copy of the shared part that a commit writes while training goes on."""
        beside = self.settings.write_back == "beside" and self.queue.num_visits > 1  # the last commit waits
        needed = beside or KINDS[self.profile.device.type].copies
        return self.shared.total_bytes if needed and self.resting is None else 0

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a step has."""
        return self.recipe.train.batch_size // self.settings.micro_batch_size

    @property
    def under_way(self) -> int:
        """How many micro-batches are under way at once where the model passes in pieces."""
        return self.recipe.blocks.sweep_steps * self.micro_batches

    @property
    def visited(self) -> list[ArenaLayout]:
        """The arenas that are trained at once; of blocks that take turns, the largest."""
        return self.layouts if self.together else [max(self.layouts, key=lambda layout: layout.total_bytes)]

    @property
    def on_device(self) -> list[ArenaLayout]:
        """The blocks' arenas that are on the device during a visit, without what is staged."""
        if self.resident or not self.swept:
            return self.layouts if self.resident else self.visited
        return [*(self.layouts[block] for block in sorted(self.stay)), *self.moving[:1]]

    @property
    def staged_bytes(self) -> tuple[int, int]:
        """Bytes of (device, host) that moving whole blocks takes beside the block in compute."""
        moving = self.moving if self.swept else self.layouts
        return staging_bytes(
            max((layout.total_bytes for layout in moving), default=0),
            self.resident or not moving,
            self.recipe.offload.prefetch,
            copied=KINDS[self.profile.device.type].copies,
            num_blocks=len(moving),
            shared_bytes=self.shared.total_bytes,
        )

    @property
    def moving(self) -> list[ArenaLayout]:
        """The arenas of blocks that do not stay in sweeps, the largest first."""
        moving = [layout for block, layout in enumerate(self.layouts) if block not in self.stay]
        return sorted(moving, key=lambda layout: -layout.total_bytes)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a weight or a gradient in the compute dtype."""
        return COMPUTE_DTYPE[self.settings.precision].itemsize

    @property
    def copy_bytes(self) -> int:
        """Bytes per weight of the copy that computes; 0 where the kept weights compute themselves."""
        return 0 if self.settings.weights == self.settings.precision else self.compute_bytes

    @property
    def block_copy_bytes(self) -> int:
        """The same of the blocks' weights, and of the base's."""
        if self.settings.frozen is None:
            return self.copy_bytes
        return (
            0 if frozen_dtype(self.settings) == COMPUTE_DTYPE[self.settings.precision] else self.compute_bytes
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes per weight of gradients that live until the update; 0 where updates run during backward."""
        return 0 if self.settings.during_backward else self.compute_bytes


def shared_bytes(setup: Setup) -> int:
    """What the shared part takes on the device while a model is trained."""
    shared = setup.shared
    if setup.resting is not None:  # weights and gradients alone
        return (setup.compute_bytes + setup.gradient_bytes) * shared.numel
    copies = 1 + ROUND_COPIES * setup.settings.in_rounds
    return shared.total_bytes * copies + (setup.gradient_bytes + setup.copy_bytes) * shared.numel


def setup_of(model: BlockModel, recipe: Recipe, profile: Profile, settings: Settings) -> Setup:
    layouts, shared = layouts_of(model, settings)
    units, base = units_of(model, settings, layouts, profile.device.type), base_layout_of(model, settings)
    weights = num_weights(model, named_layer_parameters(model, range(len(model.layers))))
    lowest = min(sum(run.stop <= model.first_trained for run in model.units()), len(units) - 1)
    return Setup(recipe, profile, settings, layouts, shared, units, base, weights, lowest=lowest)
