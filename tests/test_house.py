"""The house rules, read from the source: floors and cycles, names, what an import costs, sizes, units."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lowmem

ROOT = Path(__file__).resolve().parent.parent
# Packages and top modules from the ground up. A package imports only from floors below it, and from itself.
FLOORS = [
    {"errors", "units", "schema", "files"},
    {"machine", "data"},
    {"recipe", "noise", "schedule"},
    {"blocks", "objectives", "models"},
    {"reporting"},
    {"planning"},
    {"training"},
    {"inference", "distributed"},
    {"job", "finetuning", "from_data", "methods", "cluster", "terminal", "doctor"},
    {"cli", "runtime_probe", "floor_probe", "__init__"},
    {"__main__"},
]
# The order within a floor, where one package imports from another there.
BESIDE = {("models", "objectives"), ("noise", "recipe"), ("schedule", "recipe"), ("schema", "errors")}
BESIDE |= {("errors", "units"), ("schema", "units"), ("files", "errors"), ("files", "units")}
BESIDE |= {
    ("data", "machine"),
    ("finetuning", "job"),
    ("methods", "job"),
    ("cluster", "job"),
    ("cli", "__init__"),
}
LIGHT = [
    "lowmem",
    "lowmem.cli",
    "lowmem.doctor",
    "lowmem.recipe",
    "lowmem.models.sections",
    "lowmem.models.huggingface.section",
    "lowmem.machine.profile",
    "lowmem.blocks.run_dir",
    "lowmem.blocks.order",
    "lowmem.reporting.report",
    "lowmem.reporting.dashboard",
]
LONGEST_FUNCTION = 60  # lines


def module_name(path: Path) -> str:
    """`lowmem/models/vit.py` -> `models.vit`, `lowmem/models/__init__.py` -> `models`."""
    name = ".".join(path.relative_to(ROOT / "lowmem").with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in (ROOT / "lowmem").rglob("*.py")}


def floor_of(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import: at the top, within functions, and those for the type checker alone."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a source imports, named as in MODULES."""
    found = set()
    for node in imports(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("lowmem.") in MODULES else str(node.module) for name in whole]
        else:
            names = [alias.name for alias in node.names]
        own = (name for name in names if name.split(".")[0] == "lowmem")
        found |= {name.removeprefix("lowmem.") if name != "lowmem" else "__init__" for name in own}
    return found


IMPORTED = {name: imported_modules(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def misplaced(importer: str, imported: str) -> bool:
    upper, lower = importer.partition(".")[0], imported.partition(".")[0]
    allowed = upper == lower or (upper, lower) in BESIDE or floor_of(lower) < floor_of(upper)
    return not allowed


def test_the_parser_sees_every_import_also_those_for_the_type_checker() -> None:
    source = """
from typing import TYPE_CHECKING
import lowmem.blocks.arena
from lowmem import units, __version__
from lowmem.models import model_builder, vit
if TYPE_CHECKING:
    from lowmem.planning.plan import Plan
def late():
    from lowmem.cli import main
"""
    assert imported_modules(source) == {
        "blocks.arena",
        "units",
        "__init__",
        "models",
        "models.vit",
        "planning.plan",
        "cli",
    }


def test_every_module_stands_on_a_floor() -> None:
    parts = {name.partition(".")[0] for name in MODULES}
    assert parts == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_floors_below_and_from_its_own_package(module: str) -> None:
    lazily_public = module == "__init__"  # its names are for the type checker, and loaded when first used
    wrong = {name for name in IMPORTED[module] if misplaced(module, name)}
    assert lazily_public or wrong == set()


def test_a_wrong_import_would_be_seen() -> None:
    assert misplaced("blocks.store", "planning.plan")
    assert misplaced("objectives.base", "models.base")
    assert not misplaced("models.base", "objectives.base")


def test_no_cycle_among_modules_type_checking_imports_included() -> None:
    graph = {name: IMPORTED[name] - {name} for name in MODULES if name != "__init__"}
    for imported in graph.values():
        imported.discard("__init__")  # `from lowmem import __version__`
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as cycle:
        pytest.fail(f"modules import each other: {' -> '.join(cycle.args[1])}")
    assert set(order) == set(graph)


def test_no_module_that_a_script_could_find_is_named_like_one_of_the_standard_library() -> None:
    """A module in a script's folder shadows the library's. `machine.profile` is in no script's folder."""
    scripts = {"", "blocks"}  # `python lowmem/cli.py`, and modules that run as children
    names = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] in scripts}
    assert not names & sys.stdlib_module_names


def test_the_light_modules_do_not_load_torch() -> None:
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {LIGHT}:",
            "    importlib.import_module(name)",
            "    assert 'torch' not in sys.modules, name",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_function_fits_a_screen() -> None:
    long = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{name}.{node.name}: {lines} lines")
    assert long == []


def test_no_code_is_kept_in_strings() -> None:
    """Such code escapes lint and this test."""
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if "\n" in text.strip() and re.search(r"^(import|from) \w", text, re.M):
                found.append(f"{name}: {text.strip().splitlines()[0]}")
    assert found == []


def test_sizes_are_said_in_gib_everywhere() -> None:
    folders = ("lowmem", "profiles", "scripts", "docs", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {path: path.read_text(encoding="utf-8") for path in files if "__pycache__" not in path.parts}
    assert len(texts) > 30
    assert [str(path.relative_to(ROOT)) for path, text in texts.items() if re.search(r"\bGB\b", text)] == []


def test_every_public_name_resolves_to_what_its_module_defines() -> None:
    assert "Trainer" in lowmem.__all__ and dir(lowmem) == lowmem.__all__
    for name in lowmem.__all__:
        value = getattr(lowmem, name)
        assert value.__name__ == name
        assert value.__module__ == lowmem._HOME[name]
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = getattr(lowmem, "Trainr")  # noqa: B009
