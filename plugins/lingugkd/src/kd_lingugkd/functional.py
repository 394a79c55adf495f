"""The objective, as pure functions.

Source: Hu et al. 2025, "Large Language Model Meets Graph Neural Network in Knowledge Distillation" (arXiv 2402.05894),
and the code published with it. n is the number of labelled nodes, d the width of the states, L = k + 1 the number of
hops (0 to k), C the number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.data import IGNORE


@dataclass(frozen=True)
class Objective:
    """The values of `distill_loss`.

    Args:
        loss: the weighted sum.
        ce: cross-entropy, without its weight.
        infonce: contrast summed over the hops with their weights, without its own.
        log_probs: `[n, C]`; of a binary task with one output, the probability `[n]` of the second class.
    """

    loss: Tensor
    ce: Tensor
    infonce: Tensor
    log_probs: Tensor


def similarities(student: Tensor, teacher: Tensor, labels: Tensor, *, tau: float = 0.07) -> Tensor:
    """Cosines over tau between states of nodes, where they may be contrasted.

    Row i is the student's node i, column j the teacher's node j. Candidates of row i are j = i and every j of another
    class; a pair of one class says nothing about which of the two is meant, and is -inf, as is a column without label.

    Args:
        student, teacher: `[n, d]`; their lengths do not matter.
        labels: classes `[n]`, -100 where unknown.
        tau: temperature, > 0.

    Returns:
        `[n, n]`, float32 at least; the diagonal is always finite.

    Raises:
        ValueError: if the shapes do not fit or tau is not positive.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, but is {tau}")
    if student.ndim != 2 or student.shape != teacher.shape or labels.shape != student.shape[:1]:
        raise ValueError(f"states must be [n, d] and labels [n], but they are {list(student.shape)}, "
                         f"{list(teacher.shape)} and {list(labels.shape)}")  # fmt: skip
    rows, columns = (F.normalize(_at_least_float32(states), dim=1) for states in (student, teacher))
    others = (labels[:, None] != labels[None, :]) & (labels != IGNORE)[None, :]
    others = others | torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return (rows @ columns.T / tau).masked_fill(~others, -torch.inf)


def label_aware_infonce(
    student: Tensor, teacher: Tensor, labels: Tensor, *, tau: float = 0.07, symmetric: bool = False
) -> Tensor:
    """Mean over nodes of the cross-entropy of each node's own teacher state among the candidates.

    With one class only it is 0; with all labels different it is plain InfoNCE.

    Args:
        student, teacher, labels, tau: as `similarities`. Nodes without a label are left out.
        symmetric: the mean with the other direction, teacher states as queries.

    Raises:
        ValueError: as `similarities`.
    """
    scores = similarities(student, teacher, labels, tau=tau)
    known = (labels != IGNORE).to(scores.dtype)
    loss = -scores.log_softmax(1).diagonal()
    if symmetric:
        backward = similarities(teacher, student, labels, tau=tau)
        loss = (loss - backward.log_softmax(1).diagonal()) / 2
    return (loss * known).sum() / known.sum().clamp(min=1)


def hopwise_infonce(
    student: Tensor, teacher: Tensor, labels: Tensor, layer_weights: Tensor | None = None, *, tau: float = 0.07,
    symmetric: bool = False,
) -> Tensor:  # fmt: skip
    """Sum over the hops of `softmax(layer_weights)` times the contrast of that hop: the layer-adaptive alignment.

    Args:
        student, teacher: `[L, n, d]`.
        labels: `[n]`.
        layer_weights: `[L]`, before the softmax; `None` weighs all hops alike.
        tau, symmetric: as `label_aware_infonce`.

    Raises:
        ValueError: as `similarities`, or if there is not one weight for each hop.
    """
    if student.ndim != 3 or student.shape != teacher.shape:
        raise ValueError(f"states must be [L, n, d], but are {list(student.shape)} and {list(teacher.shape)}")
    losses = torch.stack([label_aware_infonce(h, z, labels, tau=tau, symmetric=symmetric)
                          for h, z in zip(student, teacher, strict=True)])  # fmt: skip
    if layer_weights is None:
        return losses.mean()
    if layer_weights.shape != losses.shape:
        raise ValueError(f"{len(losses)} hops need as many weights, but they are {list(layer_weights.shape)}")
    return (layer_weights.softmax(0).to(losses.dtype) * losses).sum()


def classification(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood and `log_softmax(logits)`; of a single output (`[n]` or `[n, 1]`), binary
    cross-entropy and the probability `[n]`. Nodes labelled -100 are left out of the mean."""
    logits = _at_least_float32(logits)
    known = (labels != IGNORE).to(logits.dtype)
    if logits.ndim == 1 or logits.shape[1] == 1:
        logits = logits.flatten()
        target = labels.clamp(min=0).to(logits.dtype)
        each, found = F.binary_cross_entropy_with_logits(logits, target, reduction="none"), logits.sigmoid()
    else:
        found = logits.log_softmax(1)
        each = F.nll_loss(found, labels, reduction="none", ignore_index=IGNORE)
    return (each * known).sum() / known.sum().clamp(min=1), found


def distill_loss(
    student: Tensor, teacher: Tensor, logits: Tensor, labels: Tensor, layer_weights: Tensor | None = None,
    task_weights: Tensor | None = None, *, tau: float = 0.07, symmetric: bool = False,
) -> Objective:  # fmt: skip
    """`softmax(task_weights)` times cross-entropy and hop-wise contrast.

    Args:
        student: states of the graph network `[L, n, d]`.
        teacher: projected states of the language model `[L, n, d]`; gradient flows into them.
        logits: `[n, C]`.
        labels: `[n]`.
        layer_weights: `[L]`, before the softmax; `None` for equal weights.
        task_weights: `[2]`, of cross-entropy and contrast, before the softmax; `None` for half each.
        tau, symmetric: as `label_aware_infonce`.

    Raises:
        ValueError: as `hopwise_infonce`.
    """
    infonce = hopwise_infonce(student, teacher, labels, layer_weights, tau=tau, symmetric=symmetric)
    ce, log_probs = classification(logits, labels)
    shares = task_shares(ce, task_weights)
    return Objective(shares[0] * ce + shares[1] * infonce, ce, infonce, log_probs)


def task_shares(ce: Tensor, task_weights: Tensor | None) -> Tensor:
    """What cross-entropy and contrast count for, `[2]`: a softmax of `task_weights`, or half each; of `ce`'s type."""
    return ce.new_full((2,), 0.5) if task_weights is None else task_weights.softmax(0).to(ce.dtype)


def retrieval_rate(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Share of the nodes whose own teacher state is the nearest among the candidates; all `[n, d]` and `[n]`."""
    nearest = similarities(student, teacher, labels).argmax(1)
    return (nearest == torch.arange(len(labels), device=labels.device)).float().mean()


def _at_least_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
