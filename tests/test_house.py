"""The house rules, read from the source: floors, names, what an import costs, units."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowmem

ROOT = Path(__file__).resolve().parent.parent
FLOORS = """
    errors units tables strict heap
    data_config config noise schedule cgroup hardware environment
    data_cache data_images data_augment data_idx data_npz data_folder data_latents data_huggingface data_tokenizer data_text data block_queue
    optim arena models.base objectives objectives.base objectives.labels objectives.images objectives.masked objectives.tokens objectives.recurrent
    models.layers models.vit models.dit models.masked_lm models.text models.causal_lm models.recurrent_lm models
    run_dir telemetry staging store stream borders traffic
    settings duration passes footprint choose plan guard weights trainable exact trainer sampler
    evaluation evaluation.common evaluation.labels evaluation.images evaluation.tokens evaluation.masked evaluation.recurrent
    evaluate generate export evaluation.text_quality job
    report page dashboard loggers cli __init__ __main__
"""
ORDER = FLOORS.split()
LIGHT = [
    "lowmem",
    "lowmem.cli",
    "lowmem.reporting.report",
    "lowmem.reporting.dashboard",
    "lowmem.recipe",
    "lowmem.machine.profile",
]


def module_name(path: Path) -> str:
    """`lowmem/models/vit.py` -> `models.vit`, `lowmem/models/__init__.py` -> `models`."""
    name = ".".join(path.relative_to(ROOT / "lowmem").with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in (ROOT / "lowmem").rglob("*.py")}


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run, at the top or within functions; not those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from imports(child)


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a source imports, named as in ORDER."""
    found = set()
    for node in imports(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            within = f"{node.module}."
            names = [
                within + alias.name
                if (within + alias.name).removeprefix("lowmem.") in MODULES
                else str(node.module)
                for alias in node.names
            ]
        else:
            names = [alias.name for alias in node.names]
        found |= {
            name.removeprefix("lowmem.") if name != "lowmem" else "__init__"
            for name in names
            if name.split(".")[0] == "lowmem"
        }
    return found


def test_the_parser_sees_the_imports_that_run_and_no_others() -> None:
    source = """
from typing import TYPE_CHECKING
import lowmem.blocks.arena
from lowmem import __version__
from lowmem.blocks import optim
from lowmem.models import model_builder, vit
if TYPE_CHECKING:
    from lowmem.planning.plan import Plan
def late():
    from lowmem.cli import main
"""
    assert imported_modules(source) == {"arena", "optim", "__init__", "models", "models.vit", "cli"}


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_before_it(module: str) -> None:
    imported = imported_modules(MODULES[module].read_text(encoding="utf-8"))
    assert imported <= set(ORDER[: ORDER.index(module)])


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    assert not {name.rpartition(".")[2] for name in MODULES} & sys.stdlib_module_names


def test_the_light_modules_do_not_load_torch() -> None:
    code = f"import importlib, sys\nfor name in {LIGHT}:\n    importlib.import_module(name)\n    assert 'torch' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_sizes_are_said_in_gib_everywhere() -> None:
    files = [
        path
        for folder in ("lowmem", "profiles", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    ]
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
        _ = lowmem.Trainr
