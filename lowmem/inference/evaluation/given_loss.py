"""Models with a loss of the user's: its mean over the given rows."""

from __future__ import annotations

import math
from typing import Any

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import test_batches
from lowmem.inference.frozen_run import FrozenRun


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    """The mean over rows. Where the loss is a mean itself, a row counts as the mean of its micro-batch."""
    losses = frozen.losses(test_batches(frozen, data))
    error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None
    return {"metric": "loss", "value": float(losses.mean()), "value_std_error": error, "per_block": []}
