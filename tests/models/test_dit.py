"""Images as targets: the loss, the sampler with known denoisers, the Fréchet distance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import recipe_with
from PIL import Image

from lowmem import noise
from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.data.datasets import describe_data, load_data
from lowmem.inference import image_samples
from lowmem.inference.evaluate import evaluate_run
from lowmem.inference.evaluation import features as features_module
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.generate import sample_run
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.models.dit import Dit
from lowmem.models.layers import patchify, unpatchify
from lowmem.objectives.images import ImageDenoising
from lowmem.planning.plan import Plan, make_plan
from lowmem.recipe import NoiseConfig, Recipe
from lowmem.reporting.report import digest
from lowmem.training.trainer import Trainer

SHORT = {
    "model__name": "dit",
    "model__num_layers": 3,
    "model__dim": 32,
    "train__num_steps": 4,
    "train__warmup_steps": 0,
    "blocks__visit_steps": 2,
}
NOISE = NoiseConfig()


def dit_recipe(**overrides: Any) -> Recipe:
    return recipe_with(
        **{**SHORT, "eval": {"num_samples": 40, "num_steps": 6, "batch_size": 100}, **overrides}
    )


def dit_plan(recipe: Recipe) -> Plan:
    return make_plan(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)),
        recipe,
        load_profile("cpu-4gib"),
    )


def run_short(folder: Path, **overrides: Any) -> RunState:
    recipe = dit_recipe(**overrides)
    data = load_data(recipe.data, recipe.train.seq_len)
    trainer = Trainer(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)), dit_plan(recipe), folder
    )
    return trainer.fit(lambda step: data.batch(0, step, recipe.train.batch_size))


def opened(folder: Path, **overrides: Any) -> FrozenRun:
    recipe = dit_recipe(**overrides)
    return FrozenRun(
        RunDir(folder),
        dit_plan(recipe),
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "run"
    run_short(folder)
    return folder


def random_dit(num_classes: int = 10) -> Dit:
    """With weights everywhere, also in the gates and the read-out that start at zero."""
    config = dit_recipe().model
    torch.manual_seed(0)
    model = Dit(config, (1, 8, 8), num_classes)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------
# The model and its loss


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 4, 12)])
def test_unpatchify_inverts_patchify(image_shape: tuple[int, int, int]) -> None:
    image = torch.randn(5, *image_shape)
    patches = patchify(image, 4)
    assert patches.shape == (5, image_shape[1] * image_shape[2] // 16, image_shape[0] * 16)
    assert torch.equal(patches[0, 0], image[0, :, :4, :4].flatten()), (
        "the first patch is the upper left corner"
    )
    assert torch.equal(unpatchify(patches, image_shape, 4), image)


def test_weighted_l2_of_the_denoised_is_plain_l2_of_the_networks_output() -> None:
    model = random_dit()
    objective = model.make_objective(NOISE)
    sigma = torch.tensor([0.002, 0.05, 0.3, 1.0, 10.0, 80.0])
    batch = {"label": torch.arange(6)}
    y = objective.target(torch.rand(6, 1, 8, 8) * 2 - 1)
    z = objective.noised(y, sigma)
    level = noise.append_dims(sigma, 4)
    with torch.no_grad():
        loss = objective.loss(objective.denoised(model.layers, batch, z, sigma), y, sigma)
        h, cond = model.input_part(batch, noise.c_in(level, 0.5) * z, noise.c_noise(sigma))
        for layer in model.layers:
            h = layer(h, cond)
        out = model.output_part(h, cond)
    target = (y - noise.c_skip(level, 0.5) * z) / noise.c_out(level, 0.5)
    assert loss.shape == (6,)
    assert loss.numpy() == pytest.approx((out - target).square().flatten(1).mean(1).numpy(), rel=1e-3)
    unweighted = model.make_objective(NoiseConfig(weighting="none")).loss(y + 2.0, y, sigma)
    assert unweighted.numpy() == pytest.approx(4.0, rel=1e-6)


def test_the_loss_of_the_whole_is_the_loss_of_one_block_that_owns_every_level() -> None:
    model = random_dit()
    objective = model.make_objective(NOISE)
    batch = {"image": torch.rand(6, 1, 8, 8) * 2 - 1, "label": torch.arange(6)}
    torch.manual_seed(1)
    block = objective.block_loss(model.layers, batch, objective.interval(0, 1, 0.0), recompute=False)
    torch.manual_seed(1)
    assert torch.equal(objective.end_to_end_loss(model.layers, batch, recompute=True), block)


def test_a_fresh_model_knows_nothing_and_its_loss_says_so() -> None:
    """The read-out starts at zero:

    F = 0, so the weighted loss is the mean square of F_target, about 1 where y has std sigma_data.
    """
    model = random_dit()
    objective = model.make_objective(NOISE)
    model.head.reset_parameters()
    y = torch.randn(64, 1, 8, 8) * 0.5
    sigma = torch.full((64,), 0.4)
    with torch.no_grad():
        denoised = objective.denoised(
            model.layers, {"label": torch.arange(64) % 10}, objective.noised(y, sigma), sigma
        )
    assert float(objective.loss(denoised, y, sigma).mean()) == pytest.approx(1.0, abs=0.1)


def test_labels_are_dropped_at_the_rate_asked_for_and_the_class_matters() -> None:
    labels = torch.zeros(20_000, dtype=torch.long)
    model = random_dit()
    dropped = ImageDenoising(model, NOISE, 0.1).drop_labels(labels)
    assert set(dropped.tolist()) == {0, 10}
    assert float((dropped == 10).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(ImageDenoising(model, NOISE, 0.0).drop_labels(labels), labels)
    model = random_dit()
    z, sigma = torch.randn(2, 1, 8, 8).mean(0, keepdim=True).expand(2, -1, -1, -1), torch.ones(2)
    with torch.no_grad():
        one, none = ImageDenoising(model, NOISE).denoised(
            model.layers, {"label": torch.tensor([1, 10])}, z, sigma
        )
    assert not torch.equal(one, none)


# ------------------------------------------------------------------------------------------------------------
# The sampler


def with_denoiser(frozen: FrozenRun, monkeypatch: pytest.MonkeyPatch, denoiser: Any) -> list[int]:
    """Makes the network's raw output F that of `denoiser(z, sigma, label) -> D`.

    Returns the layers that ran, as they run.
    """
    model, held, ran = frozen.model, [], []
    original = model.input_part

    def input_part(batch: Any, noisy: torch.Tensor, c_noise: torch.Tensor) -> Any:
        sigma = noise.append_dims((4 * c_noise).exp(), 4).double()
        z = noisy.double() / noise.c_in(sigma, 0.5)
        held.append(
            (denoiser(z, sigma, batch["label"]) - noise.c_skip(sigma, 0.5) * z) / noise.c_out(sigma, 0.5)
        )
        return original(batch, noisy, c_noise)

    monkeypatch.setattr(model, "input_part", input_part)
    monkeypatch.setattr(model, "output_part", lambda h, cond: held.pop())
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    return ran


def test_a_perfect_denoiser_gives_back_y_and_calls_the_blocks_in_order(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = torch.rand(10, 1, 8, 8) * 2 - 1
    labels = torch.arange(23) % 10
    with opened(tiny, eval={"batch_size": 100}) as frozen:
        ran = with_denoiser(frozen, monkeypatch, lambda z, sigma, label: wanted[label] * 0.5)
        made = image_samples.sample(frozen, labels, 9, 1.0, seed=0)
    assert made.shape == (23, 1, 8, 8)
    assert (made - wanted[labels]).abs().max() < 1e-5
    assert ran == [0] * 3 + [1] * 3 + [2] * 3


def test_samples_of_a_known_distribution_have_its_spread(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """y ~ N(0, 0.2^2): D = s^2 / (s^2 + sigma^2) z. The whole way down must count, not only the last call."""
    with opened(tiny) as frozen:
        with_denoiser(frozen, monkeypatch, lambda z, sigma, label: 0.04 / (0.04 + sigma**2) * z)
        made = image_samples.sample(frozen, torch.zeros(60, dtype=torch.long), 100, 1.0, seed=0)
    assert float((made * 0.5).std()) == pytest.approx(0.2, rel=0.1)


def test_guidance_moves_away_from_no_class_and_guidance_1_asks_only_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tiny) as frozen:
        ran = with_denoiser(
            frozen,
            monkeypatch,
            lambda z, sigma, label: torch.where(label == 10, 0.1, 0.15)[:, None, None, None].expand_as(z),
        )
        labels = torch.zeros(4, dtype=torch.long)
        assert image_samples.sample(frozen, labels, 3, 2.0, seed=0).numpy() == pytest.approx(
            0.4, abs=1e-5
        )  # (0.1 + 2 * 0.05) / sigma_data
        assert len(ran) == 2 * 3
        ran.clear()
        assert image_samples.sample(frozen, labels, 3, 1.0, seed=0).numpy() == pytest.approx(0.3, abs=1e-5)
        assert len(ran) == 3


def test_samples_follow_the_seed_and_not_the_batch_size(tiny: Path) -> None:
    labels = torch.arange(20) % 10
    made = []
    for seed, batch_size in ((0, 100), (0, 7), (1, 100)):
        with opened(tiny, eval={"batch_size": batch_size}) as frozen:
            made.append(image_samples.sample(frozen, labels, 4, 2.0, seed))
    assert (made[0] - made[1]).abs().max() < 1e-4
    assert (made[0] - made[2]).abs().max() > 0.1
    assert made[0].abs().max() <= 1


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def exactly(mean: np.ndarray[Any, Any], cov: np.ndarray[Any, Any], count: int = 500) -> torch.Tensor:
    """Samples whose mean and covariance are the given ones to rounding."""
    x = np.random.default_rng(int(mean.sum())).normal(size=(count, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(x @ np.linalg.cholesky(cov).T + mean)


def test_frechet_is_zero_of_the_same_and_the_closed_form_of_two_gaussians() -> None:
    x = torch.randn(300, 64)
    assert features_module.frechet(x, x) == pytest.approx(0.0, abs=1e-6)
    flat = torch.cat(
        [torch.randn(300, 8), torch.zeros(300, 56)], dim=1
    )  # dead features: singular covariances
    assert features_module.frechet(flat, flat) == pytest.approx(0.0, abs=1e-6)
    means = np.zeros(3), np.array([1.0, 2.0, 0.0])
    spread = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    expected = 5.0 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert features_module.frechet(
        exactly(means[0], spread[0]), exactly(means[1], spread[1])
    ) == pytest.approx(expected, rel=1e-9)
    mixed = (
        np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]]),
        np.array([[1.0, -0.4, 0.2], [-0.4, 2.0, 0.0], [0.2, 0.0, 0.5]]),
    )
    from scipy.linalg import sqrtm

    expected = 5.0 + np.trace(mixed[0] + mixed[1] - 2 * sqrtm(mixed[0] @ mixed[1])).real
    assert features_module.frechet(exactly(means[0], mixed[0]), exactly(means[1], mixed[1])) == pytest.approx(
        expected, rel=1e-6
    )


def test_the_feature_network_tells_classes_apart() -> None:
    data = load_data(dit_recipe().data, dit_recipe().train.seq_len)
    test = next(data.test_batches(360))
    network = features_module.feature_network(data)
    features = network(torch.from_numpy(test["image"]))
    assert features.shape == (360, features_module.FEATURES)
    assert float((network.head(features).argmax(-1).numpy() == test["label"]).mean()) > 0.95


def test_the_feature_network_is_the_same_each_time_and_draws_nothing_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "FEATURE_STEPS", 5)
    data, made = load_data(dit_recipe().data, dit_recipe().train.seq_len), []
    for seed in (0, 0, 1):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(len(made))))
        state = torch.random.get_rng_state()
        made.append(features_module.feature_network(data, seed)(torch.ones(2, 1, 8, 8)))
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(len(made))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_the_feature_network_is_trained_once_for_its_images_and_kept_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features_module, "FEATURE_STEPS", 5)
    data, ones = load_data(dit_recipe().data, dit_recipe().train.seq_len), torch.ones(2, 1, 8, 8)
    made = features_module.feature_network(data)(ones)
    trained = features_module._trained
    monkeypatch.setattr(features_module, "_trained", None)  # to train again would fail
    state = torch.random.get_rng_state()
    assert torch.equal(features_module.feature_network(data)(ones), made)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(TypeError):
        features_module.feature_network(data, seed=1)
    monkeypatch.setattr(features_module, "_trained", trained)
    (kept,) = (tmp_path / "lowmem").glob("*.safetensors")
    whole = kept.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], b"", b"no tensors"):
        kept.write_bytes(damage)
        assert torch.equal(features_module.feature_network(data)(ones), made)
        assert kept.read_bytes() == whole, "what was damaged is written again"


def test_a_kept_feature_network_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features_module, "FEATURE_STEPS", 2)
    data = load_data(dit_recipe().data, dit_recipe().train.seq_len)
    features_module.feature_network(data)
    (kept,) = (tmp_path / "lowmem").glob("*.safetensors")
    trained, seeds = features_module._trained, list[int]()

    def counted(images: Any, labels: Any, seed: int, say: Any) -> Any:
        seeds.append(seed)
        return trained(images, labels, seed, say)

    monkeypatch.setattr(features_module, "_trained", counted)
    features_module.feature_network(data)
    assert seeds == []
    monkeypatch.setattr(os, "geteuid", lambda: kept.lstat().st_uid + 1)
    features_module.feature_network(data)
    assert seeds == [0]


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_an_evaluation_reports_distance_floor_blocks_and_levels(tmp_path: Path, method: str) -> None:
    run_short(tmp_path / "run", method=method)
    metrics = evaluate_run(tmp_path / "run")
    assert metrics["metric"] == "frechet" and metrics["value"] > 10 * metrics["frechet_train_test"] > 0
    assert 0 <= metrics["class_accuracy"] < 0.5 < metrics["class_accuracy_test"]
    assert (metrics["num_samples"], metrics["num_steps"], metrics["guidance"]) == (40, 6, 2.0)
    assert [(b["block"], b["num_samples"]) for b in metrics["per_block"]] == [(0, 360), (1, 360), (2, 360)]
    assert [level["block"] for level in metrics["levels"]] == [0, 0, 1, 2, 2]
    assert [level["sigma"] for level in metrics["levels"]] == sorted(
        (level["sigma"] for level in metrics["levels"]), reverse=True
    )
    assert all(level["loss"] > 0 and level["loss_shuffled"] > 0 for level in metrics["levels"])
    assert evaluate_run(tmp_path / "run") == metrics


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_a_png_of_the_right_size(tmp_path: Path, channels: int) -> None:
    made = torch.full((7, channels, 8, 8), -1.0)
    made[0] = 1.0
    image_samples.write_grid(made, tmp_path / "grid.png", 3)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG" and picture.mode == ("L" if channels == 1 else "RGB")
        assert picture.size == (3 * 34 - 2, 3 * 34 - 2)  # 8 pixels magnified to 32, gaps of 2
        pixels = np.asarray(picture).reshape(100, 100, channels)
    assert (
        (pixels[:32, :32] == 255).all()
        and (pixels[:32, 34:66] == 0).all()
        and (pixels[68:, 34:] == 255).all()
    )
    image_samples.write_grid(torch.zeros(2, 3, 28, 28), tmp_path / "grid.png", 1)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (28, 58)


def test_lowmem_sample_writes_a_grid_with_a_column_for_each_class(tiny: Path, tmp_path: Path) -> None:
    from lowmem.cli import app

    app(
        ["sample", str(tiny), "--out", str(tmp_path / "made.png"), "--num", "20", "--seed", "3"],
        standalone_mode=False,
    )
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.size == (10 * 34 - 2, 2 * 34 - 2)
    assert sample_run(tiny) == tiny / "samples.png" and (tiny / "samples.png").exists()


def test_every_tier_gives_the_same_digest(tmp_path: Path) -> None:
    assert (
        len({digest(run_short(tmp_path / tier, offload__tier=tier)) for tier in ("device", "host", "disk")})
        == 1
    )
