"""The recurrent core as one denoiser: a single pass at a drawn level replaces back-propagation through its
iterations.

One level is drawn per sequence: every position's state is at the same one, as in the loop at inference. The
control, trained end to end, runs a drawn number of iterations (Poisson, mean `iterations`) and
back-propagates through the last `backprop_iterations`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.noise import Interval, append_dims, c_noise, drawn_levels
from lowmem.objectives.base import Batch, Entered, Kept, at_levels, run_layers
from lowmem.objectives.tokens import TokenDenoising, TokenModel
from lowmem.recipe import NoiseConfig, NoisyInput, Readout


class RecurrentModel(TokenModel, Protocol):
    """See `lowmem.models.recurrent_lm.RecurrentLm`."""

    def parts(
        self, layers: Sequence[nn.Module]
    ) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]: ...

    def shifted(self, tokens: Tensor) -> Tensor: ...

    def noisy(self, noisy: Tensor) -> Tensor: ...

    def condition(self, c_noise: Tensor) -> Tensor: ...

    def inject(self, state: Tensor, embedded: Tensor) -> Tensor: ...

    def features(self, h: Tensor, cond: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Iterations(Kept):
    count: int


class RecurrentDenoising(TokenDenoising):
    """Losses in nats per token, [B].

    A block is trained alone only where it is all of the model: prelude, core and coda together. `iterations`
    is the mean number of passes through the core, `backprop_iterations` how many of them gradients flow
    through, and `fixed_iterations` the number of every loop where it is not drawn.
    """

    model: RecurrentModel

    def __init__(
        self,
        model: RecurrentModel,
        noise: NoiseConfig,
        noisy_input: NoisyInput,
        readout: Readout,
        head_chunk: int,
        iterations: int,
        backprop_iterations: int,
        fixed_iterations: int | None = None,
    ) -> None:
        super().__init__(model, noise, noisy_input, readout, head_chunk)
        self.iterations, self.backprop_iterations = iterations, backprop_iterations
        self.fixed_iterations = fixed_iterations

    def counted(self) -> RecurrentDenoising:
        """With the mean number of iterations, but more than are back-propagated: the others take time, no
        memory.
        """
        fixed = max(self.iterations, self.backprop_iterations + 1)
        loops = self.iterations, self.backprop_iterations, fixed
        return RecurrentDenoising(
            self.model, self.noise, self.noisy_input, self.readout, self.head_chunk, *loops
        )

    def block_loss(
        self, layers: Iterable[nn.Module], batch: Batch, interval: Interval, recompute: bool = False
    ) -> Tensor:
        tokens = batch["tokens"]
        sigma = drawn_levels((len(tokens),), tokens.device, interval, self.noise)
        y = F.embedding(tokens, self.model.target_table())
        z = y + append_dims(sigma, 3) * torch.randn_like(y)
        levels = sigma[:, None].expand(tokens.shape)
        loss = self._chunked(self.features(layers, batch, z, levels, recompute), tokens, z, levels).mean(1)
        return at_levels(loss, sigma, self.noise)

    def features(
        self, layers: Iterable[nn.Module], batch: Batch, z: Tensor, sigma: Tensor, recompute: bool = False
    ) -> Tensor:
        """One iteration of the core on the state z [B, L, D], at the sequence's level sigma [B, L]."""
        model = self.model
        prelude, core, coda = model.parts(list(layers))
        still, cond = self._still(batch["tokens"]), model.condition(c_noise(sigma[:, 0]))
        embedded = run_layers(prelude, model.shifted(batch["tokens"]), still, recompute)
        state = model.noisy(self.network_input(z, sigma))
        h = run_layers([*core, *coda], model.inject(state, embedded), cond, recompute)
        return model.features(h, cond)

    def enter(self, batch: Batch) -> Entered:
        drawn = self.fixed_iterations or self.drawn_iterations(random.Random(torch.initial_seed()))
        return self.entered(batch["tokens"], drawn)

    def entered(self, tokens: Tensor, iterations: int) -> Entered:
        return Entered(self.model.shifted(tokens), self._still(tokens), Iterations(iterations))

    def through(
        self, layers: Iterable[nn.Module], h: Tensor, cond: Tensor, kept: Kept, recompute: bool = False
    ) -> Tensor:
        """The core, all of it, runs the whole loop; gradients flow through its last `backprop_iterations`."""
        assert isinstance(kept, Iterations)
        prelude, core, coda = self.model.parts(list(layers))
        h = run_layers(prelude, h, cond, recompute)
        if core:
            embedded, h = h, torch.randn_like(h)
            free = max(kept.count - self.backprop_iterations, 0)
            with torch.no_grad():
                for _ in range(free):
                    h = run_layers(core, self.model.inject(h, embedded), cond)
            for _ in range(kept.count - free):
                h = run_layers(core, self.model.inject(h, embedded), cond, recompute)
        return run_layers(coda, h, cond, recompute)

    def leave(self, h: Tensor, cond: Tensor, kept: Kept, batch: Batch) -> Tensor:
        return self.plain_losses(self.model.features(h, cond), batch["tokens"]).mean(1)

    def drawn_iterations(self, generator: random.Random) -> int:
        """At least 1; Poisson with mean `iterations`, by counting unit-rate arrivals."""
        count, clock = 0, generator.expovariate(1.0)
        while clock < self.iterations:
            count, clock = count + 1, clock + generator.expovariate(1.0)
        return max(count, 1)

    def _still(self, tokens: Tensor) -> Tensor:
        """The condition where there is no level: in the prelude, and in the loop trained end to end."""
        return self.model.condition(torch.zeros(len(tokens), device=tokens.device))
