"""The loss: masked errors, and the diversity of the masks."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from kd_acam_kd.functional import mask_dice_diversity, masked_mse
from kd_acam_kd.modules import Level
from kd_acam_kd.options import ACAMLossOptions
from kd_classic.layers import as_map
from kdcore import Loss, Outputs
from kdcore.errors import ModelError, RunFailed
from kdcore.losses import count_samples
from kdcore.models import Source

LOGITS = "logits"
CHECK_EVERY = 50
OTHER_MASKS = 6
"""Masks of each kind where there are no classes by position: the paper's number for detection."""


class ACAM(Loss):
    """Lan and Tian 2025: at each level, masks from the attention between teacher and student, then `masked_mse` under
    them and `mask_dice_diversity` between them, weighted and summed over the levels.

    A level is the logits `[B, C, H, W]` or a tapped map; the patches of a vision transformer are seen as one.

    Attributes:
        mask_means: mean of the masks of the last batch by kind, over the levels, outside the graph.
    """

    def __init__(self, options: ACAMLossOptions | None = None) -> None:
        super().__init__()
        self.options = options or ACAMLossOptions()
        self.taps = {"student": self.options.levels, "teacher": self.options.teacher_levels or self.options.levels}
        signals = {role: [LOGITS] if LOGITS in levels else [] for role, levels in self.taps.items()}
        for role, levels in self.taps.items():
            signals[role] += ["features"] if set(levels) - {LOGITS} else []
        self.needs = signals
        self.levels = nn.ModuleList()
        self.mask_means: dict[str, Tensor] = {}

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the levels.

        Raises:
            ModelError: if student and teacher have not as many.
        """
        for role, model in (("student", student), ("teacher", teacher)):
            if model is not None:
                found = ([p] if p == LOGITS else model.tap(p) for p in self.taps[role])
                self.names[role] = list(itertools.chain.from_iterable(found))
        counts = {role: len(names) for role, names in self.names.items()}
        if len(set(counts.values())) > 1:
            named = {role: ", ".join(names) for role, names in self.names.items()}
            raise ModelError(f"acam-kd pairs levels in order, but the student has {counts['student']} "
                             f"({named['student']}) and the teacher {counts['teacher']} ({named['teacher']}); name as "
                             "many in levels and teacher_levels")  # fmt: skip

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`channel`, `spatial` (as far as there are such masks) and `diversity`: weighted, each a mean over samples.

        Raises:
            ModelError: if what a level gives is no map.
            RunFailed: if the masks have collapsed.
        """
        ours, theirs = self.maps("student", student), self.maps("teacher", teacher)
        if not self.levels:
            dense = student.classes is not None and student.need(LOGITS).ndim == 4
            count = self.options.num_masks or (student.classes if dense else None) or OTHER_MASKS
            made = (Level(s.shape[1], t.shape[1], max(count, 2), self.options)
                    for s, t in zip(ours, theirs, strict=True))  # fmt: skip
            self.levels.extend(made).to(ours[0].device).train(self.training)
        with torch.autocast(ours[0].device.type, enabled=False):
            found = [self.level(*each) for each in zip(self.levels, ours, theirs, strict=True)]
        terms = {name: torch.stack([part[name] for part, _ in found]).sum() for name in found[0][0]}
        means = [kinds for _, kinds in found]
        self.mask_means = {kind: torch.stack([each[kind] for each in means]).mean() for kind in means[0]}
        self.check(means)
        return terms

    def level(self, level: Any, student: Tensor, teacher: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted terms of one level, and the means of its masks by kind."""
        o = self.options
        teacher = teacher.detach().float()
        student = level.aligned(student.float(), teacher)
        masks = level.masks(student.detach() if o.detach_student_in_fusion else student, teacher)
        difference = (teacher - student).flatten(2)
        terms = {}
        for kind, mask in masks.items():
            mask = mask.detach() if o.mask_grad == "diversity_only" else mask
            terms[kind] = o.alpha * masked_mse(difference, mask, kind, o.mask_weight)
        likeness = torch.stack([mask_dice_diversity(mask, o.diversity) for mask in masks.values()]).sum()
        terms["diversity"] = o.lambda_div * likeness
        return terms, {kind: mask.detach().mean() for kind, mask in masks.items()}

    def maps(self, role: str, outputs: Outputs) -> list[Tensor]:
        """The levels of one side, as maps `[B, C, H, W]`."""
        found = []
        for name in self.names.get(role, self.taps[role]):
            values = outputs.need(LOGITS) if name == LOGITS else outputs.features[name]
            try:
                found.append(_as_map(values, name))
            except ValueError as error:
                raise ModelError(f"acam-kd: the {role}'s level {name}: {error}; name other levels, such as `@-1`, in "
                                 f"{'teacher_levels' if role == 'teacher' else 'levels'}") from error  # fmt: skip
        return found

    def check(self, means: list[dict[str, Tensor]]) -> None:
        """From time to time, refuse to go on with masks that are nearly zero everywhere at some level."""
        if not (self.training and self.options.min_mask and (self.progress.step + 1) % CHECK_EVERY == 0):
            return
        lowest = torch.stack([mean for kinds in means for mean in kinds.values()]).min().item()
        if lowest < self.options.min_mask:
            raise RunFailed(f"acam-kd: the masks have collapsed at step {self.progress.step + 1}: the mean of one kind "
                            f"at one level is {lowest:.2g}, so hardly anything is distilled there. Set "
                            "`mask_grad: diversity_only` or `mask_weight: linear`, lower the rate, or, if you "
                            "want to see it happen, set `min_mask: 0`")  # fmt: skip

    def count(self, batch: dict[str, Any]) -> Tensor:
        """Samples: the terms are averaged over them."""
        return count_samples(batch)


def _as_map(values: Any, name: str) -> Tensor:
    """Raises `ValueError` where `kd_classic.layers.as_map` does, and for vectors and tokens of a text."""
    shape = list(values.shape) if isinstance(values, Tensor) else []
    if len(shape) == 2 or (name == LOGITS and len(shape) != 4):
        raise ValueError(f"gives {shape}, which is no map [B, C, H, W]")
    return as_map(values)
