"""Memory of large activations on a CPU that is used again, and not given back at every free.

The C library serves a large tensor from a map of its own, which goes back to the system when it is freed (see
`heap`). The next tensor then starts on pages that the kernel has to clear first: some two microseconds for
each 4 KiB, a quarter of the time of a step. A pool keeps the maps, and gives one of the same size again. What
it holds, lent and free together, stays within a limit: the peak of large activations that was planned anyway.
So a run's peak is as predictable as without a pool.

The pool stands between torch and its operators while it is entered. Operators that can write into a given
tensor write into one of the pool's. Their kernels are the same, so every bit is. All other operators run as
they do without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.units import MIB, PAGE, round_up

# A page that the kernel clears takes as long as this for each byte of it, and an operator that passes through
# the pool takes so much longer: measured, and rounded against the pool.
CLEARING_S_PER_BYTE, DISPATCH_S = 0.4e-9, 25e-6
# Smaller results come from the heap. Larger ones would leave gaps of tens of MiB there, because small tensors
# that stay are put into the memory that they leave.
LENT_BYTES = MIB // 4
SPACE = 8  # address space over memory: room for holes whose pages were given back
MAP_NORESERVE = 0x4000  # mmap(2): Python names it since 3.13
aten = torch.ops.aten


class Result(NamedTuple):
    """Of an operator, where it is known how it lies in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...] | None = None  # dimensions by falling stride; None: as they are


def pays(cleared_bytes: float, num_operations: float) -> bool:
    """Whether a pass that allocates so many large bytes, in so many operators, is faster with a pool."""
    return CLEARING_S_PER_BYTE * cleared_bytes > DISPATCH_S * num_operations


def activation_pool(limit_bytes: int) -> contextlib.AbstractContextManager[Pool | None]:
    """A pool to enter, or nothing where the limit is none or the system gives no address space for it."""
    with contextlib.suppress(OSError):
        if limit_bytes:
            return Pool(limit_bytes)
    return contextlib.nullcontext()


class _Entered(threading.local):
    pools = 0  # that this thread has entered


_entered = _Entered()
Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def past_pools(call: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """For what runs many operators and makes nothing large: they do not pass the pool, which takes longer
    than some of them.
    """

    @functools.wraps(call)
    def without(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        if not _entered.pools:  # and then nobody else's modes are passed by
            return call(*args, **kwargs)
        with torch._C._DisableTorchDispatch():
            return call(*args, **kwargs)

    return without


class Span(NamedTuple):
    """A part of the pool's address space."""

    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class Holes:
    """Free spans, none beside another."""

    def __init__(self) -> None:
        self._stop_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}

    def add(self, span: Span) -> None:
        start, stop = span
        if start in self._start_of:  # a hole ends where this one begins
            start = self.remove(Span(self._start_of[start], start)).start
        if stop in self._stop_of:
            stop = self.remove(Span(stop, self._stop_of[stop])).stop
        self._stop_of[start], self._start_of[stop] = stop, start

    def remove(self, span: Span) -> Span:
        del self._stop_of[span.start], self._start_of[span.stop]
        return span

    def take(self, num_bytes: int) -> Span | None:
        """A span of the smallest hole that is large enough."""
        fitting = [
            (stop - start, start) for start, stop in self._stop_of.items() if stop - start >= num_bytes
        ]
        if not fitting:
            return None
        size, start = min(fitting)
        return self.cut(Span(start, start + size), Span(start, start + num_bytes))

    def cut(self, hole: Span, part: Span) -> Span:
        """Takes a part out of a hole. What is left of the hole stays."""
        self.remove(hole)
        for rest in (Span(hole.start, part.start), Span(part.stop, hole.stop)):
            if rest.num_bytes:
                self.add(rest)
        return part

    def ending_at(self, place: int) -> Span | None:
        start = self._start_of.get(place)
        return None if start is None else Span(start, place)

    def starting_at(self, place: int) -> Span | None:
        stop = self._stop_of.get(place)
        return None if stop is None else Span(place, stop)

    def largest_first(self) -> list[Span]:
        return sorted(map(Span._make, self._stop_of.items()), key=lambda span: span.num_bytes, reverse=True)

    def smallest(self) -> Span | None:
        sizes = [(stop - start, start) for start, stop in self._stop_of.items()]
        return None if not sizes else Span(min(sizes)[1], sum(min(sizes)))


class Pool(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lends memory for large results of the operators that run while it is entered, in this thread.

    `limit_bytes`: of memory that is lent, and of free memory whose pages stay. Only what is lent at once may
    exceed it.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit_bytes = limit_bytes
        size = round_up(SPACE * limit_bytes, PAGE)
        self._space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self._warm, self._cold = Holes(), Holes()  # with pages, and without
        self._cold.add(Span(0, size))
        self.held_bytes = 0  # lent or warm

    def __enter__(self) -> Self:
        _entered.pools += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)  # type: ignore[no-untyped-call]
        _entered.pools -= 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, 70 MiB, to keep it away from here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        way = WAYS.get(func)
        if way is None:
            return func(*args, **kwargs)
        result_of, write, name = way
        result = result_of(args, kwargs)
        out = None if result is None else self._result(result)
        if out is None:
            return func(*args, **kwargs)
        write(*args, **kwargs, **{name: out})
        return out

    def _result(self, result: Result) -> Tensor | None:
        if result.order is None:
            return self.empty(result.shape, result.dtype)
        out = self.empty(tuple(result.shape[dim] for dim in result.order), result.dtype)
        return None if out is None else out.permute(sorted(range(out.ndim), key=result.order.__getitem__))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor whose memory comes back to the pool when its storage dies. None: the pool has none."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < LENT_BYTES:
            return None
        size = round_up(num_bytes, PAGE)
        span = self._warm.take(size) or self._extended(size) or self._new(size)
        if span is None:
            return None
        lent = _lent(num_bytes).from_buffer(self._space, span.start)  # lives as long as the storage
        lent.give_back = functools.partial(self._take_back, span)
        return torch.frombuffer(lent, dtype=dtype).view(shape)

    def _extended(self, num_bytes: int) -> Span | None:
        """The largest hole with pages that has room beside it, and as much of that room as is missing."""
        for hole in self._warm.largest_first():
            for room in (self._cold.starting_at(hole.stop), self._cold.ending_at(hole.start)):
                missing = num_bytes - hole.num_bytes
                if room is None or room.num_bytes < missing:
                    continue
                start = room.start if room.start == hole.stop else room.stop - missing
                self._warm.remove(hole)
                new = self._cold.cut(room, Span(start, start + missing))
                self.keep_at_most(self.limit_bytes - missing)
                self.held_bytes += missing
                return Span(min(hole.start, new.start), max(hole.stop, new.stop))
        return None

    def _new(self, num_bytes: int) -> Span | None:
        self.keep_at_most(self.limit_bytes - num_bytes)
        span = self._cold.take(num_bytes)
        if span is not None:
            self.held_bytes += num_bytes
        return span

    def keep_at_most(self, limit_bytes: int) -> None:
        """Gives pages of free memory back to the system until no more is held, or all is lent."""
        while self.held_bytes > limit_bytes:
            hole = self._warm.smallest()
            if hole is None:
                return
            kept = max(hole.num_bytes - (self.held_bytes - limit_bytes), 0) // PAGE * PAGE
            given = self._warm.cut(hole, Span(hole.start + kept, hole.stop))
            self._space.madvise(mmap.MADV_DONTNEED, given.start, given.num_bytes)
            self._cold.add(given)
            self.held_bytes -= given.num_bytes

    def _take_back(self, span: Span) -> None:
        self._warm.add(span)
        self.keep_at_most(self.limit_bytes)


@functools.cache
def _lent(num_bytes: int) -> Any:
    """The type of a buffer of that size: it tells its pool when nothing reads or writes it any more."""

    class Lent(ctypes.c_ubyte * num_bytes):  # type: ignore[misc]
        give_back: Callable[[], None]

        def __del__(self) -> None:
            self.give_back()

    return Lent


# ------------------------------------------------------------------------------------------------------------
# Operators: what the result is, where it is known to be contiguous, and the form that writes it


def _falls(tensor: Tensor) -> bool:
    """Whether the strides fall from the first dimension to the last, but for those that do not count."""
    last = None
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1 or stride == 0:
            continue
        if last is not None and stride > last:
            return False
        last = stride
    return True


def _elementwise(args: Any, kwargs: Any) -> Result | None:
    """Of tensors of one dtype, and numbers. The result has the largest one's shape, and its dimensions lie in
    memory as those of all tensors do.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    largest = max(tensors, key=Tensor.numel)
    if largest.device.type != "cpu" or not largest.is_floating_point():
        return None
    if largest.numel() * largest.itemsize < LENT_BYTES:
        return None
    falls = True
    for tensor in tensors:
        if tensor.dtype != largest.dtype or tensor.ndim > largest.ndim:
            return None
        if any(
            a not in (1, b) for a, b in zip(reversed(tensor.shape), reversed(largest.shape), strict=False)
        ):
            return None
        falls = falls and _falls(tensor)
    shape = tuple(largest.shape)
    if falls:
        return Result(shape, largest.dtype)
    if 1 in shape:  # then several orders are the same, and torch's choice is not known
        return None
    order = tuple(sorted(range(largest.ndim), key=largest.stride, reverse=True))
    if all(_falls(tensor.expand(shape).permute(order)) for tensor in tensors):
        return Result(shape, largest.dtype, order)
    return None


def _product(args: Any, kwargs: Any) -> Result | None:
    *_, a, b = args
    return Result((*a.shape[:-1], b.shape[-1]), a.dtype) if a.device.type == "cpu" else None


def _joined(args: Any, kwargs: Any) -> Result | None:
    """Of `cat`: tensors of one dtype and as many dimensions, whose elements lie side by side in the last one.
    Others may be "channels last", and the result too.
    """
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    if first.ndim == 0 or any(t.dtype != first.dtype or t.ndim != first.ndim for t in tensors):
        return None
    if any(t.stride(-1) != 1 for t in tensors):
        return None
    if first.device.type != "cpu" or not first.dtype.is_floating_point:
        return None
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return Result(tuple(shape), first.dtype)


def _stacked(args: Any, kwargs: Any) -> Result | None:
    """Of `stack`: what `cat` takes, and the first of the result's dimensions counts them."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    joined = None if dim != 0 else _joined((args[0], 0), {})
    return None if joined is None else Result((len(args[0]), *args[0][0].shape), joined.dtype)


def _alike(place: int) -> Callable[[Any, Any], Result | None]:
    """The result is like one of the arguments, if that is contiguous and of the others' dtype."""

    def result(args: Any, kwargs: Any) -> Result | None:
        like = args[place]
        floating = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        fits = like.device.type == "cpu" and like.is_contiguous() and like.is_floating_point()
        fits = fits and all(t.dtype == like.dtype for t in floating)
        return Result(tuple(like.shape), like.dtype) if fits else None

    return result


def _copied(args: Any, kwargs: Any) -> Result | None:
    source = args[0]
    kept = kwargs.get("memory_format") in (None, torch.preserve_format) and not source.is_contiguous()
    return None if kept or source.device.type != "cpu" else Result(tuple(source.shape), source.dtype)


def _copy(source: Tensor, *, out: Tensor, **_: Any) -> None:
    out.copy_(source)


def _ways() -> dict[Any, tuple[Callable[[Any, Any], Result | None], Callable[..., Any], str]]:
    """By operator: its result, what writes it, and the name of the tensor that is written."""
    ways: dict[Any, Any] = {}
    for name in ("add", "sub", "mul", "div"):
        packet = getattr(aten, name)
        ways[packet.Tensor] = _elementwise, packet.out, "out"
    for name in ("gelu", "silu", "sigmoid", "tanh", "exp", "neg", "rsqrt", "sqrt"):
        packet = getattr(aten, name)
        ways[packet.default] = _elementwise, packet.out, "out"
    for name in ("gelu_backward", "silu_backward"):
        packet = getattr(aten, name)
        ways[packet.default] = _elementwise, packet.grad_input, "grad_input"
    for name in ("mm", "addmm", "bmm"):
        packet = getattr(aten, name)
        ways[packet.default] = _product, packet.out, "out"
    ways[aten.pow.Tensor_Scalar] = _elementwise, aten.pow.Tensor_Scalar_out, "out"
    ways[aten.mul.Scalar] = _elementwise, torch.mul, "out"
    ways[aten.div.Scalar] = _elementwise, torch.div, "out"
    for name, written in (("_log_softmax", "out"), ("_softmax", "grad_input")):
        packet, backward = getattr(aten, name), getattr(aten, f"{name}_backward_data")
        ways[packet.default] = _alike(0), packet.out, "out"
        ways[backward.default] = _alike(1), backward.out, written
    ways[aten.nll_loss_backward.default] = _alike(1), aten.nll_loss_backward.grad_input, "grad_input"
    ways[aten.cat.default] = _joined, aten.cat.out, "out"
    ways[aten.stack.default] = _stacked, aten.stack.out, "out"
    ways[aten.clone.default] = _copied, _copy, "out"
    return ways


WAYS = _ways()


def lends(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a pool lends memory for the result of an operator, where it is large."""
    way = WAYS.get(func)
    return way is not None and way[0](args, kwargs) is not None
