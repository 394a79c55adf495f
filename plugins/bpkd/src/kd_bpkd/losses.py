"""The loss: distillation at contours and in bodies."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kd_bpkd.functional import bpkd
from kd_bpkd.options import BPKDLossOptions
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import DataError
from kdcore.losses import count_samples


class BPKD(Loss):
    """Liu et al. 2024: `functional.bpkd` with both terms weighted.

    It reads the logits `[B, C, h, w]` of both sides as they leave the head, and the labels `mask` `[B, H, W]`; pixels
    with the label -100 count neither as contour nor as body.
    """

    def __init__(self, options: BPKDLossOptions | None = None) -> None:
        super().__init__()
        self.options = options or BPKDLossOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`edge` and `body`: weighted, each a mean over the images.

        Raises:
            DataError: if the data has no label per pixel.
        """
        if "mask" not in batch:
            raise DataError("bpkd finds the contours in the labels of the pixels, but the data has no `mask`")
        o = self.options
        terms = bpkd(
            student.need("logits"), teacher.need("logits"), batch["mask"], width=o.edge_width, alpha=o.alpha,
            temperature=o.temperature, edge_norm=o.edge_norm, pre_mask=o.pre_mask, post_mask=o.post_mask,
            ignore_index=IGNORE, align_corners=o.align_corners,
        )  # fmt: skip
        return {"edge": o.lambda_edge * self.ramped() * terms["edge"], "body": o.lambda_body * terms["body"]}

    def ramped(self) -> float:
        """The part of `lambda_edge` that is in force at this point of the training."""
        return min(self.progress.fraction / self.options.ramp, 1.0) if self.options.ramp else 1.0

    def count(self, batch: dict[str, Any]) -> Tensor:
        """Images: the terms are averaged over them, however many of their pixels are labelled."""
        return count_samples(batch)
