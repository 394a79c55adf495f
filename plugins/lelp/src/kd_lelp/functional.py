"""Pseudo-subclass targets and the loss on them.

Source: Loo et al. 2024, "Linear Projections of Teacher Embeddings for Few-Class Distillation" (arXiv 2409.20449).
With C classes and S pseudo-subclasses of each, the student has C * S outputs in class-major order: output
``c * S + s`` is subclass s of class c.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def as_class_logits(logits: Tensor) -> Tensor:
    """Logits ``[B, 1]`` of a binary single-output head as ``[B, 2]`` with equal probabilities; others unchanged.

    Raises:
        ValueError: if `logits` is not two-dimensional.
    """
    if logits.ndim != 2:
        raise ValueError(f"class logits must be [B, C], but have shape {list(logits.shape)}")
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)


def pseudo_subclass_targets(logits: Tensor, subclass_logits: Tensor, *, tau: float = 1.0, beta: float = 0.5) -> Tensor:
    """Split each class probability of the teacher among the pseudo-subclasses of the class.

    ``p(c, s | x) = softmax_c(logits / tau) * softmax_s(subclass_logits_c / beta)``, so the sum over s is the
    teacher's class probability. tau acts on classes only, beta on subclasses only. The subclasses of every class are
    evaluated for every sample; those of unlikely classes carry little weight by themselves.

    Args:
        logits: teacher ``[B, C]``, or ``[B, 1]`` of a binary single-output head.
        subclass_logits: ``[B, C, S]``.
        tau: temperature of the classes, > 0.
        beta: temperature of the subclasses, > 0; smaller is closer to a hard assignment.

    Returns:
        Probabilities ``[B, C * S]``, float32 at least, without gradient.

    Raises:
        ValueError: if the shapes do not fit or a temperature is not positive.
    """
    if tau <= 0 or beta <= 0:
        raise ValueError(f"tau and beta must be positive, but are {tau} and {beta}")
    logits = as_class_logits(logits)
    if subclass_logits.ndim != 3 or subclass_logits.shape[:2] != logits.shape:
        raise ValueError(
            f"class logits {list(logits.shape)} need subclass logits [B, C, S] of the same batch and classes, "
            f"but they have shape {list(subclass_logits.shape)}"
        )
    classes = (_at_least_float32(logits.detach()) / tau).softmax(dim=1)
    within = (_at_least_float32(subclass_logits.detach()) / beta).softmax(dim=2)
    return (classes.unsqueeze(2) * within).flatten(1)


def class_logits(logits: Tensor, num_classes: int) -> Tensor:
    """Logits of the classes from those of their pseudo-subclasses: logsumexp over each group.

    Their softmax is the sum of the subclass probabilities, so they serve evaluation and inference.

    Args:
        logits: ``[B, C * S]`` in class-major order.
        num_classes: C.

    Returns:
        ``[B, C]``, float32 at least.

    Raises:
        ValueError: if the outputs do not split evenly into classes.
    """
    _check_groups(logits, num_classes)
    groups = _at_least_float32(logits).reshape(len(logits), num_classes, logits.shape[1] // num_classes)
    return groups.logsumexp(dim=2)


def grouped_log_probs(logits: Tensor, num_classes: int) -> Tensor:
    """Log-probability ``[B, C]`` of each class: the log of the sum over its pseudo-subclasses.

    Takes and raises what `class_logits` does.
    """
    return class_logits(logits, num_classes).log_softmax(dim=1)


def lelp(
    student_logits: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    tau: float = 1.0,
    alpha: float = 0.0,
    labels: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """``alpha * CE(labels, classes) + (1 - alpha) * tau^2 * CE(targets, all C * S pseudo-subclasses)``.

    One cross-entropy over every pseudo-subclass; its gradient is that of the KL divergence from the targets. The
    paper uses alpha = 0. With S = 1 this is plain soft-target distillation.

    Args:
        student_logits: ``[B, C * S]`` in class-major order.
        targets: probabilities ``[B, C * S]`` from `pseudo_subclass_targets` at the same tau.
        num_classes: C.
        tau: temperature of the student's softmax, > 0.
        alpha: weight of the labels in [0, 1], on the probability summed over each class's pseudo-subclasses.
        labels: class indices ``[B]``, needed if alpha > 0; -100 marks a sample without a label.
        reduction: ``"mean"``, or ``"none"`` for ``[B]``.

    Raises:
        ValueError: if shapes do not fit, tau or alpha is out of range, labels are missing or `reduction` is unknown.
    """
    if tau <= 0 or not 0 <= alpha <= 1:
        raise ValueError(f"tau must be positive and alpha in [0, 1], but they are {tau} and {alpha}")
    if student_logits.shape != targets.shape:
        raise ValueError(f"student {list(student_logits.shape)} and targets {list(targets.shape)} differ in shape")
    _check_groups(student_logits, num_classes)
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}")
    log_probs = (_at_least_float32(student_logits) / tau).log_softmax(dim=1)
    values = (1 - alpha) * tau**2 * -(targets.detach() * log_probs).sum(dim=1)
    if alpha > 0:
        if labels is None:
            raise ValueError("alpha > 0 weighs the labels in, but none were given; pass labels or set alpha to 0")
        grouped = grouped_log_probs(student_logits, num_classes)
        values = values + alpha * F.nll_loss(grouped, labels, reduction="none")
    return values.mean() if reduction == "mean" else values


def _check_groups(logits: Tensor, num_classes: int) -> None:
    if logits.ndim != 2 or num_classes < 1 or logits.shape[1] % num_classes:
        raise ValueError(
            f"the student needs outputs [B, S * {num_classes}], the same number for each of {num_classes} classes, "
            f"but has shape {list(logits.shape)}"
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
