"""lowmem as a rank of `scripts/ranks`: exchanges wait as long as a slower link would take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from lowmem.cli import main


def paced(call: Callable[..., Any], sent: Callable[..., int]) -> Callable[..., Any]:
    rate, delay_s = float(os.environ["RANKS_BYTES_PER_S"]), float(os.environ["RANKS_DELAY_S"])

    def wait(self: Any, *arguments: Any) -> Any:
        before = sent(self)
        result = call(self, *arguments)
        time.sleep(delay_s + (sent(self) - before) / rate)
        return result

    return wait


def pace_all() -> None:
    """Blocks wait for what they have sent, an exact step for its gradient."""
    from lowmem.distributed.engine import EngineRun
    from lowmem.distributed.exchange import gradient_link_bytes
    from lowmem.distributed.ranks import JoinedRanks

    def steps_bytes(engine: Any) -> int:
        engine.paced_steps = getattr(engine, "paced_steps", -1) + 1
        gradient = 4 * sum(weight.numel() for weight in engine.parameters.values())
        return (engine.paced_steps + 1) // 2 * gradient_link_bytes(gradient, engine.ranks.size)

    for name in ("slices", "joined"):
        setattr(JoinedRanks, name, paced(getattr(JoinedRanks, name), lambda ranks: ranks.exchanged_bytes))
    EngineRun._step = paced(EngineRun._step, steps_bytes)  # type: ignore[method-assign]


if __name__ == "__main__":
    if "RANKS_BYTES_PER_S" in os.environ:
        pace_all()
    main()
