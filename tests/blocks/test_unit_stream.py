"""Units over real stores: the bits and digests of whole arenas, errors of every request, no thread left.

A unit is a layer of odd sizes; chunks are small, so that several of them and the edges of pages meet.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
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

from lowmem.blocks import optim, staging, unit_stream
from lowmem.blocks import store as store_module
from lowmem.blocks import unit as unit_module
from lowmem.blocks.arena import (
    GROUP_SIZE,
    Arena,
    ArenaLayout,
    aligned_buffer,
    device_buffer,
    parameter_views,
)
from lowmem.blocks.block_file import ChunkRequests
from lowmem.blocks.run_dir import FileRecord, RunDir, RunState
from lowmem.blocks.staging import Pace
from lowmem.blocks.store import DiskStore, HostStore, Store
from lowmem.blocks.unit import Pages, Unit, edge_pages
from lowmem.blocks.unit_stream import CHUNKS, UnitStream, Update, num_weights_slots, spread, spread_over
from lowmem.errors import StoreError
from lowmem.machine.device import CPU, Device, Mark
from lowmem.recipe import OptimizerConfig
from lowmem.units import PAGE

NUM_BLOCKS, NUM_LAYERS = 2, 3  # layers of each block
NUM_UNITS = NUM_BLOCKS * NUM_LAYERS
DEVICE = CPU
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adamw8bit-ema-bf16": {"optimizer": "adamw8bit", "ema": True, "weights_dtype": torch.bfloat16},
}
STAYS = {"none": frozenset[int](), "some": spread(NUM_UNITS, 3), "all": frozenset(range(NUM_UNITS))}
HELD = {"none": frozenset[int](), "some": spread_over(NUM_UNITS, frozenset({0}), 3)}
HELD["all"] = frozenset(range(NUM_UNITS))
every_held = pytest.mark.parametrize("held", HELD.values(), ids=HELD)  # weights that stay
every_store = pytest.mark.parametrize("in_ram", [False, True], ids=["disk", "ram"])
every_stay = pytest.mark.parametrize("stay", STAYS.values(), ids=STAYS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unit_module.CHUNK_NUMEL, "cpu", 5 * GROUP_SIZE)
    monkeypatch.setattr(staging, "CHUNK_BYTES", 8192)
    monkeypatch.setattr(store_module, "DIGEST_PIECE", 4096)


def shapes(block: int) -> list[tuple[str, tuple[int, ...]]]:
    sizes = [("weight", (35, 121 + block)), ("bias", (61,)), ("gain", (5, 103)), ("scale", (300,))]
    return [(f"layers.{layer}.{name}", shape) for layer in range(NUM_LAYERS) for name, shape in sizes]


class Setting:
    """Committed blocks in a folder, and the same blocks as whole arenas in RAM."""

    def __init__(self, folder: Path, kind: str = "adamw") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run = folder, RunDir(folder)
        self.layouts = {f"block-{b}": ArenaLayout(shapes(b), **KINDS[kind]) for b in range(NUM_BLOCKS)}
        self.units = [
            Unit(key, layout, {slot.name for slot in layout.slots if f".{layer}." in slot.name})
            for key, layout in self.layouts.items()
            for layer in range(NUM_LAYERS)
        ]
        self.config = OptimizerConfig(grad_clip=None, ema=0.9 if "ema" in kind else None)
        self.steps, self.arenas = 0, dict[str, Arena]()
        first = DiskStore(self.run, self.layouts, {})
        self.run.write_plan({"schema": 1, "recipe": {"method": "end_to_end"}})
        self.run.begin()
        for key, layout in self.layouts.items():
            self.arenas[key] = Arena(layout, aligned_buffer(layout.total_bytes))
            generator = torch.Generator().manual_seed(len(self.arenas))
            for view in parameter_views(layout, self.arenas[key].weights).values():
                view.copy_(torch.randn(view.shape, generator=generator))
            first.write(key, self.arenas[key].buffer, 0)
        first.close()
        self.state = RunState(files=first.files)
        self.run.commit(self.state)

    def step(self) -> optim.Step:
        rounding = optim.Rounding(self.steps, DEVICE.torch)
        return optim.Step(self.steps, 1e-2, self.config, rounding)

    def grads(self, key: str) -> Tensor:
        """Of the step that is made now, zero in the padding."""
        flat = torch.zeros(self.layouts[key].numel)
        generator = torch.Generator().manual_seed(100 * self.steps + int(key[-1]))
        for view in parameter_views(self.layouts[key], flat).values():
            view.copy_(torch.randn(view.shape, generator=generator))
        return flat

    def make_step_in_arenas(self) -> None:
        for key, arena in self.arenas.items():
            optim.update(arena, self.grads(key), self.step())

    def holds(self, unit: int, weights: list[Tensor]) -> bool:
        """Whether these are the unit's weights as they are in its arena."""
        whole = parameter_views(self.layouts[self.units[unit].key], self.arenas[self.units[unit].key].weights)
        return all(torch.equal(view, whole[name]) for name, view in self.units[unit].views(weights).items())

    def written_whole(self, folder: Path, visits_done: int) -> dict[str, FileRecord]:
        """Records of files that hold the arenas, written a whole block at a time."""
        folder.mkdir(exist_ok=True)
        store = DiskStore(RunDir(folder), self.layouts, {})
        for key, arena in self.arenas.items():
            store.write(key, arena.buffer, visits_done)
        store.close()
        return store.files


@contextmanager
def opened(
    setting: Setting,
    in_ram: bool = False,
    stay: frozenset[int] = frozenset(),
    prefetch: bool = True,
    paces: tuple[Pace, Pace] | None = None,
    in_place: bool = True,
    held: frozenset[int] = frozenset(),
) -> Iterator[UnitStream]:
    disk = DiskStore(setting.run, setting.layouts, setting.state.files, paces=paces)
    store: Store = HostStore(disk) if in_ram else disk
    stream = UnitStream(store, setting.units, DEVICE, stay, prefetch, in_place=in_place, held=held - stay)
    try:
        yield stream
    finally:
        soon(stream.close)
        store.close()


def soon(call: Callable[[], object], *may_raise: type[Exception]) -> None:
    """Fails if the call does not return, or raise what it may."""

    def called() -> None:
        with contextlib.suppress(*may_raise):
            call()

    thread = threading.Thread(target=called, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it hangs"


def begin_update(
    setting: Setting, stream: UnitStream, unit: int, visits_done: int, durable: bool, norm: Tensor
) -> None:
    grads = setting.grads(setting.units[unit].key)
    stream.update(Update(unit, grads.__getitem__, setting.step(), visits_done, durable, norm, lambda: None))


def make_step(setting: Setting, stream: UnitStream, visits_done: int, durable: bool) -> float:
    """A step as the trainer makes it, with a look at all weights. Returns the norm of durable weights."""
    norm = torch.zeros(())
    setting.steps += 1
    for unit in range(NUM_UNITS - 1):
        weights = stream.load(unit)
        stream.prefetch(unit + 1)
        assert setting.holds(unit, weights)
        stream.advance()
        stream.release(unit)
    for unit in reversed(range(NUM_UNITS)):
        weights = stream.load(unit)
        if unit:
            stream.prefetch(unit - 1)
        assert setting.holds(unit, weights)
        stream.release(unit, update_follows=True)
        begin_update(setting, stream, unit, visits_done, durable, norm)
    setting.make_step_in_arenas()
    if durable:
        stream.finish()
    return float(norm)


def commit(setting: Setting, stream: UnitStream, visits_done: int) -> None:
    files = {key: file.result() for key, file in stream.take_written().items()}
    assert set(files) == set(setting.layouts)
    setting.state = RunState(visits_done=visits_done, files=files)
    setting.run.commit(setting.state)


# ------------------------------------------------------------------------------------------------------------
# Bits


@every_store
@every_stay
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "in chunks"])
@pytest.mark.parametrize(
    ("kind", "prefetch"), [("adamw", True), ("adamw", False), ("adamw8bit-ema-bf16", True)]
)
def test_files_and_digests_are_those_of_whole_arenas_updated_at_once(
    tmp_path: Path, in_ram: bool, stay: frozenset[int], kind: str, prefetch: bool, in_place: bool
) -> None:
    setting = Setting(tmp_path / "run", kind)
    with opened(setting, in_ram, stay, prefetch, in_place=in_place) as stream:
        for visit, durable in [(1, False), (1, False), (1, True), (2, True), (3, False), (3, True)]:
            make_step(setting, stream, visit, durable)
            if not durable:
                continue
            commit(setting, stream, visit)
            expected = setting.written_whole(tmp_path / f"whole-{visit}", visit)
            for key, record in setting.state.files.items():
                whole = expected[key]
                assert record.digest == whole.digest and record.header == whole.header
                content = (setting.folder / record.name).read_bytes()
                assert content == (tmp_path / f"whole-{visit}" / whole.name).read_bytes()
                assert record.num_bytes == len(content)


@every_store
@every_held
@pytest.mark.parametrize("stay", [STAYS["none"], frozenset({0, 4})], ids=["none", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_weights_alone_stay_files_are_the_same_and_the_run_goes_on_from_them(
    tmp_path: Path, in_ram: bool, held: frozenset[int], stay: frozenset[int], kind: str
) -> None:
    setting = Setting(tmp_path / "run", kind)
    for visit in (1, 2):
        with opened(setting, in_ram, stay, held=held) as stream:
            for durable in (False, False, True):
                make_step(setting, stream, visit, durable)
            commit(setting, stream, visit)
        expected = setting.written_whole(tmp_path / f"whole-{visit}", visit)
        assert all(record.digest == expected[key].digest for key, record in setting.state.files.items())


@every_stay
def test_the_norm_of_a_durable_step_is_that_of_all_updated_weights(
    tmp_path: Path, stay: frozenset[int]
) -> None:
    setting = Setting(tmp_path)
    with opened(setting, stay=stay) as stream:
        assert make_step(setting, stream, 1, durable=False) == 0
        norm = make_step(setting, stream, 1, durable=True)
    whole = torch.cat([arena.weights for arena in setting.arenas.values()])
    assert norm == pytest.approx(float(optim.gradient_norm(whole)), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_that_chunks_fill_together_is_written_once_and_not_read_before(
    tmp_path: Path, kind: str
) -> None:
    setting = Setting(tmp_path, kind)
    with opened(setting) as stream:
        make_step(setting, stream, 1, durable=False)
        stream.finish()
        setting.steps += 1
        unit, before = setting.units[4], stream.store.traffic()
        stream.load(4)
        stream.release(4, update_follows=True)
        begin_update(setting, stream, 4, 1, False, torch.zeros(()))
        stream.finish()
        after = stream.store.traffic()
    state = [field.pages for _, chunk in unit.chunks() for field in chunk.held(with_weights=False)]
    weights = [piece.field("weights").pages for piece in unit.pieces]
    edges, patched = (a + b for a, b in zip(edge_pages(state), edge_pages(weights), strict=True))
    whole = sum(pages.whole.stop - pages.whole.start for pages in [*state, *weights])
    assert patched < edges < sum(len(pages.edges) for pages in [*state, *weights])
    assert after.disk_written_bytes - before.disk_written_bytes == whole + PAGE * edges
    fetched = unit.weights_bytes + sum(pages.num_bytes for pages in state)
    assert after.disk_read_bytes - before.disk_read_bytes == fetched + PAGE * patched


@every_store
@every_stay
def test_a_run_goes_on_from_files_that_units_have_written(
    tmp_path: Path, in_ram: bool, stay: frozenset[int]
) -> None:
    setting = Setting(tmp_path)
    for visit in (1, 2):
        with opened(setting, in_ram, stay) as stream:
            make_step(setting, stream, visit, durable=False)
            make_step(setting, stream, visit, durable=True)
            commit(setting, stream, visit)
    assert (
        setting.written_whole(tmp_path / "whole", 2)["block-1"].digest
        == setting.state.files["block-1"].digest
    )


@every_store
@every_stay
def test_an_update_that_is_not_durable_leaves_the_committed_files_and_is_seen_by_the_next_read(
    tmp_path: Path, in_ram: bool, stay: frozenset[int]
) -> None:
    setting = Setting(tmp_path)
    before = {record.name: (tmp_path / record.name).read_bytes() for record in setting.state.files.values()}
    with opened(setting, in_ram, stay) as stream:
        make_step(setting, stream, 1, durable=False)
        for unit in range(NUM_UNITS):
            assert setting.holds(unit, stream.load(unit))
            stream.release(unit)
        stream.finish()
        assert stream.take_written() == {}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@every_store
def test_a_unit_loaded_while_it_is_written_has_its_newest_weights(tmp_path: Path, in_ram: bool) -> None:
    setting, slow = Setting(tmp_path), Pace(4e6)
    with opened(setting, in_ram, paces=(Pace(), slow)) as stream:
        for durable in (False, True):
            setting.steps += 1
            for unit in reversed(range(NUM_LAYERS)):
                stream.load(unit)
                stream.release(unit, update_follows=True)
                begin_update(setting, stream, unit, 1, durable, torch.zeros(()))
            setting.make_step_in_arenas()
            stream.prefetch(0)
            assert setting.holds(0, stream.load(0))
            stream.release(0)


# ------------------------------------------------------------------------------------------------------------
# Buffers


@pytest.mark.parametrize(
    ("in_place", "held"),
    [(False, HELD["none"]), *((True, held) for held in HELD.values())],
    ids=["in chunks", *(f"in place, {name} held" for name in HELD)],
)
@pytest.mark.parametrize("prefetch", [True, False])
@every_stay
def test_no_more_buffers_are_made_than_the_plan_counts(
    tmp_path: Path,
    stay: frozenset[int],
    prefetch: bool,
    in_place: bool,
    held: frozenset[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[int]()

    def counted(device: Device, num_bytes: int) -> Tensor:
        made.append(num_bytes)
        return device_buffer(device, num_bytes)

    monkeypatch.setattr(unit_stream, "device_buffer", counted)
    setting, held = Setting(tmp_path), held - stay
    with opened(setting, stay=stay, prefetch=prefetch, in_place=in_place, held=held) as stream:
        for visit, durable in [(1, False), (1, True), (2, True)]:
            make_step(setting, stream, visit, durable)
    moving = [unit for index, unit in enumerate(setting.units) if index not in stay | held]
    updated = [unit for index, unit in enumerate(setting.units) if index not in stay]
    expected = [piece.num_bytes() for index in stay for piece in setting.units[index].pieces]
    expected += [setting.units[index].weights_bytes for index in held]
    if moving:
        slots = num_weights_slots(prefetch, len(moving))
        expected += [max(unit.weights_bytes for unit in moving)] * slots
    if updated:
        expected += [unit_stream.chunk_bytes(updated, in_place)] * CHUNKS
    assert sorted(made) == sorted(expected)
    counted = unit_stream.unit_bytes(setting.units, stay, prefetch, True, in_place, None, held)
    assert sum(made) == sum(counted)


def test_a_chunks_buffer_is_free_only_when_its_write_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, written, given = Setting(tmp_path), set[int](), list[bool]()
    with opened(setting) as stream:
        write, give = stream.store.write_pages, stream._chunks.give

        def slowly(key: str, parts: list[tuple[Pages, Tensor]], more: bool) -> None:
            time.sleep(0.002)
            write(key, parts, more)
            written.add(parts[0][1].data_ptr())

        def recorded(buffer: Tensor, mark: Mark = None) -> None:
            given.append(buffer.data_ptr() in written)
            written.discard(buffer.data_ptr())
            give(buffer)

        monkeypatch.setattr(stream.store, "write_pages", slowly)
        monkeypatch.setattr(stream._chunks, "give", recorded)
        make_step(setting, stream, 1, durable=True)
        commit(setting, stream, 1)
    chunks = sum(1 for unit in setting.units for _ in unit.chunks())
    assert given == [True] * chunks


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "in chunks"])
def test_an_update_goes_on_while_compute_only_advances(tmp_path: Path, in_place: bool) -> None:
    setting = Setting(tmp_path)
    with opened(setting, in_place=in_place) as stream:
        setting.steps += 1
        stream.load(0)
        stream.release(0, update_follows=True)
        used = threading.Event()
        grads = setting.grads("block-0")
        stream.update(Update(0, grads.__getitem__, setting.step(), 1, False, torch.zeros(()), used.set))
        deadline = time.monotonic() + 30
        while stream._waiting and time.monotonic() < deadline:
            stream.advance()
        assert not stream._waiting and used.is_set()


# ------------------------------------------------------------------------------------------------------------
# Errors


def failing(monkeypatch: pytest.MonkeyPatch, way: str, number: int, code: int) -> list[int]:
    """The request of that number, and all later ones of its way, fail. Returns how many were made."""
    real, made, lock = getattr(ChunkRequests, way), [0], threading.Lock()

    def request(self: ChunkRequests, path: Path, position: int, chunk: Tensor) -> None:
        with lock:
            made[0] += 1
            fails = made[0] > number
        if fails:
            raise OSError(code, os.strerror(code))
        real(self, path, position, chunk)

    monkeypatch.setattr(ChunkRequests, way, request)
    return made


def durable_step(setting: Setting, stream: UnitStream) -> None:
    make_step(setting, stream, 1, durable=False)
    make_step(setting, stream, 1, durable=True)
    for file in stream.take_written().values():
        file.result()


@every_store
@pytest.mark.parametrize("stay", [STAYS["none"], STAYS["some"]], ids=["none", "some"])
@pytest.mark.parametrize(("way", "code"), [("read", errno.EIO), ("write", errno.ENOSPC)])
def test_an_error_of_any_request_is_a_store_error_of_this_and_later_calls_and_hangs_nothing(
    tmp_path: Path, in_ram: bool, stay: frozenset[int], way: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path / "whole")
    with opened(setting, in_ram, stay) as stream, monkeypatch.context() as patch:
        made = failing(patch, way, 10**9, code)
        durable_step(setting, stream)
    before = set(threading.enumerate())
    assert made[0] > 10
    for number in range(0, made[0] - 2, max(1, made[0] // 6)):
        setting = Setting(tmp_path / str(number))
        with opened(setting, in_ram, stay) as stream, monkeypatch.context() as patch:
            failing(patch, way, number, code)
            with pytest.raises(StoreError, match=os.strerror(code)):
                durable_step(setting, stream)
            for call in (stream.advance, stream.finish):
                soon(call, StoreError)
    assert set(threading.enumerate()) == before


@every_stay
def test_an_update_that_has_failed_is_met_by_every_later_call_and_its_file_is_removed(
    tmp_path: Path, stay: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path)
    with opened(setting, stay=stay) as stream:
        setting.steps += 1
        for unit in range(NUM_UNITS):
            stream.load(unit)
            stream.release(unit, update_follows=unit > 3)
        failing(monkeypatch, "write", 2, errno.ENOSPC)
        with pytest.raises(StoreError, match="No space left"):  # noqa: PT012
            for unit in (5, 4):
                begin_update(setting, stream, unit, 1, True, torch.zeros(()))
            stream.finish()
        for call in (stream.advance, stream.finish, lambda: stream.load(5), lambda: stream.load(4)):
            with pytest.raises(StoreError, match="No space left"):
                call()
        assert stream.take_written() == {}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        record.name for record in setting.state.files.values()
    }


def test_a_failed_prefetch_reaches_the_load_and_costs_no_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path)
    with opened(setting) as stream:
        stream.load(0)
        with monkeypatch.context() as patch:
            failing(patch, "read", 0, errno.EIO)
            stream.prefetch(1)
            with pytest.raises(StoreError, match="block-0000"):
                stream.load(1)
        stream.prefetch(2)  # the buffer is free again
        assert setting.holds(2, stream.load(2))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:-4096]
    elif how == "other header":
        content[20] ^= 1
    else:
        content[len(content) // 3 if how == "flipped weight" else len(content) - 5000] ^= 1
    path.write_bytes(content)


@every_store
@pytest.mark.parametrize("stay", [STAYS["none"], STAYS["all"]], ids=["none", "all"])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("flipped weight", "its data differ"),
        ("flipped moment", "its data differ"),
        ("truncated", "expected [0-9]+ bytes, found"),
        ("other header", "its header is not"),
    ],
)
def test_a_file_that_differs_from_its_record_is_refused_before_any_row_is_used(
    tmp_path: Path, in_ram: bool, stay: frozenset[int], how: str, told: str
) -> None:
    setting = Setting(tmp_path)
    damage(tmp_path / setting.state.files["block-0"].name, how)
    used = list[slice]()

    def grads(rows: slice) -> Tensor:
        used.append(rows)
        return torch.zeros(rows.stop - rows.start)

    with opened(setting, in_ram, stay) as stream:
        stream.prefetch(0)
        with pytest.raises(StoreError, match=f"block-0000.*{told}"):
            stream.load(0)
    with opened(setting, in_ram, stay, in_place=False) as stream:
        setting.steps += 1
        with pytest.raises(StoreError, match=f"block-0000.*{told}"):  # noqa: PT012
            stream.update(Update(0, grads, setting.step(), 1, True, torch.zeros(()), lambda: None))
            stream.finish()
    assert used == []


# ------------------------------------------------------------------------------------------------------------
# Commits


@every_store
@every_stay
def test_a_record_is_available_only_when_its_file_is_on_the_disk(
    tmp_path: Path, in_ram: bool, stay: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, asked, may = Setting(tmp_path), threading.Event(), threading.Event()
    real, synced = os.fsync, set[str]()

    def fsync(handle: int) -> None:
        inode = os.fstat(handle).st_ino
        name = next(path.name for path in tmp_path.iterdir() if path.stat().st_ino == inode)
        if name.startswith("block-0000"):  # the last one that is written
            asked.set()
            assert may.wait(30)
        real(handle)
        synced.add(name)

    with opened(setting, in_ram, stay) as stream:
        monkeypatch.setattr(os, "fsync", fsync)
        make_step(setting, stream, 1, durable=True)
        files = stream.take_written()
        assert asked.wait(30)
        time.sleep(0.02)
        assert len(files) == NUM_BLOCKS and not files["block-0"].done()
        may.set()
        for file in files.values():
            assert file.result().name in synced


@every_store
def test_files_of_the_next_visit_survive_the_commit_of_the_last_and_go_at_the_next_start(
    tmp_path: Path, in_ram: bool
) -> None:
    setting = Setting(tmp_path / "run")
    with opened(setting, in_ram) as stream:
        make_step(setting, stream, 1, durable=True)
        files = stream.take_written()
        make_step(setting, stream, 2, durable=False)
        stream.finish()
        state = RunState(visits_done=1, files={key: file.result() for key, file in files.items()})
        setting.run.commit(state)
        make_step(setting, stream, 2, durable=True)
        commit(setting, stream, 2)
        expected = setting.written_whole(tmp_path / "whole", 2)
        assert all(expected[key].digest == record.digest for key, record in setting.state.files.items())
        make_step(setting, stream, 3, durable=False)
        stream.finish()

    def names() -> set[str]:
        return {path.name for path in setting.folder.glob("*.safetensors")}

    for key in setting.layouts:  # as a kill leaves it
        (setting.folder / setting.run.file_name(key, 3)).write_bytes(b"torn")
    begun = RunDir(setting.folder)
    found = begun.read_state()
    assert found == setting.state
    begun.remove_leftovers(found)
    assert names() == {record.name for each in (state, setting.state) for record in each.files.values()}


@every_store
def test_close_writes_the_files_that_a_commit_waits_for_to_their_end(
    tmp_path: Path, in_ram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path / "run")
    with opened(setting, in_ram) as stream:
        submit = stream._writer.submit

        def behind(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
            """The writer has other work yet when a file is to be ended."""
            if call == stream.store.end:
                submit(time.sleep, 0.05)
            return submit(call, *arguments)

        monkeypatch.setattr(stream._writer, "submit", behind)
        make_step(setting, stream, 1, durable=True)
        files: dict[str, Future[FileRecord]] = stream.take_written()
        assert not files["block-0"].done()
        stream.close()
        expected = setting.written_whole(tmp_path / "whole", 1)
        assert all(file.result().digest == expected[key].digest for key, file in files.items())


# ------------------------------------------------------------------------------------------------------------
# The end


@every_store
@every_stay
@pytest.mark.parametrize("advances", [0, 1, 40])
def test_close_in_the_middle_of_updates_ends_every_thread_and_frees_the_memory(
    tmp_path: Path,
    in_ram: bool,
    stay: frozenset[int],
    advances: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[weakref.ref[Any]]()

    def recorded(device: Device, num_bytes: int) -> Tensor:
        buffer = device_buffer(device, num_bytes)
        made.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    monkeypatch.setattr(unit_stream, "device_buffer", recorded)
    setting, before = Setting(tmp_path), set(threading.enumerate())
    gc.disable()  # at once, not when the collector comes
    try:
        with opened(setting, in_ram, stay, paces=(Pace(2e7), Pace(2e7))) as stream:
            make_step(setting, stream, 1, durable=False)
            stream.load(0)
            stream.prefetch(1)
            stream.release(0)
            for unit in (5, 4, 3):
                stream.load(unit)
                stream.release(unit, update_follows=True)
                begin_update(setting, stream, unit, 1, True, torch.zeros(()))
            for _ in range(advances):
                stream.advance()
            assert any(held() is not None for held in made)
        assert [held for held in made if held() is not None] == []
    finally:
        gc.enable()
    assert set(threading.enumerate()) == before
