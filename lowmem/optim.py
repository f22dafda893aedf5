"""AdamW over plain flat tensors: bitsandbytes' 8-bit kernel, or torch's fused fp32 one.

Why not the stock 8-bit `step()`: it synchronises the whole device after every parameter, launches on stream 0, and keeps its
state in a dictionary keyed by parameter objects. Here the update is a free function of slices, its state are fields of the
block's arena, so state streams, rests and is saved with its block. Quantization groups are 256 elements; the arena starts
each parameter on such a border, so a flat update is bit-equal to bitsandbytes parameter by parameter.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lowmem.config import OptimizerConfig
from lowmem.units import MIB

if TYPE_CHECKING:
    from lowmem.arena import ArenaLayout

GROUP_SIZE = 256  # elements that share one absmax
MIN_8BIT_NUMEL = 4096  # smaller parameters keep fp32 state, as in bitsandbytes
SLICE_NUMEL = 1024 * 1024  # elements updated at once: bounds the kernel's temporaries
SLICE_WORKSPACE_BYTES = 38 * MIB  # measured on the CPU for one slice of that size (about nine fp32 copies)


class StateField(NamedTuple):
    """One flat tensor of optimizer state; `numel` elements of `dtype`."""

    name: str
    dtype: torch.dtype
    numel: int


def state_fields(optimizer: str, quantized_numel: int, numel: int, ema: bool = False) -> list[StateField]:
    """State for `numel` weights, the first `quantized_numel` of them in 8 bits when the optimizer is an 8-bit one; `ema`: and their average."""
    average = [StateField("ema", torch.float32, numel)] if ema else []
    if optimizer == "adamw":
        return [StateField("exp_avg", torch.float32, numel), StateField("exp_avg_sq", torch.float32, numel), *average]
    groups = quantized_numel // GROUP_SIZE
    fields = [
        StateField("state1", torch.uint8, quantized_numel),
        StateField("state2", torch.uint8, quantized_numel),
        StateField("absmax1", torch.float32, groups),
        StateField("absmax2", torch.float32, groups),
        StateField("exp_avg", torch.float32, numel - quantized_numel),
        StateField("exp_avg_sq", torch.float32, numel - quantized_numel),
        *average,
    ]
    return [field for field in fields if field.numel]


def gradient_norm(grads: Tensor) -> Tensor:
    """The L2 norm, fp32, on the device."""
    return torch.as_tensor(torch.linalg.vector_norm(grads, dtype=torch.float32))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of that norm to `max_norm` at most, without reading the norm back."""
    return torch.as_tensor((max_norm / (norm + 1e-6)).clamp(max=1.0))


def whole_factor(norms: Sequence[Tensor], config: OptimizerConfig) -> Tensor:
    """The factor of a whole model's gradients, from the norms of its parts."""
    assert config.grad_clip is not None
    return clip_factor(gradient_norm(torch.stack(list(norms))), config.grad_clip)


def update(
    layout: ArenaLayout,
    weights: Tensor,
    grads: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    lr: float,
    config: OptimizerConfig,
    factor: Tensor | None = None,
) -> None:
    """One optimizer step, in place. `weights` fp32 [N], `grads` [N] in the compute dtype, `step` counts from 1.

    `factor`: of the gradients, where the whole model's norm decides (`optimizer.clip: global`); None: their own norm does.
    """
    if factor is None and config.grad_clip is not None:
        factor = clip_factor(gradient_norm(grads), config.grad_clip)
    if factor is not None:
        grads.mul_(factor.to(grads.dtype))
    for group in layout.groups:
        rows = slice(group.start, group.stop)
        weight_decay = config.weight_decay if group.decay else 0.0
        if group.quantized:
            _adamw8bit(weights[rows], grads[rows], state, group.start, step, lr, weight_decay, config)
        else:
            first = group.start - layout.fp32_state_start
            _adamw(weights[rows], grads[rows], state, slice(first, first + group.stop - group.start), step, lr, weight_decay, config)
    if config.ema is not None:
        state["ema"].lerp_(weights, 1 - min(config.ema, (1 + step) / (10 + step)))  # warm-up: the first weights are soon forgotten


def _adamw(
    w: Tensor, g: Tensor, state: Mapping[str, Tensor], rows: slice, step: int, lr: float, weight_decay: float, config: OptimizerConfig
) -> None:
    from torch.optim.adamw import adamw

    for start in range(0, w.numel(), SLICE_NUMEL):
        part = slice(start, start + SLICE_NUMEL)
        adamw(
            [w[part]],
            [g[part].float()],
            [state["exp_avg"][rows][part]],
            [state["exp_avg_sq"][rows][part]],
            [],
            [torch.full((), float(step - 1), device=w.device)],
            fused=True,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
        )


def _adamw8bit(
    w: Tensor, g: Tensor, state: Mapping[str, Tensor], offset: int, step: int, lr: float, weight_decay: float, config: OptimizerConfig
) -> None:
    bnb = bitsandbytes_functional()
    signed, unsigned = _quantization_maps(w.device)
    for start in range(0, w.numel(), SLICE_NUMEL):
        stop = min(start + SLICE_NUMEL, w.numel())
        rows = slice(offset + start, offset + stop)
        groups = slice(rows.start // GROUP_SIZE, rows.stop // GROUP_SIZE)
        bnb.optimizer_update_8bit_blockwise(
            "adam",
            g[start:stop].float(),
            w[start:stop],
            state["state1"][rows],
            state["state2"][rows],
            config.betas[0],
            config.betas[1],
            0.0,  # beta3, alpha: other optimizers of the family
            0.0,
            config.eps,
            step,
            lr,
            signed,
            unsigned,
            state["absmax1"][groups],
            state["absmax2"][groups],
            weight_decay,
        )


@functools.cache
def bitsandbytes_functional():  # type: ignore[no-untyped-def]
    """bitsandbytes, imported where it is first used: the import takes seconds and about 115 MiB."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that we do not use
    import bitsandbytes.functional

    return bitsandbytes.functional


@functools.cache
def _quantization_maps(device: torch.device) -> tuple[Tensor, Tensor]:
    bnb = bitsandbytes_functional()
    return bnb.create_dynamic_map().to(device), bnb.create_dynamic_map(signed=False).to(device)
