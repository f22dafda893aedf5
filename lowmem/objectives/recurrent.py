"""The recurrent core as one denoiser: a single pass at a drawn level, in place of back-propagation through
its iterations.

One level per sequence: every position's state is at the same one, as in the loop at inference. The control,
trained end to end, runs a drawn number of iterations (Poisson, mean `iterations`) and back-propagates through
the last `backprop_iterations`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, c_noise, drawn_levels, loss_weight
from lowmem.objectives.base import Entered, run_layers, weighted
from lowmem.objectives.tokens import TokenDenoising
from lowmem.recipe import NoiseConfig, RecurrentLmModel

if TYPE_CHECKING:
    from lowmem.models.base import Batch, BlockModel
    from lowmem.models.recurrent_lm import RecurrentLm


class RecurrentDenoising(TokenDenoising):
    """Losses in nats per token, [B].

    A block is trained alone only where it is all of the model: prelude, core and coda together.
    """

    def __init__(self, config: RecurrentLmModel) -> None:
        super().__init__(config.noisy_input, config.readout, config.head_chunk)
        self.config = config
        self.fixed_iterations: int | None = None  # set where a pass is counted, not trained

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
        sigma = drawn_levels((len(tokens),), tokens.device, interval, noise)
        y = F.embedding(tokens, model.target_table())  # type: ignore[operator]
        z = y + append_dims(sigma, 3) * torch.randn_like(y)
        levels = sigma[:, None].expand(tokens.shape)
        loss = self.losses(model, layers, batch, z, levels, noise, recompute).mean(1)
        return weighted(loss, loss_weight(sigma, noise.sigma_data)) if noise.weighting == "edm" else loss

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
        """One iteration of the core on the state z [B, L, D], at the sequence's level sigma [B, L]."""
        lm: RecurrentLm = model  # type: ignore[assignment]
        prelude, core, coda = lm.parts(list(layers))
        still, cond = self._still(lm, batch["tokens"]), lm.time(c_noise(sigma[:, 0]))
        embedded = run_layers(prelude, lm.shifted(batch["tokens"]), still, recompute)
        state = lm.noisy(self.network_input(model, z, sigma, noise))
        return lm.features(run_layers([*core, *coda], lm.inject(state, embedded), cond, recompute), cond)

    def enter(self, model: BlockModel, batch: Batch, noise: NoiseConfig) -> Entered:
        return self.entered(
            model,
            batch["tokens"],
            self.fixed_iterations or self.drawn_iterations(random.Random(torch.initial_seed())),
        )

    def entered(self, model: BlockModel, tokens: Tensor, iterations: int) -> Entered:
        lm: RecurrentLm = model  # type: ignore[assignment]
        return Entered(lm.shifted(tokens), self._still(lm, tokens), {"iterations": iterations})

    def through(
        self,
        model: BlockModel,
        layers: Iterable[nn.Module],
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        recompute: bool,
    ) -> Tensor:
        """The core, all of it, runs the whole loop; gradients flow through its last `backprop_iterations`."""
        lm: RecurrentLm = model  # type: ignore[assignment]
        prelude, core, coda = lm.parts(list(layers))
        h = run_layers(prelude, h, cond, recompute)
        if core:
            embedded, h = h, torch.randn_like(h)
            free = max(kept["iterations"] - self.config.backprop_iterations, 0)
            with torch.no_grad():
                for _ in range(free):
                    h = run_layers(core, lm.inject(h, embedded), cond)
            for _ in range(kept["iterations"] - free):
                h = run_layers(core, lm.inject(h, embedded), cond, recompute)
        return run_layers(coda, h, cond, recompute)

    def leave(
        self,
        model: BlockModel,
        h: Tensor,
        cond: Tensor,
        kept: dict[str, Any],
        batch: Batch,
        noise: NoiseConfig,
    ) -> Tensor:
        lm: RecurrentLm = model  # type: ignore[assignment]
        return self._chunked(model, lm.features(h, cond), batch["tokens"], None, None).mean(1)

    def drawn_iterations(self, generator: random.Random) -> int:
        """At least 1; Poisson with mean `iterations`, by counting unit-rate arrivals."""
        count, clock = 0, generator.expovariate(1.0)
        while clock < self.config.iterations:
            count, clock = count + 1, clock + generator.expovariate(1.0)
        return max(count, 1)

    @staticmethod
    def _still(lm: RecurrentLm, tokens: Tensor) -> Tensor:
        """The condition where there is no level: prelude, and the loop trained end to end."""
        return lm.time(torch.zeros(len(tokens), device=tokens.device))  # type: ignore[no-any-return]
