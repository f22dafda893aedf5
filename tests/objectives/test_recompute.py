"""Own activation checkpointing: the bits of plain autograd and of torch's own, in fewer saved bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowmem.models.layers import Layer
from lowmem.objectives.base import in_chunks
from lowmem.objectives.recompute import recomputed

DIM, LENGTH, ROWS = 32, 7, 3
Calls = Callable[..., Tensor]


def plainly(call: Calls, *arguments: Any) -> Tensor:
    return call(*arguments)


def by_torch(call: Calls, *arguments: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return torch.as_tensor(checkpoint(call, *arguments, use_reentrant=False))


WAYS: list[Callable[..., Tensor]] = [plainly, by_torch, recomputed]


class Twice(nn.Module):
    """Uses `cond` twice, and draws between two tensors that are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        gate = torch.sigmoid(self.linear(cond))
        return torch.dropout(h * gate, 0.3, True).sin() * cond + torch.randn_like(h)


def layers(kind: str) -> nn.ModuleList:
    torch.manual_seed(5)
    makers: dict[str, Callable[[], nn.Module]] = {
        "attention": lambda: Layer(DIM, 4, 2, 0.2, "full"),
        "causal": lambda: Layer(DIM, 4, 2, 0.2, "causal", llama=True),
        "cond twice": Twice,
    }
    made = nn.ModuleList(makers[kind]() for _ in range(3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)  # gates begin at 0
    return made.train()


def passed(way: Callable[..., Tensor], kind: str) -> list[Tensor]:
    """The output, all gradients, and the generator's states after each pass."""
    model = layers(kind)
    torch.manual_seed(6)
    h = torch.randn(ROWS, LENGTH, DIM, requires_grad=True)
    cond = torch.randn(ROWS, 1, DIM, requires_grad=True)
    out = h * 1.0
    for layer in model:
        out = way(layer, out, cond)
    states = [torch.get_rng_state()]
    out.square().mean().backward()  # type: ignore[no-untyped-call]
    states.append(torch.get_rng_state())
    grads = [tensor.grad for tensor in (h, cond, *model.parameters())]
    assert all(grad is not None and bool(grad.any()) for grad in grads[:2])
    return [out.detach(), *(grad for grad in grads if grad is not None), *states]


@pytest.mark.parametrize("way", [by_torch, recomputed])
@pytest.mark.parametrize("kind", ["attention", "causal", "cond twice"])
def test_outputs_gradients_and_generators_are_those_of_plain_autograd(
    way: Callable[..., Tensor], kind: str
) -> None:
    expected, found = passed(plainly, kind), passed(way, kind)
    assert len(found) == len(expected) > 6
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_layer_that_is_called_again_gets_the_same_gradients() -> None:
    """As the core of a recurrent model is."""

    def grads(way: Callable[..., Tensor]) -> list[Tensor]:
        model = layers("cond twice")
        torch.manual_seed(7)
        h, cond = torch.randn(ROWS, LENGTH, DIM), torch.randn(ROWS, 1, DIM)
        for _ in range(3):
            h = way(model[0], h, cond)
        h.tanh().sum().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in model[0].parameters() if parameter.grad is not None]

    expected, found = grads(plainly), grads(recomputed)
    assert len(expected) == 2 and all(map(torch.equal, found, expected))


def test_calls_within_calls_get_the_same_gradients() -> None:
    def grads(way: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(8)
        h = torch.randn(5, DIM, requires_grad=True)
        out = way(lambda x: way(lambda y: torch.dropout(y.exp(), 0.5, True), x).sin() * x, h)
        out.sum().backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None
        return h.grad

    assert torch.equal(grads(recomputed), grads(plainly))


def test_backward_may_be_made_twice() -> None:
    h = torch.randn(5, DIM, requires_grad=True)
    out = recomputed(lambda x: torch.dropout(x.exp(), 0.5, True) * x, h).sum()
    first = torch.autograd.grad(out, h, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, h)[0], first)


def test_without_gradients_the_call_is_made_once_and_as_it_is() -> None:
    calls = list[bool]()

    def call(h: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return torch.dropout(h, 0.5, True)

    h = torch.ones(100, requires_grad=True)
    torch.manual_seed(9)
    with torch.no_grad():
        found = recomputed(call, h)
    torch.manual_seed(9)
    assert torch.equal(found, torch.dropout(torch.ones(100), 0.5, True))
    assert calls == [False] and not found.requires_grad


def test_backward_makes_each_call_once_more_and_no_more() -> None:
    calls = list[int]()

    def call(number: int, h: Tensor) -> Tensor:
        calls.append(number)
        return h.exp().sin()

    h = torch.randn(4, requires_grad=True)
    out = recomputed(call, 2, recomputed(call, 1, h))
    assert calls == [1, 2]
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert calls == [1, 2, 2, 1]


def held_bytes(way: Callable[..., Tensor]) -> int:
    """Bytes of all tensors that autograd holds after the forward pass."""
    held = dict[int, int]()

    def count(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = layers("attention")
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    h, cond = torch.randn(ROWS, 64, DIM), torch.randn(ROWS, 1, DIM)
    with saved_tensors_hooks(count, lambda tensor: tensor):
        for layer in model:
            h = way(layer, h, cond)
    h.sum().backward()  # type: ignore[no-untyped-call]
    return sum(size for place, size in held.items() if place not in own)


def test_a_call_saves_none_of_what_it_computes() -> None:
    assert held_bytes(recomputed) == 0
    assert held_bytes(plainly) > 10 * ROWS * 64 * DIM * 4


def test_what_one_call_makes_again_is_freed_before_the_next_call_is_made_again() -> None:
    """Also an operation's result that its own backward needs, which could hold itself for ever."""
    made = list[weakref.ref[Any]]()

    def call(h: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        inner = h.exp()
        made.append(weakref.ref(inner.untyped_storage()))
        return inner * inner.exp()

    alive = list[int]()
    gc.disable()
    try:
        h = torch.randn(8, requires_grad=True)
        out = h
        for _ in range(4):
            out = recomputed(call, out)
        out.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        gc.enable()
    assert alive == [0] * 8


def test_losses_in_chunks_have_the_gradients_of_one_call() -> None:
    h = torch.randn(10, DIM, dtype=torch.float64)
    table = torch.randn(20, DIM, dtype=torch.float64)
    target = torch.arange(10)

    def grads(size: int) -> list[Tensor]:
        rows, words = h.clone().requires_grad_(), table.clone().requires_grad_()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(x @ words.T, y, reduction="none")

        in_chunks(loss, size, rows, target).sum().backward()  # type: ignore[no-untyped-call]
        assert rows.grad is not None and words.grad is not None
        return [rows.grad, words.grad]

    for one, other in zip(grads(3), grads(10), strict=True):
        torch.testing.assert_close(one, other)
