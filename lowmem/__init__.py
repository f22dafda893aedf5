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
    "Plan": "lowmem.plan",
    "Profile": "lowmem.hardware",
    "ProfileError": "lowmem.errors",
    "Recipe": "lowmem.config",
    "ResumeError": "lowmem.errors",
    "StoreError": "lowmem.errors",
    "Trainer": "lowmem.trainer",
    "detect_profile": "lowmem.hardware",
    "evaluate_run": "lowmem.evaluate",
    "export_run": "lowmem.export",
    "list_profiles": "lowmem.hardware",
    "list_recipes": "lowmem.config",
    "load_profile": "lowmem.hardware",
    "load_recipe": "lowmem.config",
    "make_plan": "lowmem.plan",
    "read_environment": "lowmem.environment",
    "read_report": "lowmem.report",
    "read_status": "lowmem.report",
    "recipe_from_dict": "lowmem.config",
    "sample_run": "lowmem.generate",
    "train": "lowmem.job",
    "write_page": "lowmem.page",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowmem' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
