"""The comparison of arms: they run, their losses agree, one that cannot run says why. It measures nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench import SCRIPTS, script

EXACT = ["plain", "mapped", "in-backward", "lowmem-disk"]


@pytest.mark.slow  # six processes that import torch
def test_the_quick_comparison_has_a_row_for_every_arm_and_the_exact_ones_have_the_losses_of_plain(
    tmp_path: Path,
) -> None:
    absent = "galore" if importlib.util.find_spec("galore_torch") is None else "apollo"
    out, shown, scratch = tmp_path / "compare.json", tmp_path / "compare.txt", tmp_path / "runs"
    command = [sys.executable, str(SCRIPTS / "compare"), "--quick", "--arms", *EXACT, absent]
    where = ["--run-dir", str(scratch), "--out", str(out), "--table", str(shown)]
    done = subprocess.run([*command, *where], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    rows = {row["arm"]: row for row in content["rows"]}
    assert list(rows) == [*EXACT, absent]
    assert rows[absent]["why"] == f"not installed: pip install {absent}-torch"
    for arm in EXACT:
        assert "why" not in rows[arm], rows[arm]
        losses = rows[arm]["runs"][0]["losses"]
        assert losses == pytest.approx(rows["plain"]["runs"][0]["losses"], rel=1e-6)
        assert rows[arm]["losses_equal"] and len(set(losses)) == 4, "they change from step to step"
        assert rows[arm]["anonymous_peak_bytes"] > 2**26 and rows[arm]["tokens_per_s"] > 0
    assert rows["plain"]["of_plain"] == 1
    # The last write of the last step may come after the measured steps.
    state_bytes = 12 * rows["plain"]["parameters"]
    assert rows["lowmem-disk"]["per_step"]["wchar"] > 0.6 * state_bytes > rows["mapped"]["per_step"]["wchar"]
    assert shown.read_text() == done.stdout and f"{absent}: not installed" in done.stdout
    assert not scratch.exists(), "no scratch is left"


@pytest.mark.slow  # three processes that import torch
def test_blocks_that_are_trained_alone_have_the_losses_of_a_plain_loop(tmp_path: Path) -> None:
    out, arms = tmp_path / "compare.json", ["plain", "lowmem-resident", "lowmem-disk"]
    how = ["--quick", "--method", "diffusion_blocks", "--arms", *arms, "mapped"]
    command = [sys.executable, str(SCRIPTS / "compare"), *how, "--run-dir", str(tmp_path / "runs")]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.pop("mapped")["why"] == "trains end_to_end only"
    for row in rows.values():
        assert row["losses_equal"] and len(set(row["runs"][0]["losses"])) == 4, row


def test_the_search_finds_the_largest_number_that_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    most = script("compare", monkeypatch).most
    for answer in (0, 1, 2, 7, 8, 9, 15):
        assert most(lambda number, answer=answer: number <= answer, 4, 256) == answer
    assert most(lambda number: True, 4, 100) >= 100 - 100 // 16
    assert 190 <= most(lambda number: number <= 200, 8, 256) <= 200


def test_a_run_that_takes_too_long_is_ended_and_a_stale_lock_of_a_build_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = script("compare", monkeypatch)
    lock = tmp_path / "py" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["compare", "--quick", "--run-dir", str(tmp_path / "runs")])
    runs = compare.Runs(compare.arguments())
    assert importlib.util.find_spec("deepspeed") is None or str(lock) in runs.barred["deepspeed-2-cpu"]
    late = runs("plain", compare.SIZES["tiny"], None, 1, timeout_s=0.2)
    assert late["why"] == "not done after 0.2 s"


def test_the_slope_has_a_row_for_every_cap_with_medians_of_interleaved_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = script("compare", monkeypatch)
    caps, plot = ["2", "0.5", "1"], tmp_path / "slope.svg"
    command = ["compare", "--size", "tiny", "--arms", "lowmem-auto", "--rounds", "3", "--slope", *caps]
    monkeypatch.setattr(sys, "argv", [*command, "--plot", str(plot)])
    asked = list[float]()

    class Faked:
        given = compare.arguments()

        def __call__(self, arm: str, size: object, cap: float, steps: int) -> dict[str, object]:
            asked.append(cap)
            if cap == 0.5:
                return {"why": "killed"}
            step = {"seconds": (1 + asked.count(cap)) / cap, "rchar": 2**30, "wchar": 2**30}
            peaks = {"anonymous_peak_bytes": 1, "group_peak_bytes": 2, "after_last_step": {"seconds": 0.0}}
            return {"parameters": 1, "losses": [1.0], "per_step": step, **peaks}

    rows = compare.slope(Faked())
    assert asked == [0.5, 1, 2, 2, 1, 0.5, 0.5, 1, 2]  # every second round backwards
    assert [(row["cap_gib"], row.get("why")) for row in rows] == [(0.5, "killed"), (1, None), (2, None)]
    tokens = 2 * 32
    assert [row["tokens_per_s"] for row in rows[1:]] == pytest.approx([tokens / 3, tokens / 1.5])
    assert rows[1]["tokens_per_s_spread"] == pytest.approx([tokens / 4, tokens / 2])
    compare.plot_slope(rows, plot)
    assert plot.read_text().count("<path") > 4
