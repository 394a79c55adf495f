"""The method: one stage of cross-entropy and distillation of maps and patch embeddings.

Source: Liu et al. 2024, "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation", IEEE T-ITS
(arXiv 2202.13393). With student maps g after cross selective fusion, teacher maps F, aligned embeddings a of the
student and embeddings E of the teacher,

    L = L_ce + hcl(g, F) + sum_i w_i MSE(a_i, E_i).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from kd_transkd.losses import StridedCrossEntropy, TransKD
from kd_transkd.options import TransKDOptions
from kdcore import Distill, Method, Run, Stage
from kdcore.errors import DataError, RecipeError
from kdcore.losses import Weighted


class TransKDMethod(Method):
    """One stage, `distill`. The ablation is the student trained on the labels alone."""

    stage_names = ("distill",)
    ablation: Mapping[str, Any] = {"method.hcl_weight": 0, "method.embed": 0}
    options: TransKDOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stage.

        Raises:
            DataError: where the data poses no segmentation.
            RecipeError: if there are not as many class weights as classes.
        """
        task, weights = run.data.task, self.options.class_weights
        if task.kind != "segmentation":
            raise DataError(f"transkd distils segmentation; the data poses a task of kind {task.kind!r}")
        if weights is not None and len(weights) != task.class_count:
            raise RecipeError(f"method.class_weights: {len(weights)} weights, but the data has {task.class_count} "
                              "classes")  # fmt: skip
        yield Distill(
            run.student,
            [
                Weighted(StridedCrossEntropy(weights), name="cross-entropy"),
                Weighted(TransKD(self.options), name="transkd"),
            ],
            run.teacher,
        )
