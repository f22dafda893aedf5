"""Images in MNIST's format: read whole, kept as bytes, dealt once an epoch. A bad file is named."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import batches_digest, data_refusal, recipe_with

from lowmem.data.datasets import DataSpec, describe_data, load_data
from lowmem.recipe import Recipe
from lowmem.units import MIB


def idx_recipe(folder: Path, **keys: Any) -> Recipe:
    return recipe_with(data={"name": "idx_images", "path": str(folder), **keys})


def idx(array: np.ndarray[Any, Any]) -> bytes:
    return (
        struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """50 + 20 images of 4 x 6 pixels in 5 classes; the training images are compressed.

    Image n is full of the value n.
    """
    for name, count in {"train": 50, "t10k": 20}.items():
        images = np.arange(count)[:, None, None].repeat(4, 1).repeat(6, 2)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 5))
    plain = tmp_path / "train-images-idx3-ubyte"
    plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return tmp_path


def test_a_batch_of_images_is_a_function_of_seed_and_step(idx_folder: Path) -> None:
    data, other = load_data(idx_recipe(idx_folder).data), load_data(idx_recipe(idx_folder).data)
    for step in (0, 7, 100):
        other.batch(3, step + 1, 5)  # what was drawn before does not matter
        assert batches_digest([data.batch(3, step, 8)]) == batches_digest([other.batch(3, step, 8)])
    assert len({batches_digest([data.batch(seed, step, 8)]) for seed in (0, 1) for step in (0, 1)}) == 4


def test_idx_images_are_read_and_each_appears_once_an_epoch(idx_folder: Path) -> None:
    recipe = idx_recipe(idx_folder)
    spec = describe_data(recipe.data, recipe.train.seq_len)
    assert spec == DataSpec(image_shape=(1, 4, 6), num_classes=5) and spec.host_bytes == 70 * 4 * 6
    data = load_data(recipe.data, recipe.train.seq_len)
    assert (data.num_train, data.num_test) == (50, 20)
    for epoch in (0, 1):
        batches = [data.batch(0, 5 * epoch + step, 10) for step in range(5)]
        images, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label"))
        values = np.rint((images[:, 0, 0, 0] + 1) * 127.5).astype(int)
        assert sorted(values) == list(range(50)) and (labels == values % 5).all()
    test = list(data.test_batches(8))
    assert [len(batch["label"]) for batch in test] == [8, 8, 4]
    assert (
        test[0]["image"].shape == (8, 1, 4, 6)
        and test[0]["image"].dtype == np.float32
        and test[0]["label"].dtype == np.int64
    )


def test_images_are_scaled_to_minus_one_to_one(idx_folder: Path) -> None:
    images = np.tile(np.array([0, 255, 51], np.uint8), 40).reshape(20, 3, 2)
    for name, count in {"train": 50, "t10k": 20}.items():
        for old in idx_folder.glob(f"{name}-images*"):
            old.unlink()
        (idx_folder / f"{name}-images-idx3-ubyte").write_bytes(idx(np.resize(images, (count, 3, 2))))
    image = next(load_data(idx_recipe(idx_folder).data).test_batches(20))["image"]
    assert np.allclose(np.unique(image), [-1, -0.6, 1]) and image.min() == -1 and image.max() == 1


PIXELS = np.zeros((20, 4, 6), np.uint8)
LABELS = np.arange(20) % 5


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "t10k-images-idx3-ubyte",
            None,
            "no file t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz in the folder",
        ),
        ("t10k-labels-idx1-ubyte", None, "no file t10k-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", b"", "found 0 bytes; allowed: at least the header's 16"),
        ("t10k-images-idx3-ubyte", idx(LABELS), "magic number 2049; expected 2051"),
        ("t10k-labels-idx1-ubyte", idx(PIXELS), "magic number 2051; expected 2049"),
        ("t10k-images-idx3-ubyte", idx(PIXELS)[:-1], "479 bytes after the header; expected 480 = 20 x 4 x 6"),
        ("t10k-images-idx3-ubyte", idx(PIXELS) + b"0", "481 bytes after the header; expected 480"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((20, 6, 4))), "images of 6 x 4 pixels; allowed: 4 x 6"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((0, 4, 6))), "header says 0 x 4 x 6"),
        ("t10k-images-idx3-ubyte", idx(PIXELS[1:]), "20 labels for 19 images"),
        ("t10k-labels-idx1-ubyte", idx(LABELS + 1), "found label 5; allowed: 0 to 4"),
        ("train-labels-idx1-ubyte", idx(np.arange(50) % 5 * 2), "labels up to 8, but none is 1"),
        ("train-images-idx3-ubyte.gz", b"no gzip at all, but text", "not readable to its end"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (50, 4, 6))))[:-40],
            "not readable to its end",
        ),
    ],
)
def test_a_bad_idx_file_is_refused(idx_folder: Path, name: str, content: bytes | None, words: str) -> None:
    (idx_folder / name).unlink()
    if content is not None:
        (idx_folder / name).write_bytes(content)
    text = data_refusal(idx_recipe(idx_folder))
    assert words in text and str(idx_folder) in text


@pytest.mark.parametrize("test_name", ["t10k", "test"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_usual_other_names_are_found_too(idx_folder: Path, test_name: str, ending: str) -> None:
    for path in list(idx_folder.iterdir()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        name = path.name.removesuffix(".gz").replace("-idx", ".idx").replace("t10k", test_name)
        (idx_folder / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)
        path.unlink()
    data = load_data(idx_recipe(idx_folder).data)
    assert (data.num_train, data.num_test) == (50, 20)


def test_a_refusal_lists_what_lies_there(idx_folder: Path) -> None:
    (idx_folder / "t10k-images-idx3-ubyte").rename(idx_folder / "images.bin")
    assert "found: images.bin, t10k-labels-idx1-ubyte, train-images-idx3-ubyte.gz" in data_refusal(
        idx_recipe(idx_folder)
    )


def bomb(header: bytes, num_bytes: int) -> bytes:
    """A gzip file of a header and of far more zeros than it says."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb") as packed:
        packed.write(header)
        for _ in range(num_bytes // MIB):
            packed.write(bytes(MIB))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "header", "words"),
    [
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x801, 20), "more than 20 bytes after the header"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x801, 64 * MIB), "67108864 labels for 20 images"),
        (
            "t10k-images-idx3-ubyte",
            struct.pack(">4I", 0x803, 20, 4, 6),
            "more than 480 bytes after the header",
        ),
        ("t10k-images-idx3-ubyte", struct.pack(">4I", 0x803, 2**31, 2**31, 9), "cannot hold 2147483648 x"),
    ],
)
def test_no_more_is_unpacked_than_a_header_declares(
    idx_folder: Path, name: str, header: bytes, words: str
) -> None:
    (idx_folder / name).unlink()
    (idx_folder / f"{name}.gz").write_bytes(bomb(header, 64 * MIB))
    load_data(recipe_with().data)  # modules are loaded
    tracemalloc.start()
    try:
        assert words in data_refusal(idx_recipe(idx_folder))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB
