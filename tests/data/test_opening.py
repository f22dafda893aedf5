"""Every path that cannot be read is one line: NUL, surrogates, too long, denied, a pipe, a device."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import data_refusal, recipe_with

from lowmem.data.opening import open_file
from lowmem.errors import DataError
from lowmem.recipe import Recipe

KINDS: dict[str, dict[str, Any]] = {
    "text": {"tokenizer": "bytes"},
    "idx_images": {},
    "npz_images": {},
    "image_folder": {"image_size": 8},
    "latent_arrays": {},
}


def recipe_of(kind: str, path: str) -> Recipe:
    return recipe_with(data={"name": kind, "path": path, **KINDS[kind]}, train__seq_len=8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["a\0b", "\ud800x", "n" * 5000, "a\x1b[2Jb", "line\nline"])
def test_a_path_that_no_file_can_have_is_one_short_line(kind: str, path: str) -> None:
    text = data_refusal(recipe_of(kind, path))
    assert text.startswith("data.path: ") and len(text) < 600 and text.isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_a_denied_path_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    recipe = recipe_of(kind, str(tmp_path / "locked"))
    with monkeypatch.context() as patch:
        for name in ("stat", "open", "scandir"):
            patch.setattr(os, name, deny)
        with pytest.raises(DataError) as caught:
            recipe.data.load(8, None, False)
    assert "Permission denied; give" in str(caught.value) and "locked" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("kind", ["text", "npz_images"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), os.devnull):
        assert "a pipe or a device, where a file should be" in data_refusal(recipe_of(kind, path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_pipes_within_a_folder_of_data_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    for name in ("t10k-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"")
    assert "a pipe or a device" in data_refusal(recipe_of("idx_images", str(tmp_path)))
    for part in ("train", "test"):
        (tmp_path / f"{part}_labels.npy").write_bytes(b"")
        os.mkfifo(tmp_path / f"{part}_latents.npy")
    assert "a pipe or a device" in data_refusal(recipe_of("latent_arrays", str(tmp_path)))


def test_a_file_is_read_and_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_file(tmp_path / name, "here", "mend") as file:
            assert file.read() == b"content"
    with pytest.raises(DataError, match="here: Is a directory; mend"):
        open_file(tmp_path, "here", "mend")
