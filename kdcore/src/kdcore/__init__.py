"""kdcore: the minimal core of a knowledge-distillation framework in which every method is a plugin.

Importing this package imports no torch: what needs it is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kdcore.components import Component, Paper
from kdcore.errors import KDError, UserError
from kdcore.hookspecs import hookimpl
from kdcore.plugins import PluginManager

if TYPE_CHECKING:
    from kdcore.api import distill, evaluate, fill_cache, load_student, plan, run
    from kdcore.data import DataModule, Task
    from kdcore.generate import GenerateStage
    from kdcore.leaderboard import bench, compare
    from kdcore.losses import Loss
    from kdcore.models import Model, Outputs
    from kdcore.options import Options, Sampling
    from kdcore.recipe import recipe_schema
    from kdcore.runner import Result, Run
    from kdcore.search import SearchStage, Trial
    from kdcore.stages import Distill, FitStage, Method, Roles, Stage, TrainStage
    from kdcore.text import Answer, TextTeacher

__version__ = "0.1.0"

_LAZY = {
    "api": ("distill", "evaluate", "fill_cache", "load_student", "plan", "run"),
    "leaderboard": ("bench", "compare"),
    "data": ("DataModule", "Task"),
    "generate": ("GenerateStage",),
    "losses": ("Loss",),
    "models": ("Model", "Outputs"),
    "options": ("Options", "Sampling"),
    "recipe": ("recipe_schema",),
    "runner": ("Result", "Run"),
    "search": ("SearchStage", "Trial"),
    "stages": ("Distill", "FitStage", "Method", "Roles", "Stage", "TrainStage"),
    "text": ("Answer", "TextTeacher"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kdcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kdcore.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "Answer", "Component", "DataModule", "Distill", "FitStage", "GenerateStage", "KDError", "Loss", "Method", "Model",
    "Options", "Outputs", "Paper", "PluginManager", "Result", "Roles", "Run", "Sampling", "SearchStage", "Stage",
    "Task", "TextTeacher", "TrainStage", "Trial", "UserError", "__version__", "bench", "compare", "distill", "evaluate",
    "fill_cache", "hookimpl", "load_student", "plan", "recipe_schema", "run",
]  # fmt: skip
