"""Data sets by name, with a stand-in for the library `datasets`: calls, answers, refusals."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import data_refusal, recipe_with, text_of
from PIL import Image

from lowmem.data.datasets import DataSpec, describe_data, identify_data, load_data
from lowmem.data.text import load_tokenizer
from lowmem.errors import ConfigError, DataError
from lowmem.recipe import Recipe

SEQ_LEN = 8
DOCUMENTS = {
    "train": [f"document {n}: naïve café €" for n in range(40)],
    "test": [f"other {n}" for n in range(20)],
}


class Split:
    """Rows by number, columns by name, as `datasets.Dataset` gives them."""

    def __init__(self, columns: dict[str, list[Any]], cache_files: list[dict[str, str]]) -> None:
        self.columns, self.column_names, self.cache_files = columns, list(columns), cache_files

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        return (
            self.columns[key]
            if isinstance(key, str)
            else {name: column[key] for name, column in self.columns.items()}
        )

    def cast_column(self, column: str, feature: Any) -> Split:
        assert feature == {"decode": False}
        if not all(isinstance(stored, dict) or stored is None for stored in self.columns[column]):
            raise TypeError("Couldn't cast array of type\nstring to image")
        return self


class Library:
    """The module `datasets`: splits by name, and a note of every call."""

    def __init__(self, folder: Path) -> None:
        self.splits: dict[str, dict[str, list[Any]]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.Image = lambda decode: {"decode": decode}
        self.arrow = folder / "rows.arrow"
        self.arrow.write_bytes(b"rows")

    def load_dataset(self, path: str, name: str | None, *, split: str, revision: str | None) -> Split:
        self.calls.append((path, name, split, revision))
        if path != "known":
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub\n(no network)")
        return Split(self.splits[split], [{"filename": str(self.arrow)}])


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Library(tmp_path)
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=made.load_dataset, Image=made.Image)
    )  # type: ignore[arg-type]
    return made


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value,) * 3).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def images(library: Library, tmp_path: Path) -> Library:
    """20 + 6 images in two classes; image n is full of the value n, and one of them is a file."""
    for split, count in {"train": 20, "test": 6}.items():
        stored: list[Any] = [{"bytes": png(n), "path": f"{n}.png"} for n in range(count)]
        library.splits[split] = {"image": stored, "label": [n % 2 for n in range(count)]}
    (tmp_path / "3.png").write_bytes(png(3))
    library.splits["test"]["image"][3] = {"bytes": None, "path": str(tmp_path / "3.png")}
    return library


@pytest.fixture
def texts(library: Library) -> Library:
    for split, documents in DOCUMENTS.items():
        library.splits[split] = {"text": list(documents), "more": [0] * len(documents)}
    return library


def image_recipe(**keys: Any) -> Recipe:
    return recipe_with(
        data={"name": "huggingface", "kind": "images", "dataset": "known", "image_size": 8, **keys}
    )


def text_recipe(**keys: Any) -> Recipe:
    return recipe_with(
        data={"name": "huggingface", "kind": "text", "dataset": "known", **keys}, train__seq_len=SEQ_LEN
    )


def test_images_come_with_their_labels(images: Library) -> None:
    assert describe_data(image_recipe().data) == DataSpec(image_shape=(3, 8, 8), num_classes=2)
    data = load_data(image_recipe().data)
    assert (data.num_train, data.num_test) == (20, 6)
    epoch = data.batch(0, 0, 20)
    values = np.rint((epoch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int)
    assert (
        epoch["image"].shape == (20, 3, 8, 8)
        and sorted(values) == list(range(20))
        and (epoch["label"] == values % 2).all()
    )
    assert [np.rint((batch["image"][0, 0, 0, 0] + 1) * 127.5) for batch in data.test_batches(1)] == list(
        range(6)
    )


def test_the_library_is_asked_for_what_the_recipe_names_and_nothing_more(images: Library) -> None:
    images.splits |= {"train[:90%]": images.splits["train"], "valid": images.splits["test"]}
    load_data(
        image_recipe(subset="small", revision="abc", train_split="train[:90%]", test_split="valid").data
    )
    assert images.calls == [("known", "small", "train[:90%]", "abc"), ("known", "small", "valid", "abc")]


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_documents_are_joined_with_newlines_and_tokenised_once(
    texts: Library, tmp_path: Path, tokenizer: str
) -> None:
    recipe = text_recipe(tokenizer=tokenizer)
    codec = load_tokenizer(recipe.data)  # type: ignore[arg-type]
    data: Any = load_data(recipe.data, recipe.train.seq_len)
    for part in ("train", "test"):
        assert codec.decode(getattr(data, part).tolist()) == "\n".join(DOCUMENTS[part])
    characters = {
        character for documents in DOCUMENTS.values() for document in documents for character in document
    }
    assert describe_data(recipe.data, recipe.train.seq_len) == DataSpec(
        vocab_size=256 if tokenizer == "bytes" else len(characters) + 1, seq_len=SEQ_LEN
    )
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "lowmem").iterdir()}
    again: Any = load_data(recipe.data, recipe.train.seq_len)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "lowmem").iterdir()} == files
    assert (
        isinstance(again.train.base, np.memmap)
        and (again.batch(0, 3, 4)["tokens"] == data.batch(0, 3, 4)["tokens"]).all()
    )


def test_another_state_of_the_data_set_is_tokenised_afresh(texts: Library) -> None:
    before: Any = load_data(*text_of(text_recipe()))
    texts.splits["train"]["text"][0] = "something else"
    texts.arrow.write_bytes(b"other rows")
    after: Any = load_data(*text_of(text_recipe()))
    assert bytes(after.train).startswith(b"something else\ndocument 1") and bytes(before.train).startswith(
        b"document 0"
    )


def test_declared_shapes_are_enough_to_plan_without_library_and_network(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert describe_data(image_recipe(image_shape=[3, 8, 8], num_classes=10).data) == DataSpec(
        image_shape=(3, 8, 8), num_classes=10
    )
    assert describe_data(*text_of(text_recipe(tokenizer="none.json", vocab_size=50257))) == DataSpec(
        vocab_size=50257, seq_len=SEQ_LEN
    )
    for recipe in (image_recipe(num_classes=10), text_recipe(vocab_size=256)):
        with pytest.raises(
            DataError,
            match=r"the package datasets, which is not installed.*pip install 'lowmem\[huggingface\]'",
        ):
            load_data(recipe.data, recipe.train.seq_len)


def test_what_is_declared_must_be_what_is_found(images: Library) -> None:
    assert "found 2 classes; allowed: 3, as declared" in data_refusal(image_recipe(num_classes=3))
    images.splits |= {part: {"text": documents} for part, documents in DOCUMENTS.items()}
    assert "data.vocab_size: declared 100, found 256" in data_refusal(text_recipe(vocab_size=100))
    assert load_data(*text_of(text_recipe(vocab_size=256))).num_train > 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"dataset": "unknwn"},
            "data.dataset: 'unknwn', split 'train': cannot be opened "
            "(Couldn't reach 'unknwn' on the Hub (no network))",
        ),
        (
            {"subset": "a", "test_split": "tset"},
            "data.dataset: 'known', subset 'a', split 'tset': cannot be opened ('tset')",
        ),
        ({"image_column": "imgae"}, "split 'train': no column 'imgae'; allowed: image, label"),
        ({"label_column": "fine"}, "no column 'fine'"),
        (
            {"image_column": "label"},
            "column label holds no images (Couldn't cast array of type string to image)",
        ),
        ({"label_column": "image"}, "labels are object [20]; allowed: integers"),
    ],
)
def test_a_bad_name_is_refused(images: Library, keys: dict[str, str], words: str) -> None:
    assert words in data_refusal(image_recipe(**keys))


def test_bad_rows_are_refused(images: Library, texts: Library) -> None:
    texts.splits["train"]["text"][5] = None
    assert "split 'train': text of row 5 is NoneType; allowed: text" in data_refusal(text_recipe())
    assert "no column 'txt'; allowed: text, more" in data_refusal(text_recipe(text_column="txt"))
    texts.splits["test"]["text"][:] = [""]
    texts.splits["train"]["text"][5] = ""
    assert (
        "data.dataset: 'known': the test part has 0 tokens; allowed: at least train.seq_len = 8"
        in data_refusal(text_recipe())
    )


def test_labels_that_are_kept_back_are_refused(images: Library) -> None:
    images.splits["test"]["label"] = [-1] * 6
    assert "split 'test': found label -1" in data_refusal(image_recipe())


@pytest.mark.parametrize(
    "stored",
    [
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": "/nowhere.png"},
        {"bytes": None, "path": None},
        None,
    ],
)
def test_an_unreadable_image_is_named_when_it_is_met(images: Library, stored: Any) -> None:
    images.splits["test"]["image"][4] = stored
    data = load_data(image_recipe().data)
    with pytest.raises(
        DataError, match="data.dataset: 'known', split 'test', image 4: not readable as an image"
    ):
        list(data.test_batches(1))


def test_the_two_kinds_have_keys_of_their_own() -> None:
    with pytest.raises(ConfigError, match="unknown key 'data.tokenizer'; known: augment, dataset"):
        image_recipe(tokenizer="bytes")
    with pytest.raises(ConfigError, match="unknown key 'data.tokeniser'; did you mean 'tokenizer'"):
        text_recipe(tokeniser="bytes")
    with pytest.raises(ConfigError, match="data.kind: unknown name 'txt'; did you mean 'text'"):
        text_recipe(kind="txt")
    with pytest.raises(ConfigError, match="key 'data.kind' is missing; add it"):
        recipe_with(data={"name": "huggingface", "dataset": "known"})
    with pytest.raises(ConfigError, match="unknown key 'data.trust_remote_code'"):
        text_recipe(trust_remote_code=True)


@pytest.mark.parametrize("make", [image_recipe, text_recipe])
def test_the_rows_are_the_identity_of_a_data_set(make: Any, images: Library, texts: Library) -> None:
    for part in ("train", "test"):  # one library with both kinds of columns
        images.splits[part] |= {
            "image": [{"bytes": png(n)} for n in range(20)],
            "label": [n % 2 for n in range(20)],
        }
        images.splits[part]["text"] = DOCUMENTS[part][:20]
    recipe = make()
    before = identify_data(*text_of(recipe))
    assert identify_data(*text_of(recipe)) == before
    images.arrow.write_bytes(b"other rows")
    images.splits["train"]["text"][0] = "something else"
    assert identify_data(*text_of(recipe)).fingerprint != before.fingerprint and recipe.data.remote
