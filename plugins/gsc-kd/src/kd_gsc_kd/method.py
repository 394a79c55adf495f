"""The method: one stage in which a CNN and a vision transformer learn from the labels and from each other.

Source: Zhu et al. 2023, "A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for
Semantic Segmentation", ICCV (arXiv 2307.12574).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from kd_gsc_kd.co_train import ROLES, CoTrain
from kd_gsc_kd.options import GSCKDOptions
from kdcore import Method, Roles, Run, Stage
from kdcore.errors import DataError, RecipeError
from kdcore.metrics import higher_is_better


class GSCKD(Method):
    """One stage, `co_train`. Both students are saved and measured; the one that the recipe names first stands for the
    run. The ablation is both trained alone."""

    roles = Roles(teachers=(), students=ROLES)
    stage_names = ("co_train",)
    ablation: Mapping[str, Any] = {"method.hfd": "off", "method.weights.region": 0, "method.weights.pixel": 0}
    options: GSCKDOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stage.

        Raises:
            DataError: where the data poses no segmentation.
            RecipeError: if the recipe names further students.
        """
        if run.data.task.kind != "segmentation":
            raise DataError(f"gsc-kd trains segmenters; the data poses a task of kind {run.data.task.kind!r}")
        if others := [role for role in run.student_roles if role not in ROLES]:
            raise RecipeError(f"students.{others[0]}: gsc-kd trains two students, `cnn` and `vit`, and no other")
        yield CoTrain(run, self.options)
        for role in ROLES:
            run.add_row(role, run.model(role))
            report(run, role)


def report(run: Run, role: str) -> None:
    """Add the metrics of the last row, which is that of a student, to the run's, as `split/metric-role`."""
    for name, value in run.rows[-1].items():
        if name != "model":
            metric = name.split("/")[1]
            run.add_metric(f"{name}-{role}", value, higher_is_better(run.data.task, metric))
