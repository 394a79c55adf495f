"""Methods in which models teach each other one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd_classic import losses
from kd_classic.methods.baselines import Stages
from kdcore import Distill, Method, Model, Outputs, Roles, Run
from kdcore.losses import Weighted
from kdcore.models import Batch, Source


class TAKD(Method):
    """Mirzadeh et al. 2020: every student of the recipe, in its order and `student` last, learns from the one before;
    the first learns from the teacher.

    An arrow's losses are cross-entropy and KD, or those that the recipe lists.
    """

    roles = Roles(losses=None)
    ablation = {"method.weight": 0, "method.ce_weight": 1}

    def stages(self, run: Run) -> Stages:
        """A stage per student, named after its role."""
        teacher: Source = run.teacher
        for role in sorted(run.student_roles, key=lambda role: role == "student"):
            student = run.model(role)
            stage = Distill(student, run.losses() or self._terms(), teacher, name=role)
            stage.exports = {role: student}
            yield stage
            teacher = student

    def _terms(self) -> list[Weighted]:
        o = self.options
        return [Weighted(losses.CrossEntropy(), o.ce_weight, "cross-entropy"),
                Weighted(losses.KD(o), o.weight, "kd")]  # fmt: skip


class BornAgain(Method):
    """Furlanello et al. 2018, "Born-Again Neural Networks": generations of one architecture.

    The first learns from the teacher (who has the student's architecture, or another), each later one from the one
    before it; the last is the student. The table of the run holds every generation, and the ensemble of all.
    """

    ablation = {"method.weight": 0, "method.ce_weight": 1}

    def stages(self, run: Run) -> Stages:
        """A stage per generation."""
        o = self.options
        teacher: Source = run.teacher
        generations: dict[str, Model] = {}
        for number in range(1, o.generations + 1):
            name = f"generation-{number}"
            student = run.student if number == o.generations else run.model("student", key=name)
            terms = [Weighted(losses.CrossEntropy(), o.ce_weight, "cross-entropy"),
                     Weighted(losses.KD(o), o.weight, "kd")]  # fmt: skip
            yield Distill(student, terms, teacher, name=name)
            generations[name] = student
            teacher = student
        for name, model in generations.items():
            run.add_row(name, model)
        run.add_row("ensemble", Model(Ensemble(generations.values()), Ensemble.forward))


class Ensemble(nn.Module):
    """Models that answer together: the mean of their probabilities (Furlanello et al. 2018, section 3.1)."""

    def __init__(self, models: Iterable[Model]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, batch: Batch) -> Outputs:
        """The logarithm of the mean probability as logits."""
        outputs = [model(batch) for model in self.models]
        probs: Tensor = torch.stack([o.need("logits").softmax(dim=1) for o in outputs]).mean(0)
        return replace(outputs[0], logits=probs.log())
