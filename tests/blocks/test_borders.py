"""Activations at block borders, on every tier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem.blocks.borders import AwayBorders, Borders, NearBorders, border_bytes
from lowmem.blocks.order import border_calls
from lowmem.blocks.traffic import Traffic


@pytest.mark.parametrize("num_blocks, parts", [(2, 1), (2, 2), (3, 3), (4, 7)])
@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_borders_away_from_the_device_give_back_what_was_put_last(
    tmp_path: Path, num_blocks: int, parts: int, two_passes: bool, tier: str
) -> None:
    shape = num_blocks, parts, two_passes
    away = AwayBorders(*shape, torch.device("cpu"), tmp_path if tier == "disk" else None)
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
