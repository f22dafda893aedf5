"""Activations at block borders, on every tier."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.blocks.borders import AwayBorders, Borders, NearBorders, border_bytes
from lowmem.blocks.order import border_calls
from lowmem.blocks.traffic import Traffic
from lowmem.errors import StoreError
from lowmem.machine.device import CPU


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


def one_step(away: AwayBorders) -> None:
    away.begin()
    for is_put, place in border_calls(away.num_blocks, away.parts, away.two_passes):
        if is_put:
            away.put(place, torch.randn(2, 700))
        else:
            away.get(place)


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
@pytest.mark.parametrize("fault", ["short", "failed"])
def test_a_short_or_failed_transfer_of_borders_stops_the_step_in_one_line(
    tmp_path: Path, call: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def faulty(file: int, data: Any, offset: int) -> int:
        if fault == "failed":
            raise OSError(errno.ENOSPC, "No space left on device")
        moved: int = real(file, data, offset)
        return moved - 4096 // 8

    away = AwayBorders(4, 2, False, CPU, tmp_path, None)
    monkeypatch.setattr(os, call, faulty)
    expected = "moved 7680 of 8192 bytes" if fault == "short" else "No space left on device"
    with pytest.raises(StoreError, match=expected) as caught:
        one_step(away)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    away.close()


def test_a_failed_write_of_the_last_borders_of_a_step_stops_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are still at hand in their own step, which does not notice."""
    away = AwayBorders(2, 1, False, CPU, tmp_path, None)
    puts = sum(is_put for is_put, _ in border_calls(2, 1, False))
    real, writes = os.pwrite, iter(range(puts))

    def last_fails(file: int, data: Any, offset: int) -> int:
        if next(writes) == puts - 1:
            raise OSError(errno.EIO, "Input/output error")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", last_fails)
    one_step(away)
    with pytest.raises(StoreError, match="Input/output error"):
        away.begin()
    away.close()
