"""Latents: mapped from their files, scaled, and refused in one line.

A generator of latents trains, is evaluated, and gives latents back.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_overrides, data_refusal, recipe_with

from lowmem.data.datasets import DataSpec, describe_data, load_data
from lowmem.inference.evaluation import features
from lowmem.inference.generate import sample_run
from lowmem.job import plan_recipe, train
from lowmem.recipe import Recipe
from lowmem.reporting.report import read_report
from lowmem.units import MIB

ARRAYS = {
    "train_latents": np.random.default_rng(0).normal(0, 5.5, (40, 4, 4, 4)).astype(np.float16),
    "train_labels": np.arange(40) % 5,
    "test_latents": np.random.default_rng(1).normal(0, 5.5, (20, 4, 4, 4)).astype(np.float16),
    "test_labels": np.arange(20) % 5,
}


def latent_recipe(folder: Path, **keys: Any) -> Recipe:
    return recipe_with(data={"name": "latent_arrays", "path": str(folder), **keys})


def save(folder: Path, **arrays: Any) -> Path:
    for name, array in {**ARRAYS, **arrays}.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4"])
def test_latents_are_scaled_to_about_unit_variance_in_float32(tmp_path: Path, dtype: str) -> None:
    save(tmp_path, train_latents=ARRAYS["train_latents"].astype(dtype))
    assert describe_data(latent_recipe(tmp_path).data) == DataSpec(image_shape=(4, 4, 4), num_classes=5)
    data = load_data(latent_recipe(tmp_path).data)
    epoch, order = data.batch(2, 0, 40), np.random.default_rng([2, 0]).permutation(40)
    assert (
        epoch["image"].dtype == np.float32
        and epoch["label"].dtype == np.int64
        and epoch["image"].flags.c_contiguous
    )
    assert (epoch["image"] == ARRAYS["train_latents"][order].astype(np.float32) * np.float32(0.18215)).all()
    assert (epoch["label"] == order % 5).all() and 0.9 < epoch["image"].std() < 1.1
    assert [len(batch["label"]) for batch in data.test_batches(8)] == [8, 8, 4]
    plain = load_data(latent_recipe(tmp_path, scale=1.0).data).batch(2, 0, 40)["image"]
    assert (plain == ARRAYS["train_latents"][order]).all()


def test_latents_are_mapped_and_not_held_in_memory(tmp_path: Path) -> None:
    count = 32 * MIB // (4 * 16 * 16 * 2)
    labels = np.arange(count) % 5
    save(
        tmp_path,
        train_labels=labels,
        test_latents=np.zeros((5, 4, 16, 16), np.float16),
        test_labels=labels[:5],
    )
    np.lib.format.open_memmap(
        tmp_path / "train_latents.npy", mode="w+", dtype=np.float16, shape=(count, 4, 16, 16)
    ).flush()
    tracemalloc.start()
    try:
        data = load_data(latent_recipe(tmp_path).data)
        for step in range(count // 64):
            data.batch(0, step, 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * MIB


def test_declared_latents_are_enough_to_plan_and_must_agree(tmp_path: Path) -> None:
    declared = latent_recipe(tmp_path / "nowhere", image_shape=[4, 32, 32], num_classes=1000)
    assert describe_data(declared.data, declared.train.seq_len) == DataSpec(
        image_shape=(4, 32, 32), num_classes=1000
    )
    assert "no file train_latents.npy in the folder" in data_refusal(declared)
    save(tmp_path)
    assert "found 4 x 4 x 4 (channels x height x width); allowed: 4 x 32 x 32, as declared" in data_refusal(
        latent_recipe(tmp_path, image_shape=[4, 32, 32], num_classes=5)
    )


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("test_latents", None, "no file test_latents.npy in the folder"),
        ("train_labels", None, "no file train_labels.npy in the folder"),
        (
            "train_latents",
            ARRAYS["train_latents"].astype(np.float64),
            "found float64 [40, 4, 4, 4]; allowed: float16 or float32",
        ),
        ("train_latents", ARRAYS["train_latents"].astype(np.uint8), "found uint8 [40, 4, 4, 4]"),
        ("train_latents", ARRAYS["train_latents"][0], "found float16 [4, 4, 4]"),
        ("train_latents", np.array([None]), "not readable as .npy"),  # a pickle
        (
            "test_latents",
            ARRAYS["test_latents"][:, :3],
            "found 3 x 4 x 4 (channels x height x width); allowed: 4 x 4 x 4",
        ),
        ("test_latents", ARRAYS["test_latents"][:19], "20 labels for 19 images"),
        ("test_latents", b"no array at all, but text", "not readable as .npy"),
        ("train_labels", ARRAYS["train_labels"].astype(float), "labels are float64 [40]; allowed: integers"),
        ("test_labels", np.full(20, 5), "found label 5; allowed: 0 to 4"),
    ],
)
def test_bad_latents_are_refused(tmp_path: Path, name: str, array: Any, words: str) -> None:
    path = save(tmp_path) / f"{name}.npy"
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    text = data_refusal(latent_recipe(tmp_path))
    assert words in text and str(tmp_path) in text


def test_a_torn_file_and_an_archive_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path) / "train_latents.npy"
    path.write_bytes(path.read_bytes()[:-7])
    assert "train_latents.npy: not readable as .npy" in data_refusal(latent_recipe(tmp_path))
    with open(path, "wb") as file:
        np.savez(file, **ARRAYS)
    assert "train_latents.npy: not readable as .npy (the magic string is not correct" in data_refusal(
        latent_recipe(tmp_path)
    )


def test_a_generator_of_latents_is_planned_without_them_trained_evaluated_and_gives_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "FEATURE_STEPS", 2)
    data = {"name": "latent_arrays", "path": str(save(tmp_path)), "image_shape": [4, 4, 4], "num_classes": 5}
    quick = as_overrides(
        train__num_steps=2,
        train__batch_size=8,
        train__warmup_steps=0,
        blocks__visit_steps=2,
        model__num_layers=3,
        model__dim=32,
    )
    quick += ["eval.num_samples=10", "eval.num_steps=3"]
    absent = [*quick, f"data={ {**data, 'path': str(tmp_path / 'nowhere')} }"]
    assert plan_recipe("digits-dit", "cpu-4gib", absent).fits
    folder = train("digits-dit", "cpu-4gib", tmp_path / "run", [*quick, f"data={data}"])
    assert read_report(folder).content["metrics"]["metric"] == "frechet"
    made = np.load(sample_run(folder, num=10), allow_pickle=False)
    assert made.shape == (10, 4, 4, 4) and made.dtype == np.float32
    assert np.abs(made * 0.18215).max() > 1, "latents have no range to keep to"


def test_a_header_that_declares_too_much_takes_no_memory(tmp_path: Path) -> None:
    path = save(tmp_path) / "train_latents.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little"))
    with open(path, "r+b") as file:
        file.truncate(2**32)
    assert "a header of 2147483648 bytes" in data_refusal(latent_recipe(tmp_path))
    save(tmp_path)
    labels = np.lib.format.open_memmap(
        tmp_path / "train_labels.npy", mode="w+", dtype=np.uint8, shape=(2**28,)
    )
    del labels
    assert "268435456 labels; allowed: at most" in data_refusal(latent_recipe(tmp_path))
