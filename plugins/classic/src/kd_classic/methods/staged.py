"""Methods of two stages on one student."""

from __future__ import annotations

from kd_classic import losses
from kd_classic.methods.baselines import Baseline, Stages
from kd_classic.options import KDOptions
from kdcore import Distill, Method, Roles, Run
from kdcore.losses import Weighted
from kdcore.stages import Supervised


class FitNets(Baseline):
    """Romero et al. 2015: hints and task together, as in the benchmarks, or hints first and KD then, as in the paper.

    In the second form, the layers of the student above the hint learn nothing in the first stage.
    """

    stage_names = ("hint", "distill")

    def stages(self, run: Run) -> Stages:
        """One stage, or the paper's two."""
        o = self.options
        if o.joint:
            yield Distill(run.student, self.terms(), run.teacher)
            return
        hint = Distill(run.student, [Weighted(self.loss(), o.weight, "fitnets")], run.teacher, name="hint")
        hint.find_unused_parameters = True
        yield hint
        terms = [Weighted(losses.CrossEntropy(), o.ce_weight, "cross-entropy"),
                 Weighted(losses.KD(KDOptions(temperature=o.temperature)), o.kd_weight, "kd")]  # fmt: skip
        yield Distill(run.student, terms, run.teacher)


class AB(Method):
    """Heo et al. 2019: the student's trunk learns the teacher's activation boundaries, then the task alone."""

    stage_names = ("boundaries", "distill")
    ablation = {"method.weight": 0}

    def stages(self, run: Run) -> Stages:
        """The paper's two; the first is left out where its weight is 0."""
        o = self.options
        if o.weight:
            first = Distill(run.student, [Weighted(losses.AB(o), o.weight, "ab")], run.teacher, name="boundaries")
            first.find_unused_parameters = True  # the classifier
            yield first
        yield Distill(run.student, [Weighted(losses.CrossEntropy(), name="cross-entropy")])


class TfKD(Method):
    """Yuan et al. 2020: distillation without a teacher, from a made-up one or from the student trained before."""

    roles = Roles(teachers=())
    stage_names = ("teacher", "distill")
    ablation = {"method.alpha": 0}

    def stages(self, run: Run) -> Stages:
        """One stage, or the two of self-training."""
        o = self.options
        if o.variant == "reg":
            yield Distill(run.student, [Weighted(losses.TfKDReg(o), name="tfkd")])
            return
        earlier = run.model("student", key="teacher")
        yield Supervised(earlier, run.data.task, name="teacher", role="teacher")
        soft = losses.KD(KDOptions(temperature=o.temperature, reduction="mean"))
        terms = [Weighted(losses.CrossEntropy(), 1 - o.alpha, "cross-entropy"),
                 Weighted(soft, o.alpha * o.multiplier, "kd")]  # fmt: skip
        yield Distill(run.student, terms, earlier)
