"""AdamW over plain flat tensors: bitsandbytes' 8-bit kernel, or torch's fused fp32 one.

Why not the stock 8-bit `step()`: it synchronises the whole device after every parameter, launches on stream
0, and keeps its state in a dictionary keyed by parameter objects. Here the update is a free function of
slices, its state are fields of the block's arena, so state streams, rests and is saved with its block.
Quantization groups are 256 elements; the arena starts each parameter on such a border, so a flat update is
bit-equal to bitsandbytes parameter by parameter.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.blocks.arena import GROUP_SIZE
from lowmem.recipe import OptimizerConfig
from lowmem.schedule import mix_seed
from lowmem.units import MIB

if TYPE_CHECKING:
    from lowmem.blocks.arena import Arena, Group

SLICE_NUMEL = 1024 * 1024  # elements updated at once: bounds the kernel's temporaries
SLICE_WORKSPACE_BYTES = (
    38 * MIB
)  # of the 8-bit kernel, measured on the CPU for one slice of that size (about nine fp32 copies)
ODDS_NUMEL = 256 * 1024  # elements whose rounding is drawn at once


def workspace_bytes(numel: int, quantized: bool, weights_dtype: torch.dtype, grads_dtype: torch.dtype) -> int:
    """Temporaries of an update of `numel` elements of one group, at their most."""
    numel = min(numel, SLICE_NUMEL)
    kept_in_bf16 = weights_dtype != torch.float32
    updating = 4 * numel * (kept_in_bf16 + (grads_dtype != torch.float32))
    if quantized:
        updating += SLICE_WORKSPACE_BYTES * numel // SLICE_NUMEL
    if not kept_in_bf16:
        return updating
    odds = 2 * ODDS_NUMEL  # kept from one slice to the next
    return odds + max(updating, 4 * numel + 4 * min(numel, ODDS_NUMEL))


class Rounding:
    """The odds with which one step's fp32 results become bf16: 16 random bits for each element.

    They are a function of (seed, element), so of no order and no slicing, and nothing of them is saved. Drawn
    `ODDS_NUMEL` at a time.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._generator = seed, torch.Generator(device)
        self._part: int | None = None
        self._odds = torch.empty(ODDS_NUMEL // 4, dtype=torch.int64, device=device)

    def round(self, values: Tensor, first: int, target: Tensor) -> None:
        """Writes fp32 `values` [n] into bf16 `target` [n], each to one of its two neighbours by chance, the
        nearer the likelier.

        The mean is the value itself; what bf16 has exactly stays. `first`: the first value's element.
        Overwrites `values`.
        """
        bits = values.view(
            torch.int32
        )  # the upper half of an fp32 is a bf16: carry into it at random, then cut the lower half off
        done = 0
        while done < len(values):
            part, skipped = divmod(first + done, ODDS_NUMEL)
            odds = self._odds_of(part)[skipped : skipped + len(values) - done]
            bits[done : done + len(odds)].add_(odds.int().bitwise_and_(0xFFFF))
            done += len(odds)
        bits.bitwise_and_(-(1 << 16))
        target.copy_(values)

    def _odds_of(self, part: int) -> Tensor:
        if part != self._part:
            self._generator.manual_seed(mix_seed(self._seed, part))
            self._odds.random_(-(1 << 63), None, generator=self._generator)  # all 64 bits
            self._part = part
        return self._odds.view(torch.int16)


def gradient_norm(grads: Tensor) -> Tensor:
    """The L2 norm, fp32, on the device."""
    parts = torch.split(grads, SLICE_NUMEL)  # on a CPU the norm of a bf16 tensor widens all of it
    norms = torch.empty(
        len(parts), device=grads.device
    )  # made first: small tensors made on the way would keep freed slices apart
    for norm, part in zip(norms, parts, strict=True):
        norm.copy_(torch.linalg.vector_norm(part, dtype=torch.float32))
    return torch.as_tensor(torch.linalg.vector_norm(norms))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of that norm to `max_norm` at most, without reading the norm back."""
    return torch.as_tensor((max_norm / (norm + 1e-6)).clamp(max=1.0))


def clip_gradients(grads: Tensor, max_norm: float) -> None:
    """Scales `grads` to an L2 norm of at most `max_norm`."""
    grads.mul_(clip_factor(gradient_norm(grads), max_norm).to(grads.dtype))


def whole_factor(norms: Sequence[Tensor], config: OptimizerConfig) -> Tensor:
    """The factor of a whole model's gradients, from the norms of its parts."""
    assert config.grad_clip is not None
    return clip_factor(gradient_norm(torch.stack(list(norms))), config.grad_clip)


class Step(NamedTuple):
    """One optimizer step of a block or of the shared part, the same for all its slices."""

    number: int  # from 1
    lr: float
    config: OptimizerConfig
    rounding: Rounding | None = None  # needed by bf16 weights


def update(arena: Arena, grads: Tensor, step: Step, factor: Tensor | None = None) -> None:
    """One optimizer step, in place. `grads` [N] in the compute dtype; clipping changes them.

    `factor`: of the gradients, where the whole model's norm decides (`optimizer.clip: global`); None: their
    own norm does.
    """
    if factor is not None:
        grads.mul_(factor.to(grads.dtype))
    elif step.config.grad_clip is not None:
        clip_gradients(grads, step.config.grad_clip)
    for group in arena.layout.groups:
        update_rows(arena, group, group.start, grads[group.start : group.stop], step)


def update_rows(arena: Arena, group: Group, first: int, grads: Tensor, step: Step) -> None:
    """Updates the elements of `group` from `first` on, one for each of `grads`, a slice at a time; `first` is
    the start of a parameter or group.
    """
    whole = len(grads) // GROUP_SIZE * GROUP_SIZE
    for start in range(0, whole, SLICE_NUMEL):
        part = grads[start : min(start + SLICE_NUMEL, whole)].contiguous()
        _update_slice(arena, group, slice(first + start, first + start + len(part)), part, step)
    if whole < len(grads):  # a parameter's end, with the padding behind it
        part = F.pad(grads[whole:], (0, GROUP_SIZE - len(grads) + whole))
        _update_slice(arena, group, slice(first + whole, first + whole + GROUP_SIZE), part, step)


def _update_slice(arena: Arena, group: Group, rows: slice, grads: Tensor, step: Step) -> None:
    """Widened to fp32, updated, kept in the weights' own dtype. What it allocates is `workspace_bytes`."""
    stored = arena.weights[rows]
    weights = stored.float()  # in fp32 the stored ones themselves
    weight_decay = step.config.weight_decay if group.decay else 0.0
    (_adamw8bit if group.quantized else _adamw)(arena, rows, weights, grads.float(), step, weight_decay)
    if stored.dtype != torch.float32:
        assert step.rounding is not None
        step.rounding.round(weights, rows.start, stored)
    if step.config.ema is not None:  # warm-up: the first weights are soon forgotten
        arena.state["ema"][rows].lerp_(
            weights, 1 - min(step.config.ema, (1 + step.number) / (10 + step.number))
        )


def _adamw(
    arena: Arena, rows: slice, weights: Tensor, grads: Tensor, step: Step, weight_decay: float
) -> None:
    from torch.optim.adamw import adamw

    skipped = arena.layout.fp32_state_start
    here = slice(rows.start - skipped, rows.stop - skipped)
    adamw(
        [weights],
        [grads],
        [arena.state["exp_avg"][here]],
        [arena.state["exp_avg_sq"][here]],
        [],
        [torch.full((), float(step.number - 1), device=weights.device)],
        fused=True,
        beta1=step.config.betas[0],
        beta2=step.config.betas[1],
        lr=step.lr,
        weight_decay=weight_decay,
        eps=step.config.eps,
        amsgrad=False,
        maximize=False,
    )


def _adamw8bit(
    arena: Arena, rows: slice, weights: Tensor, grads: Tensor, step: Step, weight_decay: float
) -> None:
    signed, unsigned = _quantization_maps(weights.device)
    groups = slice(rows.start // GROUP_SIZE, rows.stop // GROUP_SIZE)
    bitsandbytes_functional().optimizer_update_8bit_blockwise(
        "adam",
        grads,
        weights,
        arena.state["state1"][rows],
        arena.state["state2"][rows],
        step.config.betas[0],
        step.config.betas[1],
        0.0,  # beta3, alpha: other optimizers of the family
        0.0,
        step.config.eps,
        step.number,
        step.lr,
        signed,
        unsigned,
        arena.state["absmax1"][groups],
        arena.state["absmax2"][groups],
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
