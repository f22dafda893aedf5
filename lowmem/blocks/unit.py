"""Where one unit of a block lies in the block's arena, and in pages that move it.

A unit is what must be on the device at once to compute: one layer, or the core of a recurrent model. A block
has one or more. Its parameters lie in a few pieces of the block's flat weights, one for each kind of state,
because parameters of a kind lie together. So a piece begins and ends anywhere, and unbuffered requests move
whole pages: `Pages` are the pages that hold some bytes, and tell where in them the bytes lie.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.blocks.arena import ArenaLayout, Group, ParameterSlot
from lowmem.blocks.optim import Rows
from lowmem.machine.pool import past_pools
from lowmem.units import PAGE, round_up

# Weights that an update reads, changes and writes back at once, by kind of device: what a processor's cache
# holds, or enough that a card is not kept waiting for the next kernel. The plan may choose more.
CHUNK_NUMEL = {"cpu": 512 * 1024, "cuda": 4 * 1024 * 1024, "mps": 1024 * 1024, "xpu": 4 * 1024 * 1024}


class Pages(NamedTuple):
    """The pages that hold the bytes [start, stop) of a block's data."""

    start: int
    stop: int

    @property
    def first(self) -> int:
        """The first page's first byte."""
        return self.start // PAGE * PAGE

    @property
    def num_bytes(self) -> int:
        return round_up(self.stop, PAGE) - self.first

    @property
    def whole(self) -> slice:
        """The bytes of those pages that hold nothing else, as a part of all pages. It may be empty."""
        begins, ends = round_up(self.start, PAGE), self.stop // PAGE * PAGE
        return slice(begins - self.first, max(begins, ends) - self.first)

    @property
    def edges(self) -> list[slice]:
        """The bytes in pages that hold other bytes too, as parts of all pages: at most two."""
        whole, size = self.whole, slice(self.start - self.first, self.stop - self.first)
        if whole.start == whole.stop:  # no page is whole
            border = (self.first // PAGE + 1) * PAGE - self.first
            parts = [slice(size.start, min(size.stop, border)), slice(border, size.stop)]
        else:
            parts = [slice(size.start, whole.start), slice(whole.stop, size.stop)]
        return [part for part in parts if part.start < part.stop]

    @property
    def inside_bytes(self) -> int:
        return self.stop - self.start

    def inside(self, pages: Tensor) -> Tensor:
        """The bytes, in `pages` [num_bytes] that hold them."""
        return pages[self.start - self.first : self.stop - self.first]

    def of(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """What the bytes say, in `pages` [num_bytes] that hold them."""
        return self.inside(pages).view(dtype)


def first_alike(units: Sequence[Unit]) -> dict[Hashable, Unit]:
    """By shape, the first unit of it: what is computed of one stands for all, and is kept with it."""
    return {unit.shape: unit for unit in reversed(units)}


def edge_pages(written: Iterable[Pages]) -> tuple[int, int]:
    """Of pages that are written together, those that are not filled by one of them alone: (how many there
    are, how many of these hold something else as well).
    """
    filled = Counter[int]()
    for pages in written:
        for edge in pages.edges:
            filled[(pages.first + edge.start) // PAGE] += edge.stop - edge.start
    return len(filled), sum(num_bytes < PAGE for num_bytes in filled.values())


class Field(NamedTuple):
    """Rows of the weights, or of a field of state."""

    name: str
    dtype: torch.dtype
    pages: Pages


class Piece:
    """Some rows of one group, and everything that is stored of them."""

    def __init__(self, layout: ArenaLayout, group: Group) -> None:
        self.group, self.rows = group, slice(group.start, group.stop)
        self.numel = group.stop - group.start
        itemsize = layout.weights_dtype.itemsize
        weights = Pages(group.start * itemsize, group.stop * itemsize)
        self.fields = [Field("weights", layout.weights_dtype, weights)]
        for name, rows in layout.state_rows(group, self.rows).items():
            field, first = layout.fields[name]
            size = field.dtype.itemsize
            pages = Pages(first + rows.start * size, first + rows.stop * size)
            self.fields.append(Field(name, field.dtype, pages))

    def num_bytes(self, with_weights: bool = True) -> int:
        """Of a buffer that holds all of it, or its state alone."""
        return sum(field.pages.num_bytes for field in self.held(with_weights))

    def held(self, with_weights: bool) -> list[Field]:
        """The fields that a buffer holds: all, or those of the state."""
        return self.fields if with_weights else self.fields[1:]

    def field(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)

    def parts(self, buffer: Tensor, with_weights: bool = True) -> list[tuple[Pages, Tensor]]:
        """The pages of each field in a buffer [num_bytes]."""
        parts, start = [], 0
        for field in self.held(with_weights):
            parts.append((field.pages, buffer[start : start + field.pages.num_bytes]))
            start += field.pages.num_bytes
        return parts

    @past_pools
    def in_buffer(self, buffer: Tensor, weights: Tensor | None = None) -> Rows:
        """The rows for an update, in a buffer that holds all of the piece; or the state alone, where the
        weights are elsewhere.
        """
        held, parts = self.held(weights is None), self.parts(buffer, weights is None)
        values = {
            field.name: pages.of(part, field.dtype) for field, (pages, part) in zip(held, parts, strict=True)
        }
        if weights is None:
            weights = values.pop("weights")
        group = self.group
        return Rows(self.rows.start, weights, values, group.decay, group.quantized, group.matrix)


class Unit:
    """One unit of a block: its pieces in the block, and its parameters in flat vectors of its own."""

    def __init__(
        self,
        key: str,
        layout: ArenaLayout,
        names: Collection[str],
        device_kind: str = "cpu",
        computes: str = "weights",
        chunk_numel: int | None = None,
    ) -> None:
        """`key`: of the block; `names`: of the unit's parameters. `computes`: what passes use, the weights or
        their average ("ema"). `chunk_numel`: weights of a chunk; None: as many as usual.
        """
        self.key, self.layout, self._computes = key, layout, computes
        self._chunk_numel = chunk_numel or CHUNK_NUMEL[device_kind]
        self.pieces: list[Piece] = []
        self.slots: list[ParameterSlot] = []  # in the unit's own flat vectors: its pieces, one after another
        self.starts: list[int] = []  # of each piece in those
        end = 0
        for group in layout.groups:
            inside = [slot for slot in layout.slots if group.start <= slot.start < group.stop]
            mine = [slot for slot in inside if slot.name in names]
            if not mine:
                continue
            later = [slot.start for slot in inside if slot.start > mine[-1].start]
            stop = min(later, default=group.stop)
            piece = Piece(layout, replace(group, start=mine[0].start, stop=stop))
            self.pieces.append(piece)
            self.starts.append(end)
            self.slots += [replace(slot, start=end + slot.start - mine[0].start) for slot in mine]
            end += piece.numel
        self.numel = end

    @functools.cached_property
    def shape(self) -> Hashable:
        """Equal for units that take and move the same bytes: like layers, each a block of its own."""
        fields = tuple((name, start) for name, (_, start) in self.layout.fields.items())
        groups = tuple(piece.group for piece in self.pieces)
        return self.layout.weights_dtype, self.layout.numel, fields, groups

    @property
    def weights_bytes(self) -> int:
        """Of a buffer that holds the pages of what passes use."""
        return sum(piece.field(self._computes).pages.num_bytes for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Of a buffer that holds all pages of its weights and state."""
        return sum(piece.num_bytes() for piece in self.pieces)

    @property
    def used_weights_bytes(self) -> int:
        """Of what passes use, without the rest of its pages."""
        return sum(piece.field(self._computes).pages.inside_bytes for piece in self.pieces)

    @functools.cached_property
    def chunk_bytes(self) -> tuple[int, int]:
        """Of the buffers that hold its largest chunk: (all of it, its state alone)."""
        pieces = [piece for _, piece in self.chunks()]
        sizes = ((piece.num_bytes(with_weights) for piece in pieces) for with_weights in (True, False))
        whole, state = (max(of_chunks, default=0) for of_chunks in sizes)
        return whole, state

    def weights_pages(self, buffer: Tensor) -> list[tuple[Pages, Tensor]]:
        """The pages of each piece's weights in a buffer [weights_bytes]."""
        parts, start = [], 0
        for piece in self.pieces:
            pages = piece.field(self._computes).pages
            parts.append((pages, buffer[start : start + pages.num_bytes]))
            start += pages.num_bytes
        return parts

    def weights(self, buffer: Tensor) -> list[Tensor]:
        """The weights of each piece in a buffer [weights_bytes]."""
        dtypes = [piece.field(self._computes).dtype for piece in self.pieces]
        parts = self.weights_pages(buffer)
        return [pages.of(part, dtype) for dtype, (pages, part) in zip(dtypes, parts, strict=True)]

    def views(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        """Each parameter's view, in a flat vector for each piece."""
        views = {}
        for slot in self.slots:
            piece, first = self._within(slot.start)
            views[slot.name] = slot.view(pieces[piece], first)
        return views

    def rows(self, pieces: Sequence[Tensor], place: int, numel: int) -> Tensor:
        """So many elements from a place in the unit's own flat vectors, of a flat vector for each piece."""
        piece, first = self._within(place)
        return pieces[piece][first : first + numel]

    def _within(self, place: int) -> tuple[int, int]:
        """The piece of a place in the unit's own flat vectors, and the place in that."""
        piece = bisect_right(self.starts, place) - 1
        return piece, place - self.starts[piece]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Each piece's part of a flat vector [numel] of the unit's own."""
        return [
            flat[start : start + piece.numel] for start, piece in zip(self.starts, self.pieces, strict=True)
        ]

    def place(self, row: int) -> int:
        """Where a row of the block lies in the unit's own flat vectors."""
        piece = next(n for n, piece in enumerate(self.pieces) if piece.rows.start <= row < piece.rows.stop)
        return self.starts[piece] + row - self.pieces[piece].rows.start

    def chunks(self) -> Iterator[tuple[int, Piece]]:
        """The unit in chunks of rows, each with its place in the unit's own flat vectors."""
        for place, piece in zip(self.starts, self.pieces, strict=True):
            group = piece.group
            if group.matrix is not None:  # updated as a whole
                yield place, piece
                continue
            for start in range(group.start, group.stop, self._chunk_numel):
                stop = min(start + self._chunk_numel, group.stop)
                yield place + start - group.start, Piece(self.layout, replace(group, start=start, stop=stop))
