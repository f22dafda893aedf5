"""A batch of the user's own that has other rows than the recipe says is refused and not cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHORT, recipe_with

from lowmem.data.datasets import describe_data, load_data
from lowmem.errors import DataError
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning.plan import make_plan
from lowmem.training.trainer import Trainer

ROWS = 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: {name: rows[:-1] for name, rows in batch.items()}, "'image' has 15 rows; allowed: 16"),
        (lambda batch: {**batch, "label": np.append(batch["label"], 0)}, "'label' has 17 rows; allowed: 16"),
        (lambda batch: {name: rows[:0] for name, rows in batch.items()}, "'image' has 0 rows; allowed: 16"),
        (lambda batch: {**batch, "label": np.int64(3)}, "'label' has no rows; allowed: 16"),
        (lambda batch: {}, "found no arrays; allowed: arrays by name"),
    ],
    ids=["few", "many", "none", "a_number", "nothing"],
)
@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_a_batch_of_other_rows_is_refused_with_both_numbers(
    method: str, change: Any, words: str, tmp_path: Path
) -> None:
    recipe = recipe_with(**{**SHORT, "train__batch_size": ROWS, "method": method})
    build = model_builder(recipe, describe_data(recipe.data))
    data = load_data(recipe.data)
    trainer = Trainer(build, make_plan(build, recipe, load_profile("cpu-4gib"), tmp_path), tmp_path / "run")

    def batches(step: int) -> Any:
        batch = data.batch(0, step, ROWS)
        return change(batch) if step == 1 else batch

    with pytest.raises(DataError, match="batch of step 1: ") as caught:
        trainer.fit(batches)
    assert words in str(caught.value) and "\n" not in str(caught.value)
