"""Block coordinate: one block after another trained by exact gradients, against a plain loop of the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import first_weights, recipe_with
from exact_runs import (
    BATCH,
    batches,
    require_one_digest,
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
from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.errors import ConfigError
from lowmem.planning.plan import Plan
from lowmem.planning.settings import file_bytes, setup_of
from lowmem.planning.traffic import coordinate_traffic
from lowmem.reporting.report import digest, read_report
from lowmem.schedule import learning_rate, mix_seed

STEPS, VISIT = 6, 4
TURNS: dict[str, Any] = {
    "method": "block_coordinate",
    "train": short(STEPS),
    "blocks__visit_steps": VISIT,
    "offload__resident_layers": "auto",
}
AGAIN = {**TURNS, "blocks__visit_batches": 2, "blocks__order": "random"}


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


# ------------------------------------------------------------------------------------------------------------
# Tiers


@pytest.mark.parametrize("name", ["causal_lm", *slow("vit", "dit", "masked_lm", "recurrent_lm", "tied")])
@pytest.mark.parametrize("way", [TURNS, AGAIN], ids=["once", "again"])
def test_every_tier_gives_the_same_digest_and_moves_what_is_planned(
    tmp_path: Path, name: str, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms: dict[str, dict[str, Any]] = {
        "device": {"offload__tier": "device"},
        "disk": {"offload__tier": "disk", "offload__borders": "disk", "offload__write_back": "beside"},
        "near": {"offload__tier": "disk", "offload__borders": "device", "offload__prefetch": False},
    }
    if name == "tied":  # over several micro-batches the two sums of its table associate otherwise
        way = {**way, "train": short(STEPS, 8)}
    digests = {}
    for arm, changes in arms.items():
        state, plan = trained(tmp_path / arm, name, **{**way, **changes})
        digests[arm] = digest(state)
        assert state.measured["disk_bytes"] <= plan.predicted.disk_bytes
        if arm != "device":
            traffic = plan.predicted.traffic
            assert traffic is not None and traffic.whole is not None
            saved = traffic.whole.disk_written_bytes - state.traffic.disk_written_bytes
            content = read_report(tmp_path / arm).content
            if name == "tied":  # without a head of its own the shared part changes in the visits of block 0
                assert saved == 4 * shared_file_bytes(plan), arm
            else:
                assert state.traffic == traffic.whole, arm
                assert content["predicted"]["traffic"] == content["traffic"]
            assert content["progress"]["steps_done"] == 3 * STEPS
    through_ram(monkeypatch)
    state, plan = trained(tmp_path / "host", name, **way, offload__tier="disk")
    digests["host"] = digest(state)
    assert name == "tied" or state.traffic == in_ram(plan)
    assert len(set(digests.values())) == 1 and None not in digests.values(), digests


def shared_file_bytes(plan: Plan) -> int:
    return file_bytes([setup_of(setting_model(plan), plan.recipe, plan.profile, plan.settings).shared])


def in_ram(plan: Plan) -> Any:
    settings = plan.settings.model_copy(update={"tier": "host"})
    setup = setup_of(setting_model(plan), plan.recipe, plan.profile, settings)
    return coordinate_traffic(setup, lambda _: BorderBytes()).whole


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("adamw8bit", "bfloat16"), pytest.param("adamw", "bfloat16", marks=pytest.mark.slow)],
)
def test_both_optimizers_and_precisions_give_the_resident_digest(
    tmp_path: Path, optimizer: str, precision: str
) -> None:
    weights = {"weights": "bfloat16"} if optimizer == "adamw8bit" else {}
    common = {
        **AGAIN,
        "optimizer__name": optimizer,
        "train": {**short(STEPS), "precision": precision, **weights},
        "optimizer__ema": 0.9,
        "model__dim": 64,
    }
    require_one_digest(tmp_path, "causal_lm", **common)


# ------------------------------------------------------------------------------------------------------------
# Plain torch


class PlainTurns:
    """The same run by torch's own parts alone."""

    def __init__(self, plan: Plan, model: Any) -> None:
        self.plan, self.recipe, self.model = plan, plan.recipe, model
        self.objective = model.make_objective(plan.recipe.noise)
        self.blocks = [
            [p for index in block for p in model.layers[index].parameters()]
            for block in model.block_slices(plan.settings.num_blocks)
        ]
        shared = {name: p for name, p in model.named_parameters() if not name.startswith("layers.")}
        batch = batches(0)
        h, cond, kept = self.objective.enter(batch)
        out = self.objective.leave(h.detach(), cond.detach(), kept, batch).sum()
        by_input, by_output = (self.used(shared, root) for root in (h.sum() + cond.sum(), out))
        self.output = [shared[name] for name in sorted(by_output - by_input)]
        self.others = [p for name, p in shared.items() if name not in by_output - by_input]
        self.optimizers = {
            id(group): self.optimizer(group) for group in (*self.blocks, self.output, self.others) if group
        }

    def used(self, shared: dict[str, nn.Parameter], root: torch.Tensor) -> set[str]:
        root.backward()  # type: ignore[no-untyped-call]
        found = {name for name, p in shared.items() if p.grad is not None}
        self.model.zero_grad()
        return found

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        config = self.recipe.optimizer
        kinds = [
            {"params": [p for p in parameters if (p.ndim >= 2) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        betas = config.betas[0], config.betas[1]
        return torch.optim.AdamW(kinds, betas=betas, eps=config.eps, fused=True)

    def step(self, block: int, step: int, draw: int) -> None:
        groups = [self.blocks[block], self.output, *([self.others] if block == 0 else [])]
        size, seed = self.plan.settings.micro_batch_size, self.recipe.train.seed
        self.model.zero_grad()
        for part in range(BATCH // size):
            micro = {name: v[part * size : (part + 1) * size] for name, v in batches(draw).items()}
            torch.manual_seed(mix_seed(seed, "step", block, draw, part))
            losses = self.objective.end_to_end_loss(self.model.layers, micro)
            (losses.mean() / (BATCH // size)).backward()
        for group in groups:
            if not group:
                continue
            for parameter in group:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if self.recipe.optimizer.grad_clip is not None:
                nn.utils.clip_grad_norm_(group, self.recipe.optimizer.grad_clip)
            optimizer = self.optimizers[id(group)]
            for kind in optimizer.param_groups:
                kind["lr"] = learning_rate(step, self.recipe.train)
            optimizer.step()

    def run(self) -> None:
        done = 0
        for visit, _ in self.plan.queue().pending(0):
            for place in range(visit.num_steps):
                again = self.recipe.blocks.visit_batches
                self.step(
                    visit.blocks[0], visit.first_step + place, done + (place % again if again else place)
                )
            done += visit.num_steps


def plain(name: str, plan: Plan, folder: Path, **changes: Any) -> nn.Module:
    _, build = setting(name, **changes)
    _, state = first_weights(folder, build, plan)
    start, model = tensors_of(folder, state), build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(start[key])
    model.train()
    PlainTurns(plan, model).run()
    return model


def largest_difference(folder: Path, state: RunState, model: nn.Module) -> dict[str, float]:
    found = tensors_of(folder, state)
    pairs = {name: (found[name], p.detach()) for name, p in model.named_parameters()}
    assert len(pairs) > 40
    return {n: float((a - b).abs().max()) for n, (a, b) in pairs.items() if not torch.equal(a, b)}


FREE: dict[str, Any] = {"optimizer__grad_clip": None, "offload__tier": "disk"}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("causal_lm", AGAIN),
        *(
            pytest.param(name, way, marks=pytest.mark.slow)
            for name in ("causal_lm", "vit", "dit", "masked_lm", "recurrent_lm", "tied")
            for way in (TURNS, AGAIN)
            if (name, way) != ("causal_lm", AGAIN)
        ),
    ],
)
def test_it_leaves_the_weights_of_a_plain_loop_to_the_bit(
    tmp_path: Path, name: str, way: dict[str, Any]
) -> None:
    """With dropout; a tied table in one micro-batch (see above)."""
    micro = {"train": short(STEPS, 8)} if name == "tied" else {}
    changes = {**way, **FREE, **micro}
    state, plan = trained(tmp_path / "ours", name, **changes)
    assert plan.settings.tier == "disk"
    model = plain(name, plan, tmp_path / "first", **changes)
    assert not largest_difference(tmp_path / "ours", state, model)


def test_a_clipped_run_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Each block by its own norm, the head by its own, the rest of the shared part by its own."""
    changes = {**TURNS, **FREE, "optimizer__grad_clip": 0.05}
    state, plan = trained(tmp_path / "ours", "tied", **changes)
    model = plain("tied", plan, tmp_path / "first", **changes)
    assert max(largest_difference(tmp_path / "ours", state, model).values(), default=0.0) < 1e-5
    unclipped = plan.model_copy(
        update={
            "recipe": plan.recipe.model_copy(
                update={"optimizer": plan.recipe.optimizer.model_copy(update={"grad_clip": None})}
            )
        }
    )
    free = plain("tied", unclipped, tmp_path / "free", **changes)
    assert max(largest_difference(tmp_path / "ours", state, free).values()) > 1e-3


def test_a_visit_changes_its_block_and_the_head_and_nothing_else(tmp_path: Path) -> None:
    """The visit of block 1, and what the one before it left."""
    commits = list[dict[str, Any]]()

    def keep(record: dict[str, Any]) -> None:
        if record["event"] == "commit":
            state = RunDir(tmp_path / "run").read_state()
            assert state is not None
            commits.append(tensors_of(tmp_path / "run", state))

    changes = {**TURNS, "offload__tier": "disk", "offload__write_back": "wait"}
    trained(tmp_path / "run", "causal_lm", [keep], **changes)
    before, after = commits[0], commits[1]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    weights = {name for name in changed if "optimizer" not in name}
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    assert layers == {"2", "3"}, "five layers in three blocks: 0 and 1, 2 and 3, 4"
    assert any(name.startswith("head") for name in weights)
    assert not any(name.startswith("words") for name in weights)


# ------------------------------------------------------------------------------------------------------------
# The way there


class Stopped(Exception):
    pass


@pytest.mark.parametrize("visit", [1, 4])
def test_a_run_that_stops_between_two_visits_goes_on_to_the_digest(tmp_path: Path, visit: int) -> None:
    changes = {**AGAIN, "offload__tier": "disk"}
    expected = digest(trained(tmp_path / "unbroken", "causal_lm", **changes)[0])

    def stop(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["visit"] == visit:
            raise Stopped

    with pytest.raises(Stopped):
        trained(tmp_path / "run", "causal_lm", [stop], **changes)
    assert digest(trained(tmp_path / "run", "causal_lm", **changes)[0]) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "end_to_end"}, "blocks.visit_batches: found 2; allowed with method end_to_end: null"),
        ({"blocks__num_blocks": 1}, "blocks.num_blocks 1, which is end_to_end; allowed: 2 or more"),
        ({"optimizer__clip": "global"}, "allowed with method block_coordinate: block"),
        ({"blocks__order": "together"}, "allowed with method block_coordinate: round_robin, random"),
        ({"blocks__sweep_steps": 2}, "allowed with method block_coordinate: 1"),
        ({"blocks__grow_at": 0.5}, "allowed with method block_coordinate: null"),
        ({"offload__resident_layers": 1}, "offload.resident_layers: found 1"),
        ({"offload__resident_weights": 1}, "offload.resident_weights: found 1"),
        (
            {"optimizer__during_backward": True, "optimizer__grad_clip": None},
            "optimizer.during_backward true; allowed: auto, false",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    common = {"method": "block_coordinate", "blocks__visit_batches": 2, "train__num_steps": 160}
    with pytest.raises(ConfigError) as caught:
        recipe_with(**{**common, **changes})
    assert expected in str(caught.value) and "\n" not in str(caught.value)
