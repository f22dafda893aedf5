"""Every kind of data: one registry, batches as functions of (seed, step), what a section says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from conftest import batches_digest, recipe_with, text_of

from lowmem.data import config
from lowmem.data.cache import digest, file_facts
from lowmem.data.config import DataConfig, ImageSource, TextConfig
from lowmem.data.datasets import DataSection, DataSpec, describe_data, load_data
from lowmem.data.images import ImageSet
from lowmem.errors import ConfigError
from lowmem.recipe import Recipe

KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> the module with its section, and the keys it needs
    "digits": ("digits", {}),
    "idx_images": ("idx", {"path": "folder"}),
    "npz_images": ("npz", {"path": "file.npz"}),
    "image_folder": ("folder", {"path": "folder", "image_size": 8}),
    "latent_arrays": ("latents", {"path": "folder"}),
    "stdlib_text": ("text", {}),
    "text": ("text", {"path": "file.txt"}),
    "pointer_chasing": ("pointers", {}),
    "huggingface images": ("huggingface", {"kind": "images", "dataset": "known", "image_size": 8}),
    "huggingface text": ("huggingface", {"kind": "text", "dataset": "known"}),
    "custom": ("config", {}),
    "chat": ("chat", {"path": "file.jsonl", "tokenizer": "folder"}),
}


def section(kind: str, **keys: Any) -> DataSection:
    return recipe_with(data={"name": kind.split()[0], **KINDS[kind][1], **keys}).data


def sections(annotation: Any = DataConfig) -> list[type[DataSection]]:
    """The members of the union, the inner union's too."""
    parts = get_args(annotation)
    return [annotation] if isinstance(annotation, type) else [cls for part in parts for cls in sections(part)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_chooses_the_section_of_its_own_kind(kind: str) -> None:
    found = section(kind)
    assert (found.name, type(found).__module__) == (kind.split()[0], f"lowmem.data.{KINDS[kind][0]}")  # type: ignore[attr-defined]


def test_every_kind_in_the_registry_is_among_those_tested_here_and_can_be_imported_from_it() -> None:
    assert sorted(cls.__name__ for cls in sections()) == sorted(
        type(section(kind)).__name__ for kind in KINDS
    )
    assert {cls.__name__ for cls in sections()} < set(config.__all__)


def test_a_kind_of_images_needs_only_its_own_section_and_reader() -> None:
    class Ramp(ImageSource):
        name: Literal["ramp"]
        count: int

        def _open(self) -> ImageSet:
            labels = np.arange(self.count) % 2
            part = {"image": np.full((self.count, 1, 2, 2), 255, np.uint8), "label": labels}
            return ImageSet((1, 2, 2), 2, lambda: (part, part), lambda mark: mark.fact(self.count))

    ramp = Ramp(name="ramp", count=6)
    assert describe_data(ramp) == DataSpec(image_shape=(1, 2, 2), num_classes=2)
    batch = load_data(ramp).batch(0, 0, 4)
    assert (batch["image"] == 1).all() and batch["image"].dtype == np.float32 and batch["label"].shape == (4,)


def test_the_registry_imports_no_package_that_only_one_kind_needs() -> None:
    heavy = ("torch", "PIL", "sklearn", "datasets", "tokenizers")
    code = f"import sys, lowmem.data.config; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("name", ["digits", "text"])
def test_a_batch_is_a_function_of_seed_and_step(name: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 20)
    recipe: Recipe = recipe_with()
    if name == "text":
        recipe = recipe_with(data={"name": "text", "path": str(path)}, train__seq_len=16)
    data, other = load_data(*text_of(recipe)), load_data(*text_of(recipe))
    for step in (0, 7, 100):
        other.batch(3, step + 1, 5)  # what was drawn before does not matter
        assert batches_digest([data.batch(3, step, 8)]) == batches_digest([other.batch(3, step, 8)])
    assert len({batches_digest([data.batch(seed, step, 8)]) for seed in (0, 1) for step in (0, 1)}) == 4


def test_the_digits_are_what_they_were() -> None:
    data = load_data(recipe_with().data)
    batches = (data.batch(seed, step, 64) for seed in (0, 1) for step in (0, 22, 500))
    assert batches_digest(batches) == "aa82984d8007754b2cfe807affc142e2aab5a5edd3f227ee007330155c53ffd6"
    test = batches_digest(data.test_batches(100))
    assert test == "1631bf92d02fa4b7f559a26e66b79347ae3175d5213c9deae8a30b6f7b2c8255"


@pytest.mark.parametrize(
    ("kind", "keys", "unit"),
    [
        ("stdlib_text", {}, "char"),
        ("text", {}, "char"),
        ("text", {"tokenizer": "characters"}, "char"),
        ("text", {"tokenizer": "words.json"}, "token"),
        ("huggingface text", {"tokenizer": "words.json"}, "token"),
        ("huggingface text", {"tokenizer": "bytes"}, "char"),
        ("custom", {}, "token"),
    ],
)
def test_a_token_counts_as_a_character_only_if_the_tokenizer_makes_it_one(
    kind: str, keys: dict[str, str], unit: str
) -> None:
    found = section(kind, **keys)
    assert found.metric_unit == unit and isinstance(found, TextConfig) == (kind != "custom")


def test_only_latents_are_no_pictures() -> None:
    assert [kind for kind in KINDS if not section(kind).decoded] == ["latent_arrays"]


def test_custom_data_come_from_python_alone() -> None:
    for use in (describe_data, load_data):
        with pytest.raises(ConfigError, match="'custom' data are given from Python: Trainer"):
            use(section("custom"))


@pytest.mark.parametrize("change", ["size", "time", "path"])
def test_another_size_time_or_path_of_a_file_is_another_digest(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    before, stat = digest(file_facts([path])), path.stat()
    if change == "size":
        path.write_bytes(b"12345")
    path = path.rename(tmp_path / "b") if change == "path" else path
    later = 10**9 * (change == "time")
    _set_time(path, stat.st_mtime_ns + later)
    assert digest(file_facts([path])) != before
    path = path.rename(tmp_path / "a")
    path.write_bytes(b"1234")
    _set_time(path, stat.st_mtime_ns)
    assert digest(file_facts([path])) == before


def _set_time(path: Path, time_ns: int) -> None:
    os.utime(path, ns=(time_ns, time_ns))
