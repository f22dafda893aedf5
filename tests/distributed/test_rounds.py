"""A round: plain visits from one shared part and their mean, the same to the bit on any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, first_weights, recipe_with, run_short
from torch import Tensor

from lowmem.blocks.order import BlockQueue
from lowmem.blocks.run_dir import RunDir
from lowmem.data.datasets import describe_data, load_data
from lowmem.distributed.exchange import slice_numel
from lowmem.errors import ConfigError
from lowmem.machine.profile import load_profile
from lowmem.models import model_builder
from lowmem.models.base import named_layer_parameters, named_shared_parameters
from lowmem.planning.plan import make_plan
from lowmem.reporting.report import digest
from lowmem.schedule import learning_rate, mix_seed
from lowmem.training.ranks import ALONE, Ranks
from lowmem.training.rounds import RoundMean

TOGETHER = {"blocks__order": "together", "optimizer__name": "adamw", "optimizer__grad_clip": None}


class ThreadRanks(Ranks):
    """Ranks that are threads of this process: what they exchange lies in a common dictionary."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, common: dict[Any, Any]) -> None:
        self.rank, self.size, self._meeting, self._common = rank, size, meeting, common
        self.exchanged_bytes = 0

    def _all(self, content: Any) -> list[Any]:
        self._common[self.rank] = content
        self._meeting.wait()
        found = [self._common[rank] for rank in range(self.size)]
        self._meeting.wait()
        return found

    def told(self, content: Any = None) -> Any:
        return self._all(content)[0]

    def gathered(self, content: Any) -> list[Any]:
        found = self._all(content)
        return found if self.leads else []

    def slices(self, vector: Tensor, senders: int) -> list[Tensor]:
        each = slice_numel(vector.numel(), self.size)
        own = slice(self.rank * each, (self.rank + 1) * each)
        whole = torch.cat([vector, vector.new_zeros(each * self.size - vector.numel())])
        return [other[own] for other in self._all(whole)[:senders]]

    def joined(self, part: Tensor, vector: Tensor) -> None:
        vector.copy_(torch.cat(self._all(part.clone()))[: vector.numel()])


def on_ranks(size: int, call: Callable[[Ranks], Any]) -> list[Any]:
    """What each of the ranks returns, or the exception that it raises."""
    meeting, common, found = threading.Barrier(size, timeout=60), dict[Any, Any](), dict[int, Any]()

    def run(rank: int) -> None:
        try:
            found[rank] = call(ThreadRanks(rank, size, meeting, common))
        except Exception as problem:
            found[rank] = problem
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("num_blocks", [1, 3, 7])
def test_the_mean_of_a_round_is_the_same_to_the_bit_on_any_number_of_ranks(num_blocks: int) -> None:
    generator = torch.Generator().manual_seed(num_blocks)
    scales = torch.logspace(-6, 6, num_blocks)
    made = [
        torch.randn(1021, generator=generator) * scale for scale in scales
    ]  # no number of ranks divides it
    expected = made[0].clone()
    for other in made[1:]:
        expected += other
    expected /= num_blocks

    def mean_of(ranks: Ranks) -> Tensor:
        mean, result = RoundMean(ranks, num_blocks), torch.empty(1021)
        mine = [made[block] for block in ranks.blocks_of(num_blocks)]
        for _ in range(-(-num_blocks // ranks.size)):
            mean.add(mine.pop(0) if mine else torch.full((1021,), torch.nan))
        mean.into(result)
        return result

    for size in range(1, num_blocks + 1):
        assert all(torch.equal(mean, expected) for mean in on_ranks(size, mean_of))
    assert torch.equal(mean_of(ALONE), expected)


def test_each_block_is_trained_by_one_rank() -> None:
    for size in range(1, 8):
        ranks = [ThreadRanks(rank, size, threading.Barrier(1), {}) for rank in range(size)]
        assert sorted(block for each in ranks for block in each.blocks_of(7)) == list(range(7))


def test_a_round_is_plain_visits_from_one_shared_part_and_their_mean_bit_for_bit(tmp_path: Path) -> None:
    changes = {**TOGETHER, "train__num_steps": 4, "model__dropout": 0.1}
    state = run_short(tmp_path / "ours", **changes)
    recipe = recipe_with(**{**SHORT, **changes})
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    initial, first = first_weights(tmp_path / "initial", build, plan)
    model, batches = build(), load_data(recipe.data, recipe.train.seq_len)
    weights = {name: (value,) for name, value in stored(initial, first).items() if "." in name}
    kept: dict[str, Any] = {name: (*value, None, None) for name, value in weights.items()}
    objective = model.make_objective(recipe.noise)
    shared = [name for name, _ in named_shared_parameters(model)]
    for first_step in (0, 2):
        made = []
        for block, layers in enumerate(model.block_slices(3)):
            names = [*shared, *(name for name, _ in named_layer_parameters(model, layers))]
            optimizer = plain_optimizer(model, names, kept, first_step)
            for step in range(first_step, first_step + 2):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, recipe.train)
                torch.manual_seed(mix_seed(0, "step", block, step, 0))
                batch = {name: torch.from_numpy(rows) for name, rows in batches.batch(0, step, 64).items()}
                some = [model.layers[layer] for layer in layers]
                interval = objective.interval(block, 3, recipe.blocks.overlap_gamma)
                optimizer.zero_grad(set_to_none=False)
                objective.block_loss(some, batch, interval).mean().backward()
                optimizer.step()
            moved = moments(model, names, optimizer)
            made.append({name: moved[name] for name in shared})
            kept.update({name: value for name, value in moved.items() if name not in shared})
        for name in shared:
            parts = [[each[name][kind] for each in made] for kind in range(3)]
            kept[name] = tuple((some[0] + some[1] + some[2]) / 3 for some in parts)
    ours = stored(RunDir(tmp_path / "ours"), state)
    assert all(torch.equal(ours[name], value[0]) for name, value in kept.items())


def stored(run: RunDir, state: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for record in state.files.values():
        tensors.update(load_file(run.path / record.name))
    return {name: value for name, value in tensors.items() if not name.startswith(("optimizer.", "padding."))}


def plain_optimizer(model: Any, names: list[str], kept: dict[str, Any], steps: int) -> torch.optim.AdamW:
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].data.copy_(kept[name][0])
        parameters[name].grad = torch.zeros_like(parameters[name])
    groups = [
        {"params": [parameters[name] for name in names if parameters[name].ndim >= 2], "weight_decay": 0.05},
        {"params": [parameters[name] for name in names if parameters[name].ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for name in names if steps else []:
        optimizer.state[parameters[name]] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": kept[name][1].clone(),
            "exp_avg_sq": kept[name][2].clone(),
        }
    return optimizer


def moments(model: Any, names: list[str], optimizer: torch.optim.AdamW) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    return {
        name: (
            parameters[name].detach().clone(),
            optimizer.state[parameters[name]]["exp_avg"].clone(),
            optimizer.state[parameters[name]]["exp_avg_sq"].clone(),
        )
        for name in names
    }


def test_every_tier_gives_a_round_the_same_digest(tmp_path: Path) -> None:
    changes = {**TOGETHER, "optimizer__name": "adamw8bit", "optimizer__ema": 0.9}
    digests = {
        digest(
            run_short(tmp_path / f"{tier}-{back}", offload__tier=tier, offload__write_back=back, **changes)
        )
        for tier, back in (("device", "wait"), ("disk", "beside"), ("host", "wait"))
    }
    assert len(digests) == 1


def test_a_round_that_is_interrupted_is_made_again_as_a_whole(tmp_path: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["event"] == "step" and record["visit"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_short(tmp_path / "broken", [stop], **TOGETHER)
    state = RunDir(tmp_path / "broken").read_state()
    assert state is not None and state.visits_done == 3
    assert digest(run_short(tmp_path / "broken", **TOGETHER)) == digest(
        run_short(tmp_path / "whole", **TOGETHER)
    )


def test_the_steps_of_the_shared_part_in_a_round_are_those_of_its_blocks() -> None:
    recipe = recipe_with(**{**SHORT, **TOGETHER}).to_dict()
    queue = BlockQueue.of(recipe, 3)
    assert [queue.shared_steps(visit) for visit in (*queue.round_of(0), *queue.round_of(3))] == [0] * 3 + [
        2
    ] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method": "end_to_end"},
            "blocks.order: found 'together'; allowed with method end_to_end: round_robin",
        ),
        ({"train__weights": "bfloat16"}, "train.weights bfloat16; allowed: float32"),
    ],
)
def test_what_no_round_can_be_made_of_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe_with(**{**SHORT, "blocks__order": "together", **changes})
