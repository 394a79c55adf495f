"""`kd eval`: the student of a finished run, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd_cli import tables


def evaluate(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes of its recipe, such as data.path=new.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to measure on; default: those of the recipe's eval.on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the student of a finished run again, on any split.

    Examples:

        kd eval runs/kd-quickstart
        kd eval runs/kd-quickstart --split test eval.metrics=[accuracy,ece]
    """
    import kdcore

    found = kdcore.evaluate(run, split, overrides or (), plugins=ctx.obj)
    if as_json:
        tables.print_json(found)
        return
    out = tables.console()
    if found:
        tables.show_metrics(out, found, f"Student of {run}")
    else:
        out.print("the task of this data has no metrics; what the method measured stands in "
                  f"{run / 'run.json'} and {run / 'README.md'}", soft_wrap=True)  # fmt: skip
