"""Opens what a run needs beside its model: the stream of its blocks, and the borders between them.

Both follow the tiers that the plan settled. On CUDA this is also where torch's allocator is held to the
profile's budget, and where the ring of page-locked memory is made.
"""

from __future__ import annotations

from pathlib import Path

from lowmem.blocks.arena import Arena, ArenaLayout, bind, computing, parameter_views
from lowmem.blocks.borders import AwayBorders, Borders, NearBorders
from lowmem.blocks.run_dir import BASE_KEY, SHARED_KEY, FileRecord, RunDir, block_key
from lowmem.blocks.staging import RING_CHUNKS, Pace, Ring, ring_bytes
from lowmem.blocks.store import DiskStore, HostStore
from lowmem.blocks.stream import BlockStream
from lowmem.machine.detect import training_device
from lowmem.machine.device import Device
from lowmem.machine.monitor import NvmlReader, Sample
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
    ring, paces = _open_ring(plan, device, [*layouts, shared_layout]), _paces(plan, profile.disk_rates)
    base = base_layout_of(model, plan.settings)
    disk = DiskStore(run, layouts_by_key(layouts, shared_layout, base), files, ring, paces, checked)
    in_ram = plan.settings.tier == "host" and not profile.unified
    return BlockStream(
        HostStore(disk, profile.pinned_max_bytes - ring_locked(ring)) if in_ram else disk,
        layouts,
        shared_layout,
        device,
        resident or is_resident(plan.settings, profile.unified),
        plan.recipe.offload.prefetch,
    )


def open_borders(plan: Plan, model: BlockModel, device: Device, folder: Path, ring: Ring | None) -> Borders:
    """Opens the borders of a streamed step at the plan's tier; those on disk lie in `folder`.

    `ring`: the store's.
    """
    settings, recipe = plan.settings, plan.recipe
    steps, micro_batches = recipe.blocks.sweep_steps, recipe.train.batch_size // settings.micro_batch_size
    pieces = settings.num_blocks if steps > 1 else len(model.units())
    shape, kept = (pieces, steps * micro_batches, recipe.optimizer.clips_whole), plan.queue().kept_batches
    if settings.borders == "device" or (settings.borders == "host" and plan.profile.unified):
        return NearBorders(*shape, kept)
    return AwayBorders(*shape, device, folder if settings.borders == "disk" else None, ring, kept)


def _open_ring(plan: Plan, device: Device, layouts: list[ArenaLayout]) -> Ring | None:
    """Makes the ring of page-locked memory; None if compute reads host memory itself.

    `layouts`: of all that passes it, the shared part on its way out among that.
    """
    if not device.copies:
        return None
    cap_allocator(plan, device)  # first, because the ring's CUDA streams already count as the run's
    wanted_bytes = ring_bytes(max(layout.total_bytes for layout in layouts))
    chunk_bytes = wanted_bytes // RING_CHUNKS
    return Ring(device, chunk_bytes, plan.profile.pinned_max_bytes, _paces(plan, plan.profile.link_rates))


def ring_locked(ring: Ring | None) -> int:
    """Bytes of a ring that are page-locked."""
    return 0 if ring is None else int(ring.facts()["locked_bytes"])


def _paces(plan: Plan, rates: tuple[float | None, float | None]) -> tuple[Pace, Pace]:
    """`rates` in bytes per second, kept only where the recipe asks for it (`offload.pace`)."""
    return (Pace(rates[0]), Pace(rates[1])) if plan.recipe.offload.pace else (Pace(), Pace())


def cap_allocator(plan: Plan, device: Device) -> None:
    """Holds torch's allocator to the profile's budget.

    The runtime's own share comes out of the budget too. It is what NVML counts for this process beyond
    torch's memory, or the plan's figure if that is larger: some kernels are loaded only later.
    """
    device.buffer(1)  # loads the runtime, so that NVML sees it
    sample, held = Sample(host_bytes=0), device.memory()
    NvmlReader(device.uuid()).fill(sample)
    beyond_torch = (sample.nvml_process_bytes or 0) - (held.reserved if held else 0)
    planned = plan.predicted.by_category["runtime_floor"]
    device.cap(plan.profile.device_budget_bytes - max(beyond_torch, planned))


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
        bind(model, parameter_views(layout, computing(weights, dtype)), None)
    return layout
