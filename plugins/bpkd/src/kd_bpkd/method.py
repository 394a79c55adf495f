"""The method: one stage of cross-entropy, auxiliary cross-entropy and distillation apart at contours and in bodies.

Source: Liu et al. 2024, "BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation", WACV
(arXiv 2306.08075). With the logits upsampled to the labels in the first two terms only,

    L = L_ce + 0.4 L_aux + lambda_edge L_edge + lambda_body L_body.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from kd_bpkd.losses import BPKD
from kd_bpkd.options import BPKDOptions
from kdcore import Distill, Method, Run, Stage
from kdcore.errors import DataError
from kdcore.losses import AuxiliaryLoss, TaskLoss, Weighted


class BPKDMethod(Method):
    """One stage, `distill`. The ablation is the student trained on the labels alone."""

    stage_names = ("distill",)
    ablation: Mapping[str, Any] = {"method.lambda_edge": 0, "method.lambda_body": 0}
    options: BPKDOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stage. Raises `DataError` where the data poses no segmentation."""
        task = run.data.task
        if task.kind != "segmentation":
            raise DataError(f"bpkd distils segmentation; the data poses a task of kind {task.kind!r}")
        yield Distill(
            run.student,
            [
                Weighted(TaskLoss(task), name="cross-entropy"),
                Weighted(AuxiliaryLoss(task), self.options.aux_weight, "auxiliary"),
                Weighted(BPKD(self.options), name="bpkd"),
            ],
            run.teacher,
        )
