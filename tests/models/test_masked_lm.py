"""The masked language model: its loss, in chunks too; runs whose bound is the sum of their blocks; text
without holes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.data.datasets import Dataset
from lowmem.inference.evaluation.masked import evaluate
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.sampling import Draw, sample_tokens
from lowmem.machine.profile import load_profile
from lowmem.models.masked_lm import MaskedLm
from lowmem.models.sections import MaskedLmModel
from lowmem.noise import Interval
from lowmem.objectives.masked import T_MIN, MaskedDenoising
from lowmem.planning.plan import Plan, make_plan
from lowmem.recipe import NoiseConfig, Recipe, recipe_from_dict
from lowmem.reporting.report import digest
from lowmem.training.trainer import Trainer
from lowmem.units import MIB

NOISE = NoiseConfig()
VOCAB, LENGTH = 8, 16
HEAD_CHUNK = 4096
CONFIG = MaskedLmModel(name="masked_lm", num_layers=3, dim=32, num_heads=2, mask_schedule="cosine")


# ------------------------------------------------------------------------------------------------------------
# The loss


def random_model(head_chunk: int = HEAD_CHUNK) -> MaskedLm:
    """With gates and head away from zero."""
    torch.manual_seed(0)
    model = MaskedLm(CONFIG.model_copy(update={"head_chunk": head_chunk}), VOCAB, LENGTH)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def logits_of(model: MaskedLm, tokens: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    objective = model.make_objective(NOISE)
    return objective.logits(objective.features(model.layers, tokens, mask, t))


def test_the_loss_ignores_unmasked_positions_and_the_network_masked_tokens() -> None:
    model = random_model()
    objective = MaskedDenoising(model, NOISE, "linear", VOCAB, HEAD_CHUNK)

    def density(mask: Tensor) -> Tensor:
        return objective.weighted_mean(objective.losses(model.layers, tokens, mask, t, tokens), mask, t)

    tokens = torch.randint(VOCAB, (5, LENGTH))
    mask = torch.rand(tokens.shape) < 0.5
    t = torch.full((5,), 0.5)
    logits = logits_of(model, tokens, mask, t)
    hidden = torch.where(mask, (tokens + 1) % VOCAB, tokens)
    torch.testing.assert_close(logits_of(model, hidden, mask, t), logits, rtol=0, atol=0)
    ce = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(
        tokens.shape
    )
    by_hand = torch.stack([2.0 * ce[row][mask[row]].sum() / LENGTH for row in range(5)])
    torch.testing.assert_close(density(mask), by_hand)
    none = torch.zeros_like(mask)
    assert not density(none).any()


def test_every_masked_position_looks_both_ways_and_the_level_matters() -> None:
    model = random_model()
    tokens = torch.randint(VOCAB, (1, LENGTH))
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[0, LENGTH // 2] = True
    t = torch.full((1,), 0.5)
    middle = logits_of(model, tokens, mask, t)[0, LENGTH // 2]
    for position in (0, LENGTH - 1):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        assert (logits_of(model, changed, mask, t)[0, LENGTH // 2] - middle).abs().max() > 1e-4
    assert (logits_of(model, tokens, mask, t / 2)[0, LENGTH // 2] - middle).abs().max() > 1e-4


def test_the_loss_stays_finite_down_to_level_zero() -> None:
    model = random_model()
    objective = MaskedDenoising(model, NOISE, "cosine", VOCAB, HEAD_CHUNK)
    batch = {"tokens": torch.randint(VOCAB, (64, LENGTH))}
    losses = objective.block_loss(model.layers, batch, Interval(0.0, T_MIN / 10), recompute=False)
    assert losses.isfinite().all()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_in_chunks_equals_the_loss_at_once_and_so_do_its_gradients(recompute: bool) -> None:
    results = []
    for chunk in (7, 10_000):
        model = random_model(chunk)
        torch.manual_seed(1)
        batch = {"tokens": torch.randint(VOCAB, (3, LENGTH))}
        loss = model.make_objective(NOISE).end_to_end_loss(model.layers, batch, recompute)
        loss.mean().backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


def test_with_a_large_vocabulary_planned_activations_follow_the_chunk_not_the_sequence() -> None:
    """16 sequences of 16 tokens: 256 rows of logits and their gradients in fp32 are 62.5 MiB at once, and 7.8
    MiB in chunks of 32.
    """
    planned = {}
    for chunk in (32, 256, 4096):
        config = CONFIG.model_copy(update={"head_chunk": chunk})
        recipe = recipe_with(model__head_chunk=chunk, train__micro_batch_size=16)
        plan = make_plan(
            lambda config=config: MaskedLm(config, 32_000, LENGTH), recipe, load_profile("h200-141gb")
        )
        planned[chunk] = plan.predicted.by_category["activations"]
    assert planned[256] == planned[4096] > planned[32] + 50 * MIB


# ------------------------------------------------------------------------------------------------------------
# A run


def recipe_with(**changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "schema": 1,
        "method": "diffusion_blocks",
        "model": CONFIG.model_dump(),
        "blocks": {"num_blocks": 3, "visit_steps": 2},
        "data": {"name": "custom"},
        "train": {"num_steps": 4, "batch_size": 32, "lr": 3e-3},
        "optimizer": {"name": "adamw"},
        "eval": {"batch_size": 16, "num_batches": 4},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        raw[section] = {**raw.get(section, {}), key: value} if key else value
    return recipe_from_dict(raw, "masked")


def build() -> MaskedLm:
    return MaskedLm(CONFIG, VOCAB, LENGTH)


def cycles(num: int, seed: int) -> np.ndarray[Any, Any]:
    """Sequences that count upwards from a random start: a token tells all others."""
    return (np.random.default_rng(seed).integers(VOCAB, size=(num, 1)) + np.arange(LENGTH)) % VOCAB


def run(folder: Path, recipe: Recipe) -> tuple[Plan, RunState]:
    plan = make_plan(build, recipe, load_profile("cpu-4gib"), folder)
    return plan, Trainer(build, plan, folder).fit(
        lambda step: {"tokens": cycles(recipe.train.batch_size, step)}
    )


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_a_plan_is_made_without_data_or_memory(method: str) -> None:
    plan = make_plan(build, recipe_with(method=method), load_profile("cpu-4gib"))
    assert plan.fits and plan.predicted.by_category["activations"] > 32 * LENGTH * VOCAB * 4


def test_device_and_disk_give_the_same_digest(tmp_path: Path) -> None:
    digests = {
        digest(run(tmp_path / tier, recipe_with(offload__tier=tier))[1]) for tier in ("device", "disk")
    }
    assert len(digests) == 1 and None not in digests


@pytest.fixture(scope="module", params=["diffusion_blocks", "end_to_end"])
def frozen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("masked")
    changes = {"train__num_steps": 250, "blocks__visit_steps": 25, "train__warmup_steps": 10}
    plan, _ = run(folder, recipe_with(method=request.param, **changes))
    with FrozenRun(RunDir(folder), plan, build) as opened, torch.no_grad():
        yield opened


def test_a_trained_runs_bound_is_the_sum_of_its_blocks_and_near_the_entropy(frozen: FrozenRun) -> None:
    tokens = cycles(100, seed=10_000)
    metrics = evaluate(frozen, Dataset({"tokens": tokens}, {"tokens": tokens}))
    assert metrics["metric"] == "bits_per_token" and metrics["num_windows"] == 64
    assert metrics["value"] == pytest.approx(sum(part["bits"] for part in metrics["per_block"]), rel=1e-5)
    parts = metrics["per_block"]
    assert [parts[0]["t_high"], parts[-1]["t_low"]] == [1.0, 0.0]
    assert [part["t_low"] for part in parts[:-1]] == [part["t_high"] for part in parts[1:]], (
        "training widens the intervals by overlap_gamma; parts of one bound must not overlap"
    )
    assert frozen.plan.recipe.blocks.overlap_gamma > 0
    entropy = math.log2(VOCAB) / LENGTH
    assert entropy - 4 * metrics["value_std_error"] < metrics["value"] < 2.0, "untrained: 3 bits"
    assert [level["block"] for level in metrics["levels"]] == [0, 0, 1, 2, 2]
    masked, *_, last = metrics["levels"]
    assert masked["t"] == 1.0 and masked["ce"] == pytest.approx(masked["ce_shuffled"], rel=1e-4), (
        "without a context there is none to shuffle"
    )
    assert last["ce_shuffled"] > last["ce"] + 0.5
    again = evaluate(frozen, Dataset({"tokens": tokens}, {"tokens": tokens}))
    assert again == metrics, "the draws are fixed"


@pytest.mark.parametrize("num_steps", [1, 3, 16])
def test_samples_have_no_mask_left_and_follow_the_seed(frozen: FrozenRun, num_steps: int) -> None:
    tokens = sample_tokens(frozen, 20, num_steps, Draw(seed=0))
    assert tokens.shape == (20, LENGTH) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < VOCAB
    assert torch.equal(tokens, sample_tokens(frozen, 20, num_steps, Draw(seed=0)))
    assert not torch.equal(tokens, sample_tokens(frozen, 20, num_steps, Draw(seed=1)))
    if num_steps == 16:
        right = ((tokens.diff(dim=1) % VOCAB) == 1).float().mean()
        assert right > 0.3, "chance: 1 in 8"


def test_a_low_temperature_and_a_small_top_p_both_draw_the_likeliest_token(frozen: FrozenRun) -> None:
    """A token at a time, each is certain once one is known: the sequences count upwards more often than at
    temperature 1.
    """

    def right(temperature: float, top_p: float) -> float:
        tokens = sample_tokens(frozen, 100, LENGTH, Draw(temperature, top_p))
        return float(((tokens.diff(dim=1) % VOCAB) == 1).float().mean())

    plain = right(1.0, 1.0)
    assert right(0.0, 1.0) > plain + 0.02 and right(1.0, 0.01) > plain + 0.02
