"""`lowmem.wrap`: a user's own modules as a model of blocks, with the user's own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.data.given import PAIR, named
from lowmem.errors import ConfigError
from lowmem.models.base import BlockModel
from lowmem.objectives.base import Batch
from lowmem.objectives.given_loss import GivenLoss
from lowmem.recipe import NoiseConfig

Loss = Callable[[Tensor, Any], Tensor]


def wrap(
    embed: nn.Module,
    layers: Iterable[nn.Module],
    head: nn.Module,
    loss: Loss,
    example: Mapping[str, Any] | Sequence[Any],
) -> BlockModel:
    """A model that is trained end to end within a budget: `head(layers(embed(input)))`, scored by `loss`.

    `embed(input)` gives h, or (h, cond); each layer maps h, or (h, cond), to an h of the same shape. `loss`
    takes the head's output in fp32 and the target, and gives one number for each sample, or their mean.
    `example` is a batch, of any number of rows: a pair (input, target), or arrays by name; then `embed` and
    `loss` are given all of them, by name. Only its shapes and dtypes are looked at. Call this within your
    `build_model()`, so that the modules are made without memory. Raises ConfigError for parts that are no
    modules, DataError for an example that is no batch.
    """
    return Wrapped(embed, layers, head, loss, example)


class Wrapped(BlockModel):
    def __init__(
        self,
        embed: nn.Module,
        layers: Iterable[nn.Module],
        head: nn.Module,
        loss: Loss,
        example: Mapping[str, Any] | Sequence[Any],
    ) -> None:
        super().__init__()
        listed = list(layers)
        for name, part in (("embed", embed), *(("layers", layer) for layer in listed), ("head", head)):
            if not isinstance(part, nn.Module):
                raise ConfigError(
                    f"lowmem.wrap: {name}: found {type(part).__name__}; allowed: an nn.Module; make it one"
                )
        self.embed, self.layers, self.head, self._loss = embed, nn.ModuleList(listed), head, loss
        tensors = {name: torch.as_tensor(v) for name, v in named(example, "lowmem.wrap: example").items()}
        for name, tensor in tensors.items():
            if not tensor.ndim:
                raise ConfigError(
                    f"lowmem.wrap: example: '{name}' has no rows; allowed: [rows, ...]; give a batch"
                )
        self._example = {name: (tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items()}
        self._pair = tuple(self._example) == PAIR

    def make_objective(self, noise: NoiseConfig) -> GivenLoss:
        return GivenLoss(self, noise)

    def example_batch(self, batch_size: int) -> Batch:
        return {
            name: torch.zeros(batch_size, *shape, dtype=dtype)
            for name, (shape, dtype) in self._example.items()
        }

    def enter(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `GivenLoss`. Floating-point input comes in the dtype that computes."""
        dtype = next(self.parameters()).dtype
        seen = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()
        }
        found = self.embed(seen[PAIR[0]] if self._pair else seen)
        return found if isinstance(found, tuple) else (found, None)

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("see enter: layers may take no condition")

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """What the loss scores."""
        return torch.as_tensor(self.head(h)).float()

    def score(self, output: Tensor, batch: Batch) -> Tensor:
        return self._loss(output, batch[PAIR[1]] if self._pair else batch)
