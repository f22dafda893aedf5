"""The ten pitfalls of the method, each with its numeric check, and errors planted to show that a check can
fail.

Check 7 (causality) speaks of text models and is not here. Checks are functions, so that a plant can be put
under them.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import recipe_with, with_weights

from lowmem import noise
from lowmem.blocks.arena import parameter_views
from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import describe_data, load_data
from lowmem.inference.evaluate import evaluate_run
from lowmem.inference.evaluation.labels import classify_blocks
from lowmem.inference.frozen_run import FrozenRun
from lowmem.models import model_builder
from lowmem.models.base import BlockModel
from lowmem.models.layers import C_NOISE_SCALE, TimeEmbedding
from lowmem.noise import Interval
from lowmem.objectives import base as objectives
from lowmem.objectives.base import mean_cosine
from lowmem.objectives.labels import LabelDenoising
from lowmem.planning.plan import read_plan
from lowmem.recipe import NoiseConfig
from lowmem.reporting.report import read_report
from lowmem.reporting.telemetry import read_records

NOISE = NoiseConfig()
BOUNDARIES = {  # recomputed from the formula independently of this code
    2: [0.002, 0.30120, 80],
    3: [0.002, 0.17963, 0.50504, 80],
    4: [0.002, 0.13408, 0.30120, 0.67665, 80],
    6: [0.002, 0.09434, 0.17963, 0.30120, 0.50504, 0.96167, 80],
}


def built(**overrides: object) -> BlockModel:
    """The tiny ViT with weights, its zero-started gates and read-out made random so that everything has an
    effect.
    """
    recipe = recipe_with(**overrides)
    torch.manual_seed(0)
    return with_weights(model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))(), std=0.1)


def digits_batch(size: int = 64) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(array)
        for name, array in load_data(recipe_with().data, recipe_with().train.seq_len)
        .batch(0, 0, size)
        .items()
    }


# ------------------------------------------------------------------------------------------------------------
# 1. Euler sign and block order


def check_euler() -> None:
    torch.manual_seed(0)
    y, eps = torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    for sigma, sigma_next in [(80.0, 0.5), (2.0, 1.0), (0.3, 0.002)]:
        landed = noise.euler_step(y + sigma * eps, y, sigma, sigma_next)
        assert ((landed - y) / eps - sigma_next).abs().max() / sigma_next < 1e-6


def check_block_order() -> None:
    for num_blocks in BOUNDARIES:
        assert noise.block_interval(0, num_blocks, NOISE).high == 80.0, "block 0 owns sigma = 80"
        assert noise.block_interval(num_blocks - 1, num_blocks, NOISE).low == 0.002
        assert noise.block_of(80.0, noise.boundaries(num_blocks, NOISE)) == 0
    assert built().block_slices(3)[0] == range(2), "block 0 is the first layers"


def test_check_1_a_perfect_denoiser_lands_on_the_next_noise_level_and_block_0_owns_the_highest() -> None:
    check_euler()
    check_block_order()


def test_check_1_fails_when_the_euler_sign_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed_in_the_paper(
        z: torch.Tensor, denoised: torch.Tensor, sigma: float, sigma_next: float
    ) -> torch.Tensor:
        return z + (sigma - sigma_next) / sigma * (z - denoised)

    monkeypatch.setattr(noise, "euler_step", printed_in_the_paper)
    with pytest.raises(AssertionError):
        check_euler()


def test_check_1_fails_when_the_block_order_is_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = noise.block_interval
    monkeypatch.setattr(
        noise,
        "block_interval",
        lambda block, num_blocks, config, gamma=0.0: right(num_blocks - 1 - block, num_blocks, config, gamma),
    )
    with pytest.raises(AssertionError):
        check_block_order()


# ------------------------------------------------------------------------------------------------------------
# 2. Partition and grid


def test_check_2_boundaries_overlap_and_calls_per_block_are_the_papers() -> None:
    for num_blocks, expected in BOUNDARIES.items():
        assert noise.boundaries(num_blocks, NOISE) == pytest.approx(expected, rel=5e-5)
        calls = [noise.block_of(sigma, expected) for sigma in noise.sampler_grid(num_blocks, NOISE)]
        assert calls == list(range(num_blocks)), "as many steps as blocks call each block once, in order"
    assert noise.block_interval(0, 4, NOISE, gamma=0.1) == pytest.approx((0.420, 80), rel=1e-3)
    assert noise.block_interval(3, 4, NOISE, gamma=0.1) == pytest.approx((0.002, 0.204), rel=1e-3)
    calls_50 = Counter(noise.block_of(sigma, BOUNDARIES[3]) for sigma in noise.sampler_grid(50, NOISE))
    assert [calls_50[block] for block in range(3)] == [17, 16, 17]


def test_check_2_drawn_levels_follow_the_truncated_log_normal_of_each_block() -> None:
    uniform = (torch.arange(200_000) + 0.5) / 200_000
    for block in range(3):
        low, high = noise.block_interval(block, 3, NOISE)
        sigma = noise.sample_sigma(uniform, Interval(low, high), NOISE).double()
        assert sigma.min() >= low and sigma.max() <= high
        q_low, q_high = noise.quantile(low, NOISE), noise.quantile(high, NOISE)
        for level in torch.linspace(math.log(low), math.log(high), 7)[1:-1].exp().tolist():
            expected = (noise.quantile(level, NOISE) - q_low) / (q_high - q_low)
            assert float((sigma < level).double().mean()) == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------
# 3. Weighting


def check_weighting() -> None:
    weighting = NoiseConfig(weighting="edm")
    model, batch, interval = built(), digits_batch(), Interval(0.18, 80.0)
    objective = model.make_objective(weighting)
    assert isinstance(objective, LabelDenoising)
    torch.manual_seed(1)
    loss = objective.block_loss(model.layers[:2], batch, interval, recompute=False)
    torch.manual_seed(1)
    label = batch["label"]
    sigma = noise.sample_sigma(torch.rand(len(label)), interval, weighting)
    z = objective.noised(model.target_table()[label], sigma)  # type: ignore[operator]
    ce = F.cross_entropy(objective.logits(model.layers[:2], batch, z, sigma), label, reduction="none")
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    assert loss.mean().item() == pytest.approx((ce * weight).mean().item(), rel=1e-6), (
        "mean over samples of ce times that sample's w"
    )


def test_check_3_the_loss_is_the_named_reduction_of_per_sample_weights() -> None:
    check_weighting()
    with pytest.raises(ValueError, match="same shape"):
        objectives.weighted(torch.ones(8), torch.ones(8, 1))


def test_check_3_fails_when_loss_and_weight_are_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "weighted", lambda loss, weight: loss * weight[:, None])
    with pytest.raises(AssertionError):
        check_weighting()


def test_check_3_weighted_l2_of_the_denoised_is_plain_l2_of_the_networks_output() -> None:
    torch.manual_seed(0)
    y, network_out = (
        torch.randn(6, 3, 8, 8, dtype=torch.float64) * 0.5,
        torch.randn(6, 3, 8, 8, dtype=torch.float64),
    )
    sigma = torch.tensor([0.002, 0.05, 0.3, 1.0, 10.0, 80.0], dtype=torch.float64)
    level = noise.append_dims(sigma, 4)
    z = y + level * torch.randn_like(y)
    skip, out = noise.c_skip(level, 0.5), noise.c_out(level, 0.5)
    target = (y - skip * z) / out
    assert objectives.l2_loss(skip * z + out * network_out, y, sigma, 0.5).numpy() == pytest.approx(
        (network_out - target).square().flatten(1).mean(1).numpy(), rel=1e-6
    )


# ------------------------------------------------------------------------------------------------------------
# 4. The input is used, 5. target scale, 6. collapse


def test_check_4_blocks_take_something_from_the_image_at_every_high_level(
    trained: Path, control: Path
) -> None:
    metrics = evaluate_run(trained)
    high = [level for level in metrics["levels"] if level["sigma"] >= 0.9]
    assert len(high) >= 2
    assert all(level["ce_shuffled"] - level["ce"] > 1.0 for level in high), "another sample's image must hurt"
    alone = evaluate_run(control)["cross_entropy"]
    first_block = metrics["per_block"][0]["sigma_max_ce"]
    assert first_block == pytest.approx(alone, abs=0.25), (
        "at sigma_max the first block is a plain predictor of as many layers"
    )


def check_target_scale() -> None:
    model = built()
    objective = model.make_objective(NOISE)
    assert isinstance(objective, LabelDenoising)
    table = model.target_table()  # type: ignore[operator]
    assert table.norm(dim=-1).detach().numpy() == pytest.approx(1.0, abs=1e-6)
    sure = torch.full((10, 10), -1e4).fill_diagonal_(1e4)
    assert (objective.denoised(sure) - table).abs().max() < 1e-6, "certainty through the sampler gives y back"


def test_check_5_targets_have_length_1_and_certainty_through_the_sampler_returns_them() -> None:
    check_target_scale()


def test_check_5_fails_when_the_sampler_uses_the_unnormalised_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LabelDenoising, "denoised", lambda self, logits: logits.softmax(-1) @ self.model.labels.weight
    )
    with pytest.raises(AssertionError):
        check_target_scale()


def test_check_6_collapse_of_the_table_is_measured_and_logged(trained: Path) -> None:
    assert mean_cosine(F.normalize(torch.eye(8), dim=-1)) == pytest.approx(0.0, abs=1e-6)
    assert mean_cosine(F.normalize(torch.ones(8, 4) + 0.1 * torch.randn(8, 4), dim=-1)) > 0.9
    logged = [
        record["table_cosine"]
        for record in read_records(RunDir(trained).telemetry_path)
        if record["event"] == "visited"
    ]
    assert len(logged) == 18 and all(abs(cosine) < 0.5 for cosine in logged)


# ------------------------------------------------------------------------------------------------------------
# 8. Isolation


def test_check_8_a_step_on_one_block_touches_no_other_and_runs_only_its_layers(tmp_path: Path) -> None:
    from lowmem.machine.profile import load_profile
    from lowmem.planning.plan import make_plan
    from lowmem.training.trainer import Trainer

    recipe = recipe_with(
        train__num_steps=4, blocks__visit_steps=4, train__warmup_steps=0, offload__tier="disk"
    )
    plan = make_plan(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)),
        recipe,
        load_profile("cpu-4gib"),
    )
    run = RunDir(tmp_path / "run")
    seen: list[tuple[int, set[int], dict[str, bytes]]] = []
    ran: set[int] = set()

    def at_commit(record: dict[str, object]) -> None:
        if record["event"] == "visit":
            ran.clear()
        if record["event"] == "step":
            own = trainer.slices[record["block"]]  # type: ignore[index]
            for index, layer in enumerate(trainer.model.layers):
                parameters = list(layer.parameters())
                assert all(p.device.type == ("cpu" if index in own else "meta") for p in parameters)
                assert all((p.grad is not None) == (index in own) for p in parameters)
        if record["event"] == "commit":
            state = run.read_state()
            assert state is not None
            files = {key: (run.path / file.name).read_bytes() for key, file in state.files.items()}
            seen.append((record["visits_done"] - 1, set(ran), files))  # type: ignore[operator]

    trainer = Trainer(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)), plan, run.path, [at_commit]
    )
    for index, layer in enumerate(trainer.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.add(index))
    data = load_data(recipe.data, recipe.train.seq_len)
    trainer.fit(lambda step: data.batch(0, step, 64))
    assert [visit for visit, _, _ in seen] == [0, 1, 2]
    for (_, _, before), (block, layers, after) in zip(seen, seen[1:], strict=False):
        assert layers == set(trainer.slices[block])
        changed = {key for key in after if after[key] != before[key]}
        assert changed == {f"block-{block}", "shared"}


# ------------------------------------------------------------------------------------------------------------
# 9. Memory (measured: tests/training/test_measured_memory.py), 10. training against inference


@pytest.mark.slow
def test_check_10_more_sampling_steps_do_not_undo_what_the_first_block_knows(trained: Path) -> None:
    """The chain draws a sample: more steps make it surer of it, right or wrong, so its cross-entropy may rise
    a little. Its accuracy must hold.
    """
    run = RunDir(trained)
    plan = read_plan(run)
    data = load_data(plan.recipe.data, plan.recipe.train.seq_len)
    by_steps = {}
    for num_steps in (3, 12, 48):
        with (
            FrozenRun(
                run,
                plan,
                model_builder(plan.recipe, describe_data(plan.recipe.data, plan.recipe.train.seq_len)),
            ) as frozen,
            torch.no_grad(),
        ):
            by_steps[num_steps] = classify_blocks(frozen, data, num_steps)
        assert [call["block"] for call in by_steps[num_steps]["chain"]] == sorted(
            call["block"] for call in by_steps[num_steps]["chain"]
        )
        assert len(by_steps[num_steps]["chain"]) == num_steps
    for num_steps in (12, 48):
        assert by_steps[num_steps]["value"] > by_steps[3]["value"] - 0.02
        assert by_steps[num_steps]["chain"][-1]["ce"] < by_steps[3]["chain"][-1]["ce"] + 0.25
    report = read_report(trained).content
    assert report["metrics"]["value"] == pytest.approx(by_steps[3]["value"])


def test_check_10_the_time_embedding_tells_noise_levels_apart() -> None:
    def effective_rank(scale: float) -> float:
        embedding = TimeEmbedding(256)
        embedding.inner, embedding.outer = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
        embedding.inner.weight = torch.zeros(())  # type: ignore[assignment]
        c_noise = torch.linspace(-1.55, 1.10, 2000) * scale / C_NOISE_SCALE
        with torch.no_grad():
            waves = F.silu(embedding(c_noise))[:, 0]
        power = torch.linalg.svdvals(waves - waves.mean(0)).square()
        share = power / power.sum()
        return float((-share * share.clamp_min(1e-12).log()).sum().exp())

    assert effective_rank(1.0) < 5
    assert effective_rank(C_NOISE_SCALE) > 40


def test_parameter_views_cover_every_parameter_of_the_model() -> None:
    from lowmem.machine.profile import load_profile
    from lowmem.planning.plan import make_plan
    from lowmem.planning.settings import layouts_of

    recipe = recipe_with()
    plan = make_plan(
        model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len)),
        recipe,
        load_profile("cpu-4gib"),
    )
    model = built()
    blocks, shared = layouts_of(model, plan.settings)
    names = [
        name for layout in (*blocks, shared) for name in parameter_views(layout, torch.zeros(layout.numel))
    ]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
