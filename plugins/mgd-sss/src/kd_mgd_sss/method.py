"""The method: stage 1 makes two teachers, if they do not exist yet, and stage 2 distils both into the student.

Source: Qin, Wu et al. 2022, "Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic
Segmentation", ECCV (arXiv 2208.10169). With labelled images x, labels y, images u mixed of two unlabelled ones, and the
classes c that teachers give to pixels,

    L = CE(S(x), y) + sum_t CE(S(x), c_t(x)) + sum_t CE(S(u), c_t(u)) + lambda_image L_I(u) + lambda_region L_R(u),

where t is the deep and the wide teacher, L_I is `functional.gap_logit_l1` with the deep one, and L_R is
`functional.region_cosine_mse` with the wide one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from kd_mgd_sss.options import MGDSSSOptions
from kd_mgd_sss.stages import CrossPseudoSupervision, MultiGranularity
from kd_mgd_sss.streams import FIRST, streams
from kdcore import Method, Model, Roles, Run, Stage
from kdcore.errors import DataError, ModelError, RecipeError

TEACHERS = ("deep", "wide")


class MGDSSS(Method):
    """The stages: `cps-deep` and `cps-wide`, each left out for a teacher that is given trained, then `distill`.

    The ablation is the student trained on the labelled images alone; it needs no teachers and trains none.
    """

    roles = Roles(teachers=TEACHERS)
    stage_names = ("cps-deep", "cps-wide", "distill")
    ablation: Mapping[str, Any] = {"method.lambda_image": 0, "method.lambda_region": 0, "method.pixel_weight": 0,
                                   "method.labelled_pixel_weight": 0}  # fmt: skip
    cut: Mapping[str, Any] = {"method.stage1": "always"}
    options: MGDSSSOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages.

        Raises:
            DataError: if the data poses no segmentation, or no image is labelled, or all are.
            ModelError: if a teacher's signals stand in columns.
            RecipeError: if stage 1 is to train a module that was handed over.
        """
        task, o = run.data.task, self.options
        if task.kind != "segmentation":
            raise DataError(f"mgd-sss distils segmentation; the data poses a task of kind {task.kind!r}")
        drawn = streams(run.data, o, run.seed)
        teachers = {role: live(run, role) for role in TEACHERS} if o.distils else {}
        for role, teacher in teachers.items():
            if self.trains(run, role):
                branches = (teacher, run.variant(role))
                yield CrossPseudoSupervision(role, branches, drawn, o)
        batch_size = run.recipe.train_for("distill").batch_size
        images = min(batch_size, len(drawn[0][FIRST]))
        yield MultiGranularity(run.student, teachers, images, drawn, o)

    def trains(self, run: Run, role: str) -> bool:
        """Whether stage 1 trains this teacher. Raises `RecipeError` if it should, and cannot make a second branch."""
        spec, options = run.recipe.teachers.get(role), run.resolved.options.get(f"teachers.{role}")
        if spec is None and self.options.stage1 == "always":
            raise RecipeError(f"method.stage1=always trains a second model like the teacher {role!r}, which was handed "
                              "over as a module: train it before, or name it in a recipe")  # fmt: skip
        given = spec is None or spec.train is not None or bool(getattr(options, "checkpoint", None))
        return self.options.stage1 == "always" or (self.options.stage1 == "auto" and not given)


def live(run: Run, role: str) -> Model:
    """The teacher of a role. Raises `ModelError` where it cannot look at images that are mixed in each step."""
    model = run.model(role)
    if not isinstance(model, Model):
        raise ModelError(f"mgd-sss shows its teachers images that are mixed in each step; teachers.{role} is a "
                         f"{type(model).__name__}, which answers for the images of the data alone")  # fmt: skip
    return model
