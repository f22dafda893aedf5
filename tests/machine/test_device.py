"""The seam of the device: what is out of memory, what a CPU does with marks, and that only one file names
`torch.cuda`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lowmem.machine.device import CPU, KINDS, Device, device_of, is_out_of_memory, open_device
from lowmem.units import PAGE

PACKAGE = Path(__file__).parents[2] / "lowmem"


def test_only_the_seam_names_torch_cuda() -> None:
    named = [path for path in PACKAGE.rglob("*.py") if re.search(r"torch\.cuda|cudart", path.read_text())]
    assert named == [PACKAGE / "machine" / "device.py"]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(problem: Exception, expected: bool) -> None:
    assert is_out_of_memory(problem) == expected


def test_a_cpu_has_nothing_to_wait_for() -> None:
    assert CPU.mark() is None
    CPU.wait_for_compute()
    assert not CPU.waits and CPU.memory() is None and CPU.random_state() is None
    assert not CPU.lock(torch.zeros(8)) and CPU.locked(8) is None


def test_a_buffer_begins_on_a_page_and_never_where_its_storage_begins() -> None:
    for num_bytes in (1, PAGE, 3 * PAGE + 5):
        buffer = CPU.buffer(num_bytes)
        assert buffer.data_ptr() % PAGE == 0 and buffer.storage_offset() > 0 and buffer.numel() == num_bytes


def test_a_loss_is_read_later_as_it_was() -> None:
    loss = torch.tensor(2.5)
    later = CPU.later(loss)
    loss.fill_(7.0)  # the next step's
    assert later.ready and later.read() == 2.5


def test_devices_are_found_by_kind_and_by_tensor() -> None:
    assert set(KINDS) >= {"cpu", "cuda"} and type(open_device("cpu")) is Device
    assert device_of(torch.zeros(1)) is CPU
