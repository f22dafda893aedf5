"""The mathematics of noise: preconditioning, the blocks' noise levels, draws of levels, the sampler's grid.

Letters are those of the papers: arXiv 2506.14202 ("the paper") and arXiv 2206.00364 ("EDM").

    y  clean target               sigma  noise level, in [sigma_min, sigma_max]
    D  denoised estimate of y     z      noisy target, y + sigma eps with eps ~ N(0, I)
    F  the network's raw output   q      probability of a level below sigma

Block 0 has the first layers and the highest noise. Boundaries ascend, so block b of B owns the levels from
boundaries[B-1-b] to boundaries[B-b]. What sets up a run are Python floats, so planning needs no torch. What
runs at each step are torch tensors.
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
    """The noise levels of a block, low < high."""

    low: float
    high: float


# ------------------------------------------------------------------------------------------------------------
# Preconditioning (EDM, table 1)


# D(z, sigma) = c_skip z + c_out F(c_in z, c_noise). All four keep the shape of sigma.


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
    """[B] -> [B, 1, ..., 1] with `ndim` dimensions: no product of one value per sample broadcasts wrongly."""
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


# ------------------------------------------------------------------------------------------------------------
# Partition (paper, section 3.3): every block's levels are equally probable
# under ln sigma ~ N(P_mean, P_std^2), truncated to [sigma_min, sigma_max]


def quantile(sigma: float, noise: NoiseConfig) -> float:
    """q: the probability of a level below sigma, before the truncation."""
    return STANDARD_NORMAL.cdf((math.log(sigma) - noise.p_mean) / noise.p_std)


def sigma_at(fraction: float, noise: NoiseConfig) -> float:
    """The level below which `fraction` of the truncated distribution lies, exact at both ends."""
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
    """The levels on which a block is trained: its own, widened each way by alpha = (high / low)^gamma.

    They stay within [sigma_min, sigma_max]. (paper, section 3.3)
    """
    borders = boundaries(num_blocks, noise)
    low, high = borders[num_blocks - 1 - block], borders[num_blocks - block]
    alpha = (high / low) ** gamma
    return Interval(max(low / alpha, noise.sigma_min), min(high * alpha, noise.sigma_max))


def block_of(sigma: float, borders: Sequence[float]) -> int:
    """The block that owns `sigma`. `borders`: of `boundaries`.

    A border belongs to the block with the higher levels, sigma_min to the last block.
    """
    num_blocks = len(borders) - 1
    above = sum(sigma >= border for border in borders[1:-1])
    return num_blocks - 1 - above


# ------------------------------------------------------------------------------------------------------------
# Levels that fit a discrete target: where z = y + sigma eps goes from telling all of y to telling nothing

INFORMATION_GRID, INFORMATION_DRAWS, INFORMATION_ROWS = 48, 64, 32_768


@lru_cache
def information_quantiles(num_rows: int, dim: int) -> tuple[float, float, float]:
    """The levels, as ln sigma, at which z leaves a quarter, a half and three quarters of ln K open.

    K = `num_rows` targets of length 1 in `dim` dimensions, with random directions. What z leaves open is the
    entropy of p(y | z) without context, whose logits are z . E_k / sigma^2 = (1[k = y] + cos_k + sigma eps_k)
    / sigma^2. The draws are fixed, so the result depends on K and `dim` alone and a plan is the same on every
    machine.
    """
    import numpy as np

    draws = np.random.default_rng(0)
    rows = min(num_rows, INFORMATION_ROWS)
    cosine, eps = (draws.standard_normal((INFORMATION_DRAWS, rows)) for _ in range(2))
    cosine /= math.sqrt(dim)
    cosine[:, 0] = 1.0  # row 0 is y itself
    ln_sigma = np.linspace(math.log(0.02), math.log(20.0), INFORMATION_GRID)
    entropy = []
    for sigma in np.exp(ln_sigma):
        score = (cosine + sigma * eps) / sigma**2
        score -= score.max(1, keepdims=True)  # or exp overflows at low levels
        weight = np.exp(score)
        total = weight.sum(1)
        entropy.append(float((np.log(total) - (weight * score).sum(1) / total).mean()))
    share = np.maximum.accumulate(entropy) / math.log(rows)
    low, middle, high = (float(np.interp(quarter, share, ln_sigma)) for quarter in (0.25, 0.5, 0.75))
    return low, middle, high


def settled_noise(noise: NoiseConfig, target_shape: tuple[int, int] | None) -> NoiseConfig:
    """`noise` as a log-normal schedule, with p_mean (and p_std) measured if its own schedule says so.

    `target_shape`: (rows, dim) of the table of targets, or None if the targets are not rows of a table.
    Raises ConfigError when the schedule measures a table and there is none.
    """
    if noise.schedule == "lognormal":
        return noise
    if target_shape is None:
        raise ConfigError(
            f"noise.schedule: found '{noise.schedule}'; "
            "allowed for targets that are no rows of a table: lognormal"
        )
    low, middle, high = information_quantiles(*target_shape)
    p_std = noise.p_std if noise.schedule == "centred" else (high - low) / (2 * STANDARD_NORMAL.inv_cdf(0.75))
    return noise.model_copy(update={"schedule": "lognormal", "p_mean": middle, "p_std": p_std})


# ------------------------------------------------------------------------------------------------------------
# Drawing and sampling


def sample_sigma(uniform: Tensor, interval: Interval, noise: NoiseConfig) -> Tensor:
    """Levels of the log-normal truncated to `interval`, by its inverse CDF in float64.

    `uniform`: draws in [0, 1). Returns float32 of the same shape. A device without float64 leaves it to the
    CPU.
    """
    import torch

    from lowmem.machine.device import device_of

    wide = uniform if device_of(uniform).has_float64 else uniform.cpu()
    q_low, q_high = quantile(interval.low, noise), quantile(interval.high, noise)
    ln_sigma: Tensor = noise.p_mean + noise.p_std * torch.special.ndtri(
        q_low + wide.double() * (q_high - q_low)
    )
    return ln_sigma.exp().clamp(interval.low, interval.high).float().to(uniform.device)


def drawn_levels(
    shape: Sequence[int], device: torch.device, interval: Interval, noise: NoiseConfig
) -> Tensor:
    """Levels from the interval, float32 of `shape`. The share `noise.sigma_max_share` is at sigma_max."""
    import torch

    sigma = sample_sigma(torch.rand(*shape, device=device), interval, noise)
    if noise.sigma_max_share:
        sigma = torch.where(torch.rand(*shape, device=device) < noise.sigma_max_share, noise.sigma_max, sigma)
    return sigma


def sampler_grid(num_steps: int, noise: NoiseConfig) -> list[float]:
    """The levels at which the sampler calls the network, from sigma_max down to sigma_min.

    Neighbours are equally far apart in probability. 50 steps over 3 blocks are 17, 16 and 17 calls. As many
    steps as blocks are one call of each. The last call returns D itself.
    """
    if num_steps == 1:
        return [noise.sigma_max]
    return [sigma_at(1 - i / (num_steps - 1), noise) for i in range(num_steps)]


def euler_step(z: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """z <- alpha z + (1 - alpha) D, alpha = sigma_next / sigma.

    It is the Euler step of dz/dsigma = (z - D) / sigma (EDM). The sign in the paper's Eq. 3-5 is a misprint.
    """
    alpha = sigma_next / sigma
    return alpha * z + (1 - alpha) * denoised
