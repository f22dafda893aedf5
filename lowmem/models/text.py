"""What the models of next tokens share: one table, the way in, the layers, the way out.

One table of rows of length 1 gives the clean tokens, the targets y and the Bayes term; the read-out is a
linear map of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.models.base import BlockModel
from lowmem.models.layers import Layer, Linear, Pattern, Table, TimeEmbedding, modulate
from lowmem.objectives.base import Batch
from lowmem.recipe import TransformerModel


class TextModel(BlockModel):
    def __init__(self, config: TransformerModel, vocab_size: int, seq_len: int, pattern: Pattern) -> None:
        super().__init__()
        self.vocab_size, self.seq_len = vocab_size, seq_len
        self.scale = math.sqrt(config.dim)  # rows of length 1 -> entries of size 1
        self.tokens = Table(vocab_size + 1, config.dim, std=1.0)  # the last row is the start token
        self.clean_in = Linear(config.dim, config.dim)
        self.noisy_in = Linear(config.dim, config.dim)
        self.time = TimeEmbedding(config.dim)
        self.layers = nn.ModuleList(
            Layer(config.dim, config.num_heads, config.mlp_ratio, config.dropout, pattern, llama=True)
            for _ in range(config.num_layers)
        )
        self.final_modulation = Linear(config.dim, 2 * config.dim, zero=True)
        self.head = Linear(config.dim, vocab_size, zero=True)

    def example_batch(self, batch_size: int) -> Batch:
        return {"tokens": torch.zeros(batch_size, self.seq_len, dtype=torch.long)}

    def target_table(self) -> Tensor:
        """[V, D], rows of length 1."""
        return self.tokens.normalized()[: self.vocab_size]

    def clean(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]; token `vocab_size` is the start token."""
        return torch.as_tensor(
            self.clean_in(
                self.scale * F.embedding(tokens, self.tokens.normalized()).to(self.head.weight.dtype)
            )
        )

    def shifted(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]: the start token, then all tokens but the last: position i knows tokens < i."""
        start = torch.full_like(tokens[:, :1], self.vocab_size)
        return self.clean(torch.cat([start, tokens[:, :-1]], dim=1))

    def noisy(self, noisy: Tensor) -> Tensor:
        """[B, L, D], what the network is to see of z."""
        return torch.as_tensor(self.noisy_in(self.scale * noisy.to(self.head.weight.dtype)))

    def condition(self, c_noise: Tensor) -> Tensor:
        """c_noise [B] or [B, T] -> cond [B, 1 or T, D]."""
        return torch.as_tensor(self.time(c_noise))

    def features(self, h: Tensor, cond: Tensor) -> Tensor:
        """[B, L, D] before the head, which is applied in chunks."""
        shift, scale = self.final_modulation(F.silu(cond)).chunk(2, dim=-1)
        return modulate(h, shift, scale, rms=True)

    def logits(self, features: Tensor) -> Tensor:
        """[N, V], for features [N, D]."""
        return torch.as_tensor(self.head(features))
