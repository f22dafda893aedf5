"""A fingerprint follows what the data are, not where they lie. A very large file is hashed in part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_with
from PIL import Image

from lowmem.data import identity as data_identity
from lowmem.data.datasets import identify_data
from lowmem.data.identity import DataIdentity, Fingerprint
from lowmem.errors import DataError
from lowmem.units import MIB

PARTS = ("train", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def text(folder: Path, value: int = 0) -> dict[str, Any]:
    (folder / "text").write_text("abc"[value:] * 100)
    return {"name": "text", "path": str(folder / "text"), "tokenizer": "characters"}


def pictures(folder: Path, value: int = 0) -> dict[str, Any]:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (value,) * 3).save(folder / part / name / "1.bmp")  # of one size always
            os.utime(folder / part / name / "1.bmp", (value, value))
    return {"name": "image_folder", "path": str(folder), "image_size": 8}


def archive(folder: Path, value: int = 0) -> dict[str, Any]:
    images, labels = np.full((4, 2, 2), value, np.uint8), np.arange(4) % 2
    parts = {
        f"{part}_{key}": rows for part in PARTS for key, rows in (("images", images), ("labels", labels))
    }
    np.savez(folder / "a.npz", **parts)
    return {"name": "npz_images", "path": str(folder / "a.npz")}


def latents(folder: Path, value: int = 0) -> dict[str, Any]:
    for part in PARTS:
        np.save(folder / f"{part}_latents.npy", np.full((4, 2, 2, 2), value, np.float32))
        np.save(folder / f"{part}_labels.npy", np.arange(4) % 2)
    return {"name": "latent_arrays", "path": str(folder)}


def of(data: dict[str, Any]) -> DataIdentity:
    recipe = recipe_with(data=data, train__seq_len=8)
    return identify_data(recipe.data, recipe.train.seq_len)


@pytest.mark.parametrize("make", [text, pictures, archive, latents])
def test_data_that_moved_are_the_same_and_data_that_changed_are_others(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    data = make(tmp_path / "old")
    before = of(data)
    (tmp_path / "old").rename(tmp_path / "new")
    assert of({**data, "path": data["path"].replace("/old", "/new")}) == before
    shutil.copytree(tmp_path / "new", tmp_path / "old")  # with its times
    assert of(data) == before
    assert of(make(tmp_path / "old", 1)).fingerprint != before.fingerprint


def _digest(path: Path) -> str:
    mark = Fingerprint()
    mark.file("a", path)
    return mark.hexdigest()


def test_what_a_run_needs_to_be_read_is_kept(tmp_path: Path) -> None:
    assert of(text(tmp_path)).alphabet == ["a", "b", "c"]
    found = of(pictures(tmp_path / "images"))
    assert found.class_names == ["cat", "dog"] and (found.num_items, found.image_shape) == (4, [3, 8, 8])
    digits = of({"name": "digits"})
    assert (digits.num_items, digits.num_classes) == (1797, 10) and digits == of({"name": "digits"})
    parsed = DataIdentity.model_validate_json(found.model_dump_json())
    assert parsed == found


def test_of_a_very_large_file_the_ends_and_even_spots_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_identity, "END_BYTES", MIB)
    monkeypatch.setattr(data_identity, "SPOT_BYTES", 1024)
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    spans = list(data_identity._spans(1 << 40))
    assert sum(length for _, length in spans) == 2 * MIB + 64 * 1024 and len(spans) == 66
    starts, ends = [start for start, _ in spans], [start + length for start, length in spans]
    assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))
    before = _digest(path)
    for start, _ in (spans[0], spans[1], spans[40], spans[64], spans[65]):
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(b"x")
        changed = _digest(path)
        assert changed != before
        before = changed
    with open(path, "ab") as file:
        file.truncate((1 << 40) + 1)
    assert _digest(path) != before


def test_a_file_below_that_is_hashed_whole(tmp_path: Path) -> None:
    assert list(data_identity._spans(192 * MIB)) == [(0, 192 * MIB)]
    spans = list(data_identity._spans(192 * MIB + 1))
    assert len(spans) == 66 and sum(length for _, length in spans) == 192 * MIB


def test_a_picture_that_is_gone_or_a_pipe_is_named_at_the_start(tmp_path: Path) -> None:
    data = pictures(tmp_path)
    (tmp_path / "train" / "cat" / "2.png").symlink_to("nowhere")
    with pytest.raises(DataError, match="cat/2.png: No such file"):
        of(data)
    (tmp_path / "train" / "cat" / "2.png").unlink()
    os.mkfifo(tmp_path / "train" / "cat" / "2.png")
    with pytest.raises(DataError, match="cat/2.png: a pipe or a device"):
        of(data)


def test_bytes_that_moved_from_one_file_to_the_next_are_other_data(tmp_path: Path) -> None:
    def whole(first: bytes, second: bytes) -> str:
        mark = Fingerprint()
        for name, content in {"first": first, "second": second}.items():
            (tmp_path / name).write_bytes(content)
            mark.file("", tmp_path / name)
        return mark.hexdigest()

    assert whole(b"ab", b"c") == whole(b"ab", b"c") != whole(b"a", b"bc")
