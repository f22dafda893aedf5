"""Parts that the evaluations share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowmem.data.datasets import Dataset
from lowmem.inference.frozen_run import FrozenRun
from lowmem.objectives.base import Batch


def test_batches(frozen: FrozenRun, data: Dataset) -> list[Batch]:
    """The test part on the device.

    With `eval.num_batches` these are that many batches, evenly spaced so that they speak for all of it.
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


def headline(losses: Tensor) -> dict[str, Any]:
    """Mean nats per token over sequences [N], with the standard error of the mean and the perplexity."""
    mean = float(losses.mean())
    error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None
    return {"metric": "cross_entropy", "value": mean, "value_std_error": error, "perplexity": math.exp(mean)}
