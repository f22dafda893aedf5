"""The loss in chunks, where a pass is only counted."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from lowmem.objectives import alike
from lowmem.objectives.base import in_chunks
from lowmem.planning.passes import LiveBytes

ROWS, DIM, VOCAB = 100, 8, 64


def counted_loss(
    size: int, grad: bool, counting: bool, made: list[int] | None = None
) -> tuple[Tensor, LiveBytes]:
    """`made`: gets the rows of each chunk that is computed."""
    table = torch.ones(VOCAB, DIM)
    rows = torch.ones(ROWS, DIM, requires_grad=grad)

    def loss(part: Tensor) -> Tensor:
        if made is not None:
            made.append(len(part))
        return (part @ table.T).logsumexp(1)

    about = alike.one_for_all() if counting else contextlib.nullcontext()
    with about, torch.set_grad_enabled(grad), LiveBytes(table, rows) as taken:
        losses = in_chunks(loss, size, rows)
    return losses.detach(), taken


def operations(taken: LiveBytes) -> int:
    return sum(flops * often for (flops, _), often in taken.work.items())


@pytest.mark.parametrize("size", [10, 30, 99, 100, 200])
def test_one_chunk_stands_for_all_without_gradients(size: int) -> None:
    (_, real), (losses, counted) = (counted_loss(size, False, counting) for counting in (False, True))
    assert operations(counted) == operations(real) == 2 * ROWS * DIM * VOCAB
    logits = 4 * min(size, ROWS) * VOCAB
    assert logits < counted.peak <= real.peak + 4 * ROWS and real.peak - counted.peak <= 4 * ROWS
    assert losses.shape == (ROWS,)
    made: list[int] = []
    counted_loss(size, False, True, made)
    assert made == sorted(set(made), reverse=True)  # one of each size
    assert alike.times() == 1


def test_with_gradients_every_chunk_is_made() -> None:
    (expected, real), (losses, counted) = (counted_loss(30, True, counting) for counting in (False, True))
    assert torch.equal(losses, expected) and losses.all()
    assert (counted.peak, counted.work) == (real.peak, real.work)
