"""The planned evaluation of a deep model."""

from __future__ import annotations

import pytest

from lowmem.job import plan_recipe
from lowmem.planning import evaluation


def test_a_deep_model_that_streams_is_counted_by_two_layers_as_by_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = ["model.num_layers=6", "model.dim=64", "model.num_heads=2", "train.seq_len=32"]
    changes += ["offload.tier=disk", "blocks.num_blocks=3", "eval.num_batches=2"]

    def planned() -> evaluation.Evaluation:
        found = plan_recipe("stdlib-causal-end-to-end", "cpu-4gib", changes).predicted.evaluation
        assert found is not None and found.seconds is not None
        return found

    by_two = planned()
    monkeypatch.setattr(evaluation, "_first_tell", lambda *_: False)
    assert planned() == by_two
