"""A block as one contiguous buffer: weights first, then optimizer state; every tensor a view.

    | weights, fp32 or bf16, each parameter on a border of 256 elements | state fields | padding to 4096 bytes |

One buffer is one file, one read, one copy. Parameters are ordered so that those with one kind of state and
one weight decay lie together (`groups`): an optimizer step is a few flat calls whatever the number of
parameters. The header makes the file a valid safetensors file whose data start on a 4096-byte border, so it
can be read straight into an aligned buffer.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.units import round_up

PAGE = 4096  # bytes: alignment of buffers, of files' data, and of unbuffered reads and writes
ALIGNMENT = 256  # bytes: alignment of each tensor in a buffer
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class ParameterSlot:
    name: str
    shape: tuple[int, ...]
    start: int  # element in the flat weights

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Group:
    """A run of the flat weights updated by one call."""

    start: int
    stop: int
    decay: bool
    quantized: bool


class ArenaLayout:
    """Where everything of a block lies.

    A function of the parameters' names and shapes, their dtype and the optimizer's state, nothing else.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, tuple[int, ...]]],
        optimizer: str,
        ema: bool = False,
        weights_dtype: torch.dtype = torch.float32,
    ) -> None:
        def kind(parameter: tuple[str, tuple[int, ...]]) -> tuple[bool, bool]:
            _, shape = parameter
            return not (optimizer == "adamw8bit" and prod(shape) >= MIN_8BIT_NUMEL), len(
                shape
            ) < 2  # vectors are not decayed

        self.slots: list[ParameterSlot] = []
        self.groups: list[Group] = []
        end = 0
        for name, shape in sorted(parameters, key=kind):
            fp32_state, no_decay = kind((name, shape))
            self.slots.append(ParameterSlot(name, tuple(shape), end))
            start, end = end, end + round_up(prod(shape), GROUP_SIZE)
            last = self.groups[-1] if self.groups else None
            if last is not None and (last.decay, last.quantized) == (not no_decay, not fp32_state):
                self.groups[-1] = Group(last.start, end, last.decay, last.quantized)
            else:
                self.groups.append(Group(start, end, not no_decay, not fp32_state))
        self.numel, self.weights_dtype = end, weights_dtype
        self.fp32_state_start = max((g.stop for g in self.groups if g.quantized), default=0)
        self.fields: dict[str, tuple[StateField, int]] = {}  # name -> field, first byte
        position = self.weights_bytes
        for field in state_fields(optimizer, self.fp32_state_start, self.numel, ema):
            self.fields[field.name] = field, position
            position = round_up(position + field.numel * field.dtype.itemsize, ALIGNMENT)
        self.total_bytes = round_up(position, PAGE)

    def group_of(self, slot: ParameterSlot) -> Group:
        return next(group for group in self.groups if group.start <= slot.start < group.stop)

    @property
    def weights_bytes(self) -> int:
        return self.numel * self.weights_dtype.itemsize

    @property
    def weights_read_bytes(self) -> int:
        """Of a read that needs the weights alone: they lie first."""
        return round_up(self.weights_bytes, PAGE)

    @property
    def state_bytes(self) -> int:
        return self.total_bytes - self.weights_bytes

    @property
    def num_parameters(self) -> int:
        return sum(slot.numel for slot in self.slots)

    def header(self) -> bytes:
        """The safetensors header, padded with spaces so that data start on a page.

        Gaps are named tensors, as the format demands.
        """
        dtype, itemsize = SAFETENSORS_DTYPE[self.weights_dtype], self.weights_dtype.itemsize
        spans = [
            (slot.name, dtype, slot.shape, slot.start * itemsize, slot.numel * itemsize)
            for slot in self.slots
        ]
        spans += [
            (
                f"optimizer.{field.name}",
                SAFETENSORS_DTYPE[field.dtype],
                (field.numel,),
                start,
                field.numel * field.dtype.itemsize,
            )
            for field, start in self.fields.values()
        ]
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape, start, nbytes in [*spans, ("", "", (), self.total_bytes, 0)]:
            if start > end:
                entries[f"padding.{end}"] = {
                    "dtype": "U8",
                    "shape": [start - end],
                    "data_offsets": [end, start],
                }
            if name:
                entries[name] = {
                    "dtype": dtype,
                    "shape": list(shape),
                    "data_offsets": [start, start + nbytes],
                }
            end = start + nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = round_up(8 + len(text), PAGE) - 8
        return struct.pack("<Q", length) + text.ljust(length)


class Arena:
    """A layout laid over a buffer (uint8, at least `total_bytes`), on any device."""

    def __init__(self, layout: ArenaLayout, buffer: Tensor) -> None:
        self.layout = layout
        self.buffer = buffer[: layout.total_bytes]
        self.weights = self.buffer[: layout.weights_bytes].view(layout.weights_dtype)
        self.state = {
            name: self.buffer[start : start + field.numel * field.dtype.itemsize].view(field.dtype)
            for name, (field, start) in layout.fields.items()
        }

    @property
    def result(self) -> Tensor:
        """What training has come to: the average of the weights where one is kept, else the weights."""
        return self.state.get("ema", self.weights)


def parameter_views(layout: ArenaLayout, flat: Tensor) -> dict[str, Tensor]:
    """Each parameter's view of a flat vector of the layout's length: weights, a bf16 copy of them, or
    gradients.
    """
    return {slot.name: flat[slot.start : slot.start + slot.numel].view(slot.shape) for slot in layout.slots}


OnGradient = Callable[[str, nn.Parameter], None]


def bind(
    model: nn.Module, weights: Mapping[str, Tensor], grads: Mapping[str, Tensor] | OnGradient | None
) -> None:
    """Makes `weights` the model's parameters of those names, gradients gathering in `grads` (None: frozen).

    Where `grads` is a function, it is called with name and parameter during backward, as soon as nothing more
    will be added to the parameter's `grad`. It may then change the parameter, and must say so with
    `torch.autograd.graph.increment_version`.
    """
    for name, value in weights.items():
        # .data: a version of its own, for a change of one parameter is none of its neighbours in the arena
        parameter = nn.Parameter(value.data, requires_grad=grads is not None)
        if callable(grads):
            parameter.register_post_accumulate_grad_hook(functools.partial(grads, name))  # type: ignore[no-untyped-call]
        elif grads is not None:
            parameter.grad = grads[name]
        _set_parameter(model, name, parameter)


def unbind(model: nn.Module, layout: ArenaLayout) -> None:
    """Gives the parameters back to the meta device: no memory, no gradient."""
    for slot in layout.slots:
        _set_parameter(model, slot.name, _on_meta(slot.name, slot.shape))


@functools.cache
def _on_meta(name: str, shape: tuple[int, ...]) -> nn.Parameter:
    """Made once: a small object that outlives each visit would lie amid freed activations, and the C
    library's heap grow around it.
    """
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)


def aligned_buffer(num_bytes: int) -> Tensor:
    """Host memory, uint8, zeros, that starts on a page.

    NumPy's, not torch's: that would fill it with a team of threads, and where a reader or writer thread asks
    for the buffer it would get a team of its own. OpenMP's teams then outnumber the cores, so they sleep
    instead of spinning between operations, for the rest of the run. NumPy also asks for huge pages.
    """
    whole = torch.from_numpy(np.zeros(num_bytes + PAGE, dtype=np.uint8))
    first = -whole.data_ptr() % PAGE
    return whole[first : first + num_bytes]


GROUP_SIZE = 256  # elements that share one absmax


MIN_8BIT_NUMEL = 4096  # smaller parameters keep fp32 state, as in bitsandbytes


class StateField(NamedTuple):
    """One flat tensor of optimizer state; `numel` elements of `dtype`."""

    name: str
    dtype: torch.dtype
    numel: int


def state_fields(optimizer: str, quantized_numel: int, numel: int, ema: bool = False) -> list[StateField]:
    """State for `numel` weights, the first `quantized_numel` of them in 8 bits when the optimizer is an 8-bit
    one; `ema`: and their average.
    """
    average = [StateField("ema", torch.float32, numel)] if ema else []
    if optimizer == "adamw":
        return [
            StateField("exp_avg", torch.float32, numel),
            StateField("exp_avg_sq", torch.float32, numel),
            *average,
        ]
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
