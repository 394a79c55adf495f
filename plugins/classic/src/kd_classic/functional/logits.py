"""Losses on logits.

Layout of logits: ``[B, C]`` for classification, ``[B, T, V]`` for sequences, ``[B, C, H, W]`` for dense prediction.
Positions of the last two are treated as samples of one large batch.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def flatten_positions(logits: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Turn every position into a row.

    Args:
        logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]``.
        target: class indices of shape ``[B]``, ``[B, T]`` or ``[B, H, W]``.

    Returns:
        Logits ``[N, C]`` and target ``[N]`` with ``N`` = number of positions, row-major over the batch.

    Raises:
        ValueError: for another number of dimensions, or a target that does not fit the logits.
    """
    if logits.ndim not in (2, 3, 4):
        raise ValueError(f"logits must be [B, C], [B, T, V] or [B, C, H, W], but have shape {list(logits.shape)}")
    positions = logits.movedim(1, -1) if logits.ndim == 4 else logits
    if target is not None and target.shape != positions.shape[:-1]:
        raise ValueError(
            f"logits of shape {list(logits.shape)} need a target of shape {list(positions.shape[:-1])}, "
            f"but it has shape {list(target.shape)}"
        )
    return positions.reshape(-1, positions.shape[-1]), None if target is None else target.reshape(-1)


def classes_second(logits: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Logits with their classes in dimension 1, without a copy, and the target that belongs to them.

    Args:
        logits, target: as for `flatten_positions`.

    Returns:
        Logits ``[N, C]`` and target ``[N]``, as `flatten_positions` gives them, or for maps ``[B, C, H * W]`` and
        ``[B, H * W]``: a softmax over few classes is several times faster across rows of pixels than along rows of
        classes.

    Raises:
        ValueError: as `flatten_positions`.
    """
    if logits.ndim != 4 or (target is not None and target.shape != logits[:, 0].shape):
        return flatten_positions(logits, target)
    return logits.flatten(2), None if target is None else target.flatten(1)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy in nats, averaged over the positions whose target is not `ignore_index`.

    Unlike ``torch.nn.functional.cross_entropy`` a batch without any valid position gives 0 instead of NaN, and the
    class dimension of ``[B, T, V]`` is the last one.

    Args:
        logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]``.
        target: class indices ``[B]``, ``[B, T]`` or ``[B, H, W]``.
        label_smoothing: mass spread evenly over all classes, the labelled one included.
        ignore_index: label of positions that do not count.
        reduction: ``"mean"``, or ``"none"`` for values shaped like `target`, 0 where ignored.

    Raises:
        ValueError: if the shapes do not fit or `reduction` is unknown.
    """
    rows, labels = classes_second(at_least_float32(logits), target)
    assert labels is not None
    values = F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    return reduce_positions(values, labels != ignore_index, target.shape, reduction)


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["batchmean", "mean", "none"] = "batchmean",
) -> Tensor:
    """Soft-target distillation, ``T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2
    (arXiv 1503.02531). The factor ``T^2`` keeps the size of the gradient independent of the temperature.

    Args:
        student_logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]``.
        teacher_logits: the same shape.
        target: class indices, used only to leave out positions equal to `ignore_index`.
        temperature: T > 0.
        standardize: apply `logit_standardize` to both sides first.
        ignore_index: label of positions that do not count.
        reduction: ``"batchmean"`` sums over classes and averages over valid positions; ``"mean"`` also averages over
            classes (C times smaller; the default of ``KLDivLoss`` that some published code relies on);
            ``"none"`` gives one value per position, 0 where ignored.

    Raises:
        ValueError: if shapes or class counts differ, T <= 0 or `reduction` is unknown.
    """
    student, teacher = soften(student_logits, teacher_logits, temperature, standardize)
    student_rows, labels = classes_second(student, target)
    teacher_rows, _ = classes_second(teacher)
    values = temperature**2 * kl(F.log_softmax(teacher_rows, dim=1), F.log_softmax(student_rows, dim=1))
    if reduction == "mean":
        values = values / student_rows.shape[1]
    valid = None if labels is None else labels != ignore_index
    shape = _position_shape(student_logits)
    return reduce_positions(values, valid, shape, "mean" if reduction == "batchmean" else reduction)


def logit_standardize(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Z-score over the classes of each position: ``(z - mean) / (eps + std)`` with the unbiased std.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", equation 9 (arXiv 2403.01427).
    The result keeps the shape of `logits` and is invariant to ``z -> a z + b`` for a > 0; gradients flow through
    mean and std. Rows of equal logits give 0 with a finite gradient.

    Args:
        logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]`` with at least two classes.
        eps: added to the standard deviation.

    Raises:
        ValueError: if there is only one class.
    """
    classes = 1 if logits.ndim == 4 else logits.ndim - 1
    if logits.shape[classes] < 2:
        raise ValueError("logit standardisation needs at least two classes, because it divides by their deviation")
    logits = at_least_float32(logits)
    centred = logits - logits.mean(dim=classes, keepdim=True)
    variance = centred.square().sum(dim=classes, keepdim=True) / (logits.shape[classes] - 1)
    # The square root has an infinite slope at 0, so constant rows take a path around it.
    constant = variance == 0
    std = variance.masked_fill(constant, 1.0).sqrt().masked_fill(constant, 0.0)
    return centred / (eps + std)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardize: bool = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Decoupled distillation, ``T^2 * (alpha * TCKD + beta * NCKD)``.

    TCKD is the divergence of the two-way split (target, all other classes); NCKD is the divergence among the other
    classes, renormalised without the target. Source: Zhao et al. 2022, "Decoupled Knowledge Distillation",
    equation 7 (arXiv 2203.08679). Everything stays in log space: ``1 - p_target`` may underflow.

    Args:
        student_logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]`` with at least two classes.
        teacher_logits: the same shape.
        target: class indices ``[B]``, ``[B, T]`` or ``[B, H, W]``.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T > 0.
        standardize: apply `logit_standardize` to both sides first.
        ignore_index: label of positions that do not count.
        reduction: ``"mean"`` over valid positions, or ``"none"`` for values shaped like `target`, 0 where ignored.

    Raises:
        ValueError: if shapes or class counts differ, there is one class, T <= 0 or `reduction` is unknown.
    """
    student, teacher = soften(student_logits, teacher_logits, temperature, standardize)
    student_rows, labels = classes_second(student, target)
    teacher_rows, _ = classes_second(teacher)
    assert labels is not None
    if student_rows.shape[1] < 2:
        raise ValueError("dkd needs at least two classes, because it compares the target with the others")
    valid = labels != ignore_index
    labels = labels.where(valid, 0)
    student_split, student_others = _decouple(student_rows, labels)
    teacher_split, teacher_others = _decouple(teacher_rows, labels)
    values = alpha * kl(teacher_split, student_split) + beta * kl(teacher_others, student_others)
    return reduce_positions(temperature**2 * values, valid, target.shape, reduction)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    standardize: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """Correlation of predictions instead of their divergence, ``tau^2 * (beta * inter + gamma * intra)``.

    ``inter`` is one minus the Pearson correlation of a sample's class probabilities, averaged over samples; ``intra``
    is one minus the correlation of a class's probabilities over the batch, averaged over classes. Source: Huang et
    al. 2022, "Knowledge Distillation from A Stronger Teacher", equations 6 to 9 (arXiv 2205.10536).

    With a single position the intra term is constant 1. Every position of a dense input counts.

    Args:
        student_logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]``.
        teacher_logits: the same shape.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.
        tau: temperature of both softmaxes, > 0.
        standardize: apply `logit_standardize` to both sides first.
        eps: added to the product of the norms.

    Raises:
        ValueError: if shapes or class counts differ or tau <= 0.
    """
    student, teacher = soften(student_logits, teacher_logits, tau, standardize)
    student_probs = flatten_positions(student)[0].softmax(dim=1)
    teacher_probs = flatten_positions(teacher)[0].softmax(dim=1)
    inter = 1 - _pearson(student_probs, teacher_probs, eps).mean()
    intra = 1 - _pearson(student_probs.T, teacher_probs.T, eps).mean()
    return tau**2 * (beta * inter + gamma * intra)


def soften(student: Tensor, teacher: Tensor, temperature: float, standardize: bool) -> tuple[Tensor, Tensor]:
    """Check a pair of logits, detach the teacher's and divide both by the temperature."""
    check_temperature(temperature)
    check_same_classes(student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if standardize:
        student, teacher = logit_standardize(student), logit_standardize(teacher)
    return student / temperature, teacher / temperature


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a positive number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite, not {temperature}")


def check_same_classes(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of different shapes."""
    if student.shape == teacher.shape:
        return
    class_dim = 1 if student.ndim == 4 else -1
    if student.ndim == teacher.ndim and student.shape[class_dim] != teacher.shape[class_dim]:
        raise ValueError(
            f"the student has {student.shape[class_dim]} classes and the teacher {teacher.shape[class_dim]}; "
            "map the teacher's classes to the student's first"
        )
    raise ValueError(
        f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in shape; "
        "bring both to the same batch and positions first"
    )


def _decouple(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N, 2, ...]`` of (target, rest) and ``[N, C, ...]`` within the rest, 0 at the target."""
    target, column = rows.gather(1, labels[:, None]), labels[:, None]
    rest = rows.scatter(1, column, -torch.inf)
    others = rest.logsumexp(dim=1, keepdim=True)
    split = torch.cat([target, others], dim=1)
    return split.log_softmax(dim=1), (rest - others).scatter(1, column, 0.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` over dimension 1, from log-probabilities."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _pearson(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Correlation of each row of `a` with the same row of `b`."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(dim=1) / (norms + eps)


def reduce_positions(values: Tensor, valid: Tensor | None, shape: torch.Size, reduction: str) -> Tensor:
    """Average values over valid positions, or give them the shape of the positions."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}")
    # Multiplying by a mask, unlike selecting by it, keeps shapes static and does not wait for the device.
    if valid is not None:
        values = values * valid
    if reduction == "none":
        return values.reshape(shape)
    return values.mean() if valid is None else values.sum() / valid.sum().clamp(min=1)


def _position_shape(logits: Tensor) -> torch.Size:
    return (logits.movedim(1, -1) if logits.ndim == 4 else logits).shape[:-1]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it is of half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
