"""Images in a NumPy archive: arrays or encoded files, held once in memory. A bad archive is named."""

from __future__ import annotations

import io
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import batches_digest, data_refusal, recipe_with
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from lowmem.data.datasets import DataSpec, describe_data, load_data
from lowmem.errors import DataError
from lowmem.job import plan_recipe, train
from lowmem.recipe import Recipe
from lowmem.units import MIB

TRAIN, TEST = 30, 12
NOISE = np.random.default_rng(0)
LABELS = {"train_labels": np.arange(TRAIN) % 3, "test_labels": np.arange(TEST, dtype=np.uint8) % 3}


def npz_recipe(path: Path, **keys: Any) -> Recipe:
    return recipe_with(data={"name": "npz_images", "path": str(path), **keys})


def pixels(*shape: int) -> np.ndarray[Any, Any]:
    return NOISE.integers(0, 256, shape, np.uint8)


def encode(image: np.ndarray[Any, Any], form: str = "PNG") -> bytes:
    """[H, W, 3] or [H, W]."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=form)
    return file.getvalue()


def encoded(part: str, files: Sequence[bytes]) -> dict[str, Any]:
    """With N + 1 offsets."""
    offsets = np.cumsum([0, *map(len, files)])
    return {f"{part}_jpeg": np.frombuffer(b"".join(files), np.uint8), f"{part}_offsets": offsets}


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{**LABELS, **arrays})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.npz"


COLOURS = {"train": pixels(TRAIN, 5, 4, 3), "test": pixels(TEST, 5, 4, 3)}


FORMS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {  # of an array [N, H, W, 3]
    "channels last": lambda images: images,
    "channels first": lambda images: images.transpose(0, 3, 1, 2),
    "grey": lambda images: images[..., 0],
    "grey, channel last": lambda images: images[..., :1],
    "grey, channel first": lambda images: images[:, None, :, :, 0],
}


@pytest.mark.parametrize("form", [*FORMS, "PNG", "PNG without the end", "compressed", "grey PNG"])
def test_archives_of_every_form_give_their_pixels(path: Path, form: str) -> None:
    images = COLOURS if "grey" not in form else {part: found[..., 0] for part, found in COLOURS.items()}
    arrays: dict[str, Any] = {}
    for part, found in COLOURS.items():
        if "PNG" in form:
            arrays |= encoded(part, [encode(image) for image in images[part]])
            arrays[f"{part}_offsets"] = arrays[f"{part}_offsets"][: -1 if "without" in form else None]
        else:
            arrays[f"{part}_images"] = FORMS.get(form, FORMS["channels last"])(found)
    (np.savez_compressed if form == "compressed" else np.savez)(path, **LABELS, **arrays)
    expected = {
        part: found.transpose(0, 3, 1, 2) if found.ndim == 4 else found[:, None]
        for part, found in images.items()
    }

    held_bytes = sum(found.nbytes for name, found in arrays.items() if name.endswith(("_images", "_jpeg")))
    spec = describe_data(npz_recipe(path).data)
    assert (
        spec == DataSpec(image_shape=expected["train"].shape[1:], num_classes=3)
        and spec.host_bytes == held_bytes
    )
    data = load_data(npz_recipe(path).data)
    test = list(data.test_batches(5))
    assert [len(batch["label"]) for batch in test] == [5, 5, 2]
    assert all(batch["image"].dtype == np.float32 and batch["label"].dtype == np.int64 for batch in test)
    assert all(batch["image"].flags.c_contiguous for batch in test)
    assert np.allclose(
        np.concatenate([batch["image"] for batch in test]), expected["test"] / 127.5 - 1, atol=1e-6
    )
    assert np.concatenate([batch["label"] for batch in test]).tolist() == LABELS["test_labels"].tolist()
    epoch = data.batch(1, 0, TRAIN)
    order = np.random.default_rng([1, 0]).permutation(TRAIN)
    assert np.allclose(epoch["image"], expected["train"][order] / 127.5 - 1, atol=1e-6)
    assert (epoch["label"] == LABELS["train_labels"][order]).all()


def test_a_batch_of_encoded_images_is_a_function_of_seed_and_step(path: Path) -> None:
    save(
        path,
        **{
            name: array
            for part, found in COLOURS.items()
            for name, array in encoded(part, [encode(i, "JPEG") for i in found]).items()
        },
    )
    data, other = load_data(npz_recipe(path).data), load_data(npz_recipe(path).data)
    for step in (0, 7, 100):
        other.batch(3, step + 1, 5)
        assert batches_digest([data.batch(3, step, 8)]) == batches_digest([other.batch(3, step, 8)])


def test_a_shuffled_set_is_held_in_memory_once(path: Path) -> None:
    count = 8 * MIB // (32 * 32 * 3)
    labels = np.arange(count) % 3
    save(
        path,
        train_images=np.zeros((count, 32, 32, 3), np.uint8),
        train_labels=labels,
        test_images=np.zeros((3, 32, 32, 3), np.uint8),
        test_labels=labels[:3],
    )
    tracemalloc.start()
    try:
        data = load_data(npz_recipe(path).data)
        for step in range(2 * count // 64):  # two epochs, each of another order
            data.batch(0, step, 64)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 8 * MIB - 4096 < held < 8.5 * MIB and peak < 10 * MIB


def test_encoded_images_stay_encoded_in_memory(path: Path) -> None:
    plain = encode(np.zeros((128, 128, 3), np.uint8))  # some hundred bytes for 48 KiB of pixels
    labels = np.arange(300) % 3
    save(
        path,
        **encoded("train", [plain] * 300),
        **encoded("test", [plain] * 3),
        train_labels=labels,
        test_labels=labels[:3],
    )
    load_data(npz_recipe(path).data).batch(0, 0, 1)  # Pillow's own modules are loaded
    tracemalloc.start()
    try:
        data = load_data(npz_recipe(path).data)
        for step in range(30):
            data.batch(0, step, 10)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1 * MIB and peak < 6 * MIB < 300 * 128 * 128 * 3


# ------------------------------------------------------------------------------------------------------------
# what is declared


def test_declared_shapes_are_enough_to_plan_without_the_data(path: Path) -> None:
    declared = npz_recipe(path, image_shape=[3, 8, 8], num_classes=7)
    assert describe_data(declared.data, declared.train.seq_len) == DataSpec(
        image_shape=(3, 8, 8), num_classes=7
    )
    with pytest.raises(DataError, match="No such file"):
        load_data(declared.data, declared.train.seq_len)
    with pytest.raises(DataError, match="No such file"):
        describe_data(npz_recipe(path, num_classes=7).data)


def test_a_run_without_its_declared_data_is_planned_and_refused_with_nothing_written(
    path: Path, tmp_path: Path
) -> None:
    data = {"name": "npz_images", "path": str(path), "image_shape": [3, 8, 8], "num_classes": 7}
    assert plan_recipe("digits-vit", "cpu-4gib", [f"data={data}"]).fits
    with pytest.raises(DataError, match="No such file"):
        train("digits-vit", "cpu-4gib", tmp_path / "run", [f"data={data}"])
    assert list(tmp_path.iterdir()) == []


def test_what_is_declared_must_be_what_is_found(path: Path) -> None:
    save(path, train_images=COLOURS["train"], test_images=COLOURS["test"])
    assert load_data(npz_recipe(path, image_shape=[3, 5, 4], num_classes=3).data).num_train == TRAIN
    text = data_refusal(npz_recipe(path, image_shape=[3, 4, 5], num_classes=3))
    assert (
        "data.image_shape: found 3 x 5 x 4 (channels x height x width); allowed: 3 x 4 x 5, as declared"
        in text
    )
    assert "data.num_classes: found 3 classes; allowed: 4, as declared" in data_refusal(
        npz_recipe(path, num_classes=4)
    )


# ------------------------------------------------------------------------------------------------------------
# what is refused


PIXELS = {"train_images": COLOURS["train"], "test_images": COLOURS["test"]}
FILES = {part: [encode(image) for image in found] for part, found in COLOURS.items()}


def with_files(**changes: Any) -> dict[str, Any]:
    return {**encoded("train", FILES["train"]), **encoded("test", FILES["test"]), **changes}


def refused(**arrays: Any) -> dict[str, Any]:
    return {name: array for name, array in {**PIXELS, **arrays}.items() if array is not None}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (refused(train_labels=np.zeros(TRAIN)), "train_labels: labels are float64 [30]; allowed: integers"),
        (refused(train_labels=np.zeros((TRAIN, 3), int)), "train_labels: labels are int64 [30, 3]"),
        (refused(test_labels=np.full(TEST, 3)), "test_labels: found label 3; allowed: 0 to 2"),
        (refused(test_labels=np.full(TEST, -1)), "test_labels: found label -1; allowed: 0 and above"),
        (refused(train_labels=np.arange(TRAIN) % 3 * 2), "labels up to 4, but none is 1"),
        (refused(train_labels=np.full(TRAIN, 2**40)), "labels up to 1099511627776, but none is 0"),
        (refused(test_labels=np.zeros(TEST + 1, int)), "13 labels for 12 images"),
        (
            refused(train_labels=np.zeros(0, int), train_images=COLOURS["train"][:0]),
            "no image in the train part",
        ),
        (refused(test_images=None), "no array test_images; found: train_labels, test_labels, train_images"),
        (
            refused(test_images=COLOURS["test"][:, :4]),
            "test images: found 3 x 4 x 4 (channels x height x width); allowed: 3 x 5 x 4",
        ),
        (refused(test_images=COLOURS["test"][..., 0]), "test images: found 1 x 5 x 4"),
        (
            refused(train_images=COLOURS["train"].astype(np.float32)),
            "train_images is float32 [30, 5, 4, 3]; allowed: uint8",
        ),
        (refused(train_images=pixels(TRAIN, 5, 4, 2)), "train_images is uint8 [30, 5, 4, 2]; allowed"),
        (
            refused(train_images=pixels(TRAIN, 3, 4, 3)),
            "train_images is uint8 [30, 3, 4, 3]; allowed",
        ),  # which axis has the channels?
        (refused(train_images=pixels(TRAIN, 0, 4)), "train_images is uint8 [30, 0, 4]; allowed"),
        (
            refused(train_images=np.array([b"image", None] * 15, object)),
            "train_images holds Python objects (pickle)",
        ),
        (
            refused(train_labels=np.array([1, None] * 15, object)),
            "train_labels holds Python objects (pickle)",
        ),
        (with_files(test_offsets=np.arange(TEST + 1)), "test_offsets does not say where each image begins"),
        (with_files(test_offsets=np.zeros(TEST + 1)), "with test_offsets float64 [13]; allowed"),
        (with_files(test_jpeg=np.zeros((2, 2), np.uint8)), "test_jpeg is uint8 [2, 2]"),
        (
            encoded("test", [encode(COLOURS["test"][0])] * (TEST + 1)) | {"train_images": COLOURS["train"]},
            "12 labels for 13 images",
        ),
        (
            encoded("test", [b"no image"] * TEST) | {"train_images": COLOURS["train"]},
            "test image 0: not readable as an image",
        ),
        (
            encoded("test", [encode(COLOURS["test"][0, ..., 0].astype(np.uint16))] * TEST)
            | {"train_images": COLOURS["train"]},
            "mode I;16",
        ),
    ],
)
def test_a_bad_archive_is_refused(path: Path, arrays: dict[str, Any], words: str) -> None:
    text = data_refusal(npz_recipe(save(path, **arrays)))
    assert words in text and str(path) in text


def test_images_and_classes_far_beyond_real_ones_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, labels = np.zeros((4, 1, 2**16 + 1), np.uint8), np.arange(4) % 2
    arrays = {"train_images": long, "train_labels": labels, "test_images": long, "test_labels": labels}
    text = data_refusal(npz_recipe(save(path, **arrays)))
    assert (
        text.startswith("data: found images of 1 x 1 x 65537 (channels") and "at most 65536 of each" in text
    )
    monkeypatch.setattr("lowmem.data.images.MOST_CLASSES", 1)
    short = {name: value[..., :8] if "images" in name else value for name, value in arrays.items()}
    assert "in 2 classes; allowed" in data_refusal(npz_recipe(save(path, **short)))


def test_what_is_no_whole_archive_is_refused(path: Path, tmp_path: Path) -> None:
    assert "No such file" in data_refusal(npz_recipe(path))
    path.write_bytes(b"")
    assert "not a NumPy archive" in data_refusal(npz_recipe(path))
    path.write_bytes(encode(COLOURS["test"][0]))
    assert "not a NumPy archive" in data_refusal(npz_recipe(path))
    whole = save(path, **PIXELS).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not readable as .npz" in data_refusal(npz_recipe(path))
    path.write_bytes(whole.replace(COLOURS["train"].tobytes(), bytes(COLOURS["train"].size)))
    assert "Bad CRC-32" in data_refusal(npz_recipe(path))
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(whole)) as source:
        for name in source.namelist():
            archive.writestr(name, source.read(name)[: -5 if name == "test_images.npy" else None])
    assert (
        f"test_images holds {COLOURS['test'].size - 5} bytes; expected {COLOURS['test'].size}"
        in data_refusal(npz_recipe(path))
    )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            encode(pixels(5, 5, 3)),
            "train image 7: found 3 x 5 x 5 (channels x height x width); "
            "allowed: 3 x 5 x 4, as the first image",
        ),
        (encode(pixels(5, 4)), "train image 7: found 1 x 5 x 4"),
        (FILES["train"][7][:50], "train image 7: not readable as an image"),
    ],
)
def test_an_encoded_image_of_another_kind_is_named_when_it_is_met(path: Path, bad: bytes, words: str) -> None:
    save(
        path,
        **encoded("train", [bad if i == 7 else file for i, file in enumerate(FILES["train"])]),
        **encoded("test", FILES["test"]),
    )
    data = load_data(npz_recipe(path).data)
    with pytest.raises(DataError) as caught:
        data.batch(0, 0, TRAIN)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_pillow_is_named_with_its_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'lowmem[data]'" in data_refusal(npz_recipe(save(path, **with_files())))
    assert load_data(npz_recipe(save(path, **PIXELS)).data).num_train == TRAIN


# ------------------------------------------------------------------------------------------------------------
# what would unpack to far more than it is


def member(path: Path, name: str, content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    """The archive of PIXELS with one member replaced."""
    whole = save(path, **PIXELS).read_bytes()
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(io.BytesIO(whole)) as source:
        for known in source.namelist():
            if known != f"{name}.npy":
                archive.writestr(known, source.read(known))
        archive.writestr(f"{name}.npy", content, kind)
    return path


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


BOMBS = {
    "labels that are no row": (npy(np.zeros((64, MIB), np.uint8)), "labels are uint8 [64, 1048576]"),
    "labels that are no integers": (npy(np.zeros(8 * MIB)), "labels are float64 [8388608]"),
    "a header of 64 MiB": (
        b"\x93NUMPY\x02\x00" + (64 * MIB).to_bytes(4, "little") + bytes(64 * MIB),
        "a header of 67108864 bytes; allowed: at most 65536",
    ),
    "a deeply nested header": (
        b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"-" * 9000,
        "not readable as .npz",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_too_large_is_refused_before_it_is_unpacked(path: Path, name: str) -> None:
    content, words = BOMBS[name]
    member(path, "train_labels", content)
    tracemalloc.start()
    try:
        assert words in data_refusal(npz_recipe(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB


def test_members_of_an_unbounded_packing_are_refused(path: Path) -> None:
    member(path, "train_labels", npy(LABELS["train_labels"]), zipfile.ZIP_BZIP2)
    assert "allowed: plain or DEFLATE" in data_refusal(npz_recipe(path))


def test_a_picture_of_another_size_is_refused_before_it_is_decoded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = encode(np.zeros((4000, 4000), np.uint8))
    files = [big if i == 7 else file for i, file in enumerate(FILES["train"])]
    save(path, **encoded("train", files), **encoded("test", FILES["test"]))
    data = load_data(npz_recipe(path).data)
    tracked: list[tuple[int, int]] = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda self: (tracked.append(self.size), load(self))[1])
    with pytest.raises(DataError, match="train image 7: found 1 x 4000 x 4000"):
        data.batch(0, 0, TRAIN)
    assert (4000, 4000) not in tracked


def test_a_transparent_colour_is_refused(path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 5)).save(file, "PNG", transparency=(0, 0, 0))
    save(path, **encoded("train", [file.getvalue()] * TRAIN), **encoded("test", FILES["test"]))
    assert "train image 0: a transparent colour" in data_refusal(npz_recipe(path))
