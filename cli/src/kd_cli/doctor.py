"""`kd doctor`: what is installed here, and what is wrong with it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from kd_cli import tables
from kd_cli.errors import say
from kdcore.plugins import PluginManager

_PACKAGES = ("kdcore", "kd-cli", "torch", "torchvision", "accelerate", "transformers", "timm", "datasets")


def doctor(
    ctx: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes of the recipe of --determinism.")
    ] = None,
    determinism: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Run the recipe twice and find the first difference.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training stage that --determinism compares.")] = 20,
    replay: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Take the step that went wrong in a run again, and look closely.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this installation (versions, devices, disk, plugins), or look into a run.

    Ends with exit status 1 if something is broken, differs or goes wrong, and says what.

    Examples:

        kd doctor
        kd doctor --determinism mine.yaml --steps 50
        kd doctor --replay runs/mine
    """
    if determinism is not None:
        return _audit(ctx, determinism, overrides or [], steps, as_json)
    if replay is not None:
        return _replay(ctx, replay, as_json)
    problems: list[str] = []
    plugins = _plugins(ctx.obj, problems)  # before torch is imported, so that a plugin that imports it is seen
    report = {
        "versions": _versions(problems),
        "devices": _devices(problems),
        "folder": _folder(problems),
        "plugins": plugins,
        "problems": problems,
    }
    _check_torchvision(problems)
    _check_core_range(problems)
    if as_json:
        tables.print_json(report)
    else:
        _print(report)
    raise typer.Exit(1 if problems else 0)


def _audit(ctx: typer.Context, recipe: str, overrides: list[str], steps: int, as_json: bool) -> None:
    from kdcore.diagnose import audit

    found = audit(recipe, overrides, steps=steps, plugins=ctx.obj)
    if as_json:
        tables.print_json(found)
    elif found.first is None:
        tables.console().print(f"{found.values} values of both runs are the same, bit for bit")
    else:
        for label, what in (("first difference", found.first), ("first term that differs", found.term)):
            if what is not None:
                say(label, f"stage {what.stage!r}, step {what.step}, {what.kind} {what.name!r}")
    raise typer.Exit(0 if found.first is None else 1)


def _replay(ctx: typer.Context, run: Path, as_json: bool) -> None:
    from kdcore.diagnose import replay

    found = replay(run, ctx.obj)
    if as_json:
        tables.print_json(found)
    elif found is None:
        tables.console().print("nothing went wrong this time")
    else:
        facts = {"stage": found.stage, "step": found.step, "samples": found.samples, "the run said": found.said,
                 "inputs not finite": ", ".join(found.inputs) or "none", "first module": found.module or "none",
                 "terms": found.terms, "parameter after it": found.parameter or "all finite"}  # fmt: skip
        tables.show(tables.console(), ("what", "found"), facts.items(), f"Replay of {run}")
    raise typer.Exit(0 if found is None else 1)


def _versions(problems: list[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in ("kdcore", "kd-cli", "torch", "accelerate"):
                problems.append(f"{name} is not installed: pip install {name}")
    return found


def _devices(problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu threads": os.cpu_count(), "accelerators": []}
    try:
        import torch
    except Exception as error:
        problems.append(f"torch cannot be imported: {type(error).__name__}: {error}")
        return found
    found["cpu threads"] = torch.get_num_threads()
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found["accelerators"].append(f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found["accelerators"].append("mps")
    if torch.version.cuda and not found["accelerators"]:
        found["accelerators"].append(f"none found, although torch was built for CUDA {torch.version.cuda}")
    return found


def _folder(problems: list[str]) -> dict[str, Any]:
    here = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
        writable = True
    except OSError as error:
        problems.append(f"{here} cannot be written: {error.strerror}; runs need --run-dir elsewhere")
        writable = False
    return {"path": str(here), "free bytes": shutil.disk_usage(here).free, "writable": writable}


def _plugins(manager: PluginManager, problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for info in manager.plugins():
        found.append({"plugin": info.name, "distribution": info.distribution, "version": info.version,
                      "components": len(info.components), "error": info.error})  # fmt: skip
        if info.error:
            problems.append(f"plugin {info.name} ({info.distribution} {info.version}): {info.error}")
        if info.heavy:
            problems.append(f"plugin {info.name} ({info.distribution} {info.version}): it imports torch when it is "
                            "loaded, for which every command of kd waits")  # fmt: skip
    count = Counter((c.kind, c.name) for _, c in manager.components())
    for (kind, name), number in count.items():
        if number > 1:
            owners = [info.distribution for info, c in manager.components(kind) if c.name == name]
            problems.append(f"{kind} {name!r} is offered by {' and '.join(owners)}: "
                            f"write '{owners[0]}:{name}' in a recipe, or remove one")  # fmt: skip
    return found


def _check_torchvision(problems: list[str]) -> None:
    """Builds of torch and torchvision that do not fit fail in many ways at import, some of which end the process."""
    try:
        metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or [f"it ended with status {tried.returncode}"])[-1]
        problems.append(f"torchvision does not fit torch: {last}; install the two together, from one index")


def _check_core_range(problems: list[str]) -> None:
    """Whether this command line was made for the installed kdcore. (The manager checks the plugins.)"""
    from packaging.requirements import Requirement

    for text in metadata.requires("kd-cli") or ():
        wanted = Requirement(text)
        if wanted.name == "kdcore" and not wanted.specifier.contains(metadata.version("kdcore"), prereleases=True):
            problems.append(f"kd-cli needs {wanted}, but kdcore {metadata.version('kdcore')} is installed")


def _print(report: dict[str, Any]) -> None:
    from rich.filesize import decimal

    out = tables.console()
    tables.show(out, ("package", "version"), report["versions"].items(), "Versions")
    devices, folder = report["devices"], report["folder"]
    out.print(f"accelerators: {', '.join(devices['accelerators']) or 'none, runs use the CPU'}")
    out.print(f"CPU threads:  {devices['cpu threads']}")
    out.print(f"this folder:  {folder['path']}, {decimal(folder['free bytes'])} free, "
              f"{'writable' if folder['writable'] else 'not writable'}")  # fmt: skip
    rows = [(p["plugin"], f"{p['distribution']} {p['version']}".strip(), p["components"],
             "broken" if p["error"] else "ok") for p in report["plugins"]]  # fmt: skip
    tables.show(out, ("plugin", "distribution", "components", "state"), rows, "Plugins")
    for problem in report["problems"]:
        say("problem", problem)
    if not report["problems"]:
        out.print("all is well")
