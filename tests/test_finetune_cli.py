"""`lowmem finetune` and its company at the command line; bad input is one line, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import new_cache
from hf_folders import BYTES_VOCAB, make_folder, make_tokenizer
from hf_training import uncounted
from typer.testing import CliRunner

from lowmem.cli import app
from lowmem.errors import ConfigError, DataError, LowmemError

uncounted_activations = pytest.fixture(autouse=True)(uncounted)
SHORT = ["train.num_steps=2", "train.seq_len=48", "train.batch_size=2", "blocks.visit_steps=1"]
SETS = [part for pair in SHORT for part in ("--set", pair)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", new_cache(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tokenizer(make_folder(tmp_path / "model", "llama", vocab_size=BYTES_VOCAB))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(30)))
    return path


def refused(*arguments: str) -> LowmemError:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, LowmemError), result.output
    assert result.exception.exit_code == 2
    assert "\n" not in str(result.exception)
    return result.exception


def test_a_folder_is_planned_finetuned_asked_and_exported(model: Path, rows: Path, tmp_path: Path) -> None:
    runner, run = CliRunner(), str(tmp_path / "run")
    planned = runner.invoke(app, ["plan", str(model), "--profile", "cpu-4gib", "--json"])
    assert json.loads(planned.stdout)["fits"]
    arguments = ["finetune", str(model), str(rows), "--profile", "cpu-4gib", "--run-dir", run, *SETS]
    done = runner.invoke(app, [*arguments, "--quiet", "--json"], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report["metrics"]["perplexity"] > 1
    assert report["first_metrics"]["value"] > 0
    assert report["progress"]["steps_done"] == 2
    again = runner.invoke(app, [*arguments, "--quiet", "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["digest"] == report["digest"]
    said = runner.invoke(app, ["sample", run, "--chat", "hello", "--tokens", "3", "--seed", "1"])
    assert said.exit_code == 0
    out = runner.invoke(app, ["export", run, str(tmp_path / "out")])
    assert f"wrote {tmp_path / 'out'}" in out.stdout


def test_bad_input_is_one_line_and_nothing_is_written(model: Path, rows: Path, tmp_path: Path) -> None:
    run = ["--profile", "cpu-4gib", "--run-dir", str(tmp_path / "run"), *SETS]
    assert isinstance(refused("finetune", str(tmp_path), str(rows), *run), ConfigError)
    assert isinstance(refused("finetune", str(model), str(tmp_path / "no.jsonl"), *run), DataError)
    assert "unknown name 'dora'" in str(refused("finetune", str(model), str(rows), "--adapter", "dora", *run))
    rows.write_text('{"question": "?"}\n')
    assert "line 1: found the columns question" in str(refused("finetune", str(model), str(rows), *run))
    assert "goes with a model's folder" in str(refused("plan", "digits-vit", str(rows)))
    text = "--set", "data={name: stdlib_text}"
    said = str(refused("finetune", str(model), str(rows), *run, *text))
    assert "data.name: found 'stdlib_text'; allowed with a decoder from a folder: chat, custom" in said
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json in it" in str(refused("finetune", str(model), str(rows), *run))
    assert not (tmp_path / "run").exists()
