"""Small models of every architecture trained end to end, one block on the device at a time: what the tests of
it share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_with
from torch import Tensor, nn

from lowmem.blocks.run_dir import RunDir, RunState
from lowmem.blocks.store import DiskStore, HostStore
from lowmem.blocks.stream import BlockStream
from lowmem.machine.device import CPU
from lowmem.machine.profile import load_profile
from lowmem.models.base import BlockModel, BuildModel
from lowmem.models.causal_lm import CausalLm
from lowmem.models.dit import Dit
from lowmem.models.layers import Layer, Table, TimeEmbedding
from lowmem.models.masked_lm import MaskedLm
from lowmem.models.recurrent_lm import RecurrentLm
from lowmem.models.vit import Vit
from lowmem.objectives.base import Batch
from lowmem.objectives.tokens import TokenDenoising
from lowmem.planning.duration import Work
from lowmem.planning.passes import Pass, PassCounter
from lowmem.planning.plan import Plan, make_plan
from lowmem.recipe import NoiseConfig, Recipe
from lowmem.reporting.report import digest
from lowmem.training import attempt as attempt_module
from lowmem.training.open_run import layouts_by_key
from lowmem.training.trainer import Trainer

VOCAB, LENGTH, CLASSES, SIDE = (
    32,
    12,
    16,
    8,
)  # widths that fill vector registers: in a rest of one torch rounds otherwise
SIZES: dict[str, Any] = {"num_layers": 5, "dim": 32, "num_heads": 2, "mlp_ratio": 3, "dropout": 0.1}
RECURRENT = {
    **SIZES,
    "prelude_layers": 2,
    "coda_layers": 1,
    "iterations": 4,
    "backprop_iterations": 3,
    "head_chunk": 17,
}
MODELS: dict[str, tuple[dict[str, Any], Callable[[Any], BlockModel]]] = {
    "vit": ({**SIZES, "patch_size": 4}, lambda c: Vit(c, (1, SIDE, SIDE), CLASSES)),
    "dit": ({**SIZES, "patch_size": 4}, lambda c: Dit(c, (1, SIDE, SIDE), CLASSES)),
    "masked_lm": ({**SIZES, "head_chunk": 17}, lambda c: MaskedLm(c, VOCAB, LENGTH)),
    "causal_lm": (
        {**SIZES, "noisy_input": "none", "head_chunk": 17},
        lambda c: CausalLm(c, VOCAB, LENGTH, whole=True),
    ),
    "recurrent_lm": (RECURRENT, lambda c: RecurrentLm(c, VOCAB, LENGTH)),
}
BATCH, STEPS = 8, 10


class Tied(BlockModel):
    """One table of words: the way in and, transposed, the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = VOCAB
        self.words = Table(VOCAB, 32, std=0.3)
        self.time = TimeEmbedding(32)
        self.layers = nn.ModuleList(Layer(32, 2, 3, 0.1, "causal", llama=True) for _ in range(5))

    def make_objective(self, noise: NoiseConfig) -> TokenDenoising:
        return TokenDenoising(self, noise, "none", "plain", head_chunk=17)

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.words.weight.T

    def example_batch(self, batch_size: int) -> Batch:
        return {"tokens": torch.zeros(batch_size, LENGTH, dtype=torch.long)}

    def target_table(self) -> Tensor:
        return self.words.normalized()

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        h = nn.functional.embedding(batch["tokens"].roll(1, 1), self.words.weight)
        return h, self.time(torch.zeros(len(h), device=h.device))

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        return h + cond


def short(num_steps: int, micro_batch_size: int = 4) -> dict[str, Any]:
    warmup_steps = min(3, num_steps - 1)
    sizes = {"batch_size": BATCH, "micro_batch_size": micro_batch_size, "seq_len": LENGTH}
    return {"num_steps": num_steps, "lr": 1e-2, "warmup_steps": warmup_steps, **sizes}


def setting(name: str, **overrides: Any) -> tuple[Recipe, BuildModel]:
    """A recipe of ten steps in visits of three, and its model."""
    model = {"name": "custom"} if name == "tied" else {"name": name, **MODELS[name][0]}
    changes: dict[str, Any] = {
        "method": "end_to_end",
        "data": {"name": "custom"},
        "model": model,
        "train": short(STEPS),
    }
    # Everything would fit on the device, and would stay there.
    changes |= {"blocks__num_blocks": 3, "blocks__visit_steps": 3, "offload__resident_layers": 0}
    recipe = recipe_with(**{**changes, **overrides})
    return recipe, Tied if name == "tied" else lambda: MODELS[name][1](recipe.model)


def batches(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "tokens": torch.randint(VOCAB, (BATCH, LENGTH), generator=generator),
        "image": torch.rand(BATCH, 1, SIDE, SIDE, generator=generator) * 2 - 1,
        "label": torch.randint(CLASSES, (BATCH,), generator=generator),
    }


def trained(folder: Path, name: str, listeners: Any = (), **overrides: Any) -> tuple[RunState, Plan]:
    recipe, build = setting(name, **overrides)
    plan = make_plan(build, recipe, load_profile("cpu-4gib"))
    return Trainer(build, plan, folder, listeners).fit(batches), plan


def through_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that rest in RAM apart from the device's memory, as beside a CUDA device."""

    def opened(
        run: RunDir, plan: Plan, model: BlockModel, files: Any, resident: bool, checked: bool
    ) -> BlockStream:
        from lowmem.planning.settings import layouts_of

        layouts, shared = layouts_of(model, plan.settings)
        store = HostStore(DiskStore(run, layouts_by_key(layouts, shared), files, checked=checked))
        return BlockStream(store, layouts, shared, CPU, resident, plan.recipe.offload.prefetch)

    monkeypatch.setattr(attempt_module, "open_stream", opened)


@pytest.fixture(autouse=True)
def uncounted_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """To count them takes longer than the runs do, and every run here fits."""
    for name in ("_count", "_count_streamed"):
        monkeypatch.setattr(PassCounter, name, lambda *_: Pass(1, Work(), Work()))


def setting_model(plan: Plan) -> BlockModel:
    name = plan.recipe.model.name
    return Tied() if name == "custom" else MODELS[name][1](plan.recipe.model)


def require_one_digest(folder: Path, name: str, **changes: Any) -> None:
    """A run on the device and one from the disk end with the same bits."""
    digests = {
        digest(trained(folder / tier, name, **changes, offload__tier=tier)[0]) for tier in ("device", "disk")
    }
    assert len(digests) == 1 and None not in digests
