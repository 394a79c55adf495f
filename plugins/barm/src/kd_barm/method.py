"""The method: a chain of training stages, each on its own classes, with the student of the last one as teacher.

Source: Zhang and Gao 2024, "Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic
Segmentation", ECCV (arXiv 2407.09838). From the second step on, with the terms of `functional`,

    L = L_pb-bce + w_tri L_bga-tri + w_bfd L_bfd + w_gkd L_gkd + w_bga_bce L_bga-bce.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from kd_barm.measure import probabilities
from kd_barm.options import BARMOptions
from kd_barm.protocol import ClassesPresent, Steps
from kd_barm.segmenter import IncrementalSegmenter
from kd_barm.stages import FirstStep, LaterStep, Step
from kdcore import DataModule, Method, Model, Outputs, Roles, Run, Stage
from kdcore.errors import DataError, RecipeError, did_you_mean
from kdcore.models import Batch


class BARM(Method):
    """The stages: `classes`, which looks for the images of each step, then `step-0`, `step-1` and so on.

    The student that ends the run is the recipe's with a head of its own on one of its maps, a branch for each step; it
    is saved beside the student's files. The ablation is plain fine-tuning: one background logit, no pseudo labels, and
    nothing but the labels of each step to learn from.
    """

    roles = Roles(teachers=())
    ablation: Mapping[str, Any] = {"method.background": "shared", "method.pseudo_thresh": "null", "method.w_tri": 0,
                                   "method.w_bfd": 0, "method.w_gkd": 0, "method.w_bga_bce": 0}  # fmt: skip
    options: BARMOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages.

        Raises:
            DataError: if the data poses no segmentation, or a step finds no image.
            RecipeError: if the task does not fit the number of classes, or `stages` names a step that there is not.
        """
        o, task = self.options, run.data.task
        if task.kind != "segmentation":
            raise DataError(f"barm learns to segment; the data poses a task of kind {task.kind!r}")
        steps = Steps.of(o.task, task.class_count, o.class_order)
        check_stages(run, len(steps.groups))
        on = [split for split in run.recipe.eval.on if split in run.data]
        present = (yield ClassesPresent())["present"].cpu()
        datas = [steps.data(run.data, present, step, o.protocol, on) for step in range(len(steps.groups))]
        net = self.network(run, steps)
        first = FirstStep(net, steps, datas[0], o, run.recipe.eval.on[0])
        yield first
        first.finish()
        rows = report(run, first, on)
        for number in range(1, len(steps.groups)):
            teacher = copy.deepcopy(net)
            net.head.grow(len(steps.groups[number]), o.copy_bn_stats)
            stage = self.step(net, teacher, steps, number, datas[number])
            yield stage
            rows = report(run, stage, on)
        for name, value in rows.items():
            if name.endswith(("-base", "-added")):
                run.add_metric(name, value)
        run.adopt("student", net.as_model())

    def network(self, run: Run, steps: Steps) -> IncrementalSegmenter:
        """The student with a head for the first step. Raises `ModelError` where the tap gives no map."""
        o = self.options
        head = {"channels": o.channels, "num_classes": [1, len(steps.groups[0])],
                "rates": o.aspp_rates if o.aspp else ()}  # fmt: skip
        student, batch = run.student.cpu(), run.data.sample("train")
        return IncrementalSegmenter.build(student, batch, o.features, steps.order, o.background == "shared", head)

    def step(
        self, net: IncrementalSegmenter, teacher: IncrementalSegmenter, steps: Steps, number: int, data: DataModule
    ) -> LaterStep:
        """The stage of a step after the first: where a method that distils something else would differ."""
        return LaterStep(net, teacher, steps, number, data, self.options)

    def restore(self, student: Model | None, folder: Path) -> Model:
        """The student of a finished run, with its head. Raises `ModelError` if there is none in the folder."""
        return IncrementalSegmenter.load(super().restore(student, folder), folder).as_model()

    def predict(self, outputs: Outputs, batch: Batch) -> Outputs:
        """Probabilities at the size of the labels."""
        return probabilities(outputs, batch)


def report(run: Run, stage: Step, on: list[str]) -> dict[str, float]:
    """Measure a step on every split of `eval.on`, as a row of the run's table."""
    found = {name: value for split in on for name, value in run.evaluate(stage, split).items()}
    run.rows.append({"model": stage.name, **found})
    return found


def check_stages(run: Run, count: int) -> None:
    """Refuse `stages:` of a recipe that are none of this run's. Raises `RecipeError`."""
    known = [*(f"step-{i}" for i in range(count)), *(r for r, s in run.recipe.students.items() if s.train is not None)]
    for name in run.recipe.stages:
        if name not in known:
            raise RecipeError(f"stages.{name}: there is no such stage; {did_you_mean(name, known, 'stages')}")
