"""The two stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kd_lad.losses import Auxiliary, CrossEntropy, LogitDistance
from kd_lad.noising import CHANNEL, LabelNoising
from kd_lad.options import LADOptions
from kd_lad.stem import LabelPlane
from kdcore import Distill, Model, Outputs, Run
from kdcore.data import TARGET_KEYS
from kdcore.losses import Weighted
from kdcore.models import Batch

TEACHER_STAGE, STUDENT_STAGE = "train_teacher_with_labels", "distil"
Predict = Callable[[Outputs, Batch], Outputs]


def noising(options: LADOptions, classes: int, stage: Literal["teacher", "student"]) -> LabelNoising:
    """How labels become a channel while the teacher, or the student, is trained."""
    training = stage == "teacher"
    return LabelNoising(
        classes,
        options.codes or ("random" if training else "fixed"),
        options.code_std,
        options.noise_std_teacher if training else options.noise_std_student,
        options.scale,
    )


class TrainTeacher(Distill):
    """Dual-path consistency: in each step the labels are noised twice, independently, and

        L = sum over both paths i of CE(o_i, y) + 0.4 CE(aux_i, y) + 5 D(o_i, sg(o_j)),  j the other path.

    A batch norm thus updates its statistics twice in a step.

    Args:
        run: the run.
        teacher: a model that reads the label channel; it is trained.
        plane: the plane that reads it, where the method made it.
        options: of the method.
        predict: turns outputs into what is measured. In evaluations during training the teacher sees the labels: what
            they give is no result of a model that could be used.
    """

    def __init__(
        self, run: Run, teacher: Model, plane: LabelPlane | None, options: LADOptions, predict: Predict
    ) -> None:
        o, classes = options, run.data.task.class_count
        tap, key = (o.teacher_aux_tap, "teacher_aux_tap") if o.teacher_aux_tap else (o.aux_tap, "aux_tap")
        losses = [
            Weighted(CrossEntropy(o.align_corners), name="cross-entropy"),
            Weighted(Auxiliary(tap, key, classes, o.align_corners), o.aux_weight_teacher, "auxiliary"),
            Weighted(
                LogitDistance(o.distance, o.temperature, o.align_corners, "paths"), o.consistency_weight, "consistency"
            ),
        ]
        super().__init__(teacher, [w for w in losses if w.weight], name=TEACHER_STAGE, predict=predict)
        self.exports = {"teacher": plane.export() if plane else teacher}
        self.noising, self.seed_of_noise = noising(o, classes, "teacher"), run.seed

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The weighted terms, summed over both paths."""
        step = self.progress.step
        one, two = (self.student(self.noising.seen(batch, self.seed_of_noise, self.name, path, step))
                    for path in (1, 2))  # fmt: skip
        terms = self.terms(one, {"teacher": two.detach()}, batch)
        others = self.terms(two, {"teacher": one.detach()}, batch)
        return {name: value + others[name] for name, value in terms.items()}

    def prepare(self, batch: Batch) -> None:
        """As in every distillation, with labels in sight."""
        super().prepare(self.noising.seen(batch, self.seed_of_noise, self.name, "prepare"))

    def evaluate(self, batch: Batch) -> Outputs:
        """The outputs with labels in sight."""
        return super().evaluate(self.noising.seen(batch, self.seed_of_noise, self.name, "evaluate"))


class DistilLabels(Distill):
    """The student, which sees the image alone, and the frozen teacher, which also sees its noised labels:

        L = CE(o_s, y) + 0.4 CE(aux_s, y) + 3 D(o_s, o_t).

    Args:
        run: the run.
        teacher: a model that reads the label channel; `None` for the student alone.
        plane: the student's plane of zeros, if it has one.
        options: of the method.
        predict: turns the student's outputs into those that are measured.
    """

    def __init__(
        self, run: Run, teacher: Model | None, plane: LabelPlane | None, options: LADOptions, predict: Predict
    ) -> None:
        o, classes = options, run.data.task.class_count
        losses = [
            Weighted(CrossEntropy(o.align_corners), name="cross-entropy"),
            Weighted(Auxiliary(o.aux_tap, "aux_tap", classes, o.align_corners), o.aux_weight_student, "auxiliary"),
        ]
        if teacher:
            losses.append(Weighted(LogitDistance(o.distance, o.temperature, o.align_corners), o.kd_weight, "lad"))
        super().__init__(run.student, [w for w in losses if w.weight], teacher, name=STUDENT_STAGE, predict=predict)
        if plane:
            self.exports = {"student": plane.export()}
        self.noising, self.seed_of_noise = noising(o, classes, "student"), run.seed

    def outputs(self, batch: Batch) -> tuple[Outputs, dict[str, Outputs]]:
        """What the teacher says with the labels in sight, and the student without them."""
        theirs: dict[str, Outputs] = {}
        if self.teachers:
            seen = self.noising.seen(batch, self.seed_of_noise, self.name, self.progress.step)
            with torch.no_grad():
                theirs = {role: teacher(seen) for role, teacher in self.teachers.items()}
        ours: Outputs = self.student(without_labels(batch))
        return ours, theirs

    def prepare(self, batch: Batch) -> None:
        """As in every distillation; the teacher sees an empty channel."""
        super().prepare({**batch, CHANNEL: empty_channel(batch)})


def without_labels(batch: Batch) -> Batch:
    """The batch without targets and label channel."""
    return {key: value for key, value in batch.items() if key not in (*TARGET_KEYS, CHANNEL)}


def empty_channel(batch: Batch) -> Tensor:
    """A label channel of zeros, `[B, 1, H, W]`."""
    return torch.zeros_like(batch["mask"], dtype=torch.float32).unsqueeze(1)


def with_channel(teacher: Model, channel: Callable[[Batch], Tensor]) -> Model:
    """A teacher that finds this channel in every batch."""
    return Model(teacher, lambda model, batch: model({**batch, CHANNEL: channel(batch)}), labels=teacher.labels)
