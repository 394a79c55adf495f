"""Writes `docs/benchmarks.md` from the results: `python benchmarks/page.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import measure

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
TEXTS = Path(__file__).parent / "page.md"
HEAD = "| case | unit | side | median | beside | median | ratio | quartiles |\n|---|---|---|---|---|---|---|---|"


def main() -> None:
    """The prose of `page.md`, where a line `@area` is followed by that area's machine and table."""
    lines = []
    for line in TEXTS.read_text().splitlines():
        lines.append(section(line.removeprefix("@")) if line.startswith("@") else line)
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"{PAGE.name}: {len(lines)} lines and tables")


def section(area: str) -> str:
    """What was run, where, and the table; or that there are no results yet."""
    path = measure.RESULTS / f"{area}.json"
    if not path.exists():
        return f"*`python benchmarks/{area}.py` has not been run.*"
    found = json.loads(path.read_text())
    rows = [cells for row in found["rows"] for cells in table(row)]
    alone = [row for row in found["rows"] if not row["ratios"]]
    return "\n".join([described(found), "", HEAD, *rows, *listed(alone)])


def listed(rows: list[dict[str, Any]]) -> list[str]:
    """A table of what is beside nothing: medians and facts."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row["facts"]))
    head = ["case", rows[0]["unit"], *names]
    lines = ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["case"], *(f"{value:.4g}" for value in row["medians"].values()),
                 *(_text(row["facts"].get(name, "")) for name in names)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def described(found: dict[str, Any]) -> str:
    """One sentence on command, date, machine and versions."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    return (f"`{found['command']}`, {found['date']}, {threads}, {machine['cpu']} with {machine['cores']} cores and "
            f"{machine['memory_gb']:.0f} GB, load {machine['load']:.1f} at the end; {versions}.")  # fmt: skip


def table(row: dict[str, Any]) -> list[str]:
    """One line for every ratio; a row that ran once says so."""
    once = "" if row["rounds"] > 1 else " (once)"
    lines = []
    for pair, (low, middle, high) in row["ratios"].items():
        side, beside = pair.split(" / ")
        medians = [f"{row['medians'][name]:.4g}" for name in (side, beside)]
        cells = [row["case"] + once, row["unit"], side, medians[0], beside, medians[1], f"**{middle:.3f}**",
                 f"{low:.3f} to {high:.3f}" if row["rounds"] > 1 else ""]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
