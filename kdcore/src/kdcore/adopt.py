"""Data from what Python users have: data sets, loaders, and what a batch looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate

from kdcore.data import DataModule, Task, derive_seed, seeded
from kdcore.errors import DataError
from kdcore.models import Batch


def as_data_module(data: Any, task: Task | None = None, keys: Sequence[str] = ("image", "label")) -> DataModule:
    """A data module from what Python users have: data sets or `DataLoader`s, one, a pair (train, val), or by name.

    A loader gives its data set, collate function and sampler; batches are then made by this project, so that a run
    can be resumed and spread over processes.

    Raises:
        DataError: if it is none of these, or a loader makes its batches by a batch sampler of its own.
    """
    if isinstance(data, DataModule):
        return data
    if isinstance(data, tuple):
        data = dict(zip(("train", "val", "test"), data, strict=False))
    if not isinstance(data, Mapping):
        data = {"train": data}
    splits, orders, collate = {}, {}, default_collate
    for name, split in data.items():
        if isinstance(split, DataLoader):
            if split.batch_sampler is None or type(split.batch_sampler).__name__ != "BatchSampler":
                raise DataError(f"the loader of {name!r} has a batch sampler of its own; pass its data set instead")
            collate = split.collate_fn
            if not isinstance(split.sampler, RandomSampler | SequentialSampler):
                orders[name] = _sampler_order(split.sampler)
            split = split.dataset
        if not hasattr(split, "__getitem__") and not hasattr(split, "__iter__"):
            raise DataError(f"{name!r} is a {type(split).__name__}; give a data set or a DataLoader")
        splits[name] = split
    module = DataModule(splits, task or Task("unlabelled"), collate=collate, keys=keys, orders=orders)
    if task is None:
        module.task = guess_task(module.sample("train"))
    return module


def _sampler_order(sampler: Any) -> Callable[[int], Sequence[int]]:
    def order(epoch: int) -> Sequence[int]:
        with seeded(derive_seed("sampler", epoch)):
            return list(sampler)

    return order


def guess_task(batch: Batch) -> Task:
    """The task that a batch looks like: by which target it holds, and of which type."""
    if isinstance(label := batch.get("label"), Tensor):
        if label.is_floating_point():
            return (
                Task("multilabel", num_classes=label.shape[1]) if label.ndim == 2 else Task("regression", num_classes=1)
            )
        return Task("classification")
    if "mask" in batch:
        return Task("segmentation")
    return Task("causal-lm") if "labels" in batch else Task("unlabelled")
