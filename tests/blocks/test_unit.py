"""Where units lie in a block: pages against a reference byte by byte, pieces against the arena's views."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.blocks import unit as unit_module
from lowmem.blocks.arena import GROUP_SIZE, Arena, ArenaLayout, aligned_buffer, parameter_views
from lowmem.blocks.unit import Pages, Unit
from lowmem.units import PAGE

# Three layers of odd sizes: large and small matrices, a large and small vectors, and a scalar.
SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("weight", (70, 61)),
    ("bias", (61,)),
    ("wide", (13, 401)),
    ("long", (4500,)),
    ("small", (3, 5)),
    ("scale", ()),
]
LAYERS = ["layers.3", "layers.4", "layers.5"]
PARAMETERS = [(f"{layer}.{name}", shape) for layer in LAYERS for name, shape in SHAPES]
KINDS: list[dict[str, Any]] = [
    {"optimizer": optimizer, "ema": ema, "weights_dtype": dtype}
    for optimizer in ("adamw", "adamw8bit", "muon")
    for ema in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
BORDERS = [0, 1, 255, 256, 2048, 4095, 4096, 4097, 5000, 8191, 8192, 8193, 9000, 12287, 12288, 12289, 20480]


def ranges() -> Iterator[tuple[int, int]]:
    """All of them about the borders of pages, and many others."""
    yield from ((start, stop) for start in BORDERS for stop in BORDERS if start <= stop)
    generator = torch.Generator().manual_seed(0)
    for start, size in torch.randint(0, 3 * PAGE, (400, 2), generator=generator).tolist():
        yield start, start + size


def test_whole_pages_hold_nothing_else_and_edges_are_all_the_other_bytes() -> None:
    for start, stop in ranges():
        pages = Pages(start, stop)
        first, size = pages.first, pages.num_bytes
        assert first % PAGE == 0 and size % PAGE == 0 and first <= start < first + PAGE
        assert stop <= first + size < stop + PAGE
        wanted = {byte - first for byte in range(start, stop)}
        alone = {
            page + byte
            for page in range(0, size, PAGE)
            if start <= first + page and first + page + PAGE <= stop
            for byte in range(PAGE)
        }
        assert set(range(pages.whole.start, pages.whole.stop)) == alone, (start, stop)
        edges = [byte for edge in pages.edges for byte in range(edge.start, edge.stop)]
        assert sorted(edges) == sorted(wanted - alone), (start, stop)


def test_there_are_at_most_two_edges_each_within_one_page() -> None:
    for start, stop in ranges():
        edges = Pages(start, stop).edges
        assert len(edges) <= 2
        for edge in edges:
            assert edge.start // PAGE == (edge.stop - 1) // PAGE, (start, stop)


def test_the_bytes_in_the_pages_are_those_of_the_range() -> None:
    data = torch.arange(10 * PAGE, dtype=torch.int32).to(torch.uint8)
    for start, stop in ranges():
        if start % 4 == stop % 4 == 0:
            pages = Pages(start, stop)
            buffer = data[pages.first : pages.first + pages.num_bytes]
            assert torch.equal(pages.of(buffer, torch.float32).view(torch.uint8), data[start:stop])


def block(kind: dict[str, Any]) -> tuple[ArenaLayout, list[Unit]]:
    layout = ArenaLayout(PARAMETERS, **kind)
    return layout, [
        Unit("block-1", layout, {name for name, _ in PARAMETERS if name.startswith(layer)})
        for layer in LAYERS
    ]


def random_arena(layout: ArenaLayout) -> Arena:
    generator = torch.Generator().manual_seed(1)
    buffer = aligned_buffer(layout.total_bytes)
    return Arena(layout, buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator)))


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Random bytes may be no numbers."""
    return one.shape == other.shape and torch.equal(
        one.flatten().contiguous().view(torch.uint8), other.flatten().contiguous().view(torch.uint8)
    )


def fetched(arena: Arena, pages: Pages, buffer: Tensor) -> None:
    buffer.copy_(arena.buffer[pages.first : pages.first + pages.num_bytes])


@every_kind
def test_a_units_views_are_the_weights_of_the_whole_arena(kind: dict[str, Any]) -> None:
    layout, units = block(kind)
    arena, seen = random_arena(layout), set[str]()
    whole = parameter_views(layout, arena.weights)
    for unit in units:
        buffer = aligned_buffer(unit.weights_bytes)
        for pages, part in unit.weights_pages(buffer):
            fetched(arena, pages, part)
        for name, view in unit.views(unit.weights(buffer)).items():
            assert view.shape == whole[name].shape and same_bytes(view, whole[name]), name
            seen.add(name)
    assert seen == set(whole)


@every_kind
def test_a_units_own_flat_vectors_hold_its_parameters_where_place_says(kind: dict[str, Any]) -> None:
    layout, units = block(kind)
    rows = parameter_views(layout, torch.arange(layout.numel))
    for unit in units:
        flat = torch.full((unit.numel,), -1)
        for part, piece in zip(unit.split(flat), unit.pieces, strict=True):
            part.copy_(torch.arange(piece.rows.start, piece.rows.stop))
        assert [unit.place(row) for row in flat.tolist()] == list(range(unit.numel))
        for views in (parameter_views(unit, flat), unit.views(unit.split(flat))):
            assert set(views) == {slot.name for slot in unit.slots}
            assert all(torch.equal(view, rows[name]) for name, view in views.items())


@every_kind
@pytest.mark.parametrize("with_weights", [True, False], ids=["all", "state alone"])
def test_the_rows_of_a_piece_are_those_of_the_whole_arena(kind: dict[str, Any], with_weights: bool) -> None:
    layout, units = block(kind)
    arena = random_arena(layout)
    for unit in units:
        assert unit.num_bytes == sum(piece.num_bytes() for piece in unit.pieces)
        slot = aligned_buffer(unit.weights_bytes)
        for pages, part in unit.weights_pages(slot):
            fetched(arena, pages, part)
        for place, piece in zip(unit.starts, unit.pieces, strict=True):
            buffer = aligned_buffer(piece.num_bytes(with_weights))
            for pages, part in piece.parts(buffer, with_weights):
                fetched(arena, pages, part)
            elsewhere = None if with_weights else unit.rows(unit.weights(slot), place, piece.numel)
            rows = piece.in_buffer(buffer, elsewhere)
            group = layout.group_of(next(slot for slot in layout.slots if slot.start == rows.first))
            assert (rows.decay, rows.quantized) == (group.decay, group.quantized)
            assert same_bytes(rows.weights, arena.weights[piece.rows])
            places = layout.state_rows(group, piece.rows)
            assert set(rows.state) == set(places)
            for name, place in places.items():
                assert rows.state[name].dtype == arena.state[name].dtype
                assert same_bytes(rows.state[name], arena.state[name][place]), name


def spans(unit: Unit) -> Iterator[Pages]:
    yield from (field.pages for piece in unit.pieces for field in piece.fields)


@every_kind
def test_every_byte_of_weights_and_state_belongs_to_one_piece_of_one_unit(kind: dict[str, Any]) -> None:
    layout, units = block(kind)
    owners = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    for unit in units:
        for pages in spans(unit):
            owners[pages.start : pages.stop] += 1
    expected = torch.zeros_like(owners)
    expected[: layout.weights_bytes] = 1
    for field, first in layout.fields.values():
        expected[first : first + field.numel * field.dtype.itemsize] = 1
    assert torch.equal(owners, expected)


@every_kind
def test_chunks_cover_each_row_once_and_end_at_groups(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(unit_module.CHUNK_NUMEL, "cpu", 3 * GROUP_SIZE)
    layout, units = block(kind)
    covered = torch.zeros(layout.numel, dtype=torch.uint8)
    for unit in units:
        places = list[int]()
        for place, chunk in unit.chunks():
            assert chunk.rows.start % GROUP_SIZE == chunk.rows.stop % GROUP_SIZE == 0
            assert 0 < chunk.numel == chunk.rows.stop - chunk.rows.start
            if chunk.group.matrix is None:
                assert chunk.numel <= 3 * GROUP_SIZE
            else:  # a matrix is updated as a whole
                assert chunk.group in layout.groups and prod(chunk.group.matrix) <= chunk.numel
            assert place == unit.place(chunk.rows.start)
            group = next(g for g in layout.groups if g.start <= chunk.rows.start < g.stop)
            assert (chunk.group.decay, chunk.group.quantized) == (group.decay, group.quantized)
            covered[chunk.rows] += 1
            places += range(place, place + chunk.numel)
        assert places == list(range(unit.numel))
        assert sum(piece.numel > 3 * GROUP_SIZE for piece in unit.pieces) >= 1
    assert bool((covered == 1).all())
