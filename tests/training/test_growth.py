"""Growth: the first block alone, then copied to all blocks, then exact steps of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import first_weights, recipe_with
from exact_runs import (
    BATCH,
    batches,
    setting,
    setting_model,
    short,
    through_ram,
    trained,
    uncounted_activations,  # noqa: F401
)
from test_streamed_step import tensors_of
from torch import nn

from lowmem.blocks.borders import BorderBytes
from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError, ResumeError
from lowmem.inference.frozen_run import FrozenRun
from lowmem.machine.profile import load_profile
from lowmem.planning.plan import Plan, make_plan
from lowmem.planning.settings import setup_of
from lowmem.planning.traffic import streamed_traffic, traffic_before_growth
from lowmem.reporting.report import digest, read_report
from lowmem.schedule import learning_rate, mix_seed
from lowmem.training.trainer import Trainer

STEPS, GROWS = 12, 6
GROWN: dict[str, Any] = {
    "blocks__grow_at": 0.5,
    "blocks__visit_steps": 3,
    "train": short(STEPS),
    "model__num_layers": 6,
}


ARMS: dict[str, dict[str, Any]] = {
    "device": {"offload__tier": "device"},
    "disk": {"offload__tier": "disk", "offload__resident_layers": 0, "offload__borders": "disk"},
    "stays": {"offload__tier": "disk", "offload__resident_layers": 2, "offload__write_back": "wait"},
    "sweeps": {"offload__tier": "disk", "offload__resident_layers": 0, "blocks__sweep_steps": 3},
    "sweeps on the device": {"offload__tier": "device", "blocks__sweep_steps": 3},
}


@pytest.mark.parametrize(
    "arms",
    [
        ("device", "disk"),
        pytest.param(("device", "stays"), marks=pytest.mark.slow),
        pytest.param(("sweeps", "sweeps on the device"), marks=pytest.mark.slow),
    ],
)
def test_every_tier_gives_the_same_digest_and_moves_what_is_planned(
    tmp_path: Path, arms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {}
    for arm, changes in ((arm, ARMS[arm]) for arm in arms):
        state, plan = trained(tmp_path / arm, "causal_lm", **{**GROWN, **changes})
        digests[arm] = digest(state)
        if "device" not in arm:
            traffic = plan.predicted.traffic
            assert traffic is not None and state.traffic == traffic.moved(STEPS, 4), arm
            content = read_report(tmp_path / arm).content
            assert content["predicted"]["traffic"] == content["traffic"]
    through_ram(monkeypatch)
    steps = {"blocks__sweep_steps": 3} if "sweeps" in arms else {}
    state, plan = trained(tmp_path / "host", "causal_lm", **GROWN, offload__tier="disk", **steps)
    digests["host"] = digest(state)
    assert state.traffic == in_ram(plan).moved(STEPS, 4)
    assert len(set(digests.values())) == 1 and None not in digests.values(), digests


def in_ram(plan: Plan) -> Any:
    settings = plan.settings.model_copy(update={"tier": "host"})
    setup = setup_of(setting_model(plan), plan.recipe, plan.profile, settings)
    traffic = streamed_traffic(setup, BorderBytes())
    return traffic.model_copy(update=traffic_before_growth(setup, plan.queue()))


# ------------------------------------------------------------------------------------------------------------
# Plain torch


def plain(plan: Plan, folder: Path, **changes: Any) -> nn.Module:
    """The same run by torch's own parts alone."""
    recipe, build = setting("causal_lm", **changes)
    _, state = first_weights(folder, build, plan)
    start, model = tensors_of(folder, state), build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name])
    model.train()
    objective: Any = model.make_objective(recipe.noise)
    decay, betas = recipe.optimizer.weight_decay, recipe.optimizer.betas
    kinds: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == decayed], "weight_decay": share}
        for decayed, share in ((True, decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(kinds, betas=(betas[0], betas[1]), eps=recipe.optimizer.eps, fused=True)
    for step in range(STEPS):
        if step == GROWS:
            copy_first_block(model, optimizer)
        layers = model.layers if step >= GROWS else model.layers[:2]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train, GROWS)
        optimizer.zero_grad()
        for part in range(2):
            micro = {key: value[part * 4 : (part + 1) * 4] for key, value in batches(step).items()}
            torch.manual_seed(mix_seed(recipe.train.seed, "step", 0, step, part))
            (objective.end_to_end_loss(layers, micro).mean() / (BATCH // 4)).backward()
        optimizer.step()
    return model


def copy_first_block(model: Any, optimizer: torch.optim.AdamW) -> None:
    """Weights and moments of layers 0 and 1 become those of layers 2 and 3, and of 4 and 5."""
    for index in range(2, 6):
        for target, source in zip(
            model.layers[index].parameters(), model.layers[index % 2].parameters(), strict=True
        ):
            target.data.copy_(source.data)
            optimizer.state[target] = {key: value.clone() for key, value in optimizer.state[source].items()}


def test_a_model_that_grows_has_the_weights_of_a_plain_loop_to_the_bit(tmp_path: Path) -> None:
    changes = {**GROWN, "optimizer__grad_clip": None, "offload__tier": "disk", "offload__resident_layers": 0}
    state, plan = trained(tmp_path / "ours", "causal_lm", **changes)
    found = tensors_of(tmp_path / "ours", state)
    model = plain(plan, tmp_path / "first", **changes)
    trained_ones = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained_ones) > 50
    assert [name for name, p in trained_ones.items() if not torch.equal(found[name], p.detach())] == []
    last = max(name for name in trained_ones if name.startswith("layers.0."))
    assert not torch.equal(found[last], found[last.replace("layers.0.", "layers.2.")])


# ------------------------------------------------------------------------------------------------------------
# The way there


class Stopped(Exception):
    pass


def test_a_run_that_stops_before_it_has_grown_is_not_read_and_goes_on_to_the_digest(tmp_path: Path) -> None:
    changes = {**GROWN, "offload__tier": "disk"}
    expected = digest(trained(tmp_path / "unbroken", "causal_lm", **changes)[0])
    for visit in (1, 2):
        folder = tmp_path / f"stops-at-{visit}"

        def stop(record: dict[str, Any], visit: int = visit) -> None:
            if record["event"] == "visit" and record["visit"] == visit:
                raise Stopped

        with pytest.raises(Stopped):
            trained(folder, "causal_lm", [stop], **changes)
        recipe, build = setting("causal_lm", **changes)
        plan = make_plan(build, recipe, load_profile("cpu-4gib"))
        state = RunDir(folder).read_state()
        assert state is not None
        if state.visits_done < 2:
            with pytest.raises(ResumeError, match="because the model grows then"):
                FrozenRun(RunDir(folder), plan, build).__enter__()
        assert digest(Trainer(build, plan, folder).fit(batches)) == expected


@pytest.mark.parametrize(
    ("num_steps", "visit_steps", "share", "visits"),
    [(100, 10, 0.6, 6), (100, 10, 0.01, 1), (100, 10, 0.99, 9), (105, 10, 0.99, 10), (20, 10, 0.5, 1)],
)
def test_a_model_grows_between_two_visits(
    num_steps: int, visit_steps: int, share: float, visits: int
) -> None:
    recipe = recipe_with(
        method="end_to_end",
        train__num_steps=num_steps,
        blocks__visit_steps=visit_steps,
        blocks__grow_at=share,
    )
    queue = BlockQueue.of(recipe.to_dict(), 3)
    blocks = [visit.blocks for visit, _ in queue.pending(0)]
    assert blocks == [(0,)] * visits + [(0, 1, 2)] * (queue.num_visits - visits)
    assert queue.grow_steps == visits * visit_steps < num_steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "diffusion_blocks"}, "allowed with method diffusion_blocks: null"),
        ({"blocks__num_blocks": "auto"}, "allowed: a number above 1"),
        ({"blocks__num_blocks": 4}, "with 4 blocks of 6 layers; allowed: blocks of as many layers each"),
        ({"train__num_steps": 25}, "allowed: less than train.num_steps = 25"),
        ({"blocks__grow_at": 1.0}, "blocks.grow_at"),
    ],
)
def test_a_growth_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_with(**{"method": "end_to_end", "blocks__grow_at": 0.5, **changes})
    assert expected in str(caught.value) and "\n" not in str(caught.value)
