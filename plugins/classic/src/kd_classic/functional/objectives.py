"""Whole objectives: losses on logits that hold the cross-entropy with the labels, or stand in its place."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_classic.functional.logits import (
    IGNORE_INDEX,
    at_least_float32,
    check_same_classes,
    check_temperature,
    cross_entropy,
    flatten_positions,
    kd,
    reduce_positions,
    soften,
)


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
    check_same_classes(student_logits, teacher_logits)
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
    check_same_classes(class_logits, distillation_logits)
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
        check_same_classes(distillation_logits, teacher_logits)
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


def _virtual_teacher(rows: Tensor, labels: Tensor, correct: float) -> Tensor:
    """``[N, C]``: `correct` at the label, the rest spread evenly over the other classes."""
    classes = rows.shape[1]
    if not 0 <= correct <= 1:
        raise ValueError(f"a belief is a probability in [0, 1], not {correct}")
    if classes < 2:
        raise ValueError("a made-up teacher needs at least two classes to spread its doubt over")
    doubt = torch.full_like(rows, (1 - correct) / (classes - 1))
    return doubt.scatter(1, labels[:, None], correct)
