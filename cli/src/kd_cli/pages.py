"""Results as files: CSV, JSON, and a page of HTML with a plot in it that needs nothing else."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_cli import tables
from kdcore.errors import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kdcore.leaderboard import Standing

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1.5rem 0; } th, td { text-align: left; padding: .3rem .9rem .3rem 0; }
th { border-bottom: 2px solid #222; } td { border-bottom: 1px solid #ddd; } pre { background: #f4f4f4; padding: .7rem; }
svg { max-width: 100%; height: auto; } pre { white-space: pre-wrap; }
</style></head><body>
<h1>{{ title }}</h1>
<pre>{{ command }}</pre>
{{ plot | safe }}
<table><thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr>{% for column in columns %}<td>{{ row.get(column, "") }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></body></html>
"""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table as CSV; its columns are the keys of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, value: Any) -> None:
    """JSON, dataclasses as mappings."""
    path.write_text(tables.to_json(value) + "\n", encoding="utf-8")


def write_html(path: Path, title: str, command: str, rows: Sequence[Mapping[str, Any]], plot: str) -> None:
    """A page: the command, a plot (SVG) and the table."""
    from jinja2 import Environment

    columns = list(dict.fromkeys(key for row in rows for key in row))
    page = Environment(autoescape=True).from_string(_PAGE)
    path.write_text(page.render(title=title, command=command, rows=rows, columns=columns, plot=plot), encoding="utf-8")


def bars(board: Sequence[Standing]) -> str:
    """Each entry's gain over the student alone with its interval, as SVG."""
    shown = [s for s in reversed(board) if s.gain is not None]
    figure = _figure(height=1.2 + 0.3 * len(shown))
    axes = figure.subplots()
    for row, standing in enumerate(shown):
        gain = standing.gain or 0.0
        low, high = (gain if end is None else end for end in (standing.low, standing.high))
        sure = low > 0 or high < 0
        axes.errorbar(gain, row, xerr=[[gain - low], [high - gain]], fmt="o", capsize=3,
                      color="#1b7f4b" if sure and gain > 0 else "#b03030" if sure else "#888888")  # fmt: skip
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_yticks(
        range(len(shown)), [_literal(s.method if len(s.method) < 36 else f"{s.method[:34]}…") for s in shown]
    )
    if scale := 2 * statistics.median([abs(s.gain or 0.0) for s in shown] or [0.0]):
        axes.set_xscale("symlog", linthresh=scale)  # a method that fails must not hide what the others do
        ends = max(abs(end) for end in axes.get_xlim())
        marks = [m * 10.0**k for k in range(-6, 6) for m in (1, 3) if scale <= m * 10.0**k <= ends]
        axes.set_xticks(
            [*(-mark for mark in marks), 0.0, *marks], [f"{m:g}" for m in (*(-m for m in marks), 0, *marks)]
        )
        axes.minorticks_off()
        axes.axvspan(-scale, scale, color="#f2f2f2", zorder=0)
        axes.set_xlabel(
            "gain over the student alone with its 95 % interval\n(linear where it is grey, logarithmic outside)"
        )
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    return _svg(figure)


def lines(runs: Sequence[Path]) -> str:
    """The metrics of runs over their steps, as SVG."""
    from kdcore.leaderboard import curves

    figure = _figure(height=4)
    axes = figure.subplots()
    for run in runs:
        for name, points in curves(run).items():
            axes.plot(*zip(*points, strict=True), marker=".", label=_literal(f"{run}: {name}"))
    axes.set_xlabel("step")
    axes.legend(fontsize=8)
    return _svg(figure)


def _literal(text: str) -> str:
    """Text in a picture as it is: without control characters, and dollars begin no formula."""
    return visible(text).replace("$", r"\$")


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8, height), layout="constrained")


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "kd"}):  # the same picture from the same numbers
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
