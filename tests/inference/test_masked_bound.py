"""Masked diffusion's bound: the partition of t, and on a distribution small enough to enumerate, a bound that
is one and adds up.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lowmem.models.base import BlockModel
from lowmem.noise import Interval
from lowmem.objectives.base import Batch
from lowmem.objectives.masked import MaskedDenoising
from lowmem.recipe import NoiseConfig

NOISE = NoiseConfig()
SCHEDULES: list[Literal["linear", "cosine"]] = ["linear", "cosine"]
HEAD_CHUNK = 4096


def schedule_of(schedule: Literal["linear", "cosine"]) -> MaskedDenoising:
    """An objective to ask for its schedule alone."""
    return MaskedDenoising(Exact(torch.ones(2, 2) / 4), NOISE, schedule, 2, HEAD_CHUNK)


# ------------------------------------------------------------------------------------------------------------
# The schedule and its partition


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_falls_from_one_to_zero_and_its_inverse_undoes_it(schedule: Any) -> None:
    objective = schedule_of(schedule)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = objective.alpha(t)
    assert (alpha[0], alpha[-1]) == (1, 0) and (alpha.diff() < 0).all()
    assert [objective.alpha_inverse(1.0), objective.alpha_inverse(0.0)] == [0.0, 1.0]
    torch.testing.assert_close(
        torch.tensor([objective.alpha_inverse(float(a)) for a in alpha], dtype=torch.float64), t
    )
    if schedule == "cosine":  # as MD4 writes it
        torch.testing.assert_close(alpha, 1 - (math.pi / 2 * (1 - t)).cos())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weight_is_the_slope_of_alpha_over_the_masked_share(schedule: Any) -> None:
    objective = schedule_of(schedule)
    t = torch.linspace(0.001, 1, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective.alpha(t).sum(), t)
    torch.testing.assert_close(objective.weight(t), -slope / (1 - objective.alpha(t)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 6])
def test_blocks_own_equal_shares_of_alpha_the_first_next_to_all_masked(
    schedule: Any, num_blocks: int
) -> None:
    objective = schedule_of(schedule)
    intervals = [objective.interval(block, num_blocks, 0.0) for block in range(num_blocks)]
    assert intervals[0].high == 1 and intervals[-1].low == 0
    assert [upper.low for upper in intervals[:-1]] == [lower.high for lower in intervals[1:]]
    borders = torch.tensor(
        [intervals[-1].low, *(interval.high for interval in reversed(intervals))], dtype=torch.float64
    )
    decrements = -objective.alpha(borders).diff()
    torch.testing.assert_close(decrements, torch.full_like(decrements, 1 / num_blocks))
    if schedule == "linear":
        torch.testing.assert_close(borders, torch.arange(num_blocks + 1) / num_blocks, check_dtype=False)


def test_overlap_widens_by_a_share_of_the_interval_within_the_range() -> None:
    objective = schedule_of("linear")
    found = [objective.interval(block, 3, 0.1) for block in range(3)]
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor([[19 / 30, 1], [9 / 30, 21 / 30], [0, 11 / 30]])
    )


# ------------------------------------------------------------------------------------------------------------
# The bound, on a distribution small enough to enumerate


class Exact(BlockModel):
    """The posterior of each token given the unmasked ones under `probs` [V, ..., V], to a power: 1 is the
    exact denoiser.
    """

    def __init__(
        self, probs: Tensor, power: float = 1.0, schedule: Literal["linear", "cosine"] = "linear"
    ) -> None:
        super().__init__()
        vocab, length = probs.shape[0], probs.ndim
        self.power = power
        self.sequences = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
        self.probs, self.one_hot = (
            probs.flatten(),
            nn.functional.one_hot(self.sequences, vocab).to(probs.dtype),
        )
        self.layers = nn.ModuleList()
        self.vocab, self.schedule = vocab, schedule

    def make_objective(self, noise: NoiseConfig) -> MaskedDenoising:
        return MaskedDenoising(self, noise, self.schedule, self.vocab, HEAD_CHUNK)

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        assert noisy is not None
        agrees = ((noisy[:, None] == self.sequences) | (noisy[:, None] == self.vocab)).all(
            -1
        )  # [B, number of sequences]
        posterior = torch.einsum("bs,slv->blv", agrees * self.probs, self.one_hot)
        return (posterior / posterior.sum(-1, keepdim=True)).clamp(min=1e-30).log() * self.power, noisy

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        return h

    def logits(self, features: Tensor) -> Tensor:
        return features


def toy(vocab: int, length: int) -> Tensor:
    """A random distribution over sequences, far from independent."""
    return (
        (3 * torch.randn([vocab] * length, generator=torch.Generator().manual_seed(vocab + length)))
        .flatten()
        .softmax(0)
        .view([vocab] * length)
    )


def nelbo(model: Exact, interval: Interval, num_points: int = 400) -> Tensor:
    """Nats per token of each sequence, [S]: every mask pattern by its probability, t by the midpoint rule."""
    objective, tokens = model.make_objective(NOISE), model.sequences
    edges = torch.linspace(interval.low, interval.high, num_points + 1, dtype=torch.float64)
    t = (edges[1:] + edges[:-1]) / 2
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for pattern in itertools.product([False, True], repeat=tokens.shape[1]):
        mask = torch.tensor(pattern).expand_as(tokens)
        share = objective.masked_share(t)
        probability = share ** sum(pattern) * (1 - share) ** (len(pattern) - sum(pattern))
        ones = torch.ones(len(tokens))  # the exact denoiser does not look at t
        at_one = objective.weighted_mean(objective.losses([], tokens, mask, ones, tokens), mask, ones)
        unweighted = at_one / objective.weight(torch.ones(1))
        total += unweighted * (probability * objective.weight(t)).mean() * (interval.high - interval.low)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("vocab", "length"), [(2, 4), (3, 3)])
def test_with_the_exact_denoiser_the_bound_is_the_negative_log_likelihood_of_each_sequence(
    schedule: Any, vocab: int, length: int
) -> None:
    probs = toy(vocab, length)
    model = Exact(probs, schedule=schedule)
    nll = -probs.flatten().log().double() / length
    torch.testing.assert_close(nelbo(model, Interval(0.0, 1.0)), nll, atol=1e-3, rtol=0)
    blocks = sum(nelbo(model, model.make_objective(NOISE).interval(block, 3, 0.0)) for block in range(3))
    torch.testing.assert_close(blocks, nll, atol=1e-3, rtol=0)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_with_a_wrong_denoiser_the_bound_is_above_the_entropy(power: float) -> None:
    probs = toy(2, 4)
    entropy = -(probs * probs.log()).sum() / 4
    bound = (probs.flatten() * nelbo(Exact(probs, power), Interval(0.0, 1.0))).sum()
    assert bound > entropy + 0.01


def mean_and_error(losses: Tensor) -> tuple[float, float]:
    return float(losses.mean()), float(losses.std() / math.sqrt(len(losses)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_blocks_drawn_losses_add_up_to_the_whole_ranges_and_to_the_entropy(schedule: Any) -> None:
    probs = toy(3, 3)
    entropy = float(-(probs * probs.log()).sum() / 3)
    torch.manual_seed(0)
    model = Exact(probs, schedule=schedule)
    batch = {"tokens": model.sequences[torch.multinomial(probs.flatten(), 40_000, replacement=True)]}
    objective = model.make_objective(NOISE)
    whole, whole_error = mean_and_error(objective.end_to_end_loss([], batch, recompute=False))
    parts = [
        mean_and_error(objective.block_loss([], batch, objective.interval(block, 3, 0.0), recompute=False))
        for block in range(3)
    ]
    blocks, blocks_error = sum(mean for mean, _ in parts), math.hypot(*(error for _, error in parts))
    assert max(whole_error, blocks_error) < 0.02
    assert blocks == pytest.approx(whole, abs=4 * math.hypot(whole_error, blocks_error))
    assert blocks == pytest.approx(entropy, abs=4 * blocks_error)
    assert all(mean > 4 * error for mean, error in parts), "each block has a part"
