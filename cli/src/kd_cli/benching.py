"""`kd bench`: methods compared on one recipe, over several seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_cli import tables
from kd_cli.errors import say
from kd_cli.listing import complete_name
from kdcore.errors import UserError

if TYPE_CHECKING:
    from kdcore.leaderboard import Standing, Trial


def bench(
    methods: Annotated[
        list[str],
        typer.Argument(
            metavar="METHOD[,KEY=VALUE…]…",
            help="Methods, each with changes of its own, such as crd,negatives=1024.",
            autocompletion=complete_name,
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="What all share: teacher, student, data, schedule. Default: the quickstart of the first method.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="A change of the recipe for all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    run_dir: Annotated[Path, typer.Option(help="Folder of all runs and of the results.")] = Path("runs/bench"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: one per device, or per CPU core.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare methods on one recipe: every method with every seed, and the student alone.

    Ends in a leaderboard, which is also written into the folder: leaderboard.csv, .json and .html. A bench that was
    killed goes on where it stopped when the same command is given again.

    Examples:

        kd bench kd dkd dist
        kd bench kd dkd,beta=2 dkd,beta=8 --recipe mine.yaml --seeds 5
        kd bench kd crd,negatives=256 --set train.epochs=3 --run-dir runs/small
    """  # fmt: skip
    import kdcore

    with contextlib.nullcontext() if as_json else _progress() as told:
        board = kdcore.bench(methods, recipe, overrides or (), seeds=seeds, run_dir=run_dir, jobs=jobs, on_trial=told)
    command = " ".join(["kd bench", *methods, *(["--recipe", recipe] if recipe else []),
                        *(f"--set {change}" for change in overrides or ()), f"--seeds {seeds}"])  # fmt: skip
    rows = [describe(standing) for standing in board]
    _write(run_dir, command, board, rows)
    if as_json:
        tables.print_json({"command": command, "standings": board})
    else:
        out = tables.console()
        tables.show_records(out, rows, "Leaderboard")
        out.print(f"written to {run_dir / 'leaderboard.html'} (.csv, .json)", soft_wrap=True)
    failed = [(s.method, seed, cause) for s in board for seed, cause in s.errors.items()]
    for method, seed, cause in failed:
        say("failed", f"{method}, seed {seed}: {cause}")
    if failed:
        raise typer.Exit(1)


def _write(run_dir: Path, command: str, board: Sequence[Standing], rows: Sequence[dict[str, str]]) -> None:
    """Write the leaderboard into the folder, in each format.

    Raises:
        UserError: if the folder cannot be written.
    """
    from kd_cli import pages

    try:
        pages.write_csv(run_dir / "leaderboard.csv", rows)
        pages.write_json(run_dir / "leaderboard.json", {"command": command, "standings": board})
        pages.write_html(run_dir / "leaderboard.html", "Leaderboard", command, rows, pages.bars(board))
    except OSError as error:
        raise UserError(f"{run_dir}: the leaderboard cannot be written: {error.strerror}") from None


def describe(standing: Standing) -> dict[str, str]:
    """A line of the leaderboard for people."""
    percent = standing.metric.endswith(("accuracy", "miou", "f1"))
    shown = [standing.mean, standing.deviation, standing.gain, standing.low, standing.high]
    mean, deviation, gain, low, high = (
        None if value is None else f"{100 * value:.2f}" if percent else f"{value:.4g}" for value in shown
    )
    spread = f" ± {deviation}" if deviation else ""
    inside = f" [{low}, {high}]" if low else ""
    return {
        "method": standing.method,
        f"{standing.metric}{' %' if percent else ''}": f"{mean}{spread}" if mean else "failed",
        "gain [95 % interval]": f"{'' if gain.startswith('-') else '+'}{gain}{inside}" if gain else "",
        "runs": str(len(standing.values)),
        "seconds": "" if standing.seconds is None else f"{standing.seconds:.1f}",
        "memory MB": "" if standing.peak_memory is None else f"{standing.peak_memory / 1e6:.0f}",
    }


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Tells each finished trial: a bar in a terminal, a line elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    out = tables.console()
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=out, disable=not out.is_terminal) as bar:  # fmt: skip
        task = bar.add_task("runs", total=None)

        def told(trial: Trial, total: int) -> None:
            bar.update(task, advance=1, total=total)
            measured = "  ".join(f"{name} {value:.4g}" for name, value in trial.facts.get("metrics", {}).items())
            out.print(f"{trial.name}  seed {trial.seed}  {trial.error or measured}", soft_wrap=True)

        yield told


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of finished runs.")],
    html: Annotated[Path | None, typer.Option(help="Write a page with table and curves here.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Put finished runs side by side: their metrics, and what their recipes do differently.

    Examples:

        kd compare runs/kd-quickstart runs/dkd-quickstart
        kd compare runs/* --html comparison.html
    """
    import kdcore
    from kd_cli import pages

    rows = kdcore.compare(runs)
    try:
        if csv:
            pages.write_csv(csv, rows)
        if html:
            pages.write_html(html, "Comparison", f"kd compare {' '.join(map(str, runs))}", rows, pages.lines(runs))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from None
    if as_json:
        tables.print_json(rows)
        return
    out = tables.console()
    tables.show_records(out, _shortened(rows), "Comparison")
    for path in filter(None, (html, csv)):
        out.print(f"written to {path}", soft_wrap=True)


def _shortened(rows: Sequence[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """Rows with so many columns at most."""
    kept = list(dict.fromkeys(key for row in rows for key in row))[:most]
    return [{key: row[key] for key in kept if key in row} for row in rows]
