"""What a model must offer to be trained block by block: an input part, residual layers, an output part, an
objective.

A user's own model subclasses `BlockModel`. It is always *built on the meta device*, which takes no memory;
then its layers are given weights one block at a time. So every module that owns parameters must have
`reset_parameters()`, as torch's own modules do, and layers must not own buffers (compute them from shapes, or
keep them in the shared part).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.errors import ConfigError
from lowmem.objectives.base import Batch, Objective
from lowmem.recipe import NoiseConfig, Recipe

RESETS = ("reset_parameters", "_reset_parameters")  # torch's own names; the second: MultiheadAttention


class GivenWeights(Protocol):
    """Weights that a model begins with, by the names of its parameters."""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ConfigError unless there is a weight of its shape for each parameter, and none too many."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


class Packed(NamedTuple):
    """How a frozen parameter lies that stands for weights of another form."""

    dtype: torch.dtype
    numel: int  # weights that it stands for


class BlockModel(nn.Module):
    """`layers` are cut into blocks.

    All other parameters are the *shared part*; it stays on the device all along.
    """

    layers: nn.ModuleList  # each: (h [B, T, D], cond [B, 1 or T, D]) -> h [B, T, D]
    # Only the parameters that `is_adapter` names are trained; all others are frozen. They count as the shared
    # part, wherever they are; what else is in no layer is the *base*, which is on the device and only read.
    adapted = False
    first_trained = 0  # the first layer that holds trained parameters; no gradient is needed below it
    layers_alike = False  # each layer takes as much memory and makes as many operations as the others

    def make_objective(self, noise: NoiseConfig) -> Objective[Any, Any]:
        """How a block, and the whole model, is scored: an objective bound to this model and to `noise`."""
        raise NotImplementedError

    def example_batch(self, batch_size: int) -> Batch:
        """A batch of the right shapes and types, for counting activations. Values do not matter."""
        raise NotImplementedError

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h [B, T, D], cond [B, 1 or T, D]) from the raw input and the noisy target.

        Both are None where the model is trained end to end.
        """
        raise NotImplementedError

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """What the objective scores, from h after all layers."""
        raise NotImplementedError

    def is_adapter(self, name: str) -> bool:
        """Whether a parameter is trained while others are frozen."""
        return False

    def packed(self, name: str) -> Packed | None:
        """How a frozen parameter lies, where the run does not say it."""
        return None

    def has_first_weights(self, module: nn.Module) -> bool:
        """Whether `draw_weights` knows what the parameters of a module begin with."""
        return any(hasattr(module, name) for name in RESETS)

    def draw_weights(self, module: nn.Module) -> None:
        """Draws the first weights of a module's own parameters. Its children's are drawn already."""
        getattr(module, next(name for name in RESETS if hasattr(module, name)))()

    def given_weights(self) -> GivenWeights | None:
        """What all parameters begin with, where it is not drawn."""
        return None

    def drawn_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules of the shared part, by name, in the order in which they are drawn."""
        found = [(name, module) for name, module in self.named_children() if name != "layers"]
        # for parameters of its own; those of its layers are on meta then
        return [*found, ("model", self)] if self.has_first_weights(self) else found

    @property
    def most_blocks(self) -> int:
        """The number of layers that are cut into blocks."""
        return len(self.layers)

    def block_slices(self, num_blocks: int) -> list[range]:
        """The layers of each block: contiguous, in order; sizes differ by one at most, larger ones first."""
        size, larger = divmod(self.most_blocks, num_blocks)
        starts = [b * size + min(b, larger) for b in range(num_blocks + 1)]
        return [range(starts[b], starts[b + 1]) for b in range(num_blocks)]

    def units(self) -> list[range]:
        """Runs of layers that compute together, and so are on the device at once where the model streams."""
        return [range(index, index + 1) for index in range(len(self.layers))]


BuildModel = Callable[[], BlockModel]


def named_layer_parameters(model: BlockModel, layers: range) -> Iterator[tuple[str, nn.Parameter]]:
    for index in layers:
        for name, parameter in model.layers[index].named_parameters(prefix=f"layers.{index}"):
            if not model.is_adapter(name):
                yield name, parameter


def named_shared_parameters(model: BlockModel) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained and on the device all along."""
    for name, parameter in model.named_parameters():
        if model.is_adapter(name) if model.adapted else not name.startswith("layers."):
            yield name, parameter


def named_base_parameters(model: BlockModel) -> Iterator[tuple[str, nn.Parameter]]:
    """What is frozen and on the device all along."""
    if model.adapted:
        for name, parameter in model.named_parameters():
            if not (name.startswith("layers.") or model.is_adapter(name)):
                yield name, parameter


def num_weights(model: BlockModel, parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    """The number of weights that these parameters are."""
    return sum(
        parameter.numel() if (packed := model.packed(name)) is None else packed.numel
        for name, parameter in parameters
    )


def check_model(model: BlockModel) -> None:
    """Raises ConfigError for a model that cannot be given weights block by block."""
    if not len(model.layers):
        raise ConfigError(
            "build_model: the model has no layers; put its residual layers in `layers`, an nn.ModuleList"
        )
    for name, module in model.named_modules():
        owns = any(True for _ in module.parameters(recurse=False))
        if owns and not model.has_first_weights(module):
            raise ConfigError(
                f"build_model: module '{name}' ({type(module).__name__}) owns parameters but has no "
                "reset_parameters(); add one"
            )
    _check_alone(model)
    for name, buffer in model.named_buffers():
        raise ConfigError(
            f"build_model: buffer '{name}' {tuple(buffer.shape)} would not stream with its block; "
            "compute it, or make it a parameter"
        )


def _check_alone(model: BlockModel) -> None:
    """Raises ConfigError for a layer's module, or a parameter, that stands in a second place as well.

    It would get the weights of one place. A module of the shared part may be used twice: it has one name.
    """
    places = dict[int, str]()
    for name, module in model.named_modules(remove_duplicate=False):
        owned = [parameter for parameter in module._parameters.values() if parameter is not None]
        for part in owned:
            first = places.setdefault(id(part), name)
            same = first != name and model.get_submodule(first) is module
            if first != name and not (same and not f"{first} {name}".count("layers.")):
                raise ConfigError(
                    f"build_model: '{first}' and '{name}' hold the same parameter; allowed: one place for "
                    "each, or one module of the shared part that is used twice; give each its own"
                )


# ------------------------------------------------------------------------------------------------------------
# What a packaged model takes from the data


def images_of(recipe: Recipe, spec: DataSpec, patch_size: int) -> tuple[tuple[int, int, int], int]:
    """((channels, height, width), number of classes).

    Raises ConfigError where the data are no such images.
    """
    if spec.image_shape is None or spec.num_classes is None:
        raise ConfigError(
            f"model.name: '{recipe.model.name}' needs images with labels; data.name '{recipe.data.name}' has "
            "none"
        )
    _, height, width = spec.image_shape
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"model.patch_size: found {patch_size}; allowed: a divisor of the image's sides, "
            f"{height} x {width} pixels"
        )
    return spec.image_shape, spec.num_classes


def text_of(recipe: Recipe, spec: DataSpec) -> tuple[int, int]:
    """(vocabulary size, sequence length in tokens). Raises ConfigError where the data are no text."""
    if spec.vocab_size is None or spec.seq_len is None:
        raise ConfigError(
            f"model.name: '{recipe.model.name}' needs text; data.name '{recipe.data.name}' has none"
        )
    if spec.vocab_size < 2:
        raise ConfigError(
            f"data: found a vocabulary of {spec.vocab_size}, which leaves nothing to predict; "
            "allowed: 2 or more; give text with other characters, or tokenizer: bytes"
        )
    return spec.vocab_size, spec.seq_len
