"""`kd run --dry-run`: the resolved recipe, and what it would download."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kd_cli import tables
from kdcore.plugins import PluginManager

if TYPE_CHECKING:
    from kdcore.api import Plan
    from kdcore.options import Download


@dataclass
class _Item:
    """Something to be downloaded once, and the keys of the recipe that ask for it."""

    download: Download
    keys: list[str] = field(default_factory=list)


def show_plan(manager: PluginManager, recipe: str, overrides: list[str], as_json: bool) -> None:
    """Print what a run would do. Downloads nothing."""
    import kdcore

    plan = kdcore.plan(recipe, overrides, plugins=manager)
    items = _items(plan)
    known = sum(item.download.size or 0 for item in items)
    unknown = any(item.download.size is None for item in items)
    if as_json:
        rows = [
            {"name": i.download.name, "source": i.download.source, "size": i.download.size, "keys": i.keys}
            for i in items
        ]
        tables.print_json({"recipe": plan.resolved.dump(), "downloads": rows, "total": None if unknown else known})
        return
    _print_recipe(plan)
    _print_downloads(items, known, unknown)


def _items(plan: Plan) -> list[_Item]:
    found: dict[tuple[str, str], _Item] = {}
    for key, downloads in plan.downloads.items():
        for download in downloads:
            found.setdefault((download.source, download.name), _Item(download)).keys.append(key)
    return list(found.values())


def _print_recipe(plan: Plan) -> None:
    import yaml

    out = tables.console()
    text = yaml.safe_dump(plan.resolved.dump(), sort_keys=False, allow_unicode=True)
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        out.print(text)


def _print_downloads(items: list[_Item], known: int, unknown: bool) -> None:
    out = tables.console()
    if not items:
        out.print("nothing would be downloaded")
        return
    rows = [(i.download.name, i.download.source, _size(i.download.size), ", ".join(i.keys)) for i in items]
    tables.show(out, ("name", "from", "size", "for"), rows, "Would be downloaded, unless it is here already")
    out.print(f"total: {'at least ' if unknown and known else ''}{_size(known if known or not unknown else None)}")


def _size(size: int | None) -> str:
    from rich.filesize import decimal

    return "size unknown" if size is None else decimal(size)
