"""The method: a teacher is trained with noised labels beside the image, then distilled into a student without them.

Source: Qiu et al. 2024, "Make a Strong Teacher with Label Assistance: A Novel Knowledge Distillation Approach for
Semantic Segmentation", ECCV (arXiv 2407.13254), with the weights of the authors' script.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from kd_lad.functional import resized
from kd_lad.options import LADOptions
from kd_lad.stages import (
    STUDENT_STAGE,
    TEACHER_STAGE,
    DistilLabels,
    TrainTeacher,
    empty_channel,
    noising,
    with_channel,
)
from kd_lad.stem import WEIGHTS, LabelPlane, reads_labels
from kdcore import Method, Model, Outputs, Roles, Run, Stage
from kdcore.api import student_folder
from kdcore.errors import DataError, ModelError
from kdcore.models import Batch


class LAD(Method):
    """Two stages. Without a teacher in the recipe, it is one more model of the student's kind.

    The ablation is the student trained on the labels alone.
    """

    roles = Roles(teachers=())
    stage_names = (TEACHER_STAGE, STUDENT_STAGE)
    ablation: Mapping[str, Any] = {"method.kd_weight": 0}
    options: LADOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages, then rows for the teacher with and without labels, and the student.

        Raises:
            DataError, ModelError: where data or models do not fit, before anything is trained.
        """
        o = self.options
        channels = image_channels(run)
        teacher: Model | None = None
        if o.kd_weight:
            teacher, plane = self.teacher(run, channels)
            if o.train_teacher:
                yield TrainTeacher(run, teacher, plane, o, self.predict)
        zeros = LabelPlane(run.student, channels, o.plane_std, o.stem) if o.student_input == "zero_channel" else None
        yield DistilLabels(run, teacher, zeros, o, self.predict)
        if zeros:
            zeros.remove()
        if teacher:
            self.add_rows(run, teacher)

    def teacher(self, run: Run, channels: int) -> tuple[Model, LabelPlane | None]:
        """A model that reads the label channel, and the plane that it does so with, where it is not its own.

        Raises:
            ModelError: if it is no live model, has no convolution to widen, or is not to be trained and does not read
                labels yet.
        """
        named = "teacher" in {**run.recipe.teachers, **run.given.get("teachers", {})}
        found = run.model("teacher") if named else run.model("student", key="teacher")
        if not isinstance(found, Model):
            raise ModelError(f"teachers.teacher: a {type(found).__name__} does not see labels; lad needs a live model")
        teacher = copy.deepcopy(found)  # what was handed over stays as it is
        batch = run.data.sample("train")
        plane = None
        if not reads_labels(teacher, batch):
            plane = LabelPlane(teacher, channels, self.options.plane_std, self.options.stem)
            options = run.resolved.options.get("teachers.teacher")
            if checkpoint := getattr(options, "checkpoint", None):
                folder = student_folder(Path(checkpoint))
                if (folder / WEIGHTS).is_file():
                    plane.load(folder)
                elif not self.options.train_teacher:
                    raise ModelError(f"teachers.teacher.checkpoint: {folder} has no {WEIGHTS}, so its model does not "
                                     f"read labels: name a folder that the stage {TEACHER_STAGE} wrote "
                                     f"(stages/*-{TEACHER_STAGE}/artifact/teacher), or set train_teacher")  # fmt: skip
            elif not self.options.train_teacher:
                raise ModelError("method.train_teacher is false, and the teacher does not read labels: give it the "
                                 f"checkpoint that the stage {TEACHER_STAGE} wrote, or a model of your own that reads "
                                 "batch['label_channel']")  # fmt: skip
        return teacher, plane

    def add_rows(self, run: Run, teacher: Model) -> None:
        """What the teacher reaches with the labels of the images that it is measured on (no model that could be used),
        with an empty channel, and what the student reaches."""
        labels = noising(self.options, run.data.task.class_count, "student")
        run.add_row("teacher, sees labels", with_channel(teacher, lambda batch: labels(batch, run.seed, "row")))
        run.add_row("teacher, empty label channel", with_channel(teacher, empty_channel))
        run.add_row("student", run.student)

    def predict(self, outputs: Outputs, batch: Batch) -> Outputs:
        """The logits at the size of the labels, resized as in training."""
        logits = resized(outputs.need("logits").float(), batch["mask"].shape[-2:], self.options.align_corners)
        return Outputs(logits, outputs.embedding, outputs.features, outputs.extras)


def image_channels(run: Run) -> int:
    """Channels of the images. Raises `DataError` where the data poses no segmentation of images."""
    if run.data.task.kind != "segmentation":
        raise DataError(f"lad distils segmentation; the data poses a task of kind {run.data.task.kind!r}")
    batch = run.data.sample("train", 1)
    if missing := {"image", "mask"} - set(batch):
        raise DataError(f"lad reads `image` and `mask`; the data's batches have no {', '.join(sorted(missing))}, only "
                        f"{', '.join(batch)}")  # fmt: skip
    return int(batch["image"].shape[1])
