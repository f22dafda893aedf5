"""Units: the code counts integer bytes, people read GiB (1024^3 bytes). Seconds are floats everywhere.

Also what a text and a number of unknown origin look like where people or programs read them.
"""

from __future__ import annotations

import math
from typing import Any

GIB = 1024**3
MIB = 1024**2
PAGE = 4096  # bytes: alignment of buffers, of files' data, and of unbuffered reads and writes


def from_gib(gib: float) -> int:
    return round(gib * GIB)


def format_bytes(num_bytes: float) -> str:
    """`0.31 GiB` from a quarter of a GiB on, then `12.3 MiB`, `1.5 KiB`, and `512 B` below one KiB."""
    if abs(num_bytes) >= GIB / 4:
        return f"{num_bytes / GIB:.2f} GiB"
    if abs(num_bytes) >= MIB:
        return f"{num_bytes / MIB:.1f} MiB"
    if abs(num_bytes) >= 1024:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `17 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 line`, `2 lines`; `plural` where it is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def shown(text: object, most: int = 500) -> str:
    """`text` as one line of at most `most` characters that a terminal prints and does not obey.

    Control characters, line ends, marks that turn the direction of text, and bytes that are no UTF-8 are
    escaped. The middle of a longer text is left out: a message begins with where and ends with what to do.
    """
    text = str(text)
    if len(text) > most:
        head = max(2 * most // 3 - 3, 0)
        text = f"{text[:head]} ... {text[len(text) - max(most - head - 5, 0) :]}"
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown("".join(escaped), most)


def finite(value: Any) -> Any:
    """`value`, of dictionaries, lists and plain values, with None for every number that JSON cannot write."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def arithmetic_text(precision: str, loss_scale: float, fp16_accumulation: bool) -> str:
    """How a run computes, as it stands beside its figures."""
    scaled = f" with loss scale {loss_scale:g}" if loss_scale != 1 else ""
    return f"{precision}{scaled}{' and fp16 accumulation' if fp16_accumulation else ''}"
