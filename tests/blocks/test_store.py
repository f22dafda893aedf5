"""Round trips, damage and a full disk, for blocks on disk and blocks also kept in RAM."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor

from lowmem.blocks import staging
from lowmem.blocks.arena import ArenaLayout, aligned_buffer
from lowmem.blocks.block_file import ChunkRequests
from lowmem.blocks.run_dir import RunDir
from lowmem.blocks.staging import Pace, Ring
from lowmem.blocks.store import DiskStore, HostStore, Store
from lowmem.blocks.traffic import Traffic
from lowmem.errors import StoreError
from lowmem.machine.device import CPU
from lowmem.units import PAGE

LAYOUTS = {
    "block-0": ArenaLayout([("weight", (70, 61)), ("bias", (70,))], "adamw8bit"),
    "shared": ArenaLayout([("table", (10, 8))], "adamw"),
}
OTHER_NAMES = {**LAYOUTS, "block-0": ArenaLayout([("other", (70, 61)), ("bias", (70,))], "adamw8bit")}

# Of `block-0`: the data are two whole chunks and a shorter one; none of them is as long as the header.
CHUNK, REST = 12288, 8192
Opens = Callable[..., Store]


def open_disk(*given: Any, **named: Any) -> Store:
    return DiskStore(*given, **named)


def open_host(*given: Any, **named: Any) -> Store:
    return HostStore(DiskStore(*given, **named))


pytestmark = pytest.mark.parametrize("opens", [open_disk, open_host])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LAYOUTS["block-0"].total_bytes == 2 * CHUNK + REST
    monkeypatch.setattr(staging, "CHUNK_BYTES", CHUNK)


def random_buffer(key: str, seed: int = 0) -> Tensor:
    buffer = aligned_buffer(LAYOUTS[key].total_bytes)
    return buffer.copy_(
        torch.randint(0, 256, buffer.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    )


def read(store: Store, key: str) -> Tensor:
    buffer = aligned_buffer(LAYOUTS[key].total_bytes)
    store.read(key, buffer)
    return buffer


def written(opens: Opens, folder: Path) -> tuple[Store, Path]:
    """A store opened in a folder where `block-0` was written by an earlier one, and the path of its file."""
    first = opens(RunDir(folder), LAYOUTS, {})
    record = first.write("block-0", random_buffer("block-0"), 7)
    return opens(RunDir(folder), LAYOUTS, first.files), folder / record.name


def test_bytes_written_are_the_bytes_read_by_this_store_and_by_the_next(opens: Opens, tmp_path: Path) -> None:
    store = opens(RunDir(tmp_path), LAYOUTS, {})
    for seed, key in enumerate(LAYOUTS):
        store.write(key, random_buffer(key, seed), 3)
    for reader in (store, opens(RunDir(tmp_path), LAYOUTS, store.files)):
        for seed, key in enumerate(LAYOUTS):
            assert torch.equal(read(reader, key), random_buffer(key, seed))


def test_the_record_names_the_file_its_size_and_counts_the_traffic(opens: Opens, tmp_path: Path) -> None:
    store, path = written(opens, tmp_path)
    record = store.files["block-0"]
    assert (record.name, record.num_bytes) == ("block-0000.000007.safetensors", path.stat().st_size)
    read(store, "block-0")
    assert store.traffic() == Traffic(disk_read_bytes=record.num_bytes)
    store.write("block-0", random_buffer("block-0"), 8)
    assert store.traffic().disk_written_bytes == record.num_bytes


def test_a_new_version_is_read_back_and_the_old_file_is_left_alone(opens: Opens, tmp_path: Path) -> None:
    store, path = written(opens, tmp_path)
    read(store, "block-0")
    before = path.read_bytes()
    store.write("block-0", random_buffer("block-0", seed=5), 8)
    assert torch.equal(read(store, "block-0"), random_buffer("block-0", seed=5))
    assert path.read_bytes() == before


def test_only_a_host_store_reads_a_second_time_without_the_disk(opens: Opens, tmp_path: Path) -> None:
    store, path = written(opens, tmp_path)
    first, before = read(store, "block-0"), store.traffic()
    first.zero_()  # the caller trains in its buffer: the copy in RAM must be another one
    again = read(store, "block-0")
    assert torch.equal(again, random_buffer("block-0"))
    assert (store.traffic() == before) == (opens is open_host)
    path.unlink()
    if opens is open_host:
        assert torch.equal(read(store, "block-0"), again)
    else:
        with pytest.raises(StoreError, match="No such file"):
            read(store, "block-0")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def truncate_odd(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def flip_header_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


DAMAGES = {
    truncate: "expected",
    truncate_odd: "expected",
    empty: "found 0 bytes",
    flip_last_byte: "data differ",
    flip_header_byte: "header is not",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(
    opens: Opens, tmp_path: Path, damage: object
) -> None:
    store, path = written(opens, tmp_path)
    size = path.stat().st_size
    damage(path)  # type: ignore[operator]
    damaged = path.read_bytes()
    for _ in range(2):  # a second read does not take the first one's bytes for good
        with pytest.raises(StoreError, match=DAMAGES[damage]) as caught:  # type: ignore[index]
            read(store, "block-0")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if len(damaged) != size:
        assert f"expected {size} bytes, found {len(damaged)} bytes" in str(caught.value)
    assert path.read_bytes() == damaged


def test_a_file_of_another_layout_is_refused(opens: Opens, tmp_path: Path) -> None:
    store, path = written(opens, tmp_path)
    other = opens(RunDir(tmp_path), OTHER_NAMES, store.files)
    with pytest.raises(StoreError, match="header is not that of this run's block") as caught:
        read(other, "block-0")
    assert path.name in str(caught.value)


@pytest.mark.parametrize("in_its_place", ["nothing", "a folder"])
def test_a_missing_file_is_refused_in_one_line(opens: Opens, tmp_path: Path, in_its_place: str) -> None:
    store, path = written(opens, tmp_path)
    path.unlink()
    if in_its_place == "a folder":
        path.mkdir()
    with pytest.raises(StoreError, match="the last commit is kept") as caught:
        read(store, "block-0")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_where_direct_io_is_refused_the_same_bytes_go_through_the_page_cache(
    opens: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.open, []

    def without_direct(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            refused.append(name)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", without_direct)
    store, path = written(opens, tmp_path)
    assert torch.equal(read(store, "block-0"), random_buffer("block-0"))
    assert refused == [str(path)] * 2, "one refusal is enough for each store"
    assert store.facts() == {"past_page_cache": False}
    monkeypatch.setattr(os, "open", real)
    assert torch.equal(
        read(opens(RunDir(tmp_path), LAYOUTS, store.files), "block-0"), random_buffer("block-0")
    )


@pytest.mark.parametrize("refused", ["readinto", "write"])
def test_where_the_first_direct_request_is_refused_the_same_bytes_go_through_the_page_cache(
    opens: Opens, tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network and overlay file systems do: the open succeeds, the request fails."""
    requests: list[bool] = []

    class Refusing(io.FileIO):
        def _refuse(self) -> None:
            direct = bool(fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT)
            requests.append(direct)
            if direct:
                raise OSError(errno.EINVAL, "Invalid argument")

        def readinto(self, buffer: object) -> int:  # type: ignore[override]
            if refused == "readinto":
                self._refuse()
            return super().readinto(buffer)  # type: ignore[arg-type]

        def write(self, data: object) -> int:  # type: ignore[override]
            if refused == "write":
                self._refuse()
            return super().write(data)  # type: ignore[arg-type]

    monkeypatch.setattr(io, "FileIO", Refusing)
    store, _ = written(opens, tmp_path)
    assert torch.equal(read(store, "block-0"), random_buffer("block-0"))
    assert requests[0] and not requests[-1]
    monkeypatch.setattr(io, "FileIO", Refusing.__base__)
    assert torch.equal(
        read(opens(RunDir(tmp_path), LAYOUTS, store.files), "block-0"), random_buffer("block-0")
    )


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs")
def test_a_run_folder_in_memory_holds_the_same_bytes(opens: Opens) -> None:
    """tmpfs: no O_DIRECT in many kernels."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        store, path = written(opens, Path(folder))
        assert torch.equal(read(store, "block-0"), random_buffer("block-0"))
        flip_last_byte(path)
        with pytest.raises(StoreError, match="data differ"):
            read(opens(RunDir(folder), LAYOUTS, store.files), "block-0")


def test_a_block_whose_bytes_did_not_change_keeps_its_file(opens: Opens, tmp_path: Path) -> None:
    store = opens(RunDir(tmp_path), LAYOUTS, {})
    first = store.write("block-0", random_buffer("block-0"), 1)
    assert store.write("block-0", random_buffer("block-0"), 2) == first
    assert store.traffic().disk_written_bytes == first.num_bytes and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("changed", [0, CHUNK, -1], ids=["first chunk", "second chunk", "last chunk"])
def test_a_block_with_one_changed_byte_gets_a_new_file(opens: Opens, tmp_path: Path, changed: int) -> None:
    store = opens(RunDir(tmp_path), LAYOUTS, {})
    first = store.write("block-0", random_buffer("block-0"), 1)
    buffer = random_buffer("block-0")
    buffer[changed] ^= 1
    newer = store.write("block-0", buffer, 2)
    assert newer.name != first.name and newer.digest != first.digest
    assert torch.equal(read(opens(RunDir(tmp_path), LAYOUTS, store.files), "block-0"), buffer)


def test_a_read_of_the_weights_alone_does_not_vouch_for_the_rest(opens: Opens, tmp_path: Path) -> None:
    store, path = written(opens, tmp_path)
    flip_last_byte(path)
    with contextlib.suppress(StoreError):  # a store in RAM reads the whole block, and finds it at once
        store.read("block-0", aligned_buffer(PAGE))
    with pytest.raises(StoreError, match="data differ"):
        read(store, "block-0")


def test_the_digest_is_that_of_the_chunks_digests(opens: Opens, tmp_path: Path) -> None:
    store, path = written(opens, tmp_path)
    data = path.read_bytes()[len(LAYOUTS["block-0"].header()) :]
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    assert len(chunks) > 2
    assert (
        store.files["block-0"].digest
        == hashlib.sha256(b"".join(xxhash.xxh3_128_digest(chunk) for chunk in chunks)).hexdigest()
    )


def test_a_paced_disk_takes_at_least_its_time(opens: Opens, tmp_path: Path) -> None:
    rate = 10 * LAYOUTS["block-0"].total_bytes  # a tenth of a second
    store = opens(RunDir(tmp_path), LAYOUTS, {}, paces=(Pace(rate), Pace(rate)))
    store.write("block-0", random_buffer("block-0"), 1)
    assert store.transfer_s().disk_written_s >= 0.1
    fresh = opens(RunDir(tmp_path), LAYOUTS, store.files, paces=(Pace(rate), Pace(rate)))
    assert torch.equal(read(fresh, "block-0"), random_buffer("block-0"))
    assert fresh.transfer_s().disk_read_s >= 0.1


def test_bytes_pass_a_ring_of_a_few_chunks_both_ways(opens: Opens, tmp_path: Path) -> None:
    size = LAYOUTS["block-0"].total_bytes
    ring = Ring(CPU, size)
    store = opens(RunDir(tmp_path), LAYOUTS, {}, ring)
    store.write("block-0", random_buffer("block-0"), 1)
    # The copy in RAM is memory of the ring's device here, so it passes as well.
    out = size * (2 if opens is open_host else 1)
    assert ring.traffic() == Traffic(device_to_host_bytes=out)
    assert torch.equal(read(store, "block-0"), random_buffer("block-0"))
    assert ring.traffic() == Traffic(host_to_device_bytes=size, device_to_host_bytes=out)


class Short(io.FileIO):
    """Moves half of each request of `length` bytes without an error, as a system without room may."""

    length = 0

    def readinto(self, buffer: Any) -> int:  # type: ignore[override]
        return super().readinto(self._half(buffer))

    def write(self, data: Any) -> int:  # type: ignore[override]
        return super().write(self._half(data))

    def _half(self, data: memoryview) -> memoryview:
        return data[: len(data) // 2] if len(data) == self.length else data


@pytest.mark.parametrize("length", [CHUNK, REST], ids=["a whole chunk", "the last one"])
def test_a_request_that_reads_less_than_it_should_is_refused(
    opens: Opens, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of the weights alone, which no digest checks."""
    store, path = written(opens, tmp_path)
    monkeypatch.setattr(Short, "length", length)
    monkeypatch.setattr(io, "FileIO", Short)
    with pytest.raises(StoreError, match=f"moved {length // 2} of {length} bytes in one request") as caught:
        store.read("block-0", aligned_buffer(CHUNK + REST))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [CHUNK, REST], ids=["a whole chunk", "the last one"])
def test_a_request_that_writes_less_than_it_should_is_refused_and_leaves_no_file(
    opens: Opens, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = written(opens, tmp_path)
    record = store.files["block-0"]
    monkeypatch.setattr(Short, "length", length)
    monkeypatch.setattr(io, "FileIO", Short)
    with pytest.raises(StoreError, match=f"moved {length // 2} of {length} bytes in one request"):
        store.write("block-0", random_buffer("block-0", seed=5), 8)
    assert list(tmp_path.iterdir()) == [path] and store.files["block-0"] == record


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_nothing_that_lies_where_a_new_file_belongs_is_overwritten(
    opens: Opens, tmp_path: Path, kind: str
) -> None:
    store, _ = written(opens, tmp_path)
    theirs, place = tmp_path / "theirs", tmp_path / "block-0000.000008.safetensors"
    theirs.write_bytes(b"theirs")
    if kind == "a link":
        place.symlink_to(theirs)
    else:
        theirs.rename(place)
    with pytest.raises(StoreError, match="File exists"):
        store.write("block-0", random_buffer("block-0", seed=5), 8)
    assert place.read_bytes() == b"theirs"


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a device"])
def test_a_block_that_is_no_file_is_refused_at_once(opens: Opens, tmp_path: Path, kind: str) -> None:
    store, path = written(opens, tmp_path)
    path.rename(tmp_path / "elsewhere")
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("elsewhere" if kind == "a link" else "/dev/zero")
    with pytest.raises(StoreError, match="allowed: a regular file"):
        store.read("block-0", aligned_buffer(CHUNK + REST))


@pytest.mark.parametrize(
    "cause", ["no space", "too large at once", "too large between chunks", "too large in the last chunk"]
)
def test_a_write_that_does_not_fit_is_one_line_and_the_old_file_still_counts(
    opens: Opens, tmp_path: Path, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = written(opens, tmp_path)
    record = store.files["block-0"]
    if cause == "no space":
        monkeypatch.setattr(ChunkRequests, "write", no_space)
    limit = {
        "no space": resource.RLIM_INFINITY,
        "too large at once": 4096,
        "too large between chunks": 4096 + CHUNK,
        "too large in the last chunk": record.num_bytes - 2048,  # the system then writes a part of it
    }[cause]
    with largest_file(limit), pytest.raises(StoreError, match="block-0000.000008.safetensors") as caught:
        store.write("block-0", random_buffer("block-0", seed=5), 8)
    assert "\n" not in str(caught.value)
    assert store.files["block-0"] == record
    assert torch.equal(
        read(opens(RunDir(tmp_path), LAYOUTS, store.files), "block-0"), random_buffer("block-0")
    )
