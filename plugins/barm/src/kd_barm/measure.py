"""Intersection over union by groups of classes: of old ones, new ones and all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from kd_barm.functional import upsample
from kdcore import Outputs
from kdcore.data import IGNORE
from kdcore.metrics import Metrics
from kdcore.models import Batch

EPSILON = 1e-6


class GroupIoU(Metrics):
    """Mean IoU over ranges of classes, from the confusion matrix of a whole split. A class that occurs neither in the
    labels nor in the predictions counts as 0, as in the official code.

    Args:
        classes: how many there are.
        groups: ranges of classes by the name of the metric.
        device: of the predictions.
    """

    def __init__(self, classes: int, groups: Mapping[str, range], device: torch.device) -> None:
        self.groups = dict(groups)
        self.matrix: Any = MulticlassConfusionMatrix(classes, ignore_index=IGNORE).to(device)

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Add a batch: logits or probabilities `[B, C, H, W]` at the size of `mask`."""
        self.matrix.update(outputs.need("logits").argmax(1), batch["mask"])

    def compute(self) -> dict[str, float]:
        """The means, in [0, 1]."""
        matrix = self.matrix.compute().double()
        both = matrix.diag()
        iou = both / (matrix.sum(0) + matrix.sum(1) - both + EPSILON)
        return {name: float(iou[classes.start : classes.stop].mean()) for name, classes in self.groups.items()}


def probabilities(outputs: Outputs, batch: Batch) -> Outputs:
    """What is predicted with: sigmoid probabilities, and only then resized to the labels, or else the image."""
    target = batch.get("mask", batch.get("image"))
    probs: Tensor = outputs.need("logits").float().sigmoid()
    return Outputs(upsample(probs, target.shape[-2:]) if isinstance(target, Tensor) else probs)
