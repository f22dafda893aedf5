"""The stream over a real store: newest bytes, few slots, errors of either thread, no thread left.

`copied` blocks pass a ring of chunks into slots of their own, as on CUDA; here those slots are host memory
too.
"""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.blocks import staging
from lowmem.blocks import stream as stream_module
from lowmem.blocks.arena import Arena, ArenaLayout, aligned_buffer, device_buffer
from lowmem.blocks.block_file import ChunkRequests
from lowmem.blocks.run_dir import FileRecord, RunDir, RunState, block_key
from lowmem.blocks.staging import RING_CHUNKS, Ring, ring_bytes
from lowmem.blocks.store import DiskStore, HostStore, Store
from lowmem.blocks.stream import DEVICE_SLOTS, HOST_SLOTS, BlockStream, num_slots, staging_bytes
from lowmem.blocks.unit import Pages
from lowmem.errors import StoreError
from lowmem.files import is_temporary
from lowmem.machine.device import CPU, Device

NUM_BLOCKS = 4
BLOCKS = [ArenaLayout([("weight", (64, 64 + 8 * b)), ("bias", (9,))], "adamw8bit") for b in range(NUM_BLOCKS)]
SHARED = ArenaLayout([("table", (10, 8))], "adamw")
LAYOUTS = {**{block_key(b): layout for b, layout in enumerate(BLOCKS)}, "shared": SHARED}
SHARED_BUFFER = torch.full((SHARED.total_bytes,), 7, dtype=torch.uint8)
SLOT_BYTES = max(layout.total_bytes for layout in BLOCKS)
every_way = pytest.mark.parametrize(
    ("resident", "prefetch"), [(True, True), (True, False), (False, True), (False, False)]
)
every_store = pytest.mark.parametrize(("in_ram", "copied"), [(False, False), (False, True), (True, True)])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these blocks is several chunks."""
    monkeypatch.setattr(staging, "CHUNK_BYTES", 8192)


def fill(block: int, version: int = 0) -> Tensor:
    """The bytes of a block at a version; all differ."""
    generator = torch.Generator().manual_seed(100 * version + block)
    return torch.randint(0, 256, (BLOCKS[block].total_bytes,), dtype=torch.uint8, generator=generator)


@contextmanager
def open_stream(
    folder: Path,
    resident: bool = False,
    prefetch: bool = True,
    in_ram: bool = False,
    copied: bool = False,
) -> Iterator[BlockStream]:
    first = DiskStore(RunDir(folder), LAYOUTS, {})
    for block in range(NUM_BLOCKS):
        first.write(block_key(block), aligned_buffer(BLOCKS[block].total_bytes).copy_(fill(block)), 0)
    first.close()
    ring = Ring(CPU, SLOT_BYTES) if copied else None
    disk = DiskStore(RunDir(folder), LAYOUTS, first.files, ring)
    stream = BlockStream(HostStore(disk) if in_ram else disk, BLOCKS, SHARED, CPU, resident, prefetch)
    try:
        yield stream
    finally:
        stream.close()


def holds(buffer: Tensor, block: int, version: int = 0) -> bool:
    return torch.equal(buffer[: BLOCKS[block].total_bytes], fill(block, version))


def store_block(stream: BlockStream, block: int, buffer: Tensor, version: int, wait: bool = False) -> None:
    """Trains the block to a version, in place, and stores it."""
    buffer[: BLOCKS[block].total_bytes].copy_(fill(block, version))
    stream.store({block: buffer}, SHARED_BUFFER, version, lambda files: None, wait)


def slowly(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    write = store.write

    def slow(*args: Any) -> FileRecord:
        time.sleep(0.05)
        return write(*args)

    monkeypatch.setattr(store, "write", slow)


@every_store
@every_way
def test_blocks_arrive_with_the_bytes_of_their_files(
    tmp_path: Path, resident: bool, prefetch: bool, in_ram: bool, copied: bool
) -> None:
    with open_stream(tmp_path, resident, prefetch, in_ram, copied) as stream:
        for block in [0, 1, 2, 3, 1, 0]:
            buffer = stream.load(block)
            stream.prefetch((block + 1) % NUM_BLOCKS)
            assert holds(buffer, block)
            stream.release(block, buffer)


@every_store
@every_way
def test_a_block_loaded_while_it_is_written_has_its_newest_bytes(
    tmp_path: Path,
    resident: bool,
    prefetch: bool,
    in_ram: bool,
    copied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_stream(tmp_path, resident, prefetch, in_ram, copied) as stream:
        slowly(monkeypatch, stream.block_store)
        for version, block in enumerate([2, 2, 0, 2], start=1):
            store_block(stream, block, stream.load(block), version)
            stream.prefetch(block)
            buffer = stream.load(block)
            assert holds(buffer, block, version)
            assert (
                stream.block_store.files[block_key(block)].name
                == f"block-{block:04d}.{version:06d}.safetensors"
            )
            stream.release(block, buffer)


@every_store
@every_way
def test_a_run_of_visits_leaves_the_last_version_of_each_block_on_disk(
    tmp_path: Path, resident: bool, prefetch: bool, in_ram: bool, copied: bool
) -> None:
    with open_stream(tmp_path, resident, prefetch, in_ram, copied) as stream:
        for visit in range(3 * NUM_BLOCKS):
            block = visit % NUM_BLOCKS
            buffer = stream.load(block)
            stream.prefetch((block + 1) % NUM_BLOCKS)
            assert holds(buffer, block, max(visit + 1 - NUM_BLOCKS, 0))
            store_block(stream, block, buffer, visit + 1)
        stream.finish()
        reader = DiskStore(RunDir(tmp_path), LAYOUTS, stream.block_store.files)
        for block in range(NUM_BLOCKS):
            buffer = aligned_buffer(BLOCKS[block].total_bytes)
            reader.read(block_key(block), buffer)
            assert holds(buffer, block, 2 * NUM_BLOCKS + block + 1)


def counting(made: list[int]) -> Callable[[Device, int], Tensor]:
    """`device_buffer`, which writes down how many bytes it is asked for."""

    def make(device: Device, num_bytes: int) -> Tensor:
        made.append(num_bytes)
        return device_buffer(device, num_bytes)

    return make


@every_store
@pytest.mark.parametrize("prefetch", [True, False])
def test_no_more_slots_are_made_than_the_plan_counts(
    tmp_path: Path, prefetch: bool, in_ram: bool, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(stream_module, "device_buffer", counting(made))
    with open_stream(tmp_path, False, prefetch, in_ram, copied) as stream:
        slowly(monkeypatch, stream.block_store)
        for visit in range(2 * NUM_BLOCKS):
            buffer = stream.load(visit % NUM_BLOCKS)
            stream.prefetch((visit + 1) % NUM_BLOCKS)
            store_block(stream, visit % NUM_BLOCKS, buffer, visit + 1)
    assert made == [SLOT_BYTES] * num_slots(copied, prefetch, NUM_BLOCKS)
    assert num_slots(copied, prefetch, NUM_BLOCKS) == (DEVICE_SLOTS if copied else HOST_SLOTS) - (
        not prefetch
    )
    in_compute = SLOT_BYTES
    assert staging_bytes(SLOT_BYTES, False, prefetch, copied, NUM_BLOCKS) == (
        sum(made) - in_compute,
        RING_CHUNKS * 8192 if copied else 0,
    )


@every_store
def test_a_resident_block_is_there_once_and_no_slot_is_made(
    tmp_path: Path, in_ram: bool, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(stream_module, "device_buffer", counting(made))
    with open_stream(tmp_path, True, True, in_ram, copied) as stream:
        for visit in range(2 * NUM_BLOCKS):
            store_block(stream, visit % NUM_BLOCKS, stream.load(visit % NUM_BLOCKS), visit + 1)
    assert made == [layout.total_bytes for layout in BLOCKS]
    assert staging_bytes(SLOT_BYTES, True, True, copied, NUM_BLOCKS)[0] == 0
    wider = staging_bytes(SLOT_BYTES, False, True, copied, NUM_BLOCKS, shared_bytes=2 * SLOT_BYTES)[1]
    assert wider == (ring_bytes(2 * SLOT_BYTES) if copied else 0), "a shared part passes the ring whole"


def test_a_prefetched_block_is_read_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_stream(tmp_path) as stream:
        read, has_read = stream.block_store.read, threading.Event()

        def recorded(key: str, buffer: Tensor) -> None:
            read(key, buffer)
            has_read.set()

        monkeypatch.setattr(stream.block_store, "read", recorded)
        stream.prefetch(3)
        assert has_read.wait(60)
        read_bytes = stream.traffic().disk_read_bytes
        assert read_bytes == stream.block_store.files["block-3"].num_bytes
        assert holds(stream.load(3), 3)
        assert stream.traffic().disk_read_bytes == read_bytes


def test_the_shared_part_is_written_as_it_was_when_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_stream(tmp_path) as stream:
        slowly(monkeypatch, stream.block_store)
        shared = SHARED_BUFFER.clone()
        stream.store({0: stream.load(0)}, shared, 1, lambda files: None, wait=False)
        shared.zero_()  # the next visit trains on
        stream.finish()
        written = aligned_buffer(SHARED.total_bytes)
        stream.block_store.read("shared", written)
        assert torch.equal(written, SHARED_BUFFER)


@pytest.mark.parametrize("wait", [True, False])
def test_a_commit_is_called_with_the_new_files_once_they_are_on_the_disk(
    tmp_path: Path, wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[dict[str, bool]] = []

    def committed(files: dict[str, FileRecord]) -> None:
        commits.append(
            {
                record.name: (tmp_path / record.name).stat().st_size == record.num_bytes
                for record in files.values()
            }
        )

    looked = threading.Event()
    with open_stream(tmp_path) as stream:
        write = stream.block_store.write

        def write_later(*args: Any) -> FileRecord:
            assert wait or looked.wait(60)
            return write(*args)

        monkeypatch.setattr(stream.block_store, "write", write_later)
        stream.store({1: stream.load(1)}, SHARED_BUFFER, 1, committed, wait)
        assert len(commits) == (1 if wait else 0)
        looked.set()
        stream.finish()
    assert commits == [{"block-0001.000001.safetensors": True, "shared.000001.safetensors": True}]


@every_way
def test_an_error_of_the_reader_reaches_load_and_costs_no_slot(
    tmp_path: Path, resident: bool, prefetch: bool
) -> None:
    with open_stream(tmp_path, resident, prefetch) as stream:
        (tmp_path / stream.block_store.files["block-1"].name).unlink()
        for _ in range(HOST_SLOTS + 1):
            stream.prefetch(1)
            with pytest.raises(StoreError, match="block-0001.000000.safetensors"):
                stream.load(1)
        assert holds(stream.load(0), 0)


def fails_to_write(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full when this file is written."""
    real = ChunkRequests.write

    def write(self: ChunkRequests, path: Path, position: int, chunk: torch.Tensor) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, position, chunk)

    monkeypatch.setattr(ChunkRequests, "write", write)


@every_store
@pytest.mark.parametrize("reached_by", ["store", "finish", "load of the same block", "store with wait"])
def test_an_error_of_the_writer_reaches_the_next_call_and_costs_no_slot(
    tmp_path: Path, reached_by: str, in_ram: bool, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[object] = []
    with open_stream(tmp_path, False, True, in_ram, copied) as stream:
        fails_to_write(monkeypatch, "block-0002.000001.safetensors")
        buffers = {2: stream.load(2)}
        stream.prefetch(0)
        if reached_by == "store with wait":
            with pytest.raises(StoreError, match="No space left"):
                stream.store(buffers, SHARED_BUFFER, 1, commits.append, wait=True)
        else:
            stream.store(buffers, SHARED_BUFFER, 1, commits.append, wait=False)
            upcoming = {0: stream.load(0)}
            stream.prefetch(1)  # may wait for the slot of the write that fails
            with pytest.raises(StoreError, match="No space left"):
                if reached_by == "store":
                    stream.store(upcoming, SHARED_BUFFER, 2, commits.append, wait=False)
                elif reached_by == "finish":
                    stream.finish()
                else:
                    stream.load(2)
    assert commits == []


def written_already(stream: BlockStream, block: int, visits_done: int) -> dict[str, Future[FileRecord]]:
    """The block's file as units write it: page by page, before the visit is stored."""
    key, store, buffer = block_key(block), stream.block_store, stream.load(block)
    buffer[: BLOCKS[block].total_bytes].copy_(fill(block, visits_done))
    store.begin(key, visits_done)
    store.write_pages(key, [(Pages(0, BLOCKS[block].total_bytes), buffer[: BLOCKS[block].total_bytes])])
    stream.release(block, buffer)
    file = Future[FileRecord]()
    file.set_result(store.end(key, visits_done))
    return {key: file}


def test_a_commit_waits_for_files_that_are_being_written_already_and_names_them(tmp_path: Path) -> None:
    commits: list[dict[str, FileRecord]] = []
    with open_stream(tmp_path) as stream:
        written = written_already(stream, 1, 1)
        later = Future[FileRecord]()
        both = {block_key(0): later, **written}
        stream.store({}, SHARED_BUFFER, 1, commits.append, wait=False, written=both)
        time.sleep(0.05)
        assert commits == []
        later.set_result(stream.block_store.files[block_key(0)])
        stream.finish()
        expected = {key: stream.block_store.files[key] for key in ("block-0", "block-1", "shared")}
        assert commits == [expected]
        assert expected["block-1"].name == "block-0001.000001.safetensors"


def test_a_file_that_could_not_be_written_is_never_committed(tmp_path: Path) -> None:
    commits: list[object] = []
    with open_stream(tmp_path) as stream:
        failed = Future[FileRecord]()
        failed.set_exception(StoreError("the disk is full"))
        stream.store({}, SHARED_BUFFER, 1, commits.append, wait=False, written={block_key(0): failed})
        with pytest.raises(StoreError, match="the disk is full"):
            stream.finish()
    assert commits == []


def test_a_commit_is_on_the_disk_in_order_files_folder_state_move_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any other order a power cut could leave a state that names what is not there."""
    run, events = RunDir(tmp_path), list[str]()
    real_fsync, real_replace = os.fsync, os.replace

    def known(name: str) -> str:
        return "the new state" if is_temporary(name, "state.json") else name

    def fsync(handle: int) -> None:
        there = {path.stat().st_ino: path.name for path in [tmp_path, *tmp_path.iterdir()]}
        events.append(f"sync {known(there[os.fstat(handle).st_ino])}")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        events.append(f"move {known(source.name)} to {target.name}")
        real_replace(source, target)

    with open_stream(tmp_path) as stream:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        written = written_already(stream, 1, 1)
        other = stream.load(2)
        other[0] ^= 1

        def committed(files: dict[str, FileRecord]) -> None:
            run.commit(RunState(visits_done=1, files=files))

        stream.store({2: other}, SHARED_BUFFER, 1, committed, wait=True, written=written)
    folder = tmp_path.name
    assert events == [
        "sync block-0001.000001.safetensors",
        "sync block-0002.000001.safetensors",
        "sync shared.000001.safetensors",
        f"sync {folder}",
        "sync the new state",
        "move the new state to state.json",
        f"sync {folder}",
    ]


def test_the_shared_part_is_loaded_as_it_was_stored_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_stream(tmp_path) as stream:
        slowly(monkeypatch, stream.block_store)
        stream.store({0: stream.load(0)}, SHARED_BUFFER, 1, lambda files: None, wait=False)
        loaded = stream.load_shared()
        assert torch.equal(loaded, SHARED_BUFFER)
        loaded.zero_()  # a buffer of its own: to train in it changes nothing else
        assert torch.equal(stream.load_shared(), SHARED_BUFFER)
        used = stream.load_shared_result()  # the weights alone
        assert torch.equal(used, Arena(stream.shared_layout, SHARED_BUFFER).result)
        assert used.untyped_storage().nbytes() <= stream.shared_layout.result[2] + 2 * 4096


def threads_since(before: set[threading.Thread]) -> set[str]:
    """Threads of this test alone: a store that another test has dropped may still have its own."""
    return {thread.name for thread in set(threading.enumerate()) - before}


@every_store
@pytest.mark.parametrize("resident", [True, False])
def test_a_closed_stream_holds_no_block(tmp_path: Path, resident: bool, in_ram: bool, copied: bool) -> None:
    gc.disable()  # at once, not when the collector comes
    try:
        with open_stream(tmp_path, resident, True, in_ram, copied) as stream:
            for visit in range(2 * NUM_BLOCKS):
                buffer = stream.load(visit % NUM_BLOCKS)
                stream.prefetch((visit + 1) % NUM_BLOCKS)
                held = weakref.ref(buffer.untyped_storage())
                store_block(stream, visit % NUM_BLOCKS, buffer, visit + 1)
            assert held() is not None
            del buffer
        assert held() is None
    finally:
        gc.enable()


def test_no_thread_of_a_stream_starts_a_team_of_compute_threads(tmp_path: Path) -> None:
    """OpenMP gives every thread that computes a team of its own. Once the teams outnumber the cores, it lets
    them sleep between operations, and compute becomes slower.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)  # with one thread there are no teams
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compute_teams_child.py"), tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0


def test_close_finishes_the_write_under_way_and_ends_every_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[object] = []
    before = set(threading.enumerate())
    with open_stream(tmp_path) as stream:
        slowly(monkeypatch, stream.block_store)
        stream.store({0: stream.load(0)}, SHARED_BUFFER, 1, commits.append, wait=False)
        stream.prefetch(1)
        assert {"lowmem-reader_0", "lowmem-writer_0"} < threads_since(before)
    assert threads_since(before) == set()
    assert len(commits) == 1
