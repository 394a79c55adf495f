"""The three training stages.

Source: Li et al. 2025, "MST-Distill" (arXiv 2507.07015): collaborative initialisation, specialised teacher
adaptation, dynamic distillation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_mst_distill.checks import ROLES, TEACHERS
from kd_mst_distill.functional import kd_kl, mutual_kl
from kd_mst_distill.losses import RoutedKD
from kd_mst_distill.masking import layer_shapes, specialise
from kd_mst_distill.modules import mask_net
from kd_mst_distill.options import MSTDistillOptions
from kd_mst_distill.selection import Best, validate, validation_due
from kdcore import Distill, Model, Outputs, Run, TrainStage
from kdcore.data import to_device
from kdcore.losses import TaskLoss, Weighted
from kdcore.models import Batch
from kdcore.recipe import TrainOptions
from kdcore.stages import make_optimizer


class CoTrain(TrainStage):
    """Stage 1: both teachers and the student together, under one optimizer.

    Each has the task's own loss and a divergence to each of the others; nothing is detached.
    """

    def __init__(self, run: Run, options: MSTDistillOptions) -> None:
        super().__init__("co_train")
        self.models = nn.ModuleDict({role: run.model(role) for role in ROLES})
        self.exports = {role: run.model(role) for role in ROLES}
        self.task = TaskLoss(run.data.task)
        self.temperature = options.temperature
        self.overrides = {"epochs": options.co_train_epochs}

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """`task` and `mutual` of each model."""
        outputs: dict[str, Outputs] = {role: model(batch) for role, model in self.models.items()}
        mutual = mutual_kl([o.need("logits") for o in outputs.values()], temperature=self.temperature)
        terms = {f"task/{role}": self.task(o, Outputs(), batch) for role, o in outputs.items()}
        return terms | {f"mutual/{role}": value for role, value in zip(outputs, mutual, strict=True)}

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Labels for the task, samples for the divergences."""
        return {"task": self.task.count(batch)}

    def evaluate(self, batch: Batch) -> Outputs:
        """The student's outputs."""
        outputs: Outputs = self.models["student"](batch)
        return outputs


class AdaptMasks(TrainStage):
    """Stage 2: one mask per chosen layer, each trained alone so that its teacher comes near the frozen student.

    Teachers and student stay as they are and in evaluation mode; gradient flows through the teacher to the mask. The
    masks of the lowest divergence on `val`, in the mean over all, are kept in `best`.

    Args:
        run: the run.
        options: of the method.
        layers: the layers that get a mask, by teacher.
    """

    def __init__(self, run: Run, options: MSTDistillOptions, layers: Mapping[str, Sequence[str]]) -> None:
        super().__init__("adapt_masks")
        self.run, self.options = run, options
        self.places = [(role, layer) for role in TEACHERS for layer in layers[role]]
        self.objectives = tuple(f"{role}.{layer}" for role, layer in self.places)
        self.frozen = {role: run.model(role).freeze() for role in TEACHERS}
        self.frozen["student"] = copy.deepcopy(run.student).freeze()
        batch = to_device(run.data.sample("train"), run.device)
        shapes = [shape for role in TEACHERS for shape in layer_shapes(run.model(role), layers[role], batch)]
        self.masks = nn.ModuleList(
            mask_net(shape, heads=options.mask_heads, hidden_dim_factor=options.hidden_dim_factor) for shape in shapes
        )
        self.masked_teachers = specialised(run, self.places, list(self.masks))
        self.best = Best(self.masks)
        self.overrides = {"epochs": options.adapt_epochs}

    def forward(self, batch: Batch, objective: str = "") -> dict[str, Tensor]:
        """The divergence of one masked teacher from the student."""
        with torch.no_grad():
            target = self.frozen["student"](batch).need("logits")
        pupil = self.masked_teachers[objective](batch).need("logits")
        return {objective: kd_kl(pupil, target, temperature=self.options.temperature)}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """One per mask."""
        return {name: make_optimizer(mask.parameters(), train.optimizer)
                for name, mask in zip(self.objectives, self.masks, strict=True)}  # fmt: skip

    def after_step(self) -> None:
        """Validate when it is due, and keep the masks that are the best so far."""
        if validation_due(self.run, self):
            values = validate(self.run, self, self.divergences, len(self.masks))
            self.best.offer(values.mean(), self.masks)
            named = {f"val/kl-{name}": v for name, v in zip(self.objectives, values.tolist(), strict=True)}
            self.run.report_metrics(self, self.progress.step + 1, {"val/kl": values.mean().item(), **named})

    def divergences(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of every masked teacher from the student, `[E]`, and the number of samples."""
        values = [next(iter(self(batch, name).values())) for name in self.objectives]
        return torch.stack(values), torch.tensor(float(len(batch["index"])), device=batch["index"].device)


class DistillRouted(Distill):
    """Stage 3: student and gate, with the specialised teachers frozen.

    The student of the lowest task loss on `val` is kept in `best`.

    Args:
        run: the run.
        options: of the method.
        places: role and layer of each mask.
        masks: the masks, adapted.
    """

    def __init__(
        self, run: Run, options: MSTDistillOptions, places: Sequence[tuple[str, str]], masks: Sequence[nn.Module]
    ) -> None:
        terms = [
            Weighted(TaskLoss(run.data.task), options.w_task, "task"),
            Weighted(RoutedKD(options), name="routed"),
        ]
        super().__init__(run.student, terms, specialised(run, places, masks, options.stacked_hooks))
        self.frozen |= {role: run.model(role).freeze() for role in TEACHERS}
        self.exports = {}  # the student at the last step; the best one is the run's
        self.run, self.task = run, TaskLoss(run.data.task)
        self.best = Best([run.student.module])

    def after_step(self) -> None:
        """Validate when it is due, and keep the student that is the best so far."""
        if validation_due(self.run, self):
            (value,) = validate(self.run, self, self.task_loss, 1)
            self.best.offer(value, [self.student.module])
            self.run.report_metrics(self, self.progress.step + 1, {"val/task-loss": value.item()})

    def task_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the student, `[1]`, and the number of targets it is a mean over."""
        return self.task(self.student(batch), Outputs(), batch).reshape(1), self.task.count(batch)


def specialised(
    run: Run, places: Sequence[tuple[str, str]], masks: Sequence[nn.Module], stacked: bool = False
) -> dict[str, Model]:
    """The specialised teachers by `role.layer`, one per mask.

    `stacked` leaves the masks of the same teacher that come before active too, as hooks that are added one by one and
    removed only at the end do.
    """
    made = {}
    for i, (role, layer) in enumerate(places):
        mine = [j for j in range(i + 1) if places[j][0] == role] if stacked else [i]
        made[f"{role}.{layer}"] = specialise(run.model(role), [places[j][1] for j in mine], [masks[j] for j in mine])
    return made
