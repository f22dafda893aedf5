"""Telemetry sent on: real TensorBoard files read back; the other two stood in for by modules that note what
they are given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import run_short

from lowmem.errors import ConfigError
from lowmem.reporting.loggers import open_logger, scalars

STEP = {
    "event": "step",
    "time": 5.0,
    "visit": 0,
    "block": 1,
    "step": 3,
    "loss": 0.5,
    "lr": 0.1,
    "step_s": 0.2,
    "host_bytes": 7,
}
VISITED = {
    "event": "visited",
    "time": 6.0,
    "visit": 0,
    "blocks": [1],
    "loss": 0.4,
    "compute_s": 1.5,
    "device_peak_bytes": 9,
}


def test_a_record_becomes_numbers_by_group() -> None:
    assert scalars(STEP) == {
        "train/loss/block-1": 0.5,
        "train/lr": 0.1,
        "time/step_s": 0.2,
        "memory/host_bytes": 7.0,
    }
    assert scalars(VISITED) == {"train/loss": 0.4, "time/compute_s": 1.5, "memory/device_peak_bytes": 9.0}
    assert scalars({"event": "commit", "time": 1.0, "disk_bytes": 3}) == {}


def test_tensorboard_files_hold_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_logger("tensorboard", tmp_path, {}) as listener:
        for step in range(4):
            listener({**STEP, "step": step, "loss": 1.0 - step / 4})
        listener(VISITED)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss/block-1")] == [
        (0, 1.0),
        (1, 0.75),
        (2, 0.5),
        (3, 0.25),
    ]
    assert [event.value for event in events.Scalars("time/compute_s")] == [1.5]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_told_settings_and_numbers_and_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told: list[Any] = []
    module: Any = ModuleType(name)
    module.init = lambda **given: told.append(("init", given["name"], given["config"]))
    module.log = lambda values: told.append(values)
    module.finish = lambda: told.append("finish")
    monkeypatch.setitem(sys.modules, name, module)
    with (
        pytest.raises(KeyboardInterrupt),
        open_logger(name, tmp_path / "run", {"method": "end_to_end"}) as listener,
    ):
        listener(STEP)
        listener({"event": "open", "time": 1.0})
        raise KeyboardInterrupt
    assert told == [("init", "run", {"method": "end_to_end"}), {**scalars(STEP), "block_step": 3}, "finish"]


def test_an_unknown_or_missing_logger_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(ConfigError, match="found 'tensorbord'; did you mean 'tensorboard'"),
        open_logger("tensorbord", tmp_path, {}),
    ):
        pass
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="trackio is not installed"), open_logger("trackio", tmp_path, {}):
        pass


def test_a_logger_writes_nothing_into_a_run_s_folder_before_the_run_does(tmp_path: Path) -> None:
    """A new run refuses a folder that holds other things."""
    with open_logger("tensorboard", tmp_path / "run", {}) as listener:
        assert not (tmp_path / "run").exists()
        run_short(tmp_path / "run", [listener])
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_result_is_sent_under_the_name_of_its_metric() -> None:
    record = {"event": "evaluated", "time": 1.0, "metric": "accuracy", "value": 0.5}
    assert scalars(record) == {"result/accuracy": 0.5}
