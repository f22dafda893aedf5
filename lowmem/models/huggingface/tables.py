"""Products and look-ups whose gradient goes straight to where the table's gradients gather.

Autograd makes a gradient as large as the table for every chunk of logits, and one more for the look-up, and
then adds them up. Of a vocabulary of 128,256 at width 4096 each of them takes a GiB. Here a few rows are made
and added at a time. The sums are autograd's: of a chunk, then of all chunks in the order of the backward
pass. Several micro-batches add up one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.objectives.alike import starts

# Weights whose gradient is made at once, at least. A large table has few slices, because each costs a call
# on the device.
SLICE_NUMEL, MOST_SLICES = 4 * 1024 * 1024, 32


def gathers(weight: Tensor) -> bool:
    """Whether the gradient of a table gathers in a tensor of its own, and is not used during backward."""
    return torch.is_grad_enabled() and weight.requires_grad and weight.grad is not None


def product(features: Tensor, weight: Tensor) -> Tensor:
    """features [N, D] times weight [V, D] transposed."""
    if not gathers(weight):
        return F.linear(features, weight)
    return torch.as_tensor(_Product.apply(features, weight))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        ctx.weight = weight  # not saved: what saves would hand back another tensor, without its gradient
        return F.linear(features, weight)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None]:
        (features,), (grads,), weight = ctx.saved_tensors, given, ctx.weight
        size = max(SLICE_NUMEL // weight.shape[1], -(-len(weight) // MOST_SLICES))
        by_row = grads.t()
        for start in starts(len(weight), size):
            rows = slice(start, start + size)
            weight.grad[rows].add_(by_row[rows].mm(features))
        return grads.mm(weight), None


def looked_up(table: nn.Embedding, tokens: Tensor) -> Tensor:
    """The rows [..., D] of tokens [...]."""
    if not gathers(table.weight):
        return F.embedding(tokens, table.weight, table.padding_idx)
    rows = _LookUp.apply(tokens, table.weight, table.padding_idx)  # type: ignore[no-untyped-call]
    return torch.as_tensor(rows)


class Table(nn.Embedding):
    """Stands for the library's table of tokens."""

    def __init__(self, table: nn.Module) -> None:
        assert isinstance(table, nn.Embedding)
        self._scale = getattr(table, "embed_scale", None)  # as Gemma 3 has it
        known = self._scale is not None or type(table) is nn.Embedding
        assert known, "something else stands between the table and its rows"
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight)
        self.weight = table.weight

    def forward(self, input: Tensor) -> Tensor:
        rows = looked_up(self, input)
        return rows if self._scale is None else rows * self._scale.to(rows.dtype)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(tokens, weight, padding)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[None, None, None]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        grads = given[0].reshape(-1, weight.shape[1])
        places, rows = _numbered(tokens.flatten())
        summed = torch.ops.aten.embedding_dense_backward(grads, places, len(rows), -1, False)
        if ctx.padding is not None:
            summed.masked_fill_((rows == ctx.padding)[:, None], 0)
        # A row comes once, so no two sums meet; what is left over adds zeros.
        weight.grad.index_add_(0, rows, summed)
        return None, None, None


def _numbered(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(place [N] of each of N tokens among those that differ, token [N] at each place; 0 where none is).

    `unique` says the same, but the host would wait for the number of places.
    """
    ordered, order = tokens.sort(stable=True)
    new = torch.ones_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    place = new.cumsum(0) - 1
    places, rows = torch.zeros_like(tokens), torch.zeros_like(tokens)
    places[order] = place
    rows[place] = ordered
    return places, rows
