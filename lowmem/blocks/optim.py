"""Updates a block's weights on flat slices with AdamW: torch's fused kernel, or with 8-bit moments
bitsandbytes' (on a CPU `eight_bit`, which gives its bits); or matrix by matrix with torch's Muon.

The update is a function of slices, and its state consists of fields of the block's arena. So the state
streams, rests and is saved together with its block. The stock 8-bit `step()` would not do: it synchronises
the whole device after every parameter, launches on stream 0, and keeps its state in a dictionary by parameter
object. Quantization groups have 256 elements and the arena starts each parameter on such a border, so a flat
update is bit-equal to that of bitsandbytes parameter by parameter.

AdamW: Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2. 8-bit state: Dettmers et
al., "8-bit optimizers via block-wise quantization". Muon: Jordan et al., 2024; the size of its updates: Liu
et al., "Muon is scalable for LLM training".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.blocks import eight_bit
from lowmem.blocks.arena import GROUP_SIZE, Arena, ArenaLayout, Group
from lowmem.machine.pool import past_pools
from lowmem.recipe import OptimizerConfig
from lowmem.schedule import mix_seed

# Elements updated at once, by kind of device: it bounds the temporaries. On a card it is enough that the host
# starts kernels faster than they end.
SLICE_NUMEL = {"cpu": 1024 * 1024, "cuda": 4 * 1024 * 1024, "mps": 1024 * 1024, "xpu": 4 * 1024 * 1024}
EIGHT_BIT_SLICE_NUMEL = SLICE_NUMEL | {"cpu": eight_bit.SLICE_NUMEL}  # the same of 8-bit state
# Elements whose rounding is drawn at once. The draws depend on it.
ODDS_NUMEL = {"cpu": 256 * 1024, "cuda": 4 * 1024 * 1024, "mps": 256 * 1024, "xpu": 4 * 1024 * 1024}

MUON_MOMENTUM = 0.95  # of the one moment; torch's default


def workspace_bytes(
    numel: int,
    quantized: bool,
    weights_dtype: torch.dtype,
    grads_dtype: torch.dtype,
    device_kind: str = "cpu",
    matrix: tuple[int, int] | None = None,
) -> int:
    """The largest temporaries, in bytes, of an update of `numel` elements of one group.

    `matrix`: see `Group`. It is updated as a whole: the update in fp32, two copies and two products in bf16.
    Beside them lie the buffers of `scratch_bytes`.
    """
    numel = numel if matrix else min(numel, _slice_numel(quantized, device_kind))
    kept_in_bf16 = weights_dtype != torch.float32
    updating = 4 * numel * (kept_in_bf16 + (grads_dtype != torch.float32))
    if matrix:
        updating += 8 * numel + 4 * min(matrix) ** 2
    if not kept_in_bf16:
        return updating
    odds = ODDS_NUMEL[device_kind]  # kept from one slice to the next, two bytes each
    return 2 * odds + max(updating, 4 * numel + 4 * min(numel, odds))


def scratch_bytes(layout: ArenaLayout, device_kind: str) -> int:
    """Bytes of the buffers that stay on the device once a block of such a layout was updated."""
    quantized = any(group.quantized for group in layout.groups)
    return eight_bit.SCRATCH_BYTES if quantized and device_kind == "cpu" else 0


def _slice_numel(quantized: bool, device_kind: str) -> int:
    return (EIGHT_BIT_SLICE_NUMEL if quantized else SLICE_NUMEL)[device_kind]


class Rounding:
    """Rounds one step's fp32 results to bf16 at random, with 16 random bits for each element.

    The bits follow from (seed, element) alone, not from the order or the size of the slices, so none of them
    need be saved. They are drawn `ODDS_NUMEL` at a time.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._generator = seed, torch.Generator(device)
        self._part: int | None = None
        self._numel = ODDS_NUMEL[device.type]
        self._odds = torch.empty(self._numel // 4, dtype=torch.int64, device=device)

    def round(self, values: Tensor, first: int, target: Tensor) -> None:
        """Writes fp32 `values` [n] to bf16 `target` [n], each to one of its two neighbours.

        A neighbour is as likely as it is near, so the mean is the value itself; a value that bf16 can hold
        stays as it is. `first`: the place of the first value in the flat weights. Overwrites `values`.
        """
        # The upper half of an fp32 is a bf16: carry into it at random, then cut the lower half off.
        bits = values.view(torch.int32)
        done = 0
        while done < len(values):
            part, skipped = divmod(first + done, self._numel)
            odds = self._odds_of(part)[skipped : skipped + len(values) - done]
            bits[done : done + len(odds)].add_(odds.int().bitwise_and_(0xFFFF))
            done += len(odds)
        bits.bitwise_and_(-(1 << 16))
        target.copy_(values)

    def _odds_of(self, part: int) -> Tensor:
        if part != self._part:
            self._generator.manual_seed(mix_seed(self._seed, part))
            self._odds.random_(-(1 << 63), None, generator=self._generator)  # all 64 bits: four elements
            self._part = part
        return self._odds.view(torch.int16)


@past_pools
def gradient_norm(grads: Tensor) -> Tensor:
    """The L2 norm of `grads` [n] of any dtype: an fp32 scalar on the device."""
    # In slices, because on a CPU the norm of a bf16 tensor widens all of it at once.
    parts = torch.split(grads, SLICE_NUMEL[grads.device.type])
    # Made before the loop: small tensors made between the slices would keep the freed ones apart.
    norms = torch.empty(len(parts), device=grads.device)
    for norm, part in zip(norms, parts, strict=True):
        norm.copy_(torch.linalg.vector_norm(part, dtype=torch.float32))
    return torch.as_tensor(torch.linalg.vector_norm(norms))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that brings gradients of that norm to at most `max_norm`: a scalar on the device, since
    reading the norm would make the host wait.
    """
    return torch.as_tensor((max_norm / (norm + 1e-6)).clamp(max=1.0))


def clip_gradients(grads: Tensor, max_norm: float) -> Tensor:
    """Scales `grads` to an L2 norm of at most `max_norm`. Returns their norm before."""
    norm = gradient_norm(grads)
    grads.mul_(clip_factor(norm, max_norm).to(grads.dtype))
    return norm


def whole_factor(norms: Sequence[Tensor], config: OptimizerConfig) -> Tensor:
    """The factor for a whole model's gradients, from the norms of its parts (`optimizer.clip: global`)."""
    assert config.scaled_clip is not None
    return clip_factor(gradient_norm(torch.stack(list(norms))), config.scaled_clip)


def clipped(grads: Tensor, config: OptimizerConfig, factor: Tensor | None = None) -> Tensor:
    """Clips `grads` [n] of a block as the recipe says. `factor`: see `update`.

    Returns a scalar on the device that is finite where all gradients are: their norm, or with `factor` that.
    """
    if factor is not None:
        grads.mul_(factor.to(grads.dtype))
        return factor
    if config.scaled_clip is not None:
        return clip_gradients(grads, config.scaled_clip)
    return gradient_norm(grads)


class Step(NamedTuple):
    """One optimizer step of a block or of the shared part, the same for all its slices."""

    number: int  # from 1
    lr: float
    config: OptimizerConfig
    rounding: Rounding | None = None  # for bf16 weights


def update(arena: Arena, grads: Tensor, step: Step, factor: Tensor | None = None) -> Tensor:
    """Makes one optimizer step in place. `grads` [numel], in the compute dtype; clipping changes them.

    Returns a scalar on the device that is finite where all gradients are: their norm, or with `factor` that.

    `factor` scales the gradients where the whole model's norm decides (`optimizer.clip: global`); with None
    their own norm decides.
    """
    norm = clipped(grads, step.config, factor)
    for group in arena.layout.groups:
        update_rows(arena, group, group.start, grads[group.start : group.stop], step)
    return norm


class Rows(NamedTuple):
    """Elements of one group with all their state, as views that an update changes in place."""

    first: int  # place of the first one in the block's flat weights
    weights: Tensor
    state: dict[str, Tensor]  # by field; the absmax of 8-bit state has an element for GROUP_SIZE weights
    decay: bool
    quantized: bool
    matrix: tuple[int, int] | None = None  # see `Group`; the elements are then all of it, and padding

    def part(self, start: int, stop: int) -> Rows:
        """Some of them. `start` and `stop` are multiples of GROUP_SIZE."""

        def cut(name: str, field: Tensor) -> Tensor:
            size = GROUP_SIZE if name.startswith("absmax") else 1
            return field[start // size : stop // size]

        state = {name: cut(name, field) for name, field in self.state.items()}
        return self._replace(first=self.first + start, weights=self.weights[start:stop], state=state)


def rows_of(arena: Arena, group: Group, start: int, stop: int) -> Rows:
    """The elements [start, stop) of a group, in an arena that is on the device as a whole."""
    places = arena.layout.state_rows(group, slice(start, stop))
    state = {name: arena.state[name][rows] for name, rows in places.items()}
    return Rows(start, arena.weights[start:stop], state, group.decay, group.quantized, group.matrix)


def update_rows(arena: Arena, group: Group, first: int, grads: Tensor, step: Step) -> None:
    """Updates the elements of `group` from `first` on, as many as `grads` [n] has.

    `first` is the start of a parameter or of the group. An element without a gradient of its own (padding)
    may be updated with 0.
    """
    if group.matrix is not None:
        update_slices(rows_of(arena, group, group.start, group.stop), grads, step)
        return
    whole = len(grads) // GROUP_SIZE * GROUP_SIZE
    update_slices(rows_of(arena, group, first, first + whole), grads[:whole], step)
    if whole < len(grads):  # a parameter's end: the kernel needs a whole group, and padding follows
        part = F.pad(grads[whole:], (0, GROUP_SIZE - len(grads) + whole))
        update_slices(rows_of(arena, group, first + whole, first + whole + GROUP_SIZE), part, step)


def update_slices(rows: Rows, grads: Tensor, step: Step) -> None:
    """Updates rows by their gradients [n], a slice at a time, or a matrix as a whole.

    n is a multiple of GROUP_SIZE, or the size of the matrix.
    """
    if rows.matrix is not None:
        numel = rows.matrix[0] * rows.matrix[1]
        _update_slice(rows.part(0, numel), grads[:numel].contiguous(), step)
    else:
        _update_slices(rows, grads, step)


@past_pools
def _update_slices(rows: Rows, grads: Tensor, step: Step) -> None:
    size = _slice_numel(rows.quantized, grads.device.type)
    for start in range(0, len(grads), size):
        stop = min(start + size, len(grads))
        _update_slice(rows.part(start, stop), grads[start:stop].contiguous(), step)


def _update_slice(rows: Rows, grads: Tensor, step: Step) -> None:
    """Updates in fp32 and stores the result in the weights' dtype. It allocates `workspace_bytes`."""
    weights = rows.weights.float()  # not a copy if they are fp32 already
    if step.config.loss_scale != 1:  # they are in fp16: the copy in fp32 is ours
        grads = grads.float().mul_(1 / step.config.loss_scale)
    weight_decay = step.config.weight_decay if rows.decay else 0.0
    if rows.matrix is not None:
        _muon(rows.state, weights.view(rows.matrix), grads.float().view(rows.matrix), step, weight_decay)
    else:
        (_adamw8bit if rows.quantized else _adamw)(rows.state, weights, grads.float(), step, weight_decay)
    if rows.weights.dtype != torch.float32:
        assert step.rounding is not None
        step.rounding.round(weights, rows.first, rows.weights)
    if step.config.ema is not None:
        # A shorter memory in the first steps, so that the first weights are soon forgotten.
        decay = min(step.config.ema, (1 + step.number) / (10 + step.number))
        rows.state["ema"].lerp_(weights, 1 - decay)


def _adamw(state: dict[str, Tensor], weights: Tensor, grads: Tensor, step: Step, weight_decay: float) -> None:
    from torch.optim.adamw import adamw

    adamw(
        [weights],
        [grads],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
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


def has_muon() -> bool:
    """Whether the installed torch has it."""
    return hasattr(torch.optim, "Muon")


def _muon(state: dict[str, Tensor], weights: Tensor, grads: Tensor, step: Step, weight_decay: float) -> None:
    """Of one matrix. The update is scaled to the size of AdamW's, so that one learning rate serves both."""
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon

    muon(
        [weights],
        [grads],
        [state["momentum"].view(weights.shape)],
        lr=step.lr,
        weight_decay=weight_decay,
        momentum=MUON_MOMENTUM,
        nesterov=True,
        ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
        ns_steps=DEFAULT_NS_STEPS,
        eps=EPS,
        adjust_lr_fn="match_rms_adamw",
        has_complex=False,
    )


def _adamw8bit(
    state: dict[str, Tensor], weights: Tensor, grads: Tensor, step: Step, weight_decay: float
) -> None:
    if weights.device.type == "cpu":
        eight_bit.adamw(
            state,
            weights,
            grads,
            number=step.number,
            lr=step.lr,
            betas=step.config.betas,
            eps=step.config.eps,
            weight_decay=weight_decay,
        )
        return
    signed, unsigned = eight_bit.books(weights.device)
    eight_bit.bitsandbytes_functional().optimizer_update_8bit_blockwise(
        "adam",
        grads,
        weights,
        state["state1"],
        state["state2"],
        step.config.betas[0],
        step.config.betas[1],
        0.0,  # beta3 and alpha: other optimizers of the family use them
        0.0,
        step.config.eps,
        step.number,
        step.lr,
        signed,
        unsigned,
        state["absmax1"],
        state["absmax2"],
        weight_decay,
    )
