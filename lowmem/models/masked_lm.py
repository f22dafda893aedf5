"""A masked-diffusion language model:

Llama-style layers that see the whole sequence, masked tokens and all (paper, App. D).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.data.datasets import DataSpec
from lowmem.models.base import BlockModel, BuildModel, text_of
from lowmem.models.layers import Layer, Linear, Table, TimeEmbedding, modulate
from lowmem.models.sections import MaskedLmModel
from lowmem.objectives.base import Batch
from lowmem.objectives.masked import MaskedDenoising
from lowmem.recipe import NoiseConfig, Recipe


def builder(config: MaskedLmModel, recipe: Recipe, spec: DataSpec) -> BuildModel:
    vocab_size, seq_len = text_of(recipe, spec)
    return lambda: MaskedLm(config, vocab_size, seq_len)


class MaskedLm(BlockModel):
    """Tokens 0 .. V-1 and the mask, V. The head knows no mask, so nothing can be denoised to one."""

    def __init__(self, config: MaskedLmModel, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        self.tokens = Table(vocab_size + 1, config.dim)  # the last row is the mask
        self.time = TimeEmbedding(config.dim)
        self.layers = nn.ModuleList(
            Layer(config.dim, config.num_heads, config.mlp_ratio, config.dropout, pattern="full", llama=True)
            for _ in range(config.num_layers)
        )
        self.final_modulation = Linear(config.dim, 2 * config.dim, zero=True)
        self.head = Linear(config.dim, vocab_size, zero=True)

    def make_objective(self, noise: NoiseConfig) -> MaskedDenoising:
        return MaskedDenoising(
            self, noise, self.config.mask_schedule, self.vocab_size, self.config.head_chunk
        )

    def example_batch(self, batch_size: int) -> Batch:
        return {"tokens": torch.zeros(batch_size, self.seq_len, dtype=torch.long)}

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """`noisy`: the tokens with some of them masked, int64 [B, L]; c_noise [B].

        End to end the model is a denoiser too.
        """
        assert noisy is not None and c_noise is not None
        return F.embedding(noisy, self.tokens.weight), self.time(c_noise)

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """Features [B, L, D] before the head, which is applied in chunks."""
        shift, scale = self.final_modulation(F.silu(cond)).chunk(2, dim=-1)
        return modulate(h, shift, scale, rms=True)

    def logits(self, features: Tensor) -> Tensor:
        """[N, V], for features [N, D]."""
        return torch.as_tensor(self.head(features))
