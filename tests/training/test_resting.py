"""A shared part whose state rests with the blocks: the bits of one on the device, and the planned traffic."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from exact_runs import setting_model, short, through_ram, trained, uncounted_activations  # noqa: F401

from lowmem.blocks import unit as unit_module
from lowmem.blocks.arena import GROUP_SIZE
from lowmem.blocks.borders import BorderBytes
from lowmem.blocks.optim import ODDS_NUMEL
from lowmem.blocks.run_dir import SHARED_KEY, FileRecord, RunDir
from lowmem.blocks.store import DiskStore
from lowmem.blocks.verify import check_contents
from lowmem.planning import plan as plan_module
from lowmem.planning.settings import setup_of
from lowmem.planning.traffic import streamed_traffic
from lowmem.reporting.report import digest

BF16 = {"train__weights": "bfloat16", "train__precision": "bfloat16", "optimizer__name": "adamw8bit"}
RESTING = {"offload__shared": "tier", "offload__tier": "disk"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the shared part comes in several, and their edges lie within pages and draws."""
    monkeypatch.setitem(unit_module.CHUNK_NUMEL, "cpu", 3 * GROUP_SIZE)
    monkeypatch.setattr(plan_module, "CHUNK_TIMES", ())  # larger ones would be whole pages
    monkeypatch.setitem(ODDS_NUMEL, "cpu", 1024)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("causal_lm", {}),
    "bf16, 8-bit": ("causal_lm", BF16 | {"model__dim": 64}),
    "masters and average": ("causal_lm", {"train__precision": "bfloat16", "optimizer__ema": 0.9}),
    "tied, global clip": ("tied", {"optimizer__clip": "global"}),
    "all layers stay": ("vit", {"offload__resident_layers": 5, "optimizer__name": "adamw8bit"}),
    "recurrent": ("recurrent_lm", {"optimizer__grad_clip": None}),
}
QUICK = {("fp32", "host"), ("tied, global clip", "disk"), ("all layers stay", "disk"), ("recurrent", "host")}


@pytest.mark.parametrize(
    ("case", "tier"),
    [
        pytest.param(case, tier, marks=[] if (case, tier) in QUICK else [pytest.mark.slow])
        for case in CASES
        for tier in ("disk", "host")
    ],
)
def test_it_ends_with_the_digest_and_moves_the_bytes_of_the_plan(
    tmp_path: Path, case: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = CASES[case]
    changes = {"train": short(4), **changes}
    near, _ = trained(tmp_path / "near", name, **{**changes, "offload__tier": "disk"})
    if tier == "host":
        through_ram(monkeypatch)
    state, plan = trained(tmp_path / "run", name, **{**changes, **RESTING})
    assert digest(state) == digest(near) and state.files["shared"].digest == near.files["shared"].digest
    check_contents(RunDir(tmp_path / "run"), state)
    settings = plan.settings.model_copy(update={"tier": tier})
    setup = setup_of(setting_model(plan), plan.recipe, plan.profile, settings)
    assert setup.resting is not None
    expected = streamed_traffic(setup, BorderBytes()).moved(steps=4, commits=2)
    moved, copied = state.traffic, state.traffic.host_to_device_bytes + state.traffic.device_to_host_bytes
    assert moved == expected and not copied
    assert state.measured["disk_bytes"] == plan.predicted.disk_bytes


def test_a_step_waits_until_the_shared_parts_file_of_the_visit_before_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that stay write nothing in most steps, so nothing else would hold the update up."""
    changes = {"train": short(4), "blocks__visit_steps": 2, "offload__resident_layers": 5}
    near, _ = trained(tmp_path / "near", "vit", **changes, offload__tier="disk")
    end = DiskStore.end

    def ends_late(store: DiskStore, key: str, visits_done: int) -> FileRecord:
        time.sleep(0.4 if key == SHARED_KEY else 0)
        return end(store, key, visits_done)

    monkeypatch.setattr(DiskStore, "end", ends_late)
    state, _ = trained(tmp_path / "run", "vit", **changes, **RESTING)
    assert digest(state) == digest(near)
