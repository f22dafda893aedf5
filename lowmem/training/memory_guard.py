"""The guard of memory: a run takes none that is not there.

It looks before a run begins, while the run goes on, and when an allocation fails all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from lowmem.blocks.order import Visit
from lowmem.blocks.run_dir import RunDir
from lowmem.errors import BudgetError, ShortageError
from lowmem.machine.memory import available_bytes
from lowmem.machine.monitor import Peak, Sample, anonymous_bytes
from lowmem.planning.plan import Plan
from lowmem.reporting.telemetry import Listener, Recorder
from lowmem.units import format_bytes

# With less than this part of the memory that should be left, a run stops at once and not at its next commit.
AT_ONCE = 2
KEPT = "the last commit is kept"


def require_available(plan: Plan) -> None:
    """Raises BudgetError if the machine cannot give now what the plan will take of the host."""
    need, have = plan.predicted.host_peak_bytes - held_bytes(), available_bytes()
    if need > have:
        raise BudgetError(
            f"plan: needs {format_bytes(need)} more of the host; the machine has {format_bytes(have)} "
            "available "
            f"now, whatever profile {plan.profile.name} allows; close other programs, or plan with a larger "
            "host.reserve_gib",
            plan.table(),
        )


def held_bytes() -> int:
    """What this process holds already, anonymous resident."""
    return anonymous_bytes(psutil.Process())


def check_available(plan: Plan, sample: Sample, committed: bool) -> None:
    """Raises ShortageError where other programs have left too little memory.

    Between two commits (`committed` false) it raises only where far too little is left.
    """
    left, least = sample.host_available_bytes, plan.profile.min_available_bytes
    if left is None or left >= (least if committed else least // AT_ONCE):
        return
    raise ShortageError(
        f"the machine has {format_bytes(left)} of memory left; allowed: {format_bytes(least)} "
        f"(host.min_available_gib of profile {plan.profile.name}); stopped before it swaps, {KEPT}: close "
        "other "
        "programs, then run the same command again"
    )


def smaller(plan: Plan, micro_batch_size: int) -> Plan:
    """The plan with a smaller micro-batch.

    The gradients of several micro-batches add up, so no parameter is updated during backward any more.
    """
    during_backward = plan.settings.during_backward and micro_batch_size == plan.recipe.train.batch_size
    settings = plan.settings.model_copy(
        update={"micro_batch_size": micro_batch_size, "during_backward": during_backward}
    )
    share = micro_batch_size / plan.settings.micro_batch_size
    predicted = plan.predicted.model_copy(update={"pool_bytes": int(share * plan.predicted.pool_bytes)})
    return plan.model_copy(update={"settings": settings, "predicted": predicted})


def next_smaller(micro_batch_size: int) -> int | None:
    """Half of it, or the largest divisor below half, because it must go on dividing the batch."""
    return next((size for size in range(micro_batch_size // 2, 0, -1) if micro_batch_size % size == 0), None)


def shortage(plan: Plan, visit: Visit | None, peak: Peak) -> ShortageError:
    """What to say about an allocation that failed. `visit`: the one under way, None before the first."""
    where = "before the first visit"
    if visit is not None:
        where = f"visit {visit.index}, block {', '.join(map(str, visit.blocks))}"
    predicted, settings = plan.predicted, plan.settings
    half = next_smaller(settings.micro_batch_size)
    cures = []
    if half is not None:
        cures.append(f"train.on_oom: shrink, which goes on from there with micro-batches of {half}")
    if not settings.recompute:
        cures.append("train.recompute: true in another --run-dir")
    cures.append("a profile with a larger reserve in another --run-dir")
    return ShortageError(
        f"{where}: out of memory at micro-batch {settings.micro_batch_size}; predicted peak "
        f"{format_bytes(predicted.device_peak_bytes)} on the device, "
        f"{format_bytes(predicted.host_peak_bytes)} on "
        f"the host; measured {format_bytes(peak.device_bytes)} and {format_bytes(peak.host_bytes)} before it "
        f"failed; {KEPT}: set {', or '.join(cures)}"
    )


def go_on_smaller(
    run: RunDir, plan: Plan, visit: Visit | None, peak: Peak, listeners: Sequence[Listener]
) -> int:
    """Commits that the run goes on from the last commit with a smaller micro-batch. Returns its size.

    Raises ShortageError where the recipe forbids that or no smaller size is left.
    """
    state, size = run.read_state(), next_smaller(plan.settings.micro_batch_size)
    if (
        plan.recipe.train.on_oom == "stop"
        or size is None
        or state is None
        or plan.recipe.optimizer.during_backward is True
    ):
        raise shortage(plan, visit, peak) from None
    run.acquire()
    try:
        run.commit(state.model_copy(update={"micro_batch_size": size}))
        recorder = Recorder(run.telemetry_path)
        recorder.listeners += listeners
        recorder.write(
            "warning",
            message=f"out of memory: on from visit {state.visits_done} with micro-batches of {size}",
        )
        recorder.close()
    finally:
        run.release()
    return size
