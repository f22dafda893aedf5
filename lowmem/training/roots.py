"""What a backward pass begins at: a loss that may be scaled, or several tensors, each with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem.recipe import OptimizerConfig


def scaled(loss: Tensor, optimizer: OptimizerConfig) -> Tensor:
    """What backward starts from, so that small gradients do not vanish in fp16. An update divides by it."""
    return loss if optimizer.loss_scale == 1 else loss * optimizer.loss_scale


class _Root(torch.autograd.Function):
    """A scalar whose gradients are given.

    `torch.autograd.backward` with gradients would import sympy, some 20 MiB, to compare their shapes.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.grads = tensors[count:]
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.grads, *(None for _ in ctx.grads))


def backward_from(*pairs: tuple[Tensor, Tensor | None]) -> None:
    """Backward from tensors, each with its gradient; one without a gradient, or that needs none, is left out.

    The gradients must not be changed afterwards.
    """
    used = [(root, grad) for root, grad in pairs if grad is not None and root.requires_grad]
    if used:
        roots, grads = [root for root, _ in used], [grad for _, grad in used]
        _Root.apply(len(roots), *roots, *grads).backward()  # type: ignore[no-untyped-call]
