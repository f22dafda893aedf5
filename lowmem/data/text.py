"""Text as a row of tokens on disk, mapped into memory: a batch touches only the pages that it takes.

Bytes are their own tokens, so the file itself is the map. Any other tokenizer reads the file once, piece by
piece, into a file of the cache, whose name is a digest of the text's and the tokenizer's paths, sizes and
times.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.cache import cache_dir, cached, digest, file_facts
from lowmem.data.config import StdlibTextData, TextConfig, TextData
from lowmem.data.huggingface import text_files
from lowmem.data.tokenizer import BYTES, Tokenizer, make_tokenizer, pieces
from lowmem.errors import DataError

Array = np.ndarray[Any, Any]
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class TextDataset:
    """Windows of `seq_len` tokens. Training: anywhere in the train part. Test: one after the other, the short
    last one dropped.

    `num_train` and `num_test` count windows that do not overlap. Raises DataError when a part is shorter than
    one window.
    """

    def __init__(self, train: Array, test: Array, seq_len: int, vocab_size: int, where: str) -> None:
        self.train, self.test, self.seq_len, self.vocab_size = train, test, seq_len, vocab_size
        self.num_train, self.num_test = len(train) // seq_len, len(test) // seq_len
        for part, tokens in {"train": train, "test": test}.items():
            if len(tokens) < seq_len:
                found = f"{where}: the {part} part has {len(tokens)} tokens"
                raise DataError(
                    f"{found}; allowed: at least train.seq_len = {seq_len}; give more text, or lower train.seq_len"
                )

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, Array]:
        """`tokens`: int64 [batch_size, seq_len], start positions a function of (seed, step)."""
        starts = np.random.default_rng([seed, step]).integers(
            0, len(self.train) - self.seq_len + 1, batch_size
        )
        return {"tokens": self.train[starts[:, None] + np.arange(self.seq_len)].astype(np.int64)}

    def test_batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        windows = self.test[: self.num_test * self.seq_len].reshape(self.num_test, self.seq_len)
        for start in range(0, self.num_test, batch_size):
            yield {"tokens": windows[start : start + batch_size].astype(np.int64)}


def load_text(config: TextConfig, seq_len: int, tokenizer: Tokenizer | None = None) -> TextDataset:
    """`tokenizer`: another than the section's own, to evaluate a run on other text.

    Raises DataError: file missing, empty, too short, not UTF-8 (where the tokenizer needs it), a tokenizer
    that cannot be read, or one of another size than declared.
    """
    files = _files(config)
    tokenizer = tokenizer or _tokenizer(config, files)
    declared = None if isinstance(config, StdlibTextData) else config.vocab_size
    if declared not in (None, tokenizer.vocab_size):
        found = f"data.vocab_size: declared {declared}, found {tokenizer.vocab_size}"
        raise DataError(f"{found}; declare what the tokenizer has, or leave it out")
    parts = [_tokens(path, tokenizer) for path in files]
    if isinstance(config, TextData):
        num_train = int(len(parts[0]) * (1 - config.test_fraction))
        parts = [parts[0][:num_train], parts[0][num_train:]]
    return TextDataset(parts[0], parts[1], seq_len, tokenizer.vocab_size, _where(config))


def load_tokenizer(config: TextConfig) -> Tokenizer:
    """Raises DataError when the tokenizer is unknown or cannot be read.

    For `characters` this reads the text, once.
    """
    if isinstance(config, StdlibTextData) or config.tokenizer == "bytes":
        return BYTES
    return _tokenizer(config, _files(config) if config.tokenizer == "characters" else [])


def _tokenizer(config: TextConfig, files: list[Path]) -> Tokenizer:
    return make_tokenizer("bytes" if isinstance(config, StdlibTextData) else config.tokenizer, files)


def _files(config: TextConfig) -> list[Path]:
    """The train and the test part's file, or the one that holds both."""
    if isinstance(config, StdlibTextData):
        return _stdlib_files()
    return [_text_file(config)] if isinstance(config, TextData) else text_files(config)


def _where(config: TextConfig) -> str:
    if isinstance(config, TextData):
        return config.path
    return (
        "data.name: 'stdlib_text'"
        if isinstance(config, StdlibTextData)
        else f"data.dataset: '{config.dataset}'"
    )


def _tokens(path: Path, tokenizer: Tokenizer) -> Array:
    if tokenizer is BYTES:
        return _map(path, np.uint8)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    name = digest(tokenizer.facts, file_facts([path]))
    return _map(
        cached(
            cache_dir() / f"{name}.bin",
            lambda: (np.array(tokenizer.encode(piece), dtype).tobytes() for piece in pieces(path)),
        ),
        dtype,
    )


def _text_file(config: TextData) -> Path:
    try:
        with open(config.path, "rb") as file:
            if file.read(1):
                return Path(config.path)
    except OSError as problem:
        raise DataError(
            f"data.path: {config.path}: {problem.strerror}; give the path of a text file that can be read"
        ) from None
    raise DataError(f"data.path: {config.path} is empty; give a file with text in it")


def _stdlib_files() -> list[Path]:
    """Train and test part of the text, written on the first call of this Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    stem = f"stdlib-{platform.python_version()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"

    def sources(test: bool) -> Iterator[bytes]:
        found = (path.relative_to(folder) for path in folder.rglob("*.py"))
        names = sorted(path.as_posix() for path in found if not STDLIB_SKIPPED & set(path.parts))
        for number, name in enumerate(names, 1):
            if (number % 10 == 0) == test:  # each tenth file, so that both parts are of the same kind
                yield (folder / name).read_bytes() + b"\n"

    return [
        cached(cache_dir() / f"{stem}-{part}.bin", partial(sources, part == "test"))
        for part in ("train", "test")
    ]


def _map(path: Path, dtype: type[np.generic]) -> Array:
    return (
        np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
    )  # an empty file has no map
