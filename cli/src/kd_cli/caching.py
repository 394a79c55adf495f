"""`kd cache`: what a teacher says of each sample, kept on disk."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from kd_cli import progress, tables
from kd_cli.errors import is_main_process
from kd_cli.launching import follow_launcher, launch
from kd_cli.running import sigterm_ends_it
from kdcore.signals import GRACE


def cache(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, METHOD for its quickstart, or METHOD/RECIPE.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes of the recipe, such as teacher.cache.views=4."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Its role; default: all teachers with a `cache`, or the only one.")
    ] = None,
    logits: Annotated[str | None, typer.Option(help="all, top-k, sampled, hidden or none.")] = None,
    k: Annotated[int | None, typer.Option(help="Of top-k or sampled.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or int8.")] = None,
    embedding: Annotated[bool, typer.Option("--embedding", help="Hold the embedding, too.")] = False,
    taps: Annotated[list[str] | None, typer.Option(help="Hold the activations of these modules, too.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Splits to hold; default: train.")] = None,
    views: Annotated[int | None, typer.Option(help="Augmented views of each sample.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where caches lie.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per device.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, nothing else.")] = False,
) -> None:
    """Ask a recipe's teacher about every sample once, and keep what it says.

    Size and time are told before it starts. What was interrupted goes on when the same command is given again. Runs of
    the recipe with the same `cache` then read it; `cache.filled` names one that is to be taken without the teacher.

    Examples:

        kd cache mine.yaml --logits top-k --k 32
        kd cache mine.yaml --taps layer3 --dtype int8
        kd run mine.yaml teacher.cache.logits=top-k
    """
    given = {"logits": logits, "k": k, "dtype": dtype, "embedding": embedding or None, "taps": taps, "splits": split,
             "views": views, "folder": str(folder) if folder else None}  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if processes > 1:
        arguments = [recipe, *(overrides or []), *(["--teacher", teacher] if teacher else [])]
        for name, value in options.items():
            flag = "--split" if name == "splits" else f"--{name}"
            arguments += [flag] if value is True else [w for v in _each(value) for w in (flag, str(v))]
        arguments += ["--json"] if as_json else []
        raise typer.Exit(launch(ctx, recipe, overrides or [], arguments, processes, GRACE, "cache"))
    follow_launcher()
    silent = as_json or not is_main_process()
    with sigterm_ends_it(), contextlib.nullcontext() if silent else progress.shown(ctx.obj):
        import kdcore

        found = kdcore.fill_cache(recipe, overrides or (), role=teacher, options=options, plugins=ctx.obj)
    if is_main_process():
        _show(found, as_json)


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _show(found: dict[str, Path], as_json: bool) -> None:
    """What each cache holds, how large it is and how far it is off."""
    from kdcore.cache import read_facts

    facts = {role: {"path": str(path), **read_facts(path)} for role, path in found.items()}
    shown = ("path", "bytes", "bytes_per_unit", "seconds", "errors")
    if as_json:
        tables.print_json({role: {name: held[name] for name in shown} for role, held in facts.items()})
        return
    rows = [{"teacher": role, "signal": signal, **errors} for role, held in facts.items()
            for signal, errors in held["errors"].items()]  # fmt: skip
    out = tables.console()
    tables.show_records(out, rows, "Error of what is held")
    for role, held in facts.items():
        out.print(f"{role}: {held['bytes'] / 1e6:.1f} MB, {held['bytes_per_unit']:.0f} bytes a sample or token, in "
                  f"{held['path']}", soft_wrap=True)  # fmt: skip
