"""The record of versions that reports and bug reports carry."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from lowmem.machine.environment import PACKAGES, read_environment

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def test_every_package_that_lowmem_requires_is_in_the_record() -> None:
    required = next(
        [ast.literal_eval(entry) for entry in node.value.elts]
        for node in ast.walk(ast.parse(SETUP.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword)
        and node.arg == "install_requires"
        and isinstance(node.value, ast.List)
    )
    names = {re.split(r"[<>=!~; ]", requirement)[0] for requirement in required}
    assert "torch" in names
    assert names <= set(PACKAGES)
    found = read_environment()["packages"]
    assert found["torch"] and found["xxhash"]


def test_the_record_imports_none_of_the_packages_that_it_names() -> None:
    code = (
        "import sys; from lowmem.machine.environment import read_environment; read_environment(); "
        "print([name for name in ('torch', 'matplotlib', 'jinja2', 'bitsandbytes') if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
