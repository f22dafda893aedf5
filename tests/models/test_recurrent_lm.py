"""The recurrent-depth model: one pass against the loop, gradients through the last iterations only,
causality, text.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_with, with_weights

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.sampling import Draw, generate_recurrent
from lowmem.machine.profile import load_profile
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.models.sections import RecurrentLmModel
from lowmem.noise import Interval, drawn_levels
from lowmem.objectives.recurrent import RecurrentDenoising
from lowmem.planning.plan import make_plan
from lowmem.recipe import NoiseConfig
from lowmem.reporting.report import digest
from lowmem.training.trainer import Trainer

NOISE = NoiseConfig()
VOCAB, LENGTH = 11, 10
CONFIG = RecurrentLmModel(
    name="recurrent_lm",
    num_layers=4,
    prelude_layers=1,
    coda_layers=1,
    dim=16,
    num_heads=2,
    iterations=12,
    backprop_iterations=3,
    head_chunk=7,
)


def built() -> tuple[RecurrentLm, RecurrentDenoising]:
    torch.manual_seed(0)
    model = with_weights(RecurrentLm(CONFIG, VOCAB, LENGTH), std=0.2)
    return model, model.make_objective(NOISE)


def runs_of_each_layer(model: RecurrentLm, call: Any) -> list[int]:
    counts = [0] * len(model.layers)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    handles = [layer.register_forward_hook(count(index)) for index, layer in enumerate(model.layers)]
    call()
    for handle in handles:
        handle.remove()
    return counts


def loop_features(model: RecurrentLm, tokens: torch.Tensor, iterations: int) -> torch.Tensor:
    """[B, L, D] after so many iterations of the loop."""
    objective = model.make_objective(NOISE)
    h, cond, kept = objective.entered(tokens, iterations)
    return model.features(objective.through(model.layers, h, cond, kept), cond)


def test_as_a_denoiser_every_layer_runs_once_and_end_to_end_the_core_runs_its_iterations() -> None:
    model, objective = built()
    batch = model.example_batch(2)
    whole = Interval(NOISE.sigma_min, NOISE.sigma_max)
    one_pass = runs_of_each_layer(model, lambda: objective.block_loss(model.layers, batch, whole))
    assert one_pass == [1, 1, 1, 1]
    assert runs_of_each_layer(model, lambda: loop_features(model, batch["tokens"], 12)) == [1, 12, 12, 1]


def test_the_weighting_of_a_recurrent_model_is_that_of_each_sequences_level() -> None:
    losses = {}
    for weighting in ("none", "edm"):
        model, _ = built()
        objective = model.make_objective(NoiseConfig(weighting=weighting))
        torch.manual_seed(1)
        losses[weighting] = objective.block_loss(model.layers, model.example_batch(6), Interval(0.2, 5.0))
    torch.manual_seed(1)
    sigma = drawn_levels((6,), torch.device("cpu"), Interval(0.2, 5.0), NOISE)
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    assert torch.allclose(losses["edm"], losses["none"] * weight, rtol=1e-5)


def test_gradients_flow_through_the_last_iterations_alone() -> None:
    """With as many iterations as are back-propagated the start state matters to the gradient's graph, with
    one more it does not.
    """
    model, _ = built()
    batch = {"tokens": torch.randint(VOCAB, (2, LENGTH))}
    graphs = []
    for iterations in (3, 4, 12):
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            loop_features(model, batch["tokens"], iterations)
        graphs.append(sum(saved))
    assert graphs[0] == graphs[1] == graphs[2], (
        "what is kept for backward does not grow with the number of iterations"
    )


def test_the_drawn_number_of_iterations_is_poisson_with_the_named_mean() -> None:
    _, objective = built()
    drawn = torch.tensor(
        [objective.drawn_iterations(random.Random(seed)) for seed in range(4000)], dtype=torch.float64
    )
    assert drawn.mean().item() == pytest.approx(12, abs=0.2)
    assert drawn.var().item() == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize("whole", [False, True])
def test_a_token_changes_only_later_predictions(whole: bool) -> None:
    model, objective = built()
    tokens, z = torch.randint(VOCAB, (2, LENGTH)), torch.randn(2, LENGTH, 16)

    def features(tokens: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        if whole:
            return loop_features(model, tokens, 5)
        return objective.features(model.layers, {"tokens": tokens}, z, torch.full((2, LENGTH), 1.0))

    before = features(tokens)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    difference = (features(changed) - before).abs().amax(dim=(0, 2))
    assert difference[:5].max() == 0 and difference[5:].min() > 0


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
def test_it_trains_by_either_method_from_every_tier(tmp_path: Path, method: str) -> None:
    model = {**CONFIG.model_dump(), "head_chunk": 64, "dim": 32}
    changes = {
        "model": model,
        "data": {"name": "custom"},
        "train__seq_len": LENGTH,
        "train__num_steps": 4,
        "blocks__visit_steps": 2,
    }
    digests = set()
    for tier in ["device", "disk"]:
        num_blocks = 3 if method == "end_to_end" else 1
        recipe = recipe_with(
            **changes,
            method=method,
            blocks__num_blocks=num_blocks,
            train__batch_size=8,
            train__warmup_steps=0,
            offload__tier=tier,
        )
        settings = recipe.model
        assert isinstance(settings, RecurrentLmModel)

        def build(settings: RecurrentLmModel = settings) -> RecurrentLm:
            return RecurrentLm(settings, VOCAB, LENGTH)

        plan = make_plan(build, recipe, load_profile("cpu-4gib"))
        state = Trainer(build, plan, tmp_path / tier).fit(
            lambda step: {"tokens": (torch.arange(8 * LENGTH).view(8, LENGTH) + step) % VOCAB}
        )
        digests.add(digest(state))
        assert state.blocks[0].loss is not None
    assert len(digests) == 1


@pytest.mark.parametrize("method", [pytest.param("diffusion_blocks", marks=pytest.mark.slow), "end_to_end"])
def test_greedy_text_goes_on_as_the_training_text_did_and_past_the_length_trained_on(
    tmp_path: Path, method: str
) -> None:
    """Each token is the last one plus 1.

    At a high temperature the text no longer follows that rule, and follows the seed.
    """
    model = {**CONFIG.model_dump(), "dim": 32, "iterations": 2}
    train = {"num_steps": 40, "batch_size": 8, "lr": 1e-2, "seq_len": LENGTH}
    recipe = recipe_with(
        model=model,
        data={"name": "custom"},
        train=train,
        method=method,
        blocks__num_blocks=1,
        blocks__visit_steps=40,
    )

    def build() -> RecurrentLm:
        return RecurrentLm(RecurrentLmModel(**model), VOCAB, LENGTH)

    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    Trainer(build, plan, tmp_path).fit(
        lambda step: {"tokens": (torch.arange(LENGTH) + torch.arange(8)[:, None] + step) % VOCAB}
    )
    with FrozenRun(RunDir(tmp_path), plan, build) as frozen:
        prompt = torch.tensor([[3, 4, 5], [9, 10, 0]])
        made = generate_recurrent(frozen, prompt, 2 * LENGTH, Draw(temperature=0.0))
        assert torch.equal(made, (prompt[:, :1] + torch.arange(3 + 2 * LENGTH)) % VOCAB)
        hot = [generate_recurrent(frozen, prompt, 8, Draw(100.0, seed=seed)) for seed in (0, 0, 1)]
        assert (
            torch.equal(hot[0], hot[1])
            and not torch.equal(hot[0], hot[2])
            and torch.equal(hot[0][:, :3], prompt)
        )
        nothing = generate_recurrent(frozen, prompt[:, :0], 4, Draw(1.0, 0.9))
        assert nothing.shape == (2, 4) and torch.equal(nothing, (nothing[:, :1] + torch.arange(4)) % VOCAB)


def test_blocks_that_would_cut_its_core_are_refused() -> None:
    for method, num_blocks, allowed in (
        ("diffusion_blocks", 3, "1 (its core"),
        ("end_to_end", 2, "1 or 3 (prelude, core, coda)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"allowed with model recurrent_lm: {allowed}")):
            recipe_with(
                model=CONFIG.model_dump(),
                method=method,
                data={"name": "custom"},
                blocks__num_blocks=num_blocks,
            )
