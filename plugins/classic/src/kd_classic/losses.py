"""The pure functions as losses: options, taps, trainable adapters, and where the target stands in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import ModelError
from kdcore.losses import count_units
from torch import Tensor, nn

from kd_classic import functional
from kd_classic.modules import Regressor
from kd_classic.options import ATOptions, CrossEntropyOptions, DISTOptions, DKDOptions, FitNetsOptions, KDOptions

Batch = dict[str, Any]


def target_at(logits: Tensor, batch: Batch) -> Tensor | None:
    """The target of each position of the logits: `label` [B], `labels` [B, T], or `mask` brought to [B, h, w] by
    nearest neighbours; `None` where the batch holds none."""
    if logits.ndim == 2:
        return batch.get("label")
    if logits.ndim == 3:
        return batch.get("labels")
    if (mask := batch.get("mask")) is None:
        return None
    return F.interpolate(mask[:, None].float(), logits.shape[-2:], mode="nearest")[:, 0].to(mask.dtype)


def pair_of_logits(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """Logits of both sides; a teacher's maps [B, C, H, W] of another size are resized to the student's."""
    ours, theirs = student.need("logits"), teacher.need("logits")
    if ours.ndim == theirs.ndim == 4 and ours.shape[-2:] != theirs.shape[-2:]:
        theirs = F.interpolate(theirs.float(), ours.shape[-2:], mode="bilinear", align_corners=False)
    return ours, theirs


class CrossEntropy(Loss):
    """Cross-entropy with `label` [B], `labels` [B, T] or, after resizing the logits to it, `mask` [B, H, W]."""

    needs = {"student": ("logits",)}  # noqa: RUF012

    def __init__(self, options: CrossEntropyOptions | None = None) -> None:
        super().__init__()
        self.options = options or CrossEntropyOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions that are not ignored."""
        logits = student.need("logits")
        if logits.ndim == 4:
            logits = F.interpolate(logits.float(), batch["mask"].shape[-2:], mode="bilinear", align_corners=False)
        target = batch["mask"] if logits.ndim == 4 else batch["labels"] if logits.ndim == 3 else batch["label"]
        return functional.cross_entropy(logits, target, label_smoothing=self.options.label_smoothing)


class _Logits(Loss):
    """A loss on the logits of both sides, averaged over the positions whose target is not ignored."""

    def count(self, batch: Batch) -> Tensor:
        """Samples, or target positions that are not ignored."""
        return _samples(batch) if "label" in batch else count_units(batch)


class KD(_Logits):
    """`functional.kd`. Unlabelled samples of a classification count like the others: KD needs no label."""

    def __init__(self, options: KDOptions | None = None) -> None:
        super().__init__()
        self.options = options or KDOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over positions."""
        ours, theirs = pair_of_logits(student, teacher)
        target = target_at(ours, batch) if ours.ndim > 2 else None
        return functional.kd(ours, theirs, target, temperature=self.options.temperature,
                             standardize=self.options.standardize, reduction=self.options.reduction)  # fmt: skip


class DKD(Loss):
    """`functional.dkd`."""

    def __init__(self, options: DKDOptions | None = None) -> None:
        super().__init__()
        self.options = options or DKDOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over labelled positions."""
        ours, theirs = pair_of_logits(student, teacher)
        if (target := target_at(ours, batch)) is None:
            raise ModelError("dkd separates the labelled class from the others: the data must have labels")
        o = self.options
        return functional.dkd(ours, theirs, target, alpha=o.alpha, beta=o.beta, temperature=o.temperature,
                              standardize=o.standardize)  # fmt: skip


class DIST(Loss):
    """`functional.dist`; it correlates the samples of a batch, so it sees the batch of all processes."""

    relational = True

    def __init__(self, options: DISTOptions | None = None) -> None:
        super().__init__()
        self.options = options or DISTOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """One value for the batch; ignored positions are left out."""
        ours, theirs = pair_of_logits(student, teacher)
        if ours.ndim > 2 and (target := target_at(ours, batch)) is not None:
            ours, labels = functional.flatten_positions(ours, target)
            valid = labels != IGNORE
            ours, theirs = ours[valid], functional.flatten_positions(theirs)[0][valid]
        return functional.dist(ours, theirs, beta=self.options.beta, gamma=self.options.gamma, tau=self.options.tau)


class _Layers(Loss):
    """A loss on pairs of layers."""

    needs = {"student": ("features",), "teacher": ("features",)}  # noqa: RUF012

    def __init__(self, student_layers: Sequence[str], teacher_layers: Sequence[str]) -> None:
        super().__init__()
        self.taps = {"student": list(student_layers), "teacher": list(teacher_layers)}

    def pairs(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """The tapped features of both sides, layer by layer."""
        ours, theirs = student.select(self.names["student"]), teacher.select(self.names["teacher"])
        if len(ours) != len(theirs):
            raise ModelError(f"layers are paired in order, but the student has {len(ours)} ({self._named('student')}) and "
                             f"the teacher {len(theirs)} ({self._named('teacher')}); set student_layers and "
                             "teacher_layers")  # fmt: skip
        return ours, theirs

    def _named(self, role: str) -> str:
        return ", ".join(self.names[role])

    def count(self, batch: Batch) -> Tensor:
        """Samples."""
        return _samples(batch)


class FitNets(_Layers):
    """`functional.fitnet` through one trained regressor per pair of layers, made from the shapes that arrive first."""

    def __init__(self, options: FitNetsOptions | None = None) -> None:
        options = options or FitNetsOptions()
        super().__init__(options.student_layers, options.teacher_layers)
        self.relu = options.relu
        self.regressors = nn.ModuleList()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean squared error, summed over the pairs."""
        ours, theirs = self.pairs(student, teacher)
        if not self.regressors:
            made = [Regressor(s.shape, t.shape, relu=self.relu) for s, t in zip(ours, theirs, strict=True)]
            self.regressors.extend(made).to(ours[0].device)
        losses = [functional.fitnet(r(s), t) for r, s, t in zip(self.regressors, ours, theirs, strict=True)]
        return torch.stack(losses).sum()


class AT(_Layers):
    """`functional.at` on pairs of convolutional layers."""

    def __init__(self, options: ATOptions | None = None) -> None:
        self_options = options or ATOptions()
        super().__init__(self_options.student_layers, self_options.teacher_layers)
        self.options = self_options

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        return functional.at(*self.pairs(student, teacher), mode=self.options.mode, p=self.options.p)


def _samples(batch: Batch) -> Tensor:
    return torch.full((), batch["index"].shape[0], device=batch["index"].device)
