"""The terms of both stages: cross-entropy of the logits and of an auxiliary head, and the distance between logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_classic.layers import as_map
from kd_lad.functional import Distance, distance, pixel_cross_entropy
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import ModelError
from kdcore.losses import count_samples
from kdcore.models import Batch, Source


class CrossEntropy(Loss):
    """`functional.pixel_cross_entropy` of the logits."""

    needs = {"student": ("logits",)}

    def __init__(self, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Mean over the pixels that are not ignored."""
        return self.of(student.need("logits"), batch)

    def of(self, logits: Tensor, batch: Batch) -> Tensor:
        """The same of other logits."""
        return pixel_cross_entropy(logits, batch["mask"], ignore_index=IGNORE, align_corners=self.align_corners)

    def count(self, batch: Batch) -> Tensor:
        """Pixels that are not ignored."""
        counted: Tensor = (batch["mask"] != IGNORE).sum()
        return counted


class Auxiliary(CrossEntropy):
    """The same of an auxiliary head: one on a tapped map, which is trained with the model and left out of what is
    saved, or, without a tap, the model's own (`Outputs.extras["aux_logits"]`).

    Args:
        tap: of the map, or `None`.
        key: the option that named it, for messages.
        classes: of the data.
        align_corners: of the resizing to the labels.
    """

    needs = {}

    def __init__(self, tap: str | None, key: str, classes: int, align_corners: bool) -> None:
        super().__init__(align_corners)
        self.key, self.classes = f"method.{key}", classes
        self.head: FCNHead | None = None
        self.taps = {"student": [tap]} if tap else {}

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the map. Raises `ModelError` if the tap matches none or several modules."""
        super().bind(student, None)
        if len(names := self.names.get("student", ())) > 1:
            raise ModelError(f"{self.key}: {self.taps['student'][0]!r} matches {len(names)} modules "
                             f"({', '.join(names[:5])}); the auxiliary head reads one map")  # fmt: skip

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Mean over the pixels that are not ignored; no term for a model without such a head.

        Raises:
            ModelError: if what is tapped is no map.
        """
        if not self.taps:
            return self.of(student.extras["aux_logits"], batch) if "aux_logits" in student.extras else {}
        (found,) = student.select(self.names["student"])
        try:
            found = as_map(found)
        except ValueError as error:
            raise ModelError(f"{self.key}: {self.names['student'][0]}: {error}; name another module") from error
        if self.head is None:
            self.head = FCNHead(found.shape[1], self.classes).to(found.device).train(self.training)
        return self.of(self.head(found), batch)


class FCNHead(nn.Sequential):
    """3x3 convolution to a quarter of the channels, batch norm, ReLU, 1x1 convolution to the classes (Long et al. 2015,
    arXiv 1411.4038, in the form of the segmentation toolboxes): `[B, D, h, w]` to `[B, C, h, w]`."""

    def __init__(self, channels: int, classes: int) -> None:
        inner = max(channels // 4, 1)
        super().__init__(
            nn.Conv2d(channels, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, classes, 1),
        )


class LogitDistance(Loss):
    """`functional.distance` of the logits.

    Args:
        kind: which distance.
        temperature, align_corners: as there.
        between: whose logits are compared: student and teacher, or (`"paths"`) two outputs of the trained model.
    """

    def __init__(self, kind: Distance, temperature: float, align_corners: bool, between: str = "models") -> None:
        super().__init__()
        self.kind, self.temperature, self.align_corners = kind, temperature, align_corners
        self.relational = kind == "dist"  # a class's correlation runs over the pixels of all images
        if between == "paths":
            self.needs = {"student": ("logits",)}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the images."""
        ours, theirs = (outputs.need("logits").float() for outputs in (student, teacher))
        with torch.autocast(ours.device.type, enabled=False):
            return distance(ours, theirs, self.kind, temperature=self.temperature, align_corners=self.align_corners)

    def count(self, batch: Batch) -> Tensor:
        """Images."""
        return count_samples(batch)
