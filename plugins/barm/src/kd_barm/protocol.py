"""Which classes and which images belong to which step, and the labels that a step sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcore import DataModule, FitStage, Run
from kdcore.data import IGNORE, named_sample
from kdcore.errors import DataError, RecipeError

ROWS = 64  # masks that are looked at together


@dataclass(frozen=True)
class Steps:
    """The foreground classes of each step, as the data numbers them."""

    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, task: str, classes: int, class_order: Sequence[int] | None = None) -> Steps:
        """The steps of a task such as `15-1`, of data with so many classes, the background included.

        Raises:
            RecipeError: if they do not add up, or the order does not name each foreground class once.
        """
        first, more = map(int, task.split("-"))
        left = classes - 1 - first
        if left < 0 or left % more:
            nearest = 1 + first + max(left, 0) // more * more
            fitting = nearest if left < 0 else f"{nearest} or {nearest + more}"
            raise RecipeError(f"method.task: {task!r} stands for {fitting} classes (the background, {first}, and "
                              f"{more} in each further step), but the data has {classes}")  # fmt: skip
        order = list(range(1, classes)) if class_order is None else list(class_order)
        if sorted(order) != list(range(1, classes)):
            raise RecipeError(f"method.class_order: it must name each foreground class (1 to {classes - 1}) once, but "
                              f"names {order}")  # fmt: skip
        starts = range(first, classes - 1, more)
        return cls((tuple(order[:first]), *(tuple(order[i : i + more]) for i in starts)))

    @property
    def order(self) -> tuple[int, ...]:
        """All classes in the order of learning, the background first."""
        return (0, *(c for group in self.groups for c in group))

    def seen(self, step: int) -> int:
        """How many classes are known after a step, the background included; 1 before the first."""
        return 1 + sum(len(group) for group in self.groups[: step + 1]) if step >= 0 else 1

    def images(self, present: Tensor, step: int, protocol: str) -> list[int]:
        """The images of a step.

        Args:
            present: which class is in which image, bool `[N, C]`.
            step: counted from 0.
            protocol: `overlap` or `disjoint`.
        """
        chosen = present[:, list(self.groups[step])].any(1)
        if protocol == "disjoint":
            chosen &= ~present[:, list(self.order[self.seen(step) :])].any(1)
        return [int(i) for i in chosen.nonzero().flatten()]

    def numbers(self, step: int, all_seen: bool) -> Tensor:
        """What a class of the data is called in a step, `[C]`: its place in the order of learning, or 0 if it is none
        of the step's classes (or, with `all_seen`, of those up to it)."""
        table = torch.zeros(len(self.order), dtype=torch.long)
        for place in range(1 if all_seen else self.seen(step - 1), self.seen(step)):
            table[self.order[place]] = place
        return table

    def data(self, data: DataModule, present: Tensor, step: int, protocol: str, on: Sequence[str]) -> DataModule:
        """What a step trains on, and is measured on: its images with its labels, and the splits `on` as a whole with
        all labels up to it.

        Raises:
            DataError: if no image has a class of the step.
        """
        images = self.images(present, step, protocol)
        names = data.task.classes or tuple(map(str, range(len(self.order))))
        if not images:
            wanted = ", ".join(names[c] for c in self.groups[step])
            raise DataError(f"step {step} has nothing to learn from: no image of split 'train' has one of its classes "
                            f"({wanted}) under the protocol {protocol!r}")  # fmt: skip
        splits = {"train": Relabelled(data["train"], self.numbers(step, False), data.keys, images)}
        for name in on:
            splits[name] = Relabelled(data[name], self.numbers(step, True), data.keys)
        known = self.order[: self.seen(step)]
        task = replace(data.task, classes=tuple(names[c] for c in known), num_classes=len(known))
        return DataModule(splits, task, collate=data.collate, augment=data.augment)


class Relabelled(Dataset[dict[str, Any]]):
    """Samples of a split, some or all, with other numbers for the classes; ignored pixels stay.

    Args:
        split: map-style.
        numbers: class -> number, `[C]`.
        keys: names of the entries of samples that are tuples.
        images: which samples; default: all.
    """

    def __init__(self, split: Any, numbers: Tensor, keys: Sequence[str], images: Sequence[int] | None = None) -> None:
        self.split, self.numbers, self.keys = split, numbers, keys
        self.images = range(len(split)) if images is None else images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = named_sample(self.split[self.images[index]], self.keys)
        mask = check_mask(sample, len(self.numbers), self.images[index])
        ignored = mask == IGNORE
        return {**sample, "mask": self.numbers[mask.masked_fill(ignored, 0)].masked_fill(ignored, IGNORE)}


class ClassesPresent(FitStage):
    """Looks through the training split for the classes of each image: `present`, bool `[N, C]`."""

    name = "classes"

    def fit(self, run: Run) -> dict[str, Tensor]:
        """Read every mask once. Raises `DataError` as `check_mask`, and for a stream."""
        if run.data.size("train") is None:
            raise DataError("barm chooses the images of each step by their labels, and the split 'train' is a stream "
                            "that cannot be looked through before: use data with a length")  # fmt: skip
        looked = _Looked(run.data["train"], run.data.task.class_count, run.data.keys)
        workers = run.recipe.train.workers
        rows = list(DataLoader(looked, batch_size=ROWS, num_workers=workers, generator=torch.Generator()))
        return {"present": torch.cat(rows)}


class _Looked(Dataset[Tensor]):
    """The classes in each sample of a split, bool `[C]`."""

    def __init__(self, split: Any, classes: int, keys: Sequence[str]) -> None:
        self.split, self.classes, self.keys = split, classes, keys

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Tensor:
        mask = check_mask(named_sample(self.split[index], self.keys), self.classes, index)
        return torch.bincount(mask[mask != IGNORE].flatten(), minlength=self.classes) > 0


def check_mask(sample: Mapping[str, Any], classes: int, index: int) -> Tensor:
    """The mask of a sample, `[H, W]`.

    Raises:
        DataError: if there is none, its size is not the image's, or it holds a class that there is not.
    """
    if "mask" not in sample:
        raise DataError(
            f"barm needs a class for each pixel, but sample {index} has no `mask`; it has: {', '.join(sample)}"
        )
    mask = torch.as_tensor(sample["mask"]).long()
    image = sample.get("image")
    if mask.ndim != 2 or (isinstance(image, Tensor) and image.shape[-2:] != mask.shape):
        size = list(image.shape) if isinstance(image, Tensor) else "of no size"
        raise DataError(f"sample {index}: the mask {list(mask.shape)} must be [H, W] as its image {size}")
    wrong = (mask >= classes) | ((mask < 0) & (mask != IGNORE))
    if wrong.any():
        raise DataError(f"sample {index}: the mask holds {int(mask[wrong][0])}, but the {classes} classes are 0 to "
                        f"{classes - 1} ({IGNORE} is ignored)")  # fmt: skip
    return mask
