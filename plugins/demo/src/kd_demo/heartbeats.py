"""Generated clips of a beating ellipse: a dark chamber in a bright wall, seen through speckle as in ultrasound.

A clip's class is its rate, slow or fast, together with its wall, thin or thick. Place, size, shape, angle, phase, depth
of the beat and brightness vary from clip to clip and say nothing about the class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_demo.columns import Columns
from kd_demo.options import HeartbeatsOptions
from kdcore.data import DataModule, Task, derive_seed

CLASSES = ("slow, thin wall", "slow, thick wall", "fast, thin wall", "fast, thick wall")
PER_CLIP = 10
BEATS = (1.0, 2.0)
"""Beats in eight frames."""
WALL = (0.25, 0.4)
"""Thickness of the wall over the radius of the chamber."""


def heartbeats(options: HeartbeatsOptions) -> DataModule:
    """Splits `train`, `val` and `test` of `video` `[frames, 3, size, size]` in [0, 1], grey, and `label`."""
    counts = {"train": options.train, "val": options.val, "test": options.test}
    splits = {}
    for name, count in counts.items():
        video, label = draw(options, name, count)
        splits[name] = Columns(video=video.expand(-1, -1, 3, -1, -1), label=label)
    kind = "classification" if options.labelled else "unlabelled"
    return DataModule(splits, Task(kind, CLASSES, image=(3, options.size, options.size)))


def draw(options: HeartbeatsOptions, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` clips `[N, T, 1, H, W]` and labels `[N]` of a split; one depends on seed, split and index."""
    generator, label = torch.Generator(), torch.empty(count, dtype=torch.long)
    uniform = torch.empty(count, PER_CLIP)
    video = torch.empty(count, options.frames, options.size, options.size)
    for index in range(count):
        generator.manual_seed(derive_seed("heartbeats", options.seed, split, index))
        label[index] = torch.randint(len(CLASSES), (), generator=generator)
        uniform[index] = torch.rand(PER_CLIP, generator=generator)
        waves = torch.randn(options.frames, 2, options.size, options.size, generator=generator)
        video[index] = speckle(waves, options.noise)
    for rows in torch.arange(count).split(64):
        video[rows] = (video[rows] * hearts(label[rows], uniform[rows], options)).clamp(0, 1)
    return video[:, :, None], label


def speckle(waves: Tensor, strength: float) -> Tensor:
    """Factors `[T, H, W]` around 1 from normal numbers `[T, 2, H, W]`: the amplitude of two smoothed waves."""
    amplitude = F.avg_pool2d(waves, 3, 1, 1).norm(dim=1) * 3 / math.sqrt(math.pi / 2)
    return 1 + strength * (amplitude - 1)


def hearts(label: Tensor, uniform: Tensor, options: HeartbeatsOptions) -> Tensor:
    """Brightness `[N, T, H, W]` without speckle of clips of these classes `[N]`, from ten uniform numbers each."""
    x, y, radius, shape, angle, phase, depth, wall, tissue, chamber = uniform.T[..., None, None, None]
    rate, thickness = torch.tensor(BEATS)[label // 2], torch.tensor(WALL)[label % 2]
    beat = rate[:, None] * torch.arange(options.frames) / 8 + phase[:, 0, 0] / 4
    pulse = 1 - (0.35 + 0.15 * depth) * (0.5 + 0.5 * (2 * math.pi * beat[..., None, None]).sin())
    axis = (torch.arange(options.size) + 0.5) / options.size
    dx, dy = axis - 0.45 - 0.1 * x, axis[:, None] - 0.45 - 0.1 * y
    sin, cos = (math.pi * angle).sin(), (math.pi * angle).cos()
    distance = ((cos * dx + sin * dy) ** 2 + ((cos * dy - sin * dx) / (0.65 + 0.2 * shape)) ** 2).sqrt()
    inside, sharpness = distance / (0.26 + 0.06 * radius) / pulse, 2 / 3 * options.size
    edge = (1 - inside).mul(sharpness).sigmoid()
    outside = (1 + thickness[:, None, None, None] / pulse - inside).mul(sharpness).sigmoid()
    background = 0.3 + 0.06 * tissue
    bright = background + (0.8 + 0.06 * wall - background) * outside
    return bright + (0.07 + 0.04 * chamber - bright) * edge
