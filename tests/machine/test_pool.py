"""Memory of large results that is used again: the same bits and strides, and no more than allowed."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.machine.pool import LENT_BYTES, WAYS, Holes, Pool, Span, activation_pool, past_pools, pays
from lowmem.models.layers import Layer
from lowmem.units import MIB, PAGE

aten = torch.ops.aten
ROWS, COLUMNS = 512, 1024  # 2 MiB in fp32


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(dtype) + 0.1


def arguments(func: Any, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Calls of an operator with large results: contiguous operands, and those that are not."""
    x, turned = draw(ROWS, COLUMNS, dtype=dtype), draw(COLUMNS, ROWS, dtype=dtype).t()
    row, column = draw(1, COLUMNS, dtype=dtype), draw(ROWS, 1, dtype=dtype)
    chunk = draw(ROWS, 2 * COLUMNS, dtype=dtype)[:, COLUMNS:]
    if func in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        heads = draw(4, 256, 8, 128, dtype=dtype).transpose(1, 2)  # of an attention: [4, 8, 256, 128]
        angles = draw(256, 64, dtype=dtype)
        pairs = [(x, x), (x, row), (column, x), (row, column), (x, turned), (turned, turned), (x, chunk)]
        return [
            *pairs,
            (chunk, row),
            (x, 3),
            (x, 0.5),
            (turned, 2.0),
            (x, draw(1, dtype=dtype)[0]),
            (x, row.double()),
            (heads[..., :64], angles),
            (heads[..., :64], heads[..., 64:]),
            (angles, heads[..., 64:]),
            (heads, heads.contiguous()),
            (heads[:1, ..., :64], angles),
            (heads[:1], heads.contiguous()),  # the first one's order is the result's
            (x, draw(1).double()[0]),
        ]
    if func in (aten.gelu_backward.default, aten.silu_backward.default):
        return [(x, x), (x, turned), (turned, turned), (chunk, x)]
    square = draw(COLUMNS, COLUMNS, dtype=dtype)
    if func is aten.mm.default:
        return [(x, square), (x, square.t()), (turned, square), (x.t(), x), (chunk, square)]
    if func is aten.addmm.default:
        return [(row[0], x, square), (x, x, square.t()), (row, turned, square)]
    if func is aten.bmm.default:
        return [(draw(4, ROWS, 64, dtype=dtype), draw(4, 64, COLUMNS, dtype=dtype))]
    if func is aten.pow.Tensor_Scalar:
        return [(x, 2), (turned, 2), (x, 0.5)]
    if func is aten.cat.default:
        split = [
            draw(4, 128, 16, 128, dtype=dtype).transpose(1, 2)[..., part]
            for part in (slice(64), slice(64, 128))
        ]
        last = draw(4, 64, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
        return [
            *[([x, x],), ([x, chunk], 1), ([x, row],), ([turned, turned], 0), ([x, x, x], -1)],
            *[(split, 3), (split, 0), ([last, last], 1)],
        ]
    if func is aten.stack.default:
        return [([x, x, x],), ([x, x], 1), ([turned, turned],), ([chunk, x], 0)]
    if func in (aten.mul.Scalar, aten.div.Scalar):
        return [(x, 3), (chunk, 0.3), (turned, 7.0)]
    if func in (aten._log_softmax.default, aten._softmax.default):
        return [(x, 1, False), (chunk, 1, False), (turned, 1, False), (x, 0, False)]
    if func in (aten._log_softmax_backward_data.default, aten._softmax_backward_data.default):
        return [(x, x, 1, dtype), (turned, x, 1, dtype), (x, turned, 1, dtype), (x, x, 0, dtype)]
    if func is aten.nll_loss_backward.default:
        wanted, total = torch.arange(ROWS) % COLUMNS, draw(1, dtype=dtype)[0]
        wanted[::5] = -100
        return [(total, probs, wanted, None, 1, -100, total) for probs in (x, turned, chunk)]
    return [(x,), (turned,), (chunk,), (x.view(2, -1, COLUMNS),)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("func", WAYS, ids=str)
def test_an_operator_gives_the_same_bits_and_strides_from_the_pool(func: Any, dtype: torch.dtype) -> None:
    lent, empty = 0, Pool.empty
    pool = Pool(64 * MIB)

    def counted(*args: Any) -> Tensor | None:
        nonlocal lent
        out = empty(pool, *args)
        lent += out is not None
        return out

    pool.empty = counted  # type: ignore[method-assign]
    for args in arguments(func, dtype):
        expected = func(*args)
        with pool:
            found = func(*args)
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert torch.equal(found, expected)
        del found
    assert lent  # the pool has made some of them


def test_halves_of_rotated_heads_are_lent() -> None:
    """Just under a MiB each in many models, they would leave gaps in the heap."""
    heads, angles = draw(4, 128, 8, 128).transpose(1, 2), draw(128, 64)
    with Pool(64 * MIB) as pool:
        half = heads[..., :64] * angles
        assert pool.held_bytes == half.numel() * half.itemsize == MIB


def test_numbers_and_tensors_of_other_dimensions_are_joined_as_they_are_without_a_pool() -> None:
    number, row, nothing = draw(1)[0], draw(1, ROWS), torch.empty(0)
    with Pool(64 * MIB):
        assert torch.equal(torch.stack([number, number]), number.repeat(2))
        assert torch.equal(torch.cat([nothing, row], 1), row)


def test_clone_keeps_what_its_memory_format_asks_for() -> None:
    turned = draw(COLUMNS, ROWS).t()
    for given_format in (torch.preserve_format, torch.contiguous_format):
        with Pool(64 * MIB):
            found = turned.clone(memory_format=given_format)
        expected = turned.clone(memory_format=given_format)
        assert found.stride() == expected.stride() and torch.equal(found, expected)


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize("limit_mib", [1, 8, 64])
def test_a_layers_gradients_are_the_same_to_the_bit_whatever_the_pool_may_hold(
    llama: bool, limit_mib: int
) -> None:
    layer = Layer(128, 2, 4, 0.1, "causal", llama=llama)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))

    def passed() -> list[Tensor]:
        torch.manual_seed(0)  # dropout
        h, cond = draw(8, 512, 128).requires_grad_(), draw(8, 1, 128).requires_grad_()
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(2):
            F.cross_entropy(layer(h, cond).view(-1, 128), torch.arange(8 * 512) % 128).backward()
        tensors = [h, cond, *layer.parameters()]
        return [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]

    expected = passed()
    with Pool(limit_mib * MIB) as pool:
        found = passed()
    assert pool.held_bytes > 0
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


# ------------------------------------------------------------------------------------------------------------
# What it holds


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def resident_bytes(pool: Pool) -> int:
    """Pages of the pool's address space that are in memory (mincore(2))."""
    size = len(pool._space)
    start = ctypes.addressof(ctypes.c_ubyte.from_buffer(pool._space))
    there = (ctypes.c_ubyte * (size // PAGE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), there) == 0
    return PAGE * sum(page & 1 for page in there)


def filled(pool: Pool, num_mib: int) -> Tensor:
    tensor = pool.empty((num_mib, MIB // 4), torch.float32)
    assert tensor is not None
    return tensor.fill_(1)


def test_memory_is_lent_again_once_the_last_view_of_it_is_gone() -> None:
    pool = Pool(16 * MIB)
    tensor = filled(pool, 4)
    place, view = address(tensor), tensor[1:]
    del tensor
    other = filled(pool, 4)
    assert address(other) != place
    del view
    assert address(filled(pool, 3)) == place  # a smaller one takes the hole too
    assert pool.held_bytes == 8 * MIB


def test_what_an_operator_keeps_for_backward_is_not_lent_again() -> None:
    with Pool(64 * MIB):
        x = draw(ROWS, COLUMNS).requires_grad_()
        y = x * 2
        z = (y * y).sum()
        del y
        others = [draw(ROWS, COLUMNS) * 0 for _ in range(8)]
        z.backward()
    assert others and x.grad is not None and torch.equal(x.grad, 8 * x.detach())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel of Linux")
def test_it_holds_no_more_than_its_limit_and_what_is_lent() -> None:
    pool = Pool(8 * MIB)
    tensors = [filled(pool, 3) for _ in range(4)]
    assert resident_bytes(pool) == pool.held_bytes == 12 * MIB  # all of it is lent
    del tensors[1], tensors[2]
    assert resident_bytes(pool) == pool.held_bytes == 8 * MIB
    large = filled(pool, 7)  # no hole is large enough: free memory makes room
    assert resident_bytes(pool) == pool.held_bytes == 13 * MIB
    del tensors, large
    assert resident_bytes(pool) == pool.held_bytes == 8 * MIB
    pool.keep_at_most(0)
    assert resident_bytes(pool) == pool.held_bytes == 0


def test_what_passes_pools_borrows_nothing_and_other_modes_see_it() -> None:
    seen = list[object]()

    class Seeing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    values, pool = torch.ones(MIB), Pool(8 * MIB)
    doubled = past_pools(lambda: values * 2)
    with pool:
        kept = doubled()
        assert pool.held_bytes == 0
        lent = values * 2
        assert pool.held_bytes == 4 * MIB
    assert torch.equal(kept, lent)
    with Seeing():  # type: ignore[no-untyped-call]
        doubled()
    assert seen == [torch.ops.aten.mul.Tensor]


def test_small_results_and_those_that_its_address_space_has_no_room_for_come_from_elsewhere() -> None:
    pool = Pool(2 * MIB)
    assert pool.empty((LENT_BYTES // 4 - 1,), torch.float32) is None
    assert pool.empty((17 * MIB // 4,), torch.float32) is None
    with pool:
        assert float((torch.ones(17 * MIB // 4) * 2).sum()) == 17 * MIB // 2


def test_without_a_limit_or_without_address_space_there_is_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(activation_pool(0), contextlib.nullcontext)
    assert isinstance(activation_pool(1 << 50), contextlib.nullcontext)
    assert isinstance(activation_pool(MIB), Pool)


def test_it_pays_where_much_is_cleared_in_few_operators() -> None:
    assert pays(1000 * MIB, 1000) and not pays(10 * MIB, 1000) and not pays(0, 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 63)), max_size=80))
def test_holes_never_overlap_and_none_lies_beside_another(calls: list[tuple[bool, int]]) -> None:
    holes, taken, free = Holes(), list[Span](), set(range(64))
    holes.add(Span(0, 64))
    for takes, number in calls:
        if takes:
            size = number % 9 + 1
            span = holes.take(size)
            if span is None:
                runs = "".join("f" if place in free else "-" for place in range(64)).split("-")
                assert max(map(len, runs)) < size
                continue
            assert span.num_bytes == size and set(range(*span)) <= free
            free -= set(range(*span))
            taken.append(span)
        elif taken:
            span = taken.pop(number % len(taken))
            holes.add(span)
            free |= set(range(*span))
    spans = []
    while (hole := holes.smallest()) is not None:
        spans.append(holes.remove(hole))
    assert [span.num_bytes for span in spans] == sorted(span.num_bytes for span in spans)
    assert sorted(place for span in spans for place in range(*span)) == sorted(free)
    assert not {span.start for span in spans} & {span.stop for span in spans}


def test_it_imports_neither_torchs_compiler_nor_sympy() -> None:
    code = "; ".join(
        [
            "import sys, torch",
            "from lowmem.machine.pool import Pool",
            "x = torch.ones(512, 1024, requires_grad=True)",
            f"pool = Pool({64 * MIB}); pool.__enter__()",
            "(x * x[:1] @ x.t()).sum().backward()",
            "assert pool.held_bytes",
            "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr


def test_spans_are_whole_pages() -> None:
    pool = Pool(16 * MIB)
    tensor = pool.empty((MIB + 1,), torch.uint8)
    assert tensor is not None and pool.held_bytes == MIB + PAGE


def spans_of(holes: Holes) -> list[Span]:
    return [Span(start, stop) for start, stop in holes._stop_of.items()]


def test_a_hole_that_is_too_small_grows_by_what_is_missing() -> None:
    pool = Pool(16 * MIB)
    tensor = filled(pool, 4)
    place = address(tensor)
    del tensor
    larger = filled(pool, 6)
    assert address(larger) == place and pool.held_bytes == 6 * MIB, "four of them are those of before"
    del larger
    kept, above = filled(pool, 1), filled(pool, 5)  # what is free lies beside the second
    assert address(kept) == place
    del above
    assert filled(pool, 9).numel() and pool.held_bytes == 10 * MIB


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 63)), max_size=60))
def test_what_is_lent_never_overlaps_and_everything_that_is_held_is_counted(
    calls: list[tuple[bool, int]],
) -> None:
    pool = Pool(8 * MIB)
    lent = list[Tensor]()
    for takes, number in calls:
        if takes:
            tensor = pool.empty(((number % 12 + 4) * MIB // 16,), torch.float32)
            if tensor is not None:
                lent.append(tensor.fill_(len(lent)))
        elif lent:
            del lent[number % len(lent)]
        tensor = None
        places = sorted((address(each), address(each) + each.nbytes) for each in lent)
        assert all(stop <= start for (_, stop), (start, _) in zip(places, places[1:], strict=False))
        warm, cold = spans_of(pool._warm), spans_of(pool._cold)
        num_lent = sum(each.nbytes for each in lent)
        assert pool.held_bytes == num_lent + sum(span.num_bytes for span in warm)
        assert pool.held_bytes <= max(pool.limit_bytes, num_lent)
        assert pool.held_bytes + sum(span.num_bytes for span in cold) == len(pool._space)
        assert all(bool((each == each[0]).all()) for each in lent)
