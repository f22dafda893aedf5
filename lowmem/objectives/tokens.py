"""Next-token prediction as denoising of the token's embedding, for a sequence with a clean and a noisy half
(paper, App. B).

The level is drawn per token. For one next token given its clean context Bayes' rule factorises, p(y | x, z) ~
p(y | x) exp(z . E_y / sigma^2) (rows of length 1), so with `readout: bayes` the network has only p(y | x)
left to learn, at every level; with `noisy_input: posterior` its noisy token is E[y | z] = softmax(E z /
sigma^2) E instead of c_in z, with `none` it sees no noisy token at all: the sequence has no noisy half, and a
block costs what its layers cost an ordinary model. Logits exist for `head_chunk` tokens at a time: forward
and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, block_interval, c_in, c_noise, drawn_levels, loss_weight
from lowmem.objectives.base import Entered, WholeLoss, in_chunks, mean_cosine, run_layers, weighted
from lowmem.recipe import NoiseConfig, NoisyInput, Readout

if TYPE_CHECKING:
    from lowmem.models.base import Batch, BlockModel
    from lowmem.models.text import TextModel

HEALTH_ROWS = 4096  # of the table, for its mean cosine


class TokenDenoising(WholeLoss):
    """Losses are means over a sequence's tokens, in nats per token, [B]."""

    def __init__(self, noisy_input: NoisyInput, readout: Readout, head_chunk: int) -> None:
        self.noisy_input, self.readout, self.head_chunk = noisy_input, readout, head_chunk

    def interval(self, block: int, num_blocks: int, noise: NoiseConfig, gamma: float) -> Interval:
        return block_interval(block, num_blocks, noise, gamma)

    def block_loss(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        interval: Interval,
        noise: NoiseConfig,
        recompute: bool,
    ) -> Tensor:
        tokens = batch["tokens"]
        sigma = drawn_levels(tokens.shape, tokens.device, interval, noise)
        table: Tensor = model.target_table()  # type: ignore[operator]
        y = F.embedding(tokens, table)
        z = y + append_dims(sigma, 3) * torch.randn_like(y)
        loss = self.losses(model, layers, batch, z, sigma, noise, recompute)
        if noise.weighting == "edm":
            loss = weighted(loss, loss_weight(sigma, noise.sigma_data))
        return loss.mean(1)

    def enter(self, model: BlockModel, batch: Batch, noise: NoiseConfig) -> Entered:
        return Entered(*model.input_part(batch, None, None), {})

    def leave(
        self,
        model: BlockModel,
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        batch: Batch,
        noise: NoiseConfig,
    ) -> Tensor:
        return self._chunked(model, model.output_part(h, cond), batch["tokens"], None, None).mean(1)

    def losses(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        z: Tensor,
        sigma: Tensor,
        noise: NoiseConfig,
        recompute: bool = False,
    ) -> Tensor:
        """Cross-entropy of each token, [B, L], for z [B, L, D] at levels sigma [B, L]."""
        features = self.features(model, layers, batch, z, sigma, noise, recompute)
        return self._chunked(model, features, batch["tokens"], z, sigma)

    def features(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        batch: Batch,
        z: Tensor,
        sigma: Tensor,
        noise: NoiseConfig,
        recompute: bool = False,
    ) -> Tensor:
        seen = (
            (None, None)
            if self.noisy_input == "none"
            else (self.network_input(model, z, sigma, noise), c_noise(sigma))
        )
        h, cond = model.input_part(batch, *seen)
        return model.output_part(run_layers(layers, h, cond, recompute), cond)

    def network_input(self, model: BlockModel, z: Tensor, sigma: Tensor, noise: NoiseConfig) -> Tensor:
        """What the network sees of z, same shape.

        The posterior mean is an input like any other: no gradient flows through it.
        """
        if self.noisy_input == "scaled":
            return c_in(append_dims(sigma, z.ndim), noise.sigma_data) * z
        with torch.no_grad():
            table: Tensor = model.target_table()  # type: ignore[operator]
            flat, level = z.flatten(0, -2), sigma.flatten()[:, None]
            chunks = zip(torch.split(flat, self.head_chunk), torch.split(level, self.head_chunk), strict=True)
            return torch.cat([(part @ table.T / s**2).softmax(-1) @ table for part, s in chunks]).view_as(z)

    def logits(self, model: BlockModel, features: Tensor, z: Tensor | None, sigma: Tensor | None) -> Tensor:
        """[N, V] in fp32, for features [N, D], z [N, D], sigma [N]."""
        lm: TextModel = model  # type: ignore[assignment]
        out: Tensor = lm.head(features).float()
        if self.readout == "bayes" and z is not None and sigma is not None:
            out = out + z @ lm.target_table().T / sigma[:, None] ** 2
        return out

    @torch.no_grad()
    def predictions(
        self, model: BlockModel, features: Tensor, tokens: Tensor, z: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each token [B, L], and the denoised estimate D = softmax(logits) E [B, L, D];
        logits in chunks.

        For features and z [B, L, D], tokens and sigma [B, L].
        """
        table: Tensor = model.target_table()  # type: ignore[operator]
        losses, denoised = [], []
        for start in range(0, tokens.numel(), self.head_chunk):
            rows = slice(start, start + self.head_chunk)
            logits = self.logits(
                model, features.flatten(0, 1)[rows], z.flatten(0, 1)[rows], sigma.flatten()[rows]
            )
            losses.append(F.cross_entropy(logits, tokens.flatten()[rows], reduction="none"))
            denoised.append(logits.softmax(-1) @ table)
        return torch.cat(losses).view(tokens.shape), torch.cat(denoised).view_as(z)

    def _chunked(
        self, model: BlockModel, features: Tensor, tokens: Tensor, z: Tensor | None, sigma: Tensor | None
    ) -> Tensor:
        """Cross-entropy of each token, [B, L]; logits of `head_chunk` tokens exist at once and are made again
        in backward.
        """

        def loss(part: Tensor, target: Tensor, z_part: Tensor | None, s_part: Tensor | None) -> Tensor:
            return F.cross_entropy(self.logits(model, part, z_part, s_part), target, reduction="none")

        noisy = (None, None) if z is None or sigma is None else (z.flatten(0, -2), sigma.flatten())
        return in_chunks(loss, self.head_chunk, features.flatten(0, -2), tokens.flatten(), *noisy).view(
            tokens.shape
        )

    @torch.no_grad()
    def health(self, model: BlockModel) -> dict[str, float]:
        return {"table_cosine": mean_cosine(model.target_table()[:HEALTH_ROWS])}  # type: ignore[operator]
