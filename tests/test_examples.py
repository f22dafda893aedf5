"""The examples run as they stand: the short one is short, and each goes on when it is run again."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import new_cache
from hf_folders import BYTES_VOCAB, make_folder, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def shown(folder: Path, *arguments: str) -> str:
    command, environment = (
        [sys.executable, *arguments],
        {**ENVIRONMENT, "XDG_CACHE_HOME": new_cache(folder / "cache")},
    )
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(said: str) -> str:
    return re.findall(r"^digest +(\w{64})$", said, re.MULTILINE)[0]


def test_a_model_of_ones_own_takes_fifteen_lines_and_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    script = EXAMPLES / "own_model.py"
    body = ast.parse(script.read_text(encoding="utf-8")).body[1:]  # without the docstring
    inner = [line for node in body for line in (node, *getattr(node, "body", []))]
    assert len({node.lineno for node in inner}) <= 15
    assert all(node.end_lineno == node.lineno for node in inner if not isinstance(node, ast.FunctionDef))
    first, again = (shown(tmp_path, str(script)) for _ in range(2))
    assert "100 of 100 steps" in first and digest(first) == digest(again)
    loss = float(re.findall(r"^ 0 +2 +100 +(\d\.\d+)", first, re.MULTILINE)[0])
    assert loss < 0.3, "well below ln 2"


def test_the_example_in_blocks_trains_goes_on_and_is_evaluated(tmp_path: Path) -> None:
    command = [str(EXAMPLES / "own_blocks.py"), "--steps", "10", "--run-dir", str(tmp_path / "own")]
    said = [shown(tmp_path, *command) for _ in range(2)]
    assert digest(said[0]) == digest(said[1]), "the second call finds the finished run"
    assert all("3 of 3 visits, 10 of 10 steps of each of 3 blocks" in each for each in said)
    assert re.search(r"accuracy on new points: chain \d+\.\d%, joint \d+\.\d%", said[0])


def test_the_example_of_finetuning_trains_asks_and_exports(tmp_path: Path) -> None:
    model = make_tokenizer(make_folder(tmp_path / "model", "llama", vocab_size=BYTES_VOCAB))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(30)))
    sets = ["train.num_steps=2", "train.seq_len=96", "train.batch_size=2", "blocks.visit_steps=1"]
    command = [str(EXAMPLES / "finetune.py"), str(model), str(rows), "--profile", "cpu-4gib"]
    said = shown(tmp_path, *command, "--run-dir", str(tmp_path / "run"), "--set", *sets)
    assert re.search(r"held-out loss \d+\.\d+ before, \d+\.\d+ after", said)
    assert (tmp_path / "run-out" / "config.json").is_file()


def test_the_notebooks_code_runs_cell_after_cell(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "own_model.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "cells.json").write_text(json.dumps(code))
    runs = "import json; names = {}; [exec(cell, names) for cell in json.load(open('cells.json'))]"
    said = shown(tmp_path, "-c", runs)
    assert float(re.findall(r"^loss (\d\.\d+)$", said, re.MULTILINE)[0]) < 0.6
    assert list((tmp_path / "runs" / "notebook-weights").glob("*.safetensors"))
