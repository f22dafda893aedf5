"""Rounds whose visits all begin from the same shared part (blocks.order: together).

A round is one visit of every block. Each begins from the shared part with which the round began. At its end
stands the mean of what the visits made of it, weights and moments alike, summed in fp32 in the order of the
blocks. So a round is the same to the bit whether one process makes its visits one after another, or several
ranks make them at the same time. It is committed as a whole.

Each rank sums one slice of the vector, so that what it sends and receives does not grow with their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from lowmem.blocks.order import Visit
from lowmem.blocks.run_dir import BlockRecord, FileRecord, RankRecord, block_key
from lowmem.training.attempt import Attempt
from lowmem.training.memory_guard import check_available
from lowmem.training.ranks import Ranks

# Trains one visit, given the one after it on this rank. Returns its figures and the block to store.
MakeVisit = Callable[[Visit, Visit | None], tuple[BlockRecord, Tensor]]


class RoundMean:
    """The mean of the shared parts of a round, as it comes in. All are fp32 vectors of one size."""

    def __init__(self, ranks: Ranks, num_blocks: int) -> None:
        self._ranks, self._num_blocks, self._taken = ranks, num_blocks, 0
        self._sum: Tensor | None = None  # of this rank's slice

    def add(self, vector: Tensor) -> None:
        """Takes what this rank's next block made; every rank calls it equally often. `vector`: of a rank that
        has no block left it is not looked at.
        """
        senders = min(self._ranks.size, self._num_blocks - self._taken)
        self._taken += senders
        for part in self._ranks.slices(vector, senders):
            self._sum = part.clone() if self._sum is None else self._sum.add_(part)

    def into(self, vector: Tensor) -> None:
        assert self._sum is not None and self._taken == self._num_blocks
        self._ranks.joined(self._sum.div_(self._num_blocks), vector)


class Rounds:
    """Makes this rank's visits of each round, and commits the round with the other ranks."""

    def __init__(self, attempt: Attempt, make_visit: MakeVisit) -> None:
        self.attempt, self.make_visit, self.ranks = attempt, make_visit, attempt.ranks
        self._begin = torch.empty_like(attempt.shared.arena.buffer)

    def train(self) -> None:
        """All rounds that are still to make."""
        attempt, queue = self.attempt, self.attempt.queue
        visits_done = attempt.state.visits_done
        while visits_done < queue.num_visits:
            visits = queue.round_of(visits_done)
            visits_done += len(visits)
            upcoming = queue.round_of(visits_done) if visits_done < queue.num_visits else []
            self._make_round(visits, upcoming)
            check_available(attempt.plan, attempt.monitor.last, committed=True)

    def _make_round(self, visits: list[Visit], upcoming: list[Visit]) -> None:
        attempt, ranks, visits_done = self.attempt, self.ranks, visits[-1].index + 1
        shared = attempt.shared.arena.buffer
        self._begin.copy_(shared)
        mean = RoundMean(ranks, len(visits))
        mine = [visits[block] for block in ranks.blocks_of(len(visits))]
        later = [*mine[1:], upcoming[mine[0].blocks[0]] if upcoming else None]
        visited, files = list[BlockRecord](), dict[str, Future[FileRecord]]()
        for visit, following in zip(mine, later, strict=True):
            shared.copy_(self._begin)
            attempt.shared.refresh()
            record, buffer = self.make_visit(visit, following)
            visited.append(record)
            attempt.empty_pool()
            files[block_key(record.block)] = attempt.stream.write_beside(record.block, buffer, visits_done)
            self._exchange(lambda: mean.add(shared.view(torch.float32)))
        if len(mine) < -(-len(visits) // ranks.size):  # nothing of it is sent, but the others' slices come
            self._exchange(lambda: mean.add(shared.view(torch.float32)))
        self._exchange(lambda: mean.into(shared.view(torch.float32)))
        attempt.shared.refresh()
        self._commit(visits_done, visited, files)

    def _exchange(self, call: Callable[[], None]) -> None:
        """Compute stands still meanwhile; to wait for the slowest rank is a part of it."""
        began = time.perf_counter()
        call()
        self.attempt.clock.exposed_transfer_s += time.perf_counter() - began

    def _commit(
        self, visits_done: int, visited: list[BlockRecord], files: dict[str, Future[FileRecord]]
    ) -> None:
        """Every rank's files are on the disk before rank 0 names them."""
        attempt, began = self.attempt, time.perf_counter()
        written = {key: file.result().model_dump() for key, file in files.items()}
        found = self.ranks.gathered(
            {
                "visited": [record.model_dump() for record in visited],
                "files": written,
                "figures": attempt.rank_record().model_dump(),
            }
        )
        attempt.clock.commit_s += time.perf_counter() - began
        if self.ranks.leads:
            every = [BlockRecord(**record) for rank in found for record in rank["visited"]]
            records = {key: FileRecord(**record) for rank in found for key, record in rank["files"].items()}
            attempt.commit_round(
                visits_done, every, records, [RankRecord(**rank["figures"]) for rank in found]
            )
        else:
            attempt.take_round(visits_done, visited)
