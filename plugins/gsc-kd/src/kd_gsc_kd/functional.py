"""Who teaches where, and what is learned from it.

Source: Zhu et al. 2023, "A Good Student is Cooperative and Reliable: CNN-Transformer Collaborative Learning for
Semantic Segmentation", ICCV (arXiv 2307.12574). The formulas are a reconstruction: the paper's code is not public.

Shapes: logits ``[B, K, h, w]``, labels ``[B, H, W]``, errors and masks ``[B, H, W]`` or, of regions, ``[B, R, S]``. No
gradient flows to the side that teaches, nor through a mask. Divergences and cosines are computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def resize(maps: Tensor, size: Grid) -> Tensor:
    """Maps ``[B, C, h, w]`` bilinearly brought to another grid; as they are, if it is the same."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def resize_labels(labels: Tensor, size: Grid) -> Tensor:
    """Labels ``[B, H, W]`` on another grid: each cell has the pixel nearest to its centre."""
    if tuple(labels.shape[-2:]) == tuple(size):
        return labels
    found: Tensor = F.interpolate(labels[:, None].double(), size, mode="nearest-exact")[:, 0].to(labels.dtype)
    return found


def pixel_errors(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of each pixel ``[B, H, W]``, of logits brought to the size of the labels; 0 where it is ignored."""
    logits = resize(logits.float(), grid_of(labels))
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


def pixel_direction(errors_a: Tensor, errors_b: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Where a teaches b, the one with the lower error, and where b teaches a: the other valid pixels.

    Args:
        errors_a, errors_b: of each pixel, at the same resolution.
        valid: pixels with a label; no direction is taken from any other.
    """
    better = (errors_a < errors_b) & valid
    return better, valid & ~better


def region_direction(errors_a: Tensor, errors_b: Tensor, grid: Grid, valid: Tensor | None = None) -> Tensor:
    """Regions in which a teaches b: those where its mean error over valid pixels is lower. Neither teaches on a tie, or
    in a region without valid pixels.

    Args:
        errors_a, errors_b: of each pixel, ``[B, H, W]``.
        grid: rows and columns of regions, as even as can be.
        valid: pixels that count; default: all.

    Returns:
        A mask ``[B, *grid]``.
    """
    counts = torch.ones_like(errors_a) if valid is None else valid.to(errors_a.dtype)
    both = torch.stack([errors_a * counts, errors_b * counts], 1)
    means = F.adaptive_avg_pool2d(both.detach(), grid)  # over all pixels of a region: the same factor for both
    return means[:, 0] < means[:, 1]


def region_features(maps: Tensor, grid: Grid) -> Tensor:
    """The mean of a map ``[B, D, h, w]`` in each region, of length one: ``[B, D, *grid]``."""
    return F.normalize(F.adaptive_avg_pool2d(maps.float(), grid), dim=1)


def selective_region_cosine(student: Tensor, teacher: Tensor, mask: Tensor, over: Tensor | None = None) -> Tensor:
    """``sum_r m_r (1 - <u_student, u_teacher>) / max(1, sum_r m_r)`` over regions.

    Args:
        student, teacher: features of length one, ``[B, D, R, S]``.
        mask: regions in which the student is taught, ``[B, R, S]``.
        over: what the sum is divided by, where it is another number than that of the regions in the mask.

    Raises:
        ValueError: if shapes differ.
    """
    _same_shape(student, teacher, "region features")
    distances = 1 - (student * teacher.detach()).sum(1)
    return _masked_mean(distances, mask, over)


def selective_pixel_kl(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0, over: Tensor | None = None
) -> Tensor:
    """``T^2 sum_i m_i KL(softmax(teacher / T) || softmax(student / T)) / max(1, sum_i m_i)`` over pixels.

    Args:
        student, teacher: logits ``[B, K, h, w]``.
        mask: pixels at which the student is taught, ``[B, h, w]``.
        temperature: T.
        over: what the sum is divided by, where it is another number than that of the pixels in the mask.

    Raises:
        ValueError: if shapes differ.
    """
    _same_shape(student, teacher, "logits")
    ours = (student.float() / temperature).log_softmax(1)
    theirs = (teacher.detach().float() / temperature).log_softmax(1)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return temperature**2 * _masked_mean(divergence, mask, over)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos`` over the channels of two maps ``[B, C, h, w]``, mean over positions. Raises `ValueError` if shapes
    differ."""
    _same_shape(student, teacher, "maps")
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=1).mean()


def grid_of(maps: Tensor) -> Grid:
    """Height and width."""
    height, width = maps.shape[-2:]
    return height, width


def smaller_grid(one: Tensor, other: Tensor) -> Grid:
    """Height and width of the map that has fewer positions."""
    return min(grid_of(one), grid_of(other), key=lambda grid: grid[0] * grid[1])


def _masked_mean(values: Tensor, mask: Tensor, over: Tensor | None) -> Tensor:
    if values.shape != mask.shape:
        raise ValueError(f"a mask {list(mask.shape)} does not fit values {list(values.shape)}")
    total = values.where(mask, 0.0).sum()
    return total / (mask.sum().clamp(min=1) if over is None else over)


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"{what} {list(student.shape)} and {list(teacher.shape)} differ in shape")
