"""An evaluation lives in the plan's budget: its figures do not depend on how it is cut, and its peak is as
planned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import first_weights, recipe_with
from safetensors.torch import load_file

from lowmem.blocks.arena import Arena, parameter_views
from lowmem.data.datasets import Dataset, describe_data, load_data
from lowmem.inference.evaluate import shown_progress
from lowmem.inference.evaluation import labels, tokens
from lowmem.inference.evaluation.common import Draws
from lowmem.inference.export import export_run
from lowmem.inference.frozen_run import FrozenRun, open_run
from lowmem.inference.generate import sample_run
from lowmem.inference.kinds import kind_of
from lowmem.inference.sampling import Draw, generate, rows_at_once
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.planning.footprint import with_headroom
from lowmem.planning.plan import Plan, make_plan
from lowmem.units import MIB

TEXT = {
    "data__name": "stdlib_text",
    "train__seq_len": 32,
    "train__batch_size": 8,
    "eval__batch_size": 8,
    "eval__num_batches": 2,
}
SIZE = {"num_layers": 3, "dim": 32, "num_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"model": {"name": "vit", "patch_size": 2, **SIZE}, "eval__batch_size": 40},
    "dit": {
        "model": {"name": "dit", "patch_size": 2, **SIZE},
        "eval__batch_size": 40,
        "eval__num_samples": 20,
        "eval__num_steps": 3,
    },
    "masked_lm": {"model": {"name": "masked_lm", **SIZE}, **TEXT},
    "causal_lm": {"model": {"name": "causal_lm", **SIZE}, **TEXT},
    "recurrent_lm": {
        "model": {"name": "recurrent_lm", "prelude_layers": 1, "coda_layers": 1, **SIZE},
        "blocks__num_blocks": 1,
        **TEXT,
    },
}


def opened(folder: Path, **overrides: Any) -> tuple[Plan, Dataset]:
    """A run of random weights that all have an effect, and its data."""
    recipe = recipe_with(**overrides)
    spec = describe_data(recipe.data, recipe.train.seq_len)
    build = model_builder(recipe, spec)

    def built() -> Any:
        model = build()
        for module in model.modules():
            if getattr(module, "zero", False):  # gates and read-outs that would start at zero
                module.zero = False
        return model

    plan = make_plan(built, recipe, load_profile("cpu-4gib"), folder, num_test=spec.num_test)
    first_weights(folder, built, plan)
    return plan, load_data(recipe.data, recipe.train.seq_len)


def cut(folder: Path, data: Dataset, size: int, walk: int, said: list[str] | None = None) -> dict[str, Any]:
    """The figures of the run in `folder` where the plan has cut its evaluation so."""
    with open_run(folder) as frozen, torch.no_grad():
        sizes = frozen.size_for(data.num_test)
        changed = {"micro_batch_size": size, "walk_size": walk}
        frozen._sizes = sizes.model_copy(update=changed)
        lines = [] if said is None else said
        with shown_progress(frozen, data.num_test, lambda line, _: lines.append(line)):
            return kind_of(frozen).evaluate(frozen, data)


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [float(tree)] if isinstance(tree, int | float) else []


@pytest.mark.parametrize(("name", "walks"), [("vit", labels._Walks), ("causal_lm", tokens._Walks)])
def test_what_waits_between_the_calls_of_a_chain_keeps_its_memory(
    tmp_path: Path, name: str, walks: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In new memory at every call it would split the free memory of the C library's heap."""
    places: dict[int, list[int]] = {}
    real = walks._chain  # type: ignore[attr-defined]

    def chain(self: Any, which: int, layers: Any, part: Any, z: torch.Tensor, *levels: float | None) -> Any:
        places.setdefault(id(part), []).append(z.data_ptr())
        return real(self, which, layers, part, z, *levels)

    monkeypatch.setattr(walks, "_chain", chain)
    _, data = opened(tmp_path, method="diffusion_blocks", **MODELS[name])
    cut(tmp_path, data, 4, 10**6)
    assert len(places) > 1 and all(len(calls) > 1 for calls in places.values())
    assert len({place for calls in places.values() for place in calls}) == len(places)


@pytest.mark.parametrize("method", ["diffusion_blocks", "end_to_end"])
@pytest.mark.parametrize("name", MODELS)
def test_the_figures_do_not_depend_on_how_the_evaluation_is_cut(
    tmp_path: Path, name: str, method: str
) -> None:
    """To five digits: a matrix product of fewer rows may add up in another order. The draws are the same to
    the bit, or the figures would differ in their first digits.
    """
    _, data = opened(tmp_path, method=method, **MODELS[name])
    whole = numbers(cut(tmp_path, data, 40, 10**6))
    walked = numbers(cut(tmp_path, data, 4, 8))
    assert len(whole) == len(walked) > 1
    assert walked == pytest.approx(whole, rel=1e-5, abs=1e-5)


def test_walks_of_whole_batches_give_the_same_bits_and_draws_are_those_of_the_whole(tmp_path: Path) -> None:
    _, data = opened(tmp_path, **MODELS["causal_lm"])
    assert cut(tmp_path, data, 8, 10**6) == cut(tmp_path, data, 8, 8)
    sizes = [[8, 8], [8, 5]]
    one, several = Draws(3, (32,), [sum(sizes, [])], 2), Draws(3, (32,), sizes, 2)
    expected = [[one.rows(8), one.rows(8), one.rows(8), one.rows(5)] for _ in range(2)]
    for group in (0, 1):
        for site in (0, 1):
            several.go_to(group, site)
            for place, size in enumerate(sizes[group]):
                assert torch.equal(several.rows(size), expected[site][2 * group + place])


def planned(memory_gib: float, **overrides: Any) -> Plan:
    recipe = recipe_with(**overrides)
    spec = describe_data(recipe.data, recipe.train.seq_len)
    machine = load_profile("cpu-4gib")
    device = machine.device.model_copy(update={"memory_gib": memory_gib})
    host = machine.host.model_copy(update={"memory_gib": memory_gib})
    small = machine.model_copy(update={"device": device, "host": host})
    return make_plan(model_builder(recipe, spec), recipe, small, num_test=spec.num_test)


WIDE: dict[str, Any] = {
    "model": {"name": "causal_lm", "num_layers": 3, "dim": 256, "num_heads": 4},
    "data__name": "stdlib_text",
    "train__seq_len": 128,
    "train__batch_size": 4,
    "eval__batch_size": 256,
    "eval__num_batches": 4,
}


def test_an_evaluation_that_does_not_fit_whole_is_split_in_the_plan_and_says_so(tmp_path: Path) -> None:
    large, small = planned(16.0, **WIDE), planned(1.6, **WIDE)
    roomy, tight = large.predicted.evaluation, small.predicted.evaluation
    assert roomy is not None and tight is not None
    assert not roomy.is_split and roomy.walk_size == 1024 and small.fits
    assert tight.is_split and tight.peak_bytes < roomy.peak_bytes
    assert with_headroom(tight.peak_bytes) <= small.budget.device_bytes < roomy.peak_bytes
    assert f"micro-batch {tight.micro_batch_size} of 256" in small.table()
    assert "micro-batch 256," in large.table()
    _, data = opened(tmp_path, **MODELS["vit"])
    said: list[str] = []
    cut(tmp_path, data, 8, 16, said)
    assert said[0].startswith("evaluation: batches of 40 in micro-batches of 8, to stay within the budget")


def test_the_larger_of_training_and_evaluation_must_fit() -> None:
    plan = planned(16.0, **WIDE)
    predicted, evaluation = plan.predicted, plan.predicted.evaluation
    assert evaluation is not None and evaluation.peak_bytes > predicted.device_peak_bytes
    assert predicted.run_peak_bytes == evaluation.peak_bytes
    between = with_headroom(predicted.device_peak_bytes)
    assert not predicted.fits(plan.budget.model_copy(update={"device_bytes": between}))
    assert predicted.model_copy(update={"evaluation": None}).fits(
        plan.budget.model_copy(update={"device_bytes": between})
    )


def test_a_draw_of_more_texts_than_fit_is_several_and_blocks_that_do_not_fit_together_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = opened(tmp_path, **MODELS["causal_lm"], offload__tier="disk")
    prompt = torch.zeros(2, 1, dtype=torch.long)
    made = []
    for fit in (True, False):
        monkeypatch.setattr(FrozenRun, "_all_blocks_fit", lambda _, fit=fit: fit)
        with open_run(tmp_path, for_drawing=True) as frozen:
            assert frozen.stream.resident == fit and rows_at_once(frozen, 40) > 1
            made.append(generate(frozen, prompt, 4, Draw()).tolist())
    assert made[0] == made[1]
    monkeypatch.setattr("lowmem.inference.generate.rows_at_once", lambda *_: 2)
    text = sample_run(tmp_path, tmp_path / "five.txt", 5).read_text(errors="replace")
    assert text.count("--- sample") == 5


def child(tmp_path: Path, recipe: str, profile: str, *overrides: str, **more: Any) -> dict[str, Any]:
    arguments = [str(Path(__file__).with_name("evaluation_child.py")), str(tmp_path), recipe, profile]
    done = subprocess.run(
        [sys.executable, *arguments, "optimizer.name=adamw", *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        **more,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


LARGE = {
    "digits-vit": ["model.dim=256", "model.patch_size=1", "model.num_layers=3"],
    "stdlib-causal": [
        "model.dim=256",
        "model.num_layers=3",
        "train.seq_len=128",
        "eval.num_batches=1",
    ],
    "stdlib-masked": ["model.dim=256", "model.num_layers=3", "eval.num_batches=1"],
    "digits-dit": [
        "model.dim=256",
        "model.patch_size=1",
        "model.num_layers=3",
        "eval.num_batches=1",
        "eval.num_samples=128",
        "eval.num_steps=3",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LARGE)
def test_the_peak_of_an_evaluation_is_within_5_percent_or_32_mib_of_its_plan(
    tmp_path: Path, recipe: str
) -> None:
    found = child(tmp_path, recipe, "cpu-4gib", *LARGE[recipe])
    measured, predicted = found["measured_bytes"], found["predicted_bytes"]
    assert abs(measured - predicted) <= max(0.05 * measured, 32 * MIB), found


@pytest.mark.slow
def test_an_evaluation_under_a_hard_limit_of_its_budget_is_not_killed(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from memory_limit import memory_limit

    profile = tmp_path / "small.yaml"
    machine = load_profile("cpu-4gib").model_dump(mode="json", by_alias=True)
    machine["device"]["memory_gib"] = machine["host"]["memory_gib"] = 1.5
    profile.write_text(json.dumps(machine))
    budget = load_profile(str(profile)).device_budget_bytes
    with memory_limit(budget, "evaluation") as limit:
        found = child(
            tmp_path / "run",
            "stdlib-causal",
            str(profile),
            *LARGE["stdlib-causal"],
            "eval.batch_size=256",
            "train.batch_size=4",
            preexec_fn=limit.enter,
        )
        peak = limit.peak_bytes()
    assert found["budget_bytes"] == budget and found["micro_batch_size"] < 256, found
    assert found["measured_bytes"] <= budget and (peak is None or peak <= budget), found


def test_an_exported_file_is_what_the_block_holds_and_is_written_without_a_copy(tmp_path: Path) -> None:
    plan, _ = opened(tmp_path / "run", **MODELS["vit"])
    folder = export_run(tmp_path / "run", tmp_path / "weights")
    with open_run(tmp_path / "run") as frozen:
        buffer = frozen.stream.load(1)
        views = parameter_views(frozen.layouts[1], Arena(frozen.layouts[1], buffer).result)
        written = load_file(folder / "model-00002-of-00004.safetensors")
        assert written.keys() == views.keys()
        assert all(torch.equal(written[name], view) for name, view in views.items())
