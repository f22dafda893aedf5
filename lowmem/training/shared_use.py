"""Finds which parameters of the shared part the input part uses, and which the output part."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from lowmem.objectives.base import Objective
from lowmem.training.attempt import Attempt
from lowmem.training.roots import backward_from


class SharedUse(NamedTuple):
    """Names of parameters of the shared part. A tied table is in both; what only layers use is in neither."""

    by_input: frozenset[str]
    by_output: frozenset[str]


def shared_use(attempt: Attempt, objective: Objective[Any, Any]) -> SharedUse:
    """Seen by a pass of an example through both parts. `objective`: bound to the attempt's model."""
    model, names, seen = attempt.model, [slot.name for slot in attempt.shared_layout.slots], set[str]()

    def see(name: str, _: nn.Parameter) -> None:
        seen.add(name)

    hooks = [
        model.get_parameter(name).register_post_accumulate_grad_hook(functools.partial(see, name))  # type: ignore[no-untyped-call]
        for name in names
    ]
    batch = {name: attempt.device.bring(value) for name, value in model.example_batch(1).items()}
    h, cond, kept = objective.enter(batch)
    backward_from((h, torch.zeros_like(h)), (cond, torch.zeros_like(cond)))
    by_input = frozenset(seen)
    seen.clear()
    loss = objective.leave(h.detach().requires_grad_(), cond.detach(), kept, batch).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    attempt.shared.forget()
    return SharedUse(by_input, frozenset(seen))
