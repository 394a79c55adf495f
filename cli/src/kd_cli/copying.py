"""`kd cp`: a shipped recipe, copied for the user to own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kd_cli.listing import complete_recipe
from kdcore.errors import UserError


def copy(
    ctx: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="METHOD[/RECIPE]",
            help="A recipe of a method; default: its quickstart.",
            autocompletion=complete_recipe,
        ),
    ],
    dest: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder; default: ./METHOD-RECIPE.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Copy a shipped recipe, comments included, to change it.

    Examples:

        kd cp kd/quickstart
        kd cp kd/quickstart recipes/mine.yaml --force
    """
    from kdcore.recipe import find_recipe

    source, name = find_recipe(recipe, ctx.obj)
    target = dest or Path(f"{name}.yaml")
    if target.is_dir():
        target /= f"{name}.yaml"
    if target.exists() and not force:
        raise UserError(f"{target} is there already; --force writes over it, or name another file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    typer.echo(f"copied to {target}; run it with: kd run {target}")
