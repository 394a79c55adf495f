"""Boundary privileged distillation: the loss of a segmentation net, split at the contours of the ground truth.

Source: Liu et al. 2024, "BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation", WACV
(arXiv 2306.08075). Shapes: logits ``[B, C, h, w]`` as they leave the head, labels ``[B, H, W]`` at full resolution.
Everything is computed in float32 at least, and the teacher's side never receives a gradient.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Alpha = float | Sequence[float] | Tensor
EdgeNorm = Literal["per_class", "total"]

# Elements of the one-hot labels held at a time: 64 MiB in float32.
_CHUNK_ELEMENTS = 2**24


def edge_mask(
    labels: Tensor, num_classes: int, out_size: tuple[int, int], *, width: int = 7, ignore_index: int = 255
) -> Tensor:
    """Soft map of each class's own contour at the resolution of the logits.

    A class's contour is its dilation minus its erosion, so a pixel beside an A/B border belongs to the edges of A and
    B and of no other class. Morphology runs at label resolution, because on reduced labels the band would widen by
    the stride. The frame of the image is no contour. Pixels whose window touches an ignored pixel are no contour
    either, or the outline of every void region would count as one.

    Args:
        labels: class indices ``[B, H, W]``; `ignore_index` marks void.
        num_classes: C.
        out_size: ``(h, w)`` of the logits.
        width: side of the square window in label pixels, odd.
        ignore_index: label of void pixels.

    Returns:
        float32 ``[B, C, h, w]`` in [0, 1]: the share of a cell's pixels that lie on the contour.

    Raises:
        ValueError: if `width` is not odd and positive, or `labels` is not ``[B, H, W]``.
    """
    _check_labels(labels)
    if width < 1 or width % 2 == 0:
        raise ValueError(f"the edge width must be odd and positive, so that the window has a centre, not {width}")
    labels = labels.unsqueeze(1)
    far_from_void = _dilate((labels == ignore_index).float(), width) == 0
    # One-hot labels of all classes at full resolution would need gigabytes at C = 150.
    chunk = max(1, _CHUNK_ELEMENTS // labels.numel())
    masks = []
    for first in range(0, num_classes, chunk):
        classes = torch.arange(first, min(first + chunk, num_classes), device=labels.device)
        inside = (labels == classes.view(1, -1, 1, 1)).float()
        eroded = 1 - _dilate(1 - inside, width)
        edge = (_dilate(inside, width) - eroded) * far_from_void
        masks.append(F.adaptive_avg_pool2d(edge, out_size))
    return torch.cat(masks, dim=1)


def valid_mask(labels: Tensor, out_size: tuple[int, int], *, ignore_index: int = 255) -> Tensor:
    """Which cells of the logits see at least one labelled pixel.

    Args:
        labels: class indices ``[B, H, W]``.
        out_size: ``(h, w)`` of the logits.
        ignore_index: label of void pixels.

    Returns:
        bool ``[B, 1, h, w]``.

    Raises:
        ValueError: if `labels` is not ``[B, H, W]``.
    """
    _check_labels(labels)
    return F.adaptive_avg_pool2d((labels != ignore_index).float().unsqueeze(1), out_size) > 0


def masked_pixel_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """``T^2 * KL(teacher || student)`` over the classes of each pixel, after multiplying the logits by a mask.

    A suppressed class keeps logit 0 in both nets, so a pixel that is masked in every class contributes exactly 0.

    Args:
        student_logits: ``[B, C, h, w]``.
        teacher_logits: the same shape.
        mask: broadcastable to the logits, in [0, 1].
        temperature: T > 0.

    Returns:
        ``[B, 1, h, w]``.

    Raises:
        ValueError: if the shapes differ or T <= 0.
    """
    student, teacher = _prepare(student_logits, teacher_logits, mask, temperature)
    divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    return temperature**2 * divergence.sum(dim=1, keepdim=True)


def channel_wise_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """``T^2 / C * sum_c KL(teacher || student)`` over the positions of each channel, averaged over the batch.

    Source: Shu et al. 2021, "Channel-wise Knowledge Distillation for Dense Prediction" (arXiv 2011.13256).

    Args:
        student_logits: ``[B, C, h, w]``.
        teacher_logits: the same shape.
        mask: multiplied onto both logits first, broadcastable to them.
        temperature: T > 0.

    Raises:
        ValueError: if the shapes differ or T <= 0.
    """
    student, teacher = _prepare(student_logits, teacher_logits, mask, temperature)
    student, teacher = student.flatten(2).log_softmax(-1), teacher.flatten(2).log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * divergence.mean()


def edge_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    edge: Tensor,
    valid: Tensor | None = None,
    *,
    alpha: Alpha = 2.0,
    temperature: float = 1.0,
    edge_norm: EdgeNorm = "per_class",
    pre_mask: bool = True,
    post_mask: bool = True,
) -> Tensor:
    """Pixel-wise divergence on the contours, weighted class by class.

    ``mean_B sum_c alpha_c / n_c * sum_i phi_i * edge_{c,i}`` with phi from `masked_pixel_kl` and n_c the number of
    cells of one image where the edge of class c is positive. A class without edges contributes 0.

    Args:
        student_logits: ``[B, C, h, w]``.
        teacher_logits: the same shape.
        edge: ``[B, C, h, w]`` from `edge_mask`.
        valid: bool ``[B, 1, h, w]`` from `valid_mask`; only read without post-mask. None means everywhere.
        alpha: one weight, or one per class.
        temperature: T > 0.
        edge_norm: ``"per_class"`` divides by n_c, ``"total"`` by the sum of n_c over classes (about C times smaller).
        pre_mask: multiply the logits by the edge mask before the softmax.
        post_mask: weight the divergence by the edge mask; without, the loss is its mean over an image's valid cells.

    Raises:
        ValueError: if shapes differ, `alpha` has a wrong length, T <= 0 or `edge_norm` is unknown.
    """
    if edge_norm not in ("per_class", "total"):
        raise ValueError(f"edge_norm must be 'per_class' or 'total', not {edge_norm!r}")
    mask = edge if pre_mask else None
    divergence = masked_pixel_kl(student_logits, teacher_logits, mask, temperature=temperature)
    if not post_mask:
        valid = torch.ones_like(divergence, dtype=torch.bool) if valid is None else valid
        return ((divergence * valid).sum(dim=(1, 2, 3)) / valid.sum(dim=(1, 2, 3)).clamp(min=1)).mean()
    per_class = (divergence * edge).sum(dim=(2, 3))
    count = (edge > 0).sum(dim=(2, 3))
    if edge_norm == "total":
        count = count.sum(dim=1, keepdim=True)
    weighted = _class_weights(alpha, per_class) * per_class / count.clamp(min=1)
    return weighted.sum(dim=1).mean()


def body_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    edge: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Channel-wise divergence of what the contours leave over, a constraint on the shape of each class.

    Args:
        student_logits: ``[B, C, h, w]``.
        teacher_logits: the same shape.
        edge: ``[B, C, h, w]`` from `edge_mask`; the body is its complement.
        valid: bool ``[B, 1, h, w]`` from `valid_mask`; cells without a label belong to no body.
        temperature: T > 0.

    Raises:
        ValueError: if the shapes differ or T <= 0.
    """
    body = 1 - edge if valid is None else (1 - edge) * valid
    return channel_wise_kl(student_logits, teacher_logits, body, temperature=temperature)


def bpkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    width: int = 7,
    alpha: Alpha = 2.0,
    temperature: float = 1.0,
    edge_norm: EdgeNorm = "per_class",
    pre_mask: bool = True,
    post_mask: bool = True,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> dict[str, Tensor]:
    """Both terms of the method, unweighted; the paper adds them to the segmentation loss times 50 and 20.

    Args:
        student_logits: ``[B, C, h, w]``.
        teacher_logits: ``[B, C, h', w']``, resized bilinearly to the student's size.
        labels: class indices ``[B, H, W]``.
        width: side of the edge window in label pixels, odd.
        alpha: weight of the edge term, one or one per class.
        temperature: T > 0 of both terms.
        edge_norm: see `edge_loss`.
        pre_mask: see `edge_loss`.
        post_mask: see `edge_loss`.
        ignore_index: label of void pixels.
        align_corners: of the bilinear resizing.

    Returns:
        ``{"edge": scalar, "body": scalar}``.

    Raises:
        ValueError: for shapes or options that do not fit.
    """
    num_classes, height, columns = student_logits.shape[1:]
    size = (height, columns)
    if teacher_logits.shape[-2:] != size:
        teacher_logits = F.interpolate(
            _at_least_float32(teacher_logits), size=size, mode="bilinear", align_corners=align_corners
        )
    edge = edge_mask(labels, num_classes, size, width=width, ignore_index=ignore_index)
    valid = valid_mask(labels, size, ignore_index=ignore_index)
    edge_term = edge_loss(
        student_logits,
        teacher_logits,
        edge,
        valid,
        alpha=alpha,
        temperature=temperature,
        edge_norm=edge_norm,
        pre_mask=pre_mask,
        post_mask=post_mask,
    )
    body_term = body_loss(student_logits, teacher_logits, edge, valid, temperature=temperature)
    return {"edge": edge_term, "body": body_term}


def _dilate(mask: Tensor, width: int) -> Tensor:
    """Maximum over a `width` x `width` window, as two passes; the implicit padding never wins."""
    pad = width // 2
    rows = F.max_pool2d(mask, (width, 1), stride=1, padding=(pad, 0))
    return F.max_pool2d(rows, (1, width), stride=1, padding=(0, pad))


def _prepare(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Check, detach the teacher, mask both and divide by the temperature."""
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    if student.ndim != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} must both be "
            "[B, C, h, w] of one shape: the same classes at the same resolution"
        )
    student, teacher = _at_least_float32(student), _at_least_float32(teacher.detach())
    if mask is not None:
        student, teacher = student * mask, teacher * mask
    return student / temperature, teacher / temperature


def _class_weights(alpha: Alpha, like: Tensor) -> Tensor:
    """`alpha` as a tensor that multiplies ``[B, C]``."""
    weights = torch.as_tensor(alpha, dtype=like.dtype, device=like.device)
    if weights.ndim and weights.shape != like.shape[1:]:
        raise ValueError(f"alpha needs one weight or one per class ({like.shape[1]}), but has {list(weights.shape)}")
    return weights


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 3:
        raise ValueError(f"labels must be class indices [B, H, W], but have shape {list(labels.shape)}")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
