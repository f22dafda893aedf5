"""The registry of the kinds of data. A recipe's `data.name` chooses one section, which has its own keys.

To add a kind: write its section and its reader in a file of their own, and list the section below. A recipe
that declares shapes and counts (the keys in `DECLARED`) can be planned without its data at hand. What is
found when they are read must agree with what was declared.
"""

from __future__ import annotations

from typing import Annotated, Literal, NoReturn

from pydantic import Field

from lowmem.data.augment import AugmentConfig
from lowmem.data.chat import ChatData
from lowmem.data.datasets import DataSection
from lowmem.data.digits import DigitsData
from lowmem.data.folder import ImageFolderData
from lowmem.data.huggingface import HuggingfaceImages, HuggingfaceText
from lowmem.data.idx import IdxImagesData
from lowmem.data.image_source import DeclaredImages, ImageSource
from lowmem.data.latents import LatentArraysData
from lowmem.data.npz import NpzImagesData
from lowmem.data.pointers import PointerChasingData
from lowmem.data.text import StdlibTextData, TextConfig, TextData, TokenisedText
from lowmem.data.tokenizer import Tokenizer
from lowmem.errors import ConfigError

__all__ = [
    "DECLARED",
    "AugmentConfig",
    "ChatData",
    "CustomData",
    "DataConfig",
    "DataSection",
    "DeclaredImages",
    "DigitsData",
    "HuggingfaceImages",
    "HuggingfaceText",
    "IdxImagesData",
    "ImageFolderData",
    "ImageSource",
    "LatentArraysData",
    "NpzImagesData",
    "PointerChasingData",
    "StdlibTextData",
    "TextConfig",
    "TextData",
    "TokenisedText",
]
DECLARED = ("image_shape", "num_classes", "vocab_size")


class CustomData(DataSection):
    """Batches that the user gives to `Trainer.fit`."""

    name: Literal["custom"]

    def describe(self, seq_len: int | None, tokenizer: Tokenizer | None) -> NoReturn:
        raise ConfigError(
            "data.name: 'custom' data are given from Python: Trainer(build_model, plan, run_dir).fit(batches)"
        )

    def load(self, seq_len: int | None, tokenizer: Tokenizer | None, augmented: bool) -> NoReturn:
        self.describe(seq_len, tokenizer)

    def identify(self, seq_len: int | None) -> NoReturn:
        self.describe(seq_len, None)


DataConfig = Annotated[
    DigitsData
    | IdxImagesData
    | NpzImagesData
    | ImageFolderData
    | LatentArraysData
    | StdlibTextData
    | TextData
    | PointerChasingData
    | Annotated[HuggingfaceImages | HuggingfaceText, Field(discriminator="kind")]
    | ChatData
    | CustomData,
    Field(discriminator="name"),
]
