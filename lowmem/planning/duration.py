"""How long a run will take: the operations of its passes at the rates of its machine, and what moving blocks
adds.

An operation takes as long as its arithmetic or as its traffic with memory, whichever is longer (the roofline
model: Williams, Waterman and Patterson, 2009), and a moment to be started. Rates are the profile's; a share
of its peak is what matrix products reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.order import BlockQueue
from lowmem.machine.profile import Profile
from lowmem.schema import Section
from lowmem.units import GIB, format_bytes, format_seconds

Work = Counter[
    tuple[int, int]
]  # (floating-point operations, bytes read and written) of an operation -> how many such
REACHED = {"cpu": 0.8, "cuda": 0.5, "mps": 0.5}  # of peak_tflops, by the products of a layer: rules of thumb
START_S = {"cpu": 6e-6, "cuda": 5e-6, "mps": 5e-6}  # of one operation: a rule of thumb
EIGHT_BIT_S = {
    "cpu": 7.4e-9,
    "cuda": 0.0,
    "mps": 0.0,
}  # of an 8-bit update beyond its traffic, per weight; measured on 2 cores


class Duration(Section):
    """Seconds and rates, as predicted. A visit of a model trained end to end is of all its blocks."""

    step_s: float  # without waiting for blocks
    visit_s: float
    run_s: float  # training alone
    samples_per_s: float
    tokens_per_s: float | None  # None: not a sequence of tokens
    moving_s: float  # for a visit's blocks, beside compute or not
    exposed_s: float  # of a visit, what of that compute cannot hide
    disk_written_bytes: int  # over the whole run: wears the drive

    def lines(self) -> list[str]:
        rate = (
            f"{self.samples_per_s:,.1f} samples/s"
            if self.tokens_per_s is None
            else f"{self.tokens_per_s:,.0f} tokens/s"
        )
        compute_s = max(self.visit_s - self.exposed_s, 1e-9)
        return [
            f"time: a step {format_seconds(self.step_s)}, a visit {format_seconds(self.visit_s)}, the run about {format_seconds(self.run_s)}; {rate}",
            f"moving blocks: {format_seconds(self.moving_s)} a visit, {self.moving_s / compute_s:.0%} of its compute, exposed "
            f"{format_seconds(self.exposed_s)}; the run writes {format_bytes(self.disk_written_bytes)} to the drive",
        ]


def has_rates(profile: Profile) -> bool:
    """Whether the time of a pass can be told."""
    return profile.device.peak_tflops is not None and profile.device.memory_gib_per_s is not None


def pass_s(work: Work, profile: Profile) -> float:
    """Of a pass on the device of a profile that has rates."""
    kind, peak, memory = profile.device.type, profile.device.peak_tflops, profile.device.memory_gib_per_s
    assert peak is not None and memory is not None, "see has_rates"
    operations, traffic = peak * 1e12 * REACHED[kind], memory * GIB
    return sum(
        count * (START_S[kind] + max(flops / operations, num_bytes / traffic))
        for (flops, num_bytes), count in work.items()
    )


def update_work(layout: ArenaLayout, grad_bytes: int, clipped: bool) -> Work:
    """Of an optimizer step over an arena: everything in it is read and written, gradients are read (twice to
    be clipped) and cleared.
    """
    return Work({(0, 2 * layout.total_bytes + (3 if clipped else 2) * grad_bytes * layout.numel): 1})


def moving_s(read_bytes: int, written_bytes: int, profile: Profile, disk: bool) -> float:
    """To fetch and to write back, over the link both ways at once, over the disk one after the other.

    What has no rate takes no time.
    """
    link_s = [
        num_bytes / rate
        for num_bytes, rate in zip((read_bytes, written_bytes), profile.link_rates, strict=True)
        if rate is not None
    ]
    disk_s = [
        num_bytes / rate
        for num_bytes, rate in zip(
            (read_bytes if disk else 0, written_bytes), profile.disk_rates, strict=True
        )
        if rate
    ]
    return max([0.0 if profile.unified else max(link_s, default=0.0), sum(disk_s)])


def run_duration(
    queue: BlockQueue,
    steps_s: Sequence[float],
    moved: Sequence[tuple[float, float]],
    written_bytes: int,
    batch_size: int,
    seq_len: int | None,
) -> Duration:
    """From the seconds of a step, and of moving in a visit: in all, and those of it that compute waits for by
    plan.

    One entry for each block, or one where all are visited together.
    """
    visits, steps = queue.num_visits / len(steps_s), min(queue.visit_steps, queue.num_steps)
    waits = [
        waited + max(moving - waited - steps * step, 0.0)
        for step, (moving, waited) in zip(steps_s, moved, strict=True)
    ]
    step_s = sum(steps_s) / len(steps_s)
    run_s = sum(queue.num_steps * step + visits * wait for step, wait in zip(steps_s, waits, strict=True))
    moving, exposed = sum(moving for moving, _ in moved) / len(moved), sum(waits) / len(waits)
    return Duration(
        step_s=step_s,
        visit_s=steps * step_s + exposed,
        run_s=run_s,
        samples_per_s=batch_size * queue.total_steps / run_s,
        tokens_per_s=None if seq_len is None else batch_size * seq_len * queue.total_steps / run_s,
        moving_s=moving,
        exposed_s=exposed,
        disk_written_bytes=written_bytes,
    )
