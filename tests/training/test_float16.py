"""Compute in fp16 with a scaled loss: an update is that of the true gradients, tiers and resumed runs have
one digest, and what cannot be is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_with
from exact_runs import batches, setting, short, trained, uncounted_activations  # noqa: F401
from torch import nn

from lowmem.blocks import optim
from lowmem.blocks.arena import Arena, ArenaLayout, aligned_buffer
from lowmem.errors import ConfigError
from lowmem.job import train
from lowmem.machine.device import CPU, Cuda
from lowmem.machine.profile import Profile, load_profile
from lowmem.planning.plan import make_plan
from lowmem.recipe import OptimizerConfig
from lowmem.reporting.report import digest, read_report
from lowmem.training.finite import not_finite
from lowmem.training.trainer import Trainer

SCALE = 1024.0
FLOAT16: dict[str, Any] = {"train__precision": "float16", "optimizer__loss_scale": SCALE}

# ------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_an_update_from_scaled_gradients_is_that_of_the_true_ones_to_the_bit(optimizer: str) -> None:
    layout = ArenaLayout([("w", (64, 96)), ("b", (96,))], optimizer)
    ends = list[torch.Tensor]()
    for scale, dtype in ((1.0, torch.float32), (SCALE, torch.float16)):
        arena, generator = (
            Arena(layout, aligned_buffer(layout.total_bytes)),
            torch.Generator().manual_seed(0),
        )
        config = OptimizerConfig(loss_scale=scale, grad_clip=None)
        for number in (1, 2, 3):
            # What fp16 holds both as it is and scaled.
            true = torch.randn(layout.numel, generator=generator).div(64).half().float()
            grads = (true * scale).to(dtype)
            assert torch.equal(grads.float() / scale, true)
            optim.update(arena, grads, optim.Step(number, 1e-2, config))
        ends.append(arena.buffer)
    assert torch.equal(*ends)


def test_scaled_gradients_are_clipped_by_the_norm_of_the_true_ones() -> None:
    true = torch.full((1000,), 0.25)
    config = OptimizerConfig(loss_scale=SCALE, grad_clip=1.0)
    for factor in (None, optim.whole_factor([optim.gradient_norm(true * SCALE)], config)):
        grads = (true * SCALE).half()
        optim.clipped(grads, config, factor)
        assert float((grads.float() / SCALE).norm()) == pytest.approx(1.0, rel=2e-3)


def test_gradients_that_would_vanish_in_fp16_arrive_with_a_scale() -> None:
    found = {}
    for scale in (2.0, SCALE):
        layer = nn.Linear(8, 8, dtype=torch.float16)
        loss = layer(torch.full((4, 8), 2.0**-15, dtype=torch.float16)).float().mean() * 2.0**-8
        (loss * scale).backward()
        assert layer.weight.grad is not None
        found[scale] = int(layer.weight.grad.count_nonzero())
    assert found == {2.0: 0, SCALE: 64}


@pytest.mark.parametrize("clip", ["block", pytest.param("global", marks=pytest.mark.slow)])
def test_streamed_steps_in_fp16_have_the_resident_digest_and_follow_fp32(tmp_path: Path, clip: str) -> None:
    common: dict[str, Any] = {"train": short(4), "optimizer__clip": clip}
    fp16 = {**common, "optimizer__loss_scale": SCALE, "train": {**short(4), "precision": "float16"}}
    ends = [
        trained(tmp_path / name, "causal_lm", **changes, offload__tier=tier)[0]
        for name, tier, changes in (
            ("device", "device", fp16),
            ("disk", "disk", fp16),
            ("fp32", "device", common),
        )
    ]
    assert digest(ends[0]) == digest(ends[1]) is not None
    assert ends[0].blocks[0].loss == pytest.approx(ends[2].blocks[0].loss, rel=1e-2)
    assert digest(ends[0]) != digest(ends[2])


def test_a_run_in_fp16_that_is_broken_off_ends_with_the_unbroken_digest(tmp_path: Path) -> None:
    recipe, build = setting("vit", **{"method": "diffusion_blocks", **FLOAT16, "train__num_steps": 6})
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    whole = Trainer(build, plan, tmp_path / "whole").fit(batches)

    def broken(step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        Trainer(build, plan, tmp_path / "broken").fit(broken)
    assert digest(Trainer(build, plan, tmp_path / "broken").fit(batches)) == digest(whole) is not None


@pytest.mark.slow
def test_digits_train_and_are_evaluated_in_fp16_and_the_report_says_so(tmp_path: Path) -> None:
    changes = ["train.precision=float16", "optimizer.loss_scale=1024", "train.num_steps=4"]
    short_ = ["blocks.visit_steps=2", "train.warmup_steps=2", "eval.num_batches=1"]
    report = read_report(train("digits-vit", "cpu-4gib", tmp_path / "run", [*changes, *short_]))
    assert "float16 with loss scale 1024," in report.summary()
    assert 0 <= report.content["metrics"]["value"] <= 1


# ------------------------------------------------------------------------------------------------------------
# What is refused, and what is said


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__precision": "float16"}, "optimizer.loss_scale: found 1; allowed with train.precision"),
        ({**FLOAT16, "optimizer__loss_scale": 1000.0}, "optimizer.loss_scale: found 1000; allowed"),
        ({"train__precision": "bfloat16", "optimizer__loss_scale": 2.0}, "optimizer.loss_scale: found 2"),
        (
            {"optimizer__loss_scale": 2.0},
            "optimizer.loss_scale: found 2; allowed with train.precision auto: 1",
        ),
        ({**FLOAT16, "train__weights": "bfloat16"}, "train.weights: found bfloat16; allowed with"),
        (
            {
                **FLOAT16,
                "method": "end_to_end",
                "model": {"name": "huggingface", "path": "decoder"},
                "adapter": {"name": "lora"},
                "data": {"name": "custom"},
                "train__seq_len": 8,
            },
            "train.precision: found float16; allowed where weights are frozen",
        ),
        *(
            (
                {"train__precision": precision, "train__fp16_accumulation": True},
                "train.fp16_accumulation: found",
            )
            for precision in ("float32", "bfloat16", "auto")
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=r"^tiny: ") as caught:
        recipe_with(**changes)
    assert named in str(caught.value)


def accumulating(profile: Profile) -> Any:
    recipe, build = setting("vit", **FLOAT16, train__fp16_accumulation=True)
    return make_plan(build, recipe, profile)


@pytest.mark.parametrize("profile", ["cpu-4gib", "apple-m2-16gb"])
def test_sums_in_fp16_are_refused_off_cuda(profile: str) -> None:
    with pytest.raises(ConfigError, match=r"^train.fp16_accumulation: found true; allowed on device type"):
        accumulating(load_profile(profile))


def test_sums_in_fp16_are_named_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = accumulating(load_profile("rtx-4060-laptop-8gb"))
    assert "float16 with loss scale 1024 and fp16 accumulation" in plan.table().replace("\n", " ")
    monkeypatch.setattr("lowmem.planning.candidates.has_fp16_accumulation", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^train.fp16_accumulation: found true; allowed where torch has it"
    ):
        accumulating(load_profile("rtx-4060-laptop-8gb"))


def test_a_number_that_is_not_finite_in_fp16_names_the_scale() -> None:
    from lowmem.blocks.order import Visit

    problem = not_finite(recipe_with(**FLOAT16), Visit(0, (0,), 0, 1), 0, None, {})
    assert "optimizer.loss_scale 1024: lower it" in str(problem)


# ------------------------------------------------------------------------------------------------------------
# The switch


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_process_wide_switch_is_as_wanted_and_undone_afterwards(before: bool, wanted: bool) -> None:
    products = torch.backends.cuda.matmul
    untouched = products.allow_fp16_accumulation
    try:
        products.allow_fp16_accumulation = before
        with Cuda().kernels(False, wanted):
            assert products.allow_fp16_accumulation == wanted
        assert products.allow_fp16_accumulation == before
        with pytest.raises(OSError, match="disk"), Cuda().kernels(False, wanted):
            raise OSError("disk")
        assert products.allow_fp16_accumulation == before
        with CPU.kernels(False, wanted):
            assert products.allow_fp16_accumulation == before
    finally:
        products.allow_fp16_accumulation = untouched
