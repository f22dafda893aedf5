"""Keeps torch's compiler out of a process that compiles nothing: it takes seconds, and 115 MiB for good."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """For the first import of bitsandbytes.

    It marks functions as some that the compiler is to compile, or is to leave alone. Either mark imports the
    compiler. None of these functions is compiled here, so the marks are left out.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that we do not use
    with mock.patch.multiple(torch, compile=_unmarked, _disable_dynamo=_unmarked):
        yield


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands for a decorator of the compiler, with arguments or without."""
    return function if function is not None else lambda function: function
