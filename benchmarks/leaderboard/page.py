"""Writes `docs/leaderboard.md` and its pictures from finished benches: `page.py MNIST_CNN MNIST_VIT FASHION_CNN`.

Each is the folder of a `kd bench` on the recipe of that name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kd_cli import pages
from kd_cli.benching import describe
from kdcore.leaderboard import Standing

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
TITLES = {
    "mnist-cnn": "CNN to CNN, 8,000 digits",
    "mnist-vit": "Vision transformer to CNN, 8,000 digits",
    "fashion-cnn": "CNN to CNN, few shots: 720 images of clothes",
}


def section(name: str, folder: Path) -> str:
    """The Markdown of one bench; its picture is written beside the page."""
    saved = json.loads((folder / "leaderboard.json").read_text())
    board = [Standing(**standing) for standing in saved["standings"]]
    (DOCS / f"leaderboard-{name}.svg").write_text(pages.bars(board), encoding="utf-8")
    recipe = (HERE / f"{name}.yaml").read_text().split("\n", 1)[1]
    compared = [s for s in board if s.gain is not None]
    sure = [f"`{s.method}`" for s in compared if s.low is not None and s.low > 0]
    behind = [f"`{s.method}`" for s in compared if s.gain is not None and s.gain <= 0]
    parts = [
        f"## {TITLES[name]}",
        f"```yaml\n{recipe.strip()}\n```",
        table([describe(standing) for standing in board]),
        f"![gain of each method over the student alone](leaderboard-{name}.svg)",
        f"Better than the student alone beyond the interval: {', '.join(sure) or 'none'}.",
        f"Not better than the student alone on average: {', '.join(behind) or 'none'}.",
    ]
    return "\n\n".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(folders: list[str]) -> None:
    """Write the page."""
    intro = (HERE / "intro.md").read_text().strip()
    parts = [intro, *(section(name, Path(folder)) for name, folder in zip(TITLES, folders, strict=True))]
    (DOCS / "leaderboard.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
