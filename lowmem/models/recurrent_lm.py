"""A recurrent-depth language model (Huginn): prelude, a core that is run again and again, coda (paper,
section 5.5).

Token i is predicted at position i from tokens < i (shifted input, causal attention throughout):
    e = prelude(tokens)      s <- core(adapter([s, e]))      logits = head(coda(s))
As a denoiser (B = 1) the state s is the noisy target itself: one pass at a drawn level is one iteration,
trained on its own.
Trained end to end, s starts as noise and back-propagation runs through the last iterations of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.models.base import BuildModel, text_of
from lowmem.models.layers import Linear
from lowmem.models.sections import RecurrentLmModel
from lowmem.models.text import TextModel
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.recipe import NoiseConfig, Recipe


def builder(config: RecurrentLmModel, recipe: Recipe, spec: DataSpec) -> BuildModel:
    vocab_size, seq_len = text_of(recipe, spec)
    return lambda: RecurrentLm(config, vocab_size, seq_len)


class RecurrentLm(TextModel):
    """`num_layers` counts all layers; the core has what prelude and coda leave."""

    def __init__(self, config: RecurrentLmModel, vocab_size: int, seq_len: int) -> None:
        super().__init__(config, vocab_size, seq_len, "causal")
        self.config = config
        self.adapter = Linear(2 * config.dim, config.dim)

    def make_objective(self, noise: NoiseConfig) -> RecurrentDenoising:
        config = self.config
        loops = config.iterations, config.backprop_iterations
        return RecurrentDenoising(self, noise, config.noisy_input, config.readout, config.head_chunk, *loops)

    def parts(self, layers: Sequence[nn.Module]) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """The layers of the prelude, of the core and of the coda among `layers`."""
        parts = [[self.layers[i] for i in part] for part in self.block_slices(3)]
        prelude, core, coda = ([each for each in layers if each in part] for part in parts)
        return prelude, core, coda

    def block_slices(self, num_blocks: int) -> list[range]:
        """One block, or prelude, core and coda: the core runs its loop while it is on the device."""
        if num_blocks != 3:
            return super().block_slices(num_blocks)
        first, end = self.config.prelude_layers, self.config.num_layers
        last = end - self.config.coda_layers
        return [range(first), range(first, last), range(last, end)]

    def units(self) -> list[range]:
        """The core loops, so all of it is there at once."""
        prelude, core, coda = self.block_slices(3)
        alone = [[range(index, index + 1) for index in part] for part in (prelude, coda)]
        return [*alone[0], core, *alone[1]]

    def inject(self, state: Tensor, embedded: Tensor) -> Tensor:
        return torch.as_tensor(self.adapter(torch.cat([state, embedded], dim=-1)))
