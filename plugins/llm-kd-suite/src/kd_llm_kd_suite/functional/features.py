"""Similarity of hidden states and of attention maps.

States ``[N, D]`` are those of the N tokens that count, the student's already projected to the teacher's width.
Attention maps ``[B, H, T, T]`` hold probabilities: each row of a real token sums to 1.
"""

import torch
from torch import Tensor


def hidden_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over tokens and features.

    Args:
        student: ``[N, D]``.
        teacher: ``[N, D]``.

    Raises:
        ValueError: if the shapes differ.
    """
    student, teacher = _pair(student, teacher)
    return (student - teacher).square().sum() / max(student.numel(), 1)


def hidden_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference over tokens and features. Arguments and errors as in `hidden_l2`."""
    student, teacher = _pair(student, teacher)
    return (student - teacher).abs().sum() / max(student.numel(), 1)


def hidden_ce(student: Tensor, teacher: Tensor) -> Tensor:
    """``-sum_d softmax(teacher)_d log softmax(student)_d``, averaged over tokens.

    At equality it is the entropy of the teacher's softmax, its least value. Arguments and errors as in `hidden_l2`.
    """
    student, teacher = _pair(student, teacher)
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum() / max(len(student), 1)


def mmd(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of states, with the kernel ``exp(-|x - y|^2 / s)``.

    ``s`` is the median of the squared distances among all states of both sides, without a gradient. It is the biased
    estimate of Gretton et al. 2012, equation 5, so it is at least 0, and 0 where the two sets are the same in any
    order. Memory grows with ``N^2``.

    Args:
        student: ``[N, D]``.
        teacher: ``[M, D]``; the numbers of states may differ.

    Raises:
        ValueError: if the widths differ.
    """
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"mmd compares states [N, D] and [M, D] of one width, not {list(student.shape)} and {list(teacher.shape)}"
        )
    if not len(student) or not len(teacher):
        return student.sum() * 0.0
    student, teacher = _wide(student), _wide(teacher.detach())
    states = torch.cat([student, teacher])
    # From differences to the first state: distances of states far from the origin would cancel.
    states = states - states[:1].detach()
    squares = states.square().sum(1)
    with torch.autocast(states.device.type, enabled=False):
        products = states @ states.T
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0)
    apart = distances.detach()[~torch.eye(len(states), dtype=torch.bool, device=states.device)]
    kernel = (-distances / apart.median().clamp(min=torch.finfo(distances.dtype).tiny)).exp()
    n = len(student)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of attention maps, over heads and pairs of real tokens.

    Source: Jiao et al. 2020, "TinyBERT", equation 7 (arXiv 1909.10351), on probabilities.

    Args:
        student: ``[B, H_s, T, T]``.
        teacher: ``[B, H_t, T, T]``; where the numbers of heads differ, both are averaged over their heads.
        mask: ``[B, T]``, 1 (or True) on real tokens: rows and columns of padding do not count. Without it all do.

    Raises:
        ValueError: if batch or length differ, or the mask does not fit.
    """
    student, teacher, real = _maps(student, teacher, mask)
    pairs = real.unsqueeze(2) & real.unsqueeze(1)
    squares = torch.where(pairs.unsqueeze(1), (student - teacher).square(), 0.0)
    return squares.sum() / (pairs.sum() * student.shape[1]).clamp(min=1)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``KL(teacher's row || student's row)`` of attention maps, averaged over heads and real tokens.

    Source: Wang et al. 2020, "MiniLM", equation 6 (arXiv 2002.10957). Pairs without attention, such as those that a
    causal mask forbids, add nothing; the student's probabilities count as 1e-12 at least. Arguments and errors as in
    `attention_mse`.
    """
    student, teacher, real = _maps(student, teacher, mask)
    pairs = real.unsqueeze(2) & real.unsqueeze(1)
    terms = torch.xlogy(teacher, teacher) - teacher * student.clamp(min=1e-12).log()
    return torch.where(pairs.unsqueeze(1), terms, 0.0).sum() / (real.sum() * student.shape[1]).clamp(min=1)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of states in float32 at least, the teacher's without a gradient."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's states {list(student.shape)} and the teacher's {list(teacher.shape)} must have one shape: "
            "project the student's"
        )
    return _wide(student), _wide(teacher.detach())


def _maps(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Two attention maps with equal heads, and which tokens are real ``[B, T]``."""
    if student.ndim != 4 or teacher.ndim != 4 or (student.shape[0], *student.shape[2:]) != (
        teacher.shape[0], *teacher.shape[2:],
    ):  # fmt: skip
        raise ValueError(
            f"attention maps are [B, H, T, T] with one batch and length, not {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    expected = (student.shape[0], student.shape[2])
    if mask is None:
        mask = torch.ones(expected, dtype=torch.bool, device=student.device)
    if mask.shape != expected:
        raise ValueError(
            f"attention maps of shape {list(student.shape)} need a mask {list(expected)}, not {list(mask.shape)}"
        )
    student, teacher = _wide(student), _wide(teacher.detach())
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return student, teacher, mask.bool()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
