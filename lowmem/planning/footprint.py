"""Predicts what a run takes under given settings: bytes by category and by tier, traffic, and time.

Weights, gradients and optimizer state are counted to the byte from the layouts of the blocks. Activations
are counted by a pass of each block (see `passes`). The runtime's floor is a constant of the device's type, or
of the profile.
"""

from __future__ import annotations

from typing import NamedTuple

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.borders import BorderBytes, border_bytes, in_one_buffer
from lowmem.blocks.optim import scratch_bytes, workspace_bytes
from lowmem.blocks.order import BlockQueue, Course
from lowmem.blocks.unit_stream import GRADIENTS, gathers_by_block, unit_bytes
from lowmem.machine.child import compiler_stays
from lowmem.machine.floor import Library, measured_floor_bytes, measured_library_bytes
from lowmem.machine.pool import pays
from lowmem.machine.profile import Profile
from lowmem.models.base import BlockModel
from lowmem.planning.duration import Duration, Work, has_rates
from lowmem.planning.evaluation import Evaluation
from lowmem.planning.passes import Pass, PassCounter
from lowmem.planning.run_time import predict_time
from lowmem.planning.settings import COMPUTE_DTYPE, Setup, file_bytes, shared_bytes
from lowmem.planning.traffic import (
    StreamedTraffic,
    coordinate_traffic,
    streamed_traffic,
    traffic_before_growth,
)
from lowmem.schema import Section
from lowmem.units import MIB, from_gib

# What libraries take on a CPU with the CPU build of torch, for a plan made where they are not installed.
LIBRARY_BYTES: dict[Library, int] = {
    "bitsandbytes": 4 * MIB,
    "compiler": 72 * MIB,
    "transformers": 128 * MIB,
    "peft": 140 * MIB,
}
# What a child that makes a plan counts with, and what it writes of its parent's pages; measured.
COPIED_BYTES = 88 * MIB
CPU_BFLOAT16_BYTES = 20 * MIB  # of kernels that a CPU makes at run time for bf16 products; measured
# of a process that uses CUDA on the host: libraries and driver; a typical value, not measured here
HOST_RUNTIME_GIB = 1.2
HEADROOM_SHARE, HEADROOM_BYTES = 0.02, 32 * MIB  # a prediction may be off by the larger of the two
NO_PASS = Pass(0, Work(), Work())
# What torch's allocator holds of a card beyond the tensors: cuBLAS's two workspaces of 32 MiB, and gaps. The
# most of five runs on an H200 was 353 MiB, the least 196 MiB.
CUDA_ALLOCATOR_BYTES = 272 * MIB


class Budget(Section):
    """Bytes that the profile allows. On unified memory device and host are one pool."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int | None  # None: unknown, because the disk is another machine's


class Predicted(Section):
    """Peaks in bytes: of training, and of the evaluation at its end.

    `by_category` adds up to the device's peak in training; on unified memory that is also the host's peak.
    """

    device_peak_bytes: int
    host_peak_bytes: int
    disk_bytes: int
    by_category: dict[str, int]
    host_by_category: dict[str, int]
    block_peak_bytes: list[int]  # the device's peak while each block is visited
    pool_bytes: int = 0  # within the activations: what a CPU keeps for the next ones (`machine.pool`)
    planning_bytes: int = 0  # what making the plan takes, where the run makes it on this memory
    traffic: StreamedTraffic | None = None  # None: the model does not stream within a step
    time: Duration | None = None  # None: the profile lacks a rate
    evaluation: Evaluation | None = None  # None: not planned, as where training does not fit

    @property
    def run_peak_bytes(self) -> int:
        """The device's peak in training or in the evaluation, whichever is higher."""
        return max(self.device_peak_bytes, self.evaluation.peak_bytes if self.evaluation else 0)

    @property
    def device_needed_bytes(self) -> int:
        return max(with_headroom(self.run_peak_bytes), self.planning_bytes)

    @property
    def host_needed_bytes(self) -> int:
        unified = self.host_by_category == self.by_category
        return self.device_needed_bytes if unified else with_headroom(self.host_peak_bytes)

    def fits(self, budget: Budget) -> bool:
        """Whether the budget holds the peaks with headroom, and the files."""
        return (
            self.device_needed_bytes <= budget.device_bytes
            and self.host_needed_bytes <= budget.host_bytes
            and (budget.disk_bytes is None or self.disk_bytes <= budget.disk_bytes)
        )


def with_headroom(peak_bytes: int) -> int:
    """Bytes that a budget must allow for a predicted peak.

    The headroom is how far predictions were off when they were measured (`scripts/calibrate`).
    """
    return peak_bytes + max(round(HEADROOM_SHARE * peak_bytes), HEADROOM_BYTES)


def without_headroom(budget_bytes: int) -> int:
    """The highest predicted peak that a budget allows."""
    return min(int(budget_bytes / (1 + HEADROOM_SHARE)), budget_bytes - HEADROOM_BYTES)


def predict(model: BlockModel, setup: Setup, counter: PassCounter | None, data_bytes: int = 0) -> Predicted:
    """What a run of `setup` takes. `data_bytes`: what the data hold in host memory.

    Without `counter` the prediction has no activations, no borders and no time. It is then quick to make, and
    a lower bound.
    """
    predicted = _predict(model, setup, counter, data_bytes)
    if setup.recipe.blocks.grow_at is None:
        return predicted
    return _with_growth(setup, predicted, _predict(model, setup.before_growth, counter, data_bytes))


def _with_growth(setup: Setup, grown: Predicted, alone: Predicted) -> Predicted:
    """What a run takes in which the first block is trained `alone` until the model grows."""
    queue = BlockQueue.of(setup.recipe.to_dict(), setup.settings.num_blocks)
    larger = max(grown, alone, key=lambda predicted: predicted.device_peak_bytes)
    larger_on_host = max(grown, alone, key=lambda predicted: predicted.host_peak_bytes)
    first, *others = grown.block_peak_bytes
    traffic, time = grown.traffic, grown.time
    if traffic is not None:
        traffic = traffic.model_copy(update=traffic_before_growth(setup, queue))
    if time is not None and alone.time is not None:
        written = None if traffic is None else traffic.moved(queue.num_steps, queue.num_visits)
        time = time.after(alone.time, queue, None if written is None else written.disk_written_bytes)
    return grown.model_copy(
        update={
            "device_peak_bytes": larger.device_peak_bytes,
            "by_category": larger.by_category,
            "host_peak_bytes": larger_on_host.host_peak_bytes,
            "host_by_category": larger_on_host.host_by_category,
            "block_peak_bytes": [max(first, alone.device_peak_bytes), *others],
            "pool_bytes": max(grown.pool_bytes, alone.pool_bytes),
            "traffic": traffic,
            "time": time,
        }
    )


def _predict(model: BlockModel, setup: Setup, counter: PassCounter | None, data_bytes: int) -> Predicted:
    passes = _passes(model, setup, counter)
    frozen: list[Pass] = []  # of the units, where those of other blocks than the visited one are only read
    if counter is not None and setup.coordinate and setup.streams:
        frozen = [counter.frozen(layers, setup.settings) for layers in model.units()]
    workspace = _workspace_bytes(setup)  # while an update uses it, no activation is alive
    borders, traffic, time, lent = BorderBytes(), None, None, 0
    if counter is not None:
        if setup.streams or setup.swept:
            borders = _border_bytes(setup, counter)
            lent = _lent_border_bytes(setup, counter)
        if setup.streams:
            if setup.coordinate:
                traffic = coordinate_traffic(setup, lambda course: _border_bytes(setup, counter, course))
            else:
                traffic = streamed_traffic(setup, borders)
        if has_rates(setup.profile):
            time = predict_time(setup, passes, traffic, frozen)
    pool_bytes = _pool_bytes(setup, passes, lent)
    # Where units stream, other units are updated while one computes. What a pool keeps is there in updates
    # too.
    together = setup.by_unit or pool_bytes > 0
    scratch = max(scratch_bytes(layout, setup.profile.device.type) for layout in setup.updated)
    activations = [
        scratch + (taken.peak_bytes + workspace if together else max(taken.peak_bytes, workspace))
        for taken in passes
    ]
    device = _device_categories(setup, max(activations), borders, data_bytes)
    host = device if setup.profile.unified else _host_categories(setup, borders, data_bytes)
    device_peak = sum(device.values())
    without_activations = device_peak - max(activations)
    by_block = _by_block(setup, activations)
    return Predicted(
        device_peak_bytes=device_peak,
        host_peak_bytes=sum(host.values()),
        disk_bytes=_disk_bytes(setup, borders),
        by_category=device,
        host_by_category=host,
        block_peak_bytes=[without_activations + num_bytes for num_bytes in by_block],
        pool_bytes=pool_bytes,
        planning_bytes=_planning_bytes(setup),
        traffic=traffic,
        time=time,
    )


def _pool_bytes(setup: Setup, passes: list[Pass], lent_borders: int) -> int:
    """What a run may keep of large activations for the next ones: their peak, less the most that no pool
    lends. So the two together never take more than the peak, which is planned anyway. Borders that it lends
    are planned beside the activations.
    """
    born = sum(taken.large.born_bytes for taken in passes)
    operations = sum(sum(taken.work.values()) for taken in passes)
    if setup.profile.device.type != "cpu" or not pays(born, operations):
        return 0
    unlent = max(taken.large.unlent_peak_bytes for taken in passes)
    return max(taken.large.peak_bytes for taken in passes) - unlent + lent_borders


def _lent_border_bytes(setup: Setup, counter: PassCounter) -> int:
    """Of borders that stay on the device, each where it was made: those that passes make, which are all but
    the input's.
    """
    border, _ = counter.waiting(setup.settings)
    if setup.settings.borders != "device" or in_one_buffer(border, setup.profile.device.type):
        return 0
    return (setup.num_pieces + setup.queue.kept_batches) * setup.under_way * border


def _by_block(setup: Setup, activations: list[int]) -> list[int]:
    """The activations of each block: the most of its units', or of all blocks together."""
    if len(activations) == 1:
        return activations * len(setup.layouts)
    if setup.coordinate and setup.streams:
        return [max(activations)] * len(setup.layouts)
    if not setup.by_unit:
        return activations
    most: dict[str, int] = {}
    for unit, taken in zip(setup.units, activations, strict=True):
        most[unit.key] = max(most.get(unit.key, 0), taken)
    return list(most.values())


def _passes(model: BlockModel, setup: Setup, counter: PassCounter | None) -> list[Pass]:
    """One pass for each block, for each unit where the model streams, or one for all blocks together."""
    if counter is None:
        return [NO_PASS]
    if setup.alone:
        return [counter(model.block_slices(setup.settings.num_blocks)[0], setup.settings)]
    if setup.coordinate and setup.resident:
        slices = model.block_slices(setup.settings.num_blocks)
        return [counter.coordinate(layers, setup.settings) for layers in slices]
    if setup.together:
        return [counter(range(len(model.layers)), setup.settings)]
    if setup.streams or setup.swept:
        pieces = model.block_slices(setup.settings.num_blocks) if setup.swept else model.units()
        return [counter.streamed(layers, setup.settings) for layers in pieces]
    return [counter(layers, setup.settings) for layers in model.block_slices(setup.settings.num_blocks)]


def _workspace_bytes(setup: Setup) -> int:
    """The most that an update takes beside weights, gradients and state.

    Updates during backward count with the activations, because both are alive at once.
    """
    settings = setup.settings
    if settings.during_backward:
        return 0
    dtypes = COMPUTE_DTYPE[settings.weights], COMPUTE_DTYPE[settings.precision]
    return max(
        workspace_bytes(
            group.stop - group.start, group.quantized, *dtypes, setup.profile.device.type, group.matrix
        )
        for layout in setup.updated
        for group in layout.groups
    )


def _border_bytes(setup: Setup, counter: PassCounter, course: Course | None = None) -> BorderBytes:
    """`course`: of a step; None: the longest."""
    border, waiting = counter.waiting(setup.settings)
    return border_bytes(
        setup.settings.borders,
        setup.profile.unified,
        border,
        waiting,
        setup.num_pieces,
        setup.under_way,
        setup.two_passes,
        setup.queue.kept_batches,
        Course(lowest=setup.lowest) if course is None else course,
        setup.profile.device.type,
    )


class Staging(NamedTuple):
    """Bytes through which blocks and the shared part pass. On unified memory both are the same bytes."""

    device: int
    host: int


def _staging(setup: Setup) -> Staging:
    """Slots for blocks beside the one in compute, the ring of the link, and a snapshot of the shared part."""
    slots, ring = setup.staged_bytes
    if setup.by_unit:
        slots = setup.unit_bytes.fetched + setup.unit_bytes.chunks
    if setup.coordinate and setup.streams:
        slots += unit_bytes(setup.units, frozenset(), setup.recipe.offload.prefetch, updates=False).fetched
    snapshot_and_ring = setup.snapshot_bytes + ring
    if setup.profile.unified:
        return Staging(slots + snapshot_and_ring, slots + snapshot_and_ring)
    return Staging(slots, snapshot_and_ring)


def _device_categories(
    setup: Setup, activations: int, borders: BorderBytes, data_bytes: int
) -> dict[str, int]:
    """Bytes on the device by category; on unified memory everything the process takes."""
    profile = setup.profile
    categories = {
        **(_streaming_categories if setup.by_unit else _visiting_categories)(setup),
        "activations": activations,
        "borders": borders.device + (borders.host if profile.unified else 0),
        "shared_part": shared_bytes(setup) + _base_bytes(setup),
        "staging": _staging(setup).device,
        "runtime_floor": _floor_bytes(setup.profile) + _cpu_runtime_bytes(setup),
    }
    if profile.device.type == "cuda" and not profile.unified:
        categories["allocator"] = CUDA_ALLOCATOR_BYTES
    return {**categories, "data": data_bytes} if profile.unified else categories


def _bases(setup: Setup) -> list[ArenaLayout]:
    return [] if setup.base is None else [setup.base]


def _base_bytes(setup: Setup) -> int:
    """Of what is frozen and on the device all along."""
    return 0 if setup.base is None else setup.base.total_bytes + setup.block_copy_bytes * setup.base.numel


def _visiting_categories(setup: Setup) -> dict[str, int]:
    """Of blocks that are on the device whole."""
    trained = sum(layout.numel for layout in setup.visited)
    copied, beside = trained, 0
    if setup.coordinate:  # the weights of the other blocks
        if setup.resident:
            copied = sum(layout.numel for layout in setup.layouts)
        else:
            prefetch = setup.recipe.offload.prefetch
            beside = unit_bytes(setup.units, frozenset(), prefetch, updates=False).weights
            copied += max(unit.numel for unit in setup.units)
    return {
        "weights": sum(layout.weights_bytes for layout in setup.on_device)
        + setup.block_copy_bytes * copied
        + beside,
        "gradients": 0 if setup.frozen else setup.gradient_bytes * trained,
        "optimizer_state": sum(layout.state_bytes for layout in setup.on_device),
    }


def _streaming_categories(setup: Setup) -> dict[str, int]:
    """Of units that come and go, and of those that stay."""
    taken = setup.unit_bytes
    copied = setup.block_copy_bytes * max(unit.numel for unit in setup.units)
    by_block = gathers_by_block(setup.recipe.optimizer.grad_clip)
    gathered = max(part.numel for part in (setup.layouts if by_block else setup.units))
    return {
        "weights": taken.weights + copied,
        "gradients": 0 if setup.frozen else GRADIENTS * setup.gradient_bytes * gathered,
        "optimizer_state": taken.state,
    }


def _floor_bytes(profile: Profile) -> int:
    """What a process takes before its first tensor.

    The profile may say it. Else it is measured with the packages here: on a CPU, and for the card of this
    machine.
    """
    measured, kind = None, profile.device.type
    if profile.device.runtime_gib is None and (kind == "cpu" or (kind == "cuda" and profile.is_detected)):
        measured = measured_floor_bytes(kind)
    return profile.runtime_floor_bytes if measured is None else measured


def _cpu_runtime_bytes(setup: Setup) -> int:
    """What a CPU's runtime takes beyond its floor under these settings."""
    if setup.profile.device.type != "cpu":
        return 0
    built_with = setup.recipe.model.library(setup.recipe.adapter is not None)
    libraries: set[Library] = {built_with} if built_with else set()
    if not built_with and compiler_stays():
        libraries.add("compiler")
    if setup.settings.optimizer == "adamw8bit" and built_with != "peft":  # which brings it
        libraries.add("bitsandbytes")
    return sum(map(_library_bytes, libraries)) + CPU_BFLOAT16_BYTES * (setup.settings.precision == "bfloat16")


def _planning_bytes(setup: Setup) -> int:
    """What this process and its child take while the child makes the plan (`machine.child`)."""
    if setup.profile.device.type != "cpu" or compiler_stays():
        return 0
    library = setup.recipe.model.library(setup.recipe.adapter is not None) or "compiler"
    return _floor_bytes(setup.profile) + _library_bytes(library) + COPIED_BYTES


def _library_bytes(library: Library) -> int:
    """What a library takes here, or else where it was measured."""
    return measured_library_bytes(library) or LIBRARY_BYTES[library]


def _host_categories(setup: Setup, borders: BorderBytes, data_bytes: int) -> dict[str, int]:
    """Bytes of host memory by category, beside a device that has its own memory."""
    everything = sum(layout.total_bytes for layout in (*setup.layouts, setup.shared, *_bases(setup)))
    return {
        "blocks": everything if setup.settings.tier == "host" else 0,
        "borders": borders.host,
        "staging": _staging(setup).host,
        "data": data_bytes,
        "runtime_floor": from_gib(HOST_RUNTIME_GIB),
    }


def _disk_bytes(setup: Setup, borders: BorderBytes) -> int:
    """The most that the run folder takes: the committed files, what the commit before had instead of some of
    them (where it is kept), and the next commit's.
    """
    committed = file_bytes([*setup.layouts, setup.shared, *_bases(setup)])
    new = file_bytes(
        setup.updated if setup.end_to_end or setup.settings.in_rounds else [*setup.visited, setup.shared]
    )
    return committed + (1 + setup.recipe.offload.keep_previous) * new + borders.disk
