"""Differentiable Siamese augmentation: the same random change of real and synthetic images, with gradient to the
pixels.

Source: Zhao and Bilen 2021, "Dataset Condensation with Differentiable Siamese Augmentation" (arXiv 2102.08259), "
                             "section 3.
Images are in standardised units, so the grey that moves in at the borders is the mean. The random numbers are an
argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kd_dataset_distill.options import AugmentOptions

NUMBERS = 3
"""Random numbers in [0, 1) that a change of an image takes, at most."""


@dataclass(frozen=True)
class Augmentation:
    """One change, drawn for a call: which operation, and the random numbers of each image.

    Args:
        options: how strong the operations are.
        name: of the operation.
        numbers: `[B, 3]` in [0, 1), or `[1, 3]` to change all images alike.
    """

    options: AugmentOptions
    name: str
    numbers: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Changed images `[B, C, H, W]`, with gradient to the given ones."""
        numbers = self.numbers.to(images.device).expand(len(images), -1)
        return OPERATIONS[self.name](images, numbers, self.options)


def draw(options: AugmentOptions, generator: torch.Generator, count: int = 1) -> Augmentation | None:
    """An operation of the strategy and the numbers of `count` images (one: all change alike); none for `none`."""
    names = options.names
    if not names:
        return None
    name = names[int(torch.randint(len(names), (), generator=generator))]
    return Augmentation(options, name, torch.rand(count, NUMBERS, generator=generator))


def flip(images: Tensor, numbers: Tensor, options: AugmentOptions) -> Tensor:
    """Mirrored with probability `flip`."""
    return torch.where(_as(numbers[:, 0]) < options.flip, images.flip(3), images)


def color(images: Tensor, numbers: Tensor, options: AugmentOptions) -> Tensor:
    """Brightness, saturation and contrast, in this order."""
    images = images + (_as(numbers[:, 0]) - 0.5) * options.brightness
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (_as(numbers[:, 1]) * options.saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (_as(numbers[:, 2]) + options.contrast) + mean


def crop(images: Tensor, numbers: Tensor, options: AugmentOptions) -> Tensor:
    """Shifted by whole pixels, up to the share `crop_pad` of each side."""
    height, width = images.shape[-2:]
    rows = _shifted(height, numbers[:, 0], options.crop_pad)
    columns = _shifted(width, numbers[:, 1], options.crop_pad)
    padded = F.pad(images, [1, 1, 1, 1])
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, numbers: Tensor, options: AugmentOptions) -> Tensor:
    """A rectangle of the share `cutout` of each side is set to the mean; its centre lies anywhere."""
    height, width = images.shape[-2:]
    rows, columns = (_covered(side, numbers[:, i], options.cutout) for i, side in enumerate((height, width)))
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def scale(images: Tensor, numbers: Tensor, options: AugmentOptions) -> Tensor:
    """Stretched along each axis by a factor between 1 / `scale` and `scale`."""
    low = 1 / options.scale
    factors = numbers[:, :2] * (options.scale - low) + low
    zero = torch.zeros_like(factors[:, 0])
    rows = [torch.stack([factors[:, 0], zero, zero], 1), torch.stack([zero, factors[:, 1], zero], 1)]
    return _moved(images, torch.stack(rows, 1))


def rotate(images: Tensor, numbers: Tensor, options: AugmentOptions) -> Tensor:
    """Turned by up to `rotate` degrees either way."""
    angle = (numbers[:, 0] - 0.5) * 2 * math.radians(options.rotate)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _moved(images, torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1))


OPERATIONS: dict[str, Callable[[Tensor, Tensor, AugmentOptions], Tensor]] = {
    "color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate,
}  # fmt: skip


def _as(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


def _moved(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _shifted(side: int, number: Tensor, share: float) -> Tensor:
    """Positions `[B, side]` in a row that was padded by one on both sides."""
    most = int(side * share + 0.5)
    shift = (number * (2 * most + 1)).long() - most
    return (torch.arange(side, device=number.device) + shift[:, None] + 1).clamp(0, side + 1)


def _covered(side: int, number: Tensor, share: float) -> Tensor:
    """Which positions of a side `[B, side]` the rectangle covers."""
    size = int(side * share + 0.5)
    start = (number * (side + 1 - size % 2)).long() - size // 2
    at = torch.arange(side, device=number.device)
    return (at >= start[:, None]) & (at < start[:, None] + size)
