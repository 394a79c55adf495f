"""`kd list`: what the installed plugins offer. Imports neither torch nor pydantic."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from kd_cli import tables
from kd_cli.errors import say
from kdcore.components import KINDS, Component, Kind
from kdcore.errors import UserError, did_you_mean
from kdcore.plugins import PluginInfo, PluginManager

_PLURALS: dict[str, Kind] = {"losses": "loss", **{f"{kind}s": kind for kind in KINDS if kind not in ("loss", "data")}}


def list_components(
    ctx: typer.Context,
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="Only this kind: teacher, student, loss, data or method.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Only what carries this tag.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods, losses, models and data that are installed.

    Plugins that failed to load are named at the end, with the cause.

    Examples:

        kd list
        kd list methods --tag segmentation
        kd list --json
    """
    manager: PluginManager = ctx.obj
    found = manager.components(parse_kind(kind), tag)
    broken = [info for info in manager.plugins() if info.error]
    if as_json:
        tables.print_json({
            "components": [describe(info, component) for info, component in found],
            "broken": [{"plugin": i.name, "distribution": i.distribution, "version": i.version, "error": i.error}
                       for i in broken],
        })  # fmt: skip
        return
    if found:
        out = tables.console()
        tables.show(out, ("kind", "name", "summary", "tags", "plugin"), _rows(found))
    else:
        say("nothing found", _why_nothing(manager, tag), "yellow")
    for info in broken:
        say("broken plugin", f"{info.name} ({info.distribution} {info.version}): {info.error}")


def parse_kind(text: str | None) -> Kind | None:
    """A kind, written in the singular or plural.

    Raises:
        UserError: if there is no such kind.
    """
    if text is None:
        return None
    for kind in KINDS:
        if text.lower() == kind or _PLURALS.get(text.lower()) == kind:
            return kind
    raise UserError(f"unknown kind {text!r}; {did_you_mean(text, [*KINDS, *_PLURALS], 'kinds')}")


def describe(info: PluginInfo, component: Component) -> dict[str, Any]:
    """A component as plain data."""
    return {"kind": component.kind, "name": component.name, "summary": component.summary, "tags": list(component.tags),
            "plugin": info.name, "distribution": info.distribution, "version": info.version}  # fmt: skip


def complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of components, for shell completion."""
    manager = ctx.obj or PluginManager()
    return sorted({c.name for _, c in manager.components() if c.name.startswith(incomplete)})


def complete_recipe(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shipped recipes as `method/recipe`, for shell completion."""
    manager = ctx.obj or PluginManager()
    names = (f"{c.name}/{recipe}" for _, c in manager.components("method") for recipe in c.recipe_files())
    return [name for name in names if name.startswith(incomplete)]


def _rows(found: list[tuple[PluginInfo, Component]]) -> list[tuple[str, ...]]:
    """Table rows; a name that several plugins offer is written as a recipe has to write it."""
    count = Counter((c.kind, c.name) for _, c in found)
    return [(c.kind, c.name if count[c.kind, c.name] == 1 else f"{info.distribution}:{c.name}", c.summary,
             ", ".join(c.tags), f"{info.distribution} {info.version}".strip()) for info, c in found]  # fmt: skip


def _why_nothing(manager: PluginManager, tag: str | None) -> str:
    tags = {tag for _, c in manager.components() for tag in c.tags}
    if tag is not None and tag not in tags:
        return f"there is no tag {tag!r}; {did_you_mean(tag, tags, 'tags')}"
    if not any(info.components for info in manager.plugins()):
        return "no plugin is loaded: `pip install kd-classic kd-demo` gives some to start with, `kd doctor` says more"
    return "no component fits"
