"""`kd show`: all about one component. Imports no torch."""

from __future__ import annotations

import types
import typing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_cli import tables
from kd_cli.listing import complete_name, describe, parse_kind
from kdcore.components import Component, Paper
from kdcore.errors import ComponentError, did_you_mean
from kdcore.plugins import PluginInfo, PluginManager

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

_USAGE = {"teacher": "teacher: {{use: {}}}", "student": "student: {{use: {}}}", "data": "data: {{use: {}}}",
          "loss": "losses: [{{use: {}}}]", "method": "method: {{use: {}}}"}  # fmt: skip


def show(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A component, as NAME or DISTRIBUTION:NAME.", autocompletion=complete_name),
    ],
    kind: Annotated[str | None, typer.Option(help="Only of this kind, where several kinds share the name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; the options as a JSON Schema.")] = False,
) -> None:
    """Show a component: its options with their defaults, its paper, its recipes.

    Examples:

        kd show kd
        kd show kd --kind loss
        kd show kd-timm:timm --json
    """
    found = find(ctx.obj, name, kind)
    if as_json:
        tables.print_json([_as_data(info, component) for info, component in found])
        return
    out = tables.console()
    for number, (info, component) in enumerate(found):
        if number:
            out.print()
        _print(out, info, component)


def find(manager: PluginManager, name: str, kind: str | None = None) -> list[tuple[PluginInfo, Component]]:
    """All components of a name, of every kind or one.

    Raises:
        ComponentError: if there is none.
    """
    distribution, _, short = name.rpartition(":")
    wanted = parse_kind(kind)
    found = [(info, c) for info, c in manager.components(wanted)
             if c.name == short and distribution in ("", info.distribution)]  # fmt: skip
    if found:
        return found
    if wanted:
        manager.get(wanted, name)  # raises, and says what is near
    names = {c.name for _, c in manager.components()}
    broken = [f"\n  {info.name} ({info.distribution}): {info.error}" for info in manager.plugins() if info.error]
    hint = "\nplugins that failed to load and may have provided it:" + "".join(broken) if broken else ""
    raise ComponentError(f"there is no component {name!r}; {did_you_mean(short, names, 'known')}{hint}")


def _print(out: Console, info: PluginInfo, component: Component) -> None:
    out.print(f"{component.kind} {component.name}", style="bold cyan", end="")
    out.print(f"  {info.distribution} {info.version}".rstrip(), style="dim")
    out.print(component.summary)
    if component.tags:
        out.print(f"tags: {', '.join(component.tags)}")
    out.print(f"in a recipe: {_USAGE[component.kind].format(component.name)}")
    out.print()
    _print_options(out, component)
    if component.paper:
        _print_paper(out, component.paper)
    if recipes := _recipes(component):
        rows = [(name, f"kd run {name}", f"kd cp {name}", about) for name, about in recipes.items()]
        tables.show(out, ("recipe", "run it", "copy it", "about"), rows, "Recipes")


def _print_options(out: Console, component: Component) -> None:
    try:
        model = component.load_options()
    except ComponentError as error:
        out.print(f"its options cannot be shown: {error}\n", style="red")
        return
    if model is None or not model.model_fields:
        out.print("It has no options.\n")
        return
    tables.show(out, ("name", "type", "default", "description"), _option_rows(model), "Options")
    out.print()


def _print_paper(out: Console, paper: Paper) -> None:
    out.print("Paper", style="bold")
    out.print(paper.citation)
    if paper.url:
        out.print(paper.url)
    out.print(f"\n{paper.bibtex}\n", style="dim")


def _option_rows(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    return [(name, type_name(field.annotation), _default(field), field.description or "")
            for name, field in model.model_fields.items()]  # fmt: skip


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "required" if field.is_required() else "-" if value is None else str(value)


def type_name(annotation: Any) -> str:
    """A type as a user would write it: `int`, `list[str]`, `mean | sum`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else type_name(a) for a in arguments)
        return f"{origin.__name__}[{inner}]"
    return str(getattr(annotation, "__name__", annotation))


def _recipes(component: Component) -> dict[str, str]:
    """The recipes a method ships, by `method/recipe`, each with the first line of its opening comment."""
    found = {}
    for name, file in component.recipe_files().items():
        first = next(iter(file.read_text(encoding="utf-8").splitlines()), "")
        found[f"{component.name}/{name}"] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def _as_data(info: PluginInfo, component: Component) -> dict[str, Any]:
    model, paper = component.load_options(), component.paper
    return {
        **describe(info, component),
        "options": model.model_json_schema() if model else None,
        "paper": {**asdict(paper), "citation": paper.citation, "bibtex": paper.bibtex} if paper else None,
        "recipes": list(_recipes(component)),
    }
