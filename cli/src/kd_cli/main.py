"""The command `kd`: its global options, its commands, and how it ends."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kd_cli import benching, caching, copying, doctor, evaluating, listing, logs, running, showing
from kd_cli.errors import reported
from kdcore.plugins import PluginManager


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with reported():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 the run failed, 2 wrong input, 130 interrupted by Ctrl-C, 75 ended by "
    "SIGTERM (a checkpoint was saved first: run it again). "
    "KD_DEBUG=1 shows tracebacks; KD_PLUGINS=a,b loads only those plugins, KD_DISABLE_PLUGINS=c all but those.",
)
app.command("list")(listing.list_components)
app.command("show")(showing.show)
app.command("run", cls=running.RunCommand)(running.run)
app.command("eval")(evaluating.evaluate)
app.command("cache")(caching.cache)
app.command("bench")(benching.bench)
app.command("compare")(benching.compare)
app.command("cp")(copying.copy)
app.command("doctor")(doctor.doctor)


def make_manager(no_plugins: bool = False) -> PluginManager:
    """The plugin manager of this call."""
    return PluginManager(discover=not no_plugins)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kd {version('kd-cli')} (kdcore {version('kdcore')}, Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def kd(
    ctx: typer.Context,
    no_plugins: Annotated[bool, typer.Option("--no-plugins", help="Do not look for installed plugins.")] = False,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, show_default=False, help="Log more; twice: other libraries too."),
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    """Knowledge distillation: a light student that keeps the quality of a heavy teacher.

    Start with `kd list method`, look at one with `kd show NAME`, run its quickstart with `kd run NAME`.
    """
    logs.set_up(verbose)
    ctx.obj = make_manager(no_plugins)


def main() -> None:
    """The console script."""
    app(prog_name="kd")
