"""Handwritten digits: the 1,797 real 8x8 images that come with scikit-learn.

They are the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_demo.columns import Columns, corrupt
from kd_demo.options import DigitsOptions
from kdcore.data import DataModule, Task, derive_seed

BRIGHTEST = 16.0
DEGREES, PIXELS = 10.0, 1.0
PARITY = ("even", "odd")


def digits(options: DigitsOptions) -> DataModule:
    """Splits of `image` `[1, 8, 8]` in [0, 1] and `label`; with `parity` also `subclass`, the hidden digit."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / BRIGHTEST
    digit = torch.tensor(bunch.target)
    task = Task("classification", PARITY if options.parity else tuple(map(str, range(10))), image=(1, 8, 8))
    splits = {}
    for name, rows in _split(digit, options).items():
        label = digit[rows] % 2 if options.parity else digit[rows]
        if name == "train":
            label = corrupt(label, task.class_count, options.label_noise, _generator(options, "noise"))
        hidden = {"subclass": digit[rows]} if options.parity else {}
        splits[name] = Columns(image=images[rows], label=label, **hidden)
    return DataModule(splits, task, augment=jitter if options.augment else None)


def jitter(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with its image shifted by up to a pixel each way and rotated by up to 10 degrees, at random."""
    draw = 2 * torch.rand(3) - 1
    angle = math.radians(DEGREES) * float(draw[0])
    image: Tensor = sample["image"]
    shift = draw[1:] * PIXELS * 2 / image.shape[-1]
    theta = torch.tensor([[math.cos(angle), -math.sin(angle), shift[0]], [math.sin(angle), math.cos(angle), shift[1]]])
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return {**sample, "image": F.grid_sample(image[None], grid, align_corners=False)[0]}


def _split(digit: Tensor, options: DigitsOptions) -> dict[str, Tensor]:
    """Rows of each split, with the same share of every digit."""
    everything, size = torch.arange(len(digit)), len(digit)
    test, rest = _take(everything, digit, options.test_fraction, _generator(options, "test"))
    val, rest = _take(rest, digit, options.val_fraction * size / len(rest), _generator(options, "val"))
    train, _ = _take(rest, digit, options.train_fraction, _generator(options, "train"))
    return {"train": train, "val": val, "test": test}


def _take(rows: Tensor, digit: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows split in two: `fraction` of every digit, at least one of each, and what is left over."""
    taken = torch.zeros(len(rows), dtype=torch.bool)
    for value in range(10):
        mine = (digit[rows] == value).nonzero().flatten()
        order = torch.randperm(len(mine), generator=generator)
        taken[mine[order[: max(1, round(fraction * len(mine)))]]] = True
    return rows[taken], rows[~taken]


def _generator(options: DigitsOptions, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed("digits", options.split_seed, purpose))
