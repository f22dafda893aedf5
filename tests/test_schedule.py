"""The learning rate of a step, by hand."""

from __future__ import annotations

import pytest

from lowmem.recipe import TrainConfig
from lowmem.schedule import learning_rate


def config(**keys: object) -> TrainConfig:
    return TrainConfig.model_validate({"num_steps": 100, "batch_size": 1, "lr": 2.0, **keys})


def test_a_cosine_falls_from_the_rate_to_nearly_nothing_after_a_linear_warm_up() -> None:
    train = config(warmup_steps=4)
    assert learning_rate(0, train) == pytest.approx(0.5)
    assert learning_rate(1, train) == pytest.approx(0.9998, abs=1e-4)
    assert learning_rate(50, train) == pytest.approx(1.0)
    assert 0 < learning_rate(99, train) < 1e-3
    assert learning_rate(99, config(lr_schedule="constant")) == 2.0


def test_of_a_model_that_grows_the_cosine_belongs_to_the_steps_after() -> None:
    train = config(warmup_steps=4)
    assert learning_rate(1, train, 60) == 1.0
    assert [learning_rate(step, train, 60) for step in (4, 30, 59, 60)] == [2.0] * 4
    assert learning_rate(80, train, 60) == pytest.approx(1.0)
    assert learning_rate(70, train, 60) == pytest.approx(2 * 0.8535533905932737)
    assert 0 < learning_rate(99, train, 60) < 1e-2
