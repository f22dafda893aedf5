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
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.models.base import BuildModel, text_of
from lowmem.models.layers import Linear
from lowmem.models.text import TextModel
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.recipe import Count, Layers, NoiseConfig, Readout, Recipe, TransformerModel


class RecurrentLmModel(TransformerModel):
    name: Literal["recurrent_lm"]
    prelude_layers: Layers = 2
    coda_layers: Layers = 2  # the core has what is left of num_layers
    iterations: Layers = 32  # mean number, when trained end to end
    backprop_iterations: Layers = 8  # how many of them gradients flow through
    noisy_input: Literal["scaled", "posterior"] = (
        "posterior"  # its state is the noisy target: it must be seen
    )
    readout: Readout = "bayes"
    head_chunk: Count = 4096  # tokens whose logits are in memory at once

    @property
    def least_layers(self) -> int:
        return self.prelude_layers + self.coda_layers + 1

    @model_validator(mode="after")
    def _core_left(self) -> RecurrentLmModel:
        if self.num_layers < self.least_layers:
            raise ValueError(
                f"num_layers {self.num_layers} leaves no core between {self.prelude_layers} and "
                f"{self.coda_layers} "
                "layers; raise it"
            )
        return self

    def builder(self, recipe: Recipe, spec: DataSpec) -> BuildModel:
        vocab_size, seq_len = text_of(recipe, spec)
        return lambda: RecurrentLm(self, vocab_size, seq_len)

    def contradiction(self, recipe: Recipe) -> str | None:
        whole, num_blocks = recipe.method == "end_to_end", recipe.blocks.num_blocks
        if num_blocks in ((1, 3) if whole else (1,)):
            return None
        allowed = "1 or 3 (prelude, core, coda)" if whole else "1 (its core is one denoiser)"
        return f"blocks.num_blocks: found {num_blocks}; allowed with model recurrent_lm: {allowed}"


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
