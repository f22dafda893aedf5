"""Creates a run's first weights and writes them to its files, one block at a time: drawn, or given.

A module draws its weights with a seed of its own, so they do not depend on how layers are grouped into
blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lowmem.blocks.arena import Arena, aligned_buffer, bind, parameter_views, unbind
from lowmem.blocks.run_dir import BASE_KEY, SHARED_KEY, FileRecord, RunDir, block_key
from lowmem.blocks.store import DiskStore
from lowmem.models.base import BlockModel, GivenWeights
from lowmem.planning.plan import Plan
from lowmem.planning.settings import base_layout_of, layouts_of
from lowmem.schedule import mix_seed
from lowmem.training.open_run import layouts_by_key


def check_given(model: BlockModel) -> None:
    """Raises ConfigError where the weights that a model begins with do not fit it."""
    given = model.given_weights()
    if given is not None:
        given.check({name: tuple(p.shape) for name, p in model.named_parameters() if name in given})
        given.close()


def create_weights(run: RunDir, plan: Plan, model: BlockModel) -> dict[str, FileRecord]:
    """Writes the first file of every block and of the shared part, and returns their records.

    At most one of them is in memory at a time. Raises StoreError if a file cannot be written.
    """
    layouts, shared_layout = layouts_of(model, plan.settings)
    base = base_layout_of(model, plan.settings)
    store = DiskStore(run, layouts_by_key(layouts, shared_layout, base), {})
    # One buffer for all of them: a freed one may stay in the C library's heap. It is zero to begin with, and
    # what is never written of it, the optimizer's state, takes no memory. `_create` leaves it zero.
    buffer = aligned_buffer(max(layout.total_bytes for layout in store.layouts.values()))
    seed, given = plan.recipe.train.seed, model.given_weights()
    for block, layers in enumerate(model.block_slices(plan.settings.num_blocks)):
        modules = [(f"layers.{i}", model.layers[i]) for i in layers]
        _create(store, block_key(block), buffer, model, modules, seed, given)
    _create(store, SHARED_KEY, buffer, model, model.drawn_modules(), seed, given)
    if base is not None:
        others = [(name, module) for name, module in model.named_children() if name != "layers"]
        _create(store, BASE_KEY, buffer, model, others, seed, given)
    store.close()
    if given is not None:
        given.close()
    return store.files


def _create(
    store: DiskStore,
    key: str,
    buffer: Tensor,
    model: BlockModel,
    modules: list[tuple[str, nn.Module]],
    seed: int,
    given: GivenWeights | None,
) -> None:
    """Puts first weights into `buffer`, which is zero, writes them as the block `key`, and clears it again.

    They are those `given`, or the modules, by name, draw them.
    """
    layout = store.layouts[key]
    arena = Arena(layout, buffer)
    views = parameter_views(layout, arena.weights)
    with torch.no_grad():
        if given is not None:
            read = {name for name in views if name in given}
            for name in read:
                views[name].copy_(given.read(name))
            modules = [(name, module) for name, module in modules if not _is_given(name, views, read)]
        for name, module in modules:
            # Drawn in fp32 whatever the weights' dtype is, so that both start from the same values.
            drawn = {
                n: view.float() for n, view in views.items() if module is model or n.startswith(f"{name}.")
            }
            bind(model, drawn, None)
            torch.manual_seed(mix_seed(seed, "weights", name))
            owners = [module] if module is model else list(module.modules())
            for owner in reversed(owners):  # children first, so that a module may change what they drew
                if model.has_first_weights(owner):
                    model.draw_weights(owner)
            for n, value in drawn.items():
                views[n].copy_(value)
            unbind(model, layout)
    if "ema" in arena.state:
        arena.state["ema"].copy_(arena.weights)
    store.write(key, arena.buffer, 0)
    arena.weights.zero_()
    if "ema" in arena.state:
        arena.state["ema"].zero_()


def _is_given(module: str, views: Mapping[str, Tensor], read: Collection[str]) -> bool:
    """Whether no parameter of a module is left to be drawn."""
    return all(name in read for name in views if name.startswith(f"{module}."))
