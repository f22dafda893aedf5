"""TODO module docstring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.blocks.arena import Arena, aligned_buffer, bind, parameter_views, unbind
from lowmem.blocks.run_dir import FileRecord, RunDir
from lowmem.blocks.store import DiskStore
from lowmem.blocks.stream import block_key
from lowmem.models.base import BlockModel
from lowmem.planning.plan import Plan
from lowmem.planning.settings import layouts_of
from lowmem.schedule import mix_seed
from lowmem.training.open_run import layouts_by_key


def create_weights(run: RunDir, plan: Plan, model: BlockModel) -> dict[str, FileRecord]:
    """Writes every block's and the shared part's first file. At no time is more than one of them in memory.

    A layer's weights are a function of (seed, layer), whatever the number of blocks.
    """
    layouts, shared_layout = layouts_of(model, plan.settings)
    store = DiskStore(run, layouts_by_key(layouts, shared_layout), {})
    buffer = aligned_buffer(
        max(layout.total_bytes for layout in (*layouts, shared_layout))
    )  # one for all: freed ones stay in the C library's heap
    for block, layers in enumerate(model.block_slices(plan.settings.num_blocks)):
        _create(
            store,
            block_key(block),
            buffer,
            model,
            [(f"layers.{i}", model.layers[i]) for i in layers],
            plan.recipe.train.seed,
        )
    shared = [(name, module) for name, module in model.named_children() if name != "layers"]
    if hasattr(model, "reset_parameters"):
        shared.append(("model", model))  # parameters that the model owns itself; its layers' are on meta here
    _create(store, "shared", buffer, model, shared, plan.recipe.train.seed)
    store.close()
    return store.files


def _create(
    store: DiskStore,
    key: str,
    buffer: Tensor,
    model: BlockModel,
    modules: list[tuple[str, nn.Module]],
    seed: int,
) -> None:
    layout = store.layouts[key]
    arena = Arena(layout, buffer.zero_())
    views = parameter_views(layout, arena.weights)
    with torch.no_grad():
        for name, module in modules:
            drawn = {
                n: view.float() for n, view in views.items() if module is model or n.startswith(f"{name}.")
            }  # in fp32, however kept
            bind(model, drawn, None)
            torch.manual_seed(mix_seed(seed, "weights", name))
            owners = [module] if module is model else list(module.modules())
            for owner in reversed(owners):  # children first, so that a module may overrule them
                reset = getattr(owner, "reset_parameters", None)
                if reset is not None:
                    reset()
            for n, value in drawn.items():
                views[n].copy_(value)
            unbind(model, layout)
    if "ema" in arena.state:
        arena.state["ema"].copy_(arena.weights)
    store.write(key, arena.buffer, 0)
