"""Text of any source as a row of tokens on disk, mapped into memory: a batch touches only the pages it takes.

Bytes are their own tokens, so the text's file itself is mapped. Every other tokenizer reads the text once,
piece by piece, into a file of the cache. That file's name is a digest of the tokenizer, and of the text's
path, size, time and content.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from lowmem.data.cache import cache_dir, cached, content_facts, digest
from lowmem.data.datasets import ArrayBatch, DataSection, Dataset, DataSpec
from lowmem.data.identity import DataIdentity, Fingerprint, Vocabulary
from lowmem.data.image_source import TestFraction
from lowmem.data.images import Array
from lowmem.data.opening import open_file
from lowmem.data.tokenizer import BYTES, NO_FILES, Tokenizer, lost_characters, make_tokenizer, pieces
from lowmem.errors import ConfigError, DataError
from lowmem.files import printable
from lowmem.units import counted

MOST_LOST = 10_000  # kinds of characters whose loss is remembered
SHOWN = 5  # of them in a message
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class TextDataset(Dataset):
    """Windows of `seq_len` tokens: `tokens`, int64 [B, seq_len].

    A training window starts anywhere in the train part, as (seed, step) decides. Test windows follow one
    another; a short last one is left out. `num_train` and `num_test` count windows that do not overlap.
    Raises DataError when a part is shorter than one window.
    """

    def __init__(self, train: Array, test: Array, seq_len: int, vocab_size: int, where: str) -> None:
        self.train, self.test, self.seq_len, self.vocab_size = train, test, seq_len, vocab_size
        for part, tokens in {"train": train, "test": test}.items():
            if len(tokens) < seq_len:
                raise DataError(
                    f"{where}: the {part} part has {counted(len(tokens), 'token')}; "
                    f"allowed: at least train.seq_len = {seq_len}; give more text, or lower train.seq_len"
                )
        super().__init__({"tokens": self._windows(train)}, {"tokens": self._windows(test)}, _as_integers)

    def batch(self, seed: int, step: int, batch_size: int) -> ArrayBatch:
        draws = np.random.default_rng([seed, step])
        starts = draws.integers(0, len(self.train) - self.seq_len + 1, batch_size)
        return _as_integers({"tokens": self.train[starts[:, None] + np.arange(self.seq_len)]})

    def _windows(self, tokens: Array) -> Array:
        """A view [windows, seq_len]."""
        count = len(tokens) // self.seq_len
        return tokens[: count * self.seq_len].reshape(count, self.seq_len)


class TextConfig(DataSection):
    """Text of any source. A subclass says where its files are, and what a message calls it."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The words with which a message about the text begins."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The train part's file and the test part's, or one that holds both. Raises DataError."""

    @property
    def tokenizer_name(self) -> str:
        return "bytes"

    @property
    def declared_vocab_size(self) -> int | None:
        return None

    @property
    def metric_unit(self) -> Literal["char", "token"]:
        return "char" if self.tokenizer_name in NO_FILES else "token"

    def split(self, files: list[Array]) -> tuple[Array, Array]:
        """The training and the test tokens, from the tokens of each file."""
        train, test = files
        return train, test

    def open(self, seq_len: int, tokenizer: Tokenizer | None) -> TextDataset:
        """The text in windows. `tokenizer`: reads the text in place of the section's own.

        Raises DataError when a file is missing, empty, too short or not UTF-8 (if the tokenizer needs it), or
        the tokenizer cannot be read or has another size than declared.
        """
        files = self.files()
        tokenizer = tokenizer or make_tokenizer(self.tokenizer_name, files)
        if self.declared_vocab_size not in (None, tokenizer.vocab_size):
            raise DataError(
                f"data.vocab_size: declared {self.declared_vocab_size}, found {tokenizer.vocab_size}; "
                "declare what the tokenizer has, or leave it out"
            )
        found = [_tokens(path, tokenizer) for path in files]
        train, test = self.split([tokens for tokens, _ in found])
        data = TextDataset(train, test, seq_len, tokenizer.vocab_size, self.source)
        data.warnings += [line for _, lines in found for line in lines]
        return data

    def identify(self, seq_len: int | None) -> DataIdentity:
        files, mark = self.files(), Fingerprint()
        for number, path in enumerate(files):
            mark.file(f"text {number}", path)
        mark.num_items = len(files)
        tokenizer = make_tokenizer(self.tokenizer_name, files)
        return mark.identity(
            vocab_size=tokenizer.vocab_size, alphabet=tokenizer.alphabet, tokenizer=tokenizer.fingerprint
        )

    def describe(self, seq_len: int | None, tokenizer: Tokenizer | None) -> DataSpec:
        length = _required(seq_len)
        if self.declared_vocab_size:
            return DataSpec(vocab_size=self.declared_vocab_size, seq_len=length)
        data = self.open(length, tokenizer)
        return DataSpec(vocab_size=data.vocab_size, seq_len=length, num_test=data.num_test)

    def load(self, seq_len: int | None, tokenizer: Tokenizer | None, augmented: bool) -> TextDataset:
        return self.open(_required(seq_len), tokenizer)


class StdlibTextData(TextConfig):
    """The source text of Python's own standard library, as bytes.

    It is real text that every machine has, so nothing is downloaded. Both parts are written to the cache on
    the first call of this Python.
    """

    name: Literal["stdlib_text"]

    @property
    def source(self) -> str:
        return "data.name: 'stdlib_text'"

    def files(self) -> list[Path]:
        folder = Path(sysconfig.get_paths()["stdlib"])
        stem = f"stdlib-{platform.python_version()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"

        def sources(test: bool) -> Iterator[bytes]:
            found = (path.relative_to(folder) for path in folder.rglob("*.py"))
            names = sorted(path.as_posix() for path in found if not STDLIB_SKIPPED & set(path.parts))
            for number, name in enumerate(names, 1):
                if (number % 10 == 0) == test:  # every tenth file, so that both parts are of the same kind
                    yield (folder / name).read_bytes() + b"\n"

        return [
            cached(cache_dir() / f"{stem}-{part}.bin", partial(sources, part == "test"))
            for part in ("train", "test")
        ]


class TokenisedText(TextConfig):
    """Text that a tokenizer of the user's choice reads."""

    # bytes | characters | a `tokenizers` JSON file | a folder with GPT-2's encoder.json and vocab.bpe
    tokenizer: str = "bytes"
    vocab_size: Vocabulary | None = None  # if declared, planning opens neither text nor tokenizer

    @property
    def packages(self) -> tuple[str, ...]:
        return () if self.tokenizer in NO_FILES else ("tokenizers",)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer

    @property
    def declared_vocab_size(self) -> int | None:
        return self.vocab_size


class TextData(TokenisedText):
    """A text file of the user's. The end of the file is the test part."""

    name: Literal["text"]
    path: str
    test_fraction: TestFraction = 0.1

    @property
    def source(self) -> str:
        return self.path

    def files(self) -> list[Path]:
        where = f"data.path: {printable(self.path)}"
        with open_file(self.path, where, "give the path of a text file that can be read") as file:
            if file.read(1):
                return [Path(self.path)]
        raise DataError(f"{where} is empty; give a file with text in it")

    def split(self, files: list[Array]) -> tuple[Array, Array]:
        (tokens,) = files
        num_train = int(len(tokens) * (1 - self.test_fraction))
        return tokens[:num_train], tokens[num_train:]


def load_tokenizer(config: TextConfig) -> Tokenizer:
    """The section's own tokenizer. For `characters` this reads the text, once.

    Raises DataError when the tokenizer is unknown or cannot be read.
    """
    name = config.tokenizer_name
    return make_tokenizer(name, config.files() if name == "characters" else [])


def _required(seq_len: int | None) -> int:
    if seq_len is None:
        raise ConfigError("train.seq_len: missing; text needs the number of tokens of a sequence; add it")
    return seq_len


def _as_integers(batch: ArrayBatch) -> ArrayBatch:
    return {"tokens": batch["tokens"].astype(np.int64)}


def _tokens(path: Path, tokenizer: Tokenizer) -> tuple[Array, list[str]]:
    """The text's tokens, mapped: uint8, uint16 or uint32 [tokens]. And a line about what they have lost."""
    if tokenizer is BYTES:
        return _map(path, np.uint8), []
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def encoded() -> Iterator[bytes]:
        lost: Counter[str] = Counter()
        for piece in pieces(path):
            yield np.array(tokenizer.encode(piece), dtype).tobytes()
            if tokenizer.alphabet is None:
                lost += lost_characters(tokenizer, piece)
        cached(lost_path, lambda: [json.dumps(lost.most_common(MOST_LOST)).encode()])

    name = digest(tokenizer.facts, content_facts([path]))
    kept, lost_path = (cache_dir() / f"{name}{suffix}" for suffix in (".bin", ".lost.json"))
    if not lost_path.exists() and tokenizer.alphabet is None:
        kept.unlink(missing_ok=True)
    tokens = _map(cached(kept, encoded), dtype)
    return tokens, [] if tokenizer.alphabet is not None else _said_lost(path, lost_path)


def _said_lost(path: Path, lost_path: Path) -> list[str]:
    """One line about the characters that the tokens of a text have lost, or none."""
    lost: list[tuple[str, int]] = json.loads(lost_path.read_bytes())
    if not lost:
        return []
    letters = ", ".join(ascii(letter) for letter, _ in lost[:SHOWN])
    return [
        f"{printable(path)}: the tokens lose {counted(sum(count for _, count in lost), 'character')} "
        f"({counted(len(lost), 'kind')}, such as {letters}): data.tokenizer drops or changes them"
    ]


def _map(path: Path, dtype: type[np.generic]) -> Array:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
