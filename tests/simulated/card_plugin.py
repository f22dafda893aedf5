"""A plug-in for pytest: the tests marked `gpu` on the simulated card (`pytest -p card_plugin -m gpu`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import simcuda  # before torch
import torch
from happens_before import RACES
from simcuda import WORLD, Card

from lowmem.blocks.eight_bit import bitsandbytes_functional
from lowmem.machine import detect
from lowmem.machine.profile import load_profile

torch.set_num_threads(1)
bitsandbytes_functional()  # its import must not find a card: it would look for its CUDA library
simcuda.install(total_bytes=8 << 30)
detect.detect_profile = lambda *_, **__: load_profile("cuda-8gib-host-24gib")


@pytest.fixture(autouse=True)
def on_the_card() -> Iterator[None]:
    """Each test makes its tensors there, and leaves no access unordered."""
    RACES.clear()
    WORLD.alarm, WORLD.limit = "default", None
    with Card():
        yield
    assert RACES == []
