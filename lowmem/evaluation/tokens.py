"""Autoregressive language models: each block and the joint prediction at sigma_max, a cross-entropy per level, and generated text.

At sigma_max the noisy token says nothing, so a block's cross-entropy is a plain next-token prediction, comparable with an
ordinary model's. The joint prediction averages the log-probabilities of all blocks there (renormalised): one pass over as many
layers as the ordinary model has, with a perplexity, temperature and top-p.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.config import NoiseConfig
from lowmem.data import Dataset
from lowmem.evaluation.common import test_batches
from lowmem.models.base import Batch
from lowmem.models.causal_lm import CausalLm
from lowmem.models.layers import KeyValueCache, Layer
from lowmem.noise import append_dims, c_noise, sigma_at
from lowmem.objectives.base import mean_cosine
from lowmem.objectives.tokens import TokenDenoising
from lowmem.sampler import FrozenRun
from lowmem.schedule import mix_seed


def evaluate(frozen: FrozenRun, data: Dataset) -> dict[str, Any]:
    model, objective = _parts(frozen)
    plan = frozen.plan
    batches = test_batches(frozen, data)
    if plan.recipe.method == "end_to_end":
        with frozen.on_device(range(plan.settings.num_blocks)) as layers:
            losses = torch.cat([objective.end_to_end_loss(model, layers, batch, plan.noise, False) for batch in batches])
        return {**headline(losses), "per_block": []}

    noise, num_blocks = plan.noise, plan.settings.num_blocks
    table = model.target_table()
    torch.manual_seed(mix_seed(plan.recipe.train.seed, "evaluate"))
    log_probs: list[Tensor] = []
    per_block, levels = [], []
    for block, layers in frozen.walk(range(num_blocks)):
        at_top = [_log_probs(frozen, layers, batch, noise.sigma_max) for batch in batches]
        log_probs = at_top if not log_probs else [a + b for a, b in zip(log_probs, at_top, strict=True)]
        alone = torch.cat([nll(logp, batch["tokens"]).mean(1) for logp, batch in zip(at_top, batches, strict=True)])
        per_block.append({"block": block, "sigma_max_ce": float(alone.mean())})
        for sigma in _levels(block, num_blocks, noise):
            true, shuffled = (
                torch.cat([_oracle(frozen, layers, batch, table, sigma, shuffle) for batch in batches]).mean() for shuffle in (False, True)
            )
            levels.append({"sigma": sigma, "block": block, "ce": float(true), "ce_shuffled": float(shuffled)})
    joint = torch.cat([nll((total / num_blocks).log_softmax(-1), batch["tokens"]).mean(1) for total, batch in zip(log_probs, batches, strict=True)])
    figures = headline(joint)
    return {**figures, "sigma_max_ce": figures["value"], "per_block": per_block, "levels": levels, "table_cosine": mean_cosine(table)}


def _levels(block: int, num_blocks: int, noise: NoiseConfig) -> list[float]:
    """The middle of the block's interval by probability; sigma_max too for the first block, sigma_min for the last."""
    middle = sigma_at(1 - (block + 0.5) / num_blocks, noise)
    return [*([noise.sigma_max] if block == 0 else []), middle, *([noise.sigma_min] if block == num_blocks - 1 else [])]


@torch.no_grad()
def generate(frozen: FrozenRun, prompt: Tensor, num_tokens: int, temperature: float, top_p: float, seed: int, use_cache: bool = True) -> Tensor:
    """Continues `prompt` [B, L] (L may be 0) by `num_tokens` tokens drawn from the joint prediction (or the whole model's).

    Each block keeps its own cache of clean keys and values. `use_cache=False` computes every token from the whole prefix.
    """
    model, objective = _parts(frozen)
    noise = frozen.plan.noise
    generator = torch.Generator().manual_seed(mix_seed(seed, "generate"))
    with frozen.on_device(range(frozen.plan.settings.num_blocks)) as layers:
        groups: list[list[nn.Module]] = [layers] if model.whole else [[model.layers[i] for i in part] for part in frozen.slices]
        caches = [[KeyValueCache() for _ in group] for group in groups]
        start = torch.full((len(prompt), 1), model.vocab_size, device=frozen.device)
        tokens = torch.cat([start, prompt], dim=1) if model.whole else prompt
        fed = 0
        for _ in range(num_tokens):
            if not use_cache:
                caches, fed = [[KeyValueCache() for _ in group] for group in groups], 0
            logits = torch.zeros(len(prompt), model.vocab_size, device=frozen.device)
            z = torch.randn(len(prompt), 1, model.head.in_features, generator=generator).to(frozen.device) * noise.sigma_max
            for group, cache in zip(groups, caches, strict=True):
                out = _advance(model, objective, group, cache, tokens, fed, z, noise)
                logits += out.log_softmax(-1) / len(groups)
            fed = tokens.shape[1]
            tokens = torch.cat([tokens, _draw(logits / max(temperature, 1e-6), top_p, generator)], dim=1)
    return tokens[:, 1:] if model.whole else tokens


def _advance(
    model: CausalLm, objective: TokenDenoising, layers: list[nn.Module], caches: list[KeyValueCache], tokens: Tensor, fed: int, z: Tensor, noise: Any
) -> Tensor:
    """Feeds the clean tokens from `fed` on into the caches; logits [B, V] of the next token."""
    zero = torch.zeros(len(tokens), device=tokens.device)
    cond = model.time(zero)
    h = None
    for position in range(fed, tokens.shape[1]):
        h = _through(layers, caches, model.clean(tokens[:, position : position + 1]), cond, keep=True)
    if model.whole:
        assert h is not None, "the start token is always fed"
        return objective.logits(model, model.features(h, cond)[:, 0], None, None)
    sigma = torch.full((len(tokens), 1), noise.sigma_max, device=tokens.device)
    cond = model.time(c_noise(sigma))
    h = _through(layers, caches, model.noisy(objective.network_input(model, z, sigma, noise)), cond, keep=False)
    return objective.logits(model, model.features(h, cond)[:, 0], z[:, 0], sigma[:, 0])


def _through(layers: list[nn.Module], caches: list[KeyValueCache], h: Tensor, cond: Tensor, keep: bool) -> Tensor:
    for layer, cache in zip(layers, caches, strict=True):
        assert isinstance(layer, Layer)
        h = layer(h, cond, cache, keep)
    return h


def _draw(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One token of each row, [B, 1], from the smallest set of tokens with probability `top_p`."""
    probs, order = logits.softmax(-1).sort(descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    return order.gather(1, torch.multinomial(probs.cpu(), 1, generator=generator).to(order.device))


def _log_probs(frozen: FrozenRun, layers: list[nn.Module], batch: Batch, sigma: float) -> Tensor:
    """[B, L, V] from pure noise at `sigma`."""
    model, objective = _parts(frozen)
    tokens = batch["tokens"]
    levels = torch.full(tokens.shape, sigma, device=tokens.device)
    z = torch.randn(*tokens.shape, model.head.in_features, device=tokens.device) * math.sqrt(1 + sigma**2)
    features = objective.features(model, layers, batch, z, levels, frozen.plan.noise)
    out = objective.logits(model, features.flatten(0, 1), z.flatten(0, 1), levels.flatten())
    return out.log_softmax(-1).view(*tokens.shape, -1)


def _oracle(frozen: FrozenRun, layers: list[nn.Module], batch: Batch, table: Tensor, sigma: float, shuffle: bool) -> Tensor:
    """Cross-entropy [B] on z made from the true tokens, with the true clean context or with another sequence's."""
    model, objective = _parts(frozen)
    tokens = batch["tokens"]
    levels = torch.full(tokens.shape, sigma, device=tokens.device)
    y = F.embedding(tokens, table)
    z = y + append_dims(levels, 3) * torch.randn_like(y)
    context = {"tokens": tokens.roll(1, 0)} if shuffle else batch
    features = objective.features(model, layers, context, z, levels, frozen.plan.noise)
    logits = objective.logits(model, features.flatten(0, 1), z.flatten(0, 1), levels.flatten())
    return nll(logits.log_softmax(-1).view(*tokens.shape, -1), tokens).mean(1)


def nll(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return -log_probs.gather(-1, tokens[..., None])[..., 0]


def headline(losses: Tensor) -> dict[str, Any]:
    """Nats per token, over sequences, with the standard error of the mean."""
    error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else None
    return {"metric": "cross_entropy", "value": float(losses.mean()), "value_std_error": error, "perplexity": math.exp(float(losses.mean()))}


def _parts(frozen: FrozenRun) -> tuple[CausalLm, TokenDenoising]:
    model, objective = frozen.model, frozen.model.objective
    assert isinstance(model, CausalLm) and isinstance(objective, TokenDenoising)
    return model, objective
