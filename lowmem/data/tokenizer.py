"""Tokenizers: bytes, the characters of a text, or subwords of the package `tokenizers`.

That package is imported only when a recipe names a file of its own.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.data.cache import cache_dir, cached, content_facts, digest
from lowmem.data.identity import MOST_VOCAB, Fingerprint
from lowmem.data.opening import is_file, is_folder
from lowmem.data.packages import imported
from lowmem.errors import DataError
from lowmem.files import printable
from lowmem.units import MIB, counted

MOST_BYTES = 256 * MIB  # of a tokenizer's files
PIECE_BYTES = 1 << 18  # bytes of the text that are read at a time
NO_FILES = ("bytes", "characters")  # the names of tokenizers that have no files of their own
ALLOWED = "bytes, characters, a `tokenizers` JSON file, or a folder with GPT-2's encoder.json and vocab.bpe"


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back. Tokens are integers below `vocab_size`.

    The `encode` of characters raises DataError for a character that the training text does not hold.
    """

    vocab_size: int
    facts: Any  # tells it apart from every other tokenizer, in the name of a cache's file
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]  # bytes that are not UTF-8 become U+FFFD
    alphabet: list[str] | None = None  # by token, where tokens are characters
    fingerprint: str | None = None  # of the files that it was read from


BYTES = Tokenizer(
    256, "bytes", lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode(errors="replace")
)


def make_tokenizer(name: str, texts: Sequence[Path]) -> Tokenizer:
    """The tokenizer that a recipe calls `name`. `characters` reads the texts, once.

    Raises DataError when the tokenizer is unknown or cannot be read.
    """
    if name == "bytes":
        return BYTES
    return characters(_alphabet(texts)) if name == "characters" else _subwords(Path(name))


def pieces(path: Path) -> Iterator[str]:
    """The text in pieces, cut before a space that follows another character.

    No usual tokenizer makes one token of those two, so tokenised pieces equal the tokenised whole. Raises
    DataError when the text is not UTF-8.
    """
    decoder, start, rest = codecs.getincrementaldecoder("utf-8")(), 0, ""
    with open(path, "rb") as file:
        while True:
            data = file.read(PIECE_BYTES)
            pending = len(decoder.getstate()[0])  # bytes of a character that the last read split
            try:
                rest += decoder.decode(data, final=not data)
            except UnicodeDecodeError as problem:
                position = start - pending + problem.start
                raise DataError(
                    f"{path}: byte {position} is not UTF-8; "
                    "save the file as UTF-8, or use data.tokenizer: bytes"
                ) from None
            start += len(data)
            if not data:
                break
            match = re.match(r"(?s).*\S( )", rest)
            cut = match.start(1) if match else len(rest)  # without such a space: where the read ended
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _alphabet(texts: Sequence[Path]) -> list[str]:
    """The distinct characters of the texts, in order of code point."""

    def found() -> list[bytes]:
        return [
            json.dumps(sorted({c for path in texts for piece in pieces(path) for c in set(piece)})).encode()
        ]

    name = digest("characters", content_facts(texts))
    alphabet: list[str] = json.loads(cached(cache_dir() / f"{name}.json", found).read_bytes())
    return alphabet


def characters(alphabet: list[str]) -> Tokenizer:
    """The tokenizer whose tokens are the characters of an alphabet."""
    tokens_of = {character: token for token, character in enumerate(alphabet)}

    def encode(text: str) -> list[int]:
        try:
            return [tokens_of[character] for character in text]
        except KeyError as problem:
            raise DataError(
                f"text: {problem.args[0]!r} is not among the {counted(len(alphabet), 'character')} of "
                "the training text; leave it out"
            ) from None

    return Tokenizer(
        len(alphabet),
        ["characters", alphabet],
        encode,
        lambda tokens: "".join(alphabet[token] for token in tokens),
        alphabet,
    )


def lost_characters(tokenizer: Tokenizer, text: str) -> Counter[str]:
    """Characters of a text that do not come back from its tokens.

    Spaces are not counted, because many tokenizers keep them elsewhere.
    """
    lost = Counter(text)
    lost.subtract(tokenizer.decode(tokenizer.encode(text)))
    del lost[" "]
    return +lost


def _subwords(path: Path) -> Tokenizer:
    """A tokenizer of the package `tokenizers`, set to add no special tokens and neither cut nor pad."""
    where, mark = f"data.tokenizer: {printable(path)}", Fingerprint()
    folder = is_folder(path, where, f"allowed: {ALLOWED}")
    files = [path / "encoder.json", path / "vocab.bpe"] if folder else [path]
    for file in files:
        if not is_file(file, where, f"allowed: {ALLOWED}"):
            raise DataError(f"data.tokenizer: no file '{printable(file)}'; allowed: {ALLOWED}")
        mark.file(file.name if len(files) > 1 else "tokenizer", file)
        if mark.num_bytes > MOST_BYTES:
            raise DataError(
                f"{where}: {mark.num_bytes} bytes; allowed: at most {MOST_BYTES}; "
                "give a tokenizer's own files"
            )
    package = imported("tokenizers", f"data.tokenizer: '{path}'", ", or take bytes or characters")
    try:
        names = [str(file) for file in files]
        inner = (
            package.ByteLevelBPETokenizer(*names) if len(names) == 2 else package.Tokenizer.from_file(*names)
        )
    except Exception as problem:  # the package raises bare Exceptions
        said = " ".join(str(problem).split())
        raise DataError(f"data.tokenizer: {path}: not readable ({said}); restore it from a copy") from None
    vocab_size = max(inner.get_vocab().values(), default=-1) + 1
    if not 0 < vocab_size <= MOST_VOCAB:
        raise DataError(
            f"{where}: found tokens up to {vocab_size - 1}; allowed: from 0 to {MOST_VOCAB - 1}; "
            "give another tokenizer"
        )
    inner.no_truncation()
    inner.no_padding()
    return Tokenizer(
        vocab_size,
        ["subwords", mark.hexdigest()],
        lambda text: list(inner.encode(text, add_special_tokens=False).ids),
        lambda tokens: str(inner.decode(tokens, skip_special_tokens=False)),
        fingerprint=mark.hexdigest(),
    )
