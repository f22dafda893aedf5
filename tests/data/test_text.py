"""Text: windows are functions of (seed, step), tokens stay on disk, and bad texts are named in one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import batches_digest, data_refusal, recipe_with, text_of

from lowmem.data import text as data_text
from lowmem.data import tokenizer as data_tokenizer
from lowmem.data.datasets import DataSpec, describe_data, load_data
from lowmem.data.text import TextDataset, load_tokenizer
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import ConfigError, DataError
from lowmem.recipe import Recipe
from lowmem.units import MIB

SEQ_LEN = 16
TEXT = "".join(f"line {n}: naïve café, {n * n} €\n" for n in range(400))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lowmem"


def text_recipe(path: Path, tokenizer: str = "bytes", seq_len: int | None = SEQ_LEN) -> Recipe:
    return recipe_with(
        data={"name": "text", "path": str(path), "tokenizer": tokenizer}, train__seq_len=seq_len
    )


def text_data(path: Path, tokenizer: str = "bytes") -> TextDataset:
    data = load_data(*text_of(text_recipe(path, tokenizer)))
    assert isinstance(data, TextDataset)
    return data


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


# ------------------------------------------------------------------------------------------------------------
# batches


def test_windows_come_from_the_train_part_and_test_windows_cover_the_rest_in_order(tmp_path: Path) -> None:
    path = tmp_path / "halves.txt"
    path.write_bytes(bytes(range(200)) + bytes(range(200, 250)))
    recipe = recipe_with(
        data={"name": "text", "path": str(path), "test_fraction": 0.2}, train__seq_len=SEQ_LEN
    )
    assert describe_data(recipe.data, recipe.train.seq_len) == DataSpec(vocab_size=256, seq_len=SEQ_LEN)
    data = load_data(recipe.data, recipe.train.seq_len)
    tokens = np.concatenate([data.batch(0, step, 100)["tokens"] for step in range(20)])
    assert tokens.dtype == np.int64 and tokens.shape == (2000, SEQ_LEN)
    assert (np.diff(tokens, axis=1) == 1).all()
    assert set(tokens[:, 0]) == set(range(200 - SEQ_LEN + 1))  # every start, the last one too, none beyond
    test = list(data.test_batches(2))
    assert [batch["tokens"].shape for batch in test] == [(2, SEQ_LEN), (1, SEQ_LEN)] and data.num_test == 3
    assert np.concatenate([batch["tokens"].ravel() for batch in test]).tolist() == list(range(200, 248))


def test_the_standard_library_is_the_same_text_twice(cache: Path) -> None:
    recipe = recipe_with(data={"name": "stdlib_text"}, train__seq_len=SEQ_LEN)
    first = load_data(recipe.data, recipe.train.seq_len)
    files = {path: path.stat().st_mtime_ns for path in cache.glob("stdlib-*.bin")}
    again = load_data(recipe.data, recipe.train.seq_len)
    assert len(files) == 2 and all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert sum(path.stat().st_size for path in files) > 5e6 and 0.02 < first.num_test / first.num_train < 0.5
    assert batches_digest([first.batch(0, 0, 4)]) == batches_digest([again.batch(0, 0, 4)])
    for path in files:
        path.unlink()
    assert batches_digest(load_data(recipe.data, recipe.train.seq_len).test_batches(999)) == batches_digest(
        first.test_batches(999)
    )


# ------------------------------------------------------------------------------------------------------------
# tokenizers and their cache


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
@pytest.mark.parametrize("piece_bytes", [7, 1 << 18])
def test_text_round_trips(
    text_path: Path, tokenizer: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tokenizer, "PIECE_BYTES", piece_bytes)
    recipe, data = text_recipe(text_path, tokenizer), text_data(text_path, tokenizer)
    codec = load_tokenizer(recipe.data)  # type: ignore[arg-type]
    assert codec.vocab_size == data.vocab_size == (256 if tokenizer == "bytes" else len(set(TEXT)))
    tokens = [*data.train.tolist(), *data.test.tolist()]
    assert codec.encode(TEXT) == tokens and codec.decode(tokens) == TEXT


def test_a_character_outside_the_text_is_named(text_path: Path) -> None:
    with pytest.raises(DataError, match="'ß' is not among the"):
        load_tokenizer(text_recipe(text_path, "characters").data).encode("caß")  # type: ignore[arg-type]


def subwords(folder: Path, kind: str) -> str:
    """A tokenizer trained on the text: as a JSON file that would cut sequences off, or as GPT-2's pair of
    files.
    """
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([TEXT], vocab_size=400, show_progress=False)
    if kind == "json":
        inner.enable_truncation(8)
        inner.save(str(folder / "tokenizer.json"))
        return str(folder / "tokenizer.json")
    inner.save_model(str(folder))
    (folder / "vocab.json").rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")
    return str(folder)


@pytest.mark.parametrize("kind", ["json", "folder"])
def test_text_tokenised_in_pieces_is_the_text_tokenised_whole(
    text_path: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tokenizer, "PIECE_BYTES", 61)
    tokenizer = subwords(tmp_path, kind)
    data = text_data(text_path, tokenizer)
    codec = load_tokenizer(text_recipe(text_path, tokenizer).data)  # type: ignore[arg-type]
    tokens = [*data.train.tolist(), *data.test.tolist()]
    assert tokens == codec.encode(TEXT) and codec.decode(tokens) == TEXT
    assert data.train.dtype == np.uint16 and max(tokens) < codec.vocab_size <= 400


def test_the_cache_is_reused_until_the_file_changes(
    text_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_data(text_path, "characters")
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    with monkeypatch.context() as patch:
        for module in (data_text, data_tokenizer):
            patch.setattr(module, "pieces", None)  # reading the text again would fail
        text_data(text_path, "characters")
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    text_path.write_bytes((TEXT + "Ω").encode())
    assert text_data(text_path, "characters").vocab_size == len(set(TEXT)) + 1
    assert len(list(cache.glob("*.bin"))) == 2


def test_a_text_of_the_same_time_but_another_size_is_read_again(text_path: Path) -> None:
    text_data(text_path, "characters")
    time_ns = text_path.stat().st_mtime_ns
    text_path.write_bytes((TEXT + "Ω").encode())
    os.utime(text_path, ns=(time_ns, time_ns))
    assert text_data(text_path, "characters").vocab_size == len(set(TEXT)) + 1


@pytest.mark.parametrize("kind", ["characters", "json"])
def test_a_text_edited_within_its_size_and_time_never_gives_the_tokens_from_before(
    text_path: Path, tmp_path: Path, kind: str
) -> None:
    tokenizer = subwords(tmp_path, kind) if kind == "json" else kind
    text_data(text_path, tokenizer)
    time_ns, edited = text_path.stat().st_mtime_ns, TEXT.replace("line", "mine")
    text_path.write_bytes(edited.encode())
    os.utime(text_path, ns=(time_ns, time_ns))
    data, codec = text_data(text_path, tokenizer), load_tokenizer(text_recipe(text_path, tokenizer).data)  # type: ignore[arg-type]
    assert codec.decode([*data.train.tolist(), *data.test.tolist()]) == edited


def test_two_tokenizers_keep_their_tokens_of_one_text_apart(text_path: Path, cache: Path) -> None:
    found = {}
    for first in (0, 5):
        tokenizer = Tokenizer(300, ["from", first], lambda text, first=first: [first] * len(text), str)
        data = load_data(*text_of(text_recipe(text_path)), tokenizer)
        found[first] = set(data.batch(0, 0, 8)["tokens"].ravel().tolist())
    assert found == {0: {0}, 5: {5}} and len(list(cache.glob("*.bin"))) == 2


def test_a_half_written_cache_is_never_used(
    text_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text_data(text_path, "characters").train.tolist()
    (file,) = cache.glob("*.bin")
    (cache / f"{file.name}.tmp").write_bytes(file.read_bytes()[:100])  # as a kill leaves it
    file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "No space left on device" in data_refusal(text_recipe(text_path, "characters"))
    assert not file.exists() and not list(cache.glob("*.tmp"))
    assert text_data(text_path, "characters").train.tolist() == whole


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told apart on Linux only")
def test_a_large_text_is_mapped_and_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    block = np.random.default_rng(0).integers(0, 256, MIB, np.uint8).tobytes()
    with open(path, "wb") as file:
        file.writelines(block for _ in range(200))

    def anonymous_bytes() -> int:
        memory = psutil.Process().memory_info()
        return int(memory.rss - memory.shared)

    before = anonymous_bytes()
    data = text_data(path)
    assert len(data.train) + len(data.test) == 200 * MIB
    for step in range(100):
        data.batch(0, step, 64)
    assert sum(batch["tokens"].shape[0] for batch in data.test_batches(4096)) == data.num_test
    assert anonymous_bytes() - before < 50 * MIB


# ------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("content", "tokenizer", "words"),
    [
        (None, "bytes", "No such file or directory"),
        (None, "characters", "No such file or directory"),
        (b"", "bytes", "is empty"),
        (b"a" * 12, "bytes", "the train part has 10 tokens; allowed: at least train.seq_len = 16"),
        (b"a" * 100, "bytes", "the test part has 10 tokens; allowed: at least train.seq_len = 16"),
        (b"a" * 100, "characters", "the test part has 10 tokens"),
        (b"a" * 500 + b"\xff" + b"a" * 500, "characters", "byte 500 is not UTF-8"),
        (b"a" * 98 + "é€".encode() + b"\xc3", "characters", "byte 103 is not UTF-8"),
        (b"a" * 98 + b"\xe2\x82a", "characters", "byte 98 is not UTF-8"),
        (b"a" * 500, "bites", "no file 'bites'; allowed: bytes, characters"),
    ],
)
def test_a_bad_text_is_refused(
    tmp_path: Path,
    cache: Path,
    content: bytes | None,
    tokenizer: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_tokenizer, "PIECE_BYTES", 100)
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert words in data_refusal(text_recipe(path, tokenizer))
    assert not list(cache.glob("*.tmp"))


def test_a_text_is_refused_before_a_run_is_planned(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        describe_data(*text_of(text_recipe(tmp_path / "none.txt")))
    with pytest.raises(ConfigError, match="train.seq_len: missing; text needs"):
        describe_data(*text_of(text_recipe(tmp_path / "none.txt", seq_len=None)))


def test_a_tokenizer_that_cannot_be_read_is_refused(
    text_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "encoder.json'; allowed:" in data_refusal(text_recipe(text_path, str(tmp_path)))
    broken = tmp_path / "tokenizer.json"
    broken.write_text(json.dumps({"model": 1}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        assert "pip install 'lowmem[text]'" in data_refusal(text_recipe(text_path, str(broken)))
    pytest.importorskip("tokenizers")
    assert "tokenizer.json: not readable" in data_refusal(text_recipe(text_path, str(broken)))
    model = {"type": "WordLevel", "vocab": {"known": 0, "far": 2**22}, "unk_token": "known"}
    broken.write_text(json.dumps({"version": "1.0", "model": model}))
    words = "found tokens up to 4194304; allowed: from 0 to 4194303"
    assert words in data_refusal(text_recipe(text_path, str(broken)))


# ------------------------------------------------------------------------------------------------------------
# what a tokenizer drops


def words_tokenizer(folder: Path) -> str:
    """Knows two words. It drops all others, and line ends."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"known": 0, "words": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(folder / "words.json"))
    return str(folder / "words.json")


def test_characters_that_a_tokenizer_drops_are_counted_and_said_each_time(
    tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("known words \u00df\u00df\n" * 400)
    for _ in range(2):  # the second time the tokens come from the cache
        (line,) = text_data(path, words_tokenizer(tmp_path)).warnings
        assert "the tokens lose 1200 characters (2 kinds, such as" in line
        assert r"'\xdf', '\n'" in line and "\n" not in line and line.startswith(str(path))
    for kept in cache.glob("*.lost.json"):
        kept.unlink()
    assert text_data(path, words_tokenizer(tmp_path)).warnings == [line]


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "json"])
def test_nothing_is_said_of_a_tokenizer_that_drops_nothing(
    text_path: Path, tmp_path: Path, tokenizer: str
) -> None:
    made = subwords(tmp_path, "json") if tokenizer == "json" else tokenizer
    assert text_data(text_path, made).warnings == []
