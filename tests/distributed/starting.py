"""Starts real ranks on this machine, as a launcher does, but none that ends the others when one has died."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECIPE = """
schema: 1
method: diffusion_blocks
model: {name: vit, num_layers: 4, dim: 32, num_heads: 4, patch_size: 2, dropout: 0.1}
blocks: {num_blocks: 4, visit_steps: 2, order: together}
data: {name: digits}
train: {num_steps: 6, batch_size: 32, lr: 2.0e-3, warmup_steps: 2}
optimizer: {name: adamw8bit}
"""


def command(recipe: Path, run_dir: Path, *more: str) -> list[str]:
    options = ["--run-dir", str(run_dir), "--profile", "cpu-4gib", "--quiet"]
    return [sys.executable, "-m", "lowmem", "train", str(recipe), *options, *more]


def recipe_file(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@contextlib.contextmanager
def ranks_of(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each command; what is left of them is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size, started = len(commands), list[subprocess.Popen[str]]()
    for rank, words in enumerate(commands):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in {**where, **address}.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(words, env=environment, text=True, **pipes))  # type: ignore[call-overload]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr; at most two minutes later."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def trained(recipe: Path, run_dir: Path, size: int, *more: str) -> str | None:
    """Trains to the end with so many ranks and returns the run's digest."""
    from lowmem.reporting.report import read_report

    with ranks_of([command(recipe, run_dir, *more)] * size) as started:
        ended = [outcome(process) for process in started]
    assert [code for code, _, _ in ended] == [0] * size, ended
    digest: str | None = read_report(run_dir).content["digest"]
    return digest


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear within two minutes"
        time.sleep(0.01)


def wait_for_visits(run_dir: Path, visits: int) -> None:
    """Until so many visits are committed."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):
            state: dict[str, Any] = json.loads((run_dir / "state.json").read_text(encoding="utf-8"))
            if state["visits_done"] >= visits:
                return
        time.sleep(0.01)
    raise AssertionError(f"{visits} visits were not committed within two minutes")
