"""The device that trains: everything that differs between a CPU and a CUDA card.

Nothing else in the package names `torch.cuda`. A CPU has done its work when a call returns. A card goes on
after the call, in the order of its streams. So whoever hands memory on says when compute is done with it:

    mark   a point that compute has been given so far; on a CPU there is nothing to wait for, and it is None
    way    a stream of copies in one direction, beside compute

A thread that fills or reads memory waits for the mark that came with it. Compute itself waits for no mark
within a step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem.units import PAGE

Mark = Any  # None, or an event of torch
CPU_REFUSAL = "DefaultCPUAllocator"  # stands in torch's message about an allocation that failed on a CPU
# What torch says of a card's memory that has run out, where it raises no OutOfMemoryError.
CARD_REFUSALS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "XPU out of memory",
)
# cuBLAS gives the same bits in every run only with a workspace of a fixed size.
CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
FP16_SWITCH = "allow_fp16_accumulation"  # of torch.backends.cuda.matmul, for the whole process
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's name since 2.9, and before


class DeviceMemory(NamedTuple):
    """Bytes of torch's allocator on a device."""

    allocated: int  # in tensors
    reserved: int  # held, in tensors or not
    retries: int  # times that the allocator has emptied its cache for a request


class Way:
    """Copies in one direction, in the order in which they were begun. Any thread may call."""

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Begins to copy to each target from its source. What it returns must be given to `finish`."""
        began = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
        return time.perf_counter() - began

    def finish(self, begun: Any) -> float:
        """Returns when the bytes are there: the seconds that the copies took."""
        return float(begun)


class Later:
    """A number that compute was told to make."""

    def __init__(self, value: float) -> None:
        self._value = value

    @property
    def ready(self) -> bool:
        """Whether it can be read without a wait."""
        return True

    def read(self) -> float:
        return self._value


class Device:
    """A CPU: its memory is the host's, and its work is done when a call returns."""

    kind = "cpu"
    copies = False  # whether blocks are copied to memory that the host does not read itself
    has_float64 = True

    def __init__(self) -> None:
        self.torch = torch.device(self.kind)
        self.waits: Counter[str] = Counter()  # times that a thread has waited for compute, by its name

    # --------------------------------------------------------------------------------------------------------
    # Order

    def mark(self) -> Mark:
        """What compute has been given so far."""
        return None

    def wait(self, mark: Mark) -> None:
        """The calling thread waits until compute has passed the mark."""

    def wait_for_compute(self) -> None:
        self.wait(self.mark())

    def way(self) -> Way:
        return Way()

    # --------------------------------------------------------------------------------------------------------
    # Memory

    def buffer(self, num_bytes: int) -> Tensor:
        """Memory of the device (uint8) that begins on a page. Kernels may still use what lay there before.

        Raises torch.OutOfMemoryError.
        """
        whole = torch.empty(num_bytes + PAGE, dtype=torch.uint8, device=self.torch)
        # Never at the very start: torch.compile makes a special case of a view at storage offset 0.
        first = PAGE - whole.data_ptr() % PAGE
        return whole[first : first + num_bytes]

    def locked(self, num_bytes: int) -> Tensor | None:
        """Host memory (uint8) that copies read and write without a detour, or None where it is refused."""
        return None

    def lock(self, buffer: Tensor) -> bool:
        """Page-locks host memory in place, until `unlock`. Returns False where that is refused."""
        return False

    def unlock(self, buffer: Tensor) -> None:
        """Must come before the memory is freed: CUDA never again locks memory that was freed while locked."""

    def bring(self, value: Tensor) -> Tensor:
        """The host's tensor on the device. The call does not wait for what compute has been given before."""
        return value.to(self.torch, non_blocking=True)

    def later(self, value: Tensor) -> Later:
        """A scalar to be read when compute has made it."""
        return Later(float(value))

    def memory(self) -> DeviceMemory | None:
        """None where no allocator tells."""
        return None

    def cap(self, num_bytes: int) -> None:
        """Holds torch's allocator to so many bytes from now on, or to what the card has."""

    def give_back(self) -> None:
        """Gives back what torch's allocator holds without need."""

    # --------------------------------------------------------------------------------------------------------
    # Numbers

    def random_state(self) -> Tensor | None:
        """The state of the device's own generator; None where it uses the CPU's."""
        return None

    def set_random_state(self, state: Tensor) -> None:
        """Sets what `random_state` has returned."""

    @contextlib.contextmanager
    def kernels(self, deterministic: bool, fp16_accumulation: bool) -> Iterator[None]:
        """Within it, the same run gives the same bits where it is to be `deterministic`; on a CPU it does
        anyway. `fp16_accumulation`: matrix products of fp16 may sum in fp16; a CPU's never do.
        """
        yield

    def total_bytes(self) -> int | None:
        """Memory of its own."""
        return None

    def uuid(self) -> str | None:
        """What NVML calls this card."""
        return None

    def name(self) -> str:
        """The card's model. Random draws depend on it."""
        return "cpu"


class CardWay(Way):
    def __init__(self, card: Card) -> None:
        self._card, self._stream = card, card.stream()

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        start, end = self._card.event(timed=True), self._card.event(timed=True)
        with self._card.on(self._stream):
            start.record()
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            end.record()
        return start, end

    def finish(self, begun: Any) -> float:
        start, end = begun
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class CardLater(Later):
    def __init__(self, value: Tensor, device: Device) -> None:
        self._there = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._there.copy_(value, non_blocking=True)
        self._mark = device.mark()

    @property
    def ready(self) -> bool:
        return bool(self._mark.query())

    def read(self) -> float:
        if not self.ready:
            self._mark.synchronize()
        return float(self._there)


class Card(Device):
    """A device with memory of its own, which works in the order of its streams."""

    copies = True

    def stream(self) -> Any:
        """A stream beside that of compute."""
        raise NotImplementedError

    def event(self, timed: bool = False) -> Any:
        """The thread that waits for it sleeps, and leaves its core to compute."""
        raise NotImplementedError

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Within it the calling thread gives its work to that stream."""
        raise NotImplementedError

    def compute(self) -> Any:
        """The stream that the calling thread gives its work to."""
        raise NotImplementedError

    def mark(self) -> Mark:
        event = self.event()
        event.record(self.compute())
        return event

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            self.waits[threading.current_thread().name] += 1
            mark.synchronize()

    def way(self) -> Way:
        return CardWay(self)

    def locked(self, num_bytes: int) -> Tensor | None:
        try:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            return None
        return buffer if buffer.data_ptr() % PAGE == 0 else None

    def bring(self, value: Tensor) -> Tensor:
        # A copy from memory that is not locked would wait for all that the card has been given.
        return (value if value.is_pinned() else value.pin_memory()).to(self.torch, non_blocking=True)

    def later(self, value: Tensor) -> Later:
        return CardLater(value, self)

    @contextlib.contextmanager
    def kernels(self, deterministic: bool, fp16_accumulation: bool) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(deterministic or before)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


class Cuda(Card):
    """A CUDA card. ROCm's build of torch shows its cards under the same names."""

    kind = "cuda"

    def __init__(self) -> None:
        super().__init__()
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
            if sys.platform.startswith("linux") and not any(map(os.environ.get, ALLOCATOR_VARIABLES)):
                # Freed memory between tensors can then be used again whatever its size, so what is held is
                # little more than what is used.
                os.environ.update(dict.fromkeys(ALLOCATOR_VARIABLES, "expandable_segments:True"))

    def stream(self) -> Any:
        return torch.cuda.Stream(self.torch)  # type: ignore[no-untyped-call]

    def event(self, timed: bool = False) -> Any:
        return torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def compute(self) -> Any:
        return torch.cuda.current_stream(self.torch)

    def lock(self, buffer: Tensor) -> bool:
        return self._accepted(self._cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))

    def unlock(self, buffer: Tensor) -> None:
        self._accepted(self._cudart().cudaHostUnregister(buffer.data_ptr()))

    def _cudart(self) -> Any:
        return torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def _accepted(self, error: Any) -> bool:
        if int(error) == 0:
            return True
        # CUDA keeps the refusal and reports it at the next call, whatever that is: let this one meet it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.torch)
        return False

    def memory(self) -> DeviceMemory:
        found = torch.cuda.memory_stats_as_nested_dict(
            self.torch
        )  # one call: each takes the allocator's lock
        if not found:  # CUDA has not begun
            return DeviceMemory(0, 0, 0)
        allocated, reserved = (found[f"{name}_bytes"]["all"] for name in ("allocated", "reserved"))
        return DeviceMemory(allocated["current"], reserved["current"], found["num_alloc_retries"])

    def cap(self, num_bytes: int) -> None:
        share = min(max(num_bytes, 0) / self.total_bytes(), 1.0)
        torch.cuda.set_per_process_memory_fraction(share)

    def give_back(self) -> None:
        torch.cuda.empty_cache()

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.torch)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.torch)

    @contextlib.contextmanager
    def kernels(self, deterministic: bool, fp16_accumulation: bool) -> Iterator[None]:
        products = torch.backends.cuda.matmul
        summed = getattr(products, FP16_SWITCH, None)  # an older torch has no such switch
        if summed is not None:
            setattr(products, FP16_SWITCH, fp16_accumulation)
        try:
            with super().kernels(deterministic, fp16_accumulation):
                yield
        finally:
            if summed is not None:
                setattr(products, FP16_SWITCH, summed)

    def total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.torch).total_memory)

    def uuid(self) -> str | None:
        found = getattr(torch.cuda.get_device_properties(self.torch), "uuid", None)
        return None if found is None else f"GPU-{found}"

    def name(self) -> str:
        return str(torch.cuda.get_device_name(self.torch))


class Xpu(Card):
    """An Intel GPU, by `torch.accelerator` where that has a call. Prepared, and never run on one."""

    kind = "xpu"
    has_float64 = False  # many of them have none

    def stream(self) -> Any:
        return torch.Stream(self.torch)

    def event(self, timed: bool = False) -> Any:
        return torch.Event(self.torch, enable_timing=timed, blocking=True)

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        entered: contextlib.AbstractContextManager[Any] = stream
        return entered

    def compute(self) -> Any:
        return torch.accelerator.current_stream(self.torch)

    def memory(self) -> DeviceMemory:
        found = torch.accelerator.memory_stats(self.torch)
        allocated, reserved = (
            found.get(f"{name}_bytes.all.current", 0) for name in ("allocated", "reserved")
        )
        return DeviceMemory(allocated, reserved, found.get("num_alloc_retries", 0))

    def cap(self, num_bytes: int) -> None:
        share = min(max(num_bytes, 0) / self.total_bytes(), 1.0)
        torch.xpu.set_per_process_memory_fraction(share, self.torch)

    def give_back(self) -> None:
        torch.accelerator.empty_cache()

    def random_state(self) -> Tensor:
        return torch.xpu.get_rng_state(self.torch)

    def set_random_state(self, state: Tensor) -> None:
        torch.xpu.set_rng_state(state, self.torch)

    def total_bytes(self) -> int:
        return int(torch.xpu.get_device_properties(self.torch).total_memory)

    def name(self) -> str:
        return str(torch.xpu.get_device_name(self.torch))


class Mps(Device):
    """An Apple GPU: one memory with the host, but tensors that the host does not read itself.

    Work and copies are given to one queue, whichever thread gives them, so nothing need wait for a mark.
    """

    kind = "mps"
    copies = True
    has_float64 = False

    def memory(self) -> DeviceMemory:
        held = int(torch.mps.driver_allocated_memory())
        return DeviceMemory(int(torch.mps.current_allocated_memory()), held, 0)

    def give_back(self) -> None:
        torch.mps.empty_cache()

    def random_state(self) -> Tensor:
        return torch.mps.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.mps.set_rng_state(state)

    def name(self) -> str:
        return "Apple GPU"


KINDS: dict[str, type[Device]] = {"cpu": Device, "cuda": Cuda, "mps": Mps, "xpu": Xpu}


@functools.cache
def open_device(kind: str) -> Device:
    """The machine's first device of a kind. A process has one: every pass asks for it."""
    return KINDS[kind]()


CPU = open_device("cpu")


def device_of(tensor: Tensor) -> Device:
    """The device on which a tensor lies."""
    return open_device(tensor.device.type)


def cuda_works() -> bool:
    """Whether torch can use a CUDA card here."""
    return torch.cuda.is_available()


def has_fp16_accumulation() -> bool:
    """Whether this torch lets matrix products of fp16 sum in fp16."""
    return hasattr(torch.backends.cuda.matmul, FP16_SWITCH)


def mps_works() -> bool:
    """Whether torch can use an Apple GPU here."""
    return torch.backends.mps.is_available()


def xpu_works() -> bool:
    """Whether torch can use an Intel GPU here."""
    return torch.xpu.is_available()


def cuda_has_begun() -> bool:
    """Whether this process has started CUDA: it must not fork then."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class CardFacts(NamedTuple):
    """What torch says of a CUDA card."""

    name: str
    total_bytes: int
    capability: tuple[int, int]
    integrated: bool  # it has no memory of its own, as on a Jetson


def cuda_facts() -> CardFacts | None:
    """Of the first card; None where there is none."""
    if not cuda_works():
        return None
    found = torch.cuda.get_device_properties(0)
    capability = int(found.major), int(found.minor)
    return CardFacts(str(found.name), int(found.total_memory), capability, bool(found.is_integrated))


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an allocation has failed, on the host or on a device."""
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(problem)
    return isinstance(problem, RuntimeError) and any(part in said for part in (CPU_REFUSAL, *CARD_REFUSALS))
