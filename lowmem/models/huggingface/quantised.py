"""Frozen linear layers whose weights lie in 4 or 8 bits, as bitsandbytes quantises them.

A weight is whole, in the dtype of its layer's input, for a product alone: once in the forward pass, once in
backward. These are the operations of bitsandbytes' `Linear4bit`, and of its `Linear8bitLt` as that is trained
on a CPU: activations are not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.machine.compiler import without_compiler
from lowmem.models.base import GivenWeights, Packed
from lowmem.models.huggingface.families import imported
from lowmem.recipe import Quantised

NF4_BLOCK = 64  # weights that share a scale: bitsandbytes' own choice
SLICE_NUMEL = 2**20  # weights that are quantised at once; it takes some 25 bytes of memory for each
WEIGHT, SCALES = "weight", "scales"


def with_bitsandbytes(name: str) -> Any:
    """A module that imports bitsandbytes."""
    with without_compiler():
        return imported(name)


def library() -> Any:
    return with_bitsandbytes("bitsandbytes.functional")


def quantised(kind: Quantised, weight: Tensor) -> dict[str, Tensor]:
    """A weight [out, in] as `FrozenLinear` keeps it, by the names of its parameters.

    Slice by slice: scales are those of whole blocks, or of whole rows.
    """
    functional, rows = library(), max(SLICE_NUMEL // weight.shape[1], 1)
    if weight.dtype == torch.float64:
        weight = weight.float()
    if kind == "int8":
        slices = [functional.int8_vectorwise_quant(part.half())[:2] for part in torch.split(weight, rows)]
    else:
        slices = [
            (packed, state.absmax)
            for part in torch.split(weight.flatten(), SLICE_NUMEL)
            for packed, state in [functional.quantize_4bit(part, blocksize=NF4_BLOCK, quant_type="nf4")]
        ]
    packed, scales = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return {WEIGHT: packed, SCALES: scales[:, None]}


def whole(
    kind: Quantised, packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight [out, in] that `quantised` has kept."""
    if kind == "int8":
        return packed.to(dtype).mul_(scales.mul(1.0 / 127.0))
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed, scales.flatten(), NF4_BLOCK, "nf4", shape, dtype
    )
    return made


class FrozenLinear(nn.Module):
    """A linear layer that is only read."""

    def __init__(self, kind: Quantised, like: nn.Module) -> None:
        """`like`: the layer in whose place it stands, torch's or GPT-2's, whose weights lie as [in, out]."""
        super().__init__()
        library()
        weight = like.get_parameter("weight")
        self.kind, self.transposed = kind, not isinstance(like, nn.Linear)
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        if self.transposed:
            self.shape = self.shape[1], self.shape[0]
        self.out_features, self.in_features = self.shape
        numel = prod(self.shape)
        self.packed = {
            WEIGHT: Packed(torch.int8 if kind == "int8" else torch.uint8, numel),
            SCALES: Packed(torch.float32, 0),
        }
        kept = self.shape if kind == "int8" else (ceil(numel / 2), 1)
        blocks = self.shape[0] if kind == "int8" else ceil(numel / NF4_BLOCK)
        for name, size in ((WEIGHT, kept), (SCALES, (blocks, 1))):
            value = torch.empty(size, dtype=self.packed[name].dtype)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        how = self.weight, self.scales, self.bias, self.kind, self.shape
        made: Tensor = _Product.apply(x, *how)  # type: ignore[no-untyped-call]
        return made


class _Product(torch.autograd.Function):
    """x W^T + b. Backward keeps the packed weight alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        kind: Quantised,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.kind, ctx.shape = kind, shape
        return F.linear(x, whole(kind, packed, scales, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        given = torch.matmul(grad, whole(ctx.kind, packed, scales, ctx.shape, grad.dtype))
        return given, None, None, None, None, None


class QuantisedWeights:
    """Weights that a model begins with, quantised where its layers keep them so."""

    def __init__(self, given: GivenWeights, layers: Mapping[str, FrozenLinear]) -> None:
        """`layers`: by the beginnings of their parameters' names."""
        self._given, self._layers = given, dict(layers)
        self._last: tuple[str, dict[str, Tensor]] = "", {}  # a layer's parameters are asked for together

    def _owner(self, name: str) -> tuple[str, FrozenLinear | None]:
        owner, _, leaf = name.rpartition(".")
        return owner, self._layers.get(owner) if leaf in (WEIGHT, SCALES) else None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        plain: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            owner, layer = self._owner(name)
            if layer is None:
                plain[name] = shape
            else:
                plain[f"{owner}.{WEIGHT}"] = layer.shape[::-1] if layer.transposed else layer.shape
        self._given.check(plain)

    def __contains__(self, name: str) -> bool:
        owner, layer = self._owner(name)
        return (name if layer is None else f"{owner}.{WEIGHT}") in self._given

    def read(self, name: str) -> Tensor:
        owner, layer = self._owner(name)
        if layer is None:
            return self._given.read(name)
        if self._last[0] != owner:
            self._last = "", {}  # its memory goes first
            weight = self._given.read(f"{owner}.{WEIGHT}")
            self._last = owner, quantised(layer.kind, weight.T if layer.transposed else weight)
        return self._last[1][name.rpartition(".")[2]]

    def close(self) -> None:
        self._last = "", {}
        self._given.close()
