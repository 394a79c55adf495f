"""The pure functions as losses: options, taps, trainable adapters, and where the target stands in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_classic import functional
from kd_classic.modules import Regressor
from kd_classic.options import ATOptions, CrossEntropyOptions, DISTOptions, DKDOptions, FitNetsOptions, KDOptions
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import DataError, ModelError
from kdcore.losses import count_samples, count_units

Batch = dict[str, Any]

TARGETS = {2: "label", 3: "labels", 4: "mask"}
"""The batch key of the target, by the number of dimensions of the logits."""


def pair_of_logits(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """Logits of both sides; a teacher's maps [B, C, H, W] of another size are resized to the student's."""
    ours, theirs = student.need("logits"), teacher.need("logits")
    if ours.ndim == theirs.ndim == 4 and ours.shape[-2:] != theirs.shape[-2:]:
        theirs = F.interpolate(theirs.float(), ours.shape[-2:], mode="bilinear", align_corners=False)
    return ours, theirs


def need_target(logits: Tensor, batch: Batch, who: str) -> Tensor:
    """The target as it stands in the batch: `label` [B], `labels` [B, T] or `mask` [B, H, W].

    Raises:
        DataError: if the batch holds none.
    """
    key = TARGETS[logits.ndim]
    if key not in batch:
        raise DataError(f"{who} needs labels, but the data's batches have no {key!r}, only {', '.join(batch)}")
    target: Tensor = batch[key]
    return target


def at_logits(logits: Tensor, target: Tensor | None) -> Tensor | None:
    """The target of each position of the logits: a mask is brought to [B, h, w] by nearest neighbours."""
    if target is None or logits.ndim < 4:
        return target
    return F.interpolate(target[:, None].float(), logits.shape[-2:], mode="nearest")[:, 0].to(target.dtype)


class CrossEntropy(Loss):
    """Cross-entropy with `label` [B], `labels` [B, T] or, after resizing the logits to it, `mask` [B, H, W]."""

    needs = {"student": ("logits",)}

    def __init__(self, options: CrossEntropyOptions | None = None) -> None:
        super().__init__()
        self.options = options or CrossEntropyOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions that are not ignored."""
        logits = student.need("logits")
        target = need_target(logits, batch, "cross-entropy")
        if logits.ndim == 4:
            logits = F.interpolate(logits.float(), target.shape[-2:], mode="bilinear", align_corners=False)
        return functional.cross_entropy(logits, target, label_smoothing=self.options.label_smoothing)


class KD(Loss):
    """`functional.kd`. Samples of a classification without a label count like the others: KD needs none."""

    def __init__(self, options: KDOptions | None = None) -> None:
        super().__init__()
        self.options = options or KDOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over positions."""
        ours, theirs = pair_of_logits(student, teacher)
        target = at_logits(ours, batch.get(TARGETS[ours.ndim])) if ours.ndim > 2 else None
        return functional.kd(ours, theirs, target, temperature=self.options.temperature,
                             standardize=self.options.standardize, reduction=self.options.reduction)  # fmt: skip

    def count(self, batch: Batch) -> Tensor:
        """Samples, or pixels and tokens whose target is not ignored."""
        return count_samples(batch) if "label" in batch else count_units(batch)


class DKD(Loss):
    """`functional.dkd`."""

    def __init__(self, options: DKDOptions | None = None) -> None:
        super().__init__()
        self.options = options or DKDOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions that are not ignored."""
        ours, theirs = pair_of_logits(student, teacher)
        target = at_logits(ours, need_target(ours, batch, "dkd"))
        assert target is not None
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
        """One value for the batch. Ignored pixels and tokens are left out; if nothing is left, it is 0."""
        ours, theirs = pair_of_logits(student, teacher)
        target = at_logits(ours, batch.get(TARGETS[ours.ndim])) if ours.ndim > 2 else None
        if target is not None:
            valid = target.flatten() != IGNORE
            ours, theirs = (functional.flatten_positions(logits)[0][valid] for logits in (ours, theirs))
        if not len(ours):
            return ours.sum()
        return functional.dist(ours, theirs, beta=self.options.beta, gamma=self.options.gamma, tau=self.options.tau)


class _Layers(Loss):
    """A loss on feature maps [B, Ch, H, W] of pairs of layers."""

    needs = {"student": ("features",), "teacher": ("features",)}

    def __init__(self, student_layers: Sequence[str], teacher_layers: Sequence[str]) -> None:
        super().__init__()
        self.taps = {"student": list(student_layers), "teacher": list(teacher_layers)}

    def pairs(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """The tapped feature maps of both sides, layer by layer.

        Raises:
            ModelError: if one side has more layers, or a layer gives something else.
        """
        ours, theirs = self._maps("student", student), self._maps("teacher", teacher)
        if len(ours) != len(theirs):
            names = {role: ", ".join(self.names[role]) for role in ("student", "teacher")}
            raise ModelError(f"layers are paired in order, but the student has {len(ours)} ({names['student']}) and "
                             f"the teacher {len(theirs)} ({names['teacher']}); set student_layers and "
                             "teacher_layers")  # fmt: skip
        return ours, theirs

    def _maps(self, role: str, outputs: Outputs) -> list[Tensor]:
        maps = outputs.select(self.names[role])
        for name, features in zip(self.names[role], maps, strict=True):
            if not isinstance(features, Tensor) or features.ndim != 4:
                shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ModelError(f"{type(self).__name__} compares feature maps [B, Ch, H, W], but the {role}'s layer "
                                 f"{name!r} gives {shape}; name convolutional layers in {role}_layers")  # fmt: skip
        return maps

    def count(self, batch: Batch) -> Tensor:
        """Samples."""
        return count_samples(batch)


class FitNets(_Layers):
    """`functional.fitnet` through one trained regressor per pair of layers, made from the shapes that arrive first."""

    def __init__(self, options: FitNetsOptions | None = None) -> None:
        options = options or FitNetsOptions()
        super().__init__(options.student_layers, options.teacher_layers)
        self.options = options
        self.regressors = nn.ModuleList()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean squared error, summed over the pairs."""
        pairs = list(zip(*self.pairs(student, teacher), strict=True))
        if not self.regressors:
            made = [Regressor(s.shape, t.shape, relu=self.options.relu) for s, t in pairs]
            self.regressors.extend(made).to(pairs[0][0].device)
        losses = [functional.fitnet(r(s), t) for r, (s, t) in zip(self.regressors, pairs, strict=True)]
        return torch.stack(losses).sum()


class AT(_Layers):
    """`functional.at` on pairs of convolutional layers."""

    def __init__(self, options: ATOptions | None = None) -> None:
        options = options or ATOptions()
        super().__init__(options.student_layers, options.teacher_layers)
        self.options = options

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        return functional.at(*self.pairs(student, teacher), mode=self.options.mode, p=self.options.p)
