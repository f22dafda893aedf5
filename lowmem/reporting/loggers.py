"""Sends a run's telemetry on to TensorBoard, Weights & Biases or Trackio while it trains.

Each logger is a listener of the trainer. `telemetry.jsonl` stays the record of the run. None of the three
packages is a dependency of lowmem: the one that is asked for must be installed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.packages import is_there
from lowmem.errors import ConfigError, nearest
from lowmem.reporting.telemetry import Listener

NOT_LOGGED = ("event", "time", "visit", "block", "step", "blocks", "visits_done")
LOGGERS = ("tensorboard", "trackio", "wandb")


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step's, a visit's or an evaluation's record, by tag: `train/loss/block-2`,
    `memory/host_bytes`, `result/accuracy`, ...
    """
    if record["event"] == "evaluated":
        return {f"result/{record['metric']}": float(record["value"])}
    if record["event"] not in ("step", "visited"):
        return {}
    block = record.get("block")
    found = {}
    for name, value in record.items():
        if name in NOT_LOGGED or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group = "memory" if name.endswith("_bytes") else "time" if name.endswith("_s") else "train"
        of_block = f"/block-{block}" if name == "loss" and block is not None else ""
        found[f"{group}/{name}{of_block}"] = float(value)
    return found


@contextlib.contextmanager
def open_logger(name: str, run_dir: Path, settings: dict[str, Any]) -> Iterator[Listener]:
    """Yields a listener that sends records to the logger `name`, and sends what is pending at the end.

    `settings`: what the logger shows as the run's configuration. Raises ConfigError if the name is unknown or
    the package is not installed.
    """
    require_logger(name)
    opened = _tensorboard(run_dir) if name == "tensorboard" else _tracker(name, run_dir, settings)
    with opened as listener:
        yield listener


@contextlib.contextmanager
def _tensorboard(run_dir: Path) -> Iterator[Listener]:
    library = importlib.import_module("torch.utils.tensorboard")
    writer, steps_sent = None, 0

    def send(record: dict[str, Any]) -> None:
        nonlocal writer, steps_sent
        if writer is None:  # made with the first record: a folder that holds other things is no new run's
            writer = library.SummaryWriter(str(run_dir / "tensorboard"))
        steps_sent += record["event"] == "step"
        for tag, value in scalars(record).items():
            # a block's loss runs over the block's own steps, all else over the steps of this process
            step = record["step"] if "/loss/" in tag else steps_sent
            writer.add_scalar(tag, value, step, walltime=record["time"])

    try:
        yield send
    finally:
        if writer is not None:
            writer.close()


@contextlib.contextmanager
def _tracker(name: str, run_dir: Path, settings: dict[str, Any]) -> Iterator[Listener]:
    """Weights & Biases or Trackio: both have the same three functions."""
    module: Any = importlib.import_module(name)
    module.init(project="lowmem", name=run_dir.resolve().name, config=settings)

    def send(record: dict[str, Any]) -> None:
        values = scalars(record)
        if values:
            module.log({**values, **({"block_step": record["step"]} if "step" in record else {})})

    try:
        yield send
    finally:
        module.finish()


def require_logger(name: str) -> None:
    """Raises ConfigError if the name is unknown or its package is not installed. Imports nothing."""
    if name not in LOGGERS:
        raise ConfigError(f"--log-to: found '{name}'; {nearest(name, LOGGERS)}")
    if not is_there(name):
        raise ConfigError(
            f"--log-to: {name} is not installed; allowed: without --log-to, or after pip install {name}"
        )
