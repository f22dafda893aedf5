"""A run's weights: made one block at a time, and opened as a stream of blocks for training or reading."""

from __future__ import annotations

from pathlib import Path

import torch

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.borders import AwayBorders, Borders
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
from lowmem.blocks.stream import BlockStream, block_key
from lowmem.machine.detect import training_device
from lowmem.machine.monitor import NvmlReader, Sample
from lowmem.machine.profile import Profile
from lowmem.models.base import BlockModel
from lowmem.planning.plan import Plan
from lowmem.planning.settings import is_resident, layouts_of


def open_stream(
    run: RunDir, plan: Plan, model: BlockModel, files: dict[str, FileRecord], resident: bool = False
) -> BlockStream:
    """The stream of a run's blocks at the tier that the plan settled, or with all of them on the device."""
    layouts, shared_layout = layouts_of(model, plan.settings)
    profile, device = plan.profile, training_device(plan.profile)
    kind = HostStore if plan.settings.tier == "host" and not profile.unified else DiskStore
    store = kind(
        run,
        layouts_by_key(layouts, shared_layout),
        files,
        _open_ring(plan, device, layouts),
        _paces(plan, profile.disk_rates),
    )
    return BlockStream(
        store,
        layouts,
        shared_layout,
        device,
        resident or is_resident(plan.settings, profile.unified),
        plan.recipe.offload.prefetch,
    )


def open_borders(plan: Plan, device: torch.device, folder: Path) -> Borders:
    """Where a streamed step keeps activations, as the plan settled it."""
    settings, recipe = plan.settings, plan.recipe
    shape = (
        settings.num_blocks,
        recipe.train.batch_size // settings.micro_batch_size,
        recipe.optimizer.clips_whole,
    )
    if settings.borders == "device" or (settings.borders == "host" and plan.profile.unified):
        return Borders(*shape)
    return AwayBorders(*shape, device, folder if settings.borders == "disk" else None)


def _open_ring(plan: Plan, device: torch.device, layouts: list[ArenaLayout]) -> Ring | None:
    """None where compute reads host memory.

    Caps the allocator first: the ring's streams are a part of the run.
    """
    if device.type != "cuda":
        return None
    cap_allocator(plan.profile)
    wanted_bytes = ring_bytes(max(layout.total_bytes for layout in layouts))
    chunk_bytes = wanted_bytes // RING_CHUNKS
    allowed_bytes = min(wanted_bytes, plan.profile.pinned_max_bytes // chunk_bytes * chunk_bytes)
    lockable_bytes = probe_lockable_bytes(allowed_bytes, chunk_bytes) if allowed_bytes else 0
    return Ring(
        device, chunk_bytes, lockable_bytes, lock_pages, unlock_pages, _paces(plan, plan.profile.link_rates)
    )


def _paces(plan: Plan, rates: tuple[float | None, float | None]) -> tuple[Pace, Pace]:
    return (Pace(rates[0]), Pace(rates[1])) if plan.recipe.offload.pace else (Pace(), Pace())


def cap_allocator(profile: Profile) -> None:
    """Holds torch to the profile's card where this one is larger: its memory less the reserve and less what
    the runtime itself takes.

    That is what NVML says of this process beyond torch's own, or the profile's figure where that is more
    (kernels are loaded late).
    """
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    if profile.device_budget_bytes >= total_bytes:
        return
    torch.zeros(1, device="cuda")  # the runtime is there from here on
    sample = Sample(host_bytes=0)
    NvmlReader().fill(sample)
    runtime_bytes = max(
        (sample.nvml_process_bytes or 0) - torch.cuda.memory_reserved(), profile.runtime_floor_bytes
    )
    torch.cuda.set_per_process_memory_fraction(
        max(profile.device_budget_bytes - runtime_bytes, 0) / total_bytes
    )


def layouts_by_key(layouts: list[ArenaLayout], shared_layout: ArenaLayout) -> dict[str, ArenaLayout]:
    return {**{block_key(block): layout for block, layout in enumerate(layouts)}, "shared": shared_layout}
