"""Decoders from a folder: the held-out loss per label, with its perplexity."""

from __future__ import annotations

from typing import Any

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import headline, test_batches
from lowmem.inference.frozen_run import FrozenRun


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    """The rows' shares make the mean over rows the mean over the labels of the whole test part."""
    return {**headline(frozen.losses(test_batches(frozen, data))), "per_block": []}
