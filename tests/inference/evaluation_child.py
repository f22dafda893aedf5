"""Evaluates a run of first weights in a process of its own, and prints predicted and measured bytes as JSON.

python evaluation_child.py FOLDER RECIPE PROFILE OVERRIDE...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import first_weights, new_cache

from lowmem.inference.evaluate import evaluate_run
from lowmem.job import plan_recipe
from lowmem.machine.heap import give_back_freed
from lowmem.machine.monitor import Monitor
from lowmem.models import model_builder
from lowmem.planning.run_data import spec_of


def main(folder: str, recipe: str, profile: str, *overrides: str) -> None:
    give_back_freed()
    os.environ["XDG_CACHE_HOME"] = new_cache(
        Path(f"{folder}-cache")
    )  # a kept feature network would take less
    plan = plan_recipe(recipe, profile, overrides, Path(folder))
    plan.require_fit()
    first_weights(Path(folder), model_builder(plan.recipe, spec_of(plan)), plan)
    with Monitor(plan.profile.unified) as monitor:
        metrics = evaluate_run(folder)
    evaluation = plan.predicted.evaluation
    assert evaluation is not None
    print(
        json.dumps(
            {
                "budget_bytes": plan.budget.device_bytes,
                "predicted_bytes": evaluation.peak_bytes,
                "measured_bytes": monitor.run_peak.device_bytes,
                "training_bytes": plan.predicted.device_peak_bytes,
                "micro_batch_size": evaluation.micro_batch_size,
                "walk_size": evaluation.walk_size,
                "seconds": evaluation.seconds,
                "by_category": evaluation.by_category,
                "value": metrics["value"],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
