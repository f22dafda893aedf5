"""Packages that only some kinds of data need. A missing one is named before any work is done."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

from lowmem.errors import DataError

# module -> (its package, the extra of lowmem that installs it)
EXTRAS = {
    "sklearn": ("scikit-learn", "data"),
    "PIL": ("Pillow", "data"),
    "tokenizers": ("tokenizers", "text"),
    "transformers": ("transformers", "huggingface"),
    "peft": ("peft", "huggingface"),
    "datasets": ("datasets", "huggingface"),
}


def require_package(module: str, what: str, instead: str = "") -> None:
    """Raises DataError, beginning with `what`, where the module is not installed. It is not imported."""
    if not is_there(module):
        raise _missing(module, what, instead)


def is_there(module: str) -> bool:
    """Whether a top module can be imported. It is not imported."""
    return sys.modules[module] is not None if module in sys.modules else find_spec(module) is not None


def imported(module: str, what: str, instead: str = "") -> Any:
    """The module, of one of EXTRAS or below one. Raises DataError, beginning with `what`, without it."""
    require_package(module.partition(".")[0], what, instead)
    try:
        return importlib.import_module(module)
    except ImportError:
        raise _missing(module.partition(".")[0], what, instead) from None


def _missing(module: str, what: str, instead: str) -> DataError:
    package, extra = EXTRAS[module]
    return DataError(
        f"{what} needs the package {package}, which is not installed; "
        f"install the extra: pip install 'lowmem[{extra}]'{instead}"
    )
