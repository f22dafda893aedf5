"""Opens what a run needs beside its model: the stream of its blocks, and the borders between them.

Both follow the tiers that the plan settled. On CUDA this is also where torch's allocator is held to the
profile's budget, and where the ring of page-locked memory is made.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lowmem.blocks.arena import Arena, ArenaLayout, bind, parameter_views
from lowmem.blocks.borders import AwayBorders, Borders, NearBorders
from lowmem.blocks.run_dir import FileRecord, RunDir
from lowmem.blocks.staging import (
    RING_CHUNKS,
    Pace,
    Ring,
    lock_pages,
    probe_lockable_bytes,
    ring_bytes,
    unlock_pages,
)
from lowmem.blocks.store import DiskStore, HostStore
from lowmem.blocks.stream import BASE_KEY, SHARED_KEY, BlockStream, block_key
from lowmem.machine.detect import training_device
from lowmem.machine.monitor import NvmlReader, Sample
from lowmem.machine.profile import Profile
from lowmem.models.base import BlockModel
from lowmem.planning.plan import Plan
from lowmem.planning.settings import COMPUTE_DTYPE, base_layout_of, is_resident, layouts_of


def open_stream(
    run: RunDir,
    plan: Plan,
    model: BlockModel,
    files: dict[str, FileRecord],
    resident: bool = False,
    checked: bool = False,
) -> BlockStream:
    """Opens the run's blocks at the plan's tier; `resident`: with all of them on the device.

    `files`: the committed ones, by key; `checked`: see `DiskStore`. Raises ProfileError if this machine lacks
    the profile's device.
    """
    layouts, shared_layout = layouts_of(model, plan.settings)
    profile, device = plan.profile, training_device(plan.profile)
    ring, paces = _open_ring(plan, device, layouts), _paces(plan, profile.disk_rates)
    base = base_layout_of(model, plan.settings)
    disk = DiskStore(run, layouts_by_key(layouts, shared_layout, base), files, ring, paces, checked)
    in_ram = plan.settings.tier == "host" and not profile.unified
    return BlockStream(
        HostStore(disk) if in_ram else disk,
        layouts,
        shared_layout,
        device,
        resident or is_resident(plan.settings, profile.unified),
        plan.recipe.offload.prefetch,
    )


def open_borders(plan: Plan, model: BlockModel, device: torch.device, folder: Path) -> Borders:
    """Opens the borders of a streamed step at the plan's tier; those on disk lie in `folder`."""
    settings, recipe = plan.settings, plan.recipe
    shape = (
        len(model.units()),
        recipe.train.batch_size // settings.micro_batch_size,
        recipe.optimizer.clips_whole,
    )
    if settings.borders == "device" or (settings.borders == "host" and plan.profile.unified):
        return NearBorders(*shape)
    return AwayBorders(*shape, device, folder if settings.borders == "disk" else None)


def _open_ring(plan: Plan, device: torch.device, layouts: list[ArenaLayout]) -> Ring | None:
    """Makes the ring of page-locked memory; None if compute reads host memory itself."""
    if device.type != "cuda":
        return None
    cap_allocator(plan.profile)  # first, because the ring's CUDA streams already count as the run's
    wanted_bytes = ring_bytes(max(layout.total_bytes for layout in layouts))
    chunk_bytes = wanted_bytes // RING_CHUNKS
    allowed_bytes = min(wanted_bytes, plan.profile.pinned_max_bytes // chunk_bytes * chunk_bytes)
    lockable_bytes = probe_lockable_bytes(allowed_bytes, chunk_bytes) if allowed_bytes else 0
    return Ring(
        device, chunk_bytes, lockable_bytes, lock_pages, unlock_pages, _paces(plan, plan.profile.link_rates)
    )


def _paces(plan: Plan, rates: tuple[float | None, float | None]) -> tuple[Pace, Pace]:
    """`rates` in bytes per second, kept only where the recipe asks for it (`offload.pace`)."""
    return (Pace(rates[0]), Pace(rates[1])) if plan.recipe.offload.pace else (Pace(), Pace())


def cap_allocator(profile: Profile) -> None:
    """Limits torch's allocator to the profile's budget, if this card has more memory than that.

    The runtime's own share comes out of the budget too. It is what NVML counts for this process beyond
    torch's memory, or the profile's figure if that is larger: some kernels are loaded only later.
    """
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    if profile.device_budget_bytes >= total_bytes:
        return
    torch.zeros(1, device="cuda")  # loads the runtime, so that NVML sees it
    sample = Sample(host_bytes=0)
    NvmlReader().fill(sample)
    runtime_bytes = max(
        (sample.nvml_process_bytes or 0) - torch.cuda.memory_reserved(), profile.runtime_floor_bytes
    )
    torch.cuda.set_per_process_memory_fraction(
        max(profile.device_budget_bytes - runtime_bytes, 0) / total_bytes
    )


def layouts_by_key(
    layouts: list[ArenaLayout], shared_layout: ArenaLayout, base: ArenaLayout | None = None
) -> dict[str, ArenaLayout]:
    """Layouts by the keys that a store uses. `base`: see `BlockModel.adapted`."""
    blocks = {block_key(block): layout for block, layout in enumerate(layouts)}
    return {**blocks, SHARED_KEY: shared_layout, **({} if base is None else {BASE_KEY: base})}


def bind_base(stream: BlockStream, model: BlockModel, plan: Plan) -> ArenaLayout | None:
    """Makes the base's weights the model's, in the compute dtype. Returns its layout, where there is one."""
    layout = base_layout_of(model, plan.settings)
    if layout is not None:
        weights = Arena(layout, stream.load_whole(BASE_KEY, layout)).weights
        dtype = COMPUTE_DTYPE[plan.settings.precision]
        bind(model, parameter_views(layout, weights.to(dtype)), None)
    return layout
