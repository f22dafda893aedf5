"""A streamed run moves the bytes that its plan names."""

from __future__ import annotations

from pathlib import Path

import pytest
from exact_runs import STEPS, setting_model, short, through_ram, trained, uncounted_activations  # noqa: F401

from lowmem.blocks import unit as unit_module
from lowmem.blocks.arena import GROUP_SIZE
from lowmem.blocks.borders import BorderBytes
from lowmem.blocks.optim import has_muon
from lowmem.blocks.traffic import Traffic
from lowmem.planning import plan as plan_module
from lowmem.planning.settings import setup_of
from lowmem.planning.traffic import StreamedTraffic, streamed_traffic
from lowmem.reporting.report import digest, read_report

# Layers are updated in place, each as soon as its gradients are whole.
ALONE = {"optimizer__grad_clip": None}


def moving(number: int) -> Traffic:
    """Another number of bytes each way."""
    return Traffic(
        host_to_device_bytes=number,
        device_to_host_bytes=2 * number,
        disk_read_bytes=3 * number,
        disk_written_bytes=5 * number,
    )


def test_a_process_moves_its_start_each_step_and_each_commit_whichever_way() -> None:
    traffic = StreamedTraffic(start=moving(1), step=moving(10), commit=moving(1000), hidden_tokens=None)
    assert traffic.moved(steps=7, commits=2) == moving(1 + 7 * 10 + 2 * 1000)
    assert traffic.moved(steps=0, commits=0) == moving(1)


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
    assert state.traffic == traffic.moved(steps=3, commits=1)
    resident = trained(tmp_path / "resident", "masked_lm", **{**changes, "offload__tier": "device"})[0]
    assert digest(state) == digest(resident)


@pytest.mark.skipif(not has_muon(), reason="torch has no Muon before 2.9")
def test_the_bytes_moved_with_muon_are_those_of_the_plan_and_fewer_than_with_adamw(tmp_path: Path) -> None:
    """One moment in place of two."""
    moved = {}
    for name in ("muon", "adamw"):
        changes = {"optimizer__name": name, "offload__tier": "disk", "train": short(3), "model__dim": 64}
        state, plan = trained(tmp_path / name, "causal_lm", **changes)
        traffic = plan.predicted.traffic
        assert traffic is not None and state.traffic == traffic.moved(steps=3, commits=1)
        moved[name] = traffic.step.disk_written_bytes
    assert 0.6 < moved["muon"] / moved["adamw"] < 0.75


@pytest.mark.slow
def test_the_bytes_of_updates_in_many_chunks_are_those_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(unit_module.CHUNK_NUMEL, "cpu", 3 * GROUP_SIZE)
    monkeypatch.setattr(plan_module, "CHUNK_TIMES", ())  # larger ones would be whole pages
    for name, changes in {
        "moves": {"offload__resident_layers": 0},
        "stays": {"offload__resident_layers": 1},
        "weights stay": {"offload__resident_weights": 3, **ALONE},
        "some stay, and weights": {"offload__resident_layers": 2, "offload__resident_weights": 2, **ALONE},
        "all weights stay": {"offload__resident_weights": 5, **ALONE},
        "8-bit": {"optimizer__name": "adamw8bit", "model__dim": 64},
    }.items():
        state, plan = trained(tmp_path / name, "causal_lm", offload__tier="disk", train=short(3), **changes)
        assert plan.predicted.traffic is not None
        assert state.traffic == plan.predicted.traffic.moved(steps=3, commits=1)


@pytest.mark.parametrize(("times", "groups"), [(2, 5), (3, 3)])
def test_larger_chunks_end_with_the_digest_of_usual_ones_and_move_the_bytes_of_their_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, groups: int
) -> None:
    changes = {"train": short(3), "offload__tier": "disk", "offload__resident_layers": 0}
    usual = groups * GROUP_SIZE
    monkeypatch.setitem(unit_module.CHUNK_NUMEL, "cpu", usual)
    ends, chunks = set[str](), []
    for allowed in ((), (times,)):
        monkeypatch.setattr(plan_module, "CHUNK_TIMES", allowed)
        state, plan = trained(tmp_path / str(allowed), "causal_lm", **changes)
        assert plan.predicted.traffic is not None
        assert state.traffic == plan.predicted.traffic.moved(steps=3, commits=1)
        ends.add(digest(state))
        chunks.append(plan.settings.update_chunk)
    assert len(ends) == 1 and chunks == [None, times * usual]


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
        settings = plan.settings.model_copy(update={"tier": "host"})
        setup = setup_of(setting_model(plan), plan.recipe, plan.profile, settings)
        traffic = streamed_traffic(setup, BorderBytes())
    assert state.traffic == traffic.moved(steps=STEPS, commits=-(-STEPS // 3))
    assert state.measured["disk_bytes"] == plan.predicted.disk_bytes


def test_without_the_commit_before_a_streamed_run_takes_twice_its_files_instead_of_three_times(
    tmp_path: Path,
) -> None:
    kept, without = (
        trained(tmp_path / str(keep), "causal_lm", offload__tier="disk", offload__keep_previous=keep)
        for keep in (True, False)
    )
    (kept_state, kept_plan), (state, plan) = kept, without
    assert state.measured["disk_bytes"] == plan.predicted.disk_bytes
    assert state.measured["disk_bytes"] * 3 == kept_state.measured["disk_bytes"] * 2
    assert kept_plan.predicted.disk_bytes == kept_state.measured["disk_bytes"]
    names = {path.name for path in (tmp_path / "False").glob("*.safetensors")}
    assert names == {record.name for record in state.files.values()}, "of the last commit alone"
    assert state.files.keys() == kept_state.files.keys()
