"""A run's weights: made one block at a time, and opened as a stream of blocks for training or reading."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.arena import Arena, ArenaLayout, aligned_buffer, bind, parameter_views, unbind
from lowmem.footprint import is_resident, layouts_of, training_device
from lowmem.models.base import BlockModel
from lowmem.plan import Plan
from lowmem.run_dir import FileRecord, RunDir
from lowmem.schedule import mix_seed
from lowmem.store import DiskStore, HostStore
from lowmem.stream import BlockStream, block_key


def create_weights(run: RunDir, plan: Plan, model: BlockModel) -> dict[str, FileRecord]:
    """Writes every block's and the shared part's first file. At no time is more than one of them in memory.

    A layer's weights are a function of (seed, layer), whatever the number of blocks.
    """
    layouts, shared_layout = layouts_of(model, plan.settings)
    store = DiskStore(run, layouts_by_key(layouts, shared_layout), {})
    buffer = aligned_buffer(max(layout.total_bytes for layout in (*layouts, shared_layout)))  # one for all: freed ones stay in the C library's heap
    for block, layers in enumerate(model.block_slices(plan.settings.num_blocks)):
        _create(store, block_key(block), buffer, model, [(f"layers.{i}", model.layers[i]) for i in layers], plan.recipe.train.seed)
    shared = [(name, module) for name, module in model.named_children() if name != "layers"]
    if hasattr(model, "reset_parameters"):
        shared.append(("model", model))  # parameters that the model owns itself; its layers' are on meta here
    _create(store, "shared", buffer, model, shared, plan.recipe.train.seed)
    return store.files


def _create(store: DiskStore, key: str, buffer: Tensor, model: BlockModel, modules: list[tuple[str, nn.Module]], seed: int) -> None:
    layout = store.layouts[key]
    arena = Arena(layout, buffer.zero_())
    bind(model, parameter_views(layout, arena.weights), None)
    with torch.no_grad():
        for name, module in modules:
            torch.manual_seed(mix_seed(seed, "weights", name))
            owners = [module] if module is model else list(module.modules())
            for owner in reversed(owners):  # children first, so that a module may overrule them
                reset = getattr(owner, "reset_parameters", None)
                if reset is not None:
                    reset()
    unbind(model, layout)
    if "ema" in arena.state:
        arena.state["ema"].copy_(arena.weights)
    store.write(key, arena.buffer, 0)


def open_stream(run: RunDir, plan: Plan, model: BlockModel, files: dict[str, FileRecord], resident: bool = False) -> BlockStream:
    """The stream of a run's blocks at the tier that the plan settled, or with all of them on the device."""
    layouts, shared_layout = layouts_of(model, plan.settings)
    kind = HostStore if plan.settings.tier == "host" and not plan.profile.unified else DiskStore
    store = kind(run, layouts_by_key(layouts, shared_layout), files)
    resident = resident or is_resident(plan.settings, plan.profile.unified)
    device = training_device(plan.profile)
    return BlockStream(store, layouts, shared_layout, device, resident, plan.recipe.offload.prefetch, plan.profile.pinned_max_bytes)


def layouts_by_key(layouts: list[ArenaLayout], shared_layout: ArenaLayout) -> dict[str, ArenaLayout]:
    return {**{block_key(block): layout for block, layout in enumerate(layouts)}, "shared": shared_layout}
