"""Decoders from a folder: the held-out loss per label, with its perplexity."""

from __future__ import annotations

from typing import Any

from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.common import headline, test_batches
from lowmem.inference.frozen_run import FrozenRun
from lowmem.objectives.next_tokens import IGNORED


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    """The mean over the labels of the batches that are used: all of the test part, or some of it."""
    batches = test_batches(frozen, data)
    rows = sum(len(batch["labels"]) for batch in batches)
    labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    share = float(batches[0]["share"][0])  # the same in all test rows: rows over labels of the whole part
    losses = frozen.losses(batches) * (rows / labels / share)
    return {**headline(losses), "num_labels": labels, "per_block": []}
