"""The label channel, and the distance between logits.

Source: Qiu et al. 2024, "Make a Strong Teacher with Label Assistance: A Novel Knowledge Distillation Approach for
Semantic Segmentation", ECCV (arXiv 2407.13254), label noising module, as in the authors' training script.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_classic.functional import cwd, dist, kd

Distance = Literal["cwd", "kl", "dist"]


def label_channel(
    labels: Tensor, codes: Tensor, noise: Tensor, *, noise_std: float, scale: float, ignore_index: int = -100
) -> Tensor:
    """An image of labels: ``scale * (codes[b, labels[b]] + noise_std * noise)``.

    All pixels of a class in an image share a value. Where codes are drawn anew for each image, the channel tells how
    the image is divided, and not which class is where.

    Args:
        labels: class indices ``[B, H, W]``.
        codes: a value for each of the K classes and, last, for ignored pixels: ``[B, K + 1]``.
        noise: standard normal, ``[B, 1, H, W]``.
        noise_std: standard deviation of the noise on each pixel.
        scale: factor that brings the channel to the size of the image's values.
        ignore_index: label of pixels that do not count.

    Returns:
        ``[B, 1, H, W]``, of the type of `codes`.

    Raises:
        ValueError: if the shapes do not fit, or a label is neither a class nor `ignore_index`.
    """
    if labels.ndim != 3 or codes.ndim != 2 or len(codes) != len(labels):
        raise ValueError(f"labels [B, H, W] need codes [B, K + 1], not {list(labels.shape)} and {list(codes.shape)}")
    if noise.shape != labels.unsqueeze(1).shape:
        raise ValueError(f"labels {list(labels.shape)} need noise [B, 1, H, W], not {list(noise.shape)}")
    classes = codes.shape[1] - 1
    slots = labels.long().masked_fill(labels == ignore_index, classes)
    if bool((wrong := (slots < 0) | ((slots >= classes) & (labels != ignore_index))).any()):
        raise ValueError(f"a pixel has the label {int(labels[wrong][0])}; the classes are 0 to {classes - 1}, and "
                         f"{ignore_index} stands for pixels that do not count")  # fmt: skip
    values = codes.gather(1, slots.flatten(1)).view_as(labels).unsqueeze(1)
    return scale * (values + noise_std * noise)


def fixed_codes(classes: int) -> Tensor:
    """Codes ``[K + 1]`` that do not change: -1.1 for the first class, 1 for ignored pixels, evenly spaced between.

    For 21 classes these are ``(k - 11) / 10``, those of the authors' script. Other numbers of classes keep the range,
    in which a teacher trained with standard normal codes has seen most of them.
    """
    return -1.1 + 2.1 * torch.arange(classes + 1) / max(classes, 1)


def distance(
    student_logits: Tensor, teacher_logits: Tensor, kind: Distance = "cwd", *, temperature: float = 4.0,
    align_corners: bool = True,
) -> Tensor:  # fmt: skip
    """The distance between score maps that both stages minimise; no gradient reaches the second.

    Args:
        student_logits: ``[B, C, h, w]``.
        teacher_logits: ``[B, C, h', w']``; resized bilinearly where it has another size.
        kind: ``"cwd"``: ``T^2 / (B C) * sum KL`` over the positions of each channel; ``"kl"``: KL divergence over the
            classes, averaged over pixels, without ``T^2``; ``"dist"``: one minus Pearson's correlation, over classes
            and over pixels (of all images together), without temperature.
        temperature: T > 0.
        align_corners: of the resizing.

    Raises:
        ValueError: if the shapes do not fit, T <= 0 or `kind` is unknown.
    """
    if student_logits.ndim != 4 or teacher_logits.ndim != 4:
        raise ValueError(f"score maps are [B, C, h, w], not {list(student_logits.shape)} and "
                         f"{list(teacher_logits.shape)}")  # fmt: skip
    teacher_logits = resized(teacher_logits.detach(), student_logits.shape[-2:], align_corners)
    if kind == "cwd":
        return cwd(student_logits, teacher_logits, temperature=temperature)
    if kind == "kl":
        return kd(student_logits, teacher_logits, temperature=temperature) / temperature**2
    if kind == "dist":
        return dist(student_logits, teacher_logits)
    raise ValueError(f"the distance must be 'cwd', 'kl' or 'dist', not {kind!r}")


def pixel_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, align_corners: bool = True
) -> Tensor:
    """Mean cross-entropy of the pixels that count, of logits ``[B, C, h, w]`` resized to labels ``[B, H, W]``; 0 where
    none counts."""
    logits = resized(logits.float(), labels.shape[-2:], align_corners)
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def resized(maps: Tensor, size: tuple[int, ...], align_corners: bool) -> Tensor:
    """Maps ``[B, C, h, w]`` brought to another size bilinearly, in float32 at least; as they are if they have it."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    maps = maps if maps.dtype == torch.float64 else maps.float()
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)
