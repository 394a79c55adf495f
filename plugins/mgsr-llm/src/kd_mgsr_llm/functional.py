"""Revision of sequences, tokens and spans as pure functions.

Source: Liu et al. 2024, "Multi-Granularity Semantic Revision for Large Language Model Distillation" (arXiv 2407.10068).
Notation: p is the teacher's next-token distribution, q the student's, V tokens. Nothing is divided by a temperature.
The teacher receives no gradient; softmaxes are in float32 at least. Where the vocabularies are padded to different
sizes, both are cut to the smaller one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_llm_kd_suite.functional import divergence
from kdcore.data import IGNORE

LARGE = 30_000
"""Tokens of a vocabulary beyond which products of distributions are compared on their largest entries only."""
TOP = 512
"""How many of each side."""
LEAST = 1e-12
"""The probability that stands for none where a logarithm is taken."""


def kl_map(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """``KL(p || q)`` of every position, ``[B, T]`` in nats; 0 where nothing counts.

    Args:
        student_logits: ``[B, T, V]``.
        teacher_logits: ``[B, T, V]``.
        labels: ``[B, T]``, -100 where nothing counts.

    Raises:
        ValueError: if the shapes do not fit.
    """
    return divergence("fkl", student_logits, teacher_logits, labels, reduction="none")


def find_errors(divergences: Tensor, teacher_tokens: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """Where each answer goes wrong most: among the positions at which it has another token than the teacher's
    likeliest, the one with the largest divergence.

    Args:
        divergences: ``KL(p || q)``, ``[B, T]``.
        teacher_tokens: the teacher's likeliest tokens, ``[B, T]``.
        answers: the tokens that the student wrote, ``[B, T]``.
        mask: ``[B, T]``, true on the answer's tokens, its end token included and nothing after it.

    Returns:
        Positions ``[B]``; -1 for an answer that the teacher agrees with everywhere.

    Raises:
        ValueError: if the shapes differ.
    """
    if not divergences.shape == teacher_tokens.shape == answers.shape == mask.shape:
        raise ValueError(
            f"divergences {list(divergences.shape)}, teacher's tokens {list(teacher_tokens.shape)}, answers "
            f"{list(answers.shape)} and mask {list(mask.shape)} must have the same shape"
        )
    wrong = mask.bool() & (answers != teacher_tokens)
    worst = divergences.masked_fill(~wrong, -torch.inf).argmax(1)
    return worst.masked_fill(~wrong.any(1), -1)


def rank_quantiles(logits: Tensor) -> Tensor:
    """The share of classes that are not more probable than each class, ``[..., V]`` in (0, 1]; 1 for the likeliest."""
    ordered = logits.sort(-1).values
    found = torch.searchsorted(ordered, logits.contiguous(), right=True)
    return found.to(torch.promote_types(logits.dtype, torch.float32)) / logits.shape[-1]


def clip_mask(teacher_logits: Tensor, lower: Tensor, upper: Tensor, keep: Tensor | None = None, *,
              tau: float = 0.02) -> Tensor:  # fmt: skip
    """Which classes lie between two levels of the teacher's distribution: 1 or 0, with a gradient for the levels.

    The gradient is that of ``sigmoid((rho - lower) / tau) sigmoid((upper - rho) / tau)``, rho the class's quantile
    (a straight-through estimate). Where no class is between the levels, the likeliest one is kept.

    Args:
        teacher_logits: ``[N, V]``.
        lower, upper: levels ``[N]`` in [0, 1].
        keep: classes ``[N]`` or ``[N, K]`` that are kept in any case.
        tau: softness of the levels, > 0.

    Returns:
        ``[N, V]``, float32 at least.

    Raises:
        ValueError: if tau is not positive.
    """
    if tau <= 0:
        raise ValueError(f"tau must be positive, because it divides the distance to a level, but it is {tau}")
    rho, low, high = rank_quantiles(teacher_logits.detach()), lower.unsqueeze(-1), upper.unsqueeze(-1)
    between = (low <= rho) & (rho <= high)
    if keep is not None:
        between = between.scatter(1, keep.reshape(len(rho), -1), True)
    likeliest = teacher_logits.argmax(1, keepdim=True)
    between = between.scatter(1, likeliest, between.gather(1, likeliest) | ~between.any(1, keepdim=True))
    soft = torch.sigmoid((rho - low) / tau) * torch.sigmoid((high - rho) / tau)
    return between.to(soft.dtype) + (soft - soft.detach())


def dac_kl(student_logits: Tensor, teacher_logits: Tensor, lower: Tensor, upper: Tensor, keep: Tensor | None = None, *,
           tau: float = 0.02) -> Tensor:  # fmt: skip
    """``KL(p~ || q)`` of each position, p~ being the teacher's distribution clipped between two levels.

    ``p~ = p m / sum(p m)`` with the mask m of `clip_mask`; q is the student's full softmax, since a student that is
    normalised over the kept classes too lets the mask collapse to a single one. With ``lower = 0`` and ``upper = 1`` it
    is the forward KL. The gradient reaches the student through q and the levels through m. For a class that is kept it
    is that of the formula; for one that is not, the slope of ``p~ log p~`` at 0 is infinite, and the logarithm of
    `LEAST` takes the place of ``log p~``. (With the logarithm that the class would have if it were kept, the levels
    close until only the target is left.)

    Args:
        student_logits: ``[N, V]``.
        teacher_logits: ``[N, V]``.
        lower, upper: levels ``[N]`` in [0, 1].
        keep: classes ``[N]`` or ``[N, K]`` that are kept in any case.
        tau: softness of the levels in their gradient, > 0.

    Returns:
        ``[N]``, in nats, >= 0.

    Raises:
        ValueError: if tau is not positive.
    """
    ours, theirs = common(student_logits, teacher_logits)
    q, p = ours.log_softmax(1), theirs.log_softmax(1)
    kept = p.exp() * clip_mask(theirs, lower, upper, keep, tau=tau)
    total = kept.sum(1, keepdim=True)
    log_kept = torch.where(kept.detach() > 0, p - total.detach().log(), math.log(LEAST))
    without = (ours == -torch.inf) | (theirs == -torch.inf)
    return (kept / total * (log_kept - q).masked_fill(without, 0.0)).sum(1)


def span_products(logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """The product of two neighbouring distributions, class by class.

    Args:
        logits: of position i and i + 1, ``[N, 2, V]``.
        ids: the classes that are wanted, ``[N, K]``; default: all.

    Returns:
        ``[N, V]`` or ``[N, K]``.
    """
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    both = logprobs.sum(1)
    return (both if ids is None else both.gather(1, ids)).exp()


def span_correlation(student_logits: Tensor, teacher_logits: Tensor, *,
                     metric: Literal["l2", "squared", "cosine"] = "l2", top: int | None = None) -> Tensor:  # fmt: skip
    """How far the products of neighbouring distributions of student and teacher are apart, pair by pair.

    Args:
        student_logits: of the positions i and i + 1 of a span, ``[N, 2, V]``.
        teacher_logits: the same, ``[N, 2, V]``.
        metric: the L2 norm of the difference, its square, or 1 - cosine.
        top: compare only the classes that are among so many largest products of the student or of the teacher.
            Default: all, of a vocabulary of more than `LARGE` the `TOP` largest.

    Returns:
        ``[N]``, >= 0.

    Raises:
        ValueError: for an unknown metric.
    """
    ours, theirs = common(student_logits, teacher_logits)
    size = ours.shape[-1]
    top = top or (TOP if size > LARGE else size)
    if top < size:
        ids = torch.cat([side.detach().sum(1).topk(top).indices for side in (ours, theirs)], 1)
        again = torch.zeros_like(ours[:, 0], dtype=torch.bool).scatter(1, ids[:, :top], True).gather(1, ids[:, top:])
        once = torch.cat([torch.ones_like(again), ~again], 1)
        a, b = (span_products(side, ids) * once for side in (ours, theirs))
    else:
        a, b = span_products(ours), span_products(theirs)
    if metric not in ("l2", "squared", "cosine"):
        raise ValueError(f"the metric must be 'l2', 'squared' or 'cosine', not {metric!r}")
    if metric == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=1, eps=torch.finfo(a.dtype).tiny)
    if metric == "squared":
        return (a - b).square().sum(1)
    norm: Tensor = torch.linalg.vector_norm(a - b, dim=1)  # its gradient is 0, not NaN, where both are equal
    return norm


def span_pairs(labels: Tensor, spans: list[list[tuple[int, int]]]) -> Tensor:
    """The first of each two neighbouring positions of a span, in a flat batch.

    Args:
        labels: ``[B, T]``.
        spans: of each row, its spans as (first position, position after the last).

    Returns:
        ``[N]``, positions in ``[0, B * T)``; a span of n tokens has n - 1 of them.
    """
    found = [row * labels.shape[1] + i for row, own in enumerate(spans) for start, end in own
             for i in range(start, end - 1)]  # fmt: skip
    return torch.tensor(found, dtype=torch.long, device=labels.device)


def common(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides over the vocabulary that they share, float32 at least, the teacher's without gradient."""
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    return student_logits[..., :size].to(dtype), teacher_logits.detach()[..., :size].to(dtype)


def answer_mask(labels: Tensor) -> Tensor:
    """Bool ``[B, T]``: where a token counts."""
    return labels != IGNORE
