"""The method: one stage of cross-entropy and distillation through masks that change with the student.

Source: Lan and Tian 2025, "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation", ICCV
(arXiv 2503.06307). With the masked errors and the diversity of the masks summed over the levels,

    L = L_ce + 0.4 L_aux + alpha (L_c + L_s) + lambda L_div.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_acam_kd.losses import ACAM
from kd_acam_kd.options import ACAMOptions
from kdcore import Distill, Method, Run, Stage
from kdcore.errors import DataError
from kdcore.losses import AuxiliaryLoss, TaskLoss, Weighted


class ACAMStage(Distill):
    """The distillation, which logs the means of the masks beside the terms: near zero, nothing is distilled."""

    def __init__(self, run: Run, acam: ACAM, options: ACAMOptions) -> None:
        task = run.data.task
        super().__init__(
            run.student,
            [
                Weighted(TaskLoss(task), name="cross-entropy"),
                Weighted(AuxiliaryLoss(task), options.aux_weight, "auxiliary"),
                Weighted(acam, name="acam-kd"),
            ],
            run.teacher,
        )
        self.run = run
        self.log_every = run.recipe.train_for(self.name, self.overrides).log_every

    def after_step(self) -> None:
        """Log the means of the masks wherever the terms are logged."""
        step = self.progress.step + 1
        if step % self.log_every and step < self.total_steps:
            return
        found: dict[str, Tensor] = self.losses["acam-kd"].mask_means  # type: ignore[assignment]
        means = self.run.accelerator.reduce(torch.stack([*found.values()]), "mean").tolist()
        logged = {f"mask/{kind}": mean for kind, mean in zip(found, means, strict=True)}
        self.run.log({"stage": self.name, "step": step, "metrics": logged})


class ACAMMethod(Method):
    """One stage, `distill`. The ablation is the student trained on the labels alone."""

    stage_names = ("distill",)
    ablation: Mapping[str, Any] = {"method.alpha": 0, "method.lambda_div": 0}
    options: ACAMOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stage. Raises `DataError` where the data poses no segmentation."""
        kind = run.data.task.kind
        if kind != "segmentation":
            raise DataError(f"the method acam-kd trains segmenters; the data poses a task of kind {kind!r}. Its loss "
                            "takes feature maps of any task: `method: distill` with acam-kd among `losses:`, and taps "
                            "in its `levels`")  # fmt: skip
        yield ACAMStage(run, ACAM(self.options), self.options)
