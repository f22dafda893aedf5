"""AdamW with 8-bit moments on a CPU: bitsandbytes' update bit for bit, in a third of its time.

A moment is stored in groups of 256 elements as codes, with a scale for each group: the largest magnitude in
it. A code stands for an entry of a book of 256 values in [-1, 1] (Dettmers et al., "8-bit optimizers via
block-wise quantization", section 2). bitsandbytes finds the code of a value in a table: it divides [-1, 1]
into 65,535 parts, and each stands for the code that is nearest to its middle. Its CPU kernel does so one
element at a time. Here torch's vectorized operators do it for a whole slice, in buffers that fit the cache
and that stay for the whole run.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.blocks.arena import GROUP_SIZE
from lowmem.machine.compiler import without_compiler

# Elements updated at once. Fewer would take more calls, and two threads wait for each other after each. fp32
# temporaries of more would come from maps that the system clears anew each time (see `lowmem.machine.heap`).
SLICE_NUMEL = 192 * 1024
SCRATCH_BYTES = (3 * 4 + 8) * SLICE_NUMEL  # stays once a first update was made
PARTS = 65535
_own = threading.local()


@functools.cache
def bitsandbytes_functional() -> Any:
    """bitsandbytes.functional, imported at its first use."""
    with without_compiler():
        import bitsandbytes.functional
    return bitsandbytes.functional


@functools.cache
def books(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values [256] that codes stand for: those of first moments, and those of second ones, which are
    never negative.
    """
    bnb = bitsandbytes_functional()
    return bnb.create_dynamic_map().to(device), bnb.create_dynamic_map(signed=False).to(device)


def adamw(
    state: dict[str, Tensor],
    weights: Tensor,
    grads: Tensor,
    *,
    number: int,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
) -> None:
    """Makes step `number` (from 1) in place, of fp32 `weights` [n] by fp32 `grads` [n], on a CPU.

    `state`: codes `state1`, `state2` [n] and scales `absmax1`, `absmax2` [n / 256]. n is a multiple of 256
    and at most SLICE_NUMEL.
    """
    scratch = _scratch()
    numel = len(weights)
    first = scratch.values_of(0, state["state1"], state["absmax1"])
    second = scratch.values_of(1, state["state2"], state["absmax2"])
    first.mul_(betas[0]).add_(grads, alpha=1.0 - betas[0])
    second.mul_(betas[1]).addcmul_(grads, grads, value=1.0 - betas[1])
    if weight_decay > 0:
        weights.mul_(1.0 - lr * weight_decay)
    divisor = torch.sqrt(second, out=scratch.spare[:numel]).div_(math.sqrt(1.0 - betas[1] ** number))
    weights.addcdiv_(first, divisor.add_(eps), value=-lr / (1.0 - betas[0] ** number))
    scratch.to_codes(0, state["state1"], state["absmax1"])
    scratch.to_codes(1, state["state2"], state["absmax2"])


def _scratch() -> _Scratch:
    """This thread's buffers: two trainers may run side by side."""
    if not hasattr(_own, "scratch"):
        _own.scratch = _Scratch()
    found: _Scratch = _own.scratch
    return found


class _Scratch:
    """Buffers for one slice. What is made in them holds until the next update."""

    def __init__(self) -> None:
        self._books = books(torch.device("cpu"))
        self._tables = [_table(book) for book in self._books]
        self._moments = torch.empty(2, SLICE_NUMEL)
        self.spare = torch.empty(SLICE_NUMEL)
        # A place in the table is computed in doubles: all its products and sums are then exact.
        self._double = torch.empty(SLICE_NUMEL, dtype=torch.float64)
        self._places = self._double.view(torch.int32)  # and then, or at another time, integers lie there
        self._half = torch.full((), 0.5, dtype=torch.float64)

    def values_of(self, moment: int, codes: Tensor, scales: Tensor) -> Tensor:
        """The values [n] of moment 0 or 1 in fp32."""
        places, values = self._places[: len(codes)], self._moments[moment, : len(codes)]
        torch.index_select(self._books[moment], 0, places.copy_(codes), out=values)
        values.view(-1, GROUP_SIZE).mul_(scales[:, None])
        return values

    def to_codes(self, moment: int, codes: Tensor, scales: Tensor) -> None:
        """Writes the values that `values_of` gave, as they are now, to `codes` [n] and `scales` [n / 256]."""
        numel = len(codes)
        values, spare = self._moments[moment, :numel], self.spare[:numel]
        torch.amax(torch.abs(values, out=spare).view(-1, GROUP_SIZE), 1, out=scales)
        # A group of zeros is divided by 0: its NaN becomes place 0 below, as in bitsandbytes.
        torch.mul(values.view(-1, GROUP_SIZE), scales.reciprocal()[:, None], out=spare.view(-1, GROUP_SIZE))
        spare.clamp_(-1, 1).add_(1).mul_(0.5)
        double, places = self._double[:numel], self._places[:numel]
        double.copy_(spare)
        # bitsandbytes rounds this sum to fp32 once, before it cuts the fraction off.
        spare.copy_(torch.add(self._half, double, alpha=PARTS, out=double))
        places.copy_(spare).bitwise_and_(PARTS)
        torch.index_select(self._tables[moment], 0, places, out=codes)


def _table(book: Tensor) -> Tensor:
    """The code of each part: uint8 [65536], the last one for 1 itself."""
    middles = torch.arange(PARTS + 1) / PARTS * 2 - 1
    borders = (book[1:].double() + book[:-1].double()) / 2
    return torch.bucketize(middles, borders).to(torch.uint8)
