"""Labelled and unlabelled images: which are which, and the data that a stage draws them from together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kd_mgd_sss.functional import box_masks
from kd_mgd_sss.options import CutMixOptions, MGDSSSOptions
from kdcore import DataModule
from kdcore.data import derive_seed, named_sample
from kdcore.errors import DataError

LABELLED, FIRST, SECOND = "labelled", "unlabelled-0", "unlabelled-1"
"""The streams: labelled images, and two orders of the unlabelled ones. An image of the second has the key `cutmix`: the
mask `[1, H, W]` that pastes parts of it into an image of the first."""

Sample = dict[str, Any]


def streams(data: DataModule, options: MGDSSSOptions, seed: int) -> tuple[DataModule, tuple[str, ...]]:
    """The data with the three streams beside its splits, and their names, those of more images first: an epoch is one
    of those.

    Masks are drawn where images are augmented, from numbers that depend on seed, epoch and image: they are the same on
    any number of processes and in any micro-batches.

    Raises:
        DataError: if no image is labelled or all are, a list cannot be read, the data is a stream, or samples have no
            image or mask.
    """
    train = data["train"]
    labelled: Sequence[int]
    unlabelled: Sequence[int]
    if options.unlabelled_split is not None:
        others = data[options.unlabelled_split]
        labelled = range(_size(data, "train"))
        unlabelled = range(_size(data, options.unlabelled_split))
    else:
        others = train
        labelled, unlabelled = divide(_size(data, "train"), options, seed)
    made = copy.copy(data)
    made.splits = {
        **data.splits,
        LABELLED: Picked(train, labelled, data.keys),
        FIRST: Picked(others, unlabelled, data.keys),
        SECOND: Picked(others, unlabelled, data.keys, pasted=True),
    }
    for name, key in ((LABELLED, "image"), (LABELLED, "mask"), (FIRST, "image")):
        if key not in (found := made.splits[name][0]):
            raise DataError(f"the {name.partition('-')[0]} samples have no {key!r}, only: {', '.join(found)}")
    made.augment = Mixing(data.augment, options.cutmix)
    more = len(labelled) > len(unlabelled)
    return made, (LABELLED, FIRST, SECOND) if more else (FIRST, SECOND, LABELLED)


def divide(size: int, options: MGDSSSOptions, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """The positions of the labelled and of the unlabelled images, by lists in files or a fraction drawn at random.

    Raises:
        DataError: if one of the two is empty, or a list cannot be read.
    """
    if options.labelled_list is not None:
        labelled = read_positions(options.labelled_list, size)
        if options.unlabelled_list is not None:
            return labelled, read_positions(options.unlabelled_list, size)
    else:
        fraction = 1 / 8 if options.labelled_fraction is None else options.labelled_fraction
        shown = Fraction(fraction).limit_denominator(100_000)
        if fraction * size < 1:
            raise DataError(f"labelled_fraction: {shown} of the {size} images of train leaves no labelled image; take "
                            f"1/{size} or more")  # fmt: skip
        order = torch.randperm(size, generator=torch.Generator().manual_seed(derive_seed(seed, LABELLED))).tolist()
        labelled = sorted(order[: math.ceil(fraction * size - 1e-9)])
    chosen = set(labelled)
    rest = [i for i in range(size) if i not in chosen]
    if not rest:
        raise DataError(f"all {size} images of train are labelled, so that there is no unlabelled image: label fewer "
                        "of them, or name the unlabelled images by unlabelled_split or unlabelled_list")  # fmt: skip
    return labelled, rest


def read_positions(file: str, size: int) -> list[int]:
    """The positions in a text file, one a line; what follows a `#` does not count.

    Raises:
        DataError: naming file and line.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {file} cannot be read: {error}") from error
    found: dict[int, None] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not text.isascii() or not text.isdigit() or int(text) >= size or int(text) in found:
            raise DataError(f"{file}, line {number}: {text[:40]!r} is not the position of an image of train, from 0 to "
                            f"{size - 1}, that the list has not named before")  # fmt: skip
        found[int(text)] = None
    if not found:
        raise DataError(f"the list {file} names no image")
    return list(found)


class Picked(Dataset[Sample]):
    """Some samples of a split, as dicts.

    Args:
        split: the split.
        positions: of the samples, in their order here.
        keys: names of the entries of tuple samples.
        pasted: whether the images are pasted into others; until they are augmented, their `cutmix` is a single 0.
    """

    def __init__(self, split: Any, positions: Sequence[int], keys: Sequence[str], pasted: bool = False) -> None:
        self.split, self.positions, self.keys, self.pasted = split, positions, keys, pasted

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        named = named_sample(self.split[self.positions[index]], self.keys)
        return {**named, "cutmix": torch.zeros(1, 1, 1)} if self.pasted else named


@dataclass(frozen=True)
class Mixing:
    """The data's own augmentation, and then the mask of an image that is pasted. (A class, so that worker processes can
    have it.)"""

    augment: Callable[[Sample], Sample] | None
    boxes: CutMixOptions

    def __call__(self, sample: Sample) -> Sample:
        """The sample, changed at random by the global generators."""
        plain = {key: value for key, value in sample.items() if key != "cutmix"}
        plain = self.augment(plain) if self.augment else plain
        if "cutmix" not in sample:
            return plain
        height, width = plain["image"].shape[-2:]
        rng = np.random.RandomState(np.random.randint(2**31))  # seeded by (seed, epoch, index), as all augmentation
        mask = box_masks(rng, 1, (height, width), self.boxes.n_boxes, self.boxes.prop)
        return {**plain, "cutmix": mask[0]}


def _size(data: DataModule, split: str) -> int:
    size = data.size(split)
    if size is None:
        raise DataError(f"the split {split!r} is a stream: mgd-sss picks images by their position and needs to know "
                        "how many there are")  # fmt: skip
    return size
