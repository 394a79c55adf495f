"""The divergences and the routing, as functions of tensors.

Source: Li et al. 2025, "MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation"
(arXiv 2507.07015), and its official code. Logits are `[B, C]`, or `[B, C, H, W]` for a class per pixel; there are E
specialised teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LbMode = Literal["kl", "cv"]
Routing = Literal["hard", "weighted"]


def kd_kl(pupil: Tensor, target: Tensor, *, temperature: float = 4.0) -> Tensor:
    """``T^2 * KL(softmax(target / T) || softmax(pupil / T))``, mean over samples and positions.

    Gradient flows into both; detach what is not to learn.

    Args:
        pupil, target: logits of one shape, `[B, C]` or `[B, C, H, W]`.
        temperature: T, > 0.

    Raises:
        ValueError: if the shapes differ or are no logits, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, but is {temperature}")
    if pupil.shape != target.shape or pupil.ndim < 2:
        raise ValueError(f"logits of pupil and target must have one shape [B, C] or [B, C, H, W], "
                         f"but have {list(pupil.shape)} and {list(target.shape)}")  # fmt: skip
    ours, theirs = ((_precise(logits) / temperature).log_softmax(1) for logits in (pupil, target))
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * total / (pupil.numel() // pupil.shape[1])


def mutual_kl(logits: Sequence[Tensor], *, temperature: float = 4.0) -> list[Tensor]:
    """For each model, the sum of `kd_kl` to every other one: collaborative initialisation (stage 1).

    Nothing is detached, so each divergence moves both its models.
    """
    return [
        torch.stack([kd_kl(own, other, temperature=temperature) for j, other in enumerate(logits) if j != i]).sum()
        for i, own in enumerate(logits)
    ]


def top_teachers(gate_logits: Tensor, k: int) -> Tensor:
    """Indices `[B, k]` of the teachers with the largest gate probabilities, the largest first.

    Args:
        gate_logits: `[B, E]`.
        k: between 1 and E.

    Raises:
        ValueError: if the logits are not `[B, E]`, or k is out of range.
    """
    if gate_logits.ndim != 2:
        raise ValueError(f"gate logits must be [B, E], but have shape {list(gate_logits.shape)}")
    if not 1 <= k <= gate_logits.shape[1]:
        raise ValueError(f"k must be between 1 and the number of teachers, {gate_logits.shape[1]}, but is {k}")
    return _precise(gate_logits).softmax(1).topk(k, dim=1).indices


def routed_kl(
    student: Tensor,
    teachers: Tensor,
    gate_logits: Tensor,
    *,
    k: int = 1,
    temperature: float = 4.0,
    routing: Routing = "hard",
) -> Tensor:
    """Divergence of the student from the teachers that the gate chooses for each sample (stage 3).

    `hard`: the mean of `kd_kl` over the k most probable teachers. The choice is not differentiable and the
    probabilities multiply nothing, so the gate gets no gradient. `weighted`: one `kd_kl` to the mean of all teachers'
    logits under the gate's probabilities, which has a gradient for the gate; k does not count.

    Args:
        student: logits `[B, C]` or `[B, C, H, W]`.
        teachers: `[E, ...]`, the same for each teacher; without gradient.
        gate_logits: `[B, E]`.
        k: teachers per sample.
        temperature: T, > 0.
        routing: `hard` or `weighted`.

    Raises:
        ValueError: if shapes do not fit, or an argument is out of range.
    """
    if teachers.shape[1:] != student.shape or gate_logits.shape != (len(student), len(teachers)):
        raise ValueError(
            f"a student's logits {list(student.shape)} need teachers' [E, ...] of the same shape and gate logits "
            f"[B, E], but these have {list(teachers.shape)} and {list(gate_logits.shape)}"
        )
    by_sample = teachers.detach().transpose(0, 1)
    if routing == "weighted":
        weights = _precise(gate_logits).softmax(1)
        mean = (weights.reshape(weights.shape + (1,) * (student.ndim - 1)) * by_sample).sum(1)
        return kd_kl(student, mean, temperature=temperature)
    if routing != "hard":
        raise ValueError(f"unknown routing {routing!r}: 'hard' or 'weighted'")
    rows = torch.arange(len(student), device=student.device)[:, None]
    chosen = by_sample[rows, top_teachers(gate_logits, k)]
    repeated = student.unsqueeze(1).expand_as(chosen)
    return kd_kl(repeated.flatten(0, 1), chosen.flatten(0, 1), temperature=temperature)


def load_balance(gate_logits: Tensor, *, mode: LbMode = "kl") -> Tensor:
    """How far the gate is from using all teachers alike.

    `kl`: ``1/E * sum_e u (log u - log c_e)`` with u = 1/E and c the mean probabilities of the batch. (The official
    code's factor 1/E; the paper writes the divergence without it.) `cv`: unbiased standard deviation over mean, of
    the summed probabilities.

    Args:
        gate_logits: `[B, E]` with at least two teachers.
        mode: `kl` or `cv`.

    Raises:
        ValueError: if the logits are not `[B, E]`, or the mode is unknown.
    """
    if gate_logits.ndim != 2 or gate_logits.shape[1] < 2:
        raise ValueError(f"gate logits must be [B, E] with E > 1, but have shape {list(gate_logits.shape)}")
    count = gate_logits.shape[1]
    if mode == "cv":
        used = _precise(gate_logits).softmax(1).sum(0)
        return used.std() / used.mean()
    if mode != "kl":
        raise ValueError(f"unknown mode {mode!r}: 'kl' or 'cv'")
    log_used = _precise(gate_logits).log_softmax(1).logsumexp(0) - math.log(len(gate_logits))
    uniform = torch.full_like(log_used, 1 / count)
    return F.kl_div(log_used, uniform, reduction="sum") / count


def decayed(weight: float, epoch: int, factor: float, every: int) -> float:
    """A weight in epoch `epoch`, counted from 0, that is multiplied by `factor` at the end of the epochs 0, `every`,
    2 `every` and so on: so already after the first one."""
    return weight * factor ** -(-epoch // every)


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
