"""Losses for dense prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_classic import functional
from kd_classic.layers import Layers
from kd_classic.losses.features import Adapted
from kd_classic.losses.logits import TARGETS, at_logits, pair_of_logits
from kd_classic.options import CWDOptions, PairWiseOptions, PixelWiseOptions
from kdcore import Loss, Outputs
from kdcore.errors import ModelError
from kdcore.losses import count_samples
from kdcore.models import Batch, Source


class CWD(Adapted):
    """`functional.cwd`, on score maps or on layers; there, a 1x1 convolution brings the student to the teacher's
    width where the two differ."""

    which = "last"

    def __init__(self, options: CWDOptions | None = None) -> None:
        super().__init__(options or CWDOptions())
        if self.options.signal == "logits":
            self.needs = {"student": ("logits",), "teacher": ("logits",)}

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the layers, if it is on layers."""
        if self.options.signal == "layers":
            super().bind(student, teacher)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over batch and channels, summed over the pairs.

        Raises:
            ModelError: if it is on logits that have no positions.
        """
        o = self.options
        if o.signal == "logits":
            ours, theirs = pair_of_logits(student, teacher)
            if ours.ndim != 4:
                raise ModelError(f"cwd compares score maps [B, C, H, W], but the logits are {list(ours.shape)}; "
                                 "set `signal: layers`")  # fmt: skip
            return functional.cwd(ours, theirs, temperature=o.temperature, norm=o.norm)
        pairs = [functional.pool_to_smaller(s, t) for s, t in self.pairs(student, teacher, batch)]
        made = self.adapted(pairs, _align)
        return torch.stack([functional.cwd(a(s), t, temperature=o.temperature, norm=o.norm) for a, s, t in made]).sum()

    def count(self, batch: Batch) -> Tensor:
        """Samples."""
        return count_samples(batch)


def _align(student: Tensor, teacher: Tensor) -> nn.Module:
    same = student.shape[1] == teacher.shape[1]
    return nn.Identity() if same else nn.Conv2d(student.shape[1], teacher.shape[1], 1)


class PixelWise(Loss):
    """`functional.skd_pixelwise`, of the batch of all processes; a teacher's score maps of another size are resized."""

    relational = True  # a sum over the batch, which grows with it

    def __init__(self, options: PixelWiseOptions | None = None) -> None:
        super().__init__()
        self.options = options or PixelWiseOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Sum over the batch, mean over the positions."""
        ours, theirs = pair_of_logits(student, teacher)
        target = at_logits(ours, batch.get(TARGETS[ours.ndim]))
        return functional.skd_pixelwise(ours, theirs, target, temperature=self.options.temperature,
                                        standardize=self.options.standardize)  # fmt: skip


class PairWise(Layers):
    """`functional.skd_pairwise`; the larger map of a pair is average-pooled to the smaller."""

    which = "last"

    def __init__(self, options: PairWiseOptions | None = None) -> None:
        super().__init__(options or PairWiseOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        pairs = [functional.pool_to_smaller(s, t) for s, t in self.pairs(student, teacher, batch)]
        return torch.stack([functional.skd_pairwise(s, t, scale=self.options.scale) for s, t in pairs]).sum()
