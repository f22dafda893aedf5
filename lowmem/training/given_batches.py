"""Batches that a Python program gives, as a function of the step, and what is asked of each."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from lowmem.data.given import named
from lowmem.errors import DataError
from lowmem.recipe import TrainConfig
from lowmem.schedule import mix_seed

# step -> arrays or tensors by name, or a pair (input, target); first dimension train.batch_size
Batches = Callable[[int], Any]
# The samplers whose order follows from torch's generator alone, so that an epoch can be drawn again.
SAMPLERS = (
    torch_data.SequentialSampler,
    torch_data.RandomSampler,
    torch_data.SubsetRandomSampler,
    torch_data.WeightedRandomSampler,
)


def batches_of(given: Batches | torch_data.DataLoader[Any], train: TrainConfig) -> Batches:
    """Batches by step. Raises DataError for a DataLoader whose batches cannot be found again."""
    return LoaderBatches(given, train) if isinstance(given, torch_data.DataLoader) else given


def checked_batch(batch: Any, example: Mapping[str, Tensor], num_rows: int, step: int) -> dict[str, Tensor]:
    """A step's batch as tensors.

    Raises DataError unless it holds the names of `example`, and each has `num_rows` rows that are no larger
    than there: the plan counted those.
    """
    where = f"batch of step {step}"
    arrays = named(batch, where)
    for name in example:
        if name not in arrays:
            raise DataError(
                f"{where}: '{name}' is not in it, but {', '.join(map(str, arrays))}; allowed: "
                f"{', '.join(example)}, as in the model's example batch; add it"
            )
    try:
        tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
    except (TypeError, ValueError, RuntimeError) as problem:
        said = " ".join(str(problem).split())[:200]
        raise DataError(f"{where}: found no array of numbers ({said}); give arrays or tensors") from None
    for name, rows in tensors.items():
        found = rows.shape[0] if rows.ndim else "no"
        if found != num_rows:
            raise DataError(
                f"{where}: '{name}' has {found} rows; allowed: {num_rows} = train.batch_size; "
                "give as many, or change train.batch_size in another --run-dir"
            )
        most = example[name].shape[1:] if name in example else rows.shape[1:]
        if rows.ndim != 1 + len(most) or any(n > m for n, m in zip(rows.shape[1:], most, strict=True)):
            raise DataError(
                f"{where}: '{name}' has rows of shape {list(rows.shape[1:])}; allowed: at most {list(most)}, "
                "with which the plan was made; give such rows"
            )
    return tensors


class LoaderBatches:
    """The batches of a DataLoader by step: epoch after epoch, each in an order of its own.

    The order of an epoch follows from `train.seed` and the epoch, and what a row's transforms draw from
    torch, numpy and Python follows from the seed, the step and the row's place. So a run that goes on sees
    what an unbroken one would have seen, with any number of workers.
    """

    def __init__(self, loader: torch_data.DataLoader[Any], train: TrainConfig) -> None:
        self._loader, self._seed, self._next_step = loader, train.seed, -1
        self._rows: Iterator[Any] = iter(())
        self._batches, self._sampler = _repeatable(loader)
        self._length = len(self._batches)
        size, short = self._batches.batch_size, False
        if not self._batches.drop_last:
            short = len(self._sampler) % size > 0
        if size != train.batch_size or short or not self._length:
            raise DataError(
                f"DataLoader: found {self._length} batches of {size}"
                f"{', the last one smaller' if short else ''}; allowed: one or more of {train.batch_size} = "
                "train.batch_size; set batch_size, and drop_last=True"
            )

    def __call__(self, step: int) -> Any:
        with _undisturbed():
            if step != self._next_step or step % self._length == 0:
                self._rows = self._from(step)
            self._next_step = step + 1
            return next(self._rows)

    def _from(self, step: int) -> Iterator[Any]:
        """The batches of the step's epoch, from that step on."""
        epoch, place = divmod(step, self._length)
        seed = mix_seed(self._seed, "epoch", epoch)
        torch.default_generator.manual_seed(seed)
        own = getattr(self._sampler, "generator", None)
        if own is not None:
            own.manual_seed(seed)
        indices = itertools.islice(iter(self._batches), place, None)
        loader = self._loader
        return iter(
            torch_data.DataLoader(
                _SeededRows(loader.dataset),
                batch_sampler=_Keyed(indices, self._seed, step),
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                prefetch_factor=loader.prefetch_factor,
            )
        )


def _repeatable(loader: torch_data.DataLoader[Any]) -> tuple[torch_data.BatchSampler, Any]:
    """The loader's batches of indices, and the sampler behind them, where an epoch can be drawn again."""
    batches = loader.batch_sampler
    if isinstance(loader.dataset, torch_data.IterableDataset) or batches is None:
        raise DataError(
            f"DataLoader: found {type(loader.dataset).__name__}, without batches of numbered rows, so no "
            "place in it can be found again when a run goes on; allowed: a data set of numbered rows, with a "
            "batch_size; or give a function of the step"
        )
    sampler = batches.sampler if type(batches) is torch_data.BatchSampler else batches
    if not isinstance(batches, torch_data.BatchSampler) or type(sampler) not in SAMPLERS:
        names = ", ".join(each.__name__ for each in SAMPLERS)
        raise DataError(
            f"DataLoader: found the sampler {type(sampler).__name__}, whose order cannot be drawn again when "
            f"a run goes on; allowed: {names}; or give a function of the step"
        )
    return batches, sampler


class _Keyed:
    """Batches of (seed of the row's draws, index)."""

    def __init__(self, indices: Iterator[list[int]], seed: int, step: int) -> None:
        self._indices, self._seed, self._step = indices, seed, step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, rows in enumerate(self._indices, self._step):
            yield [(mix_seed(self._seed, "row", step, place), row) for place, row in enumerate(rows)]


class _SeededRows(torch_data.Dataset[Any]):
    def __init__(self, rows: torch_data.Dataset[Any]) -> None:
        self._rows = rows

    def __getitem__(self, key: tuple[int, int]) -> Any:
        seed, index = key
        _seed_all(seed)
        return self._rows[index]


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # this process draws on the CPU
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Generators are after it as they were before."""
    torchs, pythons, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torchs)
        random.setstate(pythons)
        np.random.set_state(numpys)
