"""How a run grows with what it is given: `python benchmarks/growth.py [--rounds 3] [--only teachers]`.

Time of a step and peak memory of a run with 1 to 8 teachers, 1 to 8 losses, 0 to 32 taps on teacher and student, and
1,000 to 1,000,000 rows of data; and the time of `kd list` with 0 to 80 further plugins, each a generated distribution
in a folder on PYTHONPATH. The sizes of a row take turns, each in a process of its own; ratios are to the first size.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loops
import measure
import torch

import kdcore
from kd_demo.columns import Columns
from kd_demo.models import cnn
from kd_demo.options import CNNOptions
from kdcore import DataModule, Model, Task

STEPS, BATCH = 30, 64
COUNTS = {
    "teachers": (1, 2, 4, 8),
    "losses": (1, 2, 4, 8),
    "taps": (0, 8, 16, 32),
    "rows": (10**3, 10**4, 10**5, 10**6),
}
PLUGINS = (0, 10, 20, 40, 80)
PLUGIN = '''"""A generated plugin."""
from kdcore.components import Component
from kdcore.hookspecs import hookimpl


@hookimpl
def kd_register_losses():
    return [Component("loss", "made-{i}", "made_{i}:Loss", summary="generated")]
'''


def data(rows: int = 2048) -> DataModule:
    """Random images of 8x8 with labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(rows, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (rows,), generator=generator)
    return DataModule({"train": Columns(image=images, label=labels)}, Task("classification", num_classes=10,
                                                                            image=(1, 8, 8)))  # fmt: skip


def network(given: DataModule, width: int, depth: int = 1) -> Model:
    return cnn(CNNOptions(width=width, depth=depth), given.task)


def run(kind: str, count: int) -> dict[str, float]:
    """Seconds per step and bytes of a run that has so many of something."""
    made = data(count if kind == "rows" else 2048)
    depth = 11 if kind == "taps" else 1
    teachers = {f"t{i}": network(made, 16, depth) for i in range(count if kind == "teachers" else 1)}
    student = network(made, 8, depth)
    losses = [{"use": "kd", "teacher": role} for role in teachers]
    losses *= count if kind == "losses" else 1
    if kind == "taps" and count:
        blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(depth)]
        for model in (*teachers.values(), student):
            model.tap(*blocks[:count])
    before = measure.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        train = {"steps": STEPS, "batch_size": BATCH, "save_every": STEPS + 1, "eval_every": STEPS + 1,
                 "optimizer": {"name": "adamw", "lr": loops.LR}}  # fmt: skip
        result = kdcore.distill(teachers, student, made, "distill", losses=losses, train=train,
                                run_dir=Path(folder) / "run")  # fmt: skip
        timing = json.loads((result.path / "run.json").read_text())["timings"]["distill"]
    return {"seconds": timing["seconds"] / timing["steps"], "bytes": measure.peak() - before}


def grow(kind: str, rounds: int) -> list[measure.Row]:
    """Both numbers at every size."""
    counts = COUNTS[kind]
    sides = {f"{count:,}": functools.partial(measure.forked, run, kind, count) for count in counts}
    found = measure.in_turn(sides, rounds)
    rows = []
    for key, unit, factor in (("seconds", "ms per step", 1e3), ("bytes", "MB above the models and data", 1e-6)):
        values = {name: [factor * x[key] for x in those] for name, those in found.items()}
        rows.append(measure.row(kind, unit, values, next(iter(values))))
        measure.show(rows[-1])
    return rows


def write_plugin(site: Path, i: int) -> None:
    """A distribution with one entry point and one module, as an installer leaves it."""
    (site / f"made_{i}.py").write_text(PLUGIN.format(i=i))
    info = site / f"made_{i}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made-{i}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kd]\nmade-{i} = made_{i}\n")


def listing(site: Path, count: int) -> float:
    """Seconds of `kd list` with a folder of further plugins, all of which it shows."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    start = time.perf_counter()
    done = subprocess.run([Path(sys.executable).with_name("kd"), "list", "loss", "--json"], env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    seconds = time.perf_counter() - start
    if done.stdout.count("made_") + done.stdout.count("made-") < count:
        raise SystemExit(f"of {count} generated plugins, not all are listed:\n{done.stdout[-500:]}{done.stderr[-500:]}")
    return seconds


def plugins(rounds: int) -> list[measure.Row]:
    """`kd list` over the number of plugins installed beside the project's own."""
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Callable[[], Any]] = {}
        for count in PLUGINS:
            site = Path(folder) / str(count)
            site.mkdir()
            for i in range(count):
                write_plugin(site, i)
            sides[str(count)] = functools.partial(listing, site, count)
        found = measure.in_turn(sides, 3 * rounds)
    made = measure.row("plugins: kd list", "s", found, "0")
    measure.show(made)
    return [made]


def measured(given: argparse.Namespace) -> list[measure.Row]:
    """All rows that are asked for."""
    rows = []
    for kind in COUNTS:
        if given.only in kind:
            rows += grow(kind, given.rounds)
    return rows + (plugins(given.rounds) if given.only in "plugins" else [])


def main() -> None:
    given = measure.begin(measure.parser(__doc__, rounds=3))
    measure.write("growth", measured(given), given)


if __name__ == "__main__":
    main()
