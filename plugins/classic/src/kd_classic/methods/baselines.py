"""The generic method `distill`, and the baselines of one stage: cross-entropy plus one loss, with the usual weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from kd_classic import losses
from kdcore import Distill, Loss, Method, Roles, Run, Stage, stages
from kdcore.losses import Weighted

Stages = Generator[Stage, Any, None]


class WithLosses(Method):
    """The student trained on the recipe's `losses:` list, with any number of teachers (none, for a baseline)."""

    roles = Roles(teachers=None, losses=True)
    stage_names = ("distill",)

    def stages(self, run: Run) -> Stages:
        """One stage."""
        yield Distill(run.student, run.losses(), run.teachers())


class Supervised(Method):
    """The student on the labels alone: what distillation is compared with. Without a student, a recipe's teachers that
    are to be trained first are all that is trained."""

    roles = Roles(teachers=None, students=None)
    stage_names = ("supervised",)

    def stages(self, run: Run) -> Stages:
        """One stage."""
        if run.student_roles:
            yield stages.Supervised(run.student, run.data.task, name="supervised")


class Baseline(Method):
    """Cross-entropy plus one distillation loss, the class of the same name in `kd_classic.losses`.

    Its ablation is the student alone, on the same schedule.
    """

    stage_names: tuple[str, ...] = ("distill",)
    ablation: Mapping[str, Any] = {"method.weight": 0, "method.ce_weight": 1}

    def loss(self) -> Loss:
        """The distillation loss, with the method's options."""
        return getattr(losses, type(self).__name__)(self.options)  # type: ignore[no-any-return]

    def terms(self) -> Sequence[Weighted]:
        """Both losses; without labels, where `ce_weight` is 0."""
        o = self.options
        hard = [Weighted(losses.CrossEntropy(), o.ce_weight, "cross-entropy")] if o.ce_weight else []
        name = type(self).__name__.lower()
        return [*hard, Weighted(self.loss(), o.weight, name, getattr(o, "warmup", 0.0))]

    def stages(self, run: Run) -> Stages:
        """One stage."""
        yield Distill(run.student, self.terms(), run.teacher)


class KD(Baseline):
    """Hinton et al. 2015."""


class DKD(Baseline):
    """Zhao et al. 2022."""


class DIST(Baseline):
    """Huang et al. 2022."""


class AT(Baseline):
    """Zagoruyko and Komodakis 2017."""


class NST(Baseline):
    """Huang and Wang 2017."""


class VID(Baseline):
    """Ahn et al. 2019."""


class OFD(Baseline):
    """Heo et al. 2019."""


class ReviewKD(Baseline):
    """Chen et al. 2021."""


class MGD(Baseline):
    """Yang et al. 2022."""


class SP(Baseline):
    """Tung and Mori 2019."""


class RKD(Baseline):
    """Park et al. 2019."""


class PKT(Baseline):
    """Passalis and Tefas 2018."""


class CRD(Baseline):
    """Tian et al. 2020."""


class CWD(Baseline):
    """Shu et al. 2021."""


class MultiTeacher(Baseline):
    """KD from several teachers, weighted per teacher or per sample."""

    roles = Roles(teachers=None)

    def stages(self, run: Run) -> Stages:
        """One stage."""
        yield Distill(run.student, self.terms(), run.teachers())


class Whole(Method):
    """A single loss that is the whole objective, the class of the same name in `kd_classic.losses`."""

    stage_names = ("distill",)

    def stages(self, run: Run) -> Stages:
        """One stage."""
        loss = getattr(losses, type(self).__name__)(self.options)
        yield Distill(run.student, [Weighted(loss, name=type(self).__name__.lower())], run.teachers())


class WSLD(Whole):
    """Zhou et al. 2021."""

    ablation = {"method.alpha": 0}


class DeiT(Whole):
    """Touvron et al. 2021."""

    ablation = {"method.alpha": 0}


class BYOT(Whole):
    """Zhang et al. 2019: a student that needs no teacher."""

    roles = Roles(teachers=())
    ablation = {"method.alpha": 0, "method.beta": 0}
