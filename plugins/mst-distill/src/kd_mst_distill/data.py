"""Arrays of several modalities, paired by position: what the paper's preprocessed sets are."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kd_mst_distill.options import PairedArraysOptions
from kdcore.data import DataModule, Task, derive_seed
from kdcore.errors import DataError

SPLITS = ("train", "val", "test")


def paired_arrays(options: PairedArraysOptions) -> DataModule:
    """Splits of a fixed random permutation, with the entries that `arrays` names and `label`.

    Raises:
        DataError: if a file is missing or unreadable, or the arrays differ in length or do not take the shape.
    """
    folder = Path(options.path)
    label = torch.from_numpy(_joined(folder, options.label, "label").astype(np.int64)).flatten()
    entries = {key: _entry(folder, key, options) for key in options.arrays}
    for key, values in entries.items():
        if len(values) != len(label):
            raise DataError(f"data.arrays.{key}: {len(values)} samples, but data.label has {len(label)}")
    task = Task("classification", num_classes=int(label.max()) + 1)
    generator = torch.Generator().manual_seed(derive_seed("paired-arrays", options.split_seed))
    rows = torch.randperm(len(label), generator=generator)
    sizes = [round(share * len(rows)) for share in options.fractions[:2]]
    parts = torch.split(rows, [*sizes, len(rows) - sum(sizes)])
    splits = {name: Rows({**entries, "label": label}, part) for name, part in zip(SPLITS, parts, strict=True)}
    return DataModule(splits, task)


class Rows(Dataset[dict[str, Any]]):
    """Some rows of columns of one length."""

    def __init__(self, columns: dict[str, Tensor], rows: Tensor) -> None:
        self.columns, self.rows = columns, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[self.rows[index]] for key, values in self.columns.items()}

    def column(self, name: str) -> Tensor:
        """All values of one column. Raises `KeyError` if there is none."""
        return self.columns[name][self.rows]


def _entry(folder: Path, key: str, options: PairedArraysOptions) -> Tensor:
    values = torch.from_numpy(_joined(folder, options.arrays[key], f"arrays.{key}").astype(np.float32))
    if options.min_max:
        low, high = values.aminmax()
        values = (values - low) / (high - low).clamp(min=1e-12)
    if (shape := options.shapes.get(key)) is None:
        return values
    try:
        return values.reshape(len(values), *shape)
    except RuntimeError:
        raise DataError(f"data.shapes.{key}: samples of shape {list(values.shape[1:])} do not take {shape}") from None


def _joined(folder: Path, names: Sequence[str], key: str) -> NDArray[Any]:
    arrays = []
    for name in names:
        try:
            found = np.load(folder / name, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"data.{key}: {folder / name} cannot be read as a .npy file: {error}") from None
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
            raise DataError(f"data.{key}: {folder / name} holds no array of numbers, as a .npy file has")
        arrays.append(found)
    try:
        return np.concatenate(arrays)
    except ValueError as error:
        raise DataError(f"data.{key}: the files do not join: {error}") from None
