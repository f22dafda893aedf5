"""The mathematics of noise: EDM preconditioning, the equi-probability partition, truncated draws of sigma,
the sampler's grid.

Paper letters throughout (arXiv 2506.14202, EDM = arXiv 2206.00364). A legend:
    y  clean target            sigma  noise level, in [sigma_min, sigma_max]      z = y + sigma eps, eps ~ N(0, I)
    D  denoised estimate of y  F      the network's raw output                    q  probability of a level below sigma
Block 0 = first layers = highest noise. Boundaries are ascending, so block b owns (boundaries[B-1-b], boundaries[B-b]).
Scalars that set up a run are Python floats (no torch needed to plan them); what runs at each step is torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lowmem.errors import ConfigError
from lowmem.recipe import STANDARD_NORMAL

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowmem.recipe import NoiseConfig


class Interval(NamedTuple):
    """A block's noise levels, low < high."""

    low: float
    high: float


# ------------------------------------------------------------------------------------------------------------
# Preconditioning (EDM, table 1)


def c_skip(sigma: Tensor, sigma_data: float) -> Tensor:
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float) -> Tensor:
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    return 1 / (sigma**2 + sigma_data**2).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    return sigma.log() / 4


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) = 1 / c_out^2, so that w ||D - y||^2 = ||F - F_target||^2."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """[B] -> [B, 1, ..., 1] with `ndim` dimensions, so that a product per sample is never a broadcast by
    accident.
    """
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


# ------------------------------------------------------------------------------------------------------------
# Partition (paper, section 3.3): equal probability under ln sigma ~ N(P_mean, P_std^2), truncated to
# [sigma_min, sigma_max]


def quantile(sigma: float, noise: NoiseConfig) -> float:
    return STANDARD_NORMAL.cdf((math.log(sigma) - noise.p_mean) / noise.p_std)


def sigma_at(fraction: float, noise: NoiseConfig) -> float:
    """The level below which `fraction` of the truncated distribution lies; exact at both ends."""
    if fraction <= 0:
        return noise.sigma_min
    if fraction >= 1:
        return noise.sigma_max
    q_min, q_max = quantile(noise.sigma_min, noise), quantile(noise.sigma_max, noise)
    return math.exp(noise.p_mean + noise.p_std * STANDARD_NORMAL.inv_cdf(q_min + fraction * (q_max - q_min)))


def boundaries(num_blocks: int, noise: NoiseConfig) -> list[float]:
    """The B + 1 borders of the blocks' intervals, ascending."""
    return [sigma_at(b / num_blocks, noise) for b in range(num_blocks + 1)]


def block_interval(block: int, num_blocks: int, noise: NoiseConfig, gamma: float = 0.0) -> Interval:
    """The interval a block is trained on: its own, widened by alpha = (high / low)^gamma each way, clamped to
    the range.
    """
    borders = boundaries(num_blocks, noise)
    low, high = borders[num_blocks - 1 - block], borders[num_blocks - block]
    alpha = (high / low) ** gamma
    return Interval(max(low / alpha, noise.sigma_min), min(high * alpha, noise.sigma_max))


def block_of(sigma: float, borders: Sequence[float]) -> int:
    """The block that owns `sigma`; a border belongs to the block above it, sigma_min to the last block."""
    num_blocks = len(borders) - 1
    above = sum(sigma >= border for border in borders[1:-1])
    return num_blocks - 1 - above


# ------------------------------------------------------------------------------------------------------------
# Levels that fit a discrete target: where z = y + sigma eps goes from saying everything about y to saying
# nothing

INFORMATION_GRID, INFORMATION_DRAWS, INFORMATION_ROWS = 48, 64, 32_768


@lru_cache
def information_quantiles(num_rows: int, dim: int) -> tuple[float, float, float]:
    """ln sigma at which z leaves a quarter, a half and three quarters of ln K open, K = `num_rows` targets of
    length 1 in `dim` dimensions.

    The entropy of p(y | z) without context, for rows of random direction: z . E_k / sigma^2 = (1[k = y] +
    cos_k + sigma eps_k) / sigma^2. A function of K and D alone (fixed draws), so a plan is the same on every
    machine.
    """
    import numpy as np

    draws = np.random.default_rng(0)
    rows = min(num_rows, INFORMATION_ROWS)
    cosine, eps = (draws.standard_normal((INFORMATION_DRAWS, rows)) for _ in range(2))
    cosine /= math.sqrt(dim)
    cosine[:, 0] = 1.0  # y itself
    ln_sigma = np.linspace(math.log(0.02), math.log(20.0), INFORMATION_GRID)
    entropy = []
    for sigma in np.exp(ln_sigma):
        score = (cosine + sigma * eps) / sigma**2
        score -= score.max(1, keepdims=True)
        weight = np.exp(score)
        total = weight.sum(1)
        entropy.append(float((np.log(total) - (weight * score).sum(1) / total).mean()))
    share = np.maximum.accumulate(entropy) / math.log(rows)
    low, middle, high = (float(np.interp(quarter, share, ln_sigma)) for quarter in (0.25, 0.5, 0.75))
    return low, middle, high


def settled_noise(noise: NoiseConfig, target_shape: tuple[int, int] | None) -> NoiseConfig:
    """The log-normal that `noise` amounts to: p_mean (and p_std) measured where its schedule says so.
    `target_shape`: of the table of targets.

    Raises ConfigError for a schedule that measures a table where the targets are no rows of one.
    """
    if noise.schedule == "lognormal":
        return noise
    if target_shape is None:
        raise ConfigError(
            f"noise.schedule: found '{noise.schedule}'; allowed for targets that are no rows of a table: lognormal"
        )
    low, middle, high = information_quantiles(*target_shape)
    p_std = noise.p_std if noise.schedule == "centred" else (high - low) / (2 * STANDARD_NORMAL.inv_cdf(0.75))
    return noise.model_copy(update={"schedule": "lognormal", "p_mean": middle, "p_std": p_std})


# ------------------------------------------------------------------------------------------------------------
# Drawing and sampling


def sample_sigma(uniform: Tensor, interval: Interval, noise: NoiseConfig) -> Tensor:
    """Levels for `uniform` draws in [0, 1): the log-normal truncated to `interval`, by inverse CDF in
    float64. Same shape, float32.
    """
    import torch

    q_low, q_high = quantile(interval.low, noise), quantile(interval.high, noise)
    ln_sigma: Tensor = noise.p_mean + noise.p_std * torch.special.ndtri(
        q_low + uniform.double() * (q_high - q_low)
    )
    return ln_sigma.exp().clamp(interval.low, interval.high).float()


def drawn_levels(
    shape: Sequence[int], device: torch.device, interval: Interval, noise: NoiseConfig
) -> Tensor:
    """Levels of `shape` from the interval, a share of them (`noise.sigma_max_share`) at sigma_max instead."""
    import torch

    sigma = sample_sigma(torch.rand(*shape, device=device), interval, noise)
    if noise.sigma_max_share:
        sigma = torch.where(torch.rand(*shape, device=device) < noise.sigma_max_share, noise.sigma_max, sigma)
    return sigma


def sampler_grid(num_steps: int, noise: NoiseConfig) -> list[float]:
    """The levels at which the sampler calls the network: equi-probability points from sigma_max down to
    sigma_min.

    50 steps over 3 blocks are 17, 16 and 17 calls; as many steps as blocks are one call of each. The last
    call returns D itself.
    """
    if num_steps == 1:
        return [noise.sigma_max]
    return [sigma_at(1 - i / (num_steps - 1), noise) for i in range(num_steps)]


def euler_step(z: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """z <- alpha z + (1 - alpha) D, alpha = sigma_next / sigma.

    (The sign printed in the paper's Eq. 3-5 is wrong.)
    """
    alpha = sigma_next / sigma
    return alpha * z + (1 - alpha) * denoised
