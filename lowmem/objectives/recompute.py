"""Activation checkpointing: what a call computes on its way is not kept, and backward makes it again.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016). `torch.utils.checkpoint` does the same,
but its first call imports torch's compiler: some 70 MiB and more than a second in every process that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lowmem.machine.device import CPU, Device, device_of


class _Enough(Exception):
    """Everything that the forward pass had saved is made again."""


def recomputed(call: Callable[..., Tensor], *arguments: Any, draws: bool = True) -> Tensor:
    """`call(*arguments)`, whose saved tensors are made again in backward. Gradients are equal to the bit.

    `draws`: the call draws random numbers, so it is made again with the generators' state of now.
    """
    if not torch.is_grad_enabled():
        return call(*arguments)
    again = _Again(call, arguments, draws)
    with saved_tensors_hooks(again.keep_place, again.at_place):
        return call(*arguments)


class _Again:
    """Stands for the tensors that one call has saved, by the order in which it saved them."""

    def __init__(self, call: Callable[..., Tensor], arguments: tuple[Any, ...], draws: bool) -> None:
        self._call, self._arguments = call, arguments
        self._count = 0
        self._made: dict[int, Tensor] = {}
        self._device = next((device_of(a) for a in arguments if isinstance(a, Tensor)), CPU)
        self._states = _RandomStates(self._device) if draws else None

    def keep_place(self, _: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def at_place(self, place: int) -> Tensor:
        if place not in self._made:
            self._make()
        return self._made.pop(place)

    def _make(self) -> None:
        made: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            # The graph that is built here is never gone through, so it need keep nothing. With a tensor of
            # its own in it, it would hold itself for ever.
            made.append(tensor.detach())
            if len(made) == self._count:
                raise _Enough

        states = None if self._states is None else _RandomStates(self._device)
        if self._states is not None:
            self._states.restore()
        try:
            with torch.enable_grad(), saved_tensors_hooks(keep, lambda _: _):
                self._call(*(_detached(argument) for argument in self._arguments))
        except _Enough:
            pass
        finally:
            if states is not None:
                states.restore()
        self._made = dict(enumerate(made))


def _detached(argument: Any) -> Any:
    return (
        argument.detach().requires_grad_(argument.requires_grad) if isinstance(argument, Tensor) else argument
    )


class _RandomStates:
    """The generators' states: the CPU's, and that of the device on which the call computes."""

    def __init__(self, device: Device) -> None:
        self._device, self._cpu, self._own = device, torch.get_rng_state(), device.random_state()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            self._device.set_random_state(self._own)
