"""The advice about waiting: given where something is to be gained, and not elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.blocks.run_dir import RunDir
from lowmem.reporting.moving import moving_figures


@pytest.mark.parametrize(("waited_s", "advised"), [(0.0, False), (0.4, False), (3.0, True)])
def test_no_advice_where_nothing_is_to_be_gained(trained: Path, waited_s: float, advised: bool) -> None:
    run = RunDir(trained)
    state = run.read_state()
    assert state is not None
    time = {"compute_s": 10.0, "exposed_transfer_s": waited_s, "commit_s": 0.0}
    changed = state.model_copy(update={"time": time})
    found = moving_figures(run.read_plan(), changed)["advice"]
    assert (found is not None) == advised
    plan = run.read_plan()
    plan["recipe"]["blocks"]["visit_steps"] = plan["recipe"]["train"]["num_steps"]
    plan["settings"].update(tier="device", write_back="beside")
    assert moving_figures(plan, changed)["advice"] is None, "no longer visit, nothing to keep in RAM"
