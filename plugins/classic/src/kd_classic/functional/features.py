"""Losses on feature maps ``[B, Ch, H, W]``."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_classic.functional.logits import at_least_float32


def pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the resolution of the smaller one: the larger is average-pooled."""
    ours, theirs = student.shape[-2:], teacher.shape[-2:]
    if ours == theirs:
        return student, teacher
    if ours[0] * ours[1] > theirs[0] * theirs[1]:
        return F.adaptive_avg_pool2d(student, list(theirs)), teacher
    return student, F.adaptive_avg_pool2d(teacher, list(ours))


def fitnet(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Hint loss: mean squared error over every element of two feature tensors of one shape.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3 (arXiv 1412.6550), with the mean in
    place of half the sum. Bring the student to the teacher's shape first, with `kd_classic.modules.Regressor`.

    Raises:
        ValueError: if the shapes differ.
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"student features {list(student_features.shape)} and teacher features {list(teacher_features.shape)} "
            "differ in shape; pass the student's through a Regressor first"
        )
    return F.mse_loss(at_least_float32(student_features), at_least_float32(teacher_features.detach()))


def attention_map(features: Tensor, *, p: int = 2) -> Tensor:
    """Where a convolutional layer looks: ``mean_channels(F^p)``, flattened and scaled to unit length.

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", section 3.1 (arXiv 1612.03928). The
    sum over channels of the paper gives the same map, because the length is normalised away.

    Args:
        features: ``[B, Ch, H, W]``.
        p: power, 2 in the paper's experiments.

    Returns:
        ``[B, H * W]``.

    Raises:
        ValueError: if `features` is not four-dimensional.
    """
    if features.ndim != 4:
        raise ValueError(f"attention transfer needs features [B, Ch, H, W], but they have shape {list(features.shape)}")
    return F.normalize(at_least_float32(features).pow(p).mean(dim=1).flatten(1), dim=1)


def at(
    student_features: Tensor | Sequence[Tensor],
    teacher_features: Tensor | Sequence[Tensor],
    *,
    mode: Literal["code", "paper"] = "code",
    p: int = 2,
) -> Tensor:
    """Attention transfer, summed over the given layers.

    ``mode="code"`` is the mean over batch and positions of the squared difference of attention maps, as in the
    authors' and most later code; ``mode="paper"`` is the length of a sample's difference, averaged over the batch
    (arXiv 1612.03928, equation 2). The two differ by orders of magnitude. The larger map of a pair is average-pooled
    to the smaller one.

    Args:
        student_features: one ``[B, Ch, H, W]`` or one per layer.
        teacher_features: as many; channels may differ from the student's.
        mode: ``"code"`` or ``"paper"``.
        p: power of the attention map.

    Raises:
        ValueError: if the numbers of layers differ, a tensor is not four-dimensional or `mode` is unknown.
    """
    if mode not in ("code", "paper"):
        raise ValueError(f"mode must be 'code' or 'paper', not {mode!r}")
    losses = []
    for student, teacher in pairs(student_features, teacher_features):
        student, teacher = pool_to_smaller(student, teacher)
        difference = attention_map(student, p=p) - attention_map(teacher, p=p)
        per_sample = torch.linalg.vector_norm(difference, dim=1) if mode == "paper" else difference.square().mean(dim=1)
        losses.append(per_sample.mean())
    return torch.stack(losses).sum()


def nst(student_features: Tensor | Sequence[Tensor], teacher_features: Tensor | Sequence[Tensor]) -> Tensor:
    """Neuron selectivity transfer: squared maximum mean discrepancy between the channels, summed over the layers.

    A channel's map is scaled to unit length; the kernel is ``(a . b)^2``. Source: Huang and Wang 2017, "Like What You
    Like: Knowledge Distill via Neuron Selectivity Transfer", equation 6 with the polynomial kernel (arXiv 1707.01219).
    The larger map of a pair is average-pooled to the smaller one.

    Args:
        student_features: one ``[B, Ch, H, W]`` or one per layer.
        teacher_features: as many; channels may differ from the student's.

    Raises:
        ValueError: if the numbers of layers differ or a tensor is not four-dimensional.
    """
    losses = []
    for student, teacher in pairs(student_features, teacher_features):
        student, teacher = (F.normalize(f.flatten(2), dim=2) for f in pool_to_smaller(student, teacher))
        own = _kernel_mean(student, student) - 2 * _kernel_mean(student, teacher)
        losses.append(own + _kernel_mean(teacher, teacher))
    return torch.stack(losses).sum()


def vid(mean: Tensor, log_scale: Tensor, teacher_features: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Variational information distillation: the negative log-likelihood of the teacher's features, without constants.

    ``mean(0.5 * ((mean - t)^2 / var + log var))`` with one variance per channel, ``softplus(log_scale) + eps``; it may
    be negative. Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", equation 4
    (arXiv 1904.05835).

    Args:
        mean: ``[B, Ch, H, W]``, the student's prediction of the teacher's features.
        log_scale: ``[Ch]``, trained.
        teacher_features: ``[B, Ch, H, W]``.
        eps: least variance.

    Raises:
        ValueError: if the shapes differ.
    """
    if mean.shape != teacher_features.shape or mean.ndim != 4:
        raise ValueError(f"vid compares maps [B, Ch, H, W] of one shape, not {list(mean.shape)} and "
                         f"{list(teacher_features.shape)}")  # fmt: skip
    if log_scale.shape != mean.shape[1:2]:
        raise ValueError(f"vid needs a scale per channel, [{mean.shape[1]}], not {list(log_scale.shape)}")
    variance = (F.softplus(at_least_float32(log_scale)) + eps).view(1, -1, 1, 1)
    error = at_least_float32(mean) - at_least_float32(teacher_features.detach())
    return 0.5 * (error.square() / variance + variance.log()).mean()


def ab(
    student_features: Tensor | Sequence[Tensor],
    teacher_features: Tensor | Sequence[Tensor],
    *,
    margin: float = 1.0,
) -> Tensor:
    """Activation boundaries: the student's pre-activations get the teacher's signs, with a margin.

    Summed over a sample's elements, averaged over the batch; each layer weighs half of the next deeper one, and 3/1000
    is the factor of the published code. Source: Heo et al. 2019, "Knowledge Transfer via Distillation of Activation
    Boundaries Formed by Hidden Neurons", equation 4 (arXiv 1811.03233).

    Args:
        student_features: one pre-activation ``[B, Ch, H, W]`` (after its connector) or one per layer, deepest last.
        teacher_features: as many, of the same shapes.
        margin: how far beyond zero the student is pushed.

    Raises:
        ValueError: if the numbers of layers or their shapes differ.
    """
    losses = []
    for student, teacher in pairs(student_features, teacher_features):
        if student.shape != teacher.shape:
            raise ValueError(f"ab compares features of one shape, not {list(student.shape)} and {list(teacher.shape)}")
        sign = 1 - 2 * (teacher > 0).to(student.dtype)
        missing = F.relu(student * sign + margin)
        losses.append(missing.square().sum() / len(student))
    return torch.stack([loss / 2 ** (len(losses) - 1 - i) for i, loss in enumerate(losses)]).sum() * (3 / 1000)


def ofd(
    student_features: Tensor | Sequence[Tensor],
    teacher_features: Tensor | Sequence[Tensor],
    margins: Tensor | Sequence[Tensor],
) -> Tensor:
    """Feature distillation with the partial L2 distance: negative pre-activations of the teacher are only a bound.

    Summed over a sample's elements, averaged over the batch; each layer weighs half of the next deeper one. Source:
    Heo et al. 2019, "A Comprehensive Overhaul of Feature Distillation", equations 2 to 5 (arXiv 1904.01866).

    Args:
        student_features: one pre-activation ``[B, Ch, H, W]`` (after its connector) or one per layer, deepest last.
        teacher_features: as many; larger maps are average-pooled to the student's.
        margins: ``[1, Ch, 1, 1]`` per layer, from `ofd_margin`.

    Raises:
        ValueError: if the numbers of layers, or channels, differ.
    """
    bounds = [margins] if isinstance(margins, Tensor) else list(margins)
    layers = pairs(student_features, teacher_features)
    shapes = [[1, teacher.shape[1], 1, 1] for _, teacher in layers]
    if [list(margin.shape) for margin in bounds] != shapes:
        raise ValueError(f"ofd needs margins of shape {shapes}, not {[list(margin.shape) for margin in bounds]}")
    losses = []
    for (student, teacher), margin in zip(layers, bounds, strict=True):
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(f"ofd needs a connector to {teacher.shape[1]} channels; got {student.shape[1]}")
        if student.shape[-2:] != teacher.shape[-2:]:
            teacher = F.adaptive_avg_pool2d(teacher, list(student.shape[-2:]))
        target = torch.maximum(teacher, margin)
        counts = (student > target) | (target > 0)
        losses.append(((student - target).square() * counts).sum() / len(student))
    return torch.stack([loss / 2 ** (len(losses) - 1 - i) for i, loss in enumerate(losses)]).sum()


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The mean of a channel's negative values, if the batch norm that ends the teacher's layer yields a normal.

    Source: Heo et al. 2019, equation 3 (arXiv 1904.01866). Where less than a thousandth is negative: ``-3 |weight|``.

    Args:
        weight, bias: ``[Ch]`` of the batch norm.

    Returns:
        ``[1, Ch, 1, 1]``.
    """
    scale, mean = weight.detach().double().abs(), bias.detach().double()
    ratio = mean / scale.clamp(min=1e-12)
    negative = 0.5 * torch.erfc(ratio / math.sqrt(2))
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    margin = torch.where(negative > 0.001, mean - scale * density / negative.clamp(min=1e-12), -3 * scale)
    return margin.to(weight.dtype).view(1, -1, 1, 1)


def hcl(student_features: Tensor | Sequence[Tensor], teacher_features: Tensor | Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss of ReviewKD: mean squared error at full size and pooled to 4, 2 and 1, per level.

    Each next scale weighs half of the one before, and the weights are normalised; scales that are not smaller than the
    map are left out. Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", section 3.3 (arXiv
    2104.09044).

    Args:
        student_features: one ``[B, Ch, H, W]`` or one per level.
        teacher_features: as many, of the same shapes.

    Raises:
        ValueError: if the numbers of levels or their shapes differ.
    """
    losses = []
    for student, teacher in pairs(student_features, teacher_features):
        loss, total, weight = fitnet(student, teacher), 1.0, 1.0
        for size in (4, 2, 1):
            if size >= student.shape[2]:
                continue
            weight /= 2
            pooled = [F.adaptive_avg_pool2d(f, size) for f in (student, teacher)]
            loss = loss + weight * F.mse_loss(*pooled)
            total += weight
        losses.append(loss / total)
    return torch.stack(losses).sum()


def mgd(generated: Tensor, teacher_features: Tensor, *, alpha: float = 2e-5) -> Tensor:
    """Masked generative distillation: squared error of generated features, summed over a sample.

    Source: Yang et al. 2022, "Masked Generative Distillation", equation 4 (arXiv 2205.01529).

    Args:
        generated: ``[B, Ch, H, W]``, from `kd_classic.modules.MaskedGenerator`.
        teacher_features: the same shape.
        alpha: 2e-5 for segmentation and detection, 7e-5 for classification.

    Raises:
        ValueError: if the shapes differ.
    """
    return alpha * fitnet(generated, teacher_features) * (generated.numel() / len(generated))


def pairs(student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Layers of both sides, paired in order; float32 at least, and the teacher's without gradient.

    Raises:
        ValueError: if there are none, not as many, or one is no map.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(f"layers are compared in pairs, but there are {len(students)} of the student and "
                         f"{len(teachers)} of the teacher")  # fmt: skip
    for features in (*students, *teachers):
        if features.ndim != 4:
            raise ValueError(f"needs feature maps [B, Ch, H, W], but one has shape {list(features.shape)}")
    if len(sizes := {len(features) for features in (*students, *teachers)}) > 1:
        raise ValueError(f"needs feature maps of one batch, but these are of {' and '.join(map(str, sorted(sizes)))} "
                         "samples")  # fmt: skip
    return [(at_least_float32(s), at_least_float32(t.detach())) for s, t in zip(students, teachers, strict=True)]


def _kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """Mean of ``(a_i . b_j)^2`` over batch and pairs of channels, of ``[B, Ch, N]`` and ``[B, Ch', N]``."""
    return torch.bmm(a, b.transpose(1, 2)).square().mean()
