"""Predicts how long a run takes under given settings.

A step's time comes from the operations of its counted passes and of its updates. A visit's time adds the
transfers that compute does not hide. How blocks move depends on the kind of run: they stream within each
step, they all stay on the device, or they take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import block_key
from lowmem.blocks.traffic import Traffic
from lowmem.planning.duration import (
    EIGHT_BIT_S,
    Duration,
    Moving,
    moving_s,
    pass_s,
    run_duration,
    update_work,
)
from lowmem.planning.passes import Pass
from lowmem.planning.settings import Setup, file_bytes
from lowmem.planning.traffic import StreamedTraffic


class Visits(NamedTuple):
    """What `run_duration` needs to know of the visits; one entry for each block, or one for all together."""

    steps_s: list[float]
    moves: list[Moving]
    written_bytes: int  # to the disk, over the whole run


def predict_time(
    setup: Setup, passes: Sequence[Pass], traffic: StreamedTraffic | None, frozen: Sequence[Pass] = ()
) -> Duration:
    """The duration of a run on a profile that has rates.

    `passes`: one for each block or streamed unit, or one for all blocks together. `traffic`: of a model that
    streams. `frozen`: of the units that are only read, where a block is trained by the whole model's loss.
    """
    recipe, queue = setup.recipe, setup.queue
    last = len(passes) - 1
    passes_s = [
        _passes_s(setup, taken, forward=index < last, backward=not setup.streams or index >= setup.lowest)
        for index, taken in enumerate(passes)
    ]
    if traffic is not None and setup.coordinate:
        visits = _block_by_block(setup, queue, passes, frozen, traffic)
    elif traffic is not None:
        visits = _streamed(setup, queue, passes_s, traffic)
    elif setup.end_to_end:
        visits = _together(setup, queue, passes_s)
    else:
        visits = _in_turns(setup, queue, passes_s)
    return run_duration(queue, *visits, recipe.train.batch_size, recipe.train.seq_len)


def _streamed(setup: Setup, queue: BlockQueue, passes_s: list[float], traffic: StreamedTraffic) -> Visits:
    """Blocks come and go within each step, or sweep of several steps."""
    profile, step, on_disk = setup.profile, traffic.step, setup.settings.tier == "disk"
    a_step_s = max(  # the link and the disk work beside each other
        moving_s(step.host_to_device_bytes, step.device_to_host_bytes, profile, False),
        moving_s(step.disk_read_bytes, step.disk_written_bytes, profile, on_disk),
    )
    steps = min(queue.visit_steps, queue.num_steps)
    return Visits(
        [sum(passes_s) + _updates_s(setup, setup.updated)],
        [Moving(steps // traffic.sweep_steps * a_step_s)],
        traffic.moved(queue.num_steps, queue.num_visits).disk_written_bytes,
    )


def _block_by_block(
    setup: Setup,
    queue: BlockQueue,
    passes: Sequence[Pass],
    frozen: Sequence[Pass],
    traffic: StreamedTraffic,
) -> Visits:
    """One block stays for a visit and is trained; the weights of the others come and go in each step."""
    assert traffic.whole is not None
    profile, on_disk, steps = (
        setup.profile,
        setup.settings.tier == "disk",
        min(queue.visit_steps, queue.num_steps),
    )
    blocks, last, steps_s = [unit.key for unit in setup.units], len(setup.units) - 1, []
    for block, layout in enumerate(setup.layouts):
        first, key = blocks.index(block_key(block)), block_key(block)
        fresh = min(queue.kept_batches or steps, steps) / steps if block else 1.0
        taken_s = _updates_s(setup, [layout, setup.shared])
        for index, own in enumerate(blocks):
            taken = passes[index] if own == key else frozen[index]
            forward_s = _passes_s(setup, taken, forward=index < last, backward=False)
            taken_s += forward_s * (fresh if index < first else 1.0)
            taken_s += _passes_s(setup, taken, forward=False, backward=index >= first)
        steps_s.append(taken_s)
    mean = _mean_visit(traffic, queue)
    a_visit_s = max(
        moving_s(mean.host_to_device_bytes, mean.device_to_host_bytes, profile, False),
        moving_s(mean.disk_read_bytes, mean.disk_written_bytes, profile, on_disk),
    )
    moves = [Moving(a_visit_s)] * len(steps_s)
    return Visits(steps_s, moves, traffic.whole.disk_written_bytes)


def _mean_visit(traffic: StreamedTraffic, queue: BlockQueue) -> Traffic:
    assert traffic.whole is not None
    whole = traffic.whole.model_dump()
    return Traffic(**{name: number // queue.num_visits for name, number in whole.items()})


def _together(setup: Setup, queue: BlockQueue, passes_s: list[float]) -> Visits:
    """All blocks stay on the device and are trained at once: only commits move them."""
    everything = setup.updated
    written = file_bytes(everything)
    return Visits(
        [sum(passes_s) + _updates_s(setup, everything)],
        [_visit_moving(setup, 0, written)],
        queue.num_visits * written,
    )


def _in_turns(setup: Setup, queue: BlockQueue, passes_s: list[float]) -> Visits:
    """Blocks are trained in turn: each visit may fetch its block, and commits it with the shared part."""
    shared, num_blocks = setup.shared, setup.settings.num_blocks
    a_round = file_bytes(setup.layouts) + num_blocks * file_bytes([shared])
    return Visits(
        [
            taken_s + _updates_s(setup, [layout, shared])
            for taken_s, layout in zip(passes_s, setup.layouts, strict=True)
        ],
        [
            _visit_moving(setup, 0 if setup.resident else layout.total_bytes, file_bytes([layout, shared]))
            for layout in setup.layouts
        ],
        queue.num_visits // num_blocks * a_round,
    )


def _passes_s(setup: Setup, taken: Pass, forward: bool, backward: bool) -> float:
    """Seconds of a step's passes through one block or unit.

    `forward`: where units stream, a pass without gradients comes first; the last unit needs none. `backward`:
    a gradient comes to the unit.
    """
    backward_passes = backward * (2 if setup.streams and setup.two_passes else 1)
    forward_s, backward_s = pass_s(taken.forward_work, setup.profile), pass_s(taken.work, setup.profile)
    return setup.micro_batches * (forward * forward_s + backward_passes * backward_s)


def _updates_s(setup: Setup, updated: Sequence[ArenaLayout]) -> float:
    """Seconds of the optimizer's step over these arenas."""
    profile, clipped = setup.profile, setup.recipe.optimizer.grad_clip is not None
    eight_bit_s = EIGHT_BIT_S[profile.device.type] if setup.settings.optimizer == "adamw8bit" else 0.0
    return sum(
        pass_s(update_work(layout, setup.compute_bytes, clipped), profile) + eight_bit_s * layout.numel
        for layout in updated
    )


def _visit_moving(setup: Setup, read_bytes: int, written_bytes: int) -> Moving:
    """The transfers of a visit that ends in a commit; compute waits for the write where it is set to."""
    on_disk = setup.settings.tier == "disk"
    total_s = moving_s(read_bytes, written_bytes, setup.profile, on_disk)
    if setup.settings.write_back == "beside":
        return Moving(total_s)
    return Moving(total_s, moving_s(0, written_bytes, setup.profile, on_disk))
