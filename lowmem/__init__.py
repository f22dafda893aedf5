"""lowmem: train models that do not fit, one block at a time, with a memory budget you can check.

Names are loaded when they are first used, so `import lowmem` costs nothing and does not load torch. A type
checker sees every name as what it is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem.blocks.run_dir import RunState as RunState
    from lowmem.blocks.verify import recover_run as recover_run
    from lowmem.blocks.verify import verify_run as verify_run
    from lowmem.errors import BudgetError as BudgetError
    from lowmem.errors import ConfigError as ConfigError
    from lowmem.errors import DataError as DataError
    from lowmem.errors import LowmemError as LowmemError
    from lowmem.errors import ProfileError as ProfileError
    from lowmem.errors import ResumeError as ResumeError
    from lowmem.errors import ShortageError as ShortageError
    from lowmem.errors import StoreError as StoreError
    from lowmem.errors import TrainingError as TrainingError
    from lowmem.finetuning import finetune as finetune
    from lowmem.inference.chat import chat_run as chat_run
    from lowmem.inference.evaluate import evaluate_run as evaluate_run
    from lowmem.inference.export import export_run as export_run
    from lowmem.inference.generate import sample_run as sample_run
    from lowmem.job import train as train
    from lowmem.machine.detect import detect_profile as detect_profile
    from lowmem.machine.environment import read_environment as read_environment
    from lowmem.machine.profile import Profile as Profile
    from lowmem.machine.profile import list_profiles as list_profiles
    from lowmem.machine.profile import load_profile as load_profile
    from lowmem.models.base import BlockModel as BlockModel
    from lowmem.models.wrapped import wrap as wrap
    from lowmem.objectives.base import Objective as Objective
    from lowmem.objectives.images import ImageDenoising as ImageDenoising
    from lowmem.objectives.labels import LabelDenoising as LabelDenoising
    from lowmem.objectives.masked import MaskedDenoising as MaskedDenoising
    from lowmem.objectives.tokens import TokenDenoising as TokenDenoising
    from lowmem.planning.plan import Plan as Plan
    from lowmem.planning.plan import make_plan as make_plan
    from lowmem.recipe import NoiseConfig as NoiseConfig
    from lowmem.recipe import Recipe as Recipe
    from lowmem.recipe import list_recipes as list_recipes
    from lowmem.recipe import load_recipe as load_recipe
    from lowmem.recipe import recipe_from_dict as recipe_from_dict
    from lowmem.reporting.dashboard import live_view as live_view
    from lowmem.reporting.page import write_page as write_page
    from lowmem.reporting.report import Report as Report
    from lowmem.reporting.report import read_report as read_report
    from lowmem.reporting.report import read_status as read_status
    from lowmem.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

# Where each public name is defined. The imports above say the same to a type checker; a test compares them.
_HOME = {
    "BlockModel": "lowmem.models.base",
    "BudgetError": "lowmem.errors",
    "ConfigError": "lowmem.errors",
    "DataError": "lowmem.errors",
    "ImageDenoising": "lowmem.objectives.images",
    "LabelDenoising": "lowmem.objectives.labels",
    "LowmemError": "lowmem.errors",
    "MaskedDenoising": "lowmem.objectives.masked",
    "NoiseConfig": "lowmem.recipe",
    "Objective": "lowmem.objectives.base",
    "Plan": "lowmem.planning.plan",
    "Profile": "lowmem.machine.profile",
    "ProfileError": "lowmem.errors",
    "Recipe": "lowmem.recipe",
    "Report": "lowmem.reporting.report",
    "ResumeError": "lowmem.errors",
    "RunState": "lowmem.blocks.run_dir",
    "ShortageError": "lowmem.errors",
    "StoreError": "lowmem.errors",
    "TokenDenoising": "lowmem.objectives.tokens",
    "Trainer": "lowmem.training.trainer",
    "TrainingError": "lowmem.errors",
    "chat_run": "lowmem.inference.chat",
    "detect_profile": "lowmem.machine.detect",
    "evaluate_run": "lowmem.inference.evaluate",
    "export_run": "lowmem.inference.export",
    "finetune": "lowmem.finetuning",
    "list_profiles": "lowmem.machine.profile",
    "list_recipes": "lowmem.recipe",
    "live_view": "lowmem.reporting.dashboard",
    "load_profile": "lowmem.machine.profile",
    "load_recipe": "lowmem.recipe",
    "make_plan": "lowmem.planning.plan",
    "read_environment": "lowmem.machine.environment",
    "read_report": "lowmem.reporting.report",
    "read_status": "lowmem.reporting.report",
    "recipe_from_dict": "lowmem.recipe",
    "recover_run": "lowmem.blocks.verify",
    "sample_run": "lowmem.inference.generate",
    "train": "lowmem.job",
    "verify_run": "lowmem.blocks.verify",
    "wrap": "lowmem.models.wrapped",
    "write_page": "lowmem.reporting.page",
}
__all__ = sorted(_HOME)

if not TYPE_CHECKING:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'lowmem' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOME[name]), name)

    def __dir__() -> list[str]:
        return __all__
