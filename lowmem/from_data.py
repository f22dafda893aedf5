"""`lowmem init PATH` and `lowmem train PATH`: the recipe that a text or a folder of pictures makes.

What is found is looked at, not read: names of folders and files, and the sizes of a few pictures. The rest
comes from a packaged recipe, which says how such data are trained.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem.data.folder import some_pictures, sorted_classes
from lowmem.data.images import pillow
from lowmem.data.opening import open_file
from lowmem.errors import ConfigError
from lowmem.files import printable, write_whole
from lowmem.recipe import Recipe, recipe_from_dict, with_overrides
from lowmem.schema import expanded, find_file, names_in, read_yaml, yaml_text
from lowmem.units import counted, format_bytes

TEXT, SORTED, UNSORTED = "stdlib-causal-end-to-end", "fashion-vit-end-to-end", "fashion-dit-end-to-end"
ROWS = (".jsonl", ".csv", ".parquet")
SMALL, LARGE, PATCHES = 32, 64, 8  # sides of pictures as they are trained on, and patches along a side
LOOKED_AT = 32  # pictures whose size is read
LEAST_TEXT_BYTES = 4096
Made = tuple[dict[str, Any], list[str]]  # a recipe as YAML holds it, and what was found and guessed


def is_data(name: str) -> bool:
    """Whether a recipe's argument is a file or a folder of data, and no recipe."""
    path = Path(expanded(name, "PATH", ConfigError))
    return name not in names_in("recipes") and path.suffix not in (".yaml", ".yml") and path.exists()


def default_run_dir(path: str | os.PathLike[str]) -> Path:
    return Path("runs") / _name(Path(path))


def _name(path: Path) -> str:
    return path.resolve().stem if path.is_file() else path.resolve().name


def recipe_from_data(path: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """The recipe of a text file or of a folder of pictures, and lines about what was found and guessed.

    Raises ConfigError, and DataError where the data cannot be read.
    """
    raw, where, lines = raw_recipe(path, overrides)
    return recipe_from_dict(raw, where), lines


def raw_recipe(path: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str, list[str]]:
    """(The same recipe as YAML holds it, what a message about it begins with, the lines). Loads no torch."""
    found = Path(expanded(path, "PATH", ConfigError))
    if not found.exists():
        raise ConfigError(f"{printable(path)}: no such file or folder; give a text or a folder of pictures")
    raw, lines = _of_folder(found) if found.is_dir() else _of_file(found)
    return with_overrides(raw, overrides), f"recipe of {printable(path)}", lines


def recipe_text(recipe: Recipe, lines: Sequence[str]) -> str:
    """A recipe as YAML, with what was found and guessed as comments above it."""
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    raw = {"schema": 1, **raw, "model": {"name": recipe.model.name, **raw["model"]}}
    return "".join(f"# {printable(line)}\n" for line in lines) + yaml_text(raw)


def keep_recipe(folder: Path, text: str) -> None:
    """Writes `recipe.yaml` into a run that stands in `folder`."""
    write_whole(folder / "recipe.yaml", text.encode(), ConfigError, sync_folder=False)


def _packaged(name: str, data: dict[str, Any]) -> dict[str, Any]:
    raw = read_yaml(find_file(name, "recipes", "recipe", ConfigError), ConfigError)
    return {**raw, "data": data}


def _of_file(path: Path) -> Made:
    if path.suffix.lower() in ROWS:
        raise ConfigError(
            f"{printable(path)}: found a file of rows; a model is trained further on rows: "
            f"lowmem finetune MODEL-FOLDER {printable(path)}; allowed here: a text or a folder of pictures"
        )
    with open_file(path, printable(path), "give a text that can be read") as file:
        start, size = file.read(LEAST_TEXT_BYTES), path.stat().st_size
    if b"\0" in start or size < LEAST_TEXT_BYTES:
        found = "bytes of zero, so no text" if b"\0" in start else format_bytes(size)
        raise ConfigError(
            f"{printable(path)}: found {found}; allowed: a text of {format_bytes(LEAST_TEXT_BYTES)} or "
            "more, or a folder of pictures; give another"
        )
    raw = _packaged(TEXT, {"name": "text", "path": str(path), "tokenizer": "bytes"})
    return raw, [
        f"found: {printable(path)}, a text of {format_bytes(size)}",
        f"guessed: next bytes are learnt, by the model of {TEXT}; the last tenth is the test part",
    ]


def _of_folder(path: Path) -> Made:
    classes = sorted_classes(path)
    pictures = some_pictures(path, LOOKED_AT)
    if not pictures:
        raise ConfigError(f"{printable(path)}: found no picture in it; give a text or a folder of pictures")
    side = SMALL if statistics.median(map(_shorter_side, pictures)) < LARGE else LARGE
    data = {"name": "image_folder", "path": str(path), "image_size": side}
    raw = _packaged(SORTED if classes else UNSORTED, data if classes else {**data, "classes": "none"})
    raw["model"]["patch_size"] = side // PATCHES
    if classes:
        found = f"pictures in {counted(len(classes), 'folder')}, each taken for a class"
        task = f"the class is learnt, by the model of {SORTED}"
    else:
        found, task = "pictures in no class's folder", f"such pictures are drawn, by the model of {UNSORTED}"
    return raw, [
        f"found: {printable(path)}, {found}",
        f"guessed: {task}, at {side} x {side} pixels; a tenth is the test part where no test folder is",
    ]


def _shorter_side(path: Path) -> int:
    image = pillow("data.name: 'image_folder'")
    with open_file(path, printable(path), "remove it") as file:
        try:
            with image.open(file) as picture:
                return int(min(picture.size))
        except Exception:  # what it is will be said when it is trained on
            return LARGE
