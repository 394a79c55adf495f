"""Losses on the relations between the samples of a batch, from one vector ``[B, D]`` (or map, flattened) per sample."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_classic.functional.logits import at_least_float32


def sp(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity preservation: ``|G_t - G_s|_F^2 / B^2`` of the row-normalised Gram matrices.

    Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", equation 4 (arXiv 1907.09682).

    Args:
        student_features: ``[B, ...]``, flattened per sample; at least two samples.
        teacher_features: ``[B, ...]`` of any other size.

    Raises:
        ValueError: if there is one sample, or the batches differ.
    """
    student, teacher = _rows("sp", student_features, teacher_features)
    grams = [F.normalize(rows @ rows.T, dim=1) for rows in (student, teacher)]
    return (grams[1] - grams[0]).square().mean()


def rkd(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Tensor:
    """Relational distillation: `rkd_distance` and `rkd_angle` together.

    Source: Park et al. 2019, "Relational Knowledge Distillation", equations 5 to 10 (arXiv 1904.05068).

    Args:
        student_features: ``[B, ...]``, flattened per sample; at least two samples.
        teacher_features: ``[B, ...]`` of any other size.
        distance_weight, angle_weight: weights of the two parts; a part of weight 0 is not computed.

    Raises:
        ValueError: if there is one sample, or the batches differ.
    """
    parts = []
    if distance_weight:
        parts.append(distance_weight * rkd_distance(student_features, teacher_features))
    if angle_weight:
        parts.append(angle_weight * rkd_angle(student_features, teacher_features))
    return torch.stack(parts).sum() if parts else student_features.sum() * 0


def rkd_distance(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Smooth L1 between the pairwise distances of both sides, each divided by its mean. See `rkd`."""
    student, teacher = _rows("rkd", student_features, teacher_features)
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def rkd_angle(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Smooth L1 between the cosines of all angles ``j i k`` of both sides; memory grows as ``B^2 D``. See `rkd`."""
    student, teacher = _rows("rkd", student_features, teacher_features)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def pkt(student_features: Tensor, teacher_features: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Probabilistic knowledge transfer: divergence of the samples' neighbourhoods, a mean over ``B^2`` entries.

    A neighbourhood is the row-normalised matrix of cosines, shifted into [0, 1]. Source: Passalis and Tefas 2018,
    "Learning Deep Representations with Probabilistic Knowledge Transfer", equations 3 to 8 (arXiv 1803.10837).

    Args:
        student_features: ``[B, ...]``, flattened per sample; at least two samples.
        teacher_features: ``[B, ...]`` of any other size.
        eps: keeps divisions and logarithms finite.

    Raises:
        ValueError: if there is one sample, or the batches differ.
    """
    student, teacher = (_neighbours(rows, eps) for rows in _rows("pkt", student_features, teacher_features))
    return (teacher * ((teacher + eps) / (student + eps)).log()).mean()


def crd(scores: Tensor, size: int, *, eps: float = 1e-7) -> Tensor:
    """Noise-contrastive estimation of CRD, one side of it: the positive against K negatives drawn uniformly.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", equations 17 to 19 (arXiv 1910.10699), in the
    form of the authors' code.

    Args:
        scores: ``[B, 1 + K]`` of ``exp(similarity) / Z``; column 0 belongs to the positive.
        size: samples in the data set, of which a negative is one with probability ``1 / size``.
        eps: keeps quotients finite.

    Raises:
        ValueError: if `scores` is no matrix of two columns or more, or `size` is not positive.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"crd needs scores [B, 1 + K], but they have shape {list(scores.shape)}")
    if size < 1:
        raise ValueError(f"crd needs the number of samples in the data set, not {size}")
    scores = at_least_float32(scores)
    noise = (scores.shape[1] - 1) / size
    positive, negatives = scores[:, 0], scores[:, 1:]
    likely = (positive / (positive + noise + eps)).log().sum()
    unlikely = (noise / (negatives + noise + eps)).log().sum()
    return -(likely + unlikely) / len(scores)


def _rows(who: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, D]`` of both sides; the teacher's without gradient."""
    if student.ndim < 2 or teacher.ndim < 2:
        raise ValueError(f"{who} needs a vector per sample, [B, D], not {list(student.shape)} and "
                         f"{list(teacher.shape)}")  # fmt: skip
    if len(student) != len(teacher):
        raise ValueError(f"{who} compares the samples of one batch; got {len(student)} and {len(teacher)} of them")
    if len(student) < 2:
        raise ValueError(f"{who} relates samples to each other and needs at least two in a batch")
    return at_least_float32(student).flatten(1), at_least_float32(teacher.detach()).flatten(1)


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances ``[B, B]`` divided by the mean of those between different samples."""
    squares = rows.square().sum(dim=1)
    squared = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=1e-12)
    others = 1 - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    distances = squared.sqrt() * others
    return distances / (distances.sum() / (len(rows) * (len(rows) - 1)))


def _cosines(rows: Tensor) -> Tensor:
    """``[B, B, B]``: at [i, j, k] the cosine between ``e_j - e_i`` and ``e_k - e_i``."""
    directions = F.normalize(rows[None] - rows[:, None], dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


def _neighbours(rows: Tensor, eps: float) -> Tensor:
    """Conditional probabilities ``[B, B]`` of one sample given another, from shifted cosines."""
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    similarity = (rows @ rows.T + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)
