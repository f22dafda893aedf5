"""What a step of exact back-propagation moves when its blocks come and go, to the byte, and from how many
tokens on compute hides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lowmem.blocks.arena import ArenaLayout
from lowmem.blocks.borders import BorderBytes
from lowmem.blocks.order import fetches
from lowmem.blocks.traffic import Traffic
from lowmem.machine.profile import Profile
from lowmem.schema import Section
from lowmem.units import GIB, format_bytes


class StreamedTraffic(Section):
    """A process moves `start + steps x step + visits x commit`."""

    start: Traffic
    step: Traffic
    commit: Traffic
    hidden_tokens: (
        int | None
    )  # of a step, from which on moving takes no longer than computing; None: the profile lacks a rate


def streamed_traffic(
    layouts: Sequence[ArenaLayout],
    shared: ArenaLayout,
    profile: Profile,
    tier: str,
    two_passes: bool,
    recompute: bool,
    borders: BorderBytes,
) -> StreamedTraffic:
    first, *others = fetches(len(layouts), two_passes)

    def fetched(block: int, weights_only: bool) -> int:
        return layouts[block].weights_read_bytes if weights_only else layouts[block].total_bytes

    def headers(blocks: Sequence[int]) -> int:
        return sum(len(layouts[block].header()) for block in blocks)

    every = range(len(layouts))
    read = sum(fetched(*fetch) for fetch in others)
    written = sum(layout.total_bytes for layout in layouts)
    files, shared_file = written + headers(every), shared.total_bytes + len(shared.header())
    start, step, commit = Counter[str](), Counter[str](), Counter[str]()
    if not profile.unified:
        start["host_to_device_bytes"], step["host_to_device_bytes"] = fetched(*first), read
        step["device_to_host_bytes"], commit["device_to_host_bytes"] = written, shared.total_bytes
    if tier == "disk":
        start["disk_read_bytes"] = shared_file + fetched(*first) + headers([first[0]])
        step["disk_read_bytes"] = read + headers([block for block, _ in others])
        step["disk_written_bytes"], commit["disk_written_bytes"] = files, shared_file
    else:  # all blocks are read into memory once, and written where they are committed
        start["disk_read_bytes"], commit["disk_written_bytes"] = shared_file + files, shared_file + files
    return StreamedTraffic(
        start=Traffic(**start),
        step=Traffic(**step) + borders.traffic,
        commit=Traffic(**commit),
        hidden_tokens=hidden_tokens(layouts, profile, tier, recompute),
    )


def hidden_tokens(layouts: Sequence[ArenaLayout], profile: Profile, tier: str, recompute: bool) -> int | None:
    """Tokens of a step from which on every block is computed for as long as the next is fetched and the last
    written, both ways.

    A forward pass makes 2 operations per weight and token, a backward pass 4 and its recomputation 2, or 4
    with recompute within the block. A link carries both directions at once, a disk one after the other.
    """
    rate, disk, link = profile.device.peak_tflops, profile.disk, profile.link
    weights = sum(layout.weights_read_bytes for layout in layouts)
    whole, numel = (
        sum(layout.total_bytes for layout in layouts),
        sum(layout.num_parameters for layout in layouts),
    )
    forward_s, backward_s = [0.0], [0.0]
    if tier == "disk":
        if disk.read_gib_per_s is None or disk.write_gib_per_s is None:
            return None
        forward_s.append(weights / (disk.read_gib_per_s * GIB))
        backward_s.append(whole / (disk.read_gib_per_s * GIB) + whole / (disk.write_gib_per_s * GIB))
    if not profile.unified:
        assert link is not None, "checked by the profile"
        forward_s.append(weights / (link.host_to_device_gib_per_s * GIB))
        backward_s.append(whole / (min(link.host_to_device_gib_per_s, link.device_to_host_gib_per_s) * GIB))
    if rate is None:
        return None
    per_token_s = 2 * numel / (rate * 1e12)
    return round(max(max(forward_s) / per_token_s, max(backward_s) / (per_token_s * (4 if recompute else 3))))


def traffic_lines(traffic: StreamedTraffic) -> list[str]:
    step, hidden = traffic.step, traffic.hidden_tokens
    link = (
        f"link {format_bytes(step.host_to_device_bytes)} in, {format_bytes(step.device_to_host_bytes)} out; "
        if step.host_to_device_bytes
        else ""
    )
    line = f"traffic per step: {link}disk {format_bytes(step.disk_read_bytes)} read, {format_bytes(step.disk_written_bytes)} written"
    return [
        line + ("" if hidden is None else f"; hidden behind compute from about {hidden:,} tokens a step on")
    ]
