"""Counts what ranks send to each other, to the byte. It loads without torch.

A round of independent blocks exchanges the shared part alone (`training/rounds.py`): what each block made of
it is cut into one slice for each rank, and each rank sends the mean of its slices to all others. Exact
back-propagation exchanges the gradient of the whole model in every step.
"""

from __future__ import annotations

from typing import NamedTuple

ITEM_BYTES = 4  # the shared part and its moments are fp32


class Cluster(NamedTuple):
    """Ranks, spread evenly over machines."""

    ranks: int
    machines: int

    @property
    def local(self) -> int:
        """Ranks on a machine, at most."""
        return -(-self.ranks // self.machines)


def slice_numel(numel: int, ranks: int) -> int:
    """Elements of each rank's slice of a vector; the last slice is filled up with zeros."""
    return -(-numel // ranks)


def round_bytes(shared_bytes: int, num_blocks: int, ranks: int) -> int:
    """What all ranks send in a round. `shared_bytes`: of the shared part's arena."""
    part = slice_numel(shared_bytes // ITEM_BYTES, ranks) * ITEM_BYTES
    return (num_blocks + ranks) * (ranks - 1) * part


def round_link_bytes(shared_bytes: int, num_blocks: int, cluster: Cluster) -> int:
    """What the busiest link carries one way in a round: that of a machine, or of a rank where there is one
    machine.
    """
    part = slice_numel(shared_bytes // ITEM_BYTES, cluster.ranks) * ITEM_BYTES
    inside = cluster.local if cluster.machines > 1 else 1
    blocks = min(-(-num_blocks // cluster.ranks) * inside, num_blocks)
    return (blocks + inside) * (cluster.ranks - inside) * part


def gradient_link_bytes(gradient_bytes: int, ranks: int) -> int:
    """What each link carries one way in a step of data parallel training: a ring's reduce, and its gather."""
    return 2 * (ranks - 1) * slice_numel(gradient_bytes, ranks)
