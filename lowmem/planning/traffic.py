"""Predicts what a model that is trained end to end moves when its blocks stream, to the byte.

Each step fetches every unit's weights for the forward pass and for the backward pass, and its moments in
chunks for the update, which writes all of them back. The prediction also says from how many tokens a step on
compute hides all of it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.borders import BorderBytes
from lowmem.blocks.order import BlockQueue, Course
from lowmem.blocks.run_dir import block_key
from lowmem.blocks.sweep_stream import page_bytes, weights_pages, whole_pages
from lowmem.blocks.traffic import Traffic
from lowmem.blocks.unit import Field, Unit, edge_pages, first_alike
from lowmem.blocks.unit_stream import kept_for_next_step
from lowmem.planning.settings import Setup, file_bytes
from lowmem.schema import Section
from lowmem.units import PAGE, format_bytes

Parts = tuple["Moved", "Moved", "Moved"]  # start, step, commit


class StreamedTraffic(Section):
    """What one process moves: once at its start, in each step, and in each commit."""

    start: Traffic
    step: Traffic  # or sweep
    commit: Traffic
    sweep_steps: int = 1
    # of a model that grows: everything until then, and the steps and commits of that
    before: Traffic = Traffic()
    grow_steps: int = 0
    grow_visits: int = 0
    # of a whole run whose steps differ, as they do with the block that is visited; `step` and `commit` are
    # then means
    whole: Traffic | None = None
    # tokens of a step from which on moving takes no longer than computing; None: the profile lacks a rate
    hidden_tokens: int | None

    def moved(self, steps: int, commits: int) -> Traffic:
        """What a process moves that makes so many steps, in whole sweeps, and commits; of a model that grows,
        all of them.
        """
        if self.whole is not None:
            return self.whole
        sweeps, commits = (steps - self.grow_steps) // self.sweep_steps, commits - self.grow_visits
        return self.before + self.start + self.step * sweeps + self.commit * commits


def traffic_before_growth(setup: Setup, queue: BlockQueue) -> dict[str, Any]:
    """The fields of `StreamedTraffic` for a model that grows.

    The first block is read once, and written at every commit with the shared part; at the last one it is
    written as each of the others too.
    """
    first, shared, visits = setup.layouts[0], setup.shared, queue.grow_visits
    others = setup.layouts[1:]
    before = Traffic(
        disk_read_bytes=file_bytes([first, shared]),
        disk_written_bytes=visits * file_bytes([first, shared]) + file_bytes(others),
    )
    if not setup.profile.unified:
        copied = sum(layout.total_bytes for layout in others)
        before += Traffic(
            host_to_device_bytes=first.total_bytes,
            device_to_host_bytes=visits * (first.total_bytes + shared.total_bytes) + copied,
        )
    return {"before": before, "grow_steps": queue.grow_steps, "grow_visits": visits}


def streamed_traffic(setup: Setup, borders: BorderBytes) -> StreamedTraffic:
    """The traffic of a setup that streams. `borders`: what activations at block borders take and move."""
    start, step, commit = streamed_parts(setup)
    return StreamedTraffic(
        start=start,
        step=step + borders.traffic,
        commit=commit,
        sweep_steps=setup.recipe.blocks.sweep_steps,
        hidden_tokens=hidden_tokens(setup),
    )


def _unit_traffic(setup: Setup) -> Parts:
    """What the units move between the store and the device."""
    on_disk = setup.settings.tier == "disk"
    first, step, commit = Moved(), Moved(), Moved()
    last = len(setup.units) - 1
    like = first_alike(setup.units)
    held = setup.held
    kept = kept_for_next_step(len(setup.units), setup.stay | held) if setup.in_place else None
    for index, unit in enumerate(setup.units):
        if index in setup.stay:
            first += Moved(sum(_fetched(piece.fields, on_disk) for piece in unit.pieces))
            for piece in [] if setup.frozen else unit.pieces:
                commit += _written(piece.fields, on_disk)
            continue
        backward = (2 if setup.two_passes else 1) if index >= setup.lowest else 0
        passes = (index < last) + backward
        fetched = Moved(unit.weights_bytes if on_disk else unit.used_weights_bytes)
        if index in held:
            first += fetched
            commit += _written_weights(unit, on_disk)
            step += _updated(like[unit.shape], on_disk, in_place=True)
            continue
        if index == kept and backward:  # once, and then the weights are there when a step begins
            first, passes = first + fetched, passes - 1
        step += Moved(passes * fetched.read)
        if not setup.frozen:
            step += _updated(like[unit.shape], on_disk, setup.in_place)
            if setup.in_place:
                step += _written_weights(unit, on_disk)
    if setup.resting is not None:
        chunks = [piece for _, piece in setup.resting.chunks()]
        pages = [piece.field("weights").pages for piece in chunks]
        first += Moved(sum(part.num_bytes if on_disk else part.inside_bytes for part in pages))
        step += _updated(setup.resting, on_disk, in_place=False)
    return first, step, commit


@functools.lru_cache(maxsize=16)  # candidates share their units
def _updated(unit: Unit, on_disk: bool, in_place: bool) -> Moved:
    """What the update of a unit moves in chunks of its rows: all of them, or without weights."""
    fields = [chunk.held(with_weights=not in_place) for _, chunk in unit.chunks()]
    return Moved(sum(_fetched(some, on_disk) for some in fields)) + _written(chain(*fields), on_disk)


def _written_weights(unit: Unit, on_disk: bool) -> Moved:
    return _written([piece.field("weights") for piece in unit.pieces], on_disk)


def _block_traffic(setup: Setup) -> Parts:
    """What whole blocks move between the store and the device in a sweep: weights for the forward pass but
    of the last block, then everything, there and back.
    """
    on_disk = setup.settings.tier == "disk"
    first, sweep, commit = Moved(), Moved(), Moved()
    for block, layout in enumerate(setup.layouts):
        whole = page_bytes(whole_pages(layout), on_disk)
        if block in setup.stay:
            first += Moved(whole)
            commit += Moved(written=whole)
            continue
        forward = page_bytes(weights_pages(layout), on_disk) if block < len(setup.layouts) - 1 else 0
        sweep += Moved(forward + whole, whole)
    return first, sweep, commit


def streamed_parts(setup: Setup) -> tuple[Traffic, Traffic, Traffic]:
    """(start, step, commit) without what moves at the borders."""
    pieces = _block_traffic(setup) if setup.swept else _unit_traffic(setup)
    unified, shared = setup.profile.unified, setup.shared
    on_device = [shared] if setup.resting is None else []
    if setup.settings.tier == "disk":
        on_disk = [Traffic(disk_read_bytes=m.read + m.patched, disk_written_bytes=m.written) for m in pieces]
        # A durable file is read again for its digest.
        parts = [*([] if setup.frozen else setup.layouts), *([] if on_device else [shared])]
        digested = sum(layout.total_bytes for layout in parts)
        on_disk[0] += Traffic(disk_read_bytes=file_bytes(on_device))
        on_disk[2] += Traffic(
            disk_read_bytes=digested, disk_written_bytes=file_bytes(on_device) + _header_bytes(parts)
        )
    else:
        files, written = file_bytes([*setup.layouts, shared]), file_bytes(setup.updated)
        on_disk = [Traffic(disk_read_bytes=files), Traffic(), Traffic(disk_written_bytes=written)]
    link = [Traffic(host_to_device_bytes=m.read, device_to_host_bytes=m.written) for m in pieces]
    link[2] += Traffic(device_to_host_bytes=sum(layout.total_bytes for layout in on_device))
    start, step, commit = on_disk if unified else [a + b for a, b in zip(on_disk, link, strict=True)]
    return start, step, commit


class VisitTraffic(NamedTuple):
    """What a visit moves in which one block is trained and the others are read."""

    load: Traffic
    step: Traffic
    again: Traffic  # a step whose batch has been there in the visit
    commit: Traffic

    def moved(self, steps: int, kept: int) -> Traffic:
        """`kept`: batches that come back; 0: none does."""
        fresh = min(kept or steps, steps)
        return self.load + self.step * fresh + self.again * (steps - fresh) + self.commit


def visit_traffic(setup: Setup, block: int, at_borders: Callable[[Course], BorderBytes]) -> VisitTraffic:
    """`at_borders`: what a step takes and moves at the borders."""
    on_disk, unified = setup.settings.tier == "disk", setup.profile.unified
    layout, shared, units = setup.layouts[block], setup.shared, len(setup.units)
    keys = [unit.key for unit in setup.units]
    first = keys.index(block_key(block))

    def read(course: Course) -> Traffic:
        order = [*range(course.first, units - 1), *range(first, units)]
        passed = [setup.units[index] for index in order if keys[index] != keys[first]]
        moved = sum(unit.weights_bytes if on_disk else unit.used_weights_bytes for unit in passed)
        return at_borders(course).traffic + Traffic(
            disk_read_bytes=moved if on_disk else 0, host_to_device_bytes=0 if unified else moved
        )

    entry = units + 1 if setup.queue.kept_batches and first else None
    step, again = (read(Course(first, begin, entry)) for begin in (0, first))
    load = Traffic(
        disk_read_bytes=file_bytes([layout]) if on_disk else 0,
        host_to_device_bytes=0 if unified else layout.total_bytes,
    )
    commit = Traffic(
        disk_written_bytes=file_bytes([layout, shared]),
        device_to_host_bytes=0 if unified else layout.total_bytes + shared.total_bytes,
    )
    return VisitTraffic(load, step, again if entry is not None else step, commit)


def coordinate_traffic(setup: Setup, at_borders: Callable[[Course], BorderBytes]) -> StreamedTraffic:
    """The traffic of a run whose blocks are trained in turn by the loss of the whole model, and stream."""
    queue, on_disk = setup.queue, setup.settings.tier == "disk"
    visits = [visit_traffic(setup, block, at_borders) for block in range(queue.num_blocks)]
    start = Traffic(disk_read_bytes=file_bytes([setup.shared] if on_disk else [*setup.layouts, setup.shared]))
    whole, commits, counts = start, Traffic(), Counter[tuple[int, int]]()
    for visit, _ in queue.pending(0):
        counts[visit.blocks[0], visit.num_steps] += 1
    for (block, steps), count in counts.items():
        whole += visits[block].moved(steps, queue.kept_batches) * count
        commits += visits[block].commit * count
    return StreamedTraffic(
        start=start,
        step=_share(whole, start + commits, queue.total_steps),
        commit=_share(commits, Traffic(), queue.num_visits),
        whole=whole,
        hidden_tokens=None,
    )


def _share(whole: Traffic, without: Traffic, count: int) -> Traffic:
    """The mean, in whole bytes."""
    others = without.model_dump()
    return Traffic(**{name: (number - others[name]) // count for name, number in whole.model_dump().items()})


class Moved(NamedTuple):
    """Bytes that come to the device, and that go from it."""

    read: int = 0
    written: int = 0
    patched: int = 0  # pages that also hold other rows: the host reads them from the disk and writes them

    def __add__(self, other: object) -> Moved:
        assert isinstance(other, Moved)
        return Moved(*map(sum, zip(self, other, strict=True)))


def _written(fields: Iterable[Field], on_disk: bool) -> Moved:
    """Rows that are written together."""
    written = [field.pages for field in fields]
    if not on_disk:
        return Moved(written=sum(pages.inside_bytes for pages in written))
    whole = sum(pages.whole.stop - pages.whole.start for pages in written)
    edges, patched = edge_pages(written)
    return Moved(0, whole + PAGE * edges, PAGE * patched)


def _fetched(fields: Sequence[Field], on_disk: bool) -> int:
    """Bytes that come: whole pages from the disk, and what is needed from RAM."""
    return sum(field.pages.num_bytes if on_disk else field.pages.inside_bytes for field in fields)


def _header_bytes(layouts: Sequence[ArenaLayout]) -> int:
    return sum(layout.header_bytes for layout in layouts)


def hidden_tokens(setup: Setup) -> int | None:
    """Tokens of a step from which on compute hides the moving of blocks; None: the profile lacks a rate.

    Every unit, or block in sweeps, must then compute for as long as the next one is fetched and the last one
    updated. A forward pass makes 2 operations per weight and token, a backward pass 4 and its recomputation
    2. A link carries both directions at once, a disk one after the other.
    """
    profile, rate = setup.profile, setup.profile.device.peak_tflops
    if setup.swept:
        weights = sum(layout.weights_bytes for layout in setup.moving)
        whole = sum(layout.total_bytes for layout in setup.moving)
    else:
        units = [
            (unit, index in setup.held) for index, unit in enumerate(setup.units) if index not in setup.stay
        ]
        weights = sum(unit.weights_bytes for unit, held in units if not held)
        whole = sum(unit.num_bytes - held * unit.weights_bytes for unit, held in units)
    fetched, written = whole if setup.swept or setup.in_place else weights + whole, whole
    if setup.frozen:
        fetched, written = weights, 0
    forward_s, backward_s = [0.0], [0.0]
    if setup.settings.tier == "disk":
        read_rate, write_rate = profile.disk_rates
        if read_rate is None or write_rate is None:
            return None
        forward_s.append(weights / read_rate)
        backward_s.append(fetched / read_rate + written / write_rate)
    if not profile.unified:
        into, out = profile.link_rates
        assert into is not None and out is not None, "the profile checks that there is a link"
        forward_s.append(weights / into)
        backward_s.append(max(fetched / into, written / out))
    if rate is None:
        return None
    forward_per_token_s = 2 * setup.recipe.blocks.sweep_steps * setup.layer_weights / (rate * 1e12)
    backward_per_token_s = forward_per_token_s * 3
    return round(max(max(forward_s) / forward_per_token_s, max(backward_s) / backward_per_token_s))


def traffic_lines(traffic: StreamedTraffic) -> list[str]:
    """The traffic of a step as one line for the plan's table."""
    step, hidden = traffic.step, traffic.hidden_tokens
    into, out = format_bytes(step.host_to_device_bytes), format_bytes(step.device_to_host_bytes)
    read, written = format_bytes(step.disk_read_bytes), format_bytes(step.disk_written_bytes)
    link = f"link {into} in, {out} out; " if step.host_to_device_bytes else ""
    hides = "" if hidden is None else f"; hidden behind compute from about {hidden:,} tokens a step on"
    per = "step" if traffic.sweep_steps == 1 else f"sweep of {traffic.sweep_steps} steps"
    return [f"traffic per {per}: {link}disk {read} read, {written} written{hides}"]
