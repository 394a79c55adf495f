"""Draws the comparison table of a finished run as an SVG: `python docs/picture.py runs/quickstart docs/quickstart.svg`.

The rows, versions, seed and hardware are those of the run's `run.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LEFT, TOP, LINE, NAME, BARS = 860, 30, 74, 46, 150, 250
INK, GREY, COLOURS = "#1f2328", "#57606a", ("#6e7781", "#9a6700", "#1a7f37")


def draw(facts: Mapping[str, Any]) -> str:
    """The SVG of a run's facts: a bar of the first figure per row, and the other figures as text.

    Raises:
        SystemExit: if the run made no comparison table.
    """
    rows: Sequence[Mapping[str, Any]] = facts.get("rows") or []
    if not rows:
        raise SystemExit("this run has no comparison table")
    columns = list(rows[0])[1:]
    height = TOP + LINE * len(rows) + 44
    described = "; ".join(", ".join(f"{key}: {value}" for key, value in row.items()) for row in rows)
    body = [_text(LEFT + NAME, 46, columns[0], 600)]
    body += [_text(_right(i, columns), 46, name, 600, "end") for i, name in enumerate(columns[1:])]
    for number, row in enumerate(rows):
        body += _row(row, columns, TOP + LINE * number, COLOURS[number % len(COLOURS)])
    body.append(_text(LEFT, height - 20, _footer(facts), 400, colour=GREY, size=13))
    inside = "\n".join(body)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="15">\n<title>{escape(described)}</title>\n'
            f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#f6f8fa"/>\n{inside}\n</svg>\n')  # fmt: skip


def _row(row: Mapping[str, Any], columns: Sequence[str], y: int, colour: str) -> list[str]:
    name, figures = next(iter(row.values())), [str(row[column]) for column in columns]
    length = BARS * float(figures[0].split(" ")[0]) / 100
    bar = f'<rect x="{LEFT + NAME}" y="{y}" width="{length:.1f}" height="28" rx="4" fill="{colour}"/>'
    cells = [_text(_right(i, columns), y + 20, _number(row[c]), 400, "end") for i, c in enumerate(columns[1:])]
    return [
        _text(LEFT, y + 20, str(name), 600),
        bar,
        _text(LEFT + NAME + 10, y + 20, figures[0], 600, colour="#ffffff"),
        *cells,
    ]


def _right(column: int, columns: Sequence[str]) -> int:
    """The right edge of a column of text."""
    start = LEFT + NAME + BARS
    return start + (column + 1) * (WIDTH - LEFT - start) // (len(columns) - 1)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _footer(facts: Mapping[str, Any]) -> str:
    hardware, versions = facts["hardware"], facts["versions"]
    machine = f"{hardware['threads']} threads, {hardware['machine']} {hardware['device']}"
    software = f"kdcore {versions['kdcore']}, torch {versions['torch']}"
    return f"kd run {facts['method']}, seed {facts['seed']}; mean ± standard deviation; {machine}; {software}"


def _text(x: int, y: int, text: str, weight: int, anchor: str = "start", colour: str = INK, size: int = 15) -> str:
    look = f'font-weight="{weight}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"'
    return f'<text x="{x}" y="{y}" {look}>{escape(text)}</text>'


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    run, svg = map(Path, sys.argv[1:])
    svg.write_text(draw(json.loads((run / "run.json").read_text(encoding="utf-8"))), encoding="utf-8")
