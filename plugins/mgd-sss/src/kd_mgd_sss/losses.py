"""The terms as losses: each granularity between one teacher and the student, and the supervised one of hard pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_classic.functional.logits import at_least_float32
from kd_mgd_sss.functional import gap_logit_l1, hard_pseudo_ce, ohem_keeps, region_cosine_mse
from kd_mgd_sss.options import RegionOptions
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import ModelError
from kdcore.losses import count_samples
from kdcore.models import Batch, Source
from kdcore.processes import gather_with_grad, world_size

CLASSIFIER_INPUT = "@head:input"


class GapLogitL1(Loss):
    """`functional.gap_logit_l1` of the logits at the size of the image: mean over the images."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the images."""
        ours, theirs = (full_size(outputs, batch) for outputs in (student, teacher))
        return gap_logit_l1(ours, theirs, reduction="batchmean")

    def count(self, batch: Batch) -> Tensor:
        """Images."""
        return count_samples(batch)


class RegionCosineMSE(Loss):
    """`functional.region_cosine_mse` of a map of each side: mean over images and pairs of regions."""

    needs: Mapping[str, Sequence[str]] = {"student": ("features",), "teacher": ("features",)}

    def __init__(self, options: RegionOptions | None = None) -> None:
        super().__init__()
        self.options = options or RegionOptions()
        ours = self.options.feature_layer
        theirs = self.options.teacher_feature_layer or ours
        self.chosen = theirs is not None
        self.taps = {"student": [ours or CLASSIFIER_INPUT], "teacher": [theirs or CLASSIFIER_INPUT]}

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap one map of either side. Raises `ModelError` if a tap names none or several."""
        super().bind(student, teacher)
        for role, names in self.names.items():
            if len(names) != 1:
                raise ModelError(f"{self._option(role)}: one map is compared, but {self.taps[role][0]!r} of the {role} "
                                 f"names {len(names)}: {', '.join(names[:5])}")  # fmt: skip

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over images and pairs of regions.

        Raises:
            ModelError: if a tapped activation is no map or smaller than the grid; if nobody chose the maps, and they
                differ in channels.
        """
        maps = {"student": student, "teacher": teacher}
        ours, theirs = (self._map(outputs, role) for role, outputs in maps.items())
        if ours.shape[1] != theirs.shape[1] and not self.chosen:
            raise ModelError(f"what goes into the last 1x1 convolution has {ours.shape[1]} channels in the student and "
                             f"{theirs.shape[1]} in the teacher: they may not be the same map of two decoders. Name in "
                             "method.feature_layer (and teacher_feature_layer) the map before the classifier, such as "
                             "`decoder`; what is named may differ in channels")  # fmt: skip
        return region_cosine_mse(ours, theirs, self.options.region_grid)

    def _map(self, outputs: Outputs, role: str) -> Tensor:
        (name,) = self.names[role]
        found, grid = outputs.features[name], self.options.region_grid
        if not isinstance(found, Tensor) or found.ndim != 4:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ModelError(f"{self._option(role)}: a map [B, D, h, w] is compared, but the {role}'s {name!r} gives "
                             f"{shape}; name the map before the classifier")  # fmt: skip
        if min(found.shape[-2:]) < grid:
            height, width = found.shape[-2:]
            raise ModelError(f"the {role}'s map {name!r} is {height} x {width}, smaller than region_grid={grid}: its "
                             f"regions would be copies of each other. Lower region_grid, name a larger map in "
                             f"{self._option(role)}, or take larger images")  # fmt: skip
        return found

    def _option(self, role: str) -> str:
        named = role == "teacher" and self.options.teacher_feature_layer is not None
        return "teacher_feature_layer" if named else "feature_layer"

    def count(self, batch: Batch) -> Tensor:
        """Images."""
        return count_samples(batch)


class HardPseudoCE(Loss):
    """`functional.hard_pseudo_ce` with the teacher's likeliest class of every pixel, labelled or not."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the pixels."""
        return hard_pseudo_ce(full_size(student, batch), full_size(teacher, batch).argmax(1))

    def count(self, batch: Batch) -> Tensor:
        """Pixels."""
        image: Tensor = batch["image"]
        return torch.full((), float(image[:, 0].numel()), device=image.device)


class OhemCrossEntropy(Loss):
    """Cross-entropy over the hardest pixels of the batch of all processes: those whose label is not likely, and at
    least so many. (Shrivastava et al. 2016, arXiv 1604.03540, by pixels.)

    The value is this process's part of the mean, times the number of processes.

    Args:
        threshold: pixels count whose label has at most this probability.
        min_kept: and at least so many, for each image of the batch.
    """

    needs: Mapping[str, Sequence[str]] = {"student": ("logits",)}

    def __init__(self, threshold: float, min_kept: int) -> None:
        super().__init__()
        self.threshold, self.min_kept = threshold, min_kept

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the pixels that count."""
        target: Tensor = batch["mask"]
        losses = F.cross_entropy(resized(student, target.shape[-2:]), target, ignore_index=IGNORE, reduction="none")
        labelled = target != IGNORE
        # Of pixels without a label the probability is 2 here: they are never among the hardest, and sort last.
        probability = torch.where(labelled, (-losses.detach()).exp(), 2.0)
        everywhere = self._of_all_processes(probability)
        known = everywhere[everywhere <= 1]
        if not len(known):
            return losses.sum()
        limit = ohem_keeps(known, self.threshold, self.min_kept * len(everywhere))
        return torch.where(probability <= limit, losses, 0.0).sum() * world_size() / (known <= limit).sum()

    def _of_all_processes(self, values: Tensor) -> Tensor:
        if world_size() == 1:
            return values
        sizes = gather_with_grad(torch.tensor([len(values)], device=values.device)).tolist()
        return gather_with_grad(values, sizes)


def full_size(outputs: Outputs, batch: Batch) -> Tensor:
    """Logits `[B, K, H, W]` at the size of the images, in float32 at least; resized as the task's own loss does it.

    Raises:
        ModelError: if there are none for each pixel.
    """
    return resized(outputs, batch["image"].shape[-2:])


def resized(outputs: Outputs, size: torch.Size) -> Tensor:
    """As `full_size`, of any height and width."""
    logits = outputs.need("logits")
    if logits.ndim != 4:
        raise ModelError(f"classes of pixels need logits [B, K, h, w], but the model gives {list(logits.shape)}")
    logits = at_least_float32(logits)
    return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)
