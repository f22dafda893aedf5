"""Predicts what a model that is trained end to end moves when its blocks stream, to the byte.

Each step fetches the blocks in order, for the forward pass and for the backward pass, and writes each block
back once. The prediction also says from how many tokens a step on compute hides all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.borders import BorderBytes
from lowmem.blocks.order import fetches
from lowmem.blocks.traffic import Traffic
from lowmem.planning.settings import Setup, file_bytes
from lowmem.schema import Section
from lowmem.units import format_bytes

Parts = tuple[Traffic, Traffic, Traffic]  # start, step, commit


class StreamedTraffic(Section):
    """What one process moves: once at its start, in each step, and in each commit."""

    start: Traffic
    step: Traffic
    commit: Traffic
    # tokens of a step from which on moving takes no longer than computing; None: the profile lacks a rate
    hidden_tokens: int | None

    def moved(self, steps: int, commits: int) -> Traffic:
        """What a process moves that makes so many steps and commits."""
        return self.start + self.step * steps + self.commit * commits


def streamed_traffic(setup: Setup, borders: BorderBytes) -> StreamedTraffic:
    """The traffic of a setup that streams. `borders`: what activations at block borders take and move."""
    link = (Traffic(), Traffic(), Traffic()) if setup.profile.unified else _link_traffic(setup)
    disk = _disk_traffic(setup) if setup.settings.tier == "disk" else _host_tier_disk_traffic(setup)
    start, step, commit = (over + to for over, to in zip(link, disk, strict=True))
    return StreamedTraffic(
        start=start, step=step + borders.traffic, commit=commit, hidden_tokens=hidden_tokens(setup)
    )


def _fetched(setup: Setup) -> tuple[list[int], list[int]]:
    """(blocks that a step fetches, in order; bytes of each fetch). The process starts with the first fetch:
    its block is there when a step begins.
    """
    order = fetches(len(setup.layouts), setup.two_passes)

    def num_bytes(layout: ArenaLayout, weights_only: bool) -> int:
        return layout.weights_read_bytes if weights_only else layout.total_bytes

    return [block for block, _ in order], [
        num_bytes(setup.layouts[block], weights_only) for block, weights_only in order
    ]


def _link_traffic(setup: Setup) -> Parts:
    """Over the link: blocks to the device and back, and the shared part back at a commit."""
    _, (first, *others) = _fetched(setup)
    written = sum(layout.total_bytes for layout in setup.layouts)
    return (
        Traffic(host_to_device_bytes=first),
        Traffic(host_to_device_bytes=sum(others), device_to_host_bytes=written),
        Traffic(device_to_host_bytes=setup.shared.total_bytes),
    )


def _disk_traffic(setup: Setup) -> Parts:
    """Blocks rest on the disk: each fetch reads it, and each step writes every block's file."""
    (first_block, *blocks), (first, *others) = _fetched(setup)
    shared_file = file_bytes([setup.shared])
    return (
        Traffic(disk_read_bytes=shared_file + first + _header_bytes(setup, [first_block])),
        Traffic(
            disk_read_bytes=sum(others) + _header_bytes(setup, blocks),
            disk_written_bytes=file_bytes(setup.layouts),
        ),
        Traffic(disk_written_bytes=shared_file),
    )


def _host_tier_disk_traffic(setup: Setup) -> Parts:
    """Blocks rest in host memory: they are read once, and written where they are committed."""
    files = file_bytes([*setup.layouts, setup.shared])
    return Traffic(disk_read_bytes=files), Traffic(), Traffic(disk_written_bytes=files)


def _header_bytes(setup: Setup, blocks: Sequence[int]) -> int:
    return sum(len(setup.layouts[block].header()) for block in blocks)


def hidden_tokens(setup: Setup) -> int | None:
    """Tokens of a step from which on compute hides the moving of blocks; None: the profile lacks a rate.

    Every block must then compute for as long as the next one is fetched and the last one written. A forward
    pass makes 2 operations per weight and token, a backward pass 4 and its recomputation 2, or 4 with
    recompute within the block. A link carries both directions at once, a disk one after the other.
    """
    profile, rate = setup.profile, setup.profile.device.peak_tflops
    weights = sum(layout.weights_read_bytes for layout in setup.layouts)
    whole = sum(layout.total_bytes for layout in setup.layouts)
    forward_s, backward_s = [0.0], [0.0]
    if setup.settings.tier == "disk":
        read_rate, write_rate = profile.disk_rates
        if read_rate is None or write_rate is None:
            return None
        forward_s.append(weights / read_rate)
        backward_s.append(whole / read_rate + whole / write_rate)
    if not profile.unified:
        into, out = profile.link_rates
        assert into is not None and out is not None, "the profile checks that there is a link"
        forward_s.append(weights / into)
        backward_s.append(whole / min(into, out))
    if rate is None:
        return None
    forward_per_token_s = 2 * sum(layout.num_parameters for layout in setup.layouts) / (rate * 1e12)
    backward_per_token_s = forward_per_token_s * (4 if setup.settings.recompute else 3)
    return round(max(max(forward_s) / forward_per_token_s, max(backward_s) / backward_per_token_s))


def traffic_lines(traffic: StreamedTraffic) -> list[str]:
    """The traffic of a step as one line for the plan's table."""
    step, hidden = traffic.step, traffic.hidden_tokens
    into, out = format_bytes(step.host_to_device_bytes), format_bytes(step.device_to_host_bytes)
    read, written = format_bytes(step.disk_read_bytes), format_bytes(step.disk_written_bytes)
    link = f"link {into} in, {out} out; " if step.host_to_device_bytes else ""
    hides = "" if hidden is None else f"; hidden behind compute from about {hidden:,} tokens a step on"
    return [f"traffic per step: {link}disk {read} read, {written} written{hides}"]
