"""Trains a small model on the simulated card in several ways.

    python trainer_child.py MODEL ARMS COMMON

ARMS: a list of recipe changes in JSON; COMMON: changes for all. An arm with `"on_cpu": true` trains on the
CPU instead. Prints one line of JSON: for each arm its digest, the accesses that nothing orders, the waits of
the thread that computes, by kind, within the steps of the second visit, operations that are not
deterministic, and whether matrix products may sum in fp16 within the run and afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import simcuda  # before torch
import torch
from happens_before import RACES
from simcuda import NOT_DETERMINISTIC, WORLD, Card

sys.path.insert(0, str(Path(__file__).parents[1]))
import exact_runs  # noqa: E402

from lowmem.blocks.eight_bit import bitsandbytes_functional  # noqa: E402
from lowmem.machine.profile import load_profile  # noqa: E402
from lowmem.planning.duration import Work  # noqa: E402
from lowmem.planning.passes import Pass, PassCounter  # noqa: E402
from lowmem.planning.plan import make_plan  # noqa: E402
from lowmem.recipe import Recipe  # noqa: E402
from lowmem.reporting.report import digest, read_report  # noqa: E402
from lowmem.training.trainer import Trainer  # noqa: E402

VISIT_STEPS = 3


def setting(name: str, changes: dict[str, Any]) -> tuple[Recipe, Any]:
    """A short run's recipe and model."""
    changes = {
        "train__num_steps": 2 * VISIT_STEPS,
        "train__warmup_steps": 1,
        "blocks__visit_steps": VISIT_STEPS,
        "train__micro_batch_size": 8,
        "train__deterministic": True,
        **changes,
    }
    if name != "tied":
        smaller = {"num_layers": 3} if name != "recurrent_lm" else {"iterations": 2, "backprop_iterations": 1}
        changes["model"] = {"name": name, **exact_runs.MODELS[name][0], **smaller}
    return exact_runs.setting(name, **changes)


def trained(
    recipe: Recipe, build: Any, seed: int, on_cpu: bool = False, batches: Any = exact_runs.batches
) -> dict[str, Any]:
    """What a run shows."""
    plan = make_plan(build, recipe, load_profile("cpu-4gib" if on_cpu else "cuda-8gib-host-24gib"))
    visit_steps, at_once = recipe.blocks.visit_steps, recipe.blocks.sweep_steps
    before: Counter[tuple[str, str]] = Counter()
    waits: Counter[str] = Counter()
    switches = set[bool]()

    def count(event: dict[str, Any]) -> None:
        """From the last record of a step, or sweep, to the first one of the next. A loss is there at once, so
        records come at the end of what they are about.
        """
        nonlocal before
        switches.add(torch.backends.cuda.matmul.allow_fp16_accumulation)
        if event["event"] != "step" or event["visit"] != 1:
            return
        if event["step"] % visit_steps == at_once - 1:
            before = WORLD.waits.copy()
        if event["step"] % visit_steps == at_once:
            for (what, thread), number in (WORLD.waits - before).items():
                if thread == "MainThread":
                    waits[what] += number

    RACES.clear()
    WORLD.operations.clear()
    WORLD.late = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.nullcontext() if on_cpu else Card():
        state = Trainer(build, plan, folder, [count]).fit(batches)
        found, summary = digest(state), read_report(folder).summary()
    odd = [name for name in NOT_DETERMINISTIC if WORLD.operations[name]]
    return {
        "digest": found,
        "races": list(RACES)[:5],
        "waits": dict(waits),
        "odd": odd,
        "sums_in_fp16": {
            "within": sorted(switches),
            "afterwards": torch.backends.cuda.matmul.allow_fp16_accumulation,
        },
        "summary": summary,
        "settings": plan.settings.model_dump(mode="json"),
        "loss": state.blocks[0].loss,
    }


def prepare() -> None:
    bitsandbytes_functional()  # its import must not find a card: it would look for its CUDA library
    simcuda.install()
    torch.set_num_threads(1)
    for counted in ("_count", "_count_streamed"):
        setattr(PassCounter, counted, lambda *_: Pass(1, Work(), Work()))
    PassCounter.waiting = lambda self, settings: (4096, 4096)  # type: ignore[method-assign]


def main() -> None:
    prepare()
    name, arms, common = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    found = []
    for seed, arm in enumerate(arms):
        on_cpu = arm.pop("on_cpu", False)
        found.append(trained(*setting(name, {**common, **arm}), seed, on_cpu))
    print(json.dumps(found), flush=True)
    os._exit(0)  # the simulated card must not be torn down in any order


if __name__ == "__main__":
    main()
