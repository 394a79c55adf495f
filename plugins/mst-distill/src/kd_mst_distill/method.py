"""The method: train both teachers and the student together, specialise the teachers, distil from a mixture of them.

Source: Li et al. 2025, "MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation"
(arXiv 2507.07015).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from kd_mst_distill.checks import TEACHERS, check_models, masked_layers
from kd_mst_distill.options import MSTDistillOptions
from kd_mst_distill.stages import AdaptMasks, CoTrain, DistillRouted
from kdcore import Method, Roles, Run, Stage


class MSTDistill(Method):
    """Three stages. `teacher` reads both modalities, `cross` the one that `student` does not.

    The ablation is the same student without the specialised teachers.
    """

    roles = Roles(teachers=TEACHERS, splits=("train", "val"))
    stage_names = ("co_train", "adapt_masks", "distill")
    ablation: Mapping[str, Any] = {"method.w_kl": 0, "method.w_lb": 0}
    cut: Mapping[str, Any] = {"stages.co_train.train.steps": 6, "stages.adapt_masks.train.steps": 6}
    options: MSTDistillOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `DataError` or `ModelError` before the first, where models, layers and data do not fit."""
        check_models(run)
        layers = masked_layers(run, self.options)
        yield CoTrain(run, self.options)
        adapted = yield AdaptMasks(run, self.options, layers)
        distilled = yield DistillRouted(run, self.options, adapted.places, list(adapted.best.kept))
        run.student.module.load_state_dict(distilled.best.kept[0].state_dict())
        for role in TEACHERS:
            run.add_row(role, run.model(role))
        run.add_row("student", run.student)
