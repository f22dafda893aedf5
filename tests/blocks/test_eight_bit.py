"""The 8-bit update on a CPU gives the bits of bitsandbytes' kernels, for any values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from lowmem.blocks import eight_bit
from lowmem.blocks.arena import GROUP_SIZE

NUMEL = 512 * GROUP_SIZE
SIGNED, UNSIGNED = 0, 1


def quantized(moment: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of `values` [n]."""
    scratch = eight_bit._scratch()
    codes, scales = torch.zeros(len(values), dtype=torch.uint8), torch.ones(len(values) // GROUP_SIZE)
    scratch.values_of(moment, codes, scales).copy_(values)
    scratch.to_codes(moment, codes, scales)
    return codes, scales


def of_bitsandbytes(moment: int, values: Tensor) -> tuple[Tensor, Tensor]:
    eight_bit.bitsandbytes_functional()
    book = eight_bit.books(torch.device("cpu"))[moment]
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(values, book, GROUP_SIZE)
    return codes, scales


def spread(kind: str) -> Tensor:
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(3))
    if kind == "most of them tiny":
        values *= torch.rand(NUMEL, generator=torch.Generator().manual_seed(4)) ** 20
    if kind == "groups of zeros":
        values.view(-1, GROUP_SIZE)[::3] = 0
    if kind == "too small for a reciprocal":  # 1 / scale is infinite
        values *= 1e-40
    if kind == "infinite":
        values[::1000] = torch.inf
    return values


KINDS = ["normal", "most of them tiny", "groups of zeros", "too small for a reciprocal", "infinite"]


@pytest.mark.parametrize("moment", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_of_bitsandbytes(moment: int, kind: str) -> None:
    values = spread(kind)
    if moment == UNSIGNED:
        values = values.abs()
    codes, scales = quantized(moment, values)
    assert torch.equal(scales, of_bitsandbytes(moment, values)[1])
    assert torch.equal(codes, of_bitsandbytes(moment, values)[0])
    assert len(codes.unique()) > 100 or kind == "too small for a reciprocal"


@pytest.mark.parametrize("moment", [SIGNED, UNSIGNED])
def test_codes_are_those_of_bitsandbytes_beside_every_border_of_its_table(moment: int) -> None:
    """Borders lie where (1 + value) / 2 * 65535 + 1 / 2 is an integer: here with the floats around them."""
    borders = ((torch.arange(65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1).float()
    around = [borders]
    for direction in (-torch.inf, torch.inf):
        at = borders
        for _ in range(3):
            at = torch.nextafter(at, torch.tensor(direction))
            around.append(at)
    values = torch.cat(around).clamp(-1, 1)
    groups = torch.ones(-(-len(values) // 255), GROUP_SIZE)  # the 1 in front makes the scale 1
    padded = torch.cat([values, torch.zeros(len(groups) * 255 - len(values))])
    groups[:, 1:] = padded.view(-1, 255)
    flat = groups.view(-1)
    whole = eight_bit.SLICE_NUMEL
    for start in range(0, len(flat), whole):
        part = flat[start : start + whole]
        assert torch.equal(quantized(moment, part)[0], of_bitsandbytes(moment, part)[0])


@pytest.mark.parametrize("numel", [GROUP_SIZE, 3 * GROUP_SIZE, eight_bit.SLICE_NUMEL])
def test_an_update_is_that_of_bitsandbytes_bit_for_bit(numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    weights, grads = (torch.randn(numel, generator=generator) for _ in range(2))
    grads[: numel // 2] = 0
    grads *= 1e-3
    state = {f"state{i}": torch.zeros(numel, dtype=torch.uint8) for i in (1, 2)}
    state |= {f"absmax{i}": torch.zeros(numel // GROUP_SIZE) for i in (1, 2)}
    expected_weights, expected = weights.clone(), {name: value.clone() for name, value in state.items()}
    for number, (lr, weight_decay) in enumerate([(1e-3, 0.1), (2e-3, 0.1), (1e-3, 0.0), (0.5, 0.1)], 1):
        step = grads * number
        eight_bit.adamw(
            state, weights, step, number=number, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
        )
        books = eight_bit.books(torch.device("cpu"))
        of_kernel = expected["state1"], expected["state2"], expected["absmax1"], expected["absmax2"]
        eight_bit.bitsandbytes_functional().optimizer_update_8bit_blockwise(
            "adam", step, expected_weights, *of_kernel[:2], 0.9, 0.95, 0.0, 0.0, 1e-8, number, lr, *books,
            *of_kernel[2:], weight_decay,
        )  # fmt: skip
        assert torch.equal(weights, expected_weights), number
        for name, value in state.items():
            assert torch.equal(value, expected[name]), (number, name)
    assert state["absmax2"].any()


def test_gradients_that_are_not_finite_stop_no_update() -> None:
    """The run refuses them at the end of the step, with its own message."""
    numel = GROUP_SIZE
    state = {f"state{i}": torch.zeros(numel, dtype=torch.uint8) for i in (1, 2)}
    state |= {f"absmax{i}": torch.zeros(1) for i in (1, 2)}
    for value in (torch.nan, torch.inf):
        eight_bit.adamw(
            state, torch.ones(numel), torch.full((numel,), value), number=1, lr=1e-3, betas=(0.9, 0.95),
            eps=1e-8, weight_decay=0.0,
        )  # fmt: skip


def test_two_threads_do_not_share_buffers() -> None:
    with ThreadPoolExecutor(1) as other:
        assert other.submit(eight_bit._scratch).result() is not eight_bit._scratch()
    assert eight_bit._scratch() is eight_bit._scratch()
