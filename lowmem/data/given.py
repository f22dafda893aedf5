"""Batches that a Python program gives: arrays or tensors by name, or a pair of input and target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lowmem.data.datasets import Dataset
from lowmem.errors import DataError
from lowmem.units import shown

PAIR = ("input", "target")  # the names of a batch that is a pair


def named(batch: object, where: str) -> dict[str, Any]:
    """A batch by names. Raises DataError for what is neither a mapping nor a pair."""
    if isinstance(batch, Mapping) and batch:
        return dict(batch)
    if isinstance(batch, list | tuple) and len(batch) == len(PAIR):
        return dict(zip(PAIR, batch, strict=True))
    found = shown(type(batch).__name__, 60)
    if isinstance(batch, list | tuple | Mapping):
        found = f"{found} of {len(batch)}" if batch else "no arrays"
    raise DataError(
        f"{where}: found {found}; allowed: arrays by name, or a pair of input and target; return one of these"
    )


def test_part(batches: Iterable[object]) -> Dataset:
    """The rows of all batches, as the test part of a data set. Raises DataError where they do not join."""
    found = [named(batch, f"data: batch {index}") for index, batch in enumerate(batches)]
    if not found:
        raise DataError("data: found no batches; allowed: at least one; give some")
    names = list(found[0])
    for index, batch in enumerate(found):
        if set(batch) != set(names):
            raise DataError(
                f"data: batch {index} holds {', '.join(batch)}; allowed: {', '.join(names)}, as in batch 0; "
                "give the same names in all"
            )
    try:
        rows = {name: np.concatenate([_array(batch[name]) for batch in found]) for name in names}
    except ValueError as problem:
        raise DataError(f"data: {shown(problem, 200)}; give rows of one shape by name") from None
    counts = {name: len(array) for name, array in rows.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        words = ", ".join(f"{count} of '{name}'" for name, count in counts.items())
        raise DataError(f"data: found {words}; allowed: as many rows of each, 1 or more; give such batches")
    return Dataset(train=rows, test=rows)


def _array(value: Any) -> np.ndarray[Any, Any]:
    """On the CPU; numpy knows no bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.atleast_1d(np.asarray(value))
