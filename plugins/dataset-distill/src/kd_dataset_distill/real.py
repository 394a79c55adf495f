"""The real images, the units that pixels are learned in, and batches of one class each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdcore.data import DataModule, Task, derive_seed
from kdcore.errors import DataError


def check_task(data: DataModule, method: str) -> None:
    """Refuse data whose samples do not have one class each, or that cannot be read at random.

    Raises:
        DataError: naming what is wrong.
    """
    if data.task.kind != "classification":
        raise DataError(
            f"{method} makes a data set class by class, so it needs a classification; this is a task of kind "
            f"{data.task.kind!r}"
        )
    if data.size("train") is None:
        raise DataError(f"{method} reads the training data at random, and this is a stream: set `streaming: false`")


def class_rows(data: DataModule, method: str, least: int = 1) -> list[Tensor]:
    """The positions of each class's samples in the training split, in label order.

    Args:
        data: of a classification.
        method: who asks, for the error.
        least: how many samples every class must have.

    Raises:
        DataError: if the task is another, or a class has too few samples.
    """
    check_task(data, method)
    labels, names = data.labels("train"), data.task.classes
    rows = [(labels == label).nonzero().flatten() for label in range(data.task.class_count)]
    few = [(names[i] if names else str(i), len(found)) for i, found in enumerate(rows) if len(found) < least]
    if few:
        name, count = few[0]
        if count == 0:
            raise DataError(
                f"the class {name!r} has no training samples, so {method} has nothing to go by; take it out of "
                "the task's classes or add samples"
            )
        raise DataError(
            f"the class {name!r} has {count} training samples, and method.ipc asks for {least} of them; lower "
            "method.ipc, or begin with noise (method.init=noise)"
        )
    return rows


@dataclass(frozen=True)
class RealImages:
    """All training images in memory.

    Args:
        images: `[N, C, H, W]` in [0, 1].
        rows: positions of each class's images, in label order.
        task: of the data.
    """

    images: Tensor
    rows: list[Tensor]
    task: Task

    @classmethod
    def read(cls, data: DataModule, method: str, least: int = 1) -> RealImages:
        """The training split. Raises `DataError` as `class_rows`, or if there are no images of one shape."""
        rows = class_rows(data, method, least)
        images = []
        for batch in data.eval_loader("train", 256):
            if not isinstance(batch.get("image"), Tensor):
                raise DataError(f"{method} learns images of one shape; the samples have: {', '.join(batch)}")
            images.append(batch["image"].float())
        if len({image.shape[1:] for image in images}) > 1:
            raise DataError(f"{method} learns images of one shape, and these differ: set `size:` of the data")
        return cls(torch.cat(images), rows, data.task)

    def pick(self, label: int, count: int, seed: int) -> Tensor:
        """Up to `count` random images of a class, none twice, `[B, C, H, W]`."""
        rows = self.rows[label]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        return self.images[rows[order[:count]]]


class PixelSpace(nn.Module):
    """The units that pixels are learned in: standard deviations from the mean of each channel, or whitened.

    A step of one size then means the same for all images, and noise of variance one has the spread of real images.

    Args:
        images: real ones `[N, C, H, W]`.
        zca: whiten by the covariance of all pixels, with `eps` added to its eigenvalues.
    """

    same_everywhere = True

    def __init__(self, images: Tensor, zca: bool = False, eps: float = 0.1) -> None:
        super().__init__()
        self.zca = zca
        if zca:
            points = images.flatten(1).double()
            mean = points.mean(0)
            values, vectors = torch.linalg.eigh((points - mean).T.cov())
            root = (values.clamp(min=0) + eps).sqrt()
            forth, back = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
            found = {"mean": mean, "forth": forth, "back": back}
        else:
            mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp(min=1e-6)
            found = {"mean": mean[:, None, None], "std": std[:, None, None]}
        for name, value in found.items():
            self.register_buffer(name, value.float())

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` as they are in this space."""
        if self.zca:
            return ((images.flatten(1) - self.mean) @ self.forth).view_as(images)
        return (images - self.mean) / self.std

    def inverse(self, pixels: Tensor) -> Tensor:
        """What lies in this space as images; they may leave [0, 1]."""
        if self.zca:
            return (pixels.flatten(1) @ self.back + self.mean).view_as(pixels)
        return pixels * self.std + self.mean


class ClassBatches(Dataset[dict[str, Any]]):
    """Sample `step * C + c` is the batch of class c in a step: up to `size` of its images, in `space`.

    Several processes so get whole classes each, and a step's images depend on the seed and the step alone.
    """

    def __init__(self, real: RealImages, size: int, seed: int) -> None:
        self.real, self.size, self.seed = real, size, seed

    def __len__(self) -> int:
        return len(self.real.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, label = divmod(index, len(self))
        return {"image": self.real.pick(label, self.size, derive_seed(self.seed, "real", index)), "label": label}


def by_class(batches: Dataset[Any], count: int, task: Task) -> DataModule:
    """A data module whose step is one sample of `batches` per class, in label order."""
    return DataModule(
        {"train": batches}, task, collate=collate_classes, orders={"train": lambda step: steps(step, count)}
    )


def steps(step: int, count: int) -> Sequence[int]:
    """The samples of a step: one for each of `count` classes."""
    return range(step * count, (step + 1) * count)


def collate_classes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Class batches side by side: lists, since classes may differ in size, and the labels `[C]`."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0] if key != "label"}
    return {**batch, "label": torch.tensor([sample["label"] for sample in samples])}
