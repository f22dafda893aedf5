"""Lets one of many operations that are alike stand for all of them, where a pass is only counted.

A plan counts a pass operation by operation, and some tables take hundreds of the same ones. Where a pass
really runs, nothing here changes what it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_counting = False
_times = 1


def times() -> int:
    """How often what runs now counts."""
    return _times


@contextmanager
def one_for_all() -> Iterator[None]:
    """In it, `starts` gives one place for all that are alike."""
    global _counting
    before, _counting = _counting, True
    try:
        yield
    finally:
        _counting = before


def starts(total: int, size: int) -> Iterator[int]:
    """Where each of the parts of `size` begins that make up `total`; the last may be smaller.

    Where a pass is counted: only the first of the parts of one size, which counts as often as there are.
    """
    global _times
    whole = total // size
    if not _counting or whole < 2:
        yield from range(0, total, size)
        return
    _times = whole
    try:
        yield 0
    finally:
        _times = 1
    if total % size:
        yield whole * size
