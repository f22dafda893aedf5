"""Files from anywhere: only regular ones are opened, what is read has a bound, what is written is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lowmem.errors import DataError, StoreError
from lowmem.files import json_lines, open_append, printable, read_bytes, read_json, write_whole


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_at_once_and_in_one_line(tmp_path: Path, kind: str) -> None:
    path, theirs = tmp_path / "state.json", tmp_path / "theirs"
    theirs.write_bytes(b"{}")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(theirs if kind == "link" else "/dev/zero")
    for use in (
        lambda: read_json(path, DataError),
        lambda: open_append(path, DataError),
        lambda: list(json_lines(path, DataError)),
    ):
        with pytest.raises(DataError, match="state.json") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert theirs.read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "too deep"),
        ('{"a": ' * 70 + "1" + "}" * 70, "too deep; allowed: 64 levels"),
        ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"a": 1e999}', "too large"),
        ('{"a": NaN}', "found NaN"),
        ('{"a": -Infinity}', "found -Infinity"),
        ("[]", "found list"),
        ("\x00", "not readable as JSON"),
    ],
)
def test_json_that_is_not_small_and_finite_is_refused_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(StoreError, match=said) as caught:
        read_json(path, StoreError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_that_is_larger_than_ours_can_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with open(path, "wb") as file:
        file.truncate(8 * 1024**3)  # sparse
    with pytest.raises(StoreError, match="found 8.00 GiB; allowed: 64.0 MiB"):
        read_json(path, StoreError)
    (tmp_path / "five").write_bytes(bytes(5))
    assert read_bytes(tmp_path / "five", 5, StoreError) == bytes(5)
    with pytest.raises(StoreError):
        read_bytes(tmp_path / "five", 4, StoreError)


def test_lines_that_hold_no_object_or_are_too_long_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a": 1}\n12\n{"a": NaN}\n\xff\n{"a": "' + b"x" * 3 * 1024**2 + b'"}\n{"a": 2}\n{"a"')
    assert list(json_lines(path, StoreError)) == [{"a": 1}, None, None, None, None, {"a": 2}, None]


def test_a_write_moves_only_what_is_on_the_disk_and_syncs_the_folder_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, move = os.fsync, os.replace

    def fsync(handle: int) -> None:
        folder = os.fstat(handle).st_ino == tmp_path.stat().st_ino
        events.append("sync folder" if folder else f"sync {os.fstat(handle).st_size} bytes")
        sync(handle)

    def replace(source: Path, target: Path) -> None:
        events.append("move")
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "state.json", b"new", StoreError)
    assert events == ["sync 3 bytes", "move", "sync folder"]
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_write_follows_no_link_of_its_name_and_takes_no_name_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, theirs = tmp_path / "state.json", tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    path.symlink_to(theirs)
    write_whole(path, b"new", StoreError)
    assert path.read_bytes() == b"new" and not path.is_symlink() and theirs.read_bytes() == b"theirs"
    monkeypatch.setattr("lowmem.files.secrets.token_hex", lambda _: "0" * 16)
    (tmp_path / f".state.json.-{'0' * 16}.tmp").symlink_to(theirs)
    with pytest.raises(StoreError, match="File exists"):
        write_whole(path, b"newer", StoreError)
    assert theirs.read_bytes() == b"theirs" and path.read_bytes() == b"new"


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")

    def fails(_: int) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreError, match=os.strerror(fault)):
        write_whole(path, b"new", StoreError)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.json"]


def test_a_name_is_shown_as_it_is_where_it_can_be() -> None:
    assert printable("tëxt 1.txt") == "tëxt 1.txt" and printable("a\0\x1b\n") == "a\\x00\\x1b\\n"
