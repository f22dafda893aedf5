"""Tokens drawn from a trained text model: filled in by a masked one, added one by one by the others.

All drawing functions take the same arguments: a `prompt` [B, L], the number of tokens to add, how to draw,
and a seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.base import BlockModel
from lowmem.models.causal_lm import CausalLm
from lowmem.models.layers import KeyValueCache, Layer
from lowmem.noise import c_noise
from lowmem.objectives.masked import MaskedDenoising
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.objectives.tokens import TokenDenoising
from lowmem.schedule import mix_seed

COLDEST = 1e-6  # temperature 0 divides by this, and so takes the likeliest token


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from logits."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def token(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """One token of each row of logits [B, V], [B, 1], from the smallest set with probability `top_p`."""
        probs, order = (logits / max(self.temperature, COLDEST)).softmax(-1).sort(descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0)
        return order.gather(1, torch.multinomial(probs.cpu(), 1, generator=generator).to(order.device))


# ------------------------------------------------------------------------------------------------------------
# Masked models


def fill(frozen: FrozenRun, prompt: Tensor, num_tokens: int, draw: Draw) -> Tensor:
    """One whole sequence for each row of `prompt`, which is not read: [B, L], without masks."""
    recipe = frozen.plan.recipe
    assert recipe.train.seq_len is not None
    num_steps = recipe.train.seq_len if recipe.eval.num_steps == "auto" else recipe.eval.num_steps
    return sample_tokens(frozen, len(prompt), num_steps, draw)


@torch.no_grad()
def sample_tokens(frozen: FrozenRun, num: int, num_steps: int, draw: Draw) -> Tensor:
    """[num, L], int64, without masks: ancestral sampling (MD4, section 3) in steps of equal alpha.

    In a step from t to s each masked token is given its draw, from the block that owns the step, with
    probability (alpha(s) - alpha(t)) / (1 - alpha(t)). As many steps as blocks are one call of each. Only
    tokens that are given their draw cost logits.
    """
    model, objective = frozen.parts(BlockModel, MaskedDenoising)
    num_blocks = len(frozen.blocks)
    generator = torch.Generator().manual_seed(mix_seed(draw.seed, "sample"))
    tokens = torch.zeros_like(model.example_batch(num)["tokens"], device=frozen.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for block, layers in frozen.walk_owners(frozen.blocks):
        for step in range(num_steps):
            # alpha(t) = step / num_steps, and block b owns alpha from b / B on
            if step * num_blocks // num_steps != block:
                continue
            t = torch.full((num,), objective.alpha_inverse(step / num_steps), device=frozen.device)
            odds = 1 / (num_steps - step)  # in the last step all that are left
            unmask_now = mask & (torch.rand(tokens.shape, generator=generator).to(frozen.device) < odds)
            if not unmask_now.any():
                continue
            features = objective.features(layers, tokens, mask, t)[unmask_now]
            parts = torch.split(features, objective.head_chunk)
            drawn = [draw.token(objective.logits(part), generator)[:, 0] for part in parts]
            tokens[unmask_now] = torch.cat(drawn)
            mask = mask & ~unmask_now
    return tokens


# ------------------------------------------------------------------------------------------------------------
# Causal models


@torch.no_grad()
def generate(
    frozen: FrozenRun, prompt: Tensor, num_tokens: int, draw: Draw, use_cache: bool = True
) -> Tensor:
    """Continues `prompt` [B, L] (L may be 0) by tokens drawn from the joint prediction, or from the whole
    model's.

    Each block keeps its own cache of clean keys and values. `use_cache=False` computes every token from the
    whole prefix.
    """
    model, objective = frozen.parts(CausalLm, TokenDenoising)
    generator = torch.Generator().manual_seed(mix_seed(draw.seed, "generate"))
    with frozen.on_device(frozen.blocks) as layers:
        groups = frozen.each_alone()
        sizes = [len(part) for part in frozen.slices]
        if model.whole:
            groups, sizes = [layers], [len(model.layers)]
        caches = [[KeyValueCache() for _ in range(size)] for size in sizes]
        start = torch.full((len(prompt), 1), model.vocab_size, device=frozen.device)
        tokens = torch.cat([start, prompt], dim=1) if model.one_stream else prompt
        fed = 0
        for _ in range(num_tokens):
            if not use_cache:
                caches, fed = [[KeyValueCache() for _ in range(size)] for size in sizes], 0
            logits = torch.zeros(len(prompt), model.vocab_size, device=frozen.device)
            z = torch.randn(len(prompt), 1, model.head.in_features, generator=generator)
            z = z.to(frozen.device) * objective.noise.sigma_max
            for group, cache in zip(groups, caches, strict=True):
                out = _advance(model, objective, group, cache, tokens, fed, z)
                logits += out.log_softmax(-1) / len(groups)
            fed = tokens.shape[1]
            tokens = torch.cat([tokens, draw.token(logits, generator)], dim=1)
    return tokens[:, 1:] if model.one_stream else tokens


def rows_at_once(frozen: FrozenRun, length: int) -> int:
    """Sequences of `length` tokens that one draw may hold in the plan's budget, at least 1."""
    model, _ = frozen.model, frozen.objective
    if not isinstance(model, CausalLm):
        return frozen.sized().micro_batch_size  # a draw is the call of an evaluation
    of_layer = 2 * length * model.head.in_features * model.head.weight.element_size()
    # the caches of all layers, a longer one beside its old one, and the logits with what a draw makes of them
    row = (len(model.layers) + 1) * of_layer + 8 * 4 * model.vocab_size
    return max(frozen.room_bytes // row, 1)


def _advance(
    model: CausalLm,
    objective: TokenDenoising,
    layers: Iterable[nn.Module],
    caches: list[KeyValueCache],
    tokens: Tensor,
    fed: int,
    z: Tensor,
) -> Tensor:
    """Feeds the clean tokens from `fed` on into the caches. Returns the logits [B, V] of the next token."""
    cond = model.condition(torch.zeros(len(tokens), device=tokens.device))
    h = None
    for position in range(fed, tokens.shape[1]):
        h = _through(layers, caches, model.clean(tokens[:, position : position + 1]), cond, keep=True)
    sigma = torch.full((len(tokens), 1), objective.noise.sigma_max, device=tokens.device)
    if model.one_stream:
        assert h is not None, "the start token is always fed"
        evidence = (None, None) if model.whole else (z[:, 0], sigma[:, 0])
        return objective.logits(model.features(h, cond)[:, 0], *evidence)
    cond = model.condition(c_noise(sigma))
    h = _through(layers, caches, model.noisy(objective.network_input(z, sigma)), cond, keep=False)
    return objective.logits(model.features(h, cond)[:, 0], z[:, 0], sigma[:, 0])


def _through(
    layers: Iterable[nn.Module], caches: list[KeyValueCache], h: Tensor, cond: Tensor, keep: bool
) -> Tensor:
    for layer, cache in zip(layers, caches, strict=True):
        assert isinstance(layer, Layer)
        h = layer(h, cond, cache, keep)
    return h


# ------------------------------------------------------------------------------------------------------------
# Recurrent models


@torch.no_grad()
def generate_recurrent(frozen: FrozenRun, prompt: Tensor, num_tokens: int, draw: Draw) -> Tensor:
    """Continues `prompt` [B, L] (L may be 0): [B, L + num_tokens], each token drawn from a prediction of its
    own.

    A prediction is one pass at sigma_max, or the whole loop with the mean number of iterations, over the last
    tokens: no more than the model was trained on. There is no cache, because the state of each position is
    made anew.
    """
    seq_len = frozen.model.example_batch(1)["tokens"].shape[1]
    torch.manual_seed(mix_seed(draw.seed, "states"))
    generator = torch.Generator().manual_seed(mix_seed(draw.seed, "generate"))
    tokens = prompt
    for _ in range(num_tokens):
        window = tokens[:, max(tokens.shape[1] + 1 - seq_len, 0) :]
        tokens = torch.cat([tokens, draw.token(_next_logits(frozen, window), generator)], dim=1)
    return tokens


def _next_logits(frozen: FrozenRun, tokens: Tensor) -> Tensor:
    """[B, V], of the token after `tokens` [B, L]."""
    _, objective = frozen.parts(BlockModel, RecurrentDenoising)
    model, sigma_max = objective.model, objective.noise.sigma_max
    # Position i is predicted from tokens < i, so what stands at the last position does not count.
    batch = {"tokens": F.pad(tokens, (0, 1))}
    if frozen.plan.recipe.whole:
        features = frozen.whole(
            [batch],
            lambda each: objective.entered(each["tokens"], objective.iterations),
            lambda _, h, entered: model.features(h, entered.cond)[:, -1],
        )
        return objective.logits(features, None, None)
    levels = torch.full(batch["tokens"].shape, sigma_max, device=tokens.device)
    z = initial_noise((*levels.shape, model.target_table().shape[1]), sigma_max).to(tokens.device)
    with frozen.on_device(frozen.blocks) as layers:
        features = objective.features(layers, batch, z, levels)
        return objective.logits(features[:, -1], z[:, -1], levels[:, -1])
