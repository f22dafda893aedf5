"""The measuring scripts: they run, and what they print adds up. They measure nothing here."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem.recipe import load_recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    loader = importlib.machinery.SourceFileLoader(name, str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_quick_bench_writes_every_figure_and_says_which_formula_it_is_held_against(
    tmp_path: Path,
) -> None:
    out, scratch = tmp_path / "bench.json", tmp_path / "runs"
    command = [
        sys.executable,
        str(SCRIPTS / "bench"),
        "--quick",
        "--profile",
        "cpu-16gib",
        "--run-dir",
        str(scratch),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    [row] = found["steps"]
    run, traffic = row["runs"][0], row["traffic"]
    assert (row["arm"], row["steps_per_visit"]) == ("disk", 2)
    assert row["step_ratio"] == pytest.approx(run["step_s"] / row["resident_runs"][0]["step_s"])
    moved = run["traffic"]["disk_read_bytes"] + run["traffic"]["disk_written_bytes"]
    assert traffic["ours_disk_bytes_per_step"] == pytest.approx(moved / 8)  # 2 blocks, 2 visits of 2 steps
    assert run["traffic"]["disk_read_bytes"] >= 4 * run["block_bytes"]
    assert traffic["zero3"]["disk_bytes"] == (12 + 2 * 4 + 12) * run["num_parameters"]  # in fp32
    assert traffic["disk_ratio"] == pytest.approx(
        traffic["zero3"]["disk_bytes"] / traffic["ours_disk_bytes_per_step"]
    )
    assert [depth["num_blocks"] for depth in found["depths"]] == [2, 4]
    assert found["depths"][1]["num_parameters"] > 1.7 * found["depths"][0]["num_parameters"]
    peaks = [depth["device_peak_bytes"] for depth in found["depths"]]
    assert found["depth_spread"] == pytest.approx(max(peaks) / min(peaks) - 1)
    assert set(found["disk_ratio"]) == {"write", "first_read", "read"}
    assert traffic["zero3"]["formula"] in done.stdout and "| disk | 2 |" in done.stdout
    assert not scratch.exists(), "no scratch is left"


def test_the_control_of_the_recurrent_model_is_an_ordinary_one_of_the_same_layers_data_and_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parity = script("parity", monkeypatch)
    changes = ["train.lr=1.0e-8", "train.num_steps=60", "model.dim=64", "data={name: text, path: a b}"]
    recurrent = load_recipe("stdlib-recurrent", changes)
    ordinary = load_recipe(parity.ORDINARY, parity.as_ordinary_model(recurrent.to_dict()))
    assert (ordinary.method, ordinary.model.name, ordinary.model.noisy_input) == (  # type: ignore[union-attr]
        "end_to_end",
        "causal_lm",
        "none",
    )
    for key in ("num_layers", "dim", "num_heads", "mlp_ratio", "dropout"):
        assert getattr(ordinary.model, key) == getattr(recurrent.model, key)
    for section in ("data", "train", "optimizer", "eval"):
        assert getattr(ordinary, section) == getattr(recurrent, section)
    assert ordinary.blocks.num_blocks == 1


def test_the_controls_at_equal_compute_have_as_many_operations_as_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parity = script("parity", monkeypatch)
    per_step = {"stdlib-recurrent": 6.0, "stdlib-recurrent-end-to-end": 60.0, parity.ORDINARY: 3.0}
    monkeypatch.setattr(parity, "operations_per_step", lambda recipe, overrides: (per_step[recipe], 1))
    arms = parity.arms_of("recurrent", ["train.num_steps=1000"])
    control = "control: the same 4 layers as an ordinary model"
    assert {f"{control}, equal updates", f"{control}, equal compute", "end to end, equal compute"} < set(arms)
    for arm, (recipe, overrides) in arms.items():
        operations = per_step[recipe] * load_recipe(recipe, overrides).train.num_steps
        assert operations == 6000 or "equal compute" not in arm
    assert load_recipe(*arms[f"{control}, equal updates"]).train.num_steps == 1000
