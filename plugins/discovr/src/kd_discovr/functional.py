"""The losses of DISCOVR and what they need, as pure functions.

Source: Mishra et al. 2025, "Self-supervised Learning of Echocardiographic Video Representations via Online Cluster
Distillation" (arXiv 2506.11777), and its official code where the text is silent. The losses on class tokens are those
of Caron et al. 2021, DINO (arXiv 2104.14294), the assignments those of Caron et al. 2020, SwAV (arXiv 2006.09882).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-6


def visible_positions(draw: Tensor, ratio: float) -> Tensor:
    """Which of S positions stay visible when int(S * ratio) of them are masked at random.

    Args:
        draw: uniform numbers `[..., S]`.
        ratio: share of masked positions, in [0, 1).

    Returns:
        Indices `[..., S - int(S * ratio)]`, in ascending order.

    Raises:
        ValueError: if the ratio is outside.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"a mask ratio lies in [0, 1), but is {ratio}")
    masked = int(draw.shape[-1] * ratio)
    return draw.argsort(-1)[..., masked:].sort(-1).values


def tube(visible: Tensor, frames: int, size: int) -> Tensor:
    """The same visible positions `[..., v]` of a frame of `size` tokens in every frame: `[..., frames * v]`."""
    starts = torch.arange(frames, device=visible.device)[:, None] * size
    return (visible[..., None, :] + starts).flatten(-2)


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """The tokens `[B, N, D]` at the indices `[..., B, n]`: `[..., B, n, D]`."""
    tokens = tokens.expand(*indices.shape[:-1], *tokens.shape[-2:])
    return tokens.gather(-2, indices[..., None].expand(*indices.shape, tokens.shape[-1]))


def teacher_temperature(epoch: int, start: float, end: float, epochs: int) -> float:
    """From `start` to `end` in equal steps over the first `epochs` epochs, `end` from then on."""
    return end if epoch >= epochs - 1 else start + (end - start) * epoch / (epochs - 1)


def image_temperatures(teacher: float, student: float) -> tuple[float, float]:
    """The temperatures of the image branch, within the limits of the official code: at least 0.04 for the teacher,
    0.1 to 0.2 for the student."""
    return max(teacher, 0.04), min(max(student, 0.1), 0.2)


def teacher_probabilities(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """`softmax((logits - center) / temperature)` in float32, without gradient: `[B, K]`, with the centre `[1, K]`."""
    return ((logits.detach().float() - center) / temperature).softmax(-1)


def dino_ce(student_logits: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of the student's views with the teacher's distribution, a mean over views and samples.

    Args:
        student_logits: `[V, B, K]`.
        teacher: probabilities `[B, K]`.
        temperature: of the student.

    Raises:
        ValueError: if the shapes do not fit or the temperature is not positive.
    """
    if student_logits.shape[1:] != teacher.shape:
        raise ValueError(f"views of shape {list(student_logits.shape)} do not fit probabilities {list(teacher.shape)}")
    if temperature <= 0:
        raise ValueError(f"the student's temperature must be positive, but is {temperature}")
    return -(teacher.detach() * (student_logits.float() / temperature).log_softmax(-1)).sum(-1).mean()


def moved_center(center: Tensor, rows: Tensor, momentum: float = 0.9) -> Tensor:
    """The centre `[1, K]` after one step: `momentum * center + (1 - momentum) * mean(rows)`, the mean over the rows
    `[B, K]` of all processes."""
    sums = over_processes(torch.cat([rows.float().sum(0), rows.new_tensor([len(rows)], dtype=torch.float32)]))
    return momentum * center + (1 - momentum) * sums[:-1] / sums[-1]


def standardise_tokens(tokens: Tensor) -> Tensor:
    """Each channel brought to mean 0 and deviation 1 over the tokens of a frame: `[..., N, D]`, any leading ones."""
    variance, mean = torch.var_mean(tokens.float(), dim=-2, keepdim=True)
    return (tokens.float() - mean) / (variance.sqrt() + TINY)


@torch.no_grad()
def normalise_(prototypes: Tensor) -> Tensor:
    """Bring the rows `[K, D]` to length 1, in place and outside the autograd graph."""
    return prototypes.copy_(F.normalize(prototypes, dim=1))


def prototype_scores(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines `[..., K]` of tokens `[..., D]` with prototypes `[K, D]` of length 1, in float32."""
    with torch.autocast(tokens.device.type, enabled=False):
        return F.normalize(tokens.float(), dim=-1) @ prototypes.float().T


@torch.no_grad()
def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 10) -> Tensor:
    """Soft assignments of tokens to prototypes that use every prototype alike (Sinkhorn-Knopp), without gradient.

    Where processes work together they call it together, each with its own tokens, and get what one process would get
    for all of them.

    Args:
        scores: `[N, K]`.
        eps: weight of the entropy; smaller is harder.
        iterations: normalisations of prototypes, then tokens.

    Returns:
        `[N, K]` float32; each row sums to 1.

    Raises:
        ValueError: if the shape, `eps` or `iterations` make no sense.
    """
    if scores.ndim != 2 or eps <= 0 or iterations < 0:
        raise ValueError(f"sinkhorn takes scores [N, K], eps > 0 and iterations >= 0, but was given "
                         f"{list(scores.shape)}, {eps} and {iterations}")  # fmt: skip
    q = (scores.detach().float() / eps).sub_(over_processes(scores.max().float() / eps, "max")).exp_()
    q /= over_processes(q.sum())
    tokens = over_processes(torch.tensor(float(len(q)), device=q.device))
    for _ in range(iterations):
        q /= over_processes(q.sum(0)) * q.shape[1]
        q /= q.sum(1, keepdim=True) * tokens
    return q.div_(q.sum(1, keepdim=True))


def assignments(scores: Tensor, eps: float = 0.05, iterations: int = 10, soft: bool = False) -> Tensor:
    """The clusters of tokens by `sinkhorn` over all of them: `[..., K]` to indices `[...]`, or, `soft`, to `[..., K]`.
    Raises `ValueError` as `sinkhorn`."""
    q = sinkhorn(scores.flatten(0, -2), eps, iterations).view_as(scores)
    return q if soft else q.argmax(-1)


def cluster_ce(scores: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of scores `[..., K]` with targets as `assignments` gives them, a mean over the tokens."""
    targets = targets.flatten(0, -2) if targets.is_floating_point() else targets.flatten()
    return F.cross_entropy(scores.flatten(0, -2) / temperature, targets)


@dataclass(frozen=True)
class ClusterLoss:
    """Semantic cluster distillation in both directions.

    Args:
        student: the video tokens' scores with the image tokens' clusters: what trains.
        teacher: the image tokens' scores with the video tokens' clusters.
    """

    student: Tensor
    teacher: Tensor


def cluster_assignment_distill(
    student_tokens: Tensor, teacher_tokens: Tensor, prototypes: Tensor, *, eps: float = 0.05, iterations: int = 10,
    temperature: float = 0.1, soft_targets: bool = False, prototype_grad_from_image: bool = False,
    targets: Tensor | None = None,
) -> ClusterLoss:  # fmt: skip
    """Each branch predicts the clusters of the other's tokens at the same place.

    Args:
        student_tokens: decoder tokens of the video student `[B, N, D]`.
        teacher_tokens: tokens of the image teacher `[B, N, D]`, taken without gradient.
        prototypes: `[K, D]`, rows of length 1.
        eps, iterations: of `sinkhorn`, over all tokens of the batch.
        temperature: of the scores in the cross-entropies.
        soft_targets: the whole assignment as target instead of its largest entry.
        prototype_grad_from_image: let the image tokens' scores train the prototypes; without, `teacher` has no
            gradient.
        targets: the clusters of `teacher_tokens`, where they are known already.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if student_tokens.shape != teacher_tokens.shape or prototypes.shape[-1:] != student_tokens.shape[-1:]:
        raise ValueError(f"video tokens {list(student_tokens.shape)}, image tokens {list(teacher_tokens.shape)} and "
                         f"prototypes {list(prototypes.shape)} do not fit together")  # fmt: skip
    ours = prototype_scores(student_tokens, prototypes)
    theirs = prototype_scores(teacher_tokens.detach(), prototypes if prototype_grad_from_image else prototypes.detach())
    if targets is None:
        targets = assignments(theirs, eps, iterations, soft_targets)
    back = assignments(ours, eps, iterations, soft_targets)
    return ClusterLoss(cluster_ce(ours, targets, temperature), cluster_ce(theirs, back, temperature))


def paired_tokens(tokens: Tensor, tubelet: int, alignment: str = "aligned") -> Tensor:
    """The image tokens that stand for the tubelets of a clip: `[B, T, S, D]` to `[B, T / tubelet * S, D]`.

    `aligned` takes the first frame of every tubelet, so that each token has the place of the video token with its
    index. `code` takes every `tubelet`-th entry of the flat list, as the official code does: every other patch of
    every frame instead of every patch of every other frame.
    """
    if alignment == "code":
        return tokens.flatten(1, 2)[:, ::tubelet]
    return tokens[:, ::tubelet].flatten(1, 2)


def visible_first(tokens: Tensor, visible: Tensor) -> Tensor:
    """Tokens `[B, N, D]` in the order in which the official code leaves them: the visible ones `[B, v]`, then the
    masked ones."""
    masked = torch.ones(tokens.shape[:2], device=tokens.device).scatter_(1, visible, 0.0)
    return take(tokens, masked.argsort(dim=1, stable=True))


def over_processes(value: Tensor, how: str = "sum") -> Tensor:
    """The sum (or `max`) of a tensor over all processes; the tensor itself where there is one."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        value = value.clone()
        operation = torch.distributed.ReduceOp.MAX if how == "max" else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(value, operation)
    return value
