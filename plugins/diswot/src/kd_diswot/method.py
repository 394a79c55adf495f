"""The method: search the student's architecture without training, then distil the winner.

Source: Dong, Li and Wei 2023, "DisWOT: Student Architecture Search for Distillation WithOut Training" (CVPR 2023,
arXiv 2303.15678).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from typing import Any

from kd_classic.losses import KD, CrossEntropy
from kd_classic.options import KDOptions
from kd_diswot.losses import Relation, Semantic
from kd_diswot.options import DisWOTOptions, LayersOptions
from kd_diswot.search import Search, best
from kd_diswot.space import SearchSpace
from kdcore import Distill, Method, Roles, Run, Stage
from kdcore.errors import DataError, RecipeError
from kdcore.losses import Weighted

logger = logging.getLogger(__name__)


class DisWOT(Method):
    """Two stages: `search`, then `distill`. The ablation takes the first architecture drawn."""

    roles = Roles()
    stage_names = ("search", "distill")
    ablation: Mapping[str, Any] = {"method.budget": 1}
    cut: Mapping[str, Any] = {"method.budget": 5}
    options: DisWOTOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `DataError` where samples do not have one class each, `RecipeError` where the student is
        no search space, or one with a single architecture."""
        if run.data.task.kind != "classification":
            raise DataError(f"diswot searches classifiers; this is a {run.data.task.kind!r} task")
        archive = yield Search(run, student_space(run), self.options)
        arch = best(archive, self.options)
        logger.info("the student's architecture is %s, of %d that were scored", arch, len(archive))
        run.adopt("student", run.variant("student", arch=arch))
        stage = Distill(run.student, self.losses(), run.teacher)
        stage.find_unused_parameters = True  # in a cell, an edge behind `none` leads nowhere
        yield stage

    def losses(self) -> list[Weighted]:
        """Labels, soft targets and the two similarities, those with a weight."""
        o = self.options
        layers = LayersOptions(student_layer=o.student_layer, teacher_layer=o.teacher_layer)
        every = [Weighted(CrossEntropy(), o.ce_weight, "cross-entropy"),
                 Weighted(KD(KDOptions(temperature=o.temperature)), o.kd_weight, "kd"),
                 Weighted(Semantic(layers), o.semantic_weight, "semantic"),
                 Weighted(Relation(layers), o.relation_weight, "relation")]  # fmt: skip
        return [item for item in every if item.weight]


def student_space(run: Run) -> SearchSpace:
    """The search space that the recipe's student is. Raises `RecipeError` if it is none, or leaves no choice."""
    options = run.resolved.options.get("students.student")
    use = run.recipe.students["student"].use if "student" in run.recipe.students else "the one given"
    make = getattr(options, "space", None)
    if make is None or "arch" not in type(options).model_fields:
        raise RecipeError(f"student.use: {use} is no search space; students that are: "
                          "kd list student --tag search-space")  # fmt: skip
    space: SearchSpace = make()
    if space.size < 2:
        raise RecipeError(f"student: the search space of {use} holds one architecture, {next(iter(space))}: there is "
                          "nothing to search; give it more choices, or distil that one with `kd run kd`")  # fmt: skip
    return space
