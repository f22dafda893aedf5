"""What trains on a CUDA card, on a simulated one: the order of accesses, the bits, and waits of the host.

The card is simulated in a process of its own, because its guard must be loaded before torch
(`tests/simulated`). Without a C++ compiler there is no guard.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem.blocks.staging import PIECES_BEGUN

SIMULATED = Path(__file__).parents[1] / "simulated"
ROOT = Path(__file__).parents[2]
LIMIT_S = 1800


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("guard")
    command = [sys.executable, str(SIMULATED / "build_guard.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    if not done.stdout.strip():
        pytest.skip("no C++ compiler here")
    return done.stdout.strip()


def run(guard: str, *command: str, limit_s: int = LIMIT_S) -> str:
    """What a child process prints, which has the simulated card."""
    path = os.pathsep.join([str(ROOT), str(SIMULATED), *sys.path])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "SIMULATED_GUARD": guard, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
        cwd=ROOT,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def child(guard: str, script: str, *arguments: str) -> Any:
    """The line of JSON that a child process prints last."""
    return json.loads(run(guard, str(SIMULATED / script), *arguments).splitlines()[-1])


def orders(guard: str, as_it_is: int, with_a_fault: int) -> None:
    found = child(guard, "order_child.py", str(as_it_is), str(with_a_fault))
    assert found["clean"] == dict.fromkeys(found["clean"], []) and len(found["clean"]) == 15
    assert found["faults"] == dict.fromkeys(found["faults"], with_a_fault) and len(found["faults"]) == 12
    assert found["pieces_before_a_border"] == [PIECES_BEGUN, PIECES_BEGUN], "no more than are begun at once"


def test_accesses_are_ordered_and_every_planted_fault_is_found(guard: str) -> None:
    orders(guard, 2, 1)


@pytest.mark.slow
def test_accesses_are_ordered_in_100_seeds_and_every_planted_fault_is_found_in_20(guard: str) -> None:
    orders(guard, 100, 20)


INDEPENDENT = [
    {"offload__tier": "device"},
    {"offload__tier": "host", "offload__write_back": "beside"},
    {"offload__tier": "disk"},
    {"offload__tier": "disk", "offload__prefetch": False},
]
EXACT = [
    {"offload__tier": "device"},
    {"offload__tier": "host", "offload__borders": "host", "offload__resident_layers": 0},
    {"offload__tier": "disk", "offload__borders": "disk", "offload__resident_layers": 0},
    {"offload__tier": "host", "offload__borders": "device", "offload__resident_layers": 2},
]
ON_CPU: dict[str, Any] = {"on_cpu": True, "offload__tier": "disk"}
BLOCKS = {"method": "diffusion_blocks"}
SWEPT = {
    "method": "end_to_end",
    "blocks__sweep_steps": 2,
    "blocks__visit_steps": 4,
    "train__num_steps": 8,
}
CASES = {
    "blocks, bf16, 8-bit": (
        "vit",
        INDEPENDENT,
        {**BLOCKS, "train__precision": "bfloat16", "optimizer__name": "adamw8bit"},
    ),
    "exact, fp32": ("causal_lm", EXACT, {"method": "end_to_end", "train__precision": "float32"}),
}
RECURRENT = ("recurrent_lm", "diffusion_blocks")  # its core is one denoiser, so it has one block
MORE_CASES = {
    "sweeps, fp32": ("causal_lm", [EXACT[0], EXACT[2], ON_CPU], {**SWEPT, "train__precision": "float32"}),
    "exact, bf16 weights, 8-bit": (
        "causal_lm",
        EXACT,
        {
            "method": "end_to_end",
            "train__precision": "bfloat16",
            "train__weights": "bfloat16",
            "optimizer__name": "adamw8bit",
        },
    ),
    "blocks, fp32": ("vit", [*INDEPENDENT, ON_CPU], {**BLOCKS, "train__precision": "float32"}),
    "sweeps of three, bf16 weights, 8-bit": (
        "vit",
        [EXACT[0], EXACT[1], {**EXACT[2], "offload__prefetch": False}, {**EXACT[3], "offload__tier": "disk"}],
        {
            **SWEPT,
            "blocks__sweep_steps": 3,
            "blocks__visit_steps": 6,
            "train__num_steps": 12,
            "train__precision": "bfloat16",
            "train__weights": "bfloat16",
            "optimizer__name": "adamw8bit",
        },
    ),
    "growth": ("causal_lm", EXACT, {"method": "end_to_end", "blocks__grow_at": 0.5, "train__num_steps": 12}),
    "growth, then sweeps": (
        "causal_lm",
        EXACT,
        {"method": "end_to_end", "blocks__grow_at": 0.5, "blocks__sweep_steps": 3, "train__num_steps": 12},
    ),
    "exact, muon": ("causal_lm", EXACT, {"method": "end_to_end", "optimizer__name": "muon"}),
    "blocks, muon": ("dit", INDEPENDENT, {**BLOCKS, "optimizer__name": "muon"}),
    "rounds": (
        "vit",
        INDEPENDENT,
        {**BLOCKS, "blocks__order": "together", "optimizer__name": "adamw", "optimizer__grad_clip": None},
    ),
    "exact, global clip, recompute, two micro-batches": (
        "vit",
        EXACT,
        {
            "method": "end_to_end",
            "optimizer__clip": "global",
            "train__recompute": True,
            "train__micro_batch_size": 4,
        },
    ),
    **{
        f"{name}, {method}": (
            name,
            EXACT if method == "end_to_end" else INDEPENDENT,
            {"method": method, "blocks__num_blocks": 1 if (name, method) == RECURRENT else 3},
        )
        for name in ("dit", "masked_lm", "causal_lm", "recurrent_lm", "tied")
        for method in ("diffusion_blocks", "end_to_end")
        if (name, method) != ("tied", "diffusion_blocks")
    },
}


def one_digest(guard: str, model: str, arms: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    """Every arm, in memory, in RAM and on disk, ends with the same bits. Nothing is left unordered, no
    operation differs from run to run, and within a visit compute waits for nothing.

    A CPU runs other kernels, so an arm there ends with the same loss up to rounding.
    """
    every = child(guard, "trainer_child.py", model, json.dumps(arms), json.dumps(common))
    found = [arm for arm, given in zip(every, arms, strict=True) if "on_cpu" not in given]
    assert [arm["loss"] for arm in every] == pytest.approx([every[0]["loss"]] * len(every), rel=1e-5)
    arms = [given for given in arms if "on_cpu" not in given]
    tiers = [arm["settings"]["tier"] for arm in found]
    assert tiers == [arm["offload__tier"] for arm in arms], "each arm is what it is called"
    assert len({arm["digest"] for arm in found}) == 1
    for arm in found:
        assert arm["races"] == [] and arm["odd"] == []
        assert arm["waits"] == {}
    return found


def test_an_apple_gpus_limits_hold_digits_vit(guard: str, tmp_path: Path) -> None:
    """No float64, no 8-bit kernel, no page-locked memory, one memory with the host."""
    found = child(guard, "other_device_child.py", "mps", str(tmp_path / "run"), "disk")
    assert found["settings"]["tier"] == "disk" and found["settings"]["optimizer"] == "adamw"
    assert found["locks"] == 0 and found["digest"]


@pytest.mark.slow
def test_sums_in_fp16_are_switched_on_for_the_run_alone_and_named_in_its_report(guard: str) -> None:
    common = {"method": "end_to_end", "train__precision": "float16", "optimizer__loss_scale": 1024.0}
    arms = [{**EXACT[0], "train__fp16_accumulation": True}, EXACT[0], EXACT[2]]
    found = one_digest(guard, "vit", arms, common)  # a CPU's kernels sum as they do
    within = [arm["sums_in_fp16"] for arm in found]
    assert within[0] == {"within": [True], "afterwards": False}
    assert within[1:] == [{"within": [False], "afterwards": False}] * 2
    named = ["float16 with loss scale 1024 and fp16 accumulation," in arm["summary"] for arm in found]
    assert named == [True, False, False] and "float16 with loss scale 1024," in found[1]["summary"]


@pytest.mark.slow
def test_an_intel_gpus_calls_train_in_order_to_one_digest_at_every_tier(guard: str, tmp_path: Path) -> None:
    """By `torch.accelerator` and `torch.xpu` alone: none of CUDA's streams, events or locks is left."""
    tiers = ("device", "disk")
    found = [
        child(guard, "other_device_child.py", "xpu", str(tmp_path / f"run-{tier}"), tier) for tier in tiers
    ]
    assert [arm["settings"]["tier"] for arm in found] == list(tiers)
    assert found[0]["digest"] == found[1]["digest"] is not None
    assert [arm["races"] for arm in found] == [[], []] and found[1]["locks"] > 0


@pytest.mark.parametrize("case", CASES)
def test_every_tier_gives_one_digest_in_order_and_without_waits(guard: str, case: str) -> None:
    one_digest(guard, *CASES[case])


# What needs a driver, real kernels, or a card's size.
ONLY_ON_A_CARD = (
    "nvml or card or resident_digest or flat or planned_one or trace or bench or seven or paced or fp16"
)


@pytest.mark.slow
def test_the_tests_for_a_card_pass_on_the_simulated_one(guard: str) -> None:
    options = ["-p", "card_plugin", "-m", "gpu", "-k", f"not ({ONLY_ON_A_CARD})", "tests/gpu"]
    run(guard, "-m", "pytest", "-p", "no:cacheprovider", *options, limit_s=3600)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES)
def test_every_tier_of_every_model_gives_one_digest_in_order_and_without_waits(guard: str, case: str) -> None:
    one_digest(guard, *MORE_CASES[case])
