"""Trains `digits-vit` for a few steps on a device that is no CUDA card, with its limits.

    python other_device_child.py KIND RUN_FOLDER TIER

    mps   no float64, no 8-bit kernel and no page-locked memory; the device shares the host's memory
    xpu   no float64 and no 8-bit kernel; streams and memory by the calls of `torch.accelerator`

It prints the run's digest, its settings and the accesses that nothing orders as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import simcuda  # before torch
import torch
from happens_before import RACES
from simcuda import CUDA, TOTAL_BYTES, WORLD, Card

from lowmem.data.datasets import describe_data, load_data
from lowmem.machine import device
from lowmem.machine.device import DeviceMemory, Mps, Xpu
from lowmem.machine.profile import Profile, load_profile, profile_from_dict
from lowmem.models import model_builder
from lowmem.planning.plan import make_plan
from lowmem.recipe import load_recipe
from lowmem.reporting.report import digest
from lowmem.training.trainer import Trainer


class SimulatedMps(Mps):
    """An Apple GPU whose tensors are those of the simulated card."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = CUDA

    def memory(self) -> DeviceMemory:
        return DeviceMemory(WORLD.live, WORLD.live, 0)

    def random_state(self) -> Any:
        return None


class SimulatedXpu(Xpu):
    """An Intel GPU whose tensors are those of the simulated card."""

    def __init__(self) -> None:
        self.kind = "cuda"  # of its tensors
        super().__init__()
        self.kind = "xpu"


class AnyEvent(simcuda.Event):
    def __init__(self, device: Any, enable_timing: bool, blocking: bool) -> None:
        super().__init__(enable_timing, blocking)


class EnteredStream(simcuda.Stream):
    """`with stream:`, as torch's streams of any device have it."""

    def __enter__(self) -> None:
        self._entered = contextlib.ExitStack()
        self._entered.enter_context(simcuda.stream_context(self))

    def __exit__(self, *_: object) -> None:
        self._entered.close()


def of_cuda(*_: Any, **__: Any) -> Any:
    raise AssertionError("an Intel GPU has been asked for one of CUDA's streams, events or locks")


def install_xpu() -> None:
    """Puts the simulated card in the place of what `Xpu` calls."""
    card: Any = torch
    card.Stream = EnteredStream
    card.Event = AnyEvent
    card.accelerator.current_stream = simcuda.current_stream
    card.accelerator.empty_cache = lambda: None
    card.accelerator.memory_stats = lambda device: {
        f"{name}_bytes.all.current": WORLD.live for name in ("allocated", "reserved")
    }
    card.xpu.set_per_process_memory_fraction = lambda share, device: None
    card.xpu.get_rng_state = lambda device: torch.zeros(16, dtype=torch.uint8)
    card.xpu.set_rng_state = lambda state, device: None
    card.xpu.get_device_properties = lambda device: SimpleNamespace(total_memory=TOTAL_BYTES)
    card.xpu.get_device_name = lambda device: "simulated"
    for name in ("Stream", "Event", "stream", "cudart"):
        setattr(card.cuda, name, of_cuda)


def profile_of(kind: str) -> Profile:
    if kind == "mps":
        return load_profile("apple-m2-16gb")
    raw = load_profile("cuda-8gib-host-24gib").model_dump(mode="json", by_alias=True)
    return profile_from_dict({**raw, "name": "xpu-8gib", "device": {**raw["device"], "type": kind}}, "here")


def main() -> None:
    kind, folder, tier = sys.argv[1:]
    torch.set_num_threads(1)
    simcuda.install()
    WORLD.has_float64 = False
    simulated = {"mps": SimulatedMps, "xpu": SimulatedXpu}[kind]
    device.KINDS.update({kind: simulated, "cuda": simulated})  # of a tensor's device, too
    device.mps_works = device.xpu_works = lambda: True
    if kind == "xpu":
        install_xpu()
    changes = ["optimizer.name=adamw", "train.num_steps=4", "blocks.visit_steps=2", "train.warmup_steps=1"]
    recipe = load_recipe("digits-vit", [*changes, f"offload.tier={tier}"])
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, profile_of(kind))
    data = load_data(recipe.data, recipe.train.seq_len)
    with Card():
        state = Trainer(build, plan, folder).fit(lambda step: data.batch(0, step, 64))
        found = digest(state)
    settings = plan.settings.model_dump(mode="json")
    print(json.dumps({"digest": found, "settings": settings, "locks": WORLD.locks, "races": RACES}))
    sys.stdout.flush()
    os._exit(0)  # the simulated device must not be torn down in any order


if __name__ == "__main__":
    main()
