"""`model.name: huggingface`: a decoder or an image classifier from a folder, with its weights or random ones.

The library and torch are imported when a model is built, and not before: a plan builds it in a process of its
own.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from lowmem.errors import ConfigError
from lowmem.files import printable
from lowmem.machine.floor import Library
from lowmem.models.huggingface.families import CLASSIFIERS, config_of, family_of, not_built
from lowmem.models.huggingface.folder import CONFIG, FolderWeights, read_config
from lowmem.recipe import QUANTISED, AdapterConfig, Count, ModelConfig, Recipe

if TYPE_CHECKING:
    from lowmem.data.datasets import DataSpec
    from lowmem.models.base import BuildModel
    from lowmem.models.huggingface.model import HuggingfaceLm

WITH_LABELS = ("chat", "custom")  # data whose batches say what is to be learnt
LOGITS = 2**24  # elements of the logits that are in memory at once, where the recipe does not say


class HuggingfaceModel(ModelConfig):
    name: Literal["huggingface"]
    path: str  # of the folder
    weights: Literal["pretrained", "random"] = "pretrained"
    # Which weights are trained: all, the head with the last norm, or those and as many of the last layers.
    trainable: Literal["all", "head"] | Count = "all"
    head_chunk: Count | None = None  # tokens whose logits are in memory at once; None: as LOGITS allows

    def builder(self, recipe: Recipe, spec: DataSpec) -> BuildModel:
        from lowmem.models.base import text_of

        folder = Path(self.path)
        content = read_config(folder)
        family_of(content, self._where)
        if content["model_type"] in CLASSIFIERS:
            return self._classifier(content, recipe, spec)
        vocab_size, seq_len = text_of(recipe, spec)
        if recipe.data.name not in WITH_LABELS:
            raise ConfigError(
                f"data.name: found '{recipe.data.name}'; allowed with a decoder from a folder: "
                f"{', '.join(WITH_LABELS)}; use chat with the model's tokenizer, which reads a .txt file too"
            )
        known = content.get("vocab_size")
        if isinstance(known, int) and known < vocab_size:
            raise ConfigError(
                f"{self._where}: vocab_size {known} is smaller than the tokenizer's {vocab_size} tokens; "
                "allowed: a model that knows every token; give the tokenizer of this model"
            )
        packs, whole = getattr(recipe.data, "pack", False), recipe.whole
        return partial(self._build, content, seq_len, packs, recipe.adapter, whole)

    def _classifier(self, content: dict[str, Any], recipe: Recipe, spec: DataSpec) -> BuildModel:
        from lowmem.models.huggingface.classifier import built

        ways = {
            "an adapter": recipe.adapter is not None,
            f"model.trainable {self.trainable}": self.freezes,
            f"method {recipe.method}": recipe.method != "end_to_end",
        }
        for what, given in ways.items():
            if given:
                raise ConfigError(
                    f"{self._where}: found {what} with an image classifier; allowed: all of its weights, by "
                    "method end_to_end; change it"
                )
        return partial(built, Path(self.path), content, spec, self.weights == "pretrained", self._where)

    @property
    def freezes(self) -> bool:
        return self.trainable != "all"

    @property
    def begins_trained(self) -> bool:
        return self.weights == "pretrained"

    def library(self, adapter: bool) -> Library:
        return "peft" if adapter else "transformers"

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(read_config(Path(self.path)), sort_keys=True).encode())

    def contradiction(self, recipe: Recipe) -> str | None:
        adapter = recipe.adapter
        if self.weights == "random" and adapter is not None and adapter.base in QUANTISED:
            return (
                f"adapter.base: found {adapter.base}; allowed with model.weights random: float32, bfloat16; "
                "change one of them"
            )
        if self.freezes and adapter is not None:
            return (
                f"model.trainable: found {self.trainable}; allowed with an adapter, which is all that is "
                "trained: all; leave one of them out"
            )
        if recipe.whole:
            return None
        why = None
        if self.weights == "pretrained":
            why = "pretrained weights: end_to_end, because each layer expects what the one before it makes"
        elif adapter is not None or self.freezes:
            why = "an adapter, or with frozen weights: end_to_end"
        return why and f"method: found '{recipe.method}'; allowed with {why}; change one of them"

    @property
    def _where(self) -> str:
        return printable(Path(self.path) / CONFIG)

    def _build(
        self, content: dict[str, Any], seq_len: int, packs: bool, adapter: AdapterConfig | None, whole: bool
    ) -> HuggingfaceLm:
        from lowmem.models.huggingface.model import HuggingfaceLm
        from lowmem.models.huggingface.quantised import QuantisedWeights

        family, config = family_of(content, self._where), config_of(content, self._where)
        chunk = self.head_chunk or max(LOGITS // config.vocab_size, 1)
        try:
            model = HuggingfaceLm(family, config, seq_len, chunk, packs)
        except Exception as problem:  # the library's errors are of many kinds
            raise not_built(self._where, problem) from None
        model.whole = whole
        if adapter is not None:
            model.adapt(adapter)
        if self.trainable != "all":
            last = 0 if self.trainable == "head" else self.trainable
            if last >= len(model.layers):
                raise ConfigError(
                    f"model.trainable: found {last}; allowed: fewer than the model's {len(model.layers)} "
                    "layers, head, all; lower it"
                )
            model.train_only(last)
        if self.weights == "pretrained":
            ignored = list(family.model_class()._keys_to_ignore_on_load_unexpected or [])
            if config.tie_word_embeddings:
                ignored.append(r"^lm_head\.")
            given = FolderWeights(Path(self.path), model.file_names(), family.body, family.renamed, ignored)
            model.given = QuantisedWeights(given, model.quantised) if model.quantised else given
        return model
