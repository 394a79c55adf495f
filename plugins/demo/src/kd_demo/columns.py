"""What the embedded data sets share: samples held as columns in memory, and label noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Columns(Dataset[dict[str, Any]]):
    """A map-style data set of columns of one length: sample i is entry i of each."""

    def __init__(self, **columns: Sequence[Any] | Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}

    def column(self, name: str) -> Sequence[Any] | Tensor:
        """All values of one column. Raises `KeyError` if there is none."""
        return self.columns[name]


def corrupt(labels: Tensor, classes: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Labels of any shape, where each is replaced with probability `fraction` by one of the other classes."""
    chosen = torch.rand(labels.shape, generator=generator) < fraction
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return torch.where(chosen, (labels + shift) % classes, labels)
