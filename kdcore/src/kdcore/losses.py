"""The base of losses, and how a list of them is weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.data import IGNORE, TARGET_KEYS, DataModule, Task
from kdcore.models import Batch, Outputs, Source


@dataclass(frozen=True)
class Progress:
    """How far a stage has come: whole steps and epochs done, and the fraction of all steps in `[0, 1)`.

    `shares` are the samples that each process holds of the micro-batch under way, by rank; none where there is one.
    """

    step: int = 0
    epoch: int = 0
    fraction: float = 0.0
    shares: tuple[int, ...] = ()


class Loss(nn.Module):
    """One term of the objective, computed from outputs and the batch; it never sees a model.

    A subclass sets `needs`, and implements `forward(student, teacher, batch)`. It returns the mean over the units it
    counts (see `count`), or several such means by name. Trainable adapters are made in the first `forward` from the
    shapes that arrive: the stage runs one before the optimizers exist. They are kept in checkpoints and left out of
    the saved student.

    Attributes:
        needs: signals by role, such as `{"student": ("logits",), "teacher": ("logits", "features")}`. With the key
            `teachers` instead of `teacher`, the loss is given all of them: a dict of outputs by role.
        taps: tap patterns by role; `bind` turns them into names.
        relational: whether the loss relates the samples of a batch to each other. Its inputs are then gathered from
            all processes, with gradient.
        same_labels: whether logits of student and teacher must have the same classes in the same order.
        progress: how far the stage has come; current in every step.
    """

    needs: Mapping[str, Sequence[str]] = {"student": ("logits",), "teacher": ("logits",)}
    relational: bool = False
    same_labels: bool = True
    progress: Progress = Progress()

    def __init__(self) -> None:
        super().__init__()
        self.taps: dict[str, list[str]] = {}
        self.names: dict[str, list[str]] = {}

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The value for one batch. `teacher` holds the outputs of one, or by role if `needs` says `teachers`."""
        raise TypeError(f"{type(self).__name__} does not implement forward(student, teacher, batch)")

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Register the taps on the models; afterwards `self.names[role]` holds the tap names."""
        for role, model in (("student", student), ("teacher", teacher)):
            if self.taps.get(role) and model is not None:
                self.names[role] = model.tap(*self.taps[role])

    def setup(self, data: DataModule, split: str) -> None:
        """Called before the first `forward` with the data that the stage draws from, for a loss that must know its
        size or its labels."""

    def count(self, batch: Batch) -> Tensor:
        """How many units the value is a mean over, as a scalar tensor: what the means of several micro-batches and
        processes are combined by. Default: positions of the target that are not ignored, or samples."""
        return count_units(batch)


def count_units(batch: Batch) -> Tensor:
    """Positions of the batch's target that are not `IGNORE`; samples, where the batch has no target."""
    for key in TARGET_KEYS:
        if isinstance(target := batch.get(key), Tensor) and not target.is_floating_point():
            return (target != IGNORE).sum()
    tensor = next(v for v in batch.values() if isinstance(v, Tensor))
    return torch.full((), tensor.shape[0], device=tensor.device)


def count_samples(batch: Batch) -> Tensor:
    """Samples in a batch, as a scalar tensor."""
    index: Tensor = batch["index"]
    return torch.full((), float(index.shape[0]), device=index.device)


@dataclass
class Weighted:
    """A loss with its place in the sum.

    Args:
        loss: the loss.
        weight: its factor.
        name: the name of its term in logs.
        warmup: epochs over which the factor rises: `min(epoch / warmup, 1)`, epochs counted from 1.
        teacher: the role that the loss sees as its teacher.
    """

    loss: Loss
    weight: float = 1.0
    name: str = ""
    warmup: float = 0.0
    teacher: str = "teacher"

    def factor(self, progress: Progress) -> float:
        """The weight at this point of the training."""
        return self.weight * min((progress.epoch + 1) / self.warmup, 1.0) if self.warmup else self.weight


def named_terms(name: str, value: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
    """A loss's value as terms: `{name: value}`, or `{name/part: value}` for a loss with several."""
    return {f"{name}/{part}": v for part, v in value.items()} if isinstance(value, Mapping) else {name: value}


class TaskLoss(Loss):
    """The supervised loss of a task: cross-entropy over classes, pixels or tokens, binary cross-entropy for several
    labels, mean squared error for values. What a model is trained with where no other loss is asked for."""

    needs: Mapping[str, Sequence[str]] = {"student": ("logits",)}

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the target's positions that are not ignored."""
        logits = student.need("logits").float()
        if self.task.kind == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, batch["label"].float())
        if self.task.kind == "regression":
            return F.mse_loss(logits.flatten(), batch["label"].float().flatten())
        if self.task.kind == "segmentation":
            logits = F.interpolate(logits, batch["mask"].shape[-2:], mode="bilinear", align_corners=False)
            return _cross_entropy(logits, batch["mask"])
        if self.task.kind == "classification":
            return _cross_entropy(logits, batch["label"])
        return _cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


class AuxiliaryLoss(TaskLoss):
    """The same of a second head, whose logits are `Outputs.extras["aux_logits"]`; no term for a student without one."""

    needs = {}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Any:
        """Mean over the target's positions that are not ignored."""
        logits = student.extras.get("aux_logits")
        return {} if logits is None else super().forward(Outputs(logits=logits), teacher, batch)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)
