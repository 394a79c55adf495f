"""The method `quickstart`: a student alone and the same student distilled, over several seeds, in one table."""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from kd_demo.options import QuickstartOptions
from kdcore import Distill, Method, Model, Roles, Run, Stage
from kdcore.stages import Supervised


class Quickstart(Method):
    """Trains every pair from the same weights on the same batches, so that only the teacher makes the difference.

    `train:` on the teacher makes the teacher first. The first distilled student is the run's student.
    """

    roles = Roles(splits=("train", "test"), losses=True)
    options: QuickstartOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """Two stages per seed: `alone-N` and `distilled-N`."""
        split = run.recipe.eval.on[-1]
        scores: dict[str, list[float]] = {"student alone": [], "student distilled": []}
        for number in range(self.options.seeds):
            alone = run.model("student", key=f"student-{number}")
            distilled = copy.deepcopy(alone)
            if number == 0:
                run.adopt("student", distilled)
            pair: list[tuple[str, Distill]] = [
                ("student alone", Supervised(alone, run.data.task, name=f"alone-{number}")),
                ("student distilled", Distill(distilled, run.losses(), run.teachers(), name=f"distilled-{number}")),
            ]
            for name, stage in pair:
                stage.seed = run.seed + number
                stage = yield stage
                scores[name].append(first(run.evaluate(stage, split)))
        teacher = Distill(run.teacher, [], name="measure")
        run.rows = [
            row(run, "teacher", run.teacher, [first(run.evaluate(teacher, split))]),
            *(row(run, name, run.student, values) for name, values in scores.items()),
        ]


def row(run: Run, name: str, model: Model, scores: list[float]) -> dict[str, Any]:
    """A line of the table: the metric in percent (mean ± standard deviation), and what the model costs."""
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    cost = model.describe(run.data.sample("train", 1), repeats=30)
    return {
        "model": name,
        f"{run.metric_names[0]} %": f"{100 * statistics.mean(scores):.1f}{spread}",
        "parameters": int(cost["parameters"]),
        "MFLOPs": round(cost["flops"] / 1e6, 2),
        "latency ms": round(cost["latency_ms"], 2),
        "file kB": round(file_size(model, run.path) / 1e3, 1),
    }


def file_size(model: Model, where: Path) -> int:
    """Bytes of a model as it is saved."""

    with tempfile.TemporaryDirectory(dir=where) as folder:
        model.save(Path(folder))
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def first(metrics: dict[str, float]) -> float:
    """The metric that comparisons use."""
    return next(iter(metrics.values()))
