"""The generic method `distill`, and the baselines as methods: cross-entropy plus one loss, with the usual weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from kd_classic import losses
from kd_classic.options import (
    ATMethodOptions,
    DISTMethodOptions,
    DKDMethodOptions,
    FitNetsMethodOptions,
    KDMethodOptions,
    KDOptions,
)
from kdcore import Distill, Loss, Method, Roles, Run, Stage
from kdcore.losses import Weighted

Stages = Generator[Stage, Any, None]


class WithLosses(Method):
    """The student trained on the recipe's `losses:` list, with any number of teachers (none, for a baseline)."""

    roles = Roles(teachers=None, losses=True)
    stage_names = ("distill",)

    def stages(self, run: Run) -> Stages:
        """One stage."""
        yield Distill(run.student, run.losses(), run.teachers())


class _Baseline(Method):
    """Cross-entropy plus one distillation loss. Its ablation is the student alone, on the same schedule."""

    stage_names: tuple[str, ...] = ("distill",)
    ablation: Mapping[str, Any] = {"method.weight": 0, "method.ce_weight": 1}
    name = ""

    def loss(self) -> Loss:
        """The distillation loss, with the method's options."""
        return getattr(losses, type(self).__name__)(self.options)  # type: ignore[no-any-return]

    def stages(self, run: Run) -> Stages:
        """One stage."""
        yield self.joint_stage(run)

    def joint_stage(self, run: Run) -> Distill:
        """Both losses together; without labels, where `ce_weight` is 0."""
        o = self.options
        terms = [Weighted(losses.CrossEntropy(), o.ce_weight, "cross-entropy")] if o.ce_weight else []
        terms.append(Weighted(self.loss(), o.weight, self.name, getattr(o, "warmup", 0.0)))
        return Distill(run.student, terms, run.teacher)


class KD(_Baseline):
    """Hinton et al. 2015."""

    name = "kd"
    options: KDMethodOptions


class DKD(_Baseline):
    """Zhao et al. 2022."""

    name = "dkd"
    options: DKDMethodOptions


class DIST(_Baseline):
    """Huang et al. 2022."""

    name = "dist"
    options: DISTMethodOptions


class AT(_Baseline):
    """Zagoruyko and Komodakis 2017."""

    name = "at"
    options: ATMethodOptions


class FitNets(_Baseline):
    """Romero et al. 2015: hints and task together, as in the benchmarks, or hints first and KD then, as in the paper.

    In the second form, the layers of the student above the hint learn nothing in the first stage.
    """

    name = "fitnets"
    options: FitNetsMethodOptions
    stage_names = ("hint", "distill")

    def stages(self, run: Run) -> Stages:
        """One stage, or the paper's two."""
        o = self.options
        if o.joint:
            yield self.joint_stage(run)
            return
        hint = Distill(run.student, [Weighted(self.loss(), o.weight, self.name)], run.teacher, name="hint")
        hint.find_unused_parameters = True
        yield hint
        terms = [Weighted(losses.CrossEntropy(), o.ce_weight, "cross-entropy"),
                 Weighted(losses.KD(KDOptions(temperature=o.temperature)), o.kd_weight, "kd")]  # fmt: skip
        yield Distill(run.student, terms, run.teacher)
