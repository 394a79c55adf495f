"""Parts of the losses that have no parameters.

Source: Liu et al. 2024, "TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation", IEEE T-ITS
(arXiv 2202.13393). Shapes: maps ``[B, C, H, W]``, tokens ``[B, H*W, C]`` row by row. The hierarchical context loss
between maps is `kd_classic.functional.hcl`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 4

Grid = tuple[int, int]


def as_tokens(embedding: Tensor, stage: Tensor) -> Tensor:
    """A patch embedding as tokens ``[B, H*W, C]``.

    Args:
        embedding: tokens already, or ``[B, H, W, C]``, or ``[B, C, H, W]``; of width and grid of its stage.
        stage: the map ``[B, C, H, W]`` that comes out of the stage.

    Raises:
        ValueError: if it is none of these.
    """
    batch, channels, height, width = stage.shape
    if embedding.shape == (batch, height * width, channels):
        return embedding
    if embedding.shape == (batch, height, width, channels):
        return embedding.flatten(1, 2)
    if embedding.shape == stage.shape:
        return embedding.flatten(2).transpose(1, 2)
    raise ValueError(
        f"a patch embedding has the width and the grid of its stage: {list(stage.shape)} goes with "
        f"[{batch}, {height * width}, {channels}], not with {list(embedding.shape)}"
    )


def resize_map(features: Tensor, size: Grid) -> Tensor:
    """Maps ``[B, C, H, W]`` bilinearly brought to another grid; as they are, if it is the same."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def resize_tokens(tokens: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Tokens ``[B, H*W, C]`` of one grid brought to another, as `resize_map` does."""
    if grid == size:
        return tokens
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    return resize_map(maps, size).flatten(2).transpose(1, 2)


def embedding_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i * MSE(student_i, teacher_i)`` over stages, each a mean over all elements, in float32.

    Args:
        students: aligned embeddings, one ``[B, N, C]`` per stage.
        teachers: as many, of the same shapes; no gradient flows to them.
        weights: one per stage.

    Raises:
        ValueError: if numbers or shapes differ.
    """
    if not len(students) == len(teachers) == len(weights) > 0:
        raise ValueError(f"every stage needs two embeddings and a weight, but there are {len(students)} of the "
                         f"student, {len(teachers)} of the teacher and {len(weights)} weights")  # fmt: skip
    terms = []
    for student, teacher, weight in zip(students, teachers, weights, strict=True):
        if student.shape != teacher.shape:
            raise ValueError(f"embeddings {list(student.shape)} and {list(teacher.shape)} differ in shape")
        terms.append(weight * F.mse_loss(student.float(), teacher.detach().float()))
    return torch.stack(terms).sum()


def reduce_labels(labels: Tensor, stride: int = STRIDE) -> Tensor:
    """Labels ``[B, H, W]`` at a stride: the pixel nearest to the centre of each cell, ``[B, ceil(H/s), ceil(W/s)]``.

    Raises:
        ValueError: if `labels` is not ``[B, H, W]``.
    """
    if labels.ndim != 3:
        raise ValueError(f"labels must be [B, H, W], not {list(labels.shape)}")
    rows, columns = (_nearest(size, -(-size // stride), labels.device) for size in labels.shape[-2:])
    return labels[:, rows][:, :, columns]


def _nearest(size: int, cells: int, device: torch.device) -> Tensor:
    return ((torch.arange(cells, device=device) + 0.5) * (size / cells)).long()


def strided_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, ignore_index: int = 255
) -> Tensor:
    """Cross-entropy at stride 4, where the labels are reduced and not the logits enlarged.

    Args:
        logits: ``[B, C, h, w]``; resized, if they are of another stride.
        labels: classes ``[B, H, W]`` at full size.
        weights: ``[C]``; the mean is that of weighted pixels, divided by the sum of their weights.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: if there are not as many weights as classes, or `labels` is not ``[B, H, W]``.
    """
    if weights is not None and len(weights) != logits.shape[1]:
        raise ValueError(f"there are {len(weights)} class weights, but logits of {logits.shape[1]} classes")
    target = reduce_labels(labels)
    size = (target.shape[1], target.shape[2])
    total = F.cross_entropy(resize_map(logits.float(), size), target, weights, ignore_index=ignore_index,
                            reduction="sum")  # fmt: skip
    counted = label_weight(target, weights, ignore_index=ignore_index)
    return total / counted.clamp(min=torch.finfo(torch.float32).tiny)


def label_weight(labels: Tensor, weights: Tensor | None = None, *, ignore_index: int = 255) -> Tensor:
    """The sum of the class weights over the labels that count (their number, without weights), as a scalar."""
    found = labels[labels != ignore_index]
    return torch.tensor(float(found.numel()), device=labels.device) if weights is None else weights[found].sum()
