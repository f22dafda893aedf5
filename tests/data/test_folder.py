"""Images in folders: classes by name, one split whatever is added, squares cut by the batch.

A bad folder is named in one line.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_overrides, batches_digest, data_refusal, recipe_with
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngImageFile

from lowmem import cli
from lowmem.data.datasets import DataSpec, describe_data, load_data
from lowmem.data.folder import in_test_part
from lowmem.data.images import square
from lowmem.errors import ConfigError, DataError
from lowmem.recipe import Recipe
from lowmem.reporting.telemetry import read_records

SIDE = 8


def folder_recipe(folder: Path, **keys: Any) -> Recipe:
    return recipe_with(data={"name": "image_folder", "path": str(folder), "image_size": SIDE, **keys})


def picture(path: Path, value: int, size: tuple[int, int] = (10, 12), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(path)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Classes bird, cat and dog; image n of class c is full of the value 100 c + n."""
    for part, count in {"train": 6, "test": 2}.items():
        for label, name in enumerate(["bird", "cat", "dog"]):
            for n in range(count):
                picture(tmp_path / part / name / f"{n}.png", 100 * label + n)
    return tmp_path


def values(batch: dict[str, np.ndarray[Any, Any]]) -> list[int]:
    return [int(value) for value in np.rint((batch["image"][:, 0, 0, 0] + 1) * 127.5)]


def test_a_folder_of_folders_gives_every_image_with_its_class(split: Path) -> None:
    assert describe_data(folder_recipe(split).data) == DataSpec(image_shape=(3, SIDE, SIDE), num_classes=3)
    data = load_data(folder_recipe(split).data)
    assert (data.num_train, data.num_test) == (18, 6)
    epoch = data.batch(0, 0, 18)
    assert (
        epoch["image"].shape == (18, 3, SIDE, SIDE)
        and epoch["image"].dtype == np.float32
        and epoch["label"].dtype == np.int64
    )
    assert sorted(values(epoch)) == [100 * label + n for label in range(3) for n in range(6)]
    assert [value // 100 for value in values(epoch)] == epoch["label"].tolist()
    test = list(data.test_batches(4))
    assert [values(batch) for batch in test] == [[0, 1, 100, 101], [200, 201]]
    assert batches_digest([data.batch(3, 5, 4)]) == batches_digest(
        [load_data(folder_recipe(split).data).batch(3, 5, 4)]
    )


def test_val_stands_for_test_and_deeper_folders_hidden_and_other_files_do_not_disturb(split: Path) -> None:
    (split / "test").rename(split / "val")
    picture(split / "train" / "cat" / "more" / "deep.JPEG", 150)
    (split / "train" / "cat" / "notes.txt").write_text("no image")
    (split / "train" / "cat" / "._1.png").write_text("what some systems leave behind")
    (split / "train" / ".cache").mkdir()
    data = load_data(folder_recipe(split).data)
    assert (data.num_train, data.num_test) == (19, 6) and 150 in values(data.batch(0, 0, 19))


def test_without_a_train_folder_a_files_name_decides_its_part_whatever_is_added(tmp_path: Path) -> None:
    for label, name in enumerate(["a", "b"]):
        for n in range(40):
            picture(tmp_path / name / f"{n}.png", 100 * label + n)
    recipe = folder_recipe(tmp_path, test_fraction=0.25)
    before = [values(batch) for batch in load_data(recipe.data, recipe.train.seq_len).test_batches(100)][0]
    data = load_data(recipe.data, recipe.train.seq_len)
    assert data.num_train + data.num_test == 80 and 10 <= data.num_test <= 30
    assert sorted(before + values(data.batch(0, 0, data.num_train))) == sorted([*range(40), *range(100, 140)])
    for n in range(40, 60):
        picture(tmp_path / "a" / f"{n}.png", n)
    after = [values(batch) for batch in load_data(recipe.data, recipe.train.seq_len).test_batches(100)][0]
    assert set(before) < set(after) and {value for value in after if value % 100 < 40} == set(before)


def test_the_split_is_the_same_on_every_machine() -> None:
    names = [f"cat/{n}.png" for n in range(1000)]
    chosen = [name for name in names if in_test_part(name, 0.1)]
    assert len(chosen) == 101 and chosen[:3] == ["cat/8.png", "cat/10.png", "cat/29.png"]
    assert set(chosen) < {name for name in names if in_test_part(name, 0.2)}


def test_images_are_made_rgb_and_the_square_in_the_middle_is_kept(split: Path) -> None:
    exact = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE + 4, 3), np.uint8)
    Image.fromarray(exact).save(split / "test" / "bird" / "0.png")  # sides cut off, nothing resized
    halves = np.zeros((40, 16), np.uint8)
    halves[12:28] = 200  # upright: 12 rows above and below are cut off
    Image.fromarray(halves).save(split / "test" / "bird" / "1.png")
    image = next(load_data(folder_recipe(split).data).test_batches(2))["image"]
    pixels = np.rint((image + 1) * 127.5)
    assert (pixels[0] == exact[:, 2:-2].transpose(2, 0, 1)).all()
    assert (pixels[1][:, 2:-2] == 200).all() and (pixels[1][0] == pixels[1][1]).all()


def test_an_unreadable_image_is_named_when_it_is_met(split: Path) -> None:
    bad = split / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:40])
    deep = split / "test" / "dog" / "1.png"
    Image.fromarray(np.full((9, 9), 60000, np.uint16)).save(deep)
    data = load_data(folder_recipe(split).data)
    with pytest.raises(DataError, match="dog/3.png: not readable as an image") as caught:
        data.batch(0, 0, 18)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="dog/1.png: pixels of mode I;16; allowed: 8 bits"):
        list(data.test_batches(6))


def test_a_file_for_which_pillow_would_start_another_program_is_not_opened(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    (split / "train" / "dog" / "3.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match="dog/3.png: not readable as an image"):
        load_data(folder_recipe(split).data).batch(0, 0, 18)
    assert not started


def test_declared_classes_are_enough_to_plan_without_the_folder(split: Path) -> None:
    nowhere = folder_recipe(split / "nowhere", num_classes=3)
    assert describe_data(nowhere.data, nowhere.train.seq_len) == DataSpec(
        image_shape=(3, SIDE, SIDE), num_classes=3
    )
    assert "data.num_classes: found 3 classes; allowed: 4" in data_refusal(
        folder_recipe(split, num_classes=4)
    )
    with pytest.raises(
        ConfigError, match=r"image_shape: found \[1, 8, 8\]; allowed with image_size 8: \[3, 8, 8\]"
    ):
        folder_recipe(split, image_shape=[1, SIDE, SIDE])


def test_a_bad_folder_is_refused(split: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    assert (
        "No such file or directory; give a folder with one folder of images for each class"
        in data_refusal(folder_recipe(other / "none"))
    )
    assert "found no folder in it" in data_refusal(folder_recipe(other))
    picture(other / "a" / "1.png", 1)
    assert "no image in the test part" in data_refusal(folder_recipe(other, test_fraction=1e-9))
    assert "class a has no training image" in data_refusal(folder_recipe(other, test_fraction=0.999))

    (split / "train" / "emu").mkdir()
    assert "class emu has no training image; allowed: at least one (.png, .jpg" in data_refusal(
        folder_recipe(split)
    )
    (split / "train" / "emu").rmdir()
    picture(split / "test" / "fox" / "1.png", 1)
    assert "test/fox: no such class in" in data_refusal(folder_recipe(split))
    for part in ("train/cat", "train/bird", "train/dog"):
        for path in (split / part).iterdir():
            path.unlink()
        (split / part).rmdir()
    assert "found no folder in it" in data_refusal(folder_recipe(split))


# ------------------------------------------------------------------------------------------------------------
# what lies there and is used, or is said not to be


def test_linked_folders_and_pictures_of_unusual_names_are_used(tmp_path: Path) -> None:
    for label, name in enumerate(["a", "b"]):
        for n in range(20):
            picture(tmp_path / "images" / name / f"{n}.png", 100 * label + n)
    folder = tmp_path / "images" / "a"
    Image.new("RGB", (8, 8), (20,) * 3).save(folder / "20.jfif", "JPEG", quality=100)
    for n, form in enumerate(["PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"], 21):
        Image.new("RGB", (8, 8), (n,) * 3).save(folder / f"{n}", form)
    picture(tmp_path / "store" / "deep" / "30.png", 30)
    (tmp_path / "store" / "round").symlink_to(
        tmp_path / "store"
    )  # without an end, if each link were followed
    (folder / "more").symlink_to(tmp_path / "store")
    data = load_data(folder_recipe(tmp_path / "images").data)
    assert data.num_train + data.num_test == 49 and not data.warnings
    found = values(data.batch(0, 0, data.num_train)) + values(next(data.test_batches(49)))
    assert sorted(found)[:20] == list(range(20)) and 30 in found and len(found) == 49


def test_what_is_left_out_is_counted_and_said_in_one_line(split: Path) -> None:
    (split / "train" / "cat" / "notes.txt").write_text("no image")
    (split / "train" / "cat" / "README").write_text("P5? no image either")
    (split / "test" / "cat" / "._1.png").write_text("what some systems leave behind")
    picture(split / "train" / "loose.png", 1)
    (split / "val").mkdir()
    (line,) = load_data(folder_recipe(split).data).warnings
    assert "\n" not in line and line.startswith(str(split))
    for words in (
        "2 not pictures (train/cat/README)",
        "1 hidden (test/cat/._1.png)",
        "1 in no class's folder (train/loose.png)",
        "1 beside train and test (val)",
    ):
        assert words in line


def test_what_is_left_out_is_said_when_training_begins(
    split: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (split / "train" / "cat" / "notes.txt").write_text("no image")
    run = tmp_path_factory.mktemp("runs") / "run"
    data = {"name": "image_folder", "path": str(split), "image_size": SIDE}
    quick = as_overrides(train__num_steps=2, train__batch_size=4, train__warmup_steps=0, model__dim=16)
    command = ["lowmem", "train", "digits-vit", "--profile", "cpu-4gib", "--quiet", "--run-dir", str(run)]
    command += [part for value in (*quick, "model.num_heads=2", f"data={data}") for part in ("--set", value)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "1 not pictures (train/cat/notes.txt)" in said
    (record,) = [found for found in read_records(run / "telemetry.jsonl") if found["event"] == "warning"]
    assert record["message"] in said


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for label, name in enumerate(["bus", "train"]):
        for n in range(30):
            picture(tmp_path / name / f"{n}.png", 100 * label + n)
    data = folder_recipe(tmp_path).data
    assert data.class_names == ["bus", "train"] and describe_data(data).num_classes == 2
    picture(tmp_path / "train" / "more" / "30.png", 130)
    loaded = load_data(data)
    assert loaded.num_train + loaded.num_test == 61


def test_a_split_without_a_test_part_is_named_as_such(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png", 1)
    picture(tmp_path / "bus" / "1.png", 1)
    assert "found train with folders in it, and neither test nor val beside it" in data_refusal(
        folder_recipe(tmp_path)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_as_its_exif_says(split: Path, orientation: int) -> None:
    exact = np.zeros((SIDE, SIDE, 3), np.uint8)
    exact[:4, :2] = [255, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = split / "test" / "bird" / "0.png"
    Image.fromarray(exact).save(path, exif=exif)
    upright = {  # as the standard defines them
        1: exact,
        2: exact[:, ::-1],
        3: exact[::-1, ::-1],
        4: exact[::-1],
        5: exact.transpose(1, 0, 2),
        6: exact[::-1].transpose(1, 0, 2),
        7: exact[::-1, ::-1].transpose(1, 0, 2),
        8: exact.transpose(1, 0, 2)[::-1],
    }
    assert (square(str(path), SIDE, "here") == upright[orientation].transpose(2, 0, 1)).all()


def test_what_is_transparent_is_white_and_no_hidden_colour_is_trained_on(tmp_path: Path) -> None:
    hidden = np.zeros((SIDE, SIDE, 4), np.uint8)
    hidden[..., 0] = 200
    hidden[0, 0] = [10, 20, 30, 255]
    Image.fromarray(hidden).save(tmp_path / "rgba.png")
    grey = np.zeros((SIDE, SIDE, 2), np.uint8)
    grey[0, 0] = [20, 255]
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    palette = Image.fromarray(np.eye(SIDE, dtype=np.uint8), "P")
    palette.putpalette([200, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("RGB", (SIDE, SIDE), (200, 0, 0)).save(tmp_path / "rgb.png", transparency=(200, 0, 0))
    for name in ("rgba", "la", "p", "rgb"):
        assert (square(str(tmp_path / f"{name}.png"), SIDE, "here")[:, 3, 4] == 255).all(), name
    assert square(str(tmp_path / "rgba.png"), SIDE, "here")[:, 0, 0].tolist() == [10, 20, 30]
    opaque = Image.new("RGBA", (SIDE, SIDE), (200, 1, 2, 255))
    opaque.save(tmp_path / "opaque.png")
    assert (square(str(tmp_path / "opaque.png"), SIDE, "here")[:, 3, 4] == [200, 1, 2]).all()


def test_a_decompression_bomb_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    Image.new("1", (30_000, 3_100)).save(tmp_path / "bomb.png")  # 93 million pixels in a few KiB
    tracked = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(PngImageFile, "load", lambda self: tracked.append(self))
        with pytest.raises(DataError, match="bomb.png: not readable as an image .*pixels.* exceeds limit"):
            square(str(tmp_path / "bomb.png"), SIDE, str(tmp_path / "bomb.png"))
    assert not tracked and (tmp_path / "bomb.png").stat().st_size < 100_000
