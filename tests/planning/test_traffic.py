"""A streamed run moves the bytes that its plan names."""

from __future__ import annotations

from pathlib import Path

import pytest
from exact_runs import STEPS, setting_model, short, through_ram, trained, uncounted_activations  # noqa: F401

from lowmem.blocks.borders import BorderBytes
from lowmem.reporting.report import digest, read_report


@pytest.mark.parametrize("clip", ["block", "global"])
@pytest.mark.parametrize("micro_batch_size", [8, 4, 1])
def test_the_bytes_moved_are_those_of_the_plan_with_borders_on_disk(
    tmp_path: Path, clip: str, micro_batch_size: int
) -> None:
    changes = {
        "offload__tier": "disk",
        "offload__borders": "disk",
        "optimizer__clip": clip,
        "train": short(3, micro_batch_size),
    }
    state, plan = trained(tmp_path / "run", "masked_lm", **changes)
    traffic = plan.predicted.traffic
    assert traffic is not None
    assert (traffic.step.disk_read_bytes > 0) and list((tmp_path / "run").glob("*.tmp")) == []
    for name, counted in state.traffic.items():
        assert counted == getattr(traffic.start, name) + 3 * getattr(traffic.step, name) + getattr(
            traffic.commit, name
        ), name
    resident = trained(tmp_path / "resident", "masked_lm", **{**changes, "offload__tier": "device"})[0]
    assert digest(state) == digest(resident)


@pytest.mark.parametrize("clip", ["block", "global"])
@pytest.mark.parametrize("tier", ["disk", "host"])
def test_the_bytes_moved_are_those_of_the_plan(
    tmp_path: Path, tier: str, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tier == "host":
        through_ram(monkeypatch)
    state, plan = trained(tmp_path / "run", "causal_lm", offload__tier="disk", optimizer__clip=clip)
    content = read_report(tmp_path / "run").content
    assert tier == "host" or content["predicted"]["traffic"] == content["traffic"]
    assert plan.predicted.traffic is not None
    traffic = plan.predicted.traffic
    if tier == "host":
        from lowmem.planning.settings import layouts_of
        from lowmem.planning.traffic import streamed_traffic

        traffic = streamed_traffic(
            *layouts_of(setting_model(plan), plan.settings),
            plan.profile,
            "host",
            clip == "global",
            False,
            BorderBytes(),
        )
    visits = -(-STEPS // 3)
    for name, counted in state.traffic.items():
        assert counted == getattr(traffic.start, name) + STEPS * getattr(
            traffic.step, name
        ) + visits * getattr(traffic.commit, name), name
    assert state.measured["disk_bytes"] == plan.predicted.disk_bytes
