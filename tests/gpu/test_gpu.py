"""What needs a CUDA device. Run with `scripts/gpu_suite`, which also writes the table and the JSON.

Each test hands its figures to `record`, so that the suite's table shows numbers and not only passes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_with
from gpu_common import (
    SHORT,
    needs_cuda,
    record,
    train,
    train_tokens,
    uncounted_activations,  # noqa: F401
)

from lowmem.blocks.arena import Arena, ArenaLayout
from lowmem.blocks.optim import Step, update
from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import describe_data, load_data
from lowmem.machine.monitor import Monitor
from lowmem.machine.profile import Profile
from lowmem.models import model_builder
from lowmem.planning.plan import make_plan
from lowmem.recipe import OptimizerConfig, load_recipe
from lowmem.reporting.report import digest
from lowmem.reporting.telemetry import read_records
from lowmem.training.trainer import Trainer

pytestmark = needs_cuda


@pytest.mark.usefixtures("uncounted_activations")
@pytest.mark.parametrize("optimizer", ["adamw8bit", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_tier_gives_the_same_digest_on_the_device(
    tmp_path: Path, profile: Profile, optimizer: str, precision: str
) -> None:
    digests = {}
    for name, changes in {
        "device": {"offload__tier": "device"},
        "host": {"offload__tier": "host"},
        "host-beside": {"offload__tier": "host", "offload__write_back": "beside"},
        "disk": {"offload__tier": "disk"},
        "disk-no-prefetch": {"offload__tier": "disk", "offload__prefetch": False},
    }.items():
        recipe = recipe_with(
            **{**SHORT, "optimizer__name": optimizer, "train__precision": precision, **changes}
        )
        digests[name] = train(tmp_path / name, recipe, profile)["digest"]
    record(
        f"tiers' digests, {optimizer}, {precision}", arms=len(digests), distinct=len(set(digests.values()))
    )
    assert len(set(digests.values())) == 1 and None not in digests.values()


@pytest.mark.usefixtures("uncounted_activations")
def test_an_interrupted_run_ends_with_the_unbroken_digest(tmp_path: Path, profile: Profile) -> None:
    recipe = recipe_with(**SHORT, optimizer__name="adamw8bit", offload__tier="disk")
    unbroken = train(tmp_path / "unbroken", recipe, profile)["digest"]

    class Interrupted(Exception):
        pass

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["visit"] == 5:
            raise Interrupted

    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, profile)
    data = load_data(recipe.data, recipe.train.seq_len)
    with pytest.raises(Interrupted):
        Trainer(build, plan, tmp_path / "broken", [interrupt]).fit(lambda step: data.batch(0, step, 64))
    Trainer(build, plan, tmp_path / "broken").fit(lambda step: data.batch(0, step, 64))
    state = RunDir(tmp_path / "broken").read_state()
    assert state is not None and digest(state) == unbroken


def test_the_8_bit_step_follows_a_float_reference(profile: Profile) -> None:
    torch.manual_seed(0)
    arenas = {}
    for name in ("adamw8bit", "adamw"):
        layout = ArenaLayout([("weight", (512, 700)), ("bias", (700,))], name)
        arenas[name] = Arena(layout, torch.zeros(layout.total_bytes, dtype=torch.uint8, device="cuda"))
    start = torch.randn(arenas["adamw"].layout.numel, device="cuda") * 0.02
    for arena in arenas.values():
        arena.weights.copy_(start)
    config = OptimizerConfig(grad_clip=None)
    for step in range(1, 51):
        grads = torch.randn_like(start) * 0.01
        for arena in arenas.values():
            update(arena, grads.clone(), Step(step, 1e-3, config))
    moved = (arenas["adamw"].weights - start).norm()
    error = (arenas["adamw8bit"].weights - arenas["adamw"].weights).norm() / moved
    record("8-bit AdamW against fp32, 50 steps", relative_error=float(error))
    assert error < 0.05


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_the_peak_is_the_planned_one(tmp_path: Path, profile: Profile, tier: str) -> None:
    """A model large enough that the runtime's own memory does not decide: 8 layers of width 1024 on 64
    tokens.
    """
    changes = {
        "model__num_layers": 8,
        "model__dim": 1024,
        "model__num_heads": 16,
        "model__patch_size": 1,
        "blocks__num_blocks": 4,
    }
    recipe = recipe_with(
        **{
            **SHORT,
            **changes,
            "train__num_steps": 4,
            "train__batch_size": 256,
            "offload__tier": tier,
            "train__recompute": False,
        }
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    content = train(tmp_path / tier, recipe, profile)
    planned = content["predicted"]["device_peak_bytes"] - content["predicted"]["by_category"]["runtime_floor"]
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    record(
        f"peak against plan, tier {tier}",
        planned_bytes=planned,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        ratio=allocated / planned,
    )
    assert allocated == pytest.approx(planned, rel=0.1)


def test_nvml_and_the_allocator_are_read_while_training(tmp_path: Path, profile: Profile) -> None:
    train(tmp_path / "run", recipe_with(**SHORT), profile)
    steps = [
        event for event in read_records(RunDir(tmp_path / "run").telemetry_path) if event["event"] == "step"
    ]
    assert all(step["device_reserved_bytes"] > 0 and step["device_allocated_bytes"] > 0 for step in steps)
    with Monitor(unified=False) as monitor:
        sample = monitor.sample()
    record("telemetry", nvml_used_bytes=sample.nvml_used_bytes, nvml_process_bytes=sample.nvml_process_bytes)
    assert sample.nvml_used_bytes is None or sample.nvml_used_bytes > 0


@pytest.mark.usefixtures("uncounted_activations")
def test_no_step_synchronises_the_device(tmp_path: Path, profile: Profile) -> None:
    """Torch's own alarm for synchronising calls stays silent through forward, backward and optimizer."""
    recipe = recipe_with(**SHORT, train__precision="bfloat16", optimizer__name="adamw8bit")
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, profile)
    data = load_data(recipe.data, recipe.train.seq_len)
    arrays = {step: data.batch(0, step, 64) for step in range(recipe.train.num_steps)}
    batches = {
        step: {name: torch.from_numpy(array).pin_memory() for name, array in batch.items()}
        for step, batch in arrays.items()
    }

    def batch(step: int) -> dict[str, torch.Tensor]:
        """At the start of a step: the alarm is on in the middle ones of a visit of four."""
        torch.cuda.set_sync_debug_mode("error" if step % 4 in (1, 2) else "default")
        return batches[step]

    try:
        with warnings.catch_warnings():  # torch says that the alarm is a prototype
            warnings.simplefilter("ignore")
            Trainer(build, plan, tmp_path / "run").fit(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("uncounted_activations")
@pytest.mark.parametrize("recipe", ["digits-dit", "stdlib-masked", "stdlib-causal", "stdlib-recurrent"])
def test_every_architecture_gives_the_same_digest_from_device_and_disk(
    tmp_path: Path, profile: Profile, recipe: str
) -> None:
    digests = set()
    for tier in ("device", "disk"):
        settled = load_recipe(
            recipe,
            [
                "train.num_steps=6",
                "train.warmup_steps=2",
                "blocks.visit_steps=3",
                "train.deterministic=true",
                f"offload.tier={tier}",
            ],
        )
        digests.add(train(tmp_path / tier, settled, profile)["digest"])
    record(f"digests of {recipe}", distinct=len(digests))
    assert len(digests) == 1


@pytest.mark.usefixtures("uncounted_activations")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", ["block", "global"])
def test_a_streamed_model_trained_end_to_end_has_the_resident_digest(
    tmp_path: Path, profile: Profile, precision: str, clip: str
) -> None:
    """Blocks from host memory and from disk, activations at their borders on the device, in host memory and
    on disk, two micro-batches.
    """
    common = {
        **SHORT,
        "method": "end_to_end",
        "train__micro_batch_size": 32,
        "train__precision": precision,
        "optimizer__clip": clip,
        "model__dropout": 0.1,
    }
    arms = {"device": {"offload__tier": "device"}}
    for tier, borders in (("host", "device"), ("host", "host"), ("disk", "host"), ("disk", "disk")):
        arms[f"{tier}, borders {borders}"] = {"offload__tier": tier, "offload__borders": borders}
    arms["host, no prefetch"] = {"offload__tier": "host", "offload__prefetch": False}  # type: ignore[dict-item]
    digests = {
        name: train(tmp_path / name, recipe_with(**{**common, **changes}), profile)["digest"]
        for name, changes in arms.items()
    }
    record(
        f"end to end, streamed, {precision}, clip {clip}",
        arms=len(digests),
        distinct=len(set(digests.values())),
    )
    assert len(set(digests.values())) == 1 and None not in digests.values(), digests


@pytest.mark.parametrize("tier, borders", [("host", "host"), ("disk", "disk")])
def test_a_streamed_model_moves_the_bytes_of_the_plan(
    tmp_path: Path, profile: Profile, tier: str, borders: str
) -> None:
    recipe = recipe_with(
        **SHORT, method="end_to_end", train__micro_batch_size=16, offload__tier=tier, offload__borders=borders
    )
    content = train(tmp_path / "run", recipe, profile)
    traffic = RunDir(tmp_path / "run").read_plan()["predicted"]["traffic"]
    for name, counted in content["traffic"].items():
        assert counted == traffic["start"][name] + 12 * traffic["step"][name] + 3 * traffic["commit"][name], (
            name
        )
    record(f"streamed traffic, tier {tier}, borders {borders}", **content["traffic"])


@pytest.mark.usefixtures("uncounted_activations")
def test_fp16_has_one_digest_at_every_tier_and_is_timed_with_and_without_sums_in_fp16(
    tmp_path: Path, profile: Profile
) -> None:
    float16 = {"precision": "float16", "warmup_steps": 1}
    summed = {**float16, "fp16_accumulation": True}
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        "bfloat16": ("device", {"precision": "bfloat16", "warmup_steps": 1}),
        "float16": ("device", float16),
        "streamed": ("host", float16),
        "summed": ("device", summed),
        "summed_streamed": ("host", summed),
    }
    step_s, loss, digests = {}, {}, {}
    for name, (tier, changes) in arms.items():
        optimizer = {"loss_scale": 1024.0} if changes["precision"] == "float16" else {}
        found = train_tokens(
            tmp_path / name,
            profile,
            3,
            512,
            6,
            1,
            {"tier": tier},
            method="end_to_end",
            train=changes,
            optimizer=optimizer,
        )
        records = read_records(RunDir(tmp_path / name).telemetry_path)
        times = [event["step_s"] for event in records if event["event"] == "step"]
        step_s[name], loss[name] = sum(times[2:-1]) / len(times[2:-1]), found["blocks"][0]["loss"]
        digests[name] = found["digest"]
    record(
        "fp16",
        **{f"{name}_ms": 1000 * value for name, value in step_s.items()},
        **{f"{name}_loss": value for name, value in loss.items()},
    )
    assert digests["float16"] == digests["streamed"] and digests["summed"] == digests["summed_streamed"]
    assert loss["summed"] == pytest.approx(loss["bfloat16"], rel=0.02)
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation
