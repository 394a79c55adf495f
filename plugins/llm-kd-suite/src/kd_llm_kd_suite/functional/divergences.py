"""Divergences between the next-token distributions of teacher (p) and student (q).

Notation: ``p = softmax(teacher_logits / T)``, ``q = softmax(student_logits / T)``, V classes. Two layers: a function
per divergence gives one value per position (`forward_kl` and its siblings, by name in `DIVERGENCES`); `divergence`
drops the positions that do not count before any softmax and reduces what is left.

Rules that hold for all of them. The teacher receives no gradient. Softmaxes are in float32 at least, whatever the
logits are. The temperature divides both logits and there is no factor ``T^2``. Where vocabularies are padded to
different sizes, both are cut to the smaller one. A class whose logit is -inf on either side is left out of the sum, so
that value and gradient stay finite; the other side's softmax still holds its mass. A reverse divergence against a
teacher of which only the top-k logits are known therefore draws the student's mass out of the top k.

How they are computed: every divergence is a sum over classes ``f(p_v, q_v)`` with the gradient
``q_v (g_v - sum_u q_u g_u)``, ``g = df/dq``, of the logits. Value and gradient are found together, for a block of rows
that fits into the cache, so that one tensor of the size of the student's logits is kept for the backward pass and
nothing else of that size is ever made.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kdcore.data import IGNORE
from kdcore.errors import did_you_mean

CACHED = 2**19
"""Elements of a block of rows on a CPU: its few temporaries stay in the cache."""
RESIDENT = 2**24
"""Elements of a block of rows elsewhere: 64 MiB in float32."""


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, cross_entropy_form: bool = False
) -> Tensor:
    """``KL(p || q)``, which makes the student cover all that the teacher may say.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        temperature: T > 0.
        cross_entropy_form: give ``-sum p log q`` instead, which is larger by the entropy of p. The gradient is the
            same.

    Returns:
        ``[...]``, in nats.

    Raises:
        ValueError: if the positions differ or T <= 0.
    """
    return _rows(student_logits, teacher_logits, temperature, partial(_forward_kl, cross_entropy=cross_entropy_form))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``KL(q || p)``, which makes the student avoid what the teacher would not say.

    Source: Gu et al. 2024, "MiniLLM", equation 1 (arXiv 2306.08543). Arguments, result and errors as in `forward_kl`.
    """
    return _rows(student_logits, teacher_logits, temperature, _reverse_kl)


def symmetric_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    lam: float = 0.9,
    temperature: float = 1.0,
    cross_entropy_form: bool = False,
) -> Tensor:
    """``(1 - lam) KL(p || q) + lam KL(q || p)``; `cross_entropy_form` is that of the first term.

    Arguments, result and errors as in `forward_kl`, and ``0 <= lam < 1``.
    """
    _check_fraction("lam", lam, "it is the share of the reverse KL")
    formula = partial(_symmetric_kl, lam=lam, cross_entropy=cross_entropy_form)
    return _rows(student_logits, teacher_logits, temperature, formula)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``.

    ``beta = 0`` is defined as ``KL(p || q)`` and ``beta = 1`` as ``KL(q || p)``: the limits of the divergence after
    division by ``beta (1 - beta)``, which by itself would vanish. Source: Agarwal et al. 2024, "On-Policy Distillation
    of Language Models", equation 3 (arXiv 2306.13649). Arguments, result and errors as in `forward_kl`, and
    ``0 <= beta <= 1``.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], because it is the teacher's share of the mixture, but it is {beta}")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    return _rows(student_logits, teacher_logits, temperature, partial(_jensen_shannon, beta=beta))


def js_distance(
    student_logits: Tensor, teacher_logits: Tensor, *, lam: float = 0.9, temperature: float = 1.0
) -> Tensor:
    """``lam KL(q || m) + (1 - lam) KL(p || m)`` with ``m = lam q + (1 - lam) p``: `generalized_jsd` of ``1 - lam``.

    The parametrisation of DistiLLM (Ko et al. 2024, arXiv 2402.03898). Arguments, result and errors as in
    `forward_kl`, and ``0 < lam < 1``.
    """
    _check_fraction("lam", lam, "it is the student's share of the mixture")
    if lam == 0:
        raise ValueError("lam must be above 0, because with 0 the mixture is the teacher and every value is 0")
    return _rows(student_logits, teacher_logits, temperature, partial(_jensen_shannon, beta=1 - lam))


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``0.5 sum |p - q|``, between 0 and 1.

    Source: Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (arXiv 2307.15190).
    Arguments, result and errors as in `forward_kl`.
    """
    return _rows(student_logits, teacher_logits, temperature, _total_variation)


def skewed_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    cross_entropy_form: bool = False,
) -> Tensor:
    """``KL(p || alpha p + (1 - alpha) q)``.

    Source: Ko et al. 2024, "DistiLLM", equation 4 (arXiv 2402.03898). `cross_entropy_form` gives
    ``-sum p log(alpha p + (1 - alpha) q)``. Arguments, result and errors as in `forward_kl`, and ``0 <= alpha < 1``.
    """
    _check_fraction("alpha", alpha, "it is the teacher's share of the mixture")
    if alpha == 0:
        return forward_kl(
            student_logits, teacher_logits, temperature=temperature, cross_entropy_form=cross_entropy_form
        )
    formula = partial(_skewed_forward_kl, alpha=alpha, cross_entropy=cross_entropy_form)
    return _rows(student_logits, teacher_logits, temperature, formula)


def skewed_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """``KL(q || alpha q + (1 - alpha) p)``: here alpha is the student's share of the mixture.

    Source: Ko et al. 2024, "DistiLLM", section 3.1 (arXiv 2402.03898). Arguments, result and errors as in
    `forward_kl`, and ``0 <= alpha < 1``.
    """
    _check_fraction("alpha", alpha, "it is the student's share of the mixture")
    if alpha == 0:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    return _rows(student_logits, teacher_logits, temperature, partial(_skewed_reverse_kl, alpha=alpha))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "sym": symmetric_kl,
    "jsd": generalized_jsd,
    "jsdistance": js_distance,
    "tvd": total_variation,
    "sfkl": skewed_forward_kl,
    "srkl": skewed_reverse_kl,
}
"""The divergences by name: ``(student_logits [..., V], teacher_logits [..., V], **options) -> [...]``."""


def divergence(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Any,
) -> Tensor:
    """A divergence by name, over the positions that count.

    Args:
        name: a key of `DIVERGENCES`.
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        labels: ``[...]``, -100 where nothing counts; those positions are dropped before the softmax. Without labels
            every position counts.
        reduction: ``"mean"`` and ``"sum"`` over the positions that count, both 0 where none does; ``"none"`` for
            values shaped like the positions, 0 where nothing counts.
        options: the divergence's own, such as ``beta`` and ``temperature``.

    Raises:
        ValueError: for an unknown name or reduction, for labels that do not fit, and as the divergence does.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"there is no divergence {name!r}: {did_you_mean(name, DIVERGENCES, 'there are')}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"the reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if labels is None:
        values = DIVERGENCES[name](student_logits, teacher_logits, **options)
        return values if reduction == "none" else values.sum() if reduction == "sum" else mean(values)
    _check_positions("labels", labels, student_logits)
    _check_positions("teacher logits", teacher_logits[..., 0], student_logits)
    keep = labels != IGNORE
    values = DIVERGENCES[name](student_logits[keep], teacher_logits[keep], **options)
    if reduction == "none":
        return values.new_zeros(labels.shape).masked_scatter(keep, values)
    return values.sum() if reduction == "sum" else mean(values)


def mean(rows: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean over the positions whose label is not -100; 0, with a gradient of 0, where there are none.

    Args:
        rows: ``[...]``, one value per position.
        labels: ``[...]``; without them every position counts.

    Raises:
        ValueError: if the shapes differ.
    """
    if labels is not None:
        _check_positions("labels", labels, rows.unsqueeze(-1))
        rows = rows[labels != IGNORE]
    return rows.sum() / max(rows.numel(), 1)


@dataclass
class _Side:
    """One side's block of rows. Formulas may overwrite the teacher's probabilities and nothing else.

    ``log probs = logits - top - log_sum``. Where a class is left out, `probs` and `logits` hold 0.
    """

    logits: Tensor
    probs: Tensor
    top: Tensor
    log_sum: Tensor


Formula = Callable[[_Side, _Side], tuple[Tensor, Tensor]]
"""(student, teacher) -> the values ``[n]`` and ``q df/dq``, ``[n, V]``."""


def _forward_kl(student: _Side, teacher: _Side, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    terms = (student.top + student.log_sum).sub(student.logits) if cross_entropy else _log_ratio(teacher, student)
    value = terms.mul_(teacher.probs).sum(-1)
    return value, teacher.probs.neg_()


def _reverse_kl(student: _Side, teacher: _Side) -> tuple[Tensor, Tensor]:
    terms = _log_ratio(student, teacher).mul_(student.probs)
    return terms.sum(-1), terms.add_(student.probs)


def _symmetric_kl(student: _Side, teacher: _Side, lam: float, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    reverse, slope = _reverse_kl(student, teacher)
    forward, forward_slope = _forward_kl(student, teacher, cross_entropy)
    return lam * reverse + (1 - lam) * forward, slope.mul_(lam).add_(forward_slope, alpha=1 - lam)


def _jensen_shannon(student: _Side, teacher: _Side, beta: float) -> tuple[Tensor, Tensor]:
    p, q = teacher.probs, student.probs
    mixture = _mixture(p, q, beta)
    terms = _log_over(q, p, mixture, 1 - beta).mul_(q)
    theirs = _log_over(p, q, mixture, beta).mul_(p)
    return beta * theirs.sum(-1) + (1 - beta) * terms.sum(-1), terms.mul_(1 - beta)


def _total_variation(student: _Side, teacher: _Side) -> tuple[Tensor, Tensor]:
    difference = student.probs - teacher.probs
    return difference.abs().sum(-1).mul_(0.5), difference.sign_().mul_(student.probs).mul_(0.5)


def _skewed_forward_kl(student: _Side, teacher: _Side, alpha: float, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    p, q = teacher.probs, student.probs
    mixture = _mixture(p, q, alpha)
    terms = mixture.log().neg_() if cross_entropy else _log_over(p, q, mixture, alpha)
    return terms.mul_(p).sum(-1), q.div(mixture).mul_(p).mul_(alpha - 1)


def _skewed_reverse_kl(student: _Side, teacher: _Side, alpha: float) -> tuple[Tensor, Tensor]:
    p, q = teacher.probs, student.probs
    mixture = _mixture(q, p, alpha)
    terms = _log_over(q, p, mixture, alpha).mul_(q)
    # q (log(q / m) + 1 - alpha q / m), where 1 - alpha q / m = (1 - alpha) p / m
    return terms.sum(-1), terms.add_(p.div_(mixture).mul_(q), alpha=1 - alpha)


def _log_ratio(a: _Side, b: _Side) -> Tensor:
    """``log(a / b)``, ``[n, V]``. Differences of like size are taken first, which keeps small divergences exact."""
    return (a.logits - b.logits).sub_((a.top - b.top) + (a.log_sum - b.log_sum))


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """``share a + (1 - share) b``, above 0 also where both underflow."""
    return torch.lerp(b, a, share).clamp_(min=torch.finfo(a.dtype).tiny)


def _log_over(a: Tensor, b: Tensor, mixture: Tensor, share: float) -> Tensor:
    """``log(a / mixture)``, from ``a / m - 1 = (1 - share) (a - b) / m``: exact where a and b are near."""
    excess = (a - b).mul_(1 - share).div_(mixture)
    return excess.clamp_(min=torch.finfo(a.dtype).eps - 1).log1p_()


class _Rows(torch.autograd.Function):
    """Values of a formula over rows ``[n, V]``; the gradient of the student's logits is found along with them."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, formula: Formula, temperature: float, trained: bool
    ) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        values = student.new_empty(len(student), dtype=dtype)
        # Probabilities of rare classes are below what float16 holds.
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        gradient = student.new_empty(student.shape if trained else (0,), dtype=kept)
        for block in row_blocks(len(student), student):
            ours, theirs = student[block].to(dtype), teacher[block].to(dtype)
            if temperature != 1:
                ours, theirs = ours / temperature, theirs / temperature
            values[block], slope, probs = _evaluate(ours, theirs, formula)
            if trained:
                gradient[block] = slope.addcmul_(probs, slope.sum(-1, keepdim=True), value=-1)
        ctx.save_for_backward(gradient)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient.new_empty(gradient.shape, dtype=ctx.dtype)
        return torch.mul(gradient, outer.unsqueeze(-1) / ctx.temperature, out=scaled), None, None, None, None


def row_blocks(count: int, logits: Tensor) -> Iterator[slice]:
    """Blocks of `count` rows of the logits ``[N, V]``, each as large as is fast on their device."""
    size = max(1, (CACHED if logits.device.type == "cpu" else RESIDENT) // logits.shape[1])
    return (slice(start, start + size) for start in range(0, count, size))


def _evaluate(student: Tensor, teacher: Tensor, formula: Formula) -> tuple[Tensor, Tensor, Tensor]:
    """The values ``[n]`` of a block, ``q df/dq`` over the classes that count, and the student's whole softmax."""
    ours, theirs = _side(student), _side(teacher)
    probs = ours.probs
    # On a CPU it is cheaper to look than to mask; elsewhere looking would wait for the device.
    if student.device.type != "cpu" or not min(float(student.amin()), float(teacher.amin())) > -math.inf:
        left_out = (student == -math.inf) | (teacher == -math.inf)
        for side in (ours, theirs):
            side.probs = side.probs.masked_fill(left_out, 0.0)
            side.logits = side.logits.masked_fill(left_out, 0.0)
    value, slope = formula(ours, theirs)
    return value, slope, probs


def _side(logits: Tensor) -> _Side:
    """The softmax of a block, and its normaliser from the largest logit: a second pass of exponentials is spared."""
    probs = logits.softmax(-1)
    return _Side(logits, probs, logits.amax(-1, keepdim=True), probs.amax(-1, keepdim=True).log_().neg_())


def _rows(student_logits: Tensor, teacher_logits: Tensor, temperature: float, formula: Formula) -> Tensor:
    """Check a pair of logits, cut both to the common vocabulary and evaluate a formula on every position."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"the temperature must be positive and finite, because it divides the logits, not {temperature}"
        )
    _check_positions("teacher logits", teacher_logits[..., 0], student_logits)
    classes = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = student_logits[..., :classes].reshape(-1, classes)
    teacher = teacher_logits.detach()[..., :classes].reshape(-1, classes)
    trained = torch.is_grad_enabled() and student.requires_grad
    values: Tensor = _Rows.apply(student, teacher, formula, float(temperature), trained)  # type: ignore[no-untyped-call]
    return values.reshape(student_logits.shape[:-1])


def _check_positions(what: str, rows: Tensor, logits: Tensor) -> None:
    """Refuse what has not one entry per position of the student."""
    if rows.shape != logits.shape[:-1]:
        raise ValueError(
            f"the {what} have the positions {list(rows.shape)} and the student's {list(logits.shape[:-1])}: "
            "they must be the same"
        )


def _check_fraction(name: str, value: float, why: str) -> None:
    """Refuse a share outside of [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), because {why}, but it is {value}")
