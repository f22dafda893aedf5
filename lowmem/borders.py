"""What crosses the borders between blocks in a step of exact back-propagation, kept while the blocks come and go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowmem.config import Tier

RANDOM_STATE_BYTES = 5056  # of the generator on the CPU


@dataclass(frozen=True)
class BorderBytes:
    """What the borders take, by tier."""

    device: int = 0
    host: int = 0
    disk: int = 0


def border_bytes(tier: Tier, border: int, waiting: int, num_blocks: int, parts: int) -> BorderBytes:
    """`border`, `waiting`: bytes of a micro-batch at one border, and of what else of it waits for the whole step."""
    everything = (num_blocks + 1) * parts * border
    return BorderBytes(device=parts * waiting + everything, host=num_blocks * parts * RANDOM_STATE_BYTES)


class Borders:
    """Tensors [B, T, D] by row and micro-batch. Row b is block b's input; one row more holds the gradient of the border that backward is at.

    These stay on the device.
    """

    def __init__(self) -> None:
        self._there: dict[tuple[int, int], Tensor] = {}

    def put(self, row: int, part: int, h: Tensor) -> None:
        self._there[row, part] = h

    def get(self, row: int, part: int) -> Tensor:
        return self._there[row, part]
