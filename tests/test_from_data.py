"""`lowmem init PATH` and `lowmem train PATH`: what is found, guessed, refused, and kept in the run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cli import lowmem as run_lowmem

from lowmem.data.datasets import load_data
from lowmem.errors import ConfigError
from lowmem.from_data import default_run_dir, is_data, recipe_from_data, recipe_text
from lowmem.inference.evaluation import features
from lowmem.recipe import load_recipe

Maker = Callable[[Path], Path]


def text(folder: Path) -> Path:
    path = folder / "notes.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    return path


def pictures(folder: Path, names: list[str], size: tuple[int, int]) -> Path:
    draw = random.Random(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (draw.randrange(256), 0, 0)).save(folder / name)
    return folder


def pets(folder: Path) -> Path:
    names = [f"{kind}/{number}.png" for kind in ("cats", "dogs") for number in range(30)]
    return pictures(folder / "pets", names, (40, 50))


def unsorted(folder: Path) -> Path:
    return pictures(folder / "loose", [f"{number}.png" for number in range(30)], (80, 90))


@pytest.mark.parametrize(
    ("make", "model", "found"),
    [
        (text, "causal_lm", "a text of 13.2 KiB"),
        (pets, "vit", "pictures in 2 folders, each taken for a class"),
        (unsorted, "dit", "pictures in no class's folder"),
    ],
)
def test_data_make_a_recipe_that_reads_them_and_survives_its_file(
    tmp_path: Path, make: Maker, model: str, found: str
) -> None:
    path = make(tmp_path)
    recipe, lines = recipe_from_data(str(path))
    assert recipe.model.name == model and found in lines[0] and lines[1].startswith("guessed: ")
    assert is_data(str(path)) and default_run_dir(path) == Path("runs") / path.stem
    assert load_data(recipe.data, recipe.train.seq_len).num_train > 0
    (tmp_path / "made.yaml").write_text(recipe_text(recipe, lines))
    assert load_recipe(tmp_path / "made.yaml") == recipe


def test_pictures_are_trained_on_in_a_size_near_their_own_and_unsorted_ones_are_one_class(
    tmp_path: Path,
) -> None:
    small, _ = recipe_from_data(str(pets(tmp_path)))
    large, _ = recipe_from_data(str(unsorted(tmp_path)))
    assert (small.data.image_size, large.data.image_size) == (32, 64)  # type: ignore[union-attr]
    data = load_data(large.data, None)
    assert set(data.batch(0, 0, 16)["label"].tolist()) == {0}


def test_one_class_alone_would_train_no_feature_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """So to train none changes no weight."""
    network, images = features.FeatureNetwork(3, 1), torch.rand(4, 3, 8, 8)
    loss = torch.nn.functional.cross_entropy(network.head(network(images)), torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert all(not weight.grad.any() for weight in network.parameters() if weight.grad is not None)
    monkeypatch.setattr(features, "FEATURE_BATCH", -1)  # a step would fail
    features._trained(images, torch.zeros(4, dtype=torch.long), 0)


def test_a_recipe_s_name_and_file_are_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-vit").mkdir()
    (tmp_path / "mine.yaml").write_text("schema: 1")
    assert not any(map(is_data, ["digits-vit", "mine.yaml", "nowhere.txt"]))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"{}\n", "lowmem finetune MODEL-FOLDER"),
        ("a.bin", b"\0" * 5000, "bytes of zero, so no text"),
        ("short.txt", b"words", "found 5 B; allowed: a text of 4.0 KiB or more"),
        ("empty/readme.md", b"words", "found no picture in it"),
    ],
)
def test_what_makes_no_recipe_is_refused_with_a_cure(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        recipe_from_data(str(path if path.parent == tmp_path else path.parent))


def test_train_takes_data_says_what_it_guessed_and_keeps_the_recipe_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text(tmp_path)
    short = ["train.num_steps=2", "train.batch_size=4", "blocks.visit_steps=1", "eval.num_batches=1"]
    overrides = [word for setting in short for word in ("--set", setting)]
    command = ["train", "notes.txt", "--profile", "cpu-4gib", "--quiet", *overrides]
    code, out, err = run_lowmem(monkeypatch, capsys, *command)
    assert code == 0 and "digest" in out and "found: notes.txt, a text" in err and "guessed: " in err
    kept = load_recipe(tmp_path / "runs" / "notes" / "recipe.yaml")
    assert kept == recipe_from_data("notes.txt", short)[0]
    assert run_lowmem(monkeypatch, capsys, "verify", "runs/notes")[0] == 0
    assert run_lowmem(monkeypatch, capsys, "init", "notes.txt")[0] == 0
    assert load_recipe(tmp_path / "notes.yaml") == recipe_from_data("notes.txt")[0]
    assert run_lowmem(monkeypatch, capsys, "init", "notes.txt")[0] == 2
