"""A simulated CUDA card on a CPU build of torch. It holds the package to the order that a card needs.

    tensors   of device `cuda`, whose bytes lie in CPU memory; NaN until something has written them
    kernels   run when they are called, and count as work that their stream does later
    copies    from and to page-locked memory count as their stream's work; from pageable memory they are taken
              at the call, as the driver does
    waits     of the host for the card are counted by thread; page locks are counted
    memory    is counted, and refused beyond a cap

What is not ordered is found by `happens_before`, and not by late or wrong bytes. Import this module before
torch: `main` of a child process does so. SIMULATED_GUARD names the library that `build_guard` has made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

ctypes.CDLL(os.environ["SIMULATED_GUARD"], mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from happens_before import RACES, Agent, carry_clocks, known, me, memory_of, thread_name  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
TOTAL_BYTES, PAGE = 16 << 30, 4096
# What the host waits for the card for.
READ_BY_THE_HOST = ("aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")
# What gives other bits in another run, and raises where `use_deterministic_algorithms` is on.
NOT_DETERMINISTIC = ("aten::cumsum", "aten::histc", "aten::bincount", "aten::put_", "aten::kthvalue")


class World:
    """All that is counted."""

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()  # (what, thread): the host has waited for the card
        self.operations: Counter[str] = Counter()
        self.locked: dict[int, int] = {}  # page-locked in place: first byte -> size
        self.pinned: dict[int, Any] = {}  # made page-locked: storage -> kept for ever, as torch's cache does
        self.locks = self.unlocks = 0
        self.live = self.peak = 0
        self.limit: int | None = None
        self.has_float64 = True
        self.alarm = "default"  # of `torch.cuda.set_sync_debug_mode`
        self.late: random.Random | None = None  # makes threads late at random
        self.lock = threading.RLock()

    def wait(self, what: str) -> None:
        with self.lock:
            self.waits[what, thread_name()] += 1
        if self.alarm == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


WORLD = World()

# ------------------------------------------------------------------------------------------------------------
# Streams and events


class Stream(Agent):
    numbers = iter(range(10**9))

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        super().__init__(f"stream {next(self.numbers)}")

    def given(self) -> None:
        """Work is given by the calling thread: it comes after all that the thread knows."""
        if WORLD.late is not None and WORLD.late.random() < 0.1:
            time.sleep(WORLD.late.random() * 1e-3)
        self.learn(me().now())
        self.step()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.learn(event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.learn(other.now())

    def synchronize(self) -> None:
        WORLD.wait("stream.synchronize")
        me().learn(self.now())


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.clock: dict[str, int] = {}
        self._at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()
        self.clock = (stream or current_stream()).now()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:  # torch's alarm does not see this one
        with WORLD.lock:
            WORLD.waits["event.synchronize", thread_name()] += 1
        me().learn(self.clock)

    def query(self) -> bool:
        """Kernels run when they are called, so it has been passed; the thread knows it now."""
        me().learn(self.clock)
        return True

    def elapsed_time(self, other: Event) -> float:
        return max((other._at - self._at) * 1000, 1e-6)


DEFAULT = Stream()
_local = threading.local()


def current_stream(device: Any = None) -> Stream:
    return getattr(_local, "stream", DEFAULT)


@contextlib.contextmanager
def stream_context(stream: Stream) -> Iterator[None]:
    before, _local.stream = current_stream(), stream
    try:
        yield
    finally:
        _local.stream = before


# ------------------------------------------------------------------------------------------------------------
# Memory


class Allocation:
    """One piece of the card's memory, alive while a tensor shows it.

    torch's allocator may have given it out while work on the default stream still uses it, and gives it out
    again as soon as it is free. So both ends are writes of the default stream.
    """

    def __init__(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
        if dtype == torch.float64 and not WORLD.has_float64:
            raise TypeError("Cannot convert a tensor to float64: the device does not support it")
        self.storage, self.num_bytes = storage, storage.nbytes()
        with WORLD.lock:
            WORLD.live += self.num_bytes
            WORLD.peak = max(WORLD.peak, WORLD.live)
        memory_of(storage).access(DEFAULT, 0, self.num_bytes, True, "what used this memory before")

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the interpreter's end
            with WORLD.lock:
                WORLD.live -= self.num_bytes
            DEFAULT.given()
            memory_of(self.storage).access(DEFAULT, 0, self.num_bytes, True, "what uses this memory next")


def new_memory(size: Any, stride: Any, dtype: torch.dtype) -> SimTensor:
    bytes_ = torch.empty_strided(size, stride, dtype=dtype)
    num_bytes = bytes_.untyped_storage().nbytes()
    if WORLD.limit is not None and WORLD.live + num_bytes > WORLD.limit:
        raise torch.OutOfMemoryError(f"CUDA out of memory (simulated): {num_bytes} bytes")
    if num_bytes:
        ctypes.memset(bytes_.untyped_storage().data_ptr(), 0xFF, num_bytes)
    return SimTensor(bytes_, Allocation(bytes_.untyped_storage(), dtype))


def is_locked(tensor: torch.Tensor) -> bool:
    storage, at = tensor.untyped_storage(), tensor.data_ptr()
    in_place = any(first <= at < first + size for first, size in list(WORLD.locked.items()))
    return in_place or storage.data_ptr() in WORLD.pinned


def touch(agent: Agent, tensor: torch.Tensor, writes: bool, what: str) -> None:
    """`tensor`: of CPU memory."""
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    stop = start + (reach * size if tensor.numel() else 0)
    memory_of(tensor.untyped_storage()).access(agent, start, stop, writes, what)


class SimTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, bytes_: torch.Tensor, allocation: Allocation) -> SimTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            bytes_.size(),
            bytes_.stride(),
            bytes_.storage_offset(),
            dtype=bytes_.dtype,
            device=CUDA,
            requires_grad=False,
        )
        made.bytes_, made.allocation = bytes_, allocation
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimTensor{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.bytes_.data_ptr()


def unwrapped(value: Any) -> Any:
    return value.bytes_ if isinstance(value, SimTensor) else value


# ------------------------------------------------------------------------------------------------------------
# Operations


@functools.cache
def facts(func: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether the operation returns views, and the places of the arguments that it writes."""
    schema = func._schema
    views = any(given.alias_info is not None and not given.alias_info.is_write for given in schema.returns)
    written = [
        place
        for place, given in enumerate(schema.arguments)
        if given.alias_info is not None and given.alias_info.is_write
    ]
    return views, tuple(written)


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name
    with WORLD.lock:
        WORLD.operations[name] += 1
    if func is aten._local_scalar_dense.default:
        WORLD.wait("item")
        read_by_the_host(args[0])
        return args[0].bytes_.item()
    if func is aten._fused_sdp_choice.default:
        return 0
    if func is aten.is_pinned.default:
        return not isinstance(args[0], SimTensor) and is_locked(args[0])
    if func is aten._pin_memory.default:
        return pinned(args[0].clone())
    if func is aten.copy_.default and isinstance(args[0], SimTensor) != isinstance(args[1], SimTensor):
        waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        return copied_across(args[0], args[1], waits)
    if func is aten._to_copy.default:
        crossed = to_other_device(args[0], kwargs)
        if crossed is not None:
            return crossed
    if name in READ_BY_THE_HOST:
        WORLD.wait(name)
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, SimTensor):
                read_by_the_host(given)
    return computed(func, args, kwargs)


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """A kernel on the current stream, or a view."""
    views, written = facts(func)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    for value in given:
        if not isinstance(value, SimTensor) and value.device.type == "cpu" and value.dim():
            raise RuntimeError(
                f"{func}: Expected all tensors to be on the same device, but found cuda and cpu"
            )
    with torch.no_grad():
        result = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    of_storage = {
        value.bytes_.untyped_storage()._cdata: value for value in given if isinstance(value, SimTensor)
    }
    if not views:
        stream = current_stream()
        targets = [args[place] for place in written if place < len(args)]
        targets += [value for name, value in kwargs.items() if is_written(func, name)]
        changed = {id(value) for value in tree_leaves(targets)}
        stream.given()
        for value in given:
            if isinstance(value, SimTensor):
                touch(stream, value.bytes_, id(value) in changed, func._schema.name)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        base = of_storage.get(value.untyped_storage()._cdata)
        if base is not None:
            same = next((one for one in given if isinstance(one, SimTensor) and one.bytes_ is value), None)
            return SimTensor(value, base.allocation) if same is None else same
        made = SimTensor(value, Allocation(value.untyped_storage(), value.dtype))
        if not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            touch(current_stream(), value, True, func._schema.name)
        return made

    return tree_map(wrapped, result)


@functools.cache
def is_written(func: Any, name: str) -> bool:
    given = next((one for one in func._schema.arguments if one.name == name), None)
    return given is not None and given.alias_info is not None and given.alias_info.is_write


def read_by_the_host(value: SimTensor) -> None:
    """The host waits for the current stream, and reads."""
    me().learn(current_stream().now())
    touch(me(), value.bytes_, False, "a read by the host")


def copied_across(target: torch.Tensor, source: torch.Tensor, waits: bool) -> torch.Tensor:
    to_device, stream = isinstance(target, SimTensor), current_stream()
    host, there = (source, target) if to_device else (target, source)
    locked = is_locked(host)
    if to_device and not locked:
        with WORLD.lock:
            WORLD.waits["pageable" if host.dim() else "pageable scalar", thread_name()] += 1
        if host.dim() and WORLD.alarm == "error":
            WORLD.wait("copy from pageable memory")
    stream.given()
    with torch.no_grad():
        unwrapped(target).copy_(unwrapped(source))
    touch(stream, there.bytes_, to_device, "a copy")  # type: ignore[attr-defined]
    if locked:
        touch(stream, host, not to_device, "a copy")
    if waits or (not to_device and not locked):
        if waits and not (to_device and not locked):
            WORLD.wait("a copy that waits")
        me().learn(stream.now())
    return target


def to_other_device(source: torch.Tensor, kwargs: Any) -> torch.Tensor | None:
    here = isinstance(source, SimTensor)
    to = kwargs.get("device")
    wanted = here if to is None else torch.device(to).type == "cuda"
    if here == wanted:
        return None
    dtype = kwargs.get("dtype") or source.dtype
    target = (
        new_memory(source.size(), source.stride(), dtype)
        if wanted
        else torch.empty_strided(source.size(), source.stride(), dtype=dtype)
    )
    return copied_across(target, source, not kwargs.get("non_blocking", False))


def on_a_page(tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor in memory that begins on a page, as the driver gives it; others as they are."""
    if tensor.dim() != 1:
        return tensor
    whole = torch.empty(tensor.numel() * tensor.element_size() + PAGE, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    return whole[first : first + tensor.numel() * tensor.element_size()].view(tensor.dtype)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    with WORLD.lock:
        WORLD.pinned[tensor.untyped_storage().data_ptr()] = tensor
        WORLD.locks += 1
    return tensor


class Card(TorchDispatchMode):
    """Within it, the calling thread makes tensors on the card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        on_card = device is not None and torch.device(device).type == "cuda"
        asks = (aten._pin_memory.default, aten.is_pinned.default)
        if func in asks or any(isinstance(value, SimTensor) for value in tree_leaves((args, kwargs))):
            return dispatch(func, args, kwargs)
        if kwargs.get("pin_memory") and not on_card:
            return pinned(on_a_page(func(*args, **{**kwargs, "pin_memory": False})))
        if on_card and func is aten._to_copy.default:
            return dispatch(func, args, kwargs)
        if on_card:
            kwargs = {**kwargs, "device": torch.device("cpu")}
            kwargs.pop("pin_memory", None)
            result = func(*args, **kwargs)
            if func._schema.name.startswith(("aten::empty", "aten::new_empty")):
                return new_memory(result.size(), result.stride(), result.dtype)
            current_stream().given()
            made = SimTensor(result, Allocation(result.untyped_storage(), result.dtype))
            touch(current_stream(), result, True, func._schema.name)
            return made
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------------------------------
# torch.cuda


class Cudart:
    def cudaHostRegister(self, first: int, size: int, flags: int) -> int:  # noqa: N802
        if first in WORLD.locked:
            return 712
        WORLD.locked[first] = size
        WORLD.locks += 1
        return 0

    def cudaHostUnregister(self, first: int) -> int:  # noqa: N802
        del WORLD.locked[first]
        WORLD.unlocks += 1
        return 0


def install(total_bytes: int = TOTAL_BYTES) -> None:
    """Puts the simulated card in the place of `torch.cuda`."""
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream, cuda.current_stream = Stream, Event, stream_context, current_stream
    cuda.default_stream = lambda device=None: DEFAULT
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
    }.items():
        setattr(cuda, name, lambda value=value: value)
    cuda.cudart = Cudart
    properties = SimpleNamespace(
        total_memory=total_bytes, is_integrated=False, uuid="simulated", name="simulated", major=8, minor=6
    )
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_name = lambda device=None: "simulated"
    cuda.memory_allocated = cuda.memory_reserved = lambda device=None: WORLD.live
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda device=None: WORLD.peak

    def stats(device: Any = None) -> dict[str, Any]:
        both = {"all": {"current": WORLD.live, "peak": WORLD.peak}}
        return {"allocated_bytes": both, "reserved_bytes": both, "num_alloc_retries": 0}

    def reset(device: Any = None) -> None:
        WORLD.peak = WORLD.live

    def cap(share: float, device: Any = None) -> None:
        WORLD.limit = int(share * total_bytes)

    def alarm(mode: str) -> None:
        WORLD.alarm = mode

    def synchronize(device: Any = None) -> None:
        WORLD.wait("device synchronize")
        me().learn(DEFAULT.now())

    cuda.memory_stats_as_nested_dict, cuda.reset_peak_memory_stats = stats, reset
    cuda.set_per_process_memory_fraction, cuda.empty_cache = cap, lambda: None
    cuda.set_sync_debug_mode, cuda.synchronize = alarm, synchronize
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device=None: None
    cuda.manual_seed_all = cuda.manual_seed = lambda seed: None
    generator = torch.Generator

    class Generator:
        def __new__(cls, device: Any = None) -> Any:
            return generator()

    torch.Generator = Generator  # type: ignore[assignment, misc]
    numpy = torch.Tensor.numpy

    def numpy_of(self: torch.Tensor, *given: Any, **more: Any) -> Any:
        """The host reads memory that copies use, or also writes it, if it is a chunk that was made locked."""
        if isinstance(self, SimTensor):
            raise TypeError("can't convert cuda tensor to numpy")
        storage = self.untyped_storage()
        if known(storage):
            me().step()
            touch(me(), self, storage.data_ptr() in WORLD.pinned, "the host")
        return numpy(self, *given, **more)

    torch.Tensor.numpy = numpy_of  # type: ignore[method-assign, assignment]
    carry_clocks()


__all__ = ["CUDA", "RACES", "WORLD", "Card", "install"]
