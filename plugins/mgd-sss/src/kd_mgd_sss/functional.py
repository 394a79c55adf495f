"""The three granularities, and how unlabelled images are mixed.

Source: Qin, Wu et al. 2022, "Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic
Segmentation", ECCV (arXiv 2208.10169), and its official code. The boxes are those of French et al. 2020,
"Semi-supervised semantic segmentation needs strong, varied perturbations", BMVC (arXiv 1906.01916).

Logits are ``[B, K, H, W]`` at the size of the image, features ``[B, D, h, w]``. Everything is computed in float32 at
least, and the teacher's side never receives a gradient.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_classic.functional.logits import at_least_float32

EPSILON = 1e-8


def box_masks(
    rng: np.random.RandomState, count: int, size: tuple[int, int], n_boxes: int = 3,
    prop: tuple[float, float] = (0.25, 0.5),
) -> Tensor:  # fmt: skip
    """Masks of random boxes. A mask begins with 0, and each box turns over what it covers, so that overlaps cancel.

    A box has the area ``p / n_boxes`` of the image, where p is uniform in `prop`; its height is ``p ** u`` and its
    width ``p ** (1 - u)`` of the image's, times ``sqrt(1 / n_boxes)``, with u uniform in [0, 1]. It lies anywhere
    inside.

    Args:
        rng: gives the numbers: all areas first, then all aspects, then all places.
        count: how many masks.
        size: height and width in pixels.
        n_boxes: boxes of a mask.
        prop: range of p.

    Returns:
        ``[count, 1, H, W]`` of 0 and 1.
    """
    area = rng.uniform(*prop, size=(count, n_boxes))
    aspect = rng.uniform(size=(count, n_boxes))
    sides = np.stack([area**aspect, area ** (1 - aspect)], -1) * np.sqrt(1 / n_boxes)
    extent = np.round(sides * size)
    start = np.round((np.array(size) - extent) * rng.uniform(size=extent.shape))
    boxes = np.concatenate([start, start + extent], -1).astype(int)
    masks = torch.zeros(count, 1, *size)
    for mask, its_boxes in zip(masks, boxes.tolist(), strict=True):
        for top, left, bottom, right in its_boxes:
            mask[:, top:bottom, left:right] = 1 - mask[:, top:bottom, left:right]
    return masks


def cut_mix(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """The second where the mask is 1, the first where it is 0.

    Args:
        first, second: images ``[B, C, H, W]``, or classes of pixels ``[B, H, W]``.
        mask: ``[B, 1, H, W]``; sizes of 1 are repeated.

    Raises:
        ValueError: if the two differ in shape, or the mask does not fit them.
    """
    paste = mask.bool() if first.ndim == 4 else mask[:, 0].bool()
    fits = all(p in (1, n) for p, n in zip(paste.shape[-2:], first.shape[-2:], strict=True))
    if first.shape != second.shape or not fits or len(paste) not in (1, len(first)):
        raise ValueError(
            f"images {list(first.shape)} and {list(second.shape)} cannot be mixed by a mask {list(mask.shape)}"
        )
    return torch.where(paste, second, first)


def hard_pseudo_ce(student: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of logits ``[B, K, H, W]`` with a teacher's classes ``[B, H, W]``, mean over all pixels."""
    return F.cross_entropy(at_least_float32(student), classes)


def gap_logit_l1(student: Tensor, teacher: Tensor, reduction: str = "sum") -> Tensor:
    """Image level: L1 distance of the logits' means over the image, summed over the classes.

    Args:
        student, teacher: logits ``[B, K, H, W]``; their sizes may differ.
        reduction: ``sum`` over the images, or their mean (``batchmean``).

    Raises:
        ValueError: if batches or classes differ.
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"needs logits [B, K, H, W] of the same K, not {list(student.shape)} and {list(teacher.shape)}"
        )
    ours, theirs = (at_least_float32(logits).mean((2, 3)) for logits in (student, teacher.detach()))
    total = (ours - theirs).abs().sum()
    return total if reduction == "sum" else total / len(student)


def region_similarity(features: Tensor, grid: int = 7) -> Tensor:
    """Cosines ``[B, grid ** 2, grid ** 2]`` between all regions of a map ``[B, D, h, w]``, which is averaged over the
    cells of the grid."""
    regions = F.adaptive_avg_pool2d(at_least_float32(features), grid).flatten(2)
    regions = F.normalize(regions, dim=1, eps=EPSILON)
    return regions.transpose(1, 2) @ regions


def region_cosine_mse(student: Tensor, teacher: Tensor, grid: int = 7) -> Tensor:
    """Region level: mean squared difference of `region_similarity` between student and teacher.

    Channels and sizes may differ.

    Raises:
        ValueError: if batches differ, or a map is smaller than the grid: its regions would be copies of each other.
    """
    for features in (student, teacher):
        if features.ndim != 4 or len(features) != len(student) or min(features.shape[-2:]) < grid:
            raise ValueError(f"needs maps [B, D, h, w] of {grid} x {grid} or more, not {list(features.shape)}")
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(region_similarity(student, grid), region_similarity(teacher.detach(), grid))


def ohem_keeps(true_probability: Tensor, threshold: float, min_kept: int) -> Tensor:
    """The probability up to which pixels count: `threshold`, or what lets at least `min_kept` of them count.

    Args:
        true_probability: of the label, of every labelled pixel, ``[N]``; at least one.

    Returns:
        A scalar.
    """
    kept = min(min_kept, len(true_probability))
    least = true_probability.new_tensor(threshold)
    return least if not kept else torch.maximum(least, true_probability.kthvalue(kept).values)
