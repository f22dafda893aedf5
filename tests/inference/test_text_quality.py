"""Generated text under a judge: diversity and interpolation by hand, the judge's figures, what is refused,
the script's table.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.blocks.run_dir import RunDir
from lowmem.errors import ConfigError, DataError
from lowmem.inference.evaluate import evaluate_run
from lowmem.inference.generate import open_run
from lowmem.inference.text_quality import at_matched_diversity, distinct_n, judge_nats, judge_runs
from lowmem.job import train

LENGTH = 16
MODEL = "num_layers: 2, dim: 32, num_heads: 2"
TRAIN = f"train={{num_steps: 40, batch_size: 16, seq_len: {LENGTH}, lr: 1.0e-2}}"
QUICK = [TRAIN, "blocks.visit_steps=20", "eval={batch_size: 32, num_batches: 1, num_steps: 4}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A judge and two runs, trained for a moment on one small text; a folder to find them in by name."""
    root = tmp_path_factory.mktemp("judged")
    (root / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    data = "data={name: text, path: " + str(root / "book.txt") + ", tokenizer: characters}"
    train(
        "stdlib-causal-end-to-end",
        "cpu-4gib",
        root / "judge",
        [*QUICK, data, f"model={{name: causal_lm, {MODEL}}}", "blocks.num_blocks=1"],
    )
    train(
        "stdlib-causal",
        "cpu-4gib",
        root / "causal",
        [*QUICK, data, f"model={{name: causal_lm, {MODEL}}}", "blocks.num_blocks=2", "train.seed=1"],
    )
    train(
        "stdlib-masked",
        "cpu-4gib",
        root / "masked",
        [*QUICK, data, f"model={{name: masked_lm, {MODEL}}}", "blocks.num_blocks=2"],
    )
    yield root
    patch.undo()


def altered(runs: Path, folder: Path, change: Any) -> Path:
    """A run folder with nothing but the causal run's plan, changed by `change(recipe)`."""
    plan = RunDir(runs / "causal").read_plan()
    change(plan["recipe"])
    folder.mkdir()
    RunDir(folder).write_plan(plan)
    return folder


def test_distinct_n_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 3, 1]])
    assert distinct_n(tokens, 1) == 3 / 8
    assert distinct_n(tokens, 2) == 4 / 6, "12 21 23 31; no pair reaches from one row into the next"
    assert distinct_n(tokens, 3) == distinct_n(tokens, 4) == 1
    assert distinct_n(torch.zeros(10, 6, dtype=torch.long), 3) == 1 / 40
    with pytest.raises(ConfigError, match="distinct-5: found sequences of 4 tokens; allowed: at least 5"):
        distinct_n(tokens, 5)


def test_two_models_are_compared_in_the_middle_of_the_diversities_that_both_reach() -> None:
    a, b = [(0.2, 1.0), (0.6, 3.0)], [(0.8, 4.5), (0.4, 2.5)]
    matched = at_matched_diversity(a, b)
    assert matched == pytest.approx((0.5, 2.5, 3.0)) and matched.difference == pytest.approx(-0.5)
    assert at_matched_diversity(b, a).difference == pytest.approx(0.5)
    bent = [(0.2, 0.0), (0.45, 1.0), (0.55, 3.0), (1.0, 9.0)]
    assert at_matched_diversity(bent, b) == pytest.approx((0.6, 3.0 + 6.0 * 0.05 / 0.45, 3.5))
    assert at_matched_diversity([(0.5, 1.0), (0.5, 3.0)], b) == pytest.approx((0.5, 2.0, 3.0)), (
        "one diversity has one mean"
    )


def test_curves_that_reach_no_diversity_in_common_are_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"the two reach 0\.1000 to 0\.3000 and 0\.3100 to 0\.5000; allowed: ranges"
    ) as caught:
        at_matched_diversity([(0.1, 1.0), (0.3, 2.0)], [(0.5, 2.0), (0.31, 1.0)])
    assert "\n" not in str(caught.value)


def test_the_judges_nats_are_its_own_cross_entropy_and_rise_where_text_is_no_text(runs: Path) -> None:
    with open_run(runs / "judge") as judge:
        from lowmem.data.datasets import load_data

        real = torch.from_numpy(
            next(load_data(judge.plan.recipe.data, judge.plan.recipe.train.seq_len).test_batches(32))[
                "tokens"
            ]
        )
        nats = judge_nats(judge, real)
        noise = judge_nats(judge, torch.randint(real.max() + 1, real.shape))
        by_row = torch.cat([judge_nats(judge, row[None]) for row in real[:3]])
    assert nats.shape == (32,)
    assert float(nats.mean()) == pytest.approx(evaluate_run(runs / "judge")["value"], abs=1e-5)
    assert by_row.tolist() == pytest.approx(nats[:3].tolist(), abs=1e-5)
    assert float(noise.mean()) > float(nats.mean()) + 1


def test_every_run_and_the_held_out_text_get_the_same_figures_from_the_same_number_of_tokens(
    runs: Path,
) -> None:
    arguments: Any = (runs / "judge", 6, [0.8, 3.0], 1.0, 3, 2)
    result = judge_runs([runs / "causal", runs / "masked"], *arguments)
    assert [run["model"] for run in result["runs"]] == ["causal_lm", "masked_lm"]
    rows = [result["real_text"], *(row for run in result["runs"] for row in run["rows"])]
    assert len(rows) == 5
    for row in rows:
        assert row["nats"] > 0 and row["nats_std_error"] > 0
        assert 0 < row["distinct_1"] < row["distinct_2"] <= row["distinct_3"] <= row["distinct_4"] <= 1
        assert [len(text) for text in row["texts"]] == [LENGTH] * 3
    assert rows[0]["texts"][0] in "the quick brown fox jumps over the lazy dog. " * 3
    assert rows[0]["nats"] < min(row["nats"] for row in rows[1:]), (
        "no model of a few steps writes text as likely as the real one"
    )
    assert result == judge_runs([runs / "causal", runs / "masked"], *arguments)
    (pair,) = result["at_matched_diversity"]
    causal, masked = ([(row["distinct_2"], row["nats"]) for row in run["rows"]] for run in result["runs"])
    assert (pair["diversity"], pair["nats_a"], pair["nats_b"]) == at_matched_diversity(causal, masked)
    assert pair["difference"] == pair["nats_a"] - pair["nats_b"]


def test_what_does_not_go_together_is_refused_before_anything_is_drawn(runs: Path, tmp_path: Path) -> None:
    def refusal(run: Path, judge: Path, num: int = 4) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            judge_runs([run], judge, num, [1.0], 1.0, 0, 3)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    causal, judge = runs / "causal", runs / "judge"
    assert (
        "found method diffusion_blocks with model causal_lm; "
        "allowed: method end_to_end or block_coordinate with model causal_lm" in refusal(causal, causal)
    )
    assert "is one of the runs it is to judge" in refusal(judge, runs / "masked" / ".." / "judge")
    longer = altered(runs, tmp_path / "longer", lambda recipe: recipe["train"].update(seq_len=32))
    assert "has train.seq_len 32; allowed: 16, the judge's" in refusal(longer, judge)
    other = altered(runs, tmp_path / "other", lambda recipe: recipe["data"].update(tokenizer="bytes"))
    assert "has another vocabulary (256 tokens to the judge's 28)" in refusal(other, judge)
    assert re.search(
        r"found \d+ windows of train.seq_len tokens; allowed: at least the 5000 samples",
        refusal(causal, judge, 5000),
    )


def test_the_script_prints_a_table_and_writes_json(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.syspath_prepend(str(scripts))  # as Python does for a script
    main = runpy.run_path(str(scripts / "judge"))["main"]

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["judge", *arguments])
        return (main(), *capsys.readouterr())

    causal, masked, judge = (str(runs / name) for name in ("causal", "masked", "judge"))
    out = tmp_path / "judged.json"
    code, printed, _ = called(
        causal, masked, "--judge", judge, "--num", "4", "--temperatures", "0.8", "--out", str(out)
    )
    result = json.loads(out.read_text())
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert code == 0 and len(rows) == 5 and len({row.count("|") for row in rows}) == 1
    assert f"| {causal} | 0.8 | {result['runs'][0]['rows'][0]['nats']:.3f}" in rows[3]
    assert f"{causal} against {masked}, at equal distinct-3" in printed
    code, printed, problem = called(causal, "--judge", causal)
    assert code == 2 and printed == "" and problem.startswith("error: judge: ") and problem.count("\n") == 1
