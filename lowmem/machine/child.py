"""Calls a function in a child process that ends, so that what the call imports and leaves behind ends too.

A plan imports torch's fake tensors, and with them some 70 MiB that a process which then trains would keep.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from lowmem.errors import LowmemError
from lowmem.machine.device import cuda_has_begun

T = TypeVar("T")
_here = True  # whether the last call was made in this process
LEFT_BEHIND = "torch._dynamo"  # what a plan imports: where it is imported already, a child saves nothing


def in_child(call: Callable[[], T]) -> T:
    """`call()`, made in a forked child where that is safe and saves memory, else here.

    The result comes back pickled. Errors of lowmem are raised here; any other failure of the child makes the
    call be repeated here, where it shows itself with its traceback.
    """
    global _here
    _here = not _forks()
    if _here:
        return call()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(call, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        content = answer.read()
    _, killed = os.waitpid(child, 0)
    if killed or not content:
        _here = True
        return call()
    result, error = pickle.loads(content)  # noqa: S301  (our own child wrote it)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def compiler_stays() -> bool:
    """Whether what a plan imports stays in this process, because the call is made here."""
    return _here


def _forks() -> bool:
    """A fork copies one thread: with others at work, or with CUDA begun, a child may wait for ever."""
    alone = threading.active_count() == 1 and not cuda_has_begun()
    return sys.platform.startswith("linux") and alone and LEFT_BEHIND not in sys.modules


def _answer(call: Callable[[], T], writing: int) -> None:
    """In the child: sends the result, or an error of lowmem, or nothing, and ends."""
    content = b""
    try:
        # The parent's team of OpenMP threads is not copied: the child would wait for it for ever.
        torch.set_num_threads(1)
        try:
            content = pickle.dumps((call(), None))
        except LowmemError as error:
            content = pickle.dumps((None, error))
        with os.fdopen(writing, "wb") as answer:
            answer.write(content)
    finally:
        os._exit(0)  # without the parent's handlers and open files
