"""Rewrites the generated parts of the documentation: `python docs/catalogue.py`. The docs build does it too.

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, in a page of `docs/` or in the README.
The catalogue lists the plugins of this workspace, not others that happen to be installed beside them.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kd_cli.showing import type_name
from kdcore import Component, PluginManager, hookspecs
from kdcore.components import KINDS, Kind, Paper
from kdcore.metrics import METRICS
from kdcore.options import CacheOptions
from kdcore.plugins import PluginInfo
from kdcore.recipe import EvalOptions, OptimizerOptions, ScheduleOptions, StageOverrides, TrainOptions

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("recipes", "hooks", "methods", "teacher-cache")),
)
_PART = re.compile(r"(?P<begin><!-- begin (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end (?P=name) -->)", re.DOTALL)


def write() -> None:
    """Bring the generated parts of all pages up to date."""
    for page in PAGES:
        old, new = page.read_text(encoding="utf-8"), render(page)
        if new != old:
            page.write_text(new, encoding="utf-8")


def render(page: Path) -> str:
    """A page as it should be."""
    return _PART.sub(
        lambda part: f"{part['begin']}{PARTS[part['name']]()}\n{part['end']}", page.read_text(encoding="utf-8")
    )


def components(kind: Kind) -> list[tuple[PluginInfo, Component]]:
    """The components that the distributions under `plugins/` offer.

    Raises:
        SystemExit: naming the plugins that are not installed or broken.
    """
    files = ROOT.glob("plugins/*/pyproject.toml")
    ours = {tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"] for file in files}
    manager = PluginManager(only=ours, disable=())
    missing = ours - {info.distribution for info in manager.plugins() if not info.error}
    if missing:
        raise SystemExit(f"not installed, or broken: {', '.join(sorted(missing))}; see `make env` and `kd doctor`")
    return manager.components(kind)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def methods_table() -> str:
    """A line per method, for the README."""
    rows = [(f"[`{c.name}`](docs/methods.md#{c.name})", c.summary, _reference(c.paper), f"`{info.distribution}`")
            for info, c in components("method")]  # fmt: skip
    return table(("method", "what it does", "paper", "plugin"), rows)


def methods() -> str:
    """A section per method, for the catalogue."""
    return "\n\n".join(_section(info, c) for info, c in components("method"))


def others() -> str:
    """A table per kind of component that is not a method."""
    parts = []
    for kind in (k for k in KINDS if k != "method"):
        rows = [(f"`{c.name}`", c.summary, ", ".join(c.tags), f"`{info.distribution}`") for info, c in components(kind)]
        title = "Data" if kind == "data" else "Losses" if kind == "loss" else f"{kind.title()}s"
        parts.append(f"## {title}\n\n{table(('name', 'what it is', 'tags', 'plugin'), rows)}")
    return "\n\n".join(parts)


def options_table(model: type[BaseModel]) -> str:
    """A line per option of a pydantic model."""
    rows = []
    for name, field in model.model_fields.items():
        value = field.get_default(call_default_factory=True)
        default = (
            "required" if field.is_required() else "" if value is None or isinstance(value, BaseModel) else f"`{value}`"
        )
        rows.append((f"`{name}`", f"`{type_name(field.annotation)}`", default, field.description or ""))
    return table(("key", "type", "default", "what it is"), rows)


def metrics_table() -> str:
    """The metrics of each kind of task; the first is the default."""
    rows = [(kind, ", ".join(f"`{name}`" for name in names) or "none") for kind, names in METRICS.items()]
    return table(("task", "metrics"), rows)


def hooks(prefix: str) -> str:
    """A section per hook: its signature and its docstring."""
    found = [f for name, f in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("kd_")]
    chosen = [f for f in found if f.__name__.startswith("kd_register_") == (prefix == "kd_register_")]
    chosen.sort(key=lambda f: f.__code__.co_firstlineno)
    return "\n\n".join(f"### {f.__name__}\n\n```text\n{signature(f)}\n```\n\n{inspect.getdoc(f)}" for f in chosen)


def signature(function: Callable[..., Any]) -> str:
    """A hook as an implementation has to declare it."""
    parameters = inspect.signature(function)
    arguments = ", ".join(f"{p.name}: {p.annotation}" for p in parameters.parameters.values())
    return f"def {function.__name__}({arguments}) -> {parameters.return_annotation}"


def _section(info: PluginInfo, component: Component) -> str:
    model = component.load_options()
    recipes = ", ".join(f"`kd run {component.name}/{name}`" for name in component.recipe_files())
    lines = [f"## {component.name}", f"{component.summary[:1].upper()}{component.summary[1:]}.",
             f"Plugin `{info.distribution}`; tags: {', '.join(component.tags)}."]  # fmt: skip
    if component.paper:
        lines.append(f"Paper: {_linked(component.paper, component.paper.citation)}")
    if recipes:
        lines.append(f"Recipes: {recipes}.")
    if model and model.model_fields:
        lines.append(options_table(model))
    return "\n\n".join(lines)


def _reference(paper: Paper | None) -> str:
    if paper is None:
        return ""
    return _linked(paper, f"{paper.first_author} {paper.year}")


def _linked(paper: Paper, text: str) -> str:
    where = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url
    return f"[{text}]({where})" if where else text


PARTS: dict[str, Callable[[], str]] = {
    "methods-table": methods_table,
    "methods": methods,
    "others": others,
    "train": lambda: options_table(TrainOptions),
    "optimizer": lambda: options_table(OptimizerOptions),
    "schedule": lambda: options_table(ScheduleOptions),
    "stages": lambda: options_table(StageOverrides),
    "eval": lambda: options_table(EvalOptions),
    "cache": lambda: options_table(CacheOptions),
    "metrics": metrics_table,
    "registration-hooks": lambda: hooks("kd_register_"),
    "observer-hooks": lambda: hooks("observers"),
}
"""What stands between the markers of each name."""

if __name__ == "__main__":
    write()
