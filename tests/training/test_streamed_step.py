"""Exact back-propagation with blocks that come and go: the bits of plain autograd from every tier."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import first_weights
from exact_runs import (
    BATCH,
    CLASSES,
    MODELS,
    VOCAB,
    Tied,
    batches,
    require_one_digest,
    setting,
    setting_model,
    short,
    through_ram,
    trained,
)  # noqa: F401
from safetensors.torch import load_file
from torch import Tensor, nn

from lowmem.blocks.optim import has_muon
from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.inference import image_samples, sampling
from lowmem.inference.evaluation import images, labels, masked, recurrent, tokens
from lowmem.inference.frozen_run import FrozenRun
from lowmem.inference.sampling import Draw
from lowmem.machine.profile import load_profile
from lowmem.models.base import BuildModel
from lowmem.models.dit import Dit
from lowmem.models.masked_lm import MaskedLm
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.models.vit import Vit
from lowmem.noise import Interval, sample_sigma
from lowmem.objectives.base import Batch
from lowmem.planning.plan import Plan, make_plan
from lowmem.planning.settings import layouts_of
from lowmem.recipe import Recipe
from lowmem.reporting.report import digest
from lowmem.schedule import learning_rate, mix_seed
from lowmem.training.open_run import layouts_by_key
from lowmem.training.trainer import Trainer

# ------------------------------------------------------------------------------------------------------------
# Tiers


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "masked_lm" else []) for name in (*MODELS, "tied")],
)
def test_every_tier_gives_the_same_digest(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, and two micro-batches but for a tied table (see `exact`)."""
    common = {"train": short(4, 8 if name == "tied" else 4)}
    arms: dict[str, dict[str, Any]] = {
        "device": {"offload__tier": "device"},
        "disk": {"offload__tier": "disk"},
        "recompute": {"offload__tier": "disk", "train": {**common["train"], "recompute": True}},
    }
    digests = {
        arm: digest(trained(tmp_path / arm, name, **{**common, **changes})[0])
        for arm, changes in arms.items()
    }
    through_ram(monkeypatch)
    digests["host"] = digest(trained(tmp_path / "host", name, **common, offload__tier="disk")[0])
    assert len(set(digests.values())) == 1 and None not in digests.values(), digests


class WithUnused(Tied):
    """Some layers hold weights that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers[1::2]:
            layer.unused = nn.Linear(30, 70)
            # First, so that they lie where other layers have gradients.
            layer._modules = {"unused": layer.unused, **layer._modules}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_weights_without_a_gradient_are_updated_with_zeros_as_on_the_device(
    tmp_path: Path, clip: float | None
) -> None:
    digests = set()
    for tier in ("device", "disk"):
        changes = {"offload__tier": tier, "optimizer__grad_clip": clip, "train": short(4, BATCH)}
        recipe, _ = setting("tied", **changes)
        plan = make_plan(WithUnused, recipe, load_profile("cpu-4gib"))
        digests.add(digest(Trainer(WithUnused, plan, tmp_path / tier).fit(batches)))
    assert len(digests) == 1


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw8bit",
        pytest.param("adamw", marks=pytest.mark.slow),
        pytest.param("muon", marks=pytest.mark.skipif(not has_muon(), reason="torch has none before 2.9")),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_optimizers_and_precisions_give_the_resident_digest(
    tmp_path: Path, optimizer: str, precision: str
) -> None:
    common = {
        "optimizer__name": optimizer,
        "train": {**short(4), "precision": precision},
        "optimizer__ema": 0.9,
        "model__dim": 64,
    }
    resident = trained(tmp_path / "device", "causal_lm", **common, offload__tier="device")[0]
    for name, changes in {
        "disk": {},
        "waiting": {"offload__prefetch": False, "offload__write_back": "wait"},
    }.items():
        assert digest(
            trained(tmp_path / name, "causal_lm", **common, offload__tier="disk", **changes)[0]
        ) == digest(resident)


@pytest.mark.parametrize("num_blocks", [2, 5])
@pytest.mark.parametrize("clip", ["block", "global"])
def test_any_number_of_blocks_gives_the_resident_digest(tmp_path: Path, num_blocks: int, clip: str) -> None:
    common = {
        "train": short(4),
        "blocks__num_blocks": num_blocks,
        "optimizer__clip": clip,
        "optimizer__grad_clip": 0.01,
    }
    require_one_digest(tmp_path, "dit", **common)


# ------------------------------------------------------------------------------------------------------------
# Plain autograd


def tensors_of(folder: Path, state: RunState) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, record in state.files.items():
        content = load_file(folder / record.name)
        found.update(
            {
                f"{key}/{name}" if name.startswith("optimizer.") else name: value
                for name, value in content.items()
            }
        )
    return found


def plain(recipe: Recipe, build: BuildModel, plan: Plan, folder: Path) -> nn.Module:
    """The same run by a loop of torch's own parts alone, from the same first weights; moments are in the
    optimizer's state.
    """
    _, state = first_weights(folder, build, plan)
    start = tensors_of(folder, state)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    model.train()
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False)
    )
    config = recipe.optimizer
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
    )
    size = plan.settings.micro_batch_size
    for step in range(recipe.train.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        optimizer.zero_grad()
        for part in range(BATCH // size):
            micro = {key: value[part * size : (part + 1) * size] for key, value in batches(step).items()}
            torch.manual_seed(mix_seed(recipe.train.seed, "step", 0, step, part))
            loss = whole_loss(model, micro, recipe)
            (loss.mean() / (BATCH // size)).backward()
        if config.clips_whole:
            assert config.grad_clip is not None
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
    for parameter in model.parameters():
        parameter.moments = optimizer.state[parameter]  # type: ignore[attr-defined]
    return model


def whole_loss(model: Any, batch: Batch, recipe: Recipe) -> Tensor:
    """[B], written out for each model."""
    if isinstance(model, Vit):
        h, cond = model.input_part(batch, None, None)
        for layer in model.layers:
            h = layer(h, cond)
        return nn.functional.cross_entropy(
            model.output_part(h, cond).float(), batch["label"], reduction="none"
        )
    if isinstance(model, Dit):
        noise, image = recipe.noise, batch["image"]
        y = image * noise.sigma_data
        sigma = sample_sigma(torch.rand(len(y)), Interval(noise.sigma_min, noise.sigma_max), noise)
        level, sd = sigma[:, None, None, None], noise.sigma_data
        z = y + level * torch.randn_like(y)
        label = torch.where(torch.rand(len(y)) < 0.1, CLASSES, batch["label"])
        h, cond = model.input_part({"label": label}, 1 / (level**2 + sd**2).sqrt() * z, sigma.log() / 4)
        for layer in model.layers:
            h = layer(h, cond)
        denoised = (
            sd**2 / (level**2 + sd**2) * z
            + level * sd / (level**2 + sd**2).sqrt() * model.output_part(h, cond).float()
        )
        return (denoised - y).square().flatten(1).mean(1) * ((sigma**2 + sd**2) / (sigma * sd) ** 2)
    words = batch["tokens"]
    if isinstance(model, MaskedLm):
        t = ((torch.rand(1) + torch.arange(len(words)) / len(words)) % 1).clamp(min=1e-4)
        mask = torch.rand(words.shape) < t[:, None]
        h, cond = model.input_part({"tokens": words}, words.masked_fill(mask, VOCAB), t.log() / 4)
        for layer in model.layers:
            h = layer(h, cond)
        rows = model.output_part(h, cond).flatten(0, 1).split(17)
        losses = [
            nn.functional.cross_entropy(model.head(x), y, reduction="none")
            for x, y in zip(rows, words.flatten().split(17), strict=True)
        ]
        return (torch.cat(losses).view(words.shape) * mask).mean(1) / t
    if isinstance(model, RecurrentLm):
        generator = random.Random(torch.initial_seed())
        iterations, clock = 0, generator.expovariate(1.0)
        while clock < model.config.iterations:
            iterations, clock = iterations + 1, clock + generator.expovariate(1.0)
        cond, e = model.time(torch.zeros(len(words))), model.shifted(words)
        for layer in model.layers[:2]:
            e = layer(e, cond)
        h = torch.randn_like(e)
        for iteration in range(max(iterations, 1)):
            with torch.set_grad_enabled(iteration >= iterations - model.config.backprop_iterations):
                h = model.adapter(torch.cat([h, e], dim=-1))
                for layer in model.layers[2:4]:
                    h = layer(h, cond)
        h = model.layers[4](h, cond)
        features = model.features(h, cond)
    else:
        h, cond = model.input_part(batch, None, None)
        for layer in model.layers:
            h = layer(h, cond)
        features = model.output_part(h, cond)
    rows = features.flatten(0, 1).split(17)
    head = (lambda x: x @ model.words.weight.T) if isinstance(model, Tied) else model.head
    losses = [
        nn.functional.cross_entropy(head(x), y, reduction="none")
        for x, y in zip(rows, words.flatten().split(17), strict=True)
    ]
    return torch.cat(losses).view(words.shape).mean(1)


@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_ten_streamed_steps_leave_the_weights_and_moments_of_plain_autograd(
    tmp_path: Path, name: str
) -> None:
    changes = {
        "optimizer__grad_clip": None,
        "offload__tier": "disk",
        **({"train__micro_batch_size": 8} if name == "tied" else {}),
    }
    state, plan = trained(tmp_path / "ours", name, **changes)
    model = plain(*setting(name, **changes), plan, tmp_path / "first")
    assert not compared(tmp_path / "ours", state, plan, model)


def compared(folder: Path, state: RunState, plan: Plan, model: nn.Module) -> dict[str, float]:
    """Parameters whose weights or moments differ, with the largest difference."""
    found, different = tensors_of(folder, state), {}
    assert plan.settings.tier == "disk"
    with torch.device("meta"):
        layouts, shared = layouts_of(setting_model(plan), plan.settings)
    used = 0
    for key, layout in layouts_by_key(layouts, shared).items():
        for slot in layout.slots:
            parameter: Any = model.get_parameter(slot.name)
            if parameter.grad is None:  # not used end to end
                continue
            used += 1
            rows = slice(slot.start, slot.start + slot.numel)
            pairs = [(found[slot.name].flatten(), parameter.detach().flatten())]
            for moment in ("exp_avg", "exp_avg_sq"):
                pairs.append((found[f"{key}/optimizer.{moment}"][rows], parameter.moments[moment].flatten()))
            if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
                different[slot.name] = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    assert used > 50
    return different


def test_a_tied_table_over_several_micro_batches_differs_by_rounding_alone(tmp_path: Path) -> None:
    changes = {
        "optimizer__grad_clip": None,
        "offload__tier": "disk",
        "train__num_steps": 1,
        "train__warmup_steps": 0,
    }
    state, plan = trained(tmp_path / "ours", "tied", **changes)
    model = plain(*setting("tied", **changes), plan, tmp_path / "first")
    different = compared(tmp_path / "ours", state, plan, model)
    assert set(different) <= {"words.weight"} and different.get("words.weight", 0.0) < 1e-5


def test_a_global_clip_is_torchs_clip_grad_norm(tmp_path: Path) -> None:
    changes = {
        "optimizer__grad_clip": 0.05,
        "optimizer__clip": "global",
        "offload__tier": "disk",
        "model__dropout": 0.0,
    }
    state, plan = trained(tmp_path / "ours", "causal_lm", **changes)
    model = plain(*setting("causal_lm", **changes), plan, tmp_path / "first")
    assert max(compared(tmp_path / "ours", state, plan, model).values(), default=0.0) < 1e-5
    free = plain(*setting("causal_lm", **{**changes, "optimizer__grad_clip": None}), plan, tmp_path / "free")
    assert max(compared(tmp_path / "ours", state, plan, free).values()) > 1e-3, "the norm was above the bound"


# ------------------------------------------------------------------------------------------------------------
# Reading


class HeldOut:
    """What the evaluations ask of a data set."""

    num_test = 12

    def test_batches(self, size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, self.num_test, size):
            whole = {name: torch.cat([value, value.flip(0)]).numpy() for name, value in batches(99).items()}
            yield {name: value[start : min(start + size, self.num_test)] for name, value in whole.items()}


def read(name: str, frozen: FrozenRun) -> list[Any]:
    data: Any = HeldOut()
    prompt = torch.zeros(2, 1, dtype=torch.long)
    if name == "vit":
        return [labels.evaluate(frozen, data)]
    if name == "dit":
        return [
            image_samples.sample(frozen, torch.arange(6), 4, 2.0, 0).tolist(),
            images._losses(frozen, data, 0),
        ]
    if name == "masked_lm":
        return [masked.evaluate(frozen, data), sampling.sample_tokens(frozen, 2, 4, Draw()).tolist()]
    if name == "causal_lm":
        return [tokens.evaluate(frozen, data), sampling.generate(frozen, prompt, 4, Draw(1.0, 0.9)).tolist()]
    return [
        recurrent.evaluate(frozen, data),
        sampling.generate_recurrent(frozen, prompt, 4, Draw(1.0, 0.9)).tolist(),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_streams_is_read_with_the_figures_of_a_resident_one(tmp_path: Path, name: str) -> None:
    eval_config = {"batch_size": 4}
    _, plan = trained(tmp_path, name, offload__tier="disk", train=short(2), eval=eval_config)
    figures = []
    for tier in ("disk", "device"):
        read_at = plan.model_copy(update={"settings": plan.settings.model_copy(update={"tier": tier})})
        with (
            FrozenRun(RunDir(tmp_path), read_at, lambda: setting_model(plan)) as frozen,
            torch.no_grad(),
        ):
            assert frozen.stream.resident == (tier == "device")
            figures.append(read(name, frozen))
    assert figures[0] == figures[1]
