"""`lowmem eval RUN --data ...`: a finished run on other data of the same shape, classes and vocabulary, and
on no others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_overrides

from lowmem import cli
from lowmem.errors import ConfigError, DataError
from lowmem.inference.evaluate import evaluate_run
from lowmem.job import train

QUICK = {
    "train__num_steps": 4,
    "train__batch_size": 16,
    "train__warmup_steps": 0,
    "blocks__visit_steps": 4,
    "model__dim": 16,
    "model__num_heads": 2,
}


def archive(path: Path, label_of_bright: int, side: int = 8) -> Path:
    """60 + 30 images, black or white; the label tells which."""
    for part, count in {"train": 60, "test": 30}.items():
        bright = np.arange(count) % 2
        images = (255 * bright).astype(np.uint8)[:, None, None].repeat(side, 1).repeat(side, 2)
        arrays = {f"{part}_images": images, f"{part}_labels": bright if label_of_bright else 1 - bright}
        np.savez(path.with_suffix(f".{part}.npz"), **arrays)
    parts = [dict(np.load(path.with_suffix(f".{part}.npz"))) for part in ("train", "test")]
    np.savez(path, **parts[0], **parts[1])
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tells black from white images, its shapes declared, and its data gone."""
    folder = tmp_path_factory.mktemp("images")
    data = {
        "name": "npz_images",
        "path": str(archive(folder / "own.npz", 1)),
        "image_shape": [1, 8, 8],
        "num_classes": 2,
        "augment": {"flip": True},
    }
    keys = {**QUICK, "train__num_steps": 30, "blocks__visit_steps": 15, "train__lr": 5e-3}
    run = train("digits-vit", "cpu-4gib", folder / "run", [*as_overrides(**keys), f"data={json.dumps(data)}"])
    (folder / "own.npz").unlink()
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the characters a to e, whose vocabulary is theirs."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "own.txt").write_text("abcde" * 200)
    data = {"name": "text", "path": str(folder / "own.txt"), "tokenizer": "characters"}
    keys = {**QUICK, "train__seq_len": 16, "model__num_layers": 3}
    return train(
        "stdlib-masked", "cpu-4gib", folder / "run", [*as_overrides(**keys), f"data={json.dumps(data)}"]
    )


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_a_run_is_evaluated_on_other_images_also_when_its_own_are_gone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(DataError, match="own.npz"):
        evaluate_run(images)
    same, swapped = archive(tmp_path / "same.npz", 1), archive(tmp_path / "swapped.npz", 0)
    right = evaluate_run(images, [f"path={same}"])["value"]
    assert right == 1 and evaluate_run(images, [f"path={swapped}"])["value"] == 0
    monkeypatch.setattr(sys, "argv", ["lowmem", "eval", str(images), "--data", f"path={same}", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and json.loads(capsys.readouterr().out)["value"] == right


def test_images_of_another_shape_or_classes_are_refused(images: Path, tmp_path: Path) -> None:
    other = archive(tmp_path / "other.npz", 1, side=6)
    for overrides in ([f"path={other}"], ["name=npz_images", f"path={other}"]):
        with pytest.raises(
            ConfigError,
            match=r"--data: found image_shape \(1, 6, 6\), num_classes 2; "
            r"allowed: image_shape \(1, 8, 8\), num_classes 2",
        ):
            evaluate_run(images, overrides)
    with pytest.raises(ConfigError, match="num_classes 10; allowed"):
        evaluate_run(images, ["name=digits"])
    with pytest.raises(ConfigError, match="--data: unknown key 'data.pth'; did you mean 'path'"):
        evaluate_run(images, ["pth=x"])
    with pytest.raises(ConfigError, match="--data: found 'path'; allowed: key=value, as in --data path=FILE"):
        evaluate_run(images, ["path"])


def test_other_text_is_read_with_the_runs_own_vocabulary(text: Path, tmp_path: Path) -> None:
    own, other = evaluate_run(text), tmp_path / "other.txt"
    other.write_text("abcde" * 200)
    assert evaluate_run(text, [f"path={other}"])["value"] == own["value"]
    other.write_text("bd" * 300)  # two of the five characters: tokens 1 and 3, not 0 and 1
    shifted = tmp_path / "shifted.txt"
    shifted.write_text("ab" * 300)
    values = [evaluate_run(text, [f"path={path}"])["value"] for path in (other, shifted)]
    assert values[0] != values[1], "both would be 0, 1, 0, 1 ... with a vocabulary of their own"
    assert evaluate_run(text, ["name=text", f"path={other}"])["value"] == values[0]
    other.write_text("abcdf" * 200)
    with pytest.raises(DataError, match="'f' is not among the 5 characters of"):
        evaluate_run(text, [f"path={other}"])
    with pytest.raises(
        ConfigError, match="--data tokenizer: the run's own tokenizer reads any text here; leave it out"
    ):
        evaluate_run(text, [f"path={other}", "tokenizer=bytes"])
    with pytest.raises(
        ConfigError,
        match=r"--data: found image_shape \(1, 8, 8\), num_classes 10; allowed: vocab_size 5, seq_len 16",
    ):
        evaluate_run(text, ["name=digits"])
