"""What a run with given settings will take: bytes by category and by tier, traffic, and time.

State is counted to the byte from the block layouts, activations by a pass of each block (see `passes`). The
runtime floor is a constant of the device type or of the profile.
"""

from __future__ import annotations

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.borders import BorderBytes, border_bytes
from lowmem.blocks.optim import workspace_bytes
from lowmem.blocks.order import BlockQueue
from lowmem.blocks.stream import staging_bytes
from lowmem.machine.profile import Profile
from lowmem.models.base import BlockModel
from lowmem.planning.duration import (
    EIGHT_BIT_S,
    Duration,
    Work,
    has_rates,
    moving_s,
    pass_s,
    run_duration,
    update_work,
)
from lowmem.planning.passes import Pass, PassCounter
from lowmem.planning.settings import COMPUTE_DTYPE, Settings, is_resident, layouts_of
from lowmem.planning.traffic import StreamedTraffic, streamed_traffic
from lowmem.recipe import Recipe
from lowmem.schema import Section
from lowmem.units import MIB, from_gib

BITSANDBYTES_BYTES = 44 * MIB  # what its import takes on the host, measured
CPU_BFLOAT16_BYTES = 20 * MIB  # of kernels that a CPU makes for bf16 products at run time, measured
HOST_RUNTIME_GIB = (
    1.2  # a process that uses CUDA, on the host: libraries and driver; typical, not measured here
)
HEADROOM_SHARE, HEADROOM_BYTES = 0.02, 32 * MIB  # the larger of the two
NO_PASS = Pass(0, Work(), Work())


class Predicted(Section):
    """Peaks in bytes.

    `by_category` adds up to the device's peak; on unified memory that is also the host's.
    """

    device_peak_bytes: int
    host_peak_bytes: int
    disk_bytes: int
    by_category: dict[str, int]
    host_by_category: dict[str, int]
    block_peak_bytes: list[int]  # the device's peak while each block is visited
    traffic: StreamedTraffic | None = None  # of a model trained end to end that streams
    time: Duration | None = None  # None: the profile lacks a rate

    @property
    def device_needed_bytes(self) -> int:
        return with_headroom(self.device_peak_bytes)

    @property
    def host_needed_bytes(self) -> int:
        return with_headroom(self.host_peak_bytes)


def with_headroom(peak_bytes: int) -> int:
    """What a budget must allow for a predicted peak: the prediction may be off by as much, as measured
    (`scripts/calibrate`).
    """
    return peak_bytes + max(round(HEADROOM_SHARE * peak_bytes), HEADROOM_BYTES)


def predict(
    model: BlockModel,
    recipe: Recipe,
    profile: Profile,
    settings: Settings,
    counter: PassCounter | None,
    data_bytes: int = 0,
) -> Predicted:
    """`data_bytes`: what the data hold in host memory.

    Without `counter`, what is needed before the first activation: quick, and a lower bound.
    """
    layouts, shared = layouts_of(model, settings)
    whole = recipe.method == "end_to_end"
    resident = is_resident(settings, profile.unified)
    together = whole and resident  # all blocks are trained at once
    compute_bytes = COMPUTE_DTYPE[settings.precision].itemsize
    copies = (
        0 if settings.weights == settings.precision else compute_bytes
    )  # bytes per weight of the copy that computes, where there is one
    grad_bytes = 0 if settings.during_backward else compute_bytes
    visited = layouts if together else [max(layouts, key=lambda layout: layout.total_bytes)]
    on_device = layouts if resident else visited
    slot_bytes = max(layout.total_bytes for layout in layouts)

    passes = [NO_PASS]
    if counter is not None:
        slices = [range(len(model.layers))] if together else model.block_slices(settings.num_blocks)
        passes = [
            (counter.streamed if whole and not together else counter)(layers, settings) for layers in slices
        ]
    workspace = 0  # of an update, while no activation is alive
    if not settings.during_backward:
        groups = [group for layout in (*layouts, shared) for group in layout.groups]
        dtypes = COMPUTE_DTYPE[settings.weights], COMPUTE_DTYPE[settings.precision]
        workspace = max(
            workspace_bytes(group.stop - group.start, group.quantized, *dtypes) for group in groups
        )
    activations = [max(taken.peak_bytes, workspace) for taken in passes]
    slots, ring = staging_bytes(
        slot_bytes,
        resident,
        recipe.offload.prefetch,
        copied=profile.device.type == "cuda",
        num_blocks=len(layouts),
    )
    host_staging = shared.total_bytes + ring + (slots if profile.unified else 0)
    borders, traffic = BorderBytes(), None
    if whole and not resident and counter is not None:
        parts, two_passes = recipe.train.batch_size // settings.micro_batch_size, recipe.optimizer.clips_whole
        borders = border_bytes(
            settings.borders,
            profile.unified,
            *counter.waiting(settings),
            settings.num_blocks,
            parts,
            two_passes,
        )
        traffic = streamed_traffic(
            layouts, shared, profile, settings.tier, two_passes, settings.recompute, borders
        )

    category = {
        "weights": sum(layout.weights_bytes for layout in on_device)
        + copies * sum(layout.numel for layout in visited),
        "gradients": grad_bytes * sum(layout.numel for layout in visited),
        "optimizer_state": sum(layout.state_bytes for layout in on_device),
        "activations": max(activations),
        "borders": borders.device + (borders.host if profile.unified else 0),
        "shared_part": shared.total_bytes + (grad_bytes + copies) * shared.numel,
        "staging": host_staging if profile.unified else slots,
        "runtime_floor": profile.runtime_floor_bytes,
    }
    if profile.unified:
        category["data"] = data_bytes
        if profile.device.type == "cpu":
            category["runtime_floor"] += BITSANDBYTES_BYTES if settings.optimizer == "adamw8bit" else 0
            category["runtime_floor"] += CPU_BFLOAT16_BYTES if settings.precision == "bfloat16" else 0
    device_peak = sum(category.values())
    if profile.unified:
        host_category = category
    else:
        host_category = {
            "blocks": sum(layout.total_bytes for layout in (*layouts, shared))
            if settings.tier == "host"
            else 0,
            "borders": borders.host,
            "staging": host_staging,
            "data": data_bytes,
            "runtime_floor": from_gib(HOST_RUNTIME_GIB),
        }
    written = layouts if whole else visited  # between two commits, beside the files of the last one
    return Predicted(
        device_peak_bytes=device_peak,
        host_peak_bytes=sum(host_category.values()),
        disk_bytes=file_bytes([*layouts, shared]) + file_bytes([*written, shared]) + borders.disk,
        by_category=category,
        host_by_category=host_category,
        block_peak_bytes=[
            device_peak - category["activations"] + activations[0 if len(activations) == 1 else block]
            for block in range(settings.num_blocks)
        ],
        traffic=traffic,
        time=None
        if counter is None or not has_rates(profile)
        else _duration(recipe, profile, settings, layouts, shared, passes, traffic),
    )


def file_bytes(layouts: list[ArenaLayout]) -> int:
    return sum(layout.total_bytes + len(layout.header()) for layout in layouts)


def _duration(
    recipe: Recipe,
    profile: Profile,
    settings: Settings,
    layouts: list[ArenaLayout],
    shared: ArenaLayout,
    passes: list[Pass],
    traffic: StreamedTraffic | None,
) -> Duration:
    """Of the run, on a profile that has rates. `passes`: one of each block, or one of all together."""
    parts = recipe.train.batch_size // settings.micro_batch_size
    grad_bytes, clipped = COMPUTE_DTYPE[settings.precision].itemsize, recipe.optimizer.grad_clip is not None
    eight_bit_s = EIGHT_BIT_S[profile.device.type] if settings.optimizer == "adamw8bit" else 0.0

    def update_s(updated: list[ArenaLayout]) -> float:
        return sum(
            pass_s(update_work(layout, grad_bytes, clipped), profile) + eight_bit_s * layout.numel
            for layout in updated
        )

    backward_passes = 2 if recipe.optimizer.clips_whole and traffic else 1
    passes_s = [
        parts * (pass_s(taken.forward_work, profile) + backward_passes * pass_s(taken.work, profile))
        for taken in passes
    ]
    queue, on_disk = BlockQueue.of(recipe.to_dict(), settings.num_blocks), settings.tier == "disk"
    steps = min(queue.visit_steps, queue.num_steps)

    def moved(read_bytes: int, written_bytes: int) -> tuple[float, float]:
        """Seconds of a visit's transfers, and of those that compute waits for."""
        return moving_s(read_bytes, written_bytes, profile, on_disk), 0.0 if beside else moving_s(
            0, written_bytes, profile, on_disk
        )

    beside, everything = settings.write_back == "beside", [*layouts, shared]
    if traffic:
        step, steps_s = traffic.step, [sum(passes_s) + update_s(everything)]
        link_s = moving_s(step.host_to_device_bytes, step.device_to_host_bytes, profile, False)
        a_step_s = max(link_s, moving_s(step.disk_read_bytes, step.disk_written_bytes, profile, on_disk))
        moves = [(steps * a_step_s, 0.0)]
        written = (
            queue.num_steps * step.disk_written_bytes + queue.num_visits * traffic.commit.disk_written_bytes
        )
    elif recipe.method == "end_to_end":
        steps_s, moves = [sum(passes_s) + update_s(everything)], [moved(0, file_bytes(everything))]
        written = queue.num_visits * file_bytes(everything)
    else:
        steps_s = [
            taken + update_s([layout, shared]) for taken, layout in zip(passes_s, layouts, strict=True)
        ]
        fetched = 0 if is_resident(settings, profile.unified) else 1
        moves = [moved(fetched * layout.total_bytes, file_bytes([layout, shared])) for layout in layouts]
        written = (
            queue.num_visits
            // settings.num_blocks
            * (file_bytes(layouts) + settings.num_blocks * file_bytes([shared]))
        )
    return run_duration(queue, steps_s, moves, written, recipe.train.batch_size, recipe.train.seq_len)
