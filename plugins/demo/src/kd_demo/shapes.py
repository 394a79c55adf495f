"""Generated segmentation: two to four discs, rectangles, triangles and rings on a textured, noisy background.

The colour says nothing about the class: it must be read from the outline.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_demo.columns import Columns, corrupt
from kd_demo.options import ShapesOptions
from kdcore.data import DataModule, Task, derive_seed

CLASSES = ("background", "disc", "rectangle", "triangle", "ring")
FEWEST, MOST = 2, 4
TEXTURE, CONTRAST = 4, 0.3
PER_SHAPE = 8


def shapes(options: ShapesOptions) -> DataModule:
    """Splits `train`, `val` and `test` of `image` `[3, size, size]` in [0, 1] and `mask` `[size, size]`."""
    splits = {}
    for name, count in (("train", options.train), ("val", options.val), ("test", options.test)):
        image, mask = draw(options, name, count)
        if name == "train":
            generator = torch.Generator().manual_seed(derive_seed("shapes", options.seed, "label noise"))
            mask = corrupt(mask, len(CLASSES), options.label_noise, generator)
        splits[name] = Columns(image=image, mask=mask)
    return DataModule(splits, Task("segmentation", CLASSES, image=(3, options.size, options.size)))


def draw(options: ShapesOptions, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images `[N, 3, H, W]` and masks `[N, H, W]` of a split."""
    size = options.size
    uniform, noise = _random_numbers(options, split, count)
    number = FEWEST + (uniform[:, 0] * (MOST - FEWEST + 1)).long()
    texture = 0.5 + CONTRAST * (uniform[:, 1 : 1 + 3 * TEXTURE**2].reshape(-1, 3, TEXTURE, TEXTURE) - 0.5)
    objects = uniform[:, 1 + 3 * TEXTURE**2 :].reshape(-1, MOST, PER_SHAPE)
    image = F.interpolate(texture, (size, size), mode="bicubic", align_corners=False)
    mask = torch.zeros(count, size, size, dtype=torch.long)
    for i in range(MOST):
        kind = (objects[:, i, 0] * (len(CLASSES) - 1)).long() + 1
        inside = _inside(kind, objects[:, i, 1:5], size) & (i < number)[:, None, None]
        mask = torch.where(inside, kind[:, None, None], mask)
        image = torch.where(inside[:, None], objects[:, i, 5:, None, None], image)
    return (image + options.noise * noise).clamp(0, 1), mask


def _random_numbers(options: ShapesOptions, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Uniform numbers `[N, K]` and normal ones `[N, 3, H, W]`; a row depends on seed, split and index alone."""
    generator, uniform, normal = torch.Generator(), [], []
    for index in range(count):
        generator.manual_seed(derive_seed("shapes", options.seed, split, index))
        uniform.append(torch.rand(1 + 3 * TEXTURE**2 + MOST * PER_SHAPE, generator=generator))
        normal.append(torch.randn(3, options.size, options.size, generator=generator))
    return torch.stack(uniform), torch.stack(normal)


def _inside(kind: Tensor, place: Tensor, size: int) -> Tensor:
    """Which pixels `[N, H, W]` a shape covers, from its kind `[N]` and four uniform numbers `[N, 4]`: its centre
    (0.15 to 0.85 of the image), radius (0.15 to 0.3) and angle."""
    x, y, radius, turn = place[..., None, None].unbind(1)
    axis = (torch.arange(size) + 0.5) / size
    scale = 0.15 + 0.15 * radius
    dx, dy = (axis - 0.15 - 0.7 * x) / scale, (axis[:, None] - 0.15 - 0.7 * y) / scale
    sin, cos = torch.sin(2 * math.pi * turn), torch.cos(2 * math.pi * turn)
    u, v = cos * dx - sin * dy, sin * dx + cos * dy
    distance = u**2 + v**2
    forms = (distance < 1, (u.abs() < 1) & (v.abs() < 0.6), (v > -0.5) & (3**0.5 * u.abs() + v < 1),
             (distance < 1) & (distance > 0.35))  # fmt: skip
    return torch.stack(forms)[kind - 1, torch.arange(len(kind))]
