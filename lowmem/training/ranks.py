"""What a trainer asks of the other ranks. `Ranks` itself is one process alone, which has nobody to ask.

Ranks train different blocks at the same time, in one run folder. Rank 0 opens it, commits and prints.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Ranks:
    """This process among the `size` that train together."""

    rank, size = 0, 1
    exchanged_bytes = 0  # tensors that this rank has sent to others so far

    @property
    def leads(self) -> bool:
        """Whether this rank opens the run folder, commits, evaluates and prints."""
        return self.rank == 0

    def blocks_of(self, num_blocks: int) -> range:
        """The blocks that this rank trains."""
        return range(self.rank, num_blocks, self.size)

    def told(self, content: Any = None) -> Any:
        """What rank 0 gives: JSON. The others wait for it."""
        return content

    def gathered(self, content: Any) -> list[Any]:
        """On rank 0 what each rank gives (JSON), in their order; on the others nothing, and no wait."""
        return [content]

    def slices(self, vector: Tensor, senders: int) -> list[Tensor]:
        """The first `senders` ranks each have a vector of the same size. Returns this rank's slice of each,
        in the order of the ranks. The slices of all ranks, one after another, are the vector.
        """
        return [vector]

    def joined(self, part: Tensor, vector: Tensor) -> None:
        """Fills `vector` with the slices of all ranks."""
        vector.copy_(part)


ALONE = Ranks()
