"""An autoregressive language model: Llama-style layers over a clean half and a noisy half of the sequence
(paper, App. B).

Trained in blocks, T = 2 L: clean tokens 0 .. L-1, then one noisy copy of each; noisy i predicts token i from
clean < i and its own noisy embedding. Trained end to end, or with `noisy_input: none`, the model has one
stream: it sees the start token and tokens 0 .. L-2, and predicts each next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.data.datasets import DataSpec
from lowmem.models.base import BuildModel, text_of
from lowmem.models.sections import CausalLmModel
from lowmem.models.text import TextModel
from lowmem.objectives.base import Batch
from lowmem.objectives.tokens import TokenDenoising
from lowmem.recipe import NoiseConfig, Recipe


def builder(config: CausalLmModel, recipe: Recipe, spec: DataSpec) -> BuildModel:
    vocab_size, seq_len = text_of(recipe, spec)
    return lambda: CausalLm(config, vocab_size, seq_len, whole=recipe.whole)


class CausalLm(TextModel):
    """`whole`: built to be trained end to end, on clean tokens alone."""

    def __init__(self, config: CausalLmModel, vocab_size: int, seq_len: int, whole: bool) -> None:
        one_stream = whole or config.noisy_input == "none"
        super().__init__(config, vocab_size, seq_len, "causal" if one_stream else "clean_noisy")
        self.config, self.whole, self.one_stream = config, whole, one_stream

    def make_objective(self, noise: NoiseConfig) -> TokenDenoising:
        config = self.config
        return TokenDenoising(self, noise, config.noisy_input, config.readout, config.head_chunk)

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """`noisy` [B, L, D] and `c_noise` [B, L] -> h [B, 2 L, D], cond [B, 2 L, D]."""
        tokens = batch["tokens"]
        if noisy is None or c_noise is None:
            return self.shifted(tokens), self.time(torch.zeros(len(tokens), device=tokens.device))
        h = torch.cat([self.clean(tokens), self.noisy(noisy)], dim=1)
        return h, self.time(torch.cat([torch.zeros_like(c_noise), c_noise], dim=1))

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """Features [B, L, D] before the head: of the noisy half, or of all tokens of the one stream."""
        if not self.one_stream:
            h, cond = h.chunk(2, dim=1)[1], cond.chunk(2, dim=1)[1]
        return self.features(h, cond)
