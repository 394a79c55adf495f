"""The small network that says how far the teacher's distribution is clipped."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Levels(nn.Module):
    """Two levels of the teacher's distribution, from its probabilities and the student's.

    ``Linear(2 K, hidden) - GELU - Linear(hidden, 2)`` gives a and b; the upper level is ``sigmoid(a)``, the lower one
    ``sigmoid(a) sigmoid(b)``. At first they are the same for all inputs: the last layer's weights are 0, its biases
    `start` and 0.

    Args:
        size: V, of the vocabulary.
        topk: K: the network sees the teacher's K largest probabilities, in order, and the student's of the same
            tokens; `None`: all V of both, in the order of the vocabulary.
        hidden: width.
        start: a at the start; default: 4, or log V where that is more. Then ``1 - upper`` is less than the share of one
            token, and only the likeliest one, whose quantile is 1, lies above.
    """

    def __init__(self, size: int, topk: int | None = 64, hidden: int = 128, start: float | None = None) -> None:
        super().__init__()
        self.topk = None if topk is None else min(topk, size)
        last = nn.Linear(hidden, 2)
        self.layers = nn.Sequential(nn.Linear(2 * (self.topk or size), hidden), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([max(4.0, math.log(size)) if start is None else start, 0.0]))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """The lower and the upper level, `[N]` each; neither side's logits `[N, V]` get a gradient."""
        ours, theirs = (logits.detach().float().log_softmax(1) for logits in (student_logits, teacher_logits))
        if self.topk is not None:
            theirs, ids = theirs.topk(self.topk)
            ours = ours.gather(1, ids)
        a, b = self.layers(torch.cat([theirs, ours], 1).exp()).float().sigmoid().unbind(1)
        return a * b, a
