"""The two similarities of DisWOT.

Source: Dong, Li and Wei 2023, "DisWOT: Student Architecture Search for Distillation WithOut Training" (CVPR 2023,
arXiv 2303.15678), with the forms of the official code.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kd_classic.functional import sp


def batch_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Relation: squared difference of the row-normalised Gram matrices of the samples, over B^2.

    Args:
        student: maps `[B, ...]`, flattened per sample.
        teacher: maps `[B, ...]` of any other size.

    Raises:
        ValueError: if there is one sample, or the batches differ.
    """
    return sp(student, teacher)


def channel_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Semantics: squared difference of the row-normalised Gram matrices of the channels, over n * c.

    Args:
        student: `[n, c]`, such as the gradient of a classifier's weight (a row per class), or maps `[n, c, ...]`.
        teacher: with the same n and c; the positions may differ in number.

    Raises:
        ValueError: if n or c differ.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"channel similarity compares channel with channel: {tuple(student.shape[:2])} and "
                         f"{tuple(teacher.shape[:2])} do not fit")  # fmt: skip
    grams = []
    for values in (student, teacher):
        rows = values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)
        grams.append(F.normalize(rows @ rows.transpose(1, 2), dim=2))
    n, c = student.shape[:2]
    return (grams[1] - grams[0]).square().sum() / (n * c)
