"""How far a long evaluation is, by the samples that have passed the layers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from lowmem.inference.frozen_run import FrozenRun
from lowmem.units import format_bytes, format_seconds

PERIOD_S = 10.0  # between two lines
Say = Callable[[str], None]


@contextlib.contextmanager
def shown_progress(frozen: FrozenRun, num_test: int, say: Say) -> Iterator[None]:
    """While the evaluation of so many test samples runs, says every few seconds how far it is.

    An evaluation whose batches are cut to stay in the budget says that first.
    """
    sizes = frozen.size_for(num_test)
    if sizes.is_split:
        allowed = format_bytes(frozen.plan.budget.device_bytes)
        say(
            f"evaluation: batches of {sizes.batch_size} in micro-batches of {sizes.micro_batch_size}, "
            f"to stay within the budget of {allowed}"
        )
    began = said = time.monotonic()
    done = 0

    def passed(layer: nn.Module, given: tuple[Tensor, ...], h: Tensor) -> None:
        nonlocal done, said
        done, now = done + len(h), time.monotonic()
        if now - said >= PERIOD_S:
            said, share = now, min(done / max(sizes.layer_calls, 1), 0.99)
            left_s = (now - began) * (1 - share) / max(share, 1e-9)
            say(f"evaluation: {share:.0%}, about {format_seconds(left_s)} left")

    hooks = [layer.register_forward_hook(passed) for layer in frozen.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
