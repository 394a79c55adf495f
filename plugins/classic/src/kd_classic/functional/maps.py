"""Losses for dense prediction."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kd_classic.functional.logits import at_least_float32, check_temperature, soften


def cwd(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    temperature: float = 4.0,
    norm: Literal["channel", "spatial", "mse"] = "channel",
) -> Tensor:
    """Channel-wise distillation: each channel's map, as a distribution over positions, is that of the teacher.

    ``T^2 / (B * Ch) * sum KL(phi_t || phi_s)`` with ``phi`` the softmax over positions. Source: Shu et al. 2021,
    "Channel-wise Knowledge Distillation for Dense Prediction", equations 4 and 5 (arXiv 2011.13256).

    Args:
        student_features: ``[B, Ch, H, W]``, score maps or features of the teacher's width.
        teacher_features: the same shape.
        temperature: T > 0.
        norm: ``"channel"``; ``"spatial"`` for a softmax over channels, averaged over batch and positions (pixel-wise
            KD); ``"mse"`` for the plain mean squared error, without temperature.

    Raises:
        ValueError: if shapes differ, T <= 0 or `norm` is unknown.
    """
    check_temperature(temperature)
    if norm not in ("channel", "spatial", "mse"):
        raise ValueError(f"norm must be 'channel', 'spatial' or 'mse', not {norm!r}")
    if student_features.shape != teacher_features.shape or student_features.ndim != 4:
        raise ValueError(f"cwd compares maps [B, Ch, H, W] of one shape, not {list(student_features.shape)} and "
                         f"{list(teacher_features.shape)}")  # fmt: skip
    student, teacher = at_least_float32(student_features), at_least_float32(teacher_features.detach())
    if norm == "mse":
        return F.mse_loss(student, teacher)
    if norm == "channel":
        student, teacher = student.flatten(0, 1).flatten(1), teacher.flatten(0, 1).flatten(1)
    else:
        student, teacher = (f.movedim(1, -1).flatten(0, 2) for f in (student, teacher))
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def skd_pixelwise(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    standardize: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Pixel-wise soft cross-entropy, summed over batch and pixels and divided by ``H * W``: it grows with the batch.

    Source: Liu et al. 2019, "Structured Knowledge Distillation for Semantic Segmentation", equation 1 (arXiv
    1903.04197), with the factor of the authors' code.

    Args:
        student_logits: ``[B, C, H, W]``.
        teacher_logits: the same shape.
        target: ``[B, H, W]``, used only to leave out pixels equal to `ignore_index`.
        temperature: T > 0, of both softmaxes; there is no factor T^2.
        standardize: apply `logit_standardize` to both sides first.
        ignore_index: label of pixels that do not count.

    Raises:
        ValueError: if shapes differ or T <= 0.
    """
    if student_logits.ndim != 4:
        raise ValueError(f"needs score maps [B, C, H, W], but they have shape {list(student_logits.shape)}")
    student, teacher = soften(student_logits, teacher_logits, temperature, standardize)
    values = F.cross_entropy(student, teacher.softmax(dim=1), reduction="none")
    if target is not None:
        if target.shape != values.shape:
            raise ValueError(f"score maps {list(student.shape)} need a target {list(values.shape)}, not "
                             f"{list(target.shape)}")  # fmt: skip
        values = values * (target != ignore_index)
    return values.sum() / (student.shape[2] * student.shape[3])


def skd_pairwise(student_features: Tensor, teacher_features: Tensor, *, scale: float = 0.5) -> Tensor:
    """Pair-wise similarity of regions: squared difference of the cosines between all pairs of pooled positions.

    Both maps are max-pooled with kernel and stride ``int(size * scale)``, and their vectors divided by their length,
    through which no gradient flows. Source: Liu et al. 2019, equation 2 (arXiv 1903.04197), as in the authors' code.

    Args:
        student_features: ``[B, Ch, H, W]``.
        teacher_features: ``[B, Ch', H, W]``.
        scale: size of a region, in (0, 1].

    Raises:
        ValueError: if the maps differ in size, `scale` is not in (0, 1], or a region would be smaller than a pixel.
    """
    one, two = student_features.shape, teacher_features.shape
    if len(one) != 4 or len(two) != 4 or one[0] != two[0] or one[2:] != two[2:]:
        raise ValueError(f"needs maps of one size, [B, Ch, H, W], not {list(one)} and {list(two)}")
    if not 0 < scale <= 1:
        raise ValueError(f"the scale must be in (0, 1], not {scale}")
    height, width = (int(size * scale) for size in teacher_features.shape[-2:])
    if not height or not width:
        raise ValueError(f"a scale of {scale} makes regions of less than a pixel of {list(teacher_features.shape)}")
    grams = []
    for features in (at_least_float32(student_features), at_least_float32(teacher_features.detach())):
        nodes = F.max_pool2d(features, (height, width), (height, width), ceil_mode=True).flatten(2)
        nodes = nodes / (nodes.detach().norm(dim=1, keepdim=True) + 1e-8)
        grams.append(nodes.transpose(1, 2) @ nodes)
    return (grams[1] - grams[0]).square().sum() / grams[0].shape[1] ** 2 / len(student_features)
