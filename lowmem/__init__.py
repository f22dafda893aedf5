"""lowmem: train models that do not fit, one block at a time, with a memory budget you can check.

Names are loaded when first used, so `import lowmem` costs nothing and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "BlockModel": "lowmem.models.base",
    "BudgetError": "lowmem.errors",
    "ConfigError": "lowmem.errors",
    "DataError": "lowmem.errors",
    "ImageDenoising": "lowmem.objectives.images",
    "LabelDenoising": "lowmem.objectives.labels",
    "LowmemError": "lowmem.errors",
    "Plan": "lowmem.planning.plan",
    "Profile": "lowmem.machine.profile",
    "ProfileError": "lowmem.errors",
    "Recipe": "lowmem.recipe",
    "ResumeError": "lowmem.errors",
    "StoreError": "lowmem.errors",
    "Trainer": "lowmem.training.trainer",
    "detect_profile": "lowmem.machine.detect",
    "evaluate_run": "lowmem.inference.evaluate",
    "export_run": "lowmem.inference.export",
    "list_profiles": "lowmem.machine.profile",
    "list_recipes": "lowmem.recipe",
    "load_profile": "lowmem.machine.profile",
    "load_recipe": "lowmem.recipe",
    "make_plan": "lowmem.planning.plan",
    "read_environment": "lowmem.machine.environment",
    "read_report": "lowmem.reporting.report",
    "read_status": "lowmem.reporting.report",
    "recipe_from_dict": "lowmem.recipe",
    "sample_run": "lowmem.inference.generate",
    "train": "lowmem.job",
    "write_page": "lowmem.reporting.page",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowmem' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
