"""Consoles, tables and numbers, the same in every command. Rich is imported on use only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from kdcore.errors import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_UNBOUNDED = 100_000


def console() -> Console:
    """Standard output. Where it is not a terminal, lines are as long as they need to be and tables have no frame.
    Control characters in what is printed are made visible."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(visible(text), **settings)

    out = Plain(markup=False, emoji=False, highlight=False)
    if not out.is_terminal:
        out.width = _UNBOUNDED
    return out


def show(out: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table; numbers are formatted and stand on the right."""
    from rich import box
    from rich.table import Table

    rows = list(rows)
    made = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD if out.is_terminal else None)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        made.add_column(
            number(column), justify="right" if numeric else "left", style="cyan" if column == "name" else None
        )
    for row in rows:
        made.add_row(*(number(cell) for cell in row))
    if title:
        out.print(title, style="bold", soft_wrap=True)
    out.print(made)


def show_records(out: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print a table of mappings: its columns are their keys, in the order they first come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    show(out, columns, ([row.get(column, "") for column in columns] for row in rows), title)


def show_metrics(out: Console, values: Mapping[str, float], title: str) -> None:
    """Print the metrics of a student."""
    show(out, ("metric", "value"), values.items(), title)


def number(value: Any) -> str:
    """A cell: floats to four significant digits, everything else as it is, on one line."""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split("\n"))


def print_json(value: Any) -> None:
    """One JSON object on standard output; dataclasses as mappings."""
    typer.echo(to_json(value))


def to_json(value: Any) -> str:
    """JSON text, dataclasses as mappings."""
    return visible(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]
