"""Parts that the evaluations share.

The test part is gone through in micro-batches, *parts* of an evaluation batch, so that an evaluation stays in
the budget. No draw depends on how a batch is cut. Where the whole batch fits, the figures are those of the
whole batch to the bit; smaller parts can change the last digits, because a matrix product of fewer rows may
add up in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.data.datasets import Dataset
from lowmem.inference.frozen_run import FrozenRun, spans
from lowmem.objectives.base import Batch


class Part(NamedTuple):
    """Some samples of an evaluation batch."""

    whole: Batch  # the batch that it is a part of
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def batch(self) -> Batch:
        return {name: value[self.start : self.stop] for name, value in self.whole.items()}

    def shuffled(self, *names: str) -> Batch:
        """Every sample with `names` of the one before it in the evaluation batch."""
        before = torch.arange(self.start - 1, self.stop - 1)
        wanted = {name: self.whole[name] for name in names}
        return {
            **self.batch,
            **{n: whole[before.to(whole.device) % len(whole)] for n, whole in wanted.items()},
        }


def batch_sizes(frozen: FrozenRun, data: Dataset) -> dict[int, int]:
    """Samples of each evaluation batch that is used, by its place in the test part.

    With `eval.num_batches` these are that many batches, evenly spaced so that they speak for all of it.
    """
    config = frozen.plan.recipe.eval
    total = -(-data.num_test // config.batch_size)
    count = min(config.num_batches or total, total)
    wanted = sorted({index * total // count for index in range(count)})
    return {i: min(config.batch_size, data.num_test - i * config.batch_size) for i in wanted}


def open_batches(frozen: FrozenRun, data: Dataset) -> Iterator[Batch]:
    """The batches of `batch_sizes` on the device, one after the other."""
    wanted = batch_sizes(frozen, data)
    for index, batch in enumerate(data.test_batches(frozen.plan.recipe.eval.batch_size)):
        if index in wanted:
            yield {name: torch.from_numpy(array).to(frozen.device) for name, array in batch.items()}


def parts_of(frozen: FrozenRun, batch: Batch) -> list[Part]:
    count = len(next(iter(batch.values())))
    return [Part(batch, *span) for span in spans(count, frozen.sized().micro_batch_size)]


def test_batches(frozen: FrozenRun, data: Dataset) -> list[Batch]:
    """The test part on the device."""
    frozen.size_for(data.num_test)
    return list(open_batches(frozen, data))


def test_parts(frozen: FrozenRun, data: Dataset) -> list[Part]:
    """The test part on the device, in micro-batches."""
    return [part for batch in test_batches(frozen, data) for part in parts_of(frozen, batch)]


class Walks:
    """The test part in groups of parts: each group passes all blocks in a walk of its own.

    `sizes` has the samples of every part of every group.
    """

    def __init__(self, frozen: FrozenRun, data: Dataset) -> None:
        sizes = frozen.size_for(data.num_test)
        self._frozen, self._data = frozen, data
        self.sizes: list[list[int]] = [[]]
        for count in batch_sizes(frozen, data).values():
            for start, stop in spans(count, sizes.micro_batch_size):
                if sum(self.sizes[-1]) + stop - start > sizes.walk_size and self.sizes[-1]:
                    self.sizes.append([])
                self.sizes[-1].append(stop - start)

    def __iter__(self) -> Iterator[list[Part]]:
        batches = open_batches(self._frozen, self._data)
        parts = (part for batch in batches for part in parts_of(self._frozen, batch))
        for sizes in self.sizes:
            yield [next(parts) for _ in sizes]


class Draws:
    """Normal numbers in one order, however the test part is grouped: one site after the other, and within a
    site sample after sample.

    A site is a place in the evaluation that draws once for each sample. With several groups everything is
    drawn twice, the first time to find where each group begins.
    """

    def __init__(self, seed: int, row: Sequence[int], groups: list[list[int]], num_sites: int) -> None:
        """`row`: shape of what one sample draws. `groups`: see `Walks.sizes`."""
        self._generator, self._row = torch.Generator().manual_seed(seed), tuple(row)
        self._states: dict[tuple[int, int], Tensor] = {}
        for site in range(num_sites if len(groups) > 1 else 0):
            for number, sizes in enumerate(groups):
                self._states[number, site] = self._generator.get_state()
                for size in sizes:
                    self.rows(size)

    def go_to(self, group: int, site: int) -> None:
        """The next rows are those of a group at a site. With one group sites come in their order anyway."""
        if self._states:
            self._generator.set_state(self._states[group, site])

    def rows(self, count: int) -> Tensor:
        """[count, *row], on the CPU."""
        return torch.randn(count, *self._row, generator=self._generator)


def headline(losses: Tensor) -> dict[str, Any]:
    """Mean nats per token over sequences [N], with the standard error of the mean and the perplexity."""
    mean = float(losses.mean())
    error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None
    return {"metric": "cross_entropy", "value": mean, "value_std_error": error, "perplexity": math.exp(mean)}
