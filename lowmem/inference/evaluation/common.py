"""Parts that the evaluations share."""

from __future__ import annotations

import torch

from lowmem.data.datasets import Dataset
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models.base import Batch


def test_batches(frozen: FrozenRun, data: Dataset) -> list[Batch]:
    """The test part on the device; with `eval.num_batches` that many batches, evenly spaced so that they
    speak for all of it.
    """
    config = frozen.plan.recipe.eval
    total = -(-data.num_test // config.batch_size)
    count = min(config.num_batches or total, total)
    wanted = {index * total // count for index in range(count)}
    return [
        {name: torch.from_numpy(array).to(frozen.device) for name, array in batch.items()}
        for index, batch in enumerate(data.test_batches(config.batch_size))
        if index in wanted
    ]
