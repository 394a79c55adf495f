"""Liger's fused kernel for the generalised JSD on CUDA, where it is installed (`pip install liger-kernel`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.data import IGNORE
from kdcore.models import Outputs

BETAS = {"fkl": 0.0, "rkl": 1.0}
"""Divergences that are the generalised JSD at one of its ends."""


@functools.cache
def kernel() -> Any:
    """`LigerFusedLinearJSDFunction`, or `None` where there is none."""
    try:
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction
    except ImportError:
        return None
    return LigerFusedLinearJSDFunction


def fits(student: Outputs, teacher: Outputs, labels: Tensor) -> bool:
    """Whether the kernel can take these: both logits pending, on CUDA, with plain layers of one vocabulary, and a label
    that counts."""
    heads = student.head, teacher.head
    if not (student.pending and teacher.pending) or any(type(head) is not nn.Linear for head in heads):
        return False
    one, two = heads
    assert one is not None
    assert two is not None
    plain = one.bias is None and two.bias is None and one.out_features == two.out_features
    usable = plain and one.weight.is_cuda and not torch.is_autocast_enabled("cuda") and kernel() is not None
    return usable and bool((labels != IGNORE).any())


def generalized_jsd(student: Outputs, teacher: Outputs, labels: Tensor, beta: float, temperature: float) -> Tensor:
    """As `functional.generalized_jsd` and a mean over the positions whose label counts."""
    kept = labels.flatten() != IGNORE
    ours, theirs = (o.need("embedding").flatten(0, 1)[kept] for o in (student, teacher))
    heads: Any = (student.head, teacher.head)
    value: Tensor = kernel().apply(ours, heads[0].weight, theirs, heads[1].weight, None, beta, IGNORE, temperature)
    return value
