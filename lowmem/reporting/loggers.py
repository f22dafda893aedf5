"""A run's telemetry sent on, record by record, to TensorBoard, Weights & Biases or Trackio: listeners of the
trainer.

`telemetry.jsonl` stays the record of the run. None of the three is a dependency: one that is asked for must
be installed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.errors import ConfigError, nearest
from lowmem.reporting.telemetry import Listener

NOT_LOGGED = ("event", "time", "visit", "block", "step", "blocks", "visits_done")
LOGGERS = ("tensorboard", "trackio", "wandb")


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """`train/loss/block-2`, `memory/host_bytes`, `time/compute_s` ...: what a step or a visit tells in
    numbers.
    """
    if record["event"] not in ("step", "visited"):
        return {}
    found = {}
    for name, value in record.items():
        if name in NOT_LOGGED or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        group = "memory" if name.endswith("_bytes") else "time" if name.endswith("_s") else "train"
        block = record.get("block")
        found[f"{group}/{name}{f'/block-{block}' if name == 'loss' and block is not None else ''}"] = float(
            value
        )
    return found


@contextlib.contextmanager
def open_logger(name: str, run_dir: Path, settings: dict[str, Any]) -> Iterator[Listener]:
    """A listener that sends records on; what is pending is sent at the end.

    Raises ConfigError: unknown name, or not installed.
    """
    if name not in LOGGERS:
        raise ConfigError(f"--log-to: found '{name}'; {nearest(name, LOGGERS)}")
    sent = 0
    if name == "tensorboard":
        writer = _module("torch.utils.tensorboard", name).SummaryWriter(str(run_dir / "tensorboard"))

        def draw(record: dict[str, Any]) -> None:
            nonlocal sent
            sent += record["event"] == "step"
            for tag, value in scalars(record).items():
                writer.add_scalar(
                    tag, value, record["step"] if "/loss/" in tag else sent, walltime=record["time"]
                )

        try:
            yield draw
        finally:
            writer.close()
        return

    module = _module(name, name)
    module.init(project="lowmem", name=run_dir.resolve().name, config=settings)

    def log(record: dict[str, Any]) -> None:
        values = scalars(record)
        if values:
            module.log({**values, **({"block_step": record["step"]} if "step" in record else {})})

    try:
        yield log
    finally:
        module.finish()


def _module(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"--log-to: {package} is not installed; allowed: without --log-to, or after pip install {package}"
        ) from None
