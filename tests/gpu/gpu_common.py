"""What the tests on a CUDA device share: figures for the suite's table, runs, and a language model on random
tokens.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lowmem.data.datasets import describe_data, load_data  # noqa: E402
from lowmem.machine.profile import Profile  # noqa: E402
from lowmem.models import model_builder  # noqa: E402
from lowmem.models.causal_lm import CausalLm  # noqa: E402
from lowmem.planning.duration import Work  # noqa: E402
from lowmem.planning.passes import Pass, PassCounter  # noqa: E402
from lowmem.planning.plan import make_plan  # noqa: E402
from lowmem.recipe import Recipe, recipe_from_dict  # noqa: E402
from lowmem.reporting.report import read_report  # noqa: E402
from lowmem.training.trainer import Trainer  # noqa: E402

Listener = Callable[[dict[str, Any]], None]
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHORT = {
    "train__num_steps": 12,
    "blocks__visit_steps": 4,
    "train__warmup_steps": 2,
    "train__deterministic": True,
}
VOCAB, SEQ_LEN = 256, 512


@pytest.fixture
def uncounted_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only bits count, the plan need not: to count a pass takes longer than these runs do."""
    for name in ("_count", "_count_streamed", "_count_evaluated"):
        monkeypatch.setattr(PassCounter, name, lambda *_: Pass(1, Work(), Work()))


def record(name: str, **figures: Any) -> None:
    """One line of JSON for the suite's table."""
    target = os.environ.get("LOWMEM_GPU_FIGURES")
    if target:
        with open(target, "a", encoding="utf-8") as file:
            file.write(json.dumps({"check": name, **figures}) + "\n")


def train(folder: Path, recipe: Recipe, profile: Profile) -> dict[str, Any]:
    build = model_builder(recipe, describe_data(recipe.data, recipe.train.seq_len))
    plan = make_plan(build, recipe, profile, folder)
    data = load_data(recipe.data, recipe.train.seq_len)
    Trainer(build, plan, folder).fit(lambda step: data.batch(0, step, recipe.train.batch_size))
    return read_report(folder).content


def train_tokens(
    folder: Path,
    profile: Profile,
    num_blocks: int,
    dim: int,
    visit_steps: int,
    rounds: int,
    offload: dict[str, Any],
    batch_size: int = 8,
    listeners: Sequence[Listener] = (),
    method: str = "diffusion_blocks",
    train: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A causal language model, a layer a block, on random tokens in pinned memory; the report of the run.

    `train`, `optimizer`: further keys of the recipe's sections.
    """
    recipe = recipe_from_dict(
        {
            "schema": 1,
            "method": method,
            "model": {
                "name": "causal_lm",
                "num_layers": num_blocks,
                "dim": dim,
                "num_heads": dim // 64,
                "noisy_input": "none",
                "readout": "bayes",
            },
            "data": {"name": "custom"},
            "blocks": {"num_blocks": num_blocks, "visit_steps": visit_steps},
            "noise": {"schedule": "balanced", "sigma_max_share": 1.0},
            "train": {
                "num_steps": rounds * visit_steps,
                "batch_size": batch_size,
                "micro_batch_size": batch_size,
                "seq_len": SEQ_LEN,
                "lr": 1e-4,
                "recompute": False,
                "deterministic": True,
                **(train or {}),
            },
            "optimizer": {"name": "adamw8bit", **(optimizer or {})},
            "offload": {"write_back": "beside", **offload},
        },
        "tokens",
    )

    def build() -> CausalLm:
        return CausalLm(recipe.model, VOCAB, SEQ_LEN, whole=method == "end_to_end")  # type: ignore[arg-type]

    def batches(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {"tokens": torch.randint(VOCAB, (batch_size, SEQ_LEN), generator=generator).pin_memory()}

    Trainer(build, make_plan(build, recipe, profile), folder, listeners).fit(batches)
    return read_report(folder).content
