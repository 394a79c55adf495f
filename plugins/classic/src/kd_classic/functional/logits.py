"""Losses on logits.

Layout of logits: ``[B, C]`` for classification, ``[B, T, V]`` for sequences, ``[B, C, H, W]`` for dense prediction.
Positions of the last two are treated as samples of one large batch.
"""

import math
from collections.abc import Sequence
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
    rows, labels = flatten_positions(at_least_float32(logits), target)
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
    student_rows, labels = flatten_positions(student, target)
    teacher_rows, _ = flatten_positions(teacher)
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
    student_rows, labels = flatten_positions(student, target)
    teacher_rows, _ = flatten_positions(teacher)
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


def wsld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.5,
    temperature: float = 2.0,
    standardize: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Weighted soft labels, the whole objective: ``CE + alpha * T^2 * mean(w * H(p_t, p_s))``.

    ``H`` is the cross-entropy with the teacher's softened probabilities. A sample's weight
    ``w = 1 - exp(-CE_s / CE_t)`` is near 1 where the student is wrong and the teacher right; no gradient flows
    through it. Source: Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
    Perspective", equation 11 (arXiv 2102.00650).

    Args:
        student_logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]``.
        teacher_logits: the same shape.
        target: class indices ``[B]``, ``[B, T]`` or ``[B, H, W]``.
        alpha: weight of the soft part.
        temperature: T > 0.
        standardize: apply `logit_standardize` to both sides of the soft part first.
        ignore_index: label of positions that do not count.

    Raises:
        ValueError: if shapes or class counts differ or T <= 0.
    """
    _check_same_classes(student_logits, teacher_logits)
    student_rows, labels = flatten_positions(at_least_float32(student_logits), target)
    teacher_rows, _ = flatten_positions(at_least_float32(teacher_logits.detach()))
    assert labels is not None
    student, teacher = soften(student_rows, teacher_rows, temperature, standardize)
    hard = F.cross_entropy(student_rows, labels, ignore_index=ignore_index, reduction="none")
    with torch.no_grad():
        valid = labels != ignore_index
        theirs = F.cross_entropy(teacher_rows, labels, ignore_index=ignore_index, reduction="none")
        weight = alpha * temperature**2 * (1 - torch.exp(-hard / (theirs + 1e-7))) * valid
    soft = torch.linalg.vecdot(teacher.softmax(dim=1), F.log_softmax(student, dim=1))
    return (hard.sum() - weight.dot(soft)) / valid.sum().clamp(min=1)


def lsr(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    ignore_index: int = IGNORE_INDEX,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Label smoothing as the cross-entropy with a made-up teacher: ``H(p_d, softmax(z))``.

    ``p_d`` is ``1 - alpha`` at the label and ``alpha / (C - 1)`` elsewhere, which is not how
    ``torch.nn.functional.cross_entropy`` smooths. Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via
    Label Smoothing Regularization", section 3 (arXiv 1909.11723), as in the authors' code.

    Args:
        logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]`` with at least two classes.
        target: class indices ``[B]``, ``[B, T]`` or ``[B, H, W]``.
        alpha: mass off the label, in [0, 1].
        ignore_index: label of positions that do not count.
        reduction: ``"mean"`` over valid positions, or ``"none"`` for values shaped like `target`.

    Raises:
        ValueError: if shapes do not fit, there is one class or alpha is out of range.
    """
    rows, labels = flatten_positions(at_least_float32(logits), target)
    assert labels is not None
    valid = labels != ignore_index
    teacher = _virtual_teacher(rows, labels.where(valid, 0), 1 - alpha)
    values = F.cross_entropy(rows, teacher, reduction="none")
    return reduce_positions(values, valid, target.shape, reduction)


def tfkd_reg(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 20.0,
    multiplier: float = 100.0,
    correct_prob: float = 0.99,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Distillation without a teacher, the whole objective: ``(1 - alpha) CE + alpha * multiplier * KL``.

    The virtual teacher believes in the label with `correct_prob`. As in the authors' code its *probabilities* go
    through a softmax at temperature T, the student's logits are not tempered, and KL is a mean over samples and
    classes. Source: Yuan et al. 2020, equations 10 and 11 (arXiv 1909.11723).

    Args:
        logits: ``[B, C]``, ``[B, T, V]`` or ``[B, C, H, W]`` with at least two classes.
        target: class indices ``[B]``, ``[B, T]`` or ``[B, H, W]``.
        alpha: share of the virtual teacher, in [0, 1].
        temperature: T > 0 of the virtual teacher.
        multiplier: factor of the divergence; 100 for ResNet18 (alpha 0.1, T 20), 1 for MobileNetV2 (0.95, 40).
        correct_prob: the virtual teacher's belief in the label.
        ignore_index: label of positions that do not count.

    Raises:
        ValueError: if shapes do not fit, there is one class or T <= 0.
    """
    check_temperature(temperature)
    rows, labels = flatten_positions(at_least_float32(logits), target)
    assert labels is not None
    valid = labels != ignore_index
    teacher = (_virtual_teacher(rows, labels.where(valid, 0), correct_prob) / temperature).softmax(dim=1)
    hard = F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction="none")
    soft = F.kl_div(F.log_softmax(rows, dim=1), teacher, reduction="none").mean(dim=1)
    return reduce_positions((1 - alpha) * hard + alpha * multiplier * soft, valid, target.shape, "mean")


def deit(
    class_logits: Tensor,
    distillation_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    kind: Literal["hard", "soft"] = "hard",
    alpha: float = 0.5,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """The objective of DeiT's two tokens: ``(1 - alpha) CE(z_cls, y) + alpha * D(z_dist, z_t)``.

    Hard: ``D`` is the cross-entropy with the teacher's decision. Soft: ``D = T^2 KL``, divided by the number of all
    elements as in the authors' code. Source: Touvron et al. 2021, "Training data-efficient image transformers &
    distillation through attention", equations 2 and 3 (arXiv 2012.12877).

    Args:
        class_logits: ``[B, C]`` of the class token.
        distillation_logits: ``[B, C]`` of the distillation token.
        teacher_logits: ``[B, C]``.
        target: class indices ``[B]`` (-100 is ignored), or probabilities ``[B, C]`` under mixup.
        kind: ``"hard"`` or ``"soft"``.
        alpha: share of the teacher, in [0, 1].
        temperature: T > 0, used by the soft kind.
        standardize: apply `logit_standardize` to both sides of the soft kind first.

    Raises:
        ValueError: if shapes or class counts differ, T <= 0 or `kind` is unknown.
    """
    if kind not in ("hard", "soft"):
        raise ValueError(f"kind must be 'hard' or 'soft', not {kind!r}")
    check_temperature(temperature)
    _check_same_classes(class_logits, distillation_logits)
    if target.is_floating_point():
        if target.shape != class_logits.shape:
            raise ValueError(f"logits {list(class_logits.shape)} need probabilities of that shape, not "
                             f"{list(target.shape)}")  # fmt: skip
        base = F.cross_entropy(at_least_float32(class_logits), target)
    else:
        base = cross_entropy(class_logits, target)
    if kind == "soft":
        taught = kd(distillation_logits, teacher_logits, temperature=temperature, standardize=standardize,
                    reduction="mean")  # fmt: skip
    else:
        _check_same_classes(distillation_logits, teacher_logits)
        taught = F.cross_entropy(at_least_float32(distillation_logits), teacher_logits.argmax(dim=1))
    return (1 - alpha) * base + alpha * taught


def byot(
    logits: Sequence[Tensor],
    features: Sequence[Tensor],
    target: Tensor,
    *,
    temperature: float = 3.0,
    alpha: float = 0.1,
    beta: float = 1e-6,
    standardize: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Self-distillation from the deepest exit into the shallower ones, the whole objective.

    ``(1 - alpha) sum CE(z_i, y) + alpha T^2 sum H(p_last, p_i) + beta sum |f_i - f_last|^2``, where the last sum runs
    over the whole batch and over elements that are positive on either side. Nothing flows back into what the deepest
    exit teaches. Source: Zhang et al. 2019, "Be Your Own Teacher", equation 4 (arXiv 1905.08094), in the form of the
    usual implementation.

    Args:
        logits: ``[B, C]`` of each exit, the deepest last.
        features: of each exit, all of one shape, the deepest last.
        target: class indices ``[B]``.
        temperature: T > 0.
        alpha: share of the deepest exit's soft labels.
        beta: weight of the features.
        standardize: apply `logit_standardize` to what the soft labels compare first.
        ignore_index: label of samples that do not count for the cross-entropy.

    Raises:
        ValueError: if there are fewer than two exits, shapes differ or T <= 0.
    """
    if len(logits) < 2 or len(logits) != len(features):
        raise ValueError(f"byot needs two exits or more, each with features; got {len(logits)} and {len(features)}")
    hard = torch.stack([cross_entropy(z, target, ignore_index=ignore_index) for z in logits]).sum()
    soft = torch.zeros_like(hard)
    hints = torch.zeros_like(hard)
    deepest = at_least_float32(features[-1].detach())
    for exit_logits, exit_features in zip(logits[:-1], features[:-1], strict=True):
        student, teacher = soften(exit_logits, logits[-1], temperature, standardize)
        soft = soft + temperature**2 * F.cross_entropy(student, teacher.softmax(dim=1))
        if exit_features.shape != deepest.shape:
            raise ValueError(f"the features of the exits differ in shape: {list(exit_features.shape)} and "
                             f"{list(deepest.shape)}")  # fmt: skip
        active = (exit_features > 0) | (deepest > 0)
        hints = hints + ((at_least_float32(exit_features) - deepest).square() * active).sum()
    return (1 - alpha) * hard + alpha * soft + beta * hints


def soften(student: Tensor, teacher: Tensor, temperature: float, standardize: bool) -> tuple[Tensor, Tensor]:
    """Check a pair of logits, detach the teacher's and divide both by the temperature."""
    check_temperature(temperature)
    _check_same_classes(student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if standardize:
        student, teacher = logit_standardize(student), logit_standardize(teacher)
    return student / temperature, teacher / temperature


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a positive number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite, not {temperature}")


def _virtual_teacher(rows: Tensor, labels: Tensor, correct: float) -> Tensor:
    """``[N, C]``: `correct` at the label, the rest spread evenly over the other classes."""
    classes = rows.shape[1]
    if not 0 <= correct <= 1:
        raise ValueError(f"a belief is a probability in [0, 1], not {correct}")
    if classes < 2:
        raise ValueError("a made-up teacher needs at least two classes to spread its doubt over")
    doubt = torch.full_like(rows, (1 - correct) / (classes - 1))
    return doubt.scatter(1, labels[:, None], correct)


def _check_same_classes(student: Tensor, teacher: Tensor) -> None:
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
    """Log-probabilities ``[N, 2]`` of (target, rest) and ``[N, C]`` within the rest, 0 at the target."""
    target, column = rows.gather(1, labels[:, None]), labels[:, None]
    rest = rows.scatter(1, column, -torch.inf)
    others = rest.logsumexp(dim=1, keepdim=True)
    split = torch.cat([target, others], dim=1)
    return split.log_softmax(dim=1), (rest - others).scatter(1, column, 0.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` of each row, from log-probabilities."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def _pearson(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Correlation of each row of `a` with the same row of `b`."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(dim=1) / (norms + eps)


def reduce_positions(values: Tensor, valid: Tensor | None, shape: torch.Size, reduction: str) -> Tensor:
    """Average values ``[N]`` over valid positions, or give them the shape of the positions."""
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
