"""Classification as denoising: what the network sees of z, blank images, and the guidance they allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_overrides, recipe_with, with_weights
from pydantic import ValidationError

from lowmem.errors import ConfigError
from lowmem.inference.evaluate import evaluate_run
from lowmem.job import train
from lowmem.models.sections import VitModel
from lowmem.models.vit import Vit
from lowmem.noise import Interval
from lowmem.objectives.labels import LabelDenoising
from lowmem.recipe import NoiseConfig

NOISE = NoiseConfig()


def built(**changes: Any) -> tuple[Vit, LabelDenoising]:
    torch.manual_seed(0)
    config = VitModel(
        **{"name": "vit", "num_layers": 2, "dim": 16, "num_heads": 2, "patch_size": 4, **changes}
    )
    model = with_weights(Vit(config, (1, 8, 8), 10), std=0.3).eval()
    return model, model.make_objective(NOISE)


def drawn(batch_size: int = 6) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    batch = {"image": torch.rand(batch_size, 1, 8, 8) * 2 - 1, "label": torch.arange(batch_size) % 10}
    return batch, torch.randn(batch_size, 16), torch.full((batch_size,), 0.7)


@pytest.mark.parametrize(
    ("noisy_input", "readout", "sees_z"),
    [("scaled", "plain", True), ("posterior", "plain", True), ("none", "plain", False)],
)
def test_without_a_noisy_input_only_the_read_out_knows_z(
    noisy_input: str, readout: str, sees_z: bool
) -> None:
    model, objective = built(noisy_input=noisy_input, readout=readout)
    batch, z, sigma = drawn()
    difference = objective.logits(model.layers, batch, z, sigma) - objective.logits(
        model.layers, batch, z + 1, sigma
    )
    assert (difference.abs().max() > 1e-4) == sees_z


def test_the_bayes_read_out_adds_the_evidence_to_the_networks_logits() -> None:
    plain, bayes = built(noisy_input="none", readout="plain"), built(noisy_input="none", readout="bayes")
    batch, z, sigma = drawn()
    evidence = z @ plain[0].target_table().T / 0.7**2
    logits = [objective.logits(model.layers, batch, z, sigma) for model, objective in (plain, bayes)]
    assert torch.allclose(logits[0] + evidence, logits[1], atol=1e-5)


def test_guidance_moves_away_from_the_blank_image_and_1_is_none() -> None:
    model, objective = built(image_drop=0.1)
    batch, z, sigma = drawn()
    blank = objective.logits(model.layers, {**batch, "image": torch.zeros_like(batch["image"])}, z, sigma)
    seen = objective.logits(model.layers, batch, z, sigma)
    assert torch.equal(objective.guided_logits(model.layers, batch, z, sigma, 1.0), seen)
    assert torch.allclose(
        objective.guided_logits(model.layers, batch, z, sigma, 3.0),
        seen + 2 * (seen - blank),
        atol=1e-5,
    )


def test_the_named_share_of_images_is_blank_in_training() -> None:
    _, objective = built(image_drop=0.25)
    torch.manual_seed(0)
    image = objective.drop_images(torch.ones(4000, 1, 2, 2))
    blank = (image == 0).flatten(1).all(1)
    assert float(blank.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert bool((image[~blank] == 1).all())


def test_blank_images_change_the_loss_and_nothing_else_that_is_drawn() -> None:
    losses = {}
    for image_drop in (0.0, 1e-9, 0.9):
        model, objective = built(image_drop=image_drop)
        torch.manual_seed(3)
        losses[image_drop] = objective.block_loss(model.layers, drawn()[0], Interval(0.5, 80.0), False)
    assert torch.equal(losses[0.0], losses[1e-9])
    assert not torch.equal(losses[0.0], losses[0.9])


def test_guidance_is_refused_for_a_classifier_that_never_saw_a_blank_image() -> None:
    with pytest.raises(ConfigError, match="image_drop"):
        recipe_with(eval={"guidance": 2.0})
    model = {"name": "vit", "num_layers": 6, "dim": 64, "num_heads": 4, "patch_size": 2, "image_drop": 0.1}
    assert recipe_with(eval={"guidance": 2.0}, model=model).eval.guidance == 2.0


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValidationError, match="sigma_max_share"):
        NoiseConfig(sigma_max_share=share)


@pytest.mark.slow
def test_draws_at_sigma_max_make_every_block_a_predictor_of_its_own(tmp_path: Path) -> None:
    """Without them deeper blocks are never asked to predict from noise alone; with them the joint prediction
    is no worse than the chain.
    """
    common = {
        "train__num_steps": 120,
        "model": {"name": "vit", "num_layers": 3, "dim": 32, "num_heads": 2, "patch_size": 2},
    }
    metrics = {}
    for share in (0.0, 0.5):
        overrides = as_overrides(**common, noise__schedule="balanced", noise__sigma_max_share=share)
        overrides = [o for o in overrides if not o.startswith(("noise.p_mean", "noise.p_std"))]
        metrics[share] = evaluate_run(train("digits-vit", "cpu-4gib", tmp_path / str(share), overrides))
    last_block = {share: figures["per_block"][-1]["sigma_max_ce"] for share, figures in metrics.items()}
    assert last_block[0.5] < 0.7 * last_block[0.0]
    assert metrics[0.5]["joint_accuracy"] >= metrics[0.5]["value"] - 0.02
