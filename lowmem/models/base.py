"""What a model must offer to be trained block by block: an input part, residual layers, an output part.

A user's own model subclasses `BlockModel`. It is always *built on the meta device* (no memory), then its
layers are given weights one block at a time. So every module that owns parameters must have
`reset_parameters()`, as torch's own modules do, and layers must not own buffers (make them from shapes, or
keep them in the shared part).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from lowmem.objectives.base import Objective

from lowmem.errors import ConfigError

Batch = dict[str, Tensor]


class BlockModel(nn.Module):
    """`layers` are cut into blocks; all other parameters are the *shared part*, which stays on the device for
    the whole run.
    """

    layers: nn.ModuleList  # each: (h [B, T, D], cond [B, 1 or T, D]) -> h [B, T, D]
    objective: Objective  # how a block, and the whole, is scored

    def example_batch(self, batch_size: int) -> Batch:
        """A batch of the right shapes and types (values do not matter), for counting activations."""
        raise NotImplementedError

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h [B, T, D], cond [B, 1 or T, D]) from the raw input and the noisy target, None and None when
        trained end to end.
        """
        raise NotImplementedError

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        raise NotImplementedError

    def block_slices(self, num_blocks: int) -> list[range]:
        """The layers of each block: contiguous, in order; sizes differ by one at most, larger ones first."""
        size, larger = divmod(len(self.layers), num_blocks)
        starts = [b * size + min(b, larger) for b in range(num_blocks + 1)]
        return [range(starts[b], starts[b + 1]) for b in range(num_blocks)]


BuildModel = Callable[[], BlockModel]


def named_layer_parameters(model: BlockModel, layers: range) -> Iterator[tuple[str, nn.Parameter]]:
    for index in layers:
        yield from model.layers[index].named_parameters(prefix=f"layers.{index}")


def named_shared_parameters(model: BlockModel) -> Iterator[tuple[str, nn.Parameter]]:
    return (
        (name, parameter) for name, parameter in model.named_parameters() if not name.startswith("layers.")
    )


def check_model(model: BlockModel) -> None:
    """Raises ConfigError for a model that cannot be given weights block by block."""
    if not len(model.layers):
        raise ConfigError(
            "build_model: the model has no layers; put its residual layers in `layers`, an nn.ModuleList"
        )
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not hasattr(module, "reset_parameters"):
            raise ConfigError(
                f"build_model: module '{name}' ({type(module).__name__}) owns parameters but has no reset_parameters(); add one"
            )
    for name, buffer in model.named_buffers():
        raise ConfigError(
            f"build_model: buffer '{name}' {tuple(buffer.shape)} would not stream with its block; compute it, or make it a parameter"
        )
