"""Losses on logits, and where their target stands in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_classic import functional
from kd_classic.layers import embedding, tap_embedding
from kd_classic.options import (
    CrossEntropyOptions,
    DeiTOptions,
    DISTOptions,
    DKDOptions,
    KDOptions,
    LSROptions,
    MultiTeacherOptions,
    TfKDRegOptions,
    WSLDOptions,
)
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import DataError, ModelError
from kdcore.losses import count_samples, count_units
from kdcore.models import Source

Batch = dict[str, Any]

TARGETS = {2: "label", 3: "labels", 4: "mask"}
"""The batch key of the target, by the number of dimensions of the logits."""


def pair_of_logits(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """Logits of both sides; a teacher's maps [B, C, H, W] of another size are resized to the student's, vocabularies
    that are padded to different sizes [B, T, V] are cut to what both have."""
    ours, theirs = student.need("logits"), teacher.need("logits")
    if ours.ndim == theirs.ndim == 3 and ours.shape[-1] != theirs.shape[-1]:
        size = min(ours.shape[-1], theirs.shape[-1])
        return ours[..., :size], theirs[..., :size]
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
        o = self.options
        return functional.dist(ours, theirs, beta=o.beta, gamma=o.gamma, tau=o.tau, standardize=o.standardize)


class WSLD(Loss):
    """`functional.wsld`: cross-entropy and weighted soft labels."""

    def __init__(self, options: WSLDOptions | None = None) -> None:
        super().__init__()
        self.options = options or WSLDOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions that are not ignored."""
        ours, theirs = pair_of_logits(student, teacher)
        target = at_logits(ours, need_target(ours, batch, "wsld"))
        assert target is not None
        return functional.wsld(ours, theirs, target, **self.options.model_dump())


class LSR(Loss):
    """`functional.lsr`: label smoothing as in Tf-KD."""

    needs = {"student": ("logits",)}

    def __init__(self, options: LSROptions | None = None) -> None:
        super().__init__()
        self.options = options or LSROptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions that are not ignored."""
        logits = student.need("logits")
        target = at_logits(logits, need_target(logits, batch, "lsr"))
        assert target is not None
        return functional.lsr(logits, target, alpha=self.options.alpha)


class TfKDReg(Loss):
    """`functional.tfkd_reg`: cross-entropy and a made-up teacher."""

    needs = {"student": ("logits",)}

    def __init__(self, options: TfKDRegOptions | None = None) -> None:
        super().__init__()
        self.options = options or TfKDRegOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions that are not ignored."""
        logits = student.need("logits")
        target = at_logits(logits, need_target(logits, batch, "tfkd-reg"))
        assert target is not None
        o = self.options
        return functional.tfkd_reg(logits, target, alpha=o.alpha, temperature=o.temperature, multiplier=o.multiplier,
                                   correct_prob=o.correct_prob)  # fmt: skip


class DeiT(Loss):
    """`functional.deit`, for a student with a distillation token: one that gives the extras `cls_logits` and
    `dist_logits`, as the distilled models of timm and `demo-vit` with `distilled: true` do."""

    def __init__(self, options: DeiTOptions | None = None) -> None:
        super().__init__()
        self.options = options or DeiTOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over samples.

        Raises:
            ModelError: if the student has no distillation token.
        """
        if missing := {"cls_logits", "dist_logits"} - set(student.extras):
            raise ModelError(f"deit needs a student with a distillation token, but this one gives no "
                             f"{' and '.join(sorted(missing))}; take one such as timm's "
                             "deit_tiny_distilled_patch16_224")  # fmt: skip
        ours = (student.extras["cls_logits"], student.extras["dist_logits"])
        target = need_target(ours[0], batch, "deit")
        return functional.deit(*ours, teacher.need("logits"), target, **self.options.model_dump())


class MultiTeacher(Loss):
    """KD from all teachers of the recipe, weighted per teacher or per sample.

    - `average`: by fixed weights.
    - `confidence`: a teacher's weight for a sample is ``(1 - softmax(CE)_k) / (K - 1)``: large where its own
      cross-entropy with the label is low (Zhang et al. 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation",
      equation 4, arXiv 2201.00007).
    - `gate`: weights from a linear gate on the student's embedding, trained by the cross-entropy of the weighted
      mixture of teachers with the label; the gate learns nothing from KD, nor the student from the gate.
    """

    def __init__(self, options: MultiTeacherOptions | None = None) -> None:
        super().__init__()
        self.options = options or MultiTeacherOptions()
        gated = self.options.weighting == "gate"
        self.needs = {"student": ("logits", "embedding") if gated else ("logits",), "teachers": ("logits",)}
        self.gate: nn.Linear | None = None

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the embedding that the gate reads."""
        if self.options.weighting == "gate" and (names := tap_embedding(student)):
            self.names["student"] = names
            self.needs = {**self.needs, "student": ("logits", "features")}

    def forward(self, student: Outputs, teacher: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        """The term `kd`; with a gate also `gate`. Mean over samples.

        Raises:
            ModelError: if `weights` does not name just the teachers.
        """
        ours = student.need("logits")
        if ours.ndim != 2:
            raise ModelError("multi-teacher weighs samples: it needs logits [B, C] of a classification")
        theirs = torch.stack([outputs.need("logits") for outputs in teacher.values()], dim=1)
        weight, terms = self._weights(student, list(teacher), theirs, batch)
        o = self.options
        values = [functional.kd(ours, logits, temperature=o.temperature, standardize=o.standardize, reduction="none")
                  for logits in theirs.unbind(1)]  # fmt: skip
        return {"kd": (torch.stack(values, dim=1) * weight).sum(1).mean(), **terms}

    def _weights(
        self, student: Outputs, roles: list[str], theirs: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights that sum to one over the teachers, ``[B, K]`` or ``[K]``, and the gate's own term."""
        if self.options.weighting == "average":
            given = self.options.weights or dict.fromkeys(roles, 1.0)
            if set(given) != set(roles):
                raise ModelError(f"multi-teacher: weights names {', '.join(given)}, but the teachers are "
                                 f"{', '.join(roles)}")  # fmt: skip
            weight = theirs.new_tensor([given[role] for role in roles], dtype=torch.float32)
            return weight / weight.sum(), {}
        label = need_target(theirs[:, 0], batch, "multi-teacher")
        log_probs = F.log_softmax(theirs.float(), dim=2)
        if self.options.weighting == "confidence":
            hard = -log_probs.gather(2, label.clamp(min=0)[:, None, None].expand(-1, len(roles), 1)).squeeze(2)
            return (1 - hard.softmax(dim=1)) / max(len(roles) - 1, 1) if len(roles) > 1 else torch.ones_like(hard), {}
        features = embedding(student, self.names.get("student", []), False, batch).detach().flatten(1)
        if self.gate is None:
            self.gate = nn.Linear(features.shape[1], len(roles)).to(features.device)
        log_weight = F.log_softmax(self.gate(features).float(), dim=1)
        mixture = torch.logsumexp(log_weight[:, :, None] + log_probs, dim=1)
        return log_weight.exp().detach(), {"gate": functional.cross_entropy(mixture, label)}

    def count(self, batch: Batch) -> Tensor:
        """Samples."""
        return count_samples(batch)
