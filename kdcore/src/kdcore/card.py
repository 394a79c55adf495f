"""What a run says of itself: the facts in `run.json`, and the model card beside its student."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from kdcore.errors import visible

if TYPE_CHECKING:
    from kdcore.runner import Run


def model_card(run: Run, metrics: Mapping[str, float]) -> str:
    """A README in Markdown: what was distilled into what, how, from which data, with which result."""
    recipe = run.recipe
    component = run.manager.get("method", recipe.method.use)
    models = {**recipe.teachers, **recipe.students}
    lines = [
        f"# A student distilled with `{recipe.method.use}`",
        "",
        *(f"- {role}: `{spec.use}` {_options(spec.model_extra)}" for role, spec in models.items()),
        f"- data: `{recipe.data.use}` {_options(recipe.data.model_extra)}",
        f"- seed: {run.seed}",
        *([f"- method: {plain(component.paper.citation)}"] if component.paper else []),
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {plain(name)} | {value:.4f} |" for name, value in metrics.items()),
        "",
        "The model in `student/` is in its native format and loads without this project. To run the recipe again:",
        "",
        "    kd run recipe.yaml --run-dir again",
        "",
    ]
    return "\n".join(lines)


def _options(extra: Mapping[str, object] | None) -> str:
    return ", ".join(plain(f"{key}={value}") for key, value in (extra or {}).items())


def plain(text: str) -> str:
    """Text in Markdown that stays what it is: on one line, without control characters, markup or HTML."""
    line = " ".join(visible(text).split())
    return re.sub(r"([\\`*\[|])", r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def run_facts(run: Run, status: Mapping[str, Any]) -> dict[str, Any]:
    """What `run.json` says of a run when it starts or resumes."""
    versions = {name: metadata.version(name) for name in ("kdcore", "torch", "accelerate")}
    return {"status": "running", "pid": os.getpid(), "seed": run.seed, "recipe": run.resolved.fingerprint,
            "started": status.get("started", now()), "resumed": run.folder is not None and run.folder.resumed,
            "method": run.recipe.method.use,
            "versions": {"python": platform.python_version(), **versions}, "git": _git(), "error": None,
            "hardware": {"device": str(run.device), "processes": run.accelerator.num_processes,
                         "threads": torch.get_num_threads(), "machine": platform.machine()}}  # fmt: skip


def _git() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def now() -> str:
    """The time, as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
