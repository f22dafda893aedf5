"""Activations at block borders, on every tier."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.blocks import borders as borders_module
from lowmem.blocks.borders import AwayBorders, Borders, NearBorders, border_bytes
from lowmem.blocks.order import border_calls
from lowmem.blocks.traffic import Traffic
from lowmem.errors import StoreError
from lowmem.machine.device import CPU
from lowmem.machine.heap import MMAP_THRESHOLD_BYTES
from lowmem.units import PAGE


@pytest.mark.parametrize("num_blocks, parts", [(2, 1), (2, 2), (3, 3), (4, 7)])
@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_borders_away_from_the_device_give_back_what_was_put_last(
    tmp_path: Path, num_blocks: int, parts: int, two_passes: bool, tier: str
) -> None:
    shape = num_blocks, parts, two_passes
    away = AwayBorders(*shape, CPU, tmp_path if tier == "disk" else None, None)
    near = NearBorders(*shape)
    both: list[Borders] = [near, away]
    for _ in range(2):  # steps
        for borders in both:
            borders.begin()
        for is_put, place in border_calls(*shape):
            if is_put:
                h = torch.randn(2, 700)
                for borders in both:
                    borders.put(place, h)
            else:
                assert torch.equal(away.get(place), near.get(place))
    away.close()
    assert list(tmp_path.iterdir()) == []
    counted = border_bytes(tier, True, 5600, 0, *shape)  # type: ignore[arg-type]
    assert away.traffic() == counted.traffic * 2
    assert near.traffic() == Traffic()


def test_small_borders_of_a_cpu_lie_in_one_buffer_and_large_ones_where_they_were_made() -> None:
    """Amid the temporaries of layers they would split the heap's free memory. Copies of large ones would cost
    time, and each is a map of its own anyway.
    """
    shape = num_blocks, parts, two_passes = 3, 2, False
    for numel, packed in [(MMAP_THRESHOLD_BYTES // 4 - 1, True), (MMAP_THRESHOLD_BYTES // 4, False)]:
        near, put = NearBorders(*shape), dict[tuple[int, int], torch.Tensor]()
        near.begin()
        for is_put, place in border_calls(*shape):
            if is_put:
                put[place] = torch.randn(1, numel)
                near.put(place, put[place].clone() if packed else put[place])
        held = {place: near.get(place) for place in put}
        assert all(torch.equal(held[place], put[place]) for place in put)
        buffers = {h.untyped_storage().data_ptr(): h.untyped_storage().nbytes() for h in held.values()}
        assert len(buffers) == (1 if packed else len(put))
        assert packed or all(held[place] is put[place] for place in put)
        counted = border_bytes("device", True, 4 * numel, 0, *shape).device
        assert counted == (num_blocks + 1) * parts * MMAP_THRESHOLD_BYTES  # whole pages of the smaller ones
        assert sum(buffers.values()) == counted + packed * PAGE  # the buffer begins on a page
    small = border_bytes("device", False, 100, 0, num_blocks, parts, two_passes, kind="cuda")
    assert small.device == (num_blocks + 1) * parts * 100  # a card's allocator has no such heap


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_borders_give_back_what_was_put_last_where_batches_differ_in_width(tmp_path: Path, tier: str) -> None:
    """A padded batch is as wide as its longest row. In a sweep several batches are under way."""
    folder = tmp_path if tier == "disk" else None
    shape = 3, 3, False
    borders = NearBorders(*shape) if tier == "device" else AwayBorders(*shape, CPU, folder, None)
    for widths in ((64, 64, 64), (64, 64, 700), (128, 64, 64), (64, 64, 64), (1500, 3000, 64)):
        borders.begin()
        put: dict[tuple[int, int], torch.Tensor] = {}
        for is_put, place in border_calls(*shape):
            if is_put:
                put[place] = torch.randn(2, widths[place[1]], 8)
                borders.put(place, put[place].clone())
            else:
                assert torch.equal(borders.get(place), put[place])
    borders.close()


def test_rows_that_are_kept_from_step_to_step_are_whole_where_a_wider_batch_follows() -> None:
    near, kept = NearBorders(3, 2, False, kept=1), dict[tuple[int, int], torch.Tensor]()
    for width in (64, 192, 128):
        near.begin()
        assert all(torch.equal(near.get(place), h) for place, h in kept.items())
        near.put((0, 0), torch.randn(2, width, 8))
        for part in range(2):
            kept[4, part] = torch.randn(2, width, 8)
            near.put((4, part), kept[4, part].clone())


def one_step(away: AwayBorders) -> None:
    away.begin()
    for is_put, place in border_calls(away.num_blocks, away.parts, away.two_passes):
        if is_put:
            away.put(place, torch.randn(2, 700))
        else:
            away.get(place)


class Faulty(io.FileIO):
    """A file whose `call` is short, or fails; from the one after `good` on."""

    call, fault, good = "write", OSError(errno.ENOSPC, "No space left on device"), 0

    def write(self, data: Any) -> int:  # type: ignore[override]
        return self._met("write", super().write(data))

    def readinto(self, buffer: Any) -> int:  # type: ignore[override]
        return self._met("readinto", super().readinto(buffer))

    def _met(self, call: str, moved: int | None) -> int:
        cls = type(self)
        if call != cls.call:
            return moved or 0
        cls.good -= 1
        if cls.good >= 0:
            return moved or 0
        if cls.fault is None:
            return (moved or 0) - 4096 // 8
        raise cls.fault


def faulty(monkeypatch: pytest.MonkeyPatch, call: str, fault: OSError | None, good: int = 0) -> None:
    kind = type("Faulty", (Faulty,), {"call": call, "fault": fault, "good": good})
    monkeypatch.setattr(borders_module.io, "FileIO", kind)


@pytest.mark.parametrize("call", ["write", "readinto"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (None, "moved 7680 of 8192 bytes"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
    ids=["short", "failed"],
)
def test_a_short_or_failed_transfer_of_borders_stops_the_step_in_one_line(
    tmp_path: Path, call: str, fault: OSError | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(monkeypatch, call, fault)
    away = AwayBorders(4, 2, False, CPU, tmp_path, None)
    with pytest.raises(StoreError, match=expected) as caught:
        one_step(away)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    away.close()


def test_a_failed_write_of_the_last_borders_of_a_step_stops_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are still at hand in their own step, which does not notice."""
    puts = sum(is_put for is_put, _ in border_calls(2, 1, False))
    faulty(monkeypatch, "write", OSError(errno.EIO, "Input/output error"), puts - 1)
    away = AwayBorders(2, 1, False, CPU, tmp_path, None)
    one_step(away)
    with pytest.raises(StoreError, match="Input/output error"):
        away.begin()
    away.close()


def test_borders_need_nothing_that_windows_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No positional requests, and no open file that is let go: it is gone when it is closed."""
    for call in ("pwrite", "preadv", "pread", "pwritev"):
        monkeypatch.delattr(os, call, raising=False)
    real = Path.unlink
    opened = True

    def refused(path: Path, missing_ok: bool = False) -> None:
        if opened:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(borders_module.sys, "platform", "win32")
    away = AwayBorders(3, 2, False, CPU, tmp_path, None)
    one_step(away)
    assert len(list(tmp_path.iterdir())) == 1
    opened = False
    away.close()
    assert list(tmp_path.iterdir()) == []
