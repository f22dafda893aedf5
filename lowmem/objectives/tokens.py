"""Next-token prediction as denoising of the token's embedding, on a clean and a noisy half of a sequence
(App. B).

The level is drawn per token. For one next token given its clean context Bayes' rule factorises, p(y | x, z) ~
p(y | x) exp(z . E_y / sigma^2) (rows of length 1). So with `readout: bayes` the network has only p(y | x)
left to learn, at every level. With `noisy_input: posterior` its noisy token is E[y | z] = softmax(E z /
sigma^2) E in place of c_in z. With `none` it sees no noisy token at all: the sequence has no noisy half, and
a block costs what its layers cost an ordinary model. Logits exist for `head_chunk` tokens at a time, in the
forward pass and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, c_in, c_noise, drawn_levels
from lowmem.objectives.base import (
    Batch,
    Entered,
    Kept,
    Objective,
    TargetTable,
    at_levels,
    in_chunks,
    mean_cosine,
    run_layers,
)
from lowmem.recipe import NoiseConfig, NoisyInput, Readout

HEALTH_ROWS = 4096  # rows of the table that its mean cosine is taken over


class TokenModel(TargetTable, Protocol):
    """`output_part` gives features [B, L, D]; the head is applied to them in chunks."""

    def logits(self, features: Tensor) -> Tensor:
        """[N, V], for features [N, D]."""
        ...


class TokenDenoising(Objective[TokenModel, Kept]):
    """Losses are means over a sequence's tokens, in nats per token, [B]."""

    draws_with_all_blocks = True

    def __init__(
        self,
        model: TokenModel,
        noise: NoiseConfig,
        noisy_input: NoisyInput,
        readout: Readout,
        head_chunk: int,
    ) -> None:
        super().__init__(model, noise)
        self.noisy_input, self.readout, self.head_chunk = noisy_input, readout, head_chunk

    def target_shape(self) -> tuple[int, int]:
        num_rows, dim = self.model.target_table().shape
        return num_rows, dim

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        tokens = batch["tokens"]
        sigma = drawn_levels(tokens.shape, tokens.device, interval, self.noise)
        y = F.embedding(tokens, self.model.target_table())
        z = y + append_dims(sigma, 3) * torch.randn_like(y)
        loss = self._chunked(self.features(layers, batch, z, sigma, recompute), tokens, z, sigma)
        return at_levels(loss, sigma, self.noise).mean(1)

    def enter(self, batch: Batch) -> Entered:
        return Entered(*self.model.input_part(batch, None, None), Kept())

    def leave(self, h: Tensor, cond: Tensor, kept: Kept, batch: Batch) -> Tensor:
        return self.plain_losses(self.model.output_part(h, cond), batch["tokens"]).mean(1)

    def plain_losses(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Cross-entropy of each token [B, L] from features [B, L, D] that have seen no noise."""
        return self._chunked(features, tokens, None, None)

    def features(
        self, layers: Iterable[nn.Module], batch: Batch, z: Tensor, sigma: Tensor, recompute: bool = False
    ) -> Tensor:
        """[B, L, D] before the head, for z [B, L, D] at levels sigma [B, L]."""
        unseen = self.noisy_input == "none"
        seen = (None, None) if unseen else (self.network_input(z, sigma), c_noise(sigma))
        h, cond = self.model.input_part(batch, *seen)
        return self.model.output_part(run_layers(layers, h, cond, recompute), cond)

    def network_input(self, z: Tensor, sigma: Tensor) -> Tensor:
        """What the network sees of z, same shape.

        The posterior mean is an input like any other: no gradient flows through it.
        """
        if self.noisy_input == "scaled":
            return c_in(append_dims(sigma, z.ndim), self.noise.sigma_data) * z
        with torch.no_grad():
            table = self.model.target_table()
            flat, level = z.flatten(0, -2), sigma.flatten()[:, None]
            chunks = zip(torch.split(flat, self.head_chunk), torch.split(level, self.head_chunk), strict=True)
            return torch.cat([(part @ table.T / s**2).softmax(-1) @ table for part, s in chunks]).view_as(z)

    def logits(self, features: Tensor, z: Tensor | None, sigma: Tensor | None) -> Tensor:
        """[N, V] in fp32, for features [N, D], z [N, D], sigma [N]."""
        out = self.model.logits(features).float()
        if self.readout == "bayes" and z is not None and sigma is not None:
            out = out + z @ self.model.target_table().T / sigma[:, None] ** 2
        return out

    @torch.no_grad()
    def predictions(
        self, features: Tensor, tokens: Tensor, z: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each token [B, L], and the denoised estimate D = softmax(logits) E [B, L, D].

        For features and z [B, L, D], tokens and sigma [B, L]; logits in chunks.
        """
        table = self.model.target_table()
        losses, denoised = [], []
        for start in range(0, tokens.numel(), self.head_chunk):
            rows = slice(start, start + self.head_chunk)
            part = features.flatten(0, 1)[rows], z.flatten(0, 1)[rows], sigma.flatten()[rows]
            logits = self.logits(*part)
            losses.append(F.cross_entropy(logits, tokens.flatten()[rows], reduction="none"))
            denoised.append(logits.softmax(-1) @ table)
        return torch.cat(losses).view(tokens.shape), torch.cat(denoised).view_as(z)

    @torch.no_grad()
    def scored(
        self, layers: Iterable[nn.Module], batch: Batch, tokens: Tensor, z: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of `tokens` [B, L] and the cosine of D with their embeddings, means over a sequence
        [B], and D [B, L, D].

        `batch` is the clean context, z [B, L, D] is at levels sigma [B, L].
        """
        losses, denoised = self.predictions(self.features(layers, batch, z, sigma), tokens, z, sigma)
        true = F.embedding(tokens, self.model.target_table())
        return losses.mean(1), F.cosine_similarity(denoised, true, dim=-1).mean(1), denoised

    def evaluation_call(self, layers: Iterable[nn.Module], batch: Batch) -> object:
        tokens = batch["tokens"]
        z = torch.randn(*tokens.shape, self.model.target_table().shape[1], device=tokens.device)
        return self.scored(layers, batch, tokens, z, torch.ones(tokens.shape, device=tokens.device))

    def _chunked(self, features: Tensor, tokens: Tensor, z: Tensor | None, sigma: Tensor | None) -> Tensor:
        """Cross-entropy of each token, [B, L].

        Logits of `head_chunk` tokens exist at once, and anew in backward.
        """

        def loss(part: Tensor, target: Tensor, z_part: Tensor | None, s_part: Tensor | None) -> Tensor:
            return F.cross_entropy(self.logits(part, z_part, s_part), target, reduction="none")

        noisy = (None, None) if z is None or sigma is None else (z.flatten(0, -2), sigma.flatten())
        return in_chunks(loss, self.head_chunk, features.flatten(0, -2), tokens.flatten(), *noisy).view(
            tokens.shape
        )

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        return {"table_cosine": mean_cosine(self.model.target_table()[:HEALTH_ROWS])}
