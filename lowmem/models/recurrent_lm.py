"""A recurrent-depth language model (Huginn): prelude, a core that is run again and again, coda (paper,
section 5.5).

Token i is predicted at position i from tokens < i (shifted input, causal attention throughout):
    e = prelude(tokens)      s <- core(adapter([s, e]))      logits = head(coda(s))
As a denoiser (B = 1) the state s is the noisy target itself: one pass at a drawn level is one iteration, trained alone.
Trained end to end, s starts as noise and back-propagation runs through the last iterations of the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowmem.models.layers import Linear
from lowmem.models.text import TextModel
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.recipe import RecurrentLmModel


class RecurrentLm(TextModel):
    """`num_layers` counts all layers; the core has what prelude and coda leave."""

    def __init__(self, config: RecurrentLmModel, vocab_size: int, seq_len: int) -> None:
        super().__init__(config, vocab_size, seq_len, "causal")
        self.config = config
        self.adapter = Linear(2 * config.dim, config.dim)
        self.objective = RecurrentDenoising(config)

    def parts(self, layers: Sequence[nn.Module]) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
        """Those of `layers` that are in the prelude, in the core and in the coda."""
        prelude, core, coda = ([self.layers[i] for i in part] for part in self.block_slices(3))
        return (
            [each for each in layers if each in prelude],
            [each for each in layers if each in core],
            [each for each in layers if each in coda],
        )

    def block_slices(self, num_blocks: int) -> list[range]:
        """One block, or prelude, core and coda: the core runs its loop while it is on the device."""
        first, last, end = (
            self.config.prelude_layers,
            self.config.num_layers - self.config.coda_layers,
            self.config.num_layers,
        )
        return (
            [range(first), range(first, last), range(last, end)]
            if num_blocks == 3
            else super().block_slices(num_blocks)
        )

    def inject(self, state: Tensor, embedded: Tensor) -> Tensor:
        return torch.as_tensor(self.adapter(torch.cat([state, embedded], dim=-1)))
