"""Text recipes from end to end: train, evaluate, write samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import new_cache, run_short

from lowmem.errors import ConfigError, DataError
from lowmem.inference.frozen_run import open_run
from lowmem.inference.generate import TextSettings, sample_run
from lowmem.job import train
from lowmem.reporting.report import read_report

QUICK = [
    "train.num_steps=6",
    "train.warmup_steps=2",
    "blocks.visit_steps=3",
    "train.seq_len=32",
    "train.batch_size=8",
    "eval.num_batches=1",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", new_cache(tmp_path / "cache"))


@pytest.fixture
def book(tmp_path: Path) -> list[str]:
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return ["data={name: text, path: " + str(tmp_path / "book.txt") + ", tokenizer: characters}"]


@pytest.mark.parametrize(
    "recipe", ["stdlib-causal", "stdlib-causal-end-to-end", "stdlib-masked", "stdlib-masked-end-to-end"]
)
def test_text_recipes_train_evaluate_and_write_samples(tmp_path: Path, book: list[str], recipe: str) -> None:
    folder = train(recipe, "cpu-4gib", tmp_path / "run", [*QUICK, *book])
    metrics = read_report(folder).content["metrics"]
    assert metrics["value"] > 0
    path = sample_run(
        folder, num=2, text=TextSettings(prompt="the " if "causal" in recipe else "", num_tokens=12)
    )
    samples = path.read_text().split("--- sample ")[1:]
    assert len(samples) == 2
    if "causal" in recipe:
        assert all(
            sample.partition("\n")[2].startswith("the ") and len(sample.partition("\n")[2]) == 17
            for sample in samples
        )
    assert (
        sample_run(
            folder, tmp_path / "again.txt", 2, 0, TextSettings("the " if "causal" in recipe else "", 12)
        ).read_text()
        == path.read_text()
    )


@pytest.mark.parametrize(
    "recipe",
    ["stdlib-recurrent", pytest.param("stdlib-recurrent-end-to-end", marks=pytest.mark.slow)],
)
def test_recurrent_recipes_train_evaluate_each_number_of_iterations_and_write_samples(
    tmp_path: Path, book: list[str], recipe: str
) -> None:
    folder = train(recipe, "cpu-4gib", tmp_path / "run", [*QUICK, *book])
    metrics = read_report(folder).content["metrics"]
    assert [row["iterations"] for row in metrics["iterations"]] == [1, 2, 4, 8, 16, 32]
    asked = TextSettings(prompt="the ", num_tokens=30)  # with the prompt more than seq_len
    path = sample_run(folder, num=2, seed=3, text=asked)
    samples = [sample.partition("\n")[2] for sample in path.read_text().split("--- sample ")[1:]]
    assert len(samples) == 2 and all(sample.startswith("the ") and len(sample) == 35 for sample in samples)
    assert sample_run(folder, tmp_path / "again.txt", 2, 3, asked).read_text() == path.read_text()
    assert sample_run(folder, tmp_path / "other.txt", 2, 4, asked).read_text() != path.read_text()


def test_a_model_that_classifies_makes_no_samples(trained: Path) -> None:
    with pytest.raises(ConfigError, match="'vit' makes no samples; allowed: dit"):
        sample_run(trained)


def test_a_prompt_with_an_unknown_character_is_refused(tmp_path: Path, book: list[str]) -> None:
    folder = train("stdlib-causal", "cpu-4gib", tmp_path / "run", [*QUICK, *book])
    with pytest.raises(DataError):
        sample_run(folder, text=TextSettings(prompt="Ünknown"))


def test_a_run_that_is_read_while_it_trains_on_loses_no_file(tmp_path: Path) -> None:
    """Other commits come between opening the run and reading its blocks."""
    read: list[Any] = []

    def at_a_visit(record: dict[str, Any]) -> None:
        if record["event"] == "visit" and record["visit"] == 3:
            opened.append(open_run(tmp_path / "run"))
            expected.update({p: p.read_bytes() for p in (tmp_path / "run").glob("*.safetensors")})
        if record["event"] == "trained":
            with opened[0] as frozen:
                for block, layers in frozen.walk(frozen.blocks):
                    read.append((block, [float(p.sum()) for layer in layers for p in layer.parameters()]))

    opened: list[Any] = []
    expected: dict[Path, bytes] = {}
    run_short(tmp_path / "run", [at_a_visit], offload__tier="disk", offload__write_back="wait")
    assert len(read) == 3 and all(figures for _, figures in read)
    assert not any(path.exists() for path in expected), "every file was replaced since"
    assert not opened[0].stream.block_store.run_dir._held, "nothing stays open"
