"""Every objective, method, precision and optimizer on a simulated CUDA card: within a step no wait of the
host, no tensors of two devices in one operation, and no operation that gives other bits in another run.

Each is looked for in the operations themselves, and found where it is planted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_folders import make_folder
from test_simulated_card import child, guard  # noqa: F401

METHODS = {
    **dict.fromkeys(
        ("vit", "dit", "masked_lm", "causal_lm", "recurrent_lm"), ("diffusion_blocks", "end_to_end")
    ),
    "tied": ("end_to_end",),
    "wrapped": ("end_to_end",),  # a user's own layers and loss
    "decoder": ("diffusion_blocks", "end_to_end"),  # of the Hugging Face library
    "adapter": ("end_to_end",),  # beside its frozen weights
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"train__weights": "bfloat16"},
    "float16": {"optimizer__loss_scale": 1024.0},
}
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
SHORT = [("vit", "diffusion_blocks"), ("wrapped", "end_to_end"), ("decoder", "diffusion_blocks")]


def case(model: str, method: str, precision: str, optimizer: str) -> tuple[str, dict[str, Any]]:
    changes = {"method": method, "train__precision": precision, "optimizer__name": optimizer}
    blocks = {"blocks__num_blocks": 1 if (model, method) == ("recurrent_lm", "diffusion_blocks") else 3}
    return model, {**changes, **blocks, **PRECISIONS[precision]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("decoder"), "llama")


def linted(guard: str, cases: list[tuple[str, dict[str, Any]]], folder: Path) -> Any:  # noqa: F811
    return child(guard, "lint_child.py", json.dumps(cases), str(folder))


@pytest.mark.slow
def test_nothing_waits_mixes_devices_or_varies_and_each_is_found_where_it_is_planted(
    guard: str,  # noqa: F811
    folder: Path,
) -> None:
    """The adapter's shared part is larger than its blocks, and passes the ring all the same."""
    cases = [case(model, method, "bfloat16", "adamw8bit") for model, method in SHORT]
    cases.append(("adapter", {"method": "end_to_end", "train__precision": "bfloat16"}))
    found = linted(guard, cases, folder)
    assert found["found"] == [{}] * len(cases)
    assert {fault: list(seen) for fault, seen in found["controls"].items()} == {
        "wait": ["wait"],
        "mixed": ["mixed"],
        "random": ["random"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", METHODS)
def test_no_objective_method_precision_or_optimizer_waits_mixes_devices_or_varies(
    guard: str,  # noqa: F811
    folder: Path,
    model: str,
) -> None:
    precisions = [name for name in PRECISIONS if (model, name) != ("adapter", "float16")]  # refused
    cases = [
        case(model, method, precision, optimizer)
        for method in METHODS[model]
        for precision in precisions
        for optimizer in OPTIMIZERS
    ]
    found = linted(guard, cases, folder)["found"]
    wrong = [(changes, seen) for (_, changes), seen in zip(cases, found, strict=True) if seen]
    assert wrong == [] and len(found) == len(cases)
