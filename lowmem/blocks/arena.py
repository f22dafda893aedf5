"""Lays a block out as one contiguous buffer: weights first, then optimizer state, every tensor a view.

    | weights, fp32 or bf16, each parameter at a multiple of 256 elements | state fields | padding to 4096 |

So a block is one buffer, one file, one read and one copy. Parameters with the same kind of state and the same
weight decay lie next to each other (`groups`): an optimizer step is a few flat calls, however many parameters
there are. The header makes the file a valid safetensors file whose data begin on a 4096-byte border, so that
they can be read straight into an aligned buffer.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lowmem.machine.device import Device
from lowmem.units import PAGE, round_up

ALIGNMENT = 256  # bytes: alignment of each state field in a buffer
GROUP_SIZE = 256  # elements that share one absmax of 8-bit state; parameters are aligned to it
MIN_8BIT_NUMEL = 4096  # smaller parameters keep fp32 state, as in bitsandbytes
FROZEN = "none"  # in the place of an optimizer: weights that are only read, without state
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}


@dataclass(frozen=True)
class ParameterSlot:
    """A parameter's place in the flat weights."""

    name: str
    shape: tuple[int, ...]
    start: int  # its first element
    dtype: torch.dtype | None = None  # where the flat weights are bytes, which hold parameters of several

    @property
    def numel(self) -> int:
        """Elements of the flat weights."""
        return prod(self.shape) * (1 if self.dtype is None else self.dtype.itemsize)

    def view(self, flat: Tensor, start: int) -> Tensor:
        """The parameter in a flat vector, from the element `start` on."""
        part = flat[start : start + self.numel]
        return (part if self.dtype is None else part.view(self.dtype)).view(self.shape)


@dataclass(frozen=True)
class Group:
    """A run of the flat weights that one call updates."""

    start: int
    stop: int
    decay: bool
    quantized: bool
    matrix: tuple[int, int] | None = None  # its shape, of one that Muon updates as a whole


class StateField(NamedTuple):
    """One flat tensor of optimizer state: `numel` elements of `dtype`."""

    name: str
    dtype: torch.dtype
    numel: int


class HasSlots(Protocol):
    """A block's layout, or that of a part of it."""

    slots: list[ParameterSlot]


class ArenaLayout:
    """Where everything of a block lies.

    It follows from the parameters' names and shapes, their dtype and the optimizer's state alone, so that a
    resumed run finds its bytes where the first one left them.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, tuple[int, ...]]],
        optimizer: str,
        ema: bool = False,
        weights_dtype: torch.dtype = torch.float32,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """`dtypes`: of each parameter, where they differ; then the flat weights are bytes (uint8)."""

        def kind(parameter: tuple[str, tuple[int, ...]]) -> tuple[bool, bool]:
            """(AdamW in fp32, no weight decay): other parameters come first, vectors are not decayed."""
            _, shape = parameter
            quantized = optimizer == "adamw8bit" and prod(shape) >= MIN_8BIT_NUMEL
            return not (quantized or is_matrix(shape)), len(shape) < 2

        def is_matrix(shape: tuple[int, ...]) -> bool:
            return optimizer == "muon" and len(shape) == 2

        self.slots: list[ParameterSlot] = []
        self.groups: list[Group] = []
        end = 0
        # A stable sort: parameters of one kind keep the model's order, on every machine and in every version.
        for name, shape in sorted(parameters, key=kind):
            fp32_state, no_decay = kind((name, shape))
            slot = ParameterSlot(name, tuple(shape), end, None if dtypes is None else dtypes[name])
            self.slots.append(slot)
            start, end = end, end + round_up(slot.numel, GROUP_SIZE)
            last = self.groups[-1] if self.groups else None
            if is_matrix(shape):
                self.groups.append(Group(start, end, not no_decay, False, (shape[0], shape[1])))
            elif (
                last is not None
                and last.matrix is None
                and (last.decay, last.quantized) == (not no_decay, not fp32_state)
            ):
                self.groups[-1] = Group(last.start, end, last.decay, last.quantized)
            else:
                self.groups.append(Group(start, end, not no_decay, not fp32_state))
        self.numel, self.weights_dtype = end, weights_dtype
        # Quantized groups and matrices come first, so AdamW's fp32 state needs room only from here on.
        others = (group.stop for group in self.groups if group.quantized or group.matrix)
        self.fp32_state_start = max(others, default=0)
        self.fields: dict[str, tuple[StateField, int]] = {}  # name -> field, first byte
        position = self.weights_bytes
        for field in state_fields(optimizer, self.fp32_state_start, self.numel, ema):
            self.fields[field.name] = field, position
            position = round_up(position + field.numel * field.dtype.itemsize, ALIGNMENT)
        self.total_bytes = round_up(position, PAGE)

    def group_of(self, slot: ParameterSlot) -> Group:
        return next(group for group in self.groups if group.start <= slot.start < group.stop)

    def state_rows(self, group: Group, rows: slice) -> dict[str, slice]:
        """The elements of each state field that belong to these rows of `group`, by the field's name.

        `rows` begins and ends at multiples of GROUP_SIZE.
        """
        if not self.fields:
            return {}
        rest = slice(rows.start - self.fp32_state_start, rows.stop - self.fp32_state_start)
        groups = slice(rows.start // GROUP_SIZE, rows.stop // GROUP_SIZE)
        if group.matrix is not None:
            return {"momentum": rows, **({"ema": rows} if "ema" in self.fields else {})}
        held = (
            {"state1": rows, "state2": rows, "absmax1": groups, "absmax2": groups}
            if group.quantized
            else {"exp_avg": rest, "exp_avg_sq": rest}
        )
        return {**held, "ema": rows} if "ema" in self.fields else held

    @property
    def weights_bytes(self) -> int:
        return self.numel * self.weights_dtype.itemsize

    @property
    def state_bytes(self) -> int:
        return self.total_bytes - self.weights_bytes

    @property
    def result(self) -> tuple[torch.dtype, int, int]:
        """(dtype, first byte, bytes) of the flat weights to use: their average where one is kept."""
        if "ema" not in self.fields:
            return self.weights_dtype, 0, self.weights_bytes
        field, first = self.fields["ema"]
        return field.dtype, first, field.numel * field.dtype.itemsize

    @functools.cached_property
    def header_bytes(self) -> int:
        """Of the header alone."""
        return len(self.header())

    def header(self) -> bytes:
        """The file's safetensors header, padded with spaces so that the data begin on a page.

        The format allows no gaps, so each gap is a tensor with a name of its own.
        """
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}

        def add(name: str, dtype: str, shape: tuple[int, ...], start: int, stop: int) -> None:
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}

        end = 0
        for name, dtype, shape, start, num_bytes in self._spans():
            if start > end:
                add(f"padding.{end}", "U8", (start - end,), end, start)
            add(name, dtype, shape, start, start + num_bytes)
            end = start + num_bytes
        if self.total_bytes > end:
            add(f"padding.{end}", "U8", (self.total_bytes - end,), end, self.total_bytes)
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = round_up(8 + len(text), PAGE) - 8  # the text follows 8 bytes that hold its length
        return struct.pack("<Q", length) + text.ljust(length)

    def _spans(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """(name, dtype, shape, first byte, bytes) of every tensor, in the order of their bytes."""
        itemsize, spans = self.weights_dtype.itemsize, []
        for slot in self.slots:
            dtype = SAFETENSORS_DTYPE[slot.dtype or self.weights_dtype]
            spans.append((slot.name, dtype, slot.shape, slot.start * itemsize, slot.numel * itemsize))
        for field, start in self.fields.values():
            num_bytes = field.numel * field.dtype.itemsize
            name = f"optimizer.{field.name}"
            spans.append((name, SAFETENSORS_DTYPE[field.dtype], (field.numel,), start, num_bytes))
        return spans


def state_fields(optimizer: str, quantized_numel: int, numel: int, ema: bool = False) -> list[StateField]:
    """The optimizer's state for `numel` weights, in the order in which it lies in the buffer.

    `quantized_numel`: how many of them, the first ones, have 8-bit state if the optimizer is an 8-bit one, or
    one moment if it is Muon.
    `ema`: also keep the weights' average.
    """
    fp32, average = torch.float32, [StateField("ema", torch.float32, numel)] if ema else []
    if optimizer == FROZEN:
        return []
    if optimizer == "adamw":
        return [StateField("exp_avg", fp32, numel), StateField("exp_avg_sq", fp32, numel), *average]
    groups, rest = quantized_numel // GROUP_SIZE, numel - quantized_numel
    adamw = [StateField("exp_avg", fp32, rest), StateField("exp_avg_sq", fp32, rest)]
    if optimizer == "muon":
        fields = [StateField("momentum", fp32, quantized_numel), *adamw, *average]
        return [field for field in fields if field.numel]
    fields = [
        StateField("state1", torch.uint8, quantized_numel),
        StateField("state2", torch.uint8, quantized_numel),
        StateField("absmax1", fp32, groups),
        StateField("absmax2", fp32, groups),
        *adamw,
        *average,
    ]
    return [field for field in fields if field.numel]


class Arena:
    """A layout laid over a buffer (uint8, at least `total_bytes` of it), on any device."""

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
        """The weights to use: their average if one is kept, else the weights themselves."""
        return self.state.get("ema", self.weights)


def parameter_views(layout: HasSlots, flat: Tensor) -> dict[str, Tensor]:
    """Each parameter's view of a flat vector [numel]: of the weights, a bf16 copy of them, or gradients."""
    return {slot.name: slot.view(flat, slot.start) for slot in layout.slots}


def computing(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Flat weights in the dtype of compute. Bytes stay: they hold parameters that compute as they are."""
    return weights if weights.dtype == torch.uint8 else weights.to(dtype)


OnGradient = Callable[[str, nn.Parameter], None]


def bind(
    model: nn.Module, weights: Mapping[str, Tensor], grads: Mapping[str, Tensor] | OnGradient | None
) -> None:
    """Makes `weights` the model's parameters of those names.

    Gradients gather in `grads`; None freezes the parameters. A function `grads` is called with a parameter's
    name and the parameter during backward, as soon as its `grad` is complete. It may then change the
    parameter, and must say so with `torch.autograd.graph.increment_version`.
    """
    for name, value in weights.items():
        # `.data` gives each parameter a version counter of its own: an update of its neighbour in the arena
        # must not make autograd believe that this one has changed.
        parameter = nn.Parameter(value.data, requires_grad=grads is not None)
        if callable(grads):
            hook = functools.partial(grads, name)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        elif grads is not None:
            parameter.grad = grads[name]
        _set_parameter(model, name, parameter)


def gathered_in(grads: Mapping[str, Tensor], after: Callable[[], None]) -> OnGradient:
    """For `bind`: gradients gather in `grads`, whatever lies there before. A parameter without a gradient
    keeps `grad` None, and leaves its place as it is.

    The first gradient is copied. To add it to zeros would read and write twice as much. `after`: is called
    after each gradient.
    """

    def gather(name: str, parameter: nn.Parameter) -> None:
        if parameter.grad is not grads[name]:
            assert parameter.grad is not None
            grads[name].copy_(parameter.grad)
            parameter.grad = grads[name]  # to which autograd adds the next ones
        after()

    return gather


def gaps(layout: HasSlots, numel: int) -> list[slice]:
    """The elements of flat vectors [numel] that belong to no parameter."""
    starts = [*(slot.start for slot in layout.slots), numel]
    ends = [0, *(slot.start + slot.numel for slot in layout.slots)]
    return [slice(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def unbind(model: nn.Module, layout: HasSlots) -> None:
    """Puts the parameters back on the meta device: no memory, no gradient."""
    for slot in layout.slots:
        _set_parameter(model, slot.name, _on_meta(slot.name, slot.shape))


@functools.cache
def _on_meta(name: str, shape: tuple[int, ...]) -> nn.Parameter:
    """Makes each meta parameter once. New small objects at every visit would lie among freed activations and
    keep the C library from giving that memory back.
    """
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)


def aligned_buffer(num_bytes: int) -> Tensor:
    """Host memory [num_bytes] (uint8, zeros) that starts on a page.

    NumPy makes it, because torch would fill it with a team of OpenMP threads, and each reader or writer
    thread that asks for a buffer would get a team of its own. Once the teams outnumber the cores, OpenMP lets
    its threads sleep between operations instead of spinning, and compute is slower for the rest of the run.
    NumPy also asks the system for huge pages.
    """
    whole = torch.from_numpy(np.zeros(num_bytes + PAGE, dtype=np.uint8))
    first = -whole.data_ptr() % PAGE
    return whole[first : first + num_bytes]


def device_buffer(device: Device, num_bytes: int) -> Tensor:
    """A slot (uint8, [num_bytes]) in the memory that compute reads, on a page. See `Device.buffer`."""
    return device.buffer(num_bytes) if device.copies else aligned_buffer(num_bytes)
