"""Traffic as a value: what adds up, and what a run's state keeps of it."""

from __future__ import annotations

from lowmem.blocks.run_dir import RunState
from lowmem.blocks.traffic import Traffic, TransferTimes
from lowmem.errors import StoreError
from lowmem.schema import parse

STEP = Traffic(
    host_to_device_bytes=1,
    device_to_host_bytes=20,
    disk_read_bytes=300,
    disk_written_bytes=4000,
    exchanged_bytes=50000,
)


def test_traffic_and_times_add_up_way_by_way() -> None:
    assert STEP + Traffic() == STEP
    assert STEP + STEP + STEP == STEP * 3
    times = TransferTimes(host_to_device_s=0.5, device_to_host_s=1.0, disk_read_s=2.0, disk_written_s=4.0)
    assert (times + times).model_dump() == {name: 2 * value for name, value in times}
    assert list((STEP * 3).model_dump().values()) == [3, 60, 900, 12000, 150000]


def test_a_state_keeps_traffic_and_reads_one_from_before_anything_moved() -> None:
    state = RunState(traffic=STEP)
    assert parse(RunState, state.model_dump(mode="json", by_alias=True), "state", StoreError) == state
    empty = parse(RunState, {"schema": 2, "traffic": {}, "transfer_s": {}}, "state", StoreError)
    assert (empty.traffic, empty.transfer_s) == (Traffic(), TransferTimes())
