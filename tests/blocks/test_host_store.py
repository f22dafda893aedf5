"""Copies of blocks in RAM beside a device of its own: page-locked within what is allowed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowmem.blocks.arena import ArenaLayout, aligned_buffer
from lowmem.blocks.run_dir import RunDir
from lowmem.blocks.staging import Ring
from lowmem.blocks.store import DiskStore, HostStore
from lowmem.blocks.unit import Pages
from lowmem.machine.device import Device

LAYOUTS = {f"block-{index}": ArenaLayout([("weight", (64, 80))], "adamw") for index in range(2)}
SIZE = LAYOUTS["block-0"].total_bytes


def random_buffer(key: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 100 * int(key[-1]))
    buffer = aligned_buffer(SIZE)
    buffer.copy_(torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator))
    return buffer


def whole(store: HostStore, key: str) -> Tensor:
    buffer = aligned_buffer(SIZE)
    store.read(key, buffer)
    return buffer


class Locking(Device):
    """A CPU on which memory can be page-locked."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()

    def lock(self, buffer: Tensor) -> bool:
        self.held.add(buffer.data_ptr())
        return True

    def unlock(self, buffer: Tensor) -> None:
        self.held.remove(buffer.data_ptr())


def test_copies_in_ram_are_page_locked_as_far_as_allowed_and_hold_the_same_bytes(tmp_path: Path) -> None:
    device, keys = Locking(), list(LAYOUTS)
    store = HostStore(DiskStore(RunDir(tmp_path), LAYOUTS, {}, Ring(device, SIZE)), SIZE)
    for key in keys:
        store.write(key, random_buffer(key), 1)
    assert len(device.held) == 1, "the second would exceed what is allowed"
    pages = Pages(8, SIZE - 8)
    for key in keys:
        assert torch.equal(whole(store, key), random_buffer(key))
        part = aligned_buffer(pages.num_bytes)
        store.read_pages(key, [(pages, part)], False)
        assert torch.equal(pages.inside(part), random_buffer(key)[8 : pages.stop])
        store.write_pages(key, [(pages, random_buffer(key, seed=7)[: pages.num_bytes])])
        expected = random_buffer(key)
        expected[8 : pages.stop] = random_buffer(key, seed=7)[8 : pages.stop]
        assert torch.equal(whole(store, key), expected)
    store.close()
    assert device.held == set(), "each is unlocked before its memory is freed"
