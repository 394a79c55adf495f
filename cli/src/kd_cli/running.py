"""`kd run`: a recipe, run here, in several processes, or only planned."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from kd_cli import progress, tables
from kd_cli.errors import is_main_process
from kd_cli.launching import follow_launcher, launch
from kdcore.errors import Terminated
from kdcore.plugins import PluginManager
from kdcore.signals import GRACE

if TYPE_CHECKING:
    from kdcore.runner import Result


class RunCommand(TyperCommand):
    """Takes `--resume auto`, as job scripts write it, for `--resume`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments without the word."""
        plain = ["--resume" if word == "--resume=auto" else word for word in args]
        after = [None, *plain]
        return super().parse_args(ctx, [word for word, before in zip(plain, after, strict=False)
                                        if (before, word) != ("--resume", "auto")])  # fmt: skip


def run(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, METHOD for its quickstart, or METHOD/RECIPE.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes of the recipe, such as train.epochs=3.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run folder; default: runs/NAME of the recipe.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, show recipe and downloads, do nothing.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Show a finished run again instead of refusing it; `--resume auto` is the same."),
    ] = False,
    grace: Annotated[float, typer.Option(min=1, help="Seconds to save a checkpoint in after SIGTERM.")] = GRACE,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per device.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")] = False,
) -> None:
    """Run a recipe.

    A run that was killed or interrupted goes on where it stopped when the same command is given again. After SIGTERM it
    saves a checkpoint and ends with 75: a job script that runs the command with `--resume auto` may be started again
    as often as need be.

    Examples:

        kd run kd
        kd run mine.yaml train.epochs=3 student.model=resnet34
        kd run kd/quickstart --dry-run
        kd run mine.yaml --processes 2 --run-dir runs/second
    """
    if dry_run:
        from kd_cli.planning import show_plan

        return show_plan(ctx.obj, recipe, overrides or [], as_json)
    if processes > 1:
        arguments = [recipe, *(overrides or []), *(["--run-dir", str(run_dir)] if run_dir else [])]
        arguments += [flag for flag, given in (("--resume", resume), ("--json", as_json), ("--quiet", quiet)) if given]
        arguments += ["--grace", str(grace)]
        raise typer.Exit(launch(ctx, recipe, overrides or [], arguments, processes, grace))
    follow_launcher()
    silent = as_json or quiet or not is_main_process()
    with sigterm_ends_it(), contextlib.nullcontext() if silent else progress.shown(ctx.obj):
        import kdcore

        result = kdcore.run(recipe, overrides or (), run_dir=run_dir, resume=resume, plugins=ctx.obj, grace=grace)
    if not is_main_process():
        return None
    if as_json:
        tables.print_json({"path": result.path, "metrics": result.metrics, "rows": result.rows})
    elif not quiet:
        show_result(result, recipe, ctx.obj)


@contextlib.contextmanager
def sigterm_ends_it() -> Iterator[None]:
    """Inside, SIGTERM ends the command with the status of a run that may be started again. The run handles it itself
    while it is under way; imports take seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(Terminated.exit_code))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def show_result(result: Result, recipe: str, manager: PluginManager) -> None:
    """What came out, where it is, and what to do next."""
    out = tables.console()
    if result.metrics:
        tables.show_metrics(out, result.metrics, "Student")
    if result.rows:
        tables.show_records(out, result.rows, "Comparison")
    student = next((p for p in (result.path / "student", result.path / "students") if p.is_dir()), None)
    lines = {"run folder": result.path, "student": student, "measure again": f"kd eval {result.path}"}
    lines |= _next_recipes(recipe, manager)
    for label, value in lines.items():
        if value is not None:
            out.print(f"{label + ':':<15}{value}", soft_wrap=True)


def _next_recipes(recipe: str, manager: PluginManager) -> dict[str, Any]:
    """Commands that go on from a shipped recipe: another one of the method, and a copy to change."""
    if recipe.endswith((".yaml", ".yml")) or Path(recipe).exists():
        return {}
    method, _, name = recipe.partition("/")
    others = [other for other in manager.get("method", method).recipe_files() if other != (name or "quickstart")]
    more = {"other recipe": f"kd run {method}/{others[0]} --dry-run"} if others else {}
    return {**more, "make it yours": f"kd cp {method}/{name or 'quickstart'}"}
