"""Data: splits, the task they pose, and loaders whose order depends on the seed and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    default_collate,
)

from kdcore.errors import DataError, did_you_mean
from kdcore.models import Batch, Labels, map_tensors

IGNORE = -100
"""The target value of positions that do not count, in every batch of every task."""

BATCH_KEYS: dict[str, str] = {
    "image": "float [B, C, H, W] in [0, 1]; each model normalises its own input",
    "label": "int [B], or float [B, C] (multilabel) or [B] (regression)",
    "mask": "int [B, H, W]: the class of each pixel",
    "input_ids": "int [B, T]",
    "attention_mask": "int [B, T]: 1 where there is a token",
    "token_type_ids": "int [B, T]",
    "position_ids": "int [B, T]: given for rows that hold several texts; 0 where one begins, and then no mask",
    "labels": "int [B, T], aligned with the logits: position t holds what logits[:, t] should predict",
    "decoder_input_ids": "int [B, T]",
    "ranked_input_ids": "int [B, K, T]: K answers to a prompt with the prompt, the best one first",
    "ranked_attention_mask": "int [B, K, T]",
    "ranked_labels": "int [B, K, T], aligned like `labels`",
    "text": "list of B strings",
    "prompt": "list of B strings: what is to be answered",
    "completion": "list of B strings: the answer of the data",
    "video": "float [B, T, C, H, W] in [0, 1]",
    "audio": "float [B, T]",
    "imu": "float [B, T, C]",
    "series": "float [B, T, C]",
    "graph": "a graph object of the provider",
    "latents": "float [B, C, H, W]: images as a diffusion model's encoder gives them",
    "prompt_embeds": "float [B, T, D]: texts as its text encoders give them",
    "subclass": "int [B]: hidden subclasses, for analysis only",
    "index": "int [B]: the position of each sample in its split; always there",
}
"""The conventional keys of a batch. Ignored targets are `IGNORE` in all of them."""

TARGET_KEYS = ("label", "mask", "labels")

TaskKind = Literal["classification", "multilabel", "segmentation", "token-classification", "causal-lm", "masked-lm",
                   "seq2seq", "regression", "unlabelled"]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What the data asks of a model.

    Args:
        kind: decides the default metrics and the heads of models.
        classes: class names in label order; may be empty where only their number is known.
        num_classes: number of classes, or the size of the vocabulary. Default: as many as `classes`.
        image: (channels, height, width) of the images, where they are all alike.
        tokenizer: the tokenizer behind `input_ids`, where there is one; anything with `decode(ids)`.
        vocabulary: its fingerprint.
    """

    kind: TaskKind
    classes: tuple[str, ...] = ()
    num_classes: int | None = None
    image: tuple[int, int, int] | None = None
    tokenizer: Any = field(default=None, compare=False, repr=False)
    vocabulary: str | None = None

    def __post_init__(self) -> None:
        if self.num_classes is None and self.classes:
            object.__setattr__(self, "num_classes", len(self.classes))

    @property
    def labels(self) -> Labels:
        """What the logits of a model for this task mean."""
        return Labels(self.num_classes, self.classes or None, self.vocabulary)

    @property
    def class_count(self) -> int:
        """The number of classes, for certain. Raises `DataError` where the task has none."""
        if self.num_classes is None:
            raise DataError(f"the data poses a task of kind {self.kind!r} without a number of classes")
        return self.num_classes


class DataModule:
    """Splits, how their samples become batches, and the task.

    Args:
        splits: map-style or iterable data sets by name; `train` is trained on. A sample is a dict, or a tuple whose
            entries are named by `keys`.
        task: what is asked of a model.
        collate: samples -> batch. Default: torch's.
        augment: `sample -> sample`, applied to the training split only. It may draw from torch's, Python's and NumPy's
            global generators: they are seeded by (seed, epoch, index) around it.
        keys: names of the entries of tuple samples.
        orders: for a split, `epoch -> indices`, where not every sample is to come once in random order.
    """

    def __init__(
        self,
        splits: Mapping[str, Any],
        task: Task,
        *,
        collate: Callable[[list[Any]], Batch] = default_collate,
        augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        keys: Sequence[str] = ("image", "label"),
        orders: Mapping[str, Callable[[int], Sequence[int]]] | None = None,
    ) -> None:
        self.splits = dict(splits)
        self.task = task
        self.collate = collate
        self.augment = augment
        self.keys = tuple(keys)
        self.orders = dict(orders or {})
        for name, split in self.splits.items():
            if isinstance(split, Sized) and len(split) == 0:
                raise DataError(f"the split {name!r} is empty")

    def __getitem__(self, name: str) -> Any:
        """The data set of a split. Raises `DataError` where there is none of this name."""
        if name not in self.splits:
            raise DataError(f"the data has no split {name!r}; {did_you_mean(name, self.splits, 'splits')}")
        return self.splits[name]

    def __contains__(self, name: str) -> bool:
        return name in self.splits

    def size(self, name: str) -> int | None:
        """Samples in a split; `None` for a stream."""
        split = self[name]
        return None if isinstance(split, IterableDataset) or not hasattr(split, "__len__") else len(split)

    def labels(self, name: str) -> Tensor:
        """The `label` of every sample of a split, `[N]`; read from the column by itself where the data set can give
        one (`column(name)`), or else from all samples.

        Raises:
            DataError: for a stream, or samples without labels.
        """
        split, size = self[name], self.size(name)
        if size is None:
            raise DataError(f"the split {name!r} is a stream: its labels are not known beforehand")
        try:
            read = getattr(split, "column", None)
            found = read("label") if read else [named_sample(split[i], self.keys)["label"] for i in range(size)]
        except KeyError:
            raise DataError(f"the samples of split {name!r} have no label") from None
        return found if isinstance(found, Tensor) else torch.stack([torch.as_tensor(value) for value in found])

    def steps_per_epoch(self, name: str, batch_size: int) -> int | None:
        """Whole batches in a split, at least one; `None` for a stream. What is left over waits for another epoch."""
        size = self.size(name)
        return None if size is None else max(1, size // batch_size)

    def share_sizes(self, name: str, batch_size: int, accumulation: int, world: int) -> list[tuple[int, ...]]:
        """The samples that each process holds of each micro-batch of a training step: they differ where a split has
        less than a batch, or an odd one."""
        size, parts = min(batch_size, self.size(name) or batch_size), accumulation * world
        sizes = [len(_share(range(size), part, parts)) for part in range(parts)]
        return [tuple(sizes[i : i + world]) for i in range(0, parts, world)]

    def sample(self, name: str, size: int = 2) -> Batch:
        """The first samples of a split as a batch: for shapes, checks and measurements."""
        return next(iter(self.eval_loader(name, size)))

    def eval_loader(
        self, name: str, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> DataLoader[Any]:
        """Every sample of a split once, in order, without augmentation; this process's share of them."""
        split = self[name]
        if self.size(name) is None:
            stream = _Stream(self, split, batch_size * world, [(rank, world)], seed=0, augment=None, last=1)
            return DataLoader(stream, batch_size=None, generator=torch.Generator())
        indices = [(0, i) for i in range(len(split))][rank::world]
        keyed = _Keyed(split, self.keys, seed=0, augment=None)
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        return DataLoader(keyed, batch_sampler=cast(Any, batches), collate_fn=self._collate(name),
                          num_workers=workers, generator=torch.Generator())  # fmt: skip

    def train_loader(
        self, name: str, batch_size: int, *, seed: int, start: int, stop: int, accumulation: int = 1,
        rank: int = 0, world: int = 1, workers: int = 0, augment: bool = True, pin_memory: bool = False,
    ) -> DataLoader[Any]:  # fmt: skip
        """The micro-batches of steps `start` to `stop`: `accumulation` of them per step, this process's share of each.

        Step s is the same batch of the same augmented samples whatever came before it, and the shares of all
        processes and micro-batches together are the batch that one process would see.
        """
        split = self[name]
        shares = [(micro * world + rank, world * accumulation) for micro in range(accumulation)]
        transform = self.augment if augment else None
        if self.size(name) is None:
            stream = _Stream(self, split, batch_size, shares, seed, transform, start=start, last=None)
            return DataLoader(stream, batch_size=None, generator=torch.Generator())
        if len(split) < len(shares) * world:
            raise DataError(
                f"the split {name!r} has {len(split)} samples: too few for {len(shares) * world} micro-batches"
            )
        order = self.orders.get(name) or (lambda epoch: _permutation(len(split), derive_seed(seed, name, epoch)))
        return DataLoader(
            _Keyed(split, self.keys, seed, transform),
            batch_sampler=_Steps(len(split), batch_size, order, shares, start, stop),
            collate_fn=self._collate(name),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # of its own: a loader draws a seed when it is iterated
        )

    def _collate(self, name: str) -> Callable[[list[Any]], Batch]:
        return _Collate(self.collate, name, self.task.num_classes)


@dataclass
class _Collate:
    """Collates, and says what is wrong with samples that cannot be. (A class, so that worker processes can have it.)"""

    collate: Callable[[list[Any]], Batch]
    split: str
    classes: int | None

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        index = torch.tensor([sample.pop("index") for sample in samples])
        try:
            batch = self.collate(samples)
        except (TypeError, KeyError, RuntimeError) as error:
            raise DataError(f"samples of split {self.split!r} do not make a batch: {error}") from error
        for key in TARGET_KEYS:
            if self.classes and isinstance(target := batch.get(key), Tensor) and not target.is_floating_point():
                self._check(key, target, index, self.classes)
        return {**batch, "index": index}

    def _check(self, key: str, target: Tensor, index: Tensor, classes: int) -> None:
        """Refuse classes that there are not: a loss would fail on them, or on an accelerator end the process."""
        low, high = target.aminmax()
        if low >= 0 and high < classes:
            return
        wrong = (target >= classes) | ((target < 0) & (target != IGNORE))
        if wrong.any():
            rows = wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong
            where = index[rows] if len(rows) == len(index) else index  # a row of several texts
            raise DataError(f"split {self.split!r}, sample {int(where[0])}: {key} {int(target[wrong][0])}, but the "
                            f"{classes} classes are 0 to {classes - 1} ({IGNORE} is ignored)")  # fmt: skip


class _Keyed(Dataset[dict[str, Any]]):
    """Samples by (epoch, index), augmented under generators seeded by (seed, epoch, index)."""

    def __init__(self, split: Any, keys: tuple[str, ...], seed: int, augment: Callable[[Any], Any] | None) -> None:
        self.split, self.keys, self.seed, self.augment = split, keys, seed, augment

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        return self.finish(self.split[index], epoch, index)

    def finish(self, sample: Any, epoch: int, index: int) -> dict[str, Any]:
        sample = named_sample(sample, self.keys)
        if self.augment is not None:
            with seeded(derive_seed(self.seed, epoch, index)):
                sample = self.augment(sample)
        return {**sample, "index": index}


class _Steps(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) pairs of each micro-batch from one step to another."""

    def __init__(self, size: int, batch_size: int, order: Callable[[int], Sequence[int]],
                 shares: list[tuple[int, int]], start: int, stop: int) -> None:  # fmt: skip
        self.per_epoch = max(1, size // batch_size)
        self.batch_size, self.order, self.shares, self.start, self.stop = batch_size, order, shares, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, indices = -1, cast(Sequence[int], [])
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.per_epoch)
            if epoch != current:
                current, indices = epoch, self.order(epoch)
            batch = indices[position * self.batch_size : (position + 1) * self.batch_size]
            for part, parts in self.shares:
                yield [(epoch, i) for i in _share(batch, part, parts)]

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.shares)


class _Stream(IterableDataset[Batch]):
    """Batches of an iterable data set, epoch after epoch; the samples before `start` are read and passed over."""

    def __init__(self, data: DataModule, split: Any, batch_size: int, shares: list[tuple[int, int]], seed: int,
                 augment: Callable[[Any], Any] | None, start: int = 0, last: int | None = None) -> None:  # fmt: skip
        self.keyed = _Keyed(split, data.keys, seed, augment)
        self.collate = _Collate(data.collate, "stream", data.task.num_classes)
        self.batch_size, self.shares, self.start, self.last = batch_size, shares, start, last

    def __iter__(self) -> Iterator[Batch]:
        step, epoch = 0, 0
        while self.last is None or epoch < self.last:
            if hasattr(self.keyed.split, "set_epoch"):
                self.keyed.split.set_epoch(epoch)
            group: list[tuple[int, Any]] = []
            for group in _groups(self.keyed.split, self.batch_size):
                if len(group) < self.batch_size and self.last is None:
                    continue
                if step >= self.start:
                    yield from self._batches(group, epoch)
                step += 1
            if not group or step == 0:
                raise DataError("the stream holds less than one batch of samples")
            epoch += 1

    def _batches(self, group: list[tuple[int, Any]], epoch: int) -> Iterator[Batch]:
        for part, parts in self.shares:
            if share := _share(group, part, parts):
                yield self.collate([self.keyed.finish(sample, epoch, i) for i, sample in share])


def named_sample(sample: Any, keys: Sequence[str]) -> dict[str, Any]:
    """A sample by names: a mapping as it is, a tuple with these names for its entries."""
    return dict(sample) if isinstance(sample, Mapping) else dict(zip(keys, sample, strict=False))


def _groups(split: Any, size: int) -> Iterator[list[tuple[int, Any]]]:
    group: list[tuple[int, Any]] = []
    for pair in enumerate(split):
        group.append(pair)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _share(items: Sequence[Any], part: int, parts: int) -> Sequence[Any]:
    """The part-th of `parts` contiguous pieces, as equal as can be."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


def _permutation(size: int, seed: int) -> list[int]:
    return cast(list[int], torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist())


def derive_seed(*parts: object) -> int:
    """A seed that depends on all the parts and on nothing else, in `[0, 2**63)`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits over every token and its id (`tokenizer.get_vocab()`)."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's (CPU), Python's and NumPy's global generators seeded inside, and as they were afterwards."""
    import numpy as np

    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device, and whatever else knows how to go there (a graph, say); copies from
    pinned memory do not block."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if not isinstance(batch, Tensor) and hasattr(batch, "to"):
        return batch.to(device)
    return map_tensors(batch, lambda t: t if t.device == device else t.to(device, non_blocking=True))
