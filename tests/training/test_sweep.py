"""Sweeps: several steps for each coming of a block, against plain loops of the same algorithm."""

from __future__ import annotations

from collections.abc import Iterable
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
from torch import Tensor, nn

from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import RunState
from lowmem.errors import ConfigError
from lowmem.planning.plan import Plan
from lowmem.planning.settings import setup_of
from lowmem.planning.traffic import streamed_traffic
from lowmem.recipe import Recipe
from lowmem.reporting.report import digest, read_report
from lowmem.schedule import learning_rate, mix_seed
from lowmem.training import trainer as trainer_module
from lowmem.training.sweep import Sweep

FREE: dict[str, Any] = {"optimizer__grad_clip": None, "offload__tier": "disk"}


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


# ------------------------------------------------------------------------------------------------------------
# Tiers


@pytest.mark.parametrize("name", ["causal_lm", *slow("vit", "dit", "masked_lm", "recurrent_lm", "tied")])
def test_every_tier_gives_the_same_digest_and_moves_what_is_planned(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"train": short(6), "blocks__sweep_steps": 3}
    arms: dict[str, dict[str, Any]] = {
        "device": {"offload__tier": "device"},
        "borders": {"offload__tier": "disk", "offload__borders": "disk", "offload__prefetch": False},
        "stays": {"offload__tier": "disk", "offload__resident_layers": 1, "offload__write_back": "wait"},
    }
    digests = {}
    for arm, changes in arms.items():
        state, plan = trained(tmp_path / arm, name, **{**common, **changes})
        digests[arm] = digest(state)
        traffic = plan.predicted.traffic
        if arm != "device":
            assert traffic is not None and state.traffic == traffic.moved(steps=6, commits=2), arm
            content = read_report(tmp_path / arm).content
            assert content["predicted"]["traffic"] == content["traffic"]
    through_ram(monkeypatch)
    state, plan = trained(tmp_path / "host", name, **common, offload__tier="disk")
    digests["host"] = digest(state)
    assert state.traffic == in_ram(plan).moved(steps=6, commits=2)
    assert len(set(digests.values())) == 1 and None not in digests.values(), digests


def in_ram(plan: Plan) -> Any:
    from lowmem.blocks.borders import BorderBytes

    settings = plan.settings.model_copy(update={"tier": "host"})
    setup = setup_of(setting_model(plan), plan.recipe, plan.profile, settings)
    return streamed_traffic(setup, BorderBytes())


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("adamw8bit", "bfloat16"), pytest.param("adamw", "bfloat16", marks=pytest.mark.slow)],
)
def test_both_optimizers_and_precisions_give_the_resident_digest(
    tmp_path: Path, optimizer: str, precision: str
) -> None:
    weights = {"weights": "bfloat16"} if (optimizer, precision) == ("adamw8bit", "bfloat16") else {}
    common = {
        "optimizer__name": optimizer,
        "train": {**short(4), "precision": precision, **weights},
        "optimizer__ema": 0.9,
        "model__dim": 64,
        "blocks__sweep_steps": 2,
    }
    require_one_digest(tmp_path, "causal_lm", **common)


# ------------------------------------------------------------------------------------------------------------
# Plain torch


class PlainSweep:
    """The same run by torch's own parts alone, from the same first weights."""

    def __init__(self, recipe: Recipe, plan: Plan, model: Any) -> None:
        self.recipe, self.plan, self.model = recipe, plan, model
        self.objective = model.make_objective(recipe.noise)
        self.blocks = [
            [model.layers[i] for i in block] for block in model.block_slices(plan.settings.num_blocks)
        ]
        shared = {name: p for name, p in model.named_parameters() if not name.startswith("layers.")}
        by_input, by_output = self.used(shared)
        groups = {
            "output": by_output - by_input,
            "tied": by_output & by_input,
            "input": set(shared) - by_output,
        }
        self.shared = {name: [shared[n] for n in names] for name, names in groups.items()}
        self.optimizers = {name: self.optimizer(parameters) for name, parameters in self.shared.items()}
        self.layers = [[p for layer in block for p in layer.parameters()] for block in self.blocks]
        self.of_blocks = [self.optimizer(parameters) for parameters in self.layers]

    def used(self, shared: dict[str, nn.Parameter]) -> tuple[set[str], set[str]]:
        """What the input part uses, and what the output part uses."""
        h, cond, kept = self.objective.enter(batches(0))
        out = self.objective.leave(h.detach(), cond.detach(), kept, batches(0)).sum()
        found = []
        for root in (h.sum() + cond.sum(), out):
            root.backward()
            found.append({name for name, p in shared.items() if p.grad is not None})
            for parameter in shared.values():
                parameter.grad = None
        return found[0], found[1]

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW | None:
        config = self.recipe.optimizer
        kinds = [
            {"params": [p for p in parameters if (p.ndim >= 2) == decayed], "weight_decay": decay}
            for decayed, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        betas = config.betas[0], config.betas[1]
        return torch.optim.AdamW(kinds, betas=betas, eps=config.eps, fused=True) if parameters else None

    def make_step(self, optimizer: torch.optim.AdamW | None, parameters: list[Any], step: int) -> None:
        if optimizer is None:
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.recipe.train)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.recipe.optimizer.grad_clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.grad_clip)
        optimizer.step()

    def sweep(self, steps: range) -> None:
        size, last = self.plan.settings.micro_batch_size, len(self.blocks) - 1
        parts = [(step, part) for step in steps for part in range(BATCH // size)]
        micro = {
            (step, part): {n: v[part * size : (part + 1) * size] for n, v in batches(step).items()}
            for step, part in parts
        }
        seeds = {
            (step, part): mix_seed(self.recipe.train.seed, "step", 0, step, part) for step, part in parts
        }
        inputs, states, entered, grads, cond_grads = {}, {}, {}, {}, dict[Any, Any]()
        with torch.no_grad():
            for at in parts:
                torch.manual_seed(seeds[at])
                h, cond, kept = self.objective.enter(micro[at])
                inputs[0, at], entered[at], states[0, at] = h, (cond, kept), torch.get_rng_state()
                for block in range(last):
                    h = self.objective.through(self.blocks[block], h, cond, kept)
                    inputs[block + 1, at], states[block + 1, at] = h, torch.get_rng_state()
        for block in range(last, -1, -1):
            for step in steps:
                for at in (at for at in parts if at[0] == step):
                    torch.set_rng_state(states[block, at])
                    h, cond = (t.detach().requires_grad_() for t in (inputs[block, at], entered[at][0]))
                    out, kept = (
                        self.objective.through(self.blocks[block], h, cond, entered[at][1]),
                        entered[at][1],
                    )
                    if block == last:
                        loss = self.objective.leave(out, cond, kept, micro[at]).mean()
                        (loss / (BATCH // size)).backward()
                    else:
                        before = cond_grads[at]
                        roots = [(out, grads[at]), *([(cond, before)] if before is not None else [])]
                        torch.autograd.backward([r for r, _ in roots], [g for _, g in roots])
                    grads[at], cond_grads[at] = h.grad, cond.grad
                self.make_step(self.of_blocks[block], self.layers[block], step)
                self.clear(self.layers[block])
                if block == last:
                    self.make_step(self.optimizers["output"], self.shared["output"], step)
                    self.clear(self.shared["output"])
        for step in steps:
            for at in (at for at in parts if at[0] == step):
                torch.manual_seed(seeds[at])
                roots = zip(self.objective.enter(micro[at])[:2], (grads[at], cond_grads[at]), strict=True)
                used = [(root, grad) for root, grad in roots if grad is not None and root.requires_grad]
                torch.autograd.backward([r for r, _ in used], [g for _, g in used])
            self.make_step(self.optimizers["input"], self.shared["input"], step)
            self.clear(self.shared["input"])
        for parameter in self.shared["tied"]:
            assert parameter.grad is not None
            parameter.grad *= 1 / len(steps)
        for step in steps:
            self.make_step(self.optimizers["tied"], self.shared["tied"], step)
        self.clear(self.shared["tied"])

    def clear(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            parameter.grad = None


def plain(name: str, plan: Plan, folder: Path, **changes: Any) -> nn.Module:
    recipe, build = setting(name, **changes)
    _, state = first_weights(folder, build, plan)
    start, model = tensors_of(folder, state), build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(start[key])
    model.train()
    loop, size = PlainSweep(recipe, plan, model), recipe.blocks.sweep_steps
    for first in range(0, recipe.train.num_steps, size):
        loop.sweep(range(first, first + size))
    return model


def largest_difference(folder: Path, state: RunState, model: nn.Module) -> dict[str, float]:
    found = tensors_of(folder, state)
    pairs = {name: (found[name], p.detach()) for name, p in model.named_parameters()}
    assert len(pairs) > 40
    return {n: float((a - b).abs().max()) for n, (a, b) in pairs.items() if not torch.equal(a, b)}


@pytest.mark.parametrize("name", ["causal_lm", "tied", *slow("vit", "dit", "masked_lm", "recurrent_lm")])
def test_a_sweep_leaves_the_weights_of_a_plain_loop_to_the_bit(tmp_path: Path, name: str) -> None:
    """Ten steps with dropout, in two micro-batches, in one visit of two sweeps."""
    changes = {**FREE, "blocks__sweep_steps": 5, "blocks__visit_steps": 10}
    state, plan = trained(tmp_path / "ours", name, **changes)
    assert not largest_difference(tmp_path / "ours", state, plain(name, plan, tmp_path / "first", **changes))
    exact = plain(name, plan, tmp_path / "exact", **FREE)
    assert max(largest_difference(tmp_path / "ours", state, exact).values()) > 1e-3, "sweeps are stale"


@pytest.mark.parametrize("name", ["tied", *slow("causal_lm")])
def test_a_clipped_sweep_is_that_of_a_plain_loop(tmp_path: Path, name: str) -> None:
    changes = {**FREE, "optimizer__grad_clip": 0.05, "blocks__sweep_steps": 2, "train": short(4)}
    state, plan = trained(tmp_path / "ours", name, **changes)
    clipped = plain(name, plan, tmp_path / "first", **changes)
    assert max(largest_difference(tmp_path / "ours", state, clipped).values(), default=0.0) < 1e-5
    free = plain(name, plan, tmp_path / "free", **{**changes, "optimizer__grad_clip": None})
    assert max(largest_difference(tmp_path / "ours", state, free).values()) > 1e-3


@pytest.mark.parametrize("name", ["tied", *slow("causal_lm", "dit")])
def test_a_sweep_of_one_step_is_the_exact_step_to_the_bit(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe with one step takes the exact step; the sweep itself gives the same bits."""
    changes = {**FREE, "train": short(4, 8)}
    exact = digest(trained(tmp_path / "exact", name, **changes)[0])
    assert digest(trained(tmp_path / "one", name, **changes, blocks__sweep_steps=1)[0]) == exact
    made = list[Any]()

    class Single(Sweep):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)
            self.steps_at_once = 1

        def train(self, micro: Any, step: int, visits_done: int, durable: bool) -> list[Tensor]:
            self.borders.parts = len(micro[0])
            return super().train(micro, step, visits_done, durable)

    monkeypatch.setattr(trainer_module, "Sweep", Single)
    swept = trained(tmp_path / "swept", name, **changes, blocks__sweep_steps=2, blocks__visit_steps=3)[0]
    assert made and weights_of(tmp_path / "swept", swept) == weights_of(tmp_path / "exact", None)


def weights_of(folder: Path, state: RunState | None) -> dict[str, bytes]:
    from lowmem.blocks.run_dir import RunDir

    state = state or RunDir(folder).read_state()
    assert state is not None
    return {name: value.numpy().tobytes() for name, value in tensors_of(folder, state).items()}


# ------------------------------------------------------------------------------------------------------------
# Refusals, and the order of visits


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"method": "diffusion_blocks"},
            "blocks.sweep_steps: found 4; allowed with method diffusion_blocks: 1",
        ),
        ({"optimizer__clip": "global"}, "allowed with optimizer.clip global: 1"),
        (
            {"train__num_steps": 150},
            "train.num_steps: found 150; allowed with blocks.sweep_steps 4: a multiple",
        ),
        ({"optimizer__during_backward": True, "optimizer__grad_clip": None}, "during_backward true: 1"),
        ({"blocks__sweep_steps": 0}, "blocks.sweep_steps"),
    ],
)
def test_what_a_sweep_cannot_be_is_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    common = {"method": "end_to_end", "train__num_steps": 160, "blocks__sweep_steps": 4}
    with pytest.raises(ConfigError) as caught:
        recipe_with(**{**common, **changes})
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("visit_steps", "sweep_steps", "expected"), [(50, 8, 56), (6, 3, 6), (2, 8, 8)])
def test_a_visit_holds_whole_sweeps(visit_steps: int, sweep_steps: int, expected: int) -> None:
    recipe = recipe_with(
        method="end_to_end",
        blocks__visit_steps=visit_steps,
        blocks__sweep_steps=sweep_steps,
        train__num_steps=120,
    )
    queue = BlockQueue.of(recipe.to_dict(), 3)
    steps = [visit.num_steps for visit, _ in queue.pending(0)]
    assert steps[0] == expected and all(n % sweep_steps == 0 for n in steps) and sum(steps) == 120
