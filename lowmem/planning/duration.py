"""Computes how long operations, transfers and whole runs take at the rates of a machine's profile.

An operation takes as long as its arithmetic or as its traffic with memory, whichever is longer (the roofline
model: Williams, Waterman and Patterson, 2009), plus a moment to start. Rates are the profile's. Matrix
products reach a share of the peak rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.order import BlockQueue
from lowmem.machine.profile import Profile
from lowmem.schema import Section
from lowmem.units import GIB, format_bytes, format_seconds

# (floating-point operations, bytes read and written) of one operation -> how many such operations
Work = Counter[tuple[int, int]]
# share of peak_tflops that a layer's products reach: a guess
REACHED = {"cpu": 0.8, "cuda": 0.5, "mps": 0.5, "xpu": 0.5}
START_S = {"cpu": 6e-6, "cuda": 5e-6, "mps": 5e-6, "xpu": 5e-6}  # to start one operation: a rule of thumb
# what an 8-bit update takes per weight, beyond its traffic with memory; measured on 2 cores
EIGHT_BIT_S = {"cpu": 2.1e-9, "cuda": 0.0, "mps": 0.0, "xpu": 0.0}


class Duration(Section):
    """Predicted seconds and rates. A model trained end to end has visits of all its blocks."""

    step_s: float  # without waiting for blocks
    visit_s: float
    run_s: float  # training, without evaluation
    samples_per_s: float
    tokens_per_s: float | None  # None: the data are no sequences of tokens
    moving_s: float  # moving a visit's blocks, whether compute runs beside it or not
    exposed_s: float  # the part of a visit in which compute waits for blocks
    disk_written_bytes: int  # over the whole run; it wears the drive

    def after(self, alone: Duration, queue: BlockQueue, written_bytes: int | None) -> Duration:
        """That of a run whose first block is trained `alone` until the model grows; both are of all steps.

        `written_bytes`: to the disk, where it is known.
        """
        share = queue.grow_steps / queue.num_steps
        run_s = share * alone.run_s + (1 - share) * self.run_s
        mixed = share * alone.disk_written_bytes + (1 - share) * self.disk_written_bytes
        rate = self.run_s / run_s
        return self.model_copy(
            update={
                "run_s": run_s,
                "samples_per_s": self.samples_per_s * rate,
                "tokens_per_s": None if self.tokens_per_s is None else self.tokens_per_s * rate,
                "disk_written_bytes": round(mixed) if written_bytes is None else written_bytes,
            }
        )

    def lines(self) -> list[str]:
        """The prediction as lines for the plan's table."""
        rate = (
            f"{self.samples_per_s:,.1f} samples/s"
            if self.tokens_per_s is None
            else f"{self.tokens_per_s:,.0f} tokens/s"
        )
        step, visit, run = (format_seconds(s) for s in (self.step_s, self.visit_s, self.run_s))
        moving, exposed = format_seconds(self.moving_s), format_seconds(self.exposed_s)
        share = self.moving_s / max(self.visit_s - self.exposed_s, 1e-9)
        written = format_bytes(self.disk_written_bytes)
        return [
            f"time: a step {step}, a visit {visit}, the run about {run}; {rate}",
            f"moving blocks: {moving} a visit, {share:.0%} of its compute, exposed {exposed}; "
            f"the run writes {written} to the drive",
        ]


class Moving(NamedTuple):
    """Seconds that a visit's transfers take."""

    total_s: float
    waited_s: float = 0.0  # the part that the plan lets compute wait for


def has_rates(profile: Profile) -> bool:
    """Whether the profile has the rates that the time of a pass depends on."""
    return profile.device.peak_tflops is not None and profile.device.memory_gib_per_s is not None


def pass_s(work: Work, profile: Profile) -> float:
    """Seconds that operations take on the device of a profile that has rates."""
    kind, peak, memory = profile.device.type, profile.device.peak_tflops, profile.device.memory_gib_per_s
    assert peak is not None and memory is not None, "see has_rates"
    flops_per_s, bytes_per_s = peak * 1e12 * REACHED[kind], memory * GIB
    return sum(
        count * (START_S[kind] + max(flops / flops_per_s, num_bytes / bytes_per_s))
        for (flops, num_bytes), count in work.items()
    )


def update_work(layout: ArenaLayout, grad_bytes: int, clipped: bool) -> Work:
    """The work of one optimizer step over an arena. `grad_bytes`: bytes of a gradient's element.

    The step reads and writes everything in the arena. It reads the gradients, once more where they are
    clipped, and clears them.
    """
    work = Work({(0, 2 * layout.total_bytes + (3 if clipped else 2) * grad_bytes * layout.numel): 1})
    for group in layout.groups:
        if group.matrix is not None:  # Newton-Schulz: five times three products
            small, large = sorted(group.matrix)
            num_bytes = 2 * (3 * small * small + 4 * small * large)
            work[5 * (4 * small * small * large + 2 * small**3), num_bytes] += 1
    return work


def moving_s(read_bytes: int, written_bytes: int, profile: Profile, from_disk: bool) -> float:
    """Seconds to fetch `read_bytes` and to write `written_bytes` back.

    What is written always goes to the disk; what is read comes from it where `from_disk`. The link carries
    both directions at once, the disk one after the other. What has no rate takes no time.
    """
    link_s = [
        num_bytes / rate
        for num_bytes, rate in zip((read_bytes, written_bytes), profile.link_rates, strict=True)
        if rate is not None
    ]
    disk_bytes = (read_bytes if from_disk else 0, written_bytes)
    disk_s = [
        num_bytes / rate for num_bytes, rate in zip(disk_bytes, profile.disk_rates, strict=True) if rate
    ]
    return max([0.0 if profile.unified else max(link_s, default=0.0), sum(disk_s)])


def run_duration(
    queue: BlockQueue,
    steps_s: Sequence[float],
    moves: Sequence[Moving],
    written_bytes: int,
    batch_size: int,
    seq_len: int | None,
) -> Duration:
    """The duration of a run, from the seconds of a step and of a visit's transfers.

    `steps_s` and `moves` have one entry for each block, or one entry where all blocks are visited together.
    Transfers run beside compute; what takes longer than the visit's steps is exposed. `seq_len`: tokens in a
    sample, None where samples are no sequences.
    """
    visits, steps = queue.num_visits / len(steps_s), min(queue.visit_steps, queue.num_steps)
    waits = [
        move.waited_s + max(move.total_s - move.waited_s - steps * step, 0.0)
        for step, move in zip(steps_s, moves, strict=True)
    ]
    step_s, exposed_s = sum(steps_s) / len(steps_s), sum(waits) / len(waits)
    run_s = sum(queue.num_steps * step + visits * wait for step, wait in zip(steps_s, waits, strict=True))
    samples_per_s = batch_size * queue.total_steps / run_s
    return Duration(
        step_s=step_s,
        visit_s=steps * step_s + exposed_s,
        run_s=run_s,
        samples_per_s=samples_per_s,
        tokens_per_s=None if seq_len is None else batch_size * seq_len * queue.total_steps / run_s,
        moving_s=sum(move.total_s for move in moves) / len(moves),
        exposed_s=exposed_s,
        disk_written_bytes=written_bytes,
    )
