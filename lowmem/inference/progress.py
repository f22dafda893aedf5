"""How far a long evaluation is: a line every few seconds, for whoever waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from lowmem.units import format_seconds

PERIOD_S = 5.0  # between two lines
Say = Callable[[str, float], None]  # a line, and the share of the present stage that is done, from 0 to 1


def silent(line: str, share: float) -> None:
    """Says nothing."""


class Progress:
    """Says how far one stage is: at its beginning, and then every few seconds."""

    def __init__(self, say: Say, stage: str, total: int) -> None:
        """`total`: of what `add` counts. `stage`: what the lines begin with."""
        self._say, self._stage, self._total, self._done = say, stage, max(total, 1), 0
        self._began = self._said = time.monotonic()
        say(f"{stage}: begins", 0.0)

    def add(self, count: int) -> None:
        self._done, now = self._done + count, time.monotonic()
        if now - self._said >= PERIOD_S:
            self._said, share = now, min(self._done / self._total, 0.99)
            left_s = (now - self._began) * (1 - share) / max(share, 1e-9)
            self._say(f"{self._stage}: {share:.0%}, about {format_seconds(left_s)} left", share)
