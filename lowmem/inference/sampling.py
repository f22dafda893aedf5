"""TODO module docstring."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.inference.evaluation.masked import _parts as _masked_parts
from lowmem.inference.evaluation.masked import _walk
from lowmem.inference.evaluation.tokens import _parts
from lowmem.inference.frozen_run import FrozenRun, initial_noise
from lowmem.models.causal_lm import CausalLm
from lowmem.models.layers import KeyValueCache, Layer
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.noise import c_noise
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.objectives.tokens import TokenDenoising
from lowmem.schedule import mix_seed


@torch.no_grad()
def sample_tokens(
    frozen: FrozenRun, num: int, num_steps: int, seed: int, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """[num, L], int64, without masks: ancestral sampling (MD4, section 3) from all masked to none, in steps
    of equal alpha.

    In a step from t to s each masked token is given its draw from the block that owns the step with
    probability (alpha(s) - alpha(t)) / (1 - alpha(t)); as many steps as blocks are one call of each. Only
    tokens given their draw cost logits.
    """
    model, objective = _masked_parts(frozen)
    num_blocks = frozen.plan.settings.num_blocks
    generator = torch.Generator().manual_seed(mix_seed(seed, "sample"))
    tokens = torch.zeros(num, model.seq_len, dtype=torch.long, device=frozen.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for block, layers in _walk(frozen):
        for step in range(num_steps):
            if (
                step * num_blocks // num_steps != block
            ):  # alpha(t) = step / num_steps, and block b owns alpha from b / B on
                continue
            t = torch.full((num,), objective.alpha_inverse(step / num_steps), device=frozen.device)
            odds = 1 / (num_steps - step)  # all that are left, in the last step
            unmask_now = mask & (torch.rand(tokens.shape, generator=generator).to(frozen.device) < odds)
            if not unmask_now.any():
                continue
            features = objective.features(model, layers, tokens, mask, t)[unmask_now]
            logits = (
                objective.logits(model, part) / max(temperature, 1e-6)
                for part in torch.split(features, objective.head_chunk)
            )
            tokens[unmask_now] = torch.cat([draw_token(part, top_p, generator)[:, 0] for part in logits])
            mask = mask & ~unmask_now
    return tokens


def _next_logits(frozen: FrozenRun, tokens: Tensor) -> Tensor:
    """[B, V], of the token after `tokens` [B, L]."""
    model, objective, noise = frozen.model, frozen.model.objective, frozen.plan.noise
    assert isinstance(model, RecurrentLm) and isinstance(objective, RecurrentDenoising)
    batch = {
        "tokens": F.pad(tokens, (0, 1))
    }  # position i is predicted from tokens < i: what stands at the last one does not count
    if frozen.plan.recipe.method == "end_to_end":
        features = frozen.whole(
            [batch],
            lambda each: objective.entered(model, each["tokens"], objective.config.iterations),
            lambda _, h, entered: model.features(h, entered.cond)[:, -1],
        )
        return objective.logits(model, features, None, None)
    levels = torch.full(batch["tokens"].shape, noise.sigma_max, device=tokens.device)
    z = initial_noise((*levels.shape, model.head.in_features), noise.sigma_max).to(tokens.device)
    with frozen.on_device(range(frozen.plan.settings.num_blocks)) as layers:
        return objective.logits(
            model, objective.features(model, layers, batch, z, levels, noise)[:, -1], z[:, -1], levels[:, -1]
        )


@torch.no_grad()
def generate(
    frozen: FrozenRun,
    prompt: Tensor,
    num_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    use_cache: bool = True,
) -> Tensor:
    """Continues `prompt` [B, L] (L may be 0) by `num_tokens` tokens drawn from the joint prediction (or the
    whole model's).

    Each block keeps its own cache of clean keys and values. `use_cache=False` computes every token from the
    whole prefix.
    """
    model, objective = _parts(frozen)
    noise = frozen.plan.noise
    generator = torch.Generator().manual_seed(mix_seed(seed, "generate"))
    with frozen.on_device(range(frozen.plan.settings.num_blocks)) as layers:
        groups: list[Iterable[nn.Module]] = (
            [layers] if model.whole else [[model.layers[i] for i in part] for part in frozen.slices]
        )
        sizes = [len(model.layers)] if model.whole else [len(part) for part in frozen.slices]
        caches = [[KeyValueCache() for _ in range(size)] for size in sizes]
        start = torch.full((len(prompt), 1), model.vocab_size, device=frozen.device)
        tokens = torch.cat([start, prompt], dim=1) if model.one_stream else prompt
        fed = 0
        for _ in range(num_tokens):
            if not use_cache:
                caches, fed = [[KeyValueCache() for _ in range(size)] for size in sizes], 0
            logits = torch.zeros(len(prompt), model.vocab_size, device=frozen.device)
            z = (
                torch.randn(len(prompt), 1, model.head.in_features, generator=generator).to(frozen.device)
                * noise.sigma_max
            )
            for group, cache in zip(groups, caches, strict=True):
                out = _advance(model, objective, group, cache, tokens, fed, z, noise)
                logits += out.log_softmax(-1) / len(groups)
            fed = tokens.shape[1]
            tokens = torch.cat([tokens, draw_token(logits / max(temperature, 1e-6), top_p, generator)], dim=1)
    return tokens[:, 1:] if model.one_stream else tokens


def _advance(
    model: CausalLm,
    objective: TokenDenoising,
    layers: Iterable[nn.Module],
    caches: list[KeyValueCache],
    tokens: Tensor,
    fed: int,
    z: Tensor,
    noise: Any,
) -> Tensor:
    """Feeds the clean tokens from `fed` on into the caches; logits [B, V] of the next token."""
    zero = torch.zeros(len(tokens), device=tokens.device)
    cond = model.time(zero)
    h = None
    for position in range(fed, tokens.shape[1]):
        h = _through(layers, caches, model.clean(tokens[:, position : position + 1]), cond, keep=True)
    sigma = torch.full((len(tokens), 1), noise.sigma_max, device=tokens.device)
    if model.one_stream:
        assert h is not None, "the start token is always fed"
        evidence = (None, None) if model.whole else (z[:, 0], sigma[:, 0])
        return objective.logits(model, model.features(h, cond)[:, 0], *evidence)
    cond = model.time(c_noise(sigma))
    h = _through(
        layers, caches, model.noisy(objective.network_input(model, z, sigma, noise)), cond, keep=False
    )
    return objective.logits(model, model.features(h, cond)[:, 0], z[:, 0], sigma[:, 0])


def _through(
    layers: Iterable[nn.Module], caches: list[KeyValueCache], h: Tensor, cond: Tensor, keep: bool
) -> Tensor:
    for layer, cache in zip(layers, caches, strict=True):
        assert isinstance(layer, Layer)
        h = layer(h, cond, cache, keep)
    return h


def draw_token(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One token of each row, [B, 1], from the smallest set of tokens with probability `top_p`."""
    probs, order = logits.softmax(-1).sort(descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    return order.gather(1, torch.multinomial(probs.cpu(), 1, generator=generator).to(order.device))
