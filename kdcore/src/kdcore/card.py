"""The model card that a run leaves beside its student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
        *([f"- method: {component.paper.citation}"] if component.paper else []),
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
        "",
        "The model in `student/` is in its native format and loads without this project. To run the recipe again:",
        "",
        "    kd run recipe.yaml --run-dir again",
        "",
    ]
    return "\n".join(lines)


def _options(extra: Mapping[str, object] | None) -> str:
    return ", ".join(f"{key}={value}" for key, value in (extra or {}).items())
