"""The public names are typed: a user's type checker accepts a right program and rejects a wrong call."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lowmem

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
from pathlib import Path

import lowmem


def train(build: type[lowmem.BlockModel], recipe: lowmem.Recipe) -> float | None:
    profile: lowmem.Profile = lowmem.load_profile("cpu-4gib")
    plan: lowmem.Plan = lowmem.make_plan(build, recipe, profile)
    table: str = plan.table()
    trainer = lowmem.Trainer(build, plan, run_dir=Path("runs") / "mine")
    state: lowmem.RunState = trainer.fit(lambda step: {"row": [step]})
    report: lowmem.Report = lowmem.read_report("runs/mine")
    print(table, report.table())
    return state.blocks[0].loss
"""
WRONG = {
    'lowmem.load_profile("cpu-4gib")': ("lowmem.load_profile(4)", 'Argument 1 to "load_profile"'),
    "plan.table()": ("plan.tabel()", '"Plan" has no attribute "tabel"'),
    'lowmem.Trainer(build, plan, run_dir=Path("runs") / "mine")': (
        'lowmem.Trainer(build, plan, folder="mine")',
        'Unexpected keyword argument "folder" for "Trainer"',
    ),
    "lowmem.read_report": ("lowmem.read_raport", 'Module has no attribute "read_raport"'),
}


def checked(folder: Path, **programs: str) -> str:
    """What mypy says, strictly, of programs by name."""
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), *(str(folder / f"{name}.py") for name in programs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    return done.stdout + done.stderr


def test_a_users_program_is_accepted_and_each_wrong_call_in_it_rejected(tmp_path: Path) -> None:
    wrong = {f"wrong_{n}": PROGRAM.replace(right, bad) for n, (right, (bad, _)) in enumerate(WRONG.items())}
    said = checked(tmp_path, right=PROGRAM, **wrong)
    assert "right.py" not in said, said
    for number, (_, expected) in enumerate(WRONG.values()):
        lines = [line for line in said.splitlines() if f"wrong_{number}.py" in line]
        assert any(expected in line for line in lines), said


def test_the_names_for_the_type_checker_are_those_that_are_loaded() -> None:
    source = (ROOT / "lowmem" / "__init__.py").read_text(encoding="utf-8")
    seen = {
        alias.asname: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert seen == lowmem._HOME
