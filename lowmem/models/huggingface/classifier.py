"""An image classifier of transformers as a model of blocks: ViT, trained end to end.

The library's own modules run on their way in, layer by layer, and out. Its files have other names for the
weights than its modules; both are its own, and follow from each other.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.errors import ConfigError
from lowmem.files import printable, read_json
from lowmem.models.base import BlockModel, GivenWeights
from lowmem.models.huggingface.families import Family, config_of, family_of, not_built
from lowmem.models.huggingface.folder import FolderWeights
from lowmem.noise import Interval
from lowmem.objectives.base import Batch, Entered, Kept
from lowmem.objectives.labels import LabelDenoising
from lowmem.objectives.recompute import recomputed
from lowmem.recipe import NoiseConfig
from lowmem.units import shown

PREPROCESSOR = "preprocessor_config.json"
HALF = [0.5, 0.5, 0.5]  # means and deviations with which the library's images lie in -1 ... 1, as ours do
# How the names of a layer's parameters lie in files, by how they begin in the module.
IN_FILES = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
UNUSED = [r"^vit\.pooler\."]


class Classification(LabelDenoising):
    """The cross-entropy of a class, of a model without a table of targets."""

    def target_shape(self) -> tuple[int, int]:
        head: Any = self.model
        return int(head.head.out_features), int(head.head.in_features)

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        raise NotImplementedError("a recipe refuses blocks that are trained alone")

    def enter(self, batch: Batch) -> Entered:
        return Entered(*self.model.input_part(batch, None, None), Kept())

    def through(
        self, layers: Iterable[nn.Module], h: Tensor, cond: Tensor, kept: Kept, recompute: bool = False
    ) -> Tensor:
        for layer in layers:
            h = recomputed(layer, h) if recompute else layer(h)
        return h

    def health(self) -> dict[str, float]:
        return {}


class HuggingfaceVit(BlockModel):
    layers_alike = True
    whole = True  # see `HuggingfaceLm`

    def __init__(self, family: Family, config: Any, num_classes: int) -> None:
        """`num_classes`: where the configuration has another number, the head is a new one."""
        super().__init__()
        self.new_head = config.num_labels != num_classes
        if self.new_head:
            config.num_labels = num_classes
        self.family, self.config = family, config
        with importlib.import_module("transformers.initialization").no_init_weights():
            whole = family.model_class()(config)
        body = getattr(whole, family.body)
        self.embeddings, self.layers = body.embeddings, getattr(body, family.layers)
        self.norm, self.head = getattr(body, family.norm), whole.classifier
        self._draw = whole._init_weights
        self.given: GivenWeights | None = None

    def has_first_weights(self, module: nn.Module) -> bool:
        return True

    def draw_weights(self, module: nn.Module) -> None:
        self._draw(module)

    def given_weights(self) -> GivenWeights | None:
        return self.given

    def drawn_modules(self) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self.named_children() if name != "layers"]

    def file_names(self) -> dict[str, str]:
        """The names in the library's files by the names of here."""
        starts = {"embeddings.": "vit.embeddings.", "norm.": "vit.layernorm.", "head.": "classifier."}
        names = {}
        for name, _ in self.named_parameters():
            layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
            table = starts if layer is None else IN_FILES
            rest = name if layer is None else layer[2]
            start = next((start for start in table if rest.startswith(start)), "")
            inside = table.get(start, "") + rest[len(start) :]
            names[name] = inside if layer is None else f"vit.encoder.layer.{layer[1]}.{inside}"
        return names

    def content(self, names: list[str] | None) -> dict[str, Any]:
        """What config.json says of the classes, where they are others than the folder's."""
        if not self.new_head:
            return {}
        labels = names or [f"LABEL_{index}" for index in range(self.head.out_features)]
        return {
            "id2label": {str(index): label for index, label in enumerate(labels)},
            "label2id": {label: index for index, label in enumerate(labels)},
        }

    def make_objective(self, noise: NoiseConfig) -> Classification:
        return Classification(self, noise)

    def target_table(self) -> Tensor:
        raise NotImplementedError("a class is no row of a table")

    def example_batch(self, batch_size: int) -> Batch:
        shape = self.config.num_channels, *_pair(self.config.image_size)
        label = torch.zeros(batch_size, dtype=torch.long)
        return {"image": torch.zeros(batch_size, *shape), "label": label}

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.embeddings(batch["image"].to(self.head.weight.dtype))
        return h, h.new_zeros(len(h), 1, 1)

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """Logits [B, K]."""
        return torch.as_tensor(self.head(self.norm(h)[:, 0, :]))


def built(
    path: Path, content: dict[str, Any], spec: DataSpec, pretrained: bool, where: str
) -> HuggingfaceVit:
    """The classifier of a folder for such images. Raises ConfigError where they do not go together."""
    family, config = family_of(content, where), config_of(content, where)
    if spec.image_shape is None or spec.num_classes is None or spec.num_classes < 2:
        raise ConfigError(
            "model.name: 'huggingface' with a vit needs images of 2 classes or more, and the data are none; "
            "give data of another name"
        )
    shape = (config.num_channels, *_pair(config.image_size))
    if shape != spec.image_shape:
        wanted, found = (" x ".join(map(str, sizes)) for sizes in (shape, spec.image_shape))
        raise ConfigError(
            f"{where}: the model takes images of {wanted} (channels x height x width), the data are {found}; "
            "allowed: the same; set data.size"
        )
    _check_scale(path)
    try:
        model = HuggingfaceVit(family, config, spec.num_classes)
    except Exception as problem:  # the library's errors are of many kinds
        raise not_built(where, problem) from None
    if pretrained:
        names, unused = model.file_names(), list(UNUSED)
        if model.new_head:
            names = {name: stored for name, stored in names.items() if not name.startswith("head.")}
            unused.append(r"^classifier\.")
        model.given = FolderWeights(path, names, family.body, family.renamed, unused)
    return model


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_scale(path: Path) -> None:
    """Raises ConfigError for a folder whose images are scaled to another range than -1 ... 1."""
    file = path / PREPROCESSOR
    if not file.is_file():
        return
    content = read_json(file.resolve(), ConfigError)
    for key in ("image_mean", "image_std"):
        found = content.get(key, HALF)
        if not isinstance(found, list) or any(value != HALF[0] for value in found):
            raise ConfigError(
                f"{printable(file)}: {key}: found {shown(str(found), 80)}; allowed: 0.5 for each channel, "
                "because pixels are scaled to -1 ... 1; give a model that was trained so"
            )
