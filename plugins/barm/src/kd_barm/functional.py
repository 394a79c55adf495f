"""The losses of a step, between a segmenter and its former self.

Source: Zhang and Gao 2024, "Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic
Segmentation", ECCV (arXiv 2407.09838), and its official code.

A segmenter after step t has t + 1 heads. Head k gives *group* k, raw logits ``[B, 1 + n_k, h, w]``: those of the n_k
classes of step k after channel 0, which is the background logit in group 0 and the background residual of step k in the
others. Labels ``[B, H, W]`` of step t hold the classes of that step; everything else in the image is 0.
Everything is computed in float32 at least, and the teacher's side never receives a gradient.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.data import IGNORE


def unify_background(groups: Sequence[Tensor], training: bool) -> Tensor:
    """One background logit for all groups, and the classes of all groups after it.

    A residual counts where it is negative only: a step may take pixels away from the background and never add any. In
    training the newest residual counts as it is, and it alone gets a gradient through the background.

    Args:
        groups: of steps 0 to t, ``[B, 1 + n_k, h, w]``.
        training: whether this is the net that learns step t. (A teacher is not.)

    Returns:
        ``[B, 1 + n_0 + ... + n_t, h, w]``.

    Raises:
        ValueError: if there is no group, or groups differ in batch or size.
    """
    groups = _checked(groups)
    background = groups[0][:, :1]
    if training and len(groups) > 1:
        older = [group[:, :1].detach().clamp(max=0) for group in groups[1:-1]]
        background = sum(older, background.detach()) + groups[-1][:, :1]
    else:
        background = sum((group[:, :1].clamp(max=0) for group in groups[1:]), background)
    return torch.cat([background, *(group[:, 1:] for group in groups)], 1)


def shared_background(groups: Sequence[Tensor]) -> Tensor:
    """As `unify_background`, but with the background logit of group 0 alone: what the method is compared with."""
    groups = _checked(groups)
    return torch.cat([groups[0], *(group[:, 1:] for group in groups[1:])], 1)


def pseudo_label(teacher_probs: Tensor, labels: Tensor, thresh: float) -> Tensor:
    """Labels whose background is filled with the classes that the teacher is sure of.

    Args:
        teacher_probs: the teacher's sigmoid probabilities ``[B, C, H, W]``; channel 0 is the background.
        labels: ``[B, H, W]``; only 0 is changed.
        thresh: the least probability of the highest channel.

    Raises:
        ValueError: if sizes differ.
    """
    if teacher_probs.ndim != 4 or teacher_probs[:, 0].shape != labels.shape:
        raise ValueError(f"probabilities {list(teacher_probs.shape)} do not fit labels {list(labels.shape)}")
    score, found = teacher_probs.max(1)
    return torch.where((labels == 0) & (found > 0) & (score >= thresh), found.to(labels.dtype), labels)


def label_masks(labels: Tensor, size: tuple[int, int], ignore_index: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Where a step's labels say one of its classes, and where they say background; ignored pixels are neither.

    Args:
        labels: as the data gives them, without pseudo labels, ``[B, H, W]``.
        size: ``(h, w)`` of the logits. Each cell takes its upper left pixel.
        ignore_index: the label that does not count.

    Returns:
        Two masks of 0 and 1, ``[B, 1, h, w]``.
    """
    positive = ((labels != 0) & (labels != ignore_index)).float()
    both = torch.stack([positive, (labels == 0).float()], 1)
    reduced = F.interpolate(both, size, mode="nearest")
    return reduced[:, :1], reduced[:, 1:]


def pb_bce(logits: Tensor, labels: Tensor, old_classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Binary cross-entropy with pseudo labels, summed over the channels, mean over the pixels that count.

    Args:
        logits: unified, ``[B, C, h, w]``; resized to the labels.
        labels: ``[B, H, W]`` from `pseudo_label`.
        old_classes: how many foreground channels, from the first, are of older steps; they get no gradient.
        ignore_index: the label that does not count.
    """
    counts = labels != ignore_index
    old = logits[:, 1 : 1 + old_classes].detach()
    logits = _float(torch.cat([logits[:, :1], old, logits[:, 1 + old_classes :]], 1))
    logits = upsample(logits, labels.shape[-2:])
    # BCE with a one-hot target, without making the target: softplus(z) summed, less the logit of the label.
    chosen = logits.gather(1, labels.where(counts, 0).unsqueeze(1)).squeeze(1)
    pixels = F.softplus(logits).sum(1) - chosen
    return pixels.where(counts, 0).sum() / counts.sum().clamp(min=1)


def bga_bce(residual: Tensor, positive: Tensor) -> Tensor:
    """Mean over new-class cells of the cross-entropy that lowers the residual there: ``softplus(r)``.

    Args:
        residual: the newest, ``[B, 1, h, w]``.
        positive: mask of the same shape, from `label_masks`.
    """
    return (F.softplus(_float(residual)) * positive).sum() / (positive.sum() + 1e-8)


def bga_triplet(residual: Tensor, negative: Tensor) -> Tensor:
    """Mean over background cells of ``max(0, (1 - p)^2 - p^2)`` with ``p = sigmoid(r)``: raises the residual above 0,
    where it no longer changes the background. 0 without background.

    Args:
        residual: the newest, ``[B, 1, h, w]``.
        negative: mask of the same shape, from `label_masks`.
    """
    p = _float(residual).sigmoid()
    return (F.relu(1 - 2 * p) * negative).sum() / negative.sum().clamp(min=1)


def background_feature_distill(features: Sequence[Tensor], previous: Sequence[Tensor], negative: Tensor) -> Tensor:
    """Squared difference of the branch features on the background, summed over the branches that the teacher has. Each
    is a mean over all ``B * D * h * w`` entries, whatever the mask holds.

    Args:
        features: ``[B, D, h, w]`` of each branch; those that the teacher does not have are not read.
        previous: the teacher's.
        negative: ``[B, 1, h, w]``, from `label_masks`.

    Raises:
        ValueError: if shapes differ.
    """
    pairs = _pairs(features, previous, "features")
    return torch.stack([(negative * (new - old)).square().mean() for new, old in pairs]).sum()


def group_kd(groups: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of each old group with the teacher's probabilities, residuals included: mean over batch and
    cells, summed over channels and groups. Its minimum is the teacher's entropy and not 0.

    Args:
        groups: ``[B, 1 + n_k, h, w]`` of each head; those that the teacher does not have are not read.
        previous: the teacher's.

    Raises:
        ValueError: if shapes differ.
    """
    pairs = _pairs(groups, previous, "logits")
    terms = [F.binary_cross_entropy_with_logits(new, old.sigmoid(), reduction="none") for new, old in pairs]
    return torch.stack([term.mean((0, 2, 3)).sum() for term in terms]).sum()


def step_losses(
    groups: Sequence[Tensor], features: Sequence[Tensor], previous_groups: Sequence[Tensor],
    previous_features: Sequence[Tensor], labels: Tensor, *, pseudo_thresh: float | None = 0.7, shared: bool = False,
    ignore_index: int = IGNORE,
) -> dict[str, Tensor]:  # fmt: skip
    """All terms of a step after the first, without weights.

    Args:
        groups: of the net that learns step t, t + 1 of them.
        features: what its heads read, ``[B, D, h, w]`` each.
        previous_groups, previous_features: of the net of step t - 1, t of each.
        labels: of step t, ``[B, H, W]``, classes numbered over all steps.
        pseudo_thresh: for `pseudo_label`; None leaves the labels as they are.
        shared: use `shared_background`, train it and all classes by the labels, and leave out the residual's terms.
        ignore_index: the label that does not count.

    Returns:
        `pb-bce`, `bga-tri`, `bga-bce`, `bfd` and `gkd`.

    Raises:
        ValueError: if groups, features or labels do not fit each other.
    """
    if len(groups) != len(previous_groups) + 1:
        raise ValueError(f"the teacher of a step has one head less, but there are {len(previous_groups)} heads of the "
                         f"teacher and {len(groups)} of the student")  # fmt: skip
    targets = labels
    if pseudo_thresh is not None:
        unified = shared_background(previous_groups) if shared else unify_background(previous_groups, training=False)
        targets = pseudo_label(upsample(_float(unified.detach()), labels.shape[-2:]).sigmoid(), labels, pseudo_thresh)
    height, width = groups[-1].shape[-2:]
    positive, negative = label_masks(labels, (height, width), ignore_index)
    distilled = {
        "bfd": background_feature_distill(features, previous_features, negative),
        "gkd": group_kd(groups, previous_groups),
    }
    if shared:
        return {"pb-bce": pb_bce(shared_background(groups), targets, 0, ignore_index), **distilled}
    residual = groups[-1][:, :1]
    old = sum(group.shape[1] - 1 for group in previous_groups)
    return {
        "pb-bce": pb_bce(unify_background(groups, training=True), targets, old, ignore_index),
        "bga-tri": bga_triplet(residual, negative),
        "bga-bce": bga_bce(residual, positive),
        **distilled,
    }


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps ``[B, C, h, w]`` at another size, bilinear, corners not aligned."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def _checked(groups: Sequence[Tensor]) -> list[Tensor]:
    if not groups:
        raise ValueError("there is no group of logits")
    for group in groups:
        same = group.ndim == 4 and group[:, 0].shape == groups[0][:, 0].shape
        if not same:
            raise ValueError(f"groups of logits must be [B, C, h, w] of one batch and size, not "
                             f"{[list(g.shape) for g in groups]}")  # fmt: skip
    return [_float(group) for group in groups]


def _pairs(ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> list[tuple[Tensor, Tensor]]:
    """What both sides have, the teacher's without gradient."""
    shapes = [[list(t.shape) for t in side] for side in (ours[: len(theirs)], theirs)]
    if not theirs or shapes[0] != shapes[1]:
        raise ValueError(f"the {what} of the student's old branches have the shapes {shapes[0]}, the teacher's "
                         f"{shapes[1]}; they must be the same")  # fmt: skip
    return [(_float(new), _float(old.detach())) for new, old in zip(ours, theirs, strict=False)]


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
